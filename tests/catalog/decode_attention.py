"""decode_attention: a few tokens over a cache."""

import torch
import torch.nn.functional as F
from minillm_kernels.decode_attention import decode_attention

from catalog.attention import attend_one_token, attention_bound
from catalog.entry import Entry, Results


def decode_attention_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """A cache filled the way a decoder fills it, with NaN wherever nothing has been written yet.

    `positions` gives, per row, the positions of this step's tokens (-1: padding).
    """
    position = torch.tensor(case["positions"])  # [B, T]
    (batch, tokens), heads, kv_heads = position.shape, case["heads"], case["kv_heads"]
    head_dim, slots = case["head_dim"], case["slots"]
    random = {"generator": generator, "device": device}
    k_cache, v_cache = torch.full((2, batch, kv_heads, slots + 1, head_dim), float("nan"), device=device)
    for row, positions in enumerate(case["positions"]):
        written = min(max(positions) + 1, slots)
        k_cache[row, :, :written] = torch.randn(kv_heads, written, head_dim, **random)
        v_cache[row, :, :written] = torch.randn(kv_heads, written, head_dim, **random)
    alibi = torch.rand(heads, **random) if case.get("alibi") else None
    return {
        "q": torch.randn(batch, heads, tokens, head_dim, **random).to(dtype),
        "k": k_cache.to(dtype)[:, :, :slots],  # the bin slot is not the kernel's business
        "v": v_cache.to(dtype)[:, :, :slots],
        "cache_position": position.to(device),
        "scale": head_dim**-0.5,
        "window": case.get("window"),
        "softcap": case.get("softcap"),
        "alibi_slopes": alibi,
    }


def decode_attention_reference(q, k, v, cache_position, scale, window, softcap, alibi_slopes) -> Results:
    """One query token at a time, over the positions it sees, gathered from their slots."""
    out = torch.full(q.shape, float("nan"), dtype=torch.float64, device=q.device)
    for row, positions in enumerate(cache_position.tolist()):
        for token, position in enumerate(positions):
            if position < 0:
                continue  # padding: unspecified
            first = 0 if window is None else max(0, position - window + 1)
            key_position = torch.arange(first, position + 1, device=q.device)  # [P]
            slot = key_position % k.shape[2]
            out[row, :, token] = attend_one_token(
                q[row, :, token], k[row, :, slot], v[row, :, slot],
                key_position - position, scale, softcap, alibi_slopes,
            )  # fmt: skip
    return (out,)


def decode_attention_bounds(expected, q, k, v, cache_position, scale, window, softcap, alibi_slopes) -> Results:
    return (attention_bound(expected[0], q, k, v, scale, softcap),)


def decode_attention_bytes(q, k, v, cache_position, scale, window, softcap, alibi_slopes) -> int:
    """The live keys and values, once; q and the result are small beside them but counted."""
    last = cache_position.max(dim=1).values + 1
    live = last if window is None else last.clamp(max=window + cache_position.shape[1] - 1)
    kv = 2 * int(live.sum()) * k.shape[1] * k.shape[3] * k.element_size()
    return kv + 2 * q.numel() * q.element_size()


def decode_case(
    batch: int, position: int, heads: int, kv_heads: int, head_dim: int, slots: int, tokens: int = 1, **more
) -> dict:
    """A real model's shape: every row's newest token at the same position."""
    positions = [list(range(position - tokens + 1, position + 1))] * batch
    return dict(positions=positions, heads=heads, kv_heads=kv_heads, head_dim=head_dim, slots=slots, **more)


def decode_attention_flops(q, cache_position, window, **_) -> int:
    visible = cache_position + 1  # [B, T]
    visible = visible.clamp(max=window or int(visible.max()))
    return 4 * int(visible.sum()) * q.shape[1] * q.shape[3]


def sdpa_over_live_keys(q, k, v, cache_position, scale, softcap, alibi_slopes, **_):
    """SDPA cannot follow a position on the device: it is given the live keys, cut out on the host."""
    if softcap is not None or alibi_slopes is not None or q.shape[2] > 1:
        return None
    live = slice(0, int(cache_position.max()) + 1)
    k, v = k[:, :, live], v[:, :, live]
    return lambda: F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)


ENTRY = Entry(
    op=decode_attention,
    make_inputs=decode_attention_inputs,
    reference=decode_attention_reference,
    bounds=decode_attention_bounds,
    bytes_moved=decode_attention_bytes,
    small_cases={
        "one token": dict(positions=[[5]], heads=2, kv_heads=2, head_dim=64, slots=40),
        "first token": dict(positions=[[0], [39]], heads=2, kv_heads=1, head_dim=16, slots=40),
        "grouped heads, ragged rows": dict(positions=[[130], [3], [64]], heads=4, kv_heads=2, head_dim=32, slots=150),
        "five tokens": dict(
            positions=[[20, 21, 22, 23, 24], [0, 1, 2, 3, 4]], heads=4, kv_heads=1, head_dim=64, slots=40
        ),
        "padding": dict(positions=[[7, 8, -1], [-1, -1, -1], [-1, -1, 0]], heads=2, kv_heads=1, head_dim=32, slots=20),
        "many query heads": dict(positions=[[70, 71]], heads=35, kv_heads=1, head_dim=64, slots=80),
        "odd head size": dict(positions=[[33]], heads=2, kv_heads=2, head_dim=80, slots=34),
        "window": dict(positions=[[90, 91], [4, 5]], heads=2, kv_heads=1, head_dim=32, slots=100, window=16),
        "ring": dict(positions=[[90, 91], [4, 5]], heads=2, kv_heads=1, head_dim=32, slots=33, window=32),
        "window over several splits": dict(
            positions=[[390], [201]], heads=2, kv_heads=1, head_dim=16, slots=400, window=300
        ),
        **{
            f"window {n}": dict(
                positions=[[110, 111], [n - 1, n]], heads=2, kv_heads=1, head_dim=16, slots=n + 2, window=n
            )
            for n in (47, 48, 63)
        },
        "softcap": dict(positions=[[40], [77]], heads=4, kv_heads=2, head_dim=32, slots=80, softcap=5.0),
        "alibi": dict(positions=[[40, 41]], heads=4, kv_heads=4, head_dim=32, slots=50, alibi=True),
        "everything": dict(
            positions=[[200, 201, -1], [9, 10, 11]],
            heads=6,
            kv_heads=2,
            head_dim=48,
            slots=42,
            window=40,
            softcap=20.0,
            alibi=True,
        ),
        "prefill chunk": dict(positions=[list(range(30, 70))], heads=2, kv_heads=1, head_dim=32, slots=90, window=25),
    },
    model_cases={
        "Llama-2-7B, 4 rows at 2048": decode_case(4, 2047, 32, 32, 128, 4096),
        "Llama-3-8B, 8 rows at 8192": decode_case(8, 8191, 32, 8, 128, 8192),
        "Llama-3-8B, 1 row at 2048": decode_case(1, 2047, 32, 8, 128, 8192),
        "Gemma-2b, 32 rows at 4096": decode_case(32, 4095, 8, 1, 256, 8192),
        "Llama-3-8B, 6 tokens at 2048": decode_case(1, 2047, 32, 8, 128, 8192, tokens=6),
        "Llama-3-8B, 256 tokens at 2048": decode_case(1, 2047, 32, 8, 128, 8192, tokens=256),
        "Gemma-2-9b layer, 256 tokens": decode_case(1, 6000, 16, 8, 256, 4351, tokens=256, window=4096, softcap=50.0),
        "MPT-7b, 1 row at 1024": decode_case(1, 1023, 32, 32, 128, 2048, alibi=True),
        "Phi-3-mini, 1 row at 2048": decode_case(1, 2047, 32, 32, 96, 4096),
        "TinyLlama, 1 row at 1024": decode_case(1, 1023, 32, 4, 64, 2048),
    },
    flops=decode_attention_flops,
    library=("SDPA, live keys", sdpa_over_live_keys),
)
