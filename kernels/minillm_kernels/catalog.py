"""What every kernel must compute: inputs, a float64 reference, how far a kernel may be off, and why.

One `Entry` per op. The interpreter tests, the GPU tests, the cross-compile table and the benchmark all
read this list, so a kernel added here is tested, compiled and measured without writing any of that again.

References are plain torch in float64, written from the definition and not from the kernel: loops over rows
and positions are welcome. Where the result is unspecified (the output of a padding token) the reference
holds NaN, and the kernel's value there must merely be finite.

A bound is the largest error allowed at each element. It is derived from the number formats, never fitted:
`unit(dtype)` is half the spacing of numbers just above 1, so one rounding is off by at most unit * |value|.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm_kernels.decode_attention import decode_attention, decode_attention_cuda
from minillm_kernels.flash_attention import flash_attention, flash_attention_cuda
from minillm_kernels.gated_mlp import gated_mlp, gated_mlp_cuda
from minillm_kernels.int4_linear import int4_linear, int4_linear_cuda
from minillm_kernels.int8_linear import int8_linear, int8_linear_cuda
from minillm_kernels.launch import interpreting
from minillm_kernels.norm_rope import (
    add_rms_norm,
    add_rms_norm_cuda,
    rms_norm,
    rms_norm_cuda,
    rope_and_cache_write,
    rope_and_cache_write_cuda,
)

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Entry:
    """Everything the tests and tools need to know about one op.

    `make_inputs(case, dtype, device, generator)` returns the op's keyword arguments (on fake tensors too);
    `run(**inputs)` calls the op and returns all its results, a tensor the op wrote into included (it writes
    into a clone). `cuda(**inputs)` is the op's CUDA implementation: the cross-compiler looks at what it launches.
    `reference(**inputs)` returns the same tuple in float64, `bounds(expected, **inputs)` one tensor of
    allowed absolute errors per result. `bytes_moved(**inputs)` is what the kernel cannot avoid reading and
    writing: the numerator of its bandwidth. `small_cases` suit the interpreter (about 10 ms per program);
    `model_cases` are shapes of real models, for cross-compiling and measuring.
    """

    name: str
    make_inputs: Callable[..., dict]
    run: Callable[..., Results]
    cuda: Callable
    reference: Callable[..., Results]
    bounds: Callable[..., Results]
    bytes_moved: Callable[..., int]
    small_cases: dict[str, dict]
    model_cases: dict[str, dict]


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: 2^-8 for bfloat16, 2^-11 for float16, 2^-24 for float32.

    Triton's interpreter cuts float32 off to bfloat16 instead of rounding to nearest: twice as far.
    """
    truncated = dtype == torch.bfloat16 and interpreting()
    return torch.finfo(dtype).eps / (1 if truncated else 2)


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """How far rounding `value` to `dtype` can move it; subnormal numbers are as coarse as the smallest normal."""
    return unit(dtype) * value.abs().clamp(min=torch.finfo(dtype).smallest_normal)


# ---------------------------------------------------------------------------------------------------------
# decode_attention
# ---------------------------------------------------------------------------------------------------------


def decode_attention_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """A cache filled the way a decoder fills it, with NaN wherever nothing has been written yet.

    `positions` gives, per row, the positions of this step's tokens (-1: padding).
    """
    position = torch.tensor(case["positions"])  # [B, T]
    (batch, tokens), heads, kv_heads = position.shape, case["heads"], case["kv_heads"]
    head_dim, slots = case["head_dim"], case["slots"]
    random = {"generator": generator, "device": device}
    k_cache, v_cache = torch.full((2, batch, kv_heads, slots + 1, head_dim), float("nan"), device=device)
    for row, positions in enumerate(case["positions"]):
        written = min(max(positions) + 1, slots)
        k_cache[row, :, :written] = torch.randn(kv_heads, written, head_dim, **random)
        v_cache[row, :, :written] = torch.randn(kv_heads, written, head_dim, **random)
    alibi = torch.rand(heads, **random) if case.get("alibi") else None
    return {
        "q": torch.randn(batch, heads, tokens, head_dim, **random).to(dtype),
        "k": k_cache.to(dtype)[:, :, :slots],  # the bin slot is not the kernel's business
        "v": v_cache.to(dtype)[:, :, :slots],
        "cache_position": position.to(device),
        "scale": head_dim**-0.5,
        "window": case.get("window"),
        "softcap": case.get("softcap"),
        "alibi_slopes": alibi,
    }


def decode_attention_reference(q, k, v, cache_position, scale, window, softcap, alibi_slopes) -> Results:
    """One query token at a time, over the positions it sees, gathered from their slots."""
    out = torch.full(q.shape, float("nan"), dtype=torch.float64, device=q.device)
    for row, positions in enumerate(cache_position.tolist()):
        for token, position in enumerate(positions):
            if position < 0:
                continue  # padding: unspecified
            first = 0 if window is None else max(0, position - window + 1)
            key_position = torch.arange(first, position + 1, device=q.device)  # [P]
            slot = key_position % k.shape[2]
            out[row, :, token] = attend_one_token(
                q[row, :, token], k[row, :, slot], v[row, :, slot],
                key_position - position, scale, softcap, alibi_slopes,
            )  # fmt: skip
    return (out,)


def attend_one_token(q, k, v, distance, scale, softcap, alibi_slopes) -> Tensor:
    """Attention of one token, q [H, D], to the P keys it sees, k and v [KV, P, D], distance [P] <= 0."""
    group = q.shape[0] // k.shape[0]
    k, v = (x.double().repeat_interleave(group, dim=0) for x in (k, v))  # [H, P, D]
    scores = torch.einsum("hd,hpd->hp", q.double(), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.double()[:, None] * distance
    return torch.einsum("hp,hpd->hd", scores.softmax(-1), v)  # [H, D]


def attention_bound(expected: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap) -> Tensor:
    """Three sources of error, added up.

    - the result is rounded once: unit * |expected|;
    - the probabilities are rounded to v's dtype before they weigh v: unit * sum(p |v|) <= unit * max|v|;
    - a score wrong by d changes every probability by a factor within exp(+-2d), the result by at most
      2 d max|v|. Scores are float32 sums of head_dim products whose roundings behave as a random walk
      (Higham & Mary 2019), so d <= (sqrt(head_dim) + 8) * 2^-24 * the largest score; the 8 covers scaling,
      exponential and rescaling. A tanh written through exp adds an absolute 2^-22 of the softcap.
    """
    q_norm, k_norm = (x.double().nan_to_num(0).norm(dim=-1).amax() for x in (q, k))
    largest_v = v.double().nan_to_num(0).abs().amax()
    largest_score = q_norm * k_norm * scale  # Cauchy-Schwarz: sum of |q k| <= |q| |k|
    score_error = unit(torch.float32) * ((q.shape[-1] ** 0.5 + 8) * largest_score + 4 * (softcap or 0))
    rounded = rounding(expected.nan_to_num(0), q.dtype) + rounding(largest_v, q.dtype)
    return rounded + 2 * score_error * largest_v


def decode_attention_bounds(expected, q, k, v, cache_position, scale, window, softcap, alibi_slopes) -> Results:
    return (attention_bound(expected[0], q, k, v, scale, softcap),)


def decode_attention_bytes(q, k, v, cache_position, scale, window, softcap, alibi_slopes) -> int:
    """The live keys and values, once; q and the result are small beside them but counted."""
    last = cache_position.max(dim=1).values + 1
    live = last if window is None else last.clamp(max=window + cache_position.shape[1] - 1)
    kv = 2 * int(live.sum()) * k.shape[1] * k.shape[3] * k.element_size()
    return kv + 2 * q.numel() * q.element_size()


def decode_case(
    batch: int, position: int, heads: int, kv_heads: int, head_dim: int, slots: int, tokens: int = 1, **more
) -> dict:
    """A real model's shape: every row's newest token at the same position."""
    positions = [list(range(position - tokens + 1, position + 1))] * batch
    return dict(positions=positions, heads=heads, kv_heads=kv_heads, head_dim=head_dim, slots=slots, **more)


DECODE_ATTENTION = Entry(
    name="decode_attention",
    make_inputs=decode_attention_inputs,
    run=lambda **inputs: (decode_attention(**inputs),),
    cuda=decode_attention_cuda,
    reference=decode_attention_reference,
    bounds=decode_attention_bounds,
    bytes_moved=decode_attention_bytes,
    small_cases={
        "one token": dict(positions=[[5]], heads=2, kv_heads=2, head_dim=64, slots=40),
        "first token": dict(positions=[[0], [39]], heads=2, kv_heads=1, head_dim=16, slots=40),
        "grouped heads, ragged rows": dict(positions=[[130], [3], [64]], heads=4, kv_heads=2, head_dim=32, slots=150),
        "five tokens": dict(
            positions=[[20, 21, 22, 23, 24], [0, 1, 2, 3, 4]], heads=4, kv_heads=1, head_dim=64, slots=40
        ),
        "padding": dict(positions=[[7, 8, -1], [-1, -1, -1], [-1, -1, 0]], heads=2, kv_heads=1, head_dim=32, slots=20),
        "many query heads": dict(positions=[[70, 71]], heads=35, kv_heads=1, head_dim=64, slots=80),
        "odd head size": dict(positions=[[33]], heads=2, kv_heads=2, head_dim=80, slots=34),
        "window": dict(positions=[[90, 91], [4, 5]], heads=2, kv_heads=1, head_dim=32, slots=100, window=16),
        "ring": dict(positions=[[90, 91], [4, 5]], heads=2, kv_heads=1, head_dim=32, slots=33, window=32),
        "window over several splits": dict(
            positions=[[390], [201]], heads=2, kv_heads=1, head_dim=16, slots=400, window=300
        ),
        "softcap": dict(positions=[[40], [77]], heads=4, kv_heads=2, head_dim=32, slots=80, softcap=5.0),
        "alibi": dict(positions=[[40, 41]], heads=4, kv_heads=4, head_dim=32, slots=50, alibi=True),
        "everything": dict(
            positions=[[200, 201, -1], [9, 10, 11]],
            heads=6,
            kv_heads=2,
            head_dim=48,
            slots=42,
            window=40,
            softcap=20.0,
            alibi=True,
        ),
        "prefill chunk": dict(positions=[list(range(30, 70))], heads=2, kv_heads=1, head_dim=32, slots=90, window=25),
    },
    model_cases={
        "Llama-2-7B, 4 rows at 2048": decode_case(4, 2047, 32, 32, 128, 4096),
        "Llama-3-8B, 8 rows at 8192": decode_case(8, 8191, 32, 8, 128, 8192),
        "Llama-3-8B, 1 row at 2048": decode_case(1, 2047, 32, 8, 128, 8192),
        "Gemma-2b, 32 rows at 4096": decode_case(32, 4095, 8, 1, 256, 8192),
        "Llama-3-8B, 6 tokens at 2048": decode_case(1, 2047, 32, 8, 128, 8192, tokens=6),
        "Llama-3-8B, chunk of 256 at 2048": decode_case(1, 2047, 32, 8, 128, 8192, tokens=256),
        "Gemma-2-9b layer, chunk of 256": decode_case(1, 6000, 16, 8, 256, 4351, tokens=256, window=4096, softcap=50.0),
        "MPT-7b, 1 row at 1024": decode_case(1, 1023, 32, 32, 128, 2048, alibi=True),
        "Phi-3-mini, 1 row at 2048": decode_case(1, 2047, 32, 32, 96, 4096),
        "TinyLlama, 1 row at 1024": decode_case(1, 1023, 32, 4, 64, 2048),
    },
)

# ---------------------------------------------------------------------------------------------------------
# flash_attention
# ---------------------------------------------------------------------------------------------------------


def flash_attention_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """`lengths`: one sequence per batch row, all alike, or with `packed` several laid end to end."""
    lengths, heads, kv_heads, head_dim = case["lengths"], case["heads"], case["kv_heads"], case["head_dim"]
    packed = case.get("packed", False)
    batch, tokens = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    random = {"generator": generator, "device": device}
    # [B, T, heads, D] seen as [B, heads, T, D]: how a decoder has them
    qkv = torch.randn(batch, tokens, heads + 2 * kv_heads, head_dim, **random).to(dtype).transpose(1, 2)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return {
        "q": q, "k": k, "v": v, "scale": head_dim**-0.5,
        "window": case.get("window"), "softcap": case.get("softcap"),
        "alibi_slopes": torch.rand(heads, **random) if case.get("alibi") else None,
        "cu_seqlens": ends if packed else None,
    }  # fmt: skip


def flash_attention_reference(q, k, v, scale, window, softcap, alibi_slopes, cu_seqlens) -> Results:
    """One token at a time, over the keys of its own sequence that it sees."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    starts = {0} if cu_seqlens is None else set(cu_seqlens.tolist())
    for row in range(q.shape[0]):
        start = 0
        for token in range(q.shape[2]):
            start = token if token in starts else start
            first = start if window is None else max(start, token - window + 1)
            seen = slice(first, token + 1)
            out[row, :, token] = attend_one_token(
                q[row, :, token], k[row, :, seen], v[row, :, seen],
                torch.arange(first - token, 1, device=q.device), scale, softcap, alibi_slopes,
            )  # fmt: skip
    return (out,)


def flash_case(lengths: list[int], heads: int, kv_heads: int, head_dim: int, **more) -> dict:
    return dict(lengths=lengths, heads=heads, kv_heads=kv_heads, head_dim=head_dim, **more)


FLASH_ATTENTION = Entry(
    name="flash_attention",
    make_inputs=flash_attention_inputs,
    run=lambda **inputs: (flash_attention(**inputs),),
    cuda=flash_attention_cuda,
    reference=flash_attention_reference,
    bounds=lambda expected, q, k, v, scale, softcap, **_: (attention_bound(expected[0], q, k, v, scale, softcap),),
    bytes_moved=lambda q, k, v, **_: (2 * q.numel() + k.numel() + v.numel()) * q.element_size(),
    small_cases={
        "one token": flash_case([1], 2, 1, 32),
        "one tile": flash_case([17, 17], 2, 2, 32),
        "ragged, grouped heads": flash_case([147], 4, 2, 32),
        "odd head size": flash_case([40], 2, 1, 80),
        "window": flash_case([150], 2, 1, 16, window=20),
        "wide window": flash_case([150], 1, 1, 16, window=100),
        "softcap": flash_case([70], 2, 1, 32, softcap=5.0),
        "alibi": flash_case([70], 4, 2, 32, alibi=True),
        "packed": flash_case([70, 1, 3, 40, 33], 2, 1, 32, packed=True),
        "everything": flash_case([90, 5, 60], 4, 2, 48, packed=True, window=30, softcap=20.0, alibi=True),
        "wide head": flash_case([50], 1, 1, 256),
    },
    model_cases={
        "Llama-2-7B, 2048 tokens": flash_case([2048], 32, 32, 128),
        "Llama-3-8B, 4096 tokens": flash_case([4096], 32, 8, 128),
        "Gemma-2b, 2048 tokens": flash_case([2048], 8, 1, 256),
        "Gemma-2-9b layer, 4096 tokens": flash_case([4096], 16, 8, 256, window=4096, softcap=50.0),
        "TinyLlama, 4 packed": flash_case([512, 1024, 256, 256], 32, 4, 64, packed=True),
        "MPT-7b, 2048 tokens": flash_case([2048], 32, 32, 128, alibi=True),
    },
)


# ---------------------------------------------------------------------------------------------------------
# rms_norm, add_rms_norm
# ---------------------------------------------------------------------------------------------------------


def rms_norm_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    random = {"generator": generator, "device": device}
    shape = case["shape"]
    inputs = {"x": torch.randn(shape, **random).to(dtype)}
    if case.get("strided"):  # every other row of something: rows evenly spaced, not adjacent
        inputs["x"] = torch.randn(2 * shape[0], *shape[1:], **random).to(dtype)[::2]
    inputs["weight"] = torch.randn(shape[-1], **random).to(dtype)
    inputs["eps"] = case.get("eps", 1e-6)
    inputs["offset"] = case.get("offset", 0.0)
    inputs["multiply_in_fp32"] = case["multiply_in_fp32"]
    return inputs


def add_rms_norm_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    residual = torch.randn(case["shape"], generator=generator, device=device).to(dtype)
    return rms_norm_inputs(case, dtype, device, generator) | {"residual": residual}


def rms_norm_reference(x, weight, eps, offset, multiply_in_fp32) -> Results:
    wide = x.double()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double()),)


def add_rms_norm_reference(x, residual, weight, eps, offset, multiply_in_fp32) -> Results:
    total = x.double() + residual.double()
    return (*rms_norm_reference(total, weight, eps, offset, multiply_in_fp32), total)


def rms_norm_bounds(expected, x, weight, eps, offset, multiply_in_fp32) -> Results:
    """One rounding of the result, two when it is rounded before the multiplication as well. In float32: a
    sum of N squares whose roundings walk randomly, sqrt(N) * 2^-24, halved by the square root; 6 more
    operations."""
    (normed,) = expected
    bound = rounding(normed, x.dtype) + (x.shape[-1] ** 0.5 / 2 + 6) * rounding(normed, torch.float32)
    if not multiply_in_fp32:
        bound = bound + weight.double().abs() * rounding(normed / weight.double(), x.dtype)
    return (bound,)


def add_rms_norm_bounds(expected, x, residual, weight, eps, offset, multiply_in_fp32) -> Results:
    """As for rms_norm; the sum is rounded too, which moves an element and the norm by one unit each."""
    normed, total = expected
    (bound,) = rms_norm_bounds((normed,), x, weight, eps, offset, multiply_in_fp32)
    return bound + 2 * unit(x.dtype) * normed.abs(), rounding(total, x.dtype)


NORM_CASES = {
    "Llama": dict(shape=(3, 64), multiply_in_fp32=False, eps=1e-5),
    "Gemma": dict(shape=(2, 3, 96), multiply_in_fp32=True, offset=1.0),
    "OLMo 2": dict(shape=(2, 2, 2, 48), multiply_in_fp32=True),
    "odd size, large eps": dict(shape=(2, 77), multiply_in_fp32=True, eps=0.5),
    "strided rows": dict(shape=(3, 64), multiply_in_fp32=False, strided=True),
    "wider than 8192": dict(shape=(1, 9000), multiply_in_fp32=False),
}
NORM_MODEL_CASES = {
    "Llama-2-7B, 1 row": dict(shape=(1, 4096), multiply_in_fp32=False),
    "Gemma-2b, 1 row": dict(shape=(1, 2048), multiply_in_fp32=True, offset=1.0),
    "Llama-3-8B, 2048 rows": dict(shape=(2048, 4096), multiply_in_fp32=False),
    "Llama-3-70B, 512 rows": dict(shape=(512, 8192), multiply_in_fp32=False),
    "16384 wide, 128 rows": dict(shape=(128, 16384), multiply_in_fp32=False),
}

RMS_NORM = Entry(
    name="rms_norm",
    make_inputs=rms_norm_inputs,
    run=lambda **inputs: (rms_norm(**inputs),),
    cuda=rms_norm_cuda,
    reference=rms_norm_reference,
    bounds=rms_norm_bounds,
    bytes_moved=lambda x, weight, **_: (2 * x.numel() + weight.numel()) * x.element_size(),
    small_cases=NORM_CASES,
    model_cases=NORM_MODEL_CASES,
)

ADD_RMS_NORM = Entry(
    name="add_rms_norm",
    make_inputs=add_rms_norm_inputs,
    run=lambda **inputs: add_rms_norm(**inputs),
    cuda=add_rms_norm_cuda,
    reference=add_rms_norm_reference,
    bounds=add_rms_norm_bounds,
    bytes_moved=lambda x, weight, **_: (4 * x.numel() + weight.numel()) * x.element_size(),
    small_cases=NORM_CASES,
    model_cases=NORM_MODEL_CASES,
)


# ---------------------------------------------------------------------------------------------------------
# rope_and_cache_write
# ---------------------------------------------------------------------------------------------------------


def rope_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """q, k and v are slices of one fused projection, as in the decoder, hence not contiguous."""
    position = torch.tensor(case["positions"], device=device)  # [B, T]
    (batch, tokens), heads, kv_heads = position.shape, case["heads"], case["kv_heads"]
    head_dim, slots, rotary_dim = case["head_dim"], case["slots"], case.get("rotary_dim", case["head_dim"])
    random = {"generator": generator, "device": device}
    qkv = torch.randn(batch, tokens, heads + 2 * kv_heads, head_dim, **random).to(dtype)
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=2)
    frequency = 10000.0 ** -(torch.arange(0, rotary_dim, 2, device=device) / rotary_dim)
    angle = position[:, :, None] * frequency  # [B, T, R / 2]
    k_cache, v_cache = torch.randn(2, batch, kv_heads, slots + 1, head_dim, **random).to(dtype)
    return {
        "q": q, "k": k, "v": v, "cos": angle.cos(), "sin": angle.sin(),
        "k_cache": k_cache, "v_cache": v_cache, "cache_position": position,
    }  # fmt: skip


def run_rope(k_cache: Tensor, v_cache: Tensor, **inputs) -> Results:
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    return rope_and_cache_write(k_cache=k_cache, v_cache=v_cache, **inputs), k_cache, v_cache


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every pair of channels as a complex number, times cos + i sin."""
    half = cos.shape[-1]
    turn = torch.complex(cos.double(), sin.double())[:, :, None]  # [B, T, 1, R / 2]
    pair = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * turn
    return torch.cat((pair.real, pair.imag, x[..., 2 * half :].double()), dim=-1)


def rope_reference(q, k, v, cos, sin, k_cache, v_cache, cache_position) -> Results:
    keys, values = k_cache.double(), v_cache.double()
    turned = rotate_reference(k, cos, sin)
    slots = keys.shape[2] - 1
    for row, positions in enumerate(cache_position.tolist()):
        for token, position in enumerate(positions):
            if position >= 0:
                keys[row, :, position % slots] = turned[row, token]
                values[row, :, position % slots] = v[row, token].double()
    keys[:, :, slots] = values[:, :, slots] = float("nan")  # the bin: anything
    return rotate_reference(q, cos, sin).transpose(1, 2), keys, values


def rope_bounds(expected, q, k, v, cos, sin, k_cache, v_cache, cache_position) -> Results:
    """Two float32 products and a sum of numbers no larger than the pair's length, 3 * 2^-24 of it; then one
    rounding. A slot that was not written, and every value, must be exact."""
    turned, keys, values = expected
    pair = 2**0.5 * torch.stack((q.double().abs().amax(), k.double().abs().amax())).amax()
    q_bound = 3 * rounding(pair, torch.float32) + rounding(turned, q.dtype)
    k_bound = 3 * rounding(pair, torch.float32) + rounding(keys, q.dtype)
    return q_bound, torch.where(keys == k_cache.double(), 0, k_bound), torch.zeros_like(values)


def rope_case(batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, slots: int) -> dict:
    positions = [list(range(100, 100 + tokens))] * batch
    return dict(positions=positions, heads=heads, kv_heads=kv_heads, head_dim=head_dim, slots=slots)


ROPE_AND_CACHE_WRITE = Entry(
    name="rope_and_cache_write",
    make_inputs=rope_inputs,
    run=run_rope,
    cuda=rope_and_cache_write_cuda,
    reference=rope_reference,
    bounds=rope_bounds,
    # q, k and v in, as much out again, and the angles
    bytes_moved=lambda q, k, v, cos, sin, **_: (
        2 * (q.numel() + k.numel() + v.numel()) * q.element_size() + 2 * cos.numel() * 4
    ),
    small_cases={
        "one token": dict(positions=[[7]], heads=2, kv_heads=1, head_dim=32, slots=10),
        "several tokens, padding": dict(
            positions=[[3, 4, -1], [-1, 0, 1], [-1, -1, -1]], heads=2, kv_heads=2, head_dim=16, slots=6
        ),
        "ring": dict(positions=[[30, 31], [4, 5]], heads=2, kv_heads=1, head_dim=16, slots=7),
        "partial rotary": dict(positions=[[9, 10]], heads=3, kv_heads=1, head_dim=80, rotary_dim=32, slots=12),
        "odd number of angles": dict(positions=[[9]], heads=2, kv_heads=1, head_dim=20, rotary_dim=10, slots=12),
    },
    model_cases={
        "Llama-2-7B, 1 token": rope_case(1, 1, 32, 32, 128, 4096),
        "Llama-3-8B, 8 rows": rope_case(8, 1, 32, 8, 128, 8192),
        "Llama-3-8B, 512 tokens": rope_case(1, 512, 32, 8, 128, 8192),
        "Gemma-2b, 1 token": rope_case(1, 1, 8, 1, 256, 8192),
        "TinyLlama, 1 token": rope_case(1, 1, 32, 4, 64, 2048),
    },
)


# ---------------------------------------------------------------------------------------------------------
# int8_linear, int4_linear, gated_mlp
# ---------------------------------------------------------------------------------------------------------


def linear_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """x [rows, K] and a weight [N, K] in the case's format: "int8", "int4" or "dense"."""
    random = {"generator": generator, "device": device}
    (N, K), form, group = case["weight"], case["format"], case.get("group_size", 0)
    inputs = {"x": torch.randn(*case["rows"], K, **random).to(dtype)}
    if form == "dense":
        inputs["weight"] = (torch.randn(N, K, **random) * K**-0.5).to(dtype)
    elif form == "int8":
        inputs["weight"] = torch.randint(-127, 128, (N, K), dtype=torch.int8, **random)
        inputs["scale"] = (torch.rand(N, **random) + 0.5) / (70 * K**0.5)
    else:
        inputs["packed"] = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, **random)
        inputs["scale"] = ((torch.rand(K // group, N, **random) + 0.5) / (5 * K**0.5)).half()
        inputs["zero"] = torch.randint(0, 16, (K // group, N), dtype=torch.uint8, **random)
        inputs["group_size"] = group
    if "activation" in case:
        inputs["activation"] = case["activation"]
        if form == "int4":
            inputs["weight"] = inputs.pop("packed")
    elif case.get("bias"):
        inputs["bias"] = torch.randn(N, **random).to(dtype)
    return inputs


def exact_weight(weight: Tensor, scale=None, zero=None, group_size: int = 0) -> Tensor:
    """The weight [N, K] in float64, element by element from the definition of each format."""
    if weight.dtype == torch.int8:
        return weight.double() * scale.double()[:, None]
    if weight.dtype != torch.uint8:
        return weight.double()
    K = 2 * weight.shape[1]
    index = torch.arange(K, device=weight.device)  # input
    group, inner = index // group_size, index % group_size
    byte = weight[:, group * (group_size // 2) + inner % (group_size // 2)].long()  # [N, K]
    code = torch.where(inner < group_size // 2, byte % 16, byte // 16)
    return (code - zero[group].t().long()) * scale[group].t().double()


def int8_reference(x, weight, scale, bias=None) -> Results:
    y = x.double() @ exact_weight(weight, scale).t()
    return (y if bias is None else y + bias.double(),)


def int4_reference(x, packed, scale, zero, group_size, bias=None) -> Results:
    y = x.double() @ exact_weight(packed, scale, zero, group_size).t()
    return (y if bias is None else y + bias.double(),)


def gated_reference(x, weight, activation, scale=None, zero=None, group_size=0) -> Results:
    y = x.double() @ exact_weight(weight, scale, zero, group_size).t()
    gate, up = y.chunk(2, dim=-1)
    return (activated(gate, activation) * up,)


def activated(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return gate * torch.sigmoid(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")


def product_bound(x: Tensor, weight: Tensor, exact: Tensor) -> Tensor:
    """Error of x @ exact.T before the result is rounded; `weight` tells the format.

    - K float32 products and sums whose roundings walk randomly (Higham & Mary 2019): sqrt(K) * 2^-24 * sum|x w|;
    - with more than 16 rows, or int4 and more than one, the weight is rounded to x's dtype first. K
      independent errors, each uniform within unit * |x w|, add up to a spread of unit * |x w|_2 / sqrt(3); 4 * unit
      * |x w|_2 is seven of those;
    - on CPU the quantized formats round x to 16 bits of its row's largest element, 1.5e-5 of it each.
    """
    x, on_cpu, dtype, rows = x.double(), not (x.is_cuda or interpreting()), x.dtype, x.numel() // x.shape[-1]
    bound = x.shape[-1] ** 0.5 * unit(torch.float32) * (x.abs() @ exact.abs().t())
    if weight.dtype != dtype and (rows > 16 or (weight.dtype == torch.uint8 and rows > 1)):
        bound = bound + 4 * unit(dtype) * (x.square() @ exact.square().t()).sqrt()
    if weight.dtype != dtype and on_cpu:
        bound = bound + 4 * 1.5e-5 * x.abs().amax(-1, keepdim=True) * exact.norm(dim=1)
    return bound


def linear_bound(expected: Tensor, x: Tensor, weight: Tensor, exact: Tensor, bias) -> Results:
    """The product's error and one rounding of the result; the library paths round before the bias as well."""
    bound = product_bound(x, weight, exact) + rounding(expected, x.dtype)
    if bias is not None:
        bound = bound + rounding(expected - bias.double(), x.dtype) + rounding(bias.double(), torch.float32)
    return (bound,)


def int8_bounds(expected, x, weight, scale, bias=None) -> Results:
    return linear_bound(expected[0], x, weight, exact_weight(weight, scale), bias)


def int4_bounds(expected, x, packed, scale, zero, group_size, bias=None) -> Results:
    return linear_bound(expected[0], x, packed, exact_weight(packed, scale, zero, group_size), bias)


def gated_bounds(expected, x, weight, activation, scale=None, zero=None, group_size=0) -> Results:
    """An error d of the gate moves the activation by at most 1.13 d (its steepest slope), one of `up` counts in
    proportion to the activation. With more than 16 rows both are rounded to x's dtype on the way. The
    activation itself, through exp2: a relative (8 + |gate|) * 2^-24. One rounding at the end."""
    exact = exact_weight(weight, scale, zero, group_size)
    products = x.double() @ exact.t()
    error = product_bound(x, weight, exact)
    if x.numel() // x.shape[-1] > 16:
        error = error + rounding(products, x.dtype)
    (gate, up), (gate_error, up_error) = products.chunk(2, dim=-1), error.chunk(2, dim=-1)
    bound = 1.13 * gate_error * (up.abs() + up_error) + activated(gate, activation).abs() * up_error
    bound = bound + (8 + gate.abs()) * unit(torch.float32) * expected[0].abs()
    return (bound + rounding(expected[0], x.dtype),)


def linear_bytes(x: Tensor, weight: Tensor | None = None, packed: Tensor | None = None, **inputs) -> int:
    """Weights, scales and zero points once, x once, the result once."""
    weight = packed if weight is None else weight
    read = [x, weight, *(inputs[name] for name in ("scale", "zero", "bias") if inputs.get(name) is not None)]
    outputs = weight.shape[0] // (2 if "activation" in inputs else 1)
    written = x.numel() // x.shape[-1] * outputs * x.element_size()
    return sum(tensor.numel() * tensor.element_size() for tensor in read) + written


def small_linear_cases(form: str, **more) -> dict[str, dict]:
    """The three regimes by rows (1, 2..16, more), sizes that fill no tile, leading dimensions, a bias."""
    cases = {
        "1 row": dict(rows=(1,), weight=(96, 256)),
        "1 row, ragged, bias": dict(rows=(1, 1), weight=(70, 160), bias=True),
        "3 rows, bias": dict(rows=(3,), weight=(100, 192), bias=True),
        "1 row, odd outputs, bias": dict(rows=(1,), weight=(33, 128), bias=True),
        "16 rows": dict(rows=(2, 8), weight=(40, 96)),
        "17 rows, bias": dict(rows=(17,), weight=(48, 160), bias=True),
    }
    return {name: case | {"format": form} | more for name, case in cases.items()}


def model_linear_cases(form: str, **more) -> dict[str, dict]:
    cases = {
        "Llama-2-7B qkv, 1 row": dict(rows=(1,), weight=(12288, 4096)),
        "Llama-2-7B down, 1 row": dict(rows=(1,), weight=(4096, 11008)),
        "Llama-3-8B qkv, 1 row": dict(rows=(1,), weight=(6144, 4096)),
        "Gemma-2b down, 1 row": dict(rows=(1,), weight=(2048, 16384)),
        "TinyLlama qkv, 1 row": dict(rows=(1,), weight=(2560, 2048)),
        "Llama-2-7B qkv, 6 rows": dict(rows=(6,), weight=(12288, 4096)),
        "Llama-2-7B down, 6 rows": dict(rows=(6,), weight=(4096, 11008)),
        "Llama-2-7B qkv, 512 rows": dict(rows=(512,), weight=(12288, 4096)),
    }
    return {name: case | {"format": form} | more for name, case in cases.items()}


INT8_LINEAR = Entry(
    name="int8_linear",
    make_inputs=linear_inputs,
    run=lambda **inputs: (int8_linear(**inputs),),
    cuda=int8_linear_cuda,
    reference=int8_reference,
    bounds=int8_bounds,
    bytes_moved=linear_bytes,
    small_cases=small_linear_cases("int8"),
    model_cases=model_linear_cases("int8"),
)

INT4_LINEAR = Entry(
    name="int4_linear",
    make_inputs=linear_inputs,
    run=lambda **inputs: (int4_linear(**inputs),),
    cuda=int4_linear_cuda,
    reference=int4_reference,
    bounds=int4_bounds,
    bytes_moved=linear_bytes,
    small_cases={
        f"{name}, groups of {group}": case
        for group in (32, 64, 128)
        for name, case in small_linear_cases("int4", group_size=group).items()
        if case["weight"][1] % group == 0
    },
    model_cases=model_linear_cases("int4", group_size=128)
    | {"Llama-2-7B qkv, 1 row, groups of 32": dict(rows=(1,), weight=(12288, 4096), format="int4", group_size=32)},
)


def gated_case(rows: tuple, weight: tuple, form: str, activation: str = "silu", group_size: int = 0) -> dict:
    return dict(rows=rows, weight=weight, format=form, activation=activation, group_size=group_size)


GATED_MLP = Entry(
    name="gated_mlp",
    make_inputs=linear_inputs,
    run=lambda **inputs: (gated_mlp(**inputs),),
    cuda=gated_mlp_cuda,
    reference=gated_reference,
    bounds=gated_bounds,
    bytes_moved=linear_bytes,
    small_cases={
        f"{form}, {rows} rows, {activation}": gated_case((rows,), (2 * 37, 192), form, activation, 64)
        for form in ("dense", "int8", "int4")
        for rows, activation in ((1, "silu"), (1, "gelu_tanh"), (5, "silu"), (5, "gelu_tanh"), (19, "gelu_tanh"))
    },
    model_cases={
        f"{model}, {form}, {rows} rows": gated_case((rows,), weight, form, activation, 128)
        for model, weight, activation in (
            ("Llama-2-7B", (22016, 4096), "silu"),
            ("Gemma-2b", (32768, 2048), "gelu_tanh"),
            ("TinyLlama", (11264, 2048), "silu"),
        )
        for form in ("dense", "int8", "int4")
        for rows in (1, 6)
    },
)


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        DECODE_ATTENTION,
        FLASH_ATTENTION,
        RMS_NORM,
        ADD_RMS_NORM,
        ROPE_AND_CACHE_WRITE,
        INT8_LINEAR,
        INT4_LINEAR,
        GATED_MLP,
    )
}
