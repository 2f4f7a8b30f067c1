"""The small files of a checkpoint, read with care: they come from strangers.

Whatever reads one of them goes through here, so that a file that is too large, too deep, no file at all or no text
is one error that names it.
"""

import json
from pathlib import Path
from typing import Any

from minillm.errors import MinillmError, first_line

# Python holds JSON in up to 21 times its bytes. The largest file of this kind in the supported families, the
# tokenizer_config.json of Gemma 3, has 1.2 MB.
_JSON_BYTES = 2**22
_DEPTH = 64  # of objects and lists in each other; a config.json has 4
TOKENIZER_BYTES = 2**27  # tokenizer.json is read in Rust, into a compact form: Gemma 3 has 33 MB
TEMPLATE_BYTES = 2**16  # compiling a template costs 40 times what reading it does; the longest published: 17 kB


def read_text(path: Path, error: type[MinillmError], most: int) -> str | None:
    """The UTF-8 text of a file of at most `most` bytes; None if there is no such file, `error` if it is not that."""
    try:
        if not path.exists():
            return None
        if not path.is_file():  # a pipe would never end
            raise error(f"{path} is not a file")
        with path.open("rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise error(f"{path} is larger than {most} bytes, which no file of its kind is")
        return content.decode("utf-8")
    except (OSError, ValueError) as problem:
        raise error(f"{path} cannot be read: {first_line(problem)}") from None


def read_json(path: Path, error: type[MinillmError]) -> dict[str, Any]:
    """The JSON object in a small file of the checkpoint; {} if there is no such file, `error` if it is broken."""
    text = read_text(path, error, _JSON_BYTES)
    try:
        content = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} cannot be read as JSON: {problem}") from None
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}, not a JSON object")
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > _DEPTH:
            raise error(f"{path}: objects and lists stand in each other more than {_DEPTH} deep")
        inside = [one.values() if isinstance(one, dict) else one for one in level]
        level = [value for values in inside for value in values if isinstance(value, dict | list)]
    return content


def conversion(folder: Path, kind: str) -> str:
    """The line of `transformers` (its class `kind`) that writes what the folder of an old model lacks."""
    # In the Hub's cache it is models--owner--name/snapshots/commit.
    cached = folder.parents[1].name if len(folder.parents) > 1 else ""
    source = cached.removeprefix("models--").replace("--", "/") if cached.startswith("models--") else folder
    return f"transformers.{kind}.from_pretrained({str(source)!r}).save_pretrained('a-new-folder')"
