"""Causal attention of many tokens over a cache (prefill): `minillm::flash_attention`.

What bounds it: arithmetic. Every key is used by T / 2 queries on average, so the matrix units are the
limit, provided that the T x T scores never go to memory: they live in registers, one tile at a time
(FlashAttention-2, arXiv 2307.08691). See `gpu/flash_attention.py`. Forward only.
"""

import torch
from torch import Tensor

from minillm_kernels.decode_attention import check_attention, decode_attention
from minillm_kernels.op import op


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_position: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
) -> None:
    check_attention("flash_attention", q, k, v, cache_position, scale, window, softcap, alibi_slopes)
    if k.shape[2] < q.shape[2]:
        raise ValueError(f"flash_attention: {q.shape[2]} tokens in one step do not fit {k.shape[2]} slots")


@op(
    check=check,
    fake=lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device),
    triton="minillm_kernels.gpu.flash_attention",
)
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
    """`decode_attention` of more than a few tokens, and no more than there are slots: what the arguments mean, the
    result and the errors are as there."""
    return decode_attention(q, k, v, cache_position, scale, window, softcap, alibi_slopes)
