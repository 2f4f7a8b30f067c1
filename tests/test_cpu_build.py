"""Building the C kernels: what is kept, what is cleaned up, and what is said when it fails."""

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from minillm_kernels.cpu import build

KERNELS = Path(__file__).parent.parent / "kernels"
QUICK = "-O0 -DMINILLM_PLAIN_C"  # how the library is made is of interest here, not how fast it is
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
PRODUCT = """
import torch
from minillm_kernels.linear import linear

print(linear(torch.ones(1, 40), torch.ones(1, 40)).item())
"""


@pytest.fixture(autouse=True)
def quick_builds(monkeypatch):
    monkeypatch.setenv("MINILLM_CFLAGS", QUICK)


def run(kernels: Path = KERNELS, **environment: str) -> subprocess.CompletedProcess:
    """A product in a process of its own, which has to build or find the library first."""
    variables = os.environ | {"PYTHONPATH": str(kernels)} | environment
    return subprocess.run([sys.executable, "-c", PRODUCT], env=variables, capture_output=True, text=True)


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "minillm" / "kernels").iterdir())


@needs_compiler
def test_the_sources_compile(monkeypatch):
    """Where there is a compiler, a suite that quietly tested PyTorch's operators would be worth nothing: what the
    compiler says is raised here."""
    monkeypatch.delenv("MINILLM_CFLAGS")
    assert build.load().minillm_linear


@needs_compiler
def test_an_empty_cc_means_the_usual_compiler(tmp_path):
    result = run(XDG_CACHE_HOME=str(tmp_path), CC="")
    assert (result.stdout, result.stderr) == ("40.0\n", "")
    assert len(kept(tmp_path)) == 1


@needs_compiler
def test_a_cache_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "a file").touch()
    (tmp_path / "temporary").mkdir()
    result = run(XDG_CACHE_HOME=str(tmp_path / "a file"), TMPDIR=str(tmp_path / "temporary"))
    assert (result.stdout, result.stderr) == ("40.0\n", "")
    assert list((tmp_path / "temporary").iterdir()) == []


@needs_compiler
def test_what_a_killed_build_left_is_removed_after_an_hour(tmp_path):
    folder = tmp_path / "minillm" / "kernels"
    for name, age in (("building-old", 2 * build.STALE), ("building-new", 0)):
        (folder / name).mkdir(parents=True)
        (folder / name / "kernels.so").touch()
        os.utime(folder / name, times=(time.time() - age,) * 2)
    assert run(XDG_CACHE_HOME=str(tmp_path)).stdout == "40.0\n"
    assert [path.name for path in kept(tmp_path) if path.is_dir()] == ["building-new"]


@needs_compiler
@pytest.mark.parametrize("damage", ["emptied", "cut off", "one byte changed"])
def test_a_damaged_library_is_built_anew(tmp_path, damage):
    cache = tmp_path / "minillm" / "kernels"
    cache.mkdir(parents=True)
    library = build.build(cache)
    good = library.read_bytes()
    changed = good[:5000] + bytes([good[5000] ^ 1]) + good[5001:]
    library.write_bytes({"emptied": b"", "cut off": good[:5000], "one byte changed": changed}[damage])
    result = run(XDG_CACHE_HOME=str(tmp_path))
    assert (result.stdout, result.stderr) == ("40.0\n", "")
    assert [path.read_bytes() for path in kept(tmp_path)] == [good]


@needs_compiler
def test_flags_of_the_environment_make_another_library(tmp_path, monkeypatch):
    plain = build.build(tmp_path)
    monkeypatch.setenv("MINILLM_CFLAGS", "-O0 -DMINILLM_PLAIN_C -DANOTHER")
    assert build.build(tmp_path) != plain


def edited(tmp_path: Path, name: str, old: str, new: str) -> Path:
    """A copy of the kernels with one edit in a C file."""
    shutil.copytree(KERNELS, tmp_path / "kernels")
    source = tmp_path / "kernels" / "minillm_kernels" / "cpu" / name
    assert old in source.read_text()
    source.write_text(source.read_text().replace(old, new, 1))
    return tmp_path / "kernels"


@needs_compiler
def test_an_error_in_the_sources_is_shown_as_what_it_is(tmp_path):
    """The compiler's own words, and no advice to install one."""
    kernels = edited(tmp_path, "step.c", "int minillm_add(", "int minillm_add(,")
    result = run(kernels, XDG_CACHE_HOME=str(tmp_path))
    assert result.stdout == "40.0\n"  # a user's program goes on
    assert "step.c" in result.stderr
    assert "error: expected" in result.stderr
    assert "Install" not in result.stderr
    assert kept(tmp_path) == []


@needs_compiler
def test_a_struct_that_is_not_what_python_packs_is_no_fallback(tmp_path):
    kernels = edited(tmp_path, "step.c", "CALL(add, int64_t x, y, out, count,", "CALL(add, int64_t x, y, count, out,")
    result = run(kernels, XDG_CACHE_HOME=str(tmp_path))
    assert result.returncode != 0
    assert "ImportError: minillm_add takes 'int64_t x, y, count, out, dtype, threads;'" in result.stderr


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("gcc") is None, reason="gcc for x86-64")
@pytest.mark.parametrize(("chip", "instruction"), [("sapphirerapids", "tdpbf16ps"), ("cooperlake", "vdpbf16ps")])
def test_the_instructions_of_chips_that_are_not_at_hand(chip, instruction):
    """They compile for it, and use what it has: tiles are emulated elsewhere in the tests, and never run there."""
    source = Path(build.__file__).with_name("gemm.c")
    command = ["gcc", "-O3", f"-march={chip}", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-S", "-o", "-"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert instruction in done.stdout


def test_the_cache_folder_is_made_or_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder("anything") == tmp_path / "minillm" / "anything"
    assert (tmp_path / "minillm" / "anything").is_dir()
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert build.cache_folder("anything") is None
