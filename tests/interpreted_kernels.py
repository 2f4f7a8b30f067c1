"""The Triton kernels, run by Triton's interpreter on CPU, against the float64 references of the catalog.

The interpreter has to be on before Triton is imported, so the suite runs this file in a process of its own
(test_kernels_interpreter.py). While working on a kernel, run it directly:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted_kernels.py -k "decode_attention and ring"
"""

import sys
from dataclasses import replace

import pytest
import torch
from catalog import CATALOG, SMALL_CASES
from catalog_parity import check
from minillm_kernels import launch
from minillm_kernels.norm import add_rms_norm
from minillm_kernels.sampling import draw, filtered_softmax, probabilities, sample, uniform

assert launch.interpreting(), "run this file with TRITON_INTERPRET=1, or through test_kernels_interpreter.py"

CASES = [(name, case) for name, entry in CATALOG.items() for case in entry.small_cases]
ROWS = [(name, index) for name, rows in launch.TABLE.items() for index in range(len(rows))]


def launches(entry, case: dict) -> set[str]:
    """The kernel of the launch table that the op looks up first at this case; none if the library does it all."""

    class Found(Exception):
        pass

    def found(kernel, *_, **__):
        raise Found(kernel)

    inputs = entry.make_inputs(case, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        for module in {kernels for name, kernels in sys.modules.items() if name.startswith("minillm_kernels.gpu.")}:
            patch.setattr(module, "choose", found, raising=False)
        try:
            entry.run(**inputs)
        except Found as error:
            return {str(error)}
    return set()


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """torch.empty hands out NaN: a result, or a partial result, that nobody wrote does not go unnoticed."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("name", "case", "dtype"), SMALL_CASES)
def test_parity(name, case, dtype):
    check(name, CATALOG[name].small_cases[case], dtype)


@pytest.fixture(scope="module")
def users():
    """kernel of the launch table -> the ops and cases that launch it, those that set the most options first."""
    for name in CATALOG:  # so that all Triton modules are there to be looked into
        check(name, next(iter(CATALOG[name].small_cases.values())), torch.float32)
    found = {}
    for name, case in sorted(CASES, key=lambda user: -len(CATALOG[user[0]].small_cases[user[1]])):
        for kernel in launches(CATALOG[name], CATALOG[name].small_cases[case]):
            found.setdefault(kernel, []).append((name, case))
    return found


@pytest.mark.parametrize(("kernel", "index"), ROWS)
def test_parity_at_every_row_of_the_launch_table(kernel, index, users, monkeypatch):
    row = replace(launch.TABLE[kernel][index], max_size=None, chips=None, half_only=False)
    monkeypatch.setitem(launch.TABLE, kernel, (row,))
    name, case = users[kernel][0]
    check(name, CATALOG[name].small_cases[case], torch.float32)


def test_what_is_normed_is_the_sum_that_is_stored():
    """In float16 1500 + 0.5 is 1500 or 1501: a norm of 1500.5 is off by more than all other roundings together."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randint(1024, 2000, (40, 64), generator=generator) for _ in range(2))
    x, residual = x.half(), residual.half() / 512  # the sum needs up to 20 bits, its type has 11
    weight = torch.ones(64).half()
    normed, total = add_rms_norm(x, residual, weight, 1e-6, 0.0, True)
    assert torch.equal(total, x + residual)
    exact = x.double() + residual.double()
    stored, unrounded = (h / h.square().mean(1, keepdim=True).sqrt() for h in (total.double(), exact))
    # float32 on the way moves a number across a border between two of float16 in one of some thousand cases.
    assert (normed == stored.half()).double().mean() > 0.99
    assert (normed == unrounded.half()).double().mean() < 0.8


def test_a_token_in_the_interpreter_is_the_one_in_pytorch():
    """Any filters, sure and flat rows, ties, a border near the end: the same tokens stay, and the same one is drawn."""
    generator = torch.Generator().manual_seed(0)
    columns = [[1.0, 0.7, 0.0, 2.0], [1, 3, 50, 10**6], [0.3, 0.9, 1.0, 0.999], [0.05, 0.0, 0.3, 0.9]]
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in columns)
    for size, scale in ((1, 1.0), (100, 0.3), (2500, 3.0), (2500, 0.0)):
        logits = torch.randn(4, size, generator=generator) * scale
        logits = logits if scale == 0.3 else (4 * logits).round() / 4
        for filters in ((None, None, None), (top_k, None, None), (top_k, top_p, None), (None, top_p, min_p)):
            ours, theirs = (find(logits, temperature, *filters) for find in (probabilities, filtered_softmax))
            assert torch.equal(ours > 0, theirs > 0)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-30)
            seed, position = torch.randint(-(2**62), 2**62, (2, 4), generator=generator)
            assert torch.equal(draw(ours, seed, position, 3), sample(ours, uniform(seed, position, 3)))


def test_a_border_in_the_interpreter():
    """Exact ties, and a border nine nats below the best token."""
    deep = torch.zeros(1, 2500).index_fill(1, torch.tensor([7]), 9.0)  # which holds 0.7642
    for logits, share, kept in (
        *((torch.zeros(1, 4), share, count) for share, count in ((0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3))),
        *((deep, share, count) for share, count in ((0.76, 1), (0.77, 62), (0.999, 2490))),
    ):
        probs = probabilities(logits, torch.ones(1), None, torch.tensor([share]), None)
        assert (probs > 0).sum() == kept
        assert torch.equal(probs > 0, filtered_softmax(logits, torch.ones(1), None, torch.tensor([share]), None) > 0)


def test_decode_attention_of_a_row_ignores_its_neighbours():
    entry, case = CATALOG["decode_attention"], CATALOG["decode_attention"].small_cases["grouped heads, ragged rows"]
    inputs = entry.make_inputs(case, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    (together,) = entry.run(**inputs)
    for row in range(together.shape[0]):
        alone = {key: inputs[key][row : row + 1] for key in ("q", "k", "v", "cache_position")}
        (result,) = entry.run(**inputs | alone)
        assert torch.equal(result[0], together[row])


def test_decode_attention_reads_nothing_outside_the_window():
    entry, case = CATALOG["decode_attention"], CATALOG["decode_attention"].small_cases["window over several splits"]
    inputs = entry.make_inputs(case, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    (before,) = entry.run(**inputs)
    for row, (position,) in enumerate(case["positions"]):
        for tensor in (inputs["k"], inputs["v"]):
            tensor[row, :, : max(0, position - case["window"] + 1)] = float("nan")
    (after,) = entry.run(**inputs)
    assert torch.equal(before, after)
