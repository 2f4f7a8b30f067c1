"""Split-KV decode attention ("flash decoding", https://pytorch.org/blog/flash-decoding/).

    grid (B * KV, row blocks, SPLITS)        one program:

    positions   first ........ last          [ BLOCK_M query rows ]  x  [ its chunk of positions ]
    live range  |--0--|--1--|--2--|          q stays in registers, K and V tiles of BLOCK_N stream by
    split                                    -> partial result + log-sum-exp, normalised
                                             then one program per query row weighs the partials together

The query rows of one key head (tokens * group of them) share every K and V tile that is loaded.
Work is laid out by *position*, not by slot: a position's slot is position % S, so a ring buffer and a full
cache are the same code, and slots that nobody has written are never touched. The grid depends on shapes
only (a CUDA graph captures it once); each program reads its own row's positions from device memory, takes its
share, and returns at once when there is none. The combine kernel recomputes how many splits were
live, so partials that were never written are never read. No atomics, and the split of a row depends on its
own positions only: results repeat bitwise, whatever the neighbouring rows do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm_kernels.cpu import FEW_ROWS
from minillm_kernels.gpu.softmax import NEVER, NO_WINDOW, check_offsets, load_rows, scores_log2, softmax_step
from minillm_kernels.launch import choose

CHUNK = 128  # positions per program at least: below this, launching costs more than it hides
MAX_SPLITS = 64  # with one key head and one row that is 64 programs; the combine reads this many partials
MAX_PARTIALS = 128  # of a head, over all tokens: what a captured step keeps for them stays small


@triton.jit
def live_range(positions, slots, window, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """(first, end, chunk): the positions [first, end) that any of these query tokens sees, and the share of
    them, a multiple of BLOCK_N, that one split takes. Padding (-1) sees nothing. At most the `slots` positions
    that the slots hold: a position past the end of a cache that is no ring must not read past it."""
    end = tl.max(positions, 0) + 1
    earliest = tl.min(tl.where(positions < 0, end, positions), 0)
    first = tl.maximum(tl.maximum(earliest - window + 1, end - slots), 0)
    chunk = tl.cdiv(tl.cdiv(end - first, SPLITS), BLOCK_N) * BLOCK_N
    return first, end, tl.maximum(chunk, CHUNK)


@triton.jit(do_not_specialize=["slots", "window", "tokens"])
def attend_kernel(
    q, k, v, cache_position, alibi_slopes, out, partial, partial_lse,
    q_batch, q_head, q_token, k_batch, k_head, k_slot, v_batch, v_head, v_slot,
    slots, scale, softcap, window, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    kv_heads = HEADS // GROUP
    batch = (tl.program_id(0) // kv_heads).to(tl.int64)  # int64: a cache can pass 2^31 elements
    kv_head = (tl.program_id(0) % kv_heads).to(tl.int64)
    split = tl.program_id(2)

    # query row m of this key head is token m // GROUP of head m % GROUP
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < tokens * GROUP
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    position = tl.load(cache_position + batch * tokens + token, mask=row_mask, other=-1).to(tl.int32)
    first, end, chunk = live_range(position, slots, window, SPLITS, BLOCK_N, CHUNK)
    start = first + split * chunk
    stop = tl.minimum(start + chunk, end)
    if SPLITS > 1:  # noqa: SIM102 (known when compiling; the next line is not)
        if start >= stop:
            return

    q_tile = load_rows(q + batch * q_batch, head * q_head + token * q_token, 1, row_mask, D, BLOCK_D)
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head, mask=row_mask, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    biggest = tl.full([BLOCK_M], NEVER, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    wrapped = start // slots * slots  # the position of slot 0 in this turn of the ring

    for n in range(start, stop, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)  # positions
        slot = key - wrapped
        slot = tl.where(slot >= slots, slot - slots, slot)  # a live range is never longer than one turn
        key_mask = key < stop
        s = scores_log2(q_tile, load_rows(k, slot, k_slot, key_mask, D, BLOCK_D), position, key, scale, softcap, slope)
        visible = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
        s = tl.where(visible & key_mask[None, :], s, NEVER)
        v_tile = load_rows(v, slot, v_slot, key_mask, D, BLOCK_D)
        acc, biggest, total = softmax_step(s, v_tile, acc, biggest, total)

    unseen = total == 0.0  # padding, or nothing visible in this split
    result = acc / tl.where(unseen, 1.0, total)[:, None]
    column = tl.arange(0, BLOCK_D)
    result_mask = row_mask[:, None] & (column < D)[None, :]
    out_row = (batch * HEADS + head) * tokens + token  # of [B, H, T]
    if SPLITS == 1:
        tl.store(out + out_row[:, None] * D + column[None, :], result, mask=result_mask)
    else:
        partial_row = out_row * SPLITS + split
        tl.store(partial + partial_row[:, None] * D + column[None, :], result, mask=result_mask)
        lse = tl.where(unseen, NEVER, biggest + tl.log2(tl.where(unseen, 1.0, total)))
        tl.store(partial_lse + partial_row, lse, mask=row_mask)


@triton.jit(do_not_specialize=["slots", "window", "tokens"])
def combine_kernel(
    cache_position, out, partial, partial_lse, slots, window, tokens,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One query row: weigh its partial results by exp2(lse - the largest lse)."""
    out_row = tl.program_id(0).to(tl.int64)  # of [B, H, T]
    batch = out_row // (HEADS * tokens)
    head = (out_row // tokens) % HEADS
    # the same block of query rows as in attend_kernel, hence the same live range
    row = (out_row % tokens) * GROUP + head % GROUP
    block = row // BLOCK_M * BLOCK_M + tl.arange(0, BLOCK_M)
    position = tl.load(cache_position + batch * tokens + block // GROUP, mask=block < tokens * GROUP, other=-1).to(
        tl.int32
    )
    first, end, chunk = live_range(position, slots, window, SPLITS, BLOCK_N, CHUNK)
    live_splits = tl.cdiv(tl.maximum(end - first, 0), chunk)

    split = tl.arange(0, SPLITS)
    lse = tl.load(partial_lse + out_row * SPLITS + split, mask=split < live_splits, other=NEVER)
    biggest = tl.max(lse, 0)
    biggest = tl.where(biggest == NEVER, 0.0, biggest)  # a padding row: every weight is 0
    column = tl.arange(0, BLOCK_D)
    weight = tl.exp2(lse - biggest)  # [SPLITS]
    tile = tl.load(
        partial + (out_row * SPLITS + split)[:, None] * D + column[None, :],
        mask=(split < live_splits)[:, None] & (column < D)[None, :],
        other=0.0,
    )
    total = tl.sum(weight, 0)
    result = tl.sum(tile * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + out_row * D + column, result, mask=column < D)


def splits(slots: int, tokens: int) -> int:
    """How many programs share a live range; a power of two. Shapes decide, so a graph can be captured, and
    the batch size does not, so a row's bits are the same alone and in a batch."""
    if tokens > FEW_ROWS:  # they fill the GPU without splitting
        return 1
    most = min(MAX_SPLITS, MAX_PARTIALS // triton.next_power_of_2(tokens))
    return min(triton.next_power_of_2(triton.cdiv(slots, CHUNK)), most)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_position: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Launch for `minillm::decode_attention`; see there for the arguments."""
    batch, heads, tokens, head_dim = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    group = heads // kv_heads
    check_offsets(k, v)
    row = choose("decode_attention", q, size=head_dim)
    # tl.dot wants 16 rows at least
    block_m = min(max(16, triton.next_power_of_2(tokens * group)), row.blocks["BLOCK_M"])
    n_splits = splits(slots, tokens)
    constants = row.arguments() | {
        "HEADS": heads, "GROUP": group, "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)), "BLOCK_M": block_m,
        "SPLITS": n_splits, "CHUNK": CHUNK,
    }  # fmt: skip
    window = NO_WINDOW if window is None else min(window, NO_WINDOW)
    cache_position = cache_position.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    partial = partial_lse = None
    if n_splits > 1:
        partial = torch.empty(*q.shape[:3], n_splits, head_dim, dtype=torch.float32, device=q.device)
        partial_lse = torch.empty(*q.shape[:3], n_splits, dtype=torch.float32, device=q.device)
    attend_kernel[(batch * kv_heads, triton.cdiv(tokens * group, block_m), n_splits)](
        q, k, v, cache_position, alibi_slopes, out, partial, partial_lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], slots, scale, softcap, window, tokens, **constants,
    )  # fmt: skip
    if n_splits > 1:
        constants["num_warps"] = 8  # it holds a tile of SPLITS x D
        combine_kernel[(batch * heads * tokens,)](
            cache_position, out, partial, partial_lse, slots, window, tokens, **constants
        )
    return out
