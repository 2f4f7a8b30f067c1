"""add: x + y."""

import torch
from minillm_kernels.norm import add
from torch import Tensor

from catalog.entry import Entry, rounding
from catalog.rms_norm import NORM_CASES, NORM_MODEL_CASES


def add_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict[str, Tensor]:
    x, y = torch.randn((2, *case["shape"]), generator=generator, device=device).to(dtype)
    return {"x": x, "y": y}


ENTRY = Entry(
    op=add,
    make_inputs=add_inputs,
    reference=lambda x, y: (x.double() + y.double(),),
    bounds=lambda expected, x, y: (rounding(expected[0], x.dtype),),
    bytes_moved=lambda x, y: 3 * x.numel() * x.element_size(),
    small_cases=NORM_CASES,
    model_cases=NORM_MODEL_CASES,
    library=("x + y", lambda x, y: lambda: x + y),
)
