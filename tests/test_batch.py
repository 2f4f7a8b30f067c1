"""Rows that join and leave: each says what it says alone, to the last bit."""

import random

import pytest
import torch
from families import FAMILIES, prompt_ids

from minillm import StaticCache
from minillm.batch import Batch
from minillm.decode import generate_plain
from minillm.faster.steps import Steps
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.options import GenerationConfig, as_list
from minillm.row import Row
from minillm.sampling import Sampling
from minillm.speculative import DraftLength
from minillm.tokenizer import TextStream

LENGTH = 64  # tokens a seat holds


class Words:
    """A tokenizer whose text is the ids, one word each."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return "".join(f" {token}" for token in ids)


def row_of(ids, config, logprobs=True, proposer=None, drafts=0):
    row = Row(
        ids,
        config.max_new_tokens,
        frozenset(as_list(config.eos_token_id)),
        TextStream(Words(), ids, config.stops),
        Sampling.of(config, [config.seed or 0], "cpu"),
        wants_logprobs=logprobs,
        planned_length=len(ids) + config.max_new_tokens,
    )
    if proposer is not None:
        row.proposer, row.draft_length = proposer, DraftLength([drafts], proposer.cost)
    return row


def alone(steps, row, max_step=256):
    """The same request in a batch and a cache of its own."""
    length = len(row.prompt) + row.max_new_tokens
    twin = Row(
        row.prompt,
        row.max_new_tokens,
        row.eos_token_ids,
        TextStream(Words(), row.prompt, row.stream._stop_strings),
        row.sampling,
        wants_logprobs=True,
        planned_length=length,
    )
    cache = StaticCache(steps.config, 1, length, dtype=steps.embedding.weight.dtype, max_step=max_step)
    for _ in Batch(steps, cache, [twin]).run():
        pass
    return twin


def said(row):
    return row.token_ids, row.logprobs, row.text, row.finish_reason


def some_request(dice, vocabulary):
    """A random prompt and what is asked for it."""
    prompt = prompt_ids(dice.randint(1, 30), seed=dice.randrange(10**6), vocabulary=vocabulary)
    options = dict(max_new_tokens=dice.randint(1, 20), seed=dice.randrange(10**9))
    if dice.random() < 0.7:
        options |= dict(temperature=dice.choice([0.7, 1.0, 1.4]))
        for name, values in dict(top_k=[3, 20], top_p=[0.5, 0.9], min_p=[0.02, 0.2]).items():
            if dice.random() < 0.3:
                options[name] = dice.choice(values)
    if dice.random() < 0.3:
        options["repetition_penalty"] = dice.choice([1.1, 1.5])
    if dice.random() < 0.5:
        options["eos_token_id"] = dice.sample(range(vocabulary), dice.randint(1, vocabulary // 8))
    if dice.random() < 0.3:
        options["stop_strings"] = [f" {token}" for token in dice.sample(range(vocabulary), 6)]
    return prompt, GenerationConfig(**options)


def steps_of(folder, dtype=torch.float32, quantize=None):
    return Steps(load_decoder(folder, load_config(folder), dtype, "cpu", "auto", quantize, quantize is not None))


def arrivals(steps, dice, count, seats):
    """Serve so many requests, which arrive, and are cancelled, as the dice will; yields (config, row)."""
    dtype, vocabulary = steps.embedding.weight.dtype, steps.config.vocab_size
    asked = [some_request(dice, vocabulary) for _ in range(count)]
    rows = [row_of(prompt, config) for prompt, config in asked]
    batch = Batch(steps, StaticCache(steps.config, seats, LENGTH, dtype=dtype), one_request=dice.random() < 0.5)
    coming, ended = list(rows), []
    while coming:
        for _ in range(dice.randint(1, 4)):
            if coming:
                batch.waiting.append(coming.pop(0))
        for finished in batch.run():
            ended += finished
            if dice.random() < 0.3 and coming:
                batch.waiting.append(coming.pop(0))
            if dice.random() < 0.05:
                dice.choice(rows[: len(rows) - len(coming)]).cancelled = True
    assert sorted(map(id, ended)) == sorted(map(id, rows))  # each of them ends, once
    return [(config, row) for (_, config), row in zip(asked, rows, strict=True)]


def check_arrivals(steps, seed, count):
    dice, complete = random.Random(seed), 0
    for config, row in arrivals(steps, dice, count, seats=dice.choice([2, 3, 5, 8, 16])):
        expected = alone(steps, row)
        if row.finish_reason == "cancelled":
            assert row.token_ids == expected.token_ids[: len(row.token_ids)]
            assert row.logprobs == expected.logprobs[: len(row.logprobs)]
            continue
        complete += 1
        assert said(row) == said(expected)
        prompt = " ".join(map(str, row.prompt))
        with torch.inference_mode():
            assert row.text == generate_plain(steps, Words(), prompt, config)
    assert complete > count / 2


@pytest.mark.parametrize("name", FAMILIES)
def test_random_arrivals_in_every_family(name, checkpoint):
    check_arrivals(steps_of(checkpoint(name)), seed=name, count=12)


SERVED = ["llama-dynamic", "mistral-v0.1", "gemma2", "gemma3", "phi4-mini", "olmo2"]


@pytest.mark.parametrize("form", [(torch.bfloat16, None), (torch.bfloat16, "int8"), (torch.float32, "int8")], ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_random_arrivals_in_every_format(name, form, checkpoint):
    check_arrivals(steps_of(checkpoint(name), *form), seed=f"{name} {form}", count=16)
