"""linear: x W^T in the activations' dtype."""

from minillm_kernels.linear import linear

from catalog.entry import Entry
from catalog.products import (
    dense_linear,
    linear_bounds,
    linear_bytes,
    linear_flops,
    linear_inputs,
    linear_reference,
    model_linear_cases,
    small_linear_cases,
)

ENTRY = Entry(
    op=linear,
    make_inputs=linear_inputs,
    reference=linear_reference,
    bounds=linear_bounds,
    bytes_moved=linear_bytes,
    small_cases=small_linear_cases("dense"),
    model_cases=model_linear_cases("dense"),
    flops=linear_flops,
    library=("F.linear", dense_linear),
)
