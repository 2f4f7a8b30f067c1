"""Prefill and decode_one_token. To begin with, read `generate_plain`: all of it on one screen.

Generation has two phases with opposite bottlenecks. *Prefill* feeds the whole prompt at once: many
tokens share each weight that is read, so it is bound by arithmetic. *Decoding* then adds one token per
step, and each step reads every weight of the model for one column of output: it is bound by memory
bandwidth. This room holds both; `batch.py` has the loop that serves many rows.

Wherever a function takes a `Decoder`, `faster.steps.Steps` will do: it has the same parts and is called alike.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from minillm.cache import StaticCache
from minillm.errors import CacheError, RequestError
from minillm.model import Decoder
from minillm.options import GenerationConfig, as_list
from minillm.sampling import Sampling, argmax, next_token
from minillm.tokenizer import TextStream, Tokenizer


def read_chunk(model: Decoder, row: StaticCache, tokens: Sequence[int], start: int) -> Tensor:
    """Feed one row, a cache of batch size 1, at most `max_step` tokens at positions `start`, `start` + 1, ...

    A row is fed by itself: so its bits do not depend on its neighbours, whose lengths would choose how the library
    adds up, and nothing is spent on padding. Returns the last token's hidden state, `[1, d]`.
    """
    bound = start + len(tokens)
    chunk = torch.tensor([tokens], device=row.device)  # [1, T]
    position = torch.arange(start, bound, device=row.device)[None]  # [1, T]
    with model.own_dtypes(), row.writing(model, chunk, position):
        x, rotary = model.embed(chunk, position, row)
        return model.walk(x, rotary, position, row, bound, from_start=start == 0)[:, -1]


def prefill(model: Decoder, cache: StaticCache, ids: Sequence[Sequence[int]], start: Sequence[int]) -> Tensor:
    """Feed row b the tokens `ids[b]` at positions `start[b]`, `start[b] + 1`, ... in chunks of `cache.max_step`.

    Returns the logits after each row's last token, `[B, V]` float32 (of a row without tokens they mean nothing). Only
    those go through the head: with a vocabulary of 128,000 the logits of a whole prompt would be the largest tensor
    of all. Raises `CacheError` for what does not fit the cache.
    """
    if not len(ids) == len(start) == cache.batch_size:
        raise CacheError(f"prefill: {len(ids)} prompts and {len(start)} starts for a cache of {cache.batch_size} rows")
    step = cache.max_step
    last = torch.zeros(len(ids), model.config.hidden_size, device=cache.device, dtype=cache.dtype)  # [B, d]
    for b, tokens in enumerate(ids):
        for begin in range(0, len(tokens), step):
            last[b] = read_chunk(model, cache.rows(b, b + 1), tokens[begin : begin + step], start[b] + begin)[0]
    with model.own_dtypes():
        return model.logits(last)


@torch.no_grad()  # and not inference mode: this function may be compiled, with tensors from outside
def decode_one_token(
    model: Callable[[Tensor, Tensor, StaticCache], Tensor],
    token: Tensor,
    cache_position: Tensor,
    cache: StaticCache,
    sampling: Sampling | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Feed one token per row and choose the next one.

    Args:
        model: `llm.model`, or `llm.steps`, which is faster and gives the same.
        token: `[B, 1]` int64, the newest token of each row.
        cache_position: `[B, 1]` int64, where it stands; -1 for a row that is finished.
        cache: holds everything before; gains this token.
        sampling: how to choose; greedy by default.
        seen: `[B, V]` bool, the tokens of each row so far, where `sampling` has a repetition penalty.

    Returns `[B, 1]` int64. Raises `CacheError` for what does not fit the cache, `RequestError` for a penalty without
    `seen`; then nothing is fed. The loop around it is the "advanced usage: compile decode_one_token yourself"
    of the guide "LLM inference optimization".
    """
    if sampling is not None and sampling.repetition_penalty is not None:
        shape = len(token), cache.config.vocab_size
        if not isinstance(seen, Tensor) or seen.dtype != torch.bool or seen.shape != shape:
            raise RequestError(f"a repetition penalty needs the tokens so far: seen, {list(shape)} bool")
    logits = model(token, cache_position, cache)[:, -1]  # [B, V]
    if sampling is None:
        return argmax(logits)[:, None]
    return next_token(logits, sampling, cache_position[:, 0] + 1, seen)[:, None]


def reuse_prefix(row: StaticCache, prompt: Sequence[int]) -> int:
    """Cut one row, a cache of batch size 1, back to what it shares with the prompt; returns how many tokens."""
    held = row.token_ids[0]
    # One token at least must be fed: its logits are not in the cache.
    limit = min(len(held), len(prompt) - 1)
    same = next((i for i in range(limit) if held[i] != prompt[i]), limit)
    # A ring that has moved on cannot be cut that far back: start again.
    kept = same if row.can_truncate(0, same) else 0
    row.truncate(kept)
    return kept


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
