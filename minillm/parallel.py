"""Tensor parallel: a model on several devices, where a rank is a narrower model (Shoeybi et al. 2019, Megatron-LM,
arXiv:1909.08053).

Of R processes, the *ranks*, each holds H / R query heads with the key heads that these share, F / R of the MLP's hidden
channels, and V / R rows of the head; norms and the embedding are everybody's. So decoder and cache build themselves
from a narrower config, and each rank computes a share of what a layer adds to the stream. Two sums per layer, after
attention and after the MLP, make the stream whole on every rank, and the logits are gathered in the end:

    rank 0   x ─► qkv: heads 0, 1 ─► attend ─► output: columns of heads 0, 1 ─┐
                                                                              ├ sum ─► x on every rank
    rank 1   x ─► qkv: heads 2, 3 ─► attend ─► output: columns of heads 2, 3 ─┘

Who sums is `torch.distributed` under `torchrun`: NCCL on GPUs, gloo on a CPU. docs/parallel.md says when it pays.
"""

import atexit
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from minillm.attention import Backend, mean, norm
from minillm.config import ModelConfig
from minillm.errors import ConfigError, RankError, RequestError, first_line
from minillm.linear import Linear, parse_quantize

TIMEOUT = 50.0  # seconds that a rank waits for another within a request (between two it waits as long as need be)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a model: number `rank` of `count`.

    Not `joined`, it speaks with nobody and says only what such a rank would hold. Every method is called by all ranks
    or by none. Raises `RankError` where another rank has ended or does not answer.
    """

    rank: int = 0
    count: int = 1
    joined: bool = False
    waiting: Any = None  # the process group in which ranks wait for each other between requests

    def __deepcopy__(self, memo) -> "Ranks":
        return self

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' `x`, any shape, in its place. It has no gradient."""
        if self.joined:
            if x.requires_grad:
                raise RankError("a model that ranks share computes no gradients: call it under torch.no_grad()")
            self._talk(dist.all_reduce, x)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """The largest of all ranks' `x`, element by element, in its place."""
        if self.joined:
            self._talk(dist.all_reduce, x, op=dist.ReduceOp.MAX)
        return x

    def gather(self, logits: Tensor, vocab_size: int) -> Tensor:
        """All ranks' shares of the logits side by side, `[..., V]`. Each logit has one owner: all see the same bits."""
        if not self.joined:
            return logits
        mine = F.pad(logits, (0, -(-vocab_size // self.count) - logits.shape[-1]))  # [..., ceil(V / R)]
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        self._talk(dist.all_gather, parts, mine.contiguous())
        return torch.cat(parts, dim=-1)[..., :vocab_size].contiguous()  # [..., V]

    def of_first(self, x: Tensor) -> Tensor:
        """Rank 0's `x`: what is chosen is chosen once."""
        if self.joined:
            x = x.contiguous()
            self._talk(dist.broadcast, x, src=0)
        return x

    def agree(self, value: Any, asked: Any = None) -> Any:
        """Rank 0's `value`, any object that can be pickled; waits for it as long as need be.

        Raises `RequestError`, on every rank, where `asked` is not equal on all of them.
        """
        if not self.joined:
            return value
        said = [(value, asked)]
        self._talk(dist.broadcast_object_list, said, src=0, group=self.waiting)
        value, wanted = said[0]
        equal = torch.tensor([int(wanted == asked)])  # [1]
        self._talk(self._least, equal)
        if not equal:
            raise RequestError("the ranks were asked for different things: all make the same calls, in the same order")
        return value

    def meet(self) -> None:
        """Wait for all ranks, as long as need be."""
        if self.joined:
            self._talk(dist.barrier, group=self.waiting)

    def across(self, backend: Backend) -> Backend:
        """The backend with a norm over what all ranks hold of a vector, equal shares of it."""
        return replace(backend, norm=partial(norm, mean=self._mean)) if self.joined else backend

    def _mean(self, x: Tensor) -> Tensor:
        """The mean over the last dimension of all ranks' `x` together, `[..., 1]`: of equal shares."""
        return self.sum(mean(x)) / self.count

    def _least(self, x: Tensor) -> None:
        """The least of all ranks' `x`, on the CPU whatever the device of the model, and not waiting for long."""
        work = dist.all_reduce(x, op=dist.ReduceOp.MIN, group=self.waiting, async_op=True)
        work.wait(timedelta(seconds=TIMEOUT))

    def _talk(self, collective: Callable, *arguments, **options) -> None:
        if torch.compiler.is_compiling():  # becomes a functional collective of the graph
            collective(*arguments, **options)
            return
        try:
            collective(*arguments, **options)
        except (RuntimeError, ValueError) as error:  # ValueError: the program has ended the process group
            raise RankError(f"rank {self.rank} of {self.count} has lost another one: {_reason(error)}") from error


ALONE = Ranks()
# Of each default process group the one in which its ranks wait: a group has threads and sockets of its own.
_WAITING: WeakKeyDictionary = WeakKeyDictionary()


def join(device: torch.device) -> Ranks:
    """Meet the other processes that `torchrun` started; a default process group that there is already is used.

    Raises `RankError` where nobody started any, or they do not find each other.
    """
    if not dist.is_initialized() and not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        raise RankError(
            "tensor_parallel=True needs a process for each share of the model: start the script with "
            "`torchrun --nproc-per-node N`, or the command line with --ranks N"
        )
    try:
        if not dist.is_initialized():
            options = dict(device_id=device) if device.type == "cuda" else {}
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT), **options)
            atexit.register(leave)
        world = dist.group.WORLD
        if world not in _WAITING:
            _WAITING[world] = dist.new_group(backend="gloo", timeout=timedelta(days=365))
    except (RuntimeError, ValueError) as error:
        raise RankError(f"the ranks do not find each other: {_reason(error)}") from error
    return Ranks(dist.get_rank(), dist.get_world_size(), True, _WAITING[world])


def _reason(error: Exception) -> str:
    """The first sentence of an error of PyTorch's, without the files and lines of C++ in it."""
    return re.sub(r"\[\S+:\d+\] ", "", first_line(error)).partition(". ")[0]


def leave() -> None:
    """End the process group, whose threads would not survive the end of Python."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_device(device: str | torch.device) -> str | torch.device:
    """A GPU of this rank's own, where the caller names none by number."""
    if str(device) == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def narrow(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """The config of a rank's share. Raises `ConfigError` for a number of ranks that does not divide the model."""
    if ranks.count == 1:
        return config
    if problem := _misfit(config, ranks.count):
        fitting = ", ".join(str(n) for n in range(1, config.num_heads + 1) if not _misfit(config, n))
        raise ConfigError(f"the model cannot be split over {ranks.count} ranks: {problem}; it can over {fitting}")
    count = config.num_heads // ranks.count
    return replace(
        config,
        num_heads=count,
        num_kv_heads=max(1, config.num_kv_heads // ranks.count),
        intermediate_size=config.intermediate_size // ranks.count,
        alibi_slopes=config.alibi_slopes[ranks.rank * count : (ranks.rank + 1) * count],
    )


def _misfit(config: ModelConfig, count: int) -> str | None:
    """Why a model cannot be split over so many ranks."""
    for name in ("num_heads", "intermediate_size"):
        if getattr(config, name) % count:
            return f"{name} {getattr(config, name)} is not a multiple of {count}"
    if config.num_kv_heads % count and count % config.num_kv_heads:
        return f"of num_kv_heads {config.num_kv_heads} and {count} neither divides the other"
    if (count - 1) * -(-config.vocab_size // count) >= config.vocab_size:
        return f"vocab_size {config.vocab_size} leaves nothing for the last one"
    stored = parse_quantize(config.quantization)
    for inputs in (config.num_heads * config.head_dim, config.intermediate_size):
        if stored is not None and stored.group_size and inputs // count % stored.group_size:
            return f"the file's groups of {stored.group_size} do not divide a share of {inputs} inputs"
    return None


def vocabulary(config: ModelConfig, ranks: Ranks) -> range:
    """The ids whose logits a rank computes: equal parts, the last one shorter where the vocabulary is odd."""
    size = -(-config.vocab_size // ranks.count)
    return range(ranks.rank * size, min((ranks.rank + 1) * size, config.vocab_size))


class TiedRows(Linear):
    """A rank's part of a head that reads the embedding: some of its rows, wherever they lie."""

    def __init__(self, embedding: nn.Embedding, rows: range, bias: nn.Parameter | None):
        nn.Module.__init__(self)
        self.embedding, self.rows, self.bias = embedding, rows, bias

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight[self.rows.start : self.rows.stop]  # [V / R, d]
