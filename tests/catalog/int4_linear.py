"""int4_linear: int4 weights, a scale and a zero point per group of inputs."""

from minillm_kernels.int4_linear import int4_linear

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
    op=int4_linear,
    make_inputs=linear_inputs,
    reference=linear_reference,
    bounds=linear_bounds,
    bytes_moved=linear_bytes,
    small_cases={
        f"{name}, groups of {group}": case
        for group in (32, 64, 128)
        for name, case in small_linear_cases("int4", group_size=group).items()
        if case["weight"][1] % group == 0
    },
    model_cases=model_linear_cases("int4", group_size=128)
    | {"Llama-2-7B qkv, 1 row, groups of 32": dict(rows=(1,), weight=(12288, 4096), format="int4", group_size=32)},
    flops=linear_flops,
    library=("F.linear", dense_linear),
)
