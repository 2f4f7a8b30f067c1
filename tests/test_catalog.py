"""The CPU implementations of every op, the C and the PyTorch one, against the float64 references of the catalog."""

import pytest
import torch
from catalog import CATALOG
from catalog_parity import check
from minillm_kernels import cpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Without C these multiply in the activations' dtype, which in 16 bits is coarser than the catalog's bound for a
# kernel that sums in float32; test_cpu_kernels.py holds them to a bound of their own.
COARSE = ("int8_linear", "int4_linear", "gated_mlp")


def cases(dtypes_of):
    return [
        pytest.param(name, case, dtype, id=f"{name}, {case}, {dtype}")
        for name, entry in CATALOG.items()
        for case in entry.small_cases
        for dtype in dtypes_of(name)
    ]


@pytest.mark.parametrize(("name", "case", "dtype"), cases(lambda name: DTYPES))
def test_the_c_kernels(name, case, dtype):
    if not cpu.available():
        pytest.skip("no C compiler")
    check(name, CATALOG[name].small_cases[case], DTYPES[dtype])


@pytest.mark.parametrize(("name", "case", "dtype"), cases(lambda name: ["float32"] if name in COARSE else DTYPES))
def test_the_pytorch_code_without_a_compiler(name, case, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    check(name, CATALOG[name].small_cases[case], DTYPES[dtype])
