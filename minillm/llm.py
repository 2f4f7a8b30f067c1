"""LLM: a checkpoint ready to use. from_pretrained, generate, stream, conversation."""

import dataclasses
import difflib
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.attention import choose_backend
from minillm.cache import StaticCache
from minillm.checkpoint import load_decoder
from minillm.config import ModelConfig, load_config
from minillm.decode import GenerationConfig, generation_defaults, merge_options, new_row, reuse_prefix, run
from minillm.errors import BackendError, RequestError
from minillm.hub import find_checkpoint
from minillm.model import Decoder
from minillm.speculative import Proposer, make_proposer, run_speculative
from minillm.steps import Steps
from minillm.tokenizer import Tokenizer

Prompt = str | Sequence[int]

_DEFAULT_NEW_TOKENS = 256
_DEFAULT_CONVERSATION = 4096  # tokens a conversation's cache holds unless told otherwise
_OPTIONS = [field.name for field in dataclasses.fields(GenerationConfig)]


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


class LLM:
    """A decoder, its tokenizer and its defaults. Make one with `LLM.from_pretrained`.

    `model` is the decoder as it is written, `steps` the same made fast (see steps.py); both are called alike.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        config: ModelConfig,
        defaults: GenerationConfig,
        name: str = "model",
        compile: bool | str = "auto",
    ):
        self.tokenizer, self.config, self.defaults, self.name = tokenizer, config, defaults, name
        self.steps = Steps(model, compile)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        attention: str = "auto",
        quantize: str | None = None,
        quantize_head: bool = False,
        compile: bool | str = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        strict: bool = True,
    ) -> "LLM":
        """Load "demo" (the embedded model), "demo-draft", a folder, or a Hugging Face Hub id.

        Args:
            dtype: "float32", "bfloat16", "float16", or "auto" for what the checkpoint's config.json says.
            device: "cpu", "cuda", ..., or "auto": a CUDA device if there is one.
            attention: "math", "sdpa", "c" (CPU), "triton", or "auto": the fastest backend that can serve the model.
            quantize: "int8", "int4" or "int4-g32", "int4-g64", "int4-g128": store the linear layers' weights in
                this format, quantizing while they stream in. quantize_head: the output head too, in int8.
            compile: "auto": steps are recorded and replayed, with nothing to wait for; True: `torch.compile`, which
                takes up to a minute now and seconds in the next process; False: neither. See steps.py.
            revision, token, local_files_only: for the Hub, as `huggingface_hub` understands them.
            strict: whether a key of config.json that is not understood is an error.

        Raises a `MinillmError` that names the file or value at fault.
        """
        folder = find_checkpoint(name, revision=revision, token=token, local_files_only=local_files_only)
        config = load_config(folder, strict=strict)
        tokenizer = Tokenizer(folder)
        defaults = generation_defaults(folder, config, tokenizer)
        if compile is True and attention == "auto":
            # As a node of a graph a C kernel of ours costs more than what the compiler makes around the library's.
            attention = choose_backend("auto", config).name
        model = load_decoder(
            folder, config, choose_dtype(dtype, config), _device(device), attention, quantize, quantize_head
        )
        llm = cls(model, tokenizer, config, defaults, str(name), compile)
        if llm.steps.compiled is not None:
            llm.steps.compiled.warm_up()
        return llm

    @property
    def model(self) -> Decoder:
        return self.steps.model

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embedding.weight.dtype

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        generation_config: GenerationConfig | None = None,
        *,
        cache: StaticCache | None = None,
        assistant_model: "LLM | None" = None,
        **options,
    ) -> Completion | list[Completion]:
        """Continue a prompt, or several at once.

        Args:
            prompt: text or token ids for one `Completion`; a list of texts, or of lists of ids, for a list.
                Rows of different length in one batch give what they give alone.
            generation_config: options as an object; keywords override it.
            cache: a `StaticCache` of yours with one row per prompt. Where it already holds the beginning of
                a prompt, that part is not computed again; afterwards it holds prompt and answer.
            assistant_model: a smaller `LLM` with the same tokenizer that drafts `num_assistant_tokens` per step
                for this one to check: the same text (sampling: the same law) in fewer steps, see speculative.py.
            options: the fields of `GenerationConfig`; what is unset comes from the checkpoint's
                `generation_config.json`.

        Raises `RequestError` before anything is computed: an unknown option, a value out of range, or a
        prompt that together with `max_new_tokens` exceeds the cache or the model's positions.
        """
        request = _Request(self, prompt, generation_config, cache, assistant_model, options)
        for _ in request.steps():
            pass
        completions = request.completions()
        return completions[0] if request.single else completions

    def stream(
        self,
        prompt: Prompt,
        generation_config: GenerationConfig | None = None,
        *,
        cache: StaticCache | None = None,
        assistant_model: "LLM | None" = None,
        **options,
    ) -> Iterator[str]:
        """`generate` for one prompt, as pieces of text while they come.

        The pieces never hold half a character and concatenate to exactly the text `generate` returns.
        The request is checked here and now, not at the first piece.
        """
        request = _Request(self, prompt, generation_config, cache, assistant_model, options)
        if not request.single:
            raise RequestError("stream takes one prompt; use generate for a list")
        return request.pieces()

    def conversation(self, system: str | None = None, max_cache_len: int | None = None, **options) -> "Conversation":
        """A chat over one cache; `options` (as for `generate`, `assistant_model` too) hold for every turn
        unless one overrides them."""
        return Conversation(self, system, max_cache_len, options)


class _Request:
    """One checked call of generate: the rows, their cache, and the loop over them."""

    def __init__(
        self,
        llm: LLM,
        prompt: Prompt | Sequence[Prompt],
        generation_config: GenerationConfig | None,
        cache: StaticCache | None,
        assistant: LLM | None,
        options: dict,
        previous: Proposer | None = None,
    ):
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            close = difflib.get_close_matches(unknown[0], _OPTIONS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(_OPTIONS)}"
            raise RequestError(f"unknown option {unknown[0]!r}{hint}")
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
        if assistant is not None and not isinstance(assistant, LLM):
            raise RequestError(f"assistant_model must be an LLM (LLM.from_pretrained(...)), not {assistant!r}")
        self.cache = cache
        eos = frozenset(config.eos_token_id or ())
        self.rows = [new_row(row, config, budget, eos, llm.tokenizer) for row, budget in zip(ids, budgets, strict=True)]
        self.sampling = config.sampling(_seeds(config, len(ids)), llm.device)
        self.logprobs = config.logprobs
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


class Conversation:
    """A chat whose turns share one `StaticCache`: `say` for an answer, `stream` for its pieces.

    Each turn renders the whole history with the checkpoint's chat template and reuses the longest prefix
    that the cache already holds; where a template rewrites history, what differs is simply computed again.
    `messages` is the history so far; a turn that fails with an error leaves it as it was.
    """

    def __init__(self, llm: LLM, system: str | None, max_cache_len: int | None, options: dict):
        self.llm, self.options = llm, options
        length = max_cache_len or min(_DEFAULT_CONVERSATION, llm.config.max_positions)
        self.cache = StaticCache(llm.config, 1, length, device=llm.device, dtype=llm.dtype)
        self.proposer: Proposer | None = None  # the last turn's: a draft model keeps its cache as well
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        llm.tokenizer.render_chat([*self.messages, {"role": "user", "content": ""}])  # fail now, not at the first turn

    def say(self, text: str, **options) -> Completion:
        """Add a user message and return the answer. `stats.reused_tokens` tells what the cache saved."""
        request = self._request(text, options)
        for _ in request.steps():
            pass
        return self._remember(text, request)

    def stream(self, text: str, **options) -> Iterator[str]:
        """`say` as pieces of text. A stream that is abandoned keeps what it has said so far in the history."""
        return self._pieces(text, self._request(text, options))

    def _pieces(self, text: str, request: _Request) -> Iterator[str]:
        try:
            yield from request.pieces()
        except Exception:
            raise  # the history stays as it was
        except BaseException:  # the caller has heard enough, or pressed Ctrl-C
            self._remember(text, request)
            raise
        self._remember(text, request)

    def _request(self, text: str, options: dict) -> _Request:
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.llm.tokenizer.encode_chat(messages)
        options = self.options | options
        assistant = options.pop("assistant_model", None)
        request = _Request(self.llm, ids, None, self.cache, assistant, options, self.proposer)
        self.proposer = request.proposer
        return request

    def _remember(self, text: str, request: _Request) -> Completion | None:
        row = request.rows[0]
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": row.text}]
        return request.completions()[0] if row.finish_reason else None


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


def _check_cache(cache: StaticCache, llm: LLM, rows: int) -> None:
    if cache.config != llm.config:
        raise RequestError("the cache was made for another model: build it with StaticCache(llm.config, ...)")
    if cache.batch_size != rows:
        raise RequestError(f"the cache has {cache.batch_size} rows for {rows} prompts")
    if cache.device != llm.device or cache.dtype != llm.dtype:
        raise RequestError(
            f"the cache is {cache.dtype} on {cache.device}, the model {llm.dtype} on {llm.device}: "
            "build it with device=llm.device, dtype=llm.dtype"
        )


def choose_dtype(dtype: str | torch.dtype, config: ModelConfig) -> torch.dtype:
    """The torch dtype a user names; "auto" is what the checkpoint says, float32 if it says nothing."""
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return names[config.dtype or "float32"]
    found = names.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise BackendError(f"dtype {dtype!r} is not one of auto, {', '.join(names)}")
    return found


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise BackendError(f"device {device!r}: {str(error).splitlines()[0]}") from None
