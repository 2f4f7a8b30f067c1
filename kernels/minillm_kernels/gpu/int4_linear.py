"""Activations against a group-wise int4 weight matrix that is read once: int4_linear, gated_mlp on int4.

The three regimes of `gpu/int8_linear.py`. A tile has three dimensions, because scales come per group of inputs:

    [BLOCK_N rows, GROUPS groups of a row, GROUP / 2 bytes of a group]

A byte holds inputs i and i + GROUP / 2 of its group (planar packing), so its low halves meet one contiguous
stretch of x, its high halves the next, and the scale, loaded as [BLOCK_N, GROUPS, 1], is broadcast over a
group's bytes: no gather per element. The limit to watch is instructions, not bytes: at copy bandwidth an
H200 multiprocessor receives 33 weights per clock and has 128 lanes to spend on them, 3.9 instructions each.
Subtracting the zero point from the code as an integer, before the conversion, was the cheapest way found
to unpack without inline assembly (6.7 per weight on sm_90; see kernels/LOG.md).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minillm_kernels.gpu.int8_linear import FEW_ROWS, activate, blocks
from minillm_kernels.gpu.softmax import INTERPRETED


@triton.jit
def load_tile(packed, scale, zero, rows, row, group, inside, K: tl.constexpr, GROUP: tl.constexpr):
    """(low, high, scale): codes minus zero point as float32 [N, GROUPS, GROUP / 2], scale [N, GROUPS, 1].

    row [N, 1, 1] and group [1, GROUPS, 1] are indices, inside [N, GROUPS, 1]; `rows` is the rows of the matrix.
    """
    element = tl.arange(0, GROUP // 2)[None, None, :]
    pointer = packed + row.to(tl.int64) * (K // 2) + group * (GROUP // 2) + element
    codes = tl.load(pointer, mask=inside, other=0, eviction_policy="evict_first")
    s = tl.load(scale + group * rows + row, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(zero + group * rows + row, mask=inside, other=0).to(tl.int32)
    # integers are subtracted as int32 but masked as uint8: the other order costs 1.6 instructions more per weight
    low = (codes & 15).to(tl.int32) - z
    high = (codes >> 4).to(tl.int32) - z
    return low.to(tl.float32), high.to(tl.float32), s


@triton.jit
def int4_gemv_kernel(
    x, packed, scale, zero, bias, out, N, rows,
    K: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every program takes rows n and n + N, gated or not: converting x once for two rows saves a tenth of the
    instructions. Gated they are gate and up, otherwise the two halves of the matrix (N is rows / 2, rounded up)."""
    first = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first[:, None, None]
    step = tl.arange(0, GROUPS)[None, :, None]
    # x is loaded through pointers of the tile's shape, as in gpu/int8_linear.py
    element = tl.arange(0, GROUP // 2)[None, None, :] + tl.zeros([BLOCK_N, 1, 1], tl.int32)
    acc = tl.zeros([BLOCK_N, GROUPS, GROUP // 2], tl.float32)
    acc_up = tl.zeros([BLOCK_N, GROUPS, GROUP // 2], tl.float32)
    for g in tl.range(0, K // GROUP, GROUPS, num_stages=STAGES):
        group = g + step
        pointer = x + group * GROUP + element
        seen = group + element * 0 < K // GROUP
        a = tl.load(pointer, mask=seen, other=0.0, eviction_policy="evict_last").to(tl.float32)
        b = tl.load(pointer + GROUP // 2, mask=seen, other=0.0, eviction_policy="evict_last").to(tl.float32)
        seen_group = group < K // GROUP
        low, high, s = load_tile(packed, scale, zero, rows, row, group, seen_group & (row < N), K, GROUP)
        acc += s * (low * a + high * b)
        low, high, s = load_tile(packed, scale, zero, rows, row + N, group, seen_group & (row + N < rows), K, GROUP)
        acc_up += s * (low * a + high * b)

    y = tl.sum(tl.sum(acc, 2), 1)
    up = tl.sum(tl.sum(acc_up, 2), 1)
    if ACTIVATION is not None:
        tl.store(out + first, activate(y, ACTIVATION) * up, mask=first < N)
    else:
        second = first + N
        if bias is not None:
            y += tl.load(bias + first, mask=first < N, other=0.0).to(tl.float32)
            up += tl.load(bias + second, mask=second < rows, other=0.0).to(tl.float32)
        tl.store(out + first, y, mask=first < N)
        tl.store(out + second, up, mask=(first < N) & (second < rows))


@triton.jit
def product_step(acc, a, b, low, high, s, BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    """acc [BLOCK_N, M] += weights (low | high) * s [BLOCK_N, HALVES each] times (a | b) [HALVES, M] each.
    The scaled weight is rounded to x's dtype for the tensor core, as it is in the many-rows regime."""
    acc = tl.dot(tl.reshape(low * s, [BLOCK_N, HALVES]).to(a.dtype), a, acc, input_precision="ieee")
    return tl.dot(tl.reshape(high * s, [BLOCK_N, HALVES]).to(a.dtype), b, acc, input_precision="ieee")


@triton.jit
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
    packed, scale, zero, out, rows,
    K: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None, None]
    group = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    element = tl.arange(0, GROUP // 2)[None, None, :]
    inside = (row < rows) & (group < K // GROUP)
    low, high, s = load_tile(packed, scale, zero, rows, row, group, inside, K, GROUP)
    pointer = out + row.to(tl.int64) * K + group * GROUP + element
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

    With an activation (at most FEW_ROWS rows) the weight is [2N, K], gate rows first, and the result
    activation(gate) * up.
    """
    K, rows = x.shape[-1], packed.shape[0]
    N = rows // (1 if activation is None else 2)
    flat = x.reshape(-1, K).contiguous()  # [M, K]
    packed = packed.contiguous()
    M = flat.shape[0]
    if M > FEW_ROWS:
        return F.linear(x, dequantize(packed, scale, zero, group_size, x.dtype), bias)
    out = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    weight = (packed, scale, zero, bias)
    if M == 1:
        arguments, half = blocks_of_groups("int4_gemv", x, N, group_size), triton.cdiv(rows, 2)
        int4_gemv_kernel[(triton.cdiv(half, arguments["BLOCK_N"]),)](
            flat, *weight, out, half, rows,
            K=K, GROUP=group_size, ACTIVATION=activation, STAGES=arguments["num_stages"], **arguments,
        )  # fmt: skip
    elif M > 1:
        arguments = blocks_of_groups("int4_few_rows", x, N, group_size, activation)
        int4_few_rows_kernel[(triton.cdiv(N, arguments["BLOCK_N"]),)](
            flat, *weight, out, M, N, rows,
            K=K, GROUP=group_size, ACTIVATION=activation, BLOCK_M=FEW_ROWS, **arguments,
        )  # fmt: skip
    return out


def blocks_of_groups(kernel: str, x: Tensor, size: int, group_size: int, activation: str | None = None) -> dict:
    """The launch row's arguments, with BLOCK_K, counted in inputs, turned into GROUPS."""
    arguments = blocks(kernel, x, size, activation)
    return arguments | {"GROUPS": max(1, arguments.pop("BLOCK_K") // group_size)}


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """(code - zero) * scale [N, K] in `dtype`."""
    rows, K = packed.shape[0], packed.shape[1] * 2
    out = torch.empty(rows, K, dtype=dtype, device=packed.device)
    arguments = blocks_of_groups("dequantize", out, K, group_size)
    grid = (triton.cdiv(rows, arguments["BLOCK_N"]), triton.cdiv(K, arguments["GROUPS"] * group_size))
    int4_dequantize_kernel[grid](packed, scale, zero, out, rows, K=K, GROUP=group_size, **arguments)
    return out
