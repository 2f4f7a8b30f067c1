"""From full precision to codes. Only weights are quantized, and only by their own values: no data is run
through the model. The layouts are `linear.py`'s."""

from collections.abc import Callable

import torch
from minillm_kernels import quantize as kernels
from torch import Tensor

from minillm.errors import CheckpointError
from minillm.linear import Int4Linear, Int8Linear, Linear, QuantizedLinear, check_groups

# Weights quantized at a time: temporaries stay in cache, and small beside the model; a GPU wants more at once.
_PIECE, _GPU_PIECE = 1 << 18, 1 << 24
_SHRINKS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1)  # ranges tried for a group, in units of its own
_NOT_FINITE = "a weight to be quantized is infinite or not a number; load it without quantize=..."
_WIDEST = 15 * torch.finfo(torch.float16).max  # 15 steps of the largest scale that int4 can store
_SMALLEST_SCALE = 2.0**-24  # of float16; keeps a group of zeros from dividing by zero


def fill_rows(
    layer: Linear | QuantizedLinear,
    start_row: int,
    weight: Tensor,
    across: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Fill rows start_row.. of an empty layer from weight [n, K] in any floating dtype, in the layer's format.

    `across`: where the rows go on in other ranks' layers, what makes of each rank's largest `[n]` the largest of all.
    """
    if isinstance(layer, QuantizedLinear) and layer.scale.is_cuda:
        weight = weight.to(layer.scale.device)  # a GPU is some hundred times faster at it
    if isinstance(layer, Int8Linear):
        parts = quantize_int8(weight, across)
    elif isinstance(layer, Int4Linear):
        parts = quantize_int4(weight, layer.group_size)
    else:
        parts = (weight,)
    for (name, dimension), part in zip(layer.row_dimension.items(), parts, strict=True):
        getattr(layer, name).detach().narrow(dimension, start_row, weight.shape[0]).copy_(part)


def quantize_int8(weight: Tensor, across: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric int8, one scale per output: (codes [N, K] int8 in -127..127, scale [N] float32).

    The largest weight of a row becomes +-127, so no weight moves by more than half a step, max|w| / 254. `across` as
    for `fill_rows`: a row that is spread over ranks has one scale.
    Raises CheckpointError when a weight is not finite.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)  # [N, K]
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)  # [N]
    known = None if across is None else across(_finite(weight.abs().amax(dim=1)).float())  # [N]
    for rows in _pieces(weight):
        wide = weight[rows].float()
        largest = _finite(wide.abs().amax(dim=1)) if known is None else known[rows]
        scale[rows] = largest / 127
        codes[rows] = (wide * (127 / largest.clamp(min=1e-35))[:, None]).round_()
    return codes, scale


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(packed [N, K / 2] uint8, scale [K / G, N] float16, zero [K / G, N] uint8); layout as in `linear.py`.

    Spreading 16 codes evenly from a group's smallest to its largest weight (round to nearest) is not the
    closest fit: the ends are single weights, and clipping them a little serves the many. Each group tries
    nine ranges from 0.7 to 1.1 of its own, keeps the one with the least squared error, and then the scale
    that is best for the codes it got, if that is better still. On normally distributed weights the squared
    error falls by 9 % (group 32), 8 % (64) and 10 % (128); it never rises.
    Raises CheckpointError when K is not a multiple of the group size, a weight is not finite, or they lie further
    apart than 15 steps of float16's largest number.
    """
    outputs, inputs = weight.shape
    check_groups(inputs, outputs, group_size)
    groups, device = inputs // group_size, weight.device
    low, high = (end.double() for end in weight.aminmax())
    if _finite(high.clamp(min=0) - low.clamp(max=0)) > _WIDEST:
        raise CheckpointError(f'weights from {low:g} to {high:g} are too far apart for int4; use quantize="int8"')
    if found := kernels.quantize_int4(weight.detach(), group_size):  # the same as below in C, several times faster
        packed, scale, zero = found
        return packed, scale.t(), zero.t()
    packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device=device)
    scale = torch.empty(outputs, groups, dtype=torch.float16, device=device)
    zero = torch.empty(outputs, groups, dtype=torch.uint8, device=device)
    for rows in _pieces(weight):
        grouped = weight[rows].float().view(-1, groups, group_size)  # [n, K/G, G]
        piece_scale, piece_zero = _search(grouped)  # [n, K/G, 1] each
        codes = _round_to_codes(grouped, piece_scale, piece_zero).to(torch.uint8)
        low, high = codes.chunk(2, dim=2)  # [n, K/G, G/2] each
        packed[rows] = (low | high << 4).view(-1, inputs // 2)
        scale[rows], zero[rows] = piece_scale[..., 0].half(), piece_zero[..., 0].to(torch.uint8)
    return packed, scale.t(), zero.t()


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
    step = max(1, (_GPU_PIECE if weight.is_cuda else _PIECE) // max(weight.shape[1], 1))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def _finite(largest: Tensor) -> Tensor:
    if not torch.isfinite(largest).all():
        raise CheckpointError(_NOT_FINITE)
    return largest
