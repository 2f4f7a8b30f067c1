"""Prefill, single steps, the commit rule, and the options of a request."""

import pytest
import torch
from families import prompt_ids, reference_greedy, reference_logits
from rows import new_row, sampling_of

from minillm.batch import Batch
from minillm.cache import StaticCache
from minillm.decode import decode_one_token, prefill
from minillm.errors import CacheError, RequestError
from minillm.load.tokenizer import load_tokenizer
from minillm.options import GenerationConfig, merge_options
from minillm.sampling import Sampling, next_token

TOLERANCE = dict(rtol=0.0, atol=1e-4)  # against transformers, see test_families.py
SAME = dict(rtol=0.0, atol=2e-5)  # against ourselves, see test_cache.py


@pytest.fixture(scope="module")
def tokenizer(text_tokenizer_files):
    return load_tokenizer(text_tokenizer_files.folder)


@pytest.mark.parametrize("name", ["llama3", "mistral-v0.1", "gemma3"])
def test_prefill_gives_the_logits_after_each_row(name, ours, reference):
    model, rows = ours(name), [prompt_ids(n, seed=n) for n in (1, 16, 17, 40)]
    cache = StaticCache(model.config, 4, 64, max_step=8)
    logits = prefill(model, cache, rows, [0] * 4)
    assert logits.dtype == torch.float32
    assert logits.shape == (4, model.config.vocab_size)
    for row, ids in enumerate(rows):
        torch.testing.assert_close(logits[row], reference_logits(reference(name), ids)[-1], **TOLERANCE)
    assert cache.token_ids == rows


def test_prefill_continues_where_each_row_stands(ours):
    model, rows = ours("mistral-v0.1"), [prompt_ids(n, seed=n) for n in (20, 35)]
    cache, whole = (StaticCache(model.config, 2, 64, max_step=8) for _ in range(2))
    prefill(model, cache, [rows[0][:13], rows[1][:2]], [0, 0])
    logits = prefill(model, cache, [rows[0][13:], rows[1][2:]], [13, 2])
    torch.testing.assert_close(logits, prefill(model, whole, rows, [0, 0]), **SAME)
    assert cache.token_ids == whole.token_ids


@pytest.mark.parametrize("name", ["llama3", "mistral-v0.1"])
def test_a_loop_of_ones_own(name, ours, reference):
    """The second level of the public interface: the model, the cache and decode_one_token."""
    model, ids = ours(name), prompt_ids(12, seed=4)
    cache = StaticCache(model.config, 1, 64)
    position = torch.arange(12)[None]
    logits = model(torch.tensor([ids]), position, cache)
    token, position, new = logits[:, -1:].argmax(-1), position[:, -1:] + 1, []
    for _ in range(25):
        new.append(int(token))
        token = decode_one_token(model, token, position, cache)
        assert (token.shape, token.dtype) == ((1, 1), torch.int64)
        position = position + 1
    assert new == reference_greedy(reference(name), ids, 25)
    assert cache.token_ids == [ids + new]


def test_decode_one_token_samples_like_next_token(ours):
    model, rows = ours("llama3"), [prompt_ids(9, seed=1), prompt_ids(9, seed=2)]
    caches = [StaticCache(model.config, 2, 16) for _ in range(2)]
    for cache in caches:
        prefill(model, cache, rows, [0, 0])
    sampling = sampling_of([5, 6], "cpu", temperature=1.5, top_k=20)
    token, position = torch.tensor([[7], [8]]), torch.tensor([[9], [9]])
    chosen = decode_one_token(model, token, position, caches[0], sampling)
    logits = model(token, position, caches[1])[:, -1]
    assert chosen[:, 0].tolist() == next_token(logits, sampling, torch.tensor([10, 10])).tolist()


def test_a_penalty_needs_the_tokens_so_far(ours):
    model, ids = ours("llama3"), prompt_ids(9, seed=1)
    caches = [StaticCache(model.config, 1, 16) for _ in range(2)]
    for cache in caches:
        prefill(model, cache, [ids], [0])
    sampling, (token, position) = (
        sampling_of([5], "cpu", repetition_penalty=1e6),
        (torch.tensor([[7]]), torch.tensor([[9]])),
    )
    logits = model(token, position, caches[1])[:, -1]  # [1, V]
    best = logits.argmax(-1)  # [1]
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, best[:, None], True)
    chosen = decode_one_token(model, token, position, caches[0], sampling, seen)
    assert chosen.item() == logits.masked_fill(seen, -torch.inf).argmax(-1).item() != best.item()
    for wrong in (None, seen[:, 1:], seen.repeat(2, 1), seen.float(), "seen"):
        with pytest.raises(RequestError, match="seen"):
            decode_one_token(model, chosen, position + 1, caches[0], sampling, wrong)
    assert caches[0].lengths == [10]  # nothing was fed


def test_decode_past_the_end_raises(ours):
    model = ours("llama3")
    cache = StaticCache(model.config, 1, 4)
    prefill(model, cache, [prompt_ids(4)], [0])
    with pytest.raises(CacheError, match="4"):
        decode_one_token(model, torch.tensor([[5]]), torch.tensor([[4]]), cache)


# -- commit: the one place that decides when to stop --------------------------------------------


def row_of(tokenizer, budget=100, eos=(2,), stops=()):
    prompt = tokenizer.encode("The wolf")
    return new_row(prompt, GenerationConfig(stop_strings=list(stops)), budget, frozenset(eos), tokenizer)


def plain(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_commit_does_not_depend_on_how_many_tokens_come_at_once(size, tokenizer):
    """One by one or in blocks (as speculative decoding hands them over): same text, ids and reason."""
    ids = [*plain(tokenizer, " said to the little girl: where are you going 🚀?"), 2, 9, 9]
    for budget in (1, 5, len(ids) - 2, 100):
        for stops in ([], ["girl: wh"], ["🚀"], ["never"]):
            single, block = (row_of(tokenizer, budget, stops=stops) for _ in range(2))
            accepted = 0
            for token in ids:
                accepted += single.commit([token])
            counts = [block.commit(ids[i : i + size]) for i in range(0, len(ids), size)]
            assert (block.text, block.token_ids, block.finish_reason) == (
                single.text,
                single.token_ids,
                single.finish_reason,
            )
            assert sum(counts) == accepted == len(block.token_ids)
            assert block.finish_reason is not None


def test_finish_reasons(tokenizer):
    row = row_of(tokenizer, eos=(2, 3))
    row.commit([*plain(tokenizer, " said"), 3])
    assert (row.finish_reason, row.text, row.token_ids[-1]) == ("eos", " said", 3)

    row = row_of(tokenizer, stops=["aid"])
    row.commit(plain(tokenizer, " said to"))
    assert (row.finish_reason, row.text) == ("stop_string", " s")

    row = row_of(tokenizer, budget=2)
    ids = plain(tokenizer, " said to the")
    assert row.commit(ids) == 2
    assert (row.finish_reason, row.token_ids) == ("length", ids[:2])

    # EOS on the last token of the budget is EOS; a stop string there is a stop string.
    row = row_of(tokenizer, budget=1)
    row.commit([2])
    assert row.finish_reason == "eos"
    row = row_of(tokenizer, budget=len(plain(tokenizer, " said")), stops=["said"])
    row.commit(plain(tokenizer, " said"))
    assert row.finish_reason == "stop_string"


def test_no_eos_means_never_stop_on_it(tokenizer):
    row = row_of(tokenizer, budget=5, eos=())
    row.commit([2, 2, 2, 2, 2, 2])
    assert (row.finish_reason, row.token_ids, row.text) == ("length", [2] * 5, "")


def test_text_held_back_comes_out_at_the_end(tokenizer):
    """ "wol" could be the beginning of the stop string; when the budget ends it was not."""
    ids = plain(tokenizer, " wol")
    row = row_of(tokenizer, budget=len(ids), stops=["wolf"])
    row.commit(ids)
    assert (row.text, row.finish_reason) == (" wol", "length")
    row = row_of(tokenizer, stops=["wolf"])
    row.commit([*ids, 2])
    assert (row.text, row.finish_reason) == (" wol", "eos")


def test_an_unfinished_character_shows_as_replacement(tokenizer):
    ids = plain(tokenizer, "🚀")
    assert len(ids) > 2
    row = row_of(tokenizer, budget=len(ids) - 1)
    row.commit(ids)
    assert row.text == tokenizer.decode(ids[:-1])
    assert set(row.text) == {"\ufffd"}


def test_what_was_held_back_may_complete_a_stop_string(tokenizer):
    """Half a character shows as U+FFFD only when nothing more comes: then it counts, and it is no text."""
    ids = plain(tokenizer, "🚀")
    for budget, last in ((len(ids) - 1, []), (100, [2])):
        row = row_of(tokenizer, budget=budget, stops=["\ufffd"])
        row.commit([*ids[:-1], *last])
        assert (row.text, row.finish_reason) == ("", "stop_string")


def test_logprobs_go_with_accepted_tokens(tokenizer):
    row = row_of(tokenizer, budget=3)
    row.commit([10, 11, 12, 13], [-1.0, -2.0, -3.0, -4.0])
    assert row.logprobs == [-1.0, -2.0, -3.0]


# -- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "mistral-v0.1", "gemma2"])
def test_rows_finish_at_different_times(name, ours, reference, tokenizer):
    """EOS is set to a token some rows reach early; the others go on as if alone."""
    model = ours(name)
    prompts = [prompt_ids(n, seed=20 + n) for n in (3, 11, 26)]
    expected = [reference_greedy(reference(name), ids, 24) for ids in prompts]
    eos = frozenset([expected[0][6], expected[1][15]])
    rows = [new_row(ids, GenerationConfig(), 24, eos, tokenizer, wants_logprobs=True) for ids in prompts]
    cache = StaticCache(model.config, 3, 64, max_step=8)
    steps = sum(1 for _ in Batch(model, cache, rows).run())
    for row, ids in zip(rows, expected, strict=True):
        stop = next((i + 1 for i, token in enumerate(ids) if token in eos), 24)
        assert row.token_ids == ids[:stop]
        assert len(row.logprobs) == stop
    assert steps == max(len(row.token_ids) for row in rows)
    # The cache holds everything but each row's last token, which nothing has needed yet.
    assert cache.token_ids == [row.prompt + row.token_ids[:-1] for row in rows]


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        dict(max_new_tokens=0),
        dict(max_new_tokens=-1),
        dict(max_new_tokens=2.5),
        dict(max_new_tokens="9"),
        dict(max_new_tokens=True),
        dict(temperature=-0.1),
        dict(temperature=float("nan")),
        dict(temperature=float("inf")),
        dict(temperature="hot"),
        dict(top_k=-1),
        dict(top_k=1.5),
        dict(top_p=0.0),
        dict(top_p=1.01),
        dict(top_p=-0.5),
        dict(min_p=-0.1),
        dict(min_p=1.1),
        dict(repetition_penalty=0),
        dict(repetition_penalty=-1.0),
        dict(seed="lucky"),
        dict(seed=1.0),
        dict(eos_token_id="</s>"),
        dict(eos_token_id=[1, "x"]),
        dict(stop_strings=""),
        dict(stop_strings=["a", ""]),
        dict(stop_strings=[1]),
        dict(do_sample="yes"),
        dict(logprobs=3),
    ],
    ids=str,
)
def test_bad_options_name_themselves(bad):
    with pytest.raises(RequestError, match=next(iter(bad))):
        GenerationConfig(**bad)


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, False),
        (dict(temperature=0.8), True),
        (dict(top_k=5), True),
        (dict(top_p=0.9), True),
        (dict(temperature=0.0), False),
        (dict(temperature=0.0, top_p=0.9), False),
        (dict(do_sample=True), True),
        (dict(do_sample=False, temperature=0.8), False),
        (dict(do_sample=True, temperature=0.0), False),
        (dict(repetition_penalty=1.2), False),
    ],
    ids=str,
)
def test_do_sample_defaults_to_what_is_asked_for(options, samples):
    config = GenerationConfig(**options)
    assert config.samples == samples
    # The same for a caller of a checkpoint that says do_sample=false: only who asks for nothing gets that.
    merged = merge_options(GenerationConfig(do_sample=False), None, options)
    assert merged.samples == samples
    assert (Sampling.of(config, [1], "cpu").temperature is not None) == samples


def test_none_as_a_keyword_hides_nothing():
    """None is "not set": neither the caller's object nor the checkpoint's file is overruled by it."""
    file, given = GenerationConfig(eos_token_id=2, top_k=50), GenerationConfig(eos_token_id=[7], temperature=0.5)
    merged = merge_options(file, given, dict(eos_token_id=None, temperature=None, top_k=None))
    assert (merged.eos_token_id, merged.temperature, merged.top_k) == ([7], 0.5, 50)
    assert merge_options(file, GenerationConfig(), dict(top_k=None)) == file
