"""Logits -> probabilities -> token: against transformers' processors and by exact enumeration."""

import itertools
import math
from collections import Counter

import pytest
import torch
from catalog.draw import splitmix64
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from minillm_kernels import cpu
from minillm_kernels.sampling import draw, sample, uniform
from minillm_kernels.sampling import probabilities_of as probabilities
from rows import sampling_of
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minillm.options import GenerationConfig
from minillm.sampling import Sampling, next_token, penalize
from minillm.speculative.verify import distribution

V = 37


def logits_of(seed, rows=1, vocabulary=V):
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def column(value, rows=1):
    return None if value is None else torch.tensor([value] * rows)


def theirs(logits, temperature, top_k, top_p, min_p):
    processors = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        processors.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        processors.append(MinPLogitsWarper(min_p))
    return processors(None, logits).softmax(-1)


COMBINATIONS = list(itertools.product([0.3, 1.0, 1.7], [None, 1, 5, 500], [None, 0.05, 0.6, 1.0], [None, 0.0, 0.2]))


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), COMBINATIONS)
def test_probabilities_agree_with_transformers(temperature, top_k, top_p, min_p):
    logits = logits_of(1, rows=4)
    arguments = [column(value, 4) for value in (temperature, top_k, top_p, min_p)]
    ours = probabilities(logits, *arguments)
    # Softmax in float32 twice at most: a few units in the last place of numbers below 1.
    torch.testing.assert_close(ours, theirs(logits, temperature, top_k, top_p, min_p), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.sum(-1), torch.ones(4))


def test_rows_have_their_own_parameters():
    settings = [(0.0, V, 1.0, 0.0), (1.0, 3, 1.0, 0.0), (0.7, V, 0.5, 0.0), (1.3, V, 1.0, 0.3)]
    logits = logits_of(2, rows=4)
    temperature, top_k, top_p, min_p = (torch.tensor(list(values)) for values in zip(*settings, strict=True))
    together = probabilities(logits, temperature, top_k, top_p, min_p)
    for row, setting in enumerate(settings):
        alone = probabilities(logits[row : row + 1], *[torch.tensor([value]) for value in setting])
        torch.testing.assert_close(together[row : row + 1], alone)
    assert together[0].max() == 1.0  # the greedy row
    assert (together[1] > 0).sum() == 3


def test_the_places_of_a_row_share_its_parameters():
    """Several places of several rows at once, as in a step with drafts: each as alone."""
    logits = logits_of(9, rows=6).view(2, 3, V)
    seen = torch.rand(2, 3, V, generator=torch.Generator().manual_seed(1)) < 0.3
    own = dict(
        temperature=[0.5, 1.5], top_k=[4, 20], top_p=[0.9, 0.6], min_p=[0.01, 0.1], repetition_penalty=[1.1, 1.7]
    )
    own = {name: torch.tensor(values) for name, values in own.items()}
    together = distribution(logits, Sampling(seed=torch.tensor([1, 2]), **own), seen)
    for row in range(2):
        penalty, *filters = (own[name][row : row + 1] for name in ("repetition_penalty", *list(own)[:4]))
        for place in range(3):
            alone = probabilities(penalize(logits[row, place][None], seen[row, place][None], penalty), *filters)
            torch.testing.assert_close(together[row, place][None], alone)


def test_temperature_zero_is_the_one_hot_limit():
    logits = logits_of(3, rows=5)
    exact = probabilities(logits, torch.zeros(5))
    assert torch.equal(exact, torch.nn.functional.one_hot(logits.argmax(-1), V).float())
    nearly = probabilities(logits, torch.full((5,), 1e-3))
    torch.testing.assert_close(nearly, exact)
    # Filters cannot take the argmax away, and a tie goes to the first, as with argmax.
    filtered = probabilities(logits, torch.zeros(5), column(1, 5), column(0.01, 5), column(1.0, 5))
    assert torch.equal(filtered, exact)
    assert probabilities(torch.tensor([[1.0, 2.0, 2.0]]), torch.zeros(1)).tolist() == [[0.0, 1.0, 0.0]]


def test_exact_ties_at_the_border_of_top_p():
    """Four equal tokens hold a quarter each; top_p 0.5 is reached by two, and nothing is rounded here."""
    for top_p, kept in ((0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3), (1.0, 4)):
        ours = probabilities(torch.zeros(1, 4), torch.ones(1), None, torch.tensor([top_p]))
        assert (ours > 0).sum() == kept
        assert (theirs(torch.zeros(1, 4), 1.0, None, top_p, None) > 0).sum() == kept


def test_min_p_of_one_keeps_the_likeliest_and_its_equals():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    for top_k in (None, column(3)):
        kept = probabilities(logits, torch.ones(1), top_k, None, column(1.0))
        assert kept.tolist() == [[0.0, 0.5, 0.0, 0.5]]


def test_filters_that_would_do_nothing_are_off():
    """top_k=0 in particular: in `transformers` it means all of them, not none."""
    off = Sampling.of(
        GenerationConfig(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0), [1], "cpu"
    )
    assert (off.top_k, off.top_p, off.min_p, off.repetition_penalty) == (None,) * 4
    on = Sampling.of(GenerationConfig(top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2), [1, 2], "cpu")
    assert [on.top_k.tolist(), on.temperature.tolist()] == [[3, 3], [1.0, 1.0]]
    shares = torch.stack([on.top_p, on.min_p, on.repetition_penalty])
    torch.testing.assert_close(shares, torch.tensor([[0.9] * 2, [0.1] * 2, [1.2] * 2]))


def test_large_logits_stay_finite():
    for logits in (torch.tensor([[1e4, -1e4, 9.9e3]]), torch.tensor([[0.0, float("-inf"), 1.0]])):
        for temperature in (0.0, 1e-2, 1.0):
            probs = probabilities(logits, torch.tensor([temperature]), column(2), column(0.9), column(0.1))
            assert probs.isfinite().all()
            torch.testing.assert_close(probs.sum(), torch.tensor(1.0))
            assert probs[0, 1] == 0


def test_sample_by_enumeration():
    """Over an even grid of N numbers every token comes up p * N times, to within one."""
    count = 20000
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    probs = probabilities(logits_of(4), torch.tensor([1.0]), column(9))
    tokens = sample(probs.expand(count, V), u)
    counts = torch.bincount(tokens, minlength=V)
    assert ((counts - probs[0].double() * count).abs() <= 1.0).all()
    assert (counts[probs[0] == 0] == 0).all()


def test_sample_finds_rare_tokens_behind_likely_ones():
    """A thousand tokens of 1e-9 each between two halves: in float32, sums near 0.5 are 6e-8 apart and lose them."""
    probs = torch.tensor([0.5, *[1e-9] * 1000, 0.5])
    middle = probs.double().cumsum(0) - probs.double() / 2
    assert sample(probs.expand(1002, -1), middle / probs.double().sum()).tolist() == list(range(1002))


@pytest.mark.parametrize("u", [0.0, 2.0**-53, 0.5, 1 - 2.0**-53])
def test_sample_never_returns_an_impossible_token(u):
    """Also at both ends of [0, 1), with zeros at the ends and probabilities that do not add up to 1."""
    u = torch.tensor([u], dtype=torch.float64)
    for weights in ([0, 0.3, 0, 0.7, 0, 0], [0, 1, 0], [1], [0, 0, 1e-30], [0.1] * 10 + [0], [3.0, 0, 5.0, 0]):
        token = sample(torch.tensor([weights], dtype=torch.float32), u)
        assert weights[int(token)] > 0
    vocabulary = 100_003
    probs = torch.rand(1, vocabulary).masked_fill(torch.rand(1, vocabulary) < 0.5, 0.0)
    probs[0, -1] = 0.0
    assert probs[0, int(sample(probs / probs.sum(), u))] > 0


def test_repetition_penalty_agrees_with_transformers():
    logits = logits_of(5, rows=3)
    seen_ids = torch.tensor([[1, 5, 5, 9], [0, 0, 0, 0], [36, 2, 3, 4]])
    seen = torch.zeros(3, V, dtype=torch.bool).scatter(1, seen_ids, True)
    for penalty in (1.0, 1.3, 0.8):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(seen_ids, logits.clone())
        ours = penalize(logits, seen, torch.full((3,), penalty))
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("heat", [-0.8, math.nan, -math.inf])
def test_a_temperature_that_is_none(heat):
    """The row's probabilities are no numbers, whatever filters it; its neighbours' are as ever, and nothing waits."""
    logits = logits_of(7, rows=3)
    for filters in ({}, dict(top_k=3), dict(top_p=0.9), dict(min_p=0.1), dict(top_k=3, top_p=0.9, min_p=0.1)):
        columns = {name: column(value, 3) for name, value in filters.items()}
        probs = probabilities(logits, torch.tensor([0.8, heat, 0.8]), **columns)
        assert probs[1].isnan().all()
        assert torch.equal(
            probs[::2], probabilities(logits[::2], column(0.8, 2), **{n: c[:2] for n, c in columns.items()})
        )


def test_next_token_is_the_composition():
    logits = logits_of(6, rows=4)
    seen = torch.rand(4, V, generator=torch.Generator().manual_seed(0)) < 0.3
    position = torch.tensor([3, 900, 0, 17])
    sampling = sampling_of(
        [1, 2, 3, 4], "cpu", temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.2
    )
    penalised = penalize(logits, seen, torch.full((4,), 1.2))
    probs = theirs(penalised, 0.9, 20, 0.9, 0.01)
    expected = sample(probs, uniform(torch.tensor([1, 2, 3, 4]), position))
    assert torch.equal(next_token(logits, sampling, position, seen), expected)
    greedy = sampling_of([1, 2, 3, 4], "cpu")
    assert torch.equal(next_token(logits, greedy, position), logits.argmax(-1))


# -- every border, and long vocabularies -----------------------------------------------------


def law(scaled, top_k, top_p, min_p):
    """The ids that stay for sure and those that may where numbers are rounded: in float64, one token after the other.

    `scaled` are the logits over the temperature in float32: the smallest numbers become equal there.

    float32 probabilities of V tokens are off by (V + 8) 2^-23 at most: each addition, exp and quotient by 2^-24 of
    itself, or 2^-23. Shares of the likeliest, which are not summed, by 2^-20: exp of a difference of up to 64.
    """
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    kth = scaled[order[min(top_k or len(scaled), len(scaled)) - 1]]
    weights = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order if scaled[i] >= kth}
    surely, perhaps, before, off = set(), set(), 0.0, (len(scaled) + 8) * 2.0**-23
    for i, weight in weights.items():
        share = before / sum(weights.values())
        far_from_top = share - top_p if top_p not in (None, 1.0) and share > 0 else -1.0
        far_above_min = weight / min_p - 1 if min_p and weight < 1 else 1.0
        if far_from_top < off and far_above_min > -(2.0**-20) and weight > 0:
            perhaps.add(i)
            if far_from_top < -off and far_above_min > 2.0**-20 and weight > 1e-30:
                surely.add(i)
        before += weight
    return surely, perhaps


@settings(max_examples=400, deadline=None)
@given(
    logits=st.lists(
        st.sampled_from([-math.inf, -4.0, -0.5, -0.0, 0.0, 0.25, 1.0, 2.5, 60.0]) | st.floats(-20, 20, width=32),
        min_size=1,
        max_size=40,
    ),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 2, 3, 5, 40, 1000]),
    top_p=st.sampled_from([None, 1e-6, 0.25, 0.5, 0.9, 1 - 2.0**-20, 1.0]) | st.floats(2**-7, 1 - 2**-7, width=32),
    min_p=st.sampled_from([None, 0.0, 1e-5, 0.5, 1.0]) | st.floats(2**-7, 1 - 2**-7, width=32),
)
@example([-0.0, 1.401298464324817e-45], 2.0, None, 1e-6, None)  # equal, once divided
def test_what_stays(logits, temperature, top_k, top_p, min_p):
    assume(max(logits) > -math.inf)
    row, arguments = torch.tensor([logits]), (temperature, top_k, top_p, min_p)
    ours = probabilities(row, *map(column, arguments))[0]
    kept = set(ours.nonzero()[:, 0].tolist())
    scaled = (row[0] / temperature).tolist()
    surely, perhaps = law(scaled, *arguments[1:])
    assert surely <= kept <= perhaps
    if surely == perhaps:  # of equals transformers' top-p keeps others than the first, but as many
        them = theirs(row, *arguments)[0].nonzero()[:, 0].tolist()
        assert Counter(scaled[i] for i in them) == Counter(scaled[i] for i in kept)
        exact = (row[0].double() / temperature).masked_fill(
            torch.tensor([i not in kept for i in range(len(logits))]), -math.inf
        )
        torch.testing.assert_close(ours.double(), exact.softmax(-1), rtol=(len(logits) + 8) * 2.0**-22, atol=1e-30)


@pytest.mark.parametrize("vocabulary", [4096, 2**17])
def test_equal_logits_in_a_long_vocabulary(vocabulary):
    """Powers of two: nothing is rounded, and of equals the first ones stay."""
    for top_k, top_p, kept in ((None, 0.5, 0.5), (None, 1 - 2.0**-12, 1 - 2.0**-12), (64, 0.25, 0.25), (64, None, 1.0)):
        probs = probabilities(torch.zeros(1, vocabulary), column(1.0), column(top_k), column(top_p), column(1.0))[0]
        assert torch.equal(probs.nonzero()[:, 0], torch.arange(int(kept * vocabulary)))


def test_the_pytorch_code_at_its_borders(monkeypatch):
    """The same where there is no C; and beside sums that are rounded up, all of a vocabulary is all there is."""
    monkeypatch.setattr(cpu, "library", lambda: None)
    test_exact_ties_at_the_border_of_top_p()
    test_min_p_of_one_keeps_the_likeliest_and_its_equals()
    test_equal_logits_in_a_long_vocabulary(4096)
    test_a_look_at_the_borders()
    logits = logits_of(0, 3, 250_000)
    together = probabilities(logits, column(1.0, 3), column(200_000, 3))
    for row in range(3):
        assert torch.equal(probabilities(logits[row : row + 1], column(1.0), column(200_000))[0], together[row])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_c_keeps_what_pytorch_keeps(data):
    """In float64, which C leaves to PyTorch: the same tokens, but for those at the very border, in equal shares."""
    vocabulary, rows = data.draw(st.sampled_from([40, 999, 5000])), 3
    draw = lambda *values: torch.tensor([data.draw(st.sampled_from(values)) for _ in range(rows)])  # noqa: E731
    logits = logits_of(data.draw(st.integers(0, 2**31)), rows, vocabulary) * draw(0.0, 0.2, 1.0, 2.0, 9.0)[:, None]
    if data.draw(st.booleans()):
        logits = logits.round()  # ties everywhere
    logits[:, 7] += draw(0.0, 20.0, 60.0)
    logits = logits.masked_fill(logits < draw(-1e9, 0.0, 5.0)[:, None].minimum(logits.amax(1, True)), -math.inf)
    columns = [
        draw(0.0, 0.5, 1.0, 1.7),
        draw(1, 2, 50, vocabulary - 1, vocabulary, 10**6),
        draw(1e-6, 0.3, 0.9, 0.999, 1 - 2.0**-20, 1.0),
        draw(0.0, 1e-12, 2.5e-4, 0.02, 1.0),
    ]
    columns[1:] = [column if data.draw(st.booleans()) else None for column in columns[1:]]
    ours = probabilities(logits, *columns)
    temperature, top_k, top_p, min_p = columns

    def wanted(slack):
        return probabilities(
            logits.double(),
            temperature,
            top_k,
            None if top_p is None else torch.where(top_p < 1, top_p + slack, top_p),
            None if min_p is None else (min_p * (1 - 10 * slack)).clamp(max=1.0),
        )

    looser, stricter, shares = wanted(1e-6), wanted(-1e-6), probabilities(logits.double(), temperature)
    assert ((ours > 0) <= (looser > 0)).all()
    # float32 ends at e^-87: what is rarer is never drawn.
    assert ((ours > 0) >= (stricter > 1e-37)).all()
    expected = torch.where(ours > 0, shares, 0.0)
    torch.testing.assert_close(ours.double(), expected / expected.sum(-1, keepdim=True), rtol=2e-5, atol=1e-37)


def test_a_look_at_the_borders():
    """As many as top-k asks for stand out, nine nats above thousands; and top-p 1 beside sums that are rounded up."""
    logits = torch.zeros(1, 5000)
    logits[0, [7, 4000]] = 9.0  # 0.38 each: of these two 0.45 is reached by one
    assert probabilities(logits, column(1.0), column(2), column(0.45))[0].nonzero()[:, 0].tolist() == [7]
    assert probabilities(logits, column(1.0), column(2), column(0.51))[0].nonzero()[:, 0].tolist() == [7, 4000]
    thirds = torch.tensor([[0.0, 0.0, 0.0, -20.0]])  # three times 0.33333334
    assert (probabilities(thirds, column(1.0), None, column(1.0)) > 0).all()


def test_other_dtypes_are_as_good():
    logits = logits_of(7, rows=3).round()  # exact in each
    columns = column(1.0, 3), column(9, 3), column(0.8, 3), column(0.01, 3)
    for dtype in (torch.float64, torch.bfloat16):
        probs = probabilities(logits.to(dtype), *columns)
        assert probs.dtype == dtype
        torch.testing.assert_close(probs.float(), probabilities(logits, *columns), rtol=2.0**-6, atol=0)
        before = probs.clone()
        assert sample(probs, torch.full((3,), 0.5)).shape == (3,)
        assert torch.equal(probs, before)


@pytest.mark.parametrize("filters", [(None, None, None), (2, 0.9, 0.1)])
def test_what_overflows_when_it_is_divided_is_no_number_and_ends(filters):
    columns = [None if value is None else column(value) for value in filters]
    assert probabilities(torch.tensor([[3e38, 1.0]]), column(0.1), *columns).isnan().any()
    assert probabilities(torch.tensor([[1.0, 2.0, 3.0]]), column(1e-40), *columns).isnan().any()


def test_min_p_looks_as_deep_as_it_must():
    depth = torch.tensor([[0.0, -8.2, -8.4]])  # e^-8.2 is 2.7e-4, e^-8.4 2.2e-4
    assert (probabilities(depth, column(1.0), None, None, column(2.5e-4)) > 0).tolist() == [[True, True, False]]


@pytest.mark.skipif(not cpu.available(), reason="no C compiler")
def test_the_draw_in_c_is_the_draw():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(500, 37, generator=generator) * (torch.rand(500, 37, generator=generator) < 0.3)
    probs[:, 3] += 0.1  # of any sum, with many zeros
    seed, position = torch.randint(-(2**63), 2**63 - 1, (2, 500), generator=generator)
    for stream in (0, 5):
        token = draw(probs, seed, position, stream)
        assert torch.equal(token, sample(probs, uniform(seed, position, stream)))
        assert (probs.gather(1, token[:, None]) > 0).all()


EVERY_FILTER = [
    dict(top_k=top_k, top_p=top_p, min_p=min_p)
    for top_k, top_p, min_p in itertools.product([None, 50], [None, 0.9], [None, 0.02])
]


def named(filters):
    return "-".join(name for name, value in filters.items() if value) or "none"


@pytest.mark.parametrize("vocabulary", [4096, 40_000, 128_000])
@pytest.mark.parametrize("filters", EVERY_FILTER, ids=named)
def test_a_row_is_to_the_bit_what_it_is_alone(vocabulary, filters):
    """Sure and unsure rows, in any batch, with any number of threads: their probabilities and their tokens."""
    logits = logits_of(1, 16, vocabulary) * torch.tensor([2.0, 0.3, 0.0, 1.0]).repeat(4)[:, None]

    def results(begin, end):
        sampling = sampling_of(range(begin, end), "cpu", temperature=0.8, **filters)
        token = next_token(logits[begin:end], sampling, torch.arange(begin, end))
        logprobs = logits[begin:end].log_softmax(dim=-1)  # what `decode.run` tells of them
        return distribution(logits[begin:end, None], sampling, None)[:, 0], token, logprobs

    alone = [torch.cat(parts) for parts in zip(*(results(b, b + 1) for b in range(16)), strict=True)]
    threads = torch.get_num_threads()
    try:
        for count, size in itertools.product((2, 1), (1, 2, 16)):
            torch.set_num_threads(count)
            for begin in range(0, 16, size):
                for result, expected in zip(results(begin, begin + size), alone, strict=True):
                    assert torch.equal(result, expected[begin : begin + size])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("filters", EVERY_FILTER, ids=named)
def test_choosing_is_traced_whole_and_looks_at_no_value(filters):
    logits, position = logits_of(8, 3, 999), torch.arange(3)
    sampling = sampling_of([1, 2, 3], "cpu", temperature=0.8, **filters)
    compiled = torch.compile(next_token, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, sampling, position), next_token(logits, sampling, position))
    # Tensors without values, as on a GPU: whoever asked for one would raise.
    nothing = sampling_of([1, 2, 3], "meta", temperature=0.8, **filters)
    assert next_token(logits.to("meta"), nothing, position.to("meta")).shape == (3,)


# -- random numbers --------------------------------------------------------------------------


def test_mixing_is_splitmix64():
    """The published first outputs for seed 1234567, and our tensors against Python integers."""
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(splitmix64(state))
        state += 0x9E3779B97F4A7C15
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]

    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    for stream in (0, 1, 5):
        for position in (0, 1, 4095):
            ours = uniform(torch.tensor(seeds), torch.full((6,), position), stream)
            assert ours.dtype == torch.float64
            for seed, value in zip(seeds, ours.tolist(), strict=True):
                bits = splitmix64(splitmix64(splitmix64(seed % 2**64) ^ position) ^ stream)
                assert value == (bits >> 11) * 2.0**-53


@pytest.mark.parametrize("vary", ["seed", "position", "stream"])
def test_numbers_look_uniform_along_every_axis(vary):
    """Neighbouring seeds, positions or streams: mean, distribution and correlation of many numbers."""
    count = 2000 if vary == "stream" else 20000  # a stream is a Python number: one call each
    counter, fixed = torch.arange(count), torch.full((count,), 7)
    if vary == "stream":
        u = torch.cat([uniform(fixed[:1], fixed[:1], stream) for stream in range(count)])
    else:
        u = uniform(counter, fixed) if vary == "seed" else uniform(fixed, counter)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / count)  # five standard errors
    grid = (torch.arange(count, dtype=torch.float64) + 1) / count
    distance = (u.sort().values - grid).abs().max()
    assert distance < 2.0 / math.sqrt(count)  # Kolmogorov-Smirnov: exceeded with probability 7e-4
    centred = u - 0.5
    correlation = (centred[1:] * centred[:-1]).mean() * 12
    assert abs(correlation) < 5 / math.sqrt(count)


def test_numbers_do_not_depend_on_the_batch():
    seed, position = torch.tensor([9, 8, 7]), torch.tensor([3, 3, 100])
    together = uniform(seed, position, 2)
    for row in range(3):
        assert uniform(seed[row : row + 1], position[row : row + 1], 2) == together[row]
    assert uniform(seed, position, 2).tolist() != uniform(seed, position, 3).tolist()


def test_any_python_integer_is_a_seed():
    seeds = [0, -1, 2**63, 2**64 - 1, 2**80 + 5]
    sampling = sampling_of(seeds, "cpu", temperature=1.0)
    assert sampling.seed.tolist()[:2] == [0, -1]
    assert uniform(sampling.seed, torch.zeros(5, dtype=torch.int64)).isfinite().all()
