"""What a user's words for dtype and device come to."""

import torch

from minillm.config import ModelConfig
from minillm.errors import BackendError, first_line, shown
from minillm.options import DTYPES


def choose_dtype(dtype: str | torch.dtype, config: ModelConfig) -> torch.dtype:
    """The torch dtype a user names; "auto" is what the checkpoint says, float32 if it says nothing."""
    name = (config.dtype or "float32") if dtype == "auto" else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise BackendError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return getattr(torch, name)


def choose_device(device: str | torch.device) -> torch.device:
    """The torch device a user names; "auto" is a CUDA device if there is one. Raises `BackendError`."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()  # known to PyTorch, there, and holding numbers ("meta" does not)
        torch.zeros(1, device=chosen, dtype=torch.float64)  # of random numbers and sums; Apple's GPUs have none
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = first_line(error).partition(". ")[0]
        raise BackendError(f"device {shown(device)} cannot be used: {reason}") from None
    return chosen
