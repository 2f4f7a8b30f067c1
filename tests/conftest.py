"""Fixtures shared by all rooms' tests: tiny checkpoints, made once per test session."""

import os

# Before huggingface_hub and transformers are imported: they read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test but test_hub's subprocesses may use the network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import ctypes
import functools
import platform
from pathlib import Path

import pytest
import tiny_tokenizers
import torch
from families import FAMILIES, load_reference, save_checkpoint, seed_of
from minillm_kernels import cpu
from minillm_kernels.cpu.build import cpu_name

from minillm.llm import LLM
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config

# The tiny models are all overhead: on a busy machine waking a second thread for each small
# operation makes the suite nine times slower (80 s against 9 s for test_families.py).
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(name) -> folder of a family's tiny checkpoint, saved by transformers; made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def make(name):
        return save_checkpoint(root / name, FAMILIES[name].config, seed_of(name))

    return make


@pytest.fixture(scope="session")
def reference(checkpoint):
    """reference(name) -> the transformers model loaded from that folder (eager, fp32); do not alter it."""
    return functools.cache(lambda name: load_reference(checkpoint(name)))


@pytest.fixture(scope="session")
def ours(checkpoint):
    """ours(name) -> our fp32 CPU decoder of that folder, read through its own config.json."""

    @functools.cache
    def load(name):
        return load_decoder(checkpoint(name), load_config(checkpoint(name)), torch.float32, "cpu")

    return load


@pytest.fixture(scope="session")
def text_tokenizer_files(tmp_path_factory):
    """The byte-level tokenizer of tiny_tokenizers.py (.folder, .vocabulary, .copy_to)."""
    return tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tokenizers") / "byte_level")


@pytest.fixture(scope="session")
def metaspace_files(tmp_path_factory):
    """The Llama-2-style tokenizer of tiny_tokenizers.py."""
    return tiny_tokenizers.metaspace(tmp_path_factory.mktemp("tokenizers") / "metaspace")


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory, text_tokenizer_files):
    """A checkpoint with a tokenizer and padded vocabulary: five embedding rows no token uses."""
    folder = tmp_path_factory.mktemp("text") / "llama"
    config = FAMILIES["llama2"].with_changes({"vocab_size": text_tokenizer_files.vocabulary + 5})
    save_checkpoint(folder, config, seed=11)
    text_tokenizer_files.copy_to(folder)
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}')
    return folder


@pytest.fixture(scope="session")
def llm(text_checkpoint):
    """Our LLM of `text_checkpoint`, fp32 on the CPU; do not alter it."""
    return LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def window_llm(tmp_path_factory, text_tokenizer_files):
    """Another family, fp32 on the CPU; do not alter it. Its window of 9 wraps within a dozen tokens, and without a
    padded vocabulary it has five tokens fewer than `llm`."""
    folder = tmp_path_factory.mktemp("window") / "mistral"
    config = FAMILIES["mistral-v0.1"].with_changes({"vocab_size": text_tokenizer_files.vocabulary})
    save_checkpoint(folder, config, seed=13)
    text_tokenizer_files.copy_to(folder)
    return LLM.from_pretrained(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def quantizable(tmp_path_factory, text_tokenizer_files):
    """A checkpoint with a tokenizer, all of whose matrices are whole groups of int4 wide."""
    folder = tmp_path_factory.mktemp("quantizable") / "llama"
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = FAMILIES["llama2"].with_changes(sizes | {"vocab_size": text_tokenizer_files.vocabulary})
    save_checkpoint(folder, config, seed=4)
    text_tokenizer_files.copy_to(folder)
    return folder


@pytest.fixture(scope="session")
def text_reference(text_checkpoint):
    """transformers' model of `text_checkpoint`."""
    return load_reference(text_checkpoint)


@pytest.fixture(autouse=True)
def judging_is_free(monkeypatch):
    """Drafts are made for the tiny models too: beside their steps judging costs so much that no draft would pay."""
    monkeypatch.setattr("minillm.speculative.drafting.JUDGING_BYTES", 0.0)


EMULATED = "AMX, emulated"
X86 = platform.machine() == "x86_64"
BUILDS = {  # $CC for each instruction set this machine can run
    "native": "cc",
    "plain C": "cc -DMINILLM_PLAIN_C",
    **({"AVX2": "cc -mno-avx512f", "AVX-512 without VNNI, BF16": "cc -mno-avx512vnni -mno-avx512bf16"} if X86 else {}),
    **(
        {EMULATED: f"cc -D__AMX_BF16__ -include {Path(__file__).parent / 'emulated_amx.h'}"}
        if "avx512_bf16" in cpu_name()
        else {}
    ),
}


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory):
    """One for all processes that run the tests: the second to ask for a build finds it."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kernels"


@pytest.fixture(params=BUILDS)
def any_build(request, build_folder, monkeypatch):
    """Each way of building the C in turn, then back to the one the rest of the process uses."""
    monkeypatch.setenv("CC", BUILDS[request.param])
    monkeypatch.setenv("XDG_CACHE_HOME", str(build_folder))
    cpu.library.cache_clear()
    assert cpu.available()
    if request.param == EMULATED:
        assert ctypes.c_int.in_dll(cpu.library(), "minillm_amx").value == 1
    yield request.param
    cpu.library.cache_clear()
