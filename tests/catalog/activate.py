"""activate: an MLP's activation on its own, of each element or of one half times the other."""

import torch
from minillm_kernels.activation import activate
from torch import Tensor

from catalog.entry import Entry, Results, rounding, unit

DEFINITIONS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + torch.special.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


def activate_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    x = 3 * torch.randn(case["shape"], generator=generator, device=device)
    return {"x": x.to(dtype), "activation": case["activation"], "gated": case.get("gated", False)}


def halves(x: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    return x.double().chunk(2, dim=-1) if gated else (x.double(), torch.ones((), dtype=torch.float64, device=x.device))


def activate_reference(x, activation, gated) -> Results:
    gate, up = halves(x, gated)
    return (DEFINITIONS[activation](gate) * up,)


def activate_bounds(expected, x, activation, gated) -> Results:
    """Some ten float32 operations on values no larger than x (erf within 2e-7, so 4 units of x); then it is rounded
    once, or in PyTorch's own code before the product as well."""
    gate, up = halves(x, gated)
    bound = rounding(expected[0], x.dtype)
    if gated:
        bound = bound + rounding(DEFINITIONS[activation](gate), x.dtype) * up.abs()
    return (bound + 16 * unit(torch.float32) * (gate * up).abs() * gate.abs().clamp(min=1),)


ENTRY = Entry(
    op=activate,
    make_inputs=activate_inputs,
    reference=activate_reference,
    bounds=activate_bounds,
    bytes_moved=lambda x, gated, **_: (3 if gated else 4) * x.numel() * x.element_size() // 2,
    small_cases={
        f"{activation}, {shape}": dict(shape=shape, activation=activation, gated=gated)
        for activation in DEFINITIONS
        for shape, gated in (((3, 77), False), ((2, 1, 1500), False), ((2, 2 * 1100), True))
    },
    model_cases={
        "GPT-2, 1 row": dict(shape=(1, 3072), activation="gelu_tanh"),
        "Pythia-6.9b, 1 row": dict(shape=(1, 16384), activation="gelu"),
        "OPT-6.7b, 16 rows": dict(shape=(16, 16384), activation="relu"),
    },
)
