"""Two processes of minillm on one machine: what both decode together, in times what one decodes alone.

    python tools/bench_together.py --model demo --model FOLDER [--quantize int8] [--rounds 5]

A process alone and both at once take turns of three seconds, each with as many threads as PyTorch gives it. 1 is a
machine that is shared without loss; threads that spin while they wait make it less.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

from bench_peers import processor

SECONDS = 3.0


def serve(model: str, quantize: str | None) -> None:
    """For every line on stdin, tokens per second of so many seconds."""
    from minillm import LLM

    llm, ids = LLM.from_pretrained(model, quantize=quantize), [*range(5, 69)]
    for _ in sys.stdin:
        tokens, began = 0, time.perf_counter()
        while time.perf_counter() < began + SECONDS:
            tokens += len(llm.generate(ids, max_new_tokens=64, temperature=0, eos_token_id=[]).token_ids)
        print(json.dumps(tokens / (time.perf_counter() - began)), flush=True)


def speeds(processes: list[subprocess.Popen]) -> list[float]:
    """Of these processes at the same time."""
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return [json.loads(process.stdout.readline()) for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--quantize")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.model[0], options.quantize)
        return
    print(f"{processor()}\n| model | alone, tokens/s | together / alone (range) |\n|---|---|---|")
    for model in options.model:
        command = [sys.executable, __file__, "--serve", "--model", model]
        command += ["--quantize", options.quantize] if options.quantize else []
        pair = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        speeds(pair)  # whatever the first requests still make
        turns = [(speeds(pair[i % 2 : i % 2 + 1])[0], sum(speeds(pair))) for i in range(options.rounds)]
        ratios = [both / one for one, both in turns]
        alone = statistics.median(one for one, _ in turns)
        print(f"| {model} | {alone:.0f} | {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) |")
        for process in pair:
            process.communicate()


if __name__ == "__main__":
    main()
