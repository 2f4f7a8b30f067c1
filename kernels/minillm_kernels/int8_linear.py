"""x W^T with int8 weights, one scale per output: `minillm::int8_linear`.

What bounds it: reading W, one byte per weight, half of bf16. The scale is applied to the finished sum, so
the inner loop multiplies integers. On a CPU, up to 16 rows, the activations are rounded to int16 (one scale per row,
error at most 1.5e-5 of the row's largest, and 2^-15 of that in a row with outliers, see cpu/linear.c): products and
sums are then exact integers, four times as many per instruction as in float32, and accuracy stays that of
weight-only quantization (the weights' own rounding is 4e-3 of their largest). 8-bit activations would be no
faster: memory is the limit already. More rows are bound by arithmetic: there the codes are multiplied as they are by x
as it is, in bfloat16 or float32 (cpu/gemm.c).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.linear import check_product
from minillm_kernels.op import op

PIECE = 1 << 20  # weights widened at a time: they stay in cache until multiplied


def check_int8(name: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
    check_product(name, x, weight, bias, scale)
    if weight.dtype != torch.int8:
        raise TypeError(f"{name}: weight must be int8, got {weight.dtype}")
    if scale.dtype != torch.float32 or scale.shape != (weight.shape[0],) or not scale.is_contiguous():
        raise ValueError(
            f"{name}: scale must be [{weight.shape[0]}] float32, contiguous, one per output, got {tuple(scale.shape)} "
            f"{scale.dtype}"
        )


@op(
    check=functools.partial(check_int8, "int8_linear"),
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    c=lambda x, weight, scale, bias=None: cpu.product(x, weight, scale, bias=bias),
    triton="minillm_kernels.gpu.int8_linear",
)
def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """(x W^T) * scale + bias. x [..., K] float32, bfloat16 or float16; weight [N, K] int8; scale [N] float32;
    bias [N] in x.dtype. Returns [..., N] in x.dtype. No gradient. Raises ValueError or TypeError.

    In C a row's result does not depend on the number of threads or on the other rows, only on whether there are more
    than 16 of them: then the codes are multiplied as they are by x as it is, in bfloat16 or float32.
    """
    return int8_linear_torch(x, weight, scale, bias)


def int8_linear_torch(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Widen some outputs' weights, multiply, scale, next: never holds the widened matrix."""
    outputs_at_once = max(1, PIECE // weight.shape[1])
    pieces = [
        F.linear(x, codes.to(x.dtype)).float() * piece_scale  # [..., outputs_at_once]
        for codes, piece_scale in zip(weight.split(outputs_at_once), scale.split(outputs_at_once), strict=True)
    ]
    y = torch.cat(pieces, dim=-1)  # [..., N]
    return (y if bias is None else y + bias.float()).to(x.dtype)
