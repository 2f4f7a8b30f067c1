"""What checkpoints call their tensors, and in which order the rows of their matrices stand.

Most files follow Llama's; a family's row says where its own differ (`Family.names`, `interleaved`, ...). What can be
put right once, while loading, costs the forward pass nothing: it knows one order.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minillm.config import ModelConfig
from minillm.load.families import FAMILIES

# Our modules, those of a block without its prefix, and what the file calls the rows of each, first to last. The suffix
# weight/bias is carried over; a module that a model does not have is passed over.
_LLAMA = {
    "embedding": "model.embed_tokens",
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
    "mlp.down": "mlp.down_proj",
}
_TOP = ("embedding", "norm", "head", "blocks.")


def file_names(config: ModelConfig) -> dict[str, list[str]]:
    """Path of each module of the decoder -> the names of its parts in the file."""
    names = _LLAMA | FAMILIES[config.family].names
    named = {module: names[module].split() for module in _TOP if module != "blocks."}
    for layer in range(config.num_layers):
        for module in [module for module in names if module not in _TOP]:
            parts = names[module].split()
            named[f"blocks.{layer}.{module}"] = [f"{names['blocks.']}{layer}.{part}" for part in parts]
    return named


def arrangement(config: ModelConfig, module: str, part: int) -> Callable[[Tensor], Tensor] | None:
    """What brings part number `part` of a module, its rows as `[rows]` or `[rows, inputs]`, into our order, or None.

    A checkpoint that `minillm quantize` wrote is in our order already.
    """
    family = FAMILIES[config.family]
    if config.quantization is not None or not module.endswith(".qkv"):
        return None
    if family.interleaved and part < 2:  # queries and keys
        return lambda rows: _halves(rows, config.head_dim, config.ropes[0].dim)
    return None


def _halves(rows: Tensor, head_dim: int, rotary_dim: int) -> Tensor:
    """Of files that rotate neighbouring channels: first the even ones, then the odd, as `rope.rotate` pairs them."""
    order = [*range(0, rotary_dim, 2), *range(1, rotary_dim, 2), *range(rotary_dim, head_dim)]
    return rows.unflatten(0, (-1, head_dim))[:, torch.tensor(order)].flatten(0, 1)
