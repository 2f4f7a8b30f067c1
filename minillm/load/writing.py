"""Write a checkpoint folder: what `checkpoint.py` and `tensors.py` read, the other way round."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minillm.errors import CheckpointError, first_line
from minillm.linear import QuantizedLinear
from minillm.load.checkpoint import Destination, destinations, match_files, stream_tensors, tensor_files
from minillm.load.hub import HUB_PATTERNS
from minillm.load.tensors import plain_name
from minillm.model import Decoder

_SHARD_BYTES = 2**30


def check_new_folder(out: Path) -> None:
    """Raise `CheckpointError` if `out` exists and is not an empty folder."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()) or out == Path.cwd())):
        raise CheckpointError(f"{out} exists already: give a new folder, nothing is overwritten")


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to write a checkpoint into, which becomes `out` when it is whole.

    It stands in a temporary folder beside `out`: nothing is left behind if writing fails, and nothing else is ever
    removed. Raises `CheckpointError` if `out` exists and is not an empty folder, or cannot be written.
    """
    out = Path(os.path.abspath(out))
    try:
        check_new_folder(out)
        beside = next(folder for folder in out.parents if folder.exists())
        with TemporaryDirectory(prefix=".minillm-", dir=beside, ignore_cleanup_errors=True) as temporary:
            whole = Path(temporary) / "whole"  # which, unlike its parent, may have the usual permissions
            whole.mkdir()
            yield whole
            out.parent.mkdir(parents=True, exist_ok=True)
            whole.rename(out)  # an error if another run was first; an empty folder gives way
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out} cannot be written: {first_line(error)}") from error


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Into shards of 1 GiB, of which one at a time is in memory, and an index; or into one file without an index."""
    waiting: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}

    def write_shard() -> None:
        shard = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(waiting, folder / shard, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(waiting, shard))
        waiting.clear()

    for name, tensor in tensors:
        waiting[name] = tensor.contiguous()  # safetensors takes no others
        if sum(one.nbytes for one in waiting.values()) >= _SHARD_BYTES:
            write_shard()
    if waiting:
        write_shard()
    shards = sorted(set(weight_map.values()))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n")
    for shard in shards:
        shutil.copymode(index, folder / shard)  # safetensors writes for the owner alone
    if len(shards) == 1:
        (folder / shards[0]).rename(folder / "model.safetensors")
        index.unlink()


def write_config(folder: Path, raw: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def copy_small_files(source: Path, folder: Path) -> None:
    """What stands in a checkpoint beside its weights: tokenizer, chat template, config.json, generation_config.json."""
    for pattern in HUB_PATTERNS:
        if "safetensors" not in pattern and (source / pattern).exists():
            shutil.copy(source / pattern, folder)


def write_decoder(
    model: Decoder, folder: Path, raw: dict[str, Any], dtype: torch.dtype, source: Path | None = None
) -> None:
    """Write a decoder's weights and config.json as its family's files have them: `transformers` loads them too.

    Args:
        model: in full precision.
        folder: exists; see `new_folder`.
        raw: the config.json that the decoder was made from.
        dtype: of the weights on disk.
        source: the checkpoint folder that the decoder was loaded from. Its names are kept, and what the decoder does
            not have (a vision tower, positions before 0) is copied. Without one, names are those of a text-only file.

    Raises `CheckpointError` for a quantized decoder, for one that ranks share, and for one from a larger checkpoint
    without its `source`.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise CheckpointError("quantized weights cannot be written in full precision: load without quantize")
    if model.ranks.count > 1:
        raise CheckpointError("this rank holds a share of the model: load it in one process to write it")
    if model.config.nested and source is None:
        raise CheckpointError("config.json has a text_config: what stands beside the decoder is copied from `source`")
    word = str(dtype).removeprefix("torch.")

    def restated(part: dict[str, Any]) -> dict[str, Any]:
        return part | {key: word for key in ("dtype", "torch_dtype") if key in part}

    stated = {"dtype": word} | restated(raw)
    if isinstance(raw.get("text_config"), dict):
        stated["text_config"] = restated(raw["text_config"])
    write_tensors(folder, _decoder_tensors(model, dtype, source))
    write_config(folder, stated)


@torch.no_grad()
def _decoder_tensors(model: Decoder, dtype: torch.dtype, source: Path | None) -> Iterator[tuple[str, Tensor]]:
    """Everything the file holds, by name."""
    places = destinations(model.config, model)
    if source is None:
        for name, place in places.items():
            yield name, _file_tensor(model, place, torch.zeros(place.shape, dtype=dtype))
        return
    match_files(source, model.config, model)  # or an error that says what of the source does not fit
    for name, tensor in stream_tensors(source, tensor_files(source), f"writing {source.name}", check_finite=False):
        plain = plain_name(name, model.config)
        if plain in places:
            yield name, _file_tensor(model, places[plain], tensor.to(dtype, copy=True))
        elif plain == "lm_head.weight":  # a tied head that the file repeats
            yield name, model.embedding.weight.to("cpu", dtype, copy=True)
        else:
            yield name, tensor.clone()  # the original is a window on the source file


def _file_tensor(model: Decoder, place: Destination, file: Tensor) -> Tensor:
    """`file`, what is there already or zeros, with the decoder's weights where loading would read them."""
    whole = getattr(model.get_submodule(place.module), place.tensor).to("cpu", file.dtype)
    if place.arrange is None:
        return file.copy_(whole.narrow(place.dimension, place.start, place.shape[place.dimension]))
    # Arranging only moves numbers: done to the numbers of the places it says where each came from.
    origin = place.arrange(torch.arange(file.numel()).view(file.shape))
    ours = whole.narrow(place.dimension, place.start, origin.shape[place.dimension])
    return file.flatten().index_copy_(0, origin.flatten(), ours.flatten()).view(file.shape)
