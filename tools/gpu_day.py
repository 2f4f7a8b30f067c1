"""Everything there is to measure on a GPU, in stages of under nine minutes, into one folder.

    python tools/gpu_day.py --out gpu_day                     # all stages, in order; again: goes on where it stopped
    python tools/gpu_day.py --out gpu_day --stage decode      # one stage
    python tools/gpu_day.py --out gpu_day --stage decode --again

A stage is a list of cells, and a process of its own. After each cell its results are in `STAGE.json`; what has run is
not run again. A cell that fails is named, its error kept, and passed; a process that dies or takes too long loses the
cell it was at, which then counts as failed. `tables.md` and `decode.png` are drawn from what is there.

Weights are random and made on the device: speed does not depend on their values. Times are medians; a decode step is
timed as `LLM` runs it (captured, or compiled and captured), without sampling. `--small` takes toy sizes: with
`--device cpu` a look at whether everything here still runs, in seconds.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))

from minillm.cache import GPU_MAX_STEP, StaticCache
from minillm.config import ModelConfig
from minillm.decode import prefill
from minillm.faster.steps import Steps
from minillm.load.backends import choose_backend
from minillm.load.config_json import parse_config
from minillm.measure.bench import bytes_per_token, memory_bandwidth
from minillm.measure.memory import estimate, parameter_count
from minillm.model import Decoder, empty_decoder
from minillm.options import GenerationConfig
from minillm.sampling import Sampling, next_token

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 470  # seconds of a stage
Cell = Callable[[], list[dict]]
SHAPES = {  # hidden, intermediate, layers, heads, key heads, vocabulary, positions
    "1B": (2048, 5632, 22, 32, 4, 32000, 32768),  # TinyLlama
    "7B": (4096, 11008, 32, 32, 32, 32000, 32768),  # Llama 2
    "8B": (4096, 14336, 32, 32, 8, 128256, 32768),  # Llama 3
}
SMALL = {"toy": (64, 96, 2, 4, 2, 128, 256)}


class Day:
    """What is measured, and on what: the real sizes, or toy ones."""

    def __init__(self, out: Path, device: str, small: bool):
        self.out, self.device, self.small = out, torch.device(device), small
        self.shapes = SMALL if small else SHAPES
        self.dtype = torch.float32 if small else torch.bfloat16
        self.formats = [None, "int8", "int4-g32" if small else "int4-g128"]
        self.positions = (4, 40) if small else (64, 512, 2048, 4096, 16384)
        self.rows = (2,) if small else (2, 4, 8, 16, 17, 32, 64)
        self.repeats = 2 if small else 7
        self._bandwidth = None

    @property
    def bandwidth(self) -> float:
        """Bytes per second: a GPU copying, a CPU reading."""
        if self._bandwidth is None:
            self._bandwidth = 1e10 if self.small else statistics.median(memory_bandwidth(self.device) for _ in range(5))
        return self._bandwidth

    def config(self, name: str) -> ModelConfig:
        hidden, wide, layers, heads, kv_heads, vocabulary, positions = self.shapes[name]
        return parse_config(
            dict(
                model_type="llama",
                hidden_size=hidden,
                intermediate_size=wide,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                vocab_size=vocabulary,
                max_position_embeddings=positions,
                rms_norm_eps=1e-5,
                tie_word_embeddings=False,
            )
        )

    def model(self, name: str, quantize: str | None, attention: str = "auto") -> Decoder:
        """A decoder of this shape with random weights, made where it will run."""
        config = self.config(name)
        backend = choose_backend(attention, config, self.device)
        model = empty_decoder(config, self.dtype, backend, quantize, quantize is not None, device=self.device)
        generator = torch.Generator(self.device).manual_seed(0)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.dtype.is_floating_point:
                    # scales are smaller than weights; both have a spread at which activations stay finite
                    tensor.normal_(0, 1e-3 if tensor.dtype != self.dtype else 0.02, generator=generator)
                else:
                    tensor.random_(0, 127 if tensor.dtype == torch.int8 else 256, generator=generator)
        return model.eval().requires_grad_(False)

    def word(self, quantize: str | None) -> str:
        return quantize or str(self.dtype).removeprefix("torch.")

    def ids(self, count: int, vocabulary: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(count)).tolist()

    def seconds(self, call: Callable[[], object], turns: int = 1) -> float:
        """Median seconds of one of `turns` calls in a row, after one that warms up."""
        call()
        times = []
        for _ in range(self.repeats):
            self.wait()
            started = time.perf_counter()
            for _ in range(turns):
                call()
            self.wait()
            times.append((time.perf_counter() - started) / turns)
        return statistics.median(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


# ---- the stages ----


def tests(day: Day) -> dict[str, Cell]:
    """Every test marked `gpu`: kernels first, `compile=True` last."""

    def run(*arguments: str) -> list[dict]:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT - 30)
        summary = (done.stdout.strip().splitlines() or [""])[-1]
        if done.returncode not in (0, 5):  # 5: nothing to run
            raise RuntimeError(f"{summary}\n{done.stdout[-3000:]}")
        return [{"summary": summary}]

    if day.small:
        return {"collected": lambda: run("--collect-only", "tests/test_kernels_gpu.py")}
    return {
        "kernels": lambda: run("tests/test_kernels_gpu.py"),
        "steps": lambda: run("tests/test_steps_gpu.py", "-k", "not True"),
        "steps, compiled": lambda: run("tests/test_steps_gpu.py", "-k", "True"),
    }


def kernels(day: Day) -> dict[str, Cell]:
    """Each kernel at each shape, against copy bandwidth and PyTorch's own operator."""

    def run(name: str) -> list[dict]:
        folder = day.out / "kernels" / name
        command = [sys.executable, str(ROOT / "tools" / "bench_kernels.py"), "--kernel", name, "--out", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT - 30)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        return json.loads((folder / "bench_kernels.json").read_text())["rows"]

    def norm() -> list[dict]:  # on a CPU there is no bench_kernels: one op, timed
        from minillm_kernels.norm import rms_norm

        x, weight = torch.ones(4, 64, device=day.device), torch.ones(64, device=day.device)
        seconds = day.seconds(lambda: rms_norm(x, weight, 1e-6, 0.0, False))
        return [{"kernel": "rms_norm", "microseconds": 1e6 * seconds}]

    if day.small:
        return {"rms_norm": norm}
    products, attention = ("int8_linear", "gated_mlp", "int4_linear"), ("decode_attention", "flash_attention")
    names = (*products, *attention, "rms_norm", "add_rms_norm", "rope_and_cache_write")
    return {name: lambda name=name: run(name) for name in names}


def decode(day: Day) -> dict[str, Cell]:
    """Steps of one token: by position for one row, by rows at one position."""

    def run(name: str, quantize: str | None, compile: bool | str, attention: str = "auto") -> list[dict]:
        model, found = day.model(name, quantize, attention), []
        steps = Steps(model, compile)
        if steps.compiled is not None:
            steps.compiled.warm_up()
        points = [(1, position) for position in day.positions] + [(rows, day.positions[1]) for rows in day.rows]
        for rows, position in points if compile == "auto" and attention == "auto" else points[:2]:
            capacity = position + 64
            cache = StaticCache(model.config, rows, capacity, day.device, day.dtype)
            ids = day.ids(position, model.config.vocab_size)
            token = torch.full((rows, 1), 5, device=day.device)
            with torch.inference_mode():
                prefill(steps, cache, [ids] * rows, [0] * rows)
                place = torch.full((rows, 1), position, device=day.device)
                seconds = day.seconds(lambda s=steps, t=token, p=place, c=cache: s(t, p, c), 1 if day.small else 20)
            keys = bytes_per_token(model, position) - bytes_per_token(model, 0)  # of one more row
            size = bytes_per_token(model, position) + (rows - 1) * keys
            found.append(
                dict(model=name, format=day.word(quantize), steps=str(compile), attention=model.backend.name)
                | dict(rows=rows, position=position, milliseconds=1e3 * seconds, tokens_per_second=rows / seconds)
                | dict(bytes=size, percent_of_bandwidth=100 * size / seconds / day.bandwidth)
            )
        return found

    cells = {
        f"{name}, {quantize or 'full'}, captured": lambda n=name, q=quantize: run(n, q, "auto")
        for name in day.shapes
        for quantize in day.formats
    }
    for name in day.shapes:
        cells[f"{name}, sdpa"] = lambda n=name: run(n, None, "auto", "sdpa")
    for name in [] if day.small else day.shapes:  # last: it compiles for a minute
        cells[f"{name}, compiled"] = lambda n=name: run(n, None, True)
    return cells


def prompts(day: Day) -> dict[str, Cell]:
    """A prompt's way into the cache, in chunks of 256 and of 2,048."""

    def run(name: str, quantize: str | None) -> list[dict]:
        model, found = day.model(name, quantize), []
        # Multiplications and additions for a token, those of attention not counted; the head runs once for a prompt.
        config = model.config
        ends = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        work = 2 * (parameter_count(model) - ends)
        for length in (40, 100) if day.small else (512, 2048, 8192):
            for chunk in (16, 64) if day.small else (256, GPU_MAX_STEP):
                cache = StaticCache(model.config, 1, length, day.device, day.dtype, max_step=chunk)
                ids = day.ids(length, model.config.vocab_size)

                def once(cache=cache, ids=ids):
                    cache.reset()
                    prefill(model, cache, [ids], [0])

                with torch.inference_mode():
                    seconds = day.seconds(once)
                found.append(
                    dict(model=name, format=day.word(quantize), tokens=length, chunk=chunk)
                    | dict(milliseconds=1e3 * seconds, tokens_per_second=length / seconds)
                    | dict(teraflops=work * length / seconds / 1e12)
                )
        return found

    return {f"{name}, {q or 'full'}": lambda n=name, q=q: run(n, q) for name in day.shapes for q in day.formats}


def transformers(day: Day) -> dict[str, Cell]:
    """The same shapes in transformers: its growing cache, and its static one, for which it compiles on a GPU."""

    def run(name: str, cache: str) -> list[dict]:
        from transformers import LlamaConfig, LlamaForCausalLM

        hidden, wide, layers, heads, kv_heads, vocabulary, positions = day.shapes[name]
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv_heads, vocab_size=vocabulary, max_position_embeddings=positions,
        )  # fmt: skip
        with torch.device(day.device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(day.dtype)
            try:
                model = LlamaForCausalLM(config).eval()
            finally:
                torch.set_default_dtype(before)
        found = []
        for position in day.positions[:3]:
            ids = torch.tensor([day.ids(position, vocabulary)], device=day.device)
            few, many = (2, 6) if day.small else (8, 72)
            options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, cache_implementation=cache)

            def generate(new: int, ids=ids, options=options):
                mask = torch.ones_like(ids)
                return model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **options)

            long, short = (day.seconds(lambda g=generate, n=n: g(n)) for n in (many, few))
            seconds = (long - short) / (many - few)  # without the prompt
            found.append(
                dict(model=name, cache=cache, position=position)
                | dict(milliseconds=1e3 * seconds, tokens_per_second=1 / seconds)
            )
        return found

    pairs = [(name, cache) for name in day.shapes for cache in ("dynamic", "static")]
    return {f"{name}, {cache}": lambda n=name, c=cache: run(n, c) for name, cache in pairs}


def speculation(day: Day) -> dict[str, Cell]:
    """What a verify step costs beside a plain one: all that drafts have to earn."""

    def run(name: str, quantize: str | None) -> list[dict]:
        model = day.model(name, quantize)
        steps, found, position = Steps(model), [], day.positions[1]
        for width in (1, 2, 3, 5, 9, 17):
            cache = StaticCache(model.config, 1, position + 64, day.device, day.dtype)
            token = torch.full((1, width), 5, device=day.device)
            place = torch.arange(position, position + width, device=day.device)[None]
            with torch.inference_mode():
                prefill(steps, cache, [day.ids(position, model.config.vocab_size)], [0])
                seconds = day.seconds(lambda s=steps, t=token, p=place, c=cache: s(t, p, c), 1 if day.small else 20)
            found.append(
                dict(model=name, format=day.word(quantize), tokens=width, milliseconds=1e3 * seconds)
                | dict(plain_steps=1e3 * seconds / found[0]["milliseconds"] if found else 1.0)
            )
        return found

    return {f"{name}, {q or 'full'}": lambda n=name, q=q: run(n, q) for name in day.shapes for q in day.formats}


def sampling(day: Day) -> dict[str, Cell]:
    """Choosing the next token, by vocabulary and filters."""

    def run(rows: int) -> list[dict]:
        found = []
        for vocabulary in (500,) if day.small else (32000, 128256):
            logits = torch.randn(rows, vocabulary, device=day.device) * 3
            place = torch.arange(rows, device=day.device)
            for word, options in {
                "greedy": {},
                "temperature": dict(temperature=0.8),
                "top_k": dict(temperature=0.8, top_k=50),
                "top_p": dict(temperature=0.8, top_p=0.9),
                "top_k, top_p": dict(temperature=0.8, top_k=50, top_p=0.9),
            }.items():
                chosen = Sampling.of(GenerationConfig(**options), range(rows), day.device)
                seconds = day.seconds(lambda s=chosen, x=logits, p=place: next_token(x, s, p), 1 if day.small else 20)
                found.append(dict(rows=rows, vocabulary=vocabulary, filters=word, microseconds=1e6 * seconds))
        return found

    return {f"{rows} rows": lambda r=rows: run(r) for rows in ((1,) if day.small else (1, 16))}


def memory(day: Day) -> dict[str, Cell]:
    """What is allocated, beside what `minillm memory` foretells."""

    def run(name: str, quantize: str | None) -> list[dict]:
        context, gpu = (64 if day.small else 4096), day.device.type == "cuda"
        if gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(day.device)
        before = torch.cuda.memory_allocated(day.device) if gpu else 0
        model = day.model(name, quantize)
        cache = StaticCache(model.config, 1, context, day.device, day.dtype)
        with torch.inference_mode():
            prefill(model, cache, [day.ids(context - 1, model.config.vocab_size)], [0])
        foretold = estimate(model.config, 1, context, day.dtype, quantize, quantize is not None, cache.max_step)
        held, kept = model.weight_bytes + cache.nbytes, foretold.weights + foretold.cache_full + foretold.cache_sliding
        peak = torch.cuda.max_memory_allocated(day.device) - before if gpu else held
        return [
            dict(model=name, format=day.word(quantize), context=context, peak=peak, held=held)
            | dict(foretold=foretold.total, foretold_held=kept)
        ]

    return {f"{name}, {q or 'full'}": lambda n=name, q=q: run(n, q) for name in day.shapes for q in day.formats}


STAGES: dict[str, Callable[[Day], dict[str, Cell]]] = {
    stage.__name__: stage for stage in (tests, kernels, decode, prompts, transformers, speculation, sampling, memory)
}


# ---- running them ----


def results(out: Path, stage: str) -> dict:
    """cell -> {"rows": [...]} or {"error": ...}, of what has run."""
    path = out / f"{stage}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def keep(out: Path, stage: str, found: dict) -> None:
    path = out / f"{stage}.json"
    path.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".part").replace(path)  # whole, or as it was


def run_stage(day: Day, stage: str, cells: dict[str, Cell], limit: float = LIMIT) -> dict:
    """Run the cells that have not run yet while there is time; returns all results of the stage."""
    started, found = time.perf_counter(), results(day.out, stage)
    for name, cell in cells.items():
        if name in found:
            continue
        if time.perf_counter() - started > limit:
            print(f"{stage}: time is up before {name!r}; run again to go on", flush=True)
            break
        # Noted before it runs: should the process die in it, it is passed next time.
        keep(day.out, stage, found | {name: {"error": "the process ended while this ran"}})
        begun = time.perf_counter()
        try:
            found[name] = {"rows": cell(), "seconds": time.perf_counter() - begun}
            print(f"{stage}: {name}: {len(found[name]['rows'])} rows in {found[name]['seconds']:.1f} s", flush=True)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-4000:]}
            print(f"{stage}: {name} FAILED: {found[name]['error'].splitlines()[0][:200]}", flush=True)
        keep(day.out, stage, found)
        if day.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def table(rows: list[dict]) -> Iterator[str]:
    """Markdown lines."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    yield "| " + " | ".join(columns) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        values = (row.get(name, "") for name in columns)
        yield "| " + " | ".join(f"{v:,.4g}" if isinstance(v, float) else str(v) for v in values) + " |"


def report(day: Day) -> None:
    """tables.md from all that has run, and decode.png where matplotlib is installed."""
    name = torch.cuda.get_device_name(day.device) if day.device.type == "cuda" else str(day.device)
    lines = [f"# {name}, torch {torch.__version__}, Python {platform.python_version()}", ""]
    for stage in STAGES:
        found = results(day.out, stage)
        rows = [row for cell in found.values() for row in cell.get("rows", [])]
        failed = {cell: one["error"].splitlines()[0] for cell, one in found.items() if "error" in one}
        lines += [f"## {stage}", "", *(f"- FAILED {cell}: {error}" for cell, error in failed.items())]
        lines += [f"- {row['summary']}" for row in rows if "summary" in row]
        rows = [row for row in rows if "summary" not in row]
        lines += ["", *(table(rows) if rows else ["nothing yet"]), ""]
    (day.out / "tables.md").write_text("\n".join(lines))
    rows = [row for cell in results(day.out, "decode").values() for row in cell.get("rows", []) if row["rows"] == 1]
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for key in dict.fromkeys((row["model"], row["format"], row["steps"], row["attention"]) for row in rows):
        points = [row for row in rows if (row["model"], row["format"], row["steps"], row["attention"]) == key]
        places, shares = [row["position"] for row in points], [row["percent_of_bandwidth"] for row in points]
        axes.plot(places, shares, marker="o", label=", ".join(key))
    axes.set(xscale="log", xlabel="position", ylabel="% of copy bandwidth", ylim=(0, None), title=name)
    if rows:
        axes.legend(fontsize=7)
    figure.savefig(day.out / "decode.png", dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this one; repeatable")
    parser.add_argument("--again", action="store_true", help="forget what these stages have measured")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy sizes")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # this process runs the stage itself
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "gpu_day measures a GPU, and there is no CUDA device here (--small --device cpu: a look)", file=sys.stderr
        )
        return 1
    day = Day(arguments.out, arguments.device, arguments.small)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for stage in arguments.stage or STAGES:
        if arguments.worker:
            run_stage(day, stage, STAGES[stage](day))
            continue
        if arguments.again:
            (day.out / f"{stage}.json").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--worker", "--out", str(day.out), "--stage", stage]
        command += ["--device", arguments.device, *["--small"] * arguments.small]
        try:
            code = subprocess.run(command, timeout=LIMIT + 60).returncode
            if code:
                print(f"{stage}: the process ended with {code}; passed", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{stage}: took longer than {LIMIT + 60} s; passed", flush=True)
    if not arguments.worker:
        report(day)
        print(f"wrote {day.out / 'tables.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
