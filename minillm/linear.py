"""Linear layers: dense, int8, int4. Built empty; `load/` fills them.

Decoding reads every weight once per token, so bytes are time: int8 halves bf16, int4 quarters it (0.59
bytes per weight at group 32 with scale and zero point, 0.52 at group 128).

    int8   codes [N, K] int8, scale [N] float32:        w = code * scale
    int4   packed [N, K / 2] uint8, scale [K / G, N] float16, zero [K / G, N] uint8, G inputs to a group:
           w = (q - zero) * scale, q in 0..15. Byte i of a group holds element i in its low half and
           element i + G / 2 in its high half (the kernels unpack whole runs with one AND and one shift).

N outputs, K inputs. How scale and zero lie in memory depends on the device, and no file shows it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from minillm_kernels.activation import activate
from minillm_kernels.cpu import by_output
from minillm_kernels.gated_mlp import gated_mlp
from minillm_kernels.int4_linear import int4_linear
from minillm_kernels.int8_linear import int8_linear
from minillm_kernels.launch import why_no_launch
from minillm_kernels.linear import linear
from torch import Tensor, nn

from minillm.errors import CheckpointError, ConfigError
from minillm.options import GROUP_SIZES, QUANTIZED_FORMATS


@dataclass(frozen=True)
class QuantizeSpec:
    """What `quantize="..."` asks for: `bits` 8 or 4; `group_size` for int4, None for int8."""

    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        return "int8" if self.bits == 8 else f"int4-g{self.group_size}"


def parse_quantize(word: str | None) -> QuantizeSpec | None:
    """A word of QUANTIZED_FORMATS ("int4" has groups of 64) or None; anything else raises `ConfigError`."""
    if word is None:
        return None
    if word not in QUANTIZED_FORMATS:
        raise ConfigError(f"quantize={word!r} is unknown; choose one of {', '.join(QUANTIZED_FORMATS)}, or None")
    return QuantizeSpec(8) if word == "int8" else QuantizeSpec(4, int(word.partition("-g")[2] or 64))


class Projection(nn.Module):
    """What stands in the place of a matrix."""

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """act(gate) * up, [..., N / 2], where the first half of the outputs is gate and the rest is up."""
        return activate(self(x), activation, gated=True)


class Linear(Projection):
    """y = x W^T + b in full precision. weight [N, K], bias [N] or None, both in `dtype`."""

    row_dimension = {"weight": 0}  # noqa: RUF012 (which dimension of each tensor counts outputs)

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = _empty_bias(out_features, bias, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        # Training needs autograd and autocast, which the ops do not have; off the CPU the library's GEMV is the best.
        product = linear if x.is_cpu and not _trains(x, self.weight) else F.linear
        return product(x, self.weight, self.bias)

    def gated(self, x: Tensor, activation: str) -> Tensor:
        ours = x.is_cpu or torch.compiler.is_compiling() or why_no_launch(x.device) is None
        if self.bias is not None or not ours or _trains(x, self.weight):
            return super().gated(x, activation)
        return gated_mlp(x, self.weight, activation)


class QuantizedLinear(Projection):
    """What Int8Linear and Int4Linear share. Buffers, not parameters: codes have no gradient."""

    scale: Tensor

    def _apply(self, fn, recurse=True):
        """Moves to a device apply; a cast like `.to(bfloat16)` must not: the scales' precision is the format's.

        Casts skip integer tensors, so the scales pass through as their bits.
        """
        dtype = self.scale.dtype
        self.scale = self.scale.view(torch.int32 if dtype == torch.float32 else torch.int16)
        super()._apply(fn, recurse)
        self.scale = self.scale.view(dtype)
        return self

    def gated(self, x: Tensor, activation: str) -> Tensor:
        if self.bias is not None:
            return super().gated(x, activation)
        return gated_mlp(x, *self.gated_arguments(activation))


class Int8Linear(QuantizedLinear):
    """y = (x W^T) * scale + b. weight [N, K] int8, scale [N] float32, bias [N] in `dtype` or None."""

    row_dimension = {"weight": 0, "scale": 0}  # noqa: RUF012

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32, device=device))
        self.bias = _empty_bias(out_features, bias, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return int8_linear(x, self.weight, self.scale, self.bias)

    def gated_arguments(self, activation: str) -> tuple:
        return self.weight, activation, self.scale


class Int4Linear(QuantizedLinear):
    """y = x W^T + b, w = (q - zero) * scale. Buffers packed, scale, zero as at the top of the file.

    Raises `CheckpointError` naming the layer's shape when its inputs cannot be cut into groups.
    """

    row_dimension = {"packed": 0, "scale": 1, "zero": 1}  # noqa: RUF012

    def __init__(
        self, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device=None, group_size: int = 64
    ):
        super().__init__()
        check_groups(in_features, out_features, group_size)
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        shape = in_features // group_size, out_features
        self.register_buffer("packed", torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scale", _in_order(torch.empty(shape, dtype=torch.float16, device=device)))
        self.register_buffer("zero", _in_order(torch.empty(shape, dtype=torch.uint8, device=device)))
        self.bias = _empty_bias(out_features, bias, dtype, device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # which keeps the order; another device wants another one
        self.scale, self.zero = _in_order(self.scale), _in_order(self.zero)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return int4_linear(x, self.packed, self.scale, self.zero, self.group_size, self.bias)

    def gated_arguments(self, activation: str) -> tuple:
        return self.packed, activation, self.scale, self.zero, self.group_size


def _in_order(tensor: Tensor) -> Tensor:
    """[K / G, N] in the order of memory that suits its device, see `minillm_kernels.int4_linear`."""
    return tensor.contiguous() if tensor.is_cuda else by_output(tensor)


def make_linear(
    in_features: int, out_features: int, bias: bool, spec: QuantizeSpec | None, dtype: torch.dtype, device=None
) -> Linear | QuantizedLinear:
    """An empty layer in the format `spec` asks for (None: full precision in `dtype`)."""
    if spec is None:
        return Linear(in_features, out_features, bias, dtype, device)
    if spec.bits == 8:
        return Int8Linear(in_features, out_features, bias, dtype, device)
    return Int4Linear(in_features, out_features, bias, dtype, device, spec.group_size)


def check_groups(inputs: int, outputs: int, group_size: int) -> None:
    """Raise `ConfigError` for a group size that int4 does not have, `CheckpointError` for one that does not fit."""
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"int4 groups hold {', '.join(map(str, GROUP_SIZES))} inputs, not {group_size}")
    if inputs % group_size:
        fitting = [f'"int4-g{size}"' for size in GROUP_SIZES if inputs % size == 0]
        raise CheckpointError(
            f"a layer of {inputs} inputs and {outputs} outputs cannot be cut into groups of {group_size}; "
            f"use quantize={' or '.join([*fitting, chr(34) + 'int8' + chr(34)])}"
        )


def _empty_bias(out_features: int, bias: bool, dtype: torch.dtype, device) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None


def _trains(x: Tensor, weight: Tensor) -> bool:
    wanted = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return wanted or torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)
