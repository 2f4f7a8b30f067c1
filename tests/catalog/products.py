"""What the ops that multiply by a weight matrix share: inputs in each format, exact weights, error bounds, cases."""

import torch
import torch.nn.functional as F
from minillm_kernels.cpu import by_output
from minillm_kernels.launch import interpreting
from torch import Tensor

from catalog.entry import Results, rounding, unit


def linear_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    """x [rows, K] and a weight [N, K] in the case's format: "int8", "int4" or "dense"."""
    random = {"generator": generator, "device": device}
    (N, K), form, group = case["weight"], case["format"], case.get("group_size", 0)
    inputs = {"x": torch.randn(*case["rows"], K, **random).to(dtype)}
    if form == "dense":
        inputs["weight"] = (torch.randn(N, K, **random) * K**-0.5).to(dtype)
    elif form == "int8":
        inputs["weight"] = torch.randint(-127, 128, (N, K), dtype=torch.int8, **random)
        inputs["scale"] = (torch.rand(N, **random) + 0.5) / (70 * K**0.5)
    else:
        inputs["packed"] = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, **random)
        inputs["scale"] = ((torch.rand(K // group, N, **random) + 0.5) / (5 * K**0.5)).half()
        inputs["zero"] = torch.randint(0, 16, (K // group, N), dtype=torch.uint8, **random)
        if inputs["x"].is_cpu:  # in the order of memory that a layer on a CPU keeps
            inputs |= {name: by_output(inputs[name]) for name in ("scale", "zero")}
        inputs["group_size"] = group
    if "activation" in case:
        inputs["activation"] = case["activation"]
        if form == "int4":
            inputs["weight"] = inputs.pop("packed")
    elif case.get("bias"):
        inputs["bias"] = torch.randn(N, **random).to(dtype)
    return inputs


def exact_weight(weight: Tensor, scale=None, zero=None, group_size: int = 0) -> Tensor:
    """The weight [N, K] in float64, element by element from the definition of each format."""
    if weight.dtype == torch.int8:
        return weight.double() * scale.double()[:, None]
    if weight.dtype != torch.uint8:
        return weight.double()
    K = 2 * weight.shape[1]
    index = torch.arange(K, device=weight.device)  # input
    group, inner = index // group_size, index % group_size
    byte = weight[:, group * (group_size // 2) + inner % (group_size // 2)].long()  # [N, K]
    code = torch.where(inner < group_size // 2, byte % 16, byte // 16)
    return (code - zero[group].t().long()) * scale[group].t().double()


def rounded_as(x: Tensor) -> Tensor:
    """What the rounding of each row of x to int16 is a 32767th of, [..., 1]: its largest element; or 2^-15 of that
    where most others (zeros apart) are less than 1/256 of it, because such a row is multiplied as two."""
    magnitude = x.abs()
    largest = magnitude.amax(-1, keepdim=True)
    small = ((magnitude > 0) & (magnitude < largest / 256)).sum(-1, keepdim=True)
    return torch.where(small > (magnitude >= largest / 256).sum(-1, keepdim=True), largest * 2**-15, largest)


def fused_rows(x: Tensor) -> int:
    """Rows of x up to which a quantized weight is multiplied without being rounded to x's dtype first."""
    return 64 if (x.is_cuda or interpreting()) and x.dtype != torch.float32 else 16


def product_bound(x: Tensor, weight: Tensor, exact: Tensor, scale: Tensor | None, group_size: int) -> Tensor:
    """Error of x @ exact.T before the result is rounded; `weight` tells the format, int4's scale is [K / G, N].

    - K float32 products and sums whose roundings walk randomly (Higham & Mary 2019): sqrt(K) * 2^-24 * sum|x w|;
    - with more rows than `fused_rows`, or int4 and more than one, the weight is rounded to x's dtype first. K
      independent errors, each uniform within unit * |x w|, add up to a spread of unit * |x w|_2 / sqrt(3); 4 * unit
      * |x w|_2 is seven of those;
    - on a GPU one row meets int4 codes that are 128 too large, in sums of 32 products; the zero point takes that back,
      but not the roundings: sqrt(32) * 2^-24 * sum|144 s x|;
    - on CPU the quantized formats round x to 16 bits, 1.5e-5 of what `rounded_as` tells each.
    """
    x, on_cpu, dtype, rows = x.double(), not (x.is_cuda or interpreting()), x.dtype, x.numel() // x.shape[-1]
    bound = x.shape[-1] ** 0.5 * unit(torch.float32) * (x.abs() @ exact.abs().t())
    if weight.dtype != dtype and (rows > fused_rows(x) or (weight.dtype == torch.uint8 and rows > 1)):
        bound = bound + 4 * unit(dtype) * (x.square() @ exact.square().t()).sqrt()
    if weight.dtype == torch.uint8 and rows == 1 and not on_cpu:
        steps = scale.double().repeat_interleave(group_size, dim=0)  # [K, N]
        bound = bound + 32**0.5 * unit(torch.float32) * 144 * (x.abs() @ steps)
    if weight.dtype != dtype and on_cpu:
        bound = bound + 4 * 1.5e-5 * rounded_as(x) * exact.norm(dim=1)
    return bound


def linear_reference(x: Tensor, weight=None, packed=None, bias=None, **form) -> Results:
    """x W^T + bias in float64; `form`: what the weight's format has beside it, as `exact_weight` takes it."""
    y = x.double() @ exact_weight(packed if weight is None else weight, **form).t()  # [..., N]
    return (y if bias is None else y + bias.double(),)


def linear_bounds(expected: Results, x: Tensor, weight=None, packed=None, bias=None, **form) -> Results:
    """The product's error and one rounding of the result; the library paths round before the bias as well."""
    weight = packed if weight is None else weight
    bound = product_bound(x, weight, exact_weight(weight, **form), form.get("scale"), form.get("group_size", 0))
    bound = bound + rounding(expected[0], x.dtype)
    if bias is not None:
        bound = bound + rounding(expected[0] - bias.double(), x.dtype) + rounding(bias.double(), torch.float32)
    return (bound,)


def linear_bytes(x: Tensor, weight: Tensor | None = None, packed: Tensor | None = None, **inputs) -> int:
    """Weights, scales and zero points once, x once, the result once."""
    weight = packed if weight is None else weight
    read = [x, weight, *(inputs[name] for name in ("scale", "zero", "bias") if inputs.get(name) is not None)]
    outputs = weight.shape[0] // (2 if "activation" in inputs else 1)
    written = x.numel() // x.shape[-1] * outputs * x.element_size()
    return sum(tensor.numel() * tensor.element_size() for tensor in read) + written


def small_linear_cases(form: str, **more) -> dict[str, dict]:
    """The three regimes by rows (1, 2..64, more), sizes that fill no tile, leading dimensions, a bias."""
    cases = {
        "1 row": dict(rows=(1,), weight=(96, 256)),
        "1 row, ragged, bias": dict(rows=(1, 1), weight=(70, 160), bias=True),
        "3 rows, bias": dict(rows=(3,), weight=(100, 192), bias=True),
        "1 row, odd outputs, bias": dict(rows=(1,), weight=(33, 128), bias=True),
        "16 rows": dict(rows=(2, 8), weight=(40, 96)),
        "17 rows, bias": dict(rows=(17,), weight=(48, 160), bias=True),
        "64 rows": dict(rows=(2, 32), weight=(40, 96)),
        "65 rows, bias": dict(rows=(65,), weight=(48, 160), bias=True),
    }
    return {name: case | {"format": form} | more for name, case in cases.items()}


def model_linear_cases(form: str, **more) -> dict[str, dict]:
    cases = {
        "Llama-2-7B qkv, 1 row": dict(rows=(1,), weight=(12288, 4096)),
        "Llama-2-7B down, 1 row": dict(rows=(1,), weight=(4096, 11008)),
        "Llama-3-8B qkv, 1 row": dict(rows=(1,), weight=(6144, 4096)),
        "Gemma-2b down, 1 row": dict(rows=(1,), weight=(2048, 16384)),
        "TinyLlama qkv, 1 row": dict(rows=(1,), weight=(2560, 2048)),
        "Llama-2-7B qkv, 6 rows": dict(rows=(6,), weight=(12288, 4096)),
        "Llama-2-7B down, 6 rows": dict(rows=(6,), weight=(4096, 11008)),
        "Llama-2-7B qkv, 32 rows": dict(rows=(32,), weight=(12288, 4096)),
        "Llama-2-7B qkv, 64 rows": dict(rows=(64,), weight=(12288, 4096)),
        "Llama-2-7B qkv, 512 rows": dict(rows=(512,), weight=(12288, 4096)),
    }
    return {name: case | {"format": form} | more for name, case in cases.items()}


def linear_flops(x: Tensor, weight: Tensor | None = None, packed: Tensor | None = None, **_) -> int:
    return 2 * x.numel() * (packed if weight is None else weight).shape[0]


def dense_linear(x: Tensor, weight: Tensor | None = None, packed: Tensor | None = None, **_):
    """F.linear with a weight of the same shape in x's dtype: what quantization has to beat."""
    outputs = (packed if weight is None else weight).shape[0]
    dense = torch.randn(outputs, x.shape[-1], device=x.device).to(x.dtype)
    return lambda: F.linear(x, dense)
