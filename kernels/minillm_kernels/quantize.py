"""Weights to int4 codes, in C: `quantize_int4`.

What bounds it: arithmetic, ten ranges tried for each group of weights (`cpu/quantize.c`). Done once, when a model is
loaded.
"""

from torch import Tensor

from minillm_kernels import cpu
from minillm_kernels.op import op


def check(weight: Tensor, group_size: int) -> None:
    if group_size not in cpu.GROUP_SIZES:
        raise ValueError(f"quantize_int4: group_size must be one of {cpu.GROUP_SIZES}, got {group_size}")
    if not weight.is_floating_point():
        raise TypeError(f"quantize_int4: weight must be floats, got {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] % group_size:
        raise ValueError(
            f"quantize_int4: weight must be [N, K], K a multiple of {group_size}, got {tuple(weight.shape)}"
        )


@op(check=check, c=cpu.quantize_int4)
def quantize_int4(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes of weight [N, K], finite floats of any dtype, with little squared error in each group of `group_size`
    inputs: packed [N, K / 2] uint8, scale [N, K / G] float16, zero [N, K / G] uint8; `int4_linear` takes packed and the
    others transposed. None where there is no C for these tensors. Raises ValueError or TypeError.
    """
    return None
