"""How many bytes a model will take, and where they go, before any weight is read or downloaded.

Three things fill the memory of a running decoder: the *weights*, the *KV cache*, which grows with batch
and context, and for a moment the *activations* of the widest step, a chunk of the prompt. The first two
are exact here (a test compares them with what is allocated), the third is an estimate of the peak.
Sizes are bytes; GB is 10^9 and GiB is 2^30.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from minillm.cache import MAX_STEP, num_slots
from minillm.checkpoint import empty_decoder
from minillm.config import ModelConfig
from minillm.errors import CheckpointError
from minillm.model import Decoder
from minillm.quantize import QuantizedLinear

# Sizes of memory people have, GiB: laptops and graphics cards.
MEMORY_SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 141, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one way of running a model."""

    weights: int
    cache_full: int  # keys and values of the layers that see everything
    cache_sliding: int  # and of those with a window
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.cache_full + self.cache_sliding + self.activations + self.logits

    @property
    def fits_in(self) -> int | None:
        """The smallest usual memory, in GiB, that holds it; None if none does."""
        return next((size for size in MEMORY_SIZES if self.total <= size * 2**30), None)


def estimate(
    config: ModelConfig,
    batch_size: int,
    context: int,
    dtype: torch.dtype,
    quantize: str | None = None,
    quantize_head: bool = False,
) -> Estimate:
    """What generating takes with `batch_size` rows of up to `context` tokens each."""
    full, sliding = cache_bytes(config, batch_size, context, dtype)
    activations, logits = activation_bytes(config, batch_size, context, dtype)
    model = empty_decoder(config, dtype, quantize=quantize, quantize_head=quantize_head)
    return Estimate(weight_bytes(model), full, sliding, activations, logits)


def weight_bytes(model: Decoder) -> int:
    """Bytes of all parameters and buffers; a tied head counts once. Works on an empty decoder too."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def parameter_count(model: Decoder) -> int:
    """Weights of the model as trained, whatever format holds them; a tied head counts once."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and not (module is model.head and model.config.tie_word_embeddings):
            count += module.in_features * module.out_features
    return count


def cache_bytes(config: ModelConfig, batch_size: int, context: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a StaticCache for this batch and context: (layers that see everything, sliding layers)."""
    per_slot = 2 * batch_size * config.num_kv_heads * config.head_dim * dtype.itemsize
    full = sliding = 0
    for layer in config.layers:
        size = per_slot * (num_slots(layer.window, context, min(MAX_STEP, context)) + 1)
        full, sliding = (full + size, sliding) if layer.window is None else (full, sliding + size)
    return full, sliding


def kv_values(layers: int, kv_heads: int, head_dim: int, tokens: int) -> int:
    """Numbers a plain cache holds for one row: a key and a value per layer, head, channel and token.

    With all heads sharing one key/value head (MQA, Shazeer 2019, arXiv:1911.02150) it is heads times less,
    with groups (GQA) something between: that is why they were invented.
    """
    return 2 * layers * kv_heads * head_dim * tokens


def score_bytes(heads: int, queries: int, keys: int, itemsize: int) -> int:
    """Bytes of one layer's attention scores if they are written out; fused attention never holds them."""
    return heads * queries * keys * itemsize


def activation_bytes(config: ModelConfig, batch_size: int, context: int, dtype: torch.dtype) -> tuple[int, int]:
    """The peak of a prefill chunk (at most MAX_STEP tokens a row) and of the logits after it: an estimate.

    At the widest point of a block the residual stream and its normed copy are held, and either the
    attention's queries, keys, values and mask or the MLP's gate, up and their product.
    """
    tokens = batch_size * min(MAX_STEP, context)
    heads, kv_heads, size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, dtype.itemsize
    stream = 2 * tokens * config.hidden_size * size
    # q, k, v; then q and k rotated; then q folded and the result, twice.
    projections = tokens * (heads + 2 * kv_heads + heads + kv_heads + 3 * heads) * size
    group = config.num_heads // config.num_kv_heads
    mask = tokens * context * (1 + group * (1 + size))  # bool, repeated for the group, and as numbers
    if any(layer.softcap is not None for layer in config.layers):
        mask += 3 * score_bytes(config.num_heads, tokens, context, 4)  # the math backend writes them out
    mlp = tokens * 4 * config.intermediate_size * size
    logits = batch_size * config.vocab_size * (4 + size)  # of the last token only, and in float32
    return stream + max(projections + mask, mlp), logits


def stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the tensors in a folder's safetensors files by dtype name, read from the headers alone."""
    sizes: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 (a file handle, not a dict)
                    header = handle.get_slice(name)
                    count = torch.Size(header.get_shape()).numel()
                    sizes[header.get_dtype()] = sizes.get(header.get_dtype(), 0) + count * _ITEMSIZE[header.get_dtype()]
        except Exception as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    return sizes


def hub_stored_bytes(name: str, revision: str | None = None, token: str | bool | None = None) -> dict[str, int]:
    """`stored_bytes` of a Hub id: only the headers travel."""
    from huggingface_hub import get_safetensors_metadata

    metadata = get_safetensors_metadata(name, revision=revision, token=token)
    return {dtype: count * _ITEMSIZE[dtype] for dtype, count in metadata.parameter_count.items()}


_ITEMSIZE = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1} | {
    "F8_E4M3": 1,
    "F8_E5M2": 1,
}


def format_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"
