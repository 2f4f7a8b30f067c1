"""RoPE and the cache write in one launch.

grid (B * T, H + KV): one program = one head of one token; programs beyond H take a key head: they rotate k into its
slot and copy v beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm_kernels.launch import choose


@triton.jit
def rotate_head(source, target, cos, sin, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """target[0:D] = source[0:D] with the first 2 * HALF channels turned by their angles."""
    # Every channel loads its partner too (both come from the same cache line): one shape for the
    # channels that turn and those that pass through.
    channel = tl.arange(0, BLOCK)
    mask = channel < D
    turns = channel < 2 * HALF
    second = channel >= HALF
    partner = tl.where(second, channel - HALF, channel + HALF)
    angle = tl.where(second, channel - HALF, channel)
    x = tl.load(source + channel, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(source + partner, mask=turns, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=turns, other=1.0)
    s = tl.load(sin + angle, mask=turns, other=0.0)
    tl.store(target + channel, x * c + tl.where(second, y, -y) * s, mask=mask)


@triton.jit(do_not_specialize=["slots", "tokens"])
def rope_and_cache_write_kernel(
    q, k, v, cos, sin, k_cache, v_cache, cache_position, out,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    k_cache_batch, k_cache_head, k_cache_slot, v_cache_batch, v_cache_head, v_cache_slot, slots, tokens,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // tokens).to(tl.int64)  # int64, all three: a cache can pass 2^31 elements
    token = (tl.program_id(0) % tokens).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    cos += (batch * tokens + token) * HALF
    sin += (batch * tokens + token) * HALF
    if head < HEADS:
        source = q + batch * q_batch + token * q_token + head * q_head
        rotate_head(source, out + ((batch * HEADS + head) * tokens + token) * D, cos, sin, D, HALF, BLOCK)
    else:
        position = tl.load(cache_position + batch * tokens + token)
        if position >= 0:
            head -= HEADS
            slot = position % slots
            source = k + batch * k_batch + token * k_token + head * k_head
            target = k_cache + batch * k_cache_batch + head * k_cache_head + slot * k_cache_slot
            rotate_head(source, target, cos, sin, D, HALF, BLOCK)
            channel = tl.arange(0, BLOCK)
            source = v + batch * v_batch + token * v_token + head * v_head
            target = v_cache + batch * v_cache_batch + head * v_cache_head + slot * v_cache_slot
            tl.store(target + channel, tl.load(source + channel, mask=channel < D), mask=channel < D)


def rope_and_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_position: Tensor,
) -> Tensor:
    """Launch for `minillm::rope_and_cache_write`; see there for the arguments."""
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty((batch, heads, tokens, head_dim), dtype=q.dtype, device=q.device)
    if batch * tokens == 0:
        return out
    rope_and_cache_write_kernel[(batch * tokens, heads + k.shape[2])](
        q, k, v, cos.contiguous(), sin.contiguous(), k_cache, v_cache, cache_position.contiguous(), out,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        k_cache.shape[2] - 1, tokens,
        HEADS=heads, D=head_dim, HALF=cos.shape[-1], BLOCK=triton.next_power_of_2(head_dim),
        **choose("rope_and_cache_write", q, head_dim).arguments(),
    )  # fmt: skip
    return out
