"""attend(): queries against the cache, with several implementations behind one signature.

* `math` spells attention out in float32: the oracle, and the one to read.
* `sdpa` hands the same inputs to PyTorch's fused scaled-dot-product attention.
* `triton` and `c` are this project's own kernels (`kernels/`), on a GPU and on a CPU: each row reads only what
  its position makes visible, and norms, and rotation with the cache write, are one call each. On a CPU both
  names run the same C (or, without a compiler, PyTorch) code; `c` hands long steps to the others.

A backend declares what it can do; `choose_backend` picks once, at load. A backend that cannot serve
a model is refused by name, never silently replaced.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from minillm_kernels import cpu
from minillm_kernels.decode_attention import decode_attention
from minillm_kernels.flash_attention import flash_attention
from torch import Tensor

from minillm.cache import KeyView
from minillm.config import LayerSpec, ModelConfig
from minillm.errors import BackendError

_SHORT_STEP = 16  # tokens; longer steps are bound by arithmetic and go to the library


@dataclass(frozen=True)
class Backend:
    """An implementation of attention and what it can serve (all of them take windows, rings, GQA and MQA)."""

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, KeyView, LayerSpec], Tensor]
    softcap: bool
    max_head_dim: int | None  # None: any
    fused: bool = False  # norms, and rotation with the cache write, are one kernel each
    devices: tuple[str, ...] = ()  # device types it is limited to; (): none


def attend_math(q: Tensor, keys: Tensor, values: Tensor, view: KeyView, spec: LayerSpec) -> Tensor:
    """softmax(q k^T * scale) v over the visible slots, in float32.

    Args:
        q: `[B, T, H, D]` rotated queries, any float dtype.
        keys, values: `[B, KV, S, D]`; H is a multiple of KV (Ainslie et al. 2023, GQA, arXiv:2305.13245).
        view: which slots each query sees.
        spec: query scale and softcap of the layer.

    Returns `[B, T, H * D]` in q's dtype.
    """
    B, T, H, D = q.shape
    KV = keys.shape[1]
    keys, values = (
        keys[:, :, : view.key_length].float(),
        values[:, :, : view.key_length].float(),
    )  # [B, KV, S, D]
    grouped = q.float().view(B, T, KV, H // KV, D)  # query heads that share a key head side by side
    scores = torch.einsum("btkgd,bksd->bkgts", grouped, keys) * spec.query_scale  # [B, KV, G, T, S]
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~view.mask[:, None, None], float("-inf"))
    weights = scores.softmax(dim=-1)  # [B, KV, G, T, S]
    out = torch.einsum("bkgts,bksd->btkgd", weights, values)  # [B, T, KV, G, D]
    return out.reshape(B, T, H * D).to(q.dtype)


def attend_sdpa(q: Tensor, keys: Tensor, values: Tensor, view: KeyView, spec: LayerSpec) -> Tensor:
    """The same through `F.scaled_dot_product_attention`; arguments as for `attend_math`.

    The G query heads that share a key head are folded into the query length, so keys and values are
    read once and never repeated: measured 1.5x faster than `enable_gqa` on a CPU.
    """
    B, T, H, D = q.shape
    KV = keys.shape[1]
    G = H // KV
    q = q.view(B, T, KV, G, D).permute(0, 2, 3, 1, 4).reshape(B, KV, G * T, D)
    mask = view.mask[:, None].repeat(1, 1, G, 1)  # [B, 1, G * T, S]
    out = F.scaled_dot_product_attention(
        q,
        keys[:, :, : view.key_length],
        values[:, :, : view.key_length],
        attn_mask=mask,
        scale=spec.query_scale,
    )  # [B, KV, G * T, D]
    return out.view(B, KV, G, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)


def attend_triton(q: Tensor, keys: Tensor, values: Tensor, view: KeyView, spec: LayerSpec) -> Tensor:
    """The same through `minillm::flash_attention` and `minillm::decode_attention`; arguments as for `attend_math`."""
    if not view.from_start:
        return _attend_over_cache(q, keys, values, view, spec)
    B, T, H, D = q.shape
    # The rows' first tokens: slots 0 .. T - 1 are the keys, whatever the layer.
    keys, values = keys[:, :, :T], values[:, :, :T]  # [B, KV, T, D]
    out = flash_attention(q.transpose(1, 2), keys, values, spec.query_scale, view.window, spec.softcap)
    return out.transpose(1, 2).reshape(B, T, H * D)


def attend_c(q: Tensor, keys: Tensor, values: Tensor, view: KeyView, spec: LayerSpec) -> Tensor:
    """Short steps through the C kernel, called directly; arguments as for `attend_math`."""
    if q.shape[1] > _SHORT_STEP:
        return (attend_sdpa if spec.softcap is None else attend_math)(q, keys, values, view, spec)
    return _attend_over_cache(q, keys, values, view, spec)


def _attend_over_cache(q: Tensor, keys: Tensor, values: Tensor, view: KeyView, spec: LayerSpec) -> Tensor:
    B, T, H, D = q.shape
    keys, values = keys[:, :, : view.num_slots], values[:, :, : view.num_slots]  # [B, KV, S, D], without the bin
    position = view.cache_position
    q = q.transpose(1, 2)
    out = decode_attention(q, keys, values, position, spec.query_scale, view.window, spec.softcap)  # [B, H, T, D]
    return out.transpose(1, 2).reshape(B, T, H * D)


BACKENDS = {
    "math": Backend("math", attend_math, softcap=True, max_head_dim=None),
    "sdpa": Backend("sdpa", attend_sdpa, softcap=False, max_head_dim=None),
    "triton": Backend("triton", attend_triton, softcap=True, max_head_dim=256, fused=True),
    "c": Backend("c", attend_c, softcap=True, max_head_dim=None, fused=True, devices=("cpu", "meta")),
}


def choose_backend(name: str, config: ModelConfig, device: str = "meta") -> Backend:
    """The backend called `name`, or for "auto" the fastest that can serve every layer of `config` on this device type.

    Raises `BackendError` for an unknown name, or saying what the named backend lacks.
    """
    needs_softcap = any(layer.softcap is not None for layer in config.layers)
    if name == "auto" and device == "cpu" and cpu.available():
        return BACKENDS["c"]
    if name == "auto":
        return BACKENDS["math" if needs_softcap else "sdpa"]
    if name not in BACKENDS:
        raise BackendError(f"attention={name!r} is not one of auto, {', '.join(BACKENDS)}")
    backend = BACKENDS[name]
    if needs_softcap and not backend.softcap:
        raise BackendError(
            f"attention={name!r} has no score softcap, which {config.family} needs; use attention='auto' or 'math'"
        )
    if backend.devices and device not in backend.devices:
        raise BackendError(f"attention={name!r} runs on {backend.devices[0]} only, not on {device}; use 'triton' there")
    if backend.max_head_dim is not None and config.head_dim > backend.max_head_dim:
        raise BackendError(
            f"attention={name!r} serves heads of up to {backend.max_head_dim} channels, {config.family} has "
            f"{config.head_dim} here; use attention='auto'"
        )
    return backend
