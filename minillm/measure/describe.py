"""What a checkpoint is made of, and one forward pass through it, operation by operation.

For readers: `minillm inspect MODEL` prints `facts`, and with `--trace TEXT` also `trace`.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minillm.cache import StaticCache
from minillm.config import ModelConfig, RopeSpec
from minillm.errors import RequestError
from minillm.llm import LLM
from minillm.measure.memory import format_bytes, kv_values, parameter_count
from minillm.model import Norm, empty_decoder


def facts(
    config: ModelConfig, dtype: torch.dtype, quantize: str | None = None, quantize_head: bool = False
) -> list[tuple[str, str]]:
    """(name, value) pairs that say how the config was understood; no weights are read."""
    model = empty_decoder(config, dtype, quantize=quantize, quantize_head=quantize_head)
    embedding = model.embedding.weight.numel()
    held_as = quantize or config.quantization or str(dtype).removeprefix("torch.")
    kv_bytes = kv_values(config.num_layers, config.num_kv_heads, config.head_dim, 1) * dtype.itemsize  # of a token
    group = config.num_heads // config.num_kv_heads
    sharing = "MHA" if group == 1 else "MQA" if config.num_kv_heads == 1 else f"GQA, {group} queries per key"
    tied = "tied to" if config.tie_word_embeddings else "apart from"
    biases = {"q, k, v": config.qkv_bias, "attention output": config.output_bias, "MLP": config.mlp_bias}
    windows = [
        f"{count} layer{'s' * (count > 1)} {'see everything' if window is None else f'slide over {window}'}"
        for window, count in Counter(layer.window for layer in config.layers).items()
    ]
    ropes = [spec for spec in config.ropes if spec.kind != "none"]
    alibi = bool(config.alibi_slopes)
    still = sum(config.ropes[layer.rope].kind == "none" for layer in config.layers)
    names = ["RoPE"] if len(ropes) < 2 else ["RoPE full layers", "RoPE sliding layers"]
    rows = [
        ("family", config.family),
        ("layers", str(config.num_layers)),
        ("hidden size", str(config.hidden_size)),
        ("heads", f"{config.num_heads} query, {config.num_kv_heads} key/value of {config.head_dim} ({sharing})"),
        ("MLP", f"{config.intermediate_size} wide, {config.activation}{'' if config.gated else ', no gate'}"),
        ("vocabulary", f"{config.vocab_size}, head {tied} embedding"),
        ("positions", f"{config.max_positions}{', learned' * config.learned_positions}{', ALiBi' * alibi}"),
        ("attention", ", ".join(windows)),
        *zip(names, map(_rope, ropes), strict=False),
        *([("no RoPE", f"{still} of {config.num_layers} layers")] if still else []),
        ("norms", _norms(config)),
        ("biases", ", ".join(name for name, there in biases.items() if there) or "none"),
    ]
    caps = {f"scores {layer.softcap:g}" for layer in config.layers if layer.softcap is not None}
    if config.final_softcap is not None:
        caps.add(f"logits {config.final_softcap:g}")
    if caps:
        rows.append(("softcaps", ", ".join(sorted(caps, reverse=True))))
    if config.embedding_scale != 1.0:
        rows.append(("embedding scale", f"{config.embedding_scale:g}"))
    rows += [
        ("EOS ids", ", ".join(map(str, config.eos_token_ids)) or "none"),
        ("parameters", f"{parameter_count(model):,} ({embedding:,} of them embedding)"),
        ("weights", f"{format_bytes(model.weight_bytes)} in {held_as}"),
        ("KV cache", f"{format_bytes(kv_bytes)} per token (full layers)"),
    ]
    return rows


def _rope(spec: RopeSpec) -> str:
    text = f"base {spec.theta:g}, {spec.dim} channels"
    return text if spec.kind == "default" else f"{text}, {spec.kind} x{spec.factor:g} over {spec.original_length}"


def _norms(config: ModelConfig) -> str:
    places = [name for name, there in (("before", config.pre_norm), ("after", config.post_norm)) if there]
    kind = "LayerNorm" if config.norm.center else "RMSNorm"
    text = f"{kind} {' and '.join(places)} attention and MLP, eps {config.norm.eps:g}"
    extra = {None: "", "head": ", on each q/k head", "full": ", on the whole q/k projection"}[config.qk_norm]
    extra += {None: "", "shared": ", one for both", "separate": ", both of the same stream"}[config.parallel]
    return text + extra + (", weight + 1" if config.norm.offset else "")


@dataclass(frozen=True)
class Operation:
    """One operation of a traced forward pass."""

    name: str  # the module, as a path in the decoder
    shape: tuple[int, ...]  # of its result
    dtype: torch.dtype
    milliseconds: float


@dataclass(frozen=True)
class Trace:
    """One forward pass, from the text to what may follow it."""

    tokens: list[str]  # the text, as the model sees it
    operations: list[Operation]
    candidates: list[tuple[str, float]]  # the likeliest next tokens and their probabilities

    def as_text(self) -> str:
        lines = [f"{len(self.tokens)} tokens: {' | '.join(map(repr, self.tokens))}", ""]
        lines.append(f"{'operation':<38}{'result':<20}{'dtype':<10}{'ms':>8}")
        for one in self.operations:
            dtype = str(one.dtype).removeprefix("torch.")
            lines.append(f"{one.name:<38}{list(one.shape)!s:<20}{dtype:<10}{one.milliseconds:>8.3f}")
        candidates = ", ".join(f"{text!r} {p:.1%}" for text, p in self.candidates)
        return "\n".join([*lines, "", f"likeliest next tokens: {candidates}"])


# The modules worth showing, by the last part of their name.
_SHOWN = """
    embedding attention_norm qkv q_norm k_norm output attention_post_norm mlp_norm gate_up up down mlp_post_norm norm
    head
""".split()


@torch.inference_mode()
def trace(llm: LLM, text: str) -> Trace:
    """Run one forward pass over `text` and note what every operation returned and how long it took.

    Times are of this one pass, eager, on a warmed-up model; they show proportions, not a benchmark.
    Raises `RequestError` for a text that gives no token, or more than the model has positions.
    """
    ids = llm.tokenizer.encode(text)
    if not 1 <= len(ids) <= llm.config.max_positions:
        raise RequestError(f"a trace takes 1 to {llm.config.max_positions} tokens, and this text has {len(ids)}")
    model, device = llm.model, llm.device
    input_ids = torch.tensor([ids], device=device)  # [1, T]
    position = torch.arange(len(ids), device=device)[None]  # [1, T]

    def forward() -> Tensor:
        cache = StaticCache(llm.config, 1, len(ids), device=device, dtype=llm.dtype, max_step=len(ids))
        return model(input_ids, position, cache)

    forward()  # the first pass pays for start-up
    operations: list[Operation] = []

    def timed(name: str, function: Callable) -> Callable:
        def run(*arguments):
            started = time.perf_counter()
            result = function(*arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            milliseconds = (time.perf_counter() - started) * 1e3
            first = result[0] if isinstance(result, tuple) else result
            operations.append(Operation(name, tuple(first.shape), first.dtype, milliseconds))
            return result

        return run

    with ExitStack() as undo:
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] in _SHOWN and not (isinstance(module, Norm) and module.weight is None):
                for method in {"forward", "add", "gated"} & set(dir(module)):
                    setattr(module, method, timed(name, getattr(module, method)))
                    undo.callback(delattr, module, method)
            if name.endswith(".attention"):
                undo.callback(setattr, module, "backend", module.backend)
                parts = ("rotate_and_write", "attend")
                replaced = {part: timed(f"{name}.{part}", getattr(module.backend, part)) for part in parts}
                module.backend = dataclasses.replace(module.backend, **replaced)
        logits = forward()[0, -1]  # [V]
    top = logits.softmax(dim=-1).topk(min(5, logits.shape[-1]))
    read = partial(llm.tokenizer.decode, skip_special_tokens=False)
    candidates = [(read([i]), p) for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
    return Trace([read([i]) for i in ids], operations, candidates)
