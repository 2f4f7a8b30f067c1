"""What PyTorch computes between the kernels of a pass, and its twin in C: the same to the last bit.

A lookup, a product with a number, a wider dtype, another layout: so little that the decoder says it in PyTorch, and so
exact that no other code can give another result. So while a pass is recorded (`tape.py`) PyTorch computes it, and
what the tape keeps is the twin. A twin takes the result and the operator's arguments, and returns the call that would
write that result: (call, packed arguments, tensors), or None where it does not serve. In inference mode, that is:
elsewhere PyTorch takes `to` and `contiguous` apart into others, which have no twin.
"""

import torch
from torch import Tensor

from minillm_kernels.cpu.call import DTYPES, FORMATS, Call

MAX_DIMS = 4

LOOKUP = Call("lookup", "int64_t ids, table, out, count, rows, bytes;")
SCALE = Call("scale", "int64_t x, out, count, dtype; double factor;")
ADD = Call("add", "int64_t x, y, out, count, dtype, threads;")
WIDEN = Call("widen", "int64_t x, out, count, dtype;")
AT_LEAST = Call("at_least", "int64_t x, out, count, least;")
ARRANGE = Call("arrange", "int64_t from, to, bytes, n0, n1, n2, n3, s0, s1, s2, s3;")

Noted = tuple[Call, bytes, tuple[Tensor, ...]] | None


def lookup(out: Tensor, table: Tensor, ids: Tensor, *_) -> Noted:
    if not (table.is_contiguous() and ids.is_contiguous() and ids.dtype == torch.int64):
        return None
    packed = LOOKUP.pack(
        ids.data_ptr(), table.data_ptr(), out.data_ptr(), ids.numel(), len(table), table[0].numel() * table.itemsize
    )
    return LOOKUP, packed, (ids, table, out)


def scale(out: Tensor, x: Tensor, factor: object) -> Noted:
    if not isinstance(factor, float) or not x.is_contiguous() or x.dtype not in DTYPES:
        return None
    return SCALE, SCALE.pack(x.data_ptr(), out.data_ptr(), x.numel(), FORMATS[x.dtype], factor), (x, out)


def add(out: Tensor, x: Tensor, y: object, alpha: float = 1) -> Noted:
    fits = isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype and x.dtype in DTYPES and alpha == 1
    if not fits or not x.is_contiguous() or not y.is_contiguous():
        return None
    packed = ADD.pack(x.data_ptr(), y.data_ptr(), out.data_ptr(), x.numel(), FORMATS[x.dtype], 1)
    return ADD, packed, (x, y, out)


def widen(out: Tensor, x: Tensor, dtype: torch.dtype, *_, **__) -> Noted:
    if dtype != torch.float32 or x.dtype not in DTYPES or not x.is_contiguous():
        return None
    return WIDEN, WIDEN.pack(x.data_ptr(), out.data_ptr(), x.numel(), FORMATS[x.dtype]), (x, out)


def at_least(out: Tensor, x: Tensor, least: int, most: int | None = None) -> Noted:
    if x.dtype != torch.int64 or type(least) is not int or most is not None or not x.is_contiguous():
        return None
    return AT_LEAST, AT_LEAST.pack(x.data_ptr(), out.data_ptr(), x.numel(), least), (x, out)


def arrange(out: Tensor, x: Tensor, *_, **__) -> Noted:
    if x.dim() > MAX_DIMS or not out.is_contiguous():
        return None
    missing = MAX_DIMS - x.dim()
    sizes, strides = (1,) * missing + x.shape, (0,) * missing + x.stride()
    packed = ARRANGE.pack(x.data_ptr(), out.data_ptr(), x.itemsize, *sizes, *(n * x.itemsize for n in strides))
    return ARRANGE, packed, (x, out)


def copy(out: Tensor, to: Tensor, source: Tensor, *_) -> Noted:
    same = to.shape == source.shape and to.dtype == source.dtype and to.is_contiguous()
    return arrange(to, source) if same else None


_aten = torch.ops.aten
TWINS = {
    _aten.embedding.default: lookup,
    _aten.mul.Tensor: scale,
    _aten.add.Tensor: add,
    _aten.to.dtype: widen,
    _aten.clamp.default: at_least,
    _aten.copy_.default: copy,
    **dict.fromkeys((_aten.contiguous.default, _aten.reshape.default, _aten.clone.default), arrange),
}
