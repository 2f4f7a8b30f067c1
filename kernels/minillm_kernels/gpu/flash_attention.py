"""Causal flash attention, forward (FlashAttention-2, arXiv 2307.08691).

    grid (query blocks, H, B); one program holds BLOCK_M query rows and walks the keys in tiles of BLOCK_N:

                 keys  ->
    queries   . / / # # # \\                    .  outside the window: never loaded
              . . / / # # # \\                  /  left edge of the window: masked
              . . . / / # # # \\                #  visible to every row of the block: no mask at all
                                                \\  diagonal: masked

The last query blocks have the most keys, so they are started first: the short ones fill the gaps at the
end. The three stretches are three loops over one function, so that the middle one, where nearly all of
the time goes, compiles without compares and selects.

The keys lie in a cache: the queries begin at a position that is read from the device, and a key lies in the slot of
its position, modulo the slots. The decode kernel would do it too, but compares every score.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm_kernels.gpu.softmax import NEVER, NO_WINDOW, check_offsets, load_rows, scores_log2, softmax_step
from minillm_kernels.launch import choose


@triton.jit
def attend_stretch(
    acc, biggest, total, q_tile, k, v, k_token, v_token, low, high,
    query, end, slots, wrapped, window, scale, softcap, slope,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold the keys [low, high), low a multiple of BLOCK_N, into the running softmax of the block. There are none
    from `end` on."""
    for n in range(low, high, BLOCK_N):
        key = n + tl.arange(0, BLOCK_N)
        slot = key - wrapped
        # A key before the first that is seen, only there to fill the tile, may read any slot.
        slot = tl.maximum(tl.where(slot >= slots, slot - slots, slot), 0)
        k_tile = load_rows(k, slot, k_token, key < end, D, BLOCK_D)
        s = scores_log2(q_tile, k_tile, query, key, scale, softcap, slope)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            seen = (key[None, :] <= query[:, None]) & (key[None, :] > query[:, None] - window)
            s = tl.where(seen, s, NEVER)
        v_tile = load_rows(v, slot, v_token, key < end, D, BLOCK_D)
        acc, biggest, total = softmax_step(s, v_tile, acc, biggest, total)
    return acc, biggest, total


@triton.jit(do_not_specialize=["tokens", "slots", "window"])
def flash_attention_kernel(
    q, k, v, cache_position, alibi_slopes, out,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    tokens, slots, scale, softcap, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # longest first
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    token = first + tl.arange(0, BLOCK_M)
    row_mask = token < tokens
    q_tile = load_rows(q + batch * q_batch + head * q_head, token, q_token, row_mask, D, BLOCK_D)
    # From here on everything counts in positions.
    query = tl.load(cache_position + batch * tokens + token, mask=row_mask, other=-1).to(tl.int32)
    last = tl.max(query, 0)  # -1 where all is padding: no key is read
    first = tl.min(tl.where(query < 0, last + 1, query), 0)
    end = last + 1
    k += batch * k_batch + head // GROUP * k_head
    v += batch * v_batch + head // GROUP * v_head
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head) + tl.zeros([BLOCK_M], tl.float32)

    # The first key that the first, and that the last row of the block sees; in between lies the left edge.
    low = tl.maximum(0, first - window + 1)
    full = tl.maximum(0, last - window + 1)  # from here on every row sees every key ...
    diagonal = first + 1  # ... up to here
    wrapped = low // slots * slots  # the position of slot 0 in this turn of the ring; keys span one turn at most
    low = low // BLOCK_N * BLOCK_N
    diagonal = tl.maximum(diagonal // BLOCK_N * BLOCK_N, low)
    full = tl.minimum(tl.maximum(tl.cdiv(full, BLOCK_N) * BLOCK_N, low), diagonal)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    biggest = tl.full([BLOCK_M], NEVER, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc, biggest, total = attend_stretch(
        acc, biggest, total, q_tile, k, v, k_token, v_token, low, full,
        query, end, slots, wrapped, window, scale, softcap, slope, True, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc, biggest, total = attend_stretch(
        acc, biggest, total, q_tile, k, v, k_token, v_token, full, diagonal,
        query, end, slots, wrapped, window, scale, softcap, slope, False, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    acc, biggest, total = attend_stretch(
        acc, biggest, total, q_tile, k, v, k_token, v_token, diagonal, end,
        query, end, slots, wrapped, window, scale, softcap, slope, True, D, BLOCK_D, BLOCK_N,
    )  # fmt: skip

    column = tl.arange(0, BLOCK_D)
    target = out + ((batch * HEADS + head) * tokens + token)[:, None] * D + column[None, :]
    total = tl.where(total == 0.0, 1.0, total)  # past the end, or padding: every other row has seen itself
    tl.store(target, acc / total[:, None], mask=row_mask[:, None] & (column < D)[None, :])


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_position: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Launch for `minillm::flash_attention`; see there for the arguments."""
    batch, heads, tokens, head_dim = q.shape
    check_offsets(q, k, v)
    row = choose("flash_attention", q, size=head_dim)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    flash_attention_kernel[(triton.cdiv(tokens, row.blocks["BLOCK_M"]), heads, batch)](
        q, k, v, cache_position.contiguous(), alibi_slopes, out, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        tokens, k.shape[2], scale, softcap, NO_WINDOW if window is None else min(window, NO_WINDOW),
        HEADS=heads, GROUP=heads // k.shape[1], D=head_dim,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), **row.arguments(),
    )  # fmt: skip
    return out
