"""Activations against an int8 weight matrix that is read once: int8_linear, and gated_mlp on int8.

Three regimes, by the number of rows M of x:

    M = 1        gemv       one program = four rows of the weight, far apart, which share every piece of x: converting
                            x costs as much as converting a weight. Multiply-add into float32, one reduction after
                            the loop: no tensor core, no atomics.   bound by: reading the weight
    M = 2..64    few rows   tl.dot with the weight as the tall operand [BLOCK_N, BLOCK_K] and x padded to 16, 32 or 64
                            columns. The weight never goes to memory in x's dtype.   bound by: reading the weight
    M > 64       many rows  write a piece of the weight out in x's dtype, small enough to stay in the L2 cache,
                            multiply it through the library, next.   bound by: arithmetic

By count of bytes from memory the third reads one per weight, where bfloat16 reads two.

The first two compute one product or a gated pair: then half of the weight's rows are gate, half are up, and the
activation is applied before anything is stored.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm_kernels.gpu.softmax import INTERPRETED, LOG2E
from minillm_kernels.gpu.unpack import int8_to_float
from minillm_kernels.launch import choose

FUSED_ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}  # of x, at most; float32: no tensor cores
PIECE = 1 << 24  # weights dequantized at a time: 32 MB in bfloat16, which the L2 cache of an A100 holds


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu(x) = x sigmoid(x); gelu with tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    z = x
    if ACTIVATION == "gelu_tanh":
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp2(z * (-LOG2E)))


@triton.jit
def store_four(out, bias, y0, y1, y2, y3, n, quarter, half, rows, ACTIVATION: tl.constexpr):
    """Store what came out of the weight's rows n, n + quarter, half + n and half + n + quarter, as far as there are
    such rows. Gated, the first two are gate and the others up; else `half` is twice `quarter`."""
    second = n + quarter < tl.minimum(half, rows)
    if ACTIVATION is not None:
        tl.store(out + n, activate(y0, ACTIVATION) * y2)
        tl.store(out + n + quarter, activate(y1, ACTIVATION) * y3, mask=second)
    else:
        third = half + n < rows
        fourth = half + n + quarter < rows
        if bias is not None:
            y0 += tl.load(bias + n).to(tl.float32)
            y1 += tl.load(bias + n + quarter, mask=second, other=0.0).to(tl.float32)
            y2 += tl.load(bias + half + n, mask=third, other=0.0).to(tl.float32)
            y3 += tl.load(bias + half + n + quarter, mask=fourth, other=0.0).to(tl.float32)
        tl.store(out + n, y0)
        tl.store(out + n + quarter, y1, mask=second)
        tl.store(out + half + n, y2, mask=third)
        tl.store(out + half + n + quarter, y3, mask=fourth)


@triton.jit
def int8_row(weight, acc, a, row, rows, column, K: tl.constexpr):
    """acc + a stretch of one row of the weight times x's, a; nothing from row `rows` on."""
    inside = (column < K) & (row + 0 * column < rows)
    # read once, so it may leave the caches first
    codes = tl.load(weight + row.to(tl.int64) * K + column, mask=inside, other=0, eviction_policy="evict_first")
    return acc + int8_to_float(codes) * a


@triton.jit
def gemv_kernel(
    x, weight, scale, bias, out, quarter, half, rows,
    K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    first_half = tl.minimum(half, rows)
    acc0 = tl.zeros([BLOCK_K], tl.float32)
    acc1 = tl.zeros([BLOCK_K], tl.float32)
    acc2 = tl.zeros([BLOCK_K], tl.float32)
    acc3 = tl.zeros([BLOCK_K], tl.float32)
    # Not pipelined: that would fetch x around the L1 cache, for every program from L2. What hides the wait for memory
    # is the number of programs, each with four loads in flight.
    for k in range(0, K, BLOCK_K):
        column = k + tl.arange(0, BLOCK_K)
        a = tl.load(x + column, mask=column < K, other=0.0, eviction_policy="evict_last").to(tl.float32)
        acc0 = int8_row(weight, acc0, a, n, first_half, column, K)
        acc1 = int8_row(weight, acc1, a, n + quarter, first_half, column, K)
        acc2 = int8_row(weight, acc2, a, half + n, rows, column, K)
        acc3 = int8_row(weight, acc3, a, half + n + quarter, rows, column, K)
    y0 = tl.sum(acc0, 0) * tl.load(scale + n)
    y1 = tl.sum(acc1, 0) * tl.load(scale + n + quarter, mask=n + quarter < first_half, other=0.0)
    y2 = tl.sum(acc2, 0) * tl.load(scale + half + n, mask=half + n < rows, other=0.0)
    y3 = tl.sum(acc3, 0) * tl.load(scale + half + n + quarter, mask=half + n + quarter < rows, other=0.0)
    store_four(out, bias, y0, y1, y2, y3, n, quarter, half, rows, ACTIVATION)


@triton.jit(do_not_specialize=["M"])
def few_rows_kernel(
    x, weight, scale, bias, out, M, N,
    K: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row < N
    m = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_K)
    gate_rows = weight + row[:, None].to(tl.int64) * K + column[None, :]
    up_rows = gate_rows + tl.cast(N, tl.int64) * K
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        # x transposed, [BLOCK_K, BLOCK_M]
        seen = (k + column[:, None] < K) & (m[None, :] < M)
        a = tl.load(x + m[None, :] * K + k + column[:, None], mask=seen, other=0.0, eviction_policy="evict_last")
        if INTERPRETED:
            a = a.to(tl.float32)
        inside = mask[:, None] & (k + column[None, :] < K)
        w = widen(tl.load(gate_rows + k, mask=inside, other=0, eviction_policy="evict_first"), a.dtype)
        gate = tl.dot(w, a, gate, input_precision="ieee")
        if ACTIVATION is not None:
            w = widen(tl.load(up_rows + k, mask=inside, other=0, eviction_policy="evict_first"), a.dtype)
            up = tl.dot(w, a, up, input_precision="ieee")

    gate *= tl.load(scale + row, mask=mask, other=0.0)[:, None]
    if ACTIVATION is not None:
        up *= tl.load(scale + N + row, mask=mask, other=0.0)[:, None]
    if bias is not None:
        gate += tl.load(bias + row, mask=mask, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION is not None:
        gate = activate(gate, ACTIVATION) * up
    tl.store(out + m[None, :] * N + row[:, None], gate, mask=mask[:, None] & (m[None, :] < M))


@triton.jit
def widen(w, dtype: tl.constexpr):
    """A weight tile in the dtype of the activations; every int8 is exact in bfloat16 and float16."""
    return int8_to_float(w).to(dtype)


@triton.jit
def dequantize_kernel(weight, scale, out, N, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < N)[:, None] & (column < K)[None, :]
    offset = row[:, None].to(tl.int64) * K + column[None, :]
    w = int8_to_float(tl.load(weight + offset, mask=inside, other=0))
    tl.store(out + offset, w * tl.load(scale + row, mask=row < N, other=0.0)[:, None], mask=inside)


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Launch for `minillm::int8_linear`; see there for the arguments.

    With an activation (at most FUSED_ROWS of x's dtype) the weight is [2N, K], gate rows first, and the result
    activation(gate) * up.
    """
    K = x.shape[-1]
    N = weight.shape[0] // (1 if activation is None else 2)
    rows = x.reshape(-1, K).contiguous()  # [M, K]
    weight = weight.contiguous()
    M = rows.shape[0]
    out = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    if FUSED_ROWS[x.dtype] < M:

        def fill(a: int, b: int, piece: Tensor) -> None:
            dequantize(weight.narrow(0, a, b - a), scale.narrow(0, a, b - a), piece)

        multiply_pieces(rows, fill, bias, out.view(M, N))
    elif M == 1:
        quarter, half = quarters(weight.shape[0], activation)
        gemv_kernel[(quarter,)](
            rows, weight, scale, bias, out, quarter, half, weight.shape[0],
            K=K, ACTIVATION=activation, **choose("gemv", x, K).arguments(),
        )  # fmt: skip
    elif M > 1:
        arguments = blocks("few_rows", x, N, activation)
        few_rows_kernel[(triton.cdiv(N, arguments["BLOCK_N"]),)](
            rows, weight, scale, bias, out, M, N, K=K, ACTIVATION=activation, BLOCK_M=columns(M), **arguments
        )
    return out


def quarters(rows: int, activation: str | None) -> tuple[int, int]:
    """(quarter, half) for `store_four`: how many programs share the rows of a weight, and where its second half is."""
    if activation is not None:
        return triton.cdiv(rows // 2, 2), rows // 2
    return triton.cdiv(rows, 4), 2 * triton.cdiv(rows, 4)


def columns(M: int) -> int:
    """What M rows of x are padded to: three sizes, so that few kernels are compiled."""
    return max(16, triton.next_power_of_2(M))


def blocks(kernel: str, x: Tensor, size: int, activation: str | None) -> dict:
    """The launch row's arguments; a gated pair has two tiles of weights in flight, so each is half as long."""
    arguments = choose(kernel, x, size).arguments()
    if activation is not None:
        arguments["BLOCK_K"] //= 2
    return arguments


def multiply_pieces(x: Tensor, fill: Callable[[int, int, Tensor], None], bias: Tensor | None, out: Tensor) -> None:
    """out [M, N] = x [M, K] times a weight [N, K] + bias, a piece of the weight's rows at a time.

    `fill(a, b, piece)` writes the weight's rows a .. b - 1 into `piece [b - a, K]`, in x's dtype.
    """
    N, K = out.shape[1], x.shape[1]
    step = max(1, PIECE // K)
    scratch = torch.empty(min(step, N), K, dtype=x.dtype, device=x.device)  # the same memory for all: it stays in L2
    for a in range(0, N, step):
        b = min(a + step, N)
        piece = scratch.narrow(0, 0, b - a)
        fill(a, b, piece)
        if bias is None:
            torch.mm(x, piece.t(), out=out.narrow(1, a, b - a))
        else:
            torch.addmm(bias.narrow(0, a, b - a), x, piece.t(), out=out.narrow(1, a, b - a))


def dequantize(weight: Tensor, scale: Tensor, out: Tensor) -> None:
    """out [N, K] = weight [N, K] int8 times scale [N]."""
    N, K = weight.shape
    arguments = choose("dequantize", out, size=K).arguments()
    grid = (triton.cdiv(N, arguments["BLOCK_N"]), triton.cdiv(K, arguments["BLOCK_K"]))
    dequantize_kernel[grid](weight, scale, out, N, K=K, **arguments)
