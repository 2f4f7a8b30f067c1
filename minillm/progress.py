"""The one progress bar: on stderr, and gone when the work is done."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, label: str, after: float = 0.0) -> Iterator[Callable[..., None]]:
    """Yields `advance(told="")`, to be called after each of `total` things; the bar appears `after` seconds from now.

    It is redrawn by `advance` alone: a thread of its own would disturb what is measured, and outlive a fork.
    """
    started, done, bar = time.monotonic(), 0, None

    def draw(told: str = "") -> None:
        nonlocal bar
        if bar is None:
            state = random.getstate()  # rich draws a number while it is imported; the host's numbers are its own
            from rich.console import Console
            from rich.progress import Progress

            random.setstate(state)
            console = Console(stderr=True)
            bar = Progress(console=console, transient=True, auto_refresh=False, disable=not console.is_terminal)
            bar.add_task(label, total=total)
            bar.start()
        bar.update(bar.task_ids[0], completed=done, description=f"{label} {told}".rstrip(), refresh=True)

    def advance(told: str = "") -> None:
        nonlocal done
        done += 1
        if bar is not None or time.monotonic() - started > after:
            draw(told)

    if after <= 0:
        draw()
    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
