"""The Triton kernels on a real GPU: parity, repeatability, capture, and cost that follows the position."""

import pytest
import torch
from catalog import CATALOG, SMALL_CASES
from catalog_parity import check
from minillm_kernels.decode_attention import decode_attention

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device; this machine has none", allow_module_level=True)

MODEL = [(name, case) for name, entry in CATALOG.items() for case in entry.model_cases]


@pytest.fixture(autouse=True)
def poisoned_outputs():
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS wants an environment variable for more
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "case", "dtype"), SMALL_CASES)
def test_parity(name, case, dtype):
    check(name, CATALOG[name].small_cases[case], dtype, "cuda")


@pytest.mark.parametrize(("name", "case"), MODEL)
def test_parity_at_model_sizes(name, case):
    entry = CATALOG[name]
    dtype = torch.bfloat16 if "bfloat16" in entry.dtypes else torch.float32
    check(name, entry.model_cases[case], dtype, "cuda")


def model_inputs(case: str) -> dict:
    entry, device = CATALOG["decode_attention"], torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    return entry.make_inputs(entry.model_cases[case], torch.bfloat16, device, generator)


def test_decode_attention_repeats_bitwise():
    inputs = model_inputs("Llama-3-8B, 8 rows at 8192")
    first = decode_attention(**inputs)
    for _ in range(100):
        assert torch.equal(decode_attention(**inputs), first)


def test_a_row_is_the_same_alone():
    inputs = model_inputs("Llama-3-8B, 8 rows at 8192")
    together = decode_attention(**inputs)
    for row in range(8):
        alone = {key: inputs[key][row : row + 1] for key in ("q", "k", "v", "cache_position")}
        assert torch.equal(decode_attention(**inputs | alone)[0], together[row])


def test_captured_graph_follows_the_positions():
    """One capture serves every position: the grid is fixed, the work is not."""
    inputs = model_inputs("Llama-3-8B, 1 row at 2048")
    decode_attention(**inputs)  # compile before capturing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_attention(**inputs)
    for position in (0, 1, 127, 128, 1000, 2047):
        inputs["cache_position"].fill_(position)
        graph.replay()
        assert torch.equal(captured, decode_attention(**inputs))


def test_cost_follows_the_position_not_the_capacity():
    """8 rows of a cache of 16384 slots: 512 positions hold 3 % of the bytes of 16384."""
    shape = (8, 8, 16384, 128)
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    q = torch.randn(8, 32, 1, 128, dtype=torch.bfloat16, device="cuda")
    position = torch.zeros(8, 1, dtype=torch.int64, device="cuda")

    def milliseconds(at: int) -> float:
        position.fill_(at)
        decode_attention(q, k, v, position, 0.1)
        graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.graph(graph):
            for _ in range(20):
                decode_attention(q, k, v, position, 0.1)
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    assert milliseconds(511) < milliseconds(16383) / 4
