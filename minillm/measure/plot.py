"""A picture in a file: matplotlib is an extra, and a path that cannot be written is one clear error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minillm.errors import RequestError


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator:
    """A matplotlib `Figure` of this size in inches to draw on; written to `path` at the end.

    Raises `RequestError` where matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError("--plot needs matplotlib: install the extra, minillm[plot]") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    try:
        figure.savefig(path, dpi=120, format=path.suffix[1:] or "png")  # to this very path: no ending is added
    except (OSError, ValueError) as error:
        raise RequestError(f"--plot {path}: {error}") from None
