"""The Triton kernels without a GPU: compiled for three chips, and as nodes of one graph.

Every kernel at every row of the launch table is compiled here, at the first model case that reaches it;
`tools/crosscompile.py` compiles every case (several minutes).
"""

import math
import os
import re
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
            entry, entry.model_cases["Llama-3-8B, 256 tokens at 2048"], torch.bfloat16, 80
        )
    assert "SPILLS" in crosscompile.problems(launch, crosscompile.compile_for(launch, 80), 80)[0]


# ---- what the machine code shows ----

ONE_ROW = [  # op, case, the most instructions per weight
    ("int8_linear", "Llama-2-7B qkv, 1 row", 5.8),
    ("gated_mlp", "Llama-2-7B, int8, 1 rows", 5.8),
    ("int4_linear", "Llama-2-7B qkv, 1 row", 5.2),
    ("int4_linear", "Llama-2-7B qkv, 1 row, groups of 32", 5.2),
    ("gated_mlp", "Llama-2-7B, int4, 1 rows", 5.2),
]


@pytest.mark.parametrize(("op", "case", "most"), ONE_ROW)
def test_a_product_with_one_row_in_machine_code(op, case, most):
    """x comes through the L1 cache (a pipelined load goes around it), the unit that converts 16 integers a clock is
    hardly asked, nothing waits at a barrier in the loop, and kernels/README.md's counts hold."""
    crosscompile = pytest.importorskip("crosscompile", reason="Triton is not available for this platform")
    entry = CATALOG[op]
    (launch,) = crosscompile.recorded_launches(entry, entry.model_cases[case], torch.bfloat16, 90)
    instructions, found = crosscompile.per_weight(launch, 90)
    assert 3 < instructions < most
    assert not [name for name in found if "LDGSTS" in name or "BYPASS" in name]
    assert [name for name in found if name.startswith("LDG") and ".EL" in name]  # evict last: x
    weights = 4 * dict(launch.constants)["K"] / 64  # of a thread
    assert sum(count for name, count in found.items() if name.startswith("I2F")) < weights / 8
    assert found["BAR.SYNC.DEFER_BLOCKING"] <= 8  # for the sums at the end, four rows


@pytest.mark.parametrize("op", ("rope_and_cache_write", "decode_attention", "flash_attention"))
def test_where_a_row_begins_is_counted_in_64_bits(op):
    """A cache can pass 2^31 elements: a product of two 32-bit numbers would reach into another row."""
    crosscompile = pytest.importorskip("crosscompile", reason="Triton is not available for this platform")
    entry = CATALOG[op]
    for launch in crosscompile.recorded_launches(entry, next(iter(entry.model_cases.values())), torch.bfloat16, 90):
        code = crosscompile.compiled(launch, 90).asm["ttir"].splitlines()
        offsets = [line.split(":")[1] for line in code if "tt.addptr" in line and "tensor<" not in line]
        assert offsets
        assert all(", i64" in offset for offset in offsets)


def test_a_pipelined_product_would_be_noticed():
    """The check above can fail: with stages Triton fetches ahead, around the L1 cache."""
    crosscompile = pytest.importorskip("crosscompile", reason="Triton is not available for this platform")
    entry = CATALOG["int8_linear"]
    (launch,) = crosscompile.recorded_launches(entry, entry.model_cases["Llama-2-7B qkv, 6 rows"], torch.bfloat16, 90)
    found = crosscompile.instructions(launch, 90)
    assert [name for name in found if "LDGSTS" in name and "BYPASS" in name]


def run_assembly(text: str, registers: dict[str, int]) -> dict[str, int]:
    """What the few PTX instructions of `gpu/unpack.py` leave in the registers, all 32 bits wide."""

    def floats(*bits: int) -> list[float]:
        return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).double().tolist()

    def bits(number: float) -> int:
        return torch.tensor(number, dtype=torch.float32).view(torch.int32).item() & 0xFFFFFFFF

    def permute(a: int, b: int, selector: int) -> int:
        data = (b << 32 | a).to_bytes(8, "little")
        return int.from_bytes(bytes(data[selector >> 4 * i & 7] for i in range(4)), "little")

    run = {
        "and": lambda a, b: a & b,
        "xor": lambda a, b: a ^ b,
        "shr": lambda a, b: a >> b,
        "mov": lambda a: a,
        "prmt": permute,
        "mul": lambda a, b: bits(math.prod(floats(a, b))),
        # exact in float64, then rounded once, as the instruction does
        "fma": lambda a, b, c: bits(math.fsum((math.prod(floats(a, b)), *floats(c)))),
    }
    registers = dict(registers)
    for statement in text.strip("{} \n").split(";"):
        name, _, rest = statement.strip().partition(" ")
        if name and not name.startswith(".reg"):
            target, *sources = (word.strip() for word in rest.split(","))
            values = [registers[word] if word in registers else int(word, 0) for word in sources]
            registers[target] = run[name.split(".")[0]](*values)
    return registers


def as_float(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).item()


def test_unpacking_assembly():
    """The interpreter runs another form of these functions, and no GPU may be at hand: every byte, in every place."""
    unpack = pytest.importorskip("minillm_kernels.gpu.unpack", reason="Triton is not available for this platform")
    for first in range(0, 256, 4):
        codes = [(first + i) * 37 % 256 for i in range(4)]  # all bytes, each in some place
        word = int.from_bytes(bytes(codes), "little")
        out = run_assembly(unpack.INT8.value, {"$4": word})
        assert [as_float(out[f"${i}"]) - 8388736.0 for i in range(4)] == [c - 256 * (c > 127) for c in codes]
        out = run_assembly(unpack.INT4.value, {"$8": word})
        assert [as_float(out[f"${i}"]) - 128.0 for i in range(8)] == [c & 15 for c in codes] + [c >> 4 for c in codes]
    x = torch.randn(8, generator=GENERATOR)
    inputs = {f"${5 + i}": value & 0xFFFFFFFF for i, value in enumerate(x.view(torch.int32).tolist())}
    out = run_assembly(unpack.INT4_DOT.value, {"$4": word} | inputs)
    exact = sum(
        (128 + code) * float(a) for code, a in zip([c & 15 for c in codes] + [c >> 4 for c in codes], x, strict=True)
    )
    assert abs(as_float(out["$0"]) - exact) < 8 * 2**-24 * 143 * x.abs().sum().item()
    assert [as_float(out[f"${i}"]) for i in (1, 2, 3)] == [0.0] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_the_four_codes_of_a_register_are_neighbours(group_size, dtype):
    """`dot_plus_128` adds up what one instruction is given: that has to be a stretch of the summed dimension."""
    crosscompile = pytest.importorskip("crosscompile", reason="Triton is not available for this platform")
    case = dict(rows=(1,), weight=(512, 2048), format="int4", group_size=group_size)
    (launch,) = crosscompile.recorded_launches(CATALOG["int4_linear"], case, dtype, 90)
    code = crosscompile.compiled(launch, 90).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>", code, re.MULTILINE))
    used = set(re.findall(r"packed_element = 4.*-> tensor<[\dx]+xf32, (#\w+)>", code))
    assert used
    for layout in used:
        size, order = (re.search(rf"{name} = \[([\d, ]+)\]", layouts[layout])[1] for name in ("sizePerThread", "order"))
        assert int(size.split(",")[-1]) % 4 == 0
        assert order.startswith("2")  # the last of three dimensions varies fastest


# ---- what Triton would compile ----


def layer_launches(crosscompile, tokens: int, room: int) -> list[tuple]:
    """What one layer of a small int8 model launches for a chunk of `tokens` over a cache with `room` for more."""
    H, KV, D, d, rings = 4, 2, 64, 256, (None, 96)
    with crosscompile.recording(90) as launches:

        def fake(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        x, norm, angle = fake(1, tokens, d), fake(d), fake(1, tokens, D // 2, dtype=torch.float32)
        position = fake(1, tokens, dtype=torch.int64)
        add_rms_norm.implementation(x, x, norm, 1e-6, 0.0, False)
        weight, scale = fake((H + 2 * KV) * D, d, dtype=torch.int8), fake((H + 2 * KV) * D, dtype=torch.float32)
        qkv = int8_linear.implementation(x, weight, scale).view(1, tokens, H + 2 * KV, D)
        q, k, v = qkv.split((H, KV, KV), dim=2)
        for window in rings:
            slots = tokens + room if window is None else min(tokens + room, window + tokens - 1)
            keys, values = fake(1, KV, slots + 1, D), fake(1, KV, slots + 1, D)
            q_rotated = rope_and_cache_write.implementation(q, k, v, angle, angle, keys, values, position)
            attend = flash_attention if tokens > 16 else decode_attention
            options = dict(cache_position=position, window=window, softcap=None, alibi_slopes=None)
            keys, values = keys.narrow(2, 0, slots), values.narrow(2, 0, slots)
            attend.implementation(q_rotated, keys, values, scale=0.125, **options)
        gated_mlp.implementation(x, weight, "silu", scale)
    return launches


LENGTHS, ROOMS = (65, 97, 98, 99, 112, 128, 500, 777, 1024, 2048), (1, 3, 16, 31, 64, 5, 7, 11, 1, 2)


def test_ten_prompt_lengths_are_one_compilation():
    """Each kernel once, whatever the lengths: odd, even, divisible by 16, powers of two; capacities and windows too."""
    crosscompile = pytest.importorskip("crosscompile", reason="Triton is not available for this platform")
    launches = []
    for tokens, room in zip(LENGTHS, ROOMS, strict=True):
        launches += layer_launches(crosscompile, tokens, room)
    keys = crosscompile.cache_keys(launches, 90)
    assert {kernel: len(found) for kernel, found in keys.items()} == {
        "rms_norm_kernel": 1,
        "dequantize_kernel": 1,
        "gate_kernel": 1,
        "rope_and_cache_write_kernel": 1,
        "flash_attention_kernel": 1,
    }


def test_all_widths_of_a_verify_step_are_few_compilations():
    """1 to 16 tokens: query rows are padded to 16, 32 or 64, and a range is split by powers of two."""
    crosscompile = pytest.importorskip("crosscompile", reason="Triton is not available for this platform")
    launches = [one for tokens in range(2, 17) for one in layer_launches(crosscompile, tokens, 1000 + tokens)]
    keys = crosscompile.cache_keys(launches, 90)
    counts = {kernel: len(found) for kernel, found in keys.items()}
    # gated and not; over the whole cache and a ring
    assert counts.pop("attend_kernel") <= 2 * 3
    assert counts.pop("combine_kernel") <= 2 * 3
    assert counts == {"rms_norm_kernel": 1, "few_rows_kernel": 2, "rope_and_cache_write_kernel": 1}


def test_partial_results_stay_small():
    """A captured step keeps them: 32 rows of 16 tokens and 32 heads took half a gigabyte at 64 partials each."""
    decode = pytest.importorskip("minillm_kernels.gpu.decode_attention", reason="Triton is not available")
    sizes = {tokens: 32 * 32 * tokens * decode.splits(131072, tokens) * 128 * 4 for tokens in (1, 2, 4, 5, 8, 16)}
    assert max(sizes.values()) <= 70e6
    assert decode.splits(131072, 1) == 64  # one token still fills the chip


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
    h_prompt = flash_attention(q, keys, values, position, 0.25, None, None, None)
    return h_prompt, gated_mlp(h, gate_up, "silu", gate_up_scale) + residual.narrow(2, 0, 32)


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
    with pytest.raises(ValueError, match="flash_attention: 9 tokens in one step do not fit 8 slots"):
        flash_attention(torch.zeros(1, 4, 9, 16), k, k, torch.arange(9)[None], 1.0, None, None, None)
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
