"""Compile every Triton kernel for GPUs this machine does not have, and print what it would use there.

    python tools/crosscompile.py                                   # everything, sm_80, sm_90, sm_100
    python tools/crosscompile.py --kernel decode_attention --chip 90
    python tools/crosscompile.py --kernel int4_linear --chip 90 --dtype bfloat16 --count   # instructions per weight

Nothing is described twice: the op's own CUDA implementation runs on fake CUDA tensors of each model's shapes,
and whatever it launches is recorded with the types, constants and divisibility hints Triton would have
seen, then compiled for the target. A stack frame means spilled registers. The exit status is 1 if anything
spills, needs more shared memory than its chips have, or if a row of the launch table was never used.
"""

import argparse
import contextlib
import importlib
import itertools
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from catalog import CATALOG
from catalog.entry import Entry
from minillm_kernels import gpu, launch

CHIPS = (80, 90, 100)
SHARED_LIMIT = {80: 163, 90: 227, 100: 227}  # KiB one block may have
SMALLEST_SHARED_LIMIT = 99  # KiB, consumer chips: what a row that names no chips has to live with
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Specialization:
    """One kernel as Triton would compile it for one launch."""

    kernel: JITFunction
    signature: tuple  # ((argument, type), ...)
    constants: tuple  # ((argument, value), ...)
    options: tuple  # (("num_warps", 4), ...)
    aligned: tuple  # indices of arguments divisible by 16
    row: launch.Launch = field(compare=False)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass(frozen=True)
class Usage:
    registers: int
    stack: int  # bytes of local memory per thread; not zero means spills
    shared: int  # bytes


@contextlib.contextmanager
def recording(chip: int) -> Iterator[list[tuple[JITFunction, tuple, dict, launch.Launch]]]:
    """While this lasts tensors are fake and nothing runs on them: yields a list of (kernel, arguments, keywords, row of
    the launch table), for everything that is launched, as on this chip."""
    launches, rows = [], []

    def record_row(row: launch.Launch) -> dict:
        rows.append(row)
        return row.blocks | row.options()

    def record_launch(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, args, kwargs, rows[-1]))

    with (
        mock.patch.object(JITFunction, "run", record_launch),
        mock.patch.object(launch.Launch, "arguments", record_row),
        mock.patch.object(launch, "architecture", return_value=chip),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        FakeTensorMode(),
    ):
        yield launches


def recorded_launches(entry: Entry, case: dict, dtype: torch.dtype, chip: int) -> list[Specialization]:
    """What the op's CUDA implementation launches for this case on this chip, without running any of it."""
    if not entry.is_node:
        return []
    inputs = entry.make_inputs(case, dtype, torch.device("meta"), None)
    with recording(chip) as launches:
        entry.op.implementation(**{name: on_fake_cuda(value) for name, value in inputs.items()})
    return [specialize(*one) for one in launches]


def entry_points() -> set[str]:
    """The names of all kernels under gpu/: by convention they end in `_kernel`, what they call does not."""
    modules = [importlib.import_module(f"{gpu.__name__}.{found.name}") for found in pkgutil.iter_modules(gpu.__path__)]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }


def cache_keys(launches: list[tuple], chip: int) -> dict[str, set[str]]:
    """kernel -> the keys under which Triton would look up what was recorded: as many as it would compile."""
    backend, binders, keys = make_backend(GPUTarget("cuda", chip, 32)), {}, {}
    for kernel, args, kwargs, _ in launches:
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        # A fake tensor has no address; an empty one has one that is aligned, as the allocator's are.
        args = [torch.empty(0, dtype=x.dtype) if isinstance(x, torch.Tensor) else x for x in args]
        _, specialization, options = binders[kernel](*args, **kwargs)
        keys.setdefault(kernel.fn.__name__, set()).add(repr((specialization, options)))
    return keys


def on_fake_cuda(value):
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")


def specialize(kernel: JITFunction, args: tuple, kwargs: dict, row: launch.Launch) -> Specialization:
    """Types, constants and hints as Triton derives them at a launch: 1 and None become constants, pointers
    and integers divisible by 16 are said to be."""
    names = [parameter.name for parameter in kernel.params]
    bound = dict(zip(names, args, strict=False))
    options = {name: value for name, value in kwargs.items() if name not in names}
    bound |= {name: value for name, value in kwargs.items() if name in names}
    signature, constants, aligned = {}, {}, []
    for index, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            aligned.append(index)  # the allocator aligns to 512 bytes
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(index)
    pairs = (tuple(d.items()) for d in (signature, constants, options))
    return Specialization(kernel, *pairs, tuple(aligned), row)


def compiled(spec: Specialization, chip: int):
    """What Triton makes of it for that chip; taken from Triton's own cache where it has it."""
    source = ASTSource(
        spec.kernel,
        dict(spec.signature),
        constexprs=dict(spec.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in spec.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=dict(spec.options))


def read_binary(binary, tool: str, *flags: str) -> str:
    """What one of NVIDIA's tools prints of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        command = [NVIDIA_TOOLS / tool, *flags, cubin.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_for(spec: Specialization, chip: int) -> Usage:
    binary = compiled(spec, chip)
    used = dict(re.findall(r"(REG|STACK):(\d+)", read_binary(binary, "cuobjdump", "-res-usage")))
    return Usage(int(used["REG"]), int(used["STACK"]), binary.metadata.shared)


def instructions(spec: Specialization, chip: int, turns: int = 1) -> Counter[str]:
    """How often a warp runs each instruction of the machine code (SASS), by its name, where every loop is run through
    `turns` times. Nothing is skipped: a branch not taken counts as well."""
    names, labels, loops = [], {}, []
    for line in read_binary(compiled(spec, chip), "nvdisasm", "-c").splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(names)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);", line):
            target = re.search(r"`\((\.L_x_\d+)\)", code[2])
            # Back to itself: the trap behind the end. Everything else that goes back is a loop.
            if code[1].startswith("BRA") and target and labels.get(target[1], len(names)) < len(names):
                loops.append((labels[target[1]], len(names)))
            if code[1] != "NOP":
                names.append(code[1])
    found = Counter(names)
    for first, last in loops:
        found.update({name: (turns - 1) * count for name, count in Counter(names[first : last + 1]).items()})
    return found


def per_weight(spec: Specialization, chip: int) -> tuple[float, Counter[str]] | None:
    """Instructions of a thread per weight of a product with one row, and their names; None for any other kernel."""
    constants = dict(spec.constants)
    if spec.name not in ("gemv_kernel", "int4_gemv_kernel"):
        return None
    block = constants.get("BLOCK_K") or constants["GROUPS"] * constants["GROUP"]
    found = instructions(spec, chip, turns=-(-constants["K"] // block))
    weights = 4 * constants["K"] / (32 * dict(spec.options)["num_warps"])  # four rows of the weight a program
    return sum(found.values()) / weights, found


def problems(spec: Specialization, usage: Usage, chip: int) -> list[str]:
    limit = SMALLEST_SHARED_LIMIT if spec.row.chips is None else SHARED_LIMIT[chip]
    found = []
    if usage.stack > 0:
        found.append(f"SPILLS {usage.stack} bytes per thread")
    if usage.shared > limit * 1024:
        found.append(f"SHARED MEMORY over {limit} KiB")
    return found


def describe(spec: Specialization) -> str:
    constants = dict(spec.constants)
    shown = [name for name in constants if name.startswith("BLOCK_") or name == "GROUPS"]
    blocks = " ".join(f"{name}={constants[name]}" for name in shown)
    options = dict(spec.options)
    return f"{blocks} warps={options['num_warps']} stages={options.get('num_stages', '-')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=CATALOG, help="an op of the catalog; repeatable")
    parser.add_argument("--chip", action="append", type=int, choices=CHIPS, help="80, 90 or 100; repeatable")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default: both; repeatable")
    parser.add_argument("--count", action="store_true", help="also count instructions per weight")
    arguments = parser.parse_args()
    chips, dtypes = arguments.chip or CHIPS, arguments.dtype or DTYPES

    print(f"Triton {triton.__version__}")
    failures, seen, rows_used = 0, set(), set()
    cases = [(name, *case) for name in arguments.kernel or CATALOG for case in CATALOG[name].model_cases.items()]
    for (name, case_name, case), dtype in itertools.product(cases, dtypes):
        print(f"{name}, {dtype}: {case_name}")
        for chip in chips:
            for spec in recorded_launches(CATALOG[name], case, DTYPES[dtype], chip):
                rows_used.add(id(spec.row))
                if (spec, chip) in seen:
                    continue
                seen.add((spec, chip))
                usage = compile_for(spec, chip)
                found = problems(spec, usage, chip)
                failures += len(found)
                counted = per_weight(spec, chip) if arguments.count else None
                if counted is not None:
                    found.append(f"{counted[0]:.2f} instructions per weight")
                print(
                    f"  {spec.name:28} sm_{chip:<4} {usage.registers:4} registers "
                    f"{usage.shared / 1024:6.1f} KiB shared  {describe(spec)}  {' '.join(found)}",
                    flush=True,
                )
    if arguments == parser.parse_args([]):
        for name, rows in launch.TABLE.items():
            unused = [index for index, row in enumerate(rows) if id(row) not in rows_used]
            if unused:
                print(f"UNUSED: rows {unused} of launch.TABLE[{name!r}] serve no model case of the catalog")
            failures += len(unused)
    print(f"{len(seen)} compiled, {failures} problems")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
