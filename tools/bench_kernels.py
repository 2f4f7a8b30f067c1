"""Measure every kernel of the catalog on this machine's GPU, against what its memory can do.

    python tools/bench_kernels.py                          # prints a table, writes bench_kernels.json and .png
    python tools/bench_kernels.py --kernel int4_linear --out /tmp/bench

First the ceilings: how fast this GPU copies, reads and multiplies. Then per kernel and model shape the bytes
it cannot avoid moving, the microseconds, and the share of both memory ceilings, beside what PyTorch's own
operator takes for the same thing (its shares, too, count the bytes of our format: they compare times).
Inputs rotate through at least 512 MB of distinct buffers, so that nothing
waits in the L2 cache; launches are captured in a CUDA graph and replayed, so that Python is not timed.
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from catalog import CATALOG
from catalog.entry import Entry

ROTATE_BYTES = 512 << 20  # several times the largest L2 cache
MAX_SETS = 256  # tiny inputs stay in L2 however many there are; such kernels are bound by their launch anyway
LAUNCHES, REPLAYS = 100, 20


@dataclass
class Row:
    kernel: str
    case: str
    implementation: str
    bytes: int
    flops: int
    microseconds: float
    spread: float  # (90th - 10th percentile) / median of the replays
    percent_copy: float
    percent_read: float


def measure(calls: list[Callable[[], object]]) -> tuple[float, float]:
    """(microseconds per call, spread): the calls in rotation, captured once, median over the replays."""
    for call in calls[:3]:
        call()  # compile, and let libraries choose their algorithms
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(LAUNCHES):
            calls[index % len(calls)]()
    times = []
    for _ in range(REPLAYS + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / LAUNCHES)
    times = sorted(times[2:])  # the first replays upload the graph
    median = statistics.median(times)
    return median, (times[int(0.9 * len(times))] - times[int(0.1 * len(times))]) / median


def ceilings(device: torch.device) -> dict[str, float]:
    """What this GPU reaches: bytes per second copying (read + written) and reading, bf16 flops per second."""
    size = 256 << 20
    source = [torch.ones(size, dtype=torch.uint8, device=device) for _ in range(4)]
    target = torch.empty_like(source[0])
    copy, _ = measure([lambda x=x: target.copy_(x) for x in source])
    words = [x.view(torch.float32) for x in source]
    read, _ = measure([lambda x=x: x.sum() for x in words])
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    multiply, _ = measure([lambda: a @ b])
    return {
        "copy_bytes_per_second": 2 * size / copy * 1e6,
        "read_bytes_per_second": size / read * 1e6,
        "bf16_flops_per_second": 2 * 8192**3 / multiply * 1e6,
    }


def torch_quantized(name: str, inputs: dict) -> Callable[[], object] | None:
    """PyTorch's own operator on quantized weights of the same size (private operators, so they may be missing)."""
    x = inputs["x"].reshape(-1, inputs["x"].shape[-1]) if name in ("int8_linear", "int4_linear") else None
    if name == "int8_linear":
        weight, scale = inputs["weight"], inputs["scale"].to(x.dtype)
        return lambda: torch._weight_int8pack_mm(x, weight, scale)
    if name == "int4_linear":
        packed = torch._convert_weight_to_int4pack(inputs["packed"], 8)
        zeros = (8 - inputs["zero"].float()) * inputs["scale"].float()
        qparams = torch.stack((inputs["scale"].float(), zeros), dim=2).to(x.dtype)  # [K / G, N, 2]
        return lambda: torch._weight_int4pack_mm(x, packed, inputs["group_size"], qparams)
    return None


def bench_case(entry: Entry, case_name: str, ceiling: dict[str, float], device: torch.device) -> list[Row]:
    """Our kernel, the library's operator, and PyTorch's quantized one where it runs."""
    generator = torch.Generator(device).manual_seed(0)

    def make_inputs() -> dict:
        return entry.make_inputs(entry.model_cases[case_name], torch.bfloat16, device, generator)

    inputs = make_inputs()
    moved, work = entry.bytes_moved(**inputs), entry.flops(**inputs)
    sets = [inputs] + [make_inputs() for _ in range(min(-(-ROTATE_BYTES // moved), MAX_SETS) - 1)]
    contenders = {"minillm": [lambda i=i: entry.op(**i) for i in sets]}
    if entry.library is not None:
        label, library = entry.library
        contenders[label] = [library(**i) for i in sets]
    try:
        contenders["PyTorch's quantized op"] = [torch_quantized(entry.name, i) for i in sets]
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        print(f"  PyTorch's quantized op cannot do {case_name}: {str(error).splitlines()[0][:100]}")
    rows = []
    for implementation, calls in contenders.items():
        if calls[0] is None:
            continue
        try:
            microseconds, spread = measure(calls)
        except (NotImplementedError, RuntimeError) as error:
            if implementation == "minillm":
                raise
            print(f"  {implementation} cannot do {case_name}: {str(error).splitlines()[0][:100]}")
            continue
        rate = moved / microseconds * 1e6
        shares = (100 * rate / ceiling[f"{kind}_bytes_per_second"] for kind in ("copy", "read"))
        rows.append(Row(entry.name, case_name, implementation, moved, work, microseconds, spread, *shares))
    return rows


def plot_roofline(rows: list[Row], ceiling: dict[str, float], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    bandwidth, peak = ceiling["copy_bytes_per_second"], ceiling["bf16_flops_per_second"]
    intensity = [0.1, peak / bandwidth, 10 * peak / bandwidth]  # flops per byte
    axes.plot(
        intensity, [min(bandwidth * x, peak) / 1e12 for x in intensity], "k-", label="copy bandwidth, bf16 matmul"
    )
    for name in dict.fromkeys(row.kernel for row in rows):
        ours = [row for row in rows if row.kernel == name and row.implementation == "minillm"]
        axes.plot(
            [row.flops / row.bytes for row in ours],
            [row.flops / row.microseconds / 1e6 for row in ours],
            "o", label=name,
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="flops per byte moved", ylabel="Tflop/s", title=title)
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=CATALOG, help="an op of the catalog; repeatable")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for bench_kernels.json and .png")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_kernels measures a GPU, and there is no CUDA device here", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    import triton

    about = {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        **ceilings(device),
    }
    print(json.dumps(about, indent=1))
    print(f"{'kernel':21} {'case':39} {'implementation':23} {'MB':>8} {'us':>9} {'spread':>7} {'copy':>6} {'read':>6}")
    rows = []
    for name in arguments.kernel or CATALOG:
        for case_name in CATALOG[name].model_cases:
            for row in bench_case(CATALOG[name], case_name, about, device):
                rows.append(row)
                print(
                    f"{row.kernel:21} {row.case:39} {row.implementation:23} {row.bytes / 1e6:8.2f} "
                    f"{row.microseconds:9.2f} {100 * row.spread:6.1f}% "
                    f"{row.percent_copy:5.1f}% {row.percent_read:5.1f}%",
                    flush=True,
                )
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = {"about": about, "rows": [asdict(row) for row in rows]}
    (arguments.out / "bench_kernels.json").write_text(json.dumps(report, indent=1) + "\n")
    plot_roofline(rows, about, about["gpu"], arguments.out / "bench_kernels.png")
    print(f"wrote {arguments.out / 'bench_kernels.json'} and bench_kernels.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
