"""tools/gpu_day.py in miniature: every stage on toy sizes, on a CPU; failures are named and passed, results kept."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import gpu_day


@pytest.fixture
def day(tmp_path):
    return gpu_day.Day(tmp_path, "cpu", small=True)


STAGES = [name for name in gpu_day.STAGES if name != "tests"]  # it runs pytest


def test_every_stage(day):
    for stage in STAGES:
        cells = gpu_day.STAGES[stage](day)
        found = gpu_day.run_stage(day, stage, cells)
        assert {name: cell.get("error") for name, cell in found.items()} == dict.fromkeys(cells), stage
        for row in (row for cell in found.values() for row in cell["rows"]):
            numbers = [value for value in row.values() if isinstance(value, float)]
            assert all(map(math.isfinite, numbers)), row
    gpu_day.report(day)
    text = (day.out / "tables.md").read_text()
    assert all(f"## {stage}" in text for stage in gpu_day.STAGES)
    assert (day.out / "decode.png").stat().st_size > 1000


def test_what_is_measured(day):
    """Bytes of a step are the weights and the rows' keys and values; memory is what was foretold."""
    found = gpu_day.run_stage(day, "decode", {"toy": gpu_day.STAGES["decode"](day)["toy, full, captured"]})["toy"]
    one, far, rows = found["rows"]
    per_key = 2 * 2 * 2 * 16 * 4  # layers, keys and values, key heads, channels, float32
    assert far["bytes"] - one["bytes"] == (far["position"] - one["position"]) * per_key
    assert rows["bytes"] - far["bytes"] == (rows["rows"] - 1) * far["position"] * per_key
    assert one["attention"] == "kernels" and one["tokens_per_second"] == pytest.approx(1e3 / one["milliseconds"])
    (row,) = gpu_day.run_stage(day, "memory", {"toy": gpu_day.STAGES["memory"](day)["toy, int8"]})["toy"]["rows"]
    assert row["held"] == row["foretold_held"]


def test_a_failure_is_named_and_passed_and_nothing_runs_twice(day, capsys):
    ran = []

    def good():
        ran.append(len(ran))
        return [{"held": 1.0}]

    def bad():
        raise RuntimeError("no such kernel image")

    cells = {"first": good, "broken": bad, "last": good}
    gpu_day.run_stage(day, "memory", cells)
    assert "broken FAILED: RuntimeError: no such kernel image" in capsys.readouterr().out
    gpu_day.run_stage(day, "memory", cells)
    assert ran == [0, 1]
    kept = json.loads((day.out / "memory.json").read_text())
    assert [*kept] == ["first", "broken", "last"]
    assert "no such kernel image" in kept["broken"]["error"]
    gpu_day.report(day)
    assert "FAILED broken: RuntimeError: no such kernel image" in (day.out / "tables.md").read_text()


def test_a_process_that_dies_loses_one_cell(day):
    def dies():
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        gpu_day.run_stage(day, "memory", {"fatal": dies, "next": lambda: [{"held": 1}]})
    found = gpu_day.run_stage(day, "memory", {"fatal": dies, "next": lambda: [{"held": 1}]})
    assert "ended while this ran" in found["fatal"]["error"]
    assert found["next"]["rows"] == [{"held": 1}]


def test_time_that_is_up_leaves_the_rest_for_the_next_run(day, capsys):
    cells = {"one": lambda: [{"held": 1}], "two": lambda: [{"held": 2}]}
    gpu_day.run_stage(day, "memory", cells, limit=-1)
    assert "time is up before 'one'" in capsys.readouterr().out
    assert [*gpu_day.run_stage(day, "memory", cells)] == ["one", "two"]


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--out", str(tmp_path)])
    assert gpu_day.main() == 1
    assert "no CUDA device" in capsys.readouterr().err


def test_a_stage_in_a_process_of_its_own(tmp_path, monkeypatch, capfd):
    arguments = ["gpu_day", "--out", str(tmp_path), "--stage", "memory", "--small", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_day.main() == 0
    assert len(json.loads((tmp_path / "memory.json").read_text())) == 3
    assert "| toy | int8 |" in (tmp_path / "tables.md").read_text()
