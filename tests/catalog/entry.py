"""What an op must compute: inputs, a float64 reference, how far it may be off, and why.

References are plain torch in float64, written from the definition and not from the kernel: loops over rows
and positions are welcome. Where the result is unspecified (the output of a padding token) the reference
holds NaN, and the kernel's value there must merely be finite. A result of integers must be exactly the reference's.

A bound is the largest error allowed at each element. It is derived from the number formats, never fitted:
`unit(dtype)` is half the spacing of numbers just above 1, so one rounding is off by at most unit * |value|.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from minillm_kernels.launch import interpreting
from torch import Tensor

Results = tuple[Tensor, ...]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}  # of activations


@dataclass(frozen=True)
class Entry:
    """Everything the tests and tools need to know about one op.

    `op` is the callable. `make_inputs(case, dtype, device, generator)` returns its keyword arguments (on fake tensors
    too), `reference(**inputs)` its results in float64, `bounds(expected, **inputs)` one tensor of allowed absolute
    errors per result. `writes` names the arguments that the op writes into; they count as results, after its own.
    `bytes_moved(**inputs)` is what a kernel cannot avoid reading and writing: the numerator of its bandwidth;
    `flops(**inputs)` the multiplications and additions of the definition, by default a few per element of the first
    tensor. `library` is what PyTorch calls its operator for the same task, and a function of the inputs that returns a
    call of it, or None where it has none. `dtypes` names those it takes. `small_cases` suit the interpreter (about 10
    ms per program); `model_cases` are shapes of real models, for cross-compiling and measuring.
    """

    op: Callable
    make_inputs: Callable[..., dict]
    reference: Callable[..., Results]
    bounds: Callable[..., Results]
    bytes_moved: Callable[..., int]
    small_cases: dict[str, dict]
    model_cases: dict[str, dict]
    writes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = tuple(DTYPES)
    flops: Callable[..., int] = lambda **inputs: 4 * next(iter(inputs.values())).numel()
    library: tuple[str, Callable[..., Callable[[], object] | None]] | None = None

    @property
    def name(self) -> str:
        return self.op.__name__

    @property
    def is_node(self) -> bool:
        """Whether it is an op of its own; `add` is PyTorch's anywhere but in C."""
        return hasattr(self.op, "implementation")

    def run(self, **inputs) -> Results:
        """All results of the op; what it writes into is cloned first."""
        written = {name: inputs[name].clone() for name in self.writes}
        results = self.op(**inputs | written)
        return (*(results if isinstance(results, tuple) else (results,)), *written.values())


def unit(dtype: torch.dtype) -> float:
    """Unit roundoff: 2^-8 for bfloat16, 2^-11 for float16, 2^-24 for float32.

    Triton's interpreter cuts float32 off to bfloat16 instead of rounding to nearest: twice as far.
    """
    truncated = dtype == torch.bfloat16 and interpreting()
    return torch.finfo(dtype).eps / (1 if truncated else 2)


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """How far rounding `value` to `dtype` can move it; subnormal numbers are as coarse as the smallest normal."""
    return unit(dtype) * value.abs().clamp(min=torch.finfo(dtype).smallest_normal)
