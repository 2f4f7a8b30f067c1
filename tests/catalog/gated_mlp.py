"""gated_mlp: act(x Wg^T) * (x Wu^T) in any weight format."""

import torch
import torch.nn.functional as F
from minillm_kernels.gated_mlp import gated_mlp, multiply_gate
from minillm_kernels.launch import interpreting
from torch import Tensor

from catalog.entry import Entry, Results, rounding, unit
from catalog.products import exact_weight, fused_rows, linear_bytes, linear_flops, linear_inputs, product_bound


def gated_reference(x, weight, activation, scale=None, zero=None, group_size=0) -> Results:
    y = x.double() @ exact_weight(weight, scale, zero, group_size).t()
    gate, up = y.chunk(2, dim=-1)
    return (activated(gate, activation) * up,)


def activated(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return gate * torch.sigmoid(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")


def gated_bounds(expected, x, weight, activation, scale=None, zero=None, group_size=0) -> Results:
    """An error d of the gate moves the activation by at most 1.13 d (its steepest slope), one of `up` counts in
    proportion to the activation. Where the product comes from the library (dense on a GPU, and many rows) both are
    rounded to x's dtype on the way. The activation itself, through exp2: a relative (8 + |gate|) * 2^-24. One rounding
    at the end."""
    exact = exact_weight(weight, scale, zero, group_size)
    products = x.double() @ exact.t()
    error = product_bound(x, weight, exact, scale, group_size)
    on_gpu = x.is_cuda or interpreting()
    if (on_gpu and weight.dtype == x.dtype) or x.numel() // x.shape[-1] > fused_rows(x):
        error = error + rounding(products, x.dtype)
    (gate, up), (gate_error, up_error) = products.chunk(2, dim=-1), error.chunk(2, dim=-1)
    bound = 1.13 * gate_error * (up.abs() + up_error) + activated(gate, activation).abs() * up_error
    bound = bound + (8 + gate.abs()) * unit(torch.float32) * expected[0].abs()
    return (bound + rounding(expected[0], x.dtype),)


def library_gated(x, weight, activation, **_):
    dense = torch.randn(weight.shape[0], x.shape[-1], device=x.device).to(x.dtype)
    return lambda: multiply_gate(F.linear(x, dense), activation)


def gated_case(rows: tuple, weight: tuple, form: str, activation: str = "silu", group_size: int = 0) -> dict:
    return dict(rows=rows, weight=weight, format=form, activation=activation, group_size=group_size)


ENTRY = Entry(
    op=gated_mlp,
    make_inputs=linear_inputs,
    reference=gated_reference,
    bounds=gated_bounds,
    bytes_moved=linear_bytes,
    small_cases={
        f"{form}, {rows} rows, {activation}": gated_case((rows,), (2 * 37, 192), form, activation, 64)
        for form in ("dense", "int8", "int4")
        for rows, activation in (
            (1, "silu"),
            (1, "gelu_tanh"),
            (5, "silu"),
            (5, "gelu_tanh"),
            (19, "gelu_tanh"),
            (65, "silu"),
        )
    },
    model_cases={
        f"{model}, {form}, {rows} rows": gated_case((rows,), weight, form, activation, 128)
        for model, weight, activation in (
            ("Llama-2-7B", (22016, 4096), "silu"),
            ("Gemma-2b", (32768, 2048), "gelu_tanh"),
            ("TinyLlama", (11264, 2048), "silu"),
        )
        for form in ("dense", "int8", "int4")
        for rows in (1, 6, 32, 64)
    },
    flops=linear_flops,
    library=("F.linear, then the gate", library_gated),
)
