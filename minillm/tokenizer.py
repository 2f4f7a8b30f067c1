"""Text to token ids and back, and text as it streams.

The `tokenizers` library does the tokenizing; what is here is the part that other runtimes get wrong: the one BOS, the
chat template that must not add a second, and pieces of text that never show half a character.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from minillm.errors import TokenizerError, first_line

# How far back to look in a prompt for a token that ends on a whole character.
_CONTEXT_TOKENS = 8


class Tokenizer:
    """The tokenizer of a checkpoint; `load.tokenizer.load_tokenizer` makes one.

    Args:
        rust: the `tokenizers` library's, which does the tokenizing.
        special: the tokens named "bos_token", "eos_token", ..., or None for those that there are not.
        add_bos: whether `encode` begins with BOS; None: as `rust` does it.
        chat_template: renders a conversation (`load.chat_template.ChatTemplate`); None where the checkpoint has none.
    """

    def __init__(self, rust, special: dict[str, str | None], add_bos: bool | None = None, chat_template=None):
        self._tokenizer, self._special, self._add_bos, self.chat_template = rust, special, add_bos, chat_template
        self.vocab_size: int = rust.get_vocab_size(with_added_tokens=True)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, added and special ones included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id(self._special["bos_token"])

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id(self._special["eos_token"])

    def token_id(self, token: str | None) -> int | None:
        """The id of one token, given exactly as it stands in the vocabulary; None if it is not there."""
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the BOS that the checkpoint's own tokenizer would add, once."""
        if not is_unicode(text):
            raise TokenizerError("the text cannot be tokenized: it is not valid Unicode (half a surrogate pair)")
        with in_rust("the text cannot be tokenized"):
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        bos = self.bos_token_id
        if add_special_tokens and bos is not None and self._add_bos is not None:
            # tokenizer_config.json may overrule the template inside tokenizer.json, in either direction.
            if self._add_bos and ids[:1] != [bos]:
                return [bos, *ids]
            plain = ids if self._add_bos else self.encode(text, add_special_tokens=False)
            if not self._add_bos and ids[: len(plain) + 1] == [bos, *plain]:  # not one that the text begins with
                return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of these ids; ids outside the vocabulary (a padded embedding has some) give no text."""
        with in_rust("the tokens cannot be made text"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """Render `[{"role": ..., "content": ...}, ...]` with the checkpoint's chat template.

        Raises `TokenizerError` if there is none, or if it fails, refuses the messages or takes too much of time or
        memory (see `load/chat_template.py`).
        """
        if self.chat_template is None:
            raise TokenizerError(
                "this checkpoint has no chat template (chat_template in tokenizer_config.json, or "
                "chat_template.jinja): it is a base model; use generate() on plain text"
            )
        special = {name: token or "" for name, token in self._special.items()}
        return self.chat_template.render(list(messages), add_generation_prompt=add_generation_prompt, **special)

    def encode_chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of the rendered chat. The template writes BOS itself, so none is added here."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)


class TextStream:
    """Turns tokens into text as they come: no half characters, no beginnings of stop strings.

    The pieces that `push` and `finish` return concatenate to the whole text, whatever the number of tokens
    per push. Text is cut before a stop string; of several, the one that is complete first counts.

    Args:
        tokenizer: the tokenizer.
        context_ids: the tokens before the first one, so that a decoder that treats the start of a text
            differently (SentencePiece drops a leading space there) sees that this is not the start.
        stop_strings: end the text when one of these appears, even across tokens.
    """

    def __init__(self, tokenizer: Tokenizer, context_ids: Sequence[int] = (), stop_strings: Sequence[str] = ()):
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        # The newest tokens whose text is out already: enough for the decoder to see where it stands.
        self._window, self._known = self._context(context_ids)
        self._fresh: list[int] = []  # tokens whose text is not complete yet
        self._held = ""  # complete text that may be the beginning of a stop string
        self.stopped = False  # a stop string has appeared

    def push(self, token: int) -> str:
        """Add one token; returns the text that has become certain, often one word, sometimes nothing."""
        if self.stopped:
            return ""
        self._fresh.append(token)
        text = self._tokenizer.decode(self._window + self._fresh)
        if text.endswith("\ufffd"):
            return ""  # the bytes so far end inside a character: wait for the rest
        new = text[len(self._known) :]
        # Never cut inside a character, nor keep special tokens alone: neither shows where a word begins.
        known = self._tokenizer.decode(self._fresh)
        self._window = self._fresh if known else self._window + self._fresh
        self._known, self._fresh = known or text, []
        return self._release(new)

    def finish(self) -> str:
        """What was held back, now that nothing follows (an unfinished character shows as U+FFFD)."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(self._window + self._fresh)[len(self._known) :] if self._fresh else ""
        self._fresh = []
        rest = self._release(text)
        if not self.stopped:
            rest, self._held = rest + self._held, ""
        return rest

    def _context(self, ids: Sequence[int]) -> tuple[list[int], str]:
        """The shortest end of `ids` with readable text, and that text (an end without text if there is none)."""
        best = [], ""
        for size in range(1, min(_CONTEXT_TOKENS, len(ids)) + 1):
            text = self._tokenizer.decode(ids[-size:])
            if "\ufffd" not in text:
                best = list(ids[-size:]), text
            if best[1]:
                break
        return best

    def _release(self, new: str) -> str:
        text = self._held + new
        ends = [(text.index(stop) + len(stop), -len(stop)) for stop in self._stop_strings if stop in text]
        if ends:
            end, length = min(ends)
            self.stopped = True
            return text[: end + length]
        keep = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` could be the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


@contextmanager
def in_rust(problem: str) -> Iterator[None]:
    """The `tokenizers` library raises bare Exception; or it panics, which Python hears as a BaseException."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{problem}: {first_line(error)}") from None
        raise


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
