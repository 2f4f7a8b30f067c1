"""rms_norm: RMSNorm, or with `center` LayerNorm, over the last dimension."""

import torch
import torch.nn.functional as F
from minillm_kernels.norm import rms_norm

from catalog.entry import Entry, Results, rounding, unit


def rms_norm_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    random = {"generator": generator, "device": device}
    shape = case["shape"]
    inputs = {"x": torch.randn(shape, **random).to(dtype)}
    if case.get("strided"):  # every other row of something: rows evenly spaced, not adjacent
        inputs["x"] = torch.randn(2 * shape[0], *shape[1:], **random).to(dtype)[::2]
    inputs["x"] = inputs["x"] + case.get("mean", 0)
    inputs["weight"] = torch.randn(shape[-1], **random).to(dtype)
    inputs["eps"] = case.get("eps", 1e-6)
    inputs["offset"] = case.get("offset", 0.0)
    inputs["multiply_in_fp32"] = case["multiply_in_fp32"]
    inputs["bias"] = torch.randn(shape[-1], **random).to(dtype) if case.get("bias") else None
    inputs["center"] = case.get("center", False)
    return inputs


def rms_norm_reference(x, weight, eps, offset, multiply_in_fp32, bias=None, center=False) -> Results:
    wide = x.double()
    if center:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())
    return (normed if bias is None else normed + bias.double(),)


def centring(x, weight, eps, offset) -> torch.Tensor:
    """What an error of all of x relative to it moves its LayerNorm by: nothing cancels in the worst case."""
    wide = x.double()
    deviation = (wide.var(-1, keepdim=True, correction=0) + eps).sqrt()
    return (wide.abs() + wide.abs().mean(-1, keepdim=True)) / deviation * (offset + weight.double()).abs()


def rms_norm_bounds(expected, x, weight, eps, offset, multiply_in_fp32, bias=None, center=False) -> Results:
    """One rounding of the result, two when it is rounded before the multiplication as well. In float32: a
    sum of N squares whose roundings walk randomly, sqrt(N) * 2^-24, halved by the square root; 6 more
    operations. LayerNorm: the mean, a sum of N as well, and each difference from it; the bias rounds once more."""
    (normed,) = expected
    steps = x.shape[-1] ** 0.5 / 2 + 6
    bound = rounding(normed, x.dtype) + steps * rounding(normed, torch.float32)
    if center:
        bound = bound + steps * unit(torch.float32) * centring(x, weight, eps, offset)
    if bias is not None:
        bound = bound + steps * rounding(normed.abs() + bias.double().abs(), torch.float32)
    if not multiply_in_fp32:
        bound = bound + weight.double().abs() * rounding(normed / weight.double(), x.dtype)
    return (bound,)


NORM_CASES = {
    "Llama": dict(shape=(3, 64), multiply_in_fp32=False, eps=1e-5),
    "Gemma": dict(shape=(2, 3, 96), multiply_in_fp32=True, offset=1.0),
    "OLMo 2": dict(shape=(2, 2, 2, 48), multiply_in_fp32=True),
    "odd size, large eps": dict(shape=(2, 77), multiply_in_fp32=True, eps=0.5),
    "strided rows": dict(shape=(3, 64), multiply_in_fp32=False, strided=True),
    "LayerNorm": dict(shape=(2, 3, 96), multiply_in_fp32=True, center=True, bias=True, eps=1e-5),
    "LayerNorm without bias, odd size": dict(shape=(2, 77), multiply_in_fp32=True, center=True),
    "LayerNorm far from zero": dict(shape=(5, 65), multiply_in_fp32=True, center=True, bias=True, mean=30),
    "wider than 8192": dict(shape=(1, 9000), multiply_in_fp32=False),
}
NORM_MODEL_CASES = {
    "Llama-2-7B, 1 row": dict(shape=(1, 4096), multiply_in_fp32=False),
    "Gemma-2b, 1 row": dict(shape=(1, 2048), multiply_in_fp32=True, offset=1.0),
    "Llama-3-8B, 2048 rows": dict(shape=(2048, 4096), multiply_in_fp32=False),
    "Llama-3-70B, 512 rows": dict(shape=(512, 8192), multiply_in_fp32=False),
    "GPT-2, 1 row": dict(shape=(1, 768), multiply_in_fp32=True, center=True, bias=True),
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
