"""The C kernels: built on first use with the system's C compiler, called through ctypes.

`linear.c` knows nothing of Python or torch: no headers, no build system, one `cc` call of a few seconds whose
result is kept in `$XDG_CACHE_HOME/minillm/kernels` under a name made of the sources, the compiler and the
CPU. Without a compiler (or if the build fails) `available()` is False, one warning says why, and the ops take
their PyTorch implementation. $CC names another compiler.
"""

import ctypes
import functools
import hashlib
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

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}
CALL = struct.Struct("14q").pack  # `struct call` in linear.c
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
    failed = library().minillm_linear(
        CALL(
            FORMATS[weight.dtype], FORMATS[x.dtype], x.data_ptr(), y.numel() // max(outputs, 1), inputs,
            weight.data_ptr(), outputs, address(scale), address(zero), group_size, address(bias), y.data_ptr(),
            GATES[gate], torch.get_num_threads(),
        )
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for the activations of a {tuple(x.shape)} x {tuple(weight.shape)} product")
    return y


def address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise ValueError("scale, zero and bias must be contiguous")
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
    loaded.minillm_linear.argtypes = [ctypes.c_char_p]
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
    library_path = cache_folder() / f"linear-{key.hexdigest()[:20]}.so"
    if library_path.exists():
        return library_path

    source = next(str(path) for path in sources if path.name == "linear.c")
    # Compiled beside its final name and moved there in one step: two processes may do this at once.
    descriptor, unfinished = tempfile.mkstemp(dir=library_path.parent, suffix=".so")
    os.close(descriptor)
    try:
        for openmp in (["-fopenmp"], []):  # a compiler without OpenMP still gives a kernel for one core
            command = [compiler, *flags, *openmp, source, "-o", unfinished, "-lm"]
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
