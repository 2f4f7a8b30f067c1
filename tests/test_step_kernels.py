"""The C between the products (norms, rotation, attention): the same bits from one thread and from five, and in 16 bits
the bits of PyTorch's code, which the families were trained with."""

import copy

import pytest
import torch
from families import prompt_ids
from minillm_kernels import cpu
from minillm_kernels.activation import activate
from minillm_kernels.decode_attention import decode_attention
from minillm_kernels.norm import add, add_rms_norm, rms_norm
from minillm_kernels.rope import angles, rope_and_cache_write

from minillm import StaticCache, attention
from minillm.config import NormSpec
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
HALVES = (torch.bfloat16, torch.float16)


def with_threads(count, call):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def same_with_any_threads(call):
    alone = with_threads(1, call)
    for count in (2, 3, 4, 5):
        for one, other in zip(alone, with_threads(count, call), strict=True):
            assert torch.equal(one, other), count


# Sizes above the work at which threads are woken at all, and rows that no number of threads divides.


@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(6, 1, 1), (7, 1, 3), (6, 2, 1), (5, 5, 2), (1, 1, 1)])
@pytest.mark.parametrize("window", [None, 200])
def test_attention_with_any_number_of_threads(heads, kv_heads, tokens, window):
    generator = torch.Generator()
    seed = generator.seed()
    q = torch.randn(1, heads, tokens, 64, generator=generator)
    k, v = torch.randn(2, 1, kv_heads, 700, 64, generator=generator)
    position = torch.arange(650, 650 + tokens)[None]
    alone = with_threads(1, lambda: decode_attention(q, k, v, position, 0.125, window))
    for count in (2, 3, 4, 5):
        shared = with_threads(count, lambda: decode_attention(q, k, v, position, 0.125, window))
        assert torch.equal(shared, alone), f"{count} threads, seed {seed}"


def test_norms_additions_and_rotation_with_any_number_of_threads():
    torch.manual_seed(0)
    x, y, weight = torch.randn(37, 1000), torch.randn(37, 1000), torch.randn(1000)
    same_with_any_threads(lambda: [rms_norm(x, weight, 1e-5, 0.0, False)])
    same_with_any_threads(lambda: add_rms_norm(x, y, weight, 1e-5, 1.0, True))
    same_with_any_threads(lambda: [add(x, y)])
    qkv = torch.randn(2, 33, 8, 64)
    angles, position = torch.randn(2, 2, 33, 32), torch.arange(7, 40).repeat(2, 1)

    def turn():
        k_cache, v_cache = torch.zeros(2, 2, 2, 41, 64)
        q, k, v = qkv.split((4, 2, 2), dim=2)
        return rope_and_cache_write(q, k, v, *angles, k_cache, v_cache, position), k_cache, v_cache

    same_with_any_threads(turn)


# ---- 16 bits ----


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_rounds_where_pytorch_rounds(dtype, bias):
    """Of 64 numbers that are +-1 the mean, a multiple of 1/32, and the sum of squares are exact in any order; the sum
    of two 16-bit tensors is rounded before it is normed."""
    torch.manual_seed(1)
    x = torch.randint(0, 2, (50, 64)).mul(2).sub(1).to(dtype)
    weight, shift = torch.randn(64).to(dtype), torch.randn(64).to(dtype) if bias else None
    spec = NormSpec(1e-6, 0.0, True, center=True, bias=bias)
    expected = torch.nn.functional.layer_norm(
        x.double(), (64,), weight.double(), None if shift is None else shift.double(), 1e-6
    )
    for norm in (attention.norm, attention.norm_kernel):
        assert (norm(x, weight, shift, spec) == expected.to(dtype)).double().mean() > 0.99  # float32 crosses a border
    half = torch.full_like(x, 1.0)
    normed, total = attention.add_norm_kernel(x - half, half, weight, shift, spec)
    assert torch.equal(total, x)
    assert torch.equal(normed, attention.norm_kernel(x, weight, shift, spec))


def whole(*shape, largest):
    """Whole numbers: their squares add up without rounding, whoever adds them in whatever order."""
    return torch.randint(-largest, largest + 1, shape).float()


NORMS = [NormSpec(1e-6, 0.0, False), NormSpec(1e-6, 1.0, True), NormSpec(1e-6, 0.0, True)]  # Llama, Gemma, OLMo 2


@pytest.mark.parametrize("spec", NORMS, ids=["Llama", "Gemma", "OLMo 2"])
@pytest.mark.parametrize("dtype", HALVES)
def test_norms_round_where_pytorch_rounds(spec, dtype, monkeypatch):
    """C, the ops without a compiler and the decoder's own PyTorch code: not near one another, but equal.

    Of 64 whole numbers below 400 every sum of squares is exact in float32 (under 2^24), so that no order of adding
    shows; sums of two are beyond bfloat16's 8 bits and have to be rounded before they are normed.
    """
    torch.manual_seed(1)
    x, residual = (whole(50, 64, largest=200).to(dtype) for _ in range(2))
    weight = torch.randn(64).to(dtype)
    alone = attention.norm(x, weight, None, spec)
    normed, total = attention.add_norm(x, residual, weight, None, spec)
    exact = x.float() + residual.float()
    assert (dtype == torch.float16) or not torch.equal(total.float(), exact)  # the rounding is there to be seen
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr(cpu, "library", lambda: None)
        assert torch.equal(attention.norm_kernel(x, weight, None, spec), alone)
        ours = attention.add_norm_kernel(x, residual, weight, None, spec)
        assert torch.equal(ours[1], total)
        assert torch.equal(ours[0], normed)
    # And each of the three is a norm of its own: none could stand in for another unnoticed.
    others = [attention.norm(x, weight, None, other) for other in NORMS if other != spec]
    assert not any(torch.equal(alone, other) for other in others)


@pytest.mark.parametrize("name", ["llama3", "gemma", "gemma3", "olmo2"])
def test_a_familys_norm_and_embeddings_are_transformers_own_in_bfloat16(name, checkpoint, reference):
    """To the last bit: the embeddings that the first layer sees, Gemma's factor rounded as in training, and a norm of
    whole numbers (see above) by each backend."""
    theirs = copy.deepcopy(reference(name)).to(torch.bfloat16)
    config = load_config(checkpoint(name))
    ids = torch.tensor([prompt_ids(40, seed=3)])
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True).hidden_states[0]
    torch.manual_seed(2)
    norm = theirs.model.norm
    size = 16  # of its own: the sum of a power of two of squares is divided exactly
    x = whole(20, size, largest=100).bfloat16()
    norm.weight.data = norm.weight.data[:size].clone()
    for backend in ("math", "kernels"):
        model = load_decoder(checkpoint(name), config, torch.bfloat16, "cpu", attention=backend)
        with torch.inference_mode():
            embedded, _ = model.embed(ids, torch.arange(40)[None], StaticCache(config, 1, 40, dtype=torch.bfloat16))
            ours = model.backend.norm(x, norm.weight, None, config.norm)
            assert torch.equal(embedded, expected)
            assert torch.equal(ours, norm(x)), backend


def test_a_norm_of_rows_that_are_not_evenly_spaced():
    """Parts of a wider tensor, cut along every dimension in turn: what the strides of one do not tell of the others."""
    torch.manual_seed(3)
    weight = torch.randn(16)
    wide = torch.randn(3, 5, 4, 48)
    for x in (
        wide[:, :3, :, :16],
        wide[:, ::2, :2, 16:32],
        wide[::2, :, ::2, :16],
        wide[:, :, 0, :16],
        wide[:2, 1:4, 2, 32:],
        wide[..., ::3],
        wide.view(3, 5, 12, 16)[:, :2, 3:7],
        wide.transpose(0, 1)[..., :16],
    ):
        expected = rms_norm(x.contiguous(), weight, 1e-6, 0.0, False)
        assert torch.equal(rms_norm(x, weight, 1e-6, 0.0, False), expected), x.stride()


@pytest.mark.parametrize("tokens", [1, 3])
def test_positions_that_are_a_view(tokens):
    """Every other column of a wider tensor, as `position[:, ::2]` gives."""
    q = torch.randn(2, 2, tokens, 16)
    k, v = torch.randn(2, 2, 1, 30, 16)
    position = torch.tensor([[9, 10, 11], [20, 21, 22]])[:, :tokens]
    view = position.repeat_interleave(2, dim=1)[:, ::2]
    assert tokens == 1 or not view.is_contiguous()
    expected = decode_attention(q, k, v, position.contiguous(), 0.25)
    assert torch.equal(decode_attention(q, k, v, view, 0.25), expected)


def test_keys_that_do_not_lie_side_by_side():
    """Every other slot of a cache, some heads of it, and keys unlike values: copied or read right, never misread."""
    q, position = torch.randn(2, 4, 1, 16), torch.tensor([[6], [3]])
    k, v = torch.randn(2, 2, 8, 16, 16)
    for cut in (lambda x: x[:, :2, ::2], lambda x: x[:, ::2, :8], lambda x: x.transpose(1, 2)[:, :2]):
        expected = decode_attention(q, cut(k).contiguous(), cut(v).contiguous(), position, 0.25)
        for values in (cut(v), cut(v).contiguous()):
            result = decode_attention(q, cut(k), values, position, 0.25)
            torch.testing.assert_close(result, expected, rtol=0.0, atol=1e-6)  # means of 7 values below 4


def test_what_the_kernels_would_get_wrong_is_refused():
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="offset"):  # rounded before the weight: nobody adds one then
        rms_norm(x, weight, 1e-6, 1.0, False)
    q, angles, position = torch.ones(1, 4, 2, 16), torch.ones(1, 4, 8), torch.arange(4)[None]
    for slots in (4, 3):
        k_cache, v_cache = torch.zeros(2, 1, 2, slots + 1, 16)
        if slots == 4:
            rope_and_cache_write(q, q, q, angles, angles, k_cache, v_cache, position)
            continue
        with pytest.raises(ValueError, match="do not fit 3 slots"):  # two tokens would share one
            rope_and_cache_write(q, q, q, angles, angles, k_cache, v_cache, position)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_activations_of_the_largest_numbers(name):
    x = torch.tensor([-3e38, -1e38, -100.0, 0.0, 100.0, 3e38])
    expected = torch.tensor([0.0, 0.0, 0.0, 0.0, 100.0, 3e38])
    assert torch.equal(activate(x, name) + 0.0, expected)
    both = torch.cat([x, torch.ones(6)])[None].repeat(3, 1)
    assert torch.equal(activate(both, name, gated=True) + 0.0, expected.repeat(3, 1))


def test_an_op_has_no_gradient_and_says_so():
    """And does not leave it out in silence: a model that computes by ops cannot be trained."""
    x, options = torch.randn(3, 8, requires_grad=True), (torch.ones(8), 1e-5, 0.0, False)
    with pytest.raises(RuntimeError, match="backward"):
        rms_norm(x, *options).sum().backward()
    with torch.no_grad():
        assert torch.equal(rms_norm(x, *options), rms_norm(x.detach(), *options))


def test_what_is_no_op_has_a_gradient():
    """C keeps none: where one is asked for, these are PyTorch's own operators."""
    x, y = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)
    for call, plain in (
        (lambda: add(y, x), lambda: y + x),
        (lambda: activate(x, "silu"), lambda: torch.nn.functional.silu(x)),
        (lambda: angles(torch.arange(3)[None], x[0, :1], 1.0)[0], lambda: (torch.arange(3)[:, None] * x[0, :1]).cos()),
    ):
        (ours,), (theirs,) = (torch.autograd.grad(one().sum(), x) for one in (call, plain))
        torch.testing.assert_close(ours, theirs)
