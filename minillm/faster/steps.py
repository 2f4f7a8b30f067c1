"""The steps of decoding, run again and again for less than Python asks.

A decode step of a small model is calls more than arithmetic: at batch one, twelve layers cost a millisecond of
Python before any weight is read. But a step of a given shape is the same work every time, at the same addresses;
only token and position differ, and those are data. `compile=` says what is made of that:

* "auto": the first step of a shape runs as it is written and is *recorded*, all later ones are replayed. On a CPU
  the record is the list of C calls (`minillm_kernels/cpu/tape.py`), on a GPU a CUDA graph. Nothing waits for a
  compiler, no value of anything asks for a second recording, and what is computed is the same to the last bit.
* True: `torch.compile`, one full graph with every size but the weights' left open, so that no length of prompt,
  text or cache compiles anything twice. On a GPU the compiled step is captured as well.
* False: the decoder as it is written.

Few shapes are needed, because positions are data: a chunk of prompt (any length), one token per row, and the
k + 1 tokens of a verify step.
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from weakref import WeakKeyDictionary

import torch
from minillm_kernels import cpu
from minillm_kernels.cpu import FEW_ROWS
from minillm_kernels.cpu.tape import NotRecordable, Tape
from torch import Tensor

from minillm.cache import StaticCache
from minillm.errors import BackendError, first_line
from minillm.faster.compiled import CompiledWalk
from minillm.model import Decoder


class Steps:
    """A decoder that is called like `Decoder`, and runs its short steps the fast way.

    Args:
        model: the decoder. Where its weights move, steps are recorded anew.
        compile: "auto", True or False, see above.

    Raises `BackendError` for another value of `compile`.
    """

    def __init__(self, model: Decoder, compile: bool | str = "auto"):
        check_compile(compile)
        self.model, self.config, self.embedding, self.compile = model, model.config, model.embedding, compile
        self.ranks = model.ranks
        self.compiled = CompiledWalk(model) if compile is True else None
        self.embed, self.logits, self.own_dtypes = model.embed, model.logits, model.own_dtypes
        self.walk: Callable[..., Tensor] = self.compiled or model.walk
        device = model.embedding.weight.device.type
        self._make: Callable | None = None  # records a step, where steps can be recorded
        if device == "cuda" and compile is not False:
            self._make = CapturedStep
        elif device == "cpu" and compile == "auto" and model.backend.name == "kernels" and cpu.available():
            self._make = None if model.ranks.joined else RecordedStep  # a list of C calls waits for no other process
        # Per cache and (rows, tokens): the recorded step, or None where it cannot be recorded. A cache that is
        # dropped takes its steps along.
        self._recorded: WeakKeyDictionary[StaticCache, dict] = WeakKeyDictionary()
        self._weights: tuple = (False,)  # where and which they were when the steps were recorded
        self._moves = model.moves

    def __deepcopy__(self, memo) -> "Steps":
        """A copy of the model records its own steps: those of this one read this one's addresses."""
        return Steps(copy.deepcopy(self.model, memo), self.compile)

    @property
    def kind(self) -> str:
        """How steps run: "recorded", "compiled" or "eager"."""
        return "compiled" if self.compiled is not None else "eager" if self._make is None else "recorded"

    @property
    def weight_bytes(self) -> int:
        return self.model.weight_bytes

    def __call__(self, input_ids: Tensor, cache_position: Tensor, cache: StaticCache) -> Tensor:
        """Logits `[B, T, V]` float32; arguments as for `Decoder.forward`."""
        # Not within another one: where an interrupt strikes, the inner would leave the mode to the caller.
        inference = nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode()
        # When the request, or a loop of one's own, began.
        looked = (cache.hold.in_turn or cache.hold.stepped_by is self) and self._moves == self.model.moves
        with inference, self.own_dtypes(), cache.writing(self, input_ids, cache_position):
            if self._make is not None and input_ids.shape[1] <= FEW_ROWS:
                if not looked:
                    self.fingerprint()
                cache.hold.stepped_by = self
                steps, shape = self._recorded.setdefault(cache, {}), tuple(input_ids.shape)
                if shape not in steps:
                    steps[shape] = None if self._weights[-1] else self._make(self)  # a replay calls no hook
                if steps[shape] is not None:
                    try:
                        return steps[shape](input_ids, cache_position, cache)
                    except NotRecordable:  # where PyTorch computes something itself
                        steps[shape] = None
            x, rotary = self.embed(input_ids, cache_position, cache)
            return self.logits(self.walk(x, rotary, cache_position, cache))

    def fingerprint(self) -> tuple:
        """As `Decoder.fingerprint`. What was recorded with other weights, or without hooks, is dropped: a replay reads
        addresses and calls nobody."""
        weights = self.model.fingerprint()
        if weights != self._weights:
            self._recorded.clear()
            self._weights = weights
        self._moves = self.model.moves
        return weights


def check_compile(compile: bool | str) -> None:
    """Raise `BackendError` for anything but "auto", True and False."""
    if type(compile) is not bool and not (isinstance(compile, str) and compile == "auto"):
        raise BackendError(f"compile={compile!r} is not one of True, False, 'auto'")


class RecordedStep:
    """A step on the CPU as the list of its C calls: the first call writes the list, the others work through it."""

    def __init__(self, steps: Steps):
        self.model = steps.model
        self.tape: Tape | None = None

    def __call__(self, input_ids: Tensor, cache_position: Tensor, cache: StaticCache) -> Tensor:
        x, rotary = self.model.embed(input_ids, cache_position, cache)
        if self.tape is None:
            # Where the calls read from now on.
            self.x, self.rotary, self.position = x, rotary, cache_position.clone()
            tape = cpu.blank_tape()
            with tape.recording():
                # No kernel asks how far to read: each looks at the positions.
                self.out = self.model.head(self.model.walk(x, rotary, self.position, cache, bound=1))
            self.tape = tape
        else:
            self.x.copy_(x)
            self.position.copy_(cache_position)
            for kept, new in zip(self.rotary, rotary, strict=True):
                kept[0].copy_(new[0])
                kept[1].copy_(new[1])
            self.tape.replay()
        # A copy, even of float32: the next step overwrites what this one returned.
        return self.model.finish(self.out.to(torch.float32, copy=True))  # [B, T, V]


class CapturedStep:
    """A step on a GPU as a CUDA graph: one launch for all kernels, which read token and position where they lie.

    Where it cannot be captured (no memory for the graph, say) a warning says why, once, and `NotRecordable` is raised:
    the step runs as it is written.
    """

    def __init__(self, steps: Steps):
        self.steps = steps
        # What the graph reads stays where it is, whoever gives a parameter new memory.
        self.weights = [tensor.detach() for tensor in (*steps.model.parameters(), *steps.model.buffers())]
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, input_ids: Tensor, cache_position: Tensor, cache: StaticCache) -> Tensor:
        # Streams and graphs belong to the current device, which need not be the model's.
        with torch.cuda.device(input_ids.device):
            if self.graph is None:
                try:
                    self._capture(input_ids, cache_position, cache)
                except RuntimeError as error:
                    reason = f"a step of {list(input_ids.shape)} tokens cannot be captured: {first_line(error)}"
                    warnings.warn(f"{reason}; it runs as it is written", stacklevel=2)
                    raise NotRecordable(reason) from error
            self.input_ids.copy_(input_ids)
            self.position.copy_(cache_position)
            self.graph.replay()
            return self.out.clone()

    def _capture(self, input_ids: Tensor, cache_position: Tensor, cache: StaticCache) -> None:
        self.input_ids, self.position = input_ids.clone(), cache_position.clone()  # [B, T] each

        def step() -> Tensor:
            x, rotary = self.steps.embed(self.input_ids, self.position, cache)
            return self.steps.logits(self.steps.walk(x, rotary, self.position, cache))  # [B, T, V]

        # Once before capturing, on a stream of its own: kernels are compiled and libraries wake up. A step may
        # run twice: it writes the same keys to the same slots.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The thread that watches over NCCL's collectives asks the device about them all the while.
        errors = "thread_local" if self.steps.ranks.joined else "global"
        with torch.cuda.graph(graph, capture_error_mode=errors):
            self.out = step()
        self.graph = graph
