"""RMSNorm and LayerNorm, alone or after the residual addition: `minillm::rms_norm`, `minillm::add_rms_norm`; and `add`.

What bounds them: on a small model nothing but launching. Each is one pass over one token's activations
(a few KB), so eager PyTorch spends its time starting five to eight kernels, each reading and writing the
same few KB. One launch each is the whole gain; see `gpu/norm.py`.
"""

import torch
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.op import DTYPES, check_devices, op


def check_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    multiply_in_fp32: bool,
    bias: Tensor | None = None,
    center: bool = False,
) -> None:
    if not x.dim() or weight.shape != (x.shape[-1],) or not weight.numel() or not weight.is_contiguous():
        raise ValueError(
            f"rms_norm: weight must be [N], contiguous, for x [..., N], N > 0; got {tuple(weight.shape)}, "
            f"{tuple(x.shape)}"
        )
    if x.dtype != weight.dtype or x.dtype not in DTYPES:
        raise ValueError(
            f"rms_norm: x and weight must share one dtype of float32, bfloat16, float16, got {x.dtype}, {weight.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape or bias.dtype != x.dtype or not bias.is_contiguous()):
        raise ValueError(
            f"rms_norm: bias must be [N], contiguous, in x's dtype {x.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )
    check_devices("rms_norm", x, weight, bias)
    if (center or bias is not None) and not multiply_in_fp32:
        raise ValueError("rms_norm: center and bias need multiply_in_fp32=True: LayerNorm rounds once, at its end")
    if offset != 0 and not multiply_in_fp32:
        raise ValueError(
            f"rms_norm: offset {offset} needs multiply_in_fp32=True: a norm that rounds before it multiplies "
            f"has no offset in any known model"
        )


def check_add(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.dtype != y.dtype or x.dtype not in DTYPES:
        raise ValueError(
            f"an addition wants two tensors of one shape, and one dtype of float32, bfloat16, float16; got "
            f"{tuple(x.shape)} {x.dtype} and {tuple(y.shape)} {y.dtype}"
        )
    check_devices("an addition", x, y)


def check_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    multiply_in_fp32: bool,
    bias: Tensor | None = None,
    center: bool = False,
) -> None:
    check_norm(x, weight, eps, offset, multiply_in_fp32, bias, center)
    check_add(x, residual)


def empty_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@op(
    check=check_norm,
    fake=lambda x, *_: empty_like(x),
    c=cpu.norm,
    triton="minillm_kernels.gpu.norm",
)
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    multiply_in_fp32: bool,
    bias: Tensor | None = None,
    center: bool = False,
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension (arXiv 1910.07467).

    x [..., N], weight [N], one dtype of float32, bfloat16, float16; returns [..., N] in that dtype. The mean is
    always taken in float32. Families differ in where they round, and their checkpoints were trained with it:
    Gemma (offset 1) and OLMo 2 (offset 0) multiply in float32 and round once, `multiply_in_fp32=True`;
    Llama rounds first and multiplies in x's dtype, `multiply_in_fp32=False` (offset 0 only).
    With `center` the mean of x is taken off first, which makes it LayerNorm (arXiv 1607.06450), and `bias` [N], in x's
    dtype, is added last; both need `multiply_in_fp32=True`.
    Raises ValueError when shapes or dtypes do not fit.
    """
    return norm(x, weight, eps, offset, multiply_in_fp32, bias, center)


@op(
    check=check_add_norm,
    fake=lambda x, *_: (empty_like(x), empty_like(x)),
    c=cpu.rms_norm,
    triton="minillm_kernels.gpu.norm",
)
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    multiply_in_fp32: bool,
    bias: Tensor | None = None,
    center: bool = False,
) -> tuple[Tensor, Tensor]:
    """(rms_norm(sum), sum) with sum = x + residual, rounded to their dtype; arguments as for `rms_norm`."""
    total = x + residual
    return norm(total, weight, eps, offset, multiply_in_fp32, bias, center), total


def norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, multiply_in_fp32: bool, bias: Tensor | None, center: bool
) -> Tensor:
    wide = x.float()
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if multiply_in_fp32:
        wide = wide * (offset + weight.float())
        return (wide if bias is None else wide + bias.float()).to(x.dtype)
    return wide.to(x.dtype) * weight


@op(check=check_add, c=cpu.add)
def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, of one shape and one dtype of float32, bfloat16, float16. Raises ValueError or TypeError.

    In C on a CPU, so that a pass can be recorded (`cpu/tape.py`); no op elsewhere.
    """
    return x + y
