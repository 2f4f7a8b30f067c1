"""RMSNorm or LayerNorm, with the residual addition before it if there is one, in one launch.

grid (rows): one program = one row, held in registers between the two passes that a norm needs (sum of squares, then
scaling), so that it is read once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm_kernels.launch import choose


@triton.jit
def rms_norm_kernel(
    x, residual, weight, bias, out, total, x_row, residual_row, eps, offset,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, MULTIPLY_IN_FP32: tl.constexpr, CENTER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < SIZE
    h = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + row * residual_row + column, mask=mask, other=0.0).to(tl.float32)
        h = h.to(out.dtype.element_ty).to(tl.float32)  # the stored sum is what gets normalised
        tl.store(total + row * SIZE + column, h, mask=mask)
    w = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if CENTER:
        h = tl.where(mask, h - tl.sum(h, 0) / SIZE, 0.0)
    h *= tl.rsqrt(tl.sum(h * h, 0) / SIZE + eps)
    if MULTIPLY_IN_FP32:
        h *= offset + w
        if bias is not None:
            h += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    else:
        h = h.to(out.dtype.element_ty).to(tl.float32) * w
    tl.store(out + row * SIZE + column, h, mask=mask)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    multiply_in_fp32: bool,
    bias: Tensor | None = None,
    center: bool = False,
) -> Tensor:
    """Launch for `minillm::rms_norm`; see there for the arguments."""
    return add_rms_norm(x, None, weight, eps, offset, multiply_in_fp32, bias, center)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    multiply_in_fp32: bool,
    bias: Tensor | None = None,
    center: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch for `minillm::add_rms_norm`; see there for the arguments. Without a residual the sum is None."""
    size = x.shape[-1]
    rows = x.reshape(-1, size)  # [R, N], copied only if the rows are not evenly spaced
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = residual_rows = None
    if residual is not None:
        residual_rows = residual.reshape(-1, size)
        residual_rows = residual_rows if residual_rows.stride(1) == 1 else residual_rows.contiguous()
        total = torch.empty_like(out)
    if rows.shape[0] > 0:
        rms_norm_kernel[(rows.shape[0],)](
            rows, residual_rows, weight, bias, out, total,
            rows.stride(0), 0 if residual is None else residual_rows.stride(0), eps, float(offset),
            SIZE=size, BLOCK=triton.next_power_of_2(size), MULTIPLY_IN_FP32=multiply_in_fp32, CENTER=center,
            **choose("rms_norm", x, size).arguments(),
        )  # fmt: skip
    return out, total
