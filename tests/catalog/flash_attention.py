"""flash_attention: causal attention over whole sequences."""

import itertools

import torch
import torch.nn.functional as F
from minillm_kernels.flash_attention import flash_attention

from catalog.attention import attend_one_token, attention_bound
from catalog.decode_attention import decode_attention_flops, decode_attention_inputs, decode_attention_reference
from catalog.entry import Entry, Results


def flash_attention_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """`lengths`: one sequence per batch row, all alike, or with `packed` several laid end to end; or `positions` of a
    step's tokens over a cache, as for decode_attention."""
    if "positions" in case:
        return decode_attention_inputs(case, dtype, device, generator)
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


def flash_attention_reference(
    q, k, v, scale, window, softcap, alibi_slopes, cu_seqlens=None, cache_position=None
) -> Results:
    """One token at a time, over the keys of its own sequence that it sees."""
    if cache_position is not None:
        return decode_attention_reference(q, k, v, cache_position, scale, window, softcap, alibi_slopes)
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


def chunk_case(starts: list[int], tokens: int, heads: int, kv_heads: int, head_dim: int, slots: int, **more) -> dict:
    positions = [list(range(start, start + tokens)) for start in starts]
    return dict(positions=positions, heads=heads, kv_heads=kv_heads, head_dim=head_dim, slots=slots, **more)


def flash_attention_flops(q, window, cu_seqlens=None, cache_position=None, **_) -> int:
    if cache_position is not None:
        return decode_attention_flops(q, cache_position, window)
    batch, heads, tokens, head_dim = q.shape
    ends = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    pairs = sum(min(token + 1, window or tokens) for length in lengths for token in range(length))
    return 4 * batch * heads * head_dim * pairs


def causal_sdpa(q, k, v, scale, softcap, alibi_slopes, cu_seqlens=None, cache_position=None, **_):
    if any(given is not None for given in (softcap, alibi_slopes, cu_seqlens, cache_position)):
        return None
    grouped = q.shape[1] != k.shape[1]
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


ENTRY = Entry(
    op=flash_attention,
    make_inputs=flash_attention_inputs,
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
        # Where a window begins or ends on the edge of a tile (of 16, 32 and 64 keys), or a token beside it
        **{f"window {n}": flash_case([130], 1, 1, 16, window=n) for n in (47, 48, 50, 63)},
        "softcap": flash_case([70], 2, 1, 32, softcap=5.0),
        "alibi": flash_case([70], 4, 2, 32, alibi=True),
        "packed": flash_case([70, 1, 3, 40, 33], 2, 1, 32, packed=True),
        "everything": flash_case([90, 5, 60], 4, 2, 48, packed=True, window=30, softcap=20.0, alibi=True),
        "wide head": flash_case([50], 1, 1, 256),
        # A chunk over a cache: the tokens at these positions, and all before them
        "chunks, grouped heads": chunk_case([40, 0], 20, 4, 2, 32, 70),
        "chunk that fills the cache": chunk_case([100], 30, 2, 1, 16, 130),
        # Rings just long enough, which wrap before, within and behind the chunk
        **{f"ring, chunk at {n}": chunk_case([n], 40, 2, 1, 16, 64, window=25) for n in (24, 100)},
        "ring, tiles beside its turn": chunk_case([190], 18, 1, 1, 16, 66, window=49),
        "chunk, padding": dict(
            positions=[[*range(50, 70), *[-1] * 5], [-1] * 25, [*[-1] * 9, *range(16)]],
            heads=2,
            kv_heads=1,
            head_dim=16,
            slots=70,
        ),
        "chunk, everything": chunk_case([150], 33, 4, 2, 48, 72, window=40, softcap=20.0, alibi=True),
    },
    model_cases={
        "Llama-2-7B, 2048 tokens": flash_case([2048], 32, 32, 128),
        "Llama-3-8B, 4096 tokens": flash_case([4096], 32, 8, 128),
        "Gemma-2b, 2048 tokens": flash_case([2048], 8, 1, 256),
        "Gemma-2-9b layer, 4096 tokens": flash_case([4096], 16, 8, 256, window=4096, softcap=50.0),
        "TinyLlama, 4 packed": flash_case([512, 1024, 256, 256], 32, 4, 64, packed=True),
        "MPT-7b, 2048 tokens": flash_case([2048], 32, 32, 128, alibi=True),
        "Llama-3-8B, chunk of 2048 at 8192": chunk_case([6144], 2048, 32, 8, 128, 8192),
        "Gemma-2-9b layer, chunk of 2048": chunk_case([4000], 2048, 16, 8, 256, 6143, window=4096, softcap=50.0),
    },
    flops=flash_attention_flops,
    library=("SDPA, causal", causal_sdpa),
)
