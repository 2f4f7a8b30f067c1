"""Captured steps on a real GPU: the decoder's own results, at every position, without waiting for the host."""

import warnings

import pytest
import torch
from families import prompt_ids
from rows import new_row

from minillm.batch import Batch
from minillm.cache import StaticCache
from minillm.decode import prefill
from minillm.faster.steps import CapturedStep, Steps
from minillm.llm import LLM
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.load.tokenizer import load_tokenizer
from minillm.options import GenerationConfig

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device; this machine has none", allow_module_level=True)

FAMILIES = ["llama3", "mistral-v0.1", "gemma2", "olmo2"]


def load(checkpoint, name, attention="kernels", device="cuda", dtype=torch.float32, quantize=None):
    return load_decoder(checkpoint(name), load_config(checkpoint(name)), dtype, device, attention, quantize)


@pytest.mark.parametrize("compile", ["auto", True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_captured_step_follows_token_and_position(name, compile, checkpoint):
    """One capture per shape; ragged rows, one finished; float32 within rounding of the CPU."""
    model, on_cpu = load(checkpoint, name), load(checkpoint, name, "math", "cpu")
    steps, rows = Steps(model, compile), [prompt_ids(n, seed=n) for n in (3, 14, 9)]
    cache, expected_cache = (StaticCache(m.config, 3, 48, m.embedding.weight.device) for m in (model, on_cpu))
    prefill(steps, cache, rows, [0] * 3)
    prefill(on_cpu, expected_cache, rows, [0] * 3)
    at, generator = torch.tensor([[3], [14], [9]]), torch.Generator().manual_seed(0)
    for width in (1, 3, 1, 1, 3, 1):
        position = at + torch.arange(width)
        position[2] = -1
        ids = torch.randint(5, model.config.vocab_size, (3, width), generator=generator)
        with torch.inference_mode():
            result = steps(ids.cuda(), position.cuda(), cache).cpu()
            expected = on_cpu(ids, position, expected_cache)
        torch.testing.assert_close(result[:2], expected[:2], rtol=0, atol=1e-3)
        at += width
    captured = steps._recorded[cache]
    assert {shape: type(step) for shape, step in captured.items()} == {(3, 1): CapturedStep, (3, 3): CapturedStep}


def rows_of(tokenizer, prompts, budget=24, **options):
    config, eos = GenerationConfig(), frozenset([2])
    return [
        new_row(ids, config, budget, eos, tokenizer, device="cuda", seed=seed, **options)
        for seed, ids in enumerate(prompts, start=1)
    ]


@pytest.mark.parametrize("sampled", [{}, dict(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2)])
def test_the_host_waits_only_at_looks(sampled, checkpoint, text_tokenizer_files):
    """24 tokens are three looks of eight steps or six of four: the waits double, they do not follow the steps."""
    steps, tokenizer = Steps(load(checkpoint, "llama3")), load_tokenizer(text_tokenizer_files.folder)
    waits = {}
    for look_every in (8, 8, 4):  # the first time captures
        prompts = [prompt_ids(5, seed=1), prompt_ids(11, seed=2)]
        rows = rows_of(tokenizer, prompts, wants_logprobs=True, **sampled)
        batch = Batch(steps, StaticCache(steps.config, 2, 64, "cuda"), rows)
        batch.look_every, loop = look_every, batch.run()
        next(loop)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in loop:
                    pass
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits[look_every] = len(caught)
    assert waits[8] <= 2 * 5 + 5  # two more looks, and the cut at the end
    assert waits[4] <= 2 * waits[8] + 5


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize(
    ("dtype", "quantize"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, "int8")],
)
def test_text_equals_the_uncaptured_decoders(attention, dtype, quantize, checkpoint, text_tokenizer_files):
    model = load(checkpoint, "llama3", attention, dtype=dtype, quantize=quantize)
    tokenizer = load_tokenizer(text_tokenizer_files.folder)
    prompts = [prompt_ids(5, seed=1), prompt_ids(11, seed=2)]
    said = []
    for runner in (model, Steps(model)):
        cache = StaticCache(model.config, 2, 64, "cuda", dtype)
        rows = rows_of(tokenizer, prompts)
        for _ in Batch(runner, cache, rows).run():
            pass
        said.append([row.token_ids for row in rows])
        assert cache.token_ids == [row.prompt + row.token_ids[:-1] for row in rows]
    assert said[0] == said[1]


def test_plan_after_reset_reaches_a_captured_step(checkpoint):
    """A cache that is used again for a longer text: the rotary tables are filled anew where the graph reads them."""
    model, on_cpu = load(checkpoint, "llama-dynamic"), load(checkpoint, "llama-dynamic", "math", "cpu")
    steps, row = Steps(model), prompt_ids(9, seed=2)
    cache = StaticCache(model.config, 1, 128, "cuda")
    for planned in (128, 12):
        cache.reset()
        cache.plan(planned)
        expected_cache = StaticCache(model.config, 1, 128, planned_length=planned)
        with torch.inference_mode():
            prefill(steps, cache, [row], [0])
            prefill(on_cpu, expected_cache, [row], [0])
            for i in range(3):
                ids, position = torch.tensor([[7 + i]]), torch.tensor([[9 + i]])
                found = steps(ids.cuda(), position.cuda(), cache).cpu()
                torch.testing.assert_close(found, on_cpu(ids, position, expected_cache), rtol=0, atol=1e-3)


def test_a_request_captures_once_for_all(checkpoint, text_tokenizer_files):
    model = load(checkpoint, "llama3")
    llm = LLM(model, load_tokenizer(text_tokenizer_files.folder), model.config, GenerationConfig())
    for seed in range(3):
        llm.generate(prompt_ids(5 + seed, seed=seed), max_new_tokens=8)
    (steps,) = llm.steps._recorded.values()
    assert {shape: type(step) for shape, step in steps.items()} == {(1, 1): CapturedStep}


def test_the_first_token_is_timed_by_itself(checkpoint, text_tokenizer_files):
    """Eight steps to a look, but the first look after the prompt: speed does not depend on how many tokens follow."""
    model = load(checkpoint, "llama3")
    llm = LLM(model, load_tokenizer(text_tokenizer_files.folder), model.config, GenerationConfig())
    options = dict(eos_token_id=[], temperature=0)
    llm.generate(prompt_ids(5, seed=1), max_new_tokens=200, **options)
    answers = (llm.generate(prompt_ids(5, seed=1), max_new_tokens=n, **options) for n in (41, 161))
    short, long = (answer.stats.tokens_per_second for answer in answers)
    assert 0.5 < short / long < 2
