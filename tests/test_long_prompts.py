"""Prompts longer than a chunk (256 tokens) and than every window, through `generate`: each backend, plain and copied.

Only here does a chunk begin in the middle of a text, and a window end in the middle of a chunk. The first chunk has
kernels of its own on a GPU, which reads no cache for it; on a CPU the same road runs over those kernels' PyTorch code.
"""

import pytest
import torch
from families import prompt_ids, reference_greedy

from minillm import LLM, StaticCache
from minillm.decode import prefill
from minillm.load.backends import BACKENDS
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.load.tokenizer import load_tokenizer
from minillm.options import GenerationConfig

SAME = dict(rtol=0.0, atol=2e-5)  # see test_cache.py
NEW = 10
# mistral: window 9 everywhere; gemma3: three windows of 9 and a full layer; gemma2: the same two, with a softcap.
CASES = [
    (name, backend)
    for name in ("mistral-v0.1", "gemma3", "gemma2")
    for backend in ("math", "sdpa", "kernels")
    if name != "gemma2" or BACKENDS[backend].softcap
]


@pytest.fixture(scope="module")
def prompts():
    """300 tokens that end where a passage is said for the third time, and 258: two in their second chunk."""
    passage = prompt_ids(110, seed=30)
    return [(passage * 3)[:300], prompt_ids(258, seed=31)]


@pytest.fixture(scope="module")
def expected(prompts, reference):
    found = {}

    def of(name):
        if name not in found:
            found[name] = [reference_greedy(reference(name), ids, NEW) for ids in prompts]
        return found[name]

    return of


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_generate_beyond_a_chunk(name, backend, checkpoint, prompts, expected, text_tokenizer_files):
    config = load_config(checkpoint(name))
    model = load_decoder(checkpoint(name), config, torch.float32, "cpu", attention=backend)
    llm = LLM(model, load_tokenizer(text_tokenizer_files.folder), config, GenerationConfig())
    for options in ({}, dict(prompt_lookup_num_tokens=6)):
        options |= dict(max_new_tokens=NEW, eos_token_id=[])
        cache = StaticCache(config, 2, 320)
        answers = llm.generate(prompts, cache=cache, **options)
        assert [answer.token_ids for answer in answers] == expected(name), options
        # Cut back into the first chunk where no ring forbids it, and again over what is held.
        again = llm.generate([[*ids[:-3], 7, 8, 9] for ids in prompts], cache=cache, **options)
        fresh = llm.generate([[*ids[:-3], 7, 8, 9] for ids in prompts], **options)
        assert [answer.token_ids for answer in again] == [answer.token_ids for answer in fresh], options
        assert [answer.stats.reused_tokens for answer in again] == [len(ids) - 3 for ids in prompts]


@pytest.mark.parametrize("name", ["mistral-v0.1", "gemma3", "gemma2", "llama3"])
def test_chunks_through_the_kernel_of_many_tokens(name, checkpoint, ours, monkeypatch):
    """Every chunk of more than 16 tokens, longer than the window or in the middle of a text."""
    from minillm import attention

    config = ours(name).config
    model = load_decoder(checkpoint(name), config, torch.float32, "cpu", attention="kernels")
    rows = [prompt_ids(n, seed=40 + n) for n in (45, 38)]
    oracle = load_decoder(checkpoint(name), config, torch.float32, "cpu", attention="math")
    calls = []

    def flash(*arguments, **keywords):
        calls.append(arguments[0].shape[2])
        return flash_attention(*arguments, **keywords)

    flash_attention = attention.flash_attention
    monkeypatch.setattr(attention, "flash_attention", flash)
    for started in ([0, 0], [0, 5]):
        ours_cache, their_cache = (StaticCache(config, 2, 64, max_step=20) for _ in range(2))
        calls.clear()
        for decoder, cache in ((model, ours_cache), (oracle, their_cache)):
            if any(started):
                ids, position = torch.tensor([[0] * 5, rows[1][:5]]), torch.tensor([[-1] * 5, [*range(5)]])
                decoder(ids, position, cache)
        rest = [row[start:] for row, start in zip(rows, started, strict=True)]
        logits = prefill(model, ours_cache, rest, started)
        torch.testing.assert_close(logits, prefill(oracle, their_cache, rest, started), **SAME)
        # Row by row: 45 tokens are 20, 20 and 5; 38 are 20 and 18; 33 are 20 and 13.
        chunks = [20, 20, 20, 18] if started == [0, 0] else [20, 20, 20]
        assert calls == [length for length in chunks for _ in config.layers]
