"""What stands where the cache stands while a decoder learns, and the attention that goes with it.

Nothing is kept: keys and values are those of this step. A token sees its own document, which begins at the last
position 0 before it.

The kernels have no gradient. `PACKED` is made of what PyTorch differentiates:

* document by document, on a CPU without a compiler: 2 to 3 times faster than a mask over rows of 2,048 tokens;
* compiled for a CPU, with a mask, so that one graph serves any packing: written out for some queries at a time, whose
  keys end where they do. 2.7 times as fast as PyTorch's fused attention, forward and back, in bfloat16 (rows of 512);
* with a mask through PyTorch's fused attention elsewhere.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minillm.attention import Backend, Rotary, add_norm, attend_math, norm
from minillm.config import LayerSpec, ModelConfig
from minillm.errors import BackendError, CacheError
from minillm.load.backends import attend_sdpa
from minillm.rope import rotary_table, rotate

_BLOCK, _BLOCKS = 128, 8  # queries at a time, at least; and in how many parts a long row is cut, at most


@dataclass
class PackedView:
    """What the tokens of rows of documents see; what `KeyView` is to a cache."""

    cache_position: Tensor  # [B, T]: 0 where a document begins
    window: int | None
    mask: Tensor | None  # [B, T, T] bool, True where the query sees the key; None:
    documents: Sequence[tuple[int, int, int]]  # (row, start, stop) instead, by which attention is computed
    from_start: bool = False

    @property
    def key_length(self) -> int:
        return self.cache_position.shape[1]

    @property
    def key_position(self) -> Tensor:
        """[B, 1, T]"""
        return self.cache_position[:, None, :]


class Packed:
    """In the place of a `StaticCache`: it has the rotary tables, and remembers nothing.

    Args:
        config: the model's.
        length: the longest document; for this length `dynamic` and `longrope` rotary tables are chosen.
        device: where the model is.
    """

    def __init__(self, config: ModelConfig, length: int, device: torch.device | str = "cpu"):
        if config.learned_positions and length > config.max_positions:
            raise CacheError(f"documents of {length} tokens are over the model's {config.max_positions} positions")
        self.config, self.length = config, length
        self.rotary = tuple(rotary_table(spec, [length], device) for spec in config.ropes)
        self.keys = self.values = (None,) * config.num_layers

    @contextmanager
    def writing(self, model, input_ids: Tensor, cache_position: Tensor) -> Iterator[None]:
        """Around a forward pass of `model`. Raises `BackendError` if its attention cannot be trained."""
        if model.backend is not PACKED:
            raise BackendError(
                f"attention={model.backend.name!r} cannot be trained in packed rows"
                + (": its kernels have no gradient" if model.backend.name == "kernels" else "")
                + "; load the decoder with attention=minillm.train.attention.PACKED"
            )
        if input_ids.shape != cache_position.shape or input_ids.dim() != 2:
            raise CacheError(f"input_ids {list(input_ids.shape)} and positions {list(cache_position.shape)} must agree")
        yield

    def view(
        self, cache_position: Tensor, window: int | None, bound: int | None = None, from_start: bool = False
    ) -> PackedView:
        """As `StaticCache.view`; there is nothing that the last two could save."""
        by_document = not torch.compiler.is_compiling() and cache_position.is_cpu
        if not by_document:
            return PackedView(cache_position, window, packed_mask(cache_position, window), ())
        begins = (cache_position == 0).nonzero().tolist()  # (row, column) of every document
        B, T = cache_position.shape
        ends = [
            later[1] if later[0] == row else T for (row, _), later in zip(begins, [*begins[1:], (B, 0)], strict=True)
        ]
        documents = [(row, start, stop) for (row, start), stop in zip(begins, ends, strict=True)]
        return PackedView(cache_position, window, None, documents)


def packed_mask(cache_position: Tensor, window: int | None) -> Tensor:
    """[B, T, T] bool: keys of the query's document, no later than it and less than `window` before it."""
    document = (cache_position == 0).cumsum(dim=1)  # [B, T]
    column = torch.arange(cache_position.shape[1], device=cache_position.device)  # [T]
    distance = column[:, None] - column  # [T, T]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return near & (document[:, :, None] == document[:, None, :])


def rotate_and_keep(
    q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, keys: None, values: None, view: PackedView
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, T, H, D]` and keys `[B, T, KV, D]` rotated; those and the values to attend to, `[B, KV, T, D]`."""
    cos, sin = (part[:, :, None].to(q.dtype) for part in rotary)  # [B, T, 1, dim / 2], one for all heads
    return rotate(q, cos, sin), rotate(k, cos, sin).transpose(1, 2), v.transpose(1, 2)


def attend_packed(
    q: Tensor, keys: Tensor, values: Tensor, view: PackedView, spec: LayerSpec, slopes: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale) v of each document; arguments as for `attend_math`, keys and values `[B, KV, T, D]`."""
    if view.mask is not None:
        attend = _attend_blocks if torch.compiler.is_compiling() and q.is_cpu else _attend_masked
        return attend(q, keys, values, view, spec, slopes)
    parts = []
    for row, start, stop in view.documents:
        one, length = slice(row, row + 1), stop - start
        inner = q[one, start:stop], keys[one, :, start:stop], values[one, :, start:stop]
        if spec.softcap is None and slopes is None and (view.window is None or view.window >= length):
            heads = (inner[0].transpose(1, 2), *inner[1:])  # [1, H, L, D], [1, KV, L, D] twice
            out = F.scaled_dot_product_attention(*heads, is_causal=True, scale=spec.query_scale, enable_gqa=True)
            parts.append(out.transpose(1, 2).flatten(2))  # [1, L, H * D]
        else:
            position = view.cache_position[one, start:stop]  # [1, L]
            alone = PackedView(position, view.window, packed_mask(position, view.window), ())
            parts.append(_attend_masked(*inner, alone, spec, slopes))
    return torch.cat(parts, dim=1).view(*q.shape[:2], -1)  # [B, T, H * D]


def _attend_masked(
    q: Tensor, keys: Tensor, values: Tensor, view: PackedView, spec: LayerSpec, slopes: Tensor | None
) -> Tensor:
    if spec.softcap is None:
        return attend_sdpa(q, keys, values, view, spec, slopes)
    with torch.autocast(q.device.type, enabled=False):  # written out it is float32
        return attend_math(q, keys, values, view, spec, slopes)


def _attend_blocks(
    q: Tensor, keys: Tensor, values: Tensor, view: PackedView, spec: LayerSpec, slopes: Tensor | None
) -> Tensor:
    """As `attend_math`, with products in q's dtype, and for some queries after the others: half of a square mask is
    empty, and what no query of a block sees is not computed."""
    T, H, KV = q.shape[1], q.shape[2], keys.shape[1]
    size, parts = max(_BLOCK, -(-T // _BLOCKS)), []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = 0 if view.window is None else max(0, start - view.window + 1)
        seen = view.mask[:, None, None, start:stop, first:stop]  # [B, 1, 1, t, S]
        queries = q[:, start:stop].unflatten(2, (KV, H // KV)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, KV, G * t, D]
        scores = queries @ keys[:, :, first:stop].transpose(2, 3)  # [B, KV, G * t, S]
        scores = scores.unflatten(2, (H // KV, stop - start)).float() * spec.query_scale  # [B, KV, G, t, S]
        if spec.softcap is not None:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        if slopes is not None:
            position = view.cache_position[:, None, None]  # [B, 1, 1, T]
            distance = position[..., None, first:stop] - position[..., start:stop, None]  # [B, 1, 1, t, S]
            scores = scores + slopes.view(KV, H // KV, 1, 1) * distance
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).to(values.dtype).flatten(2, 3)
        out = (weights @ values[:, :, first:stop]).unflatten(2, (H // KV, stop - start))  # [B, KV, G, t, D]
        parts.append(out.permute(0, 3, 1, 2, 4).flatten(2))  # [B, t, H * D]
    return torch.cat(parts, dim=1)


PACKED = Backend("packed", norm, add_norm, rotate_and_keep, attend_packed)
