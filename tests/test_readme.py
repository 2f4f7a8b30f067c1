"""What the README and docs/ show is what happens: code runs, commands parse, files and names exist, promises hold."""

import ast
import re
import shlex
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from test_layering import ROAD, WINGS

from minillm.cli.parser import _parser
from minillm.load.families import FAMILIES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
FENCES = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def run_blocks(page: Path) -> dict:
    namespace = {}
    for language, block in FENCES.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(block, page.name, "exec"), namespace)
    return namespace


def spans(page: Path) -> list[str]:
    """What stands in backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", FENCES.sub("", page.read_text(encoding="utf-8")))


def test_the_three_levels_run_top_to_bottom(capsys):
    namespace = run_blocks(PAGES[0])
    assert namespace["again"].stats.reused_tokens > 10  # level two: the cache was used
    assert len(namespace["new"]) == 20  # level three: the loop ran
    assert capsys.readouterr().out.count("\n") >= 5


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_python_of_the_other_pages_runs(page):
    run_blocks(page)


def test_it_opens_with_two_commands_and_ci_runs_the_second():
    commands = FENCES.search(README)[2].splitlines()
    assert len(commands) == 2
    assert "minillm generate" in commands[0]
    assert "&& pytest" in commands[1]
    assert "sed -n 2p" in (ROOT / ".ci" / "run").read_text()


def test_it_is_short():
    assert len(README.splitlines()) <= 200


# ---- commands ----


def commands(page: Path) -> list[list[str]]:
    """Every `minillm ...` and `python tools/...` that is shown, as words."""
    text = page.read_text(encoding="utf-8")
    lines = [line.removeprefix("$ ") for language, block in FENCES.findall(text) for line in block.splitlines()]
    shown = [line for line in [*lines, *spans(page)] if line.startswith(("minillm ", "python tools/"))]
    return [shlex.split(line, comments=True) for line in shown]


def flags_of_tools() -> dict[str, set[str]]:
    return {path.name: set(re.findall(r'"(--[\w-]+)"', path.read_text())) for path in (ROOT / "tools").glob("*.py")}


@each_page
def test_commands_can_be_parsed(page):
    for program, *words in commands(page):
        if program == "minillm":
            # Wrong usage would be a SystemExit, and so would be --help, with 0; a name alone is no usage.
            with pytest.raises(SystemExit, match=r"^0$") if len(words) == 1 else nullcontext():
                _parser().parse_args(words + ["--help"] * (len(words) == 1))
        else:
            tool = Path(words[0])
            assert (ROOT / tool).exists(), words
            assert {word for word in words if word.startswith("--")} <= flags_of_tools()[tool.name], words


def test_it_shows_every_command():
    choices = next(action.choices for action in _parser()._actions if action.choices)
    assert {words[0] for program, *words in commands(PAGES[0]) if program == "minillm"} == set(choices)


@each_page
def test_every_flag_exists(page):
    subparsers = next(action.choices for action in _parser()._actions if action.choices).values()
    known = {flag for parser in subparsers for flag in parser._option_string_actions}
    known = known.union(*flags_of_tools().values()) | {"--check", "--nproc-per-node"}  # ruff's, torchrun's
    text = re.sub(r"pip install.*", "", page.read_text(encoding="utf-8"))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) <= known


# ---- files and names ----


@each_page
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@each_page
def test_every_file_it_names_exists(page):
    folders = ["", "minillm", "tools", "tests", *(f"minillm/{wing}" for wing in WINGS)]
    for name in filter(re.compile(r"[\w/.]+\.(py|toml|txt)").fullmatch, spans(page)):
        assert any((ROOT / folder / name).exists() for folder in folders), name


def table() -> list[tuple[list[str], list[str]]]:
    """Of the README's table of rooms: the rooms of each line, and the names to look at first."""
    rows = re.search(r"\| room \|.*?\n\|[-|]+\n(.*?)\n\n", README, re.DOTALL)[1].splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    return [(re.findall(r"`(\w+)`", first), re.findall(r"`([\w.]+)`", last)) for first, _, last in cells]


def test_the_road_is_listed_in_path_order():
    listed = [room for rooms, _ in table() for room in rooms]
    assert listed == [room for room in ROAD if (ROOT / "minillm" / f"{room}.py").exists()]


@pytest.mark.parametrize("rooms, names", table(), ids=lambda words: "-".join(words))
def test_what_to_look_at_first_is_there(rooms, names):
    trees = [ast.parse((ROOT / "minillm" / f"{room}.py").read_text(encoding="utf-8")) for room in rooms]
    defined = {node.name for tree in trees for node in ast.walk(tree) if hasattr(node, "name")}
    assert names
    for name in names:
        assert set(name.split(".")) <= defined


def test_the_wings_are_listed():
    for wing, rooms in WINGS.items():
        listed = re.search(rf"`{wing}/`\s\(([^:)]*)", README)[1]
        assert re.findall(r"`(\w+)`", listed) == rooms


def test_every_family_is_listed():
    """In the README, in docs/models.md, and as many as it says."""
    table = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), re.MULTILINE)[1:]
    listed = re.findall(r"`(\w+)`", " ".join(table))
    assert (
        re.findall(r"`(\w+)`", re.search(r"^By `model_type`(.*?)\n\n", README, re.DOTALL | re.MULTILINE)[1]) == listed
    )
    assert set(FAMILIES) <= {*listed, *(f"{name}_text" for name in listed)}
    assert f"{len(FAMILIES)} families" in README


def test_strangers_questions_are_answered_by_lines_that_exist():
    answers = re.findall(r"^\* .*\? `(\w+\.py)`, `([\w.]+)`: `(.*)`$", README, re.MULTILINE)
    assert len(answers) == 3
    for room, function, line in answers:
        source = (ROOT / "minillm" / room).read_text(encoding="utf-8")
        node = ast.parse(source)
        for name in function.split("."):
            node = next(one for one in node.body if getattr(one, "name", None) == name)
        assert line in ast.get_source_segment(source, node)


# ---- a promise of docs/safety.md that no other file tests ----

HOST = """
import os, random, signal, threading, numpy, torch

def state():
    return [dict(os.environ), os.getcwd(), torch.get_num_threads(), torch.get_num_interop_threads(),
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist(),
            [signal.getsignal(number) for number in signal.valid_signals()], threading.active_count()]

before = state()
from minillm import LLM
assert state() == before, "importing"
from minillm import progress
with progress.progress_bar(2, "as when loading takes long") as advance:
    advance()
assert state() == before, "a progress bar"
llm = LLM.from_pretrained("demo", quantize="int8")
assert state() == before, "loading"
llm.generate(["Once", "A king"], temperature=0.8, max_new_tokens=5)
list(llm.stream("Once", prompt_lookup_num_tokens=2, max_new_tokens=5))
assert state() == before, "generating"
"""


def test_the_hosts_process_is_left_as_it_was():
    done = subprocess.run([sys.executable, "-c", HOST], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
