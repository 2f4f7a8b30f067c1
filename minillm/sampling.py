"""From logits to probabilities to a token: the one way, for target and draft models alike.

Temperature 0 is the limit in which all mass sits on the largest logit: greedy decoding is sampling from a
one-hot distribution, and where all rows are greedy an argmax is the short way there. Random numbers are a
function of (seed, position, stream) and nothing else: a row draws the same number whatever batch it is in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from minillm_kernels import cpu
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
    def of(config: GenerationConfig, seeds: Sequence[int], device: torch.device) -> "Sampling":
        """What a request asks for, the same for all its rows but the seeds; a filter that would do nothing is None."""
        penalty = None if config.repetition_penalty == 1.0 else config.repetition_penalty
        if not config.samples:
            return Sampling.uniform_rows(seeds, device, repetition_penalty=penalty)
        return Sampling.uniform_rows(
            seeds,
            device,
            temperature=1.0 if config.temperature is None else config.temperature,
            top_k=config.top_k or None,  # 0 means off, as in transformers
            top_p=None if config.top_p == 1.0 else config.top_p,
            min_p=config.min_p or None,
            repetition_penalty=penalty,
        )

    @staticmethod
    def together(parts: Sequence["Sampling"]) -> "Sampling":
        """Rows that use the same filters, as one batch."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return Sampling(*(None if column[0] is None else torch.cat(column) for column in columns))

    @property
    def filters(self) -> tuple[bool, ...]:
        """Which parameters are set. A filter that lets everything through still changes the rounding of its row."""
        return tuple(parameter is not None for parameter in vars(self).values())

    @staticmethod
    def uniform_rows(
        seeds: Sequence[int],
        device: torch.device | str,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> "Sampling":
        """The same parameters for every row, a seed for each."""

        def column(value: float | None, dtype: torch.dtype = torch.float32) -> Tensor | None:
            return None if value is None else torch.full((len(seeds),), value, dtype=dtype, device=device)

        return Sampling(
            temperature=column(temperature),
            seed=torch.tensor([_as_int64(seed) for seed in seeds], dtype=torch.int64, device=device),
            top_k=column(top_k, torch.int64),
            top_p=column(top_p),
            min_p=column(min_p),
            repetition_penalty=column(repetition_penalty),
        )


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


@torch.no_grad()
def probabilities(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """The distribution that is sampled from, `[B, V]` in the dtype of `logits`.

    The filters apply in the order temperature, top-k, top-p (Holtzman et al. 2019, nucleus sampling,
    arXiv:1904.09751), min-p (arXiv:2407.01082), each to what the one before left, as in `transformers`.

    Args:
        logits: `[B, V]` float.
        temperature: `[B]`; a row at 0 becomes one-hot at its first largest logit, and so does every row at None.
        top_k: `[B]` int; V or more keeps all. Ties with the k-th stay.
        top_p, min_p: `[B]`; 1 and 0 keep all.
    """
    if temperature is None:
        return _one_hot(logits)
    if _in_c(logits):
        return cpu.probabilities(logits, temperature, top_k, top_p, min_p)
    greedy = temperature == 0  # [B]
    scaled = logits / torch.where(greedy, 1.0, temperature)[:, None].to(logits.dtype)  # [B, V]
    probs = scaled.softmax(dim=-1)
    filters = (top_k, None if top_p is None else torch.where(top_p < 1, top_p, torch.inf), min_p)
    if any(column is not None for column in filters):
        probs = _filtered(scaled, probs, *filters)
    return torch.where(greedy[:, None], _one_hot(logits), probs)


def _in_c(x: Tensor) -> bool:
    """Whether C does it, in a tenth of the time (`kernels/minillm_kernels/cpu/sampling.c`)."""
    return x.is_cpu and x.dtype == torch.float32 and not torch.compiler.is_compiling() and cpu.available()


def _filtered(scaled: Tensor, probs: Tensor, *filters: Tensor | None) -> Tensor:
    """What the filters (`[B]` each) leave of `probs [B, V]`, the softmax of `scaled [B, V]`.

    Sums run from the likeliest token down: beyond `probs` itself no bit depends on tokens that are dropped.
    """
    top_k, top_p, min_p = filters
    order = scaled.argsort(dim=-1, descending=True, stable=True)  # [B, V]
    if top_k is not None:
        kth = order.gather(-1, (top_k.clamp(max=scaled.shape[-1]) - 1)[:, None])  # [B, 1]
        probs = probs.masked_fill(scaled < scaled.gather(-1, kth), 0.0)
    kept = probs.gather(-1, order)
    if top_p is not None:
        # Keep a token if the likelier ones together do not reach top_p: the first always stays.
        mass = _running_sum(kept)
        left = 1.0 if top_k is None else torch.where(top_k < kept.shape[-1], mass[:, -1], 1.0)[:, None]  # by top-k
        kept = kept.masked_fill(mass - kept >= top_p[:, None] * left, 0.0)
    if min_p is not None:
        kept = kept.masked_fill(kept < min_p[:, None] * kept[:, :1], 0.0)
    kept = kept / _running_sum(kept)[:, -1:]
    return torch.zeros_like(probs).scatter(-1, order, kept.to(probs.dtype))


def _running_sum(x: Tensor) -> Tensor:
    """What each row of `x [B, V]`, from 0 to about 1, adds up to from its beginning, `[B, V]` float64.

    A GPU scans a long row in one block, in an order that depends on the batch. There all is counted in units of 2^-44:
    whole numbers add up to the same in any order, so pieces can be summed at once.
    """
    if not x.is_cuda:
        return x.to(torch.float64, copy=True).cumsum_(dim=-1)
    units = (x.double() * 2.0**44).round().long()  # [B, V]
    pieces = F.pad(units, (0, -x.shape[-1] % 1024)).unflatten(-1, (-1, 1024)).cumsum(dim=-1)  # [B, P, 1024]
    sums = pieces[:, :, -1]  # [B, P]
    pieces = pieces + (sums.cumsum(dim=-1) - sums)[:, :, None]
    return pieces.flatten(1)[:, : x.shape[-1]].double() * 2.0**-44


def penalized(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """`penalize` at T places per row: logits and `seen` `[B, T, V]` -> `[B, T, V]`."""
    if sampling.repetition_penalty is None:
        return logits
    penalty = sampling.repetition_penalty.repeat_interleave(logits.shape[1])  # [B * T]
    return penalize(logits.flatten(0, 1), seen.flatten(0, 1), penalty).view_as(logits)


def distribution(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """`probabilities` at T places per row: logits and `seen` `[B, T, V]` -> `[B, T, V]`."""

    def per_place(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.repeat_interleave(logits.shape[1])  # [B * T]

    filters = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    flat = penalized(logits, sampling, seen).flatten(0, 1)  # [B * T, V]
    return probabilities(flat, *map(per_place, filters)).view_as(logits)


def _one_hot(logits: Tensor) -> Tensor:
    return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)  # [B, V]


def sample(probs: Tensor, u: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `u`.

    Args:
        probs: `[B, V]`, need not be normalised; a token of probability 0 is never returned.
        u: `[B]` float64 in [0, 1).

    Returns `[B]` int64, an id even where `probs` are no numbers.
    """
    # float64: over 100,000 tokens a float32 running sum would lose the rare ones.
    cumulative = _running_sum(probs)  # [B, V]
    # u is at most 1 - 2^-53, so its share of the total stays below the total even after rounding, and the
    # search ends on a token with mass.
    found = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]  # [B]
    return found.clamp_(max=probs.shape[-1] - 1)


def next_token(logits: Tensor, sampling: Sampling, position: Tensor, seen: Tensor | None = None) -> Tensor:
    """Choose the token that will stand at `position [B]` from `logits [B, V]`; returns `[B]` int64.

    `seen [B, V]` is needed where a repetition penalty is set.
    """
    if sampling.repetition_penalty is not None:
        logits = penalize(logits, seen, sampling.repetition_penalty)
    if sampling.temperature is None:
        return logits.argmax(dim=-1)  # what the search below would find in a one-hot distribution
    probs = probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    if _in_c(probs):
        return cpu.draw(probs, sampling.seed, position, 0)
    return sample(probs, uniform(sampling.seed, position))


def uniform(seed: Tensor, position: Tensor, stream: int = 0) -> Tensor:
    """A random number in [0, 1) that depends on (seed, position, stream) only, `[B]` float64.

    A counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the
    mixing function of SplitMix64 (Steele et al. 2014): no state to carry, so the n-th number of a row can
    be had in any order, on any device, inside a compiled graph. `stream` separates several draws at the
    same position.
    """
    bits = _mix(_mix(_mix(seed) ^ position) ^ stream)
    return (_shift_right(bits, 11)).double() * 2.0**-53


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 tensors, whose products wrap around as unsigned ones would."""
    z = z + -7046029254386353131  # 0x9E3779B97F4A7C15
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift in zeros: `>>` on signed integers shifts in the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
