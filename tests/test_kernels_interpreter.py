"""Every Triton kernel in Triton's interpreter: runs `interpreted_kernels.py` with the interpreter switched on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).with_name("interpreted_kernels.py")


def test_every_kernel_in_the_interpreter():
    pytest.importorskip("triton", reason="Triton is not available for this platform")
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", str(TESTS)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    summary = result.stdout.splitlines()[-1]
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in summary, summary
    assert "skipped" not in summary, summary
