"""torch.compile for the decoder: few graphs, none of them twice, and the next process starts with them.

What usually hurts about `torch.compile` is that each new length compiles again, that it happens in the middle of a
request, and that the next process begins with nothing. Here

* every size but those of the weights is left open (`dynamic=True`), so there are at most four graphs (six on a GPU):
  for one or several rows, of one or several tokens. One is a size of its own to PyTorch; everything above it is alike;
* a graph is compiled on sizes made up for it, never on a request's: two that happen to be equal (rows and
  heads, say) would be taken for the same thing, and the next request would compile again;
* each is announced on stderr; `warm_up` makes the two for a single row, and `LLM.from_pretrained(compile=True)`
  calls it;
* what the compiler writes stays in `$XDG_CACHE_HOME/minillm/compiled` (`~/.cache/minillm/compiled`), which PyTorch
  keeps in order by itself; with TORCHINDUCTOR_CACHE_DIR set, there.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice

import torch
from minillm_kernels.cpu.build import cache_folder
from torch import Tensor

from minillm.attention import FEW_ROWS, Rotary
from minillm.cache import StaticCache
from minillm.config import ModelConfig
from minillm.errors import BackendError
from minillm.model import Decoder

_KEYS_ROUNDED_TO = 128  # a compiled step reads keys in whole blocks of so many


class CompiledWalk:
    """`Decoder.walk` as compiled graphs, called with the same arguments.

    `compilations` lists what was compiled so far, and the seconds each took. Raises `BackendError` where the
    compiler fails, for want of a C++ compiler for instance.
    """

    def __init__(self, model: Decoder):
        self.model = model
        self.compilations: list[tuple[str, float]] = []
        self._ready: set[tuple[bool, bool, bool]] = set()  # (several rows, several tokens, more than a few)
        self._run = torch.compile(model.walk, fullgraph=True, dynamic=True)

    def warm_up(self) -> None:
        """Compile what a request of one prompt needs."""
        for several_tokens in (True, False):
            self._prepare((False, several_tokens, several_tokens and self._by_width))

    @torch.inference_mode()
    def __call__(
        self,
        x: Tensor,
        rotary: list[Rotary],
        cache_position: Tensor,
        cache: StaticCache,
        bound: int | None = None,
        from_start: bool = False,
    ) -> Tensor:
        """The last hidden state of every token, `[B, T, d]`."""
        rows, tokens = cache_position.shape
        kind = (rows > 1, tokens > 1, tokens > FEW_ROWS and self._by_width)
        if kind not in self._ready:
            self._prepare(kind)
        blocks = -(-(bound or cache.max_cache_len) // _KEYS_ROUNDED_TO)
        bound = min(blocks * _KEYS_ROUNDED_TO, cache.max_cache_len)
        # Copies made here are inference tensors, whatever the caller's are: the compiler tells those apart too.
        x, position = x.clone(), cache_position.clone()
        return self._run(x, [(cos.clone(), sin.clone()) for cos, sin in rotary], position, cache, bound)

    @property
    def _by_width(self) -> bool:
        """Whether the model attends by another kernel where tokens are many: that is a graph of its own."""
        return self.model.backend.name == "kernels" and self.model.embedding.weight.is_cuda

    @torch.inference_mode()
    def _prepare(self, kind: tuple[bool, bool, bool]) -> None:
        several_rows, several_tokens, many_tokens = kind
        tokens_label = "many tokens" if many_tokens else "several tokens" if several_tokens else "one token"
        label = f"{'several rows' if several_rows else 'one row'}, {tokens_label}"
        weight = self.model.embedding.weight
        sizes = _unlike(self.model.config)
        rows, tokens = next(sizes) if several_rows else 1, next(sizes) if several_tokens else 1
        if several_tokens and self._by_width and not many_tokens:
            tokens = next(_unlike(self.model.config, 3))  # up to FEW_ROWS of them
        bound, capacity = islice(sizes, 2)
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
            with settings, artifact_folder(), compiler_errors("use compile='auto'"):
                self._run(*self.model.embed(input_ids, position, cache), position, cache, bound)
        finally:
            seconds = time.perf_counter() - started
            print(f" {seconds:.1f} s", file=sys.stderr, flush=True)
        self.compilations.append((label, seconds))
        self._ready.add(kind)


def _unlike(config: ModelConfig, least: int = FEW_ROWS + 1) -> Iterator[int]:
    """Small sizes from `least`, ascending, that no dimension of the model has, so that none is taken for another."""
    taken = {value for value in vars(config).values() if isinstance(value, int)}
    return (size for size in count(least) if size not in taken)


@contextmanager
def compiler_errors(instead: str) -> Iterator[None]:
    """While this lasts an error of PyTorch's compiler, whose own message runs over pages, is a `BackendError`.

    A process that is killed while it compiles leaves files behind that are not whole, which every later one would fail
    to load: hence the folder in the message (that of `artifact_folder`, inside of it).
    """
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException, TorchRuntimeError

        if not isinstance(error, TorchDynamoException) or isinstance(error, TorchRuntimeError):
            raise  # the latter is an error of what is compiled
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        way_out = f"if files in {cache_dir()} are damaged, remove that folder and try again, or {instead}"
        raise BackendError(f"torch.compile failed: {reason}; {way_out}") from error


@contextmanager
def artifact_folder() -> Iterator[None]:
    """While this lasts PyTorch keeps what it compiles in our folder; not where the user names one, or it cannot be."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # the compiler is slow to import

    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    # PyTorch sets the variable to its default by itself; anything else in it is the user's wish.
    folder = cache_folder("compiled") if before in (None, default_cache_dir()) else None
    if folder is None:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
