"""rope_and_cache_write: rotate queries and keys, put keys and values into their slots."""

import torch
from minillm_kernels.rope import rope_and_cache_write
from torch import Tensor

from catalog.entry import Entry, Results, rounding


def rope_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """q, k and v are slices of one fused projection, as in the decoder, hence not contiguous."""
    position = torch.tensor(case["positions"], device=device)  # [B, T]
    (batch, tokens), heads, kv_heads = position.shape, case["heads"], case["kv_heads"]
    head_dim, slots, rotary_dim = case["head_dim"], case["slots"], case.get("rotary_dim", case["head_dim"])
    random = {"generator": generator, "device": device}
    qkv = torch.randn(batch, tokens, heads + 2 * kv_heads, head_dim, **random).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    frequency = 10000.0 ** -(torch.arange(0, rotary_dim, 2, device=device) / rotary_dim)
    angle = position[:, :, None] * frequency  # [B, T, R / 2]
    k_cache, v_cache = torch.randn(2, batch, kv_heads, slots + 1, head_dim, **random).to(dtype)
    return {
        "q": q, "k": k, "v": v, "cos": angle.cos(), "sin": angle.sin(),
        "k_cache": k_cache, "v_cache": v_cache, "cache_position": position,
    }  # fmt: skip


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every pair of channels as a complex number, times cos + i sin."""
    half = cos.shape[-1]
    turn = torch.complex(cos.double(), sin.double())[:, :, None]  # [B, T, 1, R / 2]
    pair = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * turn
    return torch.cat((pair.real, pair.imag, x[..., 2 * half :].double()), dim=-1)


def rope_reference(q, k, v, cos, sin, k_cache, v_cache, cache_position) -> Results:
    keys, values = k_cache.double(), v_cache.double()
    turned = rotate_reference(k, cos, sin)
    slots = keys.shape[2] - 1
    for row, positions in enumerate(cache_position.tolist()):
        for token, position in enumerate(positions):
            if position >= 0:
                keys[row, :, position % slots] = turned[row, token]
                values[row, :, position % slots] = v[row, token].double()
    keys[:, :, slots] = values[:, :, slots] = float("nan")  # the bin: anything
    return rotate_reference(q, cos, sin).transpose(1, 2), keys, values


def rope_bounds(expected, q, k, v, cos, sin, k_cache, v_cache, cache_position) -> Results:
    """Two float32 products and a sum of numbers no larger than the pair's length, 3 * 2^-24 of it; then one
    rounding. A slot that was not written, and every value, must be exact."""
    turned, keys, values = expected
    pair = 2**0.5 * torch.stack((q.double().abs().amax(), k.double().abs().amax())).amax()
    q_bound = 3 * rounding(pair, torch.float32) + rounding(turned, q.dtype)
    k_bound = 3 * rounding(pair, torch.float32) + rounding(keys, q.dtype)
    return q_bound, torch.where(keys == k_cache.double(), 0, k_bound), torch.zeros_like(values)


def rope_case(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, slots: int) -> dict:
    positions = [list(range(100, 100 + tokens))] * batch
    return dict(positions=positions, heads=heads, kv_heads=kv_heads, head_dim=head_dim, slots=slots)


ENTRY = Entry(
    op=rope_and_cache_write,
    make_inputs=rope_inputs,
    writes=("k_cache", "v_cache"),
    reference=rope_reference,
    bounds=rope_bounds,
    # q, k and v in, as much out again, and the angles
    bytes_moved=lambda q, k, v, cos, sin, **_: (
        2 * (q.numel() + k.numel() + v.numel()) * q.element_size() + 2 * cos.numel() * 4
    ),
    small_cases={
        "one token": dict(positions=[[7]], heads=2, kv_heads=1, head_dim=32, slots=10),
        "several tokens, padding": dict(
            positions=[[3, 4, -1], [-1, 0, 1], [-1, -1, -1]], heads=2, kv_heads=2, head_dim=16, slots=6
        ),
        "ring": dict(positions=[[30, 31], [4, 5]], heads=2, kv_heads=1, head_dim=16, slots=7),
        "partial rotary": dict(positions=[[9, 10]], heads=3, kv_heads=1, head_dim=80, rotary_dim=32, slots=12),
        "odd number of angles": dict(positions=[[9]], heads=2, kv_heads=1, head_dim=20, rotary_dim=10, slots=12),
    },
    model_cases={
        "Llama-2-7B, 1 token": rope_case(1, 1, 32, 32, 128, 4096),
        "Llama-3-8B, 8 rows": rope_case(8, 1, 32, 8, 128, 8192),
        "Llama-3-8B, 512 tokens": rope_case(1, 512, 32, 8, 128, 8192),
        "Gemma-2b, 1 token": rope_case(1, 1, 8, 1, 256, 8192),
        "TinyLlama, 1 token": rope_case(1, 1, 32, 4, 64, 2048),
    },
)
