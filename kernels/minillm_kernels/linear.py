"""Dense x W^T: `minillm::linear`.

What bounds it: decoding one token multiplies every weight once, so the time is the time to read W from
memory: 2 bytes per multiply-add in bf16. A library GEMM is made for many rows and reads W at half the
speed of memory or worse; the C kernel (`cpu/linear.c`) streams it once, whatever the number of rows up to 16.
A prompt is bound by arithmetic. The C kernel for that (`cpu/gemm.c`) is as fast as the library's, and it gives each
row the same result whatever stands beside it, takes quantized weights, and waits for no thread of OpenMP's.
On a GPU the library's own matrix-vector product is at the limit already.
"""

import functools

import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.op import DTYPES, check_devices, op


def check_product(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor, per_element: int = 1
) -> None:
    """Raise unless x [..., K], weight [N, K / per_element] and bias [N] fit together; `others` for their device."""
    shape, inputs = weight.shape, x.shape[-1] if x.dim() else 0
    if len(shape) != 2 or inputs != shape[1] * per_element:
        raise ValueError(
            f"{name}: x {tuple(x.shape)} and weight {tuple(shape)} do not fit: the last "
            f"dimension of x must be the weight's number of inputs"
        )
    if not inputs:
        raise ValueError(f"{name}: the weight has no inputs: {tuple(shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: x must be float32, bfloat16 or float16, got {x.dtype}")
    check_devices(name, x, weight, bias, *others)
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (shape[0],) or not bias.is_contiguous()):
        raise ValueError(
            f"{name}: bias must be [{shape[0]}], contiguous, in x's dtype {x.dtype}, got {tuple(bias.shape)} "
            f"{bias.dtype}"
        )


def check_dense(name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    if weight.dtype != x.dtype:
        raise TypeError(f"{name}: x is {x.dtype} but weight is {weight.dtype}; cast one of them")
    check_product(name, x, weight, bias)


@op(
    check=functools.partial(check_dense, "linear"),
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    c=lambda x, weight, bias=None: cpu.product(x, weight, bias=bias),
)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. x [..., K], weight [N, K], bias [N], one dtype of float32, bfloat16, float16.

    Returns [..., N] in that dtype; sums are float32. No gradient: training goes through F.linear.
    In C a row's result does not depend on the other rows, only on whether there are more than 16 of them.
    Raises ValueError or TypeError.
    """
    return F.linear(x, weight, bias)
