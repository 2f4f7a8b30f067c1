"""Activations against an int8 weight matrix that is read once: int8_linear, and gated_mlp on int8.

Three regimes, by the number of rows M of x:

    M = 1        gemv       one program = BLOCK_N rows of the weight, walked in tiles [BLOCK_N, BLOCK_K].
                            Multiply-add into a float32 tile, one reduction after the loop: no tensor core,
                            no atomics.                      bound by: reading the weight
    M = 2..16    few rows   the same walk, tl.dot with the weight as the tall operand [BLOCK_N, BLOCK_K] and
                            x padded to 16 columns.          bound by: reading the weight
    M > 16       many rows  write the weight out in x's dtype, then the library's matrix product.
                            bound by: arithmetic (the extra pass: 13 % at 2048 rows, by count)

The first two compute one product or a gated pair: then rows n and n + N of the weight share every tile of x, and
the activation is applied before anything is stored.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from minillm_kernels.gpu.softmax import INTERPRETED, LOG2E
from minillm_kernels.launch import choose

FEW_ROWS = 16


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """silu(x) = x sigmoid(x); gelu with tanh is x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))."""
    z = x
    if ACTIVATION == "gelu_tanh":
        z = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp2(z * (-LOG2E)))


@triton.jit
def gemv_kernel(
    x, weight, scale, bias, out, N,
    K: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row < N
    # x is loaded through pointers of the weight's 2-D shape: a 1-D load would have to change its layout, through
    # shared memory and a barrier, in every step.
    column = tl.arange(0, BLOCK_K)[None, :] + tl.zeros([BLOCK_N, 1], tl.int32)
    gate_rows = weight + row[:, None].to(tl.int64) * K + column
    up_rows = gate_rows + tl.cast(N, tl.int64) * K
    gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = k + column < K
        a = tl.load(x + k + column, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)
        inside = inside & mask[:, None]
        # a weight is used once, x by every program
        gate += tl.load(gate_rows + k, mask=inside, other=0, eviction_policy="evict_first").to(tl.float32) * a
        if ACTIVATION is not None:
            up += tl.load(up_rows + k, mask=inside, other=0, eviction_policy="evict_first").to(tl.float32) * a

    y = tl.sum(gate, 1)
    z = tl.sum(up, 1)
    y *= tl.load(scale + row, mask=mask, other=0.0)
    if ACTIVATION is not None:
        z *= tl.load(scale + N + row, mask=mask, other=0.0)
    if bias is not None:
        y += tl.load(bias + row, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION is not None:
        y = activate(y, ACTIVATION) * z
    tl.store(out + row, y, mask=mask)


@triton.jit
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
    return w.to(tl.float32).to(dtype)


@triton.jit
def dequantize_kernel(weight, scale, out, N, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < N)[:, None] & (column < K)[None, :]
    offset = row[:, None].to(tl.int64) * K + column[None, :]
    w = tl.load(weight + offset, mask=inside, other=0).to(tl.float32)
    tl.store(out + offset, w * tl.load(scale + row, mask=row < N, other=0.0)[:, None], mask=inside)


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Launch for `minillm::int8_linear`; see there for the arguments.

    With an activation (at most FEW_ROWS rows) the weight is [2N, K], gate rows first, and the result
    activation(gate) * up.
    """
    K = x.shape[-1]
    N = weight.shape[0] // (1 if activation is None else 2)
    rows = x.reshape(-1, K).contiguous()  # [M, K]
    weight = weight.contiguous()
    M = rows.shape[0]
    if M > FEW_ROWS:
        return F.linear(x, dequantize(weight, scale, x.dtype), bias)
    out = torch.empty(*x.shape[:-1], N, dtype=x.dtype, device=x.device)
    if M == 1:
        arguments = blocks("gemv", x, N, activation)
        gemv_kernel[(triton.cdiv(N, arguments["BLOCK_N"]),)](
            rows, weight, scale, bias, out, N,
            K=K, ACTIVATION=activation, STAGES=arguments["num_stages"], **arguments,
        )  # fmt: skip
    elif M > 1:
        arguments = blocks("few_rows", x, N, activation)
        few_rows_kernel[(triton.cdiv(N, arguments["BLOCK_N"]),)](
            rows, weight, scale, bias, out, M, N, K=K, ACTIVATION=activation, BLOCK_M=FEW_ROWS, **arguments
        )
    return out


def blocks(kernel: str, x: Tensor, size: int, activation: str | None) -> dict:
    """The launch row's arguments; a gated pair has two tiles of weights in flight, so each is half as long."""
    arguments = choose(kernel, x, size).arguments()
    if activation is not None:
        arguments["BLOCK_K"] //= 2
    return arguments


def dequantize(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [N, K] int8 times scale [N], in `dtype`."""
    N, K = weight.shape
    out = torch.empty(N, K, dtype=dtype, device=weight.device)
    arguments = choose("dequantize", out, size=K).arguments()
    grid = (triton.cdiv(N, arguments["BLOCK_N"]), triton.cdiv(K, arguments["BLOCK_K"]))
    dequantize_kernel[grid](weight, scale, out, N, K=K, **arguments)
    return out
