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

Few shapes are needed, because positions are data: a chunk of prompt (any length), one token per row, the k + 1 tokens
of a verify step, and the two with which a draft begins.

A step and the choice of its token are one call, and so are several in which nobody has a say, k tokens of a draft or a
few of a small model: a recorded step is a list, and so are k of them with copies in between (`Steps.ahead`).
"""

import copy
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial

import torch
import torch.nn.functional as F
from minillm_kernels import cpu
from minillm_kernels.cpu import FEW_ROWS
from minillm_kernels.cpu.tape import NotRecordable, Tape
from torch import Tensor

from minillm.cache import StaticCache
from minillm.errors import BackendError, first_line
from minillm.faster.compiled import CompiledWalk
from minillm.model import Decoder
from minillm.sampling import Sampling, choose

# A token of each row, `[B]`, and what was asked for beside it, `[B, V]`: the logits, or the distribution that it was
# drawn from, None where greedy. Of k steps `[k, B]` and `[k, B, V]`.
Chosen = tuple[Tensor, Tensor | None]
_SMALL = 2**27  # bytes of weights: reading them takes less than ten times as long as Python between two steps
_STEPS_OF_SMALL = 4
_SPARE_BYTES = 2**25  # of a cache that a CPU keeps between requests: the memory of a larger one is the host's again
_STEP_LOGITS = 8  # float32 numbers of a recorded step per row and token of the vocabulary: logits, shares, results


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
        self.ranks, self._self = model.ranks, weakref.ref(self)
        self.compiled = CompiledWalk(model) if compile is True else None
        self.embed, self.logits, self.own_dtypes = model.embed, model.logits, model.own_dtypes
        self.walk: Callable[..., Tensor] = self.compiled or model.walk
        device = model.embedding.weight.device.type
        self.kind = how_steps_run(device, model.backend.name, compile, model.ranks.joined)
        self._make: Callable | None = None  # records a step, where steps can be recorded
        if device == "cuda" and compile is not False:
            self._make = CapturedStep
        elif self.kind == "recorded":
            self._make = RecordedStep
        # How many decode steps, their tokens chosen, are worth making one call: several where Python takes a good part
        # of each, none where choosing is not recorded. (A softcap is PyTorch's tanh, whose bits nobody else has.)
        self.at_once = 0
        if self._make is RecordedStep and model.config.final_softcap is None:
            self.at_once = _STEPS_OF_SMALL if model.weight_bytes < _SMALL else 1
        # Per cache, by their shapes: the recorded steps, or None for one that cannot be recorded. A cache that is
        # dropped takes its steps along.
        self._recorded: weakref.WeakKeyDictionary[StaticCache, dict] = weakref.WeakKeyDictionary()
        self._weights: tuple = (False,)  # where and which they were when the steps were recorded
        self._moves = model.moves
        self._spare: list[StaticCache] = []  # none, or that of the last request without a cache of the caller's

    def __deepcopy__(self, memo) -> "Steps":
        """A copy of the model records its own steps: those of this one read this one's addresses."""
        return Steps(copy.deepcopy(self.model, memo), self.compile)

    @property
    def weight_bytes(self) -> int:
        return self.model.weight_bytes

    def borrow_cache(self, rows: int, length: int) -> StaticCache:
        """A cache for a request that has none: the last request's if it is large enough, since recording a step costs
        as much as ten of a small model, capturing one 25 to 40 ms. What it holds is nobody's any more. Lengths are
        rounded up for that, on a CPU where it takes little memory."""
        weight, config, spare = self.embedding.weight, self.config, None
        with suppress(IndexError):  # another thread's request may be quicker
            spare = self._spare.pop()
        alike = spare is not None and (spare.device, spare.dtype) == (weight.device, weight.dtype)
        if alike and spare.batch_size >= rows and spare.max_cache_len >= length:
            return spare
        del spare  # before a larger one is made
        rounded = min(max(256, 1 << (length - 1).bit_length()), config.max_positions)
        token_bytes = 2 * len(config.layers) * config.num_kv_heads * config.head_dim * weight.itemsize  # or fewer
        if self._keeps(rows * (rounded + 1) * token_bytes):
            length = rounded
        return StaticCache(config, rows, length, weight.device, weight.dtype)

    def give_back(self, cache: StaticCache) -> None:
        """The request that borrowed this cache has ended."""
        mine = ((part, steps) for part, steps in self._recorded.items() if part.hold is cache.hold)
        recorded = sum(part.batch_size * len(steps) for part, steps in mine)  # rows of recorded steps
        if self._keeps(cache.nbytes + recorded * _STEP_LOGITS * 4 * self.config.vocab_size):
            self._spare[:] = [cache]

    def _keeps(self, size: int) -> bool:
        """Whether a cache that takes so many bytes, with its recorded steps, is worth keeping between requests."""
        return self.embedding.weight.is_cuda or (self._make is not None and size <= _SPARE_BYTES)

    def __call__(self, input_ids: Tensor, cache_position: Tensor, cache: StaticCache) -> Tensor:
        """Logits `[B, T, V]` float32; arguments as for `Decoder.forward`."""
        looked = self._looked(cache)
        with _inference(), self.own_dtypes(), cache.writing(self, input_ids, cache_position):
            if self._make is not None and input_ids.shape[1] <= FEW_ROWS:
                with suppress(NotRecordable):  # where PyTorch computes something itself
                    make = partial(self._make, self, cache)
                    return self._recall(cache, looked, tuple(input_ids.shape), make, input_ids, cache_position)
            x, rotary = self.embed(input_ids, cache_position, cache)
            return self.logits(self.walk(x, rotary, cache_position, cache))

    def ahead(
        self,
        ids: Tensor,
        cache_position: Tensor,
        place: Tensor,
        cache: StaticCache,
        sampling: Sampling,
        stream: int,
        vocabulary: int,
        logits: bool,
        seen: Tensor | None = None,
    ) -> Chosen:
        """Feed tokens and go on with those that are chosen, as `decode_ahead` in this cache: the arguments as there,
        and how to choose, with which stream of random numbers, among the first `vocabulary` tokens, whether to return
        the logits or the distributions, and which tokens a repetition penalty knows. Where steps are recorded it is
        one call; what comes out is overwritten by the next."""
        if self._make is RecordedStep and seen is None:
            looked, T = self._looked(cache), ids.shape[1]
            fed = F.pad(ids, (0, place.shape[1] - 1))  # [B, T + k - 1], to be filled in with what is chosen
            with suppress(NotRecordable), _inference(), self.own_dtypes(), cache.writing(self, fed, cache_position):
                key = (len(ids), sampling.filters, stream, vocabulary, logits)
                make = partial(RecordedAhead, self, cache, sampling, stream, vocabulary, logits)
                results = self._recall(cache, looked, key, make, ids, cache_position, place, sampling)
                if place.shape[1] > 1:
                    fed[:, T:] = results[0][:-1].t()
                return results

        def step(ids: Tensor, cache_position: Tensor, place: Tensor) -> Chosen:
            nonlocal seen
            said = self(ids, cache_position, cache)[:, -1, :vocabulary]  # [B, V]
            token, drawn_from = choose(said, sampling, place, seen, stream)
            seen = None if seen is None else seen.scatter(1, token[:, None], True)
            return token, said if logits else drawn_from

        with _inference():
            return decode_ahead(step, ids, cache_position, place)

    def _looked(self, cache: StaticCache) -> bool:
        """Whether the weights have been looked at since the request, or a loop of one's own, began."""
        return (cache.hold.in_turn or cache.hold.stepped_by is self._self) and self._moves == self.model.moves

    def _recall(self, cache: StaticCache, looked: bool, key: tuple, make: Callable[[], Callable], *inputs: Tensor):
        """What the recorded step of this cache that is called `key` returns; the first time `make` makes it. Raises
        `NotRecordable` where there can be none."""
        if not looked:
            self.fingerprint()
        cache.hold.stepped_by = self._self
        steps = self._recorded.setdefault(cache, {})
        if key not in steps:
            steps[key] = None if self._weights[-1] else make()  # a replay calls no hook
        if steps[key] is None:
            raise NotRecordable
        try:
            return steps[key](*inputs)
        except NotRecordable:
            steps[key] = None
            raise

    def fingerprint(self) -> tuple:
        """As `Decoder.fingerprint`. What was recorded with other weights, or without hooks, is dropped: a replay reads
        addresses and calls nobody."""
        weights = self.model.fingerprint()
        if weights != self._weights:
            self._recorded.clear()
            self._weights = weights
        self._moves = self.model.moves
        return weights


def _inference() -> AbstractContextManager:
    """Not within another one: where an interrupt strikes, the inner would leave the mode to the caller."""
    return nullcontext() if torch.is_inference_mode_enabled() else torch.inference_mode()


def how_steps_run(device_type: str, attention: str, compile: bool | str, shared: bool = False) -> str:
    """In a word: "compiled", "captured", "recorded" or "as written". `shared`: ranks share the model."""
    if compile is False:
        return "as written"
    if compile is True:
        return "compiled"
    if device_type == "cuda":
        return "captured"
    # A list of C calls waits for no other process.
    recorded = device_type == "cpu" and attention == "kernels" and cpu.available() and not shared
    return "recorded" if recorded else "as written"


def check_compile(compile: bool | str) -> None:
    """Raise `BackendError` for anything but "auto", True and False."""
    if type(compile) is not bool and not (isinstance(compile, str) and compile == "auto"):
        raise BackendError(f"compile={compile!r} is not one of True, False, 'auto'")


def decode_ahead(
    step: Callable[[Tensor, Tensor, Tensor], Chosen], ids: Tensor, cache_position: Tensor, place: Tensor
) -> Chosen:
    """Feed the newest tokens of every row, and then each token that is chosen but the last: k steps that need nobody.

    Args:
        step: feeds ids at positions, `[B, T]` int64 both, and chooses the tokens that will stand at `place [B]`.
        ids: `[B, T]` int64.
        cache_position: `[B, T + k - 1]` int64, where they stand, and then where the chosen ones are fed; -1: padding.
        place: `[B, k]` int64, for which places tokens are chosen.

    Returns what the steps did, see `Chosen`.
    """
    T, k = ids.shape[1], place.shape[1]
    chosen = [step(ids, cache_position[:, :T].contiguous(), place[:, 0].contiguous())]
    for i in range(1, k):
        fed = cache_position[:, T + i - 1, None].contiguous()  # [B, 1]
        chosen.append(step(chosen[-1][0][:, None], fed, place[:, i].contiguous()))
    return tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*chosen, strict=True))


class Recorded:
    """What a function of tensors computes, as the list of its C calls: the first call writes the list, the others work
    through it. What it returns is overwritten by the next call."""

    def __init__(self, function: Callable):
        self.function: Callable | None = function
        self.tape: Tape | None = None

    def __call__(self, *inputs: Tensor):
        if self.tape is None:
            self.inputs = [value.clone() for value in inputs]  # where the calls read from now on
            tape = cpu.blank_tape()
            with tape.recording():
                self.result = self.function(*self.inputs)
            self.tape, self.function = tape, None
        else:
            for kept, new in zip(self.inputs, inputs, strict=True):
                kept.copy_(new)
            self.tape.replay()
        return self.result


class RecordedStep:
    """A step on the CPU as the list of its C calls."""

    def __init__(self, steps: Steps, cache: StaticCache):
        model, held = steps.model, weakref.ref(cache)
        self.model = model

        def step(input_ids: Tensor, cache_position: Tensor) -> Tensor:
            cache = held()
            x, rotary = model.embed(input_ids, cache_position, cache)
            # No kernel asks how far to read: each looks at the positions.
            return model.head(model.walk(x, rotary, cache_position, cache, bound=1)).float()  # [B, T, V]

        self.recorded = Recorded(step)

    def __call__(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        # A copy, since the next step overwrites what this one returned; not PyTorch's, which would wake its threads.
        logits = torch.from_numpy(self.recorded(input_ids, cache_position).numpy().copy())
        return self.model.finish(logits)  # [B, T, V]


class RecordedAhead:
    """`decode_ahead` on the CPU: the list of one step's C calls, and k times that list, with copies in between, as one.

    A step is written down once, whatever k is: the first k steps of a kind are made one by one.
    """

    def __init__(
        self, steps: Steps, cache: StaticCache, sampling: Sampling, stream: int, vocabulary: int, logits: bool
    ):
        self.model, self.cache, self.stream, self.vocabulary = steps.model, weakref.ref(cache), stream, vocabulary
        self.logits = logits
        self.given: Sampling | None = None
        # Where the calls read it.
        self.sampling = Sampling(*(None if column is None else column.clone() for column in vars(sampling).values()))
        self.steps: dict[int, Recorded] = {}  # by T
        self.lists: dict[tuple[int, int], Chain] = {}  # by T and k
        self.results: list[Tensor | None] | None = None  # of the longest

    def __call__(self, ids: Tensor, cache_position: Tensor, place: Tensor, sampling: Sampling) -> Chosen:
        if sampling is not self.given:
            self.given = None  # until it is copied whole
            for kept, new in zip(vars(self.sampling).values(), vars(sampling).values(), strict=True):
                if kept is not None:
                    kept.copy_(new)
            self.given = sampling
        T, k = ids.shape[1], place.shape[1]
        if (T, k) in self.lists:
            return self.lists[T, k](ids, cache_position, place)
        chosen = decode_ahead(self._step, ids, cache_position, place)
        if self.results is None or len(self.results[0]) < k:
            self.results = [None if kept is None else kept.clone() for kept in chosen]
        results = [None if kept is None else kept[:k] for kept in self.results]
        self.lists[T, k] = Chain(self.steps[T], self.steps[1 if k > 1 else T], results)
        return chosen

    def _step(self, ids: Tensor, cache_position: Tensor, place: Tensor) -> Chosen:
        recorded = self.steps.setdefault(ids.shape[1], Recorded(self._choose))
        return tuple(None if x is None else x.clone() for x in recorded(ids, cache_position, place))

    def _choose(self, ids: Tensor, cache_position: Tensor, place: Tensor) -> Chosen:
        cache = self.cache()
        x, rotary = self.model.embed(ids, cache_position, cache)
        hidden = self.model.walk(x, rotary, cache_position, cache, bound=1)[:, -1]  # [B, d]
        logits = self.model.logits(hidden)[:, : self.vocabulary].contiguous()  # [B, V]
        token, drawn_from = choose(logits, self.sampling, place, stream=self.stream)
        return token, logits if self.logits else drawn_from


class Chain:
    """k steps as one list of C calls: a first one, and k - 1 times another that feeds the token before."""

    def __init__(self, first: Recorded, other: Recorded, results: Sequence[Tensor | None]):
        self.first, (ids, position, place) = first, other.inputs  # [B, 1], [B, 1], [B]
        self.results, k = results, len(results[0])
        self.position = position.new_empty(k - 1, *position.shape)  # [k - 1, B, 1]
        self.place = place.new_empty(k, *place.shape)  # [k, B]
        self.tape = cpu.blank_tape()
        with self.tape.recording():
            for i in range(k):
                step = other if i > 0 else first
                if i > 0:
                    ids.copy_(self.results[0][i - 1][:, None])
                    position.copy_(self.position[i - 1])
                step.inputs[2].copy_(self.place[i])
                self.tape.extend(step.tape)
                for kept, result in zip(self.results, step.result, strict=True):
                    if kept is not None:
                        kept[i].copy_(result)

    def __call__(self, ids: Tensor, cache_position: Tensor, place: Tensor) -> Chosen:
        T = ids.shape[1]
        self.first.inputs[0].copy_(ids)
        self.first.inputs[1].copy_(cache_position[:, :T])
        self.position.copy_(cache_position[:, T:].t()[:, :, None])
        self.place.copy_(place.t())
        self.tape.replay()
        return self.results


class CapturedStep:
    """A step on a GPU as a CUDA graph: one launch for all kernels, which read token and position where they lie.

    Where it cannot be captured (no memory for the graph, say) a warning says why, once, and `NotRecordable` is raised:
    the step runs as it is written.
    """

    def __init__(self, steps: Steps, cache: StaticCache):
        self.steps, self.cache = steps, weakref.ref(cache)
        # What the graph reads stays where it is, whoever gives a parameter new memory.
        self.weights = [tensor.detach() for tensor in (*steps.model.parameters(), *steps.model.buffers())]
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        # Streams and graphs belong to the current device, which need not be the model's.
        with torch.cuda.device(input_ids.device):
            if self.graph is None:
                try:
                    self._capture(input_ids, cache_position)
                except RuntimeError as error:
                    reason = f"a step of {list(input_ids.shape)} tokens cannot be captured: {first_line(error)}"
                    warnings.warn(f"{reason}; it runs as it is written", stacklevel=2)
                    raise NotRecordable(reason) from error
            self.input_ids.copy_(input_ids)
            self.position.copy_(cache_position)
            self.graph.replay()
            return self.out.clone()

    def _capture(self, input_ids: Tensor, cache_position: Tensor) -> None:
        self.input_ids, self.position = input_ids.clone(), cache_position.clone()  # [B, T] each
        cache = self.cache()

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
