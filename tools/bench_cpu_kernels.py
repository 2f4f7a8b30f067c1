"""How fast the CPU kernels are: any op of the catalog, or the matrix products beside PyTorch's alternatives.

    python tools/bench_cpu_kernels.py --op rms_norm [--case "1 row"] [--dtype bfloat16] [--against ../other-checkout]
    python tools/bench_cpu_kernels.py [--rows 1,5] [--threads 2] [--shapes 2048x2048,11264x2048] [--json FILE]

With --op: microseconds of an eager call at the catalog's model cases, and the GB/s that makes of the bytes it cannot
avoid moving, beside PyTorch's own operator; with --against the same of another checkout of this repository (a
`git worktree` of an older commit, say). Each checkout is a process of its own, they take turns, and the ratio is the
median over the turns, so a busy machine slows both alike.

Without: decoding is bound by reading weights, so the unit is GB/s of weights (scales and zero points included). Every
measurement uses the next of several copies of the weights, together larger than any cache, and the methods
take turns. Median over the rounds; beside it what one row costs against this many. `read` is the ceiling: a sum over
the same bytes.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

CACHE = 160 << 20  # bytes of weights to rotate through

Method = tuple[str, list[tuple], Callable[..., Tensor]]  # name, weights to rotate, product(x, *weights)


def methods(outputs: int, inputs: int) -> list[tuple[torch.dtype, Method]]:
    """(dtype of x, method) for one shape. Values do not matter for speed, as long as they are ordinary numbers."""
    from minillm_kernels.int4_linear import int4_linear
    from minillm_kernels.int8_linear import int8_linear
    from minillm_kernels.linear import linear

    def copies(make: Callable[[], tuple]) -> list[tuple]:
        first = make()
        return [first, *(tuple(t.clone() for t in first) for _ in range(CACHE // size(first)))]

    def dense(dtype):
        return copies(lambda: (torch.randn(outputs, inputs).to(dtype),))

    def int4(group):
        groups = inputs // group
        return copies(
            lambda: (
                torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8),
                torch.rand(outputs, groups).half().t(),  # in the order of memory that a layer on a CPU keeps
                torch.randint(0, 16, (outputs, groups), dtype=torch.uint8).t(),
            )
        )

    fp32, bf16 = dense(torch.float32), dense(torch.bfloat16)
    int8 = copies(lambda: (torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs)))
    int8_bf16_scale = [(weight, scale.bfloat16()) for weight, scale in int8]
    found = [
        (torch.float32, ("fp32 read", fp32, lambda x, w: w.view(-1).view(torch.int32).sum(dtype=torch.int32))),
        (torch.float32, ("fp32 minillm", fp32, linear)),
        (torch.float32, ("fp32 F.linear", fp32, F.linear)),
        (
            torch.float32,
            ("fp32 oneDNN", fp32, lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")),
        ),
        (torch.bfloat16, ("bf16 minillm", bf16, linear)),
        (torch.bfloat16, ("bf16 F.linear", bf16, F.linear)),
        (torch.bfloat16, ("bf16 oneDNN packed", [(packed(w),) for (w,) in bf16], onednn_linear)),
        (torch.bfloat16, ("int8 minillm", int8, int8_linear)),
        (torch.float32, ("int8 minillm, fp32 x", int8, int8_linear)),
        (torch.bfloat16, ("int8 _weight_int8pack_mm", int8_bf16_scale, torch.ops.aten._weight_int8pack_mm)),
    ]
    for group in (32, 128):
        run = lambda x, *w, group=group: int4_linear(x, *w, group)  # noqa: E731
        found.append((torch.bfloat16, (f"int4-g{group} minillm", int4(group), run)))
    if outputs % 16 == 0:
        for group in (32, 128):
            torch_int4 = copies(lambda group=group: torch_int4_weight(outputs, inputs, group))
            run = lambda x, w, s, group=group: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, group, s)  # noqa: E731
            found.append((torch.bfloat16, (f"int4-g{group} _weight_int4pack_mm_for_cpu", torch_int4, run)))
    return found


def packed(weight: Tensor) -> Tensor:
    """oneDNN's own blocked layout, made for one row; hides its bytes, so `size` counts the plain matrix."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def torch_int4_weight(outputs: int, inputs: int, group: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.int32)
    scale_and_zero = torch.rand(inputs // group, outputs, 2).bfloat16()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), scale_and_zero


def size(weights: tuple) -> int:
    return sum(t.numel() * t.element_size() for t in weights)


def measure(found: list[tuple[torch.dtype, Method]], inputs: int, rows: list[int], seconds: float) -> dict:
    """{method: {rows: seconds}}; the methods take turns until the time is up, at least five rounds."""
    times = {(name, r): [] for _, (name, _, _) in found for r in rows}
    x = {(dtype, r): torch.randn(r, inputs).to(dtype) for dtype, _ in found for r in rows}
    turn = {id(weights): itertools.cycle(weights) for _, (_, weights, _) in found}  # shared by the methods of a list
    started, rounds = time.perf_counter(), 0
    with torch.inference_mode():
        while rounds < 5 or time.perf_counter() - started < seconds:
            for dtype, (name, weights, product) in found:
                for r in rows:
                    for call in range(4):
                        arguments = next(turn[id(weights)])
                        begin = time.perf_counter()
                        product(x[dtype, r], *arguments)
                        if call:  # the first after another method is slower, for every method
                            times[name, r].append(time.perf_counter() - begin)
            rounds += 1
    return {name: {r: statistics.median(times[name, r]) for r in rows} for _, (name, _, _) in found}


# ---- any op of the catalog ----

TURN = 0.05  # seconds a checkout or PyTorch times a case before it is another's turn


def work(threads: int) -> None:
    """Times cases for another process: a line `[op, case, dtype, PyTorch's or ours]` in, `[seconds, bytes]` out."""
    from catalog import CATALOG

    torch.set_num_threads(threads)
    calls = {}
    for line in sys.stdin:
        key = name, case, dtype, library = tuple(json.loads(line))
        entry = CATALOG.get(name)
        if entry is None or case not in entry.model_cases or (library and entry.library is None):
            print("null", flush=True)
            continue
        if key not in calls:
            calls = {key: catalog_calls(entry, entry.model_cases[case], getattr(torch, dtype), library)}
        rotating, moved = calls[key]
        seconds = timed(rotating)
        print(json.dumps(seconds and [seconds, moved]), flush=True)


def catalog_calls(entry, case: dict, dtype: torch.dtype, library: bool) -> tuple[list[Callable], int]:
    """Calls at this case to rotate through, with inputs that together are larger than any cache or at least many."""
    generator = torch.Generator().manual_seed(0)
    inputs = [entry.make_inputs(case, dtype, torch.device("cpu"), generator)]
    moved = entry.bytes_moved(**inputs[0])
    copies = min(CACHE // moved, 16)
    inputs += [entry.make_inputs(case, dtype, torch.device("cpu"), generator) for _ in range(copies)]
    if not library:
        return [lambda one=one: entry.op(**one) for one in inputs], moved
    return [call for one in inputs if (call := entry.library[1](**one)) is not None], moved


def timed(rotating: list[Callable]) -> float | None:
    """Median seconds of a call."""
    times, started = [], time.perf_counter()
    with torch.inference_mode():
        while rotating and (len(times) < 4 or time.perf_counter() - started < TURN):
            call = rotating[len(times) % len(rotating)]
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(times) if times else None


def bench_ops(options: argparse.Namespace) -> None:
    checkouts = [ROOT, *([Path(options.against).resolve()] if options.against else [])]
    workers = []
    for checkout in checkouts:
        path = os.pathsep.join(str(checkout / folder) for folder in ("kernels", "tests"))
        command = [sys.executable, __file__, "--work", "--threads", str(options.threads)]
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers.append(subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path}, **pipe))

    def ask(worker: subprocess.Popen, *question) -> tuple[float, int] | None:
        worker.stdin.write(json.dumps(question) + "\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    sys.path.insert(0, str(ROOT / "tests"))
    from catalog import CATALOG

    unknown = set(options.op) - set(CATALOG)
    if unknown:
        raise SystemExit(f"the catalog has no {', '.join(unknown)}; it has {', '.join(CATALOG)}")
    head = f"{'op':21} {'case':36} {'us':>9} {'GB/s':>7} {'PyTorch, us':>12}"
    print(head + (f" {'against, us':>12} {'ratio':>6}" if options.against else ""))
    for name, case in ((op, case) for op in options.op for case in CATALOG[op].model_cases):
        if not re.search(options.case, case):
            continue
        ours, library, theirs, started = [], [], [], time.perf_counter()
        while len(ours) < 5 or time.perf_counter() - started < options.seconds:
            ours.append(ask(workers[0], name, case, options.dtype, False))
            theirs += [ask(worker, name, case, options.dtype, False) for worker in workers[1:]]
        library = [ask(workers[0], name, case, options.dtype, True) for _ in range(5)]
        seconds, moved = statistics.median(one[0] for one in ours), ours[0][1]
        line = f"{name:21} {case:36} {1e6 * seconds:9.2f} {moved / seconds / 1e9:7.1f}"
        line += f" {microseconds(library):>12}"
        if theirs and theirs[0] is not None:
            ratio = statistics.median(other[0] / one[0] for one, other in zip(ours, theirs, strict=True))
            line += f" {microseconds(theirs):>12} {ratio:5.2f}x"
        print(line, flush=True)
    for worker in workers:
        worker.stdin.close()
        worker.wait()


def microseconds(answers: list) -> str:
    return "-" if answers[0] is None else f"{1e6 * statistics.median(one[0] for one in answers):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", action="append", help="an op of the catalog; repeatable")
    parser.add_argument("--case", default="", help="with --op: only cases whose name matches this expression")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="with --op")
    parser.add_argument("--against", help="with --op: a second checkout to time, turn by turn")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rows", default="1,5")
    parser.add_argument("--shapes", default="2048x2048,11264x2048,2048x5632", help="OUTPUTSxINPUTS, comma separated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="per shape or case")
    parser.add_argument("--only", default="", help="only methods whose name matches this expression")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    if options.work:
        return work(options.threads)
    if options.op:
        return bench_ops(options)
    torch.set_num_threads(options.threads)
    rows = [int(word) for word in options.rows.split(",")]
    results = []
    for shape in options.shapes.split(","):
        outputs, inputs = map(int, shape.split("x"))
        found = [m for m in methods(outputs, inputs) if re.search(options.only, m[1][0])]
        times = measure(found, inputs, rows, options.seconds)
        print(f"\n{shape}, {options.threads} threads, torch {torch.__version__}: GB/s of weights read")
        print(f"{'':36}" + "".join(f"{f'{r} rows':>10}" for r in rows) + f"{'cost':>8}")
        for _, (name, weights, _) in found:
            speeds = {r: size(weights[0]) / seconds / 1e9 for r, seconds in times[name].items()}
            cost = times[name][rows[-1]] / times[name][rows[0]]
            print(f"{name:36}" + "".join(f"{speed:10.1f}" for speed in speeds.values()) + f"{cost:7.2f}x")
            results.append({"shape": shape, "method": name, "threads": options.threads, "GB/s": speeds})
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
