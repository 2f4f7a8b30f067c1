"""Compile every Triton kernel for GPUs this machine does not have, and print what it would use there.

    python tools/crosscompile.py                                   # everything, sm_80, sm_90, sm_100
    python tools/crosscompile.py --kernel decode_attention --chip 90

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
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

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


def recorded_launches(entry: Entry, case: dict, dtype: torch.dtype, chip: int) -> list[Specialization]:
    """What the op's CUDA implementation launches for this case on this chip, without running any of it."""
    launches, rows = [], []

    def record_row(row: launch.Launch) -> dict:
        rows.append(row)
        return row.blocks | row.options()

    def record_launch(kernel, *args, grid, warmup, **kwargs):
        launches.append(specialize(kernel, args, kwargs, rows[-1]))

    inputs = entry.make_inputs(case, dtype, torch.device("meta"), None)
    with (
        mock.patch.object(JITFunction, "run", record_launch),
        mock.patch.object(launch.Launch, "arguments", record_row),
        mock.patch.object(launch, "architecture", return_value=chip),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        FakeTensorMode(),
    ):
        if entry.is_node:
            entry.op.implementation(**{name: on_fake_cuda(value) for name, value in inputs.items()})
    return launches


def entry_points() -> set[str]:
    """The names of all kernels under gpu/: by convention they end in `_kernel`, what they call does not."""
    modules = [importlib.import_module(f"{gpu.__name__}.{found.name}") for found in pkgutil.iter_modules(gpu.__path__)]
    return {
        name
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }


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


def compile_for(spec: Specialization, chip: int) -> Usage:
    source = ASTSource(
        spec.kernel,
        dict(spec.signature),
        constexprs=dict(spec.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in spec.aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=dict(spec.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        command = [NVIDIA_TOOLS / "cuobjdump", "-res-usage", cubin.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"(REG|STACK):(\d+)", report))
    return Usage(int(used["REG"]), int(used["STACK"]), binary.metadata.shared)


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
