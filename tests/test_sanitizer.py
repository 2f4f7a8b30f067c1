"""The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer: no byte read or written outside a tensor.

A read past a tensor goes unnoticed until the day it meets a page that is not there. Here the library is built with
gcc's sanitizers ($MINILLM_CFLAGS), in processes of their own, because the sanitizer's runtime must be loaded before
anything else. PyTorch takes its memory from malloc, which the runtime replaces, so it knows where each tensor ends.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None, reason="gcc's sanitizers need gcc on Linux"
)

GENERATION = """
import torch
from minillm import LLM
from minillm_kernels import sampling

torch.set_num_threads(2)
for quantize in (None, "int8", "int4-g32"):
    for compile in ("auto", False):
        llm = LLM.from_pretrained("demo", quantize=quantize, quantize_head=quantize is not None, compile=compile)
        assert llm.generate("Once upon a time there was", max_new_tokens=20, eos_token_id=[]).stats
        assert llm.generate(" ".join(["The dog and the cat."] * 20), max_new_tokens=3, top_p=0.9).stats
        assert llm.generate(["The", "The dog and the cat"], max_new_tokens=5, prompt_lookup_num_tokens=3)
# A draft model that samples: its own drafts come back to a verifier, which C is asked for.
judged, verify = 0, sampling.verify
def counting(*arguments):
    global judged
    found = verify(*arguments)
    judged += found is not None
    return found
sampling.verify = counting
llm.generate(["The", "The dog"], max_new_tokens=5, assistant_model=llm, num_assistant_tokens=3, temperature=1.0, seed=0)
assert judged, "no draft was judged in C"
"""
RAGGED_PRODUCT = """
import torch
from minillm_kernels.int4_linear import int4_linear

N, K = 33, 544  # a register of 16 groups, and one: what is read for that begins two bytes before the end
packed, zero = torch.zeros(N, K // 2, dtype=torch.uint8), torch.zeros(K // 32, N, dtype=torch.uint8)
x = torch.ones(7, K)
x[::2, 3] = 1e5  # rows that are multiplied as two
print(int4_linear(x, packed, torch.ones(K // 32, N).half(), zero, 32).sum().item())
"""


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Runs Python with these arguments and the sanitized library, from the kernels in `kernels`."""
    runtimes = [printed(f"-print-file-name={name}") for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")]
    missing = [name for name in runtimes if not os.path.isabs(name)]
    assert not missing, f"gcc is here, but not its {missing}: the sanitizers cannot run (on Debian: apt install gcc)"
    environment = os.environ | {
        "CC": "gcc",
        "MINILLM_CFLAGS": "-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "LD_PRELOAD": " ".join(runtimes),  # the last one, or the first C++ exception in PyTorch finds no handler
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch keep much until the end
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("sanitized")),
    }

    def run(*arguments: str, kernels: Path = ROOT / "kernels", **more: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join([str(kernels), str(ROOT), *sys.path])
        variables = environment | {"PYTHONPATH": path} | more
        return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, cwd=ROOT)

    return run


def printed(question: str) -> str:
    return subprocess.run(["gcc", question], capture_output=True, text=True, check=True).stdout.strip()


def report(result: subprocess.CompletedProcess) -> str:
    lines = (result.stdout + result.stderr).splitlines()
    start = next((i for i, line in enumerate(lines) if "Sanitizer" in line or "runtime error" in line), 0)
    return "\n".join(lines[start : start + 40])


def test_a_planted_read_past_a_tensor_is_noticed(sanitized, tmp_path):
    """Without the copy of a ragged block's scales, int4 reads on to the end of a register."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    source = tmp_path / "kernels" / "minillm_kernels" / "cpu" / "linear.c"
    code = source.read_text()
    assert code.count("if (count < LANES) {") == 1
    source.write_text(code.replace("if (count < LANES) {", "if (0) {"))
    # Names for the addresses of PyTorch's part of the stack would take a minute.
    options = "detect_leaks=0:symbolize=0"
    result = sanitized("-c", RAGGED_PRODUCT, kernels=tmp_path / "kernels", ASAN_OPTIONS=options)
    assert result.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in result.stderr, result.stderr[-2000:]
    assert sanitized("-c", RAGGED_PRODUCT).returncode == 0


def test_the_kernel_tests(sanitized):
    """Every case of the catalog, and arguments of every kind of wrongness (`-s`: the report must not be captured)."""
    files = [
        str(ROOT / "tests" / name)
        for name in ("test_catalog.py", "test_kernel_arguments.py", "test_prefill_kernels.py")
    ]
    result = sanitized(
        "-m", "pytest", "-s", "-p", "no:cacheprovider", "-k", "c_kernels or C- or native or chunk or spoiled", *files
    )
    assert result.returncode == 0, report(result)
    summary = result.stdout.splitlines()[-1]
    assert "passed" in summary, summary
    assert "skipped" not in summary, summary


def test_a_generation(sanitized):
    """Prefill, recorded and eager steps, several rows, drafts to verify, in each weight format."""
    result = sanitized("-c", GENERATION)
    assert result.returncode == 0, report(result)
    assert "PyTorch's CPU operators" not in result.stderr
