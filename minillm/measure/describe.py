"""What a checkpoint is made of, and one forward pass through it, step by step.

For readers: `minillm inspect MODEL` prints `facts`, and with `--trace TEXT` also `trace`.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.cache import StaticCache
from minillm.config import ModelConfig, RopeSpec
from minillm.llm import LLM
from minillm.measure.memory import format_bytes, parameter_count, weight_bytes
from minillm.model import NoNorm, empty_decoder


def facts(
    config: ModelConfig, dtype: torch.dtype, quantize: str | None = None, quantize_head: bool = False
) -> list[tuple[str, str]]:
    """(name, value) pairs that say how the config was understood; no weights are read."""
    model = empty_decoder(config, dtype, quantize=quantize, quantize_head=quantize_head)
    embedding = model.embedding.weight.numel()
    held_as = quantize or config.quantization or str(dtype).removeprefix("torch.")
    kv_bytes = 2 * config.num_kv_heads * config.head_dim * dtype.itemsize  # one position of one layer
    group = config.num_heads // config.num_kv_heads
    sharing = "MHA" if group == 1 else "MQA" if config.num_kv_heads == 1 else f"GQA, {group} queries per key"
    rows = [
        ("family", config.family),
        ("layers", str(config.num_layers)),
        ("hidden size", str(config.hidden_size)),
        ("heads", f"{config.num_heads} query, {config.num_kv_heads} key/value of {config.head_dim} ({sharing})"),
        ("MLP", f"{config.intermediate_size} wide, {config.activation}"),
        (
            "vocabulary",
            f"{config.vocab_size}, head {'tied to' if config.tie_word_embeddings else 'apart from'} embedding",
        ),
        ("positions", str(config.max_positions)),
        ("attention", _windows(config)),
        *((f"RoPE {_rope_name(config, i)}".rstrip(), _rope(spec)) for i, spec in enumerate(config.ropes)),
        ("norms", _norms(config)),
        ("biases", _biases(config)),
    ]
    caps = {layer.softcap for layer in config.layers} - {None}
    if caps or config.final_softcap:
        rows.append(("softcaps", f"scores {', '.join(f'{cap:g}' for cap in caps)}; logits {config.final_softcap:g}"))
    if config.embedding_scale != 1.0:
        rows.append(("embedding scale", f"{config.embedding_scale:g}"))
    rows += [
        ("EOS ids", ", ".join(map(str, config.eos_token_ids)) or "none"),
        ("parameters", f"{parameter_count(model):,} ({embedding:,} of them embedding)"),
        (
            "weights",
            f"{format_bytes(weight_bytes(model))} in {held_as}",
        ),
        ("KV cache", f"{format_bytes(kv_bytes * config.num_layers)} per token (full layers)"),
    ]
    return rows


def _windows(config: ModelConfig) -> str:
    counts = Counter(layer.window for layer in config.layers)
    return ", ".join(
        f"{count} layer{'s' * (count > 1)} {'see everything' if window is None else f'slide over {window}'}"
        for window, count in counts.items()
    )


def _rope_name(config: ModelConfig, index: int) -> str:
    return "" if len(config.ropes) == 1 else ("full layers", "sliding layers")[index]


def _rope(spec: RopeSpec) -> str:
    text = f"base {spec.theta:g}, {spec.dim} channels"
    return text if spec.kind == "default" else f"{text}, {spec.kind} x{spec.factor:g} over {spec.original_length}"


def _norms(config: ModelConfig) -> str:
    places = [name for name, there in (("before", config.pre_norm), ("after", config.post_norm)) if there]
    text = f"RMSNorm {' and '.join(places)} attention and MLP, eps {config.norm.eps:g}"
    extra = {None: "", "head": ", on each q/k head", "full": ", on the whole q/k projection"}[config.qk_norm]
    return text + extra + (", weight + 1" if config.norm.offset else "")


def _biases(config: ModelConfig) -> str:
    there = {"q, k, v": config.qkv_bias, "attention output": config.output_bias, "MLP": config.mlp_bias}
    return ", ".join(name for name, present in there.items() if present) or "none"


@dataclass(frozen=True)
class Step:
    """One operation of a traced forward pass."""

    name: str  # the module, as a path in the decoder
    shape: tuple[int, ...]  # of its result
    dtype: torch.dtype
    milliseconds: float


@dataclass(frozen=True)
class Trace:
    tokens: list[str]  # the text, as the model sees it
    steps: list[Step]
    candidates: list[tuple[str, float]]  # the likeliest next tokens and their probabilities


# The modules worth showing, by the last part of their name.
_SHOWN = """
    embedding attention_norm qkv q_norm k_norm output attention_post_norm mlp_norm gate_up down mlp_post_norm norm head
""".split()


@torch.inference_mode()
def trace(llm: LLM, text: str) -> Trace:
    """Run one forward pass over `text` and record what every operation returned and how long it took.

    Times are of this one pass, eager, on a warmed-up model; they show proportions, not a benchmark.
    """
    ids = llm.tokenizer.encode(text)
    model, device = llm.model, llm.device
    input_ids = torch.tensor([ids], device=device)  # [1, T]
    position = torch.arange(len(ids), device=device)[None]  # [1, T]

    def forward() -> Tensor:
        cache = StaticCache(llm.config, 1, len(ids), device=device, dtype=llm.dtype, max_step=len(ids))
        return model(input_ids, position, cache)

    forward()  # the first pass pays for start-up
    steps: list[Step] = []
    undo = []
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in _SHOWN and not isinstance(module, NoNorm):
            undo += _watch(name, module, steps)
        if name.endswith(".attention"):
            undo.append(_watch_attend(f"{name}.attend", module, steps))
    try:
        logits = forward()[0, -1]  # [V]
    finally:
        for action in undo:
            action()
    top = logits.softmax(dim=-1).topk(min(5, logits.shape[-1]))
    candidates = [
        (llm.tokenizer.decode([i], skip_special_tokens=False), p)
        for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]
    return Trace([llm.tokenizer.decode([i], skip_special_tokens=False) for i in ids], steps, candidates)


def _watch(name: str, module: torch.nn.Module, steps: list[Step]) -> list[Callable]:
    """Hook a module so that each call appends a Step; returns how to take the hooks off again."""
    started = []

    def before(module, inputs):
        started.append(time.perf_counter())

    def after(module, inputs, result):
        steps.append(_step(name, result, started.pop()))

    return [module.register_forward_pre_hook(before).remove, module.register_forward_hook(after).remove]


def _watch_attend(name: str, attention: torch.nn.Module, steps: list[Step]) -> Callable:
    backend = attention.backend

    def attend(*arguments):
        started = time.perf_counter()
        result = backend.attend(*arguments)
        steps.append(_step(name, result, started))
        return result

    attention.backend = dataclasses.replace(backend, attend=attend)
    return lambda: setattr(attention, "backend", backend)


def _step(name: str, result: Tensor, started: float) -> Step:
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return Step(name, tuple(result.shape), result.dtype, (time.perf_counter() - started) * 1e3)
