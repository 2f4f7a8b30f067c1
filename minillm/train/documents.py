"""Documents on disk: the token ids of all of them end to end, and which of them are learned."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minillm.errors import RequestError, first_line

Document = tuple[Sequence[int], Sequence[bool]]  # ids, and of each whether predicting it is learned


@dataclass(frozen=True)
class Documents:
    """N tokens of D documents. A file of them is mapped, not read: it may be larger than memory."""

    ids: Tensor  # [N] int32
    scored: Tensor  # [N] bool: whether the loss counts how this token is predicted from those before it
    ends: Tensor  # [D] int64: where each document ends; it begins where the one before it ends
    text_bytes: int  # UTF-8 bytes of the text that the scored tokens spell, for bits per byte
    digest: str  # of all of the above: two files with one digest hold the same

    def __len__(self) -> int:
        return len(self.ends)


def make_documents(documents: Iterable[Document], text_bytes: int) -> Documents:
    """Collect documents in memory, 5 bytes per token. The first of each is never scored: nothing comes before it.

    Raises `RequestError` for a document of fewer than two tokens, or of which nothing is scored.
    """
    ids, scored, ends = array("i"), bytearray(), array("q")
    for number, (tokens, counts) in enumerate(documents):
        if len(tokens) < 2 or len(counts) != len(tokens) or not any(counts[1:]):
            raise RequestError(
                f"document {number}: {len(tokens)} tokens, of which {sum(counts[1:])} are scored: nothing to learn; "
                "leave it out"
            )
        ids.extend(tokens)
        scored += bytes([0, *counts[1:]])
        ends.append(len(ids))
    if not ends:
        raise RequestError("no documents: there is nothing to learn")
    tensors = (
        torch.frombuffer(ids, dtype=torch.int32),
        torch.frombuffer(scored, dtype=torch.bool),
        torch.frombuffer(ends, dtype=torch.int64),
    )
    digest = hashlib.sha256(f"{len(ids)} {len(ends)} {text_bytes}".encode())
    for tensor in tensors:
        digest.update(tensor.numpy())
    return Documents(*tensors, text_bytes, digest.hexdigest())


def save_documents(documents: Documents, path: Path) -> None:
    """Write documents to one safetensors file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    tensors = {name: getattr(documents, name) for name in ("ids", "scored", "ends")}
    about = {"minillm_documents": json.dumps({"text_bytes": documents.text_bytes, "digest": documents.digest})}
    try:
        save_file(tensors, part, metadata=about)
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise RequestError(f"{path} cannot be written: {first_line(error)}") from error


def load_documents(path: Path) -> Documents:
    """The documents of a file that `save_documents` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["minillm_documents"])
            return Documents(*(file.get_tensor(name) for name in ("ids", "scored", "ends")), **about)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"{path} is no file of documents ({first_line(error)}): remove it and make it anew"
        ) from None
