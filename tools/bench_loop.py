"""What a request costs beside its steps: `LLM.generate` and a bare loop over recorded steps, taking turns.

    python tools/bench_loop.py --rounds 15
    python tools/bench_loop.py --vocabulary 128000        # the demo's shape with random weights and so many tokens

The loop is `decode_one_token` over `llm.steps`, one Python call a token and no text. `generate` does all that it does:
checks, text, stop strings, statistics; of a small model it makes several steps one call. Prompts are read outside of
both clocks. Greedy, and with temperature and top-p.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from bench_peers import processor
from minillm_kernels.cpu import threads

from minillm import LLM, StaticCache, decode_one_token
from minillm.decode import prefill
from minillm.load.config_json import parse_config
from minillm.load.writing import write_decoder
from minillm.model import empty_decoder
from minillm.options import GenerationConfig
from minillm.sampling import Sampling
from minillm.train.initialize import initialize

PROMPT = "Once upon a time"
DEMO = Path(__file__).parent.parent / "minillm" / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--vocabulary", type=int, help="the demo with so many tokens, instead of --model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--new-tokens", type=int, default=200)
    options = parser.parse_args()
    if options.vocabulary:
        with tempfile.TemporaryDirectory() as folder:
            llm = widened(Path(folder), options.vocabulary)
    else:
        llm = LLM.from_pretrained(options.model)
    # One cache for all turns, as generate keeps its own: steps are recorded for a cache.
    cache = StaticCache(llm.config, 1, 64 + options.new_tokens, llm.device, llm.dtype)
    print(f"{processor()}, {threads()} thread(s), torch {torch.__version__}, {llm.config.vocab_size:,} tokens")
    print("| | loop, us/token | generate, us/token | generate / loop (range) |\n|---|---|---|---|")
    for name, sampling in {"greedy": {}, "temperature 0.8, top-p 0.9": dict(temperature=0.8, top_p=0.9)}.items():
        turns = [(loop(llm, cache, options.new_tokens, sampling), request(llm, options.new_tokens, sampling))
                 for _ in range(options.rounds + 1)][1:]  # fmt: skip
        bare, whole = (statistics.median(seconds) * 1e6 for seconds in zip(*turns, strict=True))
        ratios = [b / a for a, b in turns]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"| {name} | {bare:.0f} | {whole:.0f} | {spread} |", flush=True)


def widened(folder: Path, vocabulary: int) -> LLM:
    config = json.loads((DEMO / "config.json").read_text()) | {"vocab_size": vocabulary}
    model = empty_decoder(parse_config(config), torch.float32, device="cpu")
    initialize(model, 0)
    write_decoder(model, folder, config, torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return LLM.from_pretrained(folder)


@torch.inference_mode()
def loop(llm: LLM, cache: StaticCache, new_tokens: int, sampling: dict) -> float:
    """Seconds per token after the first."""
    ids = llm.tokenizer.encode(PROMPT)
    cache.truncate(0)
    how = Sampling.of(GenerationConfig(**sampling), [1], llm.device) if sampling else None
    token = prefill(llm.model, cache, [ids], [0]).argmax(-1, keepdim=True)  # [1, 1]
    began = time.perf_counter()
    for position in range(len(ids), len(ids) + new_tokens - 1):
        token = decode_one_token(llm.steps, token, torch.tensor([[position]]), cache, how)
        token.item()  # a loop that may end at a token has to look at it
    return (time.perf_counter() - began) / (new_tokens - 1)


def request(llm: LLM, new_tokens: int, sampling: dict) -> float:
    """Seconds per token after the first."""
    options = sampling or dict(temperature=0)
    out = llm.generate(PROMPT, max_new_tokens=new_tokens, eos_token_id=[], seed=1, **options)
    return out.stats.decode_seconds / (new_tokens - 1)


if __name__ == "__main__":
    main()
