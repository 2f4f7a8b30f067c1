"""StaticCache: what is visible, what a rollback keeps, what is refused; whole-model invariants."""

import random

import pytest
import torch
from families import FAMILIES, prompt_ids

from minillm.cache import StaticCache
from minillm.errors import CacheError, MinillmError
from minillm.load.backends import BACKENDS
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config, parse_config

# Families that differ in how they use the cache: full layers, windows everywhere, windows on some.
MODELS = ["llama3", "mistral-v0.1", "qwen2-window", "gemma2", "gemma3", "phi3"]

# The same numbers added in another order (other chunk sizes, other key lengths, other batch shapes):
# no more than rounding. Logits here are of size 10, float32 has 2^-23 of that per operation, and
# test_families.py measures under 4e-5 between fp32 and fp64; a wrong mask moves them by over 1e-2.
SAME = dict(rtol=0.0, atol=2e-5)


def run(model, cache, rows, starts, width=None):
    """One forward pass of rows of different length, padded on the right; list of logits [len(row), V]."""
    width = width or max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    position = torch.full((len(rows), width), -1)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        position[i, : len(row)] = torch.arange(start, start + len(row))
    logits = model(ids, position, cache)
    assert logits.isfinite().all()
    return [logits[i, : len(row)] for i, row in enumerate(rows)]


def feed(model, cache, ids, chunk, start=0):
    """Feed one row in chunks; logits [len(ids), V], or None of nothing."""
    pieces = [run(model, cache, [ids[i : i + chunk]], [start + i])[0] for i in range(0, len(ids), chunk)]
    return torch.cat(pieces) if pieces else None


def cache_of(model, rows=1, length=64, **keywords):
    return StaticCache(model.config, rows, length, **keywords)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [1, 3, 16, 50])
def test_chunked_prefill_equals_whole(name, chunk, ours):
    model, ids = ours(name), prompt_ids(50, seed=3)
    whole = run(model, cache_of(model), [ids], [0])[0]
    chunked = feed(model, cache_of(model, max_step=chunk), ids, chunk)
    torch.testing.assert_close(chunked, whole, **SAME)


@pytest.mark.parametrize("name", MODELS)
def test_batched_equals_single(name, ours):
    model = ours(name)
    rows = [prompt_ids(n, seed=n) for n in (1, 9, 20, 37)]
    cache = cache_of(model, rows=4)
    together = run(model, cache, rows, [0] * 4)
    steps = [[7], [8], [9], [10]]
    after = run(model, cache, steps, [len(row) for row in rows])
    for i, row in enumerate(rows):
        alone = cache_of(model)
        torch.testing.assert_close(together[i], run(model, alone, [row], [0])[0], **SAME)
        torch.testing.assert_close(after[i], run(model, alone, [steps[i]], [len(row)])[0], **SAME)
    assert cache.token_ids == [row + step for row, step in zip(rows, steps, strict=True)]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_equals_unpadded(name, side, ours):
    """32 padding slots, wherever they stand: same logits, nothing NaN, nothing stored."""
    model, ids = ours(name), prompt_ids(20, seed=4)
    plain_cache, padded_cache = cache_of(model), cache_of(model)
    plain = run(model, plain_cache, [ids], [0])[0]
    left, right = {"left": (32, 0), "right": (0, 32), "both": (16, 16)}[side]
    padded_ids = torch.tensor([[5] * left + ids + [5] * right])
    position = torch.tensor([[-1] * left + list(range(20)) + [-1] * right])
    padded = model(padded_ids, position, padded_cache)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[0, left : left + 20], plain, rtol=0.0, atol=1e-5)
    assert padded_cache.token_ids == [ids]
    step = run(model, padded_cache, [[6]], [20])[0]
    torch.testing.assert_close(step, run(model, plain_cache, [[6]], [20])[0], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("backend", [name for name, backend in BACKENDS.items() if not backend.gpu_only])
@pytest.mark.parametrize("name", ["llama3", "mistral-v0.1"])
def test_a_row_of_padding_is_left_as_it_was(name, backend, checkpoint):
    """A finished row rides along as padding: its neighbours do not notice, and it can go on later.

    Every slot of its ring (24 after 30 tokens) is in use, the last one too.
    """
    model = load_decoder(checkpoint(name), load_config(checkpoint(name)), torch.float32, "cpu", attention=backend)
    ids = prompt_ids(30, seed=5)
    cache, alone = (cache_of(model, rows=n, length=42, max_step=16) for n in (2, 1))
    for start in (0, 15):
        run(model, cache, [ids[start : start + 15]] * 2, [start] * 2)
        run(model, alone, [ids[start : start + 15]], [start])
    for i in range(12):
        run(model, cache, [[20 + i], []], [30 + i, 0], width=1)
    assert cache.lengths == [42, 30]
    for place in range(30, 42):  # up to the last slot
        late = run(model, cache, [[], [9]], [0, place], width=1)[1]
        torch.testing.assert_close(late, run(model, alone, [[9]], [place])[0], **SAME)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("length", "cut"), [(12, 5), (30, 24), (50, 43), (50, 49), (40, 0)])
def test_truncate_and_redo_equals_never_did(name, length, cut, ours):
    """Cut back by up to max_step tokens and write others: as if the first ones had never been there."""
    model, wrong, right = ours(name), prompt_ids(length, seed=6), prompt_ids(12, seed=7)
    cache, clean = cache_of(model, max_step=8), cache_of(model, max_step=8)
    feed(model, cache, wrong, 8)
    cache.truncate(cut)
    assert (cache.lengths, cache.token_ids) == ([cut], [wrong[:cut]])
    redone = feed(model, cache, right, 5, start=cut)
    feed(model, clean, wrong[:cut], 8)
    expected = feed(model, clean, right, 5, start=cut)
    torch.testing.assert_close(redone, expected, **SAME)
    assert cache.token_ids == clean.token_ids == [wrong[:cut] + right]
    # And it can be done again, also after a cut to nothing.
    for each in (cache, clean):
        each.truncate(cut + 4)
    again = [run(model, each, [[9]], [cut + 4])[0] for each in (cache, clean)]
    torch.testing.assert_close(again[0], again[1], **SAME)


@pytest.mark.parametrize("max_step", [1, 3, 8])
@pytest.mark.parametrize("length", [15, 20, 31])
@pytest.mark.parametrize("name", ["mistral-v0.1", "gemma3"])
def test_every_cut_near_the_wrap_is_exact_or_refused(name, length, max_step, ours):
    """Each cut from max_step + 4 tokens down to none: up to max_step must succeed, beyond may only refuse."""
    model, ids = ours(name), prompt_ids(length, seed=14)
    expected = run(model, cache_of(model), [[*ids]], [0])[0]
    refused = 0
    for cut in range(max(length - max_step - 4, 1), length):
        cache = cache_of(model, max_step=max_step)
        feed(model, cache, ids, max_step)
        try:
            cache.truncate(cut)
        except CacheError:
            assert length - cut > max_step
            refused += 1
            continue
        torch.testing.assert_close(run(model, cache, [[ids[cut]]], [cut])[0], expected[cut : cut + 1], **SAME)
    assert refused > 0 or max_step == 8


@pytest.mark.parametrize("name", ["mistral-v0.1", "qwen2-window", "gemma2", "gemma3", "phi3"])
def test_truncate_too_far_past_the_wrap_raises_and_changes_nothing(name, ours):
    model, ids = ours(name), prompt_ids(50, seed=8)
    cache, twin = cache_of(model, max_step=4), cache_of(model, max_step=4)
    feed(model, cache, ids, 4)
    feed(model, twin, ids, 4)
    with pytest.raises(CacheError, match="truncate"):
        cache.truncate(20)  # the ring holds window + 3 positions: 20's window is long overwritten
    assert cache.token_ids == [ids]
    torch.testing.assert_close(run(model, cache, [[9]], [50])[0], run(model, twin, [[9]], [50])[0], **SAME)


def test_a_ring_that_is_just_full_can_be_cut_anywhere(ours):
    """16 slots hold 16 tokens, all of them; with the 17th the first is gone, and so are the cuts that need it."""
    model, ids = ours("mistral-v0.1"), prompt_ids(17, seed=8)
    for length, exact in ((16, True), (17, False)):
        cache, clean = cache_of(model, max_step=8), cache_of(model, max_step=8)
        feed(model, cache, ids[:length], 8)
        assert cache.can_truncate(0, 3) == exact
    feed(model, clean, ids[:3], 8)
    cache.reset()
    feed(model, cache, ids[:16], 8)
    cache.truncate(3)
    torch.testing.assert_close(run(model, cache, [[9]], [3])[0], run(model, clean, [[9]], [3])[0], **SAME)


def test_an_interrupted_pass_has_overwritten_what_it_wrote(ours):
    """Its ids do not count, but its keys are in the ring: cuts are exact only as if it had succeeded."""

    def halt(*_):
        raise KeyboardInterrupt

    model, ids = ours("mistral-v0.1"), prompt_ids(32, seed=8)
    cache, clean = cache_of(model, max_step=8), cache_of(model, max_step=8)
    feed(model, cache, ids[:24], 8)
    assert cache.can_truncate(0, 16)
    hook = model.blocks[-1].mlp.register_forward_pre_hook(halt)
    with pytest.raises(KeyboardInterrupt):
        run(model, cache, [ids[24:]], [24])
    hook.remove()
    assert cache.token_ids == [ids[:24]]
    assert not cache.can_truncate(0, 23)
    with pytest.raises(CacheError, match="overwritten"):
        cache.truncate(16)
    feed(model, clean, ids[:24], 8)
    torch.testing.assert_close(run(model, cache, [[9]], [24])[0], run(model, clean, [[9]], [24])[0], **SAME)


def test_positions_of_a_step_follow_one_another(ours):
    """Position 2 computed without position 1 would be wrong for ever: refused, like what goes back or stands still."""
    model = ours("llama3")
    cache = cache_of(model)
    run(model, cache, [[5]], [0])
    for places in ([1, 3], [3, 2], [1, 1], [1, -1, 1], [1, -1, 3]):
        with pytest.raises(CacheError, match="one after the other"):
            model(torch.full((1, len(places)), 8), torch.tensor([places]), cache)
    assert cache.token_ids == [[5]]


def test_full_layers_can_be_cut_anywhere(ours):
    model, ids = ours("llama3"), prompt_ids(50, seed=8)
    cache, clean = cache_of(model, max_step=4), cache_of(model, max_step=4)
    feed(model, cache, ids, 4)
    cache.truncate(3)
    feed(model, clean, ids[:3], 4)
    torch.testing.assert_close(run(model, cache, [[9]], [3])[0], run(model, clean, [[9]], [3])[0], **SAME)


@pytest.mark.parametrize("written", range(9))
def test_cut_write_a_little_and_cut_deeper(written, ours):
    """What a ring has overwritten it does not get back by being cut: after 30 tokens in steps of 8 nothing below 22 is
    to be had, however few were written since the first cut."""
    model, ids, new = ours("mistral-v0.1"), prompt_ids(30, seed=15), prompt_ids(9, seed=16)
    for deeper in range(15, 23):
        cache = cache_of(model, max_step=8)
        feed(model, cache, ids, 8)
        cache.truncate(22)
        feed(model, cache, new[:written], 8, start=22)
        assert cache.can_truncate(0, deeper) == (deeper == 22)
        if deeper < 22:
            with pytest.raises(CacheError, match="shortest exact cut is 22"):
                cache.truncate(deeper)
            assert cache.token_ids == [ids[:22] + new[:written]]
            continue
        cache.truncate(22)
        expected = run(model, cache_of(model), [[*ids[:22], 9]], [0])[0][-1:]
        torch.testing.assert_close(run(model, cache, [[9]], [22])[0], expected, **SAME)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", ["mistral-v0.1", "gemma3"])
def test_random_walks_around_the_wrap(name, seed, ours):
    """Property: after any sequence of steps and cuts the logits are those of the plain token list.

    Every cut either is exact or raises; `can_truncate` is not consulted, so a cut that wrongly succeeds
    shows up as wrong logits. Afterwards every cut inside the promised max_step must have succeeded.
    """
    model, random_ = ours(name), random.Random(seed)
    max_step = random_.choice([1, 2, 5, 8])
    cache, text, high, cuts = cache_of(model, max_step=max_step), [], 0, 0
    for _ in range(14):
        count = random_.randint(1, max_step)
        if len(text) + count > 64:
            break
        new = [random_.randint(4, 130) for _ in range(count)]
        logits = run(model, cache, [new], [len(text)])[0]
        text += new
        high = max(high, len(text))
        expected = run(model, cache_of(model), [text], [0])[0][-count:]
        torch.testing.assert_close(logits, expected, **SAME)
        if random_.random() < 0.5:
            cut = random_.randint(0, len(text))
            try:
                cache.truncate(cut)
                cuts += 1
                text = text[:cut]
                high = 0 if cut == 0 else high
            except CacheError:
                assert cut < high - max_step  # a rollback of up to max_step tokens is promised
        assert cache.token_ids == [text]
    assert cuts > 0


def test_rows_are_cut_independently(ours):
    model = ours("mistral-v0.1")
    rows = [prompt_ids(n, seed=n) for n in (40, 10, 25)]
    cache = cache_of(model, rows=3, max_step=8)
    for start in range(0, 40, 8):
        run(model, cache, [row[start : start + 8] for row in rows], [start] * 3, width=8)
    keep = [35, 0, 22]
    cache.truncate(keep)
    assert cache.lengths == keep
    new = [prompt_ids(6, seed=50 + i) for i in range(3)]
    redone = run(model, cache, new, keep)
    for i, row in enumerate(rows):
        clean = cache_of(model, max_step=8)
        feed(model, clean, row[: keep[i]], 8)
        torch.testing.assert_close(redone[i], run(model, clean, [new[i]], [keep[i]])[0], **SAME)


def test_truncate_argument_errors(ours):
    model = ours("llama3")
    cache = cache_of(model, rows=2)
    run(model, cache, [prompt_ids(5), prompt_ids(9)], [0, 0])
    for bad in (-1, 6, [5], [5, 10], [5, 9, 1], [-1, 3]):
        with pytest.raises(CacheError):
            cache.truncate(bad)
        assert cache.lengths == [5, 9]
    cache.truncate([5, 9])
    assert cache.lengths == [5, 9]


@pytest.mark.parametrize("name", MODELS)
def test_reset_equals_new(name, ours):
    model, ids = ours(name), prompt_ids(20, seed=9)
    cache = cache_of(model, max_step=8)
    feed(model, cache, prompt_ids(60, seed=10), 8)
    addresses = [tensor.data_ptr() for tensor in cache.keys + cache.values]
    cache.reset()
    assert (cache.lengths, cache.token_ids) == ([0], [[]])
    torch.testing.assert_close(feed(model, cache, ids, 8), feed(model, cache_of(model, max_step=8), ids, 8), **SAME)
    assert [tensor.data_ptr() for tensor in cache.keys + cache.values] == addresses  # nothing reallocated


@pytest.mark.parametrize("name", ["llama3", "mistral-v0.1"])
def test_stale_slots_are_invisible_whatever_they_hold(name, ours):
    """NaN left behind by a reset or a cut must not leak: weight 0 times NaN would be NaN."""
    model, ids = ours(name), prompt_ids(20, seed=11)
    cache, clean = cache_of(model), cache_of(model)
    for tensor in cache.keys + cache.values:
        tensor.fill_(1e4)  # huge but finite: visible at once if any weight is not exactly 0
    torch.testing.assert_close(feed(model, cache, ids, 7), feed(model, clean, ids, 7), **SAME)


@pytest.mark.parametrize("name", ["llama3", "mistral-v0.1"])
def test_capacity_does_not_change_the_result(name, ours):
    """Compare logits, not text: other capacities may add in another order."""
    model, ids = ours(name), prompt_ids(40, seed=12)
    tight = run(model, cache_of(model, length=40), [ids], [0])[0]
    roomy = run(model, cache_of(model, length=500), [ids], [0])[0]
    torch.testing.assert_close(tight, roomy, **SAME)


def test_only_an_empty_cache_is_planned_anew(ours):
    """Keys that were turned by one clock must not meet queries turned by another."""
    model, ids = ours("phi3"), prompt_ids(20, seed=9)  # longrope, 64 original positions
    cache, short = cache_of(model, length=128), cache_of(model, length=128, planned_length=30)
    run(model, cache, [[5]], [0])
    with pytest.raises(CacheError, match="reset"):
        cache.plan(30)
    cache.reset()
    cache.plan(30)
    torch.testing.assert_close(run(model, cache, [ids], [0])[0], run(model, short, [ids], [0])[0], **SAME)


def test_memory_is_the_ring_and_nothing_grows(ours):
    """window + max_step - 1 slots (and the bin) for sliding layers, max_cache_len for full ones."""
    model = ours("gemma3")  # layers: window 9, 9, full, 9
    cache = cache_of(model, rows=2, length=300, max_step=16)
    slots = [tensor.shape[2] for tensor in cache.keys]
    assert slots == [9 + 16 - 1 + 1, 9 + 16 - 1 + 1, 301, 9 + 16 - 1 + 1]
    assert cache.keys[0].shape == (2, 1, 25, 16)  # [B, KV, S + 1, D]
    per_slot = 2 * 1 * 16 * 4  # rows, kv heads, head_dim, bytes of float32
    assert cache.nbytes == 2 * sum(slots) * per_slot
    before = [tensor.data_ptr() for tensor in cache.keys + cache.values]
    for start in range(0, 64, 16):
        run(model, cache, [prompt_ids(16)] * 2, [start] * 2)
    assert [tensor.data_ptr() for tensor in cache.keys + cache.values] == before


def test_too_small_a_cache_is_an_error_before_anything_is_written(ours):
    model = ours("llama3")
    cache = cache_of(model, length=10)
    run(model, cache, [prompt_ids(8)], [0])
    with pytest.raises(CacheError, match="10"):
        run(model, cache, [[4, 5, 6]], [8])
    assert cache.lengths == [8]
    with pytest.raises(CacheError, match="max_step"):
        run(model, cache_of(model, max_step=4), [prompt_ids(5)], [0])
    with pytest.raises(CacheError, match="max_step 10"):  # no step is longer than the cache, padded or not
        run(model, cache_of(model, length=10), [prompt_ids(3)], [0], width=11)
    with pytest.raises(CacheError):
        run(model, cache_of(model, rows=2), [prompt_ids(5)], [0])  # one row into a cache of two
    with pytest.raises(CacheError):
        model(torch.tensor([[4, 5]]), torch.tensor([[0]]), cache_of(model))


@pytest.mark.parametrize(
    "bad",
    [
        dict(batch_size=0),
        dict(batch_size=1.5),
        dict(max_cache_len=0),
        dict(max_cache_len=-5),
        dict(max_cache_len="64"),
        dict(max_step=0),
        dict(planned_length=0),
        dict(planned_length=65),
        dict(planned_length=[3, 4]),
    ],
    ids=str,
)
def test_bad_sizes(bad, ours):
    arguments = dict(batch_size=1, max_cache_len=64) | bad
    with pytest.raises(CacheError, match=next(iter(bad))):
        StaticCache(ours("llama3").config, **arguments)
    assert issubclass(CacheError, MinillmError)


def test_key_length_bound_does_not_change_the_result(ours):
    """The host's bound on the newest position only saves reading; any bound that holds gives the same."""
    for name in ("llama3", "mistral-v0.1", "gemma3"):
        model, ids = ours(name), prompt_ids(20, seed=13)
        position = torch.arange(20)[None]
        expected = model(torch.tensor([ids]), position, cache_of(model))
        for bound in (20, 33, 64, 1000):
            cache = cache_of(model)
            x, rotary = model.embed(torch.tensor([ids]), position, cache)
            logits = model.logits(model.walk(x, rotary, position, cache, bound))
            torch.testing.assert_close(logits, expected, **SAME)


@pytest.mark.parametrize("places", [[[2], [-1]], [[-1], [3]], [[5], [0]], [[-1, 4, 5], [3, 4, -1]], [[0, 1], [1, -1]]])
def test_the_books_are_kept_alike_where_nobody_looks(places, ours):
    """On a GPU, and in a compiled graph, tensor operations do what loops over the rows do on a CPU."""
    model, position = ours("llama3"), torch.tensor(places)
    looked, blind = (cache_of(model, rows=2) for _ in range(2))
    for cache in (looked, blind):
        run(model, cache, [prompt_ids(5, seed=1), prompt_ids(3, seed=2)], [0, 0])
    ids = torch.full_like(position, 9)
    with looked.writing(model, ids, position):
        blind._forget(position)
        assert blind.token_ids == looked.token_ids
    blind._ids[blind._rows, position] = ids
    assert blind.token_ids == looked.token_ids


def test_rows_that_were_interrupted_in_the_making_are_made_anew(ours, monkeypatch):
    cache = cache_of(ours("llama2"), rows=2)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(cache.rotary[0]), "rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.rows(0, 1)
    assert cache.rows(0, 1).batch_size == len(cache.rows(0, 1).keys[0]) == len(cache.rows(0, 1)._ids) == 1
    assert cache.rows(0, 1) is cache.rows(0, 1)


def test_positions_that_were_not_learned_are_refused():
    config = parse_config(FAMILIES["gpt2"].config)
    assert StaticCache(config, 1, config.max_positions).max_cache_len == 512
    with pytest.raises(CacheError, match="512 positions"):
        StaticCache(config, 1, config.max_positions + 1)
