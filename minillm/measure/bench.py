"""How fast a model runs on this machine, and how close that is to what the machine's memory allows.

A decode step of one row reads every weight and the row's keys and values once and does little with each, so
its floor is known in advance: bytes / bandwidth. `measure` times both in the same run and gives the headline
as a percentage. Times are seconds, sizes bytes.
"""

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minillm.cache import StaticCache
from minillm.config import ModelConfig
from minillm.errors import RequestError
from minillm.linear import Int4Linear, QuantizedLinear
from minillm.llm import LLM
from minillm.measure.memory import format_bytes, kv_values
from minillm.measure.plot import picture
from minillm.model import Decoder
from minillm.progress import progress_bar

LENGTHS = (64, 256, 1024)  # prompts, and so positions at which decoding is timed
CAPACITIES = (128, 1024, 4096, 16384)  # of a cache in which the shortest prompt is continued
_BUFFER = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes to read for the bandwidth: far more than a cache holds
_FEATURES = dict(
    amx_int8="AMX", avx512_vnni="AVX-512 VNNI", avx512_bf16="AVX-512 BF16", avx_vnni="AVX VNNI", asimddp="NEON dot"
)
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
class Batch:
    """Decoding `rows` rows at once, all of them at the position of the headline."""

    rows: int
    tokens_per_second: Spread  # of all rows together
    row_percent: float  # the speed of one of them, of what it has alone


@dataclass(frozen=True)
class Busy:
    """What was measured again while another process kept one core busy."""

    tokens_per_second: Spread  # of the headline
    prompt_tokens: int  # the longest
    first_token_seconds: Spread


@dataclass(frozen=True)
class Speeds:
    """What `minillm bench` shows; the first entry of `decode` is the headline."""

    name: str
    format: str  # of the weights
    device: str
    features: list[str]  # of the processor: what it has for products of small numbers
    threads: int
    torch: str
    new_tokens: int  # decoded per measurement, after the first one
    repeats: int
    weight_bytes: int
    steps: str  # how they run, see `faster.steps.how_steps_run`
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
    batch: list[Batch]
    busy: Busy | None

    def as_dict(self) -> dict:
        return asdict(self)

    def as_text(self) -> str:
        best = self.decode[0]
        speed, size = best.tokens_per_second.median, best.bytes_per_token
        lines = [
            f"{self.name}: {self.format} on {self.device}, {self.threads} threads, torch {self.torch}, "
            f"steps {self.steps}",
            f"processor: {', '.join(self.features) or 'nothing special for small numbers'}",
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

        def line(label: str, spread: Spread, scale: float = 1.0, note: str = "") -> None:
            lines.append(f"{label:<42}" + "".join(f"{number * scale:>10.1f}" for number in astuple(spread)) + note)

        for one in self.prefill:
            line(f"time to first token, prompt {one.prompt_tokens}, ms", one.first_token_seconds, 1e3)
            line(f"prefill, prompt {one.prompt_tokens}, tokens/s", one.tokens_per_second)
        for one in self.decode:
            line(f"decode at position {one.position}, tokens/s", one.tokens_per_second)
        for one in self.capacity:
            line(f"decode at {one.position} in a cache of {one.capacity}, tokens/s", one.tokens_per_second)
        for one in self.batch:
            line(f"decode {one.rows} rows, tokens/s", one.tokens_per_second, 1, f"   a row {one.row_percent:.0f} %")
        if self.busy is not None:
            share = self.busy.tokens_per_second.median / speed
            line("decode beside a busy process, tokens/s", self.busy.tokens_per_second, 1, f"   {share:.2f} of quiet")
            share = self.prefill[-1].first_token_seconds.median / self.busy.first_token_seconds.median
            label = f"first token of {self.busy.prompt_tokens} beside it, ms"
            line(label, self.busy.first_token_seconds, 1e3, f"   {share:.2f} of quiet")
        line("memory bandwidth, GB/s", self.bandwidth, 1e-9)
        return "\n".join(lines)


def measure(
    load: Callable[[], LLM],
    lengths: Sequence[int] | None = None,
    capacities: Sequence[int] | None = None,
    new_tokens: int = 32,
    repeats: int = 5,
    batches: Sequence[int] = (),
    busy: bool = False,
) -> Speeds:
    """Load a model and time it, greedy, one row.

    Args:
        load: makes the LLM; called once and timed. Memory is counted from here: measure in a fresh process.
        lengths: prompt lengths; decoding is timed right after each. Default: those of LENGTHS that fit.
        capacities: cache sizes in which the shortest prompt is also continued. Default: CAPACITIES.
        new_tokens: tokens decoded per measurement. repeats: rounds; each measures everything once.
        batches: numbers of rows that also continue the shortest prompt, all at once.
        busy: at the end, also time the headline, and the first token after the longest prompt, beside a process that
            keeps one core busy.

    Everything takes turns, the bandwidth too, so that a busy moment does not hit one number alone.
    Raises `RequestError` for a count below 1, or a length or cache that does not fit.
    """
    counts = [("new_tokens", new_tokens, 10**6), ("repeats", repeats, 10**6), *(("batch", n, 1024) for n in batches)]
    for label, value, most in counts:
        if not 1 <= value <= most:
            raise RequestError(f"{label} must be from 1 to {most}, not {value}")
    before = _process_peak()
    started = time.perf_counter()
    llm = load()
    compilations = llm.steps.compiled.compilations if llm.steps.compiled is not None else []
    load_seconds = time.perf_counter() - started - sum(seconds for _, seconds in compilations)

    def peak() -> int:
        return torch.cuda.max_memory_allocated(llm.device) if llm.device.type == "cuda" else _process_peak() - before

    load_peak = peak()
    lengths, capacities = _sizes(llm.config, lengths, capacities, new_tokens)
    ids = llm.tokenizer.encode(_TEXT, add_special_tokens=False)
    prompts = {length: (ids * (length // len(ids) + 1))[:length] for length in lengths}
    first_request, _ = _request(llm, ([prompts[lengths[0]]], None), 1)
    _request(llm, ([prompts[lengths[-1]]], None), new_tokens)  # warm up, and the peak
    longest_peak = peak()
    cache = partial(StaticCache, llm.config, device=llm.device, dtype=llm.dtype)
    # What is timed: prompts and, but for plain decoding, a cache of their own.
    lowest, room = lengths[0], new_tokens + 1
    timed = {("decode", length): ([prompts[length]], None) for length in lengths}
    timed |= {("capacity", size): ([prompts[lowest]], cache(1, size)) for size in capacities}
    timed |= {("batch", rows): ([prompts[lowest]] * rows, cache(rows, lowest + room)) for rows in sorted({*batches})}
    for what in timed.values():
        _request(llm, what, 1)
    bandwidths, times = [], {key: [] for key in timed}  # of every round: seconds to the first token, and per step
    with progress_bar(repeats * len(timed), "measuring") as advance:
        for _ in range(repeats):
            bandwidths.append(memory_bandwidth(llm.device))
            time.sleep(0.05)  # PyTorch's threads, which that took, look out for more for a while
            for key, what in timed.items():
                times[key].append(_request(llm, what, new_tokens))
                advance()
    bandwidth = Spread.of(bandwidths)
    speeds = {key: Spread.of([len(timed[key][0]) / step for _, step in rounds]) for key, rounds in times.items()}
    beside = None
    if busy:
        with busy_process():
            both = [([prompts[length]], None) for length in (lowest, lengths[-1])]
            again = [_request(llm, what, new_tokens) for _ in range(repeats) for what in both]
        steps, firsts = [1 / step for _, step in again[::2]], [first for first, _ in again[1::2]]
        beside = Busy(Spread.of(steps), lengths[-1], Spread.of(firsts))

    def prefill(length: int) -> Prefill:
        firsts = [first for first, _ in times["decode", length]]
        return Prefill(length, Spread.of(firsts), Spread.of([length / first for first in firsts]))

    def decode(position: int, capacity: int, speed: Spread) -> Decode:
        size = bytes_per_token(llm.model, position + room // 2)
        return Decode(position, capacity, speed, size, 100 * size * speed.median / bandwidth.median)

    def batch(rows: int, speed: Spread) -> Batch:
        return Batch(rows, speed, 100 * speed.median / rows / speeds["decode", lowest].median)

    return Speeds(
        name=llm.name,
        format=format_name(llm),
        device=device_name(llm.device),
        features=processor_features(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        new_tokens=new_tokens,
        repeats=repeats,
        weight_bytes=llm.model.weight_bytes,
        steps=llm.steps.kind,
        load_seconds=load_seconds,
        compile_seconds=sum(seconds for _, seconds in compilations),
        compilations=len(compilations),
        first_request_seconds=first_request,
        load_peak_bytes=load_peak,
        peak_bytes=longest_peak,
        bandwidth=bandwidth,
        prefill=[prefill(length) for length in lengths],
        decode=[decode(length, length + room, speeds["decode", length]) for length in lengths],
        capacity=[decode(lowest, size, speeds["capacity", size]) for size in capacities],
        batch=[batch(rows, speeds["batch", rows]) for rows in sorted({*batches})],
        busy=beside,
    )


def bytes_per_token(model: Decoder, position: int) -> int:
    """Bytes that decoding the token at `position` has to read: weights once, and the keys and values before it.

    Of the embedding only one row is read, unless the head is the same matrix, or some rows of it.
    """
    config, embedding = model.config, model.embedding.weight
    size = model.weight_bytes
    head = getattr(model.head, "weight", None)  # an adapter may stand around it
    if head is not embedding:
        size -= embedding.nbytes - embedding[0].nbytes
        if head is not None and head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr():
            size += head.nbytes  # a rank's part of it
    per_key = kv_values(1, config.num_kv_heads, config.head_dim, 1) * embedding.dtype.itemsize
    return size + sum(per_key * min(position + 1, layer.window or position + 1) for layer in config.layers)


def _sizes(config: ModelConfig, lengths, capacities, new_tokens: int) -> tuple[list[int], list[int]]:
    """The lengths and capacities to measure, ascending; RequestError if one of the caller's does not fit."""
    room = config.max_positions - new_tokens - 1
    if room < 1:
        raise RequestError(f"new_tokens {new_tokens} leave no room: the model has {config.max_positions} positions")
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


def _request(llm: LLM, what: tuple[list[list[int]], StaticCache | None], new_tokens: int) -> tuple[float, float]:
    """(seconds to the first token, seconds per step of the `new_tokens` after it) for prompts and their cache."""
    prompts, cache = what
    started = time.perf_counter()
    stats = llm.generate(prompts, cache=cache, max_new_tokens=new_tokens + 1, **_PLAIN)[0].stats
    return time.perf_counter() - started - stats.decode_seconds, stats.decode_seconds / new_tokens


@contextmanager
def busy_process() -> Iterator[subprocess.Popen]:
    """A process beside this one that keeps one core busy; it ends with the block, or with us, however we end."""
    code = "import os, sys\nwhile os.getppid() == int(sys.argv[1]): sum(range(100_000))"
    with subprocess.Popen([sys.executable, "-IS", "-c", code, str(os.getpid())]) as process:
        try:
            yield process
        finally:
            process.kill()


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second, the best of three passes over a large buffer. CPU: reading it; CUDA: copying it."""
    buffer = torch.ones(_BUFFER.get(device.type, _BUFFER["cpu"]) // 4, dtype=torch.int32, device=device)
    best = 0.0
    for _ in range(3):
        if buffer.is_cuda:
            with torch.cuda.device(device):  # an event belongs to the current device
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                half = buffer.numel() // 2
                buffer[:half].copy_(buffer[half:])
                end.record()
                end.synchronize()
                seconds = start.elapsed_time(end) / 1e3
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
    layers = llm.model.blocks[0].attention.qkv.modules()  # an adapter may stand around it
    layer = next((one for one in layers if isinstance(one, QuantizedLinear)), None)
    if layer is None:
        return str(llm.dtype).removeprefix("torch.")
    name = f"int4-g{layer.group_size}" if isinstance(layer, Int4Linear) else "int8"
    return f"{name} + head" if isinstance(llm.model.head, QuantizedLinear) else name


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def processor_features(path: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What the processor has for products of small numbers, by its flags; nothing where the system lists none."""
    words = set(path.read_text().split()) if path.exists() else set()
    return [name for flag, name in _FEATURES.items() if flag in words]


def save_plot(path: Path, speeds: Speeds) -> None:
    """Decode speed against position and against cache capacity, time to first token against prompt length."""

    def draw(axes, x: str, y: str, points: dict[int, Spread], scale: float = 1.0) -> None:
        middle, lowest, highest = np.array([astuple(spread) for spread in points.values()]).reshape(-1, 3).T * scale
        axes.errorbar([*points], middle, yerr=[middle - lowest, highest - middle], marker="o", capsize=3)
        axes.set_xscale("log", base=2)
        axes.set_xticks([*points], map(str, points))
        axes.set(xlabel=x, ylabel=y, ylim=(0, None))

    with picture(path, 12, 4) as figure:
        at_position, at_capacity, first = figure.subplots(1, 3)
        decode = "decode, tokens/s"
        draw(at_position, "position", decode, {one.position: one.tokens_per_second for one in speeds.decode})
        where = f"capacity of the cache, at position {speeds.decode[0].position}"
        draw(at_capacity, where, decode, {one.capacity: one.tokens_per_second for one in speeds.capacity})
        firsts = {one.prompt_tokens: one.first_token_seconds for one in speeds.prefill}
        draw(first, "prompt, tokens", "time to first token, ms", firsts, 1e3)
        what = f"{speeds.name}, {speeds.format}, {speeds.device}"
        figure.suptitle(f"{what}: median, lowest and highest of {speeds.repeats}")
