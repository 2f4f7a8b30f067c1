"""How an op is made: one registration, and one way to call it.

    @op(check=..., fake=..., triton="minillm_kernels.gpu.norm")
    def rms_norm(x, ...): the signature, the words for the user, and the code for a CPU

gives one callable that is

    eagerly on a CPU        the check and the function, called directly: the dispatcher would add 5 us
    under torch.compile     one node, the custom op `minillm::rms_norm`, whose shapes `fake` tells
    on a GPU                that op, which launches `rms_norm` of the Triton module; the function where there is none
    with TRITON_INTERPRET=1 the same on a CPU, in Triton's interpreter

The check runs on every one of these ways, because behind it stand C and Triton code that read as many bytes as they
are told. It looks at types, shapes, strides and devices, never at values, and costs some 1 us.
"""

import functools
import importlib
import inspect
import struct
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from minillm_kernels.launch import interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations, in every op


def op(
    *, check: Callable, fake: Callable, triton: str | None = None, mutates_args: Sequence[str] = ()
) -> Callable[[Callable], Callable]:
    """Register the decorated function as `minillm::<its name>`.

    Args:
        check: takes the op's arguments; raises ValueError or TypeError unless they fit together.
        fake: takes the op's arguments (`*_` for those it does not need); returns empty tensors like the results.
        triton: the module whose function of the op's name launches the Triton kernel, with the op's arguments.
        mutates_args: names of the tensors that the op writes into.

    The callable raises ValueError or TypeError for whatever it cannot do. Its `implementation` is what the node runs.
    """

    def register(function: Callable) -> Callable:
        name = function.__name__
        signature = inspect.signature(function)
        first = next(iter(signature.parameters))

        @functools.wraps(function)
        def implementation(*arguments, **keywords):
            check(*arguments, **keywords)
            x = arguments[0] if arguments else keywords[first]
            launched = triton is not None and (x.is_cuda or interpreting())
            run = getattr(importlib.import_module(triton), name) if launched else function
            with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
                return _contiguous(run(*arguments, **keywords))

        def shapes(*arguments):
            check(*arguments)
            return fake(*arguments)

        registered = torch.library.custom_op(
            f"minillm::{name}", implementation, mutates_args=mutates_args, device_types=("cpu", "cuda")
        )
        registered.register_fake(shapes)
        node = getattr(torch.ops.minillm, name).default

        @functools.wraps(function)
        def call(*arguments, **keywords):
            if torch.compiler.is_compiling():
                return node(*arguments, **keywords)
            try:
                x = arguments[0] if arguments else keywords.get(first)
                if type(x) is Tensor and x.is_cpu and not interpreting():  # real: no fake, no parameter
                    check(*arguments, **keywords)
                    return function(*arguments, **keywords)
                return node(*arguments, **keywords)
            except Exception as error:
                _refuse_wrong_types(name, signature, arguments, keywords)
                if isinstance(error, struct.error | OverflowError):
                    raise ValueError(f"{name}: a number is out of range: {error}") from error
                raise

        call.implementation = implementation
        return call

    return register


def _contiguous(results: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """A node of a graph has to keep the layout its fake promises."""
    if isinstance(results, Tensor):
        return results.contiguous()
    return tuple(result.contiguous() for result in results)


def _refuse_wrong_types(name: str, signature: inspect.Signature, arguments: tuple, keywords: dict) -> None:
    """Raise TypeError for the first argument that is not what its parameter says. Only called when a call has failed:
    checks may take the types for granted, and what they raise then is replaced by this."""
    for parameter, value in signature.bind(*arguments, **keywords).arguments.items():
        wanted = signature.parameters[parameter].annotation
        accepted = wanted | int if isinstance(1.0, wanted) else wanted  # a whole number will do as a float
        if not isinstance(value, accepted):
            words = wanted.__name__ if isinstance(wanted, type) else str(wanted)
            raise TypeError(f"{name}: {parameter} must be {words}, got {type(value).__name__}")
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
            raise TypeError(f"{name}: {parameter} must be a dense tensor, got layout {value.layout}")


def check_devices(name: str, x: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on x's device."""
    device = x.device
    for other in others:
        if other is not None and other.device != device:
            raise ValueError(f"{name}: all tensors must be on one device, got {device} and {other.device}")
