"""What `tools/bench_serving.py` works out by itself: who asks when and for what, and what its figures mean."""

import statistics
import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from bench_serving import measures, percentile, schedule


def test_a_schedule_is_its_seed():
    assert schedule(1, 20, 5.0, (16, 1024), 100) == schedule(1, 20, 5.0, (16, 1024), 100)
    assert schedule(1, 20, 5.0, (16, 1024), 100) != schedule(2, 20, 5.0, (16, 1024), 100)
    assert schedule(1, 10, 5.0, (16, 1024), 100) == schedule(1, 20, 5.0, (16, 1024), 100)[:10]


def test_arrivals_are_poisson_and_lengths_log_uniform():
    requests = schedule(0, 20_000, 5.0, (16, 1024), 100)
    arrivals, lengths = [arrival for arrival, _ in requests], [len(prompt) for _, prompt in requests]
    gaps = [b - a for a, b in pairwise(arrivals)]
    assert arrivals[0] == 0 and min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.05)  # an exponential law's is its mean
    assert (min(lengths), max(lengths)) == (16, 1024)
    assert statistics.median(lengths) == pytest.approx(128, rel=0.1)
    assert {token for _, prompt in requests[:100] for token in prompt} == {*range(100)}


def test_a_full_load_is_there_at_once():
    assert {arrival for arrival, _ in schedule(3, 50, None, (16, 1024), 100)} == {0.0}


def test_percentile():
    assert percentile([7.0], 0.95) == 7.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([*range(101)], 0.95) == 95
    assert percentile([0.0, 1.0], 0.25) == 0.25


def test_waiting_counts_from_the_arrival():
    answers = [([1, 2, 3], [1.0, 1.5, 2.5]), ([4, 5], [3.0, 4.0])]
    found = measures([(0.0, [9]), (2.5, [9])], answers)
    assert found["tokens_per_second"] == 5 / 4.0
    assert found["first_p50"] == pytest.approx((1.0 + 0.5) / 2)
    assert (found["gap_p50"], found["gap_p95"]) == (1.0, 1.0)
