"""Who guesses ahead for speculative decoding: a smaller model, or a look at the text so far.

A proposer may be as wrong as it likes: `verify` makes sure that no guess changes the law of the text. It has to be
cheap, and right often enough. How many tokens it proposes per step is the loop's choice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.cache import StaticCache, upload
from minillm.decode import prefill, reuse_prefix
from minillm.model import Decoder
from minillm.proposer import Draft, no_draft
from minillm.sampling import Sampling
from minillm.speculative.length import WIDER, pass_bytes
from minillm.speculative.verify import judge

DRAFT_STREAM = 1  # random numbers beside plain decoding's stream 0, see `uniform`
_MAX_NGRAM = 3  # the longest n-gram prompt lookup tries to match


class PromptLookup:
    """Propose what followed the last words the last time they were said (Saxena 2023, prompt lookup decoding).

    The longest n-gram at the end of the text that occurred before counts, and of its occurrences the latest.
    Needs no model; pays where answers repeat their prompt: summaries, edits, code.
    """

    cost, rest = WIDER, 32  # of a drafted token in passes of the target; steps before luck is tried again
    judge = staticmethod(judge)

    def __init__(self, device: torch.device):
        self.device = device
        # Per seat: n-gram -> the place right after its latest occurrence; and how many places are entered so far.
        self._after: dict[int, dict[tuple[int, ...], int]] = {}
        self._indexed: dict[int, int] = {}

    def start(self, seat: int, prompt: list[int], planned_length: int | None) -> None:
        self._after[seat], self._indexed[seat] = {}, 0

    def read(self, seat: int, beginning: list[int]) -> None:
        """What was said is indexed when it is looked at."""

    def propose(self, texts: dict[int, list[int]], counts: list[int], sampling: Sampling, seen: Tensor | None) -> Draft:
        found = [self._continue(*item, count) for item, count in zip(texts.items(), counts, strict=True)]
        width = max(len(ids) for ids in found)
        padded = [[*ids, *[0] * (width - len(ids)), len(ids)] for ids in found]
        tokens = upload(padded, self.device)  # [R, k + 1]
        return Draft(tokens[:, :-1], None, [len(ids) for ids in found], tokens[:, -1])  # tokens [R, k]

    def _continue(self, seat: int, text: list[int], count: int) -> list[int]:
        after = self._after[seat]
        for place in range(self._indexed[seat], len(text)):
            for n in range(1, min(_MAX_NGRAM, place) + 1):
                after[tuple(text[place - n : place])] = place
        self._indexed[seat] = len(text)
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
        model: the draft, as `faster.steps.Steps`.
        target: the model that will verify. Of its vocabulary and the draft's (both may be padded) the shorter
            one is what can be proposed; the sizes of their weights give `cost`.
        cache: the draft's own `StaticCache`, with the seats of the target's. What it holds of a prompt already is not
            computed again, unless the row has a planned length: then its drafts are to be the same wherever it sits.
    """

    rest = 256  # after it all that was said meanwhile has to be read
    judge = staticmethod(judge)

    def __init__(self, model, target: Decoder, cache: StaticCache):
        self.model, self.cache, self.ranks = model, cache, target.ranks
        self.vocab_size = target.config.vocab_size
        self.cost = WIDER + pass_bytes(model) / pass_bytes(target)
        # Per seat: tokens of text and drafts that the cache holds, and of them the drafts. A GPU is not asked.
        self._fed: dict[int, int] = {}
        self._drafts: dict[int, int] = {}

    def start(self, seat: int, prompt: list[int], planned_length: int | None) -> None:
        if not self.cache.hold.same_weights(self.model.fingerprint()):
            self.cache.reset()
        row, self._fed[seat], self._drafts[seat] = self.cache.rows(seat, seat + 1), 0, 0
        if planned_length is None:
            self._fed[seat] = reuse_prefix(row, self._known(prompt))
        else:
            row.truncate(0)
            row.plan(min(planned_length, self.cache.max_cache_len))

    def read(self, seat: int, beginning: list[int]) -> None:
        row, held = self.cache.rows(seat, seat + 1), self._fed[seat]
        if held < len(beginning) <= self.cache.max_cache_len:
            prefill(self.model, row, [self._known(beginning[held:])], [held])
            self._fed[seat], self._drafts[seat] = len(beginning), 0

    def propose(self, texts: dict[int, list[int]], counts: list[int], sampling: Sampling, seen: Tensor | None) -> Draft:
        # A text that outgrows the draft's positions goes on without drafts.
        most, room = self.cache.max_step - 1, self.cache.max_cache_len + 1
        counts = [
            max(0, min(count, most, room - len(text))) for text, count in zip(texts.values(), counts, strict=True)
        ]
        device, k = self.cache.device, max(counts)
        if k == 0:
            return no_draft(len(texts), device)
        part = self.cache.first_rows(max(texts) + 1)
        # Per row: the newest two tokens, k + 1 places where tokens are fed, and k for which they are chosen.
        table = [[0] * 2 + [-1] * (k + 1) + [0] * k for _ in range(part.batch_size)]
        for (seat, text), count in zip(texts.items(), counts, strict=True):
            if count:
                # What the cache holds of a text is right up to where the last drafts were rejected; if all were
                # accepted, the last of them was never fed. Either way the rest of the text is fed now, which ends what
                # stood there. If the text has gone on without drafts, nobody knows which of them it took: none then.
                end, held = len(text), self._fed.get(seat, 0)
                held = min(held, end - 1) if end <= held + 2 else held - self._drafts.get(seat, 0)
                if held < end - 2:
                    prefill(self.model, self.cache.rows(seat, seat + 1), [self._known(text[held : end - 2])], [held])
                    held = end - 2
                newest, places = self._known(text[held:]), [*range(held, end + count - 1)]  # the last is never fed
                row = [0] * (2 - len(newest)) + newest, [-1] * (2 - len(newest)) + places + [-1] * (k - count)
                table[seat] = [*row[0], *row[1], *range(end, end + k)]
                self._fed[seat], self._drafts[seat] = end + count - 1, count - 1
        ids, position, place = upload(table, device).split((2, k + 1, k), dim=1)  # [n, 2], [n, k + 1], [n, k]
        index = upload([*texts], device)  # [R]
        size = min(self.vocab_size, self.model.config.vocab_size)
        rows = sampling.of_rows(index, part.batch_size)
        if seen is not None:
            seen = seen.new_zeros(part.batch_size, size).index_copy(0, index, seen[:, :size])  # [n, size]
        tokens, probs = self.model.ahead(ids, position, place, part, rows, DRAFT_STREAM, size, False, seen)
        proposed = self.ranks.of_first(tokens.t().index_select(0, index))  # [R, k]
        if probs is not None:  # where greedy the target compares tokens and asks for no distribution
            probs = probs.transpose(0, 1)  # [n, k, W]
            probs = probs if len(index) == len(probs) else probs.index_select(0, index)  # [R, k, W], a copy if need be
        return Draft(proposed, probs, counts, upload(counts, device))

    def _known(self, ids: Sequence[int]) -> list[int]:
        """The ids as the draft can read them: one beyond its embedding becomes 0, which costs acceptance only."""
        return [token if token < self.model.config.vocab_size else 0 for token in ids]
