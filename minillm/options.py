"""What a caller may ask for: every option of a request with its range, and the names of formats.

Free of torch, so that the command line, whose flags are made of these fields, can answer `--help` at once.
"""

import dataclasses
import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minillm.errors import RequestError, shown

DTYPES = ("float32", "bfloat16", "float16")  # of activations, and of weights that are not quantized
GROUP_SIZES = (32, 64, 128)  # inputs that share a scale in int4
QUANTIZED_FORMATS = ("int8", "int4", *(f"int4-g{size}" for size in GROUP_SIZES))  # "int4" is int4-g64
ATTENTION = ("auto", "math", "sdpa", "sdpa:flash", "sdpa:efficient", "sdpa:cudnn", "sdpa:math", "kernels")

_SAMPLING = ("temperature", "top_k", "top_p", "min_p")  # each of them asks for sampling
_MOST = 2**31 - 1  # of whole numbers: what a tensor index holds with room to spare


def _option(kind: type, help: str, low: float = 0, high: float = _MOST, word=None, several=False, flag=True):
    """A field of `GenerationConfig`: a value of type `kind` within [low, high], or `word`.

    `several`: or a list of them. `flag`: the command line has a flag for it, with this `help`.
    """
    rule = dict(kind=kind, help=help, low=low, high=high, word=word, several=several, flag=flag)
    return dataclasses.field(default=None, metadata=rule)


@dataclass(frozen=True)
class GenerationConfig:
    """What a caller may ask of `generate`; names and meanings as in `transformers`.

    `None` means "not set": the checkpoint's `generation_config.json` may fill it in, else the filter is
    off. Raises `RequestError` for a value of the wrong type or out of range.
    """

    max_new_tokens: int | None = _option(int, "new tokens at most (default: 256, or what there is room for)", 1)
    do_sample: bool | None = _option(bool, "sample at all (default: if temperature, a top or min_p asks)", flag=False)
    temperature: float | None = _option(float, "0 is greedy", 0, 1e6)
    top_k: int | None = _option(int, "sample from the K likeliest (0: all)")
    top_p: float | None = _option(float, "sample from the fewest tokens that hold this probability", 1e-6, 1)
    min_p: float | None = _option(float, "drop tokens below this share of the likeliest one's probability", 0, 1)
    repetition_penalty: float | None = _option(float, "above 1: tokens said before become less likely", 1e-6, 1e6)
    seed: int | Sequence[int] | None = _option(
        int, "same seed, same text (default: a fresh one)", -math.inf, math.inf, several=True
    )
    eos_token_id: int | Sequence[int] | None = _option(
        int, "end at these (default: the checkpoint's)", several=True, flag=False
    )
    stop_strings: str | Sequence[str] | None = _option(str, "end before this text; may be repeated", several=True)
    logprobs: bool | None = _option(bool, "also return the log-probability of each new token", flag=False)
    num_assistant_tokens: int | str | None = _option(int, "tokens a draft model guesses per step", 1, word="auto")
    prompt_lookup_num_tokens: int | None = _option(int, "guess ahead by copying so many from the text so far", 1)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name), field.metadata)
        if self.temperature is not None and 0 < self.temperature < 1e-6:
            raise RequestError(f"temperature must be 0 (greedy) or from 1e-06 to 1e+06, not {shown(self.temperature)}")

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop_strings`, however they were given."""
        return tuple(as_list(self.stop_strings))

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random at all."""
        asked = any(getattr(self, name) is not None for name in _SAMPLING)
        return (asked if self.do_sample is None else self.do_sample) and self.temperature != 0


def merge_options(defaults: GenerationConfig, given: GenerationConfig | None, options: dict) -> GenerationConfig:
    """Keywords over the caller's object over the checkpoint's defaults; None, wherever it stands, is "not set".

    Raises `RequestError` for a keyword that is no field of `GenerationConfig`.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise RequestError(f"generation_config must be a GenerationConfig, not {shown(given)}; options are keywords")
    known = [field.name for field in dataclasses.fields(GenerationConfig)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise RequestError(f"unknown option {shown(name)}; {hint}")
    asked = {} if given is None else dict(vars(given))
    asked |= {name: value for name, value in options.items() if value is not None}
    asked = {name: value for name, value in asked.items() if value is not None}
    if "do_sample" not in asked and any(name in asked for name in _SAMPLING):
        asked["do_sample"] = None  # the caller's wish decides, whatever the file says
    return dataclasses.replace(defaults, **asked)


def as_list(value: Any) -> list:
    """Nothing, one thing, or several of them, as a list."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _check(name: str, value: Any, rule: dict) -> None:
    """Raise `RequestError` unless the value, or each of several where the field takes several, obeys the rule."""
    kind, low, high, word = rule["kind"], rule["low"], rule["high"], rule["word"]
    if value is None or (isinstance(value, str) and value == word):
        return
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a non-empty text"}[kind]
    if kind in (int, float) and low > -math.inf:
        wanted += f" >= {low}" if high == _MOST else f" from {low:g} to {high:g}"
    wanted += (f' or "{word}"' if word else "") + (", or a list of them" if rule["several"] else "")
    for one in as_list(value) if rule["several"] else [value]:
        if kind in (int, float):
            # a whole number passes for a float; true and false pass for nothing
            fits = type(one) is int or (kind is float and isinstance(one, float) and math.isfinite(one))
            fits = fits and low <= one <= high
        else:
            fits = isinstance(one, kind) and one != ""
        if not fits:
            raise RequestError(f"{name} must be {wanted}, not {shown(one)}")
