"""The small files of a checkpoint, read with care: they come from strangers."""

import json
from pathlib import Path
from typing import Any

from minillm.errors import MinillmError


def read_json(path: Path, error: type[MinillmError]) -> dict[str, Any]:
    """The JSON object in a small file of the checkpoint; {} if there is no such file, `error` if it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as problem:
        raise error(f"{path} cannot be read as JSON: {problem}") from None
    if not isinstance(content, dict):
        raise error(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content
