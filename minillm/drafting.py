"""Who guesses ahead for speculative decoding: a smaller model, or a look at the text so far.

A proposer may be as wrong as it likes: `speculative.verify` makes sure that no guess changes the law of the text.
It has to be cheap, and right often enough. How many tokens it proposes per step is the loop's choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.cache import StaticCache
from minillm.decode import prefill, reuse_prefix
from minillm.model import Decoder
from minillm.sampling import Sampling, distribution, penalized, sample, uniform

DRAFT_STREAM = 1  # random numbers beside plain decoding's stream 0, see `sampling.uniform`
_MAX_NGRAM = 3  # the longest n-gram prompt lookup tries to match


@dataclass(frozen=True)
class Draft:
    """Proposals for the next places of every row; rows may have fewer than k."""

    tokens: Tensor  # [B, k] int64, beyond a row's length any id
    probs: Tensor | None  # [B, k, V]: the distribution each token was drawn from; None where nothing was drawn
    lengths: list[int]  # how many of the k each row proposes


class Proposer(Protocol):
    """Somebody cheap who guesses what comes next, made for the rows of one request."""

    num_tokens: int | str  # drafts per step, or "auto" (see `speculative.DraftLength`)
    cost: float  # of one drafted token, in forward passes of the target

    def start(self, prompts: list[list[int]]) -> None:
        """A request begins whose rows have these ids."""

    def propose(self, texts: list[list[int]], counts: list[int], sampling: Sampling, seen: Tensor | None) -> Draft:
        """Up to `counts[b]` tokens to follow `texts[b]`, all ids of that row so far.

        `sampling` and `seen [B, V]` (with a repetition penalty) are the target's.
        """


def no_draft(rows: int, device: torch.device) -> Draft:
    return Draft(torch.zeros(rows, 0, dtype=torch.int64, device=device), None, [0] * rows)


class PromptLookup:
    """Propose what followed the last words the last time they were said (Saxena 2023, prompt lookup decoding).

    The longest n-gram at the end of the text that occurred before counts, and of its occurrences the latest.
    Needs no model; pays where answers repeat their prompt: summaries, edits, code.
    """

    cost = 0.0

    def __init__(self, num_tokens: int, device: torch.device):
        self.num_tokens, self.device = num_tokens, device

    def start(self, prompts: list[list[int]]) -> None:
        # Per row: n-gram -> the place right after its latest occurrence.
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in prompts]
        self._indexed = [0] * len(prompts)  # places entered so far

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
        model: the draft.
        target: the model that will verify. Of its vocabulary and the draft's (both may be padded) the shorter
            one is what can be proposed; the sizes of their weights give `cost`.
        num_tokens: drafts per step, or "auto".
        cache: the draft's own `StaticCache`. What it holds of the prompts already is not computed again.
    """

    def __init__(self, model: Decoder, target: Decoder, num_tokens: int | str, cache: StaticCache):
        self.model, self.num_tokens, self.cache = model, num_tokens, cache
        self.vocab_size = target.config.vocab_size
        self.cost = model.weight_bytes / target.weight_bytes  # a decode step's time is reading its weights

    def start(self, prompts: list[list[int]]) -> None:
        if not self.cache.hold.same_weights(self.model.fingerprint()):
            self.cache.reset()
        reuse_prefix(self.cache, [self._known(prompt) for prompt in prompts])

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
        logits = self._feed(missing, held)  # [B, V of the draft]
        wanted = torch.tensor(counts, device=self.cache.device)  # [B]
        place = torch.tensor([[*range(len(text), len(text) + k)] for text in texts], device=self.cache.device)  # [B, k]
        greedy = sampling.temperature is None
        numbers = None if greedy else uniform(sampling.seed[:, None], place, DRAFT_STREAM)  # [B, k]
        common = min(self.vocab_size, logits.shape[-1])
        tokens, probs = [], []
        for i in range(k):
            if i > 0:
                feed = torch.where(i < wanted, place[:, i - 1], -1)  # [B]
                logits = self.model(tokens[-1][:, None], feed[:, None], self.cache)[:, -1]  # [B, V of the draft]
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

    def _feed(self, missing: list[list[int]], held: list[int]) -> Tensor:
        """Logits after the tokens that the cache lacks of each row, `[B, V]`. One or two are fed as a step, which is
        recorded, and not as a prompt."""
        width = max(map(len, missing))
        if width > 2:
            return prefill(self.model, self.cache, missing, held)
        ids = [row + [0] * (width - len(row)) for row in missing]
        places = [
            [first + i if i < len(row) else -1 for i in range(width)] for row, first in zip(missing, held, strict=True)
        ]
        device = self.cache.device
        logits = self.model(torch.tensor(ids, device=device), torch.tensor(places, device=device), self.cache)
        return torch.stack([logits[b, len(row) - 1] for b, row in enumerate(missing)])  # of [B, T, V]

    def _known(self, ids: Sequence[int]) -> list[int]:
        """The ids as the draft can read them: one beyond its embedding becomes 0, which costs acceptance only."""
        return [token if token < self.model.config.vocab_size else 0 for token in ids]
