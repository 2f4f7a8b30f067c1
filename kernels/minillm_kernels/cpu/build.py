"""Building the C kernels: one `cc` call of some seconds, whose result is kept.

`linear.c` and `gemm.c` (products of few rows and of many), `step.c` and `glue.c` (what lies between them),
`flash_attention.c` (a prompt's attention), `sampling.c` (from logits to a token), `quantize.c` (int4 codes) and
`threads.c` (who computes them) know nothing of Python or torch: no headers, no build system. The library lies in
`$XDG_CACHE_HOME/minillm/kernels` under a name made of the sources, the compiler and the CPU, and of its own contents,
so that a damaged file is noticed. $CC names another compiler, $MINILLM_CFLAGS more flags for it.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

SCRATCH = "building-"  # folders that a build works in; one that was killed leaves its own behind
STALE = 3600  # seconds after which nobody works in one any more


class BuildError(RuntimeError):
    """There is no library, and why."""


def load() -> ctypes.CDLL:
    """The library, compiled unless a former run left it in the cache. Raises BuildError or OSError.

    Where the cache cannot be written the library is compiled for this process alone, and its file deleted once loaded.
    """
    folder = cache_folder("kernels")
    if folder is not None:
        return ctypes.CDLL(str(build(folder)))
    with tempfile.TemporaryDirectory(prefix="minillm-kernels-") as temporary:
        return ctypes.CDLL(str(build(Path(temporary))))


def cache_folder(name: str) -> Path | None:
    """`$XDG_CACHE_HOME/minillm/<name>`, made if need be, for what can be made again; None where that cannot be."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillm" / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def build(folder: Path) -> Path:
    """Path of the library in `folder`, compiled unless it is there already."""
    words = os.environ.get("CC", "").split() or ["cc"]
    compiler = shutil.which(words[0])
    if compiler is None:
        raise BuildError(
            f"no C compiler: {words[0]!r} is not on the PATH. Install one (gcc or clang), or name one in $CC"
        )
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    tune = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    flags = [*words[1:], "-O3", tune, "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread"]
    flags += os.environ.get("MINILLM_CFLAGS", "").split()
    key = hashlib.sha256(repr((compiler, os.stat(compiler).st_mtime_ns, flags, cpu_name())).encode())
    for source in sources:
        key.update(source.read_bytes())
    stem = f"kernels-{key.hexdigest()[:20]}"
    for kept in folder.glob(f"{stem}-*.so"):
        if kept.name == _name(stem, kept):
            return kept
        kept.unlink(missing_ok=True)

    _remove_stale(folder)
    # In a folder of its own, and moved to its name in one step: two processes may do this at once.
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        unfinished = Path(scratch) / "kernels.so"
        units = [str(path) for path in sources if path.suffix == ".c"]
        command = [compiler, *flags, *units, "-o", str(unfinished), "-lm"]
        environment = os.environ | {"TMPDIR": scratch}  # the compiler's own temporaries
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if result.returncode == 0:
            return unfinished.replace(folder / _name(stem, unfinished))
    raise BuildError(f"{' '.join(command)} failed:\n{result.stderr.strip()[:4000] or result.returncode}")


def _name(stem: str, library: Path) -> str:
    return f"{stem}-{hashlib.sha256(library.read_bytes()).hexdigest()[:20]}.so"


def _remove_stale(folder: Path) -> None:
    """Remove what builds that were killed have left."""
    for path in folder.glob(f"{SCRATCH}*"):
        try:
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path)
        except OSError:  # another process was faster
            pass


def cpu_name() -> str:
    """What `-march=native` depends on: the CPU model and its instruction set flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
