"""probabilities: a softmax with a temperature, filtered by top-k, top-p and min-p."""

import torch
from minillm_kernels.sampling import probabilities
from torch import Tensor

from catalog.entry import Entry, Results, unit

SURE = 1e-5  # rounding moves no mass further than this


def probabilities_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """Always float32, whatever the activations are: the head's logits."""
    rows, vocabulary = case["shape"]
    logits = case.get("scale", 3.0) * torch.randn(rows, vocabulary, generator=generator, device=device)
    columns = {"temperature": torch.float32, "top_k": torch.int64, "top_p": torch.float32, "min_p": torch.float32}
    given = {
        name: None if name not in case else torch.tensor(case[name], dtype=dtype).repeat(rows)[:rows].to(device)
        for name, dtype in columns.items()
    }
    return {"logits": logits.round() if case.get("ties") else logits} | given


def described(logits, temperature, top_k, top_p, min_p) -> tuple[Tensor, Tensor]:
    """Row by row from the definitions: the probabilities, and whether no rounding can change what is kept."""
    result, sure = torch.zeros_like(logits, dtype=torch.float64), torch.ones(len(logits), dtype=torch.bool)
    for row, given in enumerate(logits.double()):
        heat = float(temperature[row])
        if heat == 0:
            result[row, int(given.argmax())] = 1
            continue
        if not heat > 0:
            result[row] = torch.nan
            continue
        probs = (given / heat).softmax(0)
        order = given.argsort(descending=True, stable=True)
        kept = probs[order]
        if top_k is not None and top_k[row] < len(given):
            kept = kept.where(given[order] >= given[order[top_k[row] - 1]], 0)
        if top_p is not None and top_p[row] < 1:
            left = kept.sum() if top_k is not None and top_k[row] < len(given) else 1.0
            before = kept.cumsum(0) - kept
            sure[row] &= bool(((before - top_p[row] * left).abs() > SURE)[kept > SURE].all())
            kept = kept.where(before < top_p[row] * left, 0)
        if min_p is not None:
            sure[row] &= bool(((kept / kept[0] - min_p[row]).abs() > SURE * min_p[row]).all())
            kept = kept.where(kept >= min_p[row] * kept[0], 0)
        result[row, order] = kept / kept.sum()
    return result, sure


def probabilities_reference(**inputs) -> Results:
    return (described(**{name: None if value is None else value.cpu() for name, value in inputs.items()})[0],)


def probabilities_bounds(expected, **inputs) -> Results:
    """A quotient x / temperature is rounded, so is its distance from the largest, and an exponential turns an absolute
    error into a relative one; a float32 sum of 512, or whole units of 2^-44 for each token, are the rest. What
    is smaller than e^-83 may be 0. Without bound where what is kept hangs on rounding."""
    inputs = {name: None if value is None else value.cpu() for name, value in inputs.items()}
    heat = inputs["temperature"].double().clamp(min=1e-30)[:, None]
    largest = 2 * (inputs["logits"].double() / heat).abs().amax(-1, keepdim=True)
    steps = 16 + 512**0.5 + 3 * largest + inputs["logits"].shape[-1] * 2.0**-20
    bound = steps * unit(torch.float32) * expected[0].cpu() + 2.0**-120
    unsure = ~described(**inputs)[1][:, None]
    return (bound.masked_fill(unsure, torch.inf).to(expected[0].device),)


SMALL = dict(shape=(5, 97), temperature=[1.0, 0.0, 0.7, 2.0, 0.1])
LONG = dict(shape=(3, 4200), temperature=[1.0, 0.7, 0.3])

ENTRY = Entry(
    op=probabilities,
    make_inputs=probabilities_inputs,
    reference=probabilities_reference,
    bounds=probabilities_bounds,
    bytes_moved=lambda logits, **_: 2 * logits.numel() * logits.element_size(),
    dtypes=("float32",),
    small_cases={
        "temperature": SMALL,
        "top-k": SMALL | dict(top_k=[3, 1, 97]),
        "top-k, ties stay": SMALL | dict(top_k=[4, 2, 200], ties=True, scale=1.0),
        "top-p": SMALL | dict(top_p=[0.9, 0.3, 1.0]),
        "top-p, the first of many ties": SMALL | dict(top_p=[0.31, 0.93], ties=True, scale=0.7),
        "min-p": SMALL | dict(min_p=[0.1, 0.0, 0.6]),
        "all filters": SMALL | dict(top_k=[20, 3, 97], top_p=[0.8, 1.0, 0.95], min_p=[0.02]),
        "a long vocabulary": LONG | dict(top_p=[0.8]),
        "a long flat one": LONG | dict(top_p=[0.73], scale=0.01),
        "one token": dict(shape=(2, 1), temperature=[0.5], top_k=[1], top_p=[0.5], min_p=[0.5]),
    },
    model_cases={
        "Llama-3, 1 row": dict(shape=(1, 128256), temperature=[0.8], top_k=[50], top_p=[0.9], min_p=[0.02]),
        "Llama-2, 16 rows, top-p": dict(shape=(16, 32000), temperature=[0.8], top_p=[0.9]),
    },
)
