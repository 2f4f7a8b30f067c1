"""Low-rank adapters (LoRA: Hu et al. 2021, arXiv:2106.09685), in the files that PEFT writes.

A matrix W `[N, K]` becomes W + s B A with A `[r, K]`, B `[N, r]` and s = alpha / r: what a fine-tuned model needs over
its base is two thin matrices for each adapted one.

Where W is in full precision the product is added to it while it is read: an adapter costs no token anything. A
quantized W stays as it is, and s B A x is added to what it gives ("beside"): such adapters are trained so (QLoRA,
Dettmers et al. 2023, arXiv:2305.14314), and rounding the sum to a few bits would lose what was learned.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from minillm_kernels.norm import add
from torch import Tensor

from minillm.config import ModelConfig
from minillm.errors import CheckpointError, ConfigError, shown
from minillm.linear import Linear, Projection, QuantizedLinear
from minillm.load.checkpoint import (
    Destination,
    destinations,
    listed,
    load_decoder,
    match_files,
    open_tensors,
    stream_tensors,
    tensor_files,
)
from minillm.load.config_json import load_config
from minillm.load.files import read_json
from minillm.load.hub import ADAPTER_FILES
from minillm.load.reader import Reader
from minillm.load.tensors import is_transposed, plain_name
from minillm.load.writing import copy_small_files, new_folder, write_tensors
from minillm.model import Decoder, empty_decoder
from minillm.parallel import ALONE, Ranks

CONFIG, TENSORS = ADAPTER_FILES

# Keys of adapter_config.json that are read here, or say nothing about what is computed: which matrices are adapted is
# said by the tensors. Any other key must be false, empty or null.
_READ = "peft_type r lora_alpha use_rslora init_lora_weights task_type"
_HARMLESS = """
    auto_mapping base_model_name_or_path revision peft_version inference_mode target_modules exclude_modules
    layers_to_transform layers_pattern lora_dropout fan_in_fan_out loftq_config eva_config lora_ga_config megatron_core
    qalora_group_size runtime_config ensure_weight_tying
"""
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
_DTYPES = {"F32", "BF16", "F16"}


class LoraLinear(Projection):
    """base(x) + B A x. A `[R, K]` and B `[N, R]` in `dtype`; R is the sum of the ranks of all that are fused here."""

    def __init__(self, base: QuantizedLinear, rank: int, dtype: torch.dtype, device=None):
        super().__init__()
        self.base = base
        self.A = Linear(base.in_features, rank, False, dtype, device)
        self.B = Linear(rank, base.out_features, False, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        return add(self.base(x), self.B(self.A(x)))


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: by the file's name of a matrix (without `.weight`) A `[r, K]` and s B `[N, r]`, float32,
    the rows in the file's order; and where in the decoder that matrix goes."""

    config: ModelConfig  # of its base
    rank: int
    scale: float
    pairs: dict[str, tuple[Tensor, Tensor]]
    places: dict[str, Destination]

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """W + s B A in float32 for a tensor of the base's file, or the tensor as it is if it has no part in this."""
        name = (plain_name(name, self.config) or "").removesuffix(".weight")
        if name not in self.pairs:
            return tensor
        a, b = self.pairs[name]
        product = b @ a  # [N, K]
        return tensor.float() + (product.t() if is_transposed(self.config, self.places[name].module) else product)

    @torch.no_grad()
    def put_beside(self, model: Decoder) -> None:
        """Add it to what the decoder's layers give: those that are quantized; the others took it in while loading."""
        fused: dict[str, list[str]] = {}
        for name in self.pairs:
            fused.setdefault(self.places[name].module, []).append(name)
        for module, names in fused.items():
            base = model.get_submodule(module)
            if not isinstance(base, QuantizedLinear):
                continue
            # q, k and v at once, B with blocks of zeros: little more to read, and a third of the calls.
            weight = model.embedding.weight
            beside = LoraLinear(base, self.rank * len(names), weight.dtype, weight.device)
            beside.B.weight.zero_()
            for number, name in enumerate(names):
                (a, b), place = self.pairs[name], self.places[name]
                columns = slice(number * self.rank, (number + 1) * self.rank)
                beside.A.weight[columns] = a
                rows = slice(place.start, place.start + len(b))
                beside.B.weight[rows, columns] = in_our_order(b, self.config, place)
            model.set_submodule(module, beside)
        model.eval().requires_grad_(False)


def full_precision(config: ModelConfig) -> ModelConfig:
    """The config of the base that a quantized checkpoint was made from."""
    return replace(config, quantization=None, quantized_head=False)


def adaptable(config: ModelConfig) -> dict[str, Destination]:
    """Where each matrix goes that an adapter can change, by the name of its tensor in the file without `.weight`."""
    config = full_precision(config)
    model = empty_decoder(config, torch.float32)
    return {
        name.removesuffix(".weight"): place
        for name, place in destinations(config, model).items()
        if place.tensor == "weight" and isinstance(model.get_submodule(place.module), Linear)
    }


def matrix_shape(config: ModelConfig, place: Destination) -> tuple[int, int]:
    """(outputs, inputs) of the file's matrix, which some families have the other way round."""
    return place.shape[::-1] if is_transposed(full_precision(config), place.module) else place.shape


def in_our_order(b: Tensor, config: ModelConfig, place: Destination) -> Tensor:
    """Rows `[N, r]` (or `[N]`) of the file's matrix as the decoder has them."""
    turned = is_transposed(full_precision(config), place.module)  # which B is not, and that is all that is done to W
    return b if place.arrange is None or turned else place.arrange(b)


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """Read the adapter in a folder and hold it to the model of `config`.

    Raises `ConfigError` for what its adapter_config.json asks for and is not computed here, `CheckpointError` listing
    the tensors (the first twenty) that do not fit the model.
    """
    folder = Path(folder)
    rank, scale = _read_config(folder / CONFIG)
    path, places, found = folder / TENSORS, adaptable(config), {}
    if not path.is_file():
        others = sorted(other.name for other in folder.glob("adapter_model.*"))
        pickled = f" ({', '.join(others)} is pickle and is never opened: save it with PEFT again)" if others else ""
        raise CheckpointError(f"{folder} holds no {TENSORS}{pickled}")
    problems: list[str] = []
    base = full_precision(config)
    with open_tensors(path) as handle:
        for name in handle.keys():  # noqa: SIM118 (a file handle, not a dict)
            header, match = handle.get_slice(name), _TENSOR.fullmatch(name)
            matrix = match and (plain_name(f"{match[1]}.weight", base) or "").removesuffix(".weight")
            if matrix not in places:
                tied = " (the head is tied to the embedding)" if matrix == "lm_head" else ""
                problems.append(f"{shown(name)} adapts none of the model's matrices{tied}")
                continue
            outputs, inputs = matrix_shape(config, places[matrix])
            shape, expected = header.get_shape(), [rank, inputs] if match[2] == "A" else [outputs, rank]
            if shape != expected:
                problems.append(f"{name} has shape {shape}, expected {expected}")
            if header.get_dtype() not in _DTYPES:
                problems.append(f"{name} is {header.get_dtype()}, expected F32, BF16 or F16")
            if found.setdefault((matrix, match[2]), name) != name:
                problems.append(f"{name} and {found[matrix, match[2]]} are one matrix")
    for matrix, side in found:
        if (matrix, "B" if side == "A" else "A") not in found:
            problems.append(f"{found[matrix, side]} stands alone: A and B come in pairs")
    if not found:
        problems.append("it adapts nothing")
    if problems:
        raise CheckpointError(f"{path} is no adapter for this model: {listed(problems)}")
    files = dict.fromkeys(found.values(), TENSORS)
    read = {name: tensor.to(torch.float32, copy=True) for name, tensor in stream_tensors(folder, files, "adapter")}
    pairs = {
        matrix: (read[found[matrix, "A"]], scale * read[found[matrix, "B"]]) for matrix, side in found if side == "A"
    }
    return Adapter(base, rank, scale, pairs, places)


def _read_config(path: Path) -> tuple[int, float]:
    """(rank, scale) of an adapter_config.json, all of whose other keys say what this file computes."""
    raw = read_json(path, CheckpointError)
    if not raw:
        raise CheckpointError(f"{path} is missing: an adapter is a folder as PEFT saves it")
    reader = Reader(raw, {}, str(path))
    reader.one_of(["LORA"], "peft_type")
    reader.one_of(["CAUSAL_LM"], "task_type", optional=True)
    known = {*_READ.split(), *_HARMLESS.split()}
    asked = [key for key, value in raw.items() if key not in known and value not in (None, False, "none", {}, [])]
    if asked:
        named = ", ".join(f"{key} {shown(raw[key])}" for key in asked)
        raise ConfigError(f"{path}: {named}: not supported, only plain LoRA is; merge it with PEFT and load the result")
    begun = raw.get("init_lora_weights", True)
    # Others (pissa, olora, corda, loftq, ...) train beside a base that they have changed, which is not the one here.
    if begun not in (None, True, False, "gaussian", "eva", "orthogonal"):
        raise ConfigError(
            f"{path}: init_lora_weights {shown(begun)} changes the base: convert the adapter with PEFT "
            "(path_initial_model_for_weight_conversion), or merge it there"
        )
    rank, alpha = reader.integer("r"), reader.number("lora_alpha")
    return rank, alpha / (rank**0.5 if reader.flag("use_rslora") else rank)


def load_adapted(
    adapter: str | Path | None,
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    *,
    quantize: str | None = None,
    quantize_head: bool = False,
    ranks: Ranks = ALONE,
    **options,
) -> Decoder:
    """`load_decoder`, with its options, and with the adapter in a folder if there is one: in the matrices that are in
    full precision, and beside those that are quantized. Raises what `load_decoder` and `read_adapter` raise, and
    `ConfigError` where ranks share the model."""
    options |= dict(quantize=quantize, quantize_head=quantize_head, ranks=ranks)
    if adapter is None:
        return load_decoder(folder, config, dtype, **options)
    if ranks.joined:
        raise ConfigError("ranks that share a model read their part of it, and no adapter: `minillm merge` it first")
    found = read_adapter(adapter, config)
    quantized = quantize is not None or config.quantization is not None
    quantized_head = quantize_head or config.quantized_head
    taken_in = {
        name: pair
        for name, pair in found.pairs.items()
        if not (quantized_head if found.places[name].module == "head" else quantized)
    }
    model = load_decoder(folder, config, dtype, **options, change=replace(found, pairs=taken_in).merged)
    found.put_beside(model)
    return model


def merge_checkpoint(source: str | Path, adapter: str | Path, out: str | Path) -> None:
    """Write the checkpoint folder `source` with the adapter in its matrices into the new folder `out`.

    Names, dtypes and files are the source's; no more than a shard (1 GiB) is in memory. Raises `CheckpointError` for a
    quantized source, and as `new_folder` and `read_adapter` do.
    """
    source = Path(source)
    config = load_config(source)
    if config.quantization is not None:
        raise CheckpointError(
            f"{source} is quantized ({config.quantization}): merge the adapter into the checkpoint it was made from, "
            "or load it with adapter=..., which keeps it beside"
        )
    match_files(source, config, empty_decoder(config, torch.float32))  # or an error that says what is wrong
    found = read_adapter(adapter, config)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream_tensors(source, tensor_files(source), f"merging {source.name}"):
            merged = found.merged(name, tensor)
            yield name, merged.to(tensor.dtype) if merged is not tensor else tensor.clone()

    with new_folder(out) as folder:
        copy_small_files(source, folder)
        write_tensors(folder, tensors())
