"""Attention of a few new tokens over a fixed-capacity cache: `minillm::decode_attention`.

What bounds it: the live keys and values are read once and used for a handful of query rows, so it runs at
memory bandwidth. The two things to get right are reading *only* what is live (the cost follows each
row's position, never the capacity) and having enough programs in flight when batch * kv_heads is small
(the live range is split among programs; a second, tiny kernel combines). See `gpu/decode_attention.py`.
"""

import torch
from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.launch import interpreting


@torch.library.custom_op("minillm::decode_attention", mutates_args=(), device_types="cpu")
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
    check(q, k, v, cache_position, window, softcap, alibi_slopes)
    if interpreting():
        from minillm_kernels.gpu import decode_attention as triton_kernel

        return triton_kernel.launch(q, k, v, cache_position, scale, window, softcap, alibi_slopes)
    # A node of a graph has to keep the layout its fake promises.
    return decode_attention_cpu(q, k, v, cache_position, scale, window, softcap, alibi_slopes).contiguous()


def decode_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_position: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """The CPU implementation itself, for callers outside a graph: an op call costs 5 us more."""
    if q.numel() and k.stride() == v.stride() and k.stride(2) == q.shape[3] and cpu.available():
        return cpu.decode_attention(q, k, v, cache_position, scale, window, softcap, alibi_slopes)
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


@decode_attention.register_kernel("cuda")
def decode_attention_cuda(q, k, v, cache_position, scale, window=None, softcap=None, alibi_slopes=None):
    from minillm_kernels.gpu import decode_attention as triton_kernel

    check(q, k, v, cache_position, window, softcap, alibi_slopes)
    with torch.cuda.device(q.device):
        return triton_kernel.launch(q, k, v, cache_position, scale, window, softcap, alibi_slopes)


@decode_attention.register_fake
def _(q, k, v, cache_position, scale, window=None, softcap=None, alibi_slopes=None):
    check(q, k, v, cache_position, window, softcap, alibi_slopes)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def slot_positions(cache_position: Tensor, slots: int) -> Tensor:
    """The position each slot holds [B, S], negative where nothing has been written yet.

    `last` is the newest position of a row; a ring's slots hold the `slots` positions up to it.
    """
    last = cache_position.amax(dim=1, keepdim=True)  # [B, 1]
    slot = torch.arange(slots, device=cache_position.device)  # [S]
    return last - (last - slot) % slots


def check(q, k, v, cache_position, window, softcap, alibi_slopes) -> None:
    check_attention("decode_attention", q, k, v, window, softcap, alibi_slopes)
    if cache_position.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"decode_attention: cache_position must be [B, T] = {(q.shape[0], q.shape[2])}, "
            f"got {tuple(cache_position.shape)}"
        )


def check_attention(name: str, q, k, v, window, softcap, alibi_slopes) -> None:
    """Raise ValueError unless the arguments fit together; looks at shapes, dtypes and strides only."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            f"{name} wants q [B, H, T, D] and k, v [B, KV, S, D], "
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    batch, heads, _, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim or heads % k.shape[1] != 0:
        raise ValueError(
            f"{name}: q {tuple(q.shape)} and k {tuple(k.shape)} must agree in batch and head size, "
            f"and the query heads must be a multiple of the key heads"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"{name}: q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1:
        raise ValueError(f"{name}: the last dimension of q, k and v must be contiguous")
    if head_dim > 256:
        raise ValueError(f"{name}: head size {head_dim} is over the largest supported, 256")
    if window is not None and window < 1:
        raise ValueError(f"{name}: window must be at least 1 or None, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap must be positive or None, got {softcap}")
    if alibi_slopes is not None and alibi_slopes.shape != (heads,):
        raise ValueError(f"{name}: alibi_slopes must be [H] = [{heads}], got {tuple(alibi_slopes.shape)}")
