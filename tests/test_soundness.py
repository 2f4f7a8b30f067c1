"""Interrupted, shared, moved, misused: never a wrong token in silence, never a lost cache.

A cache's word is checked against the only witness there is: the ids it says it holds are fed to a fresh cache, and the
keys must be the same.
"""

import copy
import gc
import sys
import threading
import weakref
from contextlib import nullcontext, suppress

import pytest
import torch

from minillm import LLM, StaticCache, decode_one_token
from minillm.decode import prefill
from minillm.errors import CacheError, NumericalError, RequestError
from minillm.options import GenerationConfig

PROMPT = [5, 9, 17, 33, 12, 40, 7, 21, 60, 44, 31]
GREEDY = dict(temperature=0, eos_token_id=[])
# Float32 sums of a few dozen products in another order, through two layers, of values around 1.
SAME = dict(atol=5e-5, rtol=0)


def assert_truthful(cache, model):
    """What the cache says it holds is what a fresh pass over those ids computes, at every key a next token sees."""
    for row, ids in enumerate(cache.token_ids):
        if not ids:
            continue
        fresh = StaticCache(model.config, 1, cache.max_cache_len, dtype=cache.dtype, max_step=cache.max_step)
        with torch.inference_mode():
            for begin in range(0, len(ids), cache.max_step):
                chunk = ids[begin : begin + cache.max_step]
                model(torch.tensor([chunk]), torch.arange(begin, begin + len(chunk))[None], fresh)
        for layer, spec in enumerate(model.config.layers):
            first = 0 if spec.window is None else max(0, len(ids) - spec.window + 1)
            slots = [place % cache.num_slots(spec.window) for place in range(first, len(ids))]
            for ours, theirs in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
                torch.testing.assert_close(ours[layer][row][:, slots], theirs[layer][0][:, slots], **SAME)


class Interrupt:
    """Raise KeyboardInterrupt at the n-th call of a function of the package."""

    def __init__(self, number):
        self.left = number

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, kind, error, where):
        sys.settrace(None)
        return kind is KeyboardInterrupt

    def _trace(self, frame, event, argument):
        if event == "call" and "/minillm" in frame.f_code.co_filename and frame.f_code.co_name != "<genexpr>":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return None


def calls_of(action):
    counter = Interrupt(10**9)
    with counter:
        action()
    return 10**9 - counter.left


def kinds(llm):
    """Ways to generate on one cache: (rows, options)."""
    return {
        "plain": (1, {}),
        "batch": (2, {}),
        "sampled": (1, dict(temperature=0.8, top_p=0.9, seed=3, repetition_penalty=1.2)),
        "lookup": (1, dict(prompt_lookup_num_tokens=3)),
        "draft": (1, dict(assistant_model=llm, num_assistant_tokens=3)),
        "draft, batch": (2, dict(assistant_model=llm, num_assistant_tokens=2)),
    }


@pytest.mark.parametrize("kind", ["plain", "batch", "sampled", "lookup", "draft", "draft, batch"])
@pytest.mark.parametrize("which", ["llm", "window_llm"])
def test_interrupted_anywhere_the_cache_tells_the_truth(which, kind, request):
    llm = request.getfixturevalue(which)
    rows, options = kinds(llm)[kind]
    options = GREEDY | dict(max_new_tokens=6) | options
    first, longer = (
        [PROMPT[row:] * 2 for row in range(rows)],
        [PROMPT[row:] * 2 + [70 + row, 3, 4, 5, 6, 7, 8] for row in range(rows)],
    )
    expected = [out.token_ids for out in llm.generate(longer, **options)]

    def cache():
        return StaticCache(llm.config, rows, 64, dtype=llm.dtype, max_step=8)

    def fill(cache):
        llm.generate(first, cache=cache, **GREEDY, max_new_tokens=3)

    probe = cache()
    fill(probe)
    total = calls_of(lambda: llm.generate(longer, cache=probe, **options))
    for number in range(1, total + 1, max(1, total // 40)):
        held = cache()
        fill(held)
        with Interrupt(number):
            llm.generate(longer, cache=held, **options)
        assert_truthful(held, llm.model)
        assert [out.token_ids for out in llm.generate(longer, cache=held, **options)] == expected, number
        assert_truthful(held, llm.model)


def test_an_interrupted_chat_goes_on_as_if_nothing_had_been(llm):
    options = GREEDY | dict(max_new_tokens=8)
    for number in range(1, 1500, 97):
        chat, other = llm.conversation(**options), llm.conversation(**options)
        for one in (chat, other):
            one.say("Hello wolf")
        with Interrupt(number):
            chat.say("Where are you going so early in the morning?")
        assert chat.messages[:2] == other.messages
        if len(chat.messages) == 2:
            assert chat.say("And then?").text == other.say("And then?").text
        assert_truthful(chat.cache, llm.model)


def test_a_stream_closed_early_leaves_a_true_cache(llm):
    cache = StaticCache(llm.config, 1, 64, dtype=llm.dtype)
    for pieces in range(1, 6):
        stream = llm.stream(PROMPT, cache=cache, max_new_tokens=32, **GREEDY)
        for _ in range(pieces):
            next(stream)
        stream.close()
        assert_truthful(cache, llm.model)
    expected = llm.generate(PROMPT, max_new_tokens=12, **GREEDY).token_ids
    assert llm.generate(PROMPT, cache=cache, max_new_tokens=12, **GREEDY).token_ids == expected


# -- a cache and who may write to it ---------------------------------------------------------------


def step(cache, token=5, position=0):
    return torch.tensor([[token]] * cache.batch_size), torch.tensor([[position]] * cache.batch_size), cache


TWO, START = torch.tensor([[5], [6]]), torch.tensor([[0], [0]])
VALUES = [  # what is only found by looking
    (TWO, torch.tensor([[64], [0]]), "position 64 is beyond"),
    (TWO, torch.tensor([[-2], [0]]), "0 or more"),
    (torch.tensor([[5, 6], [5, 6]]), torch.tensor([[1, 0], [0, 1]]), "one after the other"),
    (torch.tensor([[1000], [0]]), START, "vocabulary"),
    (torch.tensor([[-1], [0]]), START, "vocabulary"),
]


@pytest.mark.parametrize("way", ["model", "steps", "decode_one_token", "compiled"])
def test_a_cache_of_another_kind_is_refused(way, llm, window_llm):
    one = torch.compile(decode_one_token, backend="eager") if way == "compiled" else decode_one_token
    run = {"model": llm.model, "steps": llm.steps}.get(way, lambda *arguments: one(llm.model, *arguments))
    config = llm.config
    for wrong, message in [
        (StaticCache(config, 1, 64, dtype=torch.bfloat16), "bfloat16"),
        (StaticCache(config, 1, 64, dtype=torch.float64), "float64"),
        (StaticCache(config, 1, 64, device="meta"), "meta"),
        (StaticCache(window_llm.config, 1, 64), "another model"),
    ]:
        with pytest.raises(CacheError, match=message):
            run(*step(wrong))
    cache = StaticCache(config, 2, 64)
    ids, places = TWO, START
    for bad_ids, bad_places, message in [
        (ids[:1], places[:1], "2 rows"),
        (ids, places[:1], r"must both be \[2, T\]"),
        (ids[:, 0], places[:, 0], r"must both be \[2, T\]"),
        (ids.int(), places, "int64"),
        (ids, places.int(), "int64"),
        (ids, places.to("meta"), "must be on cpu"),
        (ids[:, :0], places[:, :0], "step of 0"),
        *(() if way == "compiled" else VALUES),  # a graph does not look at ids and positions
    ]:
        with pytest.raises(CacheError, match=message):
            run(bad_ids, bad_places, cache)
    assert cache.token_ids == [[], []]
    narrow = StaticCache(config, 1, 64, max_step=1)
    with pytest.raises(CacheError, match="max_step 1"):
        run(torch.tensor([[5, 6]]), torch.tensor([[0, 1]]), narrow)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_prompt_for_every_row(rows, llm):
    cache = StaticCache(llm.config, 2, 64)
    with pytest.raises(CacheError, match=f"{rows} prompts"):
        prefill(llm.model, cache, [[5, 6]] * rows, [0] * rows)
    assert cache.token_ids == [[], []]


def test_switches_of_pytorchs_attention_are_put_back(text_checkpoint):
    """Two threads that name implementations: each has its own, and the process the switches that it had."""
    kinds = {word: LLM.from_pretrained(text_checkpoint, attention=f"sdpa:{word}") for word in ("math", "flash")}
    alone = {word: one.generate(PROMPT, max_new_tokens=20, **GREEDY).token_ids for word, one in kinds.items()}
    cuda = torch.backends.cuda
    switches = [cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled, cuda.cudnn_sdp_enabled]
    before, said = [switch() for switch in switches], []

    def work(word):
        for _ in range(4):
            said.append(kinds[word].generate(PROMPT, max_new_tokens=20, **GREEDY).token_ids == alone[word])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(word,)) for word in kinds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert said == [True] * 8
    assert [switch() for switch in switches] == before


def test_two_requests_at_once_on_one_cache(llm):
    cache = StaticCache(llm.config, 1, 64, dtype=llm.dtype)
    stream = llm.stream(PROMPT, cache=cache, max_new_tokens=10, **GREEDY)
    said = next(stream)
    for other in (
        lambda: llm.generate(PROMPT, cache=cache, max_new_tokens=2, **GREEDY),
        lambda: next(llm.stream(PROMPT, cache=cache, max_new_tokens=2, **GREEDY)),
        lambda: llm.model(*step(cache)),
        cache.reset,
        lambda: cache.truncate(0),
    ):
        with pytest.raises(CacheError, match=r"in use by a request of 1 row.*MainThread.*close"):
            other()
    assert said + "".join(stream) == llm.generate(PROMPT, max_new_tokens=10, **GREEDY).text
    llm.generate(PROMPT, cache=cache, max_new_tokens=2, **GREEDY)  # free again


def test_another_thread_may_not_use_the_holders_turn(llm):
    """Whose turn it is counts, not only that it is somebody's."""
    cache, errors = StaticCache(llm.config, 1, 8, dtype=llm.dtype), []

    def meddle():
        for meddling in (cache.reset, lambda: cache.truncate(0), lambda: llm.model(ids, place, cache)):
            with pytest.raises(CacheError, match="in use by the holder"):
                meddling()
            errors.append(meddling)

    ids, place = torch.tensor([[5]]), torch.tensor([[0]])
    with cache.hold.by("the holder"), cache.hold.turn():
        thread = threading.Thread(target=meddle)
        thread.start()
        thread.join()
        llm.model(ids, place, cache)  # the holder itself may
    assert len(errors) == 3


def test_a_turn_during_a_streamed_turn_is_refused(llm):
    chat = llm.conversation(max_new_tokens=8, **GREEDY)
    pieces = chat.stream("Hello")
    next(pieces)
    with pytest.raises(CacheError, match="in use"):
        chat.say("wait")
    assert chat.messages == []
    pieces.close()
    assert chat.say("And now?").finish_reason == "length"


def test_threads_on_one_cache_get_an_error_or_the_right_answer(llm):
    expected = llm.generate(PROMPT, max_new_tokens=20, **GREEDY).token_ids
    cache, answers = StaticCache(llm.config, 1, 64, dtype=llm.dtype), []
    barrier = threading.Barrier(2)

    def ask():
        barrier.wait()
        for _ in range(6):
            try:
                answers.append(llm.generate(PROMPT, cache=cache, max_new_tokens=20, **GREEDY).token_ids)
            except CacheError:
                answers.append(None)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(answer in (None, expected) for answer in answers)
    assert expected in answers


def test_threads_with_caches_of_their_own_share_a_model(llm):
    expected = [llm.generate(PROMPT[row:], max_new_tokens=20, **GREEDY).token_ids for row in range(3)]
    answers = {}

    def ask(row):
        cache = StaticCache(llm.config, 1, 64, dtype=llm.dtype)
        answers[row] = [
            llm.generate(PROMPT[row:], cache=cache, max_new_tokens=20, **GREEDY).token_ids for _ in range(4)
        ]

    threads = [threading.Thread(target=ask, args=(row,)) for row in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {row: [expected[row]] * 4 for row in range(3)}


def test_a_cache_belongs_to_the_model_that_filled_it(llm, text_checkpoint, tmp_path):
    other = LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu")
    with torch.no_grad():
        other.model.blocks[0].mlp.down.weight *= 3
    cache = StaticCache(llm.config, 1, 64, dtype=llm.dtype)
    llm.generate(PROMPT, cache=cache, max_new_tokens=2, **GREEDY)
    held = cache.token_ids
    with pytest.raises(CacheError, match=r"another model.*reset"):
        other.generate(PROMPT, cache=cache, max_new_tokens=2, **GREEDY)
    with pytest.raises(CacheError, match="another model"):
        other.model(*step(cache, position=len(held[0])))
    assert cache.token_ids == held
    cache.reset()
    steps = [torch.tensor([[5]]), torch.tensor([[0]])]
    first, second = llm.model.embedding, other.model.embedding
    entered = [cache.writing(one.model, *steps) for one in (llm, other)]  # both are checked while it is nobody's
    with entered[0]:
        pass
    with pytest.raises(CacheError, match="another model"), entered[1]:
        pass
    cache.hold.check_model(first)
    with pytest.raises(CacheError, match="another model"):
        cache.hold.check_model(second)
    cache.reset()
    expected = other.generate(PROMPT, max_new_tokens=5, **GREEDY).token_ids
    assert other.generate(PROMPT, cache=cache, max_new_tokens=5, **GREEDY).token_ids == expected


def test_rewriting_a_place_forgets_what_followed_it(llm):
    cache = StaticCache(llm.config, 1, 64, dtype=llm.dtype)
    with torch.inference_mode():
        llm.model(torch.tensor([PROMPT]), torch.arange(len(PROMPT))[None], cache)
        llm.model(torch.tensor([[8]]), torch.tensor([[4]]), cache)
        assert cache.token_ids == [[*PROMPT[:4], 8]]
        with pytest.raises(CacheError, match="leaves a gap: row 0 holds 5 tokens"):
            llm.model(torch.tensor([[9]]), torch.tensor([[20]]), cache)
    assert cache.token_ids == [[*PROMPT[:4], 8]]
    assert_truthful(cache, llm.model)


def test_a_cache_emptied_at_any_moment(llm):
    """Another thread that resets, and a hook in the middle of a pass: the right answer or a CacheError."""
    expected = llm.generate(PROMPT, max_new_tokens=12, **GREEDY).token_ids
    cache, stop, answers = StaticCache(llm.config, 1, 64, dtype=llm.dtype), threading.Event(), []

    def reset():
        while not stop.is_set():
            with suppress(CacheError):
                cache.reset()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=reset)
    thread.start()
    try:
        for _ in range(40):
            with suppress(CacheError):
                answers.append(llm.generate(PROMPT, cache=cache, max_new_tokens=12, **GREEDY).token_ids)
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert all(answer == expected for answer in answers)

    def from_within(*arguments):
        with pytest.raises(CacheError, match="being written to"):
            cache.reset()

    hook = llm.model.blocks[0].mlp.register_forward_pre_hook(from_within)
    try:
        assert llm.generate(PROMPT, cache=cache, max_new_tokens=12, **GREEDY).token_ids == expected
    finally:
        hook.remove()


def test_a_copied_chat_goes_on(llm):
    """With its own model and cache, as if it were the first one."""
    chat = llm.conversation()
    chat.say("abc", max_new_tokens=4, temperature=0)
    twin = copy.deepcopy(chat)
    said = [one.say("def", max_new_tokens=6, temperature=0).token_ids for one in (twin, chat, twin)]
    assert said[0] == said[1]


def test_a_cache_that_is_kept_keeps_no_model(text_checkpoint):
    mine = LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu")
    cache = StaticCache(mine.config, 1, 64, dtype=mine.dtype)
    mine.generate(PROMPT, cache=cache, max_new_tokens=4, **GREEDY)
    mine.generate(PROMPT, max_new_tokens=4, **GREEDY)
    gone = weakref.ref(mine.model)
    gc.collect()
    gc.disable()  # no cycle is left
    try:
        del mine
        assert gone() is None
    finally:
        gc.enable()
    assert cache.token_ids[0][:-3] == PROMPT


def test_a_copied_cache_is_nobodys(llm):
    cache = StaticCache(llm.config, 1, 64, dtype=llm.dtype)
    stream = llm.stream(PROMPT, cache=cache, max_new_tokens=6, **GREEDY)
    next(stream)
    other = copy.deepcopy(cache)
    expected = llm.generate(PROMPT, max_new_tokens=12, **GREEDY).token_ids
    assert llm.generate(PROMPT, cache=other, max_new_tokens=12, **GREEDY).token_ids == expected
    list(stream)
    twin = copy.deepcopy(llm)
    assert twin.generate(PROMPT, max_new_tokens=12, **GREEDY).token_ids == expected
    with pytest.raises(CacheError, match="another model"):
        twin.generate(PROMPT, cache=other, max_new_tokens=12, **GREEDY)


@pytest.mark.parametrize(
    "make",
    [
        lambda c: StaticCache(c, 1, 2**62),
        lambda c: StaticCache(c, 2**62, 8),
        lambda c: StaticCache(c, 1, 8, device="nowhere"),
        lambda c: StaticCache(c, 1, 8, device="cuda" if not torch.cuda.is_available() else "nowhere"),
        lambda c: StaticCache(c, 1, 8, dtype="float32"),
        lambda c: StaticCache(c, 1, 8, dtype=torch.int8),
        lambda c: StaticCache(None, 1, 8),
        lambda c: StaticCache(c, 1, 8, planned_length=2.5),
        lambda c: StaticCache(c, 1, 8, planned_length=[2.5]),
        lambda c: StaticCache(c, 1, 8).plan(True),
        lambda c: StaticCache(c, 1, 8).plan("3"),
        lambda c: StaticCache(c, 1, 8).truncate(None),
        lambda c: StaticCache(c, 1, 8).truncate([0, 0]),
        lambda c: StaticCache(c, 1, 8).truncate(torch.tensor(0)),
        lambda c: StaticCache(c, 2, 8).rows(1, 3),
        lambda c: StaticCache(c, 2, 8).rows(2, 1),
        lambda c: StaticCache(c, 2, 8).rows(-1, 1),
    ],
)
def test_caches_that_cannot_be(make, llm):
    with pytest.raises(CacheError):
        make(llm.config)


# -- weights that move, modes of the caller's ------------------------------------------------------


def test_weights_that_move_under_a_held_cache(text_checkpoint):
    llm = LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu")
    cache = StaticCache(llm.config, 1, 64, dtype=llm.dtype)
    llm.generate(PROMPT, cache=cache, max_new_tokens=4, **GREEDY)
    llm.model.half()
    with pytest.raises(CacheError, match="float16"):
        llm.generate(PROMPT, cache=cache, max_new_tokens=4, **GREEDY)
    llm.model.float()  # elsewhere now, and rounded
    torch.randn(1 << 20)  # what was freed is used again
    expected = llm.generate(PROMPT, max_new_tokens=12, **GREEDY).token_ids
    cache.reset()
    assert llm.generate(PROMPT, cache=cache, max_new_tokens=12, **GREEDY).token_ids == expected
    for parameter in llm.model.parameters():  # by hand, without a word to anybody
        parameter.data = parameter.data * 1.5
    cache.reset()
    expected = llm.generate(PROMPT, max_new_tokens=12, **GREEDY).token_ids
    assert llm.generate(PROMPT, cache=cache, max_new_tokens=12, **GREEDY).token_ids == expected


def flip(model):
    model.load_state_dict({name: value * -1.5 for name, value in model.state_dict().items()}, assign=True)


def scale_in_place(model):
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.mul_(3)


def replace_one(model):
    model.blocks[1].mlp.down.weight = torch.nn.Parameter(model.blocks[1].mlp.down.weight.detach() * -2)


def hook_all(model):
    for block in model.blocks:
        block.mlp.down.register_forward_hook(lambda module, given, result: result * 0.1)


@pytest.mark.parametrize("change", [flip, scale_in_place, replace_one, hook_all])
def test_what_changes_between_two_requests_is_noticed(change, text_checkpoint):
    """By a request with a cache that holds its prompt, by a chat, and by a loop of one's own over recorded steps."""
    llm = LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu")
    cache, own = (StaticCache(llm.config, 1, 64, dtype=llm.dtype) for _ in range(2))
    chat = llm.conversation(max_new_tokens=6, **GREEDY)

    def loop(run):
        own.reset()
        token, said = torch.tensor([[PROMPT[0]]]), []
        for place in range(8):
            token = decode_one_token(run, token, torch.tensor([[place]]), own)
            said.append(token.item())
        return said

    llm.generate(PROMPT, cache=cache, max_new_tokens=6, **GREEDY)
    chat.say("Hello wolf")
    loop(llm.steps)
    change(llm.model)
    fresh = LLM(copy.deepcopy(llm.model), llm.tokenizer, llm.config, llm.defaults, compile=False)
    longer = [*PROMPT, 8, 9]
    expected = fresh.generate(longer, max_new_tokens=6, **GREEDY).token_ids
    assert llm.generate(longer, cache=cache, max_new_tokens=6, **GREEDY).token_ids == expected
    assert loop(llm.steps) == loop(llm.model)
    other = fresh.conversation(max_new_tokens=6, **GREEDY)
    other.messages += chat.messages
    assert chat.say("And then?").token_ids == other.say("And then?").token_ids


def test_an_interrupt_while_a_step_is_recorded_leaves_no_mode_behind(text_checkpoint):
    first, llm = (LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu") for _ in range(2))
    expected = first.generate(PROMPT, max_new_tokens=5, **GREEDY).token_ids

    def at_the_end_of_push(frame, event, argument):
        def local(frame, event, argument):
            if event == "return":
                sys.settrace(None)
                raise KeyboardInterrupt
            return local

        return local if frame.f_code.co_name == "_push_mode" else None

    sys.settrace(at_the_end_of_push)
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPT, max_new_tokens=5, **GREEDY)
    finally:
        sys.settrace(None)
    try:
        assert llm.generate(PROMPT, max_new_tokens=5, **GREEDY).token_ids == expected
    finally:
        torch.utils._python_dispatch._pop_mode()  # what the interrupt left: other tests do without it


class Setting:
    """A global setting of torch's for a while."""

    def __init__(self, setter, value, before):
        self.setter, self.value, self.before = setter, value, before

    def __enter__(self):
        self.setter(self.value)

    def __exit__(self, *error):
        self.setter(self.before)


MODES = {
    "nothing": nullcontext,
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype float16": lambda: Setting(torch.set_default_dtype, torch.float16, torch.float32),
    "default dtype float64": lambda: Setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default device meta": lambda: torch.device("meta"),
    "grad": torch.enable_grad,
    "no grad": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": lambda: Setting(torch.use_deterministic_algorithms, True, False),
}


@pytest.mark.parametrize("form", [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("float32", "int4-g32")])
@pytest.mark.parametrize("attention", ["math", "sdpa", "kernels"])
def test_a_callers_modes_change_nothing(attention, form, quantizable):
    """Loading, a prompt longer than a step, decoding, sampling, drafts: in every mode what they give outside."""
    dtype, quantize = form

    def load():
        options = dict(dtype=dtype, quantize=quantize, quantize_head=quantize is not None, attention=attention)
        return LLM.from_pretrained(quantizable, device="cpu", **options)

    def texts(llm):
        sampled = dict(temperature=0.9, top_k=50, top_p=0.9, min_p=0.01, seed=5, eos_token_id=[])
        return [
            llm.generate(PROMPT * 3, max_new_tokens=6, logprobs=True, **GREEDY).logprobs,
            llm.generate([PROMPT, PROMPT[3:]], max_new_tokens=6, **sampled)[1].token_ids,
            llm.generate(PROMPT * 2, max_new_tokens=6, prompt_lookup_num_tokens=2, **GREEDY).token_ids,
        ]

    llm = load()
    expected = texts(llm)
    for name, mode in MODES.items():
        with mode():
            assert texts(llm) == expected, name
            assert texts(load()) == expected, f"{name}, loading"


# -- numbers that are none -------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers(poison, text_checkpoint):
    llm = LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu")
    good = llm.generate(PROMPT, max_new_tokens=4, **GREEDY).token_ids
    cache = StaticCache(llm.config, 2, 64, dtype=llm.dtype)
    weight = llm.model.embedding.weight
    sick = PROMPT[4]
    saved = weight[sick].clone()
    weight[sick] = poison
    for options in (
        GREEDY,
        dict(temperature=0.7, seed=1),
        dict(temperature=0.7, seed=1, top_p=0.9, top_k=5),
        GREEDY | dict(prompt_lookup_num_tokens=2),
        GREEDY | dict(logprobs=True),
    ):
        with pytest.raises(NumericalError, match=r"row 1, new token 1: .*dtype"):
            llm.generate([[8, 9, 10], PROMPT], cache=cache, max_new_tokens=4, **options)
        assert cache.token_ids == [[], []]  # nobody goes on from there
    weight[sick] = saved
    assert llm.generate([[8, 9, 10], PROMPT], cache=cache, max_new_tokens=4, **GREEDY)[1].token_ids == good


@pytest.mark.parametrize("infinite", [float("inf"), -float("inf")])
def test_one_infinite_logit_among_good_ones(infinite, text_checkpoint, monkeypatch):
    """Where the largest is infinite nothing is left to choose between; one that is -inf is merely never said."""
    llm = LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu")
    monkeypatch.setattr(llm.model, "finish", lambda logits: logits.index_fill(-1, torch.tensor([7]), infinite))
    for options in (GREEDY, GREEDY | dict(prompt_lookup_num_tokens=2), dict(temperature=0.7, seed=1, eos_token_id=[])):
        cache = StaticCache(llm.config, 1, 64, dtype=llm.dtype)
        if infinite < 0:
            assert 7 not in llm.generate(PROMPT, cache=cache, max_new_tokens=4, **options).token_ids
            continue
        with pytest.raises(NumericalError, match="infinite"):
            llm.generate(PROMPT, cache=cache, max_new_tokens=4, **options)
        assert cache.lengths == [0]  # nobody takes its keys for good


def test_reset_forgets_numbers_that_are_none(llm):
    for attention in ("math", "sdpa"):
        cache = StaticCache(llm.config, 1, 64, dtype=llm.dtype)
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(float("nan"))
        cache.reset()
        assert all(torch.isfinite(tensor).all() for tensor in (*cache.keys, *cache.values)), attention


# -- options ---------------------------------------------------------------------------------------


def test_none_means_not_set(llm):
    sampled = GenerationConfig(temperature=0.8)
    once = llm.generate(PROMPT, sampled, max_new_tokens=6, seed=2, eos_token_id=[])
    again = llm.generate(PROMPT, sampled, max_new_tokens=6, seed=2, eos_token_id=[], temperature=None, top_k=None)
    assert once.token_ids == again.token_ids
    chat = llm.conversation(temperature=0.8, seed=3, max_new_tokens=5)
    other = llm.conversation(temperature=0.8, seed=3, max_new_tokens=5)
    assert chat.say("Hello", temperature=None).text == other.say("Hello").text


def test_min_p_alone_samples(llm):
    assert GenerationConfig(min_p=0.05).samples
    texts = {tuple(llm.generate(PROMPT, min_p=1e-4, seed=s, max_new_tokens=8).token_ids) for s in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1e-38), dict(temperature=1e39), dict(temperature=float("nan")), dict(top_p=1e-46),
        dict(top_p=0), dict(top_k=2**63), dict(eos_token_id=2**63), dict(eos_token_id=[-1]), dict(seed=1.5),
        dict(repetition_penalty=1e39), dict(repetition_penalty=0), dict(max_new_tokens=0), dict(max_new_tokens=True),
        dict(stop_strings=""), dict(stop_strings=[""]), dict(stop_strings=5), dict(logprobs=1), dict(nonsense=3),
        dict(num_assistant_tokens=3), dict(cache=5), dict(assistant_model=7), dict(generation_config={"top_k": 3}),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_make_no_sense(options, llm):
    with pytest.raises(RequestError):
        llm.generate(PROMPT, **options)
    if not {"cache", "generation_config"} & set(options):
        with pytest.raises(RequestError):
            llm.conversation(**options)


@pytest.mark.parametrize(
    "name", ["temperature", "max_new_tokens", "top_k", "do_sample", "stop_strings", "eos_token_id"]
)
def test_numbers_too_long_to_print(name, llm):
    with pytest.raises(RequestError, match=r"a number of .* bits"):
        llm.generate(PROMPT, **{name: 10**5000})


def test_a_conversation_is_checked_when_it_is_made(llm):
    for wrong in (0, -1, 1.5, True, "9"):
        with pytest.raises(CacheError, match="max_cache_len"):
            llm.conversation(max_cache_len=wrong)
