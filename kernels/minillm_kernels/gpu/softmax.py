"""The pieces both attention kernels are made of: scores, visibility, and softmax in one pass.

Scores are kept in units of log 2, because the hardware has exp2 and not exp: exp(s) = exp2(s * log2(e)).
The one-pass ("online") softmax is Milakov & Gimelshein, arXiv 1805.02867; its use for attention is
FlashAttention, arXiv 2205.14135.
"""

import os

import triton
import triton.language as tl
from torch import Tensor

# Triton's interpreter silently gets bfloat16 dot products and arithmetic wrong. Kernels widen to float32
# right after a load when it runs; on a GPU the branch is not even compiled.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(float("-inf"))
NO_WINDOW = 2**31 - 1  # larger than any position: with it, position - window never masks anything


def check_offsets(*tensors: Tensor) -> None:
    """Raise ValueError when a row of [.., .., rows, D] is too far away for `load_rows`, which counts in int32."""
    for tensor in tensors:
        if tensor.shape[2] * tensor.stride(2) >= 2**31:
            raise ValueError(f"rows {tensor.stride(2)} elements apart: {tensor.shape[2]} of them pass 2^31 elements")


@triton.jit
def load_rows(pointer, rows, row_stride, row_mask, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[len(rows), BLOCK_D] of a matrix with contiguous rows of D; masked rows and columns read as 0."""
    column = tl.arange(0, BLOCK_D)
    tile = tl.load(
        pointer + rows[:, None] * row_stride + column[None, :],
        mask=row_mask[:, None] & (column[None, :] < D),
        other=0.0,
    )
    if INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def scores_log2(q, k, query_position, key_position, scale, softcap, slope):
    """q [M, BLOCK_D] against k [N, BLOCK_D] -> scores [M, N] in units of log 2, nothing masked yet.

    `softcap` and `slope` [M] are None when the model has none; the positions are read for ALiBi only.
    """
    # "ieee": float32 inputs must not be rounded to tf32 on the way into the tensor core.
    s = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
    if softcap is None and slope is None:
        return s * (scale * LOG2E)
    s = s * scale
    if softcap is not None:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), and stays right when the exponential overflows or vanishes
        s = softcap * (1.0 - 2.0 / (tl.exp2(s * (2.0 * LOG2E / softcap)) + 1.0))
    if slope is not None:
        s += slope[:, None] * (key_position[None, :] - query_position[:, None]).to(tl.float32)
    return s * LOG2E


@triton.jit
def softmax_step(s, v, acc, biggest, total):
    """Fold scores s [M, N] (masked ones -inf) and values v [N, BLOCK_D] into the running result.

    acc [M, BLOCK_D] is the sum of exp2(score - biggest) * value so far, total [M] the sum of the weights.
    A row that has seen nothing yet has biggest = -inf; its exponents are taken against 0 so that they
    come out as exp2(-inf) = 0 rather than NaN.
    """
    new_biggest = tl.maximum(biggest, tl.max(s, 1))
    anchor = tl.where(new_biggest == NEVER, 0.0, new_biggest)
    shrink = tl.exp2(biggest - anchor)
    p = tl.exp2(s - anchor[:, None])  # [M, N]
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, new_biggest, total
