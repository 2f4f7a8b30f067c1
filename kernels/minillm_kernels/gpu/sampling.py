"""A token out of logits in two launches: the filtered softmax, and the draw.

grid (rows): one program = one row, which it passes over a few times (it stays in the L2 cache) and never sorts. The
filters keep all tokens above a border, so the border is searched for, by halving the range of float32 numbers: first
the tokens near the best one are put together, those within 8 nats of it or, where that does not hold enough of them,
16, 32, all; then only these are looked at again, 32 times.

All sums are counted in whole units of 2^-44, which add up to the same in any order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm_kernels.launch import choose

UNITS = tl.constexpr(2.0**44)
LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _key(x):
    """int32 in the order of float32 x, -0 equal to 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The number of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _units(x):
    """x >= 0 in whole units; what is no number counts nothing."""
    return (tl.where(x > 0.0, x, 0.0) * UNITS + 0.5).to(tl.int64)


@triton.jit
def _above(keys, count, border, top, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of `keys` [count] are larger than `border`; by mass: how much exp(value - top) they hold, in units."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, count, BLOCK):
        key = tl.load(keys + start + lane, mask=start + lane < count, other=LOWEST)
        larger = (start + lane < count) & (key > border)
        if BY_MASS:
            total += tl.where(larger, _units(tl.exp(_value(key) - top)), 0)
        else:
            total += larger.to(tl.int64)
    return tl.sum(total, 0)


@triton.jit
def _border(keys, count, low, high, limit, top, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest number from `low` to `high` above which the keys number or hold less than `limit`: one of them."""
    while low < high:
        middle = (low + high) >> 1
        if _above(keys, count, middle, top, BY_MASS, BLOCK) < limit:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def probabilities_kernel(logits, out, keys, temperature, top_k, top_p, min_p, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    out += row * V
    keys += row * V
    lane = tl.arange(0, BLOCK)
    heat = tl.load(temperature + row)

    # The largest, and where it first stands; what is no number is larger than all.
    largest = tl.full([BLOCK], LOWEST, dtype=tl.int32)
    first = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits + start + lane, mask=start + lane < V, other=float("-inf"))
        key = tl.where(x != x, 0x7FFFFFFF, _key(x))
        first = tl.where(key > largest, start + lane, first)
        largest = tl.maximum(largest, key)
    best = tl.max(largest, 0)
    chosen = tl.min(tl.where(largest == best, first, V), 0)

    if heat == 0.0:
        for start in range(0, V, BLOCK):
            tl.store(out + start + lane, (start + lane == chosen).to(tl.float32), mask=start + lane < V)
    elif (best >= 0x7F800000) | (heat < 0.0) | ((tl.abs(tl.div_rn(_value(best), heat)) < float("inf")) == 0):
        for start in range(0, V, BLOCK):
            tl.store(out + start + lane, tl.full([BLOCK], float("nan"), tl.float32), mask=start + lane < V)
    else:
        top = tl.div_rn(_value(best), heat)
        total = tl.zeros([BLOCK], dtype=tl.int64)
        for start in range(0, V, BLOCK):
            x = tl.load(logits + start + lane, mask=start + lane < V, other=float("-inf"))
            total += _units(tl.exp(tl.div_rn(x, heat) - top))
        everything = tl.sum(total, 0)

        wanted = tl.full([], V, tl.int64)  # by top-k
        if top_k is not None:
            wanted = tl.minimum(tl.load(top_k + row), wanted)
        share = tl.full([], 1.0, tl.float32)  # of the mass, by top-p
        if top_p is not None:
            share = tl.load(top_p + row)

        border = tl.full([], LOWEST, tl.int64)  # smaller keys are dropped
        last = tl.full([], V, tl.int32)  # so are those equal to it behind this place
        limit = tl.ceil(share.to(tl.float64) * everything.to(tl.float64)).to(tl.int64)
        if (wanted < V) | (share < 1.0):
            # Put the keys together that are near enough to the best one.
            depth, floor, proven = tl.full([], 4.0, tl.float32), top, tl.full([], 0, tl.int1)
            while proven == 0:
                depth += depth
                floor = tl.where(depth < 64.0, top - depth, float("-inf"))
                near, mass = tl.zeros([BLOCK], dtype=tl.int32), tl.zeros([BLOCK], dtype=tl.int64)
                for start in range(0, V, BLOCK):
                    x = tl.load(logits + start + lane, mask=start + lane < V, other=float("-inf"))
                    scaled = tl.div_rn(x, heat)
                    counts = (start + lane < V) & (scaled >= floor)
                    near += counts.to(tl.int32)
                    mass += tl.where(counts, _units(tl.exp(scaled - top)), 0)
                enough = tl.where(
                    wanted < V,
                    tl.sum(near, 0) >= wanted,
                    tl.sum(mass, 0) >= limit,
                )
                proven = enough | (depth >= 64.0)
            count = tl.zeros([], tl.int32)
            for start in range(0, V, BLOCK):
                x = tl.load(logits + start + lane, mask=start + lane < V, other=float("-inf"))
                scaled = tl.div_rn(x, heat)
                taken = ((start + lane < V) & (scaled >= floor)).to(tl.int32)
                place = count + tl.cumsum(taken, 0) - taken
                tl.store(keys + place, _key(scaled), mask=taken != 0)
                count += tl.sum(taken, 0)
            tl.debug_barrier()  # other threads read what was stored

            low, high = _key(floor).to(tl.int64), _key(top).to(tl.int64)
            if wanted < V:
                low = _border(keys, count, low, high, wanted, top, False, BLOCK)
                border = low
            if share < 1.0:
                if wanted < V:
                    left = _above(keys, count, border - 1, top, True, BLOCK)
                    limit = tl.ceil(share.to(tl.float64) * left.to(tl.float64)).to(tl.int64)
                border = _border(keys, count, low, high, limit, top, True, BLOCK)
                # As many of those at the border as it takes to reach the limit, in the order of their ids.
                each = _units(tl.exp(_value(border.to(tl.int32)) - top))
                missing = limit - _above(keys, count, border, top, True, BLOCK)
                equal = _above(keys, count, border - 1, top, False, BLOCK)
                equal -= _above(keys, count, border, top, False, BLOCK)
                if equal * each > missing + each - 1:
                    seen = tl.zeros([], tl.int64)
                    for start in range(0, V, BLOCK):
                        x = tl.load(logits + start + lane, mask=start + lane < V, other=float("-inf"))
                        same = ((start + lane < V) & (_key(tl.div_rn(x, heat)) == border)).to(tl.int64)
                        before = (seen + tl.cumsum(same, 0) - same) * each
                        last = tl.minimum(last, tl.min(tl.where((same != 0) & (before >= missing), start + lane, V), 0))
                        seen += tl.sum(same, 0)
            tl.debug_barrier()  # the keys lie where the results go

        kept = tl.zeros([BLOCK], dtype=tl.int64)
        for start in range(0, V, BLOCK):
            x = tl.load(logits + start + lane, mask=start + lane < V, other=float("-inf"))
            scaled = tl.div_rn(x, heat)
            weight, key = tl.exp(scaled - top), _key(scaled)
            stays = (key > border) | ((key == border) & (start + lane < last))
            if min_p is not None:
                stays = stays & (weight >= tl.load(min_p + row))
            weight = tl.where(stays, weight, 0.0)
            kept += _units(weight)
            tl.store(out + start + lane, weight, mask=start + lane < V)
        rest = tl.sum(kept, 0).to(tl.float32) / UNITS
        for start in range(0, V, BLOCK):
            weight = tl.load(out + start + lane, mask=start + lane < V, other=0.0)
            tl.store(out + start + lane, tl.div_rn(weight, rest), mask=start + lane < V)


@triton.jit
def _mix(z):
    """SplitMix64's finaliser, uint64."""
    z += 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def draw_kernel(probs, out, seed, position, stream, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    probs += row * V
    lane = tl.arange(0, BLOCK)
    bits = _mix(tl.load(seed + row).to(tl.uint64, bitcast=True))
    bits = _mix(_mix(bits ^ tl.load(position + row).to(tl.uint64, bitcast=True)) ^ tl.full([], stream, tl.uint64))
    u = (bits >> 11).to(tl.float64) * (2.0**-53)

    total = tl.zeros([BLOCK], dtype=tl.int64)
    for start in range(0, V, BLOCK):
        total += _units(tl.load(probs + start + lane, mask=start + lane < V, other=0.0))
    # The first token with which the sum is larger than this.
    target = tl.floor(u * tl.sum(total, 0).to(tl.float64)).to(tl.int64)

    token, passed = tl.full([], V - 1, tl.int32), tl.zeros([], tl.int64)
    for start in range(0, V, BLOCK):
        units = _units(tl.load(probs + start + lane, mask=start + lane < V, other=0.0))
        beyond = passed + tl.sum(units, 0)
        if (passed <= target) & (beyond > target):
            reached = passed + tl.cumsum(units, 0) > target
            token = tl.min(tl.where(reached, start + lane, V - 1), 0)
        passed = beyond
    tl.store(out + row, token.to(tl.int64))


def probabilities(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """Launch for `minillm::probabilities`; see there for the arguments."""
    logits, out = logits.contiguous(), torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    columns = (None if column is None else column.contiguous() for column in (temperature, top_k, top_p, min_p))
    if logits.shape[0] > 0:
        probabilities_kernel[(logits.shape[0],)](
            logits, out, out.view(torch.int32), *columns,
            V=logits.shape[1], **choose("sampling", logits, logits.shape[1]).arguments(),
        )  # fmt: skip
    return out


def draw(probs: Tensor, seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """Launch for `minillm::draw`; see there for the arguments."""
    out = torch.empty(probs.shape[0], dtype=torch.int64, device=probs.device)
    if probs.shape[0] > 0:
        draw_kernel[(probs.shape[0],)](
            probs.contiguous(), out, seed.contiguous(), position.contiguous(), stream,
            V=probs.shape[1], **choose("sampling", probs, probs.shape[1]).arguments(),
        )  # fmt: skip
    return out
