"""One call of generate: checked before anything is computed, run step by step, told as a `Completion`."""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from minillm.cache import StaticCache
from minillm.decode import new_row, reuse_prefix, run
from minillm.drafting import Proposer, make_proposer
from minillm.errors import RequestError
from minillm.options import GenerationConfig, as_list, merge_options
from minillm.sampling import Sampling
from minillm.speculative import run_speculative

Prompt = str | Sequence[int]

_DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Stats:
    """Counts and seconds of one request; a batch shares the seconds."""

    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the cache and not computed again
    new_tokens: int
    prefill_seconds: float  # until the first new token
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
        return self.new_tokens / self.target_steps if self.target_steps else 0.0


@dataclass(frozen=True)
class Completion:
    """What `generate` returns for one prompt."""

    text: str  # the new text, without EOS and without the stop string
    token_ids: list[int]  # the new tokens, EOS included if it was produced
    finish_reason: str  # "eos" | "stop_string" | "length"
    logprobs: list[float] | None  # of each new token under the model itself, before temperature and filters
    from_draft: list[bool]  # for each of token_ids, whether it is an accepted draft
    stats: Stats


class Request:
    """One checked call of generate: the rows, their cache, and the loop over them.

    Args:
        llm, assistant: the `LLM` that is asked, and the one that drafts for it (or None).
        prompt, generation_config, cache, options: as for `LLM.generate`.
        previous: the proposer of the conversation's last turn, see `make_proposer`.

    Raises `RequestError`.
    """

    def __init__(
        self,
        llm,
        prompt: Prompt | Sequence[Prompt],
        generation_config: GenerationConfig | None,
        cache: StaticCache | None,
        assistant,
        options: dict,
        previous: Proposer | None = None,
    ):
        self.llm = llm
        config = merge_options(llm.defaults, generation_config, options)
        prompts, self.single = _prompts(prompt)
        ids = [self._ids(one, number) for number, one in enumerate(prompts)]
        explicit = options.get("max_new_tokens") or (generation_config and generation_config.max_new_tokens)
        room = llm.config.max_positions if cache is None else min(cache.max_cache_len, llm.config.max_positions)
        budgets = [self._budget(len(row), number, room, explicit, config, cache) for number, row in enumerate(ids)]
        lengths = [len(row) + budget for row, budget in zip(ids, budgets, strict=True)]
        planned = lengths if cache is None else cache.max_cache_len
        if cache is None:
            cache = StaticCache(
                llm.config, len(ids), max(lengths), device=llm.device, dtype=llm.dtype, planned_length=planned
            )
        else:
            _check_cache(cache, llm, len(ids))
        if assistant is not None and not hasattr(assistant, "steps"):
            raise RequestError(f"assistant_model must be an LLM (LLM.from_pretrained(...)), not {assistant!r}")
        self.cache = cache
        eos = frozenset(as_list(config.eos_token_id))
        self.rows = [new_row(row, config, budget, eos, llm.tokenizer) for row, budget in zip(ids, budgets, strict=True)]
        self.sampling = Sampling.of(config, _seeds(config, len(ids)), llm.device)
        self.logprobs = bool(config.logprobs)
        self.proposer = make_proposer(llm, assistant, config, self.rows, cache, planned, previous)

    def _ids(self, prompt: Prompt, number: int) -> list[int]:
        vocabulary = self.llm.config.vocab_size
        if isinstance(prompt, str):
            ids = self.llm.tokenizer.encode(prompt)
        else:
            ids = list(prompt)
            for token in ids:
                if type(token) is not int or not 0 <= token < vocabulary:
                    raise RequestError(f"prompt {number}: {token!r} is not a token id from 0 to {vocabulary - 1}")
        if not ids:
            raise RequestError(f"prompt {number} is empty: it needs at least one token")
        if max(ids) >= vocabulary:
            raise RequestError(
                f"prompt {number}: the tokenizer gives id {max(ids)} but the model has {vocabulary} embeddings: "
                "tokenizer.json and the weights do not belong together"
            )
        return ids

    def _budget(self, length: int, number: int, room: int, explicit: int | None, config, cache) -> int:
        """How many new tokens the row may have; an error if what was asked for does not fit."""
        limit = "the model's positions" if room == self.llm.config.max_positions else "the cache"
        wanted = explicit or min(config.max_new_tokens or _DEFAULT_NEW_TOKENS, max(room - length, 1))
        if length + wanted > room:
            raise RequestError(
                f"prompt {number} has {length} tokens and {wanted} new ones were asked for, but {limit} hold "
                f"{room}: shorten the prompt, lower max_new_tokens" + (", or use a larger StaticCache" if cache else "")
            )
        return wanted

    def steps(self) -> Iterator[None]:
        """Run the request; yields whenever rows have grown."""
        self.started = time.perf_counter()
        with torch.inference_mode():
            self.reused = reuse_prefix(self.cache, [row.prompt for row in self.rows])
        self.first = None
        arguments = (self.llm.steps, self.cache, self.rows, self.sampling, self.logprobs)
        steps = run_speculative(*arguments, self.proposer) if self.proposer else run(*arguments)
        while True:
            # Only around our own work: across a yield the mode would leak into the caller's code.
            with torch.inference_mode():
                try:
                    next(steps)
                except StopIteration:
                    return
            self.last = time.perf_counter()
            self.first = self.first or self.last
            yield

    def pieces(self) -> Iterator[str]:
        sent = 0
        for _ in self.steps():
            text = self.rows[0].text
            if len(text) > sent:
                yield text[sent:]
                sent = len(text)

    def completions(self) -> list[Completion]:
        return [
            Completion(
                text=row.text,
                token_ids=row.token_ids,
                finish_reason=row.finish_reason,
                logprobs=row.logprobs if self.logprobs else None,
                from_draft=row.from_draft,
                stats=Stats(
                    prompt_tokens=len(row.prompt),
                    reused_tokens=reused,
                    new_tokens=len(row.token_ids),
                    prefill_seconds=self.first - self.started,
                    decode_seconds=self.last - self.first,
                    target_steps=row.target_steps,
                    drafted=row.drafted,
                    accepted=sum(row.from_draft),
                ),
            )
            for row, reused in zip(self.rows, self.reused, strict=True)
        ]


def _prompts(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether there was just one."""
    if isinstance(prompt, str):
        return [prompt], True
    if not isinstance(prompt, list | tuple) or not prompt:
        raise RequestError(f"a prompt is a text, a list of token ids, or a non-empty list of those, not {prompt!r}")
    if all(isinstance(item, int) for item in prompt):
        return [prompt], True
    for item in prompt:
        if not isinstance(item, str | list | tuple):
            raise RequestError(f"a list of prompts holds texts or lists of token ids, not {item!r}")
    return list(prompt), False


def _seeds(config: GenerationConfig, rows: int) -> list[int]:
    if config.seed is None:
        return [secrets.randbits(63) for _ in range(rows)]
    if isinstance(config.seed, int):
        return [config.seed] * rows
    if len(config.seed) != rows:
        raise RequestError(f"seed lists {len(config.seed)} numbers for {rows} prompts")
    return list(config.seed)


def _check_cache(cache: StaticCache, llm, rows: int) -> None:
    if cache.config != llm.config:
        raise RequestError("the cache was made for another model: build it with StaticCache(llm.config, ...)")
    if cache.batch_size != rows:
        raise RequestError(f"the cache has {cache.batch_size} rows for {rows} prompts")
    if cache.device != llm.device or cache.dtype != llm.dtype:
        raise RequestError(
            f"the cache is {cache.dtype} on {cache.device}, the model {llm.dtype} on {llm.device}: "
            "build it with device=llm.device, dtype=llm.dtype"
        )
