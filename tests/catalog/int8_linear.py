"""int8_linear: int8 weights, one scale per output."""

from minillm_kernels.int8_linear import int8_linear

from catalog.entry import Entry, Results
from catalog.products import (
    dense_linear,
    exact_weight,
    linear_bound,
    linear_bytes,
    linear_flops,
    linear_inputs,
    model_linear_cases,
    small_linear_cases,
)


def int8_reference(x, weight, scale, bias=None) -> Results:
    y = x.double() @ exact_weight(weight, scale).t()
    return (y if bias is None else y + bias.double(),)


def int8_bounds(expected, x, weight, scale, bias=None) -> Results:
    return linear_bound(expected[0], x, weight, exact_weight(weight, scale), bias)


ENTRY = Entry(
    op=int8_linear,
    make_inputs=linear_inputs,
    reference=int8_reference,
    bounds=int8_bounds,
    bytes_moved=linear_bytes,
    small_cases=small_linear_cases("int8"),
    model_cases=model_linear_cases("int8"),
    flops=linear_flops,
    library=("F.linear", dense_linear),
)
