"""minillm: a minimal decoder runtime for large language models in PyTorch.

    from minillm import LLM
    print(LLM.from_pretrained("demo").generate("Once upon a time").text)

README.md says in which order to read the rooms. A name is fetched from its room when it is first asked for
(PEP 562), so that what needs no PyTorch, such as `minillm --help`, does not wait for it.
"""

from typing import TYPE_CHECKING

from minillm.errors import (
    BackendError,
    CacheError,
    CheckpointError,
    ConfigError,
    EngineError,
    EngineFull,
    MinillmError,
    NumericalError,
    RankError,
    RequestError,
    TokenizerError,
)
from minillm.options import GenerationConfig

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "BackendError",
    "CacheError",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "Conversation",
    "Engine",
    "EngineError",
    "EngineFull",
    "EngineStats",
    "GenerationConfig",
    "Handle",
    "MinillmError",
    "NumericalError",
    "RankError",
    "RequestError",
    "Sampling",
    "StaticCache",
    "Stats",
    "TextStream",
    "TokenizerError",
    "decode_one_token",
]

if TYPE_CHECKING:
    from minillm.cache import StaticCache
    from minillm.decode import decode_one_token
    from minillm.llm import LLM, Conversation
    from minillm.request import Completion, Stats
    from minillm.sampling import Sampling
    from minillm.serve.engine import Engine, EngineStats, Handle
    from minillm.tokenizer import TextStream
else:
    _ROOMS = {"cache": "StaticCache", "decode": "decode_one_token", "llm": "LLM Conversation", "sampling": "Sampling"}
    _ROOMS |= {"request": "Completion Stats", "serve.engine": "Engine EngineStats Handle", "tokenizer": "TextStream"}

    def __getattr__(name):
        room = next((room for room, names in _ROOMS.items() if name in names.split()), None)
        if room is None:
            raise AttributeError(f"module 'minillm' has no attribute {name!r}")
        import importlib

        value = globals()[name] = getattr(importlib.import_module(f"minillm.{room}"), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
