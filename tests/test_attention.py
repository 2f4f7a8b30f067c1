"""attend(): every backend against a float64 loop written here, over rings, windows, GQA and padding."""

import itertools

import pytest
import torch
from families import FAMILIES

from minillm.cache import StaticCache
from minillm.config import LayerSpec
from minillm.errors import BackendError
from minillm.load.backends import BACKENDS, choose_backend
from minillm.load.config_json import parse_config
from minillm.options import ATTENTION


def plain_attention(q, keys, values, position, spec):
    """The definition, one query at a time in float64.

    q [T, H, D]; keys, values [N, KV, D] of positions 0..N-1; position: the query's own position.
    """
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // keys.shape[1]
    for t, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        visible = [p for p in range(position[t] + 1) if spec.window is None or p > position[t] - spec.window]
        scores = keys[visible, h // group].double() @ q[t, h].double() * spec.query_scale
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        out[t, h] = scores.softmax(0) @ values[visible, h // group].double()
    return out.reshape(q.shape[0], -1)


def config_with(heads, kv_heads, window):
    raw = FAMILIES["mistral-v0.1"].with_changes(
        {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "sliding_window": window}
    )
    return parse_config(raw)


# Every backend of a CPU plain, and with a softcap those that declare one (choose_backend refuses the others).
ON_CPU = {name: backend for name, backend in BACKENDS.items() if not backend.gpu_only}
CASES = [(name, cap) for name in ON_CPU for cap in (None, 2.0) if cap is None or BACKENDS[name].softcap]


def write(cache, k, v, view):
    """k and v [B, T, KV, D] into their slots of the first layer."""
    rows = torch.arange(cache.batch_size)[:, None]
    cache.keys[0][rows, :, view.slots] = k
    cache.values[0][rows, :, view.slots] = v


@pytest.mark.parametrize(("backend", "softcap"), CASES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (6, 3), (6, 2), (6, 1), (1, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_against_the_definition(backend, heads, kv_heads, window, softcap):
    """Two rows of different length in chunks of at most 4, so that small windows wrap many times."""
    backend = BACKENDS[backend]
    generator = torch.Generator().manual_seed(heads * 100 + kv_heads)
    config = config_with(heads, kv_heads, window)
    spec = LayerSpec(window=window, rope=0, query_scale=0.4, softcap=softcap)
    lengths, D = [21, 13], config.head_dim
    keys, values = torch.randn(2, 2, 21, kv_heads, D, generator=generator)  # [B, N, KV, D] each
    queries = 2 * torch.randn(2, 21, heads, D, generator=generator)  # [B, N, H, D]
    cache = StaticCache(config, 2, 24, max_step=4)
    for start in range(0, 21, 4):
        position = torch.arange(start, start + 4)[None].repeat(2, 1)  # [B, T]
        position = torch.where(position < torch.tensor(lengths)[:, None], position, -1)
        index = position.clamp(min=0)
        rows = torch.arange(2)[:, None]
        view = cache.view(position, window)
        write(cache, keys[rows, index], values[rows, index], view)
        out = backend.attend(queries[rows, index], cache.keys[0], cache.values[0], view, spec)
        assert out.shape == (2, 4, heads * D)
        assert out.isfinite().all()  # padding rows included
        for row in range(2):
            real = [t for t in range(4) if position[row, t] >= 0]
            if not real:
                continue
            expected = plain_attention(
                queries[row, position[row, real]], keys[row], values[row], position[row, real].tolist(), spec
            )
            # Weighted means of values of size about 3; float32 rounding of scores up to 30 enters the
            # exponent with 30 * 2^-24 = 2e-6, times the values.
            torch.testing.assert_close(out[row, real].double(), expected, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(backend, dtype):
    """bf16 has 8 bits of mantissa, fp16 11: inputs rounded alike, results within a few roundings."""
    config = config_with(6, 2, None)
    spec = LayerSpec(window=None, rope=0, query_scale=0.3, softcap=None)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 9, 6, config.head_dim, generator=generator).to(dtype)
    k, v = torch.randn(2, 1, 9, 2, config.head_dim, generator=generator).to(dtype)
    cache = StaticCache(config, 1, 16, dtype=dtype)
    view = cache.view(torch.arange(9)[None], None)
    write(cache, k, v, view)
    out = BACKENDS[backend].attend(q, cache.keys[0], cache.values[0], view, spec)
    assert out.dtype == dtype
    expected = plain_attention(q[0].float(), k[0].float(), v[0].float(), list(range(9)), spec)
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(out[0].double(), expected, rtol=4 * epsilon, atol=4 * epsilon)


def test_the_names_a_caller_may_give_are_those_of_the_backends():
    """Written down a second time in options.py, which cannot ask here: it does without torch."""
    assert ("auto", *BACKENDS) == ATTENTION


def test_choose_backend():
    llama, gemma2 = parse_config(FAMILIES["llama3"].config), parse_config(FAMILIES["gemma2"].config)
    assert choose_backend("math", llama).name == "math"
    assert choose_backend("sdpa", llama).name == "sdpa"
    assert choose_backend("auto", gemma2).softcap  # auto never picks one that would drop the cap
    with pytest.raises(BackendError, match="softcap"):
        choose_backend("sdpa", gemma2)
    with pytest.raises(BackendError, match="flash4"):
        choose_backend("flash4", llama)


def test_a_query_at_the_start_sees_only_itself():
    """With one visible key the output is that key's value, whatever the scores."""
    config = config_with(6, 3, 5)
    for backend in ON_CPU.values():
        cache = StaticCache(config, 1, 16)
        q, k, v = torch.randn(1, 1, 6, 12), torch.randn(1, 1, 3, 12), torch.randn(1, 1, 3, 12)
        view = cache.view(torch.tensor([[0]]), 5)
        write(cache, k, v, view)
        spec = LayerSpec(window=5, rope=0, query_scale=1.0, softcap=None)
        out = backend.attend(q, cache.keys[0], cache.values[0], view, spec)  # [1, 1, H * D]
        torch.testing.assert_close(out.view(3, 2, 12), v[0, 0][:, None].expand(3, 2, 12))
