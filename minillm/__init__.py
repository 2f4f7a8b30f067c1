"""minillm: a minimal decoder runtime for large language models in PyTorch.

    from minillm import LLM
    print(LLM.from_pretrained("demo").generate("Once upon a time").text)

README.md says in which order to read the rooms.
"""

from minillm.cache import StaticCache
from minillm.decode import decode_one_token
from minillm.errors import MinillmError
from minillm.llm import LLM, Conversation
from minillm.options import GenerationConfig
from minillm.request import Completion

__all__ = ["LLM", "Completion", "Conversation", "GenerationConfig", "MinillmError", "StaticCache", "decode_one_token"]
