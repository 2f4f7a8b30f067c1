"""x W^T with int4 weights, a scale and a zero point per group of inputs: `minillm::int4_linear`.

What bounds it: reading W, half a byte per weight plus 3 bytes per group (0.59 bytes at group 32, 0.52 at 128),
as long as unpacking keeps up. Two choices make that cheap, and one keeps memory busy:

  - planar packing: byte i of a group of G holds element i in its low half and element i + G/2 in its high
    half, so one AND and one shift turn a run of bytes into two runs of neighbouring weights;
  - on a CPU the scales and zero points of an output lie side by side in memory (transposed: [K / G, N] with strides
    [1, K / G]), so that a thread reads three streams and not a cache line per group from all over the memory; on a GPU
    those of neighbouring outputs do, which its threads read together. The other order is taken too, and copied;
  - w = (q - zero) * scale, so sum(w x) = scale * (sum(q x) - zero * sum(x)): the loop multiplies bare codes,
    and the zero points are settled once per group from sums of x that all outputs share.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.int8_linear import PIECE
from minillm_kernels.linear import check_product
from minillm_kernels.op import op


def check_int4(
    name: str, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, bias: Tensor | None = None
) -> None:
    if group_size not in cpu.GROUP_SIZES:
        raise ValueError(f"{name}: group_size must be one of {cpu.GROUP_SIZES}, got {group_size}")
    check_product(name, x, packed, bias, scale, zero, per_element=2)
    if packed.dtype != torch.uint8 or zero.dtype != torch.uint8 or scale.dtype != torch.float16:
        raise TypeError(
            f"{name}: packed and zero must be uint8 and scale float16, got {packed.dtype}, {zero.dtype}, {scale.dtype}"
        )
    outputs, inputs, shape = packed.shape[0], x.shape[-1], scale.shape
    if inputs % group_size or shape != (inputs // group_size, outputs) or zero.shape != shape:
        raise ValueError(
            f"{name}: {inputs} inputs in groups of {group_size} need scale and zero of shape "
            f"[{inputs / group_size:g}, {outputs}], got {tuple(shape)} and {tuple(zero.shape)}"
        )
    for tensor in (scale, zero):
        if not tensor.is_contiguous() and tensor.stride() != (1, shape[0]):
            raise ValueError(f"{name}: scale and zero must be contiguous, or the transpose of a contiguous tensor")


@op(
    check=functools.partial(check_int4, "int4_linear"),
    fake=lambda x, packed, *_: x.new_empty((*x.shape[:-1], packed.shape[0])),
    c=lambda x, packed, scale, zero, group_size, bias=None: cpu.product(x, packed, scale, zero, group_size, bias),
    triton="minillm_kernels.gpu.int4_linear",
)
def int4_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """x W^T + bias with w = (q - zero) * scale. x [..., K] float32, bfloat16 or float16, K a multiple of
    group_size G in {32, 64, 128}; packed [N, K / 2] uint8 (planar, see above); scale [K / G, N] float16;
    zero [K / G, N] uint8; bias [N] in x.dtype. Returns [..., N] in x.dtype. No gradient.
    Raises ValueError or TypeError.

    In C a row's result does not depend on the number of threads or on the other rows, only on whether there are more
    than 16 of them: then w is rounded to bfloat16 if x is, as a checkpoint in full precision would be.
    """
    return int4_linear_torch(x, packed, scale, zero, group_size, bias)


def int4_linear_torch(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, bias: Tensor | None
) -> Tensor:
    """Dequantize some outputs' weights, multiply, next: never holds the dequantized matrix."""
    outputs_at_once = max(1, PIECE // x.shape[-1])
    pieces = []
    for start in range(0, packed.shape[0], outputs_at_once):
        piece = slice(start, start + outputs_at_once)
        weight = dequantize_int4(packed[piece], scale[:, piece], zero[:, piece], group_size)  # [n, K]
        pieces.append(F.linear(x, weight.to(x.dtype)))  # [..., n]
    y = torch.cat(pieces, dim=-1) if pieces else x.new_empty((*x.shape[:-1], 0))  # [..., N]
    return y if bias is None else y + bias


def dequantize_int4(packed: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """(q - zero) * scale as float32 [N, K], from packed [N, K / 2], scale and zero [K / G, N]."""
    outputs, groups = packed.shape[0], scale.shape[0]
    planes = packed.reshape(outputs, groups, group_size // 2)  # [N, K/G, G/2] bytes
    codes = torch.cat([planes & 15, planes >> 4], dim=2).float()  # [N, K/G, G]
    weight = (codes - zero.t().unsqueeze(2).float()) * scale.t().unsqueeze(2).float()
    return weight.view(outputs, groups * group_size)  # [N, K]
