"""An accelerator that is not there: tensors that say they are on "cuda:0" and lie in the CPU's memory.

`Accelerator` is a dispatch mode: every operator on such tensors is run on what lies behind them. So the runtime takes
the ways it takes on a GPU (bursts of steps, no look at values, captured steps) and computes real numbers, and the mode
sees all that a GPU would see: each reading back by the host, each operator of a step. `Graph` stands in for a CUDA
graph: it keeps the operators of a captured step with the tensors they were called with, as a real one keeps
addresses, and replays just these.
"""

import contextlib
import traceback
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "bincount"}


class OnDevice(torch.Tensor):
    """A tensor on the accelerator; `inner` is where it really lies."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device):
        with torch.inference_mode(False):  # a view of a tensor from outside the mode cannot be an inference tensor
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="meta"
            )
        made.inner, made.where = inner, device
        return made

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), keywords=None):
        x = arguments[0] if arguments else None
        name = getattr(function, "__name__", "")
        if name == "__get__" and isinstance(x, cls):
            # properties: of the device that this tensor pretends to be on
            described = getattr(function.__self__, "__name__", "")
            told = {"device": x.where, "is_cuda": x.where.type == "cuda", "is_cpu": False, "is_meta": False}
            if described in told:
                return told[described]
        if name == "data_ptr" and isinstance(x, cls):
            return x.inner.data_ptr()
        if name in ("tolist", "numpy", "cpu", "pin_memory", "__bool__", "__int__", "__float__", "item") and isinstance(
            x, cls
        ):
            if name == "pin_memory":
                return x
            Accelerator.current.read(name)
            found = x.inner.clone()
            return found if name == "cpu" else getattr(found, name)()
        return super().__torch_function__(function, types, arguments, keywords or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return Accelerator.current.run(function, arguments, keywords or {})


class _WithIndex(TorchFunctionMode):
    """ "cuda" is "cuda:0": PyTorch would ask a driver which one it is."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        def named(x):
            without = (isinstance(x, str) and x == "cuda") or (
                isinstance(x, torch.device) and x == torch.device("cuda")
            )
            return self.device if without else x

        keywords = {key: named(value) for key, value in (keywords or {}).items()}
        if function is torch.tensor and keywords.get("device") == self.device:  # which dispatches nothing
            return torch.tensor(*arguments, **keywords | {"device": "cpu"}).to(self.device)
        return function(*map(named, arguments), **keywords)


class Accelerator(TorchDispatchMode):
    """While this lasts "cuda" is there. `reads` lists what the host read back: the operator and the line that asked."""

    current: "Accelerator | None" = None

    def __init__(self, index: int = 0):
        super().__init__()
        self.device = torch.device("cuda", index)
        self.reads: list[str] = []
        self.uploads: list[str] = []
        self.tape: list | None = None  # of the step that is being captured
        self.graphs: list[Graph] = []
        self.fail_capture = False

    # ---- being there ----

    def __enter__(self):
        Accelerator.current = self
        self._patches = contextlib.ExitStack()
        for target, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "device", lambda device: contextlib.nullcontext()),
            (torch.cuda, "Stream", Stream),
            (torch.cuda, "current_stream", Stream),
            (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
            (torch.cuda, "CUDAGraph", Graph),
            (torch.cuda, "graph", lambda graph, capture_error_mode: graph.capturing()),
            (torch.Tensor, "pin_memory", lambda tensor: tensor),
        ):
            self._patches.enter_context(mock.patch.object(target, name, value))
        self._patches.enter_context(_WithIndex(self.device))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        Accelerator.current = None
        return super().__exit__(*error)

    def put(self, tensor: torch.Tensor) -> OnDevice:
        return OnDevice(tensor, self.device)

    def move(self, module: torch.nn.Module) -> torch.nn.Module:
        """A module whose weights lie on the accelerator."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = self.put(parameter.detach())
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = self.put(buffer)
        return module

    # ---- running operators ----

    def read(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/minillm/" in f.filename and "/tests/" not in f.filename]
        where = f"{frames[-1].filename.rsplit('/', 1)[1]}:{frames[-1].lineno}" if frames else "a test"
        self.reads.append(f"{what} in {where}")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return self.run(function, arguments, keywords or {})

    def run(self, function, arguments, keywords):
        name = function._schema.name.split("::")[1]
        ours = [x for x in tree_leaves((arguments, keywords)) if isinstance(x, OnDevice)]
        wanted = keywords.get("device")
        to_us = wanted is not None and torch.device(wanted).type == "cuda"
        if wanted is not None:
            keywords = {**keywords, "device": torch.device("cpu")}
        if name in READS and ours:
            self.read(name)
        leaving = bool(ours) and wanted is not None and not to_us
        if leaving:
            self.read(name)
        if name == "_to_copy" and to_us and not ours:
            self.uploads.append(name)
        keywords.pop("pin_memory", None)

        def inner(x):
            return x.inner if isinstance(x, OnDevice) else x

        plain_arguments, plain_keywords = tree_map(inner, (arguments, keywords))
        result = function(*plain_arguments, **plain_keywords)
        if leaving or not (ours or to_us):
            return result
        out = keywords.get("out")
        mutated = [
            a
            for a, s in zip(arguments, function._schema.arguments, strict=False)
            if s.alias_info and s.alias_info.is_write
        ]
        if out is not None:
            returned = out
        elif mutated and function._schema.returns and function._schema.returns[0].alias_info:  # x.add_(...) is x
            returned = mutated[0]
        else:
            returned = tree_map(lambda x: self.put(x) if isinstance(x, torch.Tensor) else x, result)
        if self.tape is not None:
            self.tape.append((function, plain_arguments, plain_keywords, result))
        return returned


class Stream:
    """Everything runs at once: there is nothing to wait for."""

    def wait_stream(self, other: "Stream") -> None:
        pass


class Graph:
    """A CUDA graph: the operators of a step and the very tensors they read and write."""

    def __init__(self):
        self.accelerator, self.tape, self.replays = Accelerator.current, [], 0

    @contextlib.contextmanager
    def capturing(self):
        if self.accelerator.fail_capture:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.accelerator.tape, before = self.tape, len(self.accelerator.reads)
        try:
            yield
        finally:
            self.accelerator.tape = None
        if self.accelerator.reads[before:]:
            raise RuntimeError(f"CUDA error: a captured step reads back: {self.accelerator.reads[before:]}")
        self.accelerator.graphs.append(self)

    def replay(self) -> None:
        self.replays += 1
        for function, arguments, keywords, result in self.tape:
            again = function(*arguments, **keywords)
            for old, new in zip(
                torch.utils._pytree.tree_leaves(result), torch.utils._pytree.tree_leaves(again), strict=True
            ):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
