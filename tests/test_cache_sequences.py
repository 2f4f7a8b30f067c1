"""Five hundred short histories of a cache, against a plain list of what it must hold."""

import random

import pytest
import torch
from test_soundness import assert_truthful

from minillm import StaticCache
from minillm.errors import CacheError

ROWS, LENGTH, STEP = 2, 40, 6


class Halt(BaseException):
    """What a caller throws into a pass; not an Exception, like KeyboardInterrupt."""


class History:
    """A cache, the model that fills it, and for each row the ids that must count."""

    def __init__(self, model, seed):
        self.random, self.model = random.Random(seed), model
        self.cache = StaticCache(model.config, ROWS, LENGTH, max_step=STEP)
        self.held = [[] for _ in range(ROWS)]
        self.told = []

    def tokens(self, count):
        return [self.random.randrange(3, self.model.config.vocab_size) for _ in range(count)]

    def feed(self, chunks, starts, model=None):
        width = max(map(len, chunks))
        ids = [chunk + [0] * (width - len(chunk)) for chunk in chunks]
        places = [
            [*range(start, start + len(chunk)), *[-1] * (width - len(chunk))]
            for chunk, start in zip(chunks, starts, strict=True)
        ]
        (model or self.model)(torch.tensor(ids), torch.tensor(places), self.cache)

    def sizes(self):
        sizes = [self.random.randint(0, min(STEP, LENGTH - len(row))) for row in self.held]
        return sizes if any(sizes) else None

    # ---- the operations; each does to `held` what it must do to the cache ----

    def append(self):
        if sizes := self.sizes():
            chunks = [self.tokens(size) for size in sizes]
            self.feed(chunks, [len(row) for row in self.held])
            self.held = [row + chunk for row, chunk in zip(self.held, chunks, strict=True)]

    def interrupt(self):
        """A pass that ends in the middle of some block: what was held is still held, nothing new is."""
        if sizes := self.sizes():
            block = self.random.choice(list(self.model.blocks))
            hook = block.mlp.register_forward_pre_hook(halt)
            try:
                with pytest.raises(Halt):
                    self.feed([self.tokens(size) for size in sizes], [len(row) for row in self.held])
            finally:
                hook.remove()

    def truncate(self):
        lengths = [self.random.randint(0, len(row)) for row in self.held]
        try:
            self.cache.truncate(lengths)
        except CacheError as error:  # a ring has moved on: refused, and nothing changed
            assert "overwritten" in str(error)
            return
        self.held = [row[:length] for row, length in zip(self.held, lengths, strict=True)]

    def rewrite(self):
        """Written anew without a cut: what followed counts no more."""
        row = self.random.randrange(ROWS)
        place = len(self.held[row]) - self.random.randint(1, 3)
        if place >= 0:
            chunks, starts = [[]] * ROWS, [0] * ROWS
            chunks[row], starts[row] = self.tokens(1), place
            if not self.cache.can_truncate(row, place):
                with pytest.raises(CacheError, match="overwritten"):
                    self.feed(chunks, starts)
                return
            self.feed(chunks, starts)
            self.held[row] = [*self.held[row][:place], *chunks[row]]

    def beyond_a_gap(self):
        row = self.random.randrange(ROWS)
        chunks, starts = [[]] * ROWS, [0] * ROWS
        chunks[row], starts[row] = self.tokens(1), len(self.held[row]) + self.random.randint(1, 3)
        with pytest.raises(CacheError, match=r"gap|beyond"):
            self.feed(chunks, starts)

    def reset(self):
        self.cache.reset()
        self.held = [[] for _ in range(ROWS)]

    def misuse(self):
        """Refused, whatever it is, and nothing changed."""
        ids, places = torch.tensor([[5], [6]]), torch.tensor([[len(row)] for row in self.held])
        wrong = self.random.choice(
            [
                lambda: self.model(ids.int(), places, self.cache),
                lambda: self.model(ids, places + LENGTH, self.cache),
                lambda: self.model(ids - 7, places.clamp(max=LENGTH - 1), self.cache),
                lambda: self.model(ids[:1], places[:1], self.cache),
                lambda: self.cache.truncate([len(row) + 1 for row in self.held]),
                lambda: self.cache.truncate(-1),
            ]
        )
        with pytest.raises(CacheError):
            wrong()

    def held_by_another(self):
        with self.cache.held_by("somebody"), pytest.raises(CacheError, match="somebody"):
            self.feed([[5], [6]], [0, 0])

    def check(self):
        assert self.cache.token_ids == self.held, self.told
        assert self.cache.lengths == [len(row) for row in self.held]


def halt(*arguments):
    raise Halt


OPERATIONS = """
    append append append append interrupt interrupt truncate rewrite beyond_a_gap reset misuse held_by_another
""".split()


@pytest.mark.parametrize("name", ["llama3", "mistral-v0.1", "gemma3", "gemma2"])
def test_histories(name, ours):
    model = ours(name)
    with torch.inference_mode():
        for seed in range(125):
            history = History(model, seed)
            for _ in range(10):
                operation = history.random.choice(OPERATIONS)
                history.told.append(operation)
                getattr(history, operation)()
                history.check()
            assert_truthful(history.cache, model)
