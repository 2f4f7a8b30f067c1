"""What the README shows is what happens: its Python blocks run, its two commands are what CI runs."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_blocks_run_top_to_bottom(capsys):
    namespace = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["again"].stats.reused_tokens > 10  # level two: the cache was used
    assert len(namespace["new"]) == 20  # level three: the loop ran
    assert capsys.readouterr().out.count("\n") >= 5


def test_it_opens_with_two_commands_and_ci_runs_the_second():
    commands = re.search(r"```bash\n(.*?)```", README, re.DOTALL).group(1).splitlines()
    assert len(commands) == 2
    assert "minillm generate" in commands[0]
    assert commands[1].endswith("pytest")
    assert "sed -n 2p" in (ROOT / ".ci" / "run").read_text()


def test_every_file_it_names_exists():
    for name in re.findall(r"`(?:minillm/)?(\w+\.py)`", README):
        assert any(any((ROOT / folder).rglob(name)) for folder in ("minillm", "tools")), name
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
