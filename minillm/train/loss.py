"""The loss of packed rows, its gradient, and bits per byte.

The logits are the largest tensor of a step (8,192 tokens of a vocabulary of 262,144: 8.6 GB in float32), so only
positions that are scored reach the head, some at a time. Backward runs from the loss of one such piece to the last
hidden state and throws the piece away; when all are through, their gradients go down the blocks at once. Nothing is
computed twice.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minillm.faster.compiled import compiler_errors
from minillm.model import Decoder
from minillm.progress import progress_bar
from minillm.train.attention import Packed
from minillm.train.documents import Documents
from minillm.train.packing import Batch, cut, fill, pack

_PIECE_LOGITS = 2**22  # float32 logits held at a time, some 16 MB (and their gradient)


@dataclass(frozen=True)
class Objective:
    """What is learned at a position: `loss(logits [P, V] float32, targets [P, ...])` in nats `[P]`."""

    targets: Callable[[Batch], Tensor]  # one for each of a batch's positions, [R * T, ...]
    loss: Callable[[Tensor, Tensor], Tensor]


NEXT_TOKEN = Objective(lambda batch: batch.labels.flatten(), partial(F.cross_entropy, reduction="none"))


def _compiled(function: Callable) -> Callable:
    """The function as one graph. Raises `BackendError` where the compiler fails."""
    graph = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*arguments):
        with compiler_errors("do not compile"):
            return graph(*arguments)

    return call


class ScoredLoss:
    """The loss of one decoder on batches of rows of `length` tokens.

    Args:
        model: built with `attention=PACKED`, in training mode, its weights float32.
        length: tokens of a row.
        bfloat16: compute matrix products in bfloat16 (autocast); the weights stay float32.
        recompute: keep of each block only what goes in, and compute the block again on the way back (Chen et al. 2016,
            "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174): a third more time, a fraction of the
            memory.
        compile: through `torch.compile`; one graph for the blocks and one for the head, whatever the packing.
        objective: what is learned; by default to predict the next token.
    """

    def __init__(
        self,
        model: Decoder,
        length: int,
        bfloat16: bool = False,
        recompute: bool = False,
        compile: bool = False,
        objective: Objective = NEXT_TOKEN,
    ):
        self.model, self.objective, self.bfloat16 = model, objective, bfloat16
        self.device = model.embedding.weight.device
        self.packed = Packed(model.config, length, self.device)
        self.length, self.piece = length, max(64, _PIECE_LOGITS // model.config.vocab_size)
        if recompute:
            for block in model.blocks:
                once = type(block).forward.__get__(block)  # however often it is asked for
                block.forward = partial(checkpoint, once, use_reentrant=False)
        compiled = _compiled if compile else lambda function: function
        self._hidden, self._nats = compiled(self._walk), compiled(self._score)

    def _walk(self, input_ids: Tensor, position: Tensor) -> Tensor:
        with self.packed.writing(self.model, input_ids, position):
            x, rotary = self.model.embed(input_ids, position, self.packed)
            return self.model.walk(x, rotary, position, self.packed)  # [R, T, d]

    def _score(self, hidden: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        return (self.objective.loss(self.model.logits(hidden), targets) * weight).sum()

    def _autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def hidden(self, batch: Batch) -> Tensor:
        """The last hidden state of every position, `[R * T, d]`."""
        with self._autocast():
            return self._hidden(batch.ids, batch.position).flatten(0, 1)

    def backward(self, batch: Batch, scale: float) -> float:
        """Add the gradient of `scale` times the sum of the scored positions' losses to the weights' `grad`.

        Returns that sum, in nats. A mean over an optimizer step of several batches is right only with 1 / the scored
        positions of *all* of them as `scale`: a mean of means counts a token more where few are scored.
        """
        where, weight = self._scored(batch)
        if not len(where):
            return 0.0
        hidden = self.hidden(batch)
        found = hidden.detach()[where].requires_grad_()  # [P, d]
        total = self._sum(found, batch, where, weight, lambda nats: nats.backward(torch.full_like(nats, scale)))
        gradient = torch.zeros_like(hidden).index_add_(0, where, found.grad)  # what fills up a piece has none
        hidden.backward(gradient)
        return total

    @torch.no_grad()
    def total(self, batch: Batch) -> float:
        """The sum of the scored positions' losses, in nats."""
        where, weight = self._scored(batch)
        return self._sum(self.hidden(batch)[where], batch, where, weight)

    def _scored(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which positions `[P]` are scored, filled up to whole pieces, and how much each counts, 1 or 0."""
        where = batch.scored.flatten().nonzero()[:, 0]
        fill = -len(where) % self.piece
        weight = F.pad(torch.ones(len(where), device=self.device), (0, fill))
        return F.pad(where, (0, fill)), weight

    def _sum(self, hidden: Tensor, batch: Batch, where: Tensor, weight: Tensor, then=lambda nats: None) -> float:
        targets, nats = self.objective.targets(batch)[where], []
        pieces = (part.split(self.piece) for part in (hidden, targets, weight))
        for piece in zip(*pieces, strict=True):
            with self._autocast():
                nats.append(self._nats(*piece))
            then(nats[-1])
            nats[-1] = nats[-1].detach()
        return float(torch.stack(nats).double().sum()) if nats else 0.0

    def bits_per_byte(self, documents: Documents, rows: int = 8) -> float:
        """How well the model predicts documents: the bits of all scored tokens, divided by the bytes of the text.

        Documents longer than a row are cut into windows without overlap. `rows` are computed at a time.
        """
        packed = pack(cut(documents, self.length), self.length)
        packed += [[]] * (-len(packed) % rows)  # a compiled graph has one shape
        nats = 0.0
        with progress_bar(len(packed) // rows, "scoring", after=1.0) as advance:
            for n in range(0, len(packed), rows):
                nats += self.total(fill(documents, packed[n : n + rows], self.length).to(self.device))
                advance()
        return nats / math.log(2) / documents.text_bytes
