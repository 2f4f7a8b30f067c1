"""Engine: many callers, one model. Each gets what it gets alone, nobody waits for ever, nothing is left behind."""

import asyncio
import functools
import gc
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from contextlib import suppress

import pytest
import torch
from families import FAMILIES, prompt_ids, save_checkpoint

from minillm import LLM, StaticCache
from minillm.errors import EngineError, EngineFull, MinillmError, NumericalError, RequestError
from minillm.serve import engine as engine_module
from minillm.serve.engine import Engine

PROMPT = [5, 9, 17, 33, 12, 40, 7, 21, 60, 44, 31]
GREEDY = dict(temperature=0, eos_token_id=[])
SOON = 60  # seconds that no test needs: who waits longer waits for ever


def saved(folder, files, changes=None, seed=4, family="llama2"):
    save_checkpoint(
        folder, FAMILIES[family].with_changes((changes or {}) | {"vocab_size": files.vocabulary}), seed=seed
    )
    files.copy_to(folder)
    return folder


@pytest.fixture(scope="module")
def quantizable(tmp_path_factory, text_tokenizer_files):
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    return saved(tmp_path_factory.mktemp("engine") / "wide", text_tokenizer_files, sizes)


@pytest.fixture(scope="module")
def target(quantizable):
    """A model and, nearly the same, its draft."""
    return LLM.from_pretrained(quantizable, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def draft(quantizable):
    llm = LLM.from_pretrained(quantizable, dtype="float32", device="cpu")
    generator = torch.Generator().manual_seed(1)
    for block in llm.model.blocks:
        weight = block.mlp.down.weight
        weight += torch.randn(weight.shape, generator=generator) * weight.std() * 0.3
    return llm


@pytest.fixture
def own(text_checkpoint):
    """An LLM that a test may spoil."""
    return LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu")


@pytest.fixture
def short_steps(monkeypatch):
    """Engines whose prompts are read in chunks of eight."""
    monkeypatch.setattr(engine_module, "StaticCache", functools.partial(StaticCache, max_step=8))


class Turnstile:
    """The model makes as many passes as are let through."""

    def __init__(self, llm):
        self._passes, self.reached = threading.Semaphore(0), threading.Event()
        llm.model.blocks[0].register_forward_pre_hook(self)

    def __call__(self, *_):
        self.reached.set()
        if not self._passes.acquire(timeout=SOON):
            raise RuntimeError("nobody opened the turnstile")

    def let(self, passes=10_000):
        self._passes.release(passes)


def outcome(ask):
    """What came of it, to compare: a completion, or an error."""
    try:
        done = ask()
    except Exception as error:
        return type(error), str(error)
    return done.text, done.token_ids, done.logprobs, done.finish_reason


def some_request(dice, llm, sampled=True, **fixed):
    vocabulary = llm.tokenizer.vocab_size
    prompt = prompt_ids(dice.randint(1, 20), seed=dice.randrange(10**6), vocabulary=vocabulary)
    if dice.random() < 0.3:
        prompt = dice.choice(["Once upon a time", "The wolf said", "从前有一个 🚀", "A"])
    options = dict(max_new_tokens=dice.randint(1, 12), seed=dice.randrange(10**9), temperature=0)
    if sampled and dice.random() < 0.7:
        options |= dict(temperature=dice.choice([0.7, 1.3]))
        for name, values in dict(top_k=[3, 20], top_p=[0.5, 0.9], min_p=[0.02, 0.2]).items():
            if dice.random() < 0.3:
                options[name] = dice.choice(values)
    if dice.random() < 0.3:
        options["repetition_penalty"] = 1.3
    if dice.random() < 0.4:
        options["logprobs"] = True
    if dice.random() < 0.3:
        options["stop_strings"] = dice.sample("abcdefghijklmnopqrstuvwxyz", 3)
    options["eos_token_id"] = dice.sample(range(vocabulary), 10) if dice.random() < 0.3 else []
    return prompt, options | fixed


# -- each gets what it gets alone ------------------------------------------------------------------


class Moody:
    """A tokenizer that cannot stand some of its tokens."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids, **options):
        bad = [token for token in ids if token % 37 == 0]
        if bad and len(ids) < 4:
            raise ValueError(f"no word for {bad[0]}")
        return self.tokenizer.decode(ids, **options)


FORMS = [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("float32", "int8"), ("bfloat16", "int4-g32")]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_each_gets_what_it_gets_alone(form, quantizable):
    """From several threads, with neighbours that filter, fail, are cancelled or cannot be submitted at all."""
    dtype, quantize = form
    llm = LLM.from_pretrained(quantizable, dtype=dtype, quantize=quantize, quantize_head=bool(quantize), device="cpu")
    llm.tokenizer = Moody(llm.tokenizer)
    dice = random.Random(str(form))
    asked = [some_request(dice, llm) for _ in range(28)]
    expected = [outcome(lambda p=prompt, o=options: llm.generate(p, **o)) for prompt, options in asked]
    assert sum(said[0] is ValueError for said in expected) in range(2, 20)
    given = {}

    def caller(numbers):
        for number in numbers:
            prompt, options = asked[number]
            if number % 5 == 0:
                with suppress(ValueError):
                    engine.submit(prompt, **options | dict(max_new_tokens=40)).cancel()
            with pytest.raises(RequestError):
                engine.submit(prompt, **options | dict(top_k=-1))
            # A prompt whose own words cannot be decoded fails in the caller's thread.
            given[number] = outcome(lambda p=prompt, o=options: engine.submit(p, **o).result(SOON))

    with Engine(llm, seats=5, max_cache_len=128) as engine:
        threads = [threading.Thread(target=caller, args=(range(i, 28, 7),)) for i in range(7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.stats().seats_in_use <= 5 and engine.stats().waiting == 0
    assert [given[number] for number in range(28)] == expected


@pytest.mark.parametrize("drafts", [1, 3])
def test_drafts_change_nothing_while_a_step_is_small(drafts, target, draft):
    """Four seats of four tokens: some look up, the others have a draft model. Bit for bit."""
    dice, asked = random.Random(drafts), []
    for _ in range(24):
        lookup = dice.random() < 0.5
        prompt, options = some_request(dice, target)
        if isinstance(prompt, list):
            prompt = prompt * 2
        options["prompt_lookup_num_tokens" if lookup else "num_assistant_tokens"] = drafts
        asked.append((prompt, options, None if lookup else draft))
    expected = [target.generate(prompt, assistant_model=helper, **options) for prompt, options, helper in asked]
    with Engine(target, seats=4, max_cache_len=128, assistant_model=draft) as engine:
        handles = [engine.submit(prompt, **options) for prompt, options, _ in asked]
        for handle, alone in zip(handles, expected, strict=True):
            given = handle.result(SOON)
            assert (given.text, given.token_ids, given.logprobs) == (alone.text, alone.token_ids, alone.logprobs)
            assert given.from_draft == alone.from_draft
        stats = engine.stats()
    assert stats.drafted > stats.accepted > 0


def test_drafts_over_many_rows_leave_greedy_text_alone(target, draft):
    dice = random.Random(5)
    asked = [some_request(dice, target, sampled=False, max_new_tokens=12, logprobs=False) for _ in range(24)]
    expected = [target.generate(prompt, **options).token_ids for prompt, options in asked]
    with Engine(target, seats=12, max_cache_len=128, assistant_model=draft) as engine:
        handles = [engine.submit(prompt, **options, num_assistant_tokens=4) for prompt, options in asked]
        assert [handle.result(SOON).token_ids for handle in handles] == expected


def test_two_engines_and_a_caller_without_one(target, draft):
    """On one model, beside one on another: bits stay."""
    dice = random.Random(2)
    asked = [some_request(dice, target) for _ in range(12)]
    expected = {llm: [outcome(lambda p=p, o=o, m=llm: m.generate(p, **o)) for p, o in asked] for llm in (target, draft)}
    beside = []

    def caller():
        beside.extend(outcome(lambda p=p, o=o: target.generate(p, **o)) for p, o in asked)

    thread = threading.Thread(target=caller)
    thread.start()
    sizes = dict(max_cache_len=128)
    with Engine(target, 3, **sizes) as one, Engine(target, 4, **sizes) as two, Engine(draft, 2, **sizes) as other:
        handles = {engine: [engine.submit(p, **o) for p, o in asked] for engine in (one, two, other)}
        for engine, llm in ((one, target), (two, target), (other, draft)):
            assert [outcome(lambda h=h: h.result(SOON)) for h in handles[engine]] == expected[llm]
    thread.join()
    assert beside == expected[target]
    assert expected[target] != expected[draft]


# -- a prefix is read once -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama2", "mistral-v0.1", "gemma3", "llama-dynamic", "phi4-mini"])
def test_a_prefix_is_read_once(family, short_steps, tmp_path, text_tokenizer_files):
    """Also where rings wrap, never where rotary tables follow the length; and bits stay."""
    llm = LLM.from_pretrained(saved(tmp_path / "model", text_tokenizer_files, family=family), dtype="float32")
    prefix = (PROMPT * 3)[:24]
    prompts = [[*prefix, n, n + 1] for n in range(70, 76)] + [PROMPT * 3, PROMPT[:9]]
    options = GREEDY | dict(max_new_tokens=4, logprobs=True)
    with Engine(llm, seats=3, max_cache_len=64) as engine:
        answers = [handle.result(SOON) for handle in [engine.submit(prompt, **options) for prompt in prompts]]
        reused = engine.stats().reused_tokens
    assert reused == sum(answer.stats.reused_tokens for answer in answers)
    assert all(answer.stats.reused_tokens % 8 == 0 for answer in answers)
    if any(spec.follows_length for spec in llm.config.ropes):
        assert reused == 0
    else:
        assert reused >= 3 * len(prefix)  # all that came after the first ones
    for prompt, answer in zip(prompts, answers, strict=True):
        length = len(prompt) + options["max_new_tokens"]
        cache = StaticCache(llm.config, 1, length, dtype=llm.dtype, max_step=8)
        alone = llm.generate(prompt, cache=cache, **options)
        assert (answer.token_ids, answer.logprobs) == (alone.token_ids, alone.logprobs)


def test_other_weights_have_other_keys(short_steps, own):
    options = GREEDY | dict(max_new_tokens=6, logprobs=True)

    def alone():
        cache = StaticCache(own.config, 1, 64, dtype=own.dtype, max_step=8)
        return outcome(lambda: own.generate(PROMPT * 2, cache=cache, **options))

    with Engine(own, seats=2, max_cache_len=64) as engine:
        for change in (1.0, 1.7, 0.4):
            own.model.blocks[0].mlp.down.weight *= change
            given = [engine.submit(PROMPT * 2, **options).result(SOON) for _ in range(2)]
            assert [outcome(lambda g=g: g) for g in given] == [alone()] * 2
            assert [g.stats.reused_tokens for g in given] == [0, 16]


# -- what goes wrong stays where it is -------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0, repetition_penalty=1.2, logprobs=True),
        dict(temperature=0.7, seed=1, logprobs=True),
        dict(temperature=0.7, seed=1, repetition_penalty=1.2),
        dict(temperature=0.7, seed=1, top_p=0.9, top_k=9, logprobs=True),
        dict(temperature=0.7, seed=1, prompt_lookup_num_tokens=2, logprobs=True, repetition_penalty=1.2),
    ],
    ids=str,
)
def test_numbers_that_are_none_stay_in_their_row(options, own):
    options |= dict(max_new_tokens=6, eos_token_id=[])
    healthy = [[8, 9, 10], [9, 10, 8, 9]]
    expected = [outcome(lambda p=p: own.generate(p, **options)) for p in healthy]
    own.model.embedding.weight[12] = float("nan")  # a token of PROMPT
    assert own.generate(healthy[0], **options).token_ids == expected[0][1]  # and of no other
    with Engine(own, seats=3, max_cache_len=64) as engine:
        for _ in range(2):
            first, sick, last = (engine.submit(p, **options) for p in (healthy[0], PROMPT, healthy[1]))
            assert [outcome(lambda h=h: h.result(SOON)) for h in (first, last)] == expected
            with pytest.raises(NumericalError, match="infinite or not a number"):
                sick.result(SOON)
            with pytest.raises(NumericalError):
                list(sick)


@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=0.8), dict(temperature=0.8, top_k=9)])
def test_a_draft_without_numbers_only_costs_time(options, text_checkpoint, llm):
    """NaN is never accepted; sampled, the text is that of a draft whose every token is rejected."""
    draft = LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu")
    draft.model.embedding.weight[12] = float("nan")
    options |= dict(max_new_tokens=8, eos_token_id=[], seed=1, repetition_penalty=1.1, num_assistant_tokens=2)
    healthy = [8, 9, 10]
    alone = llm.generate(healthy, assistant_model=draft, **options)
    with Engine(llm, seats=2, max_cache_len=64, assistant_model=draft) as engine:
        well, sick = engine.submit(healthy, **options), engine.submit(PROMPT, **options)
        assert well.result(SOON).token_ids == alone.token_ids
        assert sick.result(SOON).stats.accepted == 0
        if options["temperature"] == 0:
            plain = {name: value for name, value in options.items() if name != "num_assistant_tokens"}
            assert sick.result().token_ids == llm.generate(PROMPT, **plain).token_ids


class Unspeakable(Exception):
    def __str__(self):
        raise ValueError("not even this")


@pytest.mark.parametrize("error", [RuntimeError("no\nsuch thing"), MemoryError(), KeyboardInterrupt(), Unspeakable()])
def test_an_error_of_the_thread_reaches_everybody(error, own):
    turnstile, calls = Turnstile(own), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 6:
            raise error

    own.model.blocks[1].register_forward_hook(fail)
    heard = []

    def wait(handle, how):
        with pytest.raises(EngineError, match=f"has stopped: {type(error).__name__}") as caught:
            how(handle)
        heard.append(caught.value.__cause__)

    async def read(handle):
        return [piece async for piece in handle]

    engine = Engine(own, seats=2, max_cache_len=64, max_waiting=3)
    handles = [engine.submit(PROMPT, max_new_tokens=30, **GREEDY) for _ in range(5)]
    ways = [lambda h: h.result(), list, lambda h: asyncio.run(read(h)), lambda h: h.result(SOON), list]
    threads = [threading.Thread(target=wait, args=pair, daemon=True) for pair in zip(handles, ways, strict=True)]
    for thread in threads:
        thread.start()
    turnstile.let()
    for thread in threads:
        thread.join(SOON)
    assert heard == [error] * 5
    for _ in range(2):
        with pytest.raises(EngineError, match="has stopped") as caught:
            engine.submit(PROMPT)
        assert caught.value.__cause__ is error
    engine.close()
    engine.close(cancel=True)
    assert engine.stats().seats_in_use == engine.stats().waiting == 0


# -- the queue -------------------------------------------------------------------------------------


def test_a_full_queue_says_so_and_a_cancelled_place_is_free(own):
    turnstile = Turnstile(own)
    with Engine(own, seats=1, max_cache_len=64, max_waiting=1) as engine:
        running, waiting = (engine.submit(PROMPT, max_new_tokens=40, **GREEDY) for _ in range(2))
        assert turnstile.reached.wait(SOON)
        for _ in range(3):
            started = time.perf_counter()
            with pytest.raises(EngineFull, match="waiting"):
                engine.submit(PROMPT)
            assert time.perf_counter() - started < 5
        waiting.cancel()
        turnstile.let(1)  # the pass that is being made, and no other
        assert waiting.result(SOON).finish_reason == "cancelled" and waiting.result().token_ids == []
        next_one = engine.submit(PROMPT, max_new_tokens=2, **GREEDY)
        with pytest.raises(EngineFull):
            engine.submit(PROMPT)
        running.cancel()
        turnstile.let(1)
        stopped = running.result(SOON)
        assert stopped.finish_reason == "cancelled" and len(stopped.token_ids) in (1, 2)
        assert stopped.text == "".join(running)
        assert (engine.stats().seats_in_use, engine.stats().waiting) in [(0, 1), (1, 0)]
        turnstile.let()
        assert next_one.result(SOON).finish_reason == "length"
        next_one.cancel()  # too late, and no harm
        assert next_one.result().finish_reason == "length"


def test_who_has_an_answer_finds_its_place_free(llm):
    """In the very moment in which it is told."""
    with Engine(llm, seats=1, max_cache_len=64, max_waiting=0) as engine:
        seen, said = [], threading.Event()

        def again():
            stats = engine.stats()
            seen.append((stats.seats_in_use, stats.waiting, stats.new_tokens))
            seen.append(engine.submit(PROMPT, max_new_tokens=2, **GREEDY))
            said.set()

        handle = engine.submit(PROMPT[:3], max_new_tokens=1, **GREEDY)
        handle._listeners.append(again)
        if handle.done:
            again()
        assert said.wait(SOON)
        assert seen[0] == (0, 0, 1)
        assert seen[1].result(SOON).finish_reason == "length"


def test_cancelled_before_the_first_word(own):
    """The statistics are those of a request that said nothing."""
    turnstile = Turnstile(own)
    with Engine(own, seats=1, max_cache_len=64) as engine:
        engine._worker.batch.cache.max_step = 8
        handle = engine.submit(PROMPT * 3, max_new_tokens=4, **GREEDY)
        assert turnstile.reached.wait(SOON)
        handle.cancel()
        turnstile.let(1)
        answer = handle.result(SOON)
        turnstile.let()
    assert (answer.text, answer.token_ids, answer.finish_reason) == ("", [], "cancelled")
    assert answer.stats.prefill_seconds == answer.stats.decode_seconds == 0
    assert answer.stats.tokens_per_second == answer.stats.tokens_per_target_step == 0


@pytest.mark.parametrize("wrong", [None, 5, [], ["a", "b"], [[1], [2]], [10**9], [1.5], b"", {}, "\ud800"], ids=repr)
def test_prompts_that_are_none(wrong, llm):
    with Engine(llm, seats=1, max_cache_len=32) as engine, pytest.raises(MinillmError):
        engine.submit(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(seats=0), dict(seats="2"), dict(max_cache_len=None), dict(max_cache_len="9"), dict(max_cache_len=True),
        dict(max_waiting=-1), dict(max_waiting=1.0), dict(assistant_model="demo"),
    ],
    ids=str,
)  # fmt: skip
def test_engines_that_cannot_be(wrong, llm):
    before = threading.active_count()
    with pytest.raises(MinillmError):
        Engine(llm, **wrong)
    assert threading.active_count() == before


def test_options_that_are_the_engines(llm):
    with Engine(llm, seats=1, max_cache_len=32) as engine:
        for options in (dict(cache=None), dict(assistant_model=llm), dict(num_assistant_tokens=2), dict(seats=2)):
            with pytest.raises(RequestError):
                engine.submit(PROMPT, **options)
        with pytest.raises(RequestError, match="holds 32"):
            engine.submit(PROMPT, max_new_tokens=22)
        assert len(engine.submit(PROMPT, max_new_tokens=21, **GREEDY).result(SOON).token_ids) == 21


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["drain", "cancel", "block", "error"])
def test_closing(way, own):
    turnstile = Turnstile(own)
    engine = Engine(own, seats=2, max_cache_len=64)
    handles = [engine.submit(PROMPT, max_new_tokens=8, **GREEDY) for _ in range(5)]
    threading.Timer(0.2, turnstile.let).start()
    if way == "block":
        with engine:
            pass
    elif way == "error":
        with pytest.raises(ZeroDivisionError), engine:
            raise ZeroDivisionError
    else:
        engine.close(cancel=way == "cancel")
    assert all(handle.done for handle in handles)
    drained = way in ("drain", "block")
    assert {handle.result().finish_reason for handle in handles} == {"length" if drained else "cancelled"}
    engine.close()
    engine.close(cancel=True)
    with engine:
        pass
    with pytest.raises(EngineError, match="closed"):
        engine.submit(PROMPT)
    assert not engine._worker._thread.is_alive()
    if drained:
        assert engine.stats().new_tokens == 40


def test_an_engine_that_nobody_closed(own):
    turnstile = Turnstile(own)
    engine = Engine(own, seats=1, max_cache_len=64)
    running, waiting = (engine.submit(PROMPT, max_new_tokens=40, **GREEDY) for _ in range(2))
    thread, cache = engine._worker._thread, weakref.ref(engine._worker.batch.cache)
    del engine
    turnstile.let()
    assert running.result(SOON).finish_reason == waiting.result(SOON).finish_reason == "cancelled"
    thread.join(SOON)
    del running, waiting
    gc.collect()
    assert cache() is None


@pytest.mark.parametrize("where", ["in the thread", "under a lock that the thread needs"])
def test_an_engine_that_is_collected_at_a_bad_moment(where, own, monkeypatch):
    complaints, kept = [], []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    monkeypatch.setattr(threading, "excepthook", complaints.append)

    def collect(*_):
        if kept:
            kept.clear()
            gc.collect()

    if where == "in the thread":
        own.model.blocks[0].register_forward_hook(collect)
    turnstile = Turnstile(own)
    engine = Engine(own, seats=1, max_cache_len=64)
    engine.itself = engine  # only a collector finds it
    handle = engine.submit(PROMPT, max_new_tokens=40, **GREEDY)
    kept.append(engine)
    gone = weakref.ref(engine)
    del engine

    def drop():
        with handle._changed:
            turnstile.let(1)
            time.sleep(0.1)  # by now the thread may want the lock
            collect()

    if where == "in the thread":
        turnstile.let()
    else:
        thread = threading.Thread(target=drop, daemon=True)
        thread.start()
        thread.join(SOON)
        assert not thread.is_alive()
        turnstile.let()
    assert handle.result(SOON).finish_reason == "cancelled"
    assert gone() is None and not complaints


END = """
    import os, sys, threading
    from minillm import LLM
    from minillm.errors import EngineError
    from minillm.serve.engine import Engine

    llm = LLM.from_pretrained(sys.argv[1], dtype="float32", device="cpu")
    engine = Engine(llm, seats=2, max_cache_len=512)
    options = dict(temperature=0, eos_token_id=[], max_new_tokens=400)
    handles = [engine.submit("Once", **options) for _ in range(6)]
    print(next(iter(handles[0])) != "", flush=True)
    with engine._worker._changed:  # the thread may well hold it at a fork: the child must not want it
        holder = threading.Event()
        forked = threading.Event()
        child = None

        def fork():
            global child
            child = os.fork()
            if child == 0:
                import atexit, signal
                signal.alarm(20)  # ends a child that hangs
                try:
                    engine.submit("Once")
                except EngineError as error:
                    print("child:", error, flush=True)
                print(engine.stats().seats, flush=True)
                engine.close()
                atexit._run_exitfuncs()  # what the interpreter does at its end; what C does there is not ours
                os._exit(0)
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    print(os.waitpid(child, 0)[1], flush=True)
    print(not all(handle.done for handle in handles))
    # and now the interpreter ends, with requests running
"""


def test_the_interpreter_ends_and_forks_with_requests_running(text_checkpoint):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(END), str(text_checkpoint)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    child = "child: the engine's thread is not in this process: make an Engine after the fork"
    assert done.stdout.splitlines() == ["True", child, "2", "0", "True"]
    assert done.stderr == ""


# -- readers ---------------------------------------------------------------------------------------


def test_read_by_many_at_once(llm):
    """Twice, by threads, by tasks of two event loops: each hears all of it."""
    expected = llm.generate("Once upon a time", max_new_tokens=30, **GREEDY)
    with Engine(llm, seats=2, max_cache_len=128) as engine:
        handle = engine.submit("Once upon a time", max_new_tokens=30, **GREEDY)
        heard = []

        async def read():
            return "".join([piece async for piece in handle])

        async def tasks():
            whole, *texts = await asyncio.gather(handle, read(), read())
            return [whole.text, *texts]

        ways = [lambda: "".join(handle), lambda: "".join(handle), lambda: handle.result().text] * 2
        ways += [lambda: heard.extend(asyncio.run(tasks()))] * 2
        threads = [threading.Thread(target=lambda way=way: heard.append(way())) for way in ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        assert sorted(heard, key=str) == sorted([expected.text] * 12 + [None] * 2, key=str)
        assert "".join(handle) == "".join(handle) == expected.text
        assert asyncio.run(read()) == expected.text
        first, second = iter(handle), iter(handle)
        assert [next(first), next(second)] == [next(iter(handle))] * 2


def test_a_task_that_gives_up_cancels_its_request(own):
    turnstile = Turnstile(own)
    with Engine(own, seats=1, max_cache_len=64) as engine:

        async def impatient(handle):
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(handle, 0.05)
            with pytest.raises(asyncio.TimeoutError):
                async with asyncio.timeout(0.05):
                    async for _ in handle:
                        pass
            assert handle._row.cancelled
            turnstile.let()
            return await handle

        running, waiting = (engine.submit(PROMPT, max_new_tokens=40, **GREEDY) for _ in range(2))
        assert asyncio.run(impatient(running)).finish_reason == "cancelled"
        assert waiting.result(SOON).finish_reason == "length"
        with pytest.raises(TimeoutError, match="no answer within"):
            engine.submit(PROMPT, max_new_tokens=40, **GREEDY).result(0)


def test_a_reader_that_is_stopped_between_two_pieces_cancels_its_request(own):
    """As a server's task is whose client has gone: the error strikes while it sends, not while it waits for us."""

    async def send(handle):
        with pytest.raises(ConnectionError):
            async for _ in handle:
                raise ConnectionError
        return await handle

    with Engine(own, seats=1) as engine:
        assert asyncio.run(send(engine.submit(PROMPT, max_new_tokens=400, **GREEDY))).finish_reason == "cancelled"


def test_a_loop_that_is_closed_cancels_too(own):
    turnstile = Turnstile(own)
    with Engine(own, seats=1, max_cache_len=64) as engine:
        handle = engine.submit(PROMPT, max_new_tokens=40, **GREEDY)
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda *_: None)  # it would complain of the task

        async def read():
            return await handle

        task = loop.create_task(read())
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()
        turnstile.let()
        assert handle.result(SOON).finish_reason == "cancelled"
        assert engine.submit(PROMPT, max_new_tokens=2, **GREEDY).result(SOON).finish_reason == "length"
        assert not task.done()


def test_readers_that_are_slow_or_gone_hold_nobody_up(llm):
    options = GREEDY | dict(max_new_tokens=20)
    expected = llm.generate(PROMPT, **options).text
    with Engine(llm, seats=2, max_cache_len=64) as engine:
        slow, gone = engine.submit(PROMPT, **options), engine.submit(PROMPT, **options)
        engine.submit(PROMPT, **options)  # nobody ever asks
        reader = iter(slow)
        pieces = [next(reader)]
        for _ in gone:
            break
        assert engine.submit(PROMPT, **options).result(SOON).text == expected
        assert gone.result(SOON).text == expected
        assert "".join(pieces + list(reader)) == expected


# -- nothing is left behind ------------------------------------------------------------------------


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads /proc")
def test_a_thousand_requests_leave_nothing_behind(own):
    engine = Engine(own, seats=8, max_cache_len=64, max_waiting=100)
    dice = random.Random(1)

    def serve(count):
        while count:
            handles = []
            for _ in range(min(100, count)):
                prompt, options = some_request(dice, own, max_new_tokens=2)
                lookup = dict(prompt_lookup_num_tokens=1) if dice.random() < 0.3 else {}
                handles.append(engine.submit(prompt, **options, **lookup))
            count -= len(handles)
            for handle in handles[::9]:
                handle.cancel()
            for handle in handles:
                handle.result(SOON)
        gc.collect()
        return resident(), threading.active_count(), len(os.listdir("/proc/self/fd"))

    serve(200)
    before = serve(200)
    after = serve(1000)
    engine.close()
    assert after[1:] == before[1:]
    assert after[0] - before[0] < 4e6  # 4 kB each would be 4 MB
    assert not engine._worker.batch.waiting and not any(engine._worker.batch.seats)


def test_many_engines_leave_no_threads(llm):
    before, caches = threading.active_count(), []
    for number in range(12):
        engine = Engine(llm, seats=2, max_cache_len=64)
        caches.append(weakref.ref(engine._worker.batch.cache))
        engine.submit(PROMPT, max_new_tokens=2, **GREEDY).result(SOON)
        if number % 2:
            engine.close()
        else:
            thread = engine._worker._thread
            del engine
            thread.join(SOON)
    engine = None
    gc.collect()
    assert threading.active_count() == before
    assert not any(cache() for cache in caches)
