"""Packing: documents of any length side by side in rows of exactly T tokens, none of them padded to another's length.

A batch padded to its longest document computes mostly padding when lengths differ (documents of 20 to 2,000 tokens:
half of it or more). Here a row is filled with whole documents, and the position of each starts again at 0. That is
all attention needs to know: a token sees those before it as far back as the last position 0 (Krell et al. 2021,
"Efficient Sequence Packing without Cross-contamination", arXiv:2107.02027).

A document of n ids is n - 1 inputs, each with the id after it as its label. One that is longer than a row is cut; what
no document fills is one more document, of which nothing is scored.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from minillm.errors import RequestError
from minillm.train.documents import Documents


@dataclass(frozen=True)
class Batch:
    """R rows of T tokens. Every tensor is `[R, T]`."""

    ids: Tensor  # int64
    position: Tensor  # int64: 0 where a document begins
    labels: Tensor  # int64: the id that follows
    scored: Tensor  # bool: whether the loss counts it

    def rows(self, start: int, stop: int) -> "Batch":
        return Batch(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))


Piece = tuple[int, int]  # [start, stop): inputs, by their place in `Documents.ids`


def cut(documents: Documents, length: int, generator: torch.Generator | None = None) -> list[Piece]:
    """Pieces of at most `length` inputs that cover every document once; of a long one the first is shorter by chance,
    so that no two epochs cut it in the same places, unless there is no generator."""
    pieces, begin = [], 0
    for end in documents.ends.tolist():
        first, last = begin, end - 1  # the last id is a label only
        if generator is not None and last - first > length:
            first -= int(torch.randint(length, (1,), generator=generator))
        pieces += [(max(start, begin), min(start + length, last)) for start in range(first, last, length)]
        begin = end
    return pieces


def pack(pieces: list[Piece], length: int) -> list[list[Piece]]:
    """Which pieces share a row: each, the longest first, goes into the fullest row that it still fits (best fit)."""
    rows, room = [], []  # room: (inputs that still fit, row), ascending
    for piece in sorted(pieces, key=lambda piece: piece[0] - piece[1]):
        size = piece[1] - piece[0]
        place = bisect_left(room, (size, 0))
        if place == len(room):
            space, row = length, len(rows)
            rows.append([])
        else:
            space, row = room.pop(place)
        rows[row].append(piece)
        if space > size:
            insort(room, (space - size, row))
    return rows


def fill(documents: Documents, rows: list[list[Piece]], length: int) -> Batch:
    """Lay pieces into rows `[R, length]`."""
    shape = (len(rows), length)
    ids, labels = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    position, scored = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for row, pieces in enumerate(rows):
        at = 0
        for start, stop in pieces:
            to = at + stop - start
            ids[row, at:to] = documents.ids[start:stop]
            labels[row, at:to] = documents.ids[start + 1 : stop + 1]
            scored[row, at:to] = documents.scored[start + 1 : stop + 1]
            position[row, at:to] = torch.arange(stop - start)
            at = to
        position[row, at:] = torch.arange(length - at)
    return Batch(ids, position, labels, scored)


class Rows:
    """The rows of one epoch after another, each epoch cut and shuffled anew; where it stands is two numbers."""

    def __init__(self, documents: Documents, length: int, seed: int):
        self.documents, self.length, self.seed = documents, length, seed
        self.start(0, 0)

    def start(self, epoch: int, cursor: int) -> None:
        """Go to row `cursor` of an epoch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)  # an epoch's rows depend on no other
        pieces = cut(self.documents, self.length, generator)
        pieces = [pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()]
        rows = pack(pieces, self.length)
        self.order = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        self.epoch, self.cursor = epoch, cursor

    def next(self, count: int) -> Batch:
        """The next `count` rows, the last of an epoch beside the first of the one that follows."""
        rows: list[list[Piece]] = []
        while len(rows) < count:
            if self.cursor == len(self.order):
                self.start(self.epoch + 1, 0)
            taken = self.order[self.cursor : self.cursor + count - len(rows)]
            self.cursor += len(taken)
            rows += taken
        return fill(self.documents, rows, self.length)


def check_ids(documents: Documents, vocab_size: int) -> None:
    """Raise `RequestError` for ids that a model with so many does not have."""
    smallest, largest = (int(end) for end in documents.ids.aminmax())
    if smallest < 0 or largest >= vocab_size:
        raise RequestError(
            f"the documents hold token ids from {smallest} to {largest}, the model has 0 to {vocab_size - 1}: "
            "they were made with another tokenizer"
        )
