"""A C function as Python sees it: its name, and the struct through which it takes its arguments."""

import ctypes
import struct

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of activations
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4}


class Call:
    """A C function and the struct through which it takes its arguments.

    `members` are declared as in the C file, and compared with it when the library is loaded; `pack(...)` makes the
    struct of their values, in that order.
    """

    all: "list[Call]" = []  # noqa: RUF012

    def __init__(self, name: str, members: str):
        self.name, self.symbol, self.members = name, f"minillm_{name}", " ".join(members.split())
        codes = {"int64_t": "q", "double": "d"}
        declarations = [part.split(maxsplit=1) for part in self.members.split(";") if part]
        self.pack = struct.Struct("".join(codes[kind] * len(names.split(",")) for kind, names in declarations)).pack
        self.all.append(self)

    def check_layout(self, loaded: ctypes.CDLL) -> None:
        declared = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(loaded, f"{self.symbol}_layout"))).decode()
        if " ".join(declared.split()) != self.members:
            raise ImportError(f"{self.symbol} takes {declared!r}, and Python packs {self.members!r}")


def address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise ValueError("weights, scales, biases and caches must be contiguous")
    return tensor.data_ptr()
