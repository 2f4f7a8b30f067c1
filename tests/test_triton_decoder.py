"""A whole decoder on the Triton kernels, run by Triton's interpreter, against the math backend.

The kernels have tests of their own (test_kernels_*.py); here is what those cannot show: that the decoder hands
them the right things. Every family, a prompt in two chunks (the second one does not start at position 0, so
both attention kernels are used), rows of different length, decode steps past the wrap of small windows.
"""

import collections
import json
import os
import subprocess
import sys

import pytest
import torch
from families import FAMILIES, save_checkpoint

from minillm.decode import prefill
from minillm.errors import BackendError
from minillm.load.backends import BACKENDS, choose_backend
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import parse_config

STEPS = """
import json, sys
import torch
from minillm.cache import StaticCache
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.decode import prefill

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
for folder in sys.argv[1:]:
    chunk, rest = (17, 1) if folder.endswith("+") else (6, 5)  # above 16 tokens another kernel attends
    folder = folder.rstrip("+")
    config = load_config(folder)
    prompts = [torch.randint(4, config.vocab_size, (n,), generator=generator).tolist() for n in (chunk + rest, 5)]
    logits = {}
    for attention in ("math", "kernels"):
        model = load_decoder(folder, config, torch.float32, attention=attention)
        with torch.inference_mode():
            cache = StaticCache(config, 2, chunk + rest + 5, max_step=chunk)
            steps = [prefill(model, cache, prompts, [0, 0])]
            position = torch.tensor([[chunk + rest], [5]])
            for i in range(2):
                token = torch.tensor([[7 + i], [9 + i]])
                steps.append(model(token, position + i, cache)[:, -1])
            # one row is finished: padding must disturb nobody
            steps.append(model(token, torch.tensor([[chunk + rest + 2], [-1]]), cache)[:1, -1].expand(2, -1))
        logits[attention] = torch.stack(steps)
    difference = (logits["math"] - logits["kernels"]).abs().max().item()
    print(json.dumps({"difference": difference, "spread": logits["math"].std().item()}))
"""


# What the kernels do differently for each: the interpreter takes two seconds for a family.
INTERPRETED = "llama3 mistral-v0.1 qwen3 gemma2 gemma3 phi3 olmo2 smollm3 granite-biased glm4 arcee gpt2 gpt_bigcode"
INTERPRETED += " falcon-7b phi cohere2 bloom mpt"
LONG = ("gemma2",)  # read in a longer chunk: windows, a full layer, a softcap


def run(folders: list[str], interpret: bool) -> list[dict]:
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, "-c", STEPS, *folders]
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


@pytest.mark.parametrize("interpret", [True, False], ids=["interpreted kernels", "PyTorch code of the ops"])
def test_every_family_gives_the_math_backends_logits(interpret, checkpoint):
    """Both compute in float32 and differ in the order of sums only; the parity tests' 1e-4 is ample for that."""
    if interpret:
        pytest.importorskip("triton", reason="Triton's interpreter needs Triton: Linux on x86-64")
    served = [name for name in FAMILIES if can_serve("kernels", FAMILIES[name].config)]
    assert len(served) == len(FAMILIES)
    served = INTERPRETED.split() if interpret else served
    folders = [f"{checkpoint(name)}{'+' * (name in LONG)}" for name in served]
    results = dict(zip(served, run(folders, interpret), strict=True))
    assert all(result["spread"] > 0.5 for result in results.values())
    assert {name: result for name, result in results.items() if not result["difference"] < 1e-4} == {}


def can_serve(attention: str, config: dict) -> bool:
    try:
        choose_backend(attention, parse_config(config))
    except BackendError:
        return False
    return True


def test_what_a_backend_lacks_is_said_by_name():
    wide = parse_config(FAMILIES["llama2"].config | {"head_dim": 288})
    with pytest.raises(BackendError, match=r"'kernels'.*256.*llama.*288.*'auto'"):
        choose_backend("kernels", wide)
    with pytest.raises(BackendError, match=r"'sdpa'.*softcap.*gemma2"):
        choose_backend("sdpa", parse_config(FAMILIES["gemma2"].config))
    with pytest.raises(BackendError, match="flesh"):
        choose_backend("flesh", wide)
    assert choose_backend("auto", wide) is BACKENDS["sdpa"]
    gemma = parse_config(FAMILIES["gemma"].config | {"head_dim": 256})  # the widest that there is
    assert choose_backend("kernels", gemma) is choose_backend("auto", gemma, "cuda") is BACKENDS["kernels"]
    assert choose_backend("auto", wide, "cuda") is BACKENDS["sdpa"]


def counting(name: str, op, calls: dict[str, int]):
    def call(*arguments, **keywords):
        calls[name] = calls.get(name, 0) + 1
        return op(*arguments, **keywords)

    return call


def test_the_decoder_calls_the_kernels(checkpoint, ours, monkeypatch):
    """attention="kernels" must not quietly be something else: count the calls of each op."""
    from minillm import attention
    from minillm.cache import StaticCache

    config = ours("llama3").config
    decoder = load_decoder(checkpoint("llama3"), config, torch.float32, attention="kernels")
    calls = {}
    for module, name in [
        (attention, "flash_attention"),
        (attention, "decode_attention"),
        (attention, "rms_norm"),
        (attention, "add_rms_norm"),
        (attention, "rope_and_cache_write"),
    ]:
        monkeypatch.setattr(module, name, counting(name, getattr(module, name), calls))
    cache = StaticCache(config, 1, 32)
    with torch.inference_mode():
        prefill(decoder, cache, [[*range(5, 22)]], [0])
        decoder(torch.tensor([[8]]), torch.tensor([[17]]), cache)
    layers = config.num_layers
    assert calls == {
        "flash_attention": layers,
        "decode_attention": layers,
        "rope_and_cache_write": 2 * layers,
        "add_rms_norm": 2 * 2 * layers,  # each sublayer's output is added by the norm that follows
        "rms_norm": 2,  # nothing stands before the first
    }


QUANTIZED_STEPS = """
import json, sys
import torch
from minillm_kernels import launch
from minillm_kernels.gpu import int4_linear, int8_linear
from minillm.cache import StaticCache
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.decode import prefill
from minillm.linear import Int4Linear, Int8Linear, Linear
from minillm_kernels.int4_linear import dequantize_int4

torch.set_num_threads(1)
folder, word = sys.argv[1:]
config = load_config(folder)
launched = {}

def counting(kernel, *arguments, **keywords):
    launched[kernel] = launched.get(kernel, 0) + 1
    return launch.choose(kernel, *arguments, **keywords)

int8_linear.choose = int4_linear.choose = counting

def dense(layer):
    weight = (layer.weight.float() * layer.scale[:, None] if isinstance(layer, Int8Linear)
              else dequantize_int4(layer.packed, layer.scale, layer.zero, layer.group_size))
    exact = Linear(*reversed(weight.shape), layer.bias is not None, torch.float32)
    exact.weight.data, exact.bias = weight, layer.bias
    return exact

logits = {}
for attention in ("kernels", "math"):
    model = load_decoder(folder, config, torch.float32, attention=attention, quantize=word, quantize_head=True)
    if attention == "math":
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, (Int8Linear, Int4Linear)):
                    setattr(module, name, dense(child))
    with torch.inference_mode():
        cache = StaticCache(config, 1, 16, max_step=6)
        steps = [prefill(model, cache, [[5, 6, 7, 8]], [0])]
        steps.append(model(torch.tensor([[9]]), torch.tensor([[4]]), cache)[:, -1])
    logits[attention] = torch.stack(steps)
difference = (logits["math"] - logits["kernels"]).abs().max().item()
print(json.dumps({"difference": difference, "spread": logits["math"].std().item(), "launched": launched}))
"""


@pytest.mark.parametrize(
    ("word", "kernels"), [("int8", ("gemv", "few_rows")), ("int4-g32", ("int4_gemv", "int4_few_rows"))]
)
def test_a_quantized_decoder_reaches_the_kernels(word, kernels, tmp_path):
    """Against the same weights widened to float32, which the interpreter's kernels multiply exactly: what differs is
    the order of float32 sums, as in the test of the families."""
    pytest.importorskip("triton", reason="Triton's interpreter needs Triton: Linux on x86-64")
    sizes = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    save_checkpoint(tmp_path, FAMILIES["llama2"].with_changes(sizes), seed=3)
    command = [sys.executable, "-c", QUANTIZED_STEPS, str(tmp_path), word]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    layers = parse_config(FAMILIES["llama2"].config).num_layers
    # qkv, output, gate and up, down of every layer, once for the prompt's four rows and once for one; the head, always
    # in int8, has one row in both.
    one_row, few_rows = kernels
    expected = collections.Counter({few_rows: 4 * layers, one_row: 4 * layers}) + collections.Counter(gemv=2)
    assert result["launched"] == expected
    assert result["spread"] > 0.1
    assert result["difference"] < 1e-4
