"""Prefill, decode_one_token, and when to stop.

Generation has two phases with opposite bottlenecks. *Prefill* feeds the whole prompt at once: many
tokens share each weight that is read, so it is bound by arithmetic. *Decoding* then adds one token per
step, and each step reads every weight of the model for one column of output: it is bound by memory
bandwidth. This room holds both, and `Row.commit`, which alone decides when a row is finished.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minillm.cache import StaticCache
from minillm.model import Decoder
from minillm.options import GenerationConfig
from minillm.sampling import Sampling, next_token
from minillm.steps import Steps
from minillm.tokenizer import TextStream, Tokenizer

_CATCH_UP = 2  # tokens, at most, that a draft model lacks between two steps: fed as a step and not as a prompt
_LOOK_EVERY = 8  # decode steps between two looks at an accelerator's tokens


@dataclass
class Row:
    """One row of a running request: what it was asked, what it has said, and whether it is finished."""

    prompt: list[int]
    max_new_tokens: int
    eos_token_ids: frozenset[int]
    stream: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None  # None while running, then "eos", "stop_string" or "length"
    target_steps: int = 0  # forward passes of the model that gave this row tokens, prefill's included
    drafted: int = 0  # tokens that were proposed to this row
    from_draft: list[bool] = field(default_factory=list)  # for each of token_ids, whether it was one of them

    def commit(self, tokens: Sequence[int], logprobs: Sequence[float] = (), drafts: int = 0) -> int:
        """Accept what one forward pass gave, token by token, until the row is finished; returns how many.

        Every way of generating ends here, so that none can differ about when to stop. The EOS token is
        counted among `token_ids` but is no text; text ends before a stop string. The first `drafts` of the
        tokens were proposed by a draft.
        """
        self.target_steps += 1
        for count, token in enumerate(tokens):
            if self.finish_reason is not None:
                return count
            self.token_ids.append(token)
            self.from_draft.append(count < drafts)
            self.logprobs.extend(logprobs[count : count + 1])
            if token in self.eos_token_ids:
                self.finish_reason = "eos"
            else:
                self.text += self.stream.push(token)
                if self.stream.stopped:
                    self.finish_reason = "stop_string"
                elif len(self.token_ids) == self.max_new_tokens:
                    self.finish_reason = "length"
            if self.finish_reason is not None:
                self.text += self.stream.finish()
                if self.stream.stopped:  # what was held back completed one
                    self.finish_reason = "stop_string"
        return len(tokens)


def new_row(prompt: list[int], config: GenerationConfig, budget: int, eos: frozenset[int], tokenizer: Tokenizer) -> Row:
    return Row(prompt, budget, eos, TextStream(tokenizer, prompt, config.stops))


def prefill(model: Decoder | Steps, cache: StaticCache, ids: Sequence[Sequence[int]], start: Sequence[int]) -> Tensor:
    """Feed row b the tokens `ids[b]` at positions `start[b]`, `start[b] + 1`, ... in chunks of `cache.max_step`.

    Rows may differ in length; of a row without tokens the result means nothing. Returns the logits after each
    row's last token, `[B, V]` float32. Only that one column goes through the head: with a vocabulary of 128,000
    the logits of a whole prompt would be the largest tensor of all. One or two tokens are fed as a decode step
    is, which may be recorded.
    """
    device, step = cache.device, cache.max_step
    longest = max(len(row) for row in ids)
    last = torch.zeros(len(ids), model.config.hidden_size, device=device, dtype=cache.dtype)  # [B, d]
    for begin in range(0, longest, step):
        chunk = [list(row[begin : begin + step]) for row in ids]
        width = max(len(row) for row in chunk)
        input_ids = torch.tensor([row + [0] * (width - len(row)) for row in chunk], device=device)  # [B, T]
        positions = torch.tensor(
            [
                [*range(first + begin, first + begin + len(row)), *[-1] * (width - len(row))]
                for row, first in zip(chunk, start, strict=True)
            ],
            device=device,
        )  # [B, T]
        used = max(first + begin + len(row) for row, first in zip(chunk, start, strict=True))
        if longest <= _CATCH_UP:
            logits = model(input_ids, positions, cache, used)  # [B, T, V]
            return torch.stack([logits[b, len(row) - 1] for b, row in enumerate(ids)])  # [B, V]
        fresh = begin == 0 and not any(start)
        hidden = model.hidden_states(input_ids, positions, cache, key_length=used, from_start=fresh)  # [B, T, d]
        for b, row in enumerate(chunk):
            if row and begin + len(row) == len(ids[b]):
                last[b] = hidden[b, len(row) - 1]
    return model.logits(last)


def next_logits(
    model: Decoder | Steps, token: Tensor, cache_position: Tensor, cache: StaticCache, key_length: int | None = None
) -> Tensor:
    """One decode step: `token [B, 1]` at `cache_position [B, 1]` -> logits of the next token, `[B, V]`."""
    return model(token, cache_position, cache, key_length)[:, -1]


@torch.no_grad()  # and not inference mode: this function may be compiled, with tensors from outside
def decode_one_token(
    model: Decoder | Steps,
    token: Tensor,
    cache_position: Tensor,
    cache: StaticCache,
    sampling: Sampling | None = None,
    key_length: int | None = None,
) -> Tensor:
    """Feed one token per row and choose the next one.

    Args:
        model: `llm.model`, or `llm.steps`, which is faster and gives the same.
        token: `[B, 1]` int64, the newest token of each row.
        cache_position: `[B, 1]` int64, where it stands; -1 for a row that is finished.
        cache: holds everything before; gains this token.
        sampling: how to choose; greedy by default.
        key_length: see `StaticCache.view`.

    Returns `[B, 1]` int64. The loop around it is the "advanced usage: compile decode_one_token yourself"
    of the guide "LLM inference optimization".
    """
    logits = next_logits(model, token, cache_position, cache, key_length)  # [B, V]
    if sampling is None:
        return logits.argmax(dim=-1, keepdim=True)
    return next_token(logits, sampling, cache_position[:, 0] + 1)[:, None]


def reuse_prefix(cache: StaticCache, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Cut the cache back to what it shares with the prompts; returns how many tokens of each it still holds."""
    kept = []
    for row, (held, prompt) in enumerate(zip(cache.token_ids, prompts, strict=True)):
        # One token at least must be fed: its logits are not in the cache.
        limit = min(len(held), len(prompt) - 1)
        same = next((i for i in range(limit) if held[i] != prompt[i]), limit)
        # A ring that has moved on cannot be cut that far back: start that row again.
        kept.append(same if cache.can_truncate(row, same) else 0)
    cache.truncate(kept)
    return kept


def begin(
    model: Decoder | Steps, cache: StaticCache, rows: list[Row], sampling: Sampling
) -> tuple[Tensor, Tensor | None]:
    """Feed what the cache does not hold yet of each prompt.

    Returns the logits of the first new token, `[B, V]`, and, where a repetition penalty is set, which
    tokens each row has seen, `[B, V]` bool.
    """
    held = cache.lengths
    logits = prefill(model, cache, [row.prompt[n:] for row, n in zip(rows, held, strict=True)], held)  # [B, V]
    if sampling.repetition_penalty is None:
        return logits, None
    seen = torch.zeros_like(logits, dtype=torch.bool)  # [B, V]
    for b, row in enumerate(rows):
        seen[b, torch.tensor(row.prompt, device=cache.device)] = True
    return logits, seen


class Burst:
    """Several decode steps in a row without a look at what they gave: everything a step needs is a tensor.

    Looking at a token is free on a CPU, so there a burst is one step. An accelerator works through a queue, and
    each look waits until the queue is empty: there it is worth running a few steps past a row's end.
    """

    def __init__(self, model: Decoder | Steps, cache: StaticCache, rows: list[Row], sampling: Sampling):
        self.model, self.cache, self.sampling = model, cache, sampling
        device = cache.device
        self.logits, self.seen = begin(model, cache, rows, sampling)  # [B, V], [B, V] or None
        self.position = torch.tensor([len(row.prompt) for row in rows], device=device)  # [B], of the next token
        self.last = torch.tensor([len(row.prompt) + row.max_new_tokens - 1 for row in rows], device=device)  # [B]
        # One request, one set of EOS ids for all its rows.
        self.eos = torch.tensor(sorted(rows[0].eos_token_ids), dtype=torch.int64, device=device)  # [E]
        self.done = torch.zeros(len(rows), dtype=torch.bool, device=device)  # [B]
        self.token: Tensor | None = None  # [B], the newest ones, not fed yet

    def run(self, steps: int, longest: int, logprobs: bool) -> tuple[Tensor, Tensor | None]:
        """The next tokens of every row, `[B, steps]`, and with `logprobs` theirs, float32.

        `longest` is how many tokens the longest row that still runs has. What follows the end of a row is
        meaningless; it is not stored.
        """
        tokens, chosen = [], []
        for step in range(steps):
            if self.token is not None:
                # A finished row stays in the batch as padding; it writes nothing and nobody reads its logits.
                fed = torch.where(self.done, -1, self.position - 1)[:, None]  # [B, 1]
                self.logits = next_logits(self.model, self.token[:, None], fed, self.cache, longest + step)  # [B, V]
            self.token = next_token(self.logits, self.sampling, self.position, self.seen)  # [B]
            if self.seen is not None:
                self.seen.scatter_(1, self.token[:, None], True)
            if logprobs:
                chosen.append(self.logits.log_softmax(dim=-1).gather(1, self.token[:, None])[:, 0])  # [B]
            tokens.append(self.token)
            ended = (self.token[:, None] == self.eos).any(dim=1)  # [B]
            self.done = self.done | ended | (self.position >= self.last)
            self.position = self.position + 1
        return torch.stack(tokens, dim=1), torch.stack(chosen, dim=1) if logprobs else None


def run(
    model: Decoder | Steps,
    cache: StaticCache,
    rows: list[Row],
    sampling: Sampling,
    logprobs: bool,
    look_every: int | None = None,
) -> Iterator[None]:
    """Generate until every row is finished; yields after each look at the new tokens, for whoever streams.

    The cache may already hold the beginning of each prompt: only what follows is computed. On return
    it holds every token but each row's last, whose keys nobody has needed yet. `look_every` is the number of
    steps between two looks: by default 1 on a CPU, 8 elsewhere.
    """
    if look_every is None:
        look_every = 1 if cache.device.type == "cpu" else _LOOK_EVERY
    burst = Burst(model, cache, rows, sampling)
    running = rows
    while running:
        left = max(row.max_new_tokens - len(row.token_ids) for row in running)
        longest = max(len(row.prompt) + len(row.token_ids) for row in running)
        # A stop string is only seen here, after the row has gone on: the cache must be able to forget that.
        steps = min(look_every, left, cache.max_step)
        tokens, chosen = burst.run(steps, longest, logprobs)  # [B, steps]
        chosen = chosen.tolist() if logprobs else [()] * len(rows)
        for row, new, logprob in zip(rows, tokens.tolist(), chosen, strict=True):
            for step in range(steps):
                if row.finish_reason is None:
                    row.commit(new[step : step + 1], logprob[step : step + 1])
        yield
        running = [row for row in rows if row.finish_reason is None]
        burst.done |= torch.tensor([row.finish_reason is not None for row in rows], device=cache.device)
    if look_every > 1:
        cache.truncate([len(row.prompt) + len(row.token_ids) - 1 for row in rows])
