"""Causal attention over whole sequences (prefill, packed training batches): `minillm::flash_attention`.

What bounds it: arithmetic. Every key is used by T / 2 queries on average, so the matrix units are the
limit, provided that the T x T scores never go to memory: they live in registers, one tile at a time
(FlashAttention-2, arXiv 2307.08691). See `gpu/flash_attention.py`. Forward only.
"""

import torch
from torch import Tensor

from minillm_kernels.decode_attention import check_attention
from minillm_kernels.launch import interpreting


@torch.library.custom_op("minillm::flash_attention", mutates_args=(), device_types="cpu")
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k^T) v, where token t sees t - window < key <= t of its own sequence.

    q [B, H, T, D]; k, v [B, KV, T, D] (views are fine, D contiguous), all float32, bfloat16 or float16; H a
    multiple of KV. Without `cu_seqlens` each row of the batch is one sequence that starts at its token 0.
    With it B must be 1 and sequences lie end to end along T: sequence i is [cu_seqlens[i], cu_seqlens[i + 1]),
    int32 or int64 [N + 1], the first 0, the last T ("packing", arXiv 2407.09105).
    `softcap` and `alibi_slopes` as for `decode_attention`. Returns [B, H, T, D] in q.dtype.
    Raises ValueError when shapes or dtypes do not fit together.
    """
    check(q, k, v, window, softcap, alibi_slopes, cu_seqlens)
    starts = sequence_starts(cu_seqlens, q.shape[2])
    if interpreting():
        from minillm_kernels.gpu import flash_attention as triton_kernel

        return triton_kernel.launch(q, k, v, scale, window, softcap, alibi_slopes, starts)
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    token = torch.arange(tokens)
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


@flash_attention.register_kernel("cuda")
def flash_attention_cuda(q, k, v, scale, window=None, softcap=None, alibi_slopes=None, cu_seqlens=None):
    from minillm_kernels.gpu import flash_attention as triton_kernel

    check(q, k, v, window, softcap, alibi_slopes, cu_seqlens)
    with torch.cuda.device(q.device):
        starts = sequence_starts(cu_seqlens, q.shape[2])
        return triton_kernel.launch(q, k, v, scale, window, softcap, alibi_slopes, starts)


@flash_attention.register_fake
def _(q, k, v, scale, window=None, softcap=None, alibi_slopes=None, cu_seqlens=None):
    check(q, k, v, window, softcap, alibi_slopes, cu_seqlens)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def sequence_starts(cu_seqlens: Tensor | None, tokens: int) -> Tensor | None:
    """For every token the index at which its sequence starts [T] int32, without asking the device how many."""
    if cu_seqlens is None:
        return None
    token = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return cu_seqlens.index_select(0, torch.searchsorted(cu_seqlens, token, right=True) - 1).to(torch.int32)


def check(q, k, v, window, softcap, alibi_slopes, cu_seqlens) -> None:
    check_attention("flash_attention", q, k, v, window, softcap, alibi_slopes)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"flash_attention: q and k must have as many tokens, got {q.shape[2]}, {k.shape[2]}")
    if cu_seqlens is not None and (q.shape[0] != 1 or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point()):
        raise ValueError(
            f"flash_attention: cu_seqlens must be one dimension of int32 or int64, for a batch of 1, got "
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)} for a batch of {q.shape[0]}"
        )
