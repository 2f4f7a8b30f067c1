"""The flags: what several commands share, and what a word on the command line becomes."""

import argparse
import dataclasses
from functools import partial
from pathlib import Path

from minillm.options import ATTENTION, DTYPES, QUANTIZED_FORMATS, GenerationConfig

COMPILE = {"auto": "auto", "on": True, "off": False}
OPTIONS = [field for field in dataclasses.fields(GenerationConfig) if field.metadata["flag"]]
_MOST = 10**6  # of anything that is counted here


def groups() -> list[argparse.ArgumentParser]:
    """Flags that commands share: where to find a model, its dtype, how to run it, what to ask, how to tell results, and
    over how many processes the model is split."""
    hub, dtype, generation, results, split = (argparse.ArgumentParser(add_help=False) for _ in range(5))
    hub.add_argument("--revision", help="branch, tag or commit of a Hub id")
    hub.add_argument("--local-files-only", action="store_true", help="do not ask the Hub for anything")

    dtype.add_argument("--dtype", default="auto", help=f"{', '.join(DTYPES)} (default: the checkpoint's)")

    model = argparse.ArgumentParser(add_help=False, parents=[dtype, hub])
    add = model.add_argument
    add("--model", default="demo", metavar="M", help="demo, demo-draft, a folder or a Hub id (default: demo)")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--quantize", metavar="FORMAT", help=f"{', '.join(QUANTIZED_FORMATS)} (default: none)")
    add("--quantize-head", action="store_true", help="the output head too, in int8")
    add("--adapter", metavar="A", help="a LoRA adapter for the model: a folder or a Hub id, as PEFT saves it")
    add("--attention", default="auto", help=f"{', '.join(ATTENTION)} (auto: the fastest that fits)")
    how = "auto: record steps and replay them (default); on: torch.compile, slow to start; off: neither"
    add("--compile", choices=COMPILE, default="auto", help=how)

    for field in OPTIONS:
        rule = field.metadata
        generation.add_argument(
            "--stop" if field.name == "stop_strings" else f"--{field.name.replace('_', '-')}",
            dest=field.name,
            type=partial(_value, rule["kind"], rule["word"]),
            action="append" if field.name == "stop_strings" else "store",
            metavar={int: "N", float: "X", str: "TEXT"}[rule["kind"]],
            help=rule["help"],
        )
    generation.add_argument("--draft-model", metavar="M", help="a smaller model with the same tokenizer guesses ahead")

    results.add_argument("--json", action="store_true", help="print JSON instead of a table")
    results.add_argument("--plot", type=Path, metavar="PNG", help="draw it into this file")

    split.add_argument("--ranks", type=count, metavar="N", help="split the model over N processes (tensor parallel)")
    return [hub, dtype, model, generation, results, split]


def _value(kind: type, word: str | None, argument: str):
    """The argument as `kind`, or the word that may stand for one; what is neither is wrong usage."""
    try:
        argument.encode()  # bytes that are no text arrive as lone surrogates
        return argument if argument == word else kind(argument)
    except ValueError:
        wanted = {int: "a whole number", float: "a number", str: "valid text"}[kind]
        raise argparse.ArgumentTypeError(f"{argument[:40]!r} is not {wanted}") from None


text = partial(_value, str, None)


def count(argument: str) -> int:
    number = _value(int, None, argument)
    if not 1 <= number <= _MOST:
        raise argparse.ArgumentTypeError(f"{argument[:40]!r} is not from 1 to {_MOST}")
    return number


def amount(argument: str) -> float:
    number = _value(float, None, argument)
    if not 0 < number <= _MOST:
        raise argparse.ArgumentTypeError(f"{argument[:40]!r} is not above 0 and at most {_MOST}")
    return number


def counts(argument: str) -> list[int]:
    return [count(one) for one in argument.split(",")]
