"""Prefill, decode_one_token, and when to stop. To begin with, read `generate_plain`: all of it on one screen.

Generation has two phases with opposite bottlenecks. *Prefill* feeds the whole prompt at once: many
tokens share each weight that is read, so it is bound by arithmetic. *Decoding* then adds one token per
step, and each step reads every weight of the model for one column of output: it is bound by memory
bandwidth. This room holds both, and `Row.commit`, which alone decides when a row is finished.

Wherever a function takes a `Decoder`, `faster.steps.Steps` will do: it has the same parts and is called alike.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from minillm.cache import StaticCache
from minillm.errors import NumericalError
from minillm.model import Decoder
from minillm.options import GenerationConfig, as_list
from minillm.sampling import Sampling, next_token
from minillm.tokenizer import TextStream, Tokenizer

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
    reused: int = 0  # tokens of the prompt that the cache held already
    started: float = 0.0  # seconds of `time.perf_counter`: when its prompt was begun,
    first_at: float = 0.0  # when its first new token was there,
    last_at: float = 0.0  # and the newest

    def commit(self, tokens: Sequence[int], logprobs: Sequence[float] = (), drafts: int = 0) -> int:
        """Accept what one forward pass gave, token by token, until the row is finished; returns how many.

        Every way of generating ends here, so that none can differ about when to stop. The EOS token is
        counted among `token_ids` but is no text; text ends before a stop string. The first `drafts` of the
        tokens were proposed by a draft.
        """
        self.target_steps += 1
        self.last_at = time.perf_counter()
        self.first_at = self.first_at or self.last_at
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


def prefill(model: Decoder, cache: StaticCache, ids: Sequence[Sequence[int]], start: Sequence[int]) -> Tensor:
    """Feed row b the tokens `ids[b]` at positions `start[b]`, `start[b] + 1`, ... in chunks of `cache.max_step`.

    A row is fed by itself: so its bits do not depend on its neighbours, whose lengths would choose how the library
    adds up, and nothing is spent on padding. Returns the logits after each row's last token, `[B, V]` float32 (of a row
    without tokens they mean nothing). Only those go through the head: with a vocabulary of 128,000 the logits of a
    whole prompt would be the largest tensor of all.
    """
    device, step = cache.device, cache.max_step
    last = torch.zeros(len(ids), model.config.hidden_size, device=device, dtype=cache.dtype)  # [B, d]
    with model.own_dtypes():
        for b, tokens in enumerate(ids):
            row = cache if cache.batch_size == 1 else cache.rows(b, b + 1)
            for begin in range(0, len(tokens), step):
                chunk = torch.tensor([tokens[begin : begin + step]], device=device)  # [1, T]
                first, bound = start[b] + begin, start[b] + begin + chunk.shape[1]
                position = torch.arange(first, bound, device=device)[None]  # [1, T]
                with row.writing(model, chunk, position):
                    x, rotary = model.embed(chunk, position, row)
                    hidden = model.walk(x, rotary, position, row, bound, from_start=first == 0)  # [1, T, d]
                last[b] = hidden[0, -1]
        return model.logits(last)


@torch.no_grad()  # and not inference mode: this function may be compiled, with tensors from outside
def decode_one_token(
    model: Callable[[Tensor, Tensor, StaticCache], Tensor],
    token: Tensor,
    cache_position: Tensor,
    cache: StaticCache,
    sampling: Sampling | None = None,
) -> Tensor:
    """Feed one token per row and choose the next one.

    Args:
        model: `llm.model`, or `llm.steps`, which is faster and gives the same.
        token: `[B, 1]` int64, the newest token of each row.
        cache_position: `[B, 1]` int64, where it stands; -1 for a row that is finished.
        cache: holds everything before; gains this token.
        sampling: how to choose; greedy by default.

    Returns `[B, 1]` int64. The loop around it is the "advanced usage: compile decode_one_token yourself"
    of the guide "LLM inference optimization".
    """
    logits = model(token, cache_position, cache)[:, -1]  # [B, V]
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


def seen_tokens(rows: list[Row], logits: Tensor, sampling: Sampling) -> Tensor | None:
    """Where a repetition penalty is set, which tokens each row's prompt holds: bool like `logits [B, V]`."""
    if sampling.repetition_penalty is None:
        return None
    seen = torch.zeros_like(logits, dtype=torch.bool)  # [B, V]
    for b, row in enumerate(rows):
        seen[b, torch.tensor(row.prompt, device=logits.device)] = True
    return seen


@contextmanager
def working(cache: StaticCache) -> Iterator[None]:
    """Around our own work between two yields: across one, a mode would leak into the caller's code."""
    with torch.inference_mode(), cache.hold.turn():
        yield


def reuse(model: Decoder, cache: StaticCache, rows: list[Row]) -> list[int]:
    """Note what the cache holds already of each row's prompt; returns how many tokens. The clock starts."""
    if not cache.hold.same_weights(model.fingerprint()):
        cache.reset()  # its keys were made by others
    started, held = time.perf_counter(), reuse_prefix(cache, [row.prompt for row in rows])
    for row, count in zip(rows, held, strict=True):
        row.started, row.reused = started, count
    return held


def run(
    model: Decoder,
    cache: StaticCache,
    rows: list[Row],
    sampling: Sampling,
    logprobs: bool,
    look_every: int | None = None,
) -> Iterator[None]:
    """Generate until every row is finished; yields after each look at the new tokens, for whoever streams.

    The cache may already hold the beginning of each prompt: only what follows is computed. On return
    it holds every token but each row's last, whose keys nobody has needed yet.

    `look_every` is the number of steps between two looks. Looking at a token is free on a CPU: there it is 1. An
    accelerator works through a queue, and each look waits until that is empty: there it is 8, and it is worth running
    a few steps past a row's end. Everything that a step needs is a tensor, so nothing looks in between. Raises
    `NumericalError` where logits are infinite or not a number.
    """
    device = cache.device
    look_every = look_every or (1 if device.type == "cpu" else _LOOK_EVERY)
    with cache.hold.by(holder(rows)):
        with working(cache):
            held = reuse(model, cache, rows)
            logits = prefill(model, cache, [row.prompt[row.reused :] for row in rows], held)  # [B, V]
            seen = seen_tokens(rows, logits, sampling)  # [B, V] or None
            position = torch.tensor([len(row.prompt) for row in rows], device=device)  # [B], of the next token
            last = torch.tensor([len(row.prompt) + row.max_new_tokens - 1 for row in rows], device=device)  # [B]
            # One request, one set of EOS ids for all its rows.
            eos = torch.tensor(sorted(rows[0].eos_token_ids), dtype=torch.int64, device=device)  # [E]
            done = torch.zeros(len(rows), dtype=torch.bool, device=device)  # [B]
        token = None  # [B], the newest ones, not fed yet
        running = rows
        while running:
            left = max(row.max_new_tokens - len(row.token_ids) for row in running)
            # A stop string is only seen at the look, after the row has gone on: the cache must be able to forget that.
            steps = min(look_every, left, cache.max_step)
            tokens, chosen, largest = [], [], []
            with working(cache):
                for _ in range(steps):
                    if token is not None:
                        # A finished row stays as padding; it writes nothing and nobody reads its logits.
                        fed = torch.where(done, -1, position - 1)  # [B]
                        logits = model(token[:, None], fed[:, None], cache)[:, -1]  # [B, V]
                    token = next_token(logits, sampling, position, seen)  # [B]
                    if seen is not None:
                        seen.scatter_(1, token[:, None], True)
                    if logprobs:
                        chosen.append(logits.log_softmax(dim=-1).gather(1, token[:, None])[:, 0])  # [B]
                    tokens.append(token)
                    largest.append(logits.amax(dim=-1))  # [B]: NaN if any logit is
                    done = done | (token[:, None] == eos).any(dim=1) | (position >= last)  # [B]
                    position = position + 1
                _look(cache, rows, tokens, chosen, largest)
                running = [row for row in rows if row.finish_reason is None]
                done |= torch.tensor([row.finish_reason is not None for row in rows], device=device)
                if look_every > 1 and not running:
                    cache.truncate([len(row.prompt) + len(row.token_ids) - 1 for row in rows])
            yield


def _look(cache: StaticCache, rows: list[Row], tokens: list, chosen: list, largest: list) -> None:
    """Commit what some steps gave; of each step and row the token, perhaps its log-probability, the largest logit."""
    columns = (_columns(parts) or [()] * len(rows) for parts in (tokens, chosen, largest))
    for b, (row, new, logprobs, tops) in enumerate(zip(rows, *columns, strict=True)):
        for step, token in enumerate(new):
            if row.finish_reason is None:
                check_finite(cache, b, row, tops[step])
                row.commit([token], logprobs[step : step + 1])


def _columns(parts: list[Tensor]) -> list[list]:
    """Several `[B]` as one list per row. Side by side first, to wait for the device once."""
    return (torch.stack(parts, dim=1) if len(parts) > 1 else parts[0][:, None]).tolist() if parts else []


def check_finite(cache: StaticCache, number: int, row: Row, largest: float) -> None:
    """Raise `NumericalError`, and empty the cache, unless the largest logit of a step is a number."""
    if not math.isfinite(largest):
        cache.reset()  # its keys may be no numbers either
        raise NumericalError(
            f"row {number}, new token {len(row.token_ids) + 1}: the model's logits are infinite or not a number: "
            "activations exceed their dtype, or weights are damaged; try dtype='float32' or 'bfloat16'"
        )


def holder(rows: list[Row]) -> str:
    """Who a request is, for somebody who wants its cache."""
    return f"a request of {len(rows)} rows, running in thread {threading.current_thread().name!r}"


def generate_plain(model: Decoder, tokenizer: Tokenizer, prompt: str, config: GenerationConfig) -> str:
    """All of it, for one prompt: what `LLM.generate` does, without batches, reuse, drafts, streams or statistics.

    `config` sets `max_new_tokens` and, to sample, `seed`.
    """
    ids = tokenizer.encode(prompt)
    device = model.embedding.weight.device
    cache = StaticCache(model.config, 1, len(ids) + config.max_new_tokens, device, model.embedding.weight.dtype)
    sampling = Sampling.of(config, [config.seed or 0], device)
    stream, text = TextStream(tokenizer, ids, config.stops), ""
    logits = prefill(model, cache, [ids], [0])  # [1, V]: 1. the prompt, many tokens at a time
    seen = torch.zeros_like(logits, dtype=torch.bool)  # [1, V], for the repetition penalty
    seen[0, ids] = True
    for position in range(len(ids), len(ids) + config.max_new_tokens):
        place = torch.tensor([position], device=device)  # [1]
        token = next_token(logits, sampling, place, seen)  # [1]: 2. logits become a token
        if token.item() in as_list(config.eos_token_id):  # 3. is this the end?
            break
        text += stream.push(token.item())  # 4. a token becomes text, perhaps a word later
        if stream.stopped:
            break
        seen[0, token] = True
        if position + 1 < cache.max_cache_len:
            logits = model(token[:, None], place[:, None], cache)[:, -1]  # 5. one step: one token in, logits out
    return text + stream.finish()
