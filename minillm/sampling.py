"""From logits to probabilities to a token: the one way, for target and draft models alike.

Temperature 0 is the limit in which all mass sits on the largest logit: greedy decoding is sampling from a
one-hot distribution, and where all rows are greedy an argmax is the short way there. Random numbers are a
function of (seed, position, stream) and nothing else: a row draws the same number whatever batch it is in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from minillm_kernels.sampling import argmax, draw_from, probabilities_of
from torch import Tensor

from minillm.options import GenerationConfig


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a batch, one entry per row; None where no row uses the filter."""

    seed: Tensor  # [B] int64
    temperature: Tensor | None = None  # [B] float32; 0, or None for all rows, means greedy
    top_k: Tensor | None = None  # [B] int64: keep the k likeliest
    top_p: Tensor | None = None  # [B] float32: keep the fewest that hold this mass
    min_p: Tensor | None = None  # [B] float32: drop those below this share of the likeliest
    repetition_penalty: Tensor | None = None  # [B] float32

    @staticmethod
    def of(config: GenerationConfig, seeds: Sequence[int], device: torch.device | str) -> "Sampling":
        """What a request asks for, the same for all its rows but the seeds; a filter that would do nothing is None."""

        def column(value: float | None, off: float | None = None, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return None if value in (None, off) else torch.full((len(seeds),), value, dtype=dtype, device=device)

        seed = torch.tensor([_as_int64(seed) for seed in seeds], dtype=torch.int64, device=device)  # [B]
        penalty = column(config.repetition_penalty, off=1)
        if not config.samples:
            return Sampling(seed, repetition_penalty=penalty)
        temperature = column(1.0 if config.temperature is None else config.temperature)
        top_k, top_p = column(config.top_k, off=0, dtype=torch.int64), column(config.top_p, off=1)
        return Sampling(seed, temperature, top_k, top_p, column(config.min_p, off=0), penalty)

    @staticmethod
    def together(parts: Sequence["Sampling"]) -> "Sampling":
        """Rows that use the same filters, as one batch."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Sampling(*(None if column[0] is None else torch.cat(column) for column in columns))

    def of_rows(self, index: slice | Tensor, rows: int) -> "Sampling":
        """As the rows `index [R]`, ascending, of so many; the others are greedy, which costs least, without filters."""
        if rows == len(self.seed):
            return self
        columns = {}
        for name, own in vars(self).items():
            if own is not None:
                columns[name] = own.new_full((rows,), 0 if name == "temperature" else 1)
                columns[name][index] = own
        return Sampling(**columns)

    @property
    def filters(self) -> tuple[bool, ...]:
        """Which parameters are set. A filter that lets everything through still changes the rounding of its row."""
        return tuple(parameter is not None for parameter in vars(self).values())


def _as_int64(seed: int) -> int:
    """Any Python integer, wrapped into the signed 64-bit range."""
    return (seed + 2**63) % 2**64 - 2**63


def penalize(logits: Tensor, seen: Tensor, penalty: Tensor) -> Tensor:
    """Divide positive and multiply negative logits of seen tokens by `penalty` (CTRL, arXiv:1909.05858).

    Args:
        logits: `[B, V]`.
        seen: `[B, V]` bool, the tokens of the prompt and the answer so far.
        penalty: `[B]`, 1 changes nothing, more discourages repetition.
    """
    factor = penalty[:, None].to(logits.dtype)  # [B, 1]
    return torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)


def largest_of(logits: Tensor) -> Tensor:
    """The largest logit of each row, or NaN if one is: `[..., V]` -> `[...]`."""
    return logits.gather(-1, argmax(logits)[..., None])[..., 0]


def next_token(logits: Tensor, sampling: Sampling, position: Tensor, seen: Tensor | None = None) -> Tensor:
    """Choose the token that will stand at `position [B]` from `logits [B, V]`; returns `[B]` int64.

    `seen [B, V]` is needed where a repetition penalty is set.
    """
    return choose(logits, sampling, position, seen)[0]


def choose(
    logits: Tensor, sampling: Sampling, position: Tensor, seen: Tensor | None = None, stream: int = 0
) -> tuple[Tensor, Tensor | None]:
    """`next_token` with the random numbers of `stream`, and the distribution `[B, V]` it was drawn from; None if
    greedy."""
    if sampling.repetition_penalty is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature is None:
        return argmax(logits), None  # what the search below would find in a one-hot distribution
    probs = probabilities_of(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    return draw_from(probs, sampling.seed, position, stream), probs
