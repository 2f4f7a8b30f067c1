"""The small ops between the matrix products: RMSNorm, and rotary embedding with the cache write.

What bounds them: on a small model nothing but launching. Each is one pass over one token's activations
(a few KB), so eager PyTorch spends its time starting five to eight kernels, each reading and writing the
same few KB. One launch each is the whole gain; see `gpu/norm_rope.py`.
"""

import torch
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.launch import interpreting


@torch.library.custom_op("minillm::rms_norm", mutates_args=(), device_types="cpu")
def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, multiply_in_fp32: bool) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension (arXiv 1910.07467).

    x [..., N], weight [N], one floating dtype; returns [..., N] in that dtype. The mean is always taken in
    float32. Families differ in where they round, and their checkpoints were trained with it:
    Gemma (offset 1) and OLMo 2 (offset 0) multiply in float32 and round once, `multiply_in_fp32=True`;
    Llama rounds first and multiplies in x's dtype, `multiply_in_fp32=False` (offset 0 only).
    Raises ValueError when shapes or dtypes do not fit.
    """
    check_norm(x, weight, offset, multiply_in_fp32)
    if interpreting():
        from minillm_kernels.gpu import norm_rope as triton_kernel

        return triton_kernel.launch_rms_norm(x, None, weight, eps, offset, multiply_in_fp32)[0]
    return rms_norm_cpu(x, weight, eps, offset, multiply_in_fp32)


def rms_norm_cpu(x: Tensor, weight: Tensor, eps: float, offset: float, multiply_in_fp32: bool) -> Tensor:
    """The CPU implementation itself, for callers outside a graph: an op call costs 5 us more."""
    if x.numel() and cpu.available():
        return cpu.rms_norm(x, None, weight, eps, offset, multiply_in_fp32)[0]
    return norm(x, weight, eps, offset, multiply_in_fp32)


@torch.library.custom_op("minillm::add_rms_norm", mutates_args=(), device_types="cpu")
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, multiply_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """(rms_norm(sum), sum) with sum = x + residual, rounded to their dtype; arguments as for `rms_norm`."""
    check_norm(x, weight, offset, multiply_in_fp32)
    check_residual(x, residual)
    if interpreting():
        from minillm_kernels.gpu import norm_rope as triton_kernel

        return triton_kernel.launch_rms_norm(x, residual, weight, eps, offset, multiply_in_fp32)
    return add_rms_norm_cpu(x, residual, weight, eps, offset, multiply_in_fp32)


def add_rms_norm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, multiply_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The CPU implementation itself, for callers outside a graph."""
    if x.numel() and cpu.available():
        return cpu.rms_norm(x, residual, weight, eps, offset, multiply_in_fp32)
    total = x + residual
    return norm(total, weight, eps, offset, multiply_in_fp32), total


def add_cpu(x: Tensor, y: Tensor) -> Tensor:
    """x + y: an op of its own only where a pass is to be recorded (`cpu/tape.py`)."""
    return cpu.add(x, y) if x.is_contiguous() and y.is_contiguous() and cpu.available() else x + y


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, multiply_in_fp32: bool) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if multiply_in_fp32:
        return (wide * (offset + weight.float())).to(x.dtype)
    return wide.to(x.dtype) * weight


@torch.library.custom_op("minillm::rope_and_cache_write", mutates_args=("k_cache", "v_cache"), device_types="cpu")
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
    k_cache, v_cache [B, KV, S + 1, D]: the token at position p goes to slot p % S; slot S is a bin whose
    contents nobody reads, for padding (position -1). T <= S. cache_position [B, T] int64.
    Returns the rotated queries [B, H, T, D], as `decode_attention` takes them. Computes in float32, rounds
    once. Raises ValueError when shapes or dtypes do not fit.
    """
    check_rope(q, k, v, cos, sin, k_cache, v_cache, cache_position)
    if interpreting():
        from minillm_kernels.gpu import norm_rope as triton_kernel

        return triton_kernel.launch_rope(q, k, v, cos, sin, k_cache, v_cache, cache_position)
    return rope_and_cache_write_cpu(q, k, v, cos, sin, k_cache, v_cache, cache_position)


def rope_and_cache_write_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_position: Tensor,
) -> Tensor:
    """The CPU implementation itself, for callers outside a graph."""
    if q.numel() and k_cache.is_contiguous() and v_cache.is_contiguous() and cpu.available():
        return cpu.rope_and_cache_write(q, k, v, cos, sin, k_cache, v_cache, cache_position)
    slots = k_cache.shape[2] - 1
    slot = torch.where(cache_position < 0, slots, cache_position % slots)  # [B, T]
    row = torch.arange(q.shape[0])[:, None]  # [B, 1]
    k_cache[row, :, slot] = rotate(k, cos, sin)  # [B, T, KV, D]
    v_cache[row, :, slot] = v
    return rotate(q, cos, sin).transpose(1, 2).contiguous()  # [B, H, T, D]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]  # [B, T, 1, R / 2]
    first, second, rest = x.float().split((half, half, x.shape[-1] - 2 * half), dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin, rest)
    return torch.cat(turned, dim=-1).to(x.dtype)  # [B, T, heads, D]


@rms_norm.register_kernel("cuda")
def rms_norm_cuda(x, weight, eps, offset, multiply_in_fp32):
    from minillm_kernels.gpu import norm_rope as triton_kernel

    check_norm(x, weight, offset, multiply_in_fp32)
    with torch.cuda.device(x.device):
        return triton_kernel.launch_rms_norm(x, None, weight, eps, offset, multiply_in_fp32)[0]


@add_rms_norm.register_kernel("cuda")
def add_rms_norm_cuda(x, residual, weight, eps, offset, multiply_in_fp32):
    from minillm_kernels.gpu import norm_rope as triton_kernel

    check_norm(x, weight, offset, multiply_in_fp32)
    check_residual(x, residual)
    with torch.cuda.device(x.device):
        return triton_kernel.launch_rms_norm(x, residual, weight, eps, offset, multiply_in_fp32)


@rope_and_cache_write.register_kernel("cuda")
def rope_and_cache_write_cuda(q, k, v, cos, sin, k_cache, v_cache, cache_position):
    from minillm_kernels.gpu import norm_rope as triton_kernel

    check_rope(q, k, v, cos, sin, k_cache, v_cache, cache_position)
    with torch.cuda.device(q.device):
        return triton_kernel.launch_rope(q, k, v, cos, sin, k_cache, v_cache, cache_position)


@rms_norm.register_fake
def _(x, weight, eps, offset, multiply_in_fp32):
    check_norm(x, weight, offset, multiply_in_fp32)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@add_rms_norm.register_fake
def _(x, residual, weight, eps, offset, multiply_in_fp32):
    check_norm(x, weight, offset, multiply_in_fp32)
    check_residual(x, residual)
    empty = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return empty, torch.empty_like(empty)


@rope_and_cache_write.register_fake
def _(q, k, v, cos, sin, k_cache, v_cache, cache_position):
    check_rope(q, k, v, cos, sin, k_cache, v_cache, cache_position)
    batch, tokens, heads, head_dim = q.shape
    return torch.empty((batch, heads, tokens, head_dim), dtype=q.dtype, device=q.device)


def check_norm(x: Tensor, weight: Tensor, offset: float, multiply_in_fp32: bool) -> None:
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must be [N] for x [..., N], got {tuple(weight.shape)}, {tuple(x.shape)}")
    if x.dtype != weight.dtype or not x.is_floating_point():
        raise ValueError(f"rms_norm: x and weight must share one floating dtype, got {x.dtype}, {weight.dtype}")
    if offset != 0 and not multiply_in_fp32:
        raise ValueError(
            f"rms_norm: offset {offset} needs multiply_in_fp32=True: a norm that rounds before it multiplies "
            f"has no offset in any known model"
        )


def check_residual(x: Tensor, residual: Tensor) -> None:
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: residual must have x's shape and dtype, got {tuple(residual.shape)} "
            f"{residual.dtype} for {tuple(x.shape)} {x.dtype}"
        )


def check_rope(q, k, v, cos, sin, k_cache, v_cache, cache_position) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"rope_and_cache_write wants q [B, T, H, D] and k, v [B, T, KV, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    batch, tokens, kv_heads, head_dim = k.shape
    half = cos.shape[-1]
    if q.shape[3] != head_dim or cos.shape != (batch, tokens, half) or cos.shape != sin.shape:
        raise ValueError(
            f"rope_and_cache_write: q must have k's head size {head_dim} and cos, sin must be [B, T, R / 2] = "
            f"[{batch}, {tokens}, ...], got {q.shape[3]}, {tuple(cos.shape)}, {tuple(sin.shape)}"
        )
    if not 1 <= half <= head_dim // 2 or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise ValueError(
            f"rope_and_cache_write: cos and sin must be float32 with 1 to {head_dim // 2} angles, "
            f"got {half} angles in {cos.dtype}"
        )
    if k_cache.shape != v_cache.shape or k_cache.shape[:2] != (batch, kv_heads) or k_cache.shape[3] != head_dim:
        raise ValueError(
            f"rope_and_cache_write: caches must be [B, KV, S + 1, D] = [{batch}, {kv_heads}, ..., {head_dim}], "
            f"got {tuple(k_cache.shape)}, {tuple(v_cache.shape)}"
        )
    if tokens > k_cache.shape[2] - 1:
        raise ValueError(f"rope_and_cache_write: {tokens} tokens in one step do not fit {k_cache.shape[2] - 1} slots")
    if cache_position.shape != (batch, tokens):
        raise ValueError(
            f"rope_and_cache_write: cache_position must be [B, T] = {(batch, tokens)}, "
            f"got {tuple(cache_position.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype == k_cache.dtype == v_cache.dtype or not q.is_floating_point():
        raise ValueError(
            f"rope_and_cache_write: q, k, v and both caches must share one floating dtype, got {q.dtype}, "
            f"{k.dtype}, {v.dtype}, {k_cache.dtype}, {v_cache.dtype}"
        )
    if any(x.stride(3) != 1 for x in (q, k, v, k_cache, v_cache)):
        raise ValueError("rope_and_cache_write: the last dimension of q, k, v and caches must be contiguous")
