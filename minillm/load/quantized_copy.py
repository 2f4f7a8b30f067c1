"""Write a quantized copy of a checkpoint."""

import json
import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minillm.errors import CheckpointError, first_line
from minillm.linear import Int4Linear, QuantizedLinear, QuantizeSpec, make_linear
from minillm.load.checkpoint import naming, plain_name, plan_loading, stream_tensors
from minillm.load.config_json import load_config
from minillm.load.files import read_json
from minillm.load.hub import HUB_PATTERNS
from minillm.load.quantize import fill_rows
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
    config = load_config(source)
    # The dtype does not matter here: what is not quantized is written as it was read.
    model = empty_decoder(config, torch.float32, quantize=quantize, quantize_head=quantize_head)
    plan, files = plan_loading(source, config, model)
    modules, writer = dict(model.named_modules()), _ShardWriter(out)
    for name, tensor in stream_tensors(source, files, f"quantizing {source.name}"):
        module, plain = modules[plan[name].module], plain_name(name, config)
        with naming(name):
            if plan[name].tensor == "weight" and isinstance(module, QuantizedLinear):
                writer.add_quantized(plain.removesuffix(".weight"), tensor, module)
            else:
                writer.add(plain, tensor)
        if config.tie_word_embeddings and quantize_head and plan[name].module == "embedding":
            writer.add_quantized("lm_head", tensor, model.head)
    writer.finish()
    for pattern in HUB_PATTERNS:
        if "safetensors" not in pattern and (source / pattern).exists():
            shutil.copy(source / pattern, out)
    raw = read_json(source / "config.json", CheckpointError)
    raw["quantization_config"] = {"quant_method": "minillm", "format": quantize, "head": quantize_head}
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


class _ShardWriter:
    """Collects tensors and writes a shard whenever enough have come together, the index at the end."""

    def __init__(self, folder: Path):
        self.folder, self.waiting, self.weight_map, self.size = folder, {}, {}, 0

    def add(self, name: str, tensor: Tensor) -> None:
        self.waiting[name] = tensor.clone()  # the original is a window on the source file
        self.size += tensor.nbytes
        if self.size >= _SHARD_BYTES:
            self._write()

    def add_quantized(self, name: str, weight: Tensor, like: QuantizedLinear) -> None:
        spec = QuantizeSpec(4, like.group_size) if isinstance(like, Int4Linear) else QuantizeSpec(8)
        layer = make_linear(weight.shape[1], weight.shape[0], False, spec, weight.dtype, "cpu")
        fill_rows(layer, 0, weight)
        for part in like.row_dimension:
            self.add(f"{name}.{part}", getattr(layer, part))

    def _write(self) -> None:
        shard = f"model-{len(set(self.weight_map.values())) + 1:05d}.safetensors"
        save_file(self.waiting, self.folder / shard, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(self.waiting, shard)
        self.waiting, self.size = {}, 0

    def finish(self) -> None:
        if self.waiting:
            self._write()
        index = {"metadata": {}, "weight_map": self.weight_map}
        path = self.folder / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n")
        for shard in set(self.weight_map.values()):
            shutil.copymode(path, self.folder / shard)  # safetensors writes for the owner alone
