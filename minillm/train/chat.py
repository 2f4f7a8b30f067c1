"""Conversations as token ids, and which of them a model learns to say: the answers and what ends them.

No template has to mark its answers for that. What stands before an answer is rendered as it is when a model is asked
for one (`LLM.conversation`): the tokens that then follow are the answer, up to the first that ends generation.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n  Hello!<|im_end|>  \\n<|im_start|>user\\n ...
    `---------------- what the model is given --------------´  `--- scored ---´  `---- given again ----

An answer that the text after it repeats as it was is learned in its place, all answers of a conversation in one
document. Some templates do not repeat it (they drop thoughts, or end only the last answer): then each answer is a
document of its own, as each is another request.
"""

from collections.abc import Collection, Sequence
from itertools import chain

from minillm.errors import TokenizerError, shown
from minillm.tokenizer import Tokenizer
from minillm.train.documents import Document

Answer = tuple[list[int], int]  # ids up to the one that ends the answer, and how many of them stand before it


def conversation_documents(
    messages: Sequence[dict[str, str]], tokenizer: Tokenizer, ends: Collection[int]
) -> list[Document]:
    """What is learned of `[{"role": ..., "content": ...}, ...]`; `ends` are the ids that end generation.

    Raises `TokenizerError` for a template that refuses the messages or does not continue its own prompt.
    """
    asked = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [_answer(messages[: i + 1], tokenizer, ends) for i in asked]
    whole = answers[-1][0]
    if any(whole[: len(ids)] != ids for ids, _ in answers):
        return [_document(ids, [(start, len(ids))]) for ids, start in answers]
    return [_document(whole, [(start, len(ids)) for ids, start in answers])]


def completion_document(prompt: str, completion: str, tokenizer: Tokenizer, ends: Collection[int]) -> Document:
    """A text and what follows it, without a template; the end of the text follows that."""
    _check_answer(completion, tokenizer, ends)
    start, rest = _continue(prompt, prompt + completion, tokenizer, special=True)
    ids = [*start, *rest, _end(tokenizer, ends)]
    return _document(ids, [(len(start), len(ids))])


def _document(ids: list[int], answers: list[tuple[int, int]]) -> Document:
    scored = set(chain.from_iterable(range(*answer) for answer in answers))
    return ids, [place in scored for place in range(len(ids))]


def _answer(messages: Sequence[dict[str, str]], tokenizer: Tokenizer, ends: Collection[int]) -> Answer:
    """The last message as an answer to those before it."""
    _check_answer(messages[-1]["content"], tokenizer, ends)
    given = tokenizer.render_chat(messages[:-1])
    said = tokenizer.render_chat(messages, add_generation_prompt=False)
    if not said.startswith(given):
        same = next(i for i, letter in enumerate(given) if said[i : i + 1] != letter)
        raise TokenizerError(
            f"the chat template asks for an answer with {shown(given[same:])}, and begins one with "
            f"{shown(said[same:])}: what it would learn is not what it will be asked"
        )
    start, rest = _continue(given, said, tokenizer)
    end = next((place for place, token in enumerate(rest) if token in ends), None)
    if end is None:  # the template does not say where an answer ends; white space after it is the next message's
        start, rest = _continue(given, given + said[len(given) :].rstrip(), tokenizer)
        end, rest = len(rest), [*rest, _end(tokenizer, ends)]
    return [*start, *rest[: end + 1]], len(start)


def _check_answer(text: str, tokenizer: Tokenizer, ends: Collection[int]) -> None:
    if held := {*tokenizer.encode(text, add_special_tokens=False)} & {*ends}:
        token = shown(tokenizer.decode([*held], skip_special_tokens=False))
        raise TokenizerError(f"an answer holds {token}, which would end it: take it out of the text")


def _continue(given: str, said: str, tokenizer: Tokenizer, special: bool = False) -> tuple[list[int], list[int]]:
    """The ids of `given`, as a request has them, and of what follows it in `said`."""
    start, whole = tokenizer.encode(given, special), tokenizer.encode(said, special)
    if whole[: len(start)] == start:
        return start, whole[len(start) :]
    rest = tokenizer.encode(said[len(given) :], add_special_tokens=False)  # where a token would begin in what is given
    if tokenizer.decode([*start, *rest], False) != tokenizer.decode(whole, False):
        raise TokenizerError(
            f"no token begins where the answer does, between {shown(given[-20:])} and "
            f"{shown(said[len(given) :][:20])}: begin it with a space or a line break, or end what is before it so"
        )
    return start, rest


def _end(tokenizer: Tokenizer, ends: Collection[int]) -> int:
    if not ends:
        raise TokenizerError("the checkpoint names no token that ends a text (eos_token): answers would have no end")
    return min(ends) if tokenizer.eos_token_id is None else tokenizer.eos_token_id
