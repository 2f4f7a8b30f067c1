"""StaticCache: the keys and values of every position so far, in tensors that never grow.

A decoder without a cache recomputes the whole text for every new token; with one it computes a
single column and reads the rest. The tensors are allocated once, at full size, so their addresses
and shapes never change: that is what lets a step be compiled or captured once and replayed for ever
(the "static kv-cache" of the guide "LLM inference optimization").

Layout, per layer: k and v are `[B, KV, S + 1, D]`.

* A layer that sees everything has one slot per position: S = max_cache_len.
* A layer with a sliding window is a ring: position p lives in slot p % S with
  S = window + max_step - 1. A step of T <= max_step tokens is written before its queries look, so the
  first query of the step still needs the window - 1 positions before it: they fit, just. The same
  slack makes a rollback of up to max_step tokens exact.
* Slot S is a bin: padding writes there and nobody reads it.

Nothing is stored about which position a slot holds. It follows from the newest position of the row:
slot s holds `last - (last - s) mod S`, negative if it was never written. That one formula serves full
layers, rings and rows that were rolled back.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import CacheError, first_line, shown
from minillm.hold import Hold
from minillm.rope import rotary_table

MAX_STEP = 256  # tokens a single forward pass may add to a row, unless a cache is made for more or fewer,
GPU_MAX_STEP = 2048  # and on a GPU: a prompt should be enough work to fill it


@dataclass
class KeyView:
    """What one step may see of the cache; every layer with the same window shares one.

    `slots` and `mask` are made when first asked for: a kernel that reads positions needs neither.
    """

    cache_position: Tensor  # [B, T], -1 for padding
    window: int | None
    num_slots: int  # slots of the layer, without the bin
    key_length: int  # how many of them to read: the rest holds nothing yet
    from_start: bool  # column t of every row is position t (or padding after the row's end)
    _slots: Tensor | None = None
    _mask: Tensor | None = None

    @property
    def slots(self) -> Tensor:
        """[B, T]: where this step's keys and values are written."""
        if self._slots is None:
            position = self.cache_position
            self._slots = torch.where(position < 0, self.num_slots, position % self.num_slots)
        return self._slots

    @property
    def key_position(self) -> Tensor:
        """[B, 1, key_length]: the position of what each slot holds, negative where it holds nothing yet."""
        last = self.cache_position.amax(dim=1, keepdim=True)  # [B, 1]
        slot = torch.arange(self.key_length, device=last.device)  # [key_length]
        return (last - (last - slot) % self.num_slots)[:, None, :]

    @property
    def mask(self) -> Tensor:
        """[B, T, key_length] bool, True where the query sees the slot."""
        if self._mask is None:
            key_position = self.key_position  # [B, 1, key_length]
            query = self.cache_position[:, :, None]  # [B, T, 1]
            seen = (key_position >= 0) & (key_position <= query)
            if self.window is not None:
                seen &= key_position > query - self.window
            # A padding query sees everything: its result is never used, and no softmax row is left empty.
            self._mask = seen | (query < 0)
        return self._mask


def upload(numbers: list, device: torch.device) -> Tensor:
    """Whole numbers as an int64 tensor on a device, which the host does not wait for."""
    tensor = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


_NEVER, _LOST = -2, -1  # in the place of an id: nothing was ever written there; what was no longer counts
_MOST = torch.iinfo(torch.int64).max


class StaticCache:
    """Fixed-size key/value cache for `batch_size` rows of up to `max_cache_len` tokens each.

    The cache is yours: pass it to `LLM.generate` to continue where the last call stopped (it knows the
    token ids it holds, so only what differs from them is computed), or to the decoder in a loop of
    your own. An id counts from the moment its keys are complete: whatever interrupts a forward pass, the
    cache holds what it held before, and says so. It belongs to the model that fills it, until `reset`.

    Args:
        config: the model's `ModelConfig`.
        batch_size: rows.
        max_cache_len: tokens per row, prompt and answer together.
        device, dtype: where and how keys and values are kept: `llm.device`, `llm.dtype`.
        max_step: the most tokens a single forward pass may add to a row (prefill chunks have this size); by default
            256, on a CUDA device 2,048.
        planned_length: the length (one for all rows, or one per row) for which `dynamic` and `longrope`
            rotary tables are chosen; by default max_cache_len. Other models do not depend on it.

    Raises `CacheError` if a size is not positive or a planned length exceeds max_cache_len.
    """

    @torch.inference_mode(False)  # wherever it is made, a compiler sees tensors of one kind
    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_cache_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_step: int | None = None,
        planned_length: int | Sequence[int] | None = None,
    ):
        if max_step is None:
            max_step = GPU_MAX_STEP if str(device).startswith("cuda") else MAX_STEP
        for name, value in (("batch_size", batch_size), ("max_cache_len", max_cache_len), ("max_step", max_step)):
            if type(value) is not int or value < 1:
                raise CacheError(f"StaticCache: {name} must be a whole number >= 1, not {shown(value)}")
        if not isinstance(config, ModelConfig) or not getattr(dtype, "is_floating_point", False):
            raise CacheError(f"StaticCache: a ModelConfig and a floating dtype are needed, not {shown(dtype)}")
        if config.learned_positions and max_cache_len > config.max_positions:
            raise CacheError(
                f"StaticCache: max_cache_len {max_cache_len} is over the model's {config.max_positions} positions"
            )
        self.config = config
        self.batch_size = batch_size
        self.max_cache_len = max_cache_len
        self.max_step = min(max_step, max_cache_len)
        self.dtype = dtype
        self.keys: list[Tensor] = []  # per layer [B, KV, S + 1, D]
        self.values: list[Tensor] = []
        try:
            for layer in config.layers:
                shape = (batch_size, config.num_kv_heads, self.num_slots(layer.window) + 1, config.head_dim)
                # Zeros, not empty: a masked slot is multiplied by weight 0, and 0 * NaN would be NaN.
                self.keys.append(torch.zeros(shape, dtype=dtype, device=device))
                self.values.append(torch.zeros(shape, dtype=dtype, device=device))
            # The id at every position, or _NEVER or _LOST; the last column is the bin, where position -1 leads.
            self._ids = torch.full((batch_size, max_cache_len + 1), _NEVER, dtype=torch.int64, device=device)
        except (RuntimeError, TypeError, AssertionError) as error:  # no such device, or not so much memory
            raise CacheError(f"StaticCache of {batch_size} x {max_cache_len} tokens: {first_line(error)}") from error
        self.device = self._ids.device
        self._rows = torch.arange(batch_size, device=device)[:, None]  # [B, 1]
        self.hold = Hold()
        self._is_part = False  # from a larger cache
        self._parts: dict[tuple[int, int], StaticCache] = {}
        planned = self._planned(max_cache_len if planned_length is None else planned_length)
        self.rotary = tuple(rotary_table(spec, planned, device) for spec in config.ropes)

    def num_slots(self, window: int | None) -> int:
        """Slots of a layer, the bin not counted: one per position, or a ring that holds a step and its rollback."""
        return self.max_cache_len if window is None else min(self.max_cache_len, window + self.max_step - 1)

    @torch.inference_mode(False)
    def plan(self, planned_length: int | Sequence[int]) -> None:
        """Choose the rotary tables for rows that will reach this length. Only empty rows can be re-planned."""
        with self.hold.writing():
            if any(self.lengths):
                raise CacheError("StaticCache: plan() on a cache that holds tokens; call reset() first")
            lengths = self._planned(planned_length)
            for table, spec in zip(self.rotary, self.config.ropes, strict=True):
                if spec.follows_length:  # in place: a captured step reads these addresses
                    table.inverse_frequency.copy_(rotary_table(spec, lengths, self.device).inverse_frequency)

    def _planned(self, planned_length: int | Sequence[int]) -> list[int]:
        lengths = self._per_row("planned_length", planned_length)
        if not all(0 < length <= self.max_cache_len for length in lengths):
            raise CacheError(f"StaticCache: planned_length must be from 1 to max_cache_len {self.max_cache_len}")
        return lengths

    def _per_row(self, name: str, value: int | Sequence[int]) -> list[int]:
        """One whole number for all rows, or one per row, as the latter."""
        numbers = [value] * self.batch_size if type(value) is int else value
        if not (isinstance(numbers, list | tuple) and all(type(number) is int for number in numbers)):
            raise CacheError(f"{name} must be a whole number or a list of them, not {shown(value)}")
        if len(numbers) != self.batch_size:
            raise CacheError(f"{name}: {len(numbers)} numbers for {self.batch_size} rows")
        return list(numbers)

    def rows(self, start: int, stop: int) -> "StaticCache":
        """Rows `start` to `stop` - 1 as a cache of their own, which shares memory, ids and holder with this one.

        Asked again it is the same object: steps are recorded for a cache.
        """
        if not 0 <= start < stop <= self.batch_size:
            raise CacheError(f"rows {start} to {stop} are not in a cache of {self.batch_size} rows")
        if (start, stop) == (0, self.batch_size):
            return self
        if (start, stop) in self._parts:
            return self._parts[start, stop]
        part = copy.copy(self)
        part._is_part, part._parts = True, {}
        part.batch_size = stop - start
        part.keys, part.values = [k[start:stop] for k in self.keys], [v[start:stop] for v in self.values]
        part._ids, part._rows = self._ids[start:stop], self._rows[: stop - start]
        part.rotary = tuple(table.rows(start, stop) for table in self.rotary)
        self._parts[start, stop] = part  # now that it is whole
        return part

    def first_rows(self, count: int) -> "StaticCache":
        """The first 1, 2, 4, 8, ... rows, or all: the fewest that hold row `count` - 1. So steps have few shapes."""
        return self.rows(0, min(1 << (count - 1).bit_length(), self.batch_size))

    def copy_row(self, source: int, target: int) -> None:
        """Make row `target` hold what row `source` holds."""
        with self.hold.writing():
            self._ids[target] = _LOST  # until the keys are complete
            clocks = (table.inverse_frequency for table in self.rotary if len(table.inverse_frequency) > 1)
            for tensor in (*self.keys, *self.values, *clocks, self._ids):
                tensor[target].copy_(tensor[source])

    # ---- what it holds ----

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row holds."""
        return (self._ids[:, :-1] >= 0).cumprod(dim=1).sum(dim=1).tolist()

    @property
    def token_ids(self) -> list[list[int]]:
        """The token ids each row holds, by position."""
        return [ids[:length] for ids, length in zip(self._ids.tolist(), self.lengths, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of all key and value tensors, bins included."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def reset(self) -> None:
        """Forget everything, the model too (unless these are rows of a larger cache); the memory stays."""
        with self.hold.writing():
            self._ids.fill_(_NEVER)
            if not self._is_part:
                self.hold.free()
            for tensor in (*self.keys, *self.values):  # a NaN that a pass left behind would spoil what masks it
                tensor.zero_()

    def truncate(self, length: int | Sequence[int]) -> None:
        """Keep only the first `length` tokens (one number for all rows, or one per row): exact, or an error.

        Raises `CacheError` if a row is shorter than that, or if a sliding-window ring has already
        overwritten keys that the shortened row would need; then nothing is changed.
        """
        lengths = self._per_row("truncate: length", length)
        with self.hold.writing():
            for row, (new, old, written) in enumerate(zip(lengths, self.lengths, self._written(), strict=True)):
                if not 0 <= new <= old:
                    raise CacheError(f"truncate: row {row} holds {old} tokens, it cannot be cut to {new}")
                if not self._rings_hold(new, written):
                    raise CacheError(
                        f"truncate: row {row} cannot go back to {new}: positions up to {written - 1} were written and "
                        f"the rings of its sliding windows {[w for w in self.config.windows if w]} have overwritten "
                        f"keys that {new} tokens need; the shortest exact cut is {written - self.max_step}, or reset()"
                    )
            self._keep(lengths)

    def cut(self, lengths: dict[int, int]) -> None:
        """Keep at most so many tokens of these rows. The device is not asked: for those who know that no row went
        further than a step beyond."""
        with self.hold.writing():
            self._keep([lengths.get(row, self.max_cache_len) for row in range(self.batch_size)])

    def _keep(self, lengths: list[int]) -> None:
        keep = upload(lengths, self.device)[:, None]  # [B, 1]
        column = torch.arange(self.max_cache_len + 1, device=self.device)  # [max_cache_len + 1]
        self._ids.clamp_(max=torch.where(column < keep, _MOST, _LOST))  # [B, max_cache_len + 1]
        # A row cut to nothing starts afresh: no query will ever look back past position 0.
        self._ids.masked_fill_(keep == 0, _NEVER)

    def can_truncate(self, row: int, length: int) -> bool:
        """Whether `truncate` to `length` would be exact for this row."""
        return self._rings_hold(length, self._written()[row])

    def _written(self) -> list[int]:
        """One past the highest position written to each row since it was empty: what a ring has overwritten."""
        if not any(self.config.windows):
            return [0] * self.batch_size  # nothing is ever overwritten
        place = torch.arange(1, self.max_cache_len + 1, device=self.device)  # [max_cache_len]
        return torch.where(self._ids[:, :-1] > _NEVER, place, 0).amax(dim=1).tolist()

    def _rings_hold(self, length: int, written: int) -> bool:
        """Whether the window - 1 positions before `length` are still there after `written` ones went in."""
        return length == 0 or all(
            window is None
            or written <= self.num_slots(window)
            or length >= written - self.num_slots(window) + window - 1
            for window in self.config.windows
        )

    # ---- who may write ----

    def check_model(self, model, rows: int) -> None:
        """Raise `CacheError` unless the cache was made for such a model and so many rows, and holds no other's keys."""
        weight = model.embedding.weight
        if self.config is not model.config and self.config != model.config:
            raise CacheError("the cache was made for another model: build it with StaticCache(llm.config, ...)")
        if self.device != weight.device or self.dtype != weight.dtype:
            raise CacheError(
                f"the cache is {self.dtype} on {self.device}, the model {weight.dtype} on {weight.device}: "
                "build it with device=llm.device, dtype=llm.dtype"
            )
        if self.batch_size != rows:
            raise CacheError(f"the cache has {self.batch_size} rows, the input {rows}")
        self.hold.check_model(model.embedding)

    def writing(self, model, input_ids: Tensor, cache_position: Tensor) -> AbstractContextManager[None]:
        """Around all that a forward pass of `model` does: checks it, and notes which ids the cache holds after it.

        `input_ids` and `cache_position` are `[B, T]` int64. What stood at the positions, and all that followed it in
        the row, stops to count before the pass; the new ids, as they are then, count only after it. Raises
        `CacheError` for a step that does not fit or comes from somebody who may not write. Ids and positions are only
        looked at where that is free (on the CPU, outside a compiled graph): on a GPU that would stall the queue.
        """
        self._check_step(model, input_ids, cache_position)  # here: what a generator raises no compiler can tell
        return self._writing(model, input_ids, cache_position)

    @contextmanager
    def _writing(self, model, input_ids: Tensor, cache_position: Tensor) -> Iterator[None]:
        if torch.compiler.is_compiling():  # a graph can keep the books, but asks nobody who may
            self._forget(cache_position)
            yield
            self._ids[self._rows, cache_position] = input_ids
            return
        with self.hold.writing():
            self.hold.bind(model.embedding)
            spans = []
            if self.device.type == "cpu":
                spans = self._check_values(input_ids, cache_position.tolist())
            else:
                self._forget(cache_position)
            for ids, new, *_ in spans:
                if ids[new.start] >= 0:  # written anew without `truncate`: what follows was computed from the old
                    ids[new.start :].clip(max=_LOST, out=ids[new.start :])
                ids[new] = _LOST
            yield
            if self.device.type != "cpu":
                self._ids[self._rows, cache_position] = input_ids
            for ids, new, tokens, columns in spans:
                ids[new] = tokens[columns]

    def _forget(self, cache_position: Tensor) -> None:
        """Before a pass, where the host does not look: what stands at these positions and after them stops to count."""
        last = cache_position.amax(dim=1, keepdim=True)  # [B, 1]
        follower = torch.where(last < 0, last, last + 1)  # [B, 1]: where the row ends now
        self._ids[self._rows, follower] = self._ids[self._rows, follower].clamp(max=_LOST)
        self._ids[self._rows, cache_position] = _LOST

    def _check_step(self, model, input_ids: Tensor, cache_position: Tensor) -> None:
        """Raise `CacheError` unless the step's tensors fit this cache and this model."""
        if not (isinstance(input_ids, Tensor) and isinstance(cache_position, Tensor)):
            raise CacheError("input_ids and cache_position must be tensors, [B, T] int64")
        if input_ids.dim() != 2 or cache_position.shape != input_ids.shape:
            raise CacheError(
                f"input_ids {list(input_ids.shape)} and cache_position {list(cache_position.shape)} must both be "
                f"[{self.batch_size}, T] for this cache"
            )
        self.check_model(model, input_ids.shape[0])
        if input_ids.dtype != torch.int64 or cache_position.dtype != torch.int64:
            raise CacheError(f"input_ids {input_ids.dtype} and cache_position {cache_position.dtype} must be int64")
        if input_ids.device != self.device or cache_position.device != self.device:
            raise CacheError(f"input_ids and cache_position must be on {self.device}, where the cache is")
        if not 1 <= input_ids.shape[1] <= self.max_step:
            raise CacheError(f"a step of {input_ids.shape[1]} tokens exceeds the cache's max_step {self.max_step}")

    def _check_values(self, input_ids: Tensor, cache_position: list[list[int]]) -> list[tuple]:
        """For each row that a step feeds: where its ids are noted, at which positions, its tokens, and which of them
        are no padding.

        Raises `CacheError` for ids that the model does not have, and for positions that do not continue their row.
        """
        spans, size = [], self.config.vocab_size
        if not all(min(tokens) >= 0 and max(tokens) < size for tokens in input_ids.tolist()):
            raise CacheError(f"input_ids must be from 0 to {size - 1}, the model's vocabulary")
        for row, (tokens, places) in enumerate(zip(input_ids.numpy(), cache_position, strict=True)):
            ids, columns = self._ids[row].numpy(), slice(None)
            if max(places) >= self.max_cache_len:
                raise CacheError(f"position {max(places)} is beyond the cache: max_cache_len is {self.max_cache_len}")
            if min(places) < 0:  # padding
                columns = [column for column, place in enumerate(places) if place != -1]
                places = [places[column] for column in columns]
                if not places:
                    continue
            first = places[0]
            if first < 0 or (len(places) > 1 and places != list(range(first, first + len(places)))):
                raise CacheError(f"positions are 0 or more, one after the other, and -1 for padding; not {places}")
            if first > 0 and ids[first - 1] < 0:
                raise CacheError(f"position {first} leaves a gap: row {row} holds {self.lengths[row]} tokens")
            if ids[first] != _NEVER and not self.can_truncate(row, first):
                raise CacheError(f"row {row} cannot go back to {first}, keys before it are overwritten: reset() it")
            spans.append((ids, slice(first, first + len(places)), tokens, columns))
        return spans

    def view(
        self, cache_position: Tensor, window: int | None, bound: int | None = None, from_start: bool = False
    ) -> KeyView:
        """Which slots a step at `cache_position [B, T]` writes and sees, for layers with this window.

        `bound` is what the host knows of the positions: none reaches it. Reading no further is what makes a step cost
        what the text is long and not what was allocated. By default it is read off the positions on the CPU, and is
        everything elsewhere and inside a compiled graph. `from_start` is a promise that the step is the beginning of
        every row, which lets `sdpa:flash` do without a mask.
        """
        layer = next(i for i, layer in enumerate(self.config.layers) if layer.window == window)
        slots = self.keys[layer].shape[2] - 1  # as num_slots says, but read off the tensor: a compiler knows its sizes
        if bound is None:
            on_host = self.device.type == "cpu" and not torch.compiler.is_compiling()
            bound = int(cache_position.max()) + 1 if on_host else slots
        # Not min and max: of those a compiler takes one branch, and compiles again when it is the other.
        return KeyView(cache_position, window, slots, torch.sym_max(1, torch.sym_min(bound, slots)), from_start)
