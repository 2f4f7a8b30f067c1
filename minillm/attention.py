"""What an attention backend is: four functions, with several implementations behind the same signatures.

    norm              x                      -> x, normed
    add_norm          x, residual            -> the sum, normed, and the sum
    rotate_and_write  q, k, v                -> q, rotated; keys and values, with k, rotated, and v among them
    attend            q, keys, values        -> softmax(q k^T) v

* `math` spells everything out in PyTorch, attention in float32: the oracle, and the one to read.
* `sdpa` hands attention to PyTorch's fused scaled-dot-product attention, which chooses among its implementations;
  `sdpa:flash`, `sdpa:efficient`, `sdpa:cudnn`, `sdpa:math` name one. Flash on a GPU takes no mask: it computes the
  beginning of a text, and steps over a cache are left to `efficient`.
* `kernels` are this project's own (`kernels/`): Triton on a GPU, C on a CPU. Each function is one call, and a row
  reads only the keys that its position makes visible.

A backend declares what it can do; `choose_backend` picks once, at load. A backend that cannot serve a model is
refused by name, never silently replaced.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from minillm_kernels import cpu
from minillm_kernels.cpu import FEW_ROWS
from minillm_kernels.decode_attention import decode_attention
from minillm_kernels.flash_attention import flash_attention
from minillm_kernels.launch import why_no_launch
from minillm_kernels.norm import add, add_rms_norm, rms_norm
from minillm_kernels.rope import rope_and_cache_write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillm.cache import KeyView
from minillm.config import LayerSpec, ModelConfig, NormSpec
from minillm.errors import BackendError
from minillm.options import ATTENTION
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
    and bias LayerNorm (Ba et al. 2016, arXiv:1607.06450). Another `mean` is that of a vector of which x is a part."""
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


# PyTorch's switches between its implementations are the process's: a thread would put back what another has set.
_SWITCHES = threading.RLock()


def attend_sdpa(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    view: KeyView,
    spec: LayerSpec,
    slopes: Tensor | None = None,
    only: SDPBackend | None = None,
) -> Tensor:
    """The same through `F.scaled_dot_product_attention`, or that implementation of it; arguments as for `attend_math`.

    The G query heads that share a key head are folded into the query length, so keys and values are
    read once and never repeated: measured 1.5x faster than `enable_gqa` on a CPU. Raises `BackendError` where PyTorch
    has no such implementation.
    """
    B, T, H, D = q.shape
    KV = keys.shape[1]
    G = H // KV
    flash = only is SDPBackend.FLASH_ATTENTION and not q.is_cpu
    plain = slopes is None and (view.window is None or view.window >= T)
    whole = flash and view.from_start and plain  # causal says it all
    only = SDPBackend.EFFICIENT_ATTENTION if flash and not whole else only
    alone = only is not None and not torch.compiler.is_compiling()
    with _SWITCHES if alone else nullcontext(), nullcontext() if only is None else sdpa_kernel(only):
        try:
            if whole:
                q, keys, values = q.transpose(1, 2), keys[:, :, :T], values[:, :, :T]  # [B, H | KV, T, D]
                options = dict(is_causal=True, scale=spec.query_scale, enable_gqa=True)
                out = F.scaled_dot_product_attention(q, keys, values, **options)  # [B, H, T, D]
                return out.transpose(1, 2).reshape(B, T, H * D)
            q = q.reshape(B, T, KV, G, D).permute(0, 2, 3, 1, 4).reshape(B, KV, G * T, D)
            if slopes is None:
                mask = view.mask[:, None].repeat(1, 1, G, 1)  # [B, 1, G * T, S]
            else:
                mask = alibi(slopes, view).masked_fill(~view.mask[:, None], float("-inf"))  # [B, H, T, S]
                mask = mask.view(B, KV, G * T, -1).to(q.dtype)
            keys, values = keys[:, :, : view.key_length], values[:, :, : view.key_length]  # [B, KV, S, D]
            out = F.scaled_dot_product_attention(q, keys, values, mask, scale=spec.query_scale)  # [B, KV, G * T, D]
        except RuntimeError as error:
            if only is None or "kernel" not in str(error):
                raise
            wanted = f"no {only.name} for {q.dtype} and heads of {D} on {q.device}"
            raise BackendError(f"PyTorch's scaled_dot_product_attention has {wanted}: use attention='sdpa'") from error
    return out.view(B, KV, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)


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
    position, options = view.cache_position, (spec.query_scale, view.window, spec.softcap, slopes)
    if T <= FEW_ROWS:  # the keys are split among programs or threads
        out = decode_attention(q, keys, values, position, *options)  # [B, H, T, D]
    else:  # each key is read for a whole block of tokens
        out = flash_attention(q, keys, values, *options, cache_position=position)  # [B, H, T, D]
    return out.transpose(1, 2).reshape(B, T, H * D)


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("math", norm, add_norm, rotate_and_write, attend_math),
        Backend("sdpa", norm, add_norm, rotate_and_write, attend_sdpa, softcap=False),
        *(
            Backend(f"sdpa:{word}", norm, add_norm, rotate_and_write, partial(attend_sdpa, only=only), False, gpu_only)
            for word, only, gpu_only in (
                ("flash", SDPBackend.FLASH_ATTENTION, False),
                ("efficient", SDPBackend.EFFICIENT_ATTENTION, True),
                ("cudnn", SDPBackend.CUDNN_ATTENTION, True),
                ("math", SDPBackend.MATH, False),
            )
        ),
        Backend("kernels", norm_kernel, add_norm_kernel, rotate_and_write_kernel, attend_kernel, max_head_dim=256),
    )
}


def why_no_kernels(config: ModelConfig, device: torch.device | str) -> str | None:
    """What keeps this project's kernels from serving a model on a device; None where they can."""
    widest, device = BACKENDS["kernels"].max_head_dim, torch.device(device)
    if config.head_dim > widest:
        return f"they serve heads of up to {widest} channels, {config.family} has {config.head_dim} here"
    return why_no_launch(device) if device.type == "cuda" else None


def choose_backend(name: str | Backend, config: ModelConfig, device: torch.device | str = "meta") -> Backend:
    """The backend called `name`, or for "auto" the fastest that can serve every layer of `config` on this device.

    Raises `BackendError` for an unknown name, or saying what the named backend lacks.
    """
    if isinstance(name, Backend):  # one that is not for a cache: `train/attention.py`
        return name
    if name not in ATTENTION:
        raise BackendError(f"attention={name!r} is not one of {', '.join(ATTENTION)}")
    needs_softcap = any(layer.softcap is not None for layer in config.layers)
    lacking, device_type = why_no_kernels(config, device), torch.device(device).type
    if name == "auto":
        # Without a compiler the ops run PyTorch code, which is no faster than the library's.
        if lacking is None and (device_type == "cuda" or (device_type == "cpu" and cpu.available())):
            return BACKENDS["kernels"]
        return BACKENDS["math" if needs_softcap else "sdpa"]
    backend = BACKENDS[name]
    if needs_softcap and not backend.softcap:
        raise BackendError(
            f"attention={name!r} has no score softcap, which {config.family} needs; use attention='auto' or 'math'"
        )
    if backend.gpu_only and device_type == "cpu":
        raise BackendError(f"attention={name!r} runs on a GPU only; use attention='sdpa' on the CPU")
    if name == "kernels" and lacking is not None:
        raise BackendError(f"attention='kernels' cannot be used: {lacking}; use attention='auto'")
    return backend
