"""How fast a model runs on this machine, and how close that is to what the machine's memory allows.

A decode step of one row reads every weight and the row's keys and values once and does little with each, so
its floor is known in advance: bytes / bandwidth. `measure` times both in the same run and gives the headline
as a percentage. Times are seconds, sizes bytes.
"""

import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minillm.cache import StaticCache
from minillm.config import ModelConfig
from minillm.errors import RequestError
from minillm.linear import Int4Linear, QuantizedLinear
from minillm.llm import LLM
from minillm.measure.memory import format_bytes, weight_bytes
from minillm.measure.plot import picture
from minillm.model import Decoder
from minillm.tokenizer import Tokenizer

LENGTHS = (64, 256, 1024)  # prompts, and so positions at which decoding is timed
CAPACITIES = (128, 1024, 4096, 16384)  # of a cache in which the shortest prompt is continued
_BUFFER = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes to read for the bandwidth: far more than a cache holds
_PLAIN = {"temperature": 0, "eos_token_id": [], "repetition_penalty": 1.0}  # nothing but the model, to the last token
_TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind. "


@dataclass(frozen=True)
class Spread:
    """The middle and the ends of repeated measurements of one thing."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Prefill:
    """A prompt's way to its first token: cache, prefill, choice."""

    prompt_tokens: int
    first_token_seconds: Spread
    tokens_per_second: Spread  # prompt_tokens / first_token_seconds


@dataclass(frozen=True)
class Decode:
    """Decoding one row from `position` on, in a cache of `capacity` tokens."""

    position: int
    capacity: int
    tokens_per_second: Spread
    bytes_per_token: int  # weights, keys and values a step has to read
    bandwidth_percent: float  # bytes_per_token * median tokens_per_second / median bandwidth * 100


@dataclass(frozen=True)
class Report:
    """What `minillm bench` shows; the first entry of `decode` is the headline."""

    name: str
    format: str  # of the weights
    device: str
    threads: int
    torch: str
    new_tokens: int  # decoded per measurement, after the first one
    repeats: int
    weight_bytes: int
    steps: str  # how they run: "recorded", "compiled" or "eager"
    load_seconds: float  # without compiling
    compile_seconds: float
    compilations: int  # graphs that were compiled, in loading and in everything that was measured
    first_request_seconds: float  # of the shortest prompt, right after loading: what is lazy happens here
    load_peak_bytes: int  # beyond what the process held before loading
    peak_bytes: int  # the same, the longest request included
    bandwidth: Spread  # bytes per second: CPU reading, GPU copying (bytes read + bytes written)
    prefill: list[Prefill]
    decode: list[Decode]  # at every length, each in a cache that is just long enough
    capacity: list[Decode]  # at the shortest length, in caches of growing capacity

    def as_dict(self) -> dict:
        return asdict(self)

    def as_text(self) -> str:
        best = self.decode[0]
        speed, size = best.tokens_per_second.median, best.bytes_per_token
        lines = [
            f"{self.name}: {self.format} on {self.device}, {self.threads} threads, torch {self.torch}, "
            f"steps {self.steps}",
            "",
            f"{best.bandwidth_percent:.0f} % of memory bandwidth: {speed:.1f} tokens/s x {size / 1e6:.1f} MB = "
            f"{speed * size / 1e9:.1f} of {self.bandwidth.median / 1e9:.1f} GB/s",
            "",
            f"{'weights':<42}{format_bytes(self.weight_bytes):>10}",
            f"{'peak memory, loading':<42}{format_bytes(self.load_peak_bytes):>10}",
            f"{'peak memory, longest request':<42}{format_bytes(self.peak_bytes):>10}",
            f"{'load':<42}{self.load_seconds:>8.2f} s",
            f"{f'compile, {self.compilations} graphs':<42}{self.compile_seconds:>8.2f} s",
            f"{'first request, to its first token':<42}{self.first_request_seconds:>8.2f} s",
            "",
            f"{f'median of {self.repeats}':<42}{'median':>10}{'lowest':>10}{'highest':>10}",
        ]
        for one in self.prefill:
            lines.append(_line(f"time to first token, prompt {one.prompt_tokens}, ms", one.first_token_seconds, 1e3))
            lines.append(_line(f"prefill, prompt {one.prompt_tokens}, tokens/s", one.tokens_per_second))
        for one in self.decode:
            lines.append(_line(f"decode at position {one.position}, tokens/s", one.tokens_per_second))
        for one in self.capacity:
            label = f"decode at {one.position} in a cache of {one.capacity}, tokens/s"
            lines.append(_line(label, one.tokens_per_second))
        lines.append(_line("memory bandwidth, GB/s", self.bandwidth, 1e-9))
        return "\n".join(lines)


def _line(label: str, spread: Spread, scale: float = 1.0) -> str:
    numbers = (spread.median, spread.lowest, spread.highest)
    return f"{label:<42}" + "".join(f"{number * scale:>10.1f}" for number in numbers)


# ---- speed ----


def measure(
    load: Callable[[], LLM],
    lengths: Sequence[int] | None = None,
    capacities: Sequence[int] | None = None,
    new_tokens: int = 32,
    repeats: int = 5,
) -> Report:
    """Load a model and time it, greedy, one row.

    Args:
        load: makes the LLM; called once and timed. Memory is counted from here: measure in a fresh process.
        lengths: prompt lengths; decoding is timed right after each. Default: those of LENGTHS that fit.
        capacities: cache sizes in which the shortest prompt is also continued. Default: CAPACITIES.
        new_tokens: tokens decoded per measurement. repeats: rounds; each measures everything once.

    Everything takes turns, the bandwidth too, so that a busy moment does not hit one number alone.
    Raises `RequestError` for a count below 1 or a length that does not fit.
    """
    for label, value in (("new_tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise RequestError(f"{label} must be at least 1, not {value}")
    before = _process_peak()
    started = time.perf_counter()
    llm = load()
    compilations = llm.steps.compiled.compilations if llm.steps.compiled is not None else []
    load_seconds = time.perf_counter() - started - sum(seconds for _, seconds in compilations)

    def peak() -> int:
        on_gpu = llm.device.type == "cuda"
        return torch.cuda.max_memory_allocated(llm.device) if on_gpu else _process_peak() - before

    load_peak = peak()
    lengths, capacities = _sizes(llm.config, lengths, capacities, new_tokens)
    prompts = {length: _prompt(llm.tokenizer, length) for length in lengths}
    first_request, _ = _request(llm, prompts[lengths[0]], 1)
    _request(llm, prompts[lengths[-1]], new_tokens)  # warm up, and the peak
    longest_peak = peak()

    caches = [StaticCache(llm.config, 1, size, llm.device, llm.dtype) for size in capacities]
    for cache in caches:
        _request(llm, prompts[lengths[0]], 1, cache)
    firsts, steps = {n: [] for n in lengths}, {n: [] for n in lengths}
    steps_in, bandwidths = [[] for _ in caches], []
    with progress_bar(repeats * (len(lengths) + len(caches)), "measuring") as advance:
        for _ in range(repeats):
            bandwidths.append(memory_bandwidth(llm.device))
            for length in lengths:
                first, step = _request(llm, prompts[length], new_tokens)
                firsts[length].append(first)
                steps[length].append(step)
                advance()
            for cache, times in zip(caches, steps_in, strict=True):
                times.append(_request(llm, prompts[lengths[0]], new_tokens, cache)[1])
                advance()
    bandwidth = Spread.of(bandwidths)

    def decode(position: int, capacity: int, times: list[float]) -> Decode:
        speed = Spread.of([1 / seconds for seconds in times])
        size = bytes_per_token(llm.model, position + (new_tokens + 1) // 2)
        return Decode(position, capacity, speed, size, 100 * size * speed.median / bandwidth.median)

    return Report(
        name=llm.name,
        format=format_name(llm),
        device=device_name(llm.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        new_tokens=new_tokens,
        repeats=repeats,
        weight_bytes=weight_bytes(llm.model),
        steps=llm.steps.kind,
        load_seconds=load_seconds,
        compile_seconds=sum(seconds for _, seconds in compilations),
        compilations=len(compilations),
        first_request_seconds=first_request,
        load_peak_bytes=load_peak,
        peak_bytes=longest_peak,
        bandwidth=bandwidth,
        prefill=[Prefill(n, Spread.of(firsts[n]), Spread.of([n / t for t in firsts[n]])) for n in lengths],
        decode=[decode(n, n + new_tokens + 1, steps[n]) for n in lengths],
        capacity=[decode(lengths[0], size, times) for size, times in zip(capacities, steps_in, strict=True)],
    )


def bytes_per_token(model: Decoder, position: int) -> int:
    """Bytes that decoding the token at `position` has to read: weights once, and the keys and values before it.

    Of the embedding only one row is read, unless the head is the same matrix.
    """
    config, embedding = model.config, model.embedding.weight
    size = weight_bytes(model)
    if getattr(model.head, "weight", None) is not embedding:
        size -= embedding.nbytes - embedding[0].nbytes
    per_key = 2 * config.num_kv_heads * config.head_dim * embedding.dtype.itemsize
    return size + sum(per_key * min(position + 1, layer.window or position + 1) for layer in config.layers)


def _sizes(config: ModelConfig, lengths, capacities, new_tokens: int) -> tuple[list[int], list[int]]:
    """The lengths and capacities to measure, ascending; RequestError if one of the caller's does not fit."""
    room = config.max_positions - new_tokens - 1
    if lengths is None:
        lengths = [length for length in LENGTHS if length <= room] or [room]
    lengths = sorted(set(lengths))
    if not lengths or not 1 <= lengths[0] <= lengths[-1] <= room:
        raise RequestError(
            f"lengths {lengths} must be from 1 to {room}: the model has {config.max_positions} positions and "
            f"{new_tokens + 1} tokens follow"
        )
    least = lengths[0] + new_tokens + 1
    if capacities is None:
        capacities = [size for size in CAPACITIES if size >= least]
    capacities = sorted(set(capacities))
    if capacities and capacities[0] < least:
        raise RequestError(f"a cache of {capacities[0]} is too small: prompt and new tokens are {least}")
    return lengths, capacities


def _prompt(tokenizer: Tokenizer, length: int) -> list[int]:
    ids = tokenizer.encode(_TEXT, add_special_tokens=False)
    return (ids * (length // len(ids) + 1))[:length]


def _request(llm: LLM, prompt: list[int], new_tokens: int, cache: StaticCache | None = None) -> tuple[float, float]:
    """(seconds to the first token, seconds per token of the `new_tokens` after it)."""
    started = time.perf_counter()
    stats = llm.generate(prompt, cache=cache, max_new_tokens=new_tokens + 1, **_PLAIN).stats
    return time.perf_counter() - started - stats.decode_seconds, stats.decode_seconds / new_tokens


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second, the best of three passes over a large buffer. CPU: reading it; CUDA: copying it."""
    buffer = torch.ones(_BUFFER.get(device.type, _BUFFER["cpu"]) // 4, dtype=torch.int32, device=device)
    best = 0.0
    for _ in range(3):
        if buffer.is_cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            half = buffer.numel() // 2
            buffer[:half].copy_(buffer[half:])
            end.record()
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
        else:
            started = time.perf_counter()
            buffer.sum(dtype=torch.int32)
            seconds = time.perf_counter() - started
        best = max(best, buffer.nbytes / seconds)
    return best


def _process_peak() -> int:
    """The most bytes this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux: there ru_maxrss would begin with what the parent process held
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    import resource  # not on every system

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024  # bytes there, KiB elsewhere


def format_name(llm: LLM) -> str:
    """How the linear layers of a loaded model are stored: "bfloat16", "int8", "int4-g32", "int8 + head", ..."""
    layer = llm.model.blocks[0].attention.qkv
    if not isinstance(layer, QuantizedLinear):
        return str(llm.dtype).removeprefix("torch.")
    name = f"int4-g{layer.group_size}" if isinstance(layer, Int4Linear) else "int8"
    return f"{name} + head" if isinstance(llm.model.head, QuantizedLinear) else name


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@contextmanager
def progress_bar(total: int, label: str) -> Iterator[Callable[[], None]]:
    """A bar on stderr that is redrawn only when told: a thread that redraws it would disturb what is measured."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task(label, total=total)

        def advance() -> None:
            progress.advance(task)
            progress.refresh()

        yield advance


def save_plot(path: Path, report: Report) -> None:
    """Decode speed against position and against cache capacity, time to first token against prompt length."""

    def draw(axes, xs: list[int], spreads: list[Spread], scale: float = 1.0) -> None:
        middle = [spread.median * scale for spread in spreads]
        below = [m - spread.lowest * scale for m, spread in zip(middle, spreads, strict=True)]
        above = [spread.highest * scale - m for m, spread in zip(middle, spreads, strict=True)]
        axes.errorbar(xs, middle, yerr=[below, above], marker="o", capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks(xs, map(str, xs))
        axes.set_ylim(0, None)

    with picture(path, 12, 4) as figure:
        at_position, at_capacity, first = figure.subplots(1, 3)
        draw(at_position, [d.position for d in report.decode], [d.tokens_per_second for d in report.decode])
        draw(at_capacity, [d.capacity for d in report.capacity], [d.tokens_per_second for d in report.capacity])
        draw(first, [p.prompt_tokens for p in report.prefill], [p.first_token_seconds for p in report.prefill], 1e3)
        at_position.set(xlabel="position", ylabel="decode, tokens/s")
        at_capacity.set(
            xlabel=f"capacity of the cache, at position {report.decode[0].position}", ylabel="decode, tokens/s"
        )
        first.set(xlabel="prompt, tokens", ylabel="time to first token, ms")
        figure.suptitle(
            f"{report.name}, {report.format}, {report.device}: median, lowest and highest of {report.repeats}"
        )
