"""The matrix products on CPU: exactness against float64, every build of the C, the fallback, compiled graphs."""

import functools
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from catalog.products import rounded_as
from minillm_kernels import cpu
from minillm_kernels.decode_attention import decode_attention
from minillm_kernels.gated_mlp import gated_mlp
from minillm_kernels.int4_linear import int4_linear
from minillm_kernels.int8_linear import int8_linear
from minillm_kernels.linear import linear
from minillm_kernels.rope import rope_and_cache_write

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = ("dense", "int8", "int4-32", "int4-64", "int4-128")


def random_weight(kind: str, outputs: int, inputs: int, dtype: torch.dtype):
    """(arguments after x, the weight they mean [N, K] float64, |q| + |zero| scaled: what the sums add up)."""
    if kind == "dense":
        weight = torch.randn(outputs, inputs).to(dtype)
        return (weight,), weight.double(), weight.double().abs()
    if kind == "int8":
        weight, scale = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs)
        exact = weight.double() * scale.double()[:, None]
        return (weight, scale), exact, exact.abs()
    group = int(kind.removeprefix("int4-"))
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8)
    zero = torch.randint(0, 16, (inputs // group, outputs), dtype=torch.uint8)
    scale = torch.rand(inputs // group, outputs).half()
    # Packed from the words of the layout, element by element, not by the code under test.
    packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8)
    for k in range(inputs):
        at, i = k // group * group // 2, k % group
        if i < group // 2:
            packed[:, at + i] = codes[:, k] + 16 * codes[:, k + group // 2]
    spread = [t.double().t().repeat_interleave(group, dim=1) for t in (scale, zero)]  # [N, K] each
    exact = (codes.double() - spread[1]) * spread[0]
    return (packed, scale, zero, group), exact, (codes.double() + spread[1]) * spread[0]


def product_bound(x, weight, added, kind, dtype):
    """How far x W^T may be off before the result is rounded.

    float32 sums of K products err by at most (K + 2) * 2^-24 of the sum of magnitudes, in any order.
    Quantized weights meet activations rounded to int16: half a step, 2^-1 * `rounded_as` / 32767, times |w|, each; in
    the fallback the activations are exact but the weights widen to x.dtype and library sums are rounded to it.
    Of many rows in bfloat16 it is an int4 weight that is rounded, to bfloat16, by at most 2^-9 of itself.
    """
    many_in_bf16 = dtype == torch.bfloat16 and x.numel() > cpu.FEW_ROWS * x.shape[-1]
    x = x.double()
    bound = (x.shape[-1] + 2) * 2**-24 * (x.abs() @ added.t())
    if kind != "dense":
        step = rounded_as(x) / 32767
        bound = bound + 0.5001 * step * weight.abs().sum(1)
    if kind.startswith("int4") and many_in_bf16:
        bound = bound + 2**-9 * (x.abs() @ weight.abs().t())
    return bound


def unit(dtype):
    return torch.finfo(dtype).eps / 2


def call(kind, x, arguments, bias=None):
    return {"dense": linear, "int8": int8_linear}.get(kind, int4_linear)(x, *arguments, bias)


def close(y, expected, bound, dtype):
    # float16 overflows and underflows: bounds there are for what it can hold
    floor = torch.finfo(dtype).smallest_normal
    error = (y.double() - expected).abs()
    allowed = bound + unit(dtype) * (expected.abs() + bound) + floor * unit(dtype) * 2
    worst = (error / allowed).max().item() if error.numel() else 0.0
    return worst <= 1.0


@pytest.mark.parametrize("kind", FORMATS)
def test_matches_float64_at_every_size(any_build, kind):
    """Rows 1..7, 16, 17 and sizes that are multiples of nothing (int4: of the group)."""
    torch.manual_seed(0)
    group = int(kind.removeprefix("int4-")) if kind.startswith("int4") else 0
    for inputs in (group, 3 * group, 9 * group) if group else (1, 7, 32, 33, 200, 1000):
        for outputs in (1, 5, 16, 37):
            for dtype in DTYPES:
                arguments, weight, added = random_weight(kind, outputs, inputs, dtype)
                bias = torch.randn(outputs).to(dtype)
                for rows in (1, 2, 3, 4, 5, 6, 7, 16, 17):
                    x = torch.randn(rows, inputs).to(dtype)
                    y = call(kind, x, arguments, bias if rows % 2 else None)
                    assert y.dtype == dtype
                    expected = x.double() @ weight.t() + (bias.double() if rows % 2 else 0)
                    bound = product_bound(x, weight, added, kind, dtype)
                    bound = bound + 2**-24 * (x.double() @ weight.t()).abs()  # adding the bias rounds once more
                    assert close(y, expected, bound, dtype), (inputs, outputs, dtype, rows)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_mlp_matches_float64(any_build, kind, activation):
    """With F = 37 and 48 the last block of gate rows runs into the up rows, and the last of up rows is ragged."""
    torch.manual_seed(1)
    inputs = 384 if kind.startswith("int4") else 201
    for dtype, outputs, rows in itertools.product(DTYPES, (37, 48, 64), (1, 5, 8, 17)):
        arguments, weight, added = random_weight(kind, 2 * outputs, inputs, dtype)
        x = (torch.randn(rows, inputs) / 64).to(dtype)
        y = gated_mlp(x, arguments[0], activation, *arguments[1:])
        gate, up = (x.double() @ weight.t()).chunk(2, dim=-1)
        gate_bound, up_bound = product_bound(x, weight, added, kind, dtype).chunk(2, dim=-1)
        if rows > 16 and kind == "dense":  # the library rounds gate and up to dtype
            gate_bound, up_bound = gate_bound + unit(dtype) * gate.abs(), up_bound + unit(dtype) * up.abs()
        activated = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        # both activations have slopes below 1.13; expf, tanhf and what follows round a few times, and
        # 1 + tanh cancels for negative gates, which leaves errors relative to |gate| itself
        activated_bound = 1.13 * gate_bound + 8 * 2**-24 * gate.abs()
        bound = activated_bound * (up.abs() + up_bound) + activated.abs() * up_bound
        assert close(y, activated * up, bound, dtype), (dtype, outputs, rows)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others_or_on_threads(any_build, kind, dtype):
    """Bit for bit: what makes speculative and batched decoding give the text of plain decoding."""
    torch.manual_seed(2)
    arguments, _, _ = random_weight(kind, 300, 512, dtype)
    x = torch.randn(16, 512).to(dtype)
    x[[1, 5, 6, 11, 12], 40] = 1000  # quantized weights: rows that are multiplied as two
    alone = torch.cat([call(kind, row[None], arguments) for row in x])
    threads = torch.get_num_threads()
    try:
        for torch_threads in (1, 3):
            torch.set_num_threads(torch_threads)
            for rows in range(1, 17):
                assert torch.equal(call(kind, x[:rows], arguments), alone[:rows]), (rows, torch_threads)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["int8", "int4-32", "int4-128"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(kind, dtype):
    """Prefill: float32 and float16 pass through C in blocks of rows; bfloat16 weights widen piece by piece."""
    torch.manual_seed(3)
    inputs, outputs, rows = 1280, 900, 300  # 1280 * 900 weights are more than one piece
    arguments, weight, added = random_weight(kind, outputs, inputs, dtype)
    x = (torch.randn(rows, inputs) / 64).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    y = call(kind, x, arguments, bias)
    # int4 weights round once more when widened to bf16 or fp16, and the library's result is rounded before
    # scale and bias. oneDNN may compute fp32 sums in any order.
    product = x.double() @ weight.t()
    bound = product_bound(x, weight, added, kind, dtype) + 2 * unit(dtype) * product.abs()
    bound = bound + (unit(dtype) * (x.double().abs() @ weight.t().abs()) if kind != "int8" else 0)
    assert close(y, product + bias.double(), bound, dtype)


@pytest.mark.parametrize("kind", FORMATS)
def test_shapes_strides_and_emptiness(kind):
    torch.manual_seed(4)
    arguments, weight, added = random_weight(kind, 40, 256, torch.float32)
    x = torch.randn(2, 3, 512)[..., ::2]  # not contiguous
    y = call(kind, x, arguments)
    assert y.shape == (2, 3, 40)
    assert close(y, x.double() @ weight.t(), product_bound(x, weight, added, kind, torch.float32), torch.float32)
    assert call(kind, x[:0], arguments).shape == (0, 3, 40)
    assert call(kind, torch.zeros(1, 256), arguments).eq(0).all()
    tall = (arguments[0].t().contiguous().t(), *arguments[1:])  # a weight stored column by column
    assert torch.equal(call(kind, x, tall), y)


def test_nothing_hides_a_nan_or_an_infinity():
    for kind in FORMATS:
        arguments, _, _ = random_weight(kind, 20, 256, torch.float32)
        x = torch.randn(3, 256)
        x[0, 17], x[1, 255] = float("nan"), float("inf")
        y = call(kind, x, arguments)
        assert y[0].isnan().all(), kind
        assert not y[1].isfinite().any(), kind
        assert y[2].isfinite().all(), kind


def test_wide_dynamic_range_of_activations():
    """One element 1000 times the rest, as in real models: the bound scales with it and must still hold."""
    torch.manual_seed(5)
    for kind in ("int8", "int4-64"):
        arguments, weight, added = random_weight(kind, 64, 2048, torch.float32)
        x = torch.randn(4, 2048)
        x[:, 100] *= 1000
        bound = product_bound(x, weight, added, kind, torch.float32)
        assert close(call(kind, x, arguments), x.double() @ weight.t(), bound, torch.float32)
        tiny = x * 1e-36  # products of subnormal and tiny numbers
        assert call(kind, tiny, arguments).isfinite().all()


@pytest.mark.parametrize("kind", ["int8", "int4-32", "int4-128"])
@pytest.mark.parametrize("size", [1e3, 1e4, 1e5])
def test_an_outlier_does_not_drown_the_other_inputs(kind, size):
    """It meets a weight of zero, so the result is what the others make: its error stays within twice that of bfloat16
    (8 % and 74 % at 1e4 and 1e5 with one scale for a row)."""
    torch.manual_seed(9)
    x = torch.randn(3, 2048).bfloat16()
    x[:2, 100] = size
    arguments, exact, _ = random_weight(kind, 64, 2048, torch.bfloat16)
    if kind == "int8":
        arguments[0][:, 100] = 0
    else:  # the zero points' sums of x must cancel with those of the codes
        group = arguments[3]
        (packed, _, zero, _), byte = arguments, 100 // group * group // 2 + 100 % group % (group // 2)
        low = 100 % group < group // 2
        code = zero[100 // group]
        packed[:, byte] = (packed[:, byte] & 0xF0 | code) if low else (packed[:, byte] & 0x0F | code << 4)
    exact[:, 100] = 0
    expected = x.double() @ exact.t()
    error = (call(kind, x, arguments).double() - expected).norm(dim=1)
    in_bf16 = (linear(x, exact.bfloat16()).double() - x.double() @ exact.bfloat16().double().t()).norm(dim=1)
    assert (error <= 2 * in_bf16).all(), (error / in_bf16).tolist()


def test_long_rows_do_not_overflow_the_integer_sums():
    """All-extreme codes: 40,000 products of 32767 * 127 would pass 2^31 without the flush to float32."""
    inputs = 40_000
    weight = torch.full((4, inputs), 127, dtype=torch.int8)
    y = int8_linear(torch.ones(1, inputs), weight, torch.ones(4))
    assert torch.allclose(y, torch.full((1, 4), 127.0 * inputs), rtol=1e-5)


def node(op):
    return getattr(torch.ops.minillm, op.__name__).default


@pytest.mark.parametrize("kind", FORMATS)
def test_opcheck(kind):
    arguments, _, _ = random_weight(kind, 12, 128, torch.float32)
    op = {"dense": linear, "int8": int8_linear}.get(kind, int4_linear)
    for bias in (None, torch.randn(12)):
        torch.library.opcheck(node(op), (torch.randn(2, 128), *arguments, bias))
    torch.library.opcheck(node(gated_mlp), (torch.randn(2, 128), arguments[0], "silu", *arguments[1:]))


def test_one_graph_when_compiled():
    torch.manual_seed(6)
    dense, int8, int4 = (random_weight(kind, 128, 128, torch.float32)[0] for kind in ("dense", "int8", "int4-32"))

    def step(x):
        return int4_linear(int8_linear(linear(x, *dense), *int8), *int4) + gated_mlp(x, *dense, "silu").repeat(1, 2)

    x = torch.randn(3, 128)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(step, fullgraph=True)(x), step(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: linear(torch.ones(2, 5), torch.ones(3, 4)), "last dimension of x"),
        (lambda: linear(torch.ones(2, 4).double(), torch.ones(3, 4).double()), "float32, bfloat16 or float16"),
        (lambda: linear(torch.ones(2, 4), torch.ones(3, 4).bfloat16()), "cast one of them"),
        (lambda: linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(4)), "bias must be"),
        (lambda: int8_linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)), "weight must be int8"),
        (lambda: int8_linear(torch.ones(2, 4), torch.ones(3, 4).char(), torch.ones(4)), "one per output"),
        (lambda: int4_linear(torch.ones(2, 64), *int4_zeros(48), 48), "group_size must be one of"),
        (lambda: int4_linear(torch.ones(2, 64), *int4_zeros(32)[:2], torch.zeros(1, 3).byte(), 32), "need scale and"),
        (lambda: gated_mlp(torch.ones(2, 4), torch.ones(6, 4), "relu"), "activation must be one of"),
        (lambda: gated_mlp(torch.ones(2, 4), torch.ones(5, 4), "silu"), "an even number"),
        (lambda: gated_mlp(torch.ones(2, 4), torch.ones(6, 4).char(), "silu"), "need scale"),
    ],
)
def test_misfits_are_refused_in_words(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        arguments()


def int4_zeros(group):
    return torch.zeros(3, 32).byte(), torch.zeros(64 // group, 3).half(), torch.zeros(64 // group, 3).byte()


WITHOUT_COMPILER = """
import warnings, torch
from minillm_kernels.int8_linear import int8_linear
from minillm_kernels.int4_linear import int4_linear
from minillm_kernels.linear import linear
from minillm_kernels.gated_mlp import gated_mlp
torch.manual_seed(0)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, w, bias = torch.randn(3, 64).to(dtype), torch.randn(6, 64).to(dtype), torch.randn(6).to(dtype)
        loose = dict(rtol=0, atol=64 * 8 * 4 * torch.finfo(dtype).eps)
        expected = x.double() @ w.double().t() + bias.double()
        torch.testing.assert_close(linear(x, w, bias).double(), expected, **loose)
        codes, scale = torch.randint(-127, 128, (6, 64), dtype=torch.int8), torch.full((6,), 1 / 127)
        expected = x.double() @ (codes.double() / 127).t() + bias.double()
        torch.testing.assert_close(int8_linear(x, codes, scale, bias).double(), expected, **loose)
        packed = torch.full((6, 32), 0x93, dtype=torch.uint8)  # low nibbles 3, high nibbles 9
        scale, zero = torch.full((2, 6), 0.5).half(), torch.full((2, 6), 8, dtype=torch.uint8)
        w4 = torch.tensor([-2.5] * 16 + [0.5] * 16).repeat(2).double().expand(6, 64)
        expected = x.double() @ w4.t() + bias.double()
        torch.testing.assert_close(int4_linear(x, packed, scale, zero, 32, bias).double(), expected, **loose)
        gate, up = (x.double() @ w.double().t()).chunk(2, -1)
        expected = torch.nn.functional.silu(gate) * up
        torch.testing.assert_close(gated_mlp(x, w, "silu").double(), expected, rtol=0, atol=loose["atol"] * 16)
print([str(w.message) for w in caught])
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": ""}, "no C compiler: 'cc' is not on the PATH"),
        ({"CC": "no-such-compiler"}, "no C compiler: 'no-such-compiler'"),
        ({"CC": "cc --no-such-option"}, "failed:"),
    ],
)
def test_without_a_working_compiler_everything_works_and_says_so_once(tmp_path, environment, reason):
    kernels = os.path.dirname(os.path.dirname(os.path.dirname(cpu.__file__)))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": kernels, **environment}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("minillm runs on PyTorch's CPU operators") == 1
    assert reason in result.stdout


def test_processes_that_build_at_once_do_not_disturb_each_other(tmp_path):
    kernels = os.path.dirname(os.path.dirname(os.path.dirname(cpu.__file__)))
    program = (
        "import torch; from minillm_kernels.linear import linear; x = torch.ones(1, 40); print(linear(x, x).item())"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": kernels}
    start = [subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE) for _ in "12"]
    assert [process.communicate()[0].decode().strip() for process in start] == ["40.0", "40.0"]
    assert len(list((tmp_path / "minillm" / "kernels").iterdir())) == 1  # no unfinished files left


needs_c = pytest.mark.skipif(not cpu.available(), reason="no C compiler")


@needs_c
def test_a_tape_keeps_the_memory_it_reads():
    """`parameter.data = other`, as in `model.half()`, must not leave a recorded call with memory that is gone."""
    x, weight = torch.ones(1, 1 << 16), torch.nn.Parameter(torch.ones(4, 1 << 16), requires_grad=False)
    tape = cpu.blank_tape()
    with tape.recording():
        y = linear(x, weight)
    weight.data = torch.zeros(4, 1 << 16)
    others = [torch.zeros(4, 1 << 16) for _ in range(8)]  # they would lie where the weight was
    tape.replay()
    assert y.eq(1 << 16).all(), others[0].sum()


@pytest.mark.parametrize("position", [8, 100, 2**40, 2**63 - 1])
def test_a_position_past_the_end_reads_what_the_slots_hold(position):
    """8 slots, no ring: the newest positions are what they hold, and memory behind them is nobody's business."""
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 8, 16), torch.randn(1, 1, 8, 16)
    result = decode_attention(q, k, v, torch.tensor([[position]]), 0.25)
    everything = F.scaled_dot_product_attention(q, k, v, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(result, everything)


def test_a_cache_of_another_dtype_is_refused():
    """It overran the heap: a float32 model's keys in a bfloat16 cache."""
    q = torch.ones(1, 4, 2, 16)
    angles, position = torch.ones(1, 4, 8), torch.arange(4)[None]
    k_cache, v_cache = torch.zeros(2, 1, 2, 9, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="must share one dtype"):
        rope_and_cache_write(q, q, q, angles, angles, k_cache, v_cache, position)
    with pytest.raises(ValueError, match="must share one"):
        decode_attention(q.transpose(1, 2), k_cache, v_cache, position, 0.25)


def test_a_wrong_type_is_said_by_name():
    x, weight = torch.ones(1, 8), torch.ones(4, 8)
    for arguments, message in (
        ((x, None), "linear: weight must be Tensor, got NoneType"),
        ((x.numpy(), weight), "linear: x must be Tensor, got ndarray"),
        ((x, weight.to_sparse()), "linear: weight must be a dense tensor"),
        ((x, weight, 3), r"linear: bias must be .*Tensor.*, got int"),
        ((x,), "missing a required argument: 'weight'"),
    ):
        with pytest.raises(TypeError, match=message):
            linear(*arguments)
    with pytest.raises(ValueError, match="one device"):
        linear(x, weight.to("meta"))


def recorded(call):
    """(the tensors that `call` returned while it was recorded, a function that computes them again)."""
    tape = cpu.blank_tape()
    with tape.recording():
        results = call()
    results = results if isinstance(results, tuple) else (results,)
    results = tuple(result for result in results if result is not None)

    def replay():
        for result in results:
            result.fill_(float("nan"))
        tape.replay()
        return [result.clone() for result in results]

    return results, replay


def step_calls():
    """A call of every kernel that a step consists of, each large enough to be shared by threads."""
    torch.manual_seed(8)
    x, wide, norm = torch.randn(5, 512), torch.randn(80, 1024), torch.randn(1024)
    q, k, angles = torch.randn(3, 11, 16, 64), torch.randn(3, 11, 5, 64), torch.randn(3, 11, 32)
    k_cache, v_cache = torch.randn(2, 3, 5, 401, 64)
    query, position = torch.randn(3, 15, 2, 64), torch.tensor([[398, 399], [17, 18], [120, -1]])
    places = torch.arange(33).view(3, 11)
    calls = {
        kind: functools.partial(call, kind, x, random_weight(kind, 300, 512, torch.float32)[0]) for kind in FORMATS
    }
    gated = random_weight("int4-32", 300, 512, torch.float32)[0]
    calls["gated_mlp"] = lambda: gated_mlp(x, gated[0], "silu", *gated[1:])
    calls["rms_norm"] = lambda: cpu.rms_norm(wide, None, norm, 1e-5, 0.0, True)
    calls["add_rms_norm"] = lambda: cpu.rms_norm(wide, wide, norm, 1e-5, 0.0, True)
    calls["layer_norm"] = lambda: cpu.rms_norm(wide, wide, norm, 1e-5, 0.0, True, norm, True)
    calls["activate"] = lambda: cpu.activate(wide, "gelu", False)
    calls["activate, gated"] = lambda: cpu.activate(wide, "silu", True)
    calls["add"] = lambda: cpu.add(wide, wide)
    calls["rope"] = lambda: cpu.rope_and_cache_write(q, k, k, angles, angles, k_cache, v_cache, places)
    calls["attention"] = lambda: cpu.decode_attention(
        query, k_cache[:, :, :-1], v_cache[:, :, :-1], position, 0.1, None, None, None
    )
    return calls


@needs_c
@pytest.mark.parametrize("name", step_calls())
def test_a_step_is_the_same_on_any_number_of_threads(name, monkeypatch):
    """Bit for bit, eagerly and recorded, also on more threads than there are cores."""
    one = None
    for number in (1, 2, 3, 4, 5):
        monkeypatch.setattr(cpu, "threads", lambda number=number: number)
        eager = step_calls()[name]()
        results, replay = recorded(step_calls()[name])
        found = [t.clone() for t in (eager if isinstance(eager, tuple) else (eager,)) if t is not None]
        found += [t.clone() for t in results] + [t for _ in range(20) for t in replay()]
        one = found[0] if one is None else one
        for i, result in enumerate(found):
            assert torch.equal(result, found[i % len(results)]), (number, i)
        assert torch.equal(found[0], one), number


@needs_c
def test_threads_of_the_program_may_replay_at_once(monkeypatch):
    """One of them has the helpers, the others do without."""
    monkeypatch.setattr(cpu, "threads", lambda: 3)

    def work(_):
        results, replay = recorded(step_calls()["int4-32"])
        expected = results[0].clone()
        return all(torch.equal(replay()[0], expected) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


FORKED = """
import os, signal, sys, torch
from minillm_kernels import cpu
from minillm_kernels.linear import linear

cpu.threads = lambda: 3
x, weight = torch.randn(2, 512), torch.randn(300, 512)
tape = cpu.blank_tape()
with tape.recording():
    y = linear(x, weight)
expected = linear(x, weight)
for _ in range(3):
    tape.replay()
child = os.fork()
signal.alarm(60)
for _ in range(100):
    y.fill_(0)
    tape.replay()
    assert y.equal(expected) and linear(x, weight).equal(expected)
if child:
    assert os.waitpid(child, 0)[1] == 0
os._exit(0)
"""


@needs_c
def test_the_child_of_a_fork_starts_its_own_threads():
    path = os.pathsep.join(sys.path)
    result = subprocess.run([sys.executable, "-c", FORKED], env=os.environ | {"PYTHONPATH": path}, timeout=120)
    assert result.returncode == 0


@needs_c
def test_right_results_beside_busy_processes(monkeypatch):
    """More threads and processes than cores: helpers lose theirs in the middle of a piece."""
    monkeypatch.setattr(cpu, "threads", lambda: 4)
    program = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100_000))"
    busy = [subprocess.Popen([sys.executable, "-c", program, str(os.getpid())]) for _ in range(cpu.cores())]
    try:
        for name, step in step_calls().items():
            results, replay = recorded(step)
            expected = [result.clone() for result in results]
            for _ in range(50):
                assert all(map(torch.equal, replay(), expected)), name
    finally:
        for process in busy:
            process.kill()
            process.wait()


def test_cores_are_those_that_the_control_group_grants(tmp_path):
    group = tmp_path / "sys/fs/cgroup/outer/inner"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("9:name=systemd:/\n0::/outer/inner\n")
    unlimited = cpu.cores.__wrapped__(tmp_path)
    (group / "cpu.max").write_text("max 100000\n")
    assert cpu.cores.__wrapped__(tmp_path) == unlimited
    (group.parent / "cpu.max").write_text("70000 100000\n")
    assert cpu.cores.__wrapped__(tmp_path) == 1
    (group / "cpu.max").write_text("nonsense\n")
    assert cpu.cores.__wrapped__(tmp_path) == unlimited
