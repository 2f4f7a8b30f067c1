"""Training on documents of 20 to 2,000 tokens: useful tokens per second, peak memory, and what is computed in vain.

    python tools/bench_finetuning.py --model demo [--json F] [--seconds 150] [--only REGEX] [--threads 2]

The same list of documents (lengths log-uniform, random ids) goes through

* transformers, padded: batches of eight in the order of the list, filled up to the longest, as its Trainer makes them;
* transformers, flattened: the same batches through its DataCollatorWithFlattening, side by side with positions that
  begin again, which its sdpa attention turns into a mask;
* minillm, eager and compiled: rows of 2,048 tokens.

All have the same weights in float32, matrix products in bfloat16 by autocast, clipping and AdamW after every batch of
eight or every two rows. Contestants are processes of their own and take turns, one optimizer step each, until the time
is up; first each of them tells the loss of the same four documents, which must agree. Turns are added to those that F
holds already, and medians are of all of them.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from pathlib import Path

ROW, BATCH, ROWS = 2048, 8, 2
CONTESTANTS = ("transformers padded", "transformers flattened", "minillm eager", "minillm compiled")


def lengths(count: int = 512) -> list[int]:
    import torch

    drawn = torch.rand(count, generator=torch.Generator().manual_seed(0))
    return (20 * 100**drawn).long().tolist()


def make_list(vocabulary: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths()]


class Transformers:
    """What its Trainer does in a step; `Trainer` itself wants another package for it."""

    def __init__(self, folder: Path, flattened: bool):
        import torch
        from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self.model.train().config.use_cache = False
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.collate = DataCollatorWithFlattening(return_tensors="pt") if flattened else self.pad
        self.list, self.at = make_list(self.model.config.vocab_size), 0

    @staticmethod
    def pad(features: list[dict]) -> dict:
        import torch

        longest = max(len(one["input_ids"]) for one in features)
        ids = torch.zeros(len(features), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, one in enumerate(features):
            ids[row, : len(one["input_ids"])] = torch.tensor(one["input_ids"])
            mask[row, : len(one["input_ids"])] = 1
        return dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))

    def backward(self, documents: list[list[int]]) -> float:
        import torch

        batch = self.collate([{"input_ids": ids} for ids in documents])
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(**batch).loss
        loss.backward()
        return loss.item()

    def step(self) -> int:
        import torch

        documents = self.list[self.at : self.at + BATCH]
        self.at = (self.at + BATCH) % len(self.list)
        self.backward(documents)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sum(map(len, documents)) - len(documents)

    def check(self) -> float:
        loss = self.backward(self.list[:4])
        self.optimizer.zero_grad()
        return loss


class Minillm:
    def __init__(self, folder: Path, compile: bool):
        import torch

        from minillm.load.checkpoint import load_decoder
        from minillm.load.config_json import load_config
        from minillm.train.attention import PACKED
        from minillm.train.documents import make_documents
        from minillm.train.loop import Recipe, Training

        model = load_decoder(folder, load_config(folder), torch.float32, attention=PACKED).requires_grad_(True)
        self.list = make_list(model.config.vocab_size)
        self.make = lambda some: make_documents([(ids, [True] * len(ids)) for ids in some], 1)
        recipe = Recipe(10**9, ROW, ROWS, 1, learning_rate=1e-5, compile=compile)
        self.training = Training(model, self.make(self.list), recipe)

    def step(self) -> int:
        return self.training._take_step().scored

    def check(self) -> float:
        from minillm.train.packing import cut, fill, pack

        documents = self.make(self.list[:4])
        batch = fill(documents, pack(cut(documents, ROW), ROW), ROW)
        return sum(self.training.loss.total(batch.rows(n, n + 1)) for n in range(len(batch.ids))) / batch.scored.sum()


def work(pipe, name: str, folder: Path, threads: int) -> None:
    """A contestant: a step for every word it hears."""
    import torch

    torch.set_num_threads(threads)
    kind, how = name.split()
    contestant = (
        Transformers(folder, how == "flattened") if kind == "transformers" else Minillm(folder, how == "compiled")
    )
    loss = float(contestant.check())
    contestant.step()  # the first one compiles, and makes the optimizer's moments
    pipe.send(loss)
    while pipe.recv():
        began = time.perf_counter()
        tokens = contestant.step()
        seconds = time.perf_counter() - began
        status = Path("/proc/self/status").read_text()
        pipe.send((tokens, seconds, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20))


def padding() -> dict[str, float]:
    """Which share of the tokens that are computed belongs to no document, over the whole list."""
    from minillm.train.documents import make_documents
    from minillm.train.packing import Rows

    sizes = lengths()
    batches = [sizes[n : n + BATCH] for n in range(0, len(sizes), BATCH)]
    padded = 1 - sum(sizes) / sum(max(batch) * len(batch) for batch in batches)
    documents = make_documents([([0] * n, [True] * n) for n in sizes], 1)
    ours = 1 - (sum(sizes) - len(sizes)) / (ROW * len(Rows(documents, ROW, 0).order))
    return dict(zip(CONTESTANTS, (padded, 0.0, ours, ours), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="demo, or a checkpoint folder that transformers loads")
    parser.add_argument("--json", type=Path, help="turns are read from this file and written back")
    parser.add_argument("--seconds", type=float, default=150.0, help="how long to take turns")
    parser.add_argument("--only", default="", metavar="REGEX", help="contestants")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    from minillm.load.hub import find_checkpoint

    folder = find_checkpoint(args.model)
    turns = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    context, workers = multiprocessing.get_context("spawn"), {}
    losses = {}
    for name in CONTESTANTS:
        if re.search(args.only, name):
            ours, theirs = context.Pipe()
            context.Process(target=work, args=(theirs, name, folder, args.threads), daemon=True).start()
            workers[name], began = ours, time.monotonic()
            losses[name] = ours.recv()  # one after the other
            print(f"{name}: loss {losses[name]:.3f}, ready after {time.monotonic() - began:.0f} s", flush=True)
    if max(losses.values()) > 1.01 * min(losses.values()):
        raise SystemExit("the contestants do not compute the same loss")
    ends, slowest = time.monotonic() + args.seconds, 0.0
    while time.monotonic() + slowest < ends:
        began = time.monotonic()
        for name, pipe in workers.items():
            pipe.send(True)
            turns.setdefault(name, []).append(pipe.recv())
            print(name, turns[name][-1], flush=True)
        slowest = time.monotonic() - began
        if args.json:
            args.json.write_text(json.dumps(turns))

    for pipe in workers.values():
        pipe.send(False)
    print(f"{args.model}, {args.threads} threads, {platform.machine()}")
    print(f"{'':<26}{'tokens/s':>9}{'range':>14}{'turns':>7}{'peak GB':>9}{'computed in vain':>18}")
    for name, share in padding().items():
        if name in turns:
            speeds = [tokens / seconds for tokens, seconds, _ in turns[name]]
            spread = f"{min(speeds):.0f}-{max(speeds):.0f}"
            peak = max(memory for *_, memory in turns[name])
            speed = statistics.median(speeds)
            print(f"{name:<26}{speed:>9.0f}{spread:>14}{len(speeds):>7}{peak:>9.2f}{share:>18.1%}")


if __name__ == "__main__":
    main()
