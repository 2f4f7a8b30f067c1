"""The first half of a gated MLP in one pass: `minillm::gated_mlp`, act(x Wg^T) * (x Wu^T).

What bounds it: reading Wg and Wu (arXiv 2002.05202 introduced the form). Fusing saves no weight bytes; it saves
writing and re-reading the two [rows, F] intermediates and the launches of an activation and a product, which
is what a small model's time is made of. Gate and up lie in one matrix [2F, K], gate first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.int4_linear import check_int4, int4_linear_torch
from minillm_kernels.int8_linear import check_int8, int8_linear_torch
from minillm_kernels.linear import check_dense
from minillm_kernels.op import op

ACTIVATIONS = tuple(filter(None, cpu.GATES))


def check(
    x: Tensor,
    weight: Tensor,
    activation: str,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group_size: int = 0,
) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_mlp: activation must be one of {ACTIVATIONS}, got {activation!r}")
    given = scale is not None, zero is not None, group_size != 0
    if weight.dtype == torch.int8:
        if given != (True, False, False):
            raise ValueError("gated_mlp: int8 weights need scale, and neither zero nor group_size")
        check_int8("gated_mlp", x, weight, scale)
    elif weight.dtype == torch.uint8:
        if given != (True, True, True):
            raise ValueError("gated_mlp: int4 weights need scale, zero and group_size")
        check_int4("gated_mlp", x, weight, scale, zero, group_size)
    else:
        if given != (False, False, False):
            raise ValueError(f"gated_mlp: {weight.dtype} weights take no scale, zero or group_size")
        check_dense("gated_mlp", x, weight)
    if weight.shape[0] % 2:
        raise ValueError(f"gated_mlp: weight holds gate and up rows, an even number, got {weight.shape[0]}")


@op(
    check=check,
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0] // 2)),
    c=lambda x, weight, activation, *scales, **named: cpu.product(x, weight, *scales, gate=activation, **named),
    triton="minillm_kernels.gpu.gated_mlp",
)
def gated_mlp(
    x: Tensor,
    weight: Tensor,
    activation: str,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    """act(x Wg^T) * (x Wu^T) with activation "silu" or "gelu_tanh"; returns [..., F] in x.dtype.

    x [..., K]; weight's rows are gate first, then up, in one of three formats: [2F, K] in x.dtype; [2F, K] int8
    with scale [2F] float32; or [2F, K / 2] uint8 (int4) with scale, zero [K / G, 2F] and group_size G, as in
    `int4_linear`. Activation and product are taken in float32. No gradient. Raises ValueError or TypeError.
    """
    if weight.dtype == torch.int8:
        both = int8_linear_torch(x, weight, scale, None)
    elif weight.dtype == torch.uint8:
        both = int4_linear_torch(x, weight, scale, zero, group_size, None)
    else:
        both = F.linear(x, weight)
    return multiply_gate(both, activation)


def multiply_gate(both: Tensor, activation: str) -> Tensor:
    """act(gate) * up [..., F] of gate and up side by side, [..., 2F]; in float32, rounded once."""
    gate, up = both.float().chunk(2, dim=-1)  # [..., F] each
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (gate * up).to(both.dtype)
