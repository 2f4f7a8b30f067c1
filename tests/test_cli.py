"""The command: what it prints where, its exit status, and that a mistake is one line."""

import io
import json
import os
import subprocess
import sys

import pytest

from minillm.cli import main


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
    ],
)
def test_a_mistake_is_one_line_and_status_one(arguments, told, capsys, text_checkpoint):
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(text_checkpoint)]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("minillm: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err


@pytest.mark.parametrize("arguments", [[], ["sing"], ["generate", "x", "--top-k", "many"], ["chat", "--loud"]])
def test_wrong_usage_is_status_two(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2


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
