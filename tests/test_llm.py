"""LLM: text in, text out. Against transformers, and against itself (batch, stream, cache, chat)."""

import json
import random
import shutil

import pytest
import torch
import transformers
from families import FAMILIES, prompt_ids, reference_greedy, save_checkpoint

from minillm import LLM, Completion, GenerationConfig, MinillmError, StaticCache
from minillm.errors import BackendError, CacheError, CheckpointError, ConfigError, RequestError, TokenizerError
from minillm.load.hub import find_checkpoint
from minillm.load.tokenizer import load_tokenizer

PROMPTS = [
    "Once upon a time",
    "The",
    "The wolf said to the little girl: where are you going so early in the",
    "从前有一个小女孩 🚀",
]


@pytest.fixture(params=["full", "window"])
def any_llm(request, llm, window_llm):
    return llm if request.param == "full" else window_llm


def copy_of(folder, tmp_path, **files):
    """A copy of a checkpoint folder with some JSON files written anew (None removes one)."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name, content in files.items():
        path = copy / f"{name}.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return copy


def load(folder):
    return LLM.from_pretrained(folder, dtype="float32", device="cpu")


# -- against transformers ------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_equals_transformers(prompt, llm, text_reference, text_checkpoint):
    oracle = transformers.PreTrainedTokenizerFast.from_pretrained(text_checkpoint)
    ids = oracle(prompt, return_tensors="pt")
    new = text_reference.generate(**ids, max_new_tokens=40, do_sample=False, eos_token_id=None)[0]
    out = llm.generate(prompt, max_new_tokens=40, eos_token_id=[])
    size = ids["input_ids"].shape[1]
    assert out.token_ids == new[size:].tolist()
    whole = oracle.decode(new, skip_special_tokens=True)
    assert whole == oracle.decode(new[:size], skip_special_tokens=True) + out.text
    assert out.finish_reason == "length"
    assert (out.stats.prompt_tokens, out.stats.new_tokens) == (size, 40)


def test_repetition_penalty_equals_transformers(llm, text_reference):
    ids = llm.tokenizer.encode(PROMPTS[0])
    new = text_reference.generate(
        torch.tensor([ids]), max_new_tokens=30, do_sample=False, repetition_penalty=1.4, eos_token_id=None
    )[0, len(ids) :].tolist()
    assert llm.generate(ids, max_new_tokens=30, repetition_penalty=1.4, eos_token_id=[]).token_ids == new
    assert new != llm.generate(ids, max_new_tokens=30, eos_token_id=[]).token_ids


def test_logprobs_are_the_models_own(llm, text_reference):
    ids = llm.tokenizer.encode(PROMPTS[2])
    for options in (dict(), dict(temperature=1.7, top_k=30, repetition_penalty=1.3, seed=3)):
        out = llm.generate(ids, max_new_tokens=12, logprobs=True, eos_token_id=[], **options)
        logits = text_reference(torch.tensor([ids + out.token_ids])).logits[0]
        expected = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, torch.tensor(out.token_ids)[:, None])
        torch.testing.assert_close(torch.tensor(out.logprobs), expected[:, 0], rtol=0.0, atol=1e-4)
    assert llm.generate(ids, max_new_tokens=2).logprobs is None


@pytest.mark.parametrize("name", ["llama3", "mistral-v0.1", "qwen2-window", "gemma2", "gemma3", "phi3", "olmo2"])
def test_families_batched_past_the_wrap(name, checkpoint, reference, text_tokenizer_files, tmp_path):
    """Rows of different length in one batch through `generate`, far past every window."""
    folder = shutil.copytree(checkpoint(name), tmp_path / "copy")
    text_tokenizer_files.copy_to(folder)
    llm = load(folder)
    prompts = [prompt_ids(n, seed=n) for n in (2, 17, 33)]
    out = llm.generate(prompts, max_new_tokens=25, eos_token_id=[])
    assert [row.token_ids for row in out] == [reference_greedy(reference(name), ids, 25) for ids in prompts]
    cache = StaticCache(llm.config, 3, 64, max_step=4, planned_length=58)
    again = llm.generate(prompts, max_new_tokens=25, eos_token_id=[], cache=cache)
    assert [row.token_ids for row in again] == [row.token_ids for row in out]


# -- batch = single, seeds -------------------------------------------------------------------------

SAMPLED = dict(max_new_tokens=24, temperature=1.2, top_k=60, top_p=0.95, eos_token_id=[])


def test_batch_equals_single(any_llm):
    options = dict(max_new_tokens=30, eos_token_id=[], logprobs=True)
    together = any_llm.generate(PROMPTS, **options)
    assert isinstance(together, list)
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = any_llm.generate(prompt, **options)
        assert (row.text, row.token_ids, row.finish_reason) == (alone.text, alone.token_ids, alone.finish_reason)
        assert row.logprobs == pytest.approx(alone.logprobs, abs=2e-5)


def test_same_seed_same_text_whatever_the_batch(any_llm):
    alone = {prompt: any_llm.generate(prompt, seed=7, **SAMPLED).token_ids for prompt in PROMPTS}
    order = [2, 0, 3, 1, 0, 0]
    together = any_llm.generate([PROMPTS[i] for i in order], seed=7, **SAMPLED)
    assert [row.token_ids for row in together] == [alone[PROMPTS[i]] for i in order]
    listed = any_llm.generate([PROMPTS[0]] * 3, seed=[7, 8, 7], **SAMPLED)
    assert listed[0].token_ids == listed[2].token_ids == alone[PROMPTS[0]]
    assert listed[1].token_ids == any_llm.generate(PROMPTS[0], seed=8, **SAMPLED).token_ids
    assert listed[1].token_ids != listed[0].token_ids


def test_without_a_seed_texts_differ(llm):
    rows = llm.generate([PROMPTS[0]] * 4, **SAMPLED)
    assert len({tuple(row.token_ids) for row in rows}) == 4
    assert llm.generate(PROMPTS[0], **SAMPLED).token_ids != rows[0].token_ids


def test_sampling_follows_the_distribution(llm, text_reference):
    """The first token of 2,000 seeds against transformers' probabilities (temperature 0.7, top-k 8)."""
    ids, count = llm.tokenizer.encode("The wolf"), 2000
    rows = llm.generate([ids] * count, seed=list(range(count)), max_new_tokens=1, temperature=0.7, top_k=8)
    counts = torch.bincount(torch.tensor([row.token_ids[0] for row in rows]), minlength=llm.config.vocab_size)
    logits = text_reference(torch.tensor([ids])).logits[0, -1] / 0.7
    kept = logits.topk(8)
    expected = torch.zeros(llm.config.vocab_size).scatter(0, kept.indices, kept.values.softmax(-1)) * count
    assert counts[expected == 0].sum() == 0
    spread = (expected * (1 - expected / count)).sqrt()  # standard deviation of a count
    assert ((counts - expected).abs() <= 4 * spread + 1).all()


# -- prompts and results ---------------------------------------------------------------------------


def test_kinds_of_prompt(llm):
    text, ids = PROMPTS[0], llm.tokenizer.encode(PROMPTS[0])
    options = dict(max_new_tokens=5, eos_token_id=[])
    single = llm.generate(text, **options)
    assert isinstance(single, Completion)
    assert llm.generate(ids, **options).token_ids == single.token_ids
    for batch in ([text], [ids], (text,), [tuple(ids)]):
        rows = llm.generate(batch, **options)
        assert isinstance(rows, list)
        assert [row.token_ids for row in rows] == [single.token_ids]
    mixed = llm.generate([text, ids], **options)
    assert mixed[0].token_ids == mixed[1].token_ids
    assert llm.generate("", **options).token_ids == llm.generate([1], **options).token_ids  # BOS alone


def test_generation_config_object_and_keywords(llm):
    config = GenerationConfig(max_new_tokens=6, temperature=1.1, seed=3, eos_token_id=[])
    spelled = llm.generate(PROMPTS[0], max_new_tokens=6, temperature=1.1, seed=3, eos_token_id=[])
    assert llm.generate(PROMPTS[0], config).token_ids == spelled.token_ids
    assert llm.generate(PROMPTS[0], config, max_new_tokens=3).token_ids == spelled.token_ids[:3]
    greedy = llm.generate(PROMPTS[0], max_new_tokens=6, eos_token_id=[])
    assert llm.generate(PROMPTS[0], config, temperature=0.0).token_ids == greedy.token_ids


def test_attributes(llm):
    assert (llm.device, llm.dtype) == (torch.device("cpu"), torch.float32)
    assert llm.config.vocab_size == llm.tokenizer.vocab_size + 5
    assert llm.model.config is llm.config


def test_stats_add_up(llm):
    stats = llm.generate(PROMPTS[0], max_new_tokens=9, eos_token_id=[]).stats
    assert (stats.new_tokens, stats.reused_tokens) == (9, 0)
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0
    assert stats.tokens_per_second == pytest.approx(8 / stats.decode_seconds)


# -- stopping --------------------------------------------------------------------------------------


def greedy_of(llm, prompt=PROMPTS[0], count=30):
    return llm.generate(prompt, max_new_tokens=count, eos_token_id=[])


def first_use(ids, start=3):
    """A token of `ids` and the number of tokens up to its first use, not too early."""
    return next((token, i + 1) for i, token in enumerate(ids) if i >= start and token not in ids[:i])


SOURCES = ["config", "generation_config", "generation_config list", "tokenizer", "argument", "argument list"]


@pytest.mark.parametrize("source", SOURCES)
def test_eos_from_every_source(source, llm, text_checkpoint, tmp_path):
    ids = greedy_of(llm).token_ids
    eos, count = first_use(ids)
    config = json.loads((text_checkpoint / "config.json").read_text())
    token_config = json.loads((text_checkpoint / "tokenizer_config.json").read_text())
    files, options = {}, {}
    if source == "config":
        files["config"] = config | {"eos_token_id": [2, eos]}
    elif source == "generation_config":
        files["generation_config"] = {"eos_token_id": eos}
    elif source == "generation_config list":
        files["generation_config"] = {"eos_token_id": [2, 0, eos]}
    elif source == "tokenizer":
        token = json.loads((text_checkpoint / "tokenizer.json").read_text())["model"]["vocab"]
        name = next(piece for piece, index in token.items() if index == eos)
        files["tokenizer_config"] = token_config | {"eos_token": name}
    else:
        options = dict(eos_token_id=eos if source == "argument" else [eos, 2])
    out = load(copy_of(text_checkpoint, tmp_path, **files)).generate(PROMPTS[0], max_new_tokens=30, **options)
    assert out.finish_reason == "eos"
    assert out.token_ids == ids[:count]  # the EOS itself is counted
    assert out.text == "".join(pieces_of(llm, ids[: count - 1]))  # and is no text


def pieces_of(llm, ids):
    prompt = llm.tokenizer.encode(PROMPTS[0])
    yield llm.tokenizer.decode(prompt + ids)[len(llm.tokenizer.decode(prompt)) :]


def test_an_empty_eos_list_never_stops(llm, text_checkpoint, tmp_path):
    ids = greedy_of(llm).token_ids
    eos, _ = first_use(ids)
    stopping = load(copy_of(text_checkpoint, tmp_path, generation_config={"eos_token_id": eos}))
    assert stopping.generate(PROMPTS[0], max_new_tokens=30).finish_reason == "eos"
    assert stopping.generate(PROMPTS[0], max_new_tokens=30, eos_token_id=[]).token_ids == ids


def test_stop_strings_also_across_tokens(any_llm):
    text = greedy_of(any_llm).text
    for begin in (0, 4, 9, len(text) // 2):
        for length in (1, 2, 5):
            stop = text[begin : begin + length]
            if not stop or "\ufffd" in stop:
                continue
            out = any_llm.generate(PROMPTS[0], max_new_tokens=30, eos_token_id=[], stop_strings=stop)
            assert out.finish_reason == "stop_string"
            assert out.text == text[: text.index(stop)]
    out = any_llm.generate(PROMPTS[0], max_new_tokens=30, eos_token_id=[], stop_strings=["never ever"])
    assert (out.text, out.finish_reason) == (text, "length")


def test_a_stop_string_in_the_prompt_does_not_count(llm):
    assert "time" not in greedy_of(llm, count=4).text
    out = llm.generate(PROMPTS[0], max_new_tokens=4, eos_token_id=[], stop_strings=["time", PROMPTS[0][-1]])
    assert out.finish_reason == "length"


def test_defaults_of_the_checkpoint(llm, text_checkpoint, tmp_path):
    """generation_config.json says how to sample unless the caller does."""
    values = dict(do_sample=True, temperature=1.3, top_k=50, top_p=0.9, max_new_tokens=11)
    tuned = load(copy_of(text_checkpoint, tmp_path, generation_config=values | {"eos_token_id": 2}))
    spelled = {k: v for k, v in values.items() if k != "do_sample"}
    expected = llm.generate(PROMPTS[0], seed=5, **spelled)
    assert tuned.generate(PROMPTS[0], seed=5).token_ids == expected.token_ids
    for greedy in (dict(do_sample=False), dict(temperature=0.0)):
        out = tuned.generate(PROMPTS[0], eos_token_id=[], **greedy)
        assert out.token_ids == greedy_of(llm, count=11).token_ids


def test_bad_defaults_of_the_checkpoint_name_the_file(text_checkpoint, tmp_path):
    for number, content in enumerate(["{", {"temperature": -3}, {"eos_token_id": "x"}, "[]"]):
        folder = copy_of(text_checkpoint, tmp_path / str(number), generation_config=content)
        with pytest.raises(MinillmError, match=r"generation_config\.json"):
            load(folder)


# -- streaming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_stream_equals_generate(prompt, seed, any_llm):
    """Random weights produce random bytes: the hardest text there is to cut into whole characters."""
    options = dict(max_new_tokens=40, temperature=1.5, seed=seed, eos_token_id=[])
    pieces = list(any_llm.stream(prompt, **options))
    out = any_llm.generate(prompt, **options)
    assert "".join(pieces) == out.text
    assert all(pieces)  # nothing empty is sent
    prompt_ids_ = any_llm.tokenizer.encode(prompt)
    whole = any_llm.tokenizer.decode(prompt_ids_ + out.token_ids)
    assert any_llm.tokenizer.decode(prompt_ids_) + out.text == whole


def test_stream_with_stop_string_and_eos(llm):
    text, ids = greedy_of(llm).text, greedy_of(llm).token_ids
    stop = text[len(text) // 2 :][:3]
    for options in (dict(stop_strings=[stop], eos_token_id=[]), dict(eos_token_id=first_use(ids)[0])):
        out = llm.generate(PROMPTS[0], max_new_tokens=30, **options)
        assert out.finish_reason != "length"
        assert "".join(llm.stream(PROMPTS[0], max_new_tokens=30, **options)) == out.text


def test_stream_comes_piece_by_piece(llm):
    """The first piece is there before the last step is computed; errors come before the first piece."""
    stream = llm.stream(PROMPTS[0], max_new_tokens=30, eos_token_id=[])
    first = next(stream)
    assert greedy_of(llm).text.startswith(first)
    assert len(first) < len(greedy_of(llm).text)
    with pytest.raises(RequestError, match="temperature"):
        llm.stream(PROMPTS[0], temperature=-1)
    with pytest.raises(RequestError, match="one prompt"):
        llm.stream(PROMPTS)


def test_interleaved_streams_leave_no_mode_behind(llm):
    """Two streams at once, one abandoned: same texts, and the caller's grad mode is his own throughout."""
    options = dict(max_new_tokens=12, eos_token_id=[])
    one, two, three = (llm.stream(prompt, **options) for prompt in PROMPTS[:3])
    texts = [next(one), next(two)]
    next(three)
    assert not torch.is_inference_mode_enabled()
    weight = torch.ones(2, requires_grad=True)
    weight.sum().backward()  # a caller may train between two pieces
    texts[0] += "".join(one)
    texts[1] += "".join(two)
    three.close()
    assert texts == [llm.generate(prompt, **options).text for prompt in PROMPTS[:2]]
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


# -- the caller's cache ------------------------------------------------------------------------------


def cache_for(llm, rows=1, length=128, **keywords):
    return StaticCache(llm.config, rows, length, device=llm.device, dtype=llm.dtype, **keywords)


def test_a_cache_kept_across_calls_is_continued(any_llm):
    """Second turn = first prompt + answer + more: only what is new is computed, and nothing changes."""
    cache = cache_for(any_llm)
    options = dict(max_new_tokens=10, eos_token_id=[])
    prompt = any_llm.tokenizer.encode(PROMPTS[0])
    first = any_llm.generate(prompt, cache=cache, **options)
    assert cache.lengths == [len(prompt) + 9]  # after p + 10 tokens a cache holds p + 9: the off-by-one
    longer = prompt + first.token_ids + prompt_ids(7, seed=1)
    second = any_llm.generate(longer, cache=cache, **options)
    assert second.stats.reused_tokens == len(prompt) + 9
    assert second.stats.prompt_tokens == len(longer)
    assert second.token_ids == any_llm.generate(longer, **options).token_ids
    assert second.token_ids != first.token_ids


def test_a_cache_of_another_text_is_never_wrong(any_llm):
    """Random prompts with random shared beginnings on one cache: always what a fresh cache gives."""
    cache, random_ = cache_for(any_llm, max_step=16), random.Random(0)
    pool = [any_llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    reused = 0
    for _ in range(25):
        base = cache.token_ids[0] or random_.choice(pool)
        shared = base[: random_.randrange(1, len(base) + 1)]
        prompt = (shared + prompt_ids(random_.randrange(4), seed=random_.randrange(99)))[:90]
        options = dict(max_new_tokens=random_.randrange(1, 20), temperature=1.3, eos_token_id=[])
        options["seed"] = random_.randrange(99)
        out = any_llm.generate(prompt, cache=cache, **options)
        assert out.token_ids == any_llm.generate(prompt, **options).token_ids
        assert cache.token_ids == [prompt + out.token_ids[:-1]]
        reused += out.stats.reused_tokens
    assert reused > 100


def test_the_same_prompt_again(any_llm):
    cache, prompt = cache_for(any_llm), PROMPTS[2]
    first = any_llm.generate(prompt, cache=cache, max_new_tokens=3, eos_token_id=[])
    again = any_llm.generate(prompt, cache=cache, max_new_tokens=3, eos_token_id=[])
    assert again.token_ids == first.token_ids
    assert again.stats.reused_tokens == again.stats.prompt_tokens - 1  # one token gives the logits
    cache.reset()
    assert any_llm.generate(prompt, cache=cache, max_new_tokens=3, eos_token_id=[]).stats.reused_tokens == 0


def test_batched_cache_rows_reuse_their_own_prefix(llm):
    cache = cache_for(llm, rows=2)
    options = dict(max_new_tokens=5, eos_token_id=[])
    ids = [llm.tokenizer.encode(prompt) for prompt in PROMPTS[:2]]
    first = llm.generate(ids, cache=cache, **options)
    prompts = [ids[0] + first[0].token_ids + [9], [1, 9, 9]]
    second = llm.generate(prompts, cache=cache, **options)
    assert [row.stats.reused_tokens for row in second] == [len(ids[0]) + 4, 1]
    assert [row.token_ids for row in second] == [llm.generate(p, **options).token_ids for p in prompts]


def test_a_cache_that_does_not_fit_the_request(llm, window_llm):
    with pytest.raises(CacheError, match="rows"):
        llm.generate(PROMPTS, cache=cache_for(llm, rows=2), max_new_tokens=1)
    with pytest.raises(CacheError, match="another model"):
        llm.generate(PROMPTS[0], cache=cache_for(window_llm), max_new_tokens=1)
    half = StaticCache(llm.config, 1, 64, dtype=torch.bfloat16)
    with pytest.raises(CacheError, match="bfloat16"):
        llm.generate(PROMPTS[0], cache=half, max_new_tokens=1)


# -- errors before any compute -------------------------------------------------------------------------


@pytest.fixture
def no_compute(llm, monkeypatch):
    """Any forward pass fails the test."""

    def never(*args, **kwargs):
        raise AssertionError("something was computed")

    monkeypatch.setattr(type(llm.model), "forward", never)
    monkeypatch.setattr(type(llm.model), "embed", never)
    monkeypatch.setattr(llm.steps, "embed", never)


def test_over_capacity(llm, no_compute):
    prompt = prompt_ids(20)
    with pytest.raises(RequestError, match="holds 16"):
        llm.generate(prompt, cache=cache_for(llm, length=16), max_new_tokens=1)
    with pytest.raises(RequestError, match="max_new_tokens"):
        llm.generate(prompt, cache=cache_for(llm, length=25), max_new_tokens=6)
    positions = llm.config.max_positions
    with pytest.raises(RequestError, match=str(positions)):
        llm.generate(prompt, max_new_tokens=positions - 19)
    with pytest.raises(RequestError, match=str(positions)):
        llm.generate([prompt, prompt_ids(positions)], max_new_tokens=1)  # one row of a batch is enough
    with pytest.raises(RequestError, match=str(positions)):
        llm.generate(prompt, cache=cache_for(llm, length=positions + 50), max_new_tokens=positions)


def test_exactly_full_is_allowed(llm):
    prompt = prompt_ids(20)
    out = llm.generate(prompt, cache=cache_for(llm, length=26), max_new_tokens=6, eos_token_id=[])
    assert out.token_ids == llm.generate(prompt, max_new_tokens=6, eos_token_id=[]).token_ids
    # Unset, the budget is what there is room for.
    assert len(llm.generate(prompt, cache=cache_for(llm, length=26), eos_token_id=[]).token_ids) == 6


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(max_tokens=5), "max_tokens.*max_new_tokens"),
        (dict(temprature=0.5), "temprature.*temperature"),
        (dict(num_beams=4), "num_beams"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=1.5), "top_p"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(seed=[1, 2]), "seed"),
    ],
    ids=str,
)
def test_bad_requests(options, named, llm, no_compute):
    with pytest.raises(RequestError, match=named):
        llm.generate(PROMPTS[0], **options)


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        7,
        [],
        {},
        [[]],
        ["ok", []],
        [1.5],
        [[1, "x"]],
        ["ok", 3],
        [[1, -1]],
        [[10**6]],
        [[True]],
        b"bytes",
        [b"bytes"],
    ],
    ids=repr,
)
def test_bad_prompts(prompt, llm, no_compute):
    with pytest.raises(RequestError, match="prompt"):
        llm.generate(prompt, max_new_tokens=1)


def test_ids_of_padding_rows_are_ids(llm):
    """The embedding has five rows more than the tokenizer has entries: legal as ids, no text."""
    last = llm.config.vocab_size - 1
    assert llm.generate([last], max_new_tokens=2, eos_token_id=[]).finish_reason == "length"
    with pytest.raises(RequestError, match=str(last)):
        llm.generate([last + 1], max_new_tokens=2)


def test_a_tokenizer_larger_than_the_model(checkpoint, text_tokenizer_files, tmp_path):
    folder = shutil.copytree(checkpoint("llama3"), tmp_path / "copy")
    text_tokenizer_files.copy_to(folder)
    with pytest.raises(MinillmError, match="embedding"):
        load(folder).generate("从前有一个小女孩 the the", max_new_tokens=1)


# -- loading -----------------------------------------------------------------------------------------


def test_dtype_and_device(text_checkpoint):
    assert LLM.from_pretrained(text_checkpoint, device="cpu").dtype == torch.float32  # as the file says
    for name, dtype in (("bfloat16", torch.bfloat16), (torch.float16, torch.float16)):
        llm = LLM.from_pretrained(text_checkpoint, dtype=name, device="cpu")
        assert llm.dtype == dtype
        assert len(llm.generate(PROMPTS[0], max_new_tokens=4, eos_token_id=[]).token_ids) == 4
    with pytest.raises(BackendError, match="int3"):
        LLM.from_pretrained(text_checkpoint, dtype="int3")
    with pytest.raises(BackendError, match="abacus"):
        LLM.from_pretrained(text_checkpoint, device="abacus")


def test_backends_agree(text_checkpoint):
    texts = [
        LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu", attention=name).generate(
            PROMPTS, max_new_tokens=15, eos_token_id=[]
        )
        for name in ("math", "sdpa", "auto")
    ]
    ids = [[row.token_ids for row in rows] for rows in texts]
    assert ids[0] == ids[1] == ids[2]


def test_missing_pieces_of_a_checkpoint(text_checkpoint, tmp_path):
    files = {"config": ConfigError, "tokenizer": TokenizerError, "model.safetensors.index": CheckpointError}
    for name, error in files.items():
        folder = copy_of(text_checkpoint, tmp_path / name, **{name: None})
        with pytest.raises(error, match=name.replace(".", r"\.")):
            load(folder)
    without = copy_of(text_checkpoint, tmp_path / "optional", generation_config=None)
    assert load(without).generate(PROMPTS[0], max_new_tokens=2).token_ids


# -- conversation --------------------------------------------------------------------------------------


def test_conversation_equals_the_whole_history_each_time(any_llm):
    options = dict(max_new_tokens=12, temperature=1.1, seed=4)
    chat = any_llm.conversation(system="Be brief.", max_cache_len=400)
    history = [{"role": "system", "content": "Be brief."}]
    held = 0
    for turn, text in enumerate(["Hello", "Tell me about the wolf 🚀", "And then?"]):
        answer = chat.say(text, **options)
        history.append({"role": "user", "content": text})
        ids = any_llm.tokenizer.encode_chat(history)
        fresh = any_llm.generate(ids, **options)
        assert (answer.text, answer.token_ids) == (fresh.text, fresh.token_ids)
        assert answer.stats.prompt_tokens == len(ids)
        if turn:
            assert 0 < answer.stats.reused_tokens < len(ids)
            assert answer.stats.reused_tokens >= held // 2  # most of what was there is not computed again
        held = len(ids)
        history.append({"role": "assistant", "content": answer.text})
    assert chat.messages == history


def test_conversation_reuses_the_prompt_exactly(llm):
    """Where the template only appends, at least the whole previous prompt is found again."""
    chat = llm.conversation(max_cache_len=300, max_new_tokens=6)
    first = chat.say("Hello")
    second = chat.say("Hello again")
    assert first.stats.reused_tokens == 0
    assert second.stats.reused_tokens >= first.stats.prompt_tokens


def test_conversation_streams(llm):
    options = dict(max_new_tokens=10, seed=2, temperature=1.0)
    one, two = (llm.conversation(max_cache_len=300, **options) for _ in range(2))
    for text in ("Hello", "And now?"):
        assert "".join(one.stream(text)) == two.say(text).text
    assert one.messages == two.messages


def test_conversation_options_and_errors(llm, text_checkpoint, tmp_path):
    chat = llm.conversation(max_cache_len=60, max_new_tokens=4)
    assert len(chat.say("Hi").token_ids) <= 4
    before = list(chat.messages)
    with pytest.raises(RequestError, match="60"):
        chat.say("The wolf said to the little girl " * 10)
    with pytest.raises(RequestError, match="temperature"):
        chat.say("Hi", temperature=-1)
    with pytest.raises(RequestError, match="unknown"):
        llm.conversation(max_cache_len=60, tempo=3).say("Hi")
    assert chat.messages == before  # a turn that fails leaves the history as it was
    assert chat.say("Again").text is not None
    # A turn's options win over the conversation's, for that turn.
    chat = llm.conversation(max_cache_len=300, max_new_tokens=4, eos_token_id=[])
    assert [chat.say("Hi", max_new_tokens=n).stats.new_tokens for n in (2, None, 5)] == [2, 4, 5]

    config = json.loads((text_checkpoint / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    base = load(copy_of(text_checkpoint, tmp_path, tokenizer_config=config))
    with pytest.raises(TokenizerError, match="chat template"):
        base.conversation()


def test_conversation_with_a_template_that_writes_bos(metaspace_files, tmp_path):
    """Llama 2 style: one BOS per user turn, written by the template, none added."""
    folder = tmp_path / "llama2"
    save_checkpoint(folder, FAMILIES["llama2"].with_changes({"vocab_size": metaspace_files.vocabulary}), seed=3)
    metaspace_files.copy_to(folder)
    llm = load(folder)
    chat = llm.conversation(max_new_tokens=5, max_cache_len=300)
    first = chat.say("Hello")
    ids = load_tokenizer(folder).encode_chat([{"role": "user", "content": "Hello"}])
    assert ids.count(1) == 1
    assert first.stats.prompt_tokens == len(ids)
    assert first.token_ids == llm.generate(ids, max_new_tokens=5).token_ids
    chat.say("Again")
    assert chat.cache.token_ids[0].count(1) >= 2


# -- the embedded model ----------------------------------------------------------------------------


def test_the_embedded_model_is_an_ordinary_checkpoint():
    """ "demo" loads here and in transformers, from the same folder, and says the same."""
    llm = LLM.from_pretrained("demo", dtype="float32", device="cpu")
    folder = find_checkpoint("demo")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = "Once upon a time"
    ids = tokenizer(prompt).input_ids
    assert llm.tokenizer.encode(prompt) == ids
    out = llm.generate(prompt, max_new_tokens=30, temperature=0.0, repetition_penalty=1.0, eos_token_id=[])
    assert out.token_ids == reference_greedy(model, ids, 30)
    assert tokenizer.decode(ids + out.token_ids, skip_special_tokens=True) == prompt + out.text


def test_an_abandoned_answer_stays_in_the_history_and_a_failed_one_does_not(llm, monkeypatch):
    chat = llm.conversation(temperature=0, max_new_tokens=30)
    pieces = chat.stream("Hello")
    first = next(pieces)
    pieces.close()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"].startswith(first)
    kept = list(chat.messages)

    def broken(*arguments, **keywords):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(llm.steps, "embed", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(chat.stream("And then?"))
    assert chat.messages == kept
    monkeypatch.undo()
    assert chat.say("And then?").finish_reason is not None


# -- a row's bits are its own ---------------------------------------------------------------------------

LONG = [[(7 * i + row) % 300 + 5 for i in range(length)] for row, length in enumerate((300, 5, 61, 1, 17, 270))]


@pytest.mark.parametrize("form", [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("float32", "int4-g32")])
def test_a_row_gives_in_a_list_what_it_gives_alone_to_the_bit(form, quantizable):
    """Prompts of one token and of several chunks; log-probabilities too, which show what a text may hide."""
    dtype, quantize = form
    options = dict(dtype=dtype, quantize=quantize, quantize_head=quantize is not None)
    llm = LLM.from_pretrained(quantizable, device="cpu", **options)
    for options in (dict(temperature=0), dict(temperature=0.9, top_p=0.9, seed=3)):
        options |= dict(max_new_tokens=8, eos_token_id=[], logprobs=True)
        together = llm.generate(LONG, **options)
        for prompt, out in zip(LONG, together, strict=True):
            alone = llm.generate(prompt, **options)
            assert (alone.token_ids, alone.logprobs) == (out.token_ids, out.logprobs)


def test_rows_of_a_cache_share_its_memory_and_its_holder(any_llm):
    cache = cache_for(any_llm, rows=3, length=32)
    middle = cache.rows(1, 2)
    with torch.inference_mode():
        any_llm.model(torch.tensor([[5, 6, 7]]), torch.arange(3)[None], middle)
    assert cache.token_ids == [[], [5, 6, 7], []]
    middle.truncate(1)
    assert cache.token_ids == [[], [5], []]
    with cache.hold.by("somebody"), pytest.raises(CacheError, match="somebody"):
        any_llm.model(torch.tensor([[5]]), torch.tensor([[1]]), middle)
