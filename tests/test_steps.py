"""Recorded and compiled steps against the decoder as it is written."""

import copy
import gc
import shutil
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, prompt_ids, save_checkpoint, seed_of
from minillm_kernels import cpu
from minillm_kernels.cpu.tape import NotRecordable
from rows import new_row, sampling_of

from minillm import LLM, StaticCache, decode_one_token
from minillm.batch import Batch
from minillm.decode import prefill
from minillm.errors import BackendError, NumericalError, RequestError
from minillm.faster.steps import RecordedAhead, RecordedStep, Steps
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.load.tokenizer import load_tokenizer
from minillm.options import GenerationConfig
from minillm.request import Request, new_rows
from minillm.speculative.drafting import Drafting

needs_c = pytest.mark.skipif(not cpu.available(), reason="steps are recorded from C calls: needs a C compiler")


@pytest.fixture(scope="module")
def llm(text_tokenizer_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps") / "llama3"
    save_checkpoint(folder, FAMILIES["llama3"].config, seed_of("llama3"))
    text_tokenizer_files.copy_to(folder)
    return LLM.from_pretrained(folder, dtype="float32", device="cpu")


def recorded(steps: Steps, cache: StaticCache) -> dict:
    return steps._recorded[cache]


# -- recorded steps ----------------------------------------------------------------------------------


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_steps_are_the_decoder_to_the_last_bit(name, dtype, checkpoint):
    """Every family: ragged rows, one of them finished, one and three tokens, past the end of the windows."""
    model = load_decoder(checkpoint(name), load_config(checkpoint(name)), dtype, "cpu", attention="kernels")
    steps, rows = Steps(model), [prompt_ids(n, seed=n) for n in (3, 14, 9)]
    caches = [StaticCache(model.config, 3, 48, dtype=dtype) for _ in range(2)]
    for cache in caches:
        prefill(model, cache, rows, [0] * 3)
    at = torch.tensor([[3], [14], [9]])  # [B, 1]
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for width in (1, 3, 1, 1, 3, 1, 1, 3, 3):
            position = at + torch.arange(width)  # [B, width]
            position[2] = -1
            ids = torch.randint(5, model.config.vocab_size, (3, width), generator=generator)
            expected = model(ids, position, caches[0])
            result = steps(ids, position, caches[1])
            assert torch.equal(result[:2], expected[:2])
            at += width
    assert caches[1].token_ids == caches[0].token_ids
    # It was not the decoder itself that ran.
    kinds = {shape: type(step) for shape, step in recorded(steps, caches[1]).items()}
    assert kinds == {(3, 1): RecordedStep, (3, 3): RecordedStep}


FILTERS = {
    "greedy": {},
    "sampled": dict(temperature=0.9),
    "filtered": dict(temperature=1.1, top_k=9, top_p=0.8, min_p=0.02),
}


@needs_c
@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_steps_made_at_once_are_the_decoder_to_the_last_bit(name, filters, checkpoint):
    """k tokens, each fed to the next step: ragged rows, one of which wants fewer, one none; one newest token and two;
    more than once, since the first ones are recorded; with a cut vocabulary."""
    model = load_decoder(checkpoint(name), load_config(checkpoint(name)), torch.bfloat16, "cpu", attention="kernels")
    steps, rows = Steps(model), [prompt_ids(n, seed=n) for n in (3, 14, 9)]
    eager = Steps(model, compile=False)
    caches = [StaticCache(model.config, 3, 64, dtype=torch.bfloat16) for _ in range(2)]
    for cache in caches:
        prefill(model, cache, rows, [0] * 3)
    at, V = torch.tensor([[3], [14], [9]]), model.config.vocab_size - 5  # [B, 1]
    newest = torch.tensor([[5], [6], [7]])  # [B, 1]
    for number, (T, k) in enumerate([(1, 3), (2, 3), (2, 3), (1, 3), (1, 4), (1, 1), (2, 1), (1, 4), (2, 3)]):
        sampling = sampling_of([number, 8, 9], "cpu", **FILTERS[filters])
        place = at + 1 + torch.arange(k)  # [B, k]
        position = at + torch.arange(k)
        position[0, 2:], position[2] = -1, -1
        ids = newest
        if T == 2:  # the token before the newest, which is in the cache already, or padding
            ids, position = F.pad(newest, (1, 0), value=4), F.pad(position, (1, 0), value=-1)
            position[1, 0] = at[1, 0] - 1
        given = (sampling, 1, V, number % 3 == 0)  # the logits or the distributions
        expected = eager.ahead(ids, position, place, caches[0], *given)
        result = steps.ahead(ids, position, place, caches[1], *given)
        for ours, theirs in zip(result, expected, strict=True):
            if theirs is None:
                assert ours is None and filters == "greedy" and number % 3
                continue
            assert torch.equal(ours[:, 1], theirs[:, 1]) and torch.equal(ours[:3, 0], theirs[:3, 0])
        assert number % 3 or result[1].shape == (k, 3, V)
        assert caches[1].token_ids == caches[0].token_ids
        newest = expected[0][-1][:, None].clone()
        newest[0] = expected[0][min(k, 2) - 1, 0]
        at = at + torch.tensor([[min(k, 2)], [k], [0]])
    kept = [step for key, step in recorded(steps, caches[1]).items() if len(key) > 2]
    assert len(kept) == 2 and (kept == [None] * 2) == (model.config.final_softcap is not None)  # its tanh is PyTorch's


@needs_c
def test_a_request_is_the_same_in_steps_of_four(llm):
    """Tokens, logprobs, counts and the cache: however many steps are one call, and wherever a row ends."""
    prompts = [prompt_ids(n, seed=n) for n in (4, 30, 6)]
    told = llm.generate(prompts, temperature=0, max_new_tokens=40, eos_token_id=[])
    ends = [out.token_ids[7 + 3 * n] for n, out in enumerate(told)]
    outcomes = []
    for at_once in (1, 2, 4, 7):
        steps, said = Steps(llm.model), []
        steps.at_once = at_once
        for options in (
            dict(temperature=0, eos_token_id=ends),
            dict(temperature=0.9, top_p=0.9, seed=[3, 4, 5], logprobs=True, eos_token_id=ends[:1]),
            dict(temperature=0, repetition_penalty=1.3, eos_token_id=[]),
            dict(temperature=0, eos_token_id=[], stop_strings=[told[0].text[11:13] or "x"]),
        ):
            cache = StaticCache(llm.config, 3, 43, max_step=30)
            rows = rows_of(llm, prompts, GenerationConfig(max_new_tokens=13, **options))
            rows[0].max_new_tokens = 37  # the second one's budget ends with its row of the cache
            for _ in Batch(steps, cache, rows).run():
                pass
            said += [
                (row.token_ids, row.text, row.finish_reason, row.logprobs, row.target_steps, row.from_draft)
                for row in rows
            ]
            said.append(cache.token_ids)
            assert cache.token_ids == [row.ids[:-1] for row in rows]
            chains = [step for step in recorded(steps, cache).values() if isinstance(step, RecordedAhead)]
            assert [bool(step.lists) for step in chains] == [True] * ("repetition_penalty" not in options)
        outcomes.append(said)
    assert all(said == outcomes[0] for said in outcomes)


@needs_c
@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_no_more_steps_are_made_at_once_than_the_cache_can_take_back(name, checkpoint, text_tokenizer_files, tmp_path):
    shutil.copytree(checkpoint(name), tmp_path / name)
    text_tokenizer_files.copy_to(tmp_path / name)
    llm = LLM.from_pretrained(tmp_path / name, dtype="float32", device="cpu")
    config, prompt = GenerationConfig(max_new_tokens=30, temperature=0, eos_token_id=[]), prompt_ids(4, seed=1)
    expected = llm.generate(prompt, config).token_ids
    for max_step in (1, 2, 3):
        llm.steps.at_once = 4
        cache = StaticCache(llm.config, 1, 64, max_step=max_step)
        assert llm.generate(prompt, config, cache=cache).token_ids == expected


@needs_c
@pytest.mark.parametrize("bad", [9, 10, 11, 12])
def test_numbers_that_are_none_between_steps_made_at_once(llm, bad):
    """What was said before them stands, and the error names the token; behind a row's end nobody minds."""
    (row,) = rows_of(llm, [prompt_ids(4, seed=1)], GenerationConfig(max_new_tokens=30, temperature=0, eos_token_id=[]))
    steps = Steps(llm.model)
    steps.at_once = 4
    original = Steps.ahead

    def spoilt(self, ids, cache_position, place, *rest, logits):
        tokens, logits = original(self, ids, cache_position, place, *rest, logits=logits)
        spoil = (place == 4 + bad - 1).t()[:, :, None]  # [k, B, 1]
        return tokens, logits.masked_fill(spoil, float("nan"))

    steps.ahead = spoilt.__get__(steps)
    with pytest.raises(NumericalError, match=f"new token {bad}:"):
        for _ in Batch(steps, StaticCache(llm.config, 1, 64), [row]).run():
            pass
    assert len(row.token_ids) == bad - 1
    told = list(row.token_ids)
    config = GenerationConfig(max_new_tokens=30, temperature=0, eos_token_id=[told[-1]])
    if told.index(told[-1]) == len(told) - 1:
        (row,) = rows_of(llm, [prompt_ids(4, seed=1)], config)
        for _ in Batch(steps, StaticCache(llm.config, 1, 64), [row]).run():
            pass
        assert (row.finish_reason, row.token_ids) == ("eos", told)


@needs_c
def test_steps_made_at_once_go_with_their_cache(llm):
    steps = Steps(llm.model)
    cache = StaticCache(llm.config, 1, 16)
    sampling = sampling_of([1], "cpu")
    for start in (0, 3):
        position = torch.arange(start, start + 3)[None]
        steps.ahead(torch.tensor([[5]]), position, position + 1, cache, sampling, 0, 64, logits=True)
    assert len(steps._recorded) == 1
    del cache
    gc.collect()
    assert len(steps._recorded) == 0


def rows_of(llm, prompts, config):
    rows, _ = new_rows(llm, prompts, config, {}, 64)
    for row in rows:
        row.planned_length = None
    return rows


@needs_c
@pytest.mark.parametrize("quantize", ["int8", "int4-g32"])
def test_recorded_steps_of_quantized_weights(quantize, tmp_path):
    wide = FAMILIES["gemma2"].config | dict(hidden_size=96, intermediate_size=64, head_dim=16)
    quantizable = save_checkpoint(tmp_path / "wide", wide, seed=3)
    model = load_decoder(quantizable, load_config(quantizable), torch.float32, "cpu", "kernels", quantize, True)
    steps, ids = Steps(model), prompt_ids(6, seed=1)
    caches = [StaticCache(model.config, 1, 32) for _ in range(2)]
    for cache in caches:
        prefill(model, cache, [ids], [0])
    for place in range(6, 12):
        arguments = torch.tensor([[place]]), torch.tensor([[place]])
        with torch.inference_mode():
            assert torch.equal(steps(*arguments, caches[1]), model(*arguments, caches[0]))
    assert isinstance(recorded(steps, caches[1])[1, 1], RecordedStep)


@needs_c
def test_what_a_step_returned_stays_as_it_was(llm):
    cache = StaticCache(llm.config, 1, 16)
    results, kept = [], []
    for place in range(4):
        results.append(llm.steps(torch.tensor([[5 + place]]), torch.tensor([[place]]), cache))
        kept.append(results[-1].clone())
    for result, unchanged in zip(results, kept, strict=True):
        assert torch.equal(result, unchanged)
    assert not torch.equal(results[1], results[2])


@needs_c
def test_a_step_leaves_what_it_was_given_alone(llm):
    """Ids and positions are the caller's: a later step must not write its own into the tensors of the first one."""
    steps, cache = Steps(llm.model), StaticCache(llm.config, 1, 16)
    given = [(torch.tensor([[5 + place]]), torch.tensor([[place]])) for place in range(4)]
    for ids, position in given:
        steps(ids, position, cache)
    assert isinstance(recorded(steps, cache)[1, 1], RecordedStep)
    assert [(int(ids), int(position)) for ids, position in given] == [(5, 0), (6, 1), (7, 2), (8, 3)]


@needs_c
def test_steps_in_a_loop_of_ones_own_follow_weights_that_moved(llm):
    """No request begins here, at which addresses are compared: the decoder itself counts its moves."""
    model = copy.deepcopy(llm.model)
    steps, caches = Steps(model), [StaticCache(llm.config, 1, 16) for _ in range(2)]
    for place in range(6):
        if place == 3:
            model.half()
            model.float()  # rounded on the way, and elsewhere now
        arguments = torch.tensor([[5 + place]]), torch.tensor([[place]])
        with torch.inference_mode():
            assert torch.equal(steps(*arguments, caches[0]), model(*arguments, caches[1])), place


@needs_c
def test_steps_go_with_their_cache(llm):
    steps = Steps(llm.model)
    cache = StaticCache(llm.config, 1, 16)
    steps(torch.tensor([[5]]), torch.tensor([[0]]), cache)
    assert len(steps._recorded) == 1
    del cache
    gc.collect()
    assert len(steps._recorded) == 0


@needs_c
@pytest.mark.parametrize("inference", [False, True])
def test_what_pytorch_computes_is_not_recorded(inference):
    with torch.inference_mode(inference):  # in which fewer operators are taken apart
        x, y, small = torch.ones(4, 6), torch.ones(4, 6), torch.ones(4, 6, dtype=torch.int8)
        with cpu.blank_tape().recording():
            cpu.add(x.view(2, 12), torch.empty(2, 12))
            x[:, :2].reshape(4, 1, 2).transpose(0, 1)
            x.reshape(24).contiguous()
        for compute in (
            lambda: x * y,
            lambda: x + 1,
            lambda: x.copy_(y.double()),
            lambda: x.mul_(1),
            lambda: x.bfloat16(),
            lambda: x @ y.t(),
            lambda: x.sum(),
            lambda: torch.add(x, y, alpha=2),
            lambda: x.to(torch.int8),
            lambda: small + small,
            lambda: small.float(),
            lambda: x.argmax(dim=-1),
            lambda: x[0, 0].item(),
            lambda: torch.zeros(2),
        ):
            with pytest.raises(NotRecordable), cpu.blank_tape().recording():
                compute()
        assert (x * 2).sum() == 48  # and afterwards it computes as ever


def glue_calls():
    """What a decoder computes in PyTorch between its kernels, in every dtype and on every kind of number."""
    torch.manual_seed(3)
    odd = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-41, -1e-41, 6e-8, 65504.0, 3e38, 1 / 3]
    ids = torch.randint(-5, 7, (3, 4))
    places = ids.abs()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        table = torch.cat([torch.randn(96) * 100, torch.tensor(odd)])[:105].view(7, 15).to(dtype)
        wide = torch.randn(2, 3, 5, 7).to(dtype)
        yield f"embedding {dtype}", lambda table=table: F.embedding(places, table)
        for factor in (2.5, 0.1, 27.712812921102035, 1e-3, 1e5):
            yield f"times {factor} {dtype}", lambda table=table, factor=factor: table * factor
        turned = table.flip(0)
        yield f"sum {dtype}", lambda table=table, turned=turned: table + turned
        if dtype != torch.float32:
            yield f"float {dtype}", lambda table=table: table.float()
        for name, view in (
            ("a column", wide[:, -1]),
            ("turned", wide.permute(3, 1, 0, 2)),
            ("spread", wide[:1].expand(4, 3, 5, 7)),
            ("every other", wide[:, :, ::2, 1:5]),
        ):
            yield f"{name} {dtype}", lambda view=view: view.contiguous()
            yield f"{name} flat {dtype}", lambda view=view: view.reshape(-1)
    to, source = torch.zeros(4, 3, dtype=torch.int64), ids.clone().t()
    yield "a copy", lambda: to.copy_(source)
    yield "no less than 0", lambda: ids.clamp(min=0)


@needs_c
@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in glue_calls()])
def test_what_pytorch_computes_between_kernels_is_replayed_to_the_last_bit(call):
    with torch.inference_mode():
        tape = cpu.blank_tape()
        with tape.recording():
            result = call()
        expected = result.clone()
        result.view(torch.uint8).fill_(85)
        tape.replay()
        assert torch.equal(result.isnan(), expected.isnan())  # which NaN it is has no meaning
        assert torch.equal(*(x.nan_to_num(7.0).view(torch.uint8) for x in (result, expected)))


@needs_c
def test_a_step_of_many_rows_is_recorded_too(llm):
    rows = [prompt_ids(4, seed=n) for n in range(20)]
    steps, caches = Steps(llm.model), [StaticCache(llm.config, 20, 8) for _ in range(2)]
    for cache in caches:
        prefill(llm.model, cache, rows, [0] * 20)
    with torch.inference_mode():
        for place in (4, 5):
            token, position = torch.full((20, 1), 7), torch.full((20, 1), place)
            assert torch.equal(steps(token, position, caches[1]), llm.model(token, position, caches[0]))
    assert isinstance(recorded(steps, caches[1])[20, 1], RecordedStep)


@needs_c
def test_threads_record_and_replay_by_themselves(llm):
    prompts = [prompt_ids(4 + n, seed=n) for n in range(4)]
    options = dict(temperature=0, max_new_tokens=24, eos_token_id=[])
    expected = [llm.generate(ids, **options).token_ids for ids in prompts]
    results = [None] * len(prompts)

    def work(n):
        results[n] = llm.generate(prompts[n], **options).token_ids

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def test_a_loop_of_ones_own_with_steps(llm):
    """Two prompts of different length in one batch, as in the guides' example."""
    prompts = [prompt_ids(5, seed=1), prompt_ids(11, seed=2)]
    expected = llm.generate(prompts, temperature=0, max_new_tokens=12, eos_token_id=[])
    texts = []
    for model in (llm.model, llm.steps):
        cache = StaticCache(llm.config, 2, 32)
        token = prefill(model, cache, prompts, [0, 0]).argmax(-1, keepdim=True)  # [2, 1]
        position, new = torch.tensor([[5], [11]]), [token]
        for _ in range(11):
            new.append(token := decode_one_token(model, token, position, cache))
            position = position + 1
        texts.append(torch.cat(new, dim=1).tolist())
    assert texts[0] == texts[1] == [one.token_ids for one in expected]


@pytest.mark.parametrize("bad", ["yes", 1, None, "True"])
def test_an_unknown_way_to_compile_is_refused(bad, llm):
    with pytest.raises(BackendError, match="compile="):
        Steps(llm.model, bad)
    with pytest.raises(BackendError, match="compile="):  # before anything is looked for
        LLM.from_pretrained("/there/is/no/such/folder", compile=bad)


# -- several steps between two looks, as on a GPU -----------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "mistral-v0.1"])
@pytest.mark.parametrize("look_every", [2, 3, 8, 50])
def test_looking_seldom_changes_nothing(look_every, name, ours, text_tokenizer_files):
    """EOS, budgets, stop strings and the cache: the same, however many steps run unseen."""
    model, tokenizer = ours(name), load_tokenizer(text_tokenizer_files.folder)
    prompts = [prompt_ids(n, seed=20 + n) for n in (3, 11, 26)]

    def texts(look, eos=(), stops=(), penalty=None):
        config = GenerationConfig(stop_strings=list(stops), repetition_penalty=penalty)
        budgets = (24, 9, 17)
        options = dict(temperature=0.7, repetition_penalty=penalty, wants_logprobs=True)
        rows = [
            new_row(ids, config, n, frozenset(eos), tokenizer, seed=seed, **options)
            for seed, (ids, n) in enumerate(zip(prompts, budgets, strict=True), start=1)
        ]
        cache = StaticCache(model.config, 3, 64, max_step=8)
        batch = Batch(model, cache, rows)
        batch.look_every = look
        looks = sum(1 for _ in batch.run())
        said = [(row.token_ids, row.text, row.finish_reason, row.logprobs) for row in rows]
        return said, cache.token_ids, looks

    plain, _, _ = texts(1)
    stop = next(piece for piece in (plain[0][1][3:6], plain[0][1][1:3]) if piece.strip())
    for options in ({}, dict(eos=[plain[0][0][6], plain[2][0][10]]), dict(stops=[stop]), dict(penalty=1.3)):
        once, seldom = texts(1, **options), texts(look_every, **options)
        assert seldom[:2] == once[:2]
        assert seldom[2] < once[2]


def test_generating_imports_no_compiler():
    """PyTorch's takes seconds and 140 MB to import; nothing but compile=True may ask for it."""
    program = """
import sys
from minillm import LLM
LLM.from_pretrained("demo").generate("Once", max_new_tokens=4)
print(*[name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@needs_c
def test_requests_without_a_cache_share_one(llm):
    """Its steps are recorded once; what a request says does not depend on the one before, longer or of more rows."""
    alone = LLM(llm.model, llm.tokenizer, llm.config, llm.defaults)
    options = dict(max_new_tokens=9, eos_token_id=[], seed=3)

    def ask(llm, rows, **more):
        texts = [prompt_ids(n, seed=n) for n in range(4, 4 + rows)]
        return [out.token_ids for out in llm.generate(texts, **options, **more)]

    requests = [
        (1, dict(temperature=0)),
        (1, dict(temperature=0.9)),
        (3, dict(temperature=0)),
        (1, dict(temperature=0)),
    ]
    expected = [ask(LLM(llm.model, llm.tokenizer, llm.config, llm.defaults), rows, **more) for rows, more in requests]
    caches = []
    for (rows, more), said in zip(requests, expected, strict=True):
        assert ask(alone, rows, **more) == said
        caches += alone.steps._spare
    assert caches[0] is caches[1] is not caches[2] is caches[3]
    request = Request(
        alone, [prompt_ids(4, seed=n) for n in range(3)], None, None, Drafting(alone, None), options, seats=2
    )
    assert request.batch.cache is caches[3].rows(0, 2)
    assert len(request.batch.seats) == 2
    assert [len(row.token_ids) for ended in request.loop() for row in ended] == [9] * 3
    assert alone.steps._spare == [caches[3]]
    before = dict(recorded(alone.steps, caches[3].rows(0, 1)))
    assert before
    assert ask(alone, 1, temperature=0) == expected[0]
    assert dict(recorded(alone.steps, caches[3].rows(0, 1))) == before


@needs_c
def test_what_is_not_kept_between_requests(llm, monkeypatch):
    """A cache that takes much memory, one whose request failed or was left, one without recorded steps."""
    mine = LLM(llm.model, llm.tokenizer, llm.config, llm.defaults)
    options, prompt = dict(max_new_tokens=9, eos_token_id=[], temperature=0), prompt_ids(4, seed=1)
    expected = mine.generate(prompt, **options).token_ids
    next(mine.stream(prompt, **options))
    assert mine.steps._spare == []
    assert mine.generate(prompt, **options).token_ids == expected
    (spare,) = mine.steps._spare
    for refused in (
        lambda: mine.generate(prompt, num_assistant_tokens=3, **options),
        lambda: mine.stream([prompt, prompt], **options),
        lambda: mine.as_completed(prompt, **options),
    ):  # before it is borrowed
        with pytest.raises(RequestError):
            refused()
    assert mine.steps._spare == [spare]
    monkeypatch.setattr("minillm.faster.steps._SPARE_BYTES", spare.nbytes * 256 // 257)  # without the bins
    mine.generate(prompt, **options)
    assert mine.steps._spare == []
    assert mine.steps.borrow_cache(1, 13).max_cache_len == 13
    # The steps that were recorded for a cache count: every filter makes new ones.
    monkeypatch.setattr("minillm.faster.steps._SPARE_BYTES", 2 * spare.nbytes)
    monkeypatch.setattr("minillm.faster.steps._STEP_LOGITS", spare.nbytes // (2 * 4 * mine.config.vocab_size))
    kept = []
    for changed in ({}, dict(temperature=0.9), dict(temperature=0.9, top_k=5), dict(temperature=0.9, top_p=0.5)):
        mine.generate(prompt, **options | changed)
        kept.append(len(mine.steps._spare))
    assert kept == [1, 1, 0, 1]
    eager = LLM(llm.model, llm.tokenizer, llm.config, llm.defaults, compile=False)
    assert eager.generate(prompt, **options).token_ids == expected
    assert eager.steps._spare == []
    # Two at a time: each has its own, and one of them is kept.
    monkeypatch.undo()
    outer, inner = mine.stream("a", **options), mine.stream("b", **options)
    said = [next(outer), next(inner)]
    assert "".join([said[0], *outer]) == mine.generate("a", **options).text
    assert "".join([said[1], *inner]) == mine.generate("b", **options).text
    assert len(mine.steps._spare) == 1
