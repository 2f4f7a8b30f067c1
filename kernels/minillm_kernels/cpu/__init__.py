"""The C kernels, called through ctypes: what each function takes, and the call. How they come to be: build.py.

Without a compiler, or if the build fails, `available()` is False, one warning says why, and the ops take their PyTorch
implementation.
"""

import ctypes
import functools
import itertools
import math
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from minillm_kernels.cpu import build, glue, tape
from minillm_kernels.cpu.call import DTYPES, FORMATS, Call, address

GROUP_SIZES = (32, 64, 128)  # inputs that share a scale in int4
FEW_ROWS = 16  # up to which the time is that of reading the weights: other code than for many rows
GATES = {None: 0, "silu": 1, "gelu_tanh": 2}
ACTIVATIONS = GATES | {"gelu": 3, "relu": 4, "relu2": 5}
MAX_HEAD_DIM = 4096  # a thread keeps a few heads on its stack

LINEAR = Call(
    "linear",
    "int64_t format, dtype, x, rows, inputs, weight, outputs, scale, zero, group_size, bias, y, gate, threads;",
)
GEMM = Call("gemm", LINEAR.members)
RMS_NORM = Call(
    "rms_norm",
    """int64_t x, residual, weight, bias, out, sum, rows, width, dtype, multiply_in_fp32, center, threads, group,
    group_stride; double eps, offset;""",
)
ACTIVATE = Call("activate", "int64_t x, out, rows, width, kind, gated, dtype, threads;")
ANGLES = Call("angles", "int64_t position, frequency, cos, sin, batch, tokens, half, shared, threads; double scale;")
ROPE = Call(
    "rope_and_cache_write",
    """int64_t q, k, v, cos, sin, k_cache, v_cache, position, out, batch, tokens, heads, kv_heads, head_dim, half,
    slots, dtype, q_row, q_token, k_row, k_token, v_row, v_token, threads;""",
)
ATTENTION = Call(
    "decode_attention",
    """int64_t q, k, v, position, slopes, out, batch, heads, kv_heads, tokens, head_dim, slots, row_stride, head_stride,
    dtype, window, threads; double scale, softcap;""",
)
FLASH = Call("flash_attention", ATTENTION.members)
QUANTIZE = Call("quantize_int4", "int64_t dtype, weight, rows, inputs, group_size, packed, scale, zero, threads;")
PROBABILITIES = Call(
    "probabilities", "int64_t logits, out, rows, vocabulary, temperature, top_k, top_p, min_p, threads;"
)
ARGMAX = Call("argmax", "int64_t x, out, rows, width;")
DRAW = Call("draw", "int64_t probs, out, rows, vocabulary, seed, position, stream;")
VERIFY = Call(
    "verify",
    """int64_t drafted, draft_probs, row_stride, draft_stride, draft_vocabulary, target_probs, lengths, seed, position,
    stream, rows, drafts, vocabulary, accepted, next;""",
)
REPLAY = Call("replay", "int64_t function, arguments;")


def threads() -> int:
    """How many threads share a call: as many as PyTorch's operators use, but no more than may run at a time."""
    wanted, most = torch.get_num_threads(), cores()
    return wanted if wanted < most else most  # a call to `min` takes longer


@functools.cache
def cores(root: Path = Path("/")) -> int:
    """How many cores this process may keep busy: those it is bound to, or what its control group (its container, say)
    grants it, if that is less. Looked up once."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        group = (root / "proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
        folder = root / "sys/fs/cgroup" / group
        for limit in (level / "cpu.max" for level in (folder, *folder.parents)):  # each level may set one
            quota, period = limit.read_text().split() if limit.exists() else ("max", "")  # microseconds
            found = found if quota == "max" else min(found, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # not Linux, or nothing that we know how to read
        pass
    return max(found, 1)


def available() -> bool:
    """True once the C kernels are built and loaded; the first call builds them."""
    return library() is not None


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    group_size: int = 0,
    bias: Tensor | None = None,
    gate: str | None = None,
) -> Tensor:
    """x W^T (+ bias), or activation(x Wg^T) * (x Wu^T) with `gate`; the op that calls has checked the shapes.

    x [..., K]; weight [N, K] in x.dtype or int8, or [N, K / 2] uint8 (int4); with `gate` its first half of rows
    is Wg. scale, zero, bias as in the ops. Sums are float32; of up to 16 rows by quantized weights exact int32 within
    a group or block.
    """
    if zero is not None:
        scale, zero = by_output(scale), by_output(zero)
    x = x if x.is_contiguous() else x.contiguous()
    weight = weight if weight.is_contiguous() else weight.contiguous()
    inputs = x.shape[-1]
    outputs = weight.shape[0] // 2 if gate else weight.shape[0]
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device="cpu")
    packed = LINEAR.pack(
        FORMATS[weight.dtype], FORMATS[x.dtype], x.data_ptr(), y.numel() // max(outputs, 1), inputs,
        weight.data_ptr(), outputs, 0 if scale is None else scale.data_ptr(), 0 if zero is None else zero.data_ptr(),
        group_size, address(bias), y.data_ptr(), GATES[gate], threads(),
    )  # fmt: skip
    few = x.numel() <= FEW_ROWS * inputs
    _call(LINEAR if few else GEMM, packed, x, weight, scale, zero, bias, y)
    return y


def by_output(tensor: Tensor) -> Tensor:
    """scale or zero [K / G, N] with the groups of an output side by side in memory, a copy where they are not."""
    return tensor if tensor.stride() == (1, tensor.shape[0]) else tensor.t().contiguous().t()


def rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    multiply_in_fp32: bool,
    bias: Tensor | None = None,
    center: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(norm, sum) as `minillm::add_rms_norm` returns them, or (norm, None) without a residual."""
    width = x.shape[-1]
    # Queries and keys are parts of one wider tensor; their heads lie side by side, so no copy is needed.
    groups = _groups(x) if residual is None else None
    if groups is None:
        x, groups = x.contiguous(), (1, width)
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    total = None
    if residual is not None:
        residual, total = residual.contiguous(), torch.empty(x.shape, dtype=x.dtype, device="cpu")
    packed = RMS_NORM.pack(
        x.data_ptr(), address(residual), address(weight), address(bias), out.data_ptr(), address(total),
        x.numel() // width, width, FORMATS[x.dtype], multiply_in_fp32, center, threads(), *groups, eps, offset,
    )  # fmt: skip
    _call(RMS_NORM, packed, x, residual, weight, bias, out, total)
    return out, total


def _groups(x: Tensor) -> tuple[int, int] | None:
    """How the vectors of x [..., N] lie: (so many side by side, elements from one group of them to the next), or None
    where that does not tell where each one is."""
    if x.is_contiguous():
        return 1, x.shape[-1]
    side_by_side = x.shape[-2] if x.dim() > 3 else 1  # [B, T, heads, N]
    if x.stride(-1) != 1 or (side_by_side > 1 and x.stride(-2) != x.shape[-1]):
        return None
    outer = x.dim() - (2 if x.dim() > 3 else 1)
    steps = [(x.shape[i], x.stride(i)) for i in range(outer) if x.shape[i] > 1]
    if any(stride != n * inner for (_, stride), (n, inner) in itertools.pairwise(steps)):
        return None
    return side_by_side, steps[-1][1] if steps else 0


def norm(x: Tensor, weight: Tensor, eps, offset, multiply_in_fp32, bias=None, center=False) -> Tensor:
    """As `minillm::rms_norm`."""
    return rms_norm(x, None, weight, eps, offset, multiply_in_fp32, bias, center)[0]


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, two tensors of one shape and dtype."""
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    packed = glue.ADD.pack(address(x), address(y), out.data_ptr(), out.numel(), FORMATS[x.dtype], threads())
    _call(glue.ADD, packed, x, y, out)
    return out


def activate(x: Tensor, activation: str, gated: bool = False) -> Tensor:
    """As `activation.activate`."""
    x = x.contiguous()
    width = x.shape[-1] // (2 if gated else 1)
    out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device="cpu")
    packed = ACTIVATE.pack(
        x.data_ptr(), out.data_ptr(), out.numel() // max(width, 1), width, ACTIVATIONS[activation], gated,
        FORMATS[x.dtype], threads(),
    )  # fmt: skip
    _call(ACTIVATE, packed, x, out)
    return out


def angles(position: Tensor, frequency: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `rope.angles`."""
    position, frequency = position.contiguous(), frequency.contiguous()
    cos, sin = (torch.empty((*position.shape, frequency.shape[1]), dtype=torch.float32, device="cpu") for _ in range(2))
    packed = ANGLES.pack(
        position.data_ptr(), frequency.data_ptr(), cos.data_ptr(), sin.data_ptr(), *position.shape, frequency.shape[1],
        len(frequency) == 1, threads(), scale,
    )  # fmt: skip
    _call(ANGLES, packed, position, frequency, cos, sin)
    return cos, sin


def rope_and_cache_write(q, k, v, cos, sin, k_cache, v_cache, cache_position) -> Tensor:
    """As `minillm::rope_and_cache_write`; the caches must be contiguous."""
    batch, tokens, heads, head_dim = q.shape
    q, k, v = (x if x.stride(2) == head_dim and x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    cos, sin, cache_position = cos.contiguous(), sin.contiguous(), cache_position.contiguous()
    out = torch.empty((batch, heads, tokens, head_dim), dtype=q.dtype, device="cpu")
    packed = ROPE.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), cos.data_ptr(), sin.data_ptr(), address(k_cache),
        address(v_cache), cache_position.data_ptr(), out.data_ptr(), batch, tokens, heads, k.shape[2], head_dim,
        cos.shape[-1], k_cache.shape[2] - 1, FORMATS[q.dtype], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        threads(),
    )  # fmt: skip
    _call(ROPE, packed, q, k, v, cos, sin, k_cache, v_cache, cache_position, out)
    return out


def decode_attention(q, k, v, cache_position, scale, window=None, softcap=None, alibi_slopes=None) -> Tensor:
    """As `minillm::decode_attention`; k and v may be views of a longer cache that cut off slots at the end.

    The result, [B, H, T, D] like q, lies in memory as [B, T, H, D]: what follows wants the heads side by side.
    """
    q, cache_position = q.contiguous(), cache_position.contiguous()
    batch, heads, tokens, head_dim = q.shape
    if k.stride() != v.stride() or k.stride(2) != head_dim:
        k, v = k.contiguous(), v.contiguous()
    out = torch.empty((batch, tokens, heads, head_dim), dtype=q.dtype, device="cpu")
    packed = ATTENTION.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), cache_position.data_ptr(), address(alibi_slopes),
        out.data_ptr(), batch, heads, k.shape[1], tokens, head_dim, k.shape[2], k.stride(0), k.stride(1),
        FORMATS[q.dtype], window or 0, threads(), scale, softcap or 0.0,
    )  # fmt: skip
    _call(ATTENTION if tokens <= FEW_ROWS else FLASH, packed, q, k, v, cache_position, alibi_slopes, out)
    return out.transpose(1, 2)


def probabilities(
    logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None
) -> Tensor:
    """minillm_kernels.sampling.probabilities; see there for the arguments."""
    logits, out = logits.contiguous(), torch.empty(logits.shape, dtype=torch.float32, device="cpu")
    columns = [None if column is None else column.contiguous() for column in (temperature, top_k, top_p, min_p)]
    packed = PROBABILITIES.pack(logits.data_ptr(), out.data_ptr(), *logits.shape, *map(address, columns), threads())
    _call(PROBABILITIES, packed, logits, out, *columns)
    return out


def argmax(x: Tensor) -> Tensor:
    """As `sampling.argmax`."""
    x, out = x.contiguous(), torch.empty(x.shape[:-1], dtype=torch.int64, device="cpu")
    _call(ARGMAX, ARGMAX.pack(x.data_ptr(), out.data_ptr(), out.numel(), x.shape[-1]), x, out)
    return out


def draw(probs: Tensor, seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """minillm_kernels.sampling.draw; see there for the arguments."""
    probs, seed, position = probs.contiguous(), seed.contiguous(), position.contiguous()
    out = torch.empty(probs.shape[0], dtype=torch.int64, device="cpu")
    packed = DRAW.pack(probs.data_ptr(), out.data_ptr(), *probs.shape, seed.data_ptr(), position.data_ptr(), stream)
    _call(DRAW, packed, probs, seed, position, out)
    return out


def verify(draft_tokens, draft_probs, target_probs, draft_lengths, seed, position, stream) -> tuple[Tensor, Tensor]:
    """As `sampling.verify`."""
    if draft_probs.stride(2) != 1 and draft_probs.shape[2] > 1:
        draft_probs = draft_probs.contiguous()
    drafted, target_probs, lengths = (x.contiguous() for x in (draft_tokens, target_probs, draft_lengths))
    seed, position = seed.contiguous(), position.contiguous()
    accepted, following = torch.empty_like(lengths), torch.empty_like(lengths)
    packed = VERIFY.pack(
        drafted.data_ptr(), draft_probs.data_ptr(), *draft_probs.stride()[:2], draft_probs.shape[2],
        target_probs.data_ptr(), lengths.data_ptr(), seed.data_ptr(), position.data_ptr(), stream, *drafted.shape,
        target_probs.shape[2], accepted.data_ptr(), following.data_ptr(),
    )  # fmt: skip
    _call(VERIFY, packed, drafted, draft_probs, target_probs, lengths, seed, position, accepted, following)
    return accepted, following


def _call(call: Call, packed: bytes, *tensors: Tensor | None) -> None:
    """Call a C function that works on `tensors`; each returns 0, or 1 where it could not have its memory."""
    function = getattr(library(), call.symbol)
    if function(packed):
        raise MemoryError(f"no memory for a {call.name} of {[tuple(t.shape) for t in tensors if t is not None]}")
    tape.note(call, packed, tensors)


def blank_tape() -> tape.Tape:
    """A tape to record C calls on; only where they are `available`."""
    return tape.Tape(library(), REPLAY.pack, glue.TWINS)


def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `quantize.quantize_int4`."""
    weight = weight.contiguous() if weight.dtype in DTYPES else weight.float().contiguous()
    outputs, inputs = weight.shape
    packed = torch.empty(outputs, inputs // 2, dtype=torch.uint8, device="cpu")
    scale = torch.empty(outputs, inputs // group_size, dtype=torch.float16, device="cpu")
    zero = torch.empty(outputs, inputs // group_size, dtype=torch.uint8, device="cpu")
    arguments = QUANTIZE.pack(
        FORMATS[weight.dtype], weight.data_ptr(), outputs, inputs, group_size, packed.data_ptr(), scale.data_ptr(),
        zero.data_ptr(), threads(),
    )  # fmt: skip
    _call(QUANTIZE, arguments, weight, packed, scale, zero)
    return packed, scale, zero


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None with one warning that says why not. Raises ImportError when what the C functions take
    is not what is packed here."""
    try:
        loaded = build.load()
    except (OSError, build.BuildError) as error:
        warnings.warn(
            f"minillm runs on PyTorch's CPU operators, which are slower: the C kernels are missing ({error}).",
            stacklevel=2,
        )
        return None
    for call in Call.all:
        call.check_layout(loaded)
        getattr(loaded, call.symbol).argtypes = [ctypes.c_char_p]
    loaded.minillm_replay.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    return loaded
