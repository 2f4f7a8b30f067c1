"""A decoder written as its family's files have it: what was read comes back, and transformers reads it too."""

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, load_reference, prompt_ids, reference_logits
from safetensors.torch import load_file, save_file

from minillm.cache import StaticCache
from minillm.errors import CheckpointError
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.load.writing import copy_small_files, new_folder, write_decoder


def read_raw(folder):
    return json.loads((folder / "config.json").read_text())


def all_tensors(folder):
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def load(folder, dtype=torch.float32, **options):
    return load_decoder(folder, load_config(folder), dtype, **options)


def scrambled(model, seed=0):
    """Other weights, so that nothing passes that was only carried over from the source."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_read_is_written_bit_for_bit(name, checkpoint, tmp_path):
    """Every tensor of the source comes back under its name, in its shape and order: fused, transposed, grouped,
    interleaved, tied, nested, with what stands beside the decoder."""
    source = checkpoint(name)
    write_decoder(load(source), tmp_path, read_raw(source), torch.float32, source)
    before, after = all_tensors(source), all_tensors(tmp_path)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert load_config(tmp_path) == load_config(source)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_what_we_wrote(name, checkpoint, tmp_path):
    """Changed weights, written beside the source's files: its own logits of them are ours."""
    source = checkpoint(name)
    model = scrambled(load(source))
    write_decoder(model, tmp_path, read_raw(source), torch.float32, source)
    again = load(tmp_path)
    for (name_, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name_
    ids = prompt_ids(12, seed=1)
    plain = reference_logits(load_reference(source), ids)
    written = reference_logits(load_reference(tmp_path), ids)
    assert (written - plain).abs().max() > 1e-2
    logits = again(torch.tensor([ids]), torch.arange(12)[None], StaticCache(again.config, 1, 16))[0]
    # As `test_families.py`, whose weights are smaller: relative to the largest logit here.
    assert (logits - written).abs().max() < 1e-5 * max(10.0, float(written.abs().max()))


@pytest.mark.parametrize("name", [name for name in FAMILIES if not FAMILIES[name].nested])
def test_a_decoder_without_a_source(name, checkpoint, tmp_path):
    """As after training from nothing: names of a text-only file, which transformers finds complete."""
    source = checkpoint(name)
    model = scrambled(load(source))
    write_decoder(model, tmp_path, read_raw(source), torch.float32)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["config.json", "model.safetensors"]
    for (name_, ours), theirs in zip(model.named_parameters(), load(tmp_path).parameters(), strict=True):
        assert torch.equal(ours, theirs), name_
    import transformers

    model_class = getattr(transformers, read_raw(source)["architectures"][0])
    _, said = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert not said["mismatched_keys"]


def test_dtype_shards_and_small_files(quantizable, tmp_path, monkeypatch):
    monkeypatch.setattr("minillm.load.writing._SHARD_BYTES", 20_000)
    model = load(quantizable)
    with new_folder(tmp_path / "out") as folder:
        copy_small_files(quantizable, folder)
        write_decoder(model, folder, read_raw(quantizable) | {"torch_dtype": "float32"}, torch.bfloat16, quantizable)
    out = tmp_path / "out"
    shards = set(json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 3
    assert {path.name for path in out.glob("*.safetensors")} == shards
    assert read_raw(out)["dtype"] == read_raw(out)["torch_dtype"] == "bfloat16"
    assert (out / "tokenizer.json").read_bytes() == (quantizable / "tokenizer.json").read_bytes()
    rounded = load(out)
    for (name, ours), theirs in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(ours.bfloat16().float(), theirs), name


def test_a_repeated_head_is_the_new_embedding(checkpoint, tmp_path):
    """Some tied files repeat the embedding; left as it was, it would contradict the new one, and be refused."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = all_tensors(checkpoint("llama3.2"))
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, source / "model.safetensors")
    raw = read_raw(checkpoint("llama3.2"))
    (source / "config.json").write_text(json.dumps(raw))
    model = scrambled(load(source))
    (tmp_path / "out").mkdir()
    write_decoder(model, tmp_path / "out", raw, torch.float32, source)
    assert torch.equal(all_tensors(tmp_path / "out")["lm_head.weight"], model.embedding.weight)
    load(tmp_path / "out")


def test_what_cannot_be_written(quantizable, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="quantized weights cannot be written"):
        write_decoder(load(quantizable, quantize="int8"), tmp_path, {}, torch.float32)
    nested = next(name for name in FAMILIES if FAMILIES[name].nested)
    with pytest.raises(CheckpointError, match="text_config"):
        write_decoder(load(checkpoint(nested)), tmp_path, {}, torch.float32)
    with pytest.raises(CheckpointError, match="missing"):  # another model's folder
        write_decoder(load(checkpoint("llama3")), tmp_path, {}, torch.float32, Path(checkpoint("gpt2")))
    assert not list(tmp_path.iterdir())
