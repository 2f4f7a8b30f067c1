"""Ranks: a model that several processes share says what it says in one; one that dies takes the others along.

The ranks are started twice, two and four of them, for all that is compared (`ranks_of`), and once for each death.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import parallel_worker
import pytest
import torch
from families import FAMILIES, load_reference, save_checkpoint, seed_of
from parallel_worker import bytes_read, texts, without_c
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minillm.errors import CheckpointError, ConfigError, RankError
from minillm.llm import LLM
from minillm.load.config_json import load_config
from minillm.load.quantized_copy import quantize_checkpoint
from minillm.load.writing import write_decoder
from minillm.measure.memory import estimate
from minillm.model import empty_decoder
from minillm.ranks.split import Split

ROOT = Path(__file__).parent.parent
WORKER = Path(parallel_worker.__file__)
COUNTS = (2, 4)
# Float32 sums in another order: some hundred terms of size 1 to 3, each off by 6e-8 of its size, through two to four
# layers. Below what a forgotten bias (0.5), norm (0.3) or head moves by three orders of magnitude.
ATOL = 1e-4
ONE_OF_A_KIND = [*{family.text_config["model_type"]: name for name, family in FAMILIES.items()}.values()]
QUANTIZED = [
    (base, quantize, head)
    for base in ("plain", "tied", "biased")
    for quantize, head in (("int8", False), ("int8", True), ("int4-g32", False), ("int4-g32", True))
]
DIFFERENT = ["different prompts", "different dtypes", "different caches"]
IN_STEP = [*DIFFERENT, "slow disk", "again", "shared draft alone"]
# What four ranks do not repeat: a recipe of each kind is enough, and a checkpoint with biases to quantize.
FEWER = {name for name in FAMILIES if name not in ONE_OF_A_KIND} | {"text, full norms", "compiled"}
FEWER |= {*IN_STEP, *(f"{base} {quantize} {head}" for base, quantize, head in QUANTIZED if base != "biased")}
CODED = [*(f"{base} {quantize} {head}" for base, quantize, head in QUANTIZED), "int8 file", "int4-g32 file"]
JOBS = [*FAMILIES, *CODED, "text", "text, full norms"]
TWO_AND_FOUR = [(name, count) for count in COUNTS for name in JOBS if count == 2 or name not in FEWER]


def four_heads(name: str) -> dict:
    """The recipe with four query heads, as wide as before, and one, two or four key heads: two and four divide it."""
    family = FAMILIES[name]
    text = family.text_config
    heads = next(key for key in ("num_attention_heads", "n_head", "n_heads") if key in text)
    width = next(key for key in ("hidden_size", "n_embd", "n_embed", "d_model") if key in text)
    changes = {heads: 4}
    if text.get("head_dim", text[width] // text[heads]) * text[heads] == text[width]:
        changes[width] = text[width] // text[heads] * 4
    for key in ("num_key_value_heads", "num_kv_heads"):
        if text.get(key) not in (None, 1):
            changes[key] = {2: 2, 3: 2, 4: 4, 6: 4}[text[key]]
    if "mamba_n_heads" in text:
        changes["mamba_n_heads"] = 8
    if text["model_type"] == "opt":
        changes["word_embed_proj_dim"] = changes[width]
    return family.with_changes({"text_config": changes} if family.nested else changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_checkpoint, text_tokenizer_files):
    """Checkpoints by name."""
    root = tmp_path_factory.mktemp("parallel")
    made = {name: save_checkpoint(root / name, four_heads(name), seed_of(name)) for name in FAMILIES}
    sizes = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    plain = FAMILIES["llama2"].with_changes(sizes)
    made["plain"] = save_checkpoint(root / "plain", plain, 4)
    made["tied"] = save_checkpoint(root / "tied", plain | {"tie_word_embeddings": True}, 4)
    made["biased"] = save_checkpoint(root / "biased", plain | {"attention_bias": True, "mlp_bias": True}, 4)
    for quantize in ("int8", "int4-g32"):
        made[f"{quantize} file"] = root / f"{quantize} file"
        quantize_checkpoint(made["tied"], made[f"{quantize} file"], quantize, True)
    # Four heads, a window that wraps, and a vocabulary that neither two nor four divide.
    vocabulary = text_tokenizer_files.vocabulary + (text_tokenizer_files.vocabulary + 1) % 2
    for name, family in (("text", "mistral-v0.1"), ("text, full norms", "olmo2")):
        made[name] = save_checkpoint(root / name, four_heads(family) | {"vocab_size": vocabulary}, 7)
        text_tokenizer_files.copy_to(made[name])
    return {name: str(folder) for name, folder in made.items()}


@pytest.fixture(scope="module")
def jobs(folders):
    """What every rank does, by name."""
    jobs = {name: ("forward", dict(folder=folders[name])) for name in FAMILIES}
    jobs["plain"] = ("forward", dict(folder=folders["plain"]))
    for base, quantize, head in QUANTIZED:
        options = dict(folder=folders[base], quantize=quantize, quantize_head=head)
        jobs[f"{base} {quantize} {head}"] = ("forward", options)
    for name in ("int8 file", "int4-g32 file"):
        jobs[name] = ("forward", dict(folder=folders[name]))
    jobs["text"] = ("texts", dict(folder=folders["text"]))
    jobs["text, full norms"] = ("texts", dict(folder=folders["text, full norms"], shared_draft=True))
    jobs["bytes"] = ("bytes_read", dict(folder=folders["plain"]))
    jobs["bytes, tied"] = ("bytes_read", dict(folder=folders["llama3.2"]))
    jobs["compiled"] = ("compiled", dict(folder=folders["text"]))
    jobs["engine"] = ("engine", dict(folder=folders["text"]))
    for name in IN_STEP:  # after each the ranks can do the next
        jobs[name] = (name.replace(" ", "_"), dict(folder=folders["text"]))
    jobs["does not fit"] = ("forward", dict(folder=folders["plain"], quantize="int4-g128"))
    return jobs


def start(count: int, *arguments: str, **options) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), str(WORKER), *arguments]


@pytest.fixture(scope="module")
def ranks_of(jobs, tmp_path_factory):
    """ranks_of(count) -> what each rank got, by the job's name; of four ranks without those of FEWER."""
    made = {}

    def results(count: int) -> dict[str, list]:
        if count not in made:
            out = tmp_path_factory.mktemp(f"ranks-of-{count}")
            asked = {name: job for name, job in jobs.items() if count == 2 or name not in FEWER}
            (out / "jobs.json").write_text(json.dumps(list(asked.values())))
            done = subprocess.run(start(count, str(out / "jobs.json"), str(out)), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            made[count] = {
                name: [torch.load(out / f"{number}.{rank}.pt") for rank in range(count)]
                for number, name in enumerate(asked)
            }
        return made[count]

    return results


@pytest.fixture(scope="module")
def alone(jobs):
    """alone(name) -> what one process gets from a job."""
    made = {}

    def result(name: str):
        if name not in made:
            function, keywords = jobs[name]
            with without_c() if function == "forward" else nullcontext():
                made[name] = getattr(parallel_worker, function)(**keywords)
        return made[name]

    return result


# ---- the same as one ----


@pytest.mark.parametrize("name, count", [(name, count) for name, count in TWO_AND_FOUR if name in FAMILIES])
def test_logits_equal_one_ranks(name, count, ranks_of, alone):
    expected, (first, *others) = alone(name)[0], [logits for logits, _ in ranks_of(count)[name]]
    torch.testing.assert_close(first, expected, atol=ATOL, rtol=0)
    assert torch.equal(first.argmax(-1), expected.argmax(-1))
    for other in others:
        assert torch.equal(first, other)  # to the bit


@pytest.mark.parametrize("name, count", [(name, count) for name, count in TWO_AND_FOUR if name in CODED])
def test_ranks_hold_the_codes_of_one(name, count, ranks_of, alone):
    expected, whole = alone(name)
    shares = ranks_of(count)[name]
    torch.testing.assert_close(shares[0][0], expected, atol=ATOL, rtol=0)
    for tensor, values in whole.items():
        parts = [held[tensor] for _, held in shares if tensor in held]
        assert torch.equal(put_together(tensor, parts, key_heads=2, head_dim=32), values), tensor


def put_together(name: str, parts: list[torch.Tensor], key_heads: int, head_dim: int) -> torch.Tensor:
    """The whole tensor from what the ranks hold of it."""
    module, tensor = name.split(".")[-2:]
    rows = 1 if tensor in ("scale", "zero") and parts[0].dim() == 2 else 0
    if module == "qkv":
        keys = max(1, key_heads // len(parts)) * head_dim
        split = [part.split([part.shape[rows] - 2 * keys, keys, keys], dim=rows) for part in parts]
        apart = max(1, len(parts) // key_heads)  # so many ranks hold the same key head
        queries, keys, values = ([part[i] for part in split] for i in range(3))
        assert all(torch.equal(keys[r], keys[r // apart * apart]) for r in range(len(parts)))
        return torch.cat([*queries, *keys[::apart], *values[::apart]], dim=rows)
    if module == "gate_up":
        return torch.cat([part.chunk(2, dim=rows)[half] for half in (0, 1) for part in parts], dim=rows)
    if module in ("output", "down") and parts[0].dim() == 2:
        return torch.cat(parts, dim=1 - rows)
    if module in ("output", "down") and tensor == "bias":
        assert len(parts) == 1  # it is added once
    return torch.cat(parts, dim=rows) if module == "head" else parts[0]


@pytest.mark.parametrize("name, count", [(name, count) for name, count in TWO_AND_FOUR if name.startswith("text")])
def test_texts_equal_one_ranks(name, count, ranks_of, alone):
    expected, _, kind = alone(name)
    results = ranks_of(count)[name]
    for alike, _, _ in results:
        assert alike == expected
    assert expected["reused"] > 10
    others = [other for _, other, _ in results]
    assert all(other == others[0] for other in others)  # fresh seeds are rank 0's
    assert (kind, results[0][2]) == ("recorded", "as written")


def test_compiled_graphs_hold_the_sums(ranks_of, alone):
    assert ranks_of(2)["compiled"] == [alone("compiled")] * 2


def test_the_reference_agrees(folders, ranks_of):
    """Not only with ourselves."""
    name = "falcon-rw"
    reference, ids = load_reference(Path(folders[name])), parallel_worker.prompt_ids(parallel_worker.ROWS[0])
    expected = reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ranks_of(4)[name][3][0][: len(ids)], expected, atol=ATOL, rtol=0)


# ---- what a rank reads and holds ----


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name, recipe", [("bytes", "plain"), ("bytes, tied", "llama3.2")])
def test_a_rank_reads_its_share_only(name, recipe, count, ranks_of, folders):
    """Embedding and norms are everybody's; of two key heads among four ranks each reads one."""
    config, expected = load_config(folders[recipe]), [0.0] * count
    for path in Path(folders[recipe]).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a file, not a dict)
                size = file.get_tensor(key).nbytes
                for rank in range(count):
                    part = 1 / count
                    if "norm" in key or "embed" in key:
                        part = 1
                    elif "k_proj" in key or "v_proj" in key:
                        part = max(part, 1 / config.num_kv_heads)
                    elif "lm_head" in key:
                        rows = -(-config.vocab_size // count)
                        part = min(rows, config.vocab_size - rank * rows) / config.vocab_size
                    expected[rank] += size * part
    assert ranks_of(count)[name] == [round(size) for size in expected]
    assert expected[0] < bytes_read(folders[recipe])


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("count", COUNTS)
def test_memory_says_what_the_first_rank_holds(count, quantize, folders, ranks_of):
    name = "biased int8 False" if quantize else "plain"
    folder = folders["biased" if quantize else "plain"]
    held = ranks_of(count)[name][0][1]
    told = estimate(load_config(folder), 1, 100, torch.float32, quantize, ranks=Split(0, count)).weights
    assert told == sum(tensor.nbytes for tensor in held.values())
    assert told < estimate(load_config(folder), 1, 100, torch.float32, quantize).weights


def test_tied_rows_are_the_embeddings(folders):
    """They are counted once, and follow where it goes."""
    config = load_config(folders["tied"])
    whole, share = (empty_decoder(config, torch.float32, device="cpu", ranks=Split(0, n)) for n in (1, 2))
    assert share.weight_bytes < 0.6 * whole.weight_bytes + whole.embedding.weight.nbytes / 2
    share = share.to(torch.bfloat16)
    share.embedding.weight.data.fill_(3.0)
    assert share.head.weight.dtype == torch.bfloat16
    assert (share.head.weight == 3).all()


# ---- what is refused ----


@pytest.mark.parametrize(
    "name, count, problem",
    [
        ("llama2", 3, "num_heads 4 is not a multiple of 3; it can over 1, 2, 4"),
        ("smollm2-original", 6, "num_heads 9 is not a multiple of 6; it can over 1, 3, 9"),
        ("llama3-original", 2, "of num_kv_heads 3 and 2 neither divides the other; it can over 1, 3, 6"),
        ("int4-g32 file", 4, None),
        ("int4-g32 file", 8, "num_heads"),
    ],
)
def test_a_count_that_does_not_divide_is_refused(name, count, problem, folders, tmp_path):
    folder = folders.get(name, tmp_path)
    if name.endswith("-original"):
        recipe = FAMILIES[name.removesuffix("-original")].config
        (tmp_path / "config.json").write_text(json.dumps(recipe))  # and no weights: none are read
    config = load_config(folder)
    if problem is None:
        assert Split(1, count).narrow(config).num_heads * count == config.num_heads
        return
    with pytest.raises(ConfigError, match=re.escape(problem)):
        Split(0, count).narrow(config)


def test_groups_that_a_share_would_cut_are_refused(folders, ranks_of):
    error = "CheckpointError: a layer of 64 inputs and 128 outputs cannot be cut into groups of 128; use quantize="
    assert ranks_of(2)["does not fit"][1].startswith(error + '"int4-g32" or "int4-g64" or "int8"')
    config = load_config(folders["int4-g32 file"])
    with pytest.raises(ConfigError, match=r"groups of 32 do not divide a share of 96 inputs"):
        Split(0, 2).narrow(type(config)(**vars(config) | {"head_dim": 24, "intermediate_size": 128}))


def test_a_share_is_not_written_as_if_it_were_the_model(folders, tmp_path):
    raw = json.loads((Path(folders["plain"]) / "config.json").read_text())
    share = empty_decoder(load_config(folders["plain"]), torch.float32, device="cpu", ranks=Split(0, 2))
    with pytest.raises(CheckpointError, match="holds a share of the model"):
        write_decoder(share, tmp_path, raw, torch.float32)


def test_what_needs_ranks_that_nobody_started_says_how():
    with pytest.raises(RankError, match="torchrun --nproc-per-node"):
        LLM.from_pretrained("nobody/downloads-this", tensor_parallel=True)


def test_an_engine_is_refused_by_name(ranks_of):
    for said in ranks_of(2)["engine"]:
        assert said.startswith("EngineError: an Engine")


def test_a_draft_that_ranks_share_needs_a_model_that_they_share(ranks_of):
    for said in ranks_of(2)["shared draft alone"]:
        assert said.startswith("RequestError: ranks share assistant_model, but not the model")


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_are_asked_for_different_things_say_so(what, ranks_of):
    for said in ranks_of(2)[what]:
        assert said.startswith("RequestError: the ranks were asked for different things")


def test_nobody_is_asked_before_all_have_read(ranks_of):
    """Who waited in a request would do so for `TIMEOUT` only."""
    shares = ranks_of(2)["slow disk"]
    assert min(ready for _, ready in shares) >= max(read for read, _ in shares)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_another_model_needs_no_more_threads(ranks_of):
    for before, after in ranks_of(2)["again"]:
        assert after <= before


# ---- the command line ----


def minillm(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "minillm", *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_the_command_starts_its_ranks_and_one_of_them_speaks(folders):
    expected = LLM.from_pretrained(folders["text"]).generate("A fox", temperature=0, max_new_tokens=8).text
    options = "--temperature", "0", "--max-new-tokens", "8", "--draft-model", folders["text"]
    shared = minillm("generate", "--ranks", "2", "--model", folders["text"], *options, "-", input="A fox\n")
    assert (shared.returncode, shared.stdout, shared.stderr) == (0, f"A fox{expected}\n", "")


def test_a_chat_under_torchrun_reads_its_messages_once(folders):
    chat = LLM.from_pretrained(folders["text"]).conversation(temperature=0, max_new_tokens=6)
    expected = [chat.say(text).text for text in ("Hello.", "And then?")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "minillm"]
    options = ["chat", "--temperature", "0", "--max-new-tokens", "6", "--model", folders["text"]]
    shared = subprocess.run([*launcher, *options], input="Hello.\nAnd then?\n", capture_output=True, text=True)
    assert (shared.returncode, shared.stdout) == (0, "".join(f"{answer}\n" for answer in expected))


# ---- deaths ----


def told(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("minillm:")]


def processes_of(parent: int) -> dict[int, int]:
    """Process id by rank."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                rank = re.search(rb"\0RANK=(\d+)\0", (folder / "environ").read_bytes())
                found |= {int(rank[1]): int(folder.name)} if rank else {}
        except OSError:
            continue  # it has ended meanwhile
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for the ranks in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(victim):
    command = [sys.executable, "-m", "minillm", "generate", "--ranks", "2", "--stream", "--max-new-tokens", "1500", "A"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.read(30)
        ranks = processes_of(process.pid)
        assert len(ranks) == 2
        os.kill(ranks[victim], signal.SIGKILL)
        started = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - started < 5
    assert process.returncode == 1
    assert len(stderr.splitlines()) == 1, stderr
    assert re.match(
        rf"minillm: rank ({1 - victim} of 2 has lost another one|{victim} of 2 was ended by SIGKILL)", stderr
    )
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def test_an_error_of_one_rank_ends_the_others(folders, tmp_path):
    """Only rank 1 reads the rows that are damaged."""
    for path in Path(folders["text"]).iterdir():
        (tmp_path / path.name).symlink_to(path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = tmp_path / index["lm_head.weight"]
    tensors = load_file(shard)
    tensors["lm_head.weight"][-1] = torch.nan
    shard.unlink()
    save_file(tensors, shard, metadata={"format": "pt"})
    started = time.monotonic()
    done = minillm("generate", "--ranks", "2", "--model", str(tmp_path), "A")
    assert time.monotonic() - started < 30
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.match(r"minillm: rank 1: .*lm_head.weight holds NaN", done.stderr)


@pytest.mark.parametrize("how", ["exit", "hang"])
def test_a_rank_that_leaves_or_hangs_ends_the_others(how):
    options = "--stream", "--max-new-tokens", "400", "A"
    with subprocess.Popen(
        start(2, how, "generate", *options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.read(5)
        started = time.monotonic()
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - started < 5 + (how == "hang") * parallel_worker_timeout()
    assert process.returncode == 1
    (line,) = told(stderr)
    assert line.startswith("minillm: rank 0 of 2 has lost another one: ")
    assert ("imed out" in line) == (how == "hang")


def parallel_worker_timeout() -> float:
    """What `parallel_worker.die` sets; the rule itself is 60 s."""
    from minillm.ranks.joined import TIMEOUT

    assert TIMEOUT <= 60
    return 2.0


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none")
def test_one_rank_with_nccl_and_graphs_says_what_one_process_says(folders, tmp_path):
    out = tmp_path / "gpu"
    out.mkdir()
    jobs = [("texts", dict(folder=folders["text"], device="cuda", compile=compile)) for compile in ("auto", False)]
    (out / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(start(1, str(out / "jobs.json"), str(out)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    recorded, eager = (torch.load(out / f"{number}.0.pt") for number in range(2))
    alike, _, kind = texts(folders["text"], device="cuda")
    assert recorded[0] == eager[0] == alike
    assert (kind, recorded[2]) == ("recorded", "recorded")
