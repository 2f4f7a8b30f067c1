"""How often a draft is right, and what that is worth: tables, JSON and a plot, over texts nobody trained on.

    python tools/measure_speculation.py --text VALID.txt --out docs/speculation

VALID.txt is UTF-8 text, records separated by a line holding `<|endoftext|>`. The beginning of each record
is a prompt. For every temperature and every number of drafted tokens k, all prompts are continued with the
draft model in one batch and counted:

  acceptance        share of the drafted tokens that became text (what follows a rejected one counts as rejected)
  tokens per step   new tokens per forward pass of the target; plain decoding has 1

At temperature 0 each text is compared with what plain decoding gives. Wall-clock time is measured one prompt
at a time, prompt included, plain and speculative taking turns, as the ratio of the two; on a busy machine the
ratio of the CPU seconds says more (with one thread it is what the clock shows when nobody else is there).
Beside it stands what one pass costs (the target over 1 and over k + 1 tokens, the draft over 1), which says
why the ratio is what it is. Prompt lookup is measured on the same prompts, and on copying: a passage said twice
and begun again.

Writes OUT.md, OUT.json and OUT.png.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from bench_peers import processor

from minillm import LLM, StaticCache

END = "<|endoftext|>"
COPIED, BEGUN = 80, 16  # tokens of the passage that is to be copied, and how many of them are given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="validation text, not the training text")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--draft", default="demo-draft")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix")
    parser.add_argument("--dtype", default="float32", help="default float32, in which step shapes round alike")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--lengths", type=int, nargs="+", default=list(range(2, 9)), metavar="K")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--timed-prompts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = LLM.from_pretrained(options.model, dtype=options.dtype)
    draft = LLM.from_pretrained(options.draft, dtype=options.dtype)
    prompts = read_prompts(target, options)
    results = {
        "settings": {name: value.name if isinstance(value, Path) else value for name, value in vars(options).items()},
        "machine": f"{processor()}, {options.threads} thread(s), torch {torch.__version__}",
        "prompts": len(prompts),
        "passes": passes(target, draft, options),
        "draft_model": [],
        "lookup": [],
    }
    for temperature in options.temperatures:
        plain = generate(target, prompts, options, temperature)
        for k in [*options.lengths, "auto"]:
            asked = dict(assistant_model=draft, num_assistant_tokens=k)
            results["draft_model"].append(measure(target, prompts, options, temperature, plain, k, asked))
        lookup = measure(target, prompts, options, temperature, plain, 4, dict(prompt_lookup_num_tokens=4))
        results["lookup"].append({"task": "tales", **lookup})
        passages = read_prompts(target, options, COPIED)
        copies = [passage + passage + passage[:BEGUN] for passage in passages]
        plain = generate(target, copies, options, temperature)
        lookup = measure(target, copies, options, temperature, plain, 4, dict(prompt_lookup_num_tokens=4))
        results["lookup"].append({"task": "copying", **lookup})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(tables(results))
    plot(results, options.out.with_suffix(".png"))
    print(tables(results))


def read_prompts(llm: LLM, options, tokens: int | None = None) -> list[list[int]]:
    """The first tokens of each record that is long enough."""
    tokens = tokens or options.prompt_tokens
    records = options.text.read_text(encoding="utf-8").split(f"\n{END}\n")
    ids = [llm.tokenizer.encode(record.strip()) for record in records]
    ids = [row[:tokens] for row in ids if len(row) >= tokens]
    if not ids:
        sys.exit(f"measure_speculation: no record of {options.text} has {tokens} tokens")
    return ids[: options.prompts]


def generate(llm: LLM, prompts, options, temperature: float, **asked):
    return llm.generate(
        prompts,
        max_new_tokens=options.new_tokens,
        temperature=temperature,
        top_p=1.0,
        eos_token_id=[],
        seed=list(range(len(prompts))),
        **asked,
    )


def measure(llm: LLM, prompts, options, temperature: float, plain, k, asked: dict) -> dict:
    out = generate(llm, prompts, options, temperature, **asked)
    total = {
        name: sum(getattr(o.stats, name) for o in out) for name in ("drafted", "accepted", "target_steps", "new_tokens")
    }
    ratios = timed_ratios(llm, prompts[: options.timed_prompts], options, temperature, asked)
    row = {
        "temperature": temperature,
        "k": k,
        **total,
        "acceptance": total["accepted"] / max(total["drafted"], 1),
        "tokens_per_step": total["new_tokens"] / total["target_steps"],
        "texts": len(out),
        # Sampled with a draft the text is another one with the same law; all else must agree.
        "texts_as_plain": sum(a.token_ids == b.token_ids for a, b in zip(out, plain, strict=True)),
        "speed": {name: statistics.median(values) for name, values in ratios.items()},
        "speed_quartiles": {name: statistics.quantiles(values, n=4)[::2] for name, values in ratios.items()},
    }
    print(
        f"T={temperature} {[*asked]} k={k}: {row['tokens_per_step']:.2f} tokens/step, speed {row['speed']}",
        file=sys.stderr,
    )
    return row


def timed_ratios(llm: LLM, prompts, options, temperature: float, asked: dict) -> dict[str, list[float]]:
    """Speed with drafts over speed without, one prompt at a time, taking turns: by the wall and by CPU seconds."""
    ratios = {"wall": [], "cpu": []}
    for number, prompt in enumerate(prompts):
        seconds = []
        for more in (asked, {}):
            begin = time.perf_counter(), time.process_time()
            generate(llm, [prompt], options, temperature, **more)
            seconds.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        if number:  # the first one warms up
            for name, drafted, plain in zip(ratios, *seconds, strict=True):
                ratios[name].append(plain / drafted)
    return ratios


@torch.inference_mode()
def passes(target: LLM, draft: LLM, options) -> list[dict]:
    """Median CPU milliseconds of one forward pass at batch 1 behind a text of 128 tokens."""
    cases = [("target", target, 1)] + [("target", target, k + 1) for k in options.lengths] + [("draft", draft, 1)]
    caches = {id(llm): StaticCache(llm.config, 1, 160, device=llm.device, dtype=llm.dtype) for llm in (target, draft)}
    for llm in (target, draft):
        llm.steps(torch.ones(1, 128, dtype=torch.int64), torch.arange(128)[None], caches[id(llm)])
    seconds = {case: [] for case in range(len(cases))}
    for _ in range(60):
        for case, (_, llm, width) in enumerate(cases):
            begin = time.process_time()
            llm.steps(torch.ones(1, width, dtype=torch.int64), torch.arange(128, 128 + width)[None], caches[id(llm)])
            seconds[case].append(time.process_time() - begin)
    return [
        {"model": name, "tokens": width, "ms": 1000 * statistics.median(seconds[case])}
        for case, (name, _, width) in enumerate(cases)
    ]


# --- showing it -------------------------------------------------------------------------------------------


def tables(results: dict) -> str:
    head = (
        "| temperature | k | accepted / drafted | acceptance | tokens per step | speed (quartiles) | wall | as plain |"
    )
    lines = [head, "|---" * 8 + "|"]
    for row in results["draft_model"]:
        lines.append("| " + " | ".join(cells(row)) + " |")
    lines += ["", head.replace("| temperature", "| prompt lookup | temperature"), "|---" * 9 + "|"]
    for row in results["lookup"]:
        lines.append("| " + " | ".join([row["task"], *cells(row)]) + " |")
    lines += ["", "| one pass of | tokens | CPU ms |", "|---|---|---|"]
    lines += [f"| {p['model']} | {p['tokens']} | {p['ms']:.2f} |" for p in results["passes"]]
    return "\n".join([*lines, "", f"{results['prompts']} prompts; {results['machine']}", ""])


def cells(row: dict) -> list[str]:
    low, high = row["speed_quartiles"]["cpu"]
    return [
        f"{row['temperature']:g}",
        str(row["k"]),
        f"{row['accepted']} / {row['drafted']}",
        f"{row['acceptance']:.1%}",
        f"{row['tokens_per_step']:.2f}",
        f"{row['speed']['cpu']:.2f} ({low:.2f} to {high:.2f})",
        f"{row['speed']['wall']:.2f}",
        f"{row['texts_as_plain']} of {row['texts']}",
    ]


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for temperature in results["settings"]["temperatures"]:
        rows = [r for r in results["draft_model"] if r["temperature"] == temperature and r["k"] != "auto"]
        lengths, label = [r["k"] for r in rows], f"temperature {temperature:g}"
        axes[0].plot(lengths, [r["acceptance"] for r in rows], marker="o", label=label)
        axes[1].plot(lengths, [r["tokens_per_step"] for r in rows], marker="o")
        line = axes[2].plot(lengths, [r["speed"]["cpu"] for r in rows], marker="o")
        low, high = zip(*[r["speed_quartiles"]["cpu"] for r in rows], strict=True)
        axes[2].fill_between(lengths, low, high, alpha=0.2, color=line[0].get_color())
    titles = ("share of drafts accepted", "tokens per pass of the target", "speed (CPU time), plain = 1")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="drafted tokens per step", ylim=(0, None))
        axis.grid(alpha=0.3)
    for axis in axes[1:]:
        axis.axhline(1, color="grey", linewidth=1)
    axes[0].legend()
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
