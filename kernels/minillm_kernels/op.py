"""How a kernel is called: one registration, and one way to call it.

    @op(check=..., fake=..., c=cpu.rms_norm, triton="minillm_kernels.gpu.norm")
    def rms_norm(x, ...): the signature, the words for the user, and PyTorch code for any device

gives one callable that is

    eagerly on a CPU        the check and the C function, called directly: the dispatcher would add 5 us
    under torch.compile     one node, the custom op `minillm::rms_norm`, whose shapes `fake` tells
    on a GPU                that op, which launches `rms_norm` of the Triton module; the function where there is none
    with TRITON_INTERPRET=1 the same on a CPU, in Triton's interpreter

Where there is no C, a CPU runs the function (`verify` and `quantize_int4` are nothing but C, and return None). Without
a `fake` there is no op: anywhere but eagerly on a CPU the call is the function itself, which a compiler fuses with its
neighbours and a gradient goes through. An op has no gradient: asked for one it raises.

The check runs on every one of these ways, because behind it stand C and Triton code that read as many bytes as they
are told. It looks at types, shapes, strides and devices, never at values, and costs some 1 us.
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import compress
from typing import get_args

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling
from torch.nn import Parameter

from minillm_kernels import cpu
from minillm_kernels.cpu.call import DTYPES as DTYPES  # of activations, in every op
from minillm_kernels.launch import interpreting

INTERPRETING = interpreting()


def op(
    *,
    check: Callable,
    c: Callable | None = None,
    fake: Callable | None = None,
    triton: str | None = None,
    mutates_args: Sequence[str] = (),
) -> Callable[[Callable], Callable]:
    """Register the decorated function as `minillm::<its name>`, or, without a `fake`, as no op.

    Args:
        check: takes the arguments; raises ValueError or TypeError unless they fit together.
        c: takes the arguments; the same in C, on tensors in a CPU's memory. The function itself where there is none.
        fake: takes the arguments (`*_` for those it does not need); returns empty tensors like the results.
        triton: the module whose function of the op's name launches the Triton kernel, with the op's arguments.
        mutates_args: names of the tensors that the op writes into.

    The callable raises ValueError or TypeError for whatever it cannot do. Its `implementation` is what the node runs.
    """

    def register(function: Callable) -> Callable:
        name, in_c = function.__name__, c or function
        signature = inspect.signature(function)
        first = next(iter(signature.parameters))
        annotations = [parameter.annotation for parameter in signature.parameters.values()]
        tensors = [Tensor in (annotation, *get_args(annotation)) for annotation in annotations]

        @functools.wraps(function)
        def implementation(*arguments, **keywords):
            check(*arguments, **keywords)
            x = arguments[0] if arguments else keywords[first]
            if triton is not None and (x.is_cuda or INTERPRETING):
                run = getattr(importlib.import_module(triton), name)
            else:
                run = in_c if x.is_cpu and cpu.available() else function
            with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
                return _contiguous(run(*arguments, **keywords))

        def elsewhere(*arguments, **keywords):
            check(*arguments, **keywords)
            return function(*arguments, **keywords)

        if fake is not None:
            elsewhere = _node(name, implementation, check, fake, mutates_args)

        @functools.wraps(function)
        def call(*arguments, **keywords):
            if is_compiling():
                return elsewhere(*arguments, **keywords)
            try:
                x = arguments[0] if arguments else keywords.get(first)
                # The one answer to "eagerly on a CPU?": whether all tensors are what lies at their addresses. Not so a
                # fake one, a subclass that may do anything, zeros without memory (`torch._efficientzerotensor`), and
                # numbers whose sign has yet to be turned (`torch._neg_view`): PyTorch's dispatcher makes plain ones of
                # the last two.
                in_memory = type(x) is Tensor and x.is_cpu and not INTERPRETING
                if in_memory:
                    for value in (*arguments, *keywords.values()) if keywords else compress(arguments, tensors):
                        if value is None:
                            continue
                        kind = type(value)
                        if (kind is not Tensor and kind is not Parameter) or value.is_neg() or not value.data_ptr():
                            in_memory = not isinstance(value, Tensor) or (kind is Tensor and not value.numel())
                            if not in_memory:
                                break
                if in_memory and not (is_grad_enabled() and _differentiated(arguments, keywords)):
                    check(*arguments, **keywords)
                    return (in_c if cpu.available() else function)(*arguments, **keywords)
                return elsewhere(*arguments, **keywords)
            except Exception:
                _refuse_wrong_types(name, signature, arguments, keywords)
                raise

        if fake is not None:
            call.implementation = implementation
        return call

    return register


def _node(name: str, implementation: Callable, check: Callable, fake: Callable, mutates_args: Sequence[str]):
    """`minillm::<name>` of PyTorch's dispatcher."""

    def shapes(*arguments):
        check(*arguments)
        return fake(*arguments)

    registered = torch.library.custom_op(
        f"minillm::{name}", implementation, mutates_args=mutates_args, device_types=("cpu", "cuda")
    )
    registered.register_fake(shapes)
    return getattr(torch.ops.minillm, name).default


def _differentiated(arguments: tuple, keywords: dict) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in (*arguments, *keywords.values()))


def _contiguous(results: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """A node of a graph has to keep the layout its fake promises."""
    if isinstance(results, Tensor):
        return results.contiguous()
    return tuple(result.contiguous() for result in results)


def _refuse_wrong_types(name: str, signature: inspect.Signature, arguments: tuple, keywords: dict) -> None:
    """Raise TypeError for the first argument that is not what its parameter says, or ValueError for a number that no C
    type holds. Only called when a call has failed: checks may take the types for granted, and what they raise then is
    replaced by this."""
    for parameter, value in signature.bind(*arguments, **keywords).arguments.items():
        wanted = signature.parameters[parameter].annotation
        accepted = wanted | int if isinstance(1.0, wanted) else wanted  # a whole number will do as a float
        if not isinstance(value, accepted):
            words = wanted.__name__ if isinstance(wanted, type) else str(wanted)
            raise TypeError(f"{name}: {parameter} must be {words}, got {type(value).__name__}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{name}: {parameter} is out of range: {value}")
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
            raise TypeError(f"{name}: {parameter} must be a dense tensor, got layout {value.layout}")


def check_devices(name: str, x: Tensor, *others: Tensor | None) -> None:
    """Raise ValueError unless all tensors are on x's device."""
    on_cpu = x.is_cpu  # cheaper to ask than which device
    for other in others:
        if other is not None and not (other.is_cpu if on_cpu else other.device == x.device):
            raise ValueError(f"{name}: all tensors must be on one device, got {x.device} and {other.device}")
