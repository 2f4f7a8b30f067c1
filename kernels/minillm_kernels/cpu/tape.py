"""A pass of a model as a list of C calls that can be made again without Python.

A decode step makes some eight calls per layer, and each costs Python about ten microseconds: checks, an empty
tensor, a struct of arguments. Of a small model's step that is most. But the calls of a step are always the same,
and so are the addresses they work on; only the values there change. So they are written down once, and from then
on the whole step is one call, whose loop over the list is in C. CUDA graphs are this idea on a GPU.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minillm_kernels.cpu.call import Call


class NotRecordable(RuntimeError):
    """The pass computes something outside the C kernels that has no twin there: a replay would leave it out."""


class _Thread(threading.local):
    tape: "Tape | None" = None  # what this thread records on


_thread = _Thread()


class Tape:
    """The C calls that one pass made while `recording`, to be made again with `replay`.

    Whatever the pass read and wrote stays alive with the tape and at its address: put new values into the tensors
    that went in, replay, read the tensors that came out.
    """

    def __init__(self, library: ctypes.CDLL, pack: Callable[[int, int], bytes], twins: Mapping[Callable, Callable]):
        self._library, self._pack = library, pack  # threads.c, and an entry of the list that `minillm_replay` takes
        self._twins = twins  # of PyTorch's operators, see `glue.py`
        self._calls: list[tuple[int, bytes]] = []  # address of the function, its packed arguments
        self._kept: list = []
        self._list = b""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note the calls that this thread makes, and the twins of what PyTorch computes in between; raises
        NotRecordable where that has none."""
        _thread.tape = self
        try:
            with _OnlyShapes():
                yield
        finally:
            _thread.tape = None
        arguments = [ctypes.create_string_buffer(packed, len(packed)) for _, packed in self._calls]
        self._list = b"".join(
            self._pack(function, ctypes.addressof(buffer))
            for (function, _), buffer in zip(self._calls, arguments, strict=True)
        )
        self._kept += arguments

    def add(self, call: Call, packed: bytes, tensors: tuple[Tensor | None, ...]) -> None:
        self._calls.append((_address(self._library, call.symbol), packed))
        # The memory, not the tensors: `parameter.data = other` leaves a tensor without the memory that was recorded.
        self._kept += [tensor.untyped_storage() for tensor in tensors if tensor is not None]

    def extend(self, other: "Tape") -> None:
        """Note all calls of another tape, which is not replayed by that."""
        self._calls += other._calls
        self._kept.append(other)

    def add_twin(self, operator: Callable, result: object, arguments: tuple, keywords: dict) -> bool:
        """Note the twin of what PyTorch has just computed; False where it has none."""
        twin = self._twins.get(operator)
        noted = twin(result, *arguments, **keywords) if twin is not None else None
        if noted is not None:
            self.add(*noted)
        return noted is not None

    def replay(self) -> None:
        """Make the calls again, in their order, on what now stands at their addresses."""
        if self._library.minillm_replay(self._list, len(self._calls)):
            raise MemoryError("no memory for a step's activations")


@functools.cache
def _address(library: ctypes.CDLL, symbol: str) -> int:
    return ctypes.cast(getattr(library, symbol), ctypes.c_void_p).value


@functools.cache
def _writes(operator: Callable) -> bool:
    """Whether an operator of PyTorch writes into one of its arguments."""
    return any(value.alias_info and value.alias_info.is_write for value in operator._schema.arguments)


class _OnlyShapes(TorchDispatchMode):
    """Lets tensors be made and looked at differently; of whatever computes or copies the twin is noted, or it is
    refused."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: PyTorch would guard the method below against its compiler, and import it for that (2 s, 140 MB)."""
        return False

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if _thread.tape is None:  # an interrupt has left this mode behind: it must stand in nobody's way
            return result
        if function is torch.ops.aten.empty.memory_format:
            return result
        # By the memory and not by the operator's name: `reshape` and `contiguous` copy only where they must.
        known = {tensor.untyped_storage().data_ptr() for tensor in arguments if isinstance(tensor, Tensor)}
        results = result if isinstance(result, list | tuple) else [result]
        looks = all(isinstance(view, Tensor) and view.untyped_storage().data_ptr() in known for view in results)
        if (not looks or _writes(function)) and not _thread.tape.add_twin(function, result, arguments, keywords or {}):
            raise NotRecordable(f"{function} is computed by PyTorch")
        return result


def note(call: Call, packed: bytes, tensors: tuple[Tensor | None, ...]) -> None:
    """Write a call on the tape that this thread records on, if it does."""
    if _thread.tape is not None:
        _thread.tape.add(call, packed, tensors)
