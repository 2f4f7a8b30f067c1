"""Write a quantized copy of a checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minillm.errors import CheckpointError
from minillm.linear import Int4Linear, QuantizedLinear, QuantizeSpec, make_linear
from minillm.load.checkpoint import match_files, naming, stream_tensors
from minillm.load.config_json import load_config
from minillm.load.files import read_json
from minillm.load.quantize import fill_rows
from minillm.load.tensors import plain_name
from minillm.load.writing import copy_small_files, new_folder, write_config, write_tensors
from minillm.model import empty_decoder


def quantize_checkpoint(source: str | Path, out: str | Path, quantize: str, quantize_head: bool = False) -> None:
    """Write a quantized copy of the checkpoint folder `source` into the new folder `out`.

    The result is an ordinary checkpoint: safetensors shards, the small files of the source, and a
    `quantization_config` in config.json saying {"quant_method": "minillm", "format": "int8" | "int4-g64"
    | ..., "head": bool}. A matrix `x.weight` becomes, in int8, `x.weight [N, K]` int8 and `x.scale [N]` float32;
    in int4 `x.packed`, `x.scale` and `x.zero` as described in `linear.py`. Loading it gives the very bits
    that quantizing while loading gives. At no time is more than one shard (1 GiB) in memory.

    Raises `CheckpointError` as `new_folder` does.
    """
    with new_folder(out) as folder:
        _write(Path(source), folder, quantize, quantize_head)


def _write(source: Path, out: Path, quantize: str, quantize_head: bool) -> None:
    write_tensors(out, _tensors(source, quantize, quantize_head))
    copy_small_files(source, out)
    raw = read_json(source / "config.json", CheckpointError)
    write_config(
        out, raw | {"quantization_config": {"quant_method": "minillm", "format": quantize, "head": quantize_head}}
    )


def _tensors(source: Path, quantize: str, quantize_head: bool) -> Iterator[tuple[str, Tensor]]:
    """Everything the copy holds, by name, one tensor of the source at a time."""
    config = load_config(source)
    # The dtype does not matter here: what is not quantized is written as it was read.
    model = empty_decoder(config, torch.float32, quantize=quantize, quantize_head=quantize_head)
    places, files = match_files(source, config, model)
    modules = dict(model.named_modules())
    for name, tensor in stream_tensors(source, files, f"quantizing {source.name}"):
        place, plain = places[name], plain_name(name, config)
        tensor = tensor if place.arrange is None else place.arrange(tensor)
        with naming(name):
            if place.tensor == "weight" and isinstance(modules[place.module], QuantizedLinear):
                yield from _quantized(plain.removesuffix(".weight"), tensor, modules[place.module])
            else:
                yield plain, tensor.clone()  # the original is a window on the source file
            if config.tie_word_embeddings and quantize_head and place.module == "embedding":
                yield from _quantized("lm_head", tensor, model.head)


def _quantized(name: str, weight: Tensor, like: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    spec = QuantizeSpec(4, like.group_size) if isinstance(like, Int4Linear) else QuantizeSpec(8)
    layer = make_linear(weight.shape[1], weight.shape[0], False, spec, weight.dtype, "cpu")
    fill_rows(layer, 0, weight)
    for part in like.row_dimension:
        yield f"{name}.{part}", getattr(layer, part)
