"""One bar: on stderr alone, after its delay, and gone at the end."""

import io
import sys

import pytest

from minillm.progress import progress_bar


@pytest.mark.parametrize(("after", "drawn"), [(0.0, True), (60.0, False)])
def test_drawn_on_stderr_alone_and_only_after_its_delay(after, drawn, monkeypatch, capsys):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar(3, "counting", after) as advance:
        for _ in range(3):
            advance()
    assert ("counting" in terminal.getvalue()) is drawn
    assert ("100%" in terminal.getvalue()) is drawn
    assert capsys.readouterr().out == ""


def test_quick_work_does_not_import_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)  # importing it would fail
    with progress_bar(1, "quick", after=60.0) as advance:
        advance()


def test_nothing_is_written_where_nobody_watches(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # a file or a pipe
    with progress_bar(1, "counting") as advance:
        advance()
    assert sys.stderr.getvalue() == ""


def test_the_bar_is_taken_away_when_the_work_fails():
    with pytest.raises(ValueError, match="half way"), progress_bar(2, "failing") as advance:
        advance()
        raise ValueError("half way")
    with progress_bar(1, "the next one"):  # rich allows one bar at a time
        pass
