"""How well a model predicts a text, in bits per byte: what a format of its weights costs in quality.

Bits per byte (the text's information under the model, over its UTF-8 bytes) compares models with different
tokenizers, which perplexity per token does not.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from minillm.cache import MAX_STEP, StaticCache
from minillm.errors import RequestError
from minillm.llm import LLM
from minillm.measure.bench import format_name
from minillm.measure.memory import format_bytes
from minillm.options import DTYPES, QUANTIZED_FORMATS
from minillm.progress import progress_bar
from minillm.tokenizer import Tokenizer

WINDOW = 1024  # tokens of a scored window, if the model has as many positions; half of it is context
_FLOATS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Score:
    """How well one format of a model predicts a text."""

    format: str
    weight_bytes: int
    tokens: int  # predicted
    text_bytes: int  # UTF-8, of the documents without what separates them
    bits: float  # -log2 of the probability of all predicted tokens
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.text_bytes

    @property
    def nats_per_token(self) -> float:
        return self.bits * math.log(2) / self.tokens

    def as_dict(self) -> dict:
        return asdict(self) | {"bits_per_byte": self.bits_per_byte, "perplexity": math.exp(self.nats_per_token)}


def read_documents(path: Path, tokenizer: Tokenizer) -> list[str]:
    """The texts of a file: what stands between lines that hold only the EOS token, stripped, none empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: {error}") from None
    eos = tokenizer.eos_token_id
    separator = None if eos is None else tokenizer.decode([eos], skip_special_tokens=False)
    parts = f"\n{text}\n".split(f"\n{separator}\n") if separator else [text]
    documents = [part.strip() for part in parts if part.strip()]
    if not documents:
        raise RequestError(f"{path} holds no text")
    return documents


def token_stream(documents: Sequence[str], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """All documents as one stream of ids, and which of them are predicted.

    A document is its BOS, its tokens and EOS, each where the tokenizer has one; where BOS and EOS are the same
    token, one stands between two documents. EOS is predicted: knowing where a text ends is part of the task.
    A BOS is given, and so is the stream's first token.
    """
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids: list[int] = []
    predicted: list[bool] = []
    for document in documents:
        new = tokenizer.encode(document)
        opened = new[:1] == [bos]
        if opened and ids and ids[-1] == bos:
            new, opened = new[1:], False
        new = new if eos is None else [*new, eos]
        ids += new
        predicted += [not opened, *[True] * (len(new) - 1)]
    return ids, [False, *predicted[1:]]


def windows(count: int, length: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first): read ids start..stop-1 and predict first..stop, so that every id but the first is
    predicted once, with at least `overlap` ids of context where the stream has them."""
    first = 1
    while first < count:
        start = max(0, first - 1 - overlap)
        stop = min(start + length, count - 1)
        yield start, stop, first
        first = stop + 1


@torch.inference_mode()
def score_text(llm: LLM, documents: Sequence[str]) -> Score:
    """Bits the model needs for these documents; see `token_stream` for what is counted.

    Context runs across documents. Windows are as long as the model has positions, at most 1024 tokens, and
    advance by half: a token is predicted from at least 512 tokens before it.
    """
    started = time.perf_counter()
    ids, predicted = token_stream(documents, llm.tokenizer)
    length = min(llm.config.max_positions, WINDOW)
    cache = StaticCache(llm.config, 1, length, llm.device, llm.dtype, max_step=length)
    stream, counted = torch.tensor(ids, device=llm.device), torch.tensor(predicted, device=llm.device)
    bits = 0.0
    spans = list(windows(len(ids), length, length // 2))
    with progress_bar(len(spans), format_name(llm)) as advance:
        for start, stop, first in spans:
            cache.reset()
            positions = torch.arange(stop - start, device=llm.device)[None]  # [1, T]
            ids_here = stream[None, start:stop]  # [1, T]
            with cache.writing(llm.model, ids_here, positions):
                x, rotary = llm.model.embed(ids_here, positions, cache)
                hidden = llm.model.walk(x, rotary, positions, cache)[0, first - 1 - start :]  # [T', d]
            wanted = stream[first : stop + 1]  # [T']
            # A piece at a time: the logits of a whole window would be the largest tensor of all.
            pieces = (tensor.split(MAX_STEP) for tensor in (hidden, wanted, counted[first : stop + 1]))
            for piece, targets, mask in zip(*pieces, strict=True):
                nats = F.cross_entropy(llm.model.logits(piece), targets, reduction="none")  # [T']
                bits += nats[mask].double().sum().item() / math.log(2)
            advance()
    size = sum(len(document.encode()) for document in documents)
    seconds = time.perf_counter() - started
    return Score(format_name(llm), llm.model.weight_bytes, sum(predicted), size, bits, seconds)


def parse_format(word: str, dtype: str) -> tuple[str, str | None]:
    """(dtype, quantize) for a word like "bf16", "float32", "int8" or "int4-g32"; what is not quantized is `dtype`."""
    if word in QUANTIZED_FORMATS:
        return dtype, word
    if word not in (*_FLOATS, *DTYPES):
        known = ", ".join((*_FLOATS, *QUANTIZED_FORMATS))
        raise RequestError(f"format {word!r} is unknown; choose from {known}")
    return _FLOATS.get(word, word), None


@dataclass(frozen=True)
class Scores:
    """What `minillm bench --perplexity` shows: formats of a model on one text, each beside the first."""

    text: str  # its name
    scores: Sequence[Score]

    def as_dict(self) -> list[dict]:
        return [score.as_dict() for score in self.scores]

    def as_text(self) -> str:
        first = self.scores[0]
        lines = [
            f"{self.text}: {first.text_bytes:,} bytes of text, {first.tokens:,} tokens",
            "",
            f"{'format':<16}{'weights':>12}{'bits/byte':>12}{'to first':>12}{'nats/token':>12}{'seconds':>10}",
        ]
        for score in self.scores:
            change = f"{score.bits_per_byte - first.bits_per_byte:+.4f}" if score is not first else ""
            lines.append(
                f"{score.format:<16}{format_bytes(score.weight_bytes):>12}{score.bits_per_byte:>12.4f}{change:>12}"
                f"{score.nats_per_token:>12.4f}{score.seconds:>10.1f}"
            )
        return "\n".join(lines)
