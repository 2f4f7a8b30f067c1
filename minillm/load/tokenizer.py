"""The tokenizer of a checkpoint folder: `tokenizer.json`, and what `tokenizer_config.json` and a chat template add."""

import json
import math
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from minillm.errors import TokenizerError, shown
from minillm.load.chat_template import ChatTemplate
from minillm.load.files import TEMPLATE_BYTES, TOKENIZER_BYTES, conversion, read_json, read_text
from minillm.tokenizer import Tokenizer, in_rust, is_unicode

_MOST_GROWTH = 1000


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in `folder`. Raises `TokenizerError` if a file is missing, or not what its kind should be."""
    folder = Path(folder)
    path = folder / "tokenizer.json"
    content = read_text(path, TokenizerError, TOKENIZER_BYTES)
    if content is None:
        raise TokenizerError(
            f"{path} does not exist, and minillm reads no other format; this writes one: "
            f"{conversion(folder, 'AutoTokenizer')}"
        )
    with in_rust(f"{path} is not a readable tokenizer"):
        rust = RustTokenizer.from_str(content)
    for part in (rust.normalizer, rust.decoder):
        if part is not None and _growth(json.loads(part.__getstate__())) > _MOST_GROWTH:
            raise TokenizerError(f"{path}: its Replace steps may make a text over {_MOST_GROWTH} times as long")
    # Some files ask for truncation or padding, which belonged to training.
    rust.no_truncation()
    rust.no_padding()
    path = folder / "tokenizer_config.json"
    config = read_json(path, TokenizerError)
    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    special = {name: _content(config.get(name), f"{path}: {name}") for name in names}
    add_bos = config.get("add_bos_token")
    if add_bos not in (None, True, False):
        raise TokenizerError(f"{path}: add_bos_token must be true or false, not {shown(add_bos)}")
    return Tokenizer(rust, special, add_bos, _chat_template(folder, config))


def _growth(step: dict[str, Any]) -> int:
    """How many times longer than its input what a step of a normalizer or decoder makes can be, by its Replaces."""
    growth = 1 + len(step["content"]) if step["type"] == "Replace" else 1
    return math.prod(map(_growth, step.get("normalizers") or step.get("decoders") or []), start=growth)


def _content(token: Any, where: str) -> str | None:
    """A special token is written as a string, or as an object with the string inside."""
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not (isinstance(content, str) and is_unicode(content)):
        raise TokenizerError(f"{where} must be a string, not {shown(token)}")
    return content


def _chat_template(folder: Path, config: dict[str, Any]) -> ChatTemplate | None:
    template = read_text(folder / "chat_template.jinja", TokenizerError, TEMPLATE_BYTES)
    if template is None:
        template = read_json(folder / "chat_template.json", TokenizerError).get("chat_template")
    template = config.get("chat_template") if template is None else template
    if isinstance(template, list):  # several named templates: the plain one is called "default"
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if isinstance(template, str) and len(template) > TEMPLATE_BYTES:
        raise TokenizerError(f"{folder}: chat_template is larger than {TEMPLATE_BYTES} bytes, which no real one is")
    if template is not None and not isinstance(template, str):
        raise TokenizerError(
            f"{folder}: chat_template must be a string, or a list of named ones, not {shown(template)}"
        )
    return ChatTemplate(template) if template else None
