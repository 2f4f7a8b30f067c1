"""Finding, checking and streaming weights: what loads, and what is refused before any weight is read."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, prompt_ids, save_checkpoint
from minillm_kernels import cpu
from safetensors.torch import load_file, save_file

from minillm.cache import StaticCache
from minillm.errors import BackendError, CheckpointError, TokenizerError
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.load.hub import find_checkpoint
from minillm.load.tokenizer import load_tokenizer

PROMPT = prompt_ids(12, seed=1)


def load(folder, dtype=torch.float32, **keywords):
    return load_decoder(folder, load_config(folder), dtype, "cpu", **keywords)


def logits(model):
    cache = StaticCache(model.config, 1, 16, dtype=model.embedding.weight.dtype)
    return model(torch.tensor([PROMPT]), torch.arange(len(PROMPT))[None], cache)[0]


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture
def rewritten(checkpoint, tmp_path):
    """rewritten(name, edit) -> a single-file copy of a checkpoint whose tensors went through edit(dict)."""

    def make(name, edit=lambda tensors: None):
        tensors = tensors_of(checkpoint(name))
        edit(tensors)
        folder = tmp_path / "rewritten"
        folder.mkdir()
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
        shutil.copy(checkpoint(name) / "config.json", folder)
        return folder

    return make


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A sharded copy to spoil."""

    def make(name):
        return Path(shutil.copytree(checkpoint(name), tmp_path / "copied"))

    return make


@pytest.mark.parametrize("name", ["llama3", "llama3.2", "gemma3-nested", "phi3", "olmo2", "llama-biased"])
def test_single_file_equals_shards(name, rewritten, ours):
    assert torch.equal(logits(load(rewritten(name))), logits(ours(name)))


def test_weights_are_frozen_and_in_eval_mode(ours):
    model = ours("llama3")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(("name", "tied"), [("llama3", False), ("llama3.2", True), ("gemma", True)])
def test_tying(name, tied, ours):
    model = ours(name)
    assert (model.head.weight.data_ptr() == model.embedding.weight.data_ptr()) == tied


def test_a_tied_file_with_a_head_of_its_own_is_refused(rewritten):
    """`transformers` would take the file's head, whatever config.json says: so somebody trained it."""

    def differ(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(rewritten("llama3.2", differ))


def test_a_tied_file_may_repeat_the_head(rewritten, ours):
    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert torch.equal(logits(load(rewritten("llama3.2", repeat))), logits(ours("llama3.2")))


def test_buffers_of_old_llama_files_are_ignored(rewritten, ours):
    def add(tensors):
        for layer in range(2):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    assert torch.equal(logits(load(rewritten("llama3", add))), logits(ours("llama3")))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_both_generations_of_nested_names(prefix, rewritten, ours):
    def rename(tensors):
        inner = {k: v for k, v in tensors.items() if "language_model" in k}
        assert inner
        for key, tensor in inner.items():
            del tensors[key]
            plain = key.split("language_model.")[1].removeprefix("model.")
            tensors[prefix + plain] = tensor

    assert torch.equal(logits(load(rewritten("gemma3-nested", rename))), logits(ours("gemma3-nested")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_converted_on_the_way(dtype, checkpoint, ours):
    model = load(checkpoint("llama3"), dtype)
    for (name, parameter), (_, exact) in zip(model.named_parameters(), ours("llama3").named_parameters(), strict=True):
        assert parameter.dtype == dtype
        assert torch.equal(parameter, exact.to(dtype)), name


# -- tensors that do not fit -------------------------------------------------------------------


def test_everything_wrong_is_listed_in_one_error(rewritten):
    def spoil(tensors):
        del tensors["model.layers.0.mlp.down_proj.weight"]
        del tensors["model.layers.1.self_attn.k_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(4)
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["surprise"] = torch.zeros(1)
        tensors["model.embed_tokens.weight"] = torch.zeros(130, 48)
        tensors["model.layers.1.self_attn.v_proj.weight"] = torch.zeros(48, 48, 1)

    with pytest.raises(CheckpointError) as caught:
        load(rewritten("llama3", spoil))
    message = str(caught.value)
    for name in (
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.7.mlp.up_proj.weight",
        "surprise",
    ):
        assert name in message
    assert "[130, 48]" in message
    assert "[131, 48]" in message
    assert "[48, 48, 1]" in message


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("gpt2", lambda name: name.removeprefix("transformer.")),
        ("opt", lambda name: name.removeprefix("model.")),
        ("gpt_neox", lambda name: name.replace("lm_head.", "embed_out.").removeprefix("gpt_neox.")),
    ],
)
def test_names_of_files_without_a_head_and_buffers_of_old_files(name, old, checkpoint, rewritten, ours):
    def rename(tensors):
        if name == "gpt2":
            tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
            tensors["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
        for key in list(tensors):
            tensors[old(key)] = tensors.pop(key)

    assert torch.equal(logits(load(rewritten(name, rename))), logits(ours(name)))


@pytest.mark.parametrize(("name", "width"), [("gpt2", "n_embd"), ("gpt_neox", "hidden_size")])
def test_int4_of_reordered_matrices_with_and_without_a_compiler(name, width, tmp_path, monkeypatch):
    changes = {width: 96, ("n_inner" if name == "gpt2" else "intermediate_size"): 128}
    folder = save_checkpoint(tmp_path / name, FAMILIES[name].with_changes(changes), seed=3)
    states = [load(folder, quantize="int4-g32").state_dict()]
    monkeypatch.setattr(cpu, "library", lambda: None)
    states.append(load(folder, quantize="int4-g32").state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_what_an_old_checkpoint_lacks_and_the_line_that_makes_it(checkpoint, tmp_path):
    folder = tmp_path / "models--owner--old" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    shutil.copy(checkpoint("gpt2") / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    line = r"pytorch_model.bin is pickle.*AutoModelForCausalLM.from_pretrained\('owner/old'\).save_pretrained"
    with pytest.raises(CheckpointError, match=line):
        load(folder)
    with pytest.raises(TokenizerError, match=r"tokenizer.json.*AutoTokenizer.from_pretrained\('owner/old'\).save_pret"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_missing_tensor_is_named(name, checkpoint, rewritten, tmp_path):
    """For every family, leave out one tensor of each kind (layer 0 and the ones outside layers)."""
    kinds = [k for k in tensors_of(checkpoint(name)) if ".layers." not in k or ".layers.0." in k]
    kinds = [k for k in kinds if not re.search("vision|visual|projector", k)]
    assert len(kinds) >= 8
    for index, kind in enumerate(kinds):
        folder = rewritten(name, lambda tensors, kind=kind: tensors.pop(kind))
        plain = kind.replace("language_model.", "").removeprefix("model.").replace("embed_out", "lm_head")
        with pytest.raises(CheckpointError, match=plain.replace(".", r"\.")):
            load(folder)
        folder.rename(tmp_path / f"{index}")


def test_errors_come_before_any_weight_is_read(rewritten, monkeypatch):
    import minillm.load.checkpoint as room

    def never(*args):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(room, "stream_tensors", never)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(rewritten("llama3", lambda tensors: tensors.pop("model.norm.weight")))


def test_biases_the_config_does_not_know_are_unexpected(checkpoint, tmp_path):
    """A config that forgot attention_bias must not drop the biases of the file in silence."""
    folder = Path(shutil.copytree(checkpoint("llama-biased"), tmp_path / "copy"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"attention_bias": False}))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
        load(folder)


def test_integers_where_floats_belong_are_refused(rewritten):
    def spoil(tensors):
        tensors["model.norm.weight"] = torch.ones(48, dtype=torch.int8)
        tensors["model.layers.0.mlp.down_proj.weight"] = tensors["model.layers.0.mlp.down_proj.weight"].to(torch.uint8)
        tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].double()

    with pytest.raises(CheckpointError) as caught:
        load(rewritten("llama3", spoil))
    for said in (
        "norm.weight is I8",
        "0.mlp.down_proj.weight is U8",
        "1.mlp.down_proj.weight is F64",
        "F32, BF16 or F16",
    ):
        assert said in str(caught.value)


def test_a_very_long_list_of_problems_is_cut(rewritten):
    folder = rewritten("llama3", lambda tensors: tensors.update({f"extra{i}": torch.zeros(1) for i in range(5000)}))
    with pytest.raises(CheckpointError, match="and 4980 more") as caught:
        load(folder)
    assert len(str(caught.value)) < 2000


# -- values that cannot be right ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_found_and_named(dtype, wrong, rewritten):
    name = "model.layers.1.self_attn.k_proj.weight"

    def spoil(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)
        tensors[name][-1, -1] = wrong

    folder = rewritten("llama3", spoil)
    for keywords in ({}, {"quantize": "int8"}):
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + ".*NaN or infinity.*check_finite"):
            load(folder, **keywords)
    weight = load(folder, check_finite=False).blocks[1].attention.qkv.weight
    assert (~weight.isfinite()).sum() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_finite_weights_are_no_error(dtype, rewritten):
    """Their sum would be infinite."""

    def spoil(tensors):
        tensors["model.norm.weight"] = torch.full((48,), torch.finfo(dtype).max, dtype=dtype)

    assert load(rewritten("llama3", spoil), dtype).norm.weight.isfinite().all()


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_the_hosts_defaults_change_nothing(quantize, checkpoint):
    """Default dtype, default device, grad mode: loading is its own master of all of them."""

    def state():
        return load(checkpoint("gemma"), torch.bfloat16, quantize=quantize, quantize_head=bool(quantize)).state_dict()

    expected, scale = state(), load(checkpoint("gemma")).embedding_scale
    for dtype in (torch.float16, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = state()
            assert load(checkpoint("gemma")).embedding_scale == scale
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(found[key].dtype == expected[key].dtype for key in expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    for context in (torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            found = state()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_tied_head_in_int8_gives_the_logits_of_the_dense_one(checkpoint, ours):
    """The copy that a quantized head has of a tied embedding must be filled: off by a rounding, not by everything."""
    for name in ("llama3.2", "gemma"):
        quantized = load(checkpoint(name), quantize_head=True)
        assert quantized.config.tie_word_embeddings
        dense, found = logits(ours(name)), logits(quantized)
        assert (found - dense).abs().max() < 0.05 * dense.std()


def test_gemmas_embedding_scale_is_rounded_to_the_dtype(checkpoint):
    """sqrt(48) is 6.9282; trained in bfloat16, the model has seen 6.9375."""
    assert (
        load(checkpoint("gemma"), torch.bfloat16).embedding_scale == torch.tensor(48**0.5).bfloat16().item() == 6.9375
    )
    assert load(checkpoint("gemma")).embedding_scale == torch.tensor(48**0.5).item()
    assert load(checkpoint("llama3"), torch.bfloat16).embedding_scale == 1.0


# -- files that are not opened -----------------------------------------------------------------


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/inside.safetensors",
        "..\\outside.safetensors",
        "pytorch_model.bin",
        "evil.safetensors.bin",
        ".",
        "",
        7,
        None,
    ],
)
def test_only_bare_shard_names_are_opened(shard, copied, tmp_path):
    folder = copied("llama3")
    (tmp_path / "outside.safetensors").write_bytes((next(folder.glob("model-*.safetensors"))).read_bytes())
    (folder / "sub").mkdir()
    (folder / "sub" / "inside.safetensors").write_bytes(b"")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(folder)


class Bomb:
    """Unpickling this would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_pickle_is_never_opened(copied, tmp_path):
    folder, trace = copied("llama3"), tmp_path / "opened"
    for name in ("pytorch_model.bin", "model.pt", "consolidated.00.pth"):
        with open(folder / name, "wb") as file:
            pickle.dump(Bomb(trace), file)
    load(folder)  # beside safetensors they are not even looked at
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*pickle"):
        load(folder)
    # Neither under a safetensors name: that is a format error, not an invitation to guess.
    shutil.copy(folder / "pytorch_model.bin", folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="safetensors"):
        load(folder)
    assert not trace.exists()
    with open(folder / "pytorch_model.bin", "rb") as file:
        pickle.load(file)
    assert trace.exists()  # the bomb was live


def test_damaged_files(copied):
    folder = copied("llama3")
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("model-*.safetensors"))

    kept = shards[1].read_bytes()
    shards[1].write_bytes(kept[: len(kept) // 2])  # an interrupted download
    with pytest.raises(CheckpointError, match=shards[1].name):
        load(folder)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        load(folder)
    shards[1].write_bytes(kept)
    load(folder)

    listed = json.dumps({"weight_map": {"model.norm.weight": ["model.safetensors"]}})
    for content in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "{}", "[" * 10**5, " " * 2**23, listed):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            load(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)
    (folder / "model.safetensors").write_bytes((2**27).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*header is too large"):
        load(folder)


def test_an_index_that_points_to_the_wrong_shard(copied):
    folder = copied("llama3")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = next(s for s in index["weight_map"].values() if s != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = other
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load(folder)


# -- finding -----------------------------------------------------------------------------------


def test_find_a_folder(checkpoint, tmp_path, monkeypatch):
    assert find_checkpoint(checkpoint("llama3")) == checkpoint("llama3")
    assert find_checkpoint(str(checkpoint("llama3"))) == checkpoint("llama3")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert find_checkpoint("~/model") == tmp_path / "model"


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "no such name", "", "C:\\models"])
def test_find_nothing(name):
    with pytest.raises(CheckpointError, match="folder"):
        find_checkpoint(name)


def test_find_a_file_is_an_error(checkpoint):
    with pytest.raises(CheckpointError, match="folder"):
        find_checkpoint(checkpoint("llama3") / "config.json")


def test_a_hub_id_that_is_not_cached_offline(tmp_path):
    with pytest.raises(CheckpointError, match="tiny/absent"):
        find_checkpoint("tiny/absent", local_files_only=True)


def test_unknown_backend_and_device(checkpoint):
    with pytest.raises(BackendError, match="warp"):
        load(checkpoint("llama3"), attention="warp")
    config = load_config(checkpoint("llama3"))
    for device in ("cuda:99", "bogus"):
        with pytest.raises(BackendError, match=device):
            load_decoder(checkpoint("llama3"), config, torch.float32, device)


# -- memory --------------------------------------------------------------------------------------

MEASURE = """
import sys, threading, torch
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config

def anonymous():  # bytes of memory that is not the mapped file
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

warm_up, folder = sys.argv[1:]
load_decoder(warm_up, load_config(warm_up), torch.bfloat16)
before, peak, done = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
model = load_decoder(folder, load_config(folder), torch.bfloat16)
done.set()
watcher.join()
print(max(peak, anonymous()) - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_needs_the_finished_model_plus_one_tensor(checkpoint, tmp_path):
    """A float32 file loaded as bfloat16: never the whole in full precision, which would be three times as much."""
    config = FAMILIES["llama2"].with_changes(
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8,
         "num_key_value_heads": 8, "head_dim": 64}
    )  # fmt: skip
    folder = save_checkpoint(tmp_path / "big", config, seed=1, max_shard_size="40MB")
    largest = max(tensor.nbytes for tensor in tensors_of(folder).values())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, checkpoint("llama3"), folder],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    peak, model = map(int, done.stdout.split())
    assert model > 40 * 2**20
    # Above: one tensor in full precision and its copy, and what the allocator keeps (a few MB). Below:
    # the measurement sees the model at all (memory freed by the warm-up may be used again).
    assert 0.8 * model < peak < model + 2 * largest + 8 * 2**20
