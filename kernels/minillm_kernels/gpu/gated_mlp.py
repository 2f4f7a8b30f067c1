"""act(x Wg^T) * (x Wu^T) on a GPU: the products of int8_linear and int4_linear, with the gate where it is cheapest.

quantized, up to 64 rows   inside the product's own kernel: gate and up never go to memory
quantized, more rows       after the library's product of the dequantized weight
dense                      after the library's product: it is at the limit of memory already
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels.gated_mlp import multiply_gate
from minillm_kernels.gpu.int4_linear import int4_linear
from minillm_kernels.gpu.int8_linear import FUSED_ROWS, int8_linear


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
