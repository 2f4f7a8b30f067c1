"""Which block sizes a kernel is launched with: one small table, looked up by chip and size.

There is no autotuner: a table of a few rows per kernel is enough, it can be read, every row
of it is cross-compiled by `tools/crosscompile.py`, and the first call costs nothing but a lookup. The last
row of every kernel serves every chip and every size: it has to fit the smallest shared memory
(99 KiB: consumer Ampere, Ada and Blackwell). Rows above it name the data-centre chips they were made for.

Nothing here asks the device anything at import; `architecture` does, once per device, at the first launch.
"""

import functools
import importlib.util
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

HOPPER_AND_LATER = (90, 100)  # H100/H200, B100/B200, the data-centre chips: 227 KiB of shared memory per block


@dataclass(frozen=True)
class Launch:
    """One row: block sizes (handed to the kernel as constexpr arguments), warps and pipeline stages.

    `size` means what the kernel's comment in TABLE says (head_dim, elements of a row, ...). The row
    serves a launch when the chip is in `chips` (None: any chip) and the size is at most `max_size`.
    `half_only` rows are not for float32, whose products bypass the tensor cores: a tile that suits bfloat16
    takes ten times the registers there.
    """

    blocks: dict[str, int]
    num_warps: int
    num_stages: int
    max_size: int | None = None
    chips: tuple[int, ...] | None = None
    half_only: bool = False

    def arguments(self) -> dict:
        """Keyword arguments for `kernel[grid](...)`."""
        return self.blocks | self.options()

    def options(self) -> dict:
        """The compiler's part of `arguments`. Triton 3.9 leaves multiply-add unfused unless asked, 3.6 fuses by
        default: say it for both."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


# kernel -> rows (blocks, warps, stages); first match wins, the last row is the default. What `size` is
# stands beside each kernel.
TABLE: dict[str, tuple[Launch, ...]] = {
    # size: head_dim. At most BLOCK_M query rows (16 if that is enough) against tiles of BLOCK_N keys
    "decode_attention": (
        Launch({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3, max_size=128, chips=HOPPER_AND_LATER, half_only=True),
        Launch({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2, max_size=128, half_only=True),
        Launch({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 2, half_only=True),
        Launch({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 1, chips=(80,)),
        Launch({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 2),
    ),
    # size: head_dim. BLOCK_M query rows against tiles of BLOCK_N keys
    "flash_attention": (
        Launch({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2, max_size=128, chips=HOPPER_AND_LATER, half_only=True),
        Launch({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 2, chips=(100,), half_only=True),
        Launch({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2, half_only=True),
        Launch({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 2, max_size=64, chips=(80,)),  # the next one would spill
        Launch({"BLOCK_M": 32, "BLOCK_N": 16}, 4, 2, max_size=128, chips=(80,)),
        Launch({"BLOCK_M": 16, "BLOCK_N": 16}, 4, 2),
    ),
    # size: inputs K. Four rows of the weight, BLOCK_K inputs at a time: 8 a thread and row (int4: 32)
    "gemv": (Launch({"BLOCK_K": 512}, 2, 1),),
    "int4_gemv": (Launch({"BLOCK_K": 2048}, 2, 1),),
    # size: outputs N. Weight tiles [BLOCK_N, BLOCK_K]; few outputs want smaller tiles, to fill the chip
    "few_rows": (
        Launch({"BLOCK_N": 32, "BLOCK_K": 256}, 4, 3, max_size=8192, half_only=True),
        Launch({"BLOCK_N": 64, "BLOCK_K": 128}, 4, 3, half_only=True),
        Launch({"BLOCK_N": 32, "BLOCK_K": 64}, 4, 2),
    ),
    "int4_few_rows": (
        Launch({"BLOCK_N": 32, "BLOCK_K": 512}, 4, 2, half_only=True),
        Launch({"BLOCK_N": 16, "BLOCK_K": 128}, 8, 2),
    ),
    # size: outputs F
    "gate": (Launch({"BLOCK": 1024}, 4, 1),),
    # size: inputs K
    "dequantize": (Launch({"BLOCK_N": 4, "BLOCK_K": 1024}, 4, 1),),
    # size: elements of a row, held in registers by one program
    "rms_norm": (
        Launch({}, 4, 1, max_size=2048),
        Launch({}, 8, 1, max_size=8192),
        Launch({}, 16, 1),
    ),
    # size: head_dim
    "rope_and_cache_write": (Launch({}, 1, 1),),
    # size: vocabulary; BLOCK tokens of it at a time
    "sampling": (
        Launch({"BLOCK": 2048}, 16, 1, chips=HOPPER_AND_LATER),
        Launch({"BLOCK": 1024}, 16, 1),
    ),
}


_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # looked up once, as Triton itself does


def interpreting() -> bool:
    """True under TRITON_INTERPRET=1: CPU tensors then go through the Triton kernels, run by Triton's
    interpreter, so a laptop without a GPU can test them."""
    return _INTERPRETING


@functools.cache
def architecture(device: torch.device) -> int:
    """90 for an H100 (compute capability 9.0). CPU tensors, in the interpreter, count as 80.

    Raises RuntimeError for AMD's GPUs, which call themselves CUDA devices and have other limits.
    """
    if device.type != "cuda":
        return 80
    if torch.version.hip is not None:
        raise RuntimeError("these kernels are for NVIDIA's GPUs: load the weights unquantized, with attention='sdpa'")
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def why_no_launch(device: torch.device) -> str | None:
    """What keeps these kernels from running on a CUDA device; None where they can, or where there is none to ask."""
    if torch.version.hip is not None:
        return "they are for NVIDIA's GPUs"
    if "triton" not in sys.modules and importlib.util.find_spec("triton") is None:
        return "they need Triton, which is not installed"
    if torch.cuda.is_available() and architecture(device) < 80:
        return f"Triton needs compute capability 8.0, and {device} has {architecture(device) / 10}"
    return None


def choose(kernel: str, x: Tensor, size: int) -> Launch:
    """The row of TABLE that serves this kernel on x's device, for x's dtype, at this size."""
    chip = architecture(x.device)
    for row in TABLE[kernel]:
        if (
            (row.chips is None or chip in row.chips)
            and (row.max_size is None or size <= row.max_size)
            and not (row.half_only and x.dtype == torch.float32)
        ):
            return row
    raise AssertionError(f"TABLE[{kernel!r}] has no default row: its last row must serve everything")
