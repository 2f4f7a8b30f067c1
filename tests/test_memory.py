"""memory.py: what it predicts is what is allocated, and its arithmetic gives the published figures."""

import json
import subprocess
import sys

import pytest
import torch
from families import FAMILIES
from published_configs import PUBLISHED
from safetensors.torch import save_file

from minillm import StaticCache
from minillm.attention import KERNELS
from minillm.cli.parser import main
from minillm.errors import RequestError
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config, parse_config
from minillm.load.families import FAMILIES as ROWS
from minillm.measure.memory import (
    activation_bytes,
    cache_bytes,
    estimate,
    format_bytes,
    kv_values,
    model_sizes,
    parameter_count,
)
from minillm.model import empty_decoder

LLAMA2_70B = PUBLISHED["Llama-2-7b-hf"] | dict(
    hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
)


def allocated(model) -> int:
    """Bytes of distinct storages: what the process really holds for the weights."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("quantize, head", [(None, False), ("int8", False), ("int8", True)])
@pytest.mark.parametrize("name", FAMILIES)
def test_weights_are_exactly_what_is_allocated(name, quantize, head, checkpoint):
    config = load_config(checkpoint(name))
    predicted = empty_decoder(config, torch.bfloat16, quantize=quantize, quantize_head=head).weight_bytes
    model = load_decoder(checkpoint(name), config, torch.bfloat16, quantize=quantize, quantize_head=head)
    assert predicted == model.weight_bytes == allocated(model)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if not family.nested])
def test_parameters_are_counted_as_transformers_counts_them(name, checkpoint, reference):
    config = load_config(checkpoint(name))
    # OPT's file has two rows of positions that nobody reads, and that are not loaded.
    unread = ROWS[config.family].position_rows * config.hidden_size
    expected = sum(p.numel() for p in reference(name).parameters()) - unread
    assert parameter_count(empty_decoder(config, torch.float32)) == expected
    assert parameter_count(empty_decoder(config, torch.float32, quantize="int8", quantize_head=True)) == expected


@pytest.mark.parametrize("batch, context", [(1, 7), (3, 300), (2, 512)])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_is_exactly_what_is_allocated(name, batch, context, checkpoint):
    """As the design says: a slot per position and the bin, or a ring that holds a window and a step, and the bin."""
    config = load_config(checkpoint(name))
    slot = 2 * batch * config.num_kv_heads * config.head_dim * 2  # bytes: a key and a value in bfloat16
    slots = [min(context, layer.window + min(256, context) - 1 if layer.window else context) for layer in config.layers]
    full = sum(slot * (n + 1) for n, layer in zip(slots, config.layers, strict=True) if layer.window is None)
    sliding = sum(slot * (n + 1) for n, layer in zip(slots, config.layers, strict=True) if layer.window)
    assert cache_bytes(config, batch, context, torch.bfloat16) == (full, sliding)
    assert StaticCache(config, batch, context, dtype=torch.bfloat16).nbytes == full + sliding


def test_sliding_layers_stop_growing():
    config = parse_config(PUBLISHED["gemma-2-2b"])
    short, long = (cache_bytes(config, 1, context, torch.bfloat16) for context in (6000, 8000))
    assert short[0] * 8001 == long[0] * 6001  # full layers: one slot per token, and the bin
    assert short[1] == long[1] > 0


def test_published_figures():
    """Sizes people have printed for well-known models."""
    config = parse_config(LLAMA2_70B)
    assert empty_decoder(config, torch.bfloat16).weight_bytes / 1e9 == pytest.approx(140, rel=0.02)
    mistral = parse_config(PUBLISHED["Mistral-7B-v0.1"])
    bf16 = empty_decoder(mistral, torch.bfloat16).weight_bytes
    int8 = empty_decoder(mistral, torch.bfloat16, quantize="int8", quantize_head=True).weight_bytes
    assert bf16 / 2**30 == pytest.approx(13.5, abs=0.05)
    assert int8 / bf16 == pytest.approx(0.5, abs=0.01)
    # The guides' example: 40 layers, 48 heads of 128 channels, 16,000 tokens.
    assert kv_values(40, 48, 128, 16_000) == pytest.approx(7.86e9, rel=1e-3)
    assert kv_values(40, 48, 128, 16_000) == 48 * kv_values(40, 1, 128, 16_000)


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen3"])
def test_the_activation_estimate_brackets_the_measured_peak(name):
    """The profiler adds up what one prefill chunk allocates and frees; the estimate is within a third of its peak.

    Wide enough (hidden 256, 256 tokens) that tensors outweigh bookkeeping; a third because which temporaries
    overlap is the library's business.
    """
    wide = dict(hidden_size=256, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    config = parse_config(FAMILIES[name].config | wide)
    model = empty_decoder(config, torch.float32, KERNELS).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    cache = StaticCache(config, 1, 256)
    ids, position = torch.zeros(1, 256, dtype=torch.int64), torch.arange(256)[None]
    with torch.inference_mode():
        model(ids, position, cache)
        with torch.profiler.profile(profile_memory=True) as profile:
            model(ids, position, cache)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    predicted, _ = activation_bytes(config, 1, 256, torch.float32)
    assert 0.66 < predicted / peak < 1.5


def allocated_by(step) -> int:
    """The most bytes that are held at once while `step` runs, beyond what was held before."""
    with torch.inference_mode():
        step()
        with torch.profiler.profile(profile_memory=True) as profile:
            kept = step()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del kept
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_context_costs_no_more_than_a_short_one(dtype):
    """Neither scores nor masks are held, for 8,000 keys as for 256."""
    config = parse_config(FAMILIES["llama3"].config | dict(max_position_embeddings=8192))
    model = empty_decoder(config, dtype, KERNELS).to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    cache = StaticCache(config, 1, 8000, dtype=dtype)
    ids = torch.zeros(1, 256, dtype=torch.int64)
    with torch.inference_mode():
        for start in range(0, 7936, 256):
            model(ids, torch.arange(start, start + 256)[None], cache)
    late = allocated_by(lambda: model(ids[:, :64], torch.arange(7936, 8000)[None], cache))
    fresh = StaticCache(config, 1, 256, dtype=dtype)
    assert late < 1.01 * allocated_by(lambda: model(ids[:, :64], torch.arange(64)[None], fresh)) + 100_000
    assert activation_bytes(config, 1, 8000, dtype) == activation_bytes(config, 1, 256, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_held_in_the_models_dtype_and_in_float32(dtype):
    config = parse_config(FAMILIES["llama3"].config | dict(vocab_size=50_000, tie_word_embeddings=False))
    model = empty_decoder(config, dtype).to_empty(device="cpu")
    hidden = torch.zeros(3, config.hidden_size, dtype=dtype)
    predicted = activation_bytes(config, 3, 300, dtype)[1]
    held = allocated_by(lambda: model.logits(hidden))
    # In float32 the two are one tensor: the estimate is an upper bound there.
    assert held == pytest.approx(predicted if dtype != torch.float32 else predicted / 2, rel=0.01)


def test_totals_add_up_and_say_where_they_fit():
    config = parse_config(PUBLISHED["Llama-3.1-8B-Instruct"])
    one = estimate(config, 1, 4096, torch.bfloat16)
    assert one.total == one.weights + one.cache_full + one.cache_sliding + one.activations + one.logits
    assert one.fits_in == 16
    assert estimate(config, 1, 4096, torch.bfloat16, "int8").fits_in == 12
    assert estimate(config, 512, 131072, torch.bfloat16).fits_in is None


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1536, 13 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "13 GiB"]


def test_the_command_prints_a_table_json_and_a_plot(capsys, checkpoint, tmp_path):
    folder = str(checkpoint("mistral-v0.1"))
    assert main(["memory", folder, "--context", "300", "--batch", "2"]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines()[1:])) <= 80  # the first line names the folder
    assert "KV cache, sliding layers" in table
    plot = tmp_path / "memory.png"
    assert main(["memory", folder, "--context", "300", "--batch", "2", "--json", "--plot", str(plot)]) == 0
    answer = json.loads(capsys.readouterr().out)
    config = load_config(folder)
    assert answer["estimates"]["float32"]["cache_sliding"] == StaticCache(config, 2, 300).nbytes
    assert sum(answer["stored"].values()) == answer["estimates"]["float32"]["weights"]
    assert plot.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("arguments, told", [({"context": 10**6}, "positions"), ({"batch_size": 0}, "batch")])
def test_impossible_requests(arguments, told, checkpoint):
    folder = checkpoint("llama3")
    request = {"batch_size": 1, "context": None} | arguments
    with pytest.raises(RequestError, match=told):
        model_sizes(load_config(folder), torch.float32, name="x", stored={}, **request)


@pytest.mark.parametrize(
    ("padding", "dtype", "told"), [(2**22, "U8", "its header is too large"), (0, "F8_E8M0", "dtype 'F8_E8M0'")]
)
def test_files_no_checkpoint_has_are_one_clear_error(padding, dtype, told, checkpoint, tmp_path, capsys):
    """A header that could be read, but is larger than any that loading reads; numbers of a dtype nobody knows."""
    (tmp_path / "config.json").write_bytes((checkpoint("llama3") / "config.json").read_bytes())
    tensor = {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}
    header = json.dumps({"model.norm.weight": tensor}).encode() + b" " * padding
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert main(["memory", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert told in said.err


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    """A bf16 checkpoint of about 150 MB: large beside the noise of a process's memory."""
    folder = tmp_path_factory.mktemp("large")
    config = dict(
        model_type="llama", vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=5,
        num_attention_heads=8, num_key_value_heads=8, torch_dtype="bfloat16",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {"model.embed_tokens.weight": (4096, 1024), "lm_head.weight": (4096, 1024), "model.norm.weight": (1024,)}
    for i in range(5):
        layer = f"model.layers.{i}."
        tensors |= {f"{layer}self_attn.{x}_proj.weight": (1024, 1024) for x in "qkvo"}
        tensors |= {f"{layer}mlp.{x}_proj.weight": (2816, 1024) for x in ("gate", "up")}
        tensors |= {f"{layer}mlp.down_proj.weight": (1024, 2816)}
        tensors |= {f"{layer}{x}_layernorm.weight": (1024,) for x in ("input", "post_attention")}
    save_file(
        {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


PEAK = """
import re, sys, torch
from pathlib import Path
from minillm.load.config_json import load_config
from minillm.load.checkpoint import load_decoder
from minillm.linear import make_linear, parse_quantize
from minillm.load.quantize import fill_rows
folder, quantize = sys.argv[1], sys.argv[2] if sys.argv[2] != "none" else None
torch.set_num_threads(1)
# Not ru_maxrss: it begins with what the process that started this one held.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
# Code is paged in when it first runs: that is the interpreter's own, not the model's.
spec = parse_quantize(quantize)
fill_rows(make_linear(64, 64, False, spec, torch.bfloat16), 0, torch.randn(64, 64, dtype=torch.bfloat16))
config = load_config(folder)
before = peak()
model = load_decoder(folder, config, torch.bfloat16, quantize=quantize)
print(model.weight_bytes, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's peak memory from /proc")
@pytest.mark.parametrize("quantize", ["none", "int8", "int4-g64"])
def test_loading_never_holds_more_than_the_model_and_one_tensor(quantize, large_folder):
    """Peak memory of a process that loads, against the calculator: 10 % slack, one tensor, one mapped window.

    The window: pages of the source stay mapped for 16 MiB of reading before the file is reopened, and the
    tensor after them is mapped already when the old window goes.
    """
    largest, window = 4096 * 1024 * 2, 2**24
    answer = subprocess.run(
        [sys.executable, "-c", PEAK, large_folder, quantize], capture_output=True, text=True, check=True
    )
    weights, peak = map(int, answer.stdout.split())
    assert weights > 40e6
    assert peak < 1.1 * weights + 2 * largest + window
    full = (large_folder / "model.safetensors").stat().st_size
    assert quantize == "none" or peak < 0.95 * full + 0.1 * weights
