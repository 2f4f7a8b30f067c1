"""Two thousand broken checkpoints: a MinillmError or a model, never anything else, in a second and 200 MB each.

What is put in place of a value is chosen for what it has broken before: other types, numbers at the edges, depth, text
that is none. The cases are the same in every run.
"""

import contextlib
import copy
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_configs import PUBLISHED

from minillm.errors import MinillmError
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import generation_defaults, load_config, parse_config
from minillm.load.tokenizer import load_tokenizer
from minillm.model import empty_decoder
from minillm.rope import attention_scale, inverse_frequencies

CONFIGS = list(PUBLISHED.values()) + [family.config for family in FAMILIES.values()]
NUMBERS = [0, 1, -1, 2, 3, 2**31, 2**63, 10**400, 0.5, 1.0, 1e-45, 1e39, 1e308, float("inf"), float("nan"), 1e5]
ODD = st.one_of(
    st.sampled_from([None, True, False, "", "x", "\ud800", "\x00", [], {}, [1], [[]], {"a": 1}, "x" * 6000, *NUMBERS]),
    st.recursive(st.sampled_from([None, 1, "full_attention"]), lambda x: st.lists(x, max_size=4), max_leaves=40),
    st.integers(),
    st.text(max_size=9),
).map(copy.deepcopy)  # they are changed later
# What else a key of a config may hold: every value that some config has somewhere.
WORDS = st.sampled_from(
    ["linear", "yarn", "longrope", "dynamic", "llama3", "gelu", "silu", "minillm", "int8", "gemma2"]
)
DULL = {"vocab", "merges"}  # thousands of places that are all alike
LONG = [
    b"[" * 10**5,
    b'{"a":' * 10**5,
    b" " * 2**23,
    b"9" * 10**5,
    b'{"a": ' + b"9" * 10**5 + b"}",
    b'"' + b"x" * 10**6,
]


@contextlib.contextmanager
def bounded():
    """The only error that may pass is ours, in one line, within a second and 200 MB."""
    started, before = time.thread_time(), resident()
    try:
        yield
    except MinillmError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 1000
    assert time.thread_time() - started < 3  # a second on a quiet machine
    assert resident() - before < 200 * 2**20


def resident() -> int:
    if sys.platform != "linux":
        return 0
    with open("/proc/self/statm") as status:
        return int(status.read().split()[1]) * 4096


def places(value, path=()):
    """The paths to all values inside a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*path, key))


@st.composite
def spoiled(draw, originals):
    """One of these JSON values with up to three values replaced, removed or added."""
    value = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(
            st.sampled_from([path for path in places(value) if path and not DULL & {*path[:-1]}] or [("x",)])
        )
        inside = value
        for key in path:
            inside = inside[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"])):
            case "replace":
                inside[last] = draw(st.one_of(ODD, WORDS))
            case "remove":
                inside.pop(last, None) if isinstance(inside, dict) else inside.pop(last)
            case "add" if isinstance(inside, dict):
                inside[draw(st.one_of(st.sampled_from(KEYS), st.text(max_size=5)))] = draw(st.one_of(ODD, WORDS))
    return value


KEYS = sorted({key for config in CONFIGS for path in places(config) for key in path if isinstance(key, str)})


@st.composite
def damaged(draw, content: bytes):
    """These bytes cut, with some overwritten, or others altogether."""
    spoil = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(spoil) - 1, 0)))
        match draw(st.sampled_from(["cut", "overwrite", "overwrite", "insert", "other"])):
            case "cut":
                del spoil[at:]
            case "overwrite":
                some = draw(st.binary(min_size=1, max_size=4))
                spoil[at : at + len(some)] = some
            case "insert":
                spoil[at:at] = draw(st.sampled_from([b"[" * 2000, b"{", b'"', b"\\ud800", b"1e999", b"\xff", b"\x00"]))
            case "other":
                spoil = bytearray(draw(st.sampled_from(LONG)))
    return bytes(spoil)


def cases(count):
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=[*quiet])


@given(raw=spoiled(CONFIGS))
@cases(900)
def test_values_of_a_config(raw):
    with bounded():
        config = parse_config(raw)
        for spec in config.ropes:
            assert inverse_frequencies(spec, config.max_positions).isfinite().all()
            attention_scale(spec)
        if config.quantization is None and config.num_layers < 20:
            empty_decoder(config, torch.float32)


@given(data=st.data())
@cases(250)
def test_bytes_of_config_and_generation_config(data, tmp_path):
    config = parse_config(FAMILIES["llama2"].config)
    (tmp_path / "config.json").write_bytes(data.draw(damaged(json.dumps(FAMILIES["llama2"].config).encode())))
    defaults = {"eos_token_id": [1, 2], "temperature": 0.7, "top_k": 5, "do_sample": True}
    if data.draw(st.booleans()):
        content = json.dumps(data.draw(spoiled([defaults]))).encode()
    else:
        content = data.draw(damaged(json.dumps(defaults).encode()))
    (tmp_path / "generation_config.json").write_bytes(content)
    with bounded():
        load_config(tmp_path)
    with bounded():
        generation_defaults(tmp_path, config, None)


@pytest.fixture(scope="module")
def folder(checkpoint, tmp_path_factory):
    return Path(shutil.copytree(checkpoint("llama2"), tmp_path_factory.mktemp("fuzz") / "llama2"))


@given(data=st.data())
@cases(250)
def test_index(data, folder):
    path = folder / "model.safetensors.index.json"
    path.with_suffix(".kept").exists() or shutil.copy(path, path.with_suffix(".kept"))
    content = path.with_suffix(".kept").read_bytes()
    if data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(spoiled([json.loads(content)]))))
    else:
        path.write_bytes(data.draw(damaged(content)))
    with bounded():
        load_decoder(folder, load_config(folder), torch.float32)
    shutil.copy(path.with_suffix(".kept"), path)


@given(data=st.data())
@cases(300)
def test_safetensors_header(data, folder):
    path = sorted(folder.glob("model-*.safetensors"))[0]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    match data.draw(st.sampled_from(["values", "header", "file", "length"])):
        case "values":
            header = json.dumps(data.draw(spoiled([json.loads(header)]))).encode()
            content = len(header).to_bytes(8, "little") + header + rest
        case "header":
            header = data.draw(damaged(header))
            content = len(header).to_bytes(8, "little") + header + rest
        case "file":
            content = data.draw(damaged(content))
        case "length":
            length = data.draw(st.sampled_from([0, 1, 7, length - 1, length + 1, 2**22, 2**31, 2**63, 2**64 - 1]))
            content = length.to_bytes(8, "little") + content[8:]
    kept = path.read_bytes()
    try:
        path.write_bytes(content)
        with bounded():
            load_decoder(folder, load_config(folder), torch.float32)
    finally:
        path.write_bytes(kept)


@given(data=st.data())
@cases(300)
def test_tokenizer_files(data, text_tokenizer_files, metaspace_files, tmp_path):
    source = data.draw(st.sampled_from([text_tokenizer_files, metaspace_files])).folder
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    path = tmp_path / data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "tokenizer_config.json"]))
    if data.draw(st.booleans()):
        path.write_text(json.dumps(data.draw(spoiled([json.loads(path.read_bytes())]))))
    else:
        path.write_bytes(data.draw(damaged(path.read_bytes())))
    with bounded():
        tokenizer = load_tokenizer(tmp_path)
        ids = tokenizer.encode("The wolf 🚀 said <s>")
        tokenizer.decode(ids)
        tokenizer.bos_token_id, tokenizer.eos_token_id  # noqa: B018 (looked up)
        tokenizer.encode_chat([{"role": "user", "content": "Hello"}])
