"""int8_linear: int8 weights, one scale per output."""

from minillm_kernels.int8_linear import int8_linear

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
    op=int8_linear,
    make_inputs=linear_inputs,
    reference=linear_reference,
    bounds=linear_bounds,
    bytes_moved=linear_bytes,
    small_cases=small_linear_cases("int8"),
    model_cases=model_linear_cases("int8"),
    flops=linear_flops,
    library=("F.linear", dense_linear),
)
