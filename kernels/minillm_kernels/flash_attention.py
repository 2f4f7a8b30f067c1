"""Causal attention over whole sequences (prefill, packed training batches): `minillm::flash_attention`.

What bounds it: arithmetic. Every key is used by T / 2 queries on average, so the matrix units are the
limit, provided that the T x T scores never go to memory: they live in registers, one tile at a time
(FlashAttention-2, arXiv 2307.08691). See `gpu/flash_attention.py`. Forward only.
"""

import itertools

import torch
from torch import Tensor

from minillm_kernels.decode_attention import check_attention, decode_attention
from minillm_kernels.op import op


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache_position: Tensor | None = None,
) -> None:
    check_attention(
        "flash_attention",
        q,
        k,
        v,
        window,
        softcap,
        alibi_slopes,
        cu_seqlens if cache_position is None else cache_position,
    )
    if cache_position is not None:
        if cu_seqlens is not None:
            raise ValueError("flash_attention: cu_seqlens and cache_position exclude each other: packed, or in a cache")
        if cache_position.shape != (q.shape[0], q.shape[2]) or cache_position.dtype != torch.int64:
            raise ValueError(
                f"flash_attention: cache_position must be [B, T] = {(q.shape[0], q.shape[2])} int64, "
                f"got {tuple(cache_position.shape)} {cache_position.dtype}"
            )
        if k.shape[2] < q.shape[2]:
            raise ValueError(f"flash_attention: {q.shape[2]} tokens in one step do not fit {k.shape[2]} slots")
        return
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"flash_attention: q and k must have as many tokens, got {q.shape[2]}, {k.shape[2]}")
    if cu_seqlens is None:
        return
    if q.shape[0] != 1 or cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"flash_attention: cu_seqlens must be one dimension of int32 or int64, for a batch of 1, got "
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)} for a batch of {q.shape[0]}"
        )
    if cu_seqlens.shape[0] < 2:
        raise ValueError("flash_attention: cu_seqlens must hold the start of the first sequence and all ends")


@op(
    check=check,
    fake=lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device),
    triton="minillm_kernels.gpu.flash_attention",
)
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cache_position: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v, where token t sees t - window < key <= t of its own sequence.

    q [B, H, T, D]; k, v [B, KV, T, D] (views are fine, D contiguous), all float32, bfloat16 or float16; H a
    multiple of KV. Without `cu_seqlens` each row of the batch is one sequence that starts at its token 0.
    With it B must be 1 and sequences lie end to end along T: sequence i is [cu_seqlens[i], cu_seqlens[i + 1]),
    int32 or int64 [N + 1], the first 0, the last T ("packing", arXiv 2407.09105).
    With `cache_position` [B, T] int64 k and v [B, KV, S, D] are a cache that these tokens' keys lie in already,
    and all is as for `decode_attention`: position p in slot p % S, -1 for padding, whose result is any number.
    `softcap` and `alibi_slopes` as for `decode_attention`. Returns [B, H, T, D] in q.dtype.
    Raises ValueError when shapes or dtypes do not fit together.
    """
    if cache_position is not None:
        return decode_attention(q, k, v, cache_position, scale, window, softcap, alibi_slopes)
    starts = sequence_starts(cu_seqlens, q.shape[2])
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    token = torch.arange(tokens, device=q.device)
    distance = token[:, None] - token[None, :]  # [T, T], query - key
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    if starts is not None:
        visible = visible & (starts[:, None] == starts[None, :])

    keys = k.float().repeat_interleave(group, dim=1)  # [B, H, T, D]
    scores = q.float() @ keys.transpose(2, 3) * scale  # [B, H, T, T]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.float()[:, None, None] * distance
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)  # every token sees itself
    return (weights @ v.float().repeat_interleave(group, dim=1)).to(q.dtype)  # [B, H, T, D]


def sequence_starts(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """For every token the index at which its sequence starts [T] int32, without asking a GPU how many.

    Raises ValueError on a CPU when the ends are not in order from 0 to T; a GPU would have to be waited for.
    """
    if cu_seqlens is None:
        return None
    if cu_seqlens.is_cpu:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != tokens or any(end < start for start, end in itertools.pairwise(ends)):
            raise ValueError(f"flash_attention: cu_seqlens must ascend from 0 to {tokens}, the tokens, got {ends}")
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens.contiguous(), token, right=True) - 1
    return cu_seqlens.index_select(0, sequence.clamp(min=0)).to(torch.int32)
