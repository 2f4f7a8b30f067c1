"""Attention of a few new tokens over a fixed-capacity cache: `minillm::decode_attention`.

What bounds it: the live keys and values are read once and used for a handful of query rows, so it runs at
memory bandwidth. The two things to get right are reading *only* what is live (the cost follows each
row's position, never the capacity) and having enough programs in flight when batch * kv_heads is small
(the live range is split among programs; a second, tiny kernel combines). See `gpu/decode_attention.py`.
"""

import functools

import torch
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.launch import interpreting
from minillm_kernels.op import DTYPES, check_devices, op

MAX_HEAD_DIM_TRITON = 256  # it keeps whole tiles of heads in registers


def check_attention(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_position: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> None:
    """Raise ValueError unless these fit together: what both attention ops check."""
    queries, keys = q.shape, k.shape
    if len(queries) != 4 or len(keys) != 4 or keys != v.shape:
        raise ValueError(
            f"{name} wants q [B, H, T, D] and k, v [B, KV, S, D], "
            f"got q {tuple(queries)}, k {tuple(keys)}, v {tuple(v.shape)}"
        )
    if keys[0] != queries[0] or keys[3] != queries[3] or not keys[1] or queries[1] % keys[1]:
        raise ValueError(
            f"{name}: q {tuple(queries)} and k {tuple(keys)} must agree in batch and head size, "
            f"and the query heads must be a multiple of the key heads"
        )
    dtype = q.dtype
    if dtype not in DTYPES or k.dtype != dtype or v.dtype != dtype:
        raise ValueError(
            f"{name}: q, k and v must share one floating dtype of float32, bfloat16, float16, got "
            f"{dtype}, {k.dtype}, {v.dtype}"
        )
    if q.stride()[3] != 1 or k.stride()[3] != 1 or v.stride()[3] != 1:
        raise ValueError(f"{name}: the last dimension of q, k and v must be contiguous")
    largest = cpu.MAX_HEAD_DIM if q.is_cpu and not interpreting() else MAX_HEAD_DIM_TRITON
    if not 1 <= queries[3] <= largest:
        raise ValueError(f"{name}: head size {queries[3]} is not in 1 to {largest}, the largest supported")
    if window is not None and (not isinstance(window, int | torch.SymInt) or window < 1):
        raise ValueError(f"{name}: window must be a whole number of at least 1, or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap must be positive or None, got {softcap}")
    if keys[2] < 1:
        raise ValueError(f"{name}: the cache has no slots")
    if cache_position.shape != (queries[0], queries[2]) or cache_position.dtype != torch.int64:
        raise ValueError(
            f"{name}: cache_position must be [B, T] = {(queries[0], queries[2])} int64, "
            f"got {tuple(cache_position.shape)} {cache_position.dtype}"
        )
    check_devices(name, q, k, v, alibi_slopes, cache_position)
    if alibi_slopes is not None and (
        alibi_slopes.shape != (queries[1],) or alibi_slopes.dtype != torch.float32 or not alibi_slopes.is_contiguous()
    ):
        raise ValueError(
            f"{name}: alibi_slopes must be [H] = [{queries[1]}] float32, contiguous, got "
            f"{tuple(alibi_slopes.shape)} {alibi_slopes.dtype}"
        )


@op(
    check=functools.partial(check_attention, "decode_attention"),
    fake=lambda q, *_: torch.empty(q.shape, dtype=q.dtype, device=q.device),
    c=cpu.decode_attention,
    triton="minillm_kernels.gpu.decode_attention",
)
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
    """softmax(scale * q k^T) v over the positions each query token sees.

    q [B, H, T, D]; k, v [B, KV, S, D] (views are fine, D contiguous), float32, bfloat16 or float16, all alike.
    cache_position [B, T] int64: the position of each query token, -1 for padding, whose result is
    unspecified but finite. Position p lives in slot p % S and must have been written already; a token at
    position p sees p - window < key <= p. A ring (S smaller than the sequence) needs S >= window + T - 1.
    H must be a multiple of KV (grouped-query attention: H // KV consecutive query heads share a key head).
    `softcap`: scores become softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
    `alibi_slopes` [H] float32: adds slope * (key position - query position) (arXiv 2108.12409).
    Returns [B, H, T, D] in q.dtype. Each row's result depends on nothing outside that row. Any T is correct;
    the kernel is made for 1 to 16. Raises ValueError when shapes or dtypes do not fit together.
    """
    if not q.numel():
        return torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    key_position = slot_positions(cache_position, k.shape[2])[:, None, None, :]  # [B, 1, 1, S]
    query_position = cache_position[:, None, :, None]  # [B, 1, T, 1]
    visible = (key_position >= 0) & (key_position <= query_position)  # [B, 1, T, S]
    if window is not None:
        visible = visible & (key_position > query_position - window)

    keys = k.float().repeat_interleave(group, dim=1)  # [B, H, S, D]
    scores = q.float() @ keys.transpose(2, 3) * scale  # [B, H, T, S]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.float()[:, None, None] * (key_position - query_position)
    # A finite fill keeps a row that sees nothing (padding) free of NaN, unlike -inf.
    scores = torch.where(visible, scores, torch.finfo(torch.float32).min)
    # A slot nobody has written may hold NaN, and 0 * NaN is NaN: such values are dropped, not weighed by 0.
    written = (key_position >= 0).transpose(2, 3)  # [B, 1, S, 1]
    values = torch.where(written, v.float(), 0).repeat_interleave(group, dim=1)  # [B, H, S, D]
    return (scores.softmax(-1) @ values).to(q.dtype)  # [B, H, T, D]


def slot_positions(cache_position: Tensor, slots: int) -> Tensor:
    """The position each slot holds [B, S], negative where nothing has been written yet.

    `last` is the newest position of a row; a ring's slots hold the `slots` positions up to it.
    """
    last = cache_position.amax(dim=1, keepdim=True)  # [B, 1]
    slot = torch.arange(slots, device=cache_position.device)  # [S]
    return last - (last - slot) % slots
