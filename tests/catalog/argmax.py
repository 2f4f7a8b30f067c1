"""argmax: where each row is largest, or first no number."""

import torch
from minillm_kernels.sampling import argmax

from catalog.entry import Entry, Results


def argmax_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """Few different values, so that there are ties; some rows with an infinity or NaN."""
    x = torch.randint(-3, 4, case["shape"], generator=generator, device=device).to(dtype)
    odd = torch.rand(case["shape"], generator=generator, device=device) < case.get("odd", 0.0)
    other = torch.rand(case["shape"], generator=generator, device=device)
    value = torch.where(other < 0.5, float("nan"), torch.where(other < 0.75, float("inf"), -float("inf"))).to(dtype)
    return {"x": torch.where(odd, value, x)}


def argmax_reference(x) -> Results:
    found = []
    for row in x.double().reshape(-1, x.shape[-1]).tolist():
        numbers = [i for i, value in enumerate(row) if value != value] or [row.index(max(row))]
        found.append(numbers[0])
    return (torch.tensor(found, dtype=torch.int64, device=x.device).view(x.shape[:-1]),)


ENTRY = Entry(
    op=argmax,
    make_inputs=argmax_inputs,
    reference=argmax_reference,
    bounds=lambda expected, **_: (torch.zeros_like(expected[0], dtype=torch.float64),),
    bytes_moved=lambda x: x.numel() * x.element_size(),
    small_cases={
        "one": dict(shape=(3, 1)),
        "short rows": dict(shape=(2, 5, 15), odd=0.02),
        "a long row": dict(shape=(4, 1000), odd=0.002),
        "ties": dict(shape=(4, 3, 17)),
    },
    model_cases={"Llama-3, 1 row": dict(shape=(1, 128256)), "Llama-2, 16 rows": dict(shape=(16, 32000))},
)
