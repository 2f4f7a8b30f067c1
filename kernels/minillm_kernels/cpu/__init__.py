"""The C kernels: built on first use with the system's C compiler, called through ctypes.

`linear.c` (matrix products), `step.c` (what lies between them) and `quantize.c` (int4 codes) know nothing of Python
or torch: no headers, no build system, one `cc` call of some seconds whose result is kept in
`$XDG_CACHE_HOME/minillm/kernels` under a name made of the sources, the compiler and the CPU. Without a compiler (or
if the build fails) `available()` is False, one warning says why, and the ops take their PyTorch implementation. $CC
names another compiler.
"""

import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shutil
import struct
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from minillm_kernels.cpu import tape

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
# The structs through which the C functions take their arguments, in the order of their members.
CALL = struct.Struct("14q").pack  # `struct call` in linear.c
NORM_CALL = struct.Struct("12q2d").pack  # `struct norm_call` in step.c, and so on
ADD_CALL = struct.Struct("6q").pack
ROPE_CALL = struct.Struct("24q").pack
ATTENTION_CALL = struct.Struct("17q2d").pack
QUANTIZE_CALL = struct.Struct("9q").pack
GATES = {None: 0, "silu": 1, "gelu_tanh": 2}


def available() -> bool:
    """True once the C kernels are built and loaded; the first call builds them."""
    return library() is not None


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group_size: int = 0,
    bias: Tensor | None = None,
    gate: str | None = None,
) -> Tensor:
    """x W^T (+ bias), or activation(x Wg^T) * (x Wu^T) with `gate`; the op that calls has checked the shapes.

    x [..., K]; weight [N, K] in x.dtype or int8, or [N, K / 2] uint8 (int4); with `gate` its first half of rows
    is Wg. scale, zero, bias as in the ops. Sums are float32 (quantized: exact int32 within a group or block).
    """
    x = x if x.is_contiguous() else x.contiguous()
    weight = weight if weight.is_contiguous() else weight.contiguous()
    inputs = x.shape[-1]
    outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    packed = CALL(
        FORMATS[weight.dtype], FORMATS[x.dtype], x.data_ptr(), y.numel() // max(outputs, 1), inputs,
        weight.data_ptr(), outputs, address(scale), address(zero), group_size, address(bias), y.data_ptr(),
        GATES[gate], torch.get_num_threads(),
    )  # fmt: skip
    _call("linear", packed, x, weight, scale, zero, bias, y)
    return y


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, offset: float, multiply_in_fp32: bool
) -> tuple[Tensor, Tensor | None]:
    """(norm, sum) as `minillm::add_rms_norm` returns them, or (norm, None) without a residual."""
    width = x.shape[-1]
    # Queries and keys are parts of one wider tensor; their heads lie side by side, so no copy is needed.
    groups = _groups(x) if residual is None else None
    if groups is None:
        x, groups = x.contiguous(), (1, width)
    out = torch.empty(x.shape, dtype=x.dtype)
    total = None
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    packed = NORM_CALL(
        x.data_ptr(), address(residual), address(weight), out.data_ptr(), address(total), x.numel() // width,
        width, FORMATS[x.dtype], multiply_in_fp32, torch.get_num_threads(), *groups, eps, offset,
    )  # fmt: skip
    _call("rms_norm", packed, x, residual, weight, out, total)
    return out, total


def _groups(x: Tensor) -> tuple[int, int] | None:
    """How the vectors of x [..., N] lie: (so many side by side, elements from one group of them to the next), or None
    where that does not tell where each one is."""
    if x.is_contiguous():
        return 1, x.shape[-1]
    side_by_side = x.shape[-2] if x.dim() > 3 else 1  # [B, T, heads, N]
    if x.stride(-1) != 1 or (side_by_side > 1 and x.stride(-2) != x.shape[-1]):
        return None
    outer = x.dim() - (2 if x.dim() > 3 else 1)
    steps = [(x.shape[i], x.stride(i)) for i in range(outer) if x.shape[i] > 1]
    if any(stride != n * inner for (_, stride), (n, inner) in itertools.pairwise(steps)):
        return None
    return side_by_side, steps[-1][1] if steps else 0


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, two contiguous tensors of one shape and dtype."""
    out = torch.empty(x.shape, dtype=x.dtype)
    packed = ADD_CALL(address(x), address(y), out.data_ptr(), out.numel(), FORMATS[x.dtype], torch.get_num_threads())
    _call("add", packed, x, y, out)
    return out


def rope_and_cache_write(q, k, v, cos, sin, k_cache, v_cache, cache_position) -> Tensor:
    """As `minillm::rope_and_cache_write`; the caches must be contiguous."""
    batch, tokens, heads, head_dim = q.shape
    q, k, v = (x if x.stride(2) == head_dim and x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin, cache_position = cos.contiguous(), sin.contiguous(), cache_position.contiguous()
    out = torch.empty((batch, heads, tokens, head_dim), dtype=q.dtype)
    packed = ROPE_CALL(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), cos.data_ptr(), sin.data_ptr(), address(k_cache),
        address(v_cache), cache_position.data_ptr(), out.data_ptr(), batch, tokens, heads, k.shape[2], head_dim,
        cos.shape[-1], k_cache.shape[2] - 1, FORMATS[q.dtype], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        torch.get_num_threads(),
    )  # fmt: skip
    _call("rope_and_cache_write", packed, q, k, v, cos, sin, k_cache, v_cache, cache_position, out)
    return out


def decode_attention(q, k, v, cache_position, scale, window, softcap, alibi_slopes) -> Tensor:
    """As `minillm::decode_attention`; k and v may be views of a longer cache that cut off slots at the end.

    The result, [B, H, T, D] like q, lies in memory as [B, T, H, D]: what follows wants the heads side by side.
    """
    q, cache_position = q.contiguous(), cache_position.contiguous()
    batch, heads, tokens, head_dim = q.shape
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype)
    packed = ATTENTION_CALL(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), cache_position.data_ptr(), address(alibi_slopes),
        out.data_ptr(), batch, heads, k.shape[1], tokens, head_dim, k.shape[2], k.stride(0), k.stride(1),
        FORMATS[q.dtype], window or 0, torch.get_num_threads(), scale, softcap or 0.0,
    )  # fmt: skip
    _call("decode_attention", packed, q, k, v, cache_position, alibi_slopes, out)
    return out.transpose(1, 2)


def _call(name: str, packed: bytes, *tensors: Tensor | None) -> None:
    """Call a C function that works on `tensors`; each returns 0, or 1 where it could not have its memory."""
    function = getattr(library(), f"minillm_{name}")
    if function(packed):
        raise MemoryError(f"no memory for a {name} of {[tuple(t.shape) for t in tensors if t is not None]}")
    tape.note(function, packed, tensors)


def blank_tape() -> tape.Tape:
    """A tape to record C calls on; only where they are `available`."""
    return tape.Tape(library().minillm_replay)


def quantize_int4(weight: Tensor, group_size: int, packed: Tensor, scale: Tensor, zero: Tensor) -> bool:
    """Fill packed [N, K / 2], scale and zero [K / G, N] with weight [N, K] in int4, a layout as in `int4_linear`.

    Returns False, with nothing useful filled in, when a weight is infinite or not a number.
    """
    weight = weight.contiguous()
    failed = library().minillm_quantize_int4(
        QUANTIZE_CALL(
            FORMATS[weight.dtype], weight.data_ptr(), *weight.shape, group_size, address(packed), address(scale),
            address(zero), torch.get_num_threads(),
        )
    )  # fmt: skip
    return not failed


def address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise ValueError("weights, scales, biases and caches must be contiguous")
    return tensor.data_ptr()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None with one warning that says why not."""
    try:
        path = build()
        loaded = ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"minillm runs on PyTorch's CPU operators, which are slower: the C kernels are missing ({error}). "
            f"Install a C compiler (gcc or clang), or name one in $CC.",
            stacklevel=2,
        )
        return None
    for name in ("linear", "rms_norm", "add", "rope_and_cache_write", "decode_attention", "quantize_int4"):
        getattr(loaded, f"minillm_{name}").argtypes = [ctypes.c_char_p]
    loaded.minillm_replay.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    return loaded


def build() -> Path:
    """Path of the shared library, compiled unless a former run left it in the cache folder."""
    words = os.environ.get("CC", "cc").split()
    compiler = shutil.which(words[0])
    if compiler is None:
        raise RuntimeError(f"no C compiler: {words[0]!r} is not on the PATH")
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = [*words[1:], "-O3", tune, "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
    key = hashlib.sha256(repr((compiler, os.stat(compiler).st_mtime_ns, flags, cpu_name())).encode())
    for source in sources:
        key.update(source.read_bytes())
    library_path = cache_folder() / f"kernels-{key.hexdigest()[:20]}.so"
    if library_path.exists():
        return library_path

    units = [str(path) for path in sources if path.suffix == ".c"]
    # Compiled beside its final name and moved there in one step: two processes may do this at once.
    descriptor, unfinished = tempfile.mkstemp(dir=library_path.parent, suffix=".so")
    os.close(descriptor)
    try:
        for openmp in (["-fopenmp"], []):  # a compiler without OpenMP still gives a kernel for one core
            command = [compiler, *flags, *openmp, *units, "-o", unfinished, "-lm"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode == 0:
                os.replace(unfinished, library_path)
                return library_path
    finally:
        Path(unfinished).unlink(missing_ok=True)
    raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()[:500] or result.returncode}")


def cache_folder() -> Path:
    """Where built kernels are kept; a private temporary folder when the user's cache cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillm" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="minillm-kernels-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="minillm-kernels-"))


def cpu_name() -> str:
    """What `-march=native` depends on: the CPU model and its instruction set flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
