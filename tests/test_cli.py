"""The command: what it prints where, its exit status, and that a mistake is one line."""

import dataclasses
import io
import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minillm import GenerationConfig, __version__
from minillm.cli.parser import main
from minillm.llm import LLM

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(capsys, monkeypatch, text_checkpoint):
    """run(*arguments, stdin=None) -> (status, stdout, stderr), with the tiny text checkpoint as the model."""

    def call(command, *arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = main([command, *arguments, "--model", str(text_checkpoint), "--dtype", "float32", "--device", "cpu"])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_generate_prints_the_prompt_and_its_continuation(run, llm):
    status, out, err = run("generate", "Once upon", "--max-new-tokens", "12", "--temperature", "0")
    expected = llm.generate("Once upon", max_new_tokens=12, temperature=0).text
    assert (status, out, err) == (0, f"Once upon{expected}\n", "")


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_streamed_and_whole_output_are_the_same(stream, run, llm):
    arguments = ["The wolf", "--max-new-tokens", "20", "--temperature", "1.5", "--seed", "4", stream]
    expected = llm.generate("The wolf", max_new_tokens=20, temperature=1.5, seed=4).text
    assert run("generate", *arguments)[1] == f"The wolf{expected}\n"


def test_the_prompt_comes_from_a_file_or_stdin(run, tmp_path):
    options = ["--max-new-tokens", "5", "--temperature", "0"]
    direct = run("generate", "Once upon a time", *options)
    path = tmp_path / "prompt.txt"
    path.write_text("Once upon a time")
    assert run("generate", "--file", str(path), *options) == direct
    assert run("generate", *options, stdin="Once upon a time\n") == direct
    assert run("generate", "-", *options, stdin="Once upon a time\n") == direct


def test_each_line_is_a_prompt(run, llm, tmp_path):
    lines = ["Once upon a time", "", "The wolf", "  ", "A"]
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(lines))
    prompts = [line for line in lines if line.strip()]
    options = ["--max-new-tokens", "9", "--temperature", "0.8", "--seed", "4"]
    alone = [llm.generate(prompt, max_new_tokens=9, temperature=0.8, seed=4) for prompt in prompts]
    expected = "".join(f"{prompt}{one.text}\n" for prompt, one in zip(prompts, alone, strict=True))
    assert run("generate", "--file", str(path), "--each-line", *options)[1] == expected
    assert run("generate", "--each-line", "--seats", "1", *options, stdin="\n".join(lines))[1] == expected
    out = run("generate", "--file", str(path), "--each-line", "--jsonl", "--seats", "2", *options)[1]
    told = sorted(map(json.loads, out.splitlines()), key=lambda one: one["number"])
    assert [one["prompt"] + one["text"] for one in told] == [p + a.text for p, a in zip(prompts, alone, strict=True)]
    assert [(one["new_tokens"], one["finish_reason"]) for one in told] == [
        (a.stats.new_tokens, a.finish_reason) for a in alone
    ]


def test_flags_of_many_prompts_go_together(run):
    for flags, word in [
        (["x", "--jsonl"], "--each-line"),
        (["x", "--seats", "3"], "--each-line"),
        (["x", "--each-line", "--stream"], "--stream"),
        ([" ", "--each-line"], "not blank"),
    ]:
        status, out, err = run("generate", *flags)
        assert (status, out) == (1, "")
        assert word in err


def test_every_generation_option_reaches_the_library(run, llm):
    flags = "--max-new-tokens 9 --temperature 0.9 --top-k 20 --top-p 0.9 --min-p 0.01 --repetition-penalty 1.3 --seed 5"
    options = dict(
        max_new_tokens=9, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.3, seed=5
    )  # fmt: skip
    text = llm.generate("Once", **options).text
    assert run("generate", "Once", *flags.split())[1] == f"Once{text}\n"
    stop = text[4:6]
    assert run("generate", "Once", *flags.split(), "--stop", stop)[1] == f"Once{text[: text.index(stop)]}\n"


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["generate", "x", "--max-new-tokens", "0"], "max_new_tokens"),
        (["generate", "x", "--top-p", "2"], "top_p"),
        (["generate", "x", "--max-new-tokens", "100000"], "100000"),
        (["generate", "x", "--file", "nowhere.txt"], "--file"),
        (["generate", "--file", "nowhere.txt"], "nowhere.txt"),
        (["generate", "x", "--dtype", "float8"], "float8"),
        (["generate", "x", "--attention", "flesh"], "flesh"),
        (["generate", "x", "--model", "./nowhere"], "nowhere"),
        (["inspect", "--model", "./nowhere"], "nowhere"),
        (["inspect", "--model", "\udcff"], "no folder"),
        (["inspect", "--model", "~nobody-of-this-name/x"], "cannot be a folder"),
        (["inspect", "--model", "a" * 5000], "File name too long"),
        (["inspect", "--model", "a/" * 2500], "File name too long"),
        (["generate", "--file", "a" * 5000], "File name too long"),
        (["generate", "x", "--device", "meta"], "device 'meta' cannot be used"),
        (["inspect", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["inspect", "--device", "\udcff"], "cannot be used"),
        (["inspect", "--quantize", "int5"], "int5"),
        (["memory", "--context", "1000000"], "positions"),
        (["memory", "--plot", "/"], "directory"),
    ],
)
def test_a_mistake_is_one_line_and_status_one(arguments, told, capsys, text_checkpoint):
    if arguments[0] != "memory" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(text_checkpoint)]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "" or "--plot" in arguments
    assert len(captured.err) < 1000
    assert captured.err.startswith("minillm: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "COMMAND"),
        (["sing"], "sing"),
        (["generate", "x", "--top-k", "many"], "'many' is not a whole number"),
        (["generate", "x", "--top-k", "9" * 5000], "is not a whole number"),
        (["generate", "x", "--temperature", "warm"], "'warm' is not a number"),
        (["generate", "x", "--num-assistant-tokens", "some"], "'some' is not a whole number"),
        (["generate", "\udcff"], "argument prompt: '\\udcff' is not valid text"),
        (["generate", "x", "--stop", "\udcff"], "argument --stop: '\\udcff' is not valid text"),
        (["chat", "--loud"], "--loud"),
        (["chat", "--max-cache-len", "-3"], "--max-cache-len: '-3' is not from 1"),
        (["chat", "--max-cache-len", "0"], "--max-cache-len: '0' is not from 1"),
        (["bench", "--lengths", "64,,5"], "--lengths: '' is not a whole number"),
        (["bench", "--lengths", "64,0"], "--lengths: '0' is not from 1"),
        (["bench", "--capacities", str(10**12)], "--capacities: '1000000000000' is not from 1 to 1000000"),
        (["bench", "--new-tokens", "-1"], "--new-tokens: '-1'"),
        (["bench", "--repeats", "0"], "--repeats: '0'"),
        (["bench", "--batch", "4,x"], "--batch: 'x'"),
        (["memory", "--batch", str(10**12)], "--batch: '1000000000000'"),
        (["memory", "--context", "0"], "--context: '0'"),
    ],
)
def test_wrong_usage_is_status_two(arguments, told, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert told in capsys.readouterr().err.replace("\\\\", "\\")


def test_every_option_of_a_request_has_its_flag(run, monkeypatch):
    """A field that GenerationConfig gains reaches `generate` and `chat` without a word here."""
    fields = [field for field in dataclasses.fields(GenerationConfig) if field.metadata["flag"]]
    assert {"temperature", "min_p", "seed", "num_assistant_tokens"} <= {field.name for field in fields}
    asked, flags = {}, []
    for number, field in enumerate(fields):
        kind, flag = field.metadata["kind"], f"--{field.name.replace('_', '-')}"
        value = {int: 3 + number, float: 0.25 + number / 100, str: f"stop {number}"}[kind]
        flags += [flag if field.name != "stop_strings" else "--stop", str(value)]
        asked[field.name] = [value] if kind is str else value
    seen = []

    class Asked(Exception):
        pass

    def stop(self, *arguments, **options):
        seen.append(options)
        raise Asked

    for name, command in (("generate", ["generate", "x"]), ("conversation", ["chat"])):
        monkeypatch.setattr(LLM, name, stop)
        with pytest.raises(Asked):
            run(*command, *flags, "--stop", "again", "--num-assistant-tokens", "auto")
    expected = asked | {"assistant_model": None, "num_assistant_tokens": "auto"}
    expected["stop_strings"] = [*asked["stop_strings"], "again"]
    assert seen == [expected, expected]


def test_help_and_mistakes_do_not_wait_for_pytorch():
    """Every --help, --version, wrong usage and options out of range, in a process where importing torch fails."""
    code = """
import sys
sys.modules["torch"] = None
from minillm.cli.parser import main
for line in sys.stdin.read().splitlines():
    try:
        print(line, "->", main(line.split()))
    except SystemExit as exit:
        print(line, "->", exit.code)
"""
    commands = "generate chat inspect bench memory quantize".split()
    lines = ["--help", "--version", *(f"{name} --help" for name in commands), "chat --loud", "generate x --top-p 2"]
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True, cwd=ROOT
    )
    assert done.stderr.endswith("minillm: top_p must be a number from 1e-06 to 1, not 2.0\n")
    statuses = [line for line in done.stdout.splitlines() if " -> " in line]
    wanted = [0] * (len(lines) - 2) + [2, 1]
    assert statuses == [f"{line} -> {status}" for line, status in zip(lines, wanted, strict=True)]
    assert f"minillm {__version__}" in done.stdout


def test_chat_answers_each_line(run, llm):
    """Two messages piped in, two answers out, the second one knowing the first."""
    status, out, err = run("chat", "--temperature", "0", "--max-new-tokens", "6", stdin="Hello\n\nAnd then?\n")
    chat = llm.conversation(temperature=0, max_new_tokens=6)
    assert (status, err) == (0, "")
    assert out == f"{chat.say('Hello').text}\n{chat.say('And then?').text}\n"


def test_inspect_shows_the_config_as_plain_text(run, llm):
    status, out, err = run("inspect")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    parameters = sum(p.numel() for p in llm.model.parameters())
    assert f"{parameters:,}" in out


def test_inspect_traces_every_operation(run, llm):
    out = run("inspect", "--trace", "Once upon")[1]
    T = len(llm.tokenizer.encode("Once upon"))
    steps = dict(line.split(maxsplit=1) for line in out.splitlines() if line.startswith(("blocks", "head", "embedd")))
    assert len([name for name in steps if name.endswith("attend")]) == llm.config.num_layers
    assert steps["head"].startswith(f"[1, {T}, {llm.config.vocab_size}]")
    assert "likeliest next tokens" in out


def test_trace_leaves_the_model_as_it_was(run, llm):
    from minillm.measure.describe import trace

    before = [block.attention.backend for block in llm.model.blocks]
    trace(llm, "Once")
    assert [block.attention.backend for block in llm.model.blocks] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llm.model.modules())


def test_the_installed_command_in_a_pipe(text_checkpoint):
    """A reader that closes early is no error, and nothing is lost or traced."""
    command = [sys.executable, "-m", "minillm", "generate", "Once", "--stream", "--max-new-tokens", "200"]
    process = subprocess.Popen(
        [*command, "--temperature", "0", "--model", str(text_checkpoint)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.read(4) == b"Once"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_eos_ids_are_shown(run, text_checkpoint):
    eos = json.loads((text_checkpoint / "config.json").read_text())["eos_token_id"]
    assert f"EOS ids             {eos}\n" in run("inspect")[1]


def test_inspect_says_how_the_model_would_run(run, llm):
    """Without reading weights, and as it then is."""
    rows = dict(line.split(maxsplit=1) for line in run("inspect")[1].splitlines() if not line.startswith(" "))
    assert rows["device"] == "cpu" and rows["steps"] == llm.steps.kind
    assert f"attention by        {llm.model.blocks[0].attention.backend.name}\n" in run("inspect")[1]
    assert "steps               as written\n" in run("inspect", "--attention", "math")[1]
    assert "steps               compiled\n" in run("inspect", "--compile", "on")[1]


def test_a_trace_of_no_or_too_many_tokens(run):
    status, _, err = run("inspect", "--trace", "a " * 600)
    assert (status, err.count("\n")) == (1, 1) and "512" in err


# ---- as a process: streams, signals, hostile arguments ----


def shell(line: str, **environ) -> subprocess.CompletedProcess:
    """Run a line of bash in which $M is the command, as users run it (PYTHONUNBUFFERED hides what happens at exit)."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = {"M": f"{shlex.quote(sys.executable)} -m minillm", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", line], env=inherited | command | environ, cwd=ROOT, capture_output=True, timeout=60
    )


SHORT = "--max-new-tokens 2 --temperature 0"


@pytest.mark.parametrize(
    "line, status, told",
    [
        # streams that are closed, full, or read no further
        ("$M --help >&-", 1, "stdout is closed"),
        ("$M generate x >&- <&- 2>&-", 1, ""),
        ("$M --help >/dev/full", 1, "No space left"),
        ("PYTHONUNBUFFERED=1 $M memory >/dev/full", 1, "No space left"),
        ("$M generate x --top-p 2 2>/dev/full", 1, ""),
        ("$M generate x --top-p 2 2>&-", 1, ""),
        ("$M --help | true; exit ${PIPESTATUS[0]}", 0, ""),
        ("$M generate --help | head -1; exit ${PIPESTATUS[0]}", 0, ""),
        ("$M memory --json | head -1; exit ${PIPESTATUS[0]}", 0, ""),
        ("$M chat <&-", 0, ""),
        (f"$M generate x {SHORT} <&- 2>&-", 0, ""),
        # text that is none
        ("$M generate $'a\\xffb'", 2, "is not valid text"),
        ("echo 'Grüße' | PYTHONIOENCODING=ascii $M chat", 1, "stdin cannot be read as text: 'ascii'"),
        ("printf 'a\\xff' | LC_ALL=C.UTF-8 $M generate", 1, "stdin cannot be read as text"),
    ],
)
def test_a_process_ends_in_one_line_at_most(line, status, told):
    done = shell(line)
    error = done.stderr.decode()
    assert "Traceback" not in error and "Exception ignored" not in error
    assert done.returncode == status, error
    assert told in error
    assert status == 2 or error.count("\n") == bool(told)
    assert len(error) < 1200


def test_what_the_terminal_cannot_show_is_escaped():
    done = shell(f"$M generate 'Grüße 👨' {SHORT}", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"Gr\\xfc\\xdfe \\U0001f468")


def test_an_empty_CC_is_no_compiler_named():
    done = shell(f"$M generate x {SHORT}", CC="")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"x")


# Interrupts the process when it begins to import a module.
INTERRUPTED = """
import os, runpy, signal, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{signal})
sys.meta_path.insert(0, Finder)
sys.argv = ["minillm", "memory"]
runpy.run_module("minillm", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "module, name",
    [("minillm.cli.parser", "SIGINT"), ("torch", "SIGINT"), ("numpy", "SIGINT"), ("torch._ops", "SIGTERM")],
)
def test_an_interrupt_while_importing(module, name):
    """C code that imports turns an exception into another error, or into none: the process must end all the same."""
    code = INTERRUPTED.format(module=module, signal=name)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (128 + getattr(signal, name), b"", b"")


def test_an_interrupt_while_generating_is_told_in_an_empty_line(run, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "generate", interrupted)
    assert run("generate", "x") == (130, "", "\n")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("command", ["generate x --stream", "chat"])
def test_a_signal_while_text_is_printed(command, number, status, text_checkpoint):
    arguments = f"{command} --max-new-tokens 400 --temperature 0 --model".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "minillm", *arguments, text_checkpoint],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    process.stdin.write(b"Hello\n" * 50)
    process.stdin.flush()
    assert process.stdout.read(2)
    process.send_signal(number)
    out, error = process.communicate(timeout=30)
    assert process.returncode == status
    assert error.strip() == b""
    assert out.endswith(b"\n")


def test_an_ignored_interrupt_stays_ignored():
    """A script starts its background jobs so: Ctrl-C is meant for the script."""
    code = INTERRUPTED.format(module="minillm.cli.parser", signal="SIGINT").replace('"memory"', '"--version"')
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=ignore)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"minillm {__version__}\n", "")


def test_ctrl_c_on_a_terminal_ends_the_answer_and_not_the_chat(text_checkpoint):
    ours, theirs = pty.openpty()
    arguments = "chat --max-new-tokens 400 --temperature 0 --model".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "minillm", *arguments, text_checkpoint],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seen = b""

    def wait_for(end: bytes) -> None:
        nonlocal seen
        while end not in seen:
            assert select.select([ours], [], [], 30)[0], f"{end!r} did not come after {seen!r}"
            seen += os.read(ours, 1000)
        seen = seen.partition(end)[2]

    try:
        wait_for(b"> ")
        os.write(ours, b"Hello\n")
        wait_for(b"Hello\r\n")
        assert select.select([ours], [], [], 30)[0]  # the answer begins
        process.send_signal(signal.SIGINT)
        wait_for(b"\r\n> ")
        os.write(ours, b"\x04")
        assert process.wait(timeout=30) == 0
        assert b"Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)
        os.close(theirs)
