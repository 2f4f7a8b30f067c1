"""How many bytes a model will take, and where they go, before any weight is read or downloaded.

Three things fill the memory of a running decoder: the *weights*, the *KV cache*, which grows with batch
and context, and for a moment the *activations* of the widest step, a chunk of the prompt. The first two
are exact here (a test compares them with what is allocated), the third is an estimate of the peak.
Sizes are bytes; GB is 10^9 and GiB is 2^30.
"""

from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch

from minillm.cache import MAX_STEP, StaticCache
from minillm.config import ModelConfig
from minillm.errors import CheckpointError, RequestError, shown
from minillm.linear import QuantizedLinear
from minillm.measure.plot import picture
from minillm.model import Decoder, empty_decoder
from minillm.parallel import ALONE, Ranks

# Sizes of memory people have, GiB: laptops and graphics cards.
MEMORY_SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 141, 192, 256, 384, 512, 768, 1024)
# The rows of the table: an estimate's fields, and what they come to.
_ROWS = "weights|KV cache, full layers|KV cache, sliding layers|activations (estimate)|logits|total|fits in".split("|")


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
        return sum(astuple(self))

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
    max_step: int = MAX_STEP,
    ranks: Ranks = ALONE,
) -> Estimate:
    """What generating takes with `batch_size` rows of up to `context` tokens each, read `max_step` at a time.

    Of several ranks that share the model it is what one takes; no other takes more than the first.
    """
    model = empty_decoder(config, dtype, quantize=quantize, quantize_head=quantize_head, ranks=ranks)
    config = model.config
    full, sliding = cache_bytes(config, batch_size, context, dtype, max_step)
    activations, logits = activation_bytes(config, batch_size, context, dtype, max_step)
    return Estimate(model.weight_bytes, full, sliding, activations, logits)


def parameter_count(model: Decoder) -> int:
    """Weights of the model as trained, whatever format holds them; a tied head counts once."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and not (module is model.head and model.config.tie_word_embeddings):
            count += module.in_features * module.out_features
    return count


def cache_bytes(
    config: ModelConfig, batch_size: int, context: int, dtype: torch.dtype, max_step: int = MAX_STEP
) -> tuple[int, int]:
    """Bytes of a StaticCache for this batch and context: (layers that see everything, sliding layers)."""
    row = StaticCache(config, 1, context, "meta", dtype, max_step)
    sliding = sum(2 * keys.nbytes for keys, layer in zip(row.keys, config.layers, strict=True) if layer.window)
    return batch_size * (row.nbytes - sliding), batch_size * sliding


def kv_values(layers: int, kv_heads: int, head_dim: int, tokens: int) -> int:
    """Numbers a plain cache holds for one row: a key and a value per layer, head, channel and token.

    With all heads sharing one key/value head (MQA, Shazeer 2019, arXiv:1911.02150) it is heads times less,
    with groups (GQA) something between: that is why they were invented.
    """
    return 2 * layers * kv_heads * head_dim * tokens


def activation_bytes(
    config: ModelConfig, batch_size: int, context: int, dtype: torch.dtype, max_step: int = MAX_STEP
) -> tuple[int, int]:
    """The peak of a prefill chunk (at most `max_step` tokens a row) and of the logits after it: an estimate.

    At the widest point of a block the residual stream and its normed copy are held, and either the attention's
    queries, keys, values and result or the MLP's gate, up and their product. Scores are never written out by this
    project's kernels; `attention="math"` holds `heads * tokens * context` of them in float32, and like "sdpa" a mask.
    """
    tokens = batch_size * min(max_step, context)
    heads, kv_heads, size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, dtype.itemsize
    stream = 2 * tokens * config.hidden_size * size
    # q, k, v; then q and k rotated; then the result, and room for the kernels' copies.
    projections = tokens * (heads + 2 * kv_heads + heads + kv_heads + 3 * heads) * size
    mlp = tokens * 4 * config.intermediate_size * size
    logits = batch_size * config.vocab_size * (4 + size)  # of the last token only, and in float32
    return stream + max(projections, mlp), logits


# Bytes of a number in a safetensors file, by the dtype's name there.
_ITEMSIZE = dict(F64=8, I64=8, F32=4, I32=4, BF16=2, F16=2, I16=2, I8=1, U8=1, BOOL=1, F8_E4M3=1, F8_E5M2=1)


def stored_bytes(name: str, numbers: dict[str, int]) -> dict[str, int]:
    """Bytes of so many numbers of each dtype, which `name` holds. Raises `CheckpointError` for one that is unknown."""
    unknown = [shown(dtype) for dtype in numbers if dtype not in _ITEMSIZE]
    if unknown:
        raise CheckpointError(f"{name} holds numbers of dtype {', '.join(unknown)}, as no supported checkpoint does")
    return {dtype: count * _ITEMSIZE[dtype] for dtype, count in numbers.items()}


@dataclass(frozen=True)
class Sizes:
    """What `minillm memory` shows: estimates for every format a model can be run in, and what they hang on."""

    name: str
    batch_size: int
    context: int
    ranks: int  # that share the model: all but `stored` and `sharing` is what each holds
    stored: dict[str, int]  # bytes in the checkpoint's files by dtype; empty if it has none here
    estimates: dict[str, Estimate]  # by format
    sharing: dict[str, int]  # KV cache of full attention at "MHA", "this model" and "MQA", bytes

    def as_dict(self) -> dict:
        """For `--json`: bytes throughout."""
        raw = asdict(self)
        for name, one in self.estimates.items():
            raw["estimates"][name] |= {"total": one.total, "fits_in_gib": one.fits_in}
        return raw

    def as_text(self) -> str:
        columns = [
            [*map(format_bytes, (*astuple(one), one.total)), f"{one.fits_in} GiB" if one.fits_in else "none"]
            for one in self.estimates.values()
        ]
        each = f", each of {self.ranks} ranks" if self.ranks > 1 else ""
        lines = [f"{self.name}: batch {self.batch_size}, context {self.context}{each}", ""]
        for label, *cells in [("", *self.estimates), *zip(_ROWS, *columns, strict=True)]:
            lines.append(f"{label:<26}" + "".join(f"{cell:>13}" for cell in cells))
        sharing = ", ".join(f"{k} {format_bytes(v)}" for k, v in self.sharing.items())
        lines += ["", f"KV cache by heads shared: {sharing}"]
        if self.stored:
            lines.append("in the files: " + ", ".join(f"{format_bytes(v)} of {k}" for k, v in self.stored.items()))
        return "\n".join(lines)


def model_sizes(
    config: ModelConfig,
    dtype: torch.dtype,
    batch_size: int,
    context: int | None,
    name: str,
    stored: dict[str, int],
    ranks: Ranks = ALONE,
) -> Sizes:
    """The estimates for `batch_size` rows. `context` None: 4096 tokens, or as many as the model has positions.

    `stored`: how many numbers of each dtype the checkpoint's files hold; {} if they are not here.
    """
    context = min(4096, config.max_positions) if context is None else context
    if batch_size < 1:
        raise RequestError(f"batch must be at least 1, not {batch_size}")
    if not 1 <= context <= config.max_positions:
        raise RequestError(f"context must be from 1 to the model's {config.max_positions} positions, not {context}")
    estimates = {
        word: estimate(config, batch_size, context, dtype, quantize, ranks=ranks)
        for word, quantize in formats(ranks.narrow(config), dtype)
    }
    per_head = kv_values(config.num_layers, 1, config.head_dim, batch_size * context) * dtype.itemsize
    sharing = {"MHA": config.num_heads, "this model": config.num_kv_heads, "MQA": 1}
    sharing = {word: heads * per_head for word, heads in sharing.items()}
    return Sizes(name, batch_size, context, ranks.count, stored_bytes(name, stored), estimates, sharing)


def formats(config: ModelConfig, dtype: torch.dtype) -> list[tuple[str, str | None]]:
    """(name, quantize=) of the formats this model can be held in: its own, or full precision, int8 and int4."""
    if config.quantization is not None:
        return [(config.quantization, None)]
    words = [(str(dtype).removeprefix("torch."), None), ("int8", "int8")]
    q_size = config.num_heads * config.head_dim
    for group in (64, 32):
        if all(size % group == 0 for size in (config.hidden_size, config.intermediate_size, q_size)):
            return [*words, (f"int4-g{group}", f"int4-g{group}")]
    return words


def save_plot(
    path: Path, config: ModelConfig, dtype: torch.dtype, batch_size: int, context: int, ranks: Ranks = ALONE
) -> None:
    """Draw total memory against context, a line per format, into a PNG."""
    lengths = sorted({max(1, context * step // 32) for step in range(1, 33)})
    with picture(path, 7, 4) as figure:
        axes = figure.subplots()
        highest = 0.0
        for name, quantize in formats(ranks.narrow(config), dtype):
            sizes = [estimate(config, batch_size, n, dtype, quantize, ranks=ranks) for n in lengths]
            totals = [size.total / 2**30 for size in sizes]
            axes.plot(lengths, totals, label=name)
            highest = max(highest, totals[-1])
        for size in MEMORY_SIZES:
            if size <= highest * 1.1:
                axes.axhline(size, color="gray", linewidth=0.5, linestyle=":")
        axes.set(xlabel="context, tokens per row", ylabel="memory, GiB", ylim=(0, None), title=f"batch {batch_size}")
        axes.legend()


def format_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.4g} {unit}"
