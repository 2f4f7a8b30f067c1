"""flash_attention: causal attention of many tokens over a cache."""

import torch.nn.functional as F
from minillm_kernels.flash_attention import flash_attention

from catalog.attention import attention_bound
from catalog.decode_attention import decode_attention_flops, decode_attention_inputs, decode_attention_reference
from catalog.entry import Entry


def chunk_case(starts: list[int], tokens: int, heads: int, kv_heads: int, head_dim: int, slots: int, **more) -> dict:
    """Per row the positions from `starts` on, of one token after the other, over a cache that holds all before them."""
    positions = [list(range(start, start + tokens)) for start in starts]
    return dict(positions=positions, heads=heads, kv_heads=kv_heads, head_dim=head_dim, slots=slots, **more)


def causal_sdpa(q, k, v, cache_position, scale, window, softcap, alibi_slopes):
    """For a prompt from its beginning; SDPA has no causal mask that begins elsewhere."""
    if window is not None or softcap is not None or alibi_slopes is not None or k.shape[2] != q.shape[2]:
        return None
    grouped = q.shape[1] != k.shape[1]
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)


ENTRY = Entry(
    op=flash_attention,
    make_inputs=decode_attention_inputs,
    reference=decode_attention_reference,
    bounds=lambda expected, q, k, v, scale, softcap, **_: (attention_bound(expected[0], q, k, v, scale, softcap),),
    bytes_moved=lambda q, k, v, **_: (2 * q.numel() + k.numel() + v.numel()) * q.element_size(),
    small_cases={
        "one token": chunk_case([0], 1, 2, 1, 32, 1),
        "one tile": chunk_case([0, 0], 17, 2, 2, 32, 17),
        "ragged, grouped heads": chunk_case([0], 147, 4, 2, 32, 147),
        "odd head size": chunk_case([0], 40, 2, 1, 80, 40),
        "window": chunk_case([0], 150, 2, 1, 16, 150, window=20),
        "wide window": chunk_case([0], 150, 1, 1, 16, 150, window=100),
        # Where a window begins or ends on the edge of a tile (of 16, 32 and 64 keys), or a token beside it
        **{f"window {n}": chunk_case([0], 130, 1, 1, 16, 130, window=n) for n in (47, 48, 50, 63)},
        "softcap": chunk_case([0], 70, 2, 1, 32, 70, softcap=5.0),
        "alibi": chunk_case([0], 70, 4, 2, 32, 70, alibi=True),
        "everything": chunk_case([0], 155, 4, 2, 48, 155, window=30, softcap=20.0, alibi=True),
        "wide head": chunk_case([0], 50, 1, 1, 256, 50),
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
        "Llama-2-7B, 2048 tokens": chunk_case([0], 2048, 32, 32, 128, 2048),
        "Llama-3-8B, 4096 tokens": chunk_case([0], 4096, 32, 8, 128, 4096),
        "Gemma-2b, 2048 tokens": chunk_case([0], 2048, 8, 1, 256, 2048),
        "Gemma-2-9b layer, 4096 tokens": chunk_case([0], 4096, 16, 8, 256, 4096, window=4096, softcap=50.0),
        "TinyLlama, 2048 tokens": chunk_case([0], 2048, 32, 4, 64, 2048),
        "MPT-7b, 2048 tokens": chunk_case([0], 2048, 32, 32, 128, 2048, alibi=True),
        "Llama-3-8B, chunk of 2048 at 8192": chunk_case([6144], 2048, 32, 8, 128, 8192),
        "Gemma-2-9b layer, chunk of 2048": chunk_case([4000], 2048, 16, 8, 256, 6143, window=4096, softcap=50.0),
    },
    flops=decode_attention_flops,
    library=("SDPA, causal", causal_sdpa),
)
