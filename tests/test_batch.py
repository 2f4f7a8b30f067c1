"""Rows that join and leave: each says what it says alone, to the last bit."""

import random

import pytest
import torch
from families import FAMILIES, prompt_ids, save_checkpoint
from minillm_kernels.cpu import FEW_ROWS
from test_soundness import Interrupt, assert_truthful, calls_of

from minillm import StaticCache
from minillm import batch as batch_module
from minillm.batch import Batch
from minillm.decode import generate_plain, prefill
from minillm.faster.steps import Steps
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.options import GenerationConfig, as_list
from minillm.proposer import Draft
from minillm.row import Row
from minillm.sampling import Sampling
from minillm.speculative.length import AdaptiveDraftLength
from minillm.speculative.proposers import PromptLookup
from minillm.speculative.verify import judge
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
        row.proposer, row.draft_length = proposer, AdaptiveDraftLength([drafts], proposer.cost)
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


FORMS = {"fp32": (torch.float32, None), "bf16": (torch.bfloat16, None), "int8": (torch.bfloat16, "int8")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_random_arrivals(name, form, checkpoint):
    """Over two hundred requests in each format, in batches of every family."""
    assert 10 * len(FAMILIES) > 200
    check_arrivals(steps_of(checkpoint(name), *FORMS[form]), seed=f"{name} {form}", count=10)


# -- a prefix is read once, whoever holds it -------------------------------------------------------

SHORT = 8  # tokens per chunk


def served(steps, rows, seats, each_tick=lambda tick: None, **options):
    """Serve rows that all wait from the start; returns the batch."""
    cache = StaticCache(steps.config, seats, LENGTH, dtype=steps.embedding.weight.dtype, max_step=SHORT)
    batch = Batch(steps, cache, rows, **options)
    for tick, _ in enumerate(batch.run()):
        each_tick(tick)
    return batch


@pytest.mark.parametrize("one_request", [True, False])
@pytest.mark.parametrize("name", ["llama2", "mistral-v0.1", "gemma2", "gemma3", "llama-dynamic", "phi4-mini"])
def test_prompts_that_begin_alike(name, one_request, checkpoint):
    """Random ones, over few beginnings; those with a prefix in a seat say to the bit what they say without."""
    steps, dice = steps_of(checkpoint(name)), random.Random(name)
    vocabulary = steps.config.vocab_size
    beginnings = [prompt_ids(24, seed=seed, vocabulary=vocabulary) for seed in range(3)]
    rows = []
    for _ in range(30):
        begin = dice.choice(beginnings)[: dice.choice([8, 16, 20, 24])]
        prompt = begin + prompt_ids(dice.randint(1, 3), seed=dice.randrange(10**6), vocabulary=vocabulary)
        rows.append(row_of(prompt, GenerationConfig(max_new_tokens=dice.randint(1, 6), eos_token_id=[])))
    served(steps, rows, seats=3, one_request=one_request)
    reused = [row.reused for row in rows]
    if any(spec.follows_length for spec in steps.config.ropes):
        assert not any(reused)
    else:
        assert sum(reused) > 60 and all(count % SHORT == 0 for count in reused)
    for row in rows:
        assert said(row) == said(alone(steps, row, SHORT))


@pytest.mark.parametrize("name", ["llama2", "gemma3"])
def test_a_prefix_that_a_running_row_holds(name, checkpoint):
    steps = steps_of(checkpoint(name))
    prefix = prompt_ids(24, seed=1, vocabulary=steps.config.vocab_size)
    first = row_of([*prefix, 3], GenerationConfig(max_new_tokens=7, eos_token_id=[]))
    later = [row_of([*prefix, n, 4], GenerationConfig(max_new_tokens=9, eos_token_id=[])) for n in (5, 6)]
    cache = StaticCache(steps.config, 3, LENGTH, max_step=SHORT)
    batch = Batch(steps, cache, [first], one_request=False)
    for tick, _ in enumerate(batch.run()):
        if tick == 4:
            assert first.token_ids and first.finish_reason is None
            batch.waiting += later
    assert [row.reused for row in later] == [24, 24]
    for row in (first, *later):
        assert said(row) == said(alone(steps, row, SHORT))


@pytest.mark.parametrize("tick", [0, 1, 2, 4, 6])
def test_keys_of_other_weights_are_not_handed_on(tick, checkpoint):
    """Whether the row that holds them is still reading, speaks, or is gone."""
    steps = steps_of(checkpoint("llama2"))
    prefix = prompt_ids(24, seed=1, vocabulary=steps.config.vocab_size)
    first = row_of([*prefix, 3], GenerationConfig(max_new_tokens=12, eos_token_id=[]))
    later = [row_of([*prefix, n], GenerationConfig(max_new_tokens=4, eos_token_id=[])) for n in range(5, 9)]
    batch = Batch(steps, StaticCache(steps.config, 2, LENGTH, max_step=SHORT), [first], one_request=False)
    for now, _ in enumerate(batch.run()):
        if now == tick:
            steps.model.blocks[0].attention.qkv.weight *= 1.5
            batch.waiting.append(later[0])
        elif now == tick + 8:
            batch.waiting += later[1:]
    assert first.finish_reason == "length"
    assert later[0].reused == 0 and sum(row.reused for row in later[1:]) >= 24
    for row in later:
        assert said(row) == said(alone(steps, row, SHORT))


# -- nobody waits longer than for a chunk ----------------------------------------------------------


def test_a_long_prompt_delays_the_others_by_a_chunk_per_tick(checkpoint, monkeypatch):
    steps = steps_of(checkpoint("llama2"))
    talkers = [row_of([n, 7, 9], GenerationConfig(max_new_tokens=40, eos_token_id=[])) for n in (3, 4, 5)]
    long = [row_of(prompt_ids(40, seed=n), GenerationConfig(max_new_tokens=3, eos_token_id=[])) for n in (1, 2)]
    chunks, passes = [], []
    read = batch_module.read_chunk
    monkeypatch.setattr(batch_module, "read_chunk", lambda *given: chunks.append(len(given[2])) or read(*given))
    model = CountedSteps(steps, passes)
    batch = Batch(model, StaticCache(steps.config, 5, LENGTH, max_step=SHORT), talkers, one_request=False)
    before = []
    for tick, _ in enumerate(batch.run()):
        assert len(passes) <= 1 and sum(chunks) <= SHORT
        if 3 <= tick < 20:
            assert [len(row.token_ids) for row in talkers] == [count + 1 for count in before]
        before = [len(row.token_ids) for row in talkers]
        chunks.clear()
        passes.clear()
        if tick == 4:
            batch.waiting += long
        if tick == 4 + 5:
            assert [len(row.token_ids) for row in long] == [1, 0]  # one after the other
    assert {row.finish_reason for row in (*talkers, *long)} == {"length"}


class CountedSteps:
    """Notes every step."""

    def __init__(self, steps, passes):
        self.steps, self.passes = steps, passes

    def __getattr__(self, name):
        return getattr(self.steps, name)

    def __call__(self, *given):
        self.passes.append(given)
        return self.steps(*given)


# -- errors of one row -----------------------------------------------------------------------------


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("part", ["push", "finish", "first push"])
def test_a_row_whose_text_fails_leaves_alone(part, drafts, checkpoint):
    steps = steps_of(checkpoint("mistral-v0.1"))
    lookup = PromptLookup(torch.device("cpu")) if drafts else None
    config = GenerationConfig(max_new_tokens=12, eos_token_id=[])
    rows = [row_of([n, 7, n, 7, 9, n, 7], config, proposer=lookup, drafts=drafts) for n in range(3, 8)]
    sick = rows[1]
    good, calls = sick.stream.push, []

    def fail(*token):
        calls.append(token)
        if part != "push" or len(calls) == 4:
            raise UnicodeError("no such word")
        return good(*token)

    setattr(sick.stream, part.split()[-1], fail)
    served(steps, rows, seats=2, one_request=False)
    assert sick.finish_reason == "error" and isinstance(sick.error, UnicodeError)
    for row in rows:
        if row is not sick:
            assert row.error is None and said(row) == said(alone(steps, row, SHORT))
    again = [row_of(row.prompt, config, proposer=lookup, drafts=drafts) for row in rows]
    again[1].stream.finish, again[1].cancelled = lambda: next(iter(())), True
    served(steps, again, seats=2, one_request=False)
    assert isinstance(again[1].error, StopIteration) and again[0].finish_reason == "length"


@pytest.mark.parametrize("attention", ["math", "sdpa", "kernels"])
def test_keys_that_are_no_numbers_leave_with_their_row(attention, checkpoint):
    """Also where it is cancelled before anybody has seen that they are none; here all slots are multiplied."""
    folder = checkpoint("llama2")
    steps = Steps(load_decoder(folder, load_config(folder), torch.float32, "cpu", attention))
    steps.embedding.weight[12] = float("nan")

    def run(disturbed):
        ids = ([5, 9, 7, 3] * 5, [12] + [7] * 30, [8, 9, 10])
        long, sick, well = (row_of(i, GenerationConfig(max_new_tokens=30, eos_token_id=[])) for i in ids)
        batch = Batch(steps, StaticCache(steps.config, 2, LENGTH, max_step=SHORT), [long], one_request=False)
        for tick, _ in enumerate(batch.run()):
            if tick == 4 and disturbed:
                batch.waiting.append(sick)
            elif tick == 6:
                sick.cancelled = True
            elif tick == 8:
                batch.waiting.append(well)
        assert (sick.seat, sick.token_ids, well.seat) == (1 if disturbed else -1, [], 1)
        assert said(long)[0] == said(alone(steps, long, SHORT))[0]
        return well.error or said(well)

    assert run(True) == run(False)


# -- interrupted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama2", "gemma3", "llama-dynamic"])
@pytest.mark.parametrize("one_request", [True, False])
def test_interrupted_in_any_tick_the_cache_tells_the_truth(name, one_request, checkpoint):
    """With rows that join, copy a prefix from a running row, and leave."""
    steps = steps_of(checkpoint(name))
    prefix = prompt_ids(16, seed=1, vocabulary=steps.config.vocab_size)

    def new():
        config = GenerationConfig(max_new_tokens=4, eos_token_id=[])
        rows = [row_of([*prefix, n] if n % 3 else [n, 8], config) for n in range(3, 9)]
        rows[4].cancelled = True
        return Batch(steps, StaticCache(steps.config, 2, 32, max_step=SHORT), rows, one_request)

    def run(batch):
        for _ in batch.run():
            pass

    planned = new()
    total = calls_of(lambda: run(planned))
    follows = any(spec.follows_length for spec in steps.config.ropes)
    for number in range(1, total + 1, max(1, total // 40)):
        batch = new()
        with Interrupt(number):
            run(batch)
        if not follows:  # there a fresh pass would have to know each row's plan
            assert_truthful(batch.cache, steps.model)
        batch.cache.reset()  # nobody holds it any more


def until_interrupted(tensors):
    yield from tensors
    raise KeyboardInterrupt


def test_a_copy_of_a_row_that_is_interrupted_claims_nothing(checkpoint):
    steps = steps_of(checkpoint("gemma3"))
    prompts = [prompt_ids(20, seed=seed, vocabulary=steps.config.vocab_size) for seed in (1, 2)]
    for place in range(2 * len(steps.config.layers) + 2):
        cache = StaticCache(steps.config, 2, 32, max_step=SHORT)
        with torch.inference_mode():
            prefill(steps, cache, prompts, [0, 0])
        kept = cache.keys
        cache.keys = until_interrupted([*cache.keys, *cache.values][:place])
        with pytest.raises(KeyboardInterrupt):
            cache.copy_row(0, 1)
        cache.keys = kept
        assert cache.lengths == [20, 0]
        assert_truthful(cache, steps.model)
        cache.copy_row(0, 1)
        assert cache.token_ids == [prompts[0]] * 2
        assert_truthful(cache, steps.model)


# -- lists -----------------------------------------------------------------------------------------


def some_list(llm, count):
    vocabulary = llm.tokenizer.vocab_size
    prompts = [prompt_ids(1 + seed % 9, seed=seed, vocabulary=vocabulary) for seed in range(count)]
    return prompts, dict(max_new_tokens=3, temperature=0.9, top_k=20, seed=[*range(count)], logprobs=True)


def test_five_hundred_prompts_on_eight_seats(llm):
    prompts, options = some_list(llm, 500)
    options["eos_token_id"] = [*range(0, llm.tokenizer.vocab_size, 9)]
    rows = llm.generate(prompts, seats=8, **options)
    assert len({row.finish_reason for row in rows}) == 2
    for seed, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        single = llm.generate(prompt, **options | dict(seed=seed))
        assert (row.text, row.token_ids, row.logprobs) == (single.text, single.token_ids, single.logprobs)


@pytest.mark.parametrize("seats", [1, 3, 16])
def test_as_completed_yields_each_once(seats, llm):
    prompts, options = some_list(llm, 40)
    options["eos_token_id"] = [*range(0, llm.tokenizer.vocab_size, 9)]
    expected = llm.generate(prompts, **options)
    numbers = []
    for number, completion in llm.as_completed(prompts, seats=seats, **options):
        numbers.append(number)
        assert (completion.text, completion.logprobs) == (expected[number].text, expected[number].logprobs)
    assert sorted(numbers) == [*range(40)]
    assert numbers != sorted(numbers) or seats == 1


@pytest.mark.parametrize("way", ["close", "drop", "never begun", "error in the loop"])
def test_an_abandoned_list_leaves_a_usable_cache(way, llm):
    prompts, options = [[5, 9, 17], [33, 12, 40, 7, 21]], dict(temperature=0)
    cache = StaticCache(llm.config, 2, LENGTH, max_step=SHORT)
    expected = [row.token_ids for row in llm.generate(prompts, max_new_tokens=20, eos_token_id=[], **options)]
    eos = expected[0][3]
    results = llm.as_completed(prompts, cache=cache, max_new_tokens=20, eos_token_id=[eos], **options)
    if way == "error in the loop":
        with pytest.raises(ZeroDivisionError):
            for _ in results:
                raise ZeroDivisionError
    if way != "never begun":
        next(results, None)
    if way == "close":
        results.close()
    results = None
    assert_truthful(cache, llm.model)
    again = llm.generate(prompts, cache=cache, max_new_tokens=20, eos_token_id=[], **options)
    assert [row.token_ids for row in again] == expected


class Parrot:
    """Proposes more tokens than a step has room for bits of, all of them wrong or right by chance."""

    cost, rest = 0.1, 32
    judge = staticmethod(judge)

    def start(self, seat, prompt, planned_length=None):
        pass

    def read(self, seat, prompt):
        pass

    def propose(self, texts, counts, sampling, seen):
        tokens = torch.tensor([[5 + (seat + i) % 7 for i in range(20)] for seat in texts])
        lengths = [min(20, count) for count in counts]
        return Draft(tokens[:, : max(counts)], None, lengths, torch.tensor(lengths))


def test_one_rows_many_drafts_leave_its_neighbours_their_bits(checkpoint):
    """Twenty-one tokens of one row with one of each other are more than are added up one by one."""
    steps, proposer = steps_of(checkpoint("llama3"), torch.bfloat16), Parrot()
    configs = [GenerationConfig(max_new_tokens=25, temperature=t, seed=3) for t in (0.0, 1.0, 0.7)]
    plain = [row_of(prompt_ids(n, seed=n), config) for n, config in zip((5, 9, 20), configs, strict=True)]
    wide = row_of(prompt_ids(7, seed=1), configs[0], proposer=proposer, drafts=20)
    cache = StaticCache(steps.config, 4, LENGTH, dtype=torch.bfloat16)
    shapes = []

    def watched(ids, position, part):
        shapes.append((tuple(ids.shape), (position >= 0).sum(dim=1).tolist()))
        return steps(ids, position, part)

    class Watched:
        __call__ = staticmethod(watched)

        def __getattr__(self, name):
            return getattr(steps, name)

    batch = Batch(Watched(), cache, [wide, *plain])
    for _ in batch.run():
        pass
    assert wide.drafted > 20
    assert {shape for shape, _ in shapes} >= {(4, 1), (4, 21)}
    for (rows, width), fed in shapes:  # who drafts is alone in its pass, but for the last few tokens of its budget
        assert rows * width <= FEW_ROWS or sum(n > 0 for n in fed) == 1
    for row in plain:
        assert said(row) == said(alone(steps, row))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rows_clock_is_its_own_in_a_seat_that_holds_more(kind, tmp_path):
    """The seat could hold 200 tokens; the rotary table is the one for what the row is planned to reach."""
    if kind == "dynamic":
        changes = {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 20.0}}
        config = FAMILIES["llama-dynamic"].with_changes(changes)
    else:
        config = FAMILIES["phi4-mini"].with_changes({"original_max_position_embeddings": 24})
    steps = steps_of(save_checkpoint(tmp_path / kind, config, seed=5))
    configs = [GenerationConfig(max_new_tokens=n, temperature=1.0, seed=n) for n in (5, 20, 60)]
    rows = [row_of(prompt_ids(9, seed=n), config) for n, config in enumerate(configs)]
    for _ in Batch(steps, StaticCache(steps.config, 2, 200), rows).run():
        pass
    for row in rows:
        assert said(row) == said(alone(steps, row))


def test_a_prompt_that_is_held_whole_keeps_a_chunk_to_feed(checkpoint):
    steps, config = steps_of(checkpoint("llama3")), GenerationConfig(max_new_tokens=4)
    rows = [row_of(prompt_ids(16, seed=1), config) for _ in range(2)]
    for _ in Batch(steps, StaticCache(steps.config, 1, LENGTH, max_step=8), rows).run():
        pass
    assert [row.reused for row in rows] == [0, 8]
    assert said(rows[0]) == said(rows[1])
