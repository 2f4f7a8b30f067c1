"""One op at one case of the catalog against its float64 reference, within its derived bound."""

import random

import torch
from minillm_kernels.catalog import CATALOG


def check(name: str, case: dict, dtype: torch.dtype) -> None:
    entry, seed = CATALOG[name], random.SystemRandom().getrandbits(32)  # fresh inputs in every run
    inputs = entry.make_inputs(case, dtype, torch.device("cpu"), torch.Generator().manual_seed(seed))
    expected = entry.reference(**inputs)
    bounds = entry.bounds(expected, **inputs)
    for index, (result, exact, bound) in enumerate(zip(entry.run(**inputs), expected, bounds, strict=True)):
        assert result.dtype == dtype
        assert result.shape == exact.shape
        assert result.isfinite().all(), f"result {index} is not finite (seed {seed})"
        specified = ~exact.isnan()
        excess = ((result.double() - exact).abs() - bound)[specified]
        assert (excess <= 0).all(), f"result {index} is off by {excess.max():.2g} more than allowed (seed {seed})"
