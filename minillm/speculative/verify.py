"""Speculative decoding: guess several tokens cheaply, check them all in one forward pass, keep what fits.

A decode step reads every weight of the model to produce one token, and reads them just once for k + 1
tokens as well. So somebody cheap (a small draft model, or a look at the text so far) proposes k tokens,
the target computes its distribution at all k + 1 places in one pass, and `verify` accepts the longest
run of proposals that leaves the law of the text *exactly* the target's own (Leviathan, Kalman, Matias
2022, arXiv:2211.17192; Chen et al. 2023, arXiv:2302.01318). Every pass yields between 1 and k + 1 tokens.

Why rejection keeps the distribution. A token x is drafted with probability q(x) and accepted with
min(1, p(x) / q(x)), so it comes out of a draft with probability min(q(x), p(x)). What is missing from
p(x) is max(p(x) - q(x), 0), the *residual*: after a rejection the token is drawn from it. The two add
up to p(x), whatever q is; a bad draft costs speed and never changes the text. At temperature 0 both
are one-hot, and the same formula reads "accept if it is the argmax, else take the argmax".

"Exactly" is meant up to rounding: a pass of more than `FEW_ROWS` places (16) may add up in another order than
k + 1 passes. In float32 that shows in no text of our tests; in bfloat16 two tokens that
are almost equally likely may change places.

What was proposed by a look at the text was drawn from nothing: there the target draws as ever, and a proposal is kept
while it is what comes out (`compare`). On a CPU `judge` runs the same in C.

In a batch each row accepts its own number. A row that kept fewer tokens than it was fed is cut back in
the cache (`StaticCache.cut`), and positions are data, so nothing else has to know.
"""

import torch
import torch.nn.functional as F
from minillm_kernels import sampling as kernels
from minillm_kernels.sampling import argmax, draw_from, probabilities_of, sample, uniform
from torch import Tensor

from minillm.proposer import Draft
from minillm.sampling import Sampling, penalize

_ACCEPT_STREAM = 2  # random numbers beside plain decoding's stream 0 and the draft's 1, see `uniform`


def verify(
    draft_tokens: Tensor,
    draft_probs: Tensor,
    target_probs: Tensor,
    draft_lengths: Tensor,
    accept_uniforms: Tensor,
    fresh_uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens each row keeps, and the token that follows them.

    Args:
        draft_tokens: `[B, k]` int64, k may be 0.
        draft_probs: `[B, k, W]`, the distribution q each token was drawn from, of the first W tokens.
        target_probs: `[B, k + 1, V]`, the target's distribution p before and after each drafted token.
        draft_lengths: `[B]` int64, how many of the k tokens each row proposed.
        accept_uniforms, fresh_uniforms: `[B, k]` and `[B, k + 1]` float64 in [0, 1), independent.

    Returns `accepted [B]`, from 0 to draft_lengths, and `next_token [B]`, both int64.
    """
    k, proposed = draft_tokens.shape[1], _proposed(draft_tokens, draft_lengths)
    # No draft at a place means q = 0 there, and the residual p - q is p itself.
    beyond = target_probs.shape[2] - draft_probs.shape[2]
    q = F.pad(draft_probs.masked_fill(~proposed[:, :, None], 0.0), (0, beyond, 0, 1))  # [B, k + 1, V]
    drafted = draft_tokens[:, :, None]  # [B, k, 1]
    p_drafted = target_probs[:, :k].gather(2, drafted)[:, :, 0]  # [B, k]
    q_drafted = q[:, :k].gather(2, drafted)[:, :, 0]  # [B, k]
    # u < p / q without the division; u < 1, so p = q always accepts, and p = 0 never does.
    accepted = _leading(proposed & (accept_uniforms * q_drafted < p_drafted))  # [B]
    # `gather`, where p[rows, accepted] would do: for that PyTorch wakes its threads, and waits for cores that are busy.
    place = accepted[:, None, None].expand(-1, 1, q.shape[-1])  # [B, 1, V]
    p, q = (x.gather(1, place)[:, 0] for x in (target_probs, q))  # [B, V] each
    residual = (p - q).clamp(min=0)
    # Where p and q are equal but for rounding, a rejection that rounding made possible may leave no residual.
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p)
    return accepted, sample(residual, fresh_uniforms.gather(1, accepted[:, None])[:, 0])


def compare(draft_tokens: Tensor, tokens: Tensor, draft_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`verify` where the target has chosen its own `tokens [B, k + 1]`: a proposal is kept while it is that token."""
    same = draft_tokens == tokens[:, : draft_tokens.shape[1]]  # [B, k]
    accepted = _leading(_proposed(draft_tokens, draft_lengths) & same)  # [B]
    return accepted, tokens.gather(1, accepted[:, None])[:, 0]


def _proposed(draft_tokens: Tensor, draft_lengths: Tensor) -> Tensor:
    """Which of `draft_tokens [B, k]` a row proposes: its first `draft_lengths [B]`; `[B, k]` bool."""
    return torch.arange(draft_tokens.shape[1], device=draft_tokens.device) < draft_lengths[:, None]


def _leading(keep: Tensor) -> Tensor:
    """How many True stand at the beginning of each row of `keep [B, k]`; `[B]` int64."""
    return keep.long().cumprod(dim=1).sum(dim=1)


def judge(
    logits: Tensor, draft: Draft, start: Tensor, sampling: Sampling, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`verify` on the logits `[B, k + 1, V]` of tokens that will stand at `start [B]` and after.

    `seen [B, V]` are the tokens that a repetition penalty knows.
    """
    stages = None
    if seen is not None:
        # At each place the repetition penalty knows the drafts before it.
        stages = [seen]
        for token in draft.tokens.unbind(dim=1):
            stages.append(stages[-1].scatter(1, token[:, None], True))  # [B, V]
        stages = torch.stack(stages, dim=1)  # [B, k + 1, V]
    if sampling.temperature is None:
        return compare(draft.tokens, argmax(penalized(logits, sampling, stages)), draft.counts)
    place = start[:, None] + torch.arange(logits.shape[1], device=start.device)  # [B, k + 1]
    seed = sampling.seed[:, None].expand_as(place)  # [B, k + 1]
    probs = distribution(logits, sampling, stages)  # [B, k + 1, V]
    if draft.probs is None:  # nothing was drawn: the target draws as in plain decoding
        tokens = draw_from(probs.flatten(0, 1), seed.flatten(), place.flatten()).view_as(place)  # [B, k + 1]
        return compare(draft.tokens, tokens, draft.counts)
    judged = kernels.verify(draft.tokens, draft.probs, probs, draft.counts, sampling.seed, start, _ACCEPT_STREAM)
    if judged is not None:
        return judged
    accept = uniform(seed[:, :-1], place[:, :-1], _ACCEPT_STREAM)  # [B, k]
    return verify(draft.tokens, draft.probs, probs, draft.counts, accept, uniform(seed, place))


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
    return probabilities_of(flat, *map(per_place, filters)).view_as(logits)
