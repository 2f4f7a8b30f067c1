"""Rotary embedding: its `angles`, and the rotation with the cache write, `minillm::rope_and_cache_write`.

What bounds it: launching, as for the norms: twelve operators in eager PyTorch, a few KB each. One launch rotates
queries and keys and puts keys and values where attention will read them; see `gpu/rope.py`.
"""

import torch
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.op import DTYPES, check_devices, op


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_position: Tensor,
) -> None:
    queries, shape = q.shape, k.shape
    if len(queries) != 4 or len(shape) != 4 or shape != v.shape or queries[0] != shape[0] or queries[1] != shape[1]:
        raise ValueError(
            f"rope_and_cache_write wants q [B, T, H, D] and k, v [B, T, KV, D], "
            f"got {tuple(queries)}, {tuple(shape)}, {tuple(v.shape)}"
        )
    batch, tokens, kv_heads, head_dim = shape
    angles = cos.shape
    if queries[3] != head_dim or len(angles) != 3 or angles != (batch, tokens, angles[2]) or angles != sin.shape:
        raise ValueError(
            f"rope_and_cache_write: q must have k's head size {head_dim} and cos, sin must be [B, T, R / 2] = "
            f"[{batch}, {tokens}, ...], got {queries[3]}, {tuple(angles)}, {tuple(sin.shape)}"
        )
    if not 1 <= angles[2] <= head_dim // 2 or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(
            f"rope_and_cache_write: cos and sin must be float32 with 1 to {head_dim // 2} angles, "
            f"got {angles[2]} angles in {cos.dtype}, {sin.dtype}"
        )
    if head_dim > cpu.MAX_HEAD_DIM:
        raise ValueError(f"rope_and_cache_write: head size {head_dim} is over the largest, {cpu.MAX_HEAD_DIM}")
    cache = k_cache.shape
    if cache != v_cache.shape or len(cache) != 4 or cache != (batch, kv_heads, cache[2], head_dim):
        raise ValueError(
            f"rope_and_cache_write: caches must be [B, KV, S + 1, D] = [{batch}, {kv_heads}, ..., {head_dim}], "
            f"got {tuple(cache)}, {tuple(v_cache.shape)}"
        )
    if tokens > cache[2] - 1 or cache[2] < 2:
        raise ValueError(f"rope_and_cache_write: {tokens} tokens in one step do not fit {cache[2] - 1} slots")
    if cache_position.shape != (batch, tokens) or cache_position.dtype != torch.int64:
        raise ValueError(
            f"rope_and_cache_write: cache_position must be [B, T] = {(batch, tokens)} int64, "
            f"got {tuple(cache_position.shape)} {cache_position.dtype}"
        )
    if not q.dtype == k.dtype == v.dtype == k_cache.dtype == v_cache.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"rope_and_cache_write: q, k, v and both caches must share one dtype of float32, bfloat16, float16, got "
            f"{q.dtype}, {k.dtype}, {v.dtype}, {k_cache.dtype}, {v_cache.dtype}"
        )
    if not k_cache.is_contiguous() or not v_cache.is_contiguous():
        raise ValueError("rope_and_cache_write: the caches must be contiguous")
    if q.stride()[3] != 1 or k.stride()[3] != 1 or v.stride()[3] != 1:
        raise ValueError("rope_and_cache_write: the last dimension of q, k and v must be contiguous")
    check_devices("rope_and_cache_write", q, k, v, cos, sin, k_cache, v_cache, cache_position)


def fake(q: Tensor, *_) -> Tensor:
    batch, tokens, heads, head_dim = q.shape
    return torch.empty((batch, heads, tokens, head_dim), dtype=q.dtype, device=q.device)


@op(
    check=check,
    fake=fake,
    c=cpu.rope_and_cache_write,
    triton="minillm_kernels.gpu.rope",
    mutates_args=("k_cache", "v_cache"),
)
def rope_and_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_position: Tensor,
) -> Tensor:
    """Rotate queries and keys by their positions (RoPE, arXiv 2104.09864), write keys and values to the cache.

    q [B, T, H, D]; k, v [B, T, KV, D]; cos, sin [B, T, R / 2] float32, any scaling already in them. The first
    R <= D channels turn, channel j paired with j + R / 2 ("rotate half"); the rest pass through.
    k_cache, v_cache [B, KV, S + 1, D], contiguous: the token at position p goes to slot p % S; slot S is a bin
    whose contents nobody reads, for padding (position -1). T <= S. cache_position [B, T] int64.
    Returns the rotated queries [B, H, T, D], as `decode_attention` takes them. Computes in float32, rounds
    once. Raises ValueError when shapes or dtypes do not fit.
    """
    slots = k_cache.shape[2] - 1
    slot = torch.where(cache_position < 0, slots, cache_position % slots)  # [B, T]
    row = torch.arange(q.shape[0], device=q.device)[:, None]  # [B, 1]
    k_cache[row, :, slot] = rotate(k, cos, sin)  # [B, T, KV, D]
    v_cache[row, :, slot] = v
    return rotate(q, cos, sin).transpose(1, 2).contiguous()  # [B, H, T, D]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]  # [B, T, 1, R / 2]
    first, second, rest = x.float().split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(turned, dim=-1).to(x.dtype)  # [B, T, heads, D]


def check_angles(position: Tensor, frequency: Tensor, scale: float) -> None:
    if not abs(scale) < 2**64:
        raise ValueError(f"angles: scale must be a finite number, got {scale!r}")
    if position.dim() != 2 or position.dtype != torch.int64:
        raise ValueError(f"angles: position must be [B, T] int64, got {tuple(position.shape)} {position.dtype}")
    if frequency.dim() != 2 or frequency.dtype != torch.float32 or len(frequency) not in (1, len(position)):
        raise ValueError(
            f"angles: frequency must be [B | 1, R / 2] float32, got {tuple(frequency.shape)} {frequency.dtype}"
        )
    check_devices("angles", position, frequency)


@op(check=check_angles, c=cpu.angles)
def angles(position: Tensor, frequency: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * frequency, both times `scale`: position [B, T] int64, frequency [B | 1, R / 2]
    float32; two [B, T, R / 2] float32.

    In C on a CPU, so that a pass can be recorded; no op elsewhere. Raises ValueError when shapes or dtypes do not fit.
    """
    angle = position[:, :, None].float() * frequency[:, None, :]  # [B, T, R / 2]
    return angle.cos() * scale, angle.sin() * scale
