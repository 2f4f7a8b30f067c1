"""Who guesses ahead for speculative decoding: a smaller model, or a look at the text so far.

A proposer may be as wrong as it likes: `speculative.verify` makes sure that no guess changes the law of the text.
It has to be cheap, and right often enough. How many tokens it proposes per step is `DraftLength`'s choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.cache import StaticCache
from minillm.decode import Row, next_logits, prefill, reuse_prefix
from minillm.errors import RequestError
from minillm.model import Decoder
from minillm.options import GenerationConfig
from minillm.sampling import Sampling, penalize, probabilities, sample, uniform
from minillm.steps import Steps
from minillm.tokenizer import Tokenizer

DRAFT_STREAM = 1  # random numbers beside plain decoding's stream 0, see `sampling.uniform`
_MAX_NGRAM = 3  # the longest n-gram prompt lookup tries to match
_AUTO_LENGTHS = (1, 2, 4, 8)  # what "auto" chooses from: few, so that there are few shapes of verify steps
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


def no_draft(rows: int, device: torch.device) -> Draft:
    return Draft(torch.zeros(rows, 0, dtype=torch.int64, device=device), None, [0] * rows)


def penalized(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
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
    flat = penalized(logits, sampling, seen).flatten(0, 1)  # [B * T, V]
    return probabilities(flat, *map(per_place, filters)).view_as(logits)


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
        numbers = None if greedy else uniform(sampling.seed[:, None], place, DRAFT_STREAM)  # [B, k]
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
                tokens.append(penalized(logits[:, None, :common], sampling, shared)[:, 0].argmax(dim=-1))  # [B]
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
