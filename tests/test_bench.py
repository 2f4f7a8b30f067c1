"""bench.py and perplexity.py: the figures add up, bits per byte are those of transformers. No timing is asserted."""

import functools
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch
from families import load_reference
from safetensors import safe_open
from transformers import AutoTokenizer

from minillm.cli.parser import main
from minillm.errors import MinillmError, RequestError
from minillm.llm import LLM
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.load.lora import LoraLinear
from minillm.measure.bench import (
    Speeds,
    Spread,
    busy_process,
    bytes_per_token,
    measure,
    memory_bandwidth,
    processor_features,
    save_plot,
)
from minillm.measure.perplexity import parse_format, read_documents, score_text, token_stream, windows

DOCUMENTS = [
    "Once upon a time there was a little girl. " * 20,
    "The wolf said: where are you going?\n\nA family 👨‍👩‍👧 under the sun. Schöne Grüße!",
    "Then the old king gave his daughter to the tailor, and they lived happily ever after. " * 9,
]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n<eos>\n".join(DOCUMENTS) + "\n<eos>\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def speeds(text_checkpoint) -> Speeds:
    load = lambda: LLM.from_pretrained(text_checkpoint, dtype="bfloat16", device="cpu", quantize="int8")  # noqa: E731
    return measure(load, lengths=[40, 7, 40], capacities=[64, 20], new_tokens=5, repeats=3)


# ---- speed ----


def test_everything_asked_for_is_measured_and_adds_up(speeds):
    assert [one.prompt_tokens for one in speeds.prefill] == [7, 40]
    assert [(one.position, one.capacity) for one in speeds.decode] == [(7, 13), (40, 46)]
    assert [(one.position, one.capacity) for one in speeds.capacity] == [(7, 20), (7, 64)]
    assert (speeds.format, speeds.device, speeds.repeats, speeds.new_tokens) == ("int8", "cpu", 3, 5)
    assert speeds.load_seconds > 0 and speeds.first_request_seconds > 0
    assert (speeds.compilations, speeds.compile_seconds) == (0, 0)
    assert speeds.steps in ("recorded", "as written")  # as written without a C compiler
    assert speeds.peak_bytes >= speeds.load_peak_bytes >= 0
    for one in speeds.prefill:
        # The same three times, seen twice: tokens over seconds, order reversed.
        fastest, slowest = one.first_token_seconds.lowest, one.first_token_seconds.highest
        assert one.tokens_per_second.highest == pytest.approx(one.prompt_tokens / fastest)
        assert one.tokens_per_second.lowest == pytest.approx(one.prompt_tokens / slowest)
    for one in [*speeds.decode, *speeds.capacity]:
        speed = one.tokens_per_second
        assert 0 < speed.lowest <= speed.median <= speed.highest
        percent = 100 * speed.median * one.bytes_per_token / speeds.bandwidth.median
        assert one.bandwidth_percent == pytest.approx(percent)
    assert speeds.capacity[0].bytes_per_token == speeds.capacity[1].bytes_per_token  # cost follows the position
    assert speeds.decode[0].bytes_per_token < speeds.decode[1].bytes_per_token


def test_compiling_is_counted_and_not_called_loading(text_checkpoint, monkeypatch):
    # What is counted does not depend on what the compiler then makes.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    load = lambda: LLM.from_pretrained(text_checkpoint, dtype="float32", device="cpu", compile=True)  # noqa: E731
    speeds = measure(load, lengths=[7, 40], capacities=[64], new_tokens=3, repeats=1)
    assert (speeds.steps, speeds.compilations) == ("compiled", 2)
    assert speeds.compile_seconds > speeds.load_seconds > 0
    assert "compile, 2 graphs" in speeds.as_text()


def test_the_report_reads_as_text_json_and_picture(speeds, tmp_path):
    text = speeds.as_text()
    assert f"{speeds.decode[0].bandwidth_percent:.0f} % of memory bandwidth" in text.splitlines()[3]
    assert "decode at 7 in a cache of 64, tokens/s" in text
    raw = json.loads(json.dumps(speeds.as_dict()))
    assert raw["decode"][0]["tokens_per_second"]["median"] == speeds.decode[0].tokens_per_second.median
    assert set(raw) == set(Speeds.__dataclass_fields__)
    save_plot(tmp_path / "speed.png", speeds)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RequestError, match=r"speed\.nonsense"):
        save_plot(tmp_path / "speed.nonsense", speeds)


def test_without_matplotlib_the_extra_is_named(speeds, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(RequestError, match=r"minillm\[plot\]"):
        save_plot(tmp_path / "speed.png", speeds)


def test_spread():
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)


def test_batches_and_a_busy_neighbour(llm):
    speeds = measure(lambda: llm, [5], [], new_tokens=3, repeats=2, batches=[4, 1, 4], busy=True)
    assert [one.rows for one in speeds.batch] == [1, 4]
    alone = speeds.decode[0].tokens_per_second.median
    for one in speeds.batch:
        assert one.row_percent == pytest.approx(100 * one.tokens_per_second.median / one.rows / alone)
    text = speeds.as_text()
    assert "decode 4 rows, tokens/s" in text
    assert f"{speeds.busy.tokens_per_second.median / alone:.2f} of quiet" in text
    plain = measure(lambda: llm, [5], [], new_tokens=1, repeats=1)
    assert (plain.batch, plain.busy) == ([], None) and "busy" not in plain.as_text()


def test_all_rows_of_a_batch_decode_at_the_headlines_position(llm, monkeypatch):
    asked = []
    generate = llm.generate
    monkeypatch.setattr(llm, "generate", lambda prompts, **rest: asked.append(prompts) or generate(prompts, **rest))
    measure(lambda: llm, [6, 9], [], new_tokens=1, repeats=1, batches=[3])
    assert [prompts for prompts in asked if len(prompts) == 3] == [[asked[0][0]] * 3] * 2
    assert len(asked[0][0]) == 6


def busy_children() -> list[str]:
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "-f", "getppid"], capture_output=True, text=True)
    return found.stdout.split()


def test_the_busy_process_always_ends(llm, monkeypatch):
    with pytest.raises(KeyboardInterrupt), busy_process():
        assert len(busy_children()) == 1
        raise KeyboardInterrupt
    assert busy_children() == []
    # Its parent killed without warning, it notices by itself.
    code = "from minillm.measure.bench import busy_process\nwith busy_process() as p: print(p.pid, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the busy process outlived its parent")


def test_what_a_processor_can_do_is_read_from_its_flags(tmp_path, speeds):
    path = tmp_path / "cpuinfo"
    path.write_text("flags\t\t: fpu avx512f avx512_vnni amx_int8\n")
    assert processor_features(path) == ["AMX", "AVX-512 VNNI"]
    path.write_text("Features\t: fp asimd asimddp\n")
    assert processor_features(path) == ["NEON dot"]
    assert processor_features(tmp_path / "nowhere") == []
    assert f"processor: {', '.join(speeds.features)}" in speeds.as_text() or not speeds.features


def file_sizes(folder) -> dict[str, int]:
    sizes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as handle:
            sizes |= {name: handle.get_tensor(name).nbytes for name in handle.keys()}  # noqa: SIM118
    return sizes


@pytest.mark.parametrize("name", ["llama3", "mistral-v0.1", "gemma2", "qwen2"])
def test_a_step_reads_the_matrices_in_the_file_one_embedding_row_and_the_keys(name, checkpoint):
    """Counted again from the safetensors file (float32) and config.json."""
    raw = json.loads((checkpoint(name) / "config.json").read_text())
    sizes = file_sizes(checkpoint(name))
    if "lm_head.weight" in sizes:  # not tied: of the embedding one row is read
        sizes["model.embed_tokens.weight"] = raw["hidden_size"] * 4
    seen = [21] * raw["num_hidden_layers"]  # positions 0..20
    if name == "mistral-v0.1":
        seen = [raw["sliding_window"]] * raw["num_hidden_layers"]
    if name == "gemma2":  # every second layer slides, the first one does
        seen = [raw["sliding_window"], 21, raw["sliding_window"]]
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    cache = sum(2 * raw["num_key_value_heads"] * head_dim * 4 * positions for positions in seen)
    model = load_decoder(checkpoint(name), load_config(checkpoint(name)), torch.float32)
    assert bytes_per_token(model, 20) == sum(sizes.values()) + cache


def test_a_quantized_head_is_read_beside_a_tied_embedding(checkpoint):
    """qwen2 is tied: its head is a copy in int8, [V, d] codes and V scales; the embedding gives one row."""
    config = load_config(checkpoint("qwen2"))
    plain = load_decoder(checkpoint("qwen2"), config, torch.float32)
    head = load_decoder(checkpoint("qwen2"), config, torch.float32, quantize_head=True)
    rows, width = config.vocab_size, config.hidden_size
    change = (rows * width + 4 * rows + 4 * width) - 4 * rows * width
    assert bytes_per_token(head, 20) - bytes_per_token(plain, 20) == change
    head.head = LoraLinear(head.head, 2, torch.float32)  # an adapter stands around it
    lora = head.head.A.weight.nbytes + head.head.B.weight.nbytes
    assert bytes_per_token(head, 20) - bytes_per_token(plain, 20) == change + lora


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"lengths": [600]}, "512 positions"),
        ({"lengths": [0]}, "from 1 to"),
        ({"lengths": []}, "from 1 to"),
        ({"lengths": [30], "capacities": [20]}, "a cache of 20 is too small"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"repeats": 0}, "repeats"),
        ({"batches": [2, 0]}, "batch must be from 1"),
        ({"batches": [10**6]}, "batch must be from 1 to 1024"),
        ({"new_tokens": 600}, "leave no room"),
        ({"capacities": [10**12]}, "StaticCache of 1 x 1000000000000 tokens"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message, llm):
    with pytest.raises(MinillmError, match=message):
        measure(lambda: llm, **arguments)


def test_defaults_leave_room_in_a_small_model(llm):
    speeds = measure(lambda: llm, capacities=[], new_tokens=1, repeats=1)
    assert [one.position for one in speeds.decode] == [64, 256]  # 1024 exceeds its 512 positions
    assert speeds.capacity == []


def test_memory_is_read_at_a_possible_speed():
    assert 1e8 < memory_bandwidth(torch.device("cpu")) < 1e13


def test_the_command_in_a_process_of_its_own(text_checkpoint, tmp_path):
    command = [sys.executable, "-m", "minillm", "bench", "--model", str(text_checkpoint), "--device", "cpu", "--json"]
    command += ["--lengths", "5", "--capacities", "16", "--new-tokens", "2", "--repeats", "1"]
    command += ["--plot", str(tmp_path / "speed.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    raw = json.loads(done.stdout)
    assert raw["name"] == str(text_checkpoint) and raw["weight_bytes"] > 0
    # Beyond the interpreter: at least the weights, and far less than another interpreter with torch.
    assert raw["weight_bytes"] <= raw["peak_bytes"] < 300e6
    assert (tmp_path / "speed.png").exists()


# ---- quality ----


def reference_bits(folder, documents: list[str], length: int, overlap: int) -> tuple[float, int]:
    """Bits and tokens counted, from transformers' tokenizer and model, one prediction at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_reference(folder)
    ids, given = [], []
    for document in documents:
        given.append(len(ids))
        ids += [tokenizer.bos_token_id, *tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
    bits, count, scores = 0.0, 0, {}
    for index in range(1, len(ids)):
        if index in given:
            continue
        # The window that first reaches this token: they advance by length - overlap.
        start = max(0, math.ceil((index - length) / (length - overlap))) * (length - overlap)
        if start not in scores:
            with torch.no_grad():
                scores[start] = model(torch.tensor([ids[start : start + length]])).logits[0].double().log_softmax(-1)
        bits -= scores[start][index - 1 - start, ids[index]].item() / math.log(2)
        count += 1
    return bits, count


def test_bits_per_byte_are_those_of_transformers(llm, text_checkpoint, text_file):
    score = score_text(llm, read_documents(text_file, llm.tokenizer))
    documents = [document.strip() for document in DOCUMENTS]
    bits, count = reference_bits(text_checkpoint, documents, length=512, overlap=256)
    assert count > 700  # more than one window
    assert score.tokens == count
    assert score.text_bytes == sum(len(document.encode()) for document in documents)
    # float32 logits of size 10 differ by 1e-5 or so; what is summed here differs by no more, relatively.
    assert score.bits == pytest.approx(bits, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(bits / score.text_bytes, rel=1e-5)
    assert score.as_dict()["perplexity"] == pytest.approx(2 ** (bits / count), rel=1e-4)


@pytest.mark.parametrize(
    "count, length, overlap", [(2, 8, 4), (9, 8, 4), (10, 8, 4), (57, 8, 4), (57, 9, 4), (30, 1, 0)]
)
def test_windows_predict_every_token_once_from_enough_context(count, length, overlap):
    seen = []
    for start, stop, first in windows(count, length, overlap):
        assert 0 <= start < stop <= count - 1 and stop - start <= length
        assert start <= max(0, first - 1 - overlap)
        seen += range(first, stop + 1)
    assert seen == list(range(1, count))


def test_one_token_that_begins_and_ends_documents_stands_once_between_them():
    """The demo's tokenizer: <|endoftext|>, id 0, is BOS and EOS."""
    tokenizer = LLM.from_pretrained("demo").tokenizer
    one, two = (tokenizer.encode(text, add_special_tokens=False) for text in ("Once upon", "a time"))
    ids, predicted = token_stream(["Once upon", "a time"], tokenizer)
    assert ids == [0, *one, 0, *two, 0]
    assert predicted == [False] + [True] * (len(ids) - 1)


def test_a_bos_is_given_and_an_eos_predicted(llm):
    text = llm.tokenizer.encode("wolf", add_special_tokens=False)
    ids, predicted = token_stream(["wolf", "wolf"], llm.tokenizer)
    assert ids == [1, *text, 2] * 2
    assert predicted == ([False] + [True] * (len(text) + 1)) * 2


def test_documents_are_what_stands_between_separators(llm, tmp_path, text_file):
    assert read_documents(text_file, llm.tokenizer) == [document.strip() for document in DOCUMENTS]
    plain = tmp_path / "plain.txt"
    plain.write_text("no separator, and <eos> inside a line is text\n")
    assert read_documents(plain, llm.tokenizer) == ["no separator, and <eos> inside a line is text"]


def test_files_that_cannot_be_scored(llm, tmp_path):
    (tmp_path / "empty.txt").write_text("\n<eos>\n\n")
    (tmp_path / "latin1.txt").write_bytes(b"Gr\xfc\xdfe")
    for name, message in (("empty.txt", "no text"), ("latin1.txt", "utf-8"), ("nowhere.txt", "No such file")):
        with pytest.raises(RequestError, match=message):
            read_documents(tmp_path / name, llm.tokenizer)


def test_words_for_formats():
    assert parse_format("bf16", "auto") == parse_format("bfloat16", "float32") == ("bfloat16", None)
    assert parse_format("int4-g32", "float32") == ("float32", "int4-g32")
    with pytest.raises(RequestError, match="'fp8' is unknown"):
        parse_format("fp8", "auto")


def test_the_command_compares_formats(text_checkpoint, text_file, capsys):
    command = ["bench", "--model", str(text_checkpoint), "--device", "cpu", "--dtype", "float32"]
    command += ["--perplexity", str(text_file), "--formats", "fp32,bf16,int8"]
    assert main([*command, "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert [one["format"] for one in raw] == ["float32", "bfloat16", "int8"]
    plain, bf16, int8 = (one["bits_per_byte"] for one in raw)
    assert plain != int8 and plain == pytest.approx(int8, rel=0.02) and plain == pytest.approx(bf16, rel=0.02)
    assert raw[0]["weight_bytes"] > raw[2]["weight_bytes"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert f"{plain:.4f}" in table and f"{int8 - plain:+.4f}" in table


@pytest.mark.parametrize(
    "options, message",
    [
        (["--formats", "int8"], "--perplexity"),
        (["--perplexity", "x.txt", "--plot", "x.png"], "--plot"),
        (["--perplexity", "x.txt", "--formats", "fp8"], "'fp8' is unknown"),
        (["--perplexity", "x.txt"], "x.txt"),
    ],
)
def test_a_command_that_makes_no_sense_is_one_line(options, message, text_checkpoint, capsys):
    assert main(["bench", "--model", str(text_checkpoint), "--device", "cpu", *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
