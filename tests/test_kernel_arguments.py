"""Arguments that fit, and arguments bent out of shape, at every op: a right result or ValueError / TypeError.

Behind the ops stand C and Triton kernels that read as many bytes as they are told, so nothing that a caller can say
may get past the checks. Each example takes a case of the catalog, bends some of its arguments (shape, type, strides,
device, value, or one size of all tensors together) and calls the op.
"""

import numpy as np
import pytest
import torch
from catalog import CATALOG
from catalog.entry import DTYPES, Entry, Results, rounding
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from minillm_kernels import cpu
from minillm_kernels.int4_linear import dequantize_int4
from minillm_kernels.quantize import quantize_int4
from minillm_kernels.sampling import uniform, verify
from torch import Tensor

from minillm.speculative.verify import verify as verify_in_pytorch

EXAMPLES = 100  # of each op, in C and in PyTorch
ALL_DTYPES = (
    *DTYPES.values(),
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
)
# Without C these multiply in the activations' dtype, coarser than the catalog's bounds; test_catalog.py says more.
COARSE = ("int8_linear", "int4_linear", "gated_mlp")
NO_TENSOR = (None, 3, 2.5, "x", [1.0], np.ones(3, dtype=np.float32))
NO_NUMBER = (None, "x", torch.ones(2), [1])
INTEGERS = (0, -1, 1, 2, 32, 33, 2**31, 2**62, 10**30, 2.5)
FLOATS = (0.0, -1.0, 0.5, 1e30, float("nan"), float("inf"), 2, 10**400)


# ---- what only C computes, and is None elsewhere ----


def verify_inputs(case: dict, dtype: torch.dtype, device, generator: torch.Generator) -> dict:
    B, k, W, V = case["shape"]
    random = {"generator": generator, "device": device}
    seed, position = torch.randint(2**40, (2, B), **random)
    return {
        "draft_tokens": torch.randint(W, (B, k), **random),
        "draft_probs": torch.rand(B, k, W, **random).softmax(-1),
        "target_probs": torch.rand(B, k + 1, V, **random).softmax(-1),
        "draft_lengths": torch.randint(k + 1, (B,), **random),
        "seed": seed, "position": position, "stream": 2,
    }  # fmt: skip


def verify_reference(draft_tokens, draft_probs, target_probs, draft_lengths, seed, position, stream) -> Results:
    place = position[:, None] + torch.arange(draft_tokens.shape[1] + 1)  # [B, k + 1]
    seeds = seed[:, None].expand_as(place)
    numbers = uniform(seeds[:, :-1], place[:, :-1], stream), uniform(seeds, place)
    return verify_in_pytorch(draft_tokens, draft_probs, target_probs, draft_lengths, *numbers)


def requantized(weight: Tensor, group_size: int) -> Tensor | None:
    """The weights that int4 keeps of `weight`."""
    if (found := quantize_int4(weight, group_size)) is None:
        return None
    packed, scale, zero = found
    return dequantize_int4(packed, scale.t(), zero.t(), group_size).to(weight.dtype)


def least_error(expected: Results, weight: Tensor, group_size: int) -> Results:
    """No group's squared error is more than that of rounding to 16 steps from its smallest to its largest, so no
    weight's error is more than the root of that; scales are float16, sums float32, and the result has a dtype too."""
    groups = weight.double().unflatten(1, (-1, group_size))  # [N, K / G, G]
    low, high = groups.amin(2, keepdim=True).clamp(max=0), groups.amax(2, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().double().clamp(min=2.0**-24)
    zero = (-low / scale).round().clamp(0, 15)
    error = ((groups / scale + zero).round().clamp(0, 15) - zero) * scale - groups
    bound = error.square().sum(2, keepdim=True).sqrt().expand_as(groups).flatten(1)
    return (1.001 * bound + rounding(expected[0], torch.float32) + rounding(expected[0], weight.dtype),)


ENTRIES_IN_C = {
    "verify": Entry(
        op=verify,
        make_inputs=verify_inputs,
        reference=verify_reference,
        bounds=lambda expected, **_: expected,  # whole numbers are exact
        bytes_moved=lambda **_: 0,
        dtypes=("float32",),
        small_cases={"one draft": dict(shape=(1, 1, 5, 5)), "a draft model of fewer words": dict(shape=(3, 4, 20, 33))},
        model_cases={},
    ),
    "quantize_int4": Entry(
        op=requantized,
        make_inputs=lambda case, dtype, device, generator: {
            "weight": torch.randn(case["shape"], generator=generator, device=device).to(dtype),
            "group_size": case["group_size"],
        },
        reference=lambda weight, group_size: (weight.double(),),
        bounds=least_error,
        bytes_moved=lambda **_: 0,
        small_cases={
            "one group": dict(shape=(1, 32), group_size=32),
            "ragged": dict(shape=(33, 128), group_size=64),
            "two groups": dict(shape=(5, 256), group_size=128),
        },
        model_cases={},
    ),
}
ENTRIES = CATALOG | ENTRIES_IN_C


def test_that_is_at_least_a_thousand():
    assert 2 * len(CATALOG) * EXAMPLES >= 1000


@pytest.mark.parametrize(
    ("implementation", "name"), [*(("C", name) for name in ENTRIES), *(("PyTorch", name) for name in CATALOG)]
)
def test_a_right_result_or_a_clear_refusal(name, implementation, monkeypatch):
    if implementation == "PyTorch":
        monkeypatch.setattr(cpu, "library", lambda: None)
    elif not cpu.available():
        pytest.skip("no C compiler")
    entry = ENTRIES[name]
    seen = {"right": 0, "refused": 0}

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def search(data):
        inputs = bent(entry, data)
        note(f"{name}({', '.join(f'{key}={shown(value)}' for key, value in inputs.items())})")
        before = {key: plain(value) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        try:
            results = entry.op(**inputs)
        except (ValueError, TypeError) as error:
            assert str(error), "an error without words"
            seen["refused"] += 1
            return
        if results is None:
            assert name in ENTRIES_IN_C
            assert not all(in_c(value) for value in inputs.values())
            seen["refused"] += 1
            return
        results = results if isinstance(results, tuple) else (results,)
        results = (*results, *(inputs[key] for key in entry.writes))
        check_results(entry, before, results, implementation == "PyTorch" and name in COARSE)
        seen["right"] += 1

    search()
    assert min(seen.values()) >= 10, seen  # both happen, or the bending does not do what it should


def in_c(value: object) -> bool:
    """Whether C takes an argument that is right otherwise: its memory holds what PyTorch says, in a dtype of C's."""
    if not isinstance(value, Tensor):
        return True
    plain = type(value) is Tensor and value.is_cpu and not value.is_neg() and not value._is_zerotensor()
    return plain and value.dtype != torch.float64 and value.dtype not in (torch.bfloat16, torch.float16)


def bent(entry: Entry, data) -> dict:
    """The arguments of one call: those of a case of the catalog, with none to three of them bent."""
    case = data.draw(st.sampled_from(list(entry.small_cases)), label="case")
    dtype = data.draw(st.sampled_from([DTYPES[name] for name in entry.dtypes]), label="dtype")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    inputs = entry.make_inputs(entry.small_cases[case], dtype, torch.device("cpu"), generator)
    for _ in range(data.draw(st.integers(0, 3), label="bends")):
        names = [key for key, value in inputs.items() if isinstance(value, Tensor)]
        if not names:
            break
        kind = data.draw(st.sampled_from(("tensor", "tensor", "size", "dtype", "scalar", "positions")), label="bend")
        if kind == "tensor":
            key = data.draw(st.sampled_from(names), label="tensor")
            inputs[key] = bent_tensor(inputs[key], data)
        elif kind == "size":
            sizes = sorted({size for key in names for size in inputs[key].shape})
            old = data.draw(st.sampled_from(sizes or [0]), label="size")
            new = data.draw(st.sampled_from((0, 1, old + 1)), label="becomes")
            inputs |= {key: with_size(inputs[key], old, new) for key in names}
        elif kind == "dtype":
            old, new = dtype, data.draw(st.sampled_from(ALL_DTYPES), label="all tensors become")
            inputs |= {key: inputs[key].to(new) for key in names if inputs[key].dtype == old}
        elif kind == "scalar":
            key = data.draw(st.sampled_from(list(inputs)), label="argument")
            whole = isinstance(inputs[key], int) or key == "window"
            values = NO_TENSOR if key in names else (*NO_NUMBER, *(INTEGERS if whole else FLOATS))
            inputs[key] = data.draw(st.sampled_from(values), label="becomes")
        elif isinstance(inputs.get("cache_position"), Tensor) and inputs["cache_position"].numel():
            position = inputs["cache_position"]
            place = data.draw(st.integers(0, position.numel() - 1), label="place")
            value = data.draw(st.sampled_from((-1, -7, 0, 10**6 + 1, 2**31, 2**62, 2**63 - 1)), label="position")
            if position.is_cpu and position.dtype == torch.int64 and position.layout == torch.strided:
                changed = position.flatten().index_fill(0, torch.tensor(place), value)
                inputs["cache_position"] = changed.view(position.shape)
    return inputs


def with_size(tensor: Tensor, old: int, new: int) -> Tensor:
    """Every dimension of size `old` cut or continued to `new`."""
    for dim, size in enumerate(tensor.shape):
        if size == old and tensor.layout == torch.strided:
            index = torch.arange(new, device=tensor.device) % max(size, 1)
            tensor = tensor.index_select(dim, index) if size else tensor.new_zeros(resized(tensor, dim, new))
    return tensor


def resized(tensor: Tensor, dim: int, size: int) -> list[int]:
    return [size if i == dim else old for i, old in enumerate(tensor.shape)]


def bent_tensor(tensor: Tensor, data):
    if tensor.layout != torch.strided:
        return tensor
    ways = ["dtype", "gaps", "offset", "more dimensions", "meta", "sparse", "parameter", "negative", "zeros"]
    if tensor.dim():
        ways += ["transposed", "expanded", "resized", "resized", "fewer dimensions"]
    way = data.draw(st.sampled_from(ways), label="way")
    dim = data.draw(st.integers(0, max(tensor.dim() - 1, 0)), label="dimension")
    if way == "dtype":
        return tensor.to(data.draw(st.sampled_from(ALL_DTYPES), label="dtype"))
    if way == "gaps":
        return torch.stack((tensor, tensor), -1)[..., 0]
    if way == "offset":
        return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)
    if way == "more dimensions":
        return tensor[None]
    if way == "meta":
        return tensor.to("meta")
    if way == "sparse":
        return tensor if tensor.is_meta else tensor.to_sparse()
    if way == "negative":  # a view whose numbers have another sign than those in memory
        return torch._neg_view(tensor) if tensor.is_floating_point() else tensor
    if way == "zeros":  # without memory
        return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)
    if way == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=False)
    if way == "transposed":
        return tensor.transpose(dim, -1).clone(memory_format=torch.contiguous_format).transpose(dim, -1)
    if way == "expanded":
        return tensor.narrow(dim, 0, min(1, tensor.shape[dim])).expand(tensor.shape)
    if way == "fewer dimensions":
        return tensor.select(dim, 0) if tensor.shape[dim] else tensor
    size = data.draw(st.sampled_from((0, 1, tensor.shape[dim] + 1, 300)), label="size")
    return with_dimension(tensor, dim, size)


def with_dimension(tensor: Tensor, dim: int, size: int) -> Tensor:
    if not tensor.shape[dim]:
        return tensor.new_zeros(resized(tensor, dim, size))
    return tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])


def plain(tensor: Tensor) -> Tensor:
    """A copy whose numbers lie in its memory."""
    return torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor._is_zerotensor() else tensor.clone().resolve_neg()


def shown(value) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    strides = value.stride() if value.layout == torch.strided else value.layout
    listed = value.dtype == torch.int64 and value.is_cpu and value.layout == torch.strided and value.numel() < 20
    few = f" {plain(value).tolist()}" if listed else ""
    return f"<{tuple(value.shape)} {value.dtype} strides {strides} on {value.device}{few}>"


def check_results(entry: Entry, inputs: dict, results: tuple, coarse: bool) -> None:
    """The results are what the catalog's reference says, wherever it says anything and the dtype can hold it."""
    if any(isinstance(value, Tensor) and value.is_meta for value in inputs.values()):
        assert all(result.is_meta for result in results)
        return
    first = next(iter(inputs.values()))
    position = inputs.get("cache_position")
    if "attention" in entry.name and position.numel() and beyond_the_ring(inputs):
        assert results[0].shape == first.shape  # which keys are left is unspecified: only memory counts
        return
    expected = entry.reference(**inputs)
    # Bounds are made of largest elements, which nothing has none of.
    empty = any(isinstance(value, Tensor) and not value.numel() for value in inputs.values())
    bounds = [0.01 * (exact.abs() + 1) for exact in expected] if empty else entry.bounds(expected, **inputs)
    for result, exact, bound in zip(results, expected, bounds, strict=True):
        assert result.shape == exact.shape
        if not exact.is_floating_point():
            assert torch.equal(result, exact)
            continue
        assert result.dtype == (first.dtype if first.is_floating_point() else torch.float32)
        # A padding token's result, and numbers that overflow on the way, are nobody's business.
        told = exact.isfinite() & bound.isfinite() & (exact.abs() + bound < torch.finfo(result.dtype).max / 4)
        if not coarse or first.dtype == torch.float32:
            assert ((result.double() - exact).abs() <= bound)[told].all()


def beyond_the_ring(inputs: dict) -> bool:
    """Whether a token sees positions that the slots do not hold any more."""
    position, slots = inputs["cache_position"], inputs["k"].shape[2]
    for row in position.tolist():
        for place in row:
            first = 0 if inputs["window"] is None else max(0, place - inputs["window"] + 1)
            if max(row) - first >= slots:
                return True
    return False
