"""What test_parallel.py runs on every rank: `torchrun ... parallel_worker.py JOBS OUT`.

JOBS is a JSON list of [name of a function below, its keywords]; what rank r gets from job n is saved as `OUT/n.r.pt`.
An error is a result as well: its type and text. Called without ranks, the functions give what one process gets.
"""

import json
import os
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from families import prompt_ids
from minillm_kernels import cpu

import minillm.llm
import minillm.load.checkpoint
import minillm.ranks.joined
import minillm.speculative.drafting
from minillm.cache import StaticCache
from minillm.errors import MinillmError
from minillm.llm import LLM
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import load_config
from minillm.parallel import ALONE, Ranks
from minillm.ranks.joined import join
from minillm.row import Row
from minillm.serve.engine import Engine

ROWS = (11, 3, 7)  # tokens of ragged rows: the first is longer than a window of 9
PROMPTS = ["The old king said", "A fox", "Once upon a time there was", "hello hello hello hello"]


@torch.inference_mode()
def ragged_logits(model) -> torch.Tensor:
    """Logits of every token of three ragged rows, `[T, V]`: a step with padding, then a token for each row."""
    ids = torch.tensor(
        [prompt_ids(max(ROWS) + 1, seed, model.config.vocab_size) for seed in range(len(ROWS))]
    )  # [B, T]
    cache = StaticCache(model.config, len(ROWS), 24, dtype=model.embedding.weight.dtype)
    place, lengths = torch.arange(max(ROWS))[None], torch.tensor(ROWS)[:, None]  # [1, T], [B, 1]
    position = torch.where(place < lengths, place, -1)  # [B, T]
    logits = model(ids[:, : max(ROWS)], position, cache)[position >= 0]
    return torch.cat([logits, model(ids[:, max(ROWS) :], lengths, cache)[:, 0]])


@contextmanager
def without_c():
    """PyTorch's operators in place of the C kernels, which round activations: by what a rank has of them."""
    before = os.environ.get("CC", "cc")
    os.environ["CC"] = "none-at-all"
    cpu.library.cache_clear()
    try:
        yield
    finally:
        os.environ["CC"] = before
        cpu.library.cache_clear()


def forward(folder: str, ranks: Ranks = ALONE, **options):
    """Logits as above, and the tensors that the rank holds."""
    model = load_decoder(folder, load_config(folder), torch.float32, ranks=ranks, **options)
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return ragged_logits(model), {name: tensor.clone() for name, tensor in held.items()}


def load(folder: str, ranks: Ranks, **options) -> LLM:
    return LLM.from_pretrained(folder, dtype="float32", tensor_parallel=ranks.joined, **options)


def texts(folder: str, ranks: Ranks = ALONE, shared_draft: bool = False, device: str = "cpu", **options):
    """Token ids of every way to generate: those that one process gives as well, and those that it does not."""
    minillm.speculative.drafting.JUDGING_BYTES = 0.0  # drafts pay for tiny models too
    llm = load(folder, ranks, device=device, **options)
    draft = load(folder, ranks if shared_draft else ALONE, device=llm.device, quantize="int8")

    def ids(*arguments, **options):
        done = llm.generate(*arguments, **options)
        return [one.token_ids for one in (done if isinstance(done, list) else [done])]

    greedy = dict(temperature=0, max_new_tokens=10, eos_token_id=[])
    chat = llm.conversation(max_cache_len=400, **greedy)
    turns = [chat.say(text) for text in ("Hello.", "And then?")]
    alike = {
        "a list": ids(PROMPTS, seats=3, **greedy),
        "penalty": ids(PROMPTS[0], repetition_penalty=1.3, **greedy),
        "a seed": ids(PROMPTS, temperature=0.9, top_p=0.9, seed=3, max_new_tokens=8),
        "stream": "".join(llm.stream(PROMPTS[0], **greedy)),
        "turns": [turn.token_ids for turn in turns],
        "reused": turns[1].stats.reused_tokens,
        "lookup": ids(PROMPTS, prompt_lookup_num_tokens=3, **greedy),
        "a draft": ids(PROMPTS, assistant_model=draft, num_assistant_tokens=3, **greedy),
    }
    free = dict(temperature=1.0, max_new_tokens=8)
    other = {
        "no seed": ids(PROMPTS, **free),
        "no seed, a draft": ids(PROMPTS, assistant_model=draft, num_assistant_tokens=3, **free),
        "lengths of drafts": ids(PROMPTS, assistant_model=draft, **free),
    }
    return alike, other, llm.steps.kind


def compiled(folder: str, ranks: Ranks = ALONE):
    """Text of the decoder as full graphs; what a C++ compiler makes of them takes minutes, and is left out."""
    compile, torch.compile = torch.compile, partial(torch.compile, backend="aot_eager")
    try:
        llm = load(folder, ranks, compile=ranks.joined)
        return llm.generate(PROMPTS[0], temperature=0, max_new_tokens=8, eos_token_id=[]).token_ids
    finally:
        torch.compile = compile


def bytes_read(folder: str, ranks: Ranks = ALONE) -> int:
    """Bytes of weights that loading takes from the files."""
    counted = 0

    def count(tensor):
        nonlocal counted
        counted += tensor.nbytes
        return tensor

    class Slice:
        def __init__(self, stored):
            self.get_shape, self.get_dtype, self.stored = stored.get_shape, stored.get_dtype, stored

        def __getitem__(self, index):
            return count(self.stored[index])

    class File:
        def __init__(self, *arguments, **keywords):
            self.file = opened(*arguments, **keywords)
            self.keys = self.file.keys

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.__exit__(*_)

        def get_slice(self, name):
            return Slice(self.file.get_slice(name))

        def get_tensor(self, name):
            return count(self.file.get_tensor(name))

    opened, minillm.load.checkpoint.safe_open = minillm.load.checkpoint.safe_open, File
    try:
        load_decoder(folder, load_config(folder), torch.float32, ranks=ranks)
    finally:
        minillm.load.checkpoint.safe_open = opened
    return counted


def engine(folder: str, ranks: Ranks):
    Engine(load(folder, ranks))


def slow_disk(folder: str, ranks: Ranks) -> tuple[float, float]:
    """Rank 1 reads for half a second: when this rank has read its share, and when it could be asked."""
    read, load_adapted = [], minillm.llm.load_adapted

    def slowly(*arguments, **options):
        time.sleep(0.5 * ranks.rank)
        model = load_adapted(*arguments, **options)
        read.append(time.monotonic())
        return model

    minillm.llm.load_adapted = slowly
    try:
        load(folder, ranks)
    finally:
        minillm.llm.load_adapted = load_adapted
    return read[0], time.monotonic()


def again(folder: str, ranks: Ranks) -> tuple[int, int]:
    """Threads of this process after one more model, and after another."""
    load(folder, ranks)
    before = len(os.listdir("/proc/self/task"))
    load(folder, ranks)
    return before, len(os.listdir("/proc/self/task"))


def shared_draft_alone(folder: str, ranks: Ranks):
    load(folder, ALONE).generate("A", assistant_model=load(folder, ranks))


def different_dtypes(folder: str, ranks: Ranks):
    LLM.from_pretrained(folder, dtype=("float32", "bfloat16")[ranks.rank], tensor_parallel=True)


def different_caches(folder: str, ranks: Ranks):
    llm = load(folder, ranks)
    llm.generate("A", cache=StaticCache(llm.config, 1, (40, 20)[ranks.rank]))


def different_prompts(folder: str, ranks: Ranks):
    load(folder, ranks).generate(PROMPTS[ranks.rank], max_new_tokens=2)


def main(jobs: str, out: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() and "gpu" in out else "cpu")
    ranks = join(device)
    jobs = [*enumerate(json.loads(Path(jobs).read_text()))]

    def run(number: int, name: str, keywords: dict) -> None:
        try:
            result = globals()[name](ranks=ranks, **keywords)
        except MinillmError as error:
            result = f"{type(error).__name__}: {error}"
        torch.save(result, Path(out) / f"{number}.{ranks.rank}.pt")

    with without_c():
        for number, job in jobs:
            if job[0] == "forward":
                run(number, *job)
    for number, job in jobs:
        if job[0] != "forward":
            run(number, *job)


def die(how: str, *arguments: str) -> None:
    """The command line, where rank 1 ends or hangs after its fifth token; a rank waits for 2 s instead of 50."""
    minillm.ranks.joined.TIMEOUT = 2.0
    commit = Row.commit

    def last_commit(row, *arguments):
        if os.environ["RANK"] == "1" and len(row.token_ids) == 5:
            time.sleep(1000) if how == "hang" else os._exit(0)
        return commit(row, *arguments)

    Row.commit = last_commit
    from minillm.cli.process import run

    sys.argv[1:] = arguments
    sys.exit(run())


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] in ("hang", "exit"):
        die(*sys.argv[1:])
    main(*sys.argv[1:])
