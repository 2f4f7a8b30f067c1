"""angles: cosine and sine of position * frequency, as rotary embedding wants them."""

import torch
from minillm_kernels.rope import angles

from catalog.entry import Entry, Results, unit


def angles_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """Always float32, whatever the activations are."""
    batch, tokens, half = case["shape"]
    highest = case.get("highest", 4096)
    position = torch.randint(-1, highest, (batch, tokens), generator=generator, device=device)
    rows = batch if case.get("own") else 1
    stretch = 1 + torch.rand(rows, 1, generator=generator, device=device)
    frequency = 10000.0 ** -(torch.arange(half, device=device) / half)  # [R / 2]
    return {"position": position, "frequency": frequency / stretch, "scale": case.get("scale", 1.0)}


def angles_reference(position, frequency, scale) -> Results:
    """Of the angle as float32 has it: that rounding belongs to the definition, models were trained with it."""
    angle = (position[:, :, None].float() * frequency[:, None, :]).double()
    return angle.cos() * scale, angle.sin() * scale


def angles_bounds(expected, position, frequency, scale) -> Results:
    """Within a unit in the last place of numbers up to 1, then a product."""
    return tuple(torch.full_like(value, 4 * unit(torch.float32) * scale) for value in expected)


ENTRY = Entry(
    op=angles,
    make_inputs=angles_inputs,
    reference=angles_reference,
    bounds=angles_bounds,
    bytes_moved=lambda position, frequency, **_: 8 * position.numel() * frequency.shape[1],
    dtypes=("float32",),
    small_cases={
        "one token": dict(shape=(1, 1, 32)),
        "rows, each with its clock": dict(shape=(3, 5, 17), own=True, scale=1.25),
        "far positions": dict(shape=(2, 300, 64), highest=2**20),
    },
    model_cases={
        "Llama-3-8B, 1 token": dict(shape=(1, 1, 64)),
        "Llama-3-8B, 256 tokens": dict(shape=(1, 256, 64)),
    },
)
