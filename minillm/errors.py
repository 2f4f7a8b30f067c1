"""Every error a user of minillm can meet, under one base class.

A message names the file, field or value that is wrong, the rule it broke, and the way out.
The command line prints it as one line and exits with 1; it never shows a traceback for these.
"""

import reprlib


class MinillmError(Exception):
    """Base class: `except MinillmError` catches everything this package raises on purpose."""


class ConfigError(MinillmError):
    """`config.json` asks for something the decoder does not compute, or contradicts itself."""


class CheckpointError(MinillmError):
    """The checkpoint folder, its safetensors files or its tensors are not what the config promises."""


class TokenizerError(MinillmError):
    """`tokenizer.json` or the chat template is missing or cannot be used."""


class RequestError(MinillmError):
    """What was asked for is unknown, out of range or contradicts itself: an option, a prompt, a flag."""


class CacheError(MinillmError):
    """A StaticCache does not fit the model or the step, is in use by another, or cannot be cut back that far."""


class BackendError(MinillmError):
    """The chosen attention backend, dtype or device cannot run this model."""


class RankError(MinillmError):
    """The processes that share a model (`tensor_parallel=True`) were not started, or one of them is lost."""


class EngineError(MinillmError):
    """The engine is closed, or its thread has failed."""


class EngineFull(EngineError):
    """As many requests are waiting as may: ask again later."""


class NumericalError(MinillmError):
    """Weights or logits are infinite or not a number."""


def first_line(error: Exception) -> str:
    """What a library's error says first: enough for one line of ours."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)


class _Short(reprlib.Repr):
    def repr_int(self, number: int, level: int) -> str:
        return repr(number) if abs(number) < 2**128 else f"a number of {number.bit_length()} bits"


_short = _Short()
_short.maxstring = _short.maxother = 100
shown = _short.repr  # a value in an error: short and one line, whatever a stranger gave us
