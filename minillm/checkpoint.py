"""Find a checkpoint, check every tensor it promises, and stream the weights into a decoder.

A checkpoint is a folder: `config.json`, one or more `.safetensors` files and, where there are
several, `model.safetensors.index.json` saying which tensor lives in which file. Tensors are copied
one at a time from the file to their final dtype and device, so loading needs the memory of the
finished model plus one tensor. Pickle files (`.bin`, `.pt`) can run code when opened and never are.
"""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minillm.attention import choose_backend
from minillm.config import ModelConfig
from minillm.errors import BackendError, CheckpointError
from minillm.model import Decoder

DEMOS = {"demo": Path(__file__).parent / "demo", "demo-draft": Path(__file__).parent / "demo" / "draft"}

# What is asked of the Hub: weights as safetensors and the small files that describe them. Original-format
# copies ("consolidated.safetensors") and pickle files stay where they are.
HUB_PATTERNS = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
]

# Where each tensor of the file goes: name in the file -> (name in Decoder, which part of a fused matrix).
# {} stands for the layer number and the suffix weight/bias is carried over.
_NAMES = {
    "embed_tokens": ("embedding", 0),
    "norm": ("norm", 0),
    "layers.{}.self_attn.q_proj": ("blocks.{}.attention.qkv", 0),
    "layers.{}.self_attn.k_proj": ("blocks.{}.attention.qkv", 1),
    "layers.{}.self_attn.v_proj": ("blocks.{}.attention.qkv", 2),
    "layers.{}.self_attn.o_proj": ("blocks.{}.attention.output", 0),
    "layers.{}.self_attn.q_norm": ("blocks.{}.attention.q_norm", 0),
    "layers.{}.self_attn.k_norm": ("blocks.{}.attention.k_norm", 0),
    "layers.{}.mlp.gate_proj": ("blocks.{}.mlp.gate_up", 0),
    "layers.{}.mlp.up_proj": ("blocks.{}.mlp.gate_up", 1),
    "layers.{}.mlp.down_proj": ("blocks.{}.mlp.down", 0),
}
_FUSED_NAMES = {
    "layers.{}.self_attn.qkv_proj": ("blocks.{}.attention.qkv", 0),
    "layers.{}.mlp.gate_up_proj": ("blocks.{}.mlp.gate_up", 0),
}
# The same file name means different norms, depending on which norms the family has.
_NORM_NAMES = {
    (True, False): {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"},
    (True, True): {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
    (False, True): {
        "post_attention_layernorm": "attention_post_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    },
}


@dataclass(frozen=True)
class Slot:
    """Where one tensor of the file goes: rows `start : start + shape[0]` of a parameter of the decoder."""

    parameter: str
    start: int
    shape: tuple[int, ...]


def find_checkpoint(
    name: str | Path,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint: "demo", "demo-draft", a folder on disk, or a Hub id (downloaded if needed).

    `revision`, `token` and `local_files_only` go to `huggingface_hub.snapshot_download`, which also obeys
    HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT. Raises `CheckpointError` naming what was looked for.
    """
    if str(name) in DEMOS:
        return DEMOS[str(name)]
    folder = Path(name).expanduser()
    if str(name) and folder.is_dir():
        return folder
    if str(name) and folder.exists():
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json and the .safetensors files")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(name)):
        raise CheckpointError(f"no folder {str(name)!r}, and it is no Hub id (owner/name) nor one of {list(DEMOS)}")
    # Imported here: a folder on disk should not pay for the network client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(
                str(name),
                revision=revision,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=HUB_PATTERNS,
            )
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"no folder {name}, and the Hub id {name} is not in the local cache and cannot be downloaded: "
            f"{_first_line(error)}"
        ) from error
    except RepositoryNotFoundError as error:  # also what the Hub answers for a private or gated one
        raise CheckpointError(
            f"the Hub id {name} does not exist or needs another token: check the name, give token=... or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"the Hub id {name} has no revision {revision!r}") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(f"the Hub id {name} cannot be downloaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def load_decoder(
    folder: str | Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    attention: str = "auto",
) -> Decoder:
    """Build the decoder of `config` and fill it from the safetensors files in `folder`.

    Raises `CheckpointError` listing every missing, unexpected and mis-shaped tensor at once, before any
    weight is read; `BackendError` if `attention` cannot serve the model.
    """
    folder = Path(folder)
    backend = choose_backend(attention, config)
    with torch.device("meta"):
        model = Decoder(config, backend).to(dtype)
    files = _tensor_files(folder)
    plan = _match(tensor_slots(config, model), files, config, folder)
    try:
        # Uninitialised memory: a page is only really taken when a tensor is copied into it.
        model.to_empty(device=device)
    except (RuntimeError, AssertionError) as error:
        raise BackendError(f"device {str(device)!r}: {_first_line(error)}") from error
    if config.tie_word_embeddings:
        model.head.weight = model.embedding.weight  # to_empty gave each its own
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in _stream(folder, {name: files[name] for name in plan}):
            slot = plan[name]
            parameters[slot.parameter][slot.start : slot.start + slot.shape[0]].copy_(tensor)
    return model.eval().requires_grad_(False)


def tensor_slots(config: ModelConfig, model: Decoder) -> dict[str, Slot]:
    """Every tensor a checkpoint of this config must hold (without the file's name prefix), and where it goes."""
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    parts = {"qkv": (q_rows, kv_rows, kv_rows), "gate_up": (config.intermediate_size,) * 2}
    names = dict(_NAMES)
    for old, new in _NORM_NAMES[config.pre_norm, config.post_norm].items():
        names[f"layers.{{}}.{old}"] = (f"blocks.{{}}.{new}", 0)
    if config.fused_tensors:
        names = {old: new for old, new in names.items() if new[0].rsplit(".", 1)[-1] not in parts} | _FUSED_NAMES
    parameters = dict(model.named_parameters())
    slots = {}
    for old, (new, part) in names.items():
        for layer in range(config.num_layers) if "{}" in old else [0]:
            for suffix in ("weight", "bias"):
                parameter = f"{new.format(layer)}.{suffix}"
                if parameter not in parameters:
                    continue
                shape = tuple(parameters[parameter].shape)
                rows = parts.get(new.rsplit(".", 1)[-1]) if not config.fused_tensors else None
                start, count = (sum(rows[:part]), rows[part]) if rows else (0, shape[0])
                slots[f"model.{old.format(layer)}.{suffix}"] = Slot(parameter, start, (count, *shape[1:]))
    if not config.tie_word_embeddings:
        slots["lm_head.weight"] = Slot("head.weight", 0, tuple(parameters["head.weight"].shape))
    return slots


def _tensor_files(folder: Path) -> dict[str, str]:
    """Which file holds each tensor: from the index of a sharded checkpoint, or the one file there is."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(map(str, set(files.values())))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{index} has no readable weight_map: {error!r}") from None
        for shard in shards:
            # A path could point anywhere on the disk; a shard lies beside its index.
            if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
                raise CheckpointError(f"{index} names {shard!r}: only bare .safetensors file names are opened")
            if not (folder / shard).exists():
                raise CheckpointError(f"{folder / shard} is missing: {index.name} lists it; download it again")
        return files
    single = folder / "model.safetensors"
    if not single.exists():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        hint = f"; {', '.join(pickles)} is pickle and is never opened: convert it to safetensors" if pickles else ""
        raise CheckpointError(f"{folder} holds no model.safetensors and no model.safetensors.index.json{hint}")
    with _open(single) as handle:
        return dict.fromkeys(handle.keys(), single.name)


def _match(slots: dict[str, Slot], files: dict[str, str], config: ModelConfig, folder: Path) -> dict[str, Slot]:
    """Pair the names in the file with their slots, or raise one error that lists everything that is wrong."""
    renamed = {_plain_name(name, config): name for name in files}
    renamed.pop(None, None)
    if config.tie_word_embeddings:
        renamed.pop("lm_head.weight", None)  # some files repeat the embedding under this name
    shapes = {}
    for shard in sorted({files[name] for name in renamed.values()}):
        with _open(folder / shard) as handle:
            for name in handle.keys():  # noqa: SIM118 (a file handle, not a dict)
                if files.get(name) == shard:  # a tensor elsewhere than the index says counts as missing
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
    problems = [f"missing {name}" for name in slots if renamed.get(name) not in shapes]
    for name, original in renamed.items():
        if name not in slots:
            problems.append(f"unexpected {original}")
        elif original in shapes and shapes[original] != slots[name].shape:
            problems.append(f"{original} has shape {list(shapes[original])}, expected {list(slots[name].shape)}")
    if problems:
        raise CheckpointError(f"{folder}: tensors do not match config.json: " + "; ".join(problems))
    return {renamed[name]: slot for name, slot in slots.items()}


def _plain_name(name: str, config: ModelConfig) -> str | None:
    """A tensor's name as in a text-only checkpoint, or None if it is none of the decoder's."""
    if name.endswith("rotary_emb.inv_freq"):
        return None  # a buffer old Llama files carry; it follows from config.json
    if config.nested:
        # Two generations of names: language_model.model.x and model.language_model.x.
        name = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.", name)
        name = name.removeprefix("language_model.")
        if not name.startswith(("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")):
            return None  # vision tower and projector
    return name


def _stream(folder: Path, files: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor once, in file order, with a progress bar on stderr if it takes over a second."""
    reopen_after = 256 * 2**20  # bytes
    total, done, started = len(files), 0, time.monotonic()
    progress = None
    try:
        for shard in dict.fromkeys(files.values()):
            names = [name for name, file in files.items() if file == shard]
            while names:
                # The file is mapped into memory, and pages already copied would stay counted as ours:
                # closing the mapping every so often gives them back, so the peak is the model plus a bit.
                taken = 0
                with _open(folder / shard) as handle:
                    while names and taken < reopen_after:
                        tensor = handle.get_tensor(names[0])
                        taken += tensor.nbytes
                        yield names.pop(0), tensor
                        del tensor
                        done += 1
                        if progress is None and time.monotonic() - started > 1:
                            progress = _progress_bar()
                            task = progress.add_task(f"loading {folder.name}", total=total)
                        if progress is not None:
                            progress.update(task, completed=done)
    finally:
        if progress is not None:
            progress.stop()


def _progress_bar():
    from rich.console import Console
    from rich.progress import Progress

    progress = Progress(console=Console(stderr=True), transient=True)
    progress.start()
    return progress


def _open(path: Path):
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
