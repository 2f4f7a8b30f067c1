"""Write a quantized copy of a checkpoint."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minillm.errors import CheckpointError, first_line
from minillm.linear import Int4Linear, QuantizedLinear, QuantizeSpec, make_linear
from minillm.load.checkpoint import naming, plan_loading, stream_tensors
from minillm.load.config_json import load_config
from minillm.load.files import read_json
from minillm.load.hub import HUB_PATTERNS
from minillm.load.quantize import fill_rows
from minillm.load.tensors import plain_name
from minillm.model import empty_decoder

_SHARD_BYTES = 2**30


def quantize_checkpoint(source: str | Path, out: str | Path, quantize: str, quantize_head: bool = False) -> None:
    """Write a quantized copy of the checkpoint folder `source` into the new folder `out`.

    The result is an ordinary checkpoint: safetensors shards, the small files of the source, and a
    `quantization_config` in config.json saying {"quant_method": "minillm", "format": "int8" | "int4-g64"
    | ..., "head": bool}. A matrix `x.weight` becomes, in int8, `x.weight [N, K]` int8 and `x.scale [N]` float32;
    in int4 `x.packed`, `x.scale` and `x.zero` as described in `linear.py`. Loading it gives the very bits
    that quantizing while loading gives. At no time is more than one shard (1 GiB) in memory.

    Raises `CheckpointError` if `out` exists and is not an empty folder, or cannot be written. What is written stands in
    a temporary folder beside it and is moved there when it is whole: nothing is left behind if that fails, and nothing
    else is ever removed.
    """
    source, out = Path(source), Path(os.path.abspath(out))
    try:
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()) or out == Path.cwd())):
            raise CheckpointError(f"{out} exists already: give a new folder, nothing is overwritten")
        beside = next(folder for folder in out.parents if folder.exists())
        with TemporaryDirectory(prefix=".minillm-", dir=beside, ignore_cleanup_errors=True) as temporary:
            whole = Path(temporary) / "whole"  # which, unlike its parent, may have the usual permissions
            whole.mkdir()
            _write(source, whole, quantize, quantize_head)
            out.parent.mkdir(parents=True, exist_ok=True)
            whole.rename(out)  # an error if another run was first; an empty folder gives way
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} cannot be written: {first_line(error)}") from error


def _write(source: Path, out: Path, quantize: str, quantize_head: bool) -> None:
    waiting, weight_map = {}, {}

    def write_shard() -> None:
        shard = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(waiting, out / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(waiting, shard))
        waiting.clear()

    for name, tensor in _tensors(source, quantize, quantize_head):
        waiting[name] = tensor
        if sum(one.nbytes for one in waiting.values()) >= _SHARD_BYTES:
            write_shard()
    if waiting:
        write_shard()
    index = out / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
    for shard in set(weight_map.values()):
        shutil.copymode(index, out / shard)  # safetensors writes for the owner alone
    for pattern in HUB_PATTERNS:
        if "safetensors" not in pattern and (source / pattern).exists():
            shutil.copy(source / pattern, out)
    raw = read_json(source / "config.json", CheckpointError)
    raw["quantization_config"] = {"quant_method": "minillm", "format": quantize, "head": quantize_head}
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def _tensors(source: Path, quantize: str, quantize_head: bool) -> Iterator[tuple[str, Tensor]]:
    """Everything the copy holds, by name, one tensor of the source at a time."""
    config = load_config(source)
    # The dtype does not matter here: what is not quantized is written as it was read.
    model = empty_decoder(config, torch.float32, quantize=quantize, quantize_head=quantize_head)
    plan, files = plan_loading(source, config, model)
    modules = dict(model.named_modules())
    for name, tensor in stream_tensors(source, files, f"quantizing {source.name}"):
        place, plain = plan[name], plain_name(name, config)
        tensor = tensor if place.arrange is None else place.arrange(tensor)
        with naming(name):
            if place.tensor == "weight" and isinstance(modules[place.module], QuantizedLinear):
                yield from _quantized(plain.removesuffix(".weight"), tensor, modules[place.module])
            else:
                yield (
                    plain,
                    tensor.clone(),
                )  # the original is a window on the source file
            if config.tie_word_embeddings and quantize_head and place.module == "embedding":
                yield from _quantized("lm_head", tensor, model.head)


def _quantized(name: str, weight: Tensor, like: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    spec = QuantizeSpec(4, like.group_size) if isinstance(like, Int4Linear) else QuantizeSpec(8)
    layer = make_linear(weight.shape[1], weight.shape[0], False, spec, weight.dtype, "cpu")
    fill_rows(layer, 0, weight)
    for part in like.row_dimension:
        yield f"{name}.{part}", getattr(layer, part)
