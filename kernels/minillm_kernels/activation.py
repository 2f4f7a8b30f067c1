"""Activations of an MLP on their own, where the product before them does not apply them already: `activate`.

What bounds it: launching; a row of it is a few KB. It is no op: off the CPU it is PyTorch's own, which a compiler fuses
with its neighbours; in C on a CPU, so that a pass can be recorded (`cpu/tape.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.op import DTYPES

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def activate(x: Tensor, activation: str, gated: bool = False) -> Tensor:
    """act(x), like x; or `gated`, of gate and up side by side in x [..., 2F], act(gate) * up [..., F].

    x float32, bfloat16 or float16; activation "silu", "gelu" (with erf), "gelu_tanh" (arXiv 1606.08415), "relu" or
    "relu2" (its square, arXiv 2109.08668). In C computed in float32 and rounded once. Raises ValueError or TypeError.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activate: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.dtype not in DTYPES:
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"activate: x must be a dense tensor of float32, bfloat16 or float16, got {what}")
    if not isinstance(gated, bool):
        raise TypeError(f"activate: gated must be True or False, got {gated!r}")
    if not x.dim() or (gated and x.shape[-1] % 2):
        raise ValueError(f"activate: x holds gate and up, an even number in a row, got {tuple(x.shape)}")
    differentiated = torch.is_grad_enabled() and x.requires_grad
    if not torch.compiler.is_compiling() and type(x) is Tensor and x.is_cpu and not differentiated and cpu.available():
        return cpu.activate(x, activation, gated)
    if not gated:
        return ACTIVATIONS[activation](x)
    gate, up = x.chunk(2, dim=-1)  # [..., F] each
    return ACTIVATIONS[activation](gate) * up
