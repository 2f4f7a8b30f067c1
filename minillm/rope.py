"""Rotary position embedding: positions become rotations of pairs of channels.

Channel pair j of a head turns by `position * inverse_frequency[j]` radians, so the dot product of a
query and a key depends on the distance between them only (Su et al. 2021, RoFormer,
arXiv:2104.09864). The variants below stretch that clock so that a model reads further than it was
trained to: they change the frequencies, and two of them (dynamic, longrope) change them with the
length of the text. Those are chosen once per cache row, from the length the row is planned to reach,
because keys that are already rotated by one clock must never meet queries rotated by another.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from minillm_kernels.rope import angles
from torch import Tensor

from minillm.config import RopeSpec


@dataclass(frozen=True)
class RotaryTable:
    """The clock of one `RopeSpec` for the rows of one cache."""

    inverse_frequency: Tensor  # [B, dim / 2], or [1, dim / 2] where every row has the same; float32
    scale: float  # cos and sin are multiplied by this (yarn, longrope); 1 otherwise

    def rows(self, start: int, stop: int) -> "RotaryTable":
        """The clock of some of the rows."""
        shared = len(self.inverse_frequency) == 1
        return self if shared else RotaryTable(self.inverse_frequency[start:stop], self.scale)


def rotary_table(spec: RopeSpec, planned_lengths: Sequence[int], device: torch.device | str) -> RotaryTable:
    """Build the table for rows that will grow to `planned_lengths` positions."""
    if not spec.follows_length:
        planned_lengths = planned_lengths[:1]  # the length does not matter: share one row
    rows = [inverse_frequencies(spec, length) for length in planned_lengths]
    return RotaryTable(torch.stack(rows).to(device), attention_scale(spec))  # [B | 1, dim / 2]


def inverse_frequencies(spec: RopeSpec, length: int) -> Tensor:
    """Radians per position of each channel pair, `[dim / 2]` float32, for a text of `length` tokens."""
    exponent = torch.arange(0, spec.dim, 2, dtype=torch.float32, device="cpu") / spec.dim  # [dim / 2]
    if spec.kind == "dynamic":
        # NTK-aware scaling (u/bloc97, u/emozilla 2023): raise the base just enough for this length.
        stretch = spec.factor * max(length, spec.original_length) / spec.original_length - (spec.factor - 1)
        return 1.0 / (spec.theta * stretch ** (spec.dim / (spec.dim - 2))) ** exponent
    plain = 1.0 / spec.theta**exponent
    if spec.kind == "none":
        return 0 * plain  # cos 1, sin 0: a layer without positions (NoPE), to the bit
    if spec.kind == "linear":
        # Position interpolation (Chen et al. 2023, arXiv:2306.15595): slow every clock by the same factor.
        return plain / spec.factor
    if spec.kind == "llama3":
        return _llama3(plain, spec)
    if spec.kind == "yarn":
        return _yarn(plain, spec)
    if spec.kind == "longrope":
        # LongRoPE (Ding et al. 2024, arXiv:2402.13753): a searched divisor for each frequency.
        divisors = spec.long_factor if length > spec.original_length else spec.short_factor
        return plain / torch.tensor(divisors, dtype=torch.float32, device="cpu")
    return plain


def _llama3(plain: Tensor, spec: RopeSpec) -> Tensor:
    """Llama 3.1 (arXiv:2407.21783): slow the long wavelengths, keep the short, blend between."""
    turns = spec.original_length * plain / (2 * math.pi)  # rotations over the original context, [dim / 2]
    blend = (turns - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)  # 0: fewer turns than low, fully slowed; 1: more than high, untouched
    return (1 - blend) * plain / spec.factor + blend * plain


def _yarn(plain: Tensor, spec: RopeSpec) -> Tensor:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): the same idea with a ramp over channel numbers."""

    def channel_with(rotations: float) -> float:
        """The (fractional) pair that turns this often over the original context."""
        return (spec.dim * math.log(spec.original_length / (rotations * 2 * math.pi))) / (2 * math.log(spec.theta))

    low, high = channel_with(spec.beta_fast), channel_with(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    channel = torch.arange(spec.dim // 2, dtype=torch.float32, device="cpu")
    slowed = ((channel - low) / max(high - low, 0.001)).clamp(0.0, 1.0)  # 0: keep; 1: interpolate
    return plain * (1 - slowed) + plain / spec.factor * slowed


def attention_scale(spec: RopeSpec) -> float:
    """The factor on cos and sin: stretched attention is a little too flat, this sharpens it back."""
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.factor <= 1.0:
        return 1.0
    if spec.kind == "yarn":
        growth = 0.1 * math.log(spec.factor)
        if spec.mscale and spec.mscale_all_dim:
            return (spec.mscale * growth + 1.0) / (spec.mscale_all_dim * growth + 1.0)
        return growth + 1.0
    if spec.kind == "longrope":
        return math.sqrt(1 + math.log(spec.factor) / math.log(spec.original_length))
    return 1.0


def cos_sin(table: RotaryTable, cache_position: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle at `cache_position [B, T]`: two `[B, T, dim / 2]` float32."""
    return angles(cache_position, table.inverse_frequency, table.scale)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `dim` channels of `x [B, T, H, D]`; channel j is paired with j + dim / 2.

    cos, sin `[B, T, 1, dim / 2]` in x's dtype.
    """
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)  # [B, T, H, D]
