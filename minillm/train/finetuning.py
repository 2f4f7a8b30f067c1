"""Fine-tuning from a checkpoint to a checkpoint: what `minillm finetune` calls."""

import dataclasses
import json
import math
import os
import re
import shlex
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minillm import __version__
from minillm.errors import CheckpointError, RequestError, first_line
from minillm.load.checkpoint import load_decoder
from minillm.load.config_json import generation_defaults, load_config
from minillm.load.files import read_json
from minillm.load.hub import HUB_PATTERNS, find_checkpoint
from minillm.load.placement import choose_device, choose_dtype
from minillm.load.tokenizer import load_tokenizer
from minillm.load.writing import check_new_folder, copy_small_files, new_folder, write_decoder
from minillm.model import Decoder
from minillm.progress import progress_bar
from minillm.train.attention import PACKED
from minillm.train.data import tokenized
from minillm.train.loop import Recipe, Training
from minillm.train.lora import add_lora, save_adapter
from minillm.train.packing import Rows

_LEARNING_RATE, _LORA_LEARNING_RATE = 2e-5, 2e-4


@dataclass(frozen=True)
class Options:
    """How to fine-tune; each is a flag of `minillm finetune`, where `help` says what it means."""

    steps: int | None = None  # of the optimizer; or
    epochs: float | None = None  # how often the data is read (default: once); or
    minutes: float | None = None  # as many steps as take about so long, by the speed of one that is tried first
    lora: int | None = None  # rank: an adapter is trained, and written as PEFT does, not all weights
    quantize: str | None = None  # what the adapter stands beside
    max_length: int | None = None  # tokens of a row, and of a conversation; default: 2048, or the model's positions
    rows: int = 8  # of an optimizer step; an epoch of fewer is a step
    rows_at_once: int = 1  # and of a forward pass; divides `rows`
    learning_rate: float | None = None
    held_out: float | str | Path = 0.05  # a share, or a file or folder; never learned
    seed: int = 0
    bf16: bool = True  # matrix products in bfloat16; weights and optimizer are float32
    compile: bool = False
    recompute: bool = False  # activations, to save memory
    device: str = "auto"
    revision: str | None = None
    local_files_only: bool = False

    def __post_init__(self):
        if sum(value is not None for value in (self.steps, self.epochs, self.minutes)) > 1:
            raise RequestError("steps, epochs and minutes each say how long: give one of them")
        if self.quantize is not None and self.lora is None:
            raise RequestError("quantized weights cannot be trained, only an adapter beside them: give lora=16")
        for name in ("steps", "epochs", "minutes", "lora", "max_length", "rows", "rows_at_once", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise RequestError(f"{name} must be above 0, not {value}")
        if self.rows % self.rows_at_once:
            raise RequestError(f"rows_at_once {self.rows_at_once} must divide the {self.rows} rows of a step")

    def flags(self) -> list[str]:
        """The command line's words for what is not the default."""
        words = []
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), f"--{field.name.replace('_', '-')}"
            if isinstance(value, bool):
                words += [flag if value else f"--no-{field.name}"] * (value != field.default)
            elif value != field.default:
                words += [flag, str(value)]
        return words


@dataclass(frozen=True)
class Finetuned:
    """What a run did."""

    command: str
    steps: int
    epochs: float
    tokens: int  # of documents, read and read again
    seconds: float  # of the steps
    filled: float  # share of the rows' tokens that are of documents; the rest is computed for nothing
    losses: list[float]  # of each step, nats per scored token
    learned: int  # documents
    scored: int  # tokens of theirs
    before: float | None  # bits per byte of the text that was held out, by the weights to begin with,
    after: float | None  # and by those that were written

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def as_text(self) -> str:
        minutes = f"{self.seconds / 60:.1f} minutes, {self.tokens_per_second:,.0f} tokens/s"
        lines = [
            f"learned     {self.learned:,} documents, {self.scored:,} scored tokens; rows {self.filled:.1%} full",
            f"steps       {self.steps:,} ({self.epochs:.2f} epochs) in {minutes}",
            f"loss        {self.losses[0]:.4f} in the first step, {self.losses[-1]:.4f} in the last (nats per token)",
        ]
        if self.before is not None:
            lines.append(f"held out    {self.before:.4f} bits per byte before, {self.after:.4f} after")
        return "\n".join(lines)


def finetune(model: str | Path, data: str | Path, out: str | Path, **options: Any) -> Finetuned:
    """Train a checkpoint further on `data` (see data.py), and write the result into the new folder `out`.

    Everything that a run holds on to lies in `out`.partial until `out` is there: killed at any moment, the same call
    goes on, and ends in the same bits on a CPU with as many threads.

    Args:
        model: "demo", a folder or a Hub id.
        options: the fields of `Options`.

    Raises a `MinillmError` that names the file and line, option or value at fault.
    """
    data, out = Path(data), Path(out)
    known = [field.name for field in dataclasses.fields(Options)]
    if unknown := sorted(options.keys() - {*known}):
        raise RequestError(f"unknown option {unknown[0]!r}; there are {', '.join(known)}")
    return _Run(str(model), data, out, Options(**options)).finish()


class _Run:
    """One call, and the folder from which it goes on."""

    def __init__(self, model: str, data: Path, out: Path, options: Options):
        check_new_folder(Path(os.path.abspath(out)))
        self.model_name, self.out, self.options = model, out, options
        self.command = shlex.join(["minillm", "finetune", model, str(data), str(out), *options.flags()])
        self.source = find_checkpoint(model, options.revision, local_files_only=options.local_files_only)
        self.config = load_config(self.source)
        if self.config.quantization is not None and options.lora is None:
            raise CheckpointError(f"{self.source} is quantized: fine-tune what it was made from, or give lora=16")
        self.tokenizer = load_tokenizer(self.source)
        length = options.max_length or min(2048, self.config.max_positions)
        if length > self.config.max_positions:
            raise RequestError(f"max_length {length} is over the model's {self.config.max_positions} positions")
        self.partial, self.notes = out.with_name(out.name + ".partial"), {}
        self.notes = self._resumed()

        ends = generation_defaults(self.source, self.config, self.tokenizer.eos_token_id).eos_token_id
        described_by = [path for name in HUB_PATTERNS if (path := self.source / name).suffix in (".json", ".jinja")]
        self.learned, self.held_out = tokenized(
            data, _held_out(options.held_out), options.seed, length, self.tokenizer, ends,
            [path for path in described_by if path.exists()], self.partial,
        )  # fmt: skip
        digests = [part.digest for part in (self.learned, self.held_out) if part is not None]
        if self.notes.setdefault("documents", digests) != digests:
            raise RequestError(
                f"{data} is not what it was when the run in {self.partial} began: remove that folder to begin anew"
            )
        self.tokens = len(self.learned.ids) - len(self.learned)  # the last of each is a label only
        self.length = min(length, self.tokens)
        epoch = len(Rows(self.learned, self.length, options.seed).order)
        at_once = options.rows_at_once
        self.rows = options.rows if epoch >= options.rows else max(at_once, epoch // at_once * at_once)
        self.filled = self.tokens / (epoch * self.length)
        self.epoch_steps = epoch / self.rows

    # --- what lies beside the result ---

    def _resumed(self) -> dict[str, Any]:
        """What is known of the run that began in the folder; {"command": ...} of a new one."""
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            empty = not {path.name for path in self.partial.iterdir()} - {"run.json.part"}
        except OSError as error:
            raise RequestError(f"{self.partial} cannot be made: {first_line(error)}") from None
        if empty:
            self._note(command=self.command)
            return self.notes
        if not (self.partial / "run.json").exists():
            raise RequestError(f"{self.partial} exists and holds no run of minillm: name another place")
        notes = read_json(self.partial / "run.json", RequestError)
        if "steps" not in notes:  # it has not begun to learn: nothing is lost
            notes = {"command": self.command}
        if notes.get("command") != self.command:
            raise RequestError(
                f"{self.partial} holds another run, {notes.get('command')!r}: give that command to go on, remove "
                "the folder, or name another place"
            )
        return notes

    def _clear(self) -> None:
        """Remove what a run needs, and nothing that somebody else put beside it."""
        for pattern in ("run.json*", "state.pt*", "learned-*.safetensors*", "held-out-*.safetensors*"):
            for path in self.partial.glob(pattern):
                path.unlink()
        if not any(self.partial.iterdir()):
            self.partial.rmdir()

    def _note(self, **facts: Any) -> None:
        self.notes |= facts
        part = self.partial / "run.json.part"
        with self._writing():
            part.write_text(json.dumps(self.notes, indent=2) + "\n", encoding="utf-8")
            part.replace(self.partial / "run.json")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RequestError(
                f"{self.partial} cannot be written ({first_line(error)}): make room and give the same command again"
            ) from error

    # --- the run ---

    def finish(self) -> Finetuned:
        model = self._model()
        if "steps" not in self.notes:
            self._note(steps=self._steps(model))
        recipe = self._recipe(self.notes["steps"])
        training = Training(model, self.learned, recipe, self.partial / "state.pt")
        if "before" not in self.notes:
            self._note(before=self._bits(training) if training.step == 0 else None)
        tokens = self.filled * recipe.rows * recipe.length  # of a step
        with progress_bar(recipe.steps - training.step, "training") as advance:
            for step in training:
                advance(f"loss {step.loss:.3f}, {tokens / step.seconds:,.0f} tokens/s")
        dtype = choose_dtype("auto", self.config)
        if self.options.lora is None:
            with torch.no_grad():
                for parameter in model.parameters():  # as they will be read
                    parameter.copy_(parameter.to(dtype))
        done = self._told(training, tokens, self._bits(training))
        with new_folder(self.out) as folder:
            if self.options.lora is None:
                raw = read_json(self.source / "config.json", CheckpointError)
                copy_small_files(self.source, folder)
                write_decoder(model, folder, raw, dtype, self.source)
            else:
                save_adapter(model, folder, self.model_name)
            card = _card(done, self.model_name, "transformers" if self.options.lora is None else "peft")
            (folder / "README.md").write_text(card, encoding="utf-8")
        self._clear()
        return done

    def _model(self) -> Decoder:
        device = choose_device(self.options.device)
        model = load_decoder(self.source, self.config, torch.float32, device, PACKED, self.options.quantize)
        if self.options.lora is None:
            return model.requires_grad_(True)
        add_lora(model, self.options.lora, seed=self.options.seed)
        return model

    def _recipe(self, steps: int) -> Recipe:
        options = self.options
        return Recipe(
            steps=steps,
            length=self.length,
            rows=self.rows,
            rows_at_once=options.rows_at_once,
            learning_rate=options.learning_rate or (_LEARNING_RATE if options.lora is None else _LORA_LEARNING_RATE),
            bfloat16=options.bf16,
            recompute=options.recompute,
            compile=options.compile,
            seed=options.seed,
        )

    def _steps(self, model: Decoder) -> int:
        if self.options.minutes is None:
            return self.options.steps or math.ceil((self.options.epochs or 1) * self.epoch_steps)
        trial = Training(model, self.learned, self._recipe(1))
        seconds = 0.0
        for _ in range(2):  # the first one is slower
            began = time.perf_counter()
            trial.loss.backward(trial.rows.next(self.options.rows_at_once).to(trial.loss.device), 0.0)
            seconds = (time.perf_counter() - began) * self.rows / self.options.rows_at_once
        model.zero_grad()
        return max(1, round(self.options.minutes * 60 / seconds))

    def _bits(self, training: Training) -> float | None:
        return None if self.held_out is None else training.loss.bits_per_byte(self.held_out, self.options.rows_at_once)

    def _told(self, training: Training, tokens: float, after: float | None) -> Finetuned:
        return Finetuned(
            command=self.command,
            steps=training.step,
            epochs=training.rows.epoch + training.rows.cursor / len(training.rows.order),
            tokens=round(tokens * training.step),
            seconds=sum(seconds for _, seconds in training.log),
            filled=self.filled,
            losses=[loss for loss, _ in training.log],
            learned=len(self.learned),
            scored=int(self.learned.scored.sum()),
            before=self.notes["before"],
            after=after,
        )


def _held_out(value: float | str | Path) -> float | Path:
    try:
        return float(value)
    except (TypeError, ValueError):
        return Path(value)


def _card(done: Finetuned, base: str, library: str) -> str:
    """README.md of the result."""
    named = f"base_model: {json.dumps(base)}\n" if re.fullmatch(r"[\w.-]+/[\w.-]+", base) else ""
    head = f"{named}library_name: {library}\npipeline_tag: text-generation\ntags: [minillm, finetuned]"
    made = f"Made by minillm {__version__} with\n\n    {done.command}\n\nwhich told:"
    said = textwrap.indent(done.as_text(), "    ")
    rest = (
        f"Bits per byte are of text that was held out, by the weights in this folder. Conditions of use are those of "
        f"{base} and of the data."
    )
    return f"---\n{head}\n---\n\n" + "\n\n".join([f"# {base}, fine-tuned", made, said, rest]) + "\n"
