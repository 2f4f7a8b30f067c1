"""A quantized copy loads to the bits of quantizing while loading, or leaves nothing behind."""

import functools
import json
import os
import shutil
import stat
import sys
import threading
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_checkpoint
from safetensors.torch import load_file, save_file

from minillm.errors import CheckpointError
from minillm.load import quantized_copy, writing
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.load.quantized_copy import quantize_checkpoint


def state(folder, **keywords):
    return load_decoder(folder, load_config(folder), torch.bfloat16, **keywords).state_dict()


@pytest.fixture(scope="module")
def whole_groups(tmp_path_factory):
    """whole_groups(tied) -> a float32 checkpoint whose matrices can be cut into groups of 32."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}

    @functools.cache
    def make(tied):
        changes = sizes | {"num_key_value_heads": 2, "tie_word_embeddings": tied}
        return save_checkpoint(tmp_path_factory.mktemp("groups") / "llama", FAMILIES["llama2"].with_changes(changes), 3)

    return make


def everything_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("quantize", ["int8", "int4-g32"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_a_copy_loads_to_the_bits_of_quantizing_while_loading(quantize, tied, head, whole_groups, tmp_path):
    """Also in bfloat16, from a float32 file: what is quantized is what the file holds, not what it was rounded to."""
    quantize_checkpoint(whole_groups(tied), tmp_path / "new" / "copy", quantize, head)
    found = state(tmp_path / "new" / "copy")
    expected = state(whole_groups(tied), quantize=quantize, quantize_head=head)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]


REORDERED = "phi3 glm4 ernie4_5-biased granite4 mistral3 gpt2 gpt_bigcode opt gpt_neox falcon-40b cohere2-biased phi"
REORDERED += " bloom mpt"


@pytest.mark.parametrize("name", REORDERED.split())
def test_a_copy_is_in_our_order_whatever_the_order_of_its_source(name, checkpoint, tmp_path):
    quantize_checkpoint(checkpoint(name), tmp_path / "copy", "int8")
    expected, found = state(checkpoint(name), quantize="int8"), state(tmp_path / "copy")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_the_copy_has_the_usual_permissions(checkpoint, tmp_path):
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").write_text("")
    quantize_checkpoint(checkpoint("llama3"), tmp_path / "copy", "int8")
    assert stat.S_IMODE((tmp_path / "copy").stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    for path in (tmp_path / "copy").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "usual" / "file").stat().st_mode), path


def test_an_empty_folder_is_filled_and_a_neighbour_is_left_alone(checkpoint, tmp_path):
    for name in ("copy", "copy.partial", "copy.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "copy.partial" / "precious").write_text("mine")
    quantize_checkpoint(checkpoint("llama3"), tmp_path / "copy", "int8")
    state(tmp_path / "copy")
    assert (tmp_path / "copy.partial" / "precious").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "copy.partial", "copy.tmp"]


def test_a_name_of_250_characters(checkpoint, tmp_path):
    quantize_checkpoint(checkpoint("llama3"), tmp_path / ("n" * 250), "int8")
    state(tmp_path / ("n" * 250))


@pytest.mark.parametrize(
    "where", [".", "", "full", "link", "dangling", "file", "file/child", "n" * 300, "~", "copy/../full"]
)
def test_places_that_cannot_be_written_are_one_error_and_left_alone(where, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "~").write_text("")
    before = everything_in(tmp_path)
    for start in (tmp_path, tmp_path / "empty"):
        monkeypatch.chdir(start)
        target = where if where in (".", "") else str(tmp_path / where)
        with pytest.raises(CheckpointError) as caught:
            quantize_checkpoint(checkpoint("llama3"), target, "int8")
        assert os.path.basename(os.path.abspath(target)) in str(caught.value)
        assert everything_in(tmp_path) == before


@pytest.mark.parametrize("what", ["save_file", "shutil.copy", "Path.rename", "KeyboardInterrupt", "weights"])
def test_a_failure_on_the_way_leaves_nothing_behind(what, checkpoint, tmp_path, monkeypatch):
    source = Path(shutil.copytree(checkpoint("llama3"), tmp_path / "source"))
    error = KeyboardInterrupt if what == "KeyboardInterrupt" else CheckpointError
    full = KeyboardInterrupt() if what == "KeyboardInterrupt" else OSError(28, "No space left on device")

    def fail(*args, **keywords):
        raise full

    if what in ("save_file", "KeyboardInterrupt"):
        monkeypatch.setattr(writing, "save_file", fail)
    elif what == "shutil.copy":
        monkeypatch.setattr(writing.shutil, "copy", fail)
    elif what == "Path.rename":
        monkeypatch.setattr(Path, "rename", fail)
    else:
        next(source.glob("model-*1-of*.safetensors")).unlink()
    before = everything_in(tmp_path)
    with pytest.raises(error):
        quantize_checkpoint(source, tmp_path / "copy", "int8")
    assert everything_in(tmp_path) == before


def test_two_runs_to_one_place_do_not_collide(checkpoint, tmp_path, monkeypatch):
    """Both write; the first to finish wins, the other says so, and what stands there is whole."""
    both_write, plain = threading.Barrier(2, timeout=60), quantized_copy._write

    def write(*args):
        both_write.wait()
        plain(*args)
        both_write.wait()

    monkeypatch.setattr(quantized_copy, "_write", write)
    errors = []

    def run():
        try:
            quantize_checkpoint(checkpoint("llama3"), tmp_path / "copy", "int8")
        except CheckpointError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 1
    assert "copy cannot be written" in errors[0]
    state(tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_errors_name_the_tensor(whole_groups, tmp_path):
    source = Path(shutil.copytree(whole_groups(False), tmp_path / "source"))
    name = "model.layers.1.mlp.down_proj.weight"
    shard = source / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    for wrong, message in ((float("inf"), "infinity"), (3e37, "too far apart")):
        tensors[name][0, 0] = wrong
        save_file(tensors, shard)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + ".*" + message):
            quantize_checkpoint(source, tmp_path / "copy", "int4-g32")
