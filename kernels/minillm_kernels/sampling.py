"""From logits to probabilities to a token: `minillm::probabilities` and `minillm::draw`, and the same in PyTorch; which
drafts are kept, in C.

What bounds it: on a GPU launching (the PyTorch code below is some forty operators, one of them a sort of the whole
vocabulary), on a CPU the sort. The kernels never sort: the filters keep all tokens above a border, which is searched
for; see `gpu/sampling.py` and `cpu/sampling.c`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.launch import why_no_launch
from minillm_kernels.op import check_devices, op

MAX_VOCABULARY = 2**18  # whole numbers of 2^-44 add up to less than 2^63


def check_probabilities(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> None:
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCABULARY or logits.dtype != torch.float32:
        raise ValueError(
            f"probabilities: logits must be [B, V] float32 with V from 1 to {MAX_VOCABULARY}, got "
            f"{tuple(logits.shape)} {logits.dtype}"
        )
    for name, column, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
    ):
        if column is not None and (column.shape != logits.shape[:1] or column.dtype != dtype):
            raise ValueError(
                f"probabilities: {name} must be [B] = [{logits.shape[0]}] {dtype}, got {tuple(column.shape)} "
                f"{column.dtype}"
            )
    check_devices("probabilities", logits, temperature, top_k, top_p, min_p)


def check_draw(probs: Tensor, seed: Tensor, position: Tensor, stream: int) -> None:
    if probs.dim() != 2 or not 1 <= probs.shape[1] <= MAX_VOCABULARY or probs.dtype != torch.float32:
        raise ValueError(
            f"draw: probs must be [B, V] float32 with V from 1 to {MAX_VOCABULARY}, got {tuple(probs.shape)} "
            f"{probs.dtype}"
        )
    for name, column in (("seed", seed), ("position", position)):
        if column.shape != probs.shape[:1] or column.dtype != torch.int64:
            raise ValueError(
                f"draw: {name} must be [B] = [{probs.shape[0]}] int64, got {tuple(column.shape)} {column.dtype}"
            )
    if not 0 <= stream < 2**31:
        raise ValueError(f"draw: stream must be from 0 to 2^31 - 1, got {stream}")
    check_devices("draw", probs, seed, position)


@op(
    check=check_probabilities,
    fake=lambda logits, *_: torch.empty(logits.shape, dtype=logits.dtype, device=logits.device),
    c=cpu.probabilities,
    triton="minillm_kernels.gpu.sampling",
)
def probabilities(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """softmax(logits / temperature), filtered by top-k, top-p (arXiv 1904.09751) and min-p (arXiv 2407.01082) in turn.

    Args:
        logits: [B, V] float32, V at most 262,144.
        temperature: [B] float32 of 0 and more; a row at 0 becomes one-hot at its first largest logit.
        top_k: [B] int64 of 1 and more; V or more keeps all. Ties with the k-th stay. None: no row is filtered so.
        top_p, min_p: [B] float32; 1 and 0 keep all. Of equal tokens at the border of top_p the first stay. Or None.

    Returns [B, V] float32; a row with a logit of NaN or infinity is NaN, as a softmax of it would be, and so is one
    with a temperature of NaN or below 0. Raises ValueError when shapes, dtypes or devices do not fit.
    """
    return filtered_softmax(logits, temperature, top_k, top_p, min_p)


@op(
    check=check_draw,
    fake=lambda probs, *_: torch.empty(probs.shape[0], dtype=torch.int64, device=probs.device),
    c=cpu.draw,
    triton="minillm_kernels.gpu.sampling",
)
def draw(probs: Tensor, seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """`sample(probs, uniform(seed, position, stream))`, [B] int64: probs [B, V] float32, seed and position [B] int64.

    Raises ValueError when shapes, dtypes or devices do not fit.
    """
    return sample(probs, uniform(seed, position, stream))


@torch.no_grad()
def probabilities_of(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> Tensor:
    """`probabilities` of logits in any float dtype, with any V, on any device, in their dtype; where `temperature` is
    None every row is greedy. Each filter applies to what the one before left, as in `transformers`."""
    if temperature is None:
        return one_hot(logits)
    return (probabilities if _served(logits) else filtered_softmax)(logits, temperature, top_k, top_p, min_p)


def draw_from(probs: Tensor, seed: Tensor, position: Tensor, stream: int = 0) -> Tensor:
    """`draw` from probabilities in any float dtype, with any V, on any device."""
    return draw(probs, seed, position, stream) if _served(probs) else sample(probs, uniform(seed, position, stream))


def _served(x: Tensor) -> bool:
    """Whether the ops take such logits or probabilities: a tenth of the time of the PyTorch code."""
    fits = x.dtype == torch.float32 and x.shape[-1] <= MAX_VOCABULARY
    return fits and (not x.is_cuda or why_no_launch(x.device) is None)


def check_argmax(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"argmax: x must be floats, got {x.dtype}")
    if not x.dim() or not x.shape[-1]:
        raise ValueError(f"argmax: x must be [..., V] with V of 1 or more, got {tuple(x.shape)}")


@op(check=check_argmax, c=lambda x: cpu.argmax(x) if x.dtype == torch.float32 else x.argmax(dim=-1))
def argmax(x: Tensor) -> Tensor:
    """The first largest of each row, or the first that is no number: x [..., V] float, V 1 or more; [...] int64.

    In C on a CPU, where a pass can then be recorded, and none of PyTorch's threads is woken, which would have to be
    waited for beside a busy process; no op elsewhere. Raises ValueError or TypeError.
    """
    return x.argmax(dim=-1)


def check_verify(
    draft_tokens: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    draft_lengths: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: int,
) -> None:
    fits = draft_tokens.dim() == 2 and draft_probs.dim() == target_probs.dim() == 3
    if fits:
        (B, k), V, W = draft_tokens.shape, target_probs.shape[2], draft_probs.shape[2]
        fits = draft_probs.shape[:2] == (B, k) and target_probs.shape[:2] == (B, k + 1) and k > 0 and 1 <= W <= V
    if not fits:
        shapes = f"{tuple(draft_tokens.shape)}, {tuple(draft_probs.shape)} and {tuple(target_probs.shape)}"
        raise ValueError(f"verify: [B, k], [B, k, W] and [B, k + 1, V] with W up to V are needed, got {shapes}")
    if not draft_probs.is_floating_point() or not target_probs.is_floating_point():
        raise TypeError(f"verify: probabilities must be floats, got {draft_probs.dtype} and {target_probs.dtype}")
    if not 0 <= stream < 2**31:
        raise ValueError(f"verify: stream must be from 0 to 2^31 - 1, got {stream}")
    if draft_tokens.dtype != torch.int64:
        raise TypeError(f"verify: draft_tokens must be int64, got {draft_tokens.dtype}")
    for name, column in (("draft_lengths", draft_lengths), ("seed", seed), ("position", position)):
        if column.shape != (B,) or column.dtype != torch.int64:
            raise ValueError(f"verify: {name} must be [{B}] int64, got {tuple(column.shape)} {column.dtype}")
    check_devices("verify", draft_tokens, draft_probs, target_probs, draft_lengths, seed, position)


def verify_in_c(
    draft_tokens: Tensor, draft_probs: Tensor, target_probs: Tensor, draft_lengths: Tensor, *place, **named
) -> tuple[Tensor, Tensor] | None:
    if not draft_probs.dtype == target_probs.dtype == torch.float32:
        return None
    k, W = draft_probs.shape[1:]
    if len(draft_tokens):
        smallest, largest = (int(end) for end in draft_tokens.aminmax())
        if smallest < 0 or largest >= W or int(draft_lengths.max()) > k:
            raise ValueError(f"verify: drafts must be from 0 to {W - 1}, and at most {k}")
    return cpu.verify(draft_tokens, draft_probs, target_probs, draft_lengths, *place, **named)


@op(check=check_verify, c=verify_in_c)
def verify(
    draft_tokens: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    draft_lengths: Tensor,
    seed: Tensor,
    position: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor] | None:
    """How many drafts each row keeps, and the token that follows them (speculative sampling, arXiv 2211.17192).

    In C what would be some forty of PyTorch's operators on tensors over which its threads wake, and None where there is
    no C for these tensors: off a CPU, or in another dtype.

    Args:
        draft_tokens: [B, k] int64; draft_probs [B, k, W] float32, what each was drawn from, nothing beyond W.
        target_probs: [B, k + 1, V] float32, V at least W.
        draft_lengths: [B] int64, how many of the k a row has.
        seed, position: [B] int64: the i-th draft of a row, which would stand at position + i, is kept where
            uniform(seed, position + i, stream) * q < p; what follows is drawn with `uniform`'s stream 0.

    Returns accepted and next token, [B] int64. Raises ValueError or TypeError where shapes, dtypes or devices do not
    fit, and in C for an id that W does not have, and for more drafts than k, which is 1 or more.
    """
    return None


# ---- the same in PyTorch, for any float dtype and any device ----


def filtered_softmax(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """`probabilities` in the dtype of logits."""
    greedy = temperature == 0  # [B]
    divisor = torch.where(temperature > 0, temperature, torch.nan)  # [B]
    scaled = logits / torch.where(greedy, 1.0, divisor)[:, None].to(logits.dtype)  # [B, V]
    probs = scaled.softmax(dim=-1)
    filters = (top_k, None if top_p is None else torch.where(top_p < 1, top_p, torch.inf), min_p)
    if any(column is not None for column in filters):
        probs = _apply_filters(scaled, probs, *filters)
    return torch.where(greedy[:, None], one_hot(logits), probs)


def one_hot(logits: Tensor) -> Tensor:
    """All mass on the first largest: [B, V] -> [B, V]."""
    return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)


def _apply_filters(scaled: Tensor, probs: Tensor, *filters: Tensor | None) -> Tensor:
    """What the filters ([B] each) leave of `probs` [B, V], the softmax of `scaled` [B, V].

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
        mass = running_sum(kept)
        left = 1.0 if top_k is None else torch.where(top_k < kept.shape[-1], mass[:, -1], 1.0)[:, None]  # by top-k
        kept = kept.masked_fill(mass - kept >= top_p[:, None] * left, 0.0)
    if min_p is not None:
        kept = kept.masked_fill(kept < min_p[:, None] * kept[:, :1], 0.0)
    kept = kept / running_sum(kept)[:, -1:]
    return torch.zeros_like(probs).scatter(-1, order, kept.to(probs.dtype))


def running_sum(x: Tensor) -> Tensor:
    """What each row of `x` [B, V], from 0 to about 1, adds up to from its beginning, [B, V] float64.

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


def sample(probs: Tensor, u: Tensor) -> Tensor:
    """The token at which the cumulative distribution passes `u`.

    Args:
        probs: [B, V], need not be normalised; a token of probability 0 is never returned.
        u: [B] float64 in [0, 1).

    Returns [B] int64, an id even where `probs` are no numbers.
    """
    # float64: over 100,000 tokens a float32 running sum would lose the rare ones.
    cumulative = running_sum(probs).contiguous()  # [B, V]
    # u is at most 1 - 2^-53, so its share of the total stays below the total even after rounding, and the
    # search ends on a token with mass.
    found = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True)[:, 0]  # [B]
    return found.clamp_(max=probs.shape[-1] - 1)


def uniform(seed: Tensor, position: Tensor, stream: int = 0) -> Tensor:
    """A random number in [0, 1) that depends on (seed, position, stream) only, [B] float64.

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
