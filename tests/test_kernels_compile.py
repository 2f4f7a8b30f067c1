"""The Triton kernels without a GPU: compiled for three chips, and as nodes of one graph.

Every kernel at every row of the launch table is compiled here, at the first model case that reaches it;
`tools/crosscompile.py` compiles every case (several minutes).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from catalog import CATALOG
from minillm_kernels.decode_attention import decode_attention
from minillm_kernels.flash_attention import flash_attention
from minillm_kernels.gated_mlp import gated_mlp
from minillm_kernels.int8_linear import int8_linear
from minillm_kernels.norm import add_rms_norm, rms_norm
from minillm_kernels.rope import rope_and_cache_write
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def first_launches():
    """(specialization, chip) -> for every kernel, row of the launch table and chip, the first that uses it."""
    pytest.importorskip("triton", reason="Triton is not available for this platform")
    import crosscompile

    found, rows = {}, set()
    for entry in CATALOG.values():
        for case in entry.model_cases.values():
            for dtype in crosscompile.DTYPES.values():
                for chip in crosscompile.CHIPS:
                    for launch in crosscompile.recorded_launches(entry, case, dtype, chip):
                        found.setdefault((launch.name, id(launch.row), chip), launch)
                        rows.add(id(launch.row))
    return crosscompile, found, rows


def test_every_row_of_the_launch_table_serves_a_model_case(first_launches):
    crosscompile, _, used = first_launches
    for kernel, rows in crosscompile.launch.TABLE.items():
        for index, row in enumerate(rows):
            assert id(row) in used, f"row {index} of TABLE[{kernel!r}] serves no model case of the catalog"


@pytest.mark.parametrize("chip", (80, 90, 100))
def test_kernels_compile_without_spills(first_launches, chip):
    crosscompile, found, _ = first_launches
    kernels = set()
    for (name, _, its_chip), launch in found.items():
        if its_chip == chip:
            kernels.add(name)
            problems = crosscompile.problems(launch, crosscompile.compile_for(launch, chip), chip)
            assert not problems, f"{name}, {crosscompile.describe(launch)}: {problems}"
    assert kernels == crosscompile.entry_points()


def test_spills_are_noticed(first_launches):
    """The check above can fail: a tile far too large for its warps does spill."""
    crosscompile, _, _ = first_launches
    entry = CATALOG["decode_attention"]
    huge = crosscompile.launch.Launch({"BLOCK_M": 64, "BLOCK_N": 64}, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(crosscompile.launch.TABLE, "decode_attention", (huge,))
        (launch,) = crosscompile.recorded_launches(
            entry, entry.model_cases["Llama-3-8B, chunk of 256 at 2048"], torch.bfloat16, 80
        )
    assert "SPILLS" in crosscompile.problems(launch, crosscompile.compile_for(launch, 80), 80)[0]


@pytest.mark.parametrize("name", [name for name, entry in CATALOG.items() if entry.is_node])
def test_opcheck(name):
    """Schema, fake implementation and tracing agree with what the op does."""
    entry = CATALOG[name]
    case = next(iter(entry.small_cases.values()))
    inputs = entry.make_inputs(case, torch.float32, torch.device("cpu"), GENERATOR)
    torch.library.opcheck(getattr(torch.ops.minillm, name).default, (), inputs)


def one_layer(x, residual, norm, qkv, qkv_scale, gate_up, gate_up_scale, cos, sin, k_cache, v_cache, position):
    """The ops chained as a decoder layer chains them: B = 2 rows, T = 1, H = 4, KV = 2, D = 16, d = 64."""
    h, residual = add_rms_norm(x, residual, norm, 1e-6, 0.0, False)
    q, k, v = int8_linear(h, qkv, qkv_scale).view(2, 1, 8, 16).split((4, 2, 2), dim=2)
    q = rope_and_cache_write(q, k, v, cos, sin, k_cache, v_cache, position)  # [B, H, T, D]
    keys, values = k_cache.narrow(2, 0, 11), v_cache.narrow(2, 0, 11)  # [...] on a fake CUDA tensor wants a GPU
    h = decode_attention(q, keys, values, position, 0.25, window=8)
    h = rms_norm(h.transpose(1, 2).reshape(2, 1, 64), norm, 1e-6, 1.0, True)
    return flash_attention(q, q, q, 0.25), gated_mlp(h, gate_up, "silu", gate_up_scale) + residual.narrow(2, 0, 32)


def layer_inputs(device) -> list:
    qkv = torch.randint(-9, 9, (128, 64), dtype=torch.int8, device=device)
    gate_up = torch.randint(-9, 9, (64, 64), dtype=torch.int8, device=device)
    floats = [(2, 1, 64), (2, 1, 64), (64,), (128,), (64,), (2, 1, 8), (2, 1, 8), (2, 2, 12, 16), (2, 2, 12, 16)]
    x, residual, norm, qkv_scale, gate_up_scale, *rest = (torch.randn(shape, device=device) for shape in floats)
    position = torch.zeros(2, 1, dtype=torch.int64, device=device)
    return [x, residual, norm, qkv, qkv_scale, gate_up, gate_up_scale, *rest, position]


def counting_backend(graphs: list):
    def compile_graph(graph, example_inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    return compile_graph


@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_one_graph(device):
    """fullgraph=True raises at a graph break; on CUDA the tensors are fake, and so is the run."""
    graphs = []
    compiled = torch.compile(one_layer, fullgraph=True, backend=counting_backend(graphs))
    if device == "cpu":
        inputs = layer_inputs(device)
        expected = one_layer(*(tensor.clone() for tensor in inputs))
        torch.testing.assert_close(compiled(*inputs), expected)
    else:
        with FakeTensorMode():
            attended, result = compiled(*layer_inputs(device))
        assert attended.device.type == result.device.type == "cuda"
    (graph,) = graphs
    assert sum(getattr(target, "namespace", "") == "minillm" for target in graph) == 7


def test_compiled_cache_write_does_not_copy_the_cache():
    inputs = layer_inputs("cpu")
    expected = [tensor.clone() for tensor in inputs]
    one_layer(*expected)
    address = inputs[9].data_ptr()
    torch.compile(one_layer, fullgraph=True)(*inputs)
    assert inputs[9].data_ptr() == address
    torch.testing.assert_close(inputs[9][:, :, :-1], expected[9][:, :, :-1])


def test_arguments_that_do_not_fit_are_refused():
    q, k = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 8, 16)
    position = torch.zeros(1, 1, dtype=torch.int64)
    for change, message in (
        (dict(q=torch.zeros(1, 3, 1, 16)), "multiple of the key heads"),
        (dict(q=torch.zeros(1, 4, 1, 32)), "agree in batch and head size"),
        (dict(cache_position=position[0]), "cache_position must be"),
        (dict(k=k.bfloat16()), "share one floating dtype"),
        (dict(v=torch.zeros(1, 2, 16, 8).transpose(2, 3)), "must be contiguous"),
        (dict(window=0), "window must be a whole number of at least 1"),
        (dict(softcap=0.0), "softcap must be positive"),
        (dict(alibi_slopes=torch.zeros(3)), "alibi_slopes must be"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_attention(**dict(q=q, k=k, v=k, cache_position=position, scale=1.0) | change)
    with pytest.raises(ValueError, match="cu_seqlens must be"):
        flash_attention(*(torch.zeros(2, 2, 8, 16),) * 3, 1.0, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="needs multiply_in_fp32"):
        rms_norm(torch.zeros(2, 8), torch.zeros(8), 1e-6, 1.0, False)
    with pytest.raises(ValueError, match="do not fit 3 slots"):
        rope_and_cache_write(
            *(torch.zeros(1, 4, 2, 16),) * 3, *(torch.zeros(1, 4, 8),) * 2, *(torch.zeros(1, 2, 4, 16),) * 2,
            torch.zeros(1, 4, dtype=torch.int64),
        )  # fmt: skip


def test_the_package_needs_no_triton_on_cpu():
    """macOS and Windows have none: importing every op and running one must not import it."""
    program = """
import sys
sys.modules["triton"] = None  # importing it now raises ImportError
import torch
from catalog import CATALOG
from minillm_kernels.norm import rms_norm
print(rms_norm(torch.ones(1, 4), torch.ones(4), 0.0, 0.0, True).tolist())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stdout.strip() == "[[1.0, 1.0, 1.0, 1.0]]", result.stderr
