"""Weights in int8 and int4, and the linear layers that hold them.

Decoding reads every weight once per token, so bytes are time: int8 halves bf16, int4 quarters it (0.59
bytes per weight at group 32 with scale and zero point, 0.52 at group 128). Only weights are quantized and only
by their own values; no data is run through the model.

    int8   codes [N, K] int8, scale [N] float32:        w = code * scale
    int4   packed [N, K / 2] uint8, scale [K / G, N] float16, zero [K / G, N] uint8, G inputs to a group:
           w = (q - zero) * scale, q in 0..15. Byte i of a group holds element i in its low half and
           element i + G / 2 in its high half (the kernels unpack whole runs with one AND and one shift).

N outputs, K inputs. Nothing here depends on the processor, so the tensors are saved as they are.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from minillm_kernels import cpu
from minillm_kernels.gated_mlp import gated_mlp
from minillm_kernels.int4_linear import GROUP_SIZES, dequantize_int4, int4_linear
from minillm_kernels.int8_linear import int8_linear
from minillm_kernels.linear import linear
from torch import Tensor, nn

from minillm.errors import CheckpointError, ConfigError

__all__ = [
    "Int4Linear",
    "Int8Linear",
    "Linear",
    "QuantizeSpec",
    "dequantize_int4",
    "dequantize_int8",
    "make_linear",
    "parse_quantize",
    "quantize_int4",
    "quantize_int8",
]

_PIECE = 1 << 18  # weights quantized at a time: temporaries stay in cache, and small beside the model
_SHRINKS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)  # ranges tried for a group, in units of its own
_NOT_FINITE = "a weight to be quantized is infinite or not a number; load it without quantize=..."
_SMALLEST_SCALE = 2.0**-24  # of float16; keeps a group of zeros from dividing by zero


@dataclass(frozen=True)
class QuantizeSpec:
    """What `quantize="..."` asks for: `bits` 8 or 4; `group_size` for int4, None for int8."""

    bits: int
    group_size: int | None = None

    def __str__(self) -> str:
        return "int8" if self.bits == 8 else f"int4-g{self.group_size}"


def parse_quantize(word: str | None) -> QuantizeSpec | None:
    """ "int8", "int4" (group 64), "int4-g32", "int4-g64", "int4-g128" or None; anything else raises ConfigError."""
    choices = {"int8": QuantizeSpec(8), "int4": QuantizeSpec(4, 64)}
    choices |= {f"int4-g{size}": QuantizeSpec(4, size) for size in GROUP_SIZES}
    if word is None:
        return None
    if word not in choices:
        raise ConfigError(f"quantize={word!r} is unknown; choose one of {', '.join(choices)}, or None")
    return choices[word]


# ---- from full precision to codes and back ----


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale per output: (codes [N, K] int8 in -127..127, scale [N] float32).

    The largest weight of a row becomes +-127, so no weight moves by more than half a step, max|w| / 254.
    Raises CheckpointError when a weight is not finite.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)  # [N, K]
    scale = torch.empty(weight.shape[0], device=weight.device)  # [N]
    for rows in _pieces(weight):
        wide = weight[rows].float()
        largest = _finite(wide.abs().amax(dim=1))
        scale[rows] = largest / 127
        codes[rows] = (wide * (127 / largest.clamp(min=1e-35))[:, None]).round_()
    return codes, scale


def dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [N, K] int8, scale [N] -> float32 [N, K]."""
    return codes.float() * scale[:, None]


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(packed [N, K / 2] uint8, scale [K / G, N] float16, zero [K / G, N] uint8); layout at the top of the file.

    Spreading 16 codes evenly from a group's smallest to its largest weight (round to nearest) is not the
    closest fit: the ends are single weights, and clipping them a little serves the many. Each group tries
    nine ranges from 0.7 to 1.1 of its own, keeps the one with the least squared error, and then the scale
    that is best for the codes it got, if that is better still. On normally distributed weights the squared
    error falls by 9 % (group 32), 8 % (64) and 10 % (128); it never rises.
    Raises CheckpointError when K is not a multiple of the group size or a weight is not finite.
    """
    outputs, inputs = weight.shape
    _check_groups(inputs, outputs, group_size)
    groups, device = inputs // group_size, weight.device
    packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=device)
    scale = torch.empty(groups, outputs, dtype=torch.float16, device=device)
    zero = torch.empty(groups, outputs, dtype=torch.uint8, device=device)
    if weight.is_cpu and cpu.available():  # the same search and results as below, several times faster
        if not cpu.quantize_int4(weight, group_size, packed, scale, zero):
            raise CheckpointError(_NOT_FINITE)
        return packed, scale, zero
    for rows in _pieces(weight):
        grouped = weight[rows].float().view(-1, groups, group_size)  # [n, K/G, G]
        _finite(grouped.abs().amax())
        piece_scale, piece_zero = _search(grouped)  # [n, K/G, 1] each
        codes = _round_to_codes(grouped, piece_scale, piece_zero).to(torch.uint8)
        low, high = codes.chunk(2, dim=2)  # [n, K/G, G/2] each
        packed[rows] = (low | high << 4).view(-1, inputs // 2)
        scale[:, rows] = piece_scale[..., 0].t().half()
        zero[:, rows] = piece_zero[..., 0].t().to(torch.uint8)
    return packed, scale, zero


def _search(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The best scale and zero [n, K/G, 1] found for weight [n, K/G, G]; see `quantize_int4`."""
    low, high = weight.amin(2, keepdim=True).clamp(max=0), weight.amax(2, keepdim=True).clamp(min=0)
    best_error = torch.full_like(low, torch.inf, dtype=torch.float64)
    best_scale, best_zero = torch.empty_like(low), torch.empty_like(low)

    def keep_if_better(scale: Tensor, zero: Tensor) -> None:
        error = (_round_to_codes(weight, scale, zero).sub_(zero) * scale).sub_(weight).square_()
        error = error.sum(2, keepdim=True, dtype=torch.float64)  # in float64 the order of adding does not matter
        better = error < best_error
        for best, new in ((best_error, error), (best_scale, scale), (best_zero, zero)):
            torch.where(better, new, best, out=best)

    for shrink in [1.0, *_SHRINKS]:  # 1.0 first: round to nearest is what has to be beaten
        scale = _storable(shrink * (high - low) / 15)
        keep_if_better(scale, (-shrink * low / scale).round_().clamp_(0, 15))
    centred = _round_to_codes(weight, best_scale, best_zero).sub_(best_zero)  # [n, K/G, G]
    # Least squares: the scale that takes these codes closest to the weights.
    products = (weight * centred).sum(2, keepdim=True, dtype=torch.float64)
    squares = centred.square().sum(2, keepdim=True, dtype=torch.float64)
    keep_if_better(_storable((products / squares.clamp(min=1)).float()), best_zero.clone())
    return best_scale, best_zero


def _round_to_codes(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (weight / scale).add_(zero).round_().clamp_(0, 15)


def _storable(scale: Tensor) -> Tensor:
    """Rounded to float16 before codes are chosen, so that the codes fit the scale that will be stored."""
    return scale.half().float().clamp(min=_SMALLEST_SCALE)


def _pieces(weight: Tensor) -> list[slice]:
    step = max(1, _PIECE // max(weight.shape[1], 1))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def _finite(largest: Tensor) -> Tensor:
    if not torch.isfinite(largest).all():
        raise CheckpointError(_NOT_FINITE)
    return largest


def _check_groups(inputs: int, outputs: int, group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ConfigError(f"int4 groups hold {', '.join(map(str, GROUP_SIZES))} inputs, not {group_size}")
    if inputs % group_size:
        fitting = [f'"int4-g{size}"' for size in GROUP_SIZES if inputs % size == 0]
        raise CheckpointError(
            f"a layer of {inputs} inputs and {outputs} outputs cannot be cut into groups of {group_size}; "
            f"use quantize={' or '.join([*fitting, chr(34) + 'int8' + chr(34)])}"
        )


# ---- layers: built empty, filled some rows at a time while the checkpoint streams ----


class Linear(nn.Module):
    """y = x W^T + b in full precision. weight [N, K], bias [N] or None, both in `dtype`."""

    row_dimension = {"weight": 0}  # noqa: RUF012 (which dimension of each tensor counts outputs)

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype=None, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = _empty_bias(out_features, bias, dtype, device)

    def load_rows(self, start_row: int, weight: Tensor) -> None:
        """Fill rows start_row.. of the weight from weight [n, K] in any floating dtype."""
        with torch.no_grad():
            self.weight[start_row : start_row + weight.shape[0]].copy_(weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        if _library_only(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        return linear(x, self.weight, self.bias)

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """act(gate) * up, [..., N / 2], where the first half of the outputs is gate and the rest is up."""
        if self.bias is not None or _library_only(x, self.weight):
            return _gate(self(x), activation)
        return gated_mlp(x, self.weight, activation)


class QuantizedLinear(nn.Module):
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
        """act(gate) * up, [..., N / 2], where the first half of the outputs is gate and the rest is up."""
        if self.bias is not None:
            return _gate(self(x), activation)
        return gated_mlp(x, *self.gated_weights(activation))


class Int8Linear(QuantizedLinear):
    """y = (x W^T) * scale + b. weight [N, K] int8, scale [N] float32, bias [N] in `dtype` or None."""

    row_dimension = {"weight": 0, "scale": 0}  # noqa: RUF012

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype=None, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32, device=device))
        self.bias = _empty_bias(out_features, bias, dtype, device)

    def load_rows(self, start_row: int, weight: Tensor) -> None:
        """Quantize weight [n, K], any floating dtype, into rows start_row.. of the layer."""
        rows = slice(start_row, start_row + weight.shape[0])
        codes, scale = quantize_int8(weight)
        self.weight[rows].copy_(codes)
        self.scale[rows].copy_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return int8_linear(x, self.weight, self.scale, self.bias)

    def gated_weights(self, activation: str) -> tuple:
        return self.weight, activation, self.scale


class Int4Linear(QuantizedLinear):
    """y = x W^T + b, w = (q - zero) * scale. Buffers packed, scale, zero as at the top of the file."""

    row_dimension = {"packed": 0, "scale": 1, "zero": 1}  # noqa: RUF012

    def __init__(self, in_features: int, out_features: int, bias: bool, dtype=None, device=None, group_size: int = 64):
        super().__init__()
        _check_groups(in_features, out_features, group_size)
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        groups = in_features // group_size
        self.register_buffer("packed", torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device))
        self.register_buffer("scale", torch.empty(groups, out_features, dtype=torch.float16, device=device))
        self.register_buffer("zero", torch.empty(groups, out_features, dtype=torch.uint8, device=device))
        self.bias = _empty_bias(out_features, bias, dtype, device)

    def load_rows(self, start_row: int, weight: Tensor) -> None:
        """Quantize weight [n, K], any floating dtype, into rows start_row.. of the layer."""
        rows = slice(start_row, start_row + weight.shape[0])
        packed, scale, zero = quantize_int4(weight, self.group_size)
        self.packed[rows].copy_(packed)
        self.scale[:, rows].copy_(scale)
        self.zero[:, rows].copy_(zero)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return int4_linear(x, self.packed, self.scale, self.zero, self.group_size, self.bias)

    def gated_weights(self, activation: str) -> tuple:
        return self.packed, activation, self.scale, self.zero, self.group_size


def make_linear(
    in_features: int, out_features: int, bias: bool, spec: QuantizeSpec | None = None, dtype=None, device=None
) -> Linear | Int8Linear | Int4Linear:
    """An empty layer in the format `spec` asks for (None: full precision in `dtype`).

    Raises CheckpointError naming the layer's shape when its inputs cannot be cut into int4 groups.
    """
    if spec is None:
        return Linear(in_features, out_features, bias, dtype, device)
    if spec.bits == 8:
        return Int8Linear(in_features, out_features, bias, dtype, device)
    return Int4Linear(in_features, out_features, bias, dtype, device, spec.group_size)


def _empty_bias(out_features: int, bias: bool, dtype, device) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None


def _library_only(x: Tensor, weight: Tensor) -> bool:
    """Training needs gradients, which the ops do not have; off the CPU the library's GEMV is the best there is."""
    return not x.is_cpu or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


def _gate(both: Tensor, activation: str) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
