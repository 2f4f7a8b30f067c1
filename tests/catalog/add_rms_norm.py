"""add_rms_norm: the residual addition, then RMSNorm."""

import torch
from minillm_kernels.norm import add_rms_norm

from catalog.entry import Entry, Results, rounding, unit
from catalog.rms_norm import (
    NORM_CASES,
    NORM_MODEL_CASES,
    centring,
    rms_norm_bounds,
    rms_norm_inputs,
    rms_norm_reference,
)


def add_rms_norm_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    residual = torch.randn(case["shape"], generator=generator, device=device).to(dtype)
    return rms_norm_inputs(case, dtype, device, generator) | {"residual": residual}


def add_rms_norm_reference(x, residual, weight, eps, offset, multiply_in_fp32, bias=None, center=False) -> Results:
    total = x.double() + residual.double()
    return (*rms_norm_reference(total, weight, eps, offset, multiply_in_fp32, bias, center), total)


def add_rms_norm_bounds(
    expected, x, residual, weight, eps, offset, multiply_in_fp32, bias=None, center=False
) -> Results:
    """As for rms_norm; the sum is rounded too, which moves an element and the norm by one unit each."""
    normed, total = expected
    (bound,) = rms_norm_bounds((normed,), total.to(x.dtype), weight, eps, offset, multiply_in_fp32, bias, center)
    moved = centring(total, weight, eps, offset) if center else normed.abs()
    return bound + 2 * unit(x.dtype) * moved, rounding(total, x.dtype)


ENTRY = Entry(
    op=add_rms_norm,
    make_inputs=add_rms_norm_inputs,
    reference=add_rms_norm_reference,
    bounds=add_rms_norm_bounds,
    bytes_moved=lambda x, weight, **_: (4 * x.numel() + weight.numel()) * x.element_size(),
    small_cases=NORM_CASES,
    model_cases=NORM_MODEL_CASES,
)
