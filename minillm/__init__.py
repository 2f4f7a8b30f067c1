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
    _ROOMS = dict(
        LLM="llm",
        Completion="request",
        Conversation="llm",
        Engine="serve.engine",
        EngineStats="serve.engine",
        Handle="serve.engine",
        Sampling="sampling",
        StaticCache="cache",
        Stats="request",
        TextStream="tokenizer",
        decode_one_token="decode",
    )

    def __getattr__(name):
        if name not in _ROOMS:
            raise AttributeError(f"module 'minillm' has no attribute {name!r}")
        import importlib

        value = globals()[name] = getattr(importlib.import_module(f"minillm.{_ROOMS[name]}"), name)
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
