"""What an attention backend is: four functions, with several implementations behind the same signatures.

    norm              x                      -> x, normed
    add_norm          x, residual            -> the sum, normed, and the sum
    rotate_and_write  q, k, v                -> q, rotated; keys and values, with k, rotated, and v among them
    attend            q, keys, values        -> softmax(q k^T) v

* `math` spells everything out in PyTorch, attention in float32: the oracle, and the one to read.
* `kernels` are this project's own (`kernels/`): Triton on a GPU, C on a CPU. Each function is one call, and a row
  reads only the keys that its position makes visible.

`load/backends.py` has PyTorch's fused attention as well, and picks one by name, once, when a model is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from minillm_kernels.cpu import FEW_ROWS  # of x, B * T: each of so many is added up by itself, whatever is beside it
from minillm_kernels.decode_attention import MAX_HEAD_DIM_TRITON, decode_attention
from minillm_kernels.flash_attention import flash_attention
from minillm_kernels.norm import add, add_rms_norm, rms_norm
from minillm_kernels.rope import rope_and_cache_write
from torch import Tensor

from minillm.cache import KeyView
from minillm.config import LayerSpec, NormSpec
from minillm.rope import rotate

Rotary = tuple[Tensor, Tensor]  # cos and sin of every position's angles, each [B, T, dim / 2] float32


@dataclass(frozen=True)
class Backend:
    """An implementation and what it can serve (all of them take windows, rings, GQA and MQA)."""

    name: str
    norm: Callable[[Tensor, Tensor, Tensor | None, NormSpec], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, NormSpec], tuple[Tensor, Tensor]]
    rotate_and_write: Callable[[Tensor, Tensor, Tensor, Rotary, Tensor, Tensor, KeyView], tuple[Tensor, Tensor, Tensor]]
    attend: Callable[[Tensor, Tensor, Tensor, KeyView, LayerSpec, Tensor | None], Tensor]
    softcap: bool = True
    gpu_only: bool = False
    max_head_dim: int | None = None  # None: any


# ---- in PyTorch ----


mean = partial(torch.mean, dim=-1, keepdim=True)  # [..., N] -> [..., 1]


def norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec, mean: Callable[[Tensor], Tensor] = mean
) -> Tensor:
    """x / rms(x) * (offset + weight) over the last dimension (Zhang & Sennrich 2019, arXiv:1910.07467); with `center`
    and bias LayerNorm (Ba et al. 2016, arXiv:1607.06450). With ranks x is a share, and `mean` is the whole's."""
    wide = x.float()
    if spec.center:
        wide = wide - mean(wide)
    wide = wide * torch.rsqrt(mean(wide.square()) + spec.eps)
    if spec.multiply_in_fp32:
        wide = wide * (spec.offset + weight.float())
        return (wide if bias is None else wide + bias.float()).to(x.dtype)
    return wide.to(x.dtype) * weight


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual), all `[B, T, d]`; without a weight the sum twice."""
    total = x + residual
    return (total if weight is None else norm(total, weight, bias, spec)), total


def rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, keys: Tensor, values: Tensor, view: KeyView
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate queries and keys; put keys and values into their slots of the cache.

    Args:
        q, k, v: `[B, T, H, D]`, `[B, T, KV, D]` twice.
        rotary: cos and sin of this step's positions.
        keys, values: the layer's part of the cache, `[B, KV, S + 1, D]`; written to.
        view: where each token goes.

    Returns the rotated queries, `[B, T, H, D]`, and the keys and values to attend to.
    """
    cos, sin = (part[:, :, None].to(q.dtype) for part in rotary)  # [B, T, 1, dim / 2], one for all heads
    row = torch.arange(q.shape[0], device=q.device)[:, None]  # [B, 1]
    keys[row, :, view.slots] = rotate(k, cos, sin)
    values[row, :, view.slots] = v
    return rotate(q, cos, sin), keys, values


def alibi(slopes: Tensor, view: KeyView) -> Tensor:
    """slope * (key position - query position), `[B, H, T, S]` float32 (Press et al. 2022, ALiBi, arXiv:2108.12409)."""
    distance = view.key_position - view.cache_position[:, :, None]  # [B, T, S]
    return slopes[:, None, None] * distance[:, None]


def attend_math(
    q: Tensor, keys: Tensor, values: Tensor, view: KeyView, spec: LayerSpec, slopes: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale) v over the visible slots, in float32.

    Args:
        q: `[B, T, H, D]` rotated queries, any float dtype.
        keys, values: `[B, KV, S + 1, D]`; H is a multiple of KV (Ainslie et al. 2023, GQA, arXiv:2305.13245).
        view: which slots each query sees.
        spec: query scale and softcap of the layer.
        slopes: `[H]` float32, of models that know positions by ALiBi; else None.

    Returns `[B, T, H * D]` in q's dtype.
    """
    B, T, H, D = q.shape
    KV = keys.shape[1]
    keys = keys[:, :, : view.key_length].float()  # [B, KV, S, D], and so the values
    values = values[:, :, : view.key_length].float()
    grouped = q.float().view(B, T, KV, H // KV, D)  # query heads that share a key head side by side
    scores = torch.einsum("btkgd,bksd->bkgts", grouped, keys) * spec.query_scale  # [B, KV, G, T, S]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if slopes is not None:
        scores = scores + alibi(slopes, view).view(B, KV, H // KV, T, -1)
    scores = scores.masked_fill(~view.mask[:, None, None], float("-inf"))
    weights = scores.softmax(dim=-1)  # [B, KV, G, T, S]
    out = torch.einsum("bkgts,bksd->btkgd", weights, values)  # [B, T, KV, G, D]
    return out.reshape(B, T, H * D).to(q.dtype)


# ---- in kernels ----


def norm_kernel(x: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec) -> Tensor:
    """`norm` in one call."""
    return rms_norm(x, weight, spec.eps, spec.offset, spec.multiply_in_fp32, bias, spec.center)


def add_norm_kernel(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
) -> tuple[Tensor, Tensor]:
    """`add_norm` in one call."""
    if weight is None:
        total = add(x, residual)
        return total, total
    return add_rms_norm(x, residual, weight, spec.eps, spec.offset, spec.multiply_in_fp32, bias, spec.center)


def rotate_and_write_kernel(
    q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, keys: Tensor, values: Tensor, view: KeyView
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate_and_write` in one call, which rounds once, at its end."""
    rotated = rope_and_cache_write(q, k, v, *rotary, keys, values, view.cache_position)  # [B, H, T, D]
    return rotated.transpose(1, 2), keys, values


def attend_kernel(
    q: Tensor, keys: Tensor, values: Tensor, view: KeyView, spec: LayerSpec, slopes: Tensor | None = None
) -> Tensor:
    """Attention through the kernel that suits the step; arguments as for `attend_math`."""
    B, T, H, D = q.shape
    q = q.transpose(1, 2)  # [B, H, T, D]
    keys, values = keys[:, :, : view.num_slots], values[:, :, : view.num_slots]  # [B, KV, S, D], without the bin
    # Of few tokens the keys are split among programs or threads; of more each key is read for a whole block of them.
    kernel = decode_attention if T <= FEW_ROWS else flash_attention
    out = kernel(q, keys, values, view.cache_position, spec.query_scale, view.window, spec.softcap, slopes)
    return out.transpose(1, 2).reshape(B, T, H * D)


MATH = Backend("math", norm, add_norm, rotate_and_write, attend_math)
KERNELS = Backend(
    "kernels", norm_kernel, add_norm_kernel, rotate_and_write_kernel, attend_kernel, max_head_dim=MAX_HEAD_DIM_TRITON
)
