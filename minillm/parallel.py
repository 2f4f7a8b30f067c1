"""Tensor parallel: a model on several devices, where a rank is a narrower model (Shoeybi et al. 2019, Megatron-LM,
arXiv:1909.08053).

Of R processes, the *ranks*, each holds H / R query heads with the key heads that these share, F / R of the MLP's hidden
channels, and V / R rows of the head; norms and the embedding are everybody's. So decoder and cache build themselves
from a narrower config, and each rank computes a share of what a layer adds to the stream. Two sums per layer, after
attention and after the MLP, make the stream whole on every rank, and the logits are gathered in the end:

    rank 0   x ─► qkv: heads 0, 1 ─► attend ─► output: columns of heads 0, 1 ─┐
                                                                              ├ sum ─► x on every rank
    rank 1   x ─► qkv: heads 2, 3 ─► attend ─► output: columns of heads 2, 3 ─┘

Here stands what decoder and loop ask of the ranks, with the answers of one process that has the whole model: as it is.
The answers of several are in the wing `ranks/`.
"""

from typing import Any

from torch import Tensor, nn

from minillm.attention import Backend
from minillm.config import ModelConfig


class Ranks:
    """The processes that share a model, of which this is number `rank` of `count`. Where they are `joined`, every
    method is called by all of them or by none."""

    rank, count, joined = 0, 1, False

    @property
    def first(self) -> bool:
        return self.rank == 0

    def narrow(self, config: ModelConfig) -> ModelConfig:
        """The config of this rank's share."""
        return config

    def vocabulary(self, config: ModelConfig) -> range:
        """The ids whose logits this rank computes."""
        return range(config.vocab_size)

    def tie(self, head: nn.Module, embedding: nn.Embedding) -> nn.Module:
        """The head, reading the embedding's matrix."""
        head.weight = embedding.weight
        return head

    def across(self, backend: Backend) -> Backend:
        """The backend with a norm over what all ranks hold of a vector."""
        return backend

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, any shape, in its place."""
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The largest of all ranks' `x`, element by element, in its place."""
        return x

    def gather(self, logits: Tensor, vocab_size: int) -> Tensor:
        """All ranks' shares of the logits side by side, `[..., V]`."""
        return logits

    def of_first(self, x: Tensor) -> Tensor:
        """Rank 0's `x`: what is chosen is chosen once."""
        return x

    def agree(self, value: Any, asked: Any = None) -> Any:
        """Rank 0's `value`, any object that can be pickled; an error on all where `asked` is not equal on all."""
        return value

    def meet(self) -> None:
        """Wait for all ranks, as long as need be."""


ALONE = Ranks()
