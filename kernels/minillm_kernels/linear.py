"""Dense x W^T for few rows: `minillm::linear`.

What bounds it: decoding one token multiplies every weight once, so the time is the time to read W from
memory: 2 bytes per multiply-add in bf16. A library GEMM is made for many rows and reads W at half the
speed of memory or worse; the C kernel (`cpu/linear.c`) streams it once, whatever the number of rows up to 16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import cpu

FEW_ROWS = 16  # above: the library, which blocks for caches in all three directions (float16: it does not)


def linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The CPU implementation itself, for callers outside a graph: an op call costs 5 us more."""
    check_linear("linear", x, weight, weight.shape[1], bias)
    if weight.dtype != x.dtype:
        raise TypeError(f"linear: x is {x.dtype} but weight is {weight.dtype}; cast one of them")
    if in_c(x):
        return cpu.product(x, weight, bias=bias)
    return library_linear(x, weight, bias)


def in_c(x: Tensor) -> bool:
    """Whether the C kernel multiplies x [..., K] by a dense weight. At 512 rows of 2048 x 2048 on a Zen 5 core pair
    oneDNN takes 10 ms in float32 and 5 in bfloat16 where the kernel takes 16 and 7; PyTorch's float16 is five
    times slower than the kernel at any number of rows."""
    return (x.numel() <= FEW_ROWS * x.shape[-1] or x.dtype == torch.float16) and cpu.available()


@torch.library.custom_op("minillm::linear", mutates_args=(), device_types="cpu")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias. x [..., K], weight [N, K], bias [N], one dtype of float32, bfloat16, float16.

    Returns [..., N] in that dtype; sums are float32. No gradient: training goes through F.linear.
    With up to 16 rows a row's result does not depend on the other rows. Raises ValueError or TypeError.
    """
    return linear_cpu(x, weight, bias)


@linear.register_kernel("cuda")
def linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """On a GPU the library's own matrix-vector product is at the limit already."""
    check_linear("linear", x, weight, weight.shape[1], bias)
    return F.linear(x, weight, bias)


@linear.register_fake
def _(x, weight, bias=None):
    check_linear("linear", x, weight, weight.shape[1], bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def library_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear, through oneDNN for float32: PyTorch would call MKL, which is 2-3x slower on AMD."""
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and x.numel() and weight.numel():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def check_linear(name: str, x: Tensor, weight: Tensor, inputs: int, bias: Tensor | None) -> None:
    """Raise unless x [..., inputs], weight [N, ...] and bias [N] fit together."""
    if weight.dim() != 2 or x.shape[-1] != inputs:
        raise ValueError(
            f"{name}: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: the last "
            f"dimension of x must be the weight's number of inputs, {inputs}"
        )
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{name}: x must be float32, bfloat16 or float16, got {x.dtype}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
        raise ValueError(
            f"{name}: bias must be [{weight.shape[0]}] in x's dtype {x.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )
