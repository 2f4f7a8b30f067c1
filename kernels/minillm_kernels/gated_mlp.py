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
from minillm_kernels.int8_linear import in_c as quantized_in_c
from minillm_kernels.launch import interpreting
from minillm_kernels.linear import check_linear, library_linear
from minillm_kernels.linear import in_c as dense_in_c

ACTIVATIONS = ("silu", "gelu_tanh")


def gated_mlp_cpu(
    x: Tensor,
    weight: Tensor,
    activation: str,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    """The CPU implementation itself, for callers outside a graph: an op call costs 5 us more."""
    check_gated(x, weight, activation, scale, zero, group_size)
    if dense_in_c(x) if weight.dtype == x.dtype else quantized_in_c(x):
        return cpu.product(x, weight, scale, zero, group_size, gate=activation)
    if weight.dtype == torch.int8:
        both = int8_linear_torch(x, weight, scale, None)
    elif weight.dtype == torch.uint8:
        both = int4_linear_torch(x, weight, scale, zero, group_size, None)
    else:
        both = library_linear(x, weight)
    gate, up = both.float().chunk(2, dim=-1)  # [..., F] each
    gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    return (gate * up).to(x.dtype)


@torch.library.custom_op("minillm::gated_mlp", mutates_args=(), device_types="cpu")
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
    implementation = gated_mlp_triton if interpreting() else gated_mlp_cpu
    return implementation(x, weight, activation, scale, zero, group_size)


@gated_mlp.register_kernel("cuda")
def gated_mlp_cuda(
    x: Tensor,
    weight: Tensor,
    activation: str,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group_size: int = 0,
) -> Tensor:
    with torch.cuda.device(x.device):
        return gated_mlp_triton(x, weight, activation, scale, zero, group_size)


def gated_mlp_triton(
    x: Tensor, weight: Tensor, activation: str, scale: Tensor | None, zero: Tensor | None, group_size: int
) -> Tensor:
    from minillm_kernels.gpu import int4_linear, linear

    check_gated(x, weight, activation, scale, zero, group_size)
    if weight.dtype == torch.uint8:
        return int4_linear.launch(x, weight, scale, zero, group_size, None, activation)
    return linear.launch(x, weight, scale, None, activation)


@gated_mlp.register_fake
def _(x, weight, activation, scale=None, zero=None, group_size=0):
    check_gated(x, weight, activation, scale, zero, group_size)
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def check_gated(x, weight, activation, scale, zero, group_size) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_mlp: activation must be one of {ACTIVATIONS}, got {activation!r}")
    if weight.shape[0] % 2:
        raise ValueError(f"gated_mlp: weight holds gate and up rows, an even number, got {weight.shape[0]}")
    if weight.dtype == torch.int8:
        if scale is None:
            raise ValueError("gated_mlp: int8 weights need scale")
        check_int8("gated_mlp", x, weight, scale, None)
    elif weight.dtype == torch.uint8:
        if scale is None or zero is None:
            raise ValueError("gated_mlp: int4 weights need scale and zero")
        check_int4("gated_mlp", x, weight, scale, zero, group_size, None)
    else:
        check_linear("gated_mlp", x, weight, weight.shape[1], None)
        if weight.dtype != x.dtype:
            raise TypeError(f"gated_mlp: x is {x.dtype} but weight is {weight.dtype}; cast one of them")
