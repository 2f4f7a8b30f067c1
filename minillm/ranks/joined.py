"""Ranks that talk: `torch.distributed` under `torchrun`, NCCL on GPUs, gloo on a CPU. docs/parallel.md says when it
pays."""

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
from torch import Tensor

from minillm.attention import Backend, mean, norm
from minillm.errors import RankError, RequestError, first_line
from minillm.ranks.split import Split

TIMEOUT = 50.0  # seconds that a rank waits for another within a request (between two it waits as long as need be)


@dataclass(frozen=True)
class Joined(Split):
    """A rank that speaks with the others. Raises `RankError` where another one has ended or does not answer."""

    waiting: Any = None  # the process group in which ranks wait for each other between requests
    joined = True

    def sum(self, x: Tensor) -> Tensor:
        """It has no gradient."""
        if x.requires_grad:
            raise RankError("a model that ranks share computes no gradients: call it under torch.no_grad()")
        self._talk(dist.all_reduce, x)
        return x

    def largest(self, x: Tensor) -> Tensor:
        self._talk(dist.all_reduce, x, op=dist.ReduceOp.MAX)
        return x

    def gather(self, logits: Tensor, vocab_size: int) -> Tensor:
        """Each logit has one owner: all see the same bits."""
        mine = F.pad(logits, (0, -(-vocab_size // self.count) - logits.shape[-1]))  # [..., ceil(V / R)]
        parts = [torch.empty_like(mine) for _ in range(self.count)]
        self._talk(dist.all_gather, parts, mine.contiguous())
        return torch.cat(parts, dim=-1)[..., :vocab_size].contiguous()  # [..., V]

    def of_first(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._talk(dist.broadcast, x, src=0)
        return x

    def agree(self, value: Any, asked: Any = None) -> Any:
        """Waits for it as long as need be. Raises `RequestError`, on every rank, where `asked` is not equal."""
        said = [(value, asked)]
        self._talk(dist.broadcast_object_list, said, src=0, group=self.waiting)
        value, wanted = said[0]
        equal = torch.tensor([int(wanted == asked)])  # [1]
        self._talk(self._least, equal)
        if not equal:
            raise RequestError("the ranks were asked for different things: all make the same calls, in the same order")
        return value

    def meet(self) -> None:
        self._talk(dist.barrier, group=self.waiting)

    def across(self, backend: Backend) -> Backend:
        """Of equal shares."""
        return replace(backend, norm=partial(norm, mean=self._mean))

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


# Of each default process group the one in which its ranks wait: a group has threads and sockets of its own.
_WAITING: WeakKeyDictionary = WeakKeyDictionary()


def join(device: torch.device) -> Joined:
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
    return Joined(dist.get_rank(), dist.get_world_size(), _WAITING[world])


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
