"""A progress bar on stderr, where that is a terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, label: str, after: float = 0.0) -> Iterator[Callable[[], None]]:
    """Yields `advance()`, to be called `total` times; the bar shows once `after` seconds have passed.

    `advance` alone redraws it: a thread that did would disturb what is measured.
    """
    started, done, bar = time.monotonic(), 0, None

    def advance() -> None:
        nonlocal done, bar
        done += 1
        if bar is None and time.monotonic() - started >= after and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            bar = Progress(console=Console(stderr=True), transient=True, auto_refresh=False)
            bar.start()
            bar.add_task(label, total=total)
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done, refresh=True)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
