"""Activations against a group-wise int4 weight matrix that is read once: int4_linear, gated_mlp on int4.

The three regimes of `gpu/int8_linear.py`. Scales come per group of inputs, and a byte holds inputs i and i + GROUP / 2
of its group (planar packing): its low halves meet one contiguous stretch of x, its high halves the next.

The limit to watch is instructions, not bytes: at copy bandwidth an H200 multiprocessor receives 33 weights per clock
and has 128 lanes to spend on them, 3.9 instructions each. So for one row of x the tile is

    [GROUPS groups of a row, GROUP / 32 threads a group, 16 bytes a thread]

a thread adds up its 32 products before the scale comes, and the zero point is settled with the sum of its 32 inputs:
w = (q - z) s, so sum(w x) = s (sum(q x) - z sum(x)). Four rows of the weight share every piece of x. What `unpack`
returns is 128 + q, which the same subtraction settles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm_kernels.gpu.int8_linear import FUSED_ROWS, activate, blocks, columns, multiply_pieces, quarters, store_four
from minillm_kernels.gpu.softmax import INTERPRETED
from minillm_kernels.gpu.unpack import dot_plus_128, halves_plus_128
from minillm_kernels.launch import choose


@triton.jit
def load_tile(packed, scale, zero, rows, row, group, inside, K: tl.constexpr, GROUP: tl.constexpr):
    """(low, high, scale): codes minus zero point as float32 [N, GROUPS, GROUP / 2], scale [N, GROUPS, 1].

    row [N, 1, 1] and group [1, GROUPS, 1] are indices, inside [N, GROUPS, 1]; `rows` is the rows of the matrix.
    """
    element = tl.arange(0, GROUP // 2)[None, None, :]
    pointer = packed + row.to(tl.int64) * (K // 2) + group * (GROUP // 2) + element
    codes = tl.load(pointer, mask=inside, other=0, eviction_policy="evict_first")
    s = tl.load(scale + group * rows + row, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(zero + group * rows + row, mask=inside, other=0).to(tl.float32) + 128.0
    low, high = halves_plus_128(codes)
    return low - z, high - z, s


@triton.jit
def int4_row(
    packed, scale, zero, acc, a, b, sums, row, limit, rows, group, byte,
    K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """acc [GROUPS, GROUP / 32] + what every thread's 32 inputs contribute to the output of one row of the weight; there
    are none from row `limit` on.

    group [GROUPS, GROUP / 32], byte [GROUPS, GROUP / 32, 16]: where its codes lie in the row; a, b: the inputs of their
    low and high halves, `sums` what these add up to.
    """
    codes = tl.load(
        packed + row.to(tl.int64) * (K // 2) + byte,
        mask=(byte < K // 2) & (row + 0 * byte < limit), other=0, eviction_policy="evict_first",
    )  # fmt: skip
    inside = (group < K // GROUP) & (row + 0 * group < limit)
    s = tl.load(scale + group * rows + row, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(zero + group * rows + row, mask=inside, other=0).to(tl.float32) + 128.0
    return acc + s * (tl.sum(dot_plus_128(codes, a, b), 2) - z * sums)


@triton.jit
def int4_gemv_kernel(
    x, packed, scale, zero, bias, out, quarter, half, rows,
    K: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    first_half = tl.minimum(half, rows)
    # Every index has the tile's full shape: one of another shape has another layout, and a barrier to change it.
    thread = tl.arange(0, GROUP // 32)[None, :] + tl.zeros([GROUPS, 1], tl.int32)  # of a group
    element = tl.arange(0, 16)[None, None, :]
    acc0 = tl.zeros([GROUPS, GROUP // 32], tl.float32)
    acc1 = tl.zeros([GROUPS, GROUP // 32], tl.float32)
    acc2 = tl.zeros([GROUPS, GROUP // 32], tl.float32)
    acc3 = tl.zeros([GROUPS, GROUP // 32], tl.float32)
    for g in range(0, K // GROUP, GROUPS):
        group = g + tl.arange(0, GROUPS)[:, None] + 0 * thread
        byte = (group * (GROUP // 2) + thread * 16)[:, :, None] + element
        low_input = (group * GROUP + thread * 16)[:, :, None] + element
        seen = byte < K // 2
        a = tl.load(x + low_input, mask=seen, other=0.0, eviction_policy="evict_last").to(tl.float32)
        b = tl.load(x + low_input + GROUP // 2, mask=seen, other=0.0, eviction_policy="evict_last").to(tl.float32)
        sums = tl.sum(a + b, 2)
        last = half + n + quarter
        acc0 = int4_row(packed, scale, zero, acc0, a, b, sums, n, first_half, rows, group, byte, K, GROUP)
        acc1 = int4_row(packed, scale, zero, acc1, a, b, sums, n + quarter, first_half, rows, group, byte, K, GROUP)
        acc2 = int4_row(packed, scale, zero, acc2, a, b, sums, half + n, rows, rows, group, byte, K, GROUP)
        acc3 = int4_row(packed, scale, zero, acc3, a, b, sums, last, rows, rows, group, byte, K, GROUP)
    y0, y1 = tl.sum(tl.sum(acc0, 1), 0), tl.sum(tl.sum(acc1, 1), 0)
    y2, y3 = tl.sum(tl.sum(acc2, 1), 0), tl.sum(tl.sum(acc3, 1), 0)
    store_four(out, bias, y0, y1, y2, y3, n, quarter, half, rows, ACTIVATION)


@triton.jit
def product_step(acc, a, b, low, high, s, BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    """acc [BLOCK_N, M] += weights (low | high) * s [BLOCK_N, HALVES each] times (a | b) [HALVES, M] each.
    The scaled weight is rounded to x's dtype for the tensor core, as it is in the many-rows regime."""
    acc = tl.dot(tl.reshape(low * s, [BLOCK_N, HALVES]).to(a.dtype), a, acc, input_precision="ieee")
    return tl.dot(tl.reshape(high * s, [BLOCK_N, HALVES]).to(a.dtype), b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["M"])
def int4_few_rows_kernel(
    x, packed, scale, zero, bias, out, M, N, rows,
    K: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = GROUPS * GROUP // 2
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
    step = tl.arange(0, GROUPS)[None, :, None]
    m = tl.arange(0, BLOCK_M)[None, :]
    half = tl.arange(0, HALVES)[:, None]  # byte index in the tile: its low input, and where in x that lies
    low_input = half // (GROUP // 2) * GROUP + half % (GROUP // 2)
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for g in range(0, K // GROUP, GROUPS):
        pointer = x + m * K + g * GROUP + low_input  # [HALVES, BLOCK_M]
        seen = (g * GROUP + low_input < K) & (m < M)
        a = tl.load(pointer, mask=seen, other=0.0, eviction_policy="evict_last")
        b = tl.load(pointer + GROUP // 2, mask=seen, other=0.0, eviction_policy="evict_last")
        if INTERPRETED:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        group = g + step
        inside = (group < K // GROUP) & (row < N)
        low, high, s = load_tile(packed, scale, zero, rows, row, group, inside, K, GROUP)
        gate = product_step(gate, a, b, low, high, s, BLOCK_N, HALVES)
        if ACTIVATION is not None:
            low, high, s = load_tile(packed, scale, zero, rows, row + N, group, inside, K, GROUP)
            up = product_step(up, a, b, low, high, s, BLOCK_N, HALVES)

    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if bias is not None:
        gate += tl.load(bias + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        gate = activate(gate, ACTIVATION) * up
    tl.store(out + m * N + row[:, None], gate, mask=(row < N)[:, None] & (m < M))


@triton.jit
def int4_dequantize_kernel(
    packed, scale, zero, out, first, end, rows,
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = (first + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    element = tl.arange(0, GROUP // 2)[None, None, :]
    inside = (row < end) & (group < K // GROUP)
    low, high, s = load_tile(packed, scale, zero, rows, row, group, inside, K, GROUP)
    pointer = out + (row - first).to(tl.int64) * K + group * GROUP + element
    tl.store(pointer, low * s, mask=inside)
    tl.store(pointer + GROUP // 2, high * s, mask=inside)


def int4_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Launch for `minillm::int4_linear`; see there for the arguments.

    With an activation (at most FUSED_ROWS of x's dtype) the weight is [2N, K], gate rows first, and the result
    activation(gate) * up.
    """
    K, rows = x.shape[-1], packed.shape[0]
    N = rows // (1 if activation is None else 2)
    flat = x.reshape(-1, K).contiguous()  # [M, K]
    packed, scale, zero = packed.contiguous(), scale.contiguous(), zero.contiguous()
    M = flat.shape[0]
    out = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    weight = (packed, scale, zero, bias)
    if FUSED_ROWS[x.dtype] < M:

        def fill(a: int, b: int, piece: Tensor) -> None:
            dequantize(packed, scale, zero, group_size, a, b, piece)

        multiply_pieces(flat, fill, bias, out.view(M, N))
    elif M == 1:
        quarter, half = quarters(rows, activation)
        arguments = in_groups(choose("int4_gemv", x, K).arguments(), group_size)
        int4_gemv_kernel[(quarter,)](
            flat, *weight, out, quarter, half, rows, K=K, GROUP=group_size, ACTIVATION=activation, **arguments
        )
    elif M > 1:
        arguments = in_groups(blocks("int4_few_rows", x, N, activation), group_size)
        int4_few_rows_kernel[(triton.cdiv(N, arguments["BLOCK_N"]),)](
            flat, *weight, out, M, N, rows,
            K=K, GROUP=group_size, ACTIVATION=activation, BLOCK_M=columns(M), **arguments,
        )  # fmt: skip
    return out


def in_groups(arguments: dict, group_size: int) -> dict:
    """A launch row's arguments with BLOCK_K, counted in inputs, turned into GROUPS."""
    return arguments | {"GROUPS": max(1, arguments.pop("BLOCK_K") // group_size)}


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, first: int, end: int, out: Tensor) -> None:
    """out [end - first, K] = (code - zero) * scale of the weight's rows first .. end - 1."""
    rows, K = packed.shape[0], packed.shape[1] * 2
    arguments = in_groups(choose("dequantize", out, size=K).arguments(), group_size)
    grid = (triton.cdiv(end - first, arguments["BLOCK_N"]), triton.cdiv(K, arguments["GROUPS"] * group_size))
    int4_dequantize_kernel[grid](packed, scale, zero, out, first, end, rows, K=K, GROUP=group_size, **arguments)
