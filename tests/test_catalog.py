"""The CPU implementations of every op, the C and the PyTorch one, against the float64 references of the catalog."""

import pytest
import torch
from catalog import CATALOG, SMALL_CASES
from catalog_parity import check
from minillm_kernels import cpu

# Without C these multiply in the activations' dtype, which in 16 bits is coarser than the catalog's bound for a
# kernel that sums in float32; test_cpu_kernels.py holds them to a bound of their own.
COARSE = ("int8_linear", "int4_linear", "gated_mlp")


def named(cases):
    return [pytest.param(*case, id=f"{case[0]}, {case[1]}, {str(case[2])[6:]}") for case in cases]


@pytest.mark.parametrize(("name", "case", "dtype"), named(SMALL_CASES))
def test_the_c_kernels(name, case, dtype):
    if not cpu.available():
        pytest.skip("no C compiler")
    check(name, CATALOG[name].small_cases[case], dtype)


@pytest.mark.parametrize(
    ("name", "case", "dtype"),
    named(case for case in SMALL_CASES if case[0] not in COARSE or case[2] == torch.float32),
)
def test_the_pytorch_code_without_a_compiler(name, case, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    check(name, CATALOG[name].small_cases[case], dtype)
