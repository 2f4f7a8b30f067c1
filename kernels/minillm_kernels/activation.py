"""Activations of an MLP on their own, where the product before them does not apply them already: `activate`.

What bounds it: launching; a row of it is a few KB. It is no op: off the CPU it is PyTorch's own, which a compiler fuses
with its neighbours; in C on a CPU, so that a pass can be recorded (`cpu/tape.py`).
"""

import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.op import DTYPES, op

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def check(x: Tensor, activation: str, gated: bool = False) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activate: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if x.dtype not in DTYPES or not isinstance(gated, bool):
        raise TypeError(
            f"activate: x must be float32, bfloat16 or float16 and gated True or False, got {x.dtype}, {gated!r}"
        )
    if not x.dim() or (gated and x.shape[-1] % 2):
        raise ValueError(f"activate: x holds gate and up, an even number in a row, got {tuple(x.shape)}")


@op(check=check, c=cpu.activate)
def activate(x: Tensor, activation: str, gated: bool = False) -> Tensor:
    """act(x), like x; or `gated`, of gate and up side by side in x [..., 2F], act(gate) * up [..., F].

    x float32, bfloat16 or float16; activation "silu", "gelu" (with erf), "gelu_tanh" (arXiv 1606.08415), "relu" or
    "relu2" (its square, arXiv 2109.08668). In C computed in float32 and rounded once. Raises ValueError or TypeError.
    """
    if not gated:
        return ACTIVATIONS[activation](x)
    gate, up = x.chunk(2, dim=-1)  # [..., F] each
    return ACTIVATIONS[activation](gate) * up
