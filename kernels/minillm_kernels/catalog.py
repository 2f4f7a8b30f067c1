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

from minillm_kernels.decode_attention import decode_attention

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Entry:
    """Everything the tests and tools need to know about one op.

    `make_inputs(case, dtype, device, generator)` returns the op's keyword arguments; `run(**inputs)` calls
    the op and returns all its results, a tensor the op wrote into included (it writes into a clone).
    `reference(**inputs)` returns the same tuple in float64, `bounds(expected, **inputs)` one tensor of
    allowed absolute errors per result. `bytes_moved(**inputs)` is what the kernel cannot avoid reading and
    writing: the numerator of its bandwidth. `small_cases` suit the interpreter (about 10 ms per program);
    `model_cases` are shapes of real models, for cross-compiling and measuring.
    """

    name: str
    make_inputs: Callable[..., dict]
    run: Callable[..., Results]
    reference: Callable[..., Results]
    bounds: Callable[..., Results]
    bytes_moved: Callable[..., int]
    small_cases: dict[str, dict]
    model_cases: dict[str, dict]


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: 2^-9 for bfloat16, 2^-12 for float16, 2^-24 for float32."""
    return torch.finfo(dtype).eps / 2


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
    for row, last in enumerate(position.max(dim=1).values.tolist()):
        written = min(last + 1, slots)
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
    slots, group = k.shape[2], q.shape[1] // k.shape[1]
    out = torch.full(q.shape, float("nan"), dtype=torch.float64, device=q.device)
    for row, positions in enumerate(cache_position.tolist()):
        for token, position in enumerate(positions):
            if position < 0:
                continue  # padding: unspecified
            first = 0 if window is None else max(0, position - window + 1)
            key_position = torch.arange(first, position + 1, device=q.device)  # [P]
            keys = k[row, :, key_position % slots].double().repeat_interleave(group, 0)  # [H, P, D]
            values = v[row, :, key_position % slots].double().repeat_interleave(group, 0)
            scores = torch.einsum("hd,hpd->hp", q[row, :, token].double(), keys) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if alibi_slopes is not None:
                scores = scores + alibi_slopes.double()[:, None] * (key_position - position)
            out[row, :, token] = torch.einsum("hp,hpd->hd", scores.softmax(-1), values)
    return (out,)


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
    rounding = unit(q.dtype) * (expected.nan_to_num(0).abs() + largest_v)
    return rounding + 2 * score_error * largest_v


def decode_attention_bounds(
    expected, q, k, v, cache_position, scale, window, softcap, alibi_slopes
) -> Results:
    return (attention_bound(expected[0], q, k, v, scale, softcap),)


def decode_attention_bytes(q, k, v, cache_position, scale, window, softcap, alibi_slopes) -> int:
    """The live keys and values, once; q and the result are small beside them but counted."""
    last = cache_position.max(dim=1).values + 1
    live = last if window is None else last.clamp(max=window + cache_position.shape[1] - 1)
    kv = 2 * int(live.sum()) * k.shape[1] * k.shape[3] * k.element_size()
    return kv + 2 * q.numel() * q.element_size()


def decode_case(
    batch: int, position: int, heads: int, kv_heads: int, head_dim: int, slots: int, **more
) -> dict:
    """A real model's shape: every row at the same position, one token each."""
    positions = [[position]] * batch
    return dict(positions=positions, heads=heads, kv_heads=kv_heads, head_dim=head_dim, slots=slots, **more)


DECODE_ATTENTION = Entry(
    name="decode_attention",
    make_inputs=decode_attention_inputs,
    run=lambda **inputs: (decode_attention(**inputs),),
    reference=decode_attention_reference,
    bounds=decode_attention_bounds,
    bytes_moved=decode_attention_bytes,
    small_cases={
        "one token": dict(positions=[[5]], heads=2, kv_heads=2, head_dim=64, slots=40),
        "first token": dict(positions=[[0], [39]], heads=2, kv_heads=1, head_dim=16, slots=40),
        "grouped heads, ragged rows": dict(
            positions=[[130], [3], [64]], heads=4, kv_heads=2, head_dim=32, slots=150
        ),
        "five tokens": dict(
            positions=[[20, 21, 22, 23, 24], [0, 1, 2, 3, 4]], heads=4, kv_heads=1, head_dim=64, slots=40
        ),
        "padding": dict(
            positions=[[7, 8, -1], [-1, -1, -1], [-1, -1, 0]], heads=2, kv_heads=1, head_dim=32, slots=20
        ),
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
        "prefill chunk": dict(
            positions=[list(range(30, 70))], heads=2, kv_heads=1, head_dim=32, slots=90, window=25
        ),
    },
    model_cases={
        "Llama-2-7B, 4 rows at 2048": decode_case(4, 2047, 32, 32, 128, 4096),
        "Llama-3-8B, 8 rows at 8192": decode_case(8, 8191, 32, 8, 128, 8192),
        "Llama-3-8B, 1 row at 2048": decode_case(1, 2047, 32, 8, 128, 8192),
        "Gemma-2b, 32 rows at 4096": decode_case(32, 4095, 8, 1, 256, 8192),
        "TinyLlama, 1 row at 1024": decode_case(1, 1023, 32, 4, 64, 2048),
    },
)


CATALOG: dict[str, Entry] = {entry.name: entry for entry in (DECODE_ATTENTION,)}
