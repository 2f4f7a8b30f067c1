"""Products and attention of many tokens in C: right in every build, the same bits whatever is computed beside them."""

import pytest
import torch
from catalog.attention import attention_bound
from catalog.decode_attention import decode_attention_inputs, decode_attention_reference
from minillm_kernels import cpu
from minillm_kernels.decode_attention import decode_attention
from minillm_kernels.gated_mlp import gated_mlp
from minillm_kernels.int4_linear import int4_linear
from minillm_kernels.int8_linear import int8_linear
from minillm_kernels.linear import linear

needs_c = pytest.mark.skipif(not cpu.available(), reason="no C compiler")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

CASES = {
    "from the start": dict(positions=[list(range(100))], heads=4, kv_heads=2, head_dim=64, slots=100),
    "over several blocks": dict(positions=[list(range(300, 340))], heads=3, kv_heads=1, head_dim=32, slots=400),
    "ragged rows": dict(
        positions=[list(range(20)), list(range(190, 210))], heads=2, kv_heads=2, head_dim=16, slots=220
    ),
    "padding": dict(
        positions=[[-1] * 17, [5, 6, *[-1] * 13, 7, 8], [*range(60, 77)]], heads=2, kv_heads=1, head_dim=24, slots=90
    ),
    "one channel": dict(positions=[list(range(20))], heads=2, kv_heads=2, head_dim=1, slots=20),
    "odd channels": dict(positions=[list(range(7, 40))], heads=6, kv_heads=2, head_dim=83, slots=64),
    "wide head": dict(positions=[list(range(30))], heads=2, kv_heads=1, head_dim=256, slots=30),
    "window": dict(positions=[list(range(150, 190))], heads=2, kv_heads=1, head_dim=32, slots=200, window=20),
    "ring": dict(positions=[list(range(333, 373))], heads=2, kv_heads=1, head_dim=32, slots=139, window=100),
    "everything": dict(
        positions=[[-1, *range(250, 290)], [*range(41)]],
        heads=6, kv_heads=2, head_dim=48, slots=170, window=130, softcap=20.0, alibi=True,
    ),
}  # fmt: skip


@needs_c
@pytest.mark.parametrize("case", CASES)
def test_attention_matches_float64(any_build, case):
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        given = decode_attention_inputs(CASES[case], dtype, "cpu", generator)
        (expected,) = decode_attention_reference(**given)
        result = decode_attention(*given.values())
        assert result.isfinite().all()  # of padding too
        bound = attention_bound(expected, given["q"], given["k"], given["v"], given["scale"], given["softcap"])
        error = (result.double() - expected).abs()
        assert (error <= bound)[~expected.isnan()].all(), dtype


@needs_c
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 150])
def test_attention_of_a_token_does_not_depend_on_its_chunk(dtype, window):
    torch.manual_seed(0)
    q = torch.randn(1, 6, 300, 40).to(dtype)
    k, v = torch.randn(2, 1, 2, 300, 40).to(dtype)
    position = torch.arange(300)[None]
    whole = decode_attention(q[:, :, 100:], k, v, position[:, 100:], 0.2, window)
    for start, stop in ((100, 117), (117, 200), (200, 300), (133, 171)):
        chunk = decode_attention(q[:, :, start:stop], k, v, position[:, start:stop], 0.2, window)
        assert torch.equal(chunk, whole[:, :, start - 100 : stop - 100])


@needs_c
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_query_is_not_spoiled_by_what_it_does_not_see(bad):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 60, 32), torch.randn(1, 2, 80, 32), torch.randn(1, 2, 80, 32)
    k, v = k[None, 0], v[None, 0]
    position = torch.arange(60)[None]
    clean = decode_attention(q, k, v, position, 0.2)
    k[:, :, 40:], v[:, :, 40:] = bad, bad
    spoiled = decode_attention(q, k, v, position, 0.2)
    torch.testing.assert_close(spoiled[:, :, :40], clean[:, :, :40], rtol=1e-5, atol=1e-5)
    assert not spoiled[:, :, 40:].isfinite().any()


def products(dtype):
    K, N = 200 if dtype != torch.float16 else 96, 101
    weight, codes = torch.randn(N, K).to(dtype), torch.randint(-127, 128, (N, K), dtype=torch.int8)
    G = 32
    packed, zero = (torch.randint(0, n, s, dtype=torch.uint8) for n, s in ((256, (102, 64)), (16, (4, 102))))
    scale = torch.rand(4, 102).half()
    return {
        "dense": (K, lambda x: linear(x, weight, weight[:, 0].contiguous())),
        "int8": (K, lambda x: int8_linear(x, codes, torch.linspace(0.1, 1, N))),
        "int4": (128, lambda x: int4_linear(x, packed, scale, zero, G)),
        "gated": (128, lambda x: gated_mlp(x, packed, "silu", scale, zero, G)),
    }


@needs_c
def test_many_rows_of_nothing():
    assert linear(torch.randn(40, 8), torch.randn(0, 8)).shape == (40, 0)
    assert gated_mlp(torch.randn(40, 8), torch.randn(0, 8), "silu").shape == (40, 0)
    assert linear(torch.randn(3, 0, 8), torch.randn(5, 8)).shape == (3, 0, 5)


@needs_c
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["dense", "int8", "int4", "gated"])
def test_a_row_of_a_product_depends_on_no_other_and_on_no_number_of_threads(any_build, kind, dtype, monkeypatch):
    torch.manual_seed(0)
    inputs, product = products(dtype)[kind]
    x = torch.randn(150, inputs).to(dtype)
    monkeypatch.setattr(cpu, "threads", lambda: 1)
    whole = product(x)
    for threads, rows in ((1, 17), (2, 33), (3, 64), (5, 65), (2, 129), (4, 150)):
        monkeypatch.setattr(cpu, "threads", lambda threads=threads: threads)
        assert torch.equal(product(x[:rows]), whole[:rows]), (threads, rows)
        assert torch.equal(product(x[-rows:]), whole[-rows:]), (threads, rows)
