"""rms_norm: RMSNorm over the last dimension."""

import torch
import torch.nn.functional as F
from minillm_kernels.norm import rms_norm

from catalog.entry import Entry, Results, rounding


def rms_norm_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    random = {"generator": generator, "device": device}
    shape = case["shape"]
    inputs = {"x": torch.randn(shape, **random).to(dtype)}
    if case.get("strided"):  # every other row of something: rows evenly spaced, not adjacent
        inputs["x"] = torch.randn(2 * shape[0], *shape[1:], **random).to(dtype)[::2]
    inputs["weight"] = torch.randn(shape[-1], **random).to(dtype)
    inputs["eps"] = case.get("eps", 1e-6)
    inputs["offset"] = case.get("offset", 0.0)
    inputs["multiply_in_fp32"] = case["multiply_in_fp32"]
    return inputs


def rms_norm_reference(x, weight, eps, offset, multiply_in_fp32) -> Results:
    wide = x.double()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double()),)


def rms_norm_bounds(expected, x, weight, eps, offset, multiply_in_fp32) -> Results:
    """One rounding of the result, two when it is rounded before the multiplication as well. In float32: a
    sum of N squares whose roundings walk randomly, sqrt(N) * 2^-24, halved by the square root; 6 more
    operations."""
    (normed,) = expected
    bound = rounding(normed, x.dtype) + (x.shape[-1] ** 0.5 / 2 + 6) * rounding(normed, torch.float32)
    if not multiply_in_fp32:
        bound = bound + weight.double().abs() * rounding(normed / weight.double(), x.dtype)
    return (bound,)


NORM_CASES = {
    "Llama": dict(shape=(3, 64), multiply_in_fp32=False, eps=1e-5),
    "Gemma": dict(shape=(2, 3, 96), multiply_in_fp32=True, offset=1.0),
    "OLMo 2": dict(shape=(2, 2, 2, 48), multiply_in_fp32=True),
    "odd size, large eps": dict(shape=(2, 77), multiply_in_fp32=True, eps=0.5),
    "strided rows": dict(shape=(3, 64), multiply_in_fp32=False, strided=True),
    "wider than 8192": dict(shape=(1, 9000), multiply_in_fp32=False),
}
NORM_MODEL_CASES = {
    "Llama-2-7B, 1 row": dict(shape=(1, 4096), multiply_in_fp32=False),
    "Gemma-2b, 1 row": dict(shape=(1, 2048), multiply_in_fp32=True, offset=1.0),
    "Llama-3-8B, 2048 rows": dict(shape=(2048, 4096), multiply_in_fp32=False),
    "Llama-3-70B, 512 rows": dict(shape=(512, 8192), multiply_in_fp32=False),
    "16384 wide, 128 rows": dict(shape=(128, 16384), multiply_in_fp32=False),
}

ENTRY = Entry(
    op=rms_norm,
    make_inputs=rms_norm_inputs,
    reference=rms_norm_reference,
    bounds=rms_norm_bounds,
    bytes_moved=lambda x, weight, **_: (2 * x.numel() + weight.numel()) * x.element_size(),
    small_cases=NORM_CASES,
    model_cases=NORM_MODEL_CASES,
    library=("F.rms_norm", lambda x, weight, eps, **_: lambda: F.rms_norm(x, weight.shape, weight, eps)),
)
