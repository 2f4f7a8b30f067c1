"""One call of generate: checked before anything is computed, told as `Completion`s."""

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from minillm.attention import FEW_ROWS
from minillm.batch import Batch
from minillm.cache import StaticCache
from minillm.errors import RequestError, shown
from minillm.options import GenerationConfig, as_list, merge_options
from minillm.row import Row
from minillm.sampling import Sampling
from minillm.tokenizer import TextStream

Prompt = str | Sequence[int]

SEATS = FEW_ROWS  # rows that run at a time: so many keep their bits
_DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Stats:
    """Counts and seconds of one request; a batch shares the seconds."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the cache and not computed again
    new_tokens: int
    prefill_seconds: float  # until the first new token, if there was one
    decode_seconds: float  # from the first new token to the last
    target_steps: int  # forward passes of the model that gave tokens, the prompt's included; plain: new_tokens
    drafted: int  # tokens that a draft model or prompt lookup proposed
    accepted: int  # of them, those that became text

    @property
    def tokens_per_second(self) -> float:
        """Decode speed of this row: the first token is prefill's."""
        return (self.new_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that became text; what follows a rejected one counts as rejected."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_target_step(self) -> float:
        """What speculation gains: 1 without."""
        return self.new_tokens / self.target_steps if self.target_steps else 0.0


@dataclass(frozen=True)
class Completion:
    """What `generate` returns for one prompt."""

    text: str  # the new text, without EOS and without the stop string
    token_ids: list[int]  # the new tokens, EOS included if it was produced
    finish_reason: str  # "eos" | "stop_string" | "length" | "cancelled" (by `Handle.cancel`)
    logprobs: list[float] | None  # of each new token under the model itself, before temperature and filters
    from_draft: list[bool]  # for each of token_ids, whether it is an accepted draft
    stats: Stats


class Request:
    """One checked call of generate: its rows, and the batch they are.

    Args:
        llm: the `LLM` that is asked.
        prompt, generation_config, cache, options: as for `LLM.generate`.
        drafting: who drafts for it, a `speculative.drafting.Drafting`.
        seats: how many rows run at a time in a cache of the request's own.

    Raises `RequestError`, and `CacheError` for a cache that does not fit.
    """

    def __init__(
        self,
        llm,
        prompt: Prompt | Sequence[Prompt],
        generation_config: GenerationConfig | None,
        cache: StaticCache | None,
        drafting,
        options: dict,
        seats: int = SEATS,
    ):
        check_whole("seats", seats, 1)
        prompts, self.single = as_prompts(prompt)
        if cache is not None:
            if not isinstance(cache, StaticCache):
                raise RequestError(f"cache must be a StaticCache, not {shown(cache)}")
            cache.check_model(llm.model, len(prompts))
        room = None if cache is None else cache.max_cache_len
        if llm.model.ranks.joined:  # steps of another shape on another rank would wait for each other, or add up wrong
            held = None if cache is None else (cache.max_cache_len, cache.max_step, cache.token_ids)
            llm.model.ranks.agree(None, (seats, drafting.assistant is None, held))
        self.rows, config = new_rows(llm, prompts, generation_config, options, room)
        drafting.check(config)
        self._borrowed: list[tuple] = []  # caches, and the `Steps` that get them back in the end
        if cache is None:
            longest, seats = max(row.planned_length for row in self.rows), min(seats, len(self.rows))
            cache = self._borrow(llm.steps, seats, longest).rows(0, seats)  # it may have more
        else:
            for row in self.rows:
                row.planned_length = None  # whatever the cache was made for
        drafting.make_proposer(config, cache, self._borrow if self._borrowed else None)
        for row in self.rows:
            drafting.attach(row, config, cache.max_step)
        self.batch = Batch(llm.steps, cache, self.rows)

    def _borrow(self, steps, rows: int, length: int) -> StaticCache:
        cache = steps.borrow_cache(rows, length)
        self._borrowed.append((steps, cache))
        return cache

    def loop(self) -> Iterator[list[Row]]:
        """The loop over the rows, not begun yet; it yields after each tick the rows that ended."""
        return chain(self.batch.run(), self._over())

    def _over(self) -> Iterator[list[Row]]:
        for steps, cache in self._borrowed:
            steps.give_back(cache)
        yield from ()

    def pieces(self) -> Iterator[str]:
        sent = 0
        for _ in self.loop():
            text = self.rows[0].text
            if len(text) > sent:
                yield text[sent:]
                sent = len(text)


def completion(row: Row) -> Completion:
    """What a finished row has become."""
    return Completion(
        text=row.text,
        token_ids=row.token_ids,
        finish_reason=row.finish_reason,
        logprobs=row.logprobs if row.wants_logprobs else None,
        from_draft=row.from_draft,
        stats=Stats(
            prompt_tokens=len(row.prompt),
            reused_tokens=row.reused,
            new_tokens=len(row.token_ids),
            prefill_seconds=row.first_at - row.started if row.token_ids else 0.0,
            decode_seconds=row.last_at - row.first_at,
            target_steps=row.target_steps,
            drafted=row.drafted,
            accepted=sum(row.from_draft),
        ),
    )


def new_rows(
    llm, prompts: Sequence[Prompt], generation_config: GenerationConfig | None, options: dict, room: int | None
) -> tuple[list[Row], GenerationConfig]:
    """A row for each prompt, and what is asked for them all. `room`: the tokens a row of the cache holds, if there is
    one. Raises `RequestError`."""
    config = merge_options(llm.defaults, generation_config, options)
    ids = [_ids(llm, prompt, number) for number, prompt in enumerate(prompts)]
    asked = options.get("max_new_tokens") or (generation_config and generation_config.max_new_tokens)
    limit = "the model's positions hold"
    if room is None or room >= llm.config.max_positions:
        room = llm.config.max_positions
    else:
        limit = "the cache holds"
    budgets = [_budget(len(row), number, room, limit, asked, config) for number, row in enumerate(ids)]
    eos, seeds = frozenset(as_list(config.eos_token_id)), llm.model.ranks.agree(_seeds(config, len(ids)), (ids, config))
    rows = [
        Row(
            prompt=row,
            max_new_tokens=budget,
            eos_token_ids=eos,
            stream=TextStream(llm.tokenizer, row, config.stops),
            sampling=Sampling.of(config, [seed], llm.device),
            wants_logprobs=bool(config.logprobs),
            number=number,
            planned_length=len(row) + budget,
        )
        for number, (row, budget, seed) in enumerate(zip(ids, budgets, seeds, strict=True))
    ]
    return rows, config


def as_prompts(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether there was just one."""
    if isinstance(prompt, str):
        return [prompt], True
    if not isinstance(prompt, list | tuple) or not prompt:
        raise RequestError(
            f"a prompt is a text, a list of token ids, or a non-empty list of those, not {shown(prompt)}"
        )
    if all(isinstance(item, int) for item in prompt):
        return [prompt], True
    for item in prompt:
        if not isinstance(item, str | list | tuple):
            raise RequestError(f"a list of prompts holds texts or lists of token ids, not {shown(item)}")
    return list(prompt), False


def check_whole(name: str, value: int, least: int) -> None:
    """Raise `RequestError` for anything but a whole number from `least` on."""
    if type(value) is not int or value < least:
        raise RequestError(f"{name} must be a whole number >= {least}, not {shown(value)}")


def _ids(llm, prompt: Prompt, number: int) -> list[int]:
    """The token ids of one prompt, all of them within the model's vocabulary."""
    size = llm.config.vocab_size
    ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise RequestError(f"prompt {number} is empty: it needs at least one token")
    for token in ids:
        if type(token) is not int or not 0 <= token < size:
            if isinstance(prompt, str):
                raise RequestError(
                    f"prompt {number}: the tokenizer gives id {token} but the model has {size} embeddings: "
                    "tokenizer.json and the weights do not belong together"
                )
            raise RequestError(f"prompt {number}: {shown(token)} is not a token id from 0 to {size - 1}")
    return ids


def _budget(length: int, number: int, room: int, limit: str, asked: int | None, config: GenerationConfig) -> int:
    """How many new tokens a row may have; an error if what was `asked` for does not fit."""
    wanted = asked or min(config.max_new_tokens or _DEFAULT_NEW_TOKENS, max(room - length, 1))
    if length + wanted > room:
        raise RequestError(
            f"prompt {number} has {length} tokens and {wanted} new ones were asked for, but {limit} "
            f"{room}: shorten the prompt, lower max_new_tokens"
            + (", or use a larger max_cache_len" * ("cache" in limit))
        )
    return wanted


def _seeds(config: GenerationConfig, rows: int) -> list[int]:
    if config.seed is None:
        return [secrets.randbits(63) for _ in range(rows)]
    if isinstance(config.seed, int):
        return [config.seed] * rows
    if len(config.seed) != rows:
        raise RequestError(f"seed lists {len(config.seed)} numbers for {rows} prompts")
    return list(config.seed)
