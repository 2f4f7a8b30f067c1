"""What each command does: read what was given, call the library, print. A command's help is its docstring.

What needs PyTorch is imported where it is called: --help and a wrong command line do not wait for it.
"""

import argparse
import ctypes
import itertools
import json
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path

from minillm.cli.flags import COMPILE, OPTIONS
from minillm.cli.ranks import complain, several, speaks
from minillm.errors import RequestError
from minillm.options import GenerationConfig


def _load(options: argparse.Namespace, **changes):
    from minillm.llm import LLM

    _keep_freed_memory()

    asked = vars(options) | dict(tensor_parallel=several()) | changes
    names = "dtype device attention quantize quantize_head adapter revision local_files_only tensor_parallel".split()
    return LLM.from_pretrained(asked["model"], compile=COMPILE[options.compile], **{n: asked[n] for n in names})


def _keep_freed_memory() -> None:
    """Ask glibc's malloc to keep what a prompt's activations leave, up to 128 MiB, for the next layer and prompt.

    By default it hands megabytes back to the system when they are freed and gets them again page by page: a quarter of
    the time to the first token of a 512-token prompt (110M, bf16: 280 ms instead of 205). The setting is for the
    process, so that it is the command line's to make and not the library's; a user's own is left alone.
    """
    if platform.libc_ver()[0] == "glibc" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        trim_threshold, mmap_threshold = -1, -3  # from malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 128 << 20)
        libc.mallopt(mmap_threshold, 32 << 20)


def _find(options: argparse.Namespace, weights: bool = False) -> Path:
    from minillm.load.hub import HUB_PATTERNS, find_checkpoint

    patterns = HUB_PATTERNS if weights else ["config.json"]
    return find_checkpoint(options.model, options.revision, None, options.local_files_only, patterns)


def _asked(options: argparse.Namespace) -> dict:
    """The generation options that were given; a `RequestError` for a wrong one before anything is loaded."""
    asked = {field.name: getattr(options, field.name) for field in OPTIONS}
    asked = {name: value for name, value in asked.items() if value is not None}
    GenerationConfig(**asked)
    return asked


def _draft(options: argparse.Namespace, llm):
    """The `LLM` that guesses ahead for another, if one was named: as it is stored, and whole on each rank."""
    if options.draft_model is None:
        return None
    plain = dict(
        quantize=None, quantize_head=False, adapter=None, revision=None, tensor_parallel=False, device=llm.device
    )
    return _load(options, model=options.draft_model, **plain)


def generate(options: argparse.Namespace) -> None:
    """Print a text and its continuation."""
    if options.show_draft and options.stream:
        raise RequestError("--show-draft prints the text when it is complete: leave out --stream")
    if options.show_draft and options.draft_model is None and options.prompt_lookup_num_tokens is None:
        raise RequestError("--show-draft needs somebody who drafts: --draft-model or --prompt-lookup-num-tokens")
    if options.each_line and (options.stream or options.show_draft):
        raise RequestError("--each-line prints answers when they are complete: leave out --stream and --show-draft")
    if not options.each_line and (options.jsonl or options.seats is not None):
        raise RequestError("--jsonl and --seats are for many prompts: give them with --each-line")
    asked, prompt = _asked(options), _read_prompt(options)
    llm = _load(options)
    asked["assistant_model"], prompt = _draft(options, llm), llm.model.ranks.agree(prompt)
    if options.each_line:
        _each_line(options, llm, prompt.splitlines(), asked)
        return
    if options.show_draft:
        _show_draft(llm, prompt, llm.generate(prompt, **asked), options.stop_strings or ())
        return
    streaming = sys.stdout.isatty() if options.stream is None else options.stream
    _say(itertools.chain([prompt], llm.stream(prompt, **asked) if streaming else [llm.generate(prompt, **asked).text]))


def _each_line(options: argparse.Namespace, llm, lines: Sequence[str], asked: dict) -> None:
    """Print the continuation of each line that is not blank, in order; as JSON, each as soon as it is complete."""
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise RequestError("--each-line: there is no line that is not blank")
    if options.seats is not None:
        asked["seats"] = options.seats
    if not options.jsonl:
        for prompt, done in zip(prompts, llm.generate(prompts, progress=True, **asked), strict=True):
            _say([prompt, done.text])
        return
    for number, done in llm.as_completed(prompts, **asked):
        said = dict(text=done.text, finish_reason=done.finish_reason, new_tokens=done.stats.new_tokens)
        print(json.dumps(dict(number=number, prompt=prompts[number]) | said, ensure_ascii=False), flush=True)


def _say(pieces: Iterable[str]) -> None:
    """Print pieces as they come, and end the line whatever happens."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


def _show_draft(llm, prompt: str, completion, stops: Sequence[str]) -> None:
    """Print the text with its accepted drafts marked, and on stderr what they were good for."""
    from minillm.tokenizer import TextStream

    stream = TextStream(llm.tokenizer, llm.tokenizer.encode(prompt), stops)
    said = completion.token_ids[:-1] if completion.finish_reason == "eos" else completion.token_ids
    pieces = [*map(stream.push, said), stream.finish()]
    drafts = [*completion.from_draft[: len(said)], False]
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    before, after = ("\x1b[32m", "\x1b[0m") if colour else "[]"
    runs = [prompt]
    for drafted, group in itertools.groupby(zip(drafts, pieces, strict=True), key=lambda pair: pair[0]):
        run = "".join(piece for _, piece in group)
        runs.append(f"{before}{run}{after}" if drafted else run)
    _say(runs)
    stats = completion.stats
    print(
        f"{stats.accepted} of {stats.drafted} drafted tokens accepted ({stats.acceptance_rate:.0%}); "
        f"{stats.new_tokens} tokens in {stats.target_steps} passes of the model: "
        f"{stats.tokens_per_target_step:.2f} per pass",
        file=sys.stderr,
    )


def _read_prompt(options: argparse.Namespace) -> str:
    if not speaks():
        return ""  # rank 0 reads it
    if options.file is not None:
        if options.prompt is not None:
            raise RequestError("give a prompt or --file, not both")
        return _read(f"--file {options.file}", lambda: options.file.read_text(encoding="utf-8"))
    if options.prompt not in (None, "-"):
        return options.prompt
    if sys.stdin.isatty():
        print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    return _read("stdin", sys.stdin.read).removesuffix("\n")


def _read(source: str, read: Callable[[], str]) -> str:
    try:
        text = read()
        text.encode()  # in some locales Python lets stray bytes in
    except (OSError, UnicodeError) as error:
        raise RequestError(f"{source} cannot be read as text: {getattr(error, 'strerror', None) or error}") from None
    return text


def chat(options: argparse.Namespace) -> None:
    """Talk to a model.

    Piped in, each line is a message; on a terminal, Ctrl-C stops an answer and Ctrl-D ends the chat.
    """
    asked = _asked(options)
    llm = _load(options)
    chat = llm.conversation(options.system, options.max_cache_len, assistant_model=_draft(options, llm), **asked)
    ranks = llm.model.ranks
    terminal = ranks.agree(sys.stdin.isatty())  # rank 0's: it reads, and how an error ends is the same for all
    while True:
        message = ranks.agree(_next_message(terminal) if speaks() else None)
        if message is None:
            return
        try:
            if message.strip():
                _say(chat.stream(message))
        except RequestError as error:
            if not terminal:
                raise
            complain(error)
        except KeyboardInterrupt:
            if not terminal or ranks.joined:  # no two ranks are interrupted at the same point
                raise


def _next_message(terminal: bool) -> str | None:
    """A line from stdin, or None at its end."""
    try:
        return _read("stdin", lambda: input("> " if terminal else ""))
    except EOFError:
        return None


def inspect(options: argparse.Namespace) -> None:
    """Show how a checkpoint's config is understood."""
    from minillm.load.config_json import load_config
    from minillm.load.hub import find_adapter
    from minillm.load.lora import read_adapter
    from minillm.load.placement import choose_device, choose_dtype
    from minillm.measure.describe import facts, trace

    config = load_config(_find(options))
    rows = facts(config, choose_dtype(options.dtype, config), options.quantize, options.quantize_head)
    rows += how_it_runs(config, choose_device(options.device), options.attention, COMPILE[options.compile])
    if options.adapter is not None:
        adapter = read_adapter(find_adapter(options.adapter, local_files_only=options.local_files_only), config)
        rows.append(("adapter", f"rank {adapter.rank}, scale {adapter.scale:g}, {len(adapter.pairs)} matrices"))
    for name, value in rows:
        print(_fill(f"{name:<20}{value}", indent=20))
    if options.trace is not None:
        llm = _load(options, tensor_parallel=False)
        print("", *map(_fill, trace(llm, options.trace).as_text().splitlines()), sep="\n")


def how_it_runs(config, device, attention: str, compile: bool | str) -> list[tuple[str, str]]:
    """(name, value) pairs that say what would compute on this device, and how steps would run."""
    from minillm.faster.steps import how_steps_run
    from minillm.load.backends import choose_backend, why_no_kernels
    from minillm.measure.bench import device_name

    backend = choose_backend(attention, config, device).name
    lacking = why_no_kernels(config, device) if attention == "auto" and device.type == "cuda" else None
    return [
        ("device", device_name(device)),
        ("attention by", backend if lacking is None else f"{backend} (not by kernels: {lacking})"),
        ("steps", how_steps_run(device.type, backend, compile)),
    ]


def bench(options: argparse.Namespace) -> None:
    """Time a model beside this machine's memory bandwidth, or score it on a text (--perplexity)."""
    if options.formats is not None and options.perplexity is None:
        raise RequestError("--formats compares formats on a text: give it with --perplexity FILE")
    if options.plot is not None and options.perplexity is not None:
        raise RequestError("--plot draws speeds: leave out --perplexity")
    if options.busy and several():
        raise RequestError("--busy measures beside one process: leave out --ranks")
    if options.perplexity is not None:
        _score(options)
        return
    from minillm.measure.bench import measure, save_plot

    sizes = options.lengths, options.capacities, options.new_tokens, options.repeats
    speeds = measure(lambda: _load(options), *sizes, options.batch, options.busy)
    _tell(options, speeds, lambda path: save_plot(path, speeds))


def _score(options: argparse.Namespace) -> None:
    from minillm.measure.perplexity import Scores, parse_format, read_documents, score_text

    asked = [(options.dtype, options.quantize)]
    if options.formats is not None:
        asked = [parse_format(word, options.dtype) for word in options.formats]
    scores = []
    for dtype, quantize in asked:
        llm = _load(options, dtype=dtype, quantize=quantize)
        scores.append(score_text(llm, read_documents(options.perplexity, llm.tokenizer)))
    _tell(options, Scores(options.perplexity.name, scores))


def memory(options: argparse.Namespace) -> None:
    """Show how much memory a model will take, from config.json and the headers of its weights alone."""
    from minillm.load.checkpoint import stored_numbers
    from minillm.load.config_json import load_config
    from minillm.load.hub import hub_stored_numbers
    from minillm.load.placement import choose_dtype
    from minillm.measure.memory import model_sizes, save_plot
    from minillm.ranks.split import Split

    folder = _find(options)
    config = load_config(folder)
    dtype = choose_dtype(options.dtype, config)
    stored = stored_numbers(folder)
    if not stored and not Path(options.model).exists() and not options.local_files_only:  # a Hub id
        stored = hub_stored_numbers(options.model, options.revision)
    first = Split(0, options.ranks or 1)
    sizes = model_sizes(config, dtype, options.batch, options.context, options.model, stored, first)
    _tell(options, sizes, lambda path: save_plot(path, config, dtype, options.batch, sizes.context, first))


def _tell(options: argparse.Namespace, results, draw: Callable[[Path], None] | None = None) -> None:
    """Print results as a table or as JSON, and draw them if a file was named."""
    print(json.dumps(results.as_dict(), indent=2) if options.json else results.as_text(), flush=True)
    if options.plot is not None and speaks():
        draw(options.plot)
        print(f"wrote {options.plot}", file=sys.stderr)


def quantize(options: argparse.Namespace) -> None:
    """Write a quantized copy of a checkpoint."""
    from minillm.load.quantized_copy import quantize_checkpoint

    quantize_checkpoint(_find(options, weights=True), options.out, options.to, options.head)
    print(options.out)


def finetune(options: argparse.Namespace) -> None:
    """Train a checkpoint further on text or conversations.

    Stopped at any moment, the same command goes on where it was.
    """
    from minillm.measure.plot import picture
    from minillm.train.finetuning import finetune

    own = ("command", "model", "data", "out", "plot")
    asked = {name: value for name, value in vars(options).items() if name not in own and value is not None}
    # Opened first: what the picture lacks is told before the training, not after it.
    with nullcontext() if options.plot is None else picture(options.plot, 7, 4) as figure:
        done = finetune(options.model, options.data, options.out, **asked)
        print(done.as_text(), options.out, sep="\n", flush=True)
        if figure is not None:
            axes = figure.subplots()
            axes.plot(range(1, done.steps + 1), done.losses, linewidth=1)
            axes.set(xlabel="optimizer step", ylabel="nats per scored token", ylim=(0, None))


def merge(options: argparse.Namespace) -> None:
    """Write a checkpoint with a LoRA adapter in its weights."""
    from minillm.load.hub import find_adapter
    from minillm.load.lora import merge_checkpoint

    adapter = find_adapter(options.adapter, local_files_only=options.local_files_only)
    merge_checkpoint(_find(options, weights=True), adapter, options.out)
    print(options.out)


def _fill(line: str, indent: int = 0) -> str:
    """Wrapped to the terminal's width, within reason; to 80 columns when piped."""
    width = max(40, min(shutil.get_terminal_size().columns, 100))
    return textwrap.fill(line, width, subsequent_indent=" " * indent)
