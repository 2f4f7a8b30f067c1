"""Which attention backend a decoder is loaded with: one of the road's two, or PyTorch's fused attention.

`sdpa` hands attention to PyTorch's fused scaled-dot-product attention, which chooses among its implementations;
`sdpa:flash`, `sdpa:efficient`, `sdpa:cudnn`, `sdpa:math` name one. Flash on a GPU takes no mask: it computes the
beginning of a text, and steps over a cache are left to `efficient`.

A backend declares what it can do. One that cannot serve a model is refused by name, never silently replaced.
"""

import threading
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from minillm_kernels import cpu
from minillm_kernels.launch import why_no_launch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minillm.attention import KERNELS, MATH, Backend, add_norm, alibi, norm, rotate_and_write
from minillm.cache import KeyView
from minillm.config import LayerSpec, ModelConfig
from minillm.errors import BackendError, first_line, shown
from minillm.options import ATTENTION

# PyTorch's switches between its implementations are the process's: a thread would follow what another has set.
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
    """`attend_math` through `F.scaled_dot_product_attention`, or that implementation of it; arguments as there.

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
    one_by_one = nullcontext() if torch.compiler.is_compiling() else _SWITCHES
    with one_by_one, nullcontext() if only is None else sdpa_kernel(only):
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


BACKENDS = {
    backend.name: backend
    for backend in (
        MATH,
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
        KERNELS,
    )
}


def why_no_kernels(config: ModelConfig, device: torch.device) -> str | None:
    """What keeps this project's kernels from serving a model on a device; None where they can."""
    widest = KERNELS.max_head_dim
    if config.head_dim > widest:
        return f"they serve heads of up to {widest} channels, {config.family} has {config.head_dim} here"
    return why_no_launch(device) if device.type == "cuda" else None


def choose_backend(name: str | Backend, config: ModelConfig, device: torch.device | str = "meta") -> Backend:
    """The backend called `name`, or for "auto" the fastest that can serve every layer of `config` on this device
    (on "meta", where nothing runs, the library's).

    Raises `BackendError` for an unknown name, or saying what the named backend lacks.
    """
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BackendError(f"device {shown(device)}: {first_line(error)}") from error
    if isinstance(name, Backend):  # of the caller's own
        return name
    if name not in ATTENTION:
        raise BackendError(f"attention={name!r} is not one of {', '.join(ATTENTION)}")
    needs_softcap = any(layer.softcap is not None for layer in config.layers)
    lacking = why_no_kernels(config, device)
    if name == "auto":
        # Without a compiler the ops run PyTorch code, which is no faster than the library's.
        if lacking is None and (device.type == "cuda" or (device.type == "cpu" and cpu.available())):
            return KERNELS
        return BACKENDS["math" if needs_softcap else "sdpa"]
    backend = BACKENDS[name]
    if needs_softcap and not backend.softcap:
        raise BackendError(
            f"attention={name!r} has no score softcap, which {config.family} needs; use attention='auto' or 'math'"
        )
    if backend.gpu_only and device.type == "cpu":
        raise BackendError(f"attention={name!r} runs on a GPU only; use attention='sdpa' on the CPU")
    if name == "kernels" and lacking is not None:
        raise BackendError(f"attention='kernels' cannot be used: {lacking}; use attention='auto'")
    return backend
