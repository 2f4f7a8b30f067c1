"""`import minillm` is light: no device is asked, nothing heavy comes along, and it costs little over torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import minillm

ROOT = Path(__file__).parent.parent

# Every function of torch.cuda that could touch a driver raises; so does opening a socket.
NO_DEVICES = """
import socket, torch
def forbidden(*args, **kwargs):
    raise AssertionError("asked a device or the network at import time")
names = ("is_available device_count current_device get_device_properties get_device_capability "
         "get_device_name init _lazy_init mem_get_info synchronize").split()
for name in names:
    setattr(torch.cuda, name, forbidden)
torch.backends.mps.is_available = torch.accelerator.is_available = forbidden
socket.socket.connect = socket.create_connection = forbidden
"""

HEAVY = [
    "transformers",
    "matplotlib",
    "triton",
    "huggingface_hub",
    "torch._inductor",
    "torch._dynamo",
    "torch.distributed.tensor",
    "pandas",
    "requests",
]


# One process: what came along, and what it cost on top of torch.
MEASURE = """
import json, sys, time
start = time.perf_counter()
import torch
middle, cpu, before = time.perf_counter(), time.process_time(), set(sys.modules)
from minillm import LLM
print(json.dumps({
    "torch": middle - start, "minillm": time.perf_counter() - middle, "cpu": time.process_time() - cpu,
    "new": sorted(set(sys.modules) - before),
}))
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured() -> dict:
    return json.loads(python(MEASURE))


def test_no_device_query():
    python(NO_DEVICES + "import minillm\nfrom minillm import LLM, StaticCache, GenerationConfig")


def test_nothing_heavy_beyond_what_torch_brings(measured):
    assert "minillm.llm" in measured["new"]
    assert [name for name in measured["new"] if name in HEAVY] == []


def test_import_adds_little_to_torch(measured):
    """Reported, and asserted loosely: the goal is 0.3 s on an idle machine, a busy one needs room."""
    print(
        f"import torch {measured['torch']:.2f} s, then import minillm {measured['minillm']:.2f} s "
        f"({measured['cpu']:.2f} s of CPU)"
    )
    assert measured["cpu"] < 1.0


def test_public_names():
    assert {"LLM", "StaticCache", "GenerationConfig", "decode_one_token", "MinillmError"} <= set(minillm.__all__)
    for name in minillm.__all__:
        getattr(minillm, name)
