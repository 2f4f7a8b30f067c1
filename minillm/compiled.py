"""torch.compile for the decoder: few graphs, none of them twice, and the next process starts with them.

What usually hurts about `torch.compile` is that each new length compiles again, that it happens in the middle of a
request, and that the next process begins with nothing. Here

* every size but those of the weights is left open (`dynamic=True`), so there are at most four graphs: for one or
  several rows, of one or several tokens. One is a size of its own to PyTorch; everything above it is alike;
* a graph is compiled on sizes made up for it, never on a request's: two that happen to be equal (rows and
  heads, say) would be taken for the same thing, and the next request would compile again;
* each is announced on stderr; `warm_up` makes the two for a single row, and `LLM.from_pretrained(compile=True)`
  calls it;
* what the compiler writes stays in `$XDG_CACHE_HOME/minillm/compiled` (`~/.cache/minillm/compiled`), one folder for
  each model, set of versions and kind of machine. Folders not used for longest go when all together exceed
  MAX_BYTES. With TORCHINDUCTOR_CACHE_DIR set, that folder is used instead and nothing in it is deleted.
"""

import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from minillm.cache import StaticCache
from minillm.config import ModelConfig
from minillm.errors import BackendError
from minillm.model import Decoder

MAX_BYTES = 1 << 30  # of all folders together
_NAME = r"model-[0-9a-f]{20}"  # of a folder, see `_key`
_KEYS_ROUNDED_TO = 128  # a compiled step reads keys in whole blocks of so many


class CompiledStates:
    """`Decoder.hidden_states` as compiled graphs, called with the same arguments.

    `compilations` lists what was compiled so far, and the seconds each took. Raises `BackendError` where the
    compiler fails, for want of a C++ compiler for instance.
    """

    def __init__(self, model: Decoder):
        self.model = model
        self.compilations: list[tuple[str, float]] = []
        self._ready: set[tuple[bool, bool, bool]] = set()  # (several rows, several tokens, from_start)
        self._run = torch.compile(model.hidden_states, fullgraph=True, dynamic=True)

    def warm_up(self) -> None:
        """Compile what a request of one prompt needs."""
        for several_tokens in (True, False):
            self._prepare((False, several_tokens, several_tokens and self._asks_for_start))

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        cache_position: Tensor,
        cache: StaticCache,
        key_length: int | None = None,
        from_start: bool = False,
    ) -> Tensor:
        """The last hidden state of every token, `[B, T, d]`."""
        rows, tokens = input_ids.shape
        from_start = from_start and self._asks_for_start
        kind = (rows > 1, tokens > 1, from_start)
        if kind not in self._ready:
            self._prepare(kind)
        blocks = -(-(key_length or cache.max_cache_len) // _KEYS_ROUNDED_TO)
        key_length = min(blocks * _KEYS_ROUNDED_TO, cache.max_cache_len)
        # Copies made here are inference tensors, whatever the caller's are: the compiler tells those apart too.
        return self._run(input_ids.clone(), cache_position.clone(), cache, key_length, from_start)

    @property
    def _asks_for_start(self) -> bool:
        """Whether the model computes the beginning of a text by another kernel: that is a graph of its own."""
        return self.model.fused and self.model.embedding.weight.is_cuda

    @torch.inference_mode()
    def _prepare(self, kind: tuple[bool, bool, bool]) -> None:
        several_rows, several_tokens, from_start = kind
        label = (
            f"{'several rows' if several_rows else 'one row'}, {'several tokens' if several_tokens else 'one token'}"
        )
        weight = self.model.embedding.weight
        sizes = _unlike(self.model.config)
        rows, tokens = next(sizes) if several_rows else 1, next(sizes) if several_tokens else 1
        key_length, capacity = islice(sizes, 2)
        cache = StaticCache(self.model.config, rows, capacity, weight.device, weight.dtype, max_step=next(sizes))
        for tensor in (*cache.keys, *cache.values):  # [B, KV, S + 1, D]: heads and channels are the model's
            torch._dynamo.mark_static(tensor, 1)
            torch._dynamo.mark_static(tensor, 3)
        input_ids = torch.zeros(rows, tokens, dtype=torch.int64, device=weight.device)
        position = torch.arange(tokens, device=weight.device).repeat(rows, 1)  # [B, T]
        started = time.perf_counter()
        print(f"minillm: compiling the decoder for {label} ...", end="", file=sys.stderr, flush=True)
        try:
            # A norm's epsilon is no size: left open, it costs a second compilation that finds that out.
            settings = torch._dynamo.config.patch(recompile_limit=64, specialize_float=True)
            with artifact_folder(self.model), settings:
                self._run(input_ids, position, cache, key_length, from_start)
        except RuntimeError as error:  # what PyTorch's compiler raises; its own message runs over pages
            reason = " ".join(str(error).strip().splitlines()[:2])
            raise BackendError(f"compile=True: torch.compile failed ({reason}); use compile='auto'") from error
        finally:
            seconds = time.perf_counter() - started
            print(f" {seconds:.1f} s", file=sys.stderr, flush=True)
        self.compilations.append((label, seconds))
        self._ready.add(kind)


def _unlike(config: ModelConfig) -> Iterator[int]:
    """Small sizes, ascending, that no dimension of the model has, so that none is taken for another."""
    taken = {value for value in vars(config).values() if isinstance(value, int)}
    return (size for size in count(17) if size not in taken)


@contextmanager
def artifact_folder(model: Decoder) -> Iterator[Path]:
    """While this lasts the compiler keeps what it makes in this model's folder; afterwards the oldest make room."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # the compiler is slow to import

    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if before and before != default_cache_dir():  # PyTorch sets the variable to its default by itself
        yield Path(before)
        return
    folder = all_artifacts() / _key(model)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.utime(folder)  # used now: the last to go
    except OSError:  # no place to keep anything: compile all the same
        folder = Path(tempfile.mkdtemp(prefix="minillm-compiled-"))
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
        if before:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
        if folder.parent == all_artifacts():
            make_room(folder)


def all_artifacts() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillm" / "compiled"


def make_room(kept: Path) -> None:
    """Delete the folders beside `kept` that were not used for longest, until all fit MAX_BYTES.

    Only folders that bear a name made by `_key` are counted or deleted, whatever else lies there.
    """
    ours = [path for path in kept.parent.iterdir() if path.is_dir() and re.fullmatch(_NAME, path.name)]
    try:
        folders = sorted(ours, key=lambda path: path.stat().st_mtime)
        sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in folders}
    except FileNotFoundError:  # another process is making room right now: leave it to that one
        return
    for path in folders:
        if sum(sizes.values()) <= MAX_BYTES:
            return
        if path != kept:
            shutil.rmtree(path, ignore_errors=True)  # the other process may be deleting it too
            del sizes[path]


def _key(model: Decoder) -> str:
    """A name for the model's shape and format, the versions, and the hardware."""
    weight = model.embedding.weight
    hardware = torch.cuda.get_device_name(weight.device) if weight.is_cuda else platform.machine()
    layers = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in model.state_dict().items()]
    words = (model.config, model.fused, layers, torch.__version__, platform.python_version(), hardware)
    return "model-" + hashlib.sha256(repr(words).encode()).hexdigest()[:20]
