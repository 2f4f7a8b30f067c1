"""One op at one case of the catalog against its float64 reference, within its derived bound."""

import random

import torch
from catalog import CATALOG


def check(name: str, case: dict, dtype: torch.dtype, device: str = "cpu") -> None:
    entry, seed = CATALOG[name], random.SystemRandom().getrandbits(32)  # fresh inputs in every run
    inputs = entry.make_inputs(case, dtype, torch.device(device), torch.Generator(device).manual_seed(seed))
    expected = entry.reference(**inputs)
    bounds = entry.bounds(expected, **inputs)
    for index, (result, exact, bound) in enumerate(zip(entry.run(**inputs), expected, bounds, strict=True)):
        assert result.shape == exact.shape
        if not exact.is_floating_point():
            assert torch.equal(result, exact), f"result {index} is not the reference's (seed {seed})"
            continue
        assert result.dtype == dtype
        assert result.isfinite().all(), f"result {index} is not finite (seed {seed})"
        specified = ~exact.isnan()
        excess = ((result.double() - exact).abs() - bound)[specified]
        assert (excess <= 0).all(), f"result {index} is off by {excess.max():.2g} more than allowed (seed {seed})"
