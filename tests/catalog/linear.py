"""linear: x W^T in the activations' dtype."""

from minillm_kernels.linear import linear

from catalog.entry import Entry, Results
from catalog.products import (
    dense_linear,
    linear_bound,
    linear_bytes,
    linear_flops,
    linear_inputs,
    model_linear_cases,
    small_linear_cases,
)


def linear_reference(x, weight, bias=None) -> Results:
    y = x.double() @ weight.double().t()
    return (y if bias is None else y + bias.double(),)


def linear_bounds(expected, x, weight, bias=None) -> Results:
    return linear_bound(expected[0], x, weight, weight.double(), bias)


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
