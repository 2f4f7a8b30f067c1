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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import CacheError
from minillm.rope import rotary_table

MAX_STEP = 256  # tokens a single forward pass may add to a row, unless a cache is made for more or fewer


def num_slots(window: int | None, max_cache_len: int, max_step: int) -> int:
    """Slots of a layer: one per position, or a ring that is long enough for a step and its rollback."""
    return max_cache_len if window is None else min(max_cache_len, window + max_step - 1)


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
    def mask(self) -> Tensor:
        """[B, T, key_length] bool, True where the query sees the slot."""
        if self._mask is None:
            last = self.cache_position.amax(dim=1, keepdim=True)  # [B, 1]
            slot = torch.arange(self.key_length, device=last.device)  # [key_length]
            key_position = (last - (last - slot) % self.num_slots)[:, None, :]  # [B, 1, key_length]
            query = self.cache_position[:, :, None]  # [B, T, 1]
            seen = (key_position >= 0) & (key_position <= query)
            if self.window is not None:
                seen &= key_position > query - self.window
            # A padding query sees everything: its result is never used, and no softmax row is left empty.
            self._mask = seen | (query < 0)
        return self._mask


class StaticCache:
    """Fixed-size key/value cache for `batch_size` rows of up to `max_cache_len` tokens each.

    The cache is yours: pass it to `LLM.generate` to continue where the last call stopped (it knows the
    token ids it holds, so only what differs from them is computed), or to the decoder in a loop of
    your own.

    Args:
        config: the model's `ModelConfig`.
        batch_size: rows.
        max_cache_len: tokens per row, prompt and answer together.
        device, dtype: where and how keys and values are kept; normally `llm.device`, `llm.dtype`.
        max_step: the most tokens a single forward pass may add to a row (prefill chunks have this size).
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
        max_step: int = MAX_STEP,
        planned_length: int | Sequence[int] | None = None,
    ):
        for name, value in (
            ("batch_size", batch_size),
            ("max_cache_len", max_cache_len),
            ("max_step", max_step),
        ):
            if type(value) is not int or value < 1:
                raise CacheError(f"StaticCache: {name} must be a whole number >= 1, not {value!r}")
        self.config = config
        self.batch_size = batch_size
        self.max_cache_len = max_cache_len
        self.max_step = min(max_step, max_cache_len)
        self.device = torch.device(device)
        self.dtype = dtype
        self.keys: list[Tensor] = []  # per layer [B, KV, S + 1, D]
        self.values: list[Tensor] = []
        for layer in config.layers:
            shape = (batch_size, config.num_kv_heads, self.num_slots(layer.window) + 1, config.head_dim)
            # Zeros, not empty: a masked slot is multiplied by weight 0, and 0 * NaN would be NaN.
            self.keys.append(torch.zeros(shape, dtype=dtype, device=device))
            self.values.append(torch.zeros(shape, dtype=dtype, device=device))
        # The ids the cache holds, -1 where it holds none; column max_cache_len is the bin.
        self._ids = torch.full((batch_size, max_cache_len + 1), -1, dtype=torch.int64, device=device)
        # One past the highest position ever written since the reset: what a ring has overwritten.
        self._written = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self._rows = torch.arange(batch_size, device=device)[:, None]  # [B, 1]
        self.plan(max_cache_len if planned_length is None else planned_length)

    def num_slots(self, window: int | None) -> int:
        """Slots of a layer with this window, the bin not counted."""
        return num_slots(window, self.max_cache_len, self.max_step)

    @torch.inference_mode(False)
    def plan(self, planned_length: int | Sequence[int]) -> None:
        """Choose the rotary tables for rows that will reach this length. Only an empty cache can be re-planned."""
        lengths = [planned_length] * self.batch_size if isinstance(planned_length, int) else list(planned_length)
        if len(lengths) != self.batch_size or not all(0 < length <= self.max_cache_len for length in lengths):
            raise CacheError(
                f"StaticCache: planned_length {planned_length} must be one length, or one for each of "
                f"{self.batch_size} rows, from 1 to max_cache_len {self.max_cache_len}"
            )
        if any(self.lengths):
            raise CacheError("StaticCache: plan() on a cache that holds tokens; call reset() first")
        self.rotary = tuple(rotary_table(spec, lengths, self.device) for spec in self.config.ropes)

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row holds."""
        return (self._ids >= 0).cumprod(dim=1).sum(dim=1).tolist()

    @property
    def token_ids(self) -> list[list[int]]:
        """The token ids each row holds, by position."""
        return [ids[:length] for ids, length in zip(self._ids.tolist(), self.lengths, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of all key and value tensors, bins included."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def reset(self) -> None:
        """Forget everything; the memory stays. What is left in the slots can no longer be seen."""
        self._ids.fill_(-1)
        self._written.zero_()

    def truncate(self, length: int | Sequence[int]) -> None:
        """Keep only the first `length` tokens (one number for all rows, or one per row): exact, or an error.

        Raises `CacheError` if a row is shorter than that, or if a sliding-window ring has already
        overwritten keys that the shortened row would need; then nothing is changed.
        """
        lengths = [length] * self.batch_size if isinstance(length, int) else list(length)
        if len(lengths) != self.batch_size:
            raise CacheError(f"truncate: {len(lengths)} lengths for {self.batch_size} rows")
        for row, (new, old, written) in enumerate(zip(lengths, self.lengths, self._written.tolist(), strict=True)):
            if not 0 <= new <= old:
                raise CacheError(f"truncate: row {row} holds {old} tokens, it cannot be cut to {new}")
            for window in self.config.windows:
                if not self._ring_still_holds(window, new, written):
                    raise CacheError(
                        f"truncate: row {row} cannot go back to {new}: positions up to {written - 1} were written "
                        f"and its ring of {self.num_slots(window)} slots (window {window}) has overwritten keys "
                        f"that {new} tokens need; the shortest exact cut is {written - self.max_step}, or reset()"
                    )
        keep = torch.tensor(lengths, device=self.device)[:, None]  # [B, 1]
        column = torch.arange(self.max_cache_len + 1, device=self.device)  # [max_cache_len + 1]
        self._ids.masked_fill_(column >= keep, -1)  # [B, max_cache_len + 1]
        # A row cut to nothing starts afresh: no query will ever look back past position 0.
        self._written.masked_fill_(keep[:, 0] == 0, 0)

    def can_truncate(self, row: int, length: int) -> bool:
        """Whether `truncate` to `length` would be exact for this row."""
        written = int(self._written[row])
        return all(self._ring_still_holds(window, length, written) for window in self.config.windows)

    def _ring_still_holds(self, window: int | None, length: int, written: int) -> bool:
        """Whether the window - 1 positions before `length` are still there after `written` ones went in."""
        slots = self.num_slots(window)
        return window is None or length == 0 or written <= slots or length >= written - slots + window - 1

    def record(self, input_ids: Tensor, cache_position: Tensor) -> None:
        """Note which ids a forward pass is about to write; `input_ids` and `cache_position` are `[B, T]`.

        Raises `CacheError` for a step that does not fit. Positions are only looked at where that is free
        (on the CPU, outside a compiled graph): on a GPU reading them back would stall the queue.
        """
        rows, step = input_ids.shape
        if rows != self.batch_size or cache_position.shape != input_ids.shape:
            raise CacheError(
                f"input_ids {list(input_ids.shape)} and cache_position {list(cache_position.shape)} must both be "
                f"[{self.batch_size}, T] for this cache"
            )
        if step > self.max_step:
            raise CacheError(f"a step of {step} tokens exceeds the cache's max_step {self.max_step}")
        if self.device.type == "cpu" and not torch.compiler.is_compiling():
            top = int(cache_position.max())
            if top >= self.max_cache_len:
                raise CacheError(f"position {top} is beyond the cache: max_cache_len is {self.max_cache_len}")
        column = torch.where(cache_position < 0, self.max_cache_len, cache_position)  # [B, T]
        self._ids[self._rows, column] = input_ids
        self._written.copy_(torch.maximum(self._written, cache_position.amax(dim=1) + 1))

    def view(
        self,
        cache_position: Tensor,
        window: int | None,
        key_length: int | None = None,
        from_start: bool = False,
    ) -> KeyView:
        """Which slots a step at `cache_position [B, T]` writes and sees, for layers with this window.

        `key_length` is a bound, known to the host, on the positions in use (newest + 1): reading no
        further is what makes a step cost what the text is long and not what was allocated. By default
        it is read off the positions on the CPU, and is everything elsewhere and inside a compiled graph.
        `from_start` is a promise that the step is the beginning of every row, which lets a kernel skip the cache.
        """
        layer = next(i for i, layer in enumerate(self.config.layers) if layer.window == window)
        slots = self.keys[layer].shape[2] - 1  # as num_slots says, but read off the tensor: a compiler knows its sizes
        if key_length is None:
            on_host = self.device.type == "cpu" and not torch.compiler.is_compiling()
            key_length = int(cache_position.max()) + 1 if on_host else slots
        # Not min and max: of those a compiler takes one branch, and compiles again when it is the other.
        key_length = torch.sym_max(1, torch.sym_min(key_length, slots))
        return KeyView(cache_position, window, slots, key_length, from_start)

    def write(self, layer: int, keys: Tensor, values: Tensor, view: KeyView) -> None:
        """Put this step's `keys` and `values`, both `[B, T, KV, D]`, into their slots."""
        self.keys[layer][self._rows, :, view.slots] = keys
        self.values[layer][self._rows, :, view.slots] = values
