"""act(x Wg^T) * (x Wu^T) on a GPU: the products of int8_linear and int4_linear, with the gate where it is cheapest.

quantized, up to 64 rows   inside the product's own kernel: gate and up never go to memory
quantized, more rows       after the library's product of the dequantized weight, in one launch
dense                      likewise: the library's product is at the limit of memory already
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minillm_kernels.gpu.int4_linear import int4_linear
from minillm_kernels.gpu.int8_linear import FUSED_ROWS, activate, int8_linear
from minillm_kernels.launch import choose


@triton.jit
def gate_kernel(both, out, SIZE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, SIZE] = act(gate) * up of both [rows, 2 * SIZE]; a program takes BLOCK of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < SIZE
    gate = tl.load(both + row * 2 * SIZE + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * SIZE + SIZE + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + column, activate(gate, ACTIVATION) * up, mask=mask)


def multiply_gate(both: Tensor, activation: str) -> Tensor:
    """act(gate) * up [..., F] of gate and up side by side, [..., 2F]; in float32, rounded once."""
    size = both.shape[-1] // 2
    rows, out = both.contiguous().view(-1, 2 * size), both.new_empty((*both.shape[:-1], size))
    if out.numel() > 0:
        arguments = choose("gate", both, size).arguments()
        grid = (rows.shape[0], triton.cdiv(size, arguments["BLOCK"]))
        gate_kernel[grid](rows, out, SIZE=size, ACTIVATION=activation, **arguments)
    return out


def gated_mlp(
    x: Tensor,
    weight: Tensor,
    activation: str,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    """Launch for `minillm::gated_mlp`; see there for the arguments."""
    if weight.dtype == x.dtype:
        return multiply_gate(F.linear(x, weight), activation)
    fused = activation if x.numel() <= FUSED_ROWS[x.dtype] * x.shape[-1] else None
    if weight.dtype == torch.int8:
        y = int8_linear(x, weight, scale, activation=fused)
    else:
        y = int4_linear(x, weight, scale, zero, group_size, activation=fused)
    return y if fused else multiply_gate(y, activation)
