"""Files of text and of conversations as documents, tokenized once.

A file that ends in .jsonl holds an object per line, `{"messages": [{"role": ..., "content": ...}, ...]}` or
`{"prompt": ..., "completion": ...}`, of which the answers are learned. Any other is UTF-8 text, all of it learned: one
document, or several with a line between them that holds the end-of-text token alone. A folder is all files in it.

Text may be longer than a row, and is cut. A conversation may not: an answer without its question teaches nothing.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minillm import __version__
from minillm.errors import MinillmError, RequestError, first_line, shown
from minillm.progress import progress_bar
from minillm.tokenizer import Tokenizer
from minillm.train.chat import completion_document, conversation_documents
from minillm.train.documents import Document, Documents, load_documents, make_documents, save_documents

_BLOCK = 2**16  # bytes that are a notch of the progress bar


@dataclass(frozen=True)
class Example:
    """What is learned of one text or one line, and the UTF-8 bytes of the text that its scored tokens spell."""

    documents: list[Document]
    text_bytes: int
    is_text: bool


def tokenized(
    data: Path, held_out: float | Path, seed: int, max_length: int, tokenizer: Tokenizer, ends: Collection[int],
    described_by: Sequence[Path], folder: Path,
) -> tuple[Documents, Documents | None]:  # fmt: skip
    """The documents of `data`, and those of it (or of another file) that are held out, mapped from files in `folder`.

    The files are named after all that decides what is in them, and made where they are missing.

    Args:
        held_out: the share of `data` that is not learned, drawn by `seed` (0: none); or where other documents are.
        max_length: tokens of a conversation, at most.
        ends: the ids that end generation.
        described_by: the files that tokenizer, ends and chat template were read from.
    """
    share, other = (0.0, held_out) if isinstance(held_out, Path) else (held_out, None)
    if not 0 <= share < 1:
        raise RequestError(f"the share that is held out must be from 0 to below 1, not {share}")
    files, others = _files(data), _files(other) if other else []
    facts = [__version__, share, seed, max_length, sorted(ends), len(files), len(others)]
    key = hashlib.sha256(json.dumps(facts).encode())
    for path in [*described_by, *files, *others]:
        with _readable(path), path.open("rb") as file:
            key.update(path.suffix.encode() + hashlib.file_digest(file, "sha256").digest())
    paths = [folder / f"{part}-{key.hexdigest()[:16]}.safetensors" for part in ("learned", "held-out")]
    if not paths[0].exists():  # the second one is written first
        learned, kept = _split(read_examples(data, tokenizer, ends, max_length), share, seed, max_length, tokenizer)
        if other:
            kept = read_examples(other, tokenizer, ends, max_length)
        if kept:
            save_documents(_together(kept), paths[1])
        save_documents(_together(learned), paths[0])
    return load_documents(paths[0]), load_documents(paths[1]) if paths[1].exists() else None


def read_examples(data: Path, tokenizer: Tokenizer, ends: Collection[int], max_length: int) -> list[Example]:
    """All examples of a file or folder. Raises a `MinillmError` that names file and line."""
    eos = tokenizer.eos_token_id
    separator = None if eos is None else tokenizer.decode([eos], skip_special_tokens=False)
    files, examples = _files(data), []
    with progress_bar(sum(1 + path.stat().st_size // _BLOCK for path in files), "tokenizing", after=1.0) as advance:
        for path in files:
            lines = _lines(path, advance)
            made = _chats(lines, tokenizer, ends) if path.suffix == ".jsonl" else _texts(lines, separator, tokenizer)
            for number, example in _told(made, path):
                longest = max(len(ids) for ids, _ in example.documents)
                if longest > max_length and not example.is_text:
                    raise RequestError(
                        f"{path}:{number}: {longest} tokens, and --max-length is {max_length}: leave it out, or "
                        "allow more"
                    )
                packed = [(array("i", ids), bytes(scored)) for ids, scored in example.documents]
                examples.append(Example(packed, example.text_bytes, example.is_text))
    if not examples:
        raise RequestError(f"{data} holds no text and no conversation")
    return examples


def _files(data: Path) -> list[Path]:
    if data.is_dir():
        return [path for path in sorted(data.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    if not data.is_file():
        raise RequestError(f"{data} is neither a file nor a folder: give text, or conversations in a .jsonl file")
    return [data]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {first_line(error)}") from None


def _lines(path: Path, advance: Callable[[], None]) -> Iterator[tuple[int, str]]:
    """(number, text) of every line."""
    read = 0
    with _readable(path), path.open("rb") as file:
        for number, line in enumerate(file, 1):
            for _ in range((read + len(line)) // _BLOCK - read // _BLOCK):
                advance()
            read += len(line)
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise RequestError(f"{path}:{number}: not UTF-8 text ({error.reason})") from None
    advance()


def _told(made: Iterator[tuple[int, Callable[[], Example]]], path: Path) -> Iterator[tuple[int, Example]]:
    """Examples, and whatever is wrong with one told with its file and line."""
    for number, make in made:
        try:
            example = make()
        except MinillmError as error:
            raise type(error)(f"{path}:{number}: {error}") from None
        yield number, example


def _texts(
    lines: Iterator[tuple[int, str]], separator: str | None, tokenizer: Tokenizer
) -> Iterator[tuple[int, Callable[[], Example]]]:
    """An example for each text, with the number of its first line."""

    def example(text: str) -> Example:
        ids, eos = tokenizer.encode(text), tokenizer.eos_token_id
        ids = ids if eos is None else [*ids, eos]
        if len(ids) < 2:
            raise RequestError(f"a text of one token, {shown(text)}: nothing to learn; leave it out")
        return Example([(ids, [True] * len(ids))], len(text.encode()), is_text=True)

    first, text = 1, []
    for number, line in lines:
        if separator and line.rstrip("\r\n") == separator:
            yield from _not_empty(first, "".join(text).strip(), example)
            first, text = number + 1, []
        else:
            text.append(line)
    yield from _not_empty(first, "".join(text).strip(), example)


def _not_empty(
    number: int, text: str, example: Callable[[str], Example]
) -> Iterator[tuple[int, Callable[[], Example]]]:
    if text:
        yield number, lambda: example(text)


def _chats(
    lines: Iterator[tuple[int, str]], tokenizer: Tokenizer, ends: Collection[int]
) -> Iterator[tuple[int, Callable[[], Example]]]:
    """An example for each line that is not blank."""

    def example(line: str) -> Example:
        try:
            content = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"no JSON: {first_line(error)}") from None
        if not isinstance(content, dict) or not ("messages" in content or {"prompt", "completion"} <= content.keys()):
            raise RequestError(f'{shown(content)} is no object with "messages", or with "prompt" and "completion"')
        if "messages" in content:
            answers = _check_messages(content["messages"])
            documents = conversation_documents(content["messages"], tokenizer, ends)
        else:
            prompt, answers = _text(content, "prompt"), [_said(content, "completion")]
            documents = [completion_document(prompt, answers[0], tokenizer, ends)]
        return Example(documents, sum(len(answer.encode()) for answer in answers), is_text=False)

    for number, line in lines:
        yield from _not_empty(number, line.strip(), example)


def _check_messages(messages: Any) -> list[str]:
    """The answers in messages that are what they should be."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RequestError(f'"messages" must be a list of objects, not {shown(messages)}')
    answers = []
    for message in messages:
        role = _text(message, "role")
        if role == "assistant":
            answers.append(_said(message, "content"))
        else:
            _text(message, "content")
    if not answers:
        raise RequestError('no message has the role "assistant": there is no answer to learn')
    return answers


def _text(content: dict[str, Any], key: str) -> str:
    if not isinstance(content.get(key), str):
        raise RequestError(f'"{key}" must be a text, not {shown(content[key]) if key in content else "missing"}')
    return content[key]


def _said(content: dict[str, Any], key: str) -> str:
    if not _text(content, key).strip():
        raise RequestError(f'"{key}" of an answer is empty: nothing to learn; leave it out')
    return content[key]


def _split(
    examples: list[Example], share: float, seed: int, longest: int, tokenizer: Tokenizer
) -> tuple[list[Example], list[Example]]:
    """Those that are learned and a share that is held out: of texts of over `longest` tokens the end of each, of
    everything else whole examples."""
    if share == 0:
        return examples, []
    long = {i for i, example in enumerate(examples) if example.is_text and len(example.documents[0][0]) > longest}
    short = [i for i in range(len(examples)) if i not in long]
    if not long and len(short) < 2:
        raise RequestError("one document cannot be learned and held out: hold out another file, or 0")
    order = torch.randperm(len(short), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(0 if long else 1, round(share * len(short)))
    chosen = {short[place] for place in order[: min(count, len(examples) - 1)]}
    learned, kept = [], []
    for i, example in enumerate(examples):
        if i not in long:
            (kept if i in chosen else learned).append(example)
            continue
        ids, scored = example.documents[0]
        at = max(2, min(len(ids) - 2, round(len(ids) * (1 - share))))
        size = len(tokenizer.decode(ids[at + 1 :]).encode())  # of what is scored
        learned.append(Example([(ids[:at], scored[:at])], example.text_bytes - size, is_text=True))
        kept.append(Example([(ids[at:], scored[at:])], size, is_text=True))
    return learned, kept


def _together(examples: list[Example]) -> Documents:
    documents = (document for example in examples for document in example.documents)
    return make_documents(documents, sum(example.text_bytes for example in examples))
