"""torch.compile: how often, with what result, and what is left for the next process."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, prompt_ids, save_checkpoint, seed_of
from torch._dynamo.utils import counters

from minillm import LLM, StaticCache, decode_one_token
from minillm.decode import prefill
from minillm.errors import BackendError
from minillm.faster import compiled
from minillm.faster.steps import Steps
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config

SAME = dict(rtol=0.0, atol=2e-5)  # against ourselves, see test_cache.py


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch, tmp_path):
    """Nothing of another test, and nothing in the user's folder."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def trace_only(monkeypatch):
    """What compiles again is decided by tracing; leaving out C++ makes these tests ten times faster."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def save(folder, name, text_tokenizer_files):
    save_checkpoint(folder, FAMILIES[name].config, seed_of(name))
    text_tokenizer_files.copy_to(folder)
    return folder


@pytest.mark.parametrize("name", ["llama3", "mistral-v0.1", "gemma3"])
def test_no_request_compiles_anything_twice(name, trace_only, tmp_path, text_tokenizer_files):
    """30 prompt lengths, caches of all sizes, rows that end at different times, every way of sampling."""
    llm = LLM.from_pretrained(save(tmp_path, name, text_tokenizer_files), dtype="float32", device="cpu", compile=True)
    assert graphs() == len(llm.steps.compiled.compilations) == 2
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 90, (30,), generator=generator).tolist()
    for n, length in enumerate(lengths):
        options = [
            dict(temperature=0),
            dict(temperature=0.3 + n / 10),
            dict(top_k=2 + n, seed=n),
            dict(top_p=0.5 + n / 100, min_p=0.01),
            dict(temperature=1.1, repetition_penalty=1.0 + n / 10),
            dict(prompt_lookup_num_tokens=1 + n % 5),
        ][n % 6]
        cache = StaticCache(llm.config, 1, length + 30 + n) if n % 3 == 0 else None
        llm.generate(prompt_ids(length, seed=n), cache=cache, max_new_tokens=2 + n % 7, **options)
    assert graphs() == 2

    ends = set()
    for rows in (2, 3, 4, 5):  # 3 and 4 are also numbers of heads
        prompts = [prompt_ids(length, seed=length) for length in lengths[rows : 2 * rows]]
        alone = [llm.generate(ids, temperature=0, max_new_tokens=9, eos_token_id=[]) for ids in prompts]
        eos = [alone[0].token_ids[2], alone[1].token_ids[5]]
        together = llm.generate(prompts, temperature=0, max_new_tokens=9, eos_token_id=eos)
        ends |= {tuple(len(one.token_ids) for one in together)}
    assert any(len(set(lengths)) > 1 for lengths in ends)  # rows did end at different times
    assert graphs() == len(llm.steps.compiled.compilations) == 3  # each prompt is fed by itself
    llm.generate([prompt_ids(9), prompt_ids(12)], prompt_lookup_num_tokens=3, temperature=0, max_new_tokens=9)
    assert graphs() == len(llm.steps.compiled.compilations) == 4


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_compiled_steps_agree_with_the_decoder(name, checkpoint, capfd):
    """With the real compiler: prefill, single tokens, a verify step; then an unfinished row among several."""
    model = load_decoder(checkpoint(name), load_config(checkpoint(name)), torch.float32, "cpu", attention="math")
    steps = Steps(model, compile=True)
    ids, more = prompt_ids(21, seed=1), torch.tensor([prompt_ids(4, seed=2)])
    caches = [StaticCache(model.config, 1, 40) for _ in range(2)]
    results = [[], []]
    for run, cache, result in zip((model, steps), caches, results, strict=True):
        with torch.inference_mode():
            result.append(prefill(run, cache, [ids], [0]))
            result.append(run(torch.tensor([[7]]), torch.tensor([[21]]), cache))
            result.append(run(more, torch.arange(22, 26)[None], cache))
            result.append(run(torch.tensor([[9]]), torch.tensor([[26]]), cache))
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, **SAME)
    assert caches[0].token_ids == caches[1].token_ids
    said = capfd.readouterr().err.splitlines()
    assert [line.split(" ...")[0] for line in said if line.startswith("minillm:")] == [
        "minillm: compiling the decoder for one row, several tokens",
        "minillm: compiling the decoder for one row, one token",
    ]


def test_a_loop_of_ones_own_compiles(ours, trace_only):
    """The guides' advanced example: compile decode_one_token, two prompts of different length."""
    model = ours("llama3")
    prompts = [prompt_ids(5, seed=1), prompt_ids(11, seed=2)]
    texts = []
    for step in (decode_one_token, torch.compile(decode_one_token, fullgraph=True)):
        cache = StaticCache(model.config, 2, 32)
        token = prefill(model, cache, prompts, [0, 0]).argmax(-1, keepdim=True)  # [2, 1]
        position, new = torch.tensor([[5], [11]]), [token]
        for _ in range(8):
            new.append(token := step(model, token, position, cache))
            position = position + 1
        texts.append(torch.cat(new, dim=1).tolist())
    assert texts[0] == texts[1]
    assert graphs() == 1


def test_a_compiler_that_fails_is_one_clear_error(ours, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    steps = Steps(ours("llama3"), compile=True)
    with pytest.raises(BackendError, match=r"no C\+\+ compiler.*use compile='auto'"):
        steps.compiled.warm_up()
    assert steps.compiled.compilations == []


# -- artifacts ---------------------------------------------------------------------------------------

PROGRAM = """
import sys
from minillm import LLM
llm = LLM.from_pretrained(sys.argv[1], dtype="float32", device="cpu", compile=True)
print(llm.generate([5, 6, 7], max_new_tokens=4, temperature=0, eos_token_id=[]).token_ids)
from torch._dynamo.utils import counters
print(counters["inductor"]["fxgraph_cache_miss"], counters["inductor"]["fxgraph_cache_hit"])
"""


def test_the_second_process_finds_what_the_first_compiled(tmp_path, text_tokenizer_files):
    folder = save(tmp_path / "model", "llama3", text_tokenizer_files)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    outputs = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(folder)], env=environment, capture_output=True, text=True, check=True
        )
        assert "compiling the decoder for one row, one token ..." in run.stderr
        outputs.append(run.stdout.splitlines())
    assert outputs[0][0] == outputs[1][0]
    assert [line[1] for line in outputs] == ["2 0", "0 2"]
    # As a process leaves them that is killed while it compiles.
    ours = tmp_path / "cache" / "minillm" / "compiled"
    libraries = [*ours.rglob("*.so")]
    assert libraries
    for library in libraries:
        library.write_bytes(b"")
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], env=environment, capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("minillm.errors.BackendError: torch.compile failed: ")
    assert last.endswith(f"if files in {ours} are damaged, remove that folder and try again, or use compile='auto'")


def folder_used() -> str | None:
    with compiled.artifact_folder():
        return os.environ.get("TORCHINDUCTOR_CACHE_DIR")


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert folder_used() is None


def test_a_folder_the_user_chose_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert folder_used() == str(tmp_path / "mine") == os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert not (tmp_path / "cache").exists()  # and none is made that nobody will use
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert folder_used() == str(tmp_path / "cache" / "minillm" / "compiled")
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
