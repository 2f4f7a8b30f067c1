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

"Exactly" is meant up to rounding: a pass over k + 1 tokens may add up in another order than k + 1 passes,
as batches of another size do. In float32 that shows in no text of our tests; in bfloat16 two tokens that
are almost equally likely may change places.

In a batch each row accepts its own number. A row that kept fewer tokens than it was fed is cut back in
the cache (`StaticCache.truncate`), and positions are data, so nothing else has to know.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.cache import StaticCache
from minillm.decode import GenerationConfig, Row, begin, next_logits, prefill, reuse_prefix
from minillm.errors import RequestError
from minillm.model import Decoder
from minillm.sampling import Sampling, penalize, probabilities, sample, uniform
from minillm.steps import Steps
from minillm.tokenizer import Tokenizer

_DRAFT_STREAM, _ACCEPT_STREAM = 1, 2  # random numbers beside plain decoding's stream 0, see `sampling.uniform`
_MAX_NGRAM = 3  # the longest n-gram prompt lookup tries to match
_AUTO_LENGTHS = (1, 2, 4, 8)  # what "auto" chooses from: few, so that a compiled verify step has few shapes
_AUTO_DECAY = 0.9  # how fast "auto" forgets: about the last ten steps count


@dataclass(frozen=True)
class Draft:
    """Proposals for the next places of every row; rows may have fewer than k."""

    tokens: Tensor  # [B, k] int64, beyond a row's length any id
    probs: Tensor | None  # [B, k, V]: the distribution each token was drawn from; None where nothing was drawn
    lengths: list[int]  # how many of the k each row proposes


class Proposer(Protocol):
    """Somebody cheap who guesses what comes next, made for the rows of one request."""

    num_tokens: int | str  # drafts per step, or "auto" (see `DraftLength`)
    cost: float  # of one drafted token, in forward passes of the target

    def propose(self, texts: list[list[int]], counts: list[int], sampling: Sampling, seen: Tensor | None) -> Draft:
        """Up to `counts[b]` tokens to follow `texts[b]`, all ids of that row so far.

        `sampling` and `seen [B, V]` (with a repetition penalty) are the target's.
        """


def verify(
    draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    draft_lengths: Tensor,
    accept_uniforms: Tensor,
    fresh_uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """How many drafted tokens each row keeps, and the token that follows them.

    Args:
        draft_tokens: `[B, k]` int64, k may be 0.
        draft_probs: `[B, k, V]`, the distribution q each token was drawn from; None for proposals that have
            none (prompt lookup): then the target draws its own token at each place, with the numbers plain
            decoding would use, and a proposal is kept if it is that very token.
        target_probs: `[B, k + 1, V]`, the target's distribution p before and after each drafted token.
        draft_lengths: `[B]` int64, how many of the k tokens each row proposed.
        accept_uniforms, fresh_uniforms: `[B, k]` and `[B, k + 1]` float64 in [0, 1), independent.

    Returns `accepted [B]`, from 0 to draft_lengths, and `next_token [B]`, both int64.
    """
    if draft_probs is None:
        fresh = sample(target_probs.flatten(0, 1), fresh_uniforms.flatten()).view_as(fresh_uniforms)  # [B, k + 1]
        return compare(draft_tokens, fresh, draft_lengths)
    k = draft_tokens.shape[1]
    proposed = torch.arange(k, device=draft_tokens.device) < draft_lengths[:, None]  # [B, k]
    # No draft at a place means q = 0 there, and the residual p - q is p itself.
    q = F.pad(draft_probs.masked_fill(~proposed[:, :, None], 0.0), (0, 0, 0, 1))  # [B, k + 1, V]
    drafted = draft_tokens[:, :, None]  # [B, k, 1]
    p_drafted = target_probs[:, :k].gather(2, drafted)[:, :, 0]  # [B, k]
    q_drafted = q[:, :k].gather(2, drafted)[:, :, 0]  # [B, k]
    # u < p / q without the division; u < 1, so p = q always accepts, and p = 0 never does.
    accepted = _leading(proposed & (accept_uniforms * q_drafted < p_drafted))  # [B]
    rows = torch.arange(len(accepted), device=accepted.device)
    p, q = target_probs[rows, accepted], q[rows, accepted]  # [B, V] each
    residual = (p - q).clamp(min=0)
    # Where p and q are equal but for rounding, a rejection that rounding made possible may leave no residual.
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p)
    return accepted, sample(residual, fresh_uniforms[rows, accepted])


def compare(draft_tokens: Tensor, tokens: Tensor, draft_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """`verify` where the target has chosen its own `tokens [B, k + 1]`: a proposal is kept while it is that token."""
    k = draft_tokens.shape[1]
    proposed = torch.arange(k, device=tokens.device) < draft_lengths[:, None]  # [B, k]
    accepted = _leading(proposed & (draft_tokens == tokens[:, :k]))  # [B]
    return accepted, tokens.gather(1, accepted[:, None])[:, 0]


def _leading(keep: Tensor) -> Tensor:
    """How many True stand at the beginning of each row of `keep [B, k]`; `[B]` int64."""
    return keep.long().cumprod(dim=1).sum(dim=1)


def _penalized(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """`sampling.penalize` at T places per row: logits and `seen` `[B, T, V]` -> `[B, T, V]`."""
    if sampling.repetition_penalty is None:
        return logits
    penalty = sampling.repetition_penalty.repeat_interleave(logits.shape[1])  # [B * T]
    return penalize(logits.flatten(0, 1), seen.flatten(0, 1), penalty).view_as(logits)


def distribution(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    """`sampling.probabilities` at T places per row: logits and `seen` `[B, T, V]` -> `[B, T, V]`."""

    def per_place(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.repeat_interleave(logits.shape[1])  # [B * T]

    filters = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    flat = _penalized(logits, sampling, seen).flatten(0, 1)  # [B * T, V]
    return probabilities(flat, *map(per_place, filters)).view_as(logits)


def run_speculative(
    model: Decoder | Steps, cache: StaticCache, rows: list[Row], sampling: Sampling, logprobs: bool, proposer: Proposer
) -> Iterator[None]:
    """`decode.run` with drafts: the same contract, the same `Row.commit`, fewer passes of the target."""
    device = cache.device
    plans = [DraftLength(proposer.num_tokens, proposer.cost, cache.max_step - 1) for _ in rows]
    texts = [list(row.prompt) for row in rows]
    logits, seen = begin(model, cache, rows, sampling)  # [B, V]
    logits = logits[:, None]  # [B, 1, V]
    draft = no_draft(len(rows), device)
    while True:
        start = torch.tensor([len(text) for text in texts], device=device)  # [B], where new tokens will stand
        accepted, token = _judge(logits, draft, start, sampling, seen)  # [B] each
        new = F.pad(draft.tokens, (0, 1)).scatter(1, accepted[:, None], token[:, None])  # [B, k + 1]
        chosen = [[]] * len(rows)
        if logprobs:
            chosen = logits.log_softmax(dim=-1).gather(2, new[:, :, None])[:, :, 0].tolist()  # [B][k + 1]
        for b, (kept, ids) in enumerate(zip(accepted.tolist(), new.tolist(), strict=True)):
            row = rows[b]
            if row.finish_reason is None:
                count = row.commit(ids[: kept + 1], chosen[b], drafts=kept)
                texts[b] += ids[:count]
                row.drafted += draft.lengths[b]
                plans[b].learn(draft.lengths[b], kept)
                if seen is not None:
                    seen[b, new[b, :count]] = True
        # Forget rejected drafts. The newest token is not in the cache yet: it is fed with the next drafts.
        cache.truncate([len(text) - 1 for text in texts])
        yield
        running = [row.finish_reason is None for row in rows]
        if not any(running):
            return
        lengths = [plan.choose() if busy else 0 for plan, busy in zip(plans, running, strict=True)]
        # The last token of a row's budget needs no draft: every step yields one token of its own.
        left = [row.max_new_tokens - len(row.token_ids) for row in rows]
        counts = [max(0, min(length, room - 1)) for length, room in zip(lengths, left, strict=True)]
        draft = proposer.propose(texts, counts, sampling, seen)
        logits = _verify_step(model, cache, texts, running, draft, 1 + max(lengths))  # [B, k + 1, V]


def no_draft(rows: int, device: torch.device) -> Draft:
    return Draft(torch.zeros(rows, 0, dtype=torch.int64, device=device), None, [0] * rows)


def _verify_step(
    model: Decoder | Steps, cache: StaticCache, texts: list[list[int]], running: list[bool], draft: Draft, width: int
) -> Tensor:
    """Feed the newest token and the drafts of every running row; logits after each, `[B, k + 1, V]`.

    The step is padded to `width` tokens whatever the rows propose, so its shape does not follow their luck;
    where nobody proposes anything it is a plain decode step.
    """
    device, k = cache.device, draft.tokens.shape[1]
    width = min(width, cache.max_step) if k else 1
    newest = torch.tensor([text[-1:] for text in texts], device=device)  # [B, 1]
    tokens = F.pad(torch.cat((newest, draft.tokens), dim=1), (0, width - 1 - k))  # [B, width]
    fed = [1 + length if busy else 0 for length, busy in zip(draft.lengths, running, strict=True)]
    first = torch.tensor([[len(text) - 1] for text in texts], device=device)  # [B, 1]
    place = torch.arange(width, device=device)  # [width]
    position = torch.where(place < torch.tensor(fed, device=device)[:, None], first + place, -1)  # [B, width]
    used = max(len(text) - 1 + count for text, count in zip(texts, fed, strict=True) if count)
    return model(tokens, position, cache, key_length=used)[:, : k + 1]


def _judge(logits: Tensor, draft: Draft, start: Tensor, sampling: Sampling, seen: Tensor | None):
    """`verify` on the logits `[B, k + 1, V]` of tokens that will stand at `start [B]` and after."""
    stages = None
    if seen is not None:
        # At each place the repetition penalty knows the drafts before it.
        stages = [seen]
        for token in draft.tokens.unbind(dim=1):
            stages.append(stages[-1].scatter(1, token[:, None], True))  # [B, V]
        stages = torch.stack(stages, dim=1)  # [B, k + 1, V]
    lengths = torch.tensor(draft.lengths, device=start.device)  # [B]
    if sampling.temperature is None:
        return compare(draft.tokens, _penalized(logits, sampling, stages).argmax(dim=-1), lengths)
    place = start[:, None] + torch.arange(logits.shape[1], device=start.device)  # [B, k + 1]
    seed = sampling.seed[:, None]  # [B, 1]
    return verify(
        draft.tokens,
        draft.probs,
        distribution(logits, sampling, stages),
        lengths,
        uniform(seed, place[:, :-1], _ACCEPT_STREAM),
        uniform(seed, place),
    )


class DraftLength:
    """How many tokens to draft for one row: a fixed number, or as many as its luck so far suggests.

    With a chance `a` that a drafted token is accepted, k drafts yield 1 + a + ... + a^k tokens per step on
    average, for the time of one pass of the target and k of the draft (Leviathan et al. 2022, section 3.4).
    "auto" estimates `a` from the row's own recent steps, so that no neighbour changes a row's text, and
    takes the k with the most tokens per time.
    """

    def __init__(self, asked: int | str, cost: float, longest: int):
        self.asked, self.cost, self.longest = asked, cost, longest
        self.accepted, self.rejected = 3.0, 1.0  # before anything is known: three in four

    def choose(self) -> int:
        if self.asked != "auto":
            return self.asked
        rate = self.accepted / (self.accepted + self.rejected)
        lengths = [k for k in _AUTO_LENGTHS if k <= self.longest]
        return max(lengths, key=lambda k: sum(rate**i for i in range(k + 1)) / (1 + k * self.cost), default=0)

    def learn(self, drafted: int, accepted: int) -> None:
        """Count a step. Drafts after the first rejected one tell nothing: they continue a wrong text."""
        if drafted:
            self.accepted = _AUTO_DECAY * self.accepted + accepted
            self.rejected = _AUTO_DECAY * self.rejected + (accepted < drafted)


class PromptLookup:
    """Propose what followed the last words the last time they were said (Saxena 2023, prompt lookup decoding).

    The longest n-gram at the end of the text that occurred before counts, and of its occurrences the latest.
    Needs no model; pays where answers repeat their prompt: summaries, edits, code.
    """

    cost = 0.0

    def __init__(self, rows: int, num_tokens: int, device: torch.device):
        self.num_tokens, self.device = num_tokens, device
        # Per row: n-gram -> the place right after its latest occurrence.
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(rows)]
        self._indexed = [0] * rows  # places entered so far

    def propose(self, texts: list[list[int]], counts: list[int], sampling: Sampling, seen: Tensor | None) -> Draft:
        found = [self._continue(b, text, count) for b, (text, count) in enumerate(zip(texts, counts, strict=True))]
        width = max(len(ids) for ids in found)
        tokens = torch.tensor([ids + [0] * (width - len(ids)) for ids in found], dtype=torch.int64, device=self.device)
        return Draft(tokens, None, [len(ids) for ids in found])  # tokens [B, k]

    def _continue(self, row: int, text: list[int], count: int) -> list[int]:
        after = self._after[row]
        for place in range(self._indexed[row], len(text)):
            for n in range(1, min(_MAX_NGRAM, place) + 1):
                after[tuple(text[place - n : place])] = place
        self._indexed[row] = len(text)
        matches = (after.get(tuple(text[-n:])) for n in range(min(_MAX_NGRAM, len(text)), 0, -1))
        place = next((place for place in matches if place is not None), None)
        if place is None:
            return []
        # The copy may run into its own output: after "ab ab" comes "ab ab ab ...".
        longer = list(text)
        for source in range(place, place + count):
            longer.append(longer[source])
        return longer[len(text) :]


class DraftModel:
    """Propose what a smaller model with the same tokenizer would say.

    Args:
        steps: the draft.
        target: the model that will verify. Of its vocabulary and the draft's (both may be padded) the shorter
            one is what can be proposed; the sizes of their weights give `cost`.
        num_tokens: drafts per step, or "auto".
        cache: the draft's own `StaticCache`. What it holds of the prompts already is not computed again.
        prompts: the ids of the rows' prompts.
    """

    def __init__(
        self,
        steps: Steps,
        target: Decoder,
        num_tokens: int | str,
        cache: StaticCache,
        prompts: Sequence[Sequence[int]],
    ):
        self.steps, self.num_tokens, self.cache = steps, num_tokens, cache
        self.vocab_size = target.config.vocab_size
        self.cost = _weight_bytes(steps.model) / _weight_bytes(target)  # a decode step's time is reading its weights
        reuse_prefix(cache, [self._known(prompt) for prompt in prompts])

    def propose(self, texts: list[list[int]], counts: list[int], sampling: Sampling, seen: Tensor | None) -> Draft:
        # What the cache holds of the text is right up to where the last drafts were rejected; if all were
        # accepted, the last of them was never fed. Either way the rest of the text is fed now.
        held = [min(held, len(text) - 1) for held, text in zip(self.cache.lengths, texts, strict=True)]
        self.cache.truncate(held)
        # A text that outgrows the draft's positions goes on without drafts.
        room = self.cache.max_cache_len + 1
        counts = [max(0, min(count, room - len(text))) for text, count in zip(texts, counts, strict=True)]
        k = max(counts)
        if k == 0:
            return no_draft(len(texts), self.cache.device)
        missing = [self._known(text[n:]) if c else [] for text, n, c in zip(texts, held, counts, strict=True)]
        logits = prefill(self.steps, self.cache, missing, held)  # [B, V of the draft]
        wanted = torch.tensor(counts, device=self.cache.device)  # [B]
        place = torch.tensor([[*range(len(text), len(text) + k)] for text in texts], device=self.cache.device)  # [B, k]
        greedy = sampling.temperature is None
        numbers = None if greedy else uniform(sampling.seed[:, None], place, _DRAFT_STREAM)  # [B, k]
        common = min(self.vocab_size, logits.shape[-1])
        tokens, probs = [], []
        for i in range(k):
            if i > 0:
                feed = torch.where(i < wanted, place[:, i - 1], -1)  # [B]
                used = max(len(text) + i for text, count in zip(texts, counts, strict=True) if count > i)
                logits = next_logits(self.steps, tokens[-1][:, None], feed[:, None], self.cache, key_length=used)
                if seen is not None:
                    seen = seen.scatter(1, tokens[-1][:, None], True)
            shared = None if seen is None else seen[:, None, :common]  # [B, 1, common]
            if greedy:  # the target compares tokens and asks for no distribution
                tokens.append(_penalized(logits[:, None, :common], sampling, shared)[:, 0].argmax(dim=-1))  # [B]
                continue
            q = distribution(logits[:, None, :common], sampling, shared)[:, 0]  # [B, common]
            tokens.append(sample(q, numbers[:, i]))  # [B]
            probs.append(q)
        if greedy:
            return Draft(torch.stack(tokens, dim=1), None, counts)  # tokens [B, k]
        padded = F.pad(torch.stack(probs, dim=1), (0, self.vocab_size - common))  # [B, k, V]
        return Draft(torch.stack(tokens, dim=1), padded, counts)  # tokens [B, k]

    def _known(self, ids: Sequence[int]) -> list[int]:
        """The ids as the draft can read them: one beyond its embedding becomes 0, which costs acceptance only."""
        return [token if token < self.steps.config.vocab_size else 0 for token in ids]


def _weight_bytes(model: Decoder) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def make_proposer(
    target,
    assistant,
    config: GenerationConfig,
    rows: list[Row],
    cache: StaticCache,
    planned_length: int | Sequence[int],
    previous: Proposer | None = None,
) -> Proposer | None:
    """The proposer a request asks for, or None for plain decoding.

    Args:
        target, assistant: the `LLM` that generates and the one that drafts for it (or None).
        config, rows, cache: the request; `planned_length` is what its cache was planned for.
        previous: the proposer of the conversation's last turn: its draft model's cache is used again.

    Raises `RequestError` where the options contradict each other or the assistant does not fit.
    """
    asked, lookup = config.num_assistant_tokens, config.prompt_lookup_num_tokens
    if assistant is not None and lookup is not None:
        raise RequestError("assistant_model and prompt_lookup_num_tokens exclude each other: choose who drafts")
    if assistant is None and asked is not None:
        raise RequestError("num_assistant_tokens needs an assistant_model (prompt_lookup_num_tokens does not)")
    if assistant is None and lookup is None:
        return None
    longest = min(lookup or (1 if asked in (None, "auto") else asked), max(row.max_new_tokens for row in rows) - 1)
    if longest >= cache.max_step:
        raise RequestError(
            f"{longest} drafted tokens make a step of {longest + 1}, but the cache takes {cache.max_step} per step: "
            f"draft fewer, or pass a StaticCache with max_step={longest + 1}"
        )
    if assistant is None:
        return PromptLookup(len(rows), lookup, cache.device)
    _check_same_tokenizer(target.tokenizer, assistant.tokenizer)
    if assistant.device != target.device:
        raise RequestError(f"assistant_model is on {assistant.device}, the model on {target.device}: load both on one")
    if isinstance(previous, DraftModel) and previous.steps is assistant.steps:
        draft_cache = previous.cache
    else:
        size = min(cache.max_cache_len, assistant.config.max_positions)
        planned = [planned_length] * len(rows) if isinstance(planned_length, int) else planned_length
        draft_cache = StaticCache(
            assistant.config,
            len(rows),
            size,
            assistant.device,
            assistant.dtype,
            max_step=cache.max_step,
            planned_length=[min(length, size) for length in planned],
        )
    prompts = [row.prompt for row in rows]
    return DraftModel(assistant.steps, target.model, "auto" if asked is None else asked, draft_cache, prompts)


def _check_same_tokenizer(target: Tokenizer, draft: Tokenizer) -> None:
    """Raise `RequestError` unless every id means the same token to both."""
    if target is draft or target.vocabulary == draft.vocabulary:
        return
    ours, theirs = ({token_id: token for token, token_id in t.vocabulary.items()} for t in (target, draft))
    first = min(token_id for token_id in {*ours, *theirs} if ours.get(token_id) != theirs.get(token_id))
    raise RequestError(
        f"assistant_model has another tokenizer: id {first} is {ours.get(first)!r} for the model ({len(ours)} tokens) "
        f"and {theirs.get(first)!r} for the assistant ({len(theirs)}); a draft needs the same vocabulary"
    )
