"""Train low-rank matrices beside a frozen base (LoRA: Hu et al. 2021, arXiv:2106.09685), which may be quantized
(QLoRA: Dettmers et al. 2023, arXiv:2305.14314). What they are, and how they are used: `load/lora.py`."""

import json
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from minillm_kernels.int4_linear import dequantize_int4
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from minillm.errors import CheckpointError, RequestError, first_line
from minillm.linear import Int4Linear, Linear, Projection, QuantizedLinear
from minillm.load.lora import (
    CONFIG,
    TENSORS,
    LoraLinear,
    adaptable,
    full_precision,
    in_our_order,
    matrix_shape,
)
from minillm.load.tensors import file_names, is_transposed
from minillm.model import Decoder


class _Product(torch.autograd.Function):
    """x W^T with W as codes. Nothing wide is kept: the way back widens them again, and has no gradient for them."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int | None) -> Tensor:
        ctx.save_for_backward(codes, scale, zero)
        ctx.group_size = group_size
        return F.linear(x, _widened(codes, scale, zero, group_size, x.dtype))  # [..., N]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        weight = _widened(*ctx.saved_tensors, ctx.group_size, gradient.dtype)
        return gradient @ weight, None, None, None, None  # [..., K]


def _widened(codes: Tensor, scale: Tensor, zero: Tensor | None, group_size: int | None, dtype: torch.dtype) -> Tensor:
    """W `[N, K]` from the tensors of an Int8Linear, which has no zero and no groups, or an Int4Linear."""
    if zero is not None:
        return dequantize_int4(codes, scale, zero, group_size).to(dtype)
    return (codes.float() * scale[:, None]).to(dtype)


class DifferentiableLinear(Projection):
    """A frozen quantized layer through which gradients flow; the kernels have none."""

    def __init__(self, layer: QuantizedLinear):
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype, or the one that autocast chooses."""
        device, layer = x.device.type, self.layer
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        if isinstance(layer, Int4Linear):
            y = _Product.apply(x, layer.packed, layer.scale, layer.zero, layer.group_size)
        else:
            y = _Product.apply(x, layer.weight, layer.scale, None, None)
        return y if layer.bias is None else y + layer.bias.to(y.dtype)


class LowRank(nn.Module):
    """s B A x, for some rows of a layer's outputs: A `[r, K]` and B `[N, r]` of one matrix of the file, float32."""

    def __init__(self, name: str, inputs: int, start: int, rows: int, rank: int, alpha: float, device=None):
        super().__init__()
        self.name, self.start, self.rows, self.alpha, self.scale = name, start, rows, alpha, alpha / rank
        self.A = Linear(inputs, rank, False, torch.float32, device)
        self.B = Linear(rank, rows, False, torch.float32, device)


class TrainedLinear(Projection):
    """A frozen layer, and beside it what is trained."""

    def __init__(self, base: nn.Module, parts: list[LowRank]):
        super().__init__()
        self.base, self.parts = base, nn.ModuleList(parts)
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]."""
        y = self.base(x)
        for part in self.parts:
            y.narrow(-1, part.start, part.rows).add_(part.B(part.A(x)), alpha=part.scale)
        return y


def add_lora(
    model: Decoder, rank: int, alpha: float | None = None, targets: Collection[str] | None = None, seed: int = 0
) -> None:
    """Freeze a decoder and put low-rank matrices beside its own: from now on they are all that is trained.

    One A and one B for each matrix *of the file*, of which several may stand in one of the decoder's. A is drawn as
    PEFT draws it, uniform within 1 / sqrt(K), and B is 0: nothing is computed differently yet.

    Args:
        model: built with `attention=PACKED`, in full precision or quantized.
        rank: r, of every A `[r, K]` and B `[N, r]`; both are float32, whatever the base is in.
        alpha: what they give is multiplied by alpha / r; 2 r if None.
        targets: which matrices of the blocks, by the ends of their names in the file ("q_proj", "mlp.down_proj");
            None: all of them.
        seed: of A; the same numbers on every machine.

    Raises `RequestError` for a rank, an alpha or targets that cannot be, and for a decoder that has some already.
    """
    alpha = 2.0 * rank if alpha is None else alpha
    if type(rank) is not int or rank < 1 or not 0 < alpha < float("inf"):
        raise RequestError(f"rank must be a whole number from 1 and alpha positive, not {rank!r} and {alpha!r}")
    if any(isinstance(module, LoraLinear | TrainedLinear) for module in model.modules()):
        raise RequestError("the model has an adapter beside it already: merge it first (minillm merge)")
    places = {name: place for name, place in adaptable(model.config).items() if place.module.startswith("blocks.")}
    chosen = [] if targets is None else [name for name in places if any(_ends(name, end) for end in targets)]
    unknown = [end for end in targets or () if not any(_ends(name, end) for name in chosen)]
    if unknown or (targets is not None and not chosen):
        ends = sorted({name.rpartition(".")[2] for name in places})
        raise RequestError(f"targets {unknown} name no matrix of this model; it has {', '.join(ends)}")
    generator = torch.Generator("cpu").manual_seed(seed)
    device, parts = model.embedding.weight.device, {}
    model.requires_grad_(False)
    for name in chosen if targets is not None else places:
        place = places[name]
        outputs, inputs = matrix_shape(model.config, place)
        part = LowRank(name, inputs, place.start, outputs, rank, alpha, device)
        drawn = torch.rand(rank, inputs, generator=generator)
        with torch.no_grad():
            part.A.weight.copy_((2 * drawn - 1) / inputs**0.5)
            part.B.weight.zero_()
        parts.setdefault(place.module, []).append(part)
    for module, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            model.set_submodule(module, DifferentiableLinear(layer))
    for module, beside in parts.items():
        model.set_submodule(module, TrainedLinear(model.get_submodule(module), beside))


def save_adapter(model: Decoder, folder: Path, base_name: str) -> None:
    """Write what `add_lora` added as PEFT does, into a folder that exists (see `load.writing.new_folder`).

    `base_name` is what the base was loaded as: a Hub id or a folder. PEFT loads the base by it, and minillm does not
    read it. Raises `CheckpointError` if the folder cannot be written.
    """
    parts = [part for module in model.modules() if isinstance(module, TrainedLinear) for part in module.parts]
    if not parts:
        raise RequestError("the model has no adapter: nothing to save")
    config, places = full_precision(model.config), adaptable(model.config)
    tensors, targets = {}, set()
    prefix = file_names(config)["blocks.0.attention.output"][0].partition(".0.")[0]
    for part in parts:
        place, name = places[part.name], part.name
        b = part.B.weight.detach().float().cpu()
        origin = in_our_order(torch.arange(len(b)), config, place)  # of each row of ours, its row in the file
        within = name.removeprefix(f"{prefix}.").partition(".")[2]
        if config.nested:
            # As transformers calls it; in full, since a vision tower may have matrices of the same names.
            name = within = "model.language_model." + name.removeprefix("model.")
        targets.add(within)
        tensors[f"base_model.model.{name}.lora_A.weight"] = part.A.weight.detach().float().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.empty_like(b).index_copy_(0, origin, b)
    rank, alpha = len(parts[0].A.weight), parts[0].alpha
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "fan_in_fan_out": any(is_transposed(config, place.module) for place in places.values()),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
    try:
        save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be written: {first_line(error)}") from error


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)
