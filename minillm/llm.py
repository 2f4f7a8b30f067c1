"""LLM: a checkpoint ready to use. from_pretrained, generate, stream, conversation."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from minillm.cache import StaticCache
from minillm.config import ModelConfig
from minillm.errors import RequestError
from minillm.faster.steps import Steps, check_compile
from minillm.load.backends import choose_backend
from minillm.load.config_json import generation_defaults, load_config
from minillm.load.hub import find_adapter, find_checkpoint
from minillm.load.lora import load_adapted
from minillm.load.placement import choose_device, choose_dtype
from minillm.load.tokenizer import load_tokenizer
from minillm.model import Decoder
from minillm.options import GenerationConfig, merge_options
from minillm.parallel import ALONE
from minillm.progress import progress_bar
from minillm.proposer import Proposer
from minillm.request import SEATS, Completion, Prompt, Request, as_prompts, completion
from minillm.speculative.drafting import Drafting
from minillm.tokenizer import Tokenizer

_DEFAULT_CONVERSATION = 4096  # tokens a conversation's cache holds unless told otherwise


class LLM:
    """A decoder, its tokenizer and its defaults. Make one with `LLM.from_pretrained`.

    `model` is the decoder as it is written, `steps` the same made fast (see faster/steps.py); both are called alike.
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
        adapter: str | Path | None = None,
        compile: bool | str = "auto",
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        strict: bool = True,
        check_finite: bool = True,
        tensor_parallel: bool = False,
    ) -> "LLM":
        """Load "demo" (the embedded model), "demo-draft", a folder, or a Hugging Face Hub id.

        Args:
            dtype: "float32", "bfloat16", "float16", or "auto" for what the checkpoint's config.json says.
            device: "cpu", "cuda", ..., or "auto": a CUDA device if there is one.
            attention: "math", "sdpa" (or "sdpa:flash", ...), "kernels", or "auto": the fastest that can serve it.
            quantize: "int8", "int4" or "int4-g32", "int4-g64", "int4-g128": store the linear layers' weights in
                this format, quantizing while they stream in. quantize_head: the output head too, in int8.
            adapter: a LoRA adapter as PEFT saves it, a folder or a Hub id: added to the matrices, or kept beside them
                where they are quantized. See load/lora.py.
            compile: "auto": steps are recorded and replayed, with nothing to wait for; True: `torch.compile`, which
                takes up to a minute now and seconds in the next process; False: neither. See faster/steps.py.
            revision, token, local_files_only: for the Hub, as `huggingface_hub` understands them.
            strict: whether a key of config.json that is not understood is an error.
            check_finite: look for NaN and infinity in the weights while they stream in, 0.1 s per GB.
            tensor_parallel: the processes that `torchrun` started share the model, and all make the same calls; see
                parallel.py and docs/parallel.md.

        Raises a `MinillmError` that names the file or value at fault.
        """
        check_compile(compile)  # now, not after the weights are read
        if tensor_parallel:  # before a download, which one may end long before another
            from minillm.ranks.joined import join, local_device

            where = choose_device(local_device(device))
            ranks = join(where)
        else:
            ranks, where = ALONE, choose_device(device)
        folder = find_checkpoint(name, revision=revision, token=token, local_files_only=local_files_only)
        if adapter is not None:
            adapter = find_adapter(adapter, token, local_files_only)
        config = load_config(folder, strict=strict)
        tokenizer = load_tokenizer(folder)
        defaults = generation_defaults(folder, config, tokenizer.eos_token_id)
        dtype = choose_dtype(dtype, config)
        ranks.meet()  # some download, and read, faster than others
        ranks.agree(None, (config, dtype, quantize, quantize_head, compile))
        if compile is True and attention == "auto" and where.type == "cpu":
            # As a node of a graph a C kernel of ours costs more than what the compiler makes around the library's.
            attention = choose_backend("auto", config).name
        how = dict(attention=attention, quantize=quantize, quantize_head=quantize_head, check_finite=check_finite)
        model = load_adapted(adapter, folder, config, dtype, device=where, ranks=ranks, **how)
        ranks.meet()
        llm = cls(model, tokenizer, model.config, defaults, str(name), compile)
        if llm.steps.compiled is not None:
            llm.steps.compiled.warm_up()
        return llm

    @property
    def model(self) -> Decoder:
        """The decoder as it is written."""
        return self.steps.model

    @property
    def device(self) -> torch.device:
        """Where the weights are, and a cache has to be."""
        return self.model.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and of a cache; quantized matrices have their own."""
        return self.model.embedding.weight.dtype

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        generation_config: GenerationConfig | None = None,
        *,
        cache: StaticCache | None = None,
        assistant_model: "LLM | None" = None,
        seats: int = SEATS,
        progress: bool = False,
        **options,
    ) -> Completion | list[Completion]:
        """Continue a prompt, or as many as you like.

        Args:
            prompt: text or token ids for one `Completion`; a list of texts, or of lists of ids, for a list in the same
                order. Each gives what it gives alone.
            generation_config: options as an object; keywords override it.
            cache: a `StaticCache` of yours with one row per prompt. Where it already holds the beginning of
                a prompt, that part is not computed again; afterwards it holds prompt and answer.
            assistant_model: a smaller `LLM` with the same tokenizer that drafts `num_assistant_tokens` per step
                for this one to check: the same text (sampling: the same law) in fewer steps, see speculative/verify.py.
            seats: how many prompts run at a time; the next one takes the seat of one that has ended. Up to 16 give to
                the last bit what they give alone. With a cache of yours all of them run at once.
            progress: show a bar on stderr, a notch for each finished prompt.
            options: the fields of `GenerationConfig`; what is unset comes from the checkpoint's
                `generation_config.json`.

        Raises `RequestError` before anything is computed: an unknown option, a value out of range, or a
        prompt that together with `max_new_tokens` exceeds the cache or the model's positions.
        """
        request = Request(self, prompt, generation_config, cache, Drafting(self, assistant_model), options, seats)
        with progress_bar(len(request.rows), "generating", after=0 if progress else math.inf) as advance:
            for ended in request.loop():
                for _ in ended:
                    advance()
        completions = [completion(row) for row in request.rows]
        return completions[0] if request.single else completions

    def as_completed(
        self,
        prompts: Sequence[Prompt],
        generation_config: GenerationConfig | None = None,
        *,
        cache: StaticCache | None = None,
        assistant_model: "LLM | None" = None,
        seats: int = SEATS,
        **options,
    ) -> Iterator[tuple[int, Completion]]:
        """`generate` for a list of prompts, as (number of the prompt, its `Completion`) whenever one has ended.

        The request is checked here and now, not at the first result.
        """
        if as_prompts(prompts)[1]:
            raise RequestError("as_completed takes a list of prompts; use generate or stream for one")
        request = Request(self, prompts, generation_config, cache, Drafting(self, assistant_model), options, seats)
        return ((row.number, completion(row)) for ended in request.loop() for row in ended)

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
        if not as_prompts(prompt)[1]:
            raise RequestError("stream takes one prompt; use generate for a list")
        return Request(self, prompt, generation_config, cache, Drafting(self, assistant_model), options).pieces()

    def conversation(self, system: str | None = None, max_cache_len: int | None = None, **options) -> "Conversation":
        """A chat over one cache; `options` (as for `generate`, `assistant_model` too) hold for every turn
        unless one overrides them."""
        return Conversation(self, system, max_cache_len, options)


class Conversation:
    """A chat whose turns share one `StaticCache`: `say` for an answer, `stream` for its pieces.

    Each turn renders the whole history with the checkpoint's chat template and reuses the longest prefix
    that the cache already holds; where a template rewrites history, what differs is simply computed again.
    `messages` is the history so far; a turn that fails with an error leaves it as it was.
    """

    def __init__(self, llm: LLM, system: str | None, max_cache_len: int | None, options: dict):
        self.llm, self.options = llm, options
        asked = {name: value for name, value in options.items() if name != "assistant_model"}
        # Fail now, not at the first turn.
        Drafting(llm, options.get("assistant_model")).check(merge_options(llm.defaults, None, asked))
        length = min(_DEFAULT_CONVERSATION, llm.config.max_positions) if max_cache_len is None else max_cache_len
        self.cache = StaticCache(llm.config, 1, length, device=llm.device, dtype=llm.dtype)
        self.proposer: Proposer | None = None  # the last turn's: a draft model keeps its cache as well
        self.messages: list[dict[str, str]] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        llm.tokenizer.render_chat([*self.messages, {"role": "user", "content": ""}])

    def say(self, text: str, **options) -> Completion:
        """Add a user message and return the answer. `stats.reused_tokens` tells what the cache saved."""
        request = self._request(text, options)
        for _ in request.loop():
            pass
        return self._keep(text, request)

    def stream(self, text: str, **options) -> Iterator[str]:
        """`say` as pieces of text. A stream that is abandoned keeps what it has said so far in the history."""
        return self._pieces(text, self._request(text, options))

    def _pieces(self, text: str, request: Request) -> Iterator[str]:
        try:
            yield from request.pieces()
        except Exception:
            raise  # the history stays as it was
        except BaseException:  # the caller has heard enough, or pressed Ctrl-C
            self._keep(text, request)
            raise
        self._keep(text, request)

    def _request(self, text: str, options: dict) -> Request:
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.llm.tokenizer.encode_chat(messages)
        options = self.options | {name: value for name, value in options.items() if value is not None}
        drafting = Drafting(self.llm, options.pop("assistant_model", None), self.proposer)
        request = Request(self.llm, ids, None, self.cache, drafting, options)
        self.proposer = drafting.proposer
        return request

    def _keep(self, text: str, request: Request) -> Completion | None:
        row = request.rows[0]
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": row.text}]
        return completion(row) if row.finish_reason else None
