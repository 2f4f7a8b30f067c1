"""Check every tensor a checkpoint promises, and stream the weights into a decoder.

A checkpoint is a folder: `config.json`, one or more `.safetensors` files and, where there are
several, `model.safetensors.index.json` saying which tensor lives in which file. Tensors are copied
one at a time from the file to their final dtype and device, so loading needs the memory of the
finished model plus one tensor. Pickle files (`.bin`, `.pt`) can run code when opened and never are.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from minillm.attention import Backend
from minillm.config import ModelConfig
from minillm.errors import BackendError, CheckpointError, first_line, shown
from minillm.linear import Linear, QuantizedLinear
from minillm.load.backends import choose_backend
from minillm.load.files import conversion, read_json
from minillm.load.quantize import fill_rows
from minillm.load.share import Cut, share_places
from minillm.load.tensors import Destination, arrangement, file_names, file_shape, plain_name
from minillm.model import Decoder, empty_decoder
from minillm.parallel import ALONE, Ranks
from minillm.progress import progress_bar

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HEADER_BYTES = 2**22  # describes some 30,000 tensors; a shard of the largest supported models describes some 1,000
_REOPEN_BYTES = 2**24  # read through one mapping of a file before it is closed and opened again


def load_decoder(
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attention: str | Backend = "auto",
    quantize: str | None = None,
    quantize_head: bool = False,
    check_finite: bool = True,
    ranks: Ranks = ALONE,
    change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> Decoder:
    """Build the decoder of `config` and fill it from the safetensors files in `folder`, each of whose tensors goes
    through `change` first, with its name.

    Raises `CheckpointError` listing missing, unexpected and mis-shaped tensors (the first twenty) before any weight is
    read, or naming one that holds NaN or infinity, unless `check_finite` is false (the look costs 0.1 s per GB);
    `BackendError` if `attention` cannot serve the model. `quantize` and `quantize_head` as for `empty_decoder`. Of a
    model that `ranks` share each reads its own part only.
    """
    folder, asked = Path(folder), (dtype, choose_backend(attention, config, device), quantize, quantize_head)
    mine = empty_decoder(config, *asked, ranks=ranks)  # an error, if there is one, before anything is read
    whole = mine if ranks.count == 1 else empty_decoder(config, *asked)
    places, files = match_files(folder, config, whole)
    places, cuts = (places, {}) if ranks.count == 1 else share_places(places, whole, mine, config, ranks)
    files = {name: file for name, file in files.items() if name in places}
    try:
        # Uninitialised memory: a page is only really taken when a tensor is copied into it.
        model = empty_decoder(config, *asked, device, ranks)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"device {str(device)!r}: {first_line(error)}") from error
    # A tied head that is quantized is a matrix of its own, made from the embedding.
    own_head = config.tie_word_embeddings and isinstance(model.head, QuantizedLinear) and config.quantization is None
    with torch.no_grad():
        for name, tensor in stream_tensors(folder, files, f"loading {folder.name}", check_finite, cuts, ranks.first):
            with naming(name):
                tensor = change(name, tensor)
                _fill(model, places[name], tensor, name in cuts and cuts[name].columns is not None)
                if own_head and places[name].module == "embedding":
                    ids = ranks.vocabulary(config)
                    fill_rows(model.head, 0, tensor[ids.start : ids.stop])
    return model.eval().requires_grad_(False)


def _fill(model: Decoder, place: Destination, tensor: Tensor, shared_rows: bool) -> None:
    """`shared_rows`: other ranks hold the rest of each row."""
    module = model.get_submodule(place.module)
    tensor = tensor if place.arrange is None else place.arrange(tensor)
    if place.tensor == "weight" and place.dtype is None and isinstance(module, Linear | QuantizedLinear):
        fill_rows(module, place.start, tensor, model.ranks.largest if shared_rows else None)
    else:
        whole = getattr(module, place.tensor)
        whole.narrow(place.dimension, place.start, tensor.shape[place.dimension]).copy_(tensor)


def destinations(config: ModelConfig, model: Decoder) -> dict[str, Destination]:
    """Every tensor a checkpoint of this config must hold (without the file's name prefix), and where it goes."""
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rows = {"qkv": [q_rows, kv_rows, kv_rows], "gate_up": [config.intermediate_size] * 2}
    modules, places = dict(model.named_modules()), {}
    for module, names in file_names(config).items():
        if module == "head" and config.tie_word_embeddings and not config.quantized_head:
            continue
        for tensor, dimension, shape, dtype in _tensors(modules.get(module), config.quantization is not None):
            start, counts = 0, rows[module.rsplit(".", 1)[-1]] if len(names) > 1 else [shape[dimension]]
            for part, (name, count) in enumerate(zip(names, counts, strict=True)):
                size = file_shape(config, module, (*shape[:dimension], count, *shape[dimension + 1 :]))
                arrange = arrangement(config, module, part)
                places[f"{name}.{tensor}"] = Destination(module, tensor, dimension, start, size, dtype, arrange)
                start += count
    return places


def _tensors(module: nn.Module | None, stored: bool) -> Iterator[tuple[str, int, tuple[int, ...], torch.dtype | None]]:
    """(name, dimension of outputs, shape, dtype) of what a file holds for a module; `stored`: quantized already."""
    if isinstance(module, QuantizedLinear) and stored:
        for name, dimension in module.row_dimension.items():
            tensor = getattr(module, name)
            yield name, dimension, tuple(tensor.shape), tensor.dtype
    elif isinstance(module, QuantizedLinear):
        yield "weight", 0, (module.out_features, module.in_features), None
    elif getattr(module, "weight", None) is not None:
        yield "weight", 0, tuple(module.weight.shape), None
    if getattr(module, "bias", None) is not None:
        yield "bias", 0, tuple(module.bias.shape), None


def tensor_files(folder: Path) -> dict[str, str]:
    """Which file holds each tensor: from the index of a sharded checkpoint, or the one file there is."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(files, dict) or not files:
            raise CheckpointError(f"{index} has no weight_map that says which file holds each tensor")
        for shard in files.values():
            # A path could point anywhere on the disk; a shard lies beside its index.
            if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
                raise CheckpointError(f"{index} names {shown(shard)}: only bare .safetensors file names are opened")
        return files
    single = folder / "model.safetensors"
    if not single.exists():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        pickled = f" ({', '.join(pickles[:3])} is pickle and is never opened)" if pickles else ""
        raise CheckpointError(
            f"{folder} holds no model.safetensors and no model.safetensors.index.json{pickled}; this writes one: "
            f"{conversion(folder, 'AutoModelForCausalLM')}"
        )
    with open_tensors(single) as handle:
        return dict.fromkeys(handle.keys(), single.name)


def match_files(folder: Path, config: ModelConfig, model: Decoder) -> tuple[dict[str, Destination], dict[str, str]]:
    """The place and the file of every tensor to read, by its name there, or one error that lists all that is wrong."""
    places, files = destinations(config, model), tensor_files(folder)
    renamed = {plain_name(name, config): name for name in files}
    renamed.pop(None, None)
    # Tied, but some files repeat the embedding under this name.
    repeated = renamed.pop("lm_head.weight", None) if "lm_head.weight" not in places else None
    found = {}
    for shard in sorted({files[name] for name in renamed.values()}):
        with open_tensors(folder / shard) as handle:
            for name in handle.keys():  # noqa: SIM118 (a file handle, not a dict)
                if files.get(name) == shard:  # a tensor elsewhere than the index says counts as missing
                    header = handle.get_slice(name)
                    found[name] = tuple(header.get_shape()), header.get_dtype()
    problems = [f"missing {name}" for name in places if renamed.get(name) not in found]
    for name, original in renamed.items():
        if name not in places:
            problems.append(f"unexpected {shown(original)}")
        elif original in found:
            place, (shape, dtype) = places[name], found[original]
            if shape != place.shape:
                problems.append(f"{original} has shape {list(shape)}, expected {list(place.shape)}")
            if _DTYPES.get(dtype) not in ((place.dtype,) if place.dtype else _FLOATS):
                problems.append(f"{original} is {dtype}, expected {place.dtype or 'F32, BF16 or F16'}")
    if problems:
        raise CheckpointError(f"{folder}: tensors do not match config.json: {listed(problems)}")
    places = {renamed[name]: place for name, place in places.items()}
    embedding = next(name for name, place in places.items() if place.module == "embedding")
    if repeated is not None and not _equal_tensors(folder, files, repeated, embedding):
        raise CheckpointError(
            f"{folder}: {repeated} differs from {embedding}, but config.json says that the head is tied to the "
            "embedding; set tie_word_embeddings to false there to use it, or remove the tensor"
        )
    return places, {name: files[name] for name in places}


def listed(problems: list[str]) -> str:
    """The first twenty."""
    return "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")


def _equal_tensors(folder: Path, files: dict[str, str], one: str, other: str) -> bool:
    """Whether two tensors of a checkpoint are the same, to the bit; some thousand rows of them are held at a time."""
    with open_tensors(folder / files[one]) as left, open_tensors(folder / files[other]) as right:
        a, b = left.get_slice(one), right.get_slice(other)
        if (a.get_shape(), a.get_dtype()) != (b.get_shape(), b.get_dtype()):
            return False
        starts = range(0, a.get_shape()[0], 4096)
        return all(torch.equal(*(part[n : n + 4096].view(torch.uint8) for part in (a, b))) for n in starts)


def stored_numbers(folder: Path) -> dict[str, int]:
    """How many numbers the safetensors files in a folder hold, by dtype name; read from their headers alone."""
    counts: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open_tensors(path) as handle:
            for name in handle.keys():  # noqa: SIM118 (a file handle, not a dict)
                header = handle.get_slice(name)
                counts[header.get_dtype()] += math.prod(header.get_shape())
    return dict(counts)


def stream_tensors(
    folder: Path,
    files: dict[str, str],
    label: str,
    check_finite: bool = True,
    cuts: dict[str, Cut] | None = None,
    told: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor once, in file order, with a progress bar on stderr if it takes over a second and is `told`.

    Of those that `cuts` names only that part is read.

    Raises `CheckpointError` for one that holds NaN or infinity, unless `check_finite` is false.
    """
    with progress_bar(len(files), label, after=1.0 if told else math.inf) as advance:
        for shard in dict.fromkeys(files.values()):
            names = [name for name, file in files.items() if file == shard]
            while names:
                # The file is mapped into memory, and pages already copied would stay counted as ours:
                # closing the mapping every so often gives them back, so the peak is the model plus a bit.
                taken = 0
                with open_tensors(folder / shard) as handle:
                    while names and taken < _REOPEN_BYTES:
                        cut = (cuts or {}).get(names[0])
                        tensor = handle.get_tensor(names[0]) if cut is None else cut.read(handle.get_slice(names[0]))
                        taken += tensor.nbytes
                        if check_finite and not _is_finite(tensor):
                            raise CheckpointError(
                                f"{folder / shard}: {names[0]} holds NaN or infinity, and so would every answer; "
                                "get the file again (check_finite=False loads it all the same)"
                            )
                        yield names.pop(0), tensor
                        del tensor
                        advance()


def _is_finite(tensor: Tensor) -> bool:
    """Its smallest and largest are finite, which NaN makes NaN: 15 GB/s, where looking at each makes 0.3."""
    return not tensor.is_floating_point() or bool(torch.stack(tensor.aminmax()).isfinite().all())


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Say of which tensor an error speaks."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def open_tensors(path: Path):
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint says it has it; download it again")
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > _HEADER_BYTES:
                raise CheckpointError(f"{path} is not a readable safetensors file: its header is too large")
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {first_line(error)}") from None
