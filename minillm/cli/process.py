"""The command in a process of its own, and what that owes its surroundings.

A stream that is closed, full or read no further, a character the terminal does not have, Ctrl-C at any moment:
each ends in one line at most, never in a traceback.
"""

import os
import signal
import sys


def run() -> int:
    """The exit status; interrupted: 130, terminated: 143."""
    _on_signals(_stop)
    try:
        _open_streams()
        from minillm.cli.parser import main

        return main()
    finally:
        _on_signals(lambda number, frame: os._exit(128 + number))  # all is done and said: only Python's end is left
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # told already, or nobody reads on: what is left must not fail once more at the very end
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _on_signals(handler) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as in the background of a script
            signal.signal(number, handler)


def _stop(number: int, frame) -> None:
    """Raise what ends the command, so that it tidies up. Not in an import: C code there swallows exceptions; leave."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _open_streams() -> None:
    """Give the process its three streams; what stdout cannot show is written as an escape."""
    closed = sys.stdout is None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # or the next file that is opened would take its number
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if closed:
        sys.exit("minillm: stdout is closed: there is nowhere to write to")
    sys.stdout.reconfigure(errors="backslashreplace")
