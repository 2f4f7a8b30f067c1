"""Two thousand requests nobody would make: each is answered, or refused in one clear error."""

import dataclasses
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm import Completion, GenerationConfig, MinillmError, StaticCache

NUMBERS = st.one_of(
    st.integers(-2, 40),
    st.integers(),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-46, 1e-38, 1e-7, 0.3, 0.9, 1.0, 1.1, 1e39]),
)
ANYTHING = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.sampled_from(["auto", "0.5", object, torch.tensor(3), torch.tensor([0.5])]),
    st.lists(st.one_of(NUMBERS, st.text(max_size=3), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
)
NAMES = [field.name for field in dataclasses.fields(GenerationConfig)]
OPTIONS = st.dictionaries(
    st.one_of(st.sampled_from(NAMES), st.sampled_from(["max_length", "temprature", "cache", "assistant_model"])),
    st.one_of(NUMBERS, ANYTHING),
    max_size=4,
)
PROMPTS = st.one_of(
    st.text(max_size=20),
    st.lists(st.one_of(st.integers(3, 90), st.integers(-3, 10**9)), max_size=12),
    st.lists(st.one_of(st.text(max_size=5), st.lists(st.integers(3, 90), max_size=4)), max_size=3),
    ANYTHING,
)


def answer(ask):
    """What `ask` gives, or None where it is refused; never another exception, never more than a second."""
    started = time.perf_counter()
    try:
        return ask()
    except MinillmError as error:
        assert str(error)
        assert "\n" not in str(error)
    finally:
        assert time.perf_counter() - started < 5.0  # a second on a machine of one's own; this one is shared


SETTINGS = settings(
    max_examples=1000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@SETTINGS
@given(options=OPTIONS)
def test_options_are_obeyed_or_refused(llm, options):
    asked = {"max_new_tokens": 3} | options
    out = answer(lambda: llm.generate([5, 6, 7, 8], **asked))
    if out is None:
        return
    assert isinstance(out, Completion)
    assert all(0 <= token < llm.config.vocab_size for token in out.token_ids)
    if type(asked["max_new_tokens"]) is int:
        assert len(out.token_ids) <= asked["max_new_tokens"]
    answer(lambda: llm.conversation(**options))


@SETTINGS
@given(prompt=PROMPTS, rows=st.integers(1, 2))
def test_prompts_are_continued_or_refused(llm, prompt, rows):
    cache = StaticCache(llm.config, rows, 32, dtype=llm.dtype)
    out = answer(lambda: llm.generate(prompt, cache=cache, max_new_tokens=2, temperature=0))
    assert out is None or isinstance(out, Completion | list)
    assert answer(lambda: "".join(llm.stream(prompt, max_new_tokens=2))) is None or isinstance(prompt, str | list)


def test_the_way_out_is_named(llm):
    with pytest.raises(MinillmError, match="did you mean temperature"):
        llm.generate("a", temprature=0.5)
