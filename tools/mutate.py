"""Does the suite see? Small plausible mistakes, put into a copy of the code one at a time, and who notices.

    python tools/mutate.py                          all of them: some twenty seconds each
    python tools/mutate.py --only 'cache|speculative'
    python tools/mutate.py --list

The mistakes stand in `mutations.toml`: a file, the old text, which must occur in it exactly once, the new text, and
what that would cost whoever it reached. Each is made in a copy of the checkout (the working tree is only read), where
the narrowest tests run until one fails, those of the mistake, else those of its file. What takes longer than five
minutes counts as noticed. In the end every test that noticed something has to pass on the code as it is.

Results are kept in the folder of the copy. The next run skips what was noticed, and what was not unless its tests have
changed; `--again` forgets them. Two runs at once need a `--folder` each.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MISTAKES = Path(__file__).with_name("mutations.toml")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillm" / "mutate"
LIMIT = 300.0  # seconds after which tests are stopped
SETTING = "[A-Z_]+=|--noconftest"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="mistakes whose file, text or cost it is found in")
    parser.add_argument("--list", action="store_true", help="print them and try none")
    parser.add_argument("--again", action="store_true", help="forget former results")
    parser.add_argument("--folder", type=Path, default=CACHE, help=f"for the copy and the results (default: {CACHE})")
    arguments = parser.parse_args()
    data = tomllib.loads(MISTAKES.read_text())
    mistakes = [one for one in data["mistake"] if re.search(arguments.only, describe(one))]
    if arguments.list:
        print("\n".join(map(describe, mistakes)), f"\n{len(mistakes)} mistakes")
        return 0
    bench = Bench(arguments.folder, arguments.again)
    outcomes = []
    for mistake in mistakes:
        tests = mistake.get("tests") or data["tests"][mistake["file"]]
        outcome, seconds, by = bench.attempt(mistake, tests)
        outcomes.append(outcome)
        print(f"{outcome:9} {seconds:4.0f} s  {describe(mistake)}{by and f' ({by})'}", flush=True)
    if blind := bench.verify():
        raise SystemExit(f"{blind} fails without any mistake: forget its results (--again) once it is mended")
    print(", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("noticed", "harmless", "unnoticed", "invalid")))
    return 1 if {"unnoticed", "invalid"} & set(outcomes) else 0


def describe(mistake: dict) -> str:
    old, new = (" ".join(mistake[key].split()) for key in ("old", "new"))
    return f"{mistake['file']}: {old[:60]} -> {new[:60]}: {mistake.get('harmless') or mistake['cost']}"


class Bench:
    """A copy of the checkout in which mistakes are made and tests run, and what came of it so far."""

    def __init__(self, folder: Path, again: bool):
        folder = folder.resolve()
        self.tree, self.results = folder / "tree", folder / "results.json"
        shutil.rmtree(self.tree, ignore_errors=True)
        listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, text=True).split("\0")[:-1]:
            if (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.tree / name)
        self.known = json.loads(self.results.read_text()) if self.results.exists() and not again else {}
        self.witnesses: dict[str, set[str]] = {}  # how they were run -> tests that noticed something
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")  # kernels with a mistake in them are nobody else's
        os.environ["PYTHONPATH"] = f"{self.tree}{os.pathsep}{self.tree / 'kernels'}"  # also for tests' subprocesses
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONDONTWRITEBYTECODE": "1"}

    def attempt(self, mistake: dict, tests: str) -> tuple[str, float, str]:
        """What became of a mistake ("noticed", "unnoticed", "harmless" or "invalid"), after how many seconds, and which
        test noticed it."""
        path = self.tree / mistake["file"]
        text = path.read_text()
        changed = text.replace(mistake["old"], mistake["new"])
        if text.count(mistake["old"]) != 1 or not sound(path.suffix, changed):
            return "invalid", 0.0, ""
        key = hashlib.sha256(repr([mistake[name] for name in ("file", "old", "new")]).encode()).hexdigest()[:16]
        sources = [self.tree / word.partition("::")[0] for word in tests.split() if word.startswith("tests/")]
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources) + tests.encode()).hexdigest()[:16]
        former = self.known.get(key, {})
        if former.get("outcome") == "noticed" or former.get("tests") == digest:
            return former["outcome"], former["seconds"], former["by"]
        words = shlex.split(tests)
        try:
            path.write_text(changed)
            passed, seconds, by = self.run(words)
        finally:
            path.write_text(text)
        if by:
            self.witnesses.setdefault(" ".join(word for word in words if re.match(SETTING, word)), set()).add(by)
        outcome = "noticed" if not passed else "harmless" if "harmless" in mistake else "unnoticed"
        self.known[key] = {"outcome": outcome, "seconds": round(seconds, 1), "tests": digest, "by": by}
        self.results.write_text(json.dumps(self.known, indent=1))
        return outcome, seconds, by

    def verify(self) -> str:
        """Run what noticed mistakes once more, on the code as it is; a test that fails there too, or nothing."""
        return "".join(self.run([*settings.split(), *tests])[2] for settings, tests in self.witnesses.items())

    def run(self, words: list[str]) -> tuple[bool, float, str]:
        """Whether these tests pass, how long they took, and which of them failed."""
        started = time.perf_counter()
        process = multiprocessing.get_context("fork").Process(target=self._test, args=(words,))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
        if process.exitcode in (3, 4, 5):  # pytest's own
            raise SystemExit(f"pytest {' '.join(words)}:\n{(self.tree / 'output').read_text()[-4000:]}")
        failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", (self.tree / "output").read_text(), re.MULTILINE)
        return process.exitcode == 0, time.perf_counter() - started, failed[1] if failed else ""

    def _test(self, words: list[str]) -> None:
        """In a process of its own, which finds the slow imports done."""
        import pytest

        os.setsid()
        with open(self.tree / "output", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(self.tree)
        sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
        settings = [word for word in words if re.match(SETTING, word) and "=" in word]
        command = ["-x", "-q", "-p", "no:cacheprovider", *(word for word in words if word not in settings)]
        if settings:  # looked at during imports
            os.environ.update(word.split("=") for word in settings)
            os.execv(sys.executable, [sys.executable, "-m", "pytest", *command])
        os._exit(pytest.main(command))


def sound(suffix: str, text: str) -> bool:
    """Whether a changed file is a program at all: what does not compile is no mistake that anybody could overlook."""
    if suffix != ".py":
        return True  # a test of its own sees C that does not compile
    try:
        compile(text, "changed", "exec")
    except SyntaxError:
        return False
    return True


def import_slow_things() -> None:
    """Everything the tests import that is not ours: once, here, and not in every process."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import hypothesis  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.gemma2.modeling_gemma2
    import transformers.models.llama.modeling_llama  # noqa: F401


if __name__ == "__main__":
    if "--list" not in sys.argv:
        import_slow_things()
    sys.exit(main())
