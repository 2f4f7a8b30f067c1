"""What checkpoints call their tensors, and in which order the rows of their matrices stand.

Most files follow Llama's; a family's row says where its own differ (`Family.names`, `interleaved`, ...). What can be
put right once, while loading, costs the forward pass nothing: it knows one order.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.load.families import FAMILIES

# Our modules, those of a block without its prefix, and what the file calls the rows of each, first to last. The suffix
# weight/bias is carried over; a module that a model does not have is passed over.
_LLAMA = {
    "embedding": "model.embed_tokens",
    "positions": "",
    "embedding_norm": "",
    "norm": "model.norm",
    "head": "lm_head",
    "blocks.": "model.layers.",
    "attention_norm": "input_layernorm",
    "attention.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_up": "mlp.gate_proj mlp.up_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_TOP = ("embedding", "positions", "embedding_norm", "norm", "head", "blocks.")
# Buffers that old files carry; they follow from config.json.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias)$")


@dataclass(frozen=True)
class Destination:
    """Where one tensor of the file goes: a slice of a tensor of one of the decoder's modules."""

    module: str
    tensor: str  # "weight", "bias", or a part of a quantized matrix
    dimension: int  # along which a fused matrix is put together
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype | None  # exactly this one; None: any float, converted on the way
    arrange: Callable[[Tensor], Tensor] | None  # what puts the file's rows in our order


def file_names(config: ModelConfig) -> dict[str, list[str]]:
    """Path of each module of the decoder -> the names of its parts in the file."""
    family = FAMILIES[config.family]
    names = _LLAMA | family.names | (family.separate_names if config.parallel == "separate" else {})
    named = {module: names[module].split() for module in _TOP if module != "blocks."}
    for layer in range(config.num_layers):
        for module in [module for module in names if module not in _TOP]:
            parts = names[module].split()
            named[f"blocks.{layer}.{module}"] = [f"{names['blocks.']}{layer}.{part}" for part in parts]
    return named


def plain_name(name: str, config: ModelConfig) -> str | None:
    """A tensor's name as in a text-only checkpoint, or None if it is none of the decoder's."""
    if _BUFFERS.search(name):
        return None
    if config.nested:
        # Two generations of names: language_model.model.x and model.language_model.x.
        name = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)
        name = name.removeprefix("language_model.")
        if not name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")):
            return None  # vision tower and projector
    prefix = (_LLAMA | FAMILIES[config.family].names)["blocks."].partition(".")[0] + "."
    # Files of a model without its head leave the prefix out; GPT-NeoX calls the head otherwise.
    name = re.sub(r"^embed_out\.", "lm_head.", name)
    return name if name.startswith((prefix, "lm_head.")) else prefix + name


def file_shape(config: ModelConfig, module: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of a part of a module that is `shape` here."""
    family = FAMILIES[config.family]
    if config.quantization is None and module == "positions":
        return (shape[0] + family.position_rows, *shape[1:])
    return shape[::-1] if is_transposed(config, module) else shape


def arrangement(config: ModelConfig, module: str, part: int) -> Callable[[Tensor], Tensor] | None:
    """What brings part number `part` of a module, its rows as `[rows]` or `[rows, inputs]`, into our order, or None.

    A checkpoint that `minillm quantize` wrote is in our order already.
    """
    family, queries_or_keys = FAMILIES[config.family], module.endswith(".qkv") and part < 2
    if config.quantization is not None:
        return None
    if module == "positions" and family.position_rows:
        return lambda rows: rows[family.position_rows :]
    if is_transposed(config, module):
        return lambda rows: rows.t().contiguous() if rows.dim() == 2 else rows
    if family.interleaved and queries_or_keys:
        return lambda rows: _halves(rows, config.head_dim, config.ropes[0].dim)
    if family.grouped and queries_or_keys:
        return lambda rows: _ungrouped(rows, config.num_kv_heads, config.head_dim)
    return None


def is_transposed(config: ModelConfig, module: str) -> bool:
    """Whether a file holds the module's matrix as [inputs, outputs]."""
    matrix = module.endswith((".qkv", ".output", ".up", ".down"))
    return FAMILIES[config.family].transposed and matrix and config.quantization is None


def _ungrouped(rows: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """All queries, then all keys, then all values, of files that put each key and value behind its G queries."""
    groups = rows.unflatten(0, (kv_heads, -1, head_dim))  # [KV, G + 2, D, ...]
    return torch.cat([part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])])


def _halves(rows: Tensor, head_dim: int, rotary_dim: int) -> Tensor:
    """Of files that rotate neighbouring channels: first the even ones, then the odd, as `rope.rotate` pairs them."""
    order = [*range(0, rotary_dim, 2), *range(1, rotary_dim, 2), *range(rotary_dim, head_dim)]
    return rows.unflatten(0, (-1, head_dim))[:, torch.tensor(order)].flatten(0, 1)
