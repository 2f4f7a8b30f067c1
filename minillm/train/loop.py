"""The training loop: rows, loss, optimizer, and one file from which a run goes on where it was stopped."""

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minillm.errors import NumericalError, RequestError, first_line
from minillm.model import Decoder
from minillm.train.documents import Documents
from minillm.train.loss import NEXT_TOKEN, Objective, ScoredLoss
from minillm.train.optimizer import Optimizer, learning_rate_factor
from minillm.train.packing import Rows, check_ids


@dataclass(frozen=True)
class Recipe:
    """All that decides, with the documents and the weights to begin with, which weights a run ends in."""

    steps: int  # of the optimizer
    length: int  # tokens of a row; longer documents are cut
    rows: int  # of an optimizer step,
    rows_at_once: int  # and of a forward pass: divides `rows`
    learning_rate: float
    muon_learning_rate: float | None = None
    weight_decay: float = 0.1
    warmup: float = 0.05  # of all steps
    max_norm: float = 1.0
    bfloat16: bool = True
    recompute: bool = False
    compile: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "length", "rows", "rows_at_once"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be 1 or more, not {getattr(self, name)}")
        if self.rows % self.rows_at_once:
            raise RequestError(f"rows_at_once {self.rows_at_once} must divide the {self.rows} rows of a step")


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    number: int  # 1, 2, ...
    epoch: float  # how often the documents had been read after it
    loss: float  # nats per scored token, before it
    scored: int
    gradient_norm: float
    seconds: float


class Training:
    """One run: iterate over it to train, step by step.

        for step in Training(model, documents, recipe, state=Path("state.pt")):
            print(step.number, step.loss)

    Args:
        model: the decoder, built with `attention=PACKED`; what of it requires a gradient, float32, is trained.
        state: the file that is written every `save_every` seconds and after the last step, and read if it is there.
            Killed at any moment, the same call goes on and, on a CPU with as many threads, ends in the same bits.
        objective: what is learned; by default to predict the next token.

    Raises `RequestError` if the state is that of another run, or cannot be written; `NumericalError` when the loss is
    no longer a number.
    """

    def __init__(
        self,
        model: Decoder,
        documents: Documents,
        recipe: Recipe,
        state: Path | None = None,
        save_every: float = 120.0,
        objective: Objective = NEXT_TOKEN,
    ):
        check_ids(documents, model.config.vocab_size)
        if model.embedding.weight.dtype != torch.float32 and not recipe.bfloat16:
            raise RequestError(f"weights in {model.embedding.weight.dtype} need bfloat16=True, or load them as float32")
        self.model, self.recipe, self.state, self.save_every = model.train(), recipe, state, save_every
        self.loss = ScoredLoss(
            model, recipe.length, recipe.bfloat16, recipe.recompute, recipe.compile, objective=objective
        )
        self.optimizer = Optimizer(
            model, recipe.learning_rate, recipe.muon_learning_rate, recipe.weight_decay, max_norm=recipe.max_norm
        )
        self.rows = Rows(documents, recipe.length, recipe.seed)
        self.step = 0  # optimizer steps done
        self.log: list[tuple[float, float]] = []  # of each: loss, seconds
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._run = asdict(recipe) | {"documents": documents.digest}
        self._run["parameters"] = {name: list(parameter.shape) for name, parameter in self._trained.items()}
        if state is not None and state.exists():
            self._load(state)

    def __iter__(self) -> Iterator[Step]:
        saved = time.monotonic()
        while self.step < self.recipe.steps:
            step = self._take_step()
            if self.state is not None and (
                time.monotonic() - saved >= self.save_every or self.step == self.recipe.steps
            ):
                self.save()
                saved = time.monotonic()
            yield step

    def _take_step(self) -> Step:
        began, recipe = time.perf_counter(), self.recipe
        batch = self.rows.next(recipe.rows)
        scored, nats = int(batch.scored.sum()), 0.0
        for start in range(0, recipe.rows, recipe.rows_at_once):
            part = batch.rows(start, start + recipe.rows_at_once).to(self.loss.device)
            nats += self.loss.backward(part, 1 / max(1, scored))
        if not nats < float("inf"):
            raise NumericalError(f"step {self.step + 1}: the loss is {nats}; lower learning_rate, and start anew")
        warmup = round(recipe.warmup * recipe.steps)
        norm = self.optimizer.step(learning_rate_factor(self.step, recipe.steps, warmup))
        self.step += 1
        epoch = self.rows.epoch + self.rows.cursor / len(self.rows.order)
        step = Step(self.step, epoch, nats / max(1, scored), scored, norm, time.perf_counter() - began)
        self.log.append((step.loss, step.seconds))
        return step

    def save(self) -> None:
        """Write the state file: all of it, on the disk, or the one that was there stays."""
        part = self.state.with_name(self.state.name + ".part")
        content = {
            "run": self._run,
            "step": self.step,
            "log": self.log,
            "rows": (self.rows.epoch, self.rows.cursor),
            "weights": {name: parameter.detach() for name, parameter in self._trained.items()},
            "optimizer": self.optimizer.state_dict(),
        }
        try:
            with part.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.state)
        except (OSError, RuntimeError) as error:  # of a full disk either
            part.unlink(missing_ok=True)
            raise RequestError(
                f"{self.state} cannot be written ({first_line(error)}); the state before it is untouched: make room "
                "and give the same command again"
            ) from error

    def _load(self, state: Path) -> None:
        try:
            content = torch.load(state, map_location="cpu", weights_only=True)
            run = content["run"]
        except Exception as error:  # whatever a file that is no state makes of it
            raise RequestError(f"{state} is no state of a training run: {first_line(error)}") from None
        for key, value in self._run.items():
            if run.get(key) != value:
                said = "" if key in ("documents", "parameters") else f" {run.get(key)!r}, not {value!r}"
                raise RequestError(
                    f"{state} is the state of another run ({key}{said}): give the same, or another place"
                )
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(content["weights"][name])
        self.optimizer.load_state_dict(content["optimizer"])
        self.rows.start(*content["rows"])
        self.step, self.log = content["step"], content["log"]
