"""Several users of one model: all their tokens per second, and how long each of them waits.

    python tools/bench_serving.py --work FOLDER [--seats 1,4,8,16] [--rounds 3] [--threads 2] [--only REGEX] [--json F]

Requests have prompts of 16 to 1,024 random tokens (log-uniform) and answers of a fixed length, greedy, without EOS.
Two loads: "full", all requests are there at time 0, and "2x", they arrive at random (Poisson) at twice the rate that
minillm serves one after the other. Every round is another schedule, the same for all contestants.

Contestants: minillm one request after the other (`LLM.stream`), minillm's `Engine`, transformers' continuous batching,
and llama.cpp, whose continuous batching is written here on `llama_decode`, as its server does it: who talks goes
first, and prompts fill what is left of the batch. One that is not installed is named and skipped. Each runs in a
process of its own with the same number of threads, and they take turns: a busy moment hits all of them, and every ratio
is of turns of one round. "others" is the share of the machine that other processes took; `--patience` waits for less.

minillm's times are those at which a caller of the public interface has a piece of text in hand; the peers' are taken
inside of their loops, before text is made of ids, which is kind to them.

Last: one user alone, `Engine` beside `LLM.generate`, request by request in turns.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import threading
import time
from collections import deque
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy
from bench_peers import (
    SHAPES,
    Contestant,
    gguf_path,
    missing,
    processor,
    random_checkpoint,
    serve_orders,
    spread,
    versions,
    write_gguf,
)

NAMES = ["minillm in turn", "minillm engine", "transformers", "llama.cpp"]
CHUNK = 512  # tokens of a pass of the peers
CHECK = 16  # greedy ids that are compared
MEASURES = ["tokens_per_second", "gap_p50", "gap_p95", "first_p50", "first_p95", "others"]

Schedule = list[tuple[float, list[int]]]  # of each request: when it arrives, and its prompt
Answers = list[tuple[list[int], list[float]]]  # of each request: its ids, and when they were there


def schedule(seed: int, count: int, rate: float | None, lengths: tuple[int, int], vocabulary: int) -> Schedule:
    """Requests in the order of their arrival: `rate` a second on the average, or all at time 0."""
    chance, now, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        length = round(lengths[0] * (lengths[1] / lengths[0]) ** chance.random())
        requests.append((now, [chance.randrange(vocabulary) for _ in range(length)]))
        now += chance.expovariate(rate) if rate else 0.0
    return requests


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed, interpolated between its neighbours."""
    return float(numpy.percentile(values, 100 * share))


def measures(requests: Schedule, answers: Answers) -> dict[str, float]:
    """What a run was like; its time to the first token counts from the arrival, waiting included."""
    gaps = [b - a for _, times in answers for a, b in pairwise(times)]
    first = [times[0] - arrival for (arrival, _), (_, times) in zip(requests, answers, strict=True)]
    seconds = max(times[-1] for _, times in answers)
    return {
        "tokens_per_second": sum(len(ids) for ids, _ in answers) / seconds,
        "gap_p50": percentile(gaps, 0.5),
        "gap_p95": percentile(gaps, 0.95),
        "first_p50": percentile(first, 0.5),
        "first_p95": percentile(first, 0.95),
    }


# ---- contestants: each lives in its own process; run(requests, new_tokens) -> answers ----


class Minillm:
    def __init__(self, folder: Path, dtype: str, **_):
        from minillm import LLM

        self.llm = LLM.from_pretrained(folder, dtype=dtype, device="cpu")

    def options(self, new_tokens: int) -> dict:
        return dict(max_new_tokens=new_tokens, temperature=0, eos_token_id=[], repetition_penalty=1.0)


class InTurn(Minillm):
    def run(self, requests: Schedule, new_tokens: int) -> Answers:
        answers, started = [], time.perf_counter()
        for arrival, prompt in requests:
            time.sleep(max(0.0, arrival - (time.perf_counter() - started)))
            ids, times = [], []
            for piece in self.llm.stream(prompt, **self.options(new_tokens)):
                times.append(time.perf_counter() - started)
                ids.append(id_of(piece))
            answers.append((ids, times))
        return answers

    def lone(self, prompt: list[int], new_tokens: int) -> float:
        started = time.perf_counter()
        self.llm.generate(prompt, **self.options(new_tokens))
        return time.perf_counter() - started


class Engine(Minillm):
    def __init__(self, folder: Path, dtype: str, seats: int, room: int, **_):
        from minillm.serve.engine import Engine

        super().__init__(folder, dtype)
        self.engine = Engine(self.llm, seats=seats, max_cache_len=room, max_waiting=10_000)

    def run(self, requests: Schedule, new_tokens: int) -> Answers:
        return asyncio.run(self.serve(requests, new_tokens))

    async def serve(self, requests: Schedule, new_tokens: int) -> Answers:
        started = time.perf_counter()

        async def one(arrival: float, prompt: list[int]) -> tuple[list[int], list[float]]:
            await asyncio.sleep(max(0.0, arrival - (time.perf_counter() - started)))
            ids, times = [], []
            async for piece in self.engine.submit(prompt, **self.options(new_tokens)):
                times.append(time.perf_counter() - started)
                ids.append(id_of(piece))
            return ids, times

        return await asyncio.gather(*(one(*request) for request in requests))

    def lone(self, prompt: list[int], new_tokens: int) -> float:
        started = time.perf_counter()
        self.engine.submit(prompt, **self.options(new_tokens)).result()
        return time.perf_counter() - started


def id_of(piece: str) -> int:
    """The token of a piece of text, by the words that `checkpoint` gave them."""
    return int(piece.strip().removeprefix("w"))


class Transformers:
    def __init__(self, folder: Path, dtype: str, seats: int, room: int, **_):
        import torch
        from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        settings = ContinuousBatchingConfig(
            num_blocks=seats * -(-room // 256) + 1,  # unset: more than half of the machine's memory
            max_batch_tokens=CHUNK,
            max_requests_per_batch=seats,
            allow_block_sharing=False,  # no prompt begins like another
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
        self.manager = model.init_continuous_batching(greedy, continuous_batching_config=settings)
        self.manager.start()

    def run(self, requests: Schedule, new_tokens: int) -> Answers:
        started = time.perf_counter()

        def submit() -> None:
            for number, (arrival, prompt) in enumerate(requests):
                time.sleep(max(0.0, arrival - (time.perf_counter() - started)))
                self.manager.add_request(prompt, str(number), max_new_tokens=new_tokens, record_timestamps=True)

        threading.Thread(target=submit, daemon=True).start()
        found = {}
        while len(found) < len(requests):
            out = self.manager.get_result(timeout=1)
            if out is None and not self.manager.is_running():
                raise RuntimeError("the thread that generates has ended")
            if out is not None and out.is_finished():
                if out.error is not None:
                    raise RuntimeError(out.error)
                found[int(out.request_id)] = out.generated_tokens, [moment - started for moment in out.timestamps]
        return [found[number] for number in range(len(requests))]


class LlamaCpp:
    def __init__(self, folder: Path, dtype: str, threads: int, seats: int, room: int, **_):
        import llama_cpp

        self.api, self.seats = llama_cpp, seats
        self.silence = llama_cpp.llama_log_callback(lambda *message: None)
        llama_cpp.llama_log_set(self.silence, None)
        llama_cpp.llama_backend_init()
        path = str(gguf_path(folder, GGUF[dtype])).encode()
        self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = seats * room, seats
        settings.n_batch = settings.n_ubatch = CHUNK
        settings.n_threads = settings.n_threads_batch = threads
        settings.type_k = settings.type_v = 0 if dtype == "float32" else 1  # GGML_TYPE_F32, _F16 (the default)
        settings.kv_unified = False  # the default, and the faster one here
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)
        arrays = (numpy.ctypeslib.as_array(a, (CHUNK,)) for a in (batch.token, batch.pos, batch.logits, batch.n_seq_id))
        self.token, self.position, self.listen, owners = arrays
        self.owner, owners[:] = batch.seq_id, 1
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def run(self, requests: Schedule, new_tokens: int) -> Answers:
        answers = [([], []) for _ in requests]
        waiting, fed = deque(range(len(requests))), [0] * len(requests)
        seats: list[int | None] = [None] * self.seats  # the request that sits there
        started = time.perf_counter()
        while waiting or any(number is not None for number in seats):
            now = time.perf_counter() - started
            while waiting and None in seats and requests[waiting[0]][0] <= now:
                seats[seats.index(None)] = waiting.popleft()
            taken = [(seat, number) for seat, number in enumerate(seats) if number is not None]
            if not taken:
                time.sleep(max(0.0, requests[waiting[0]][0] - now))
                continue
            self.batch.n_tokens, heard = 0, []
            for seat, number in sorted(taken, key=lambda one: (not answers[one[1]][0], one[1])):
                text = requests[number][1] + answers[number][0]
                part = text[fed[number] : fed[number] + CHUNK - self.batch.n_tokens]
                last = self.add(part, fed[number], seat, fed[number] + len(part) == len(text))
                fed[number] += len(part)
                if part and fed[number] == len(text):
                    heard.append((last, seat, number))
            status = self.api.llama_decode(self.context, self.batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            for place, seat, number in heard:
                logits = self.api.llama_get_logits_ith(self.context, place)
                ids, times = answers[number]
                ids.append(int(numpy.ctypeslib.as_array(logits, (self.vocabulary,)).argmax()))
                times.append(time.perf_counter() - started)
                if len(ids) == new_tokens:
                    self.api.llama_memory_seq_rm(self.memory, seat, -1, -1)
                    seats[seat] = None
        return answers

    def add(self, ids: list[int], position: int, seat: int, listen: bool) -> int:
        """Put a part of a sequence into the batch, to hear what follows its last token or not; where that stands."""
        start, end = self.batch.n_tokens, self.batch.n_tokens + len(ids)
        self.token[start:end], self.listen[start:end] = ids, 0
        self.position[start:end] = range(position, position + len(ids))
        for place in range(start, end):
            self.owner[place][0] = seat
        if ids:
            self.listen[end - 1] = listen
        self.batch.n_tokens = end
        return end - 1


KINDS = dict(zip(NAMES, [InTurn, Engine, Transformers, LlamaCpp], strict=True))
GGUF = {"bfloat16": "bf16", "float32": "f32"}


def serve(settings: dict) -> None:
    kind, folder = KINDS[settings.pop("name")], Path(settings.pop("folder"))
    serve_orders(lambda: kind(folder, **settings), lambda contestant, order: getattr(contestant, order[0])(*order[1:]))
    os._exit(0)  # whatever threads a contestant has left


# ---- the referee ----


def turn(contestant: Contestant, requests: Schedule, new_tokens: int, patience: float) -> dict[str, float]:
    """One contestant's measures of a schedule, and the share of the machine that others took meanwhile."""
    until = time.perf_counter() + patience
    while time.perf_counter() < until:
        before = ticks(os.getpid())
        time.sleep(0.5)
        busy, everything, _ = (b - a for a, b in zip(before, ticks(os.getpid()), strict=True))
        if busy < 0.1 * everything:
            break
    before = ticks(contestant.process.pid)
    answers = contestant.ask(["run", requests, new_tokens])
    busy, everything, own = (b - a for a, b in zip(before, ticks(contestant.process.pid), strict=True))
    return measures(requests, answers) | {"others": max(0.0, busy - own) / everything}


def ticks(process: int) -> tuple[int, int, int]:
    """Of Linux's clock: when any core worked, all there were, and when this process did."""
    cores = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    own = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(cores) - cores[3] - cores[4], sum(cores), int(own[11]) + int(own[12])


def checkpoint(shape: str, folder: Path) -> int:
    """A checkpoint with random weights; returns how many ids it has. Each is a word: of a random model's text most
    would be empty otherwise, and nobody could see from outside when a token comes."""
    from tokenizers import Tokenizer, models

    if not (folder / "words.json").exists():  # written last
        random_checkpoint(shape, folder)
        size = json.loads((folder / "config.json").read_text())["vocab_size"]
        Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, "w0")).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast")))
        (folder / "words.json").write_text(json.dumps(size))
    return json.loads((folder / "words.json").read_text())


def meet(seats: int, names: list[str], folder: Path, vocabulary: int, args) -> dict:
    """Everything measured with this number of seats."""
    count, room = args.requests or max(12, 3 * seats), args.prompts[1] + args.new_tokens
    here = dict(program=__file__, dtype=args.dtype, seats=seats, room=room)
    contestants = {name: Contestant(name, folder, args.threads, **here) for name in names}
    try:
        # Not counted: whatever the first requests still build. What they say is compared.
        requests = schedule(0, count, None, args.prompts, vocabulary)
        answers = {name: one.ask(["run", requests, args.new_tokens]) for name, one in contestants.items()}
        said = {name: [ids[:CHECK] for ids, _ in answer] for name, answer in answers.items()}
        equal = {name: sum(a == b for a, b in zip(said[names[0]], said[name], strict=True)) for name in names}
        result = dict(seats=seats, requests=count, first_ids_equal=equal, loads={})
        for load in ("full", f"{args.load:g}x"):
            runs = {name: [] for name in names}
            for number in range(args.rounds):
                rate = None if load == "full" else args.rate
                requests = schedule(args.seed + number, count, rate, args.prompts, vocabulary)
                for name in names if number % 2 == 0 else reversed(names):
                    runs[name].append(turn(contestants[name], requests, args.new_tokens, args.patience))
                told = ", ".join(f"{runs[name][-1]['tokens_per_second']:.0f}" for name in names)
                print(f"{seats} seats, {load}, round {number + 1}: {told} tokens/s", file=sys.stderr, flush=True)
            rows = result["loads"][load] = {name: summary(runs, name, names[0]) for name in names}
            if args.rate is None:  # measured with the first number of seats, and from then on the same
                args.rate = args.load * rows[names[0]]["tokens_per_second"]["median"] / args.new_tokens
        if {"minillm in turn", "minillm engine"} <= {*names}:
            result["lone"] = lone(contestants, vocabulary, args)
        return result
    finally:
        for one in contestants.values():
            one.close()


def summary(runs: dict[str, list[dict]], name: str, base: str) -> dict:
    speeds = [[run["tokens_per_second"] for run in runs[one]] for one in (name, base)]
    found = {measure: spread([run[measure] for run in runs[name]]) for measure in MEASURES}
    return found | {"times_first": spread([a / b for a, b in zip(*speeds, strict=True)]), "runs": runs[name]}


def lone(contestants: dict[str, Contestant], vocabulary: int, args) -> dict:
    """One user alone, seconds of an answer: `LLM.generate`, and an `Engine` of so many seats."""
    pair = [contestants[name] for name in ("minillm in turn", "minillm engine")]
    seconds = [[], []]
    for number, (_, prompt) in enumerate(schedule(args.seed - 1, args.lone_turns, None, args.prompts, vocabulary)):
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            seconds[side].append(pair[side].ask(["lone", prompt, args.new_tokens]))
    return {
        "seconds": [statistics.median(times) for times in seconds],
        "speed": spread([a / b for a, b in zip(*seconds, strict=True)]),
        "runs": seconds,
    }


def as_text(results: list[dict], skipped: dict[str, str], heading: str) -> str:
    lines = [heading, "", f"{'':<31}{'all together':^34}{'between tokens, ms':^18}{'first token, ms':^18}"]
    head = f"{'seats':>5} {'load':<6}{'':<19}{'tokens/s':>10}{'times the first (range)':>24}"
    lines.append(head + f"{'p50':>9}{'p95':>9}{'p50':>9}{'p95':>9}{'others':>8}{'ids':>7}")
    for one in results:
        for load, rows in one["loads"].items():
            for name, row in rows.items():
                times = "{median:.2f} ({lowest:.2f}-{highest:.2f})".format(**row["times_first"])
                waits = "".join(f"{row[measure]['median'] * 1e3:>9.0f}" for measure in MEASURES[3:5])
                gaps = "".join(f"{row[measure]['median'] * 1e3:>9.1f}" for measure in MEASURES[1:3])
                lines.append(
                    f"{one['seats']:>5} {load:<6}{name:<19}{row['tokens_per_second']['median']:>10.1f}{times:>24}"
                    f"{gaps}{waits}{row['others']['median']:>8.0%}{one['first_ids_equal'][name]:>4}/{one['requests']}"
                )
    for one in results:
        if "lone" in one:
            speed = "{median:.3f} ({lowest:.2f}-{highest:.2f})".format(**one["lone"]["speed"])
            a, b = (seconds * 1e3 for seconds in one["lone"]["seconds"])
            lines.append(f"alone, engine of {one['seats']} seats: {speed} times generate's speed, {b:.0f} / {a:.0f} ms")
    return "\n".join([*lines, *(f"not measured: {name}: {reason}" for name, reason in skipped.items())])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="110M", choices=SHAPES, help="a Llama of this shape, with random weights")
    parser.add_argument("--dtype", default="bfloat16", choices=GGUF)
    parser.add_argument("--work", type=Path, default=Path("bench_serving_work"), help="folder for what is written")
    parser.add_argument("--seats", default="1,4,8,16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, help="in a round; default: three a seat, at least 12")
    parser.add_argument("--prompts", default="16,1024", help="tokens of the shortest and of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64, help="of every answer")
    parser.add_argument("--load", type=float, default=2.0, help="arrivals, as a multiple of what is served in turn")
    parser.add_argument("--rate", type=float, help="or arrivals per second")
    parser.add_argument("--lone-turns", type=int, default=24)
    parser.add_argument("--patience", type=float, default=0, help="seconds to wait for a quiet machine, before a turn")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="only contestants that match this regular expression")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(json.loads(args.serve))
        return

    args.prompts = tuple(map(int, args.prompts.split(",")))
    skipped = {name: reason for name in NAMES if (reason := missing(name))}
    names = [name for name in NAMES if name not in skipped and re.search(args.only, name)]
    folder = args.work / args.model
    vocabulary = checkpoint(args.model, folder)
    if "llama.cpp" in names:
        write_gguf(folder, GGUF[args.dtype])
    results = [meet(int(seats), names, folder, vocabulary, args) for seats in args.seats.split(",")]
    sizes = f"prompts of {args.prompts[0]} to {args.prompts[1]}, answers of {args.new_tokens}"
    rate = f"{sizes}, {args.load:g}x is {args.rate:.2f} requests/s"
    where = f"{processor()}, {os.cpu_count()} cores, {args.threads} threads, {date.today()}"
    heading = f"{args.model} {args.dtype}, {where}: {versions()}; {rate}"
    print(as_text(results, skipped, heading))
    if args.json:
        args.json.write_text(json.dumps({"heading": heading, "results": results, "skipped": skipped}, indent=1))


if __name__ == "__main__":
    main()
