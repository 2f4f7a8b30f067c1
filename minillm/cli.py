"""The `minillm` command: parse, call the library, print.

Results go to stdout, progress and notices to stderr. Exit status 0: done; 1: a `MinillmError`, told in one line;
2: the command line itself was wrong; 130: interrupted. `__main__.py` adds what a process of its own needs.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from minillm import __version__
from minillm.errors import MinillmError, RequestError
from minillm.options import ATTENTION, DTYPES, QUANTIZED_FORMATS, GenerationConfig

# What needs PyTorch is imported where it is called: --help and a wrong command line do not wait for it.

_COMPILE = {"auto": "auto", "on": True, "off": False}
_OPTIONS = [field for field in dataclasses.fields(GenerationConfig) if field.metadata["flag"]]
_MOST = 10**6  # of anything that is counted here


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        try:
            options = _parser().parse_args(arguments)
            options.command(options)
        finally:
            sys.stdout.flush()
    except MinillmError as error:
        return _complain(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0  # whoever read our output (head, a pager) has enough
    except OSError as error:
        if error.filename is not None:
            raise  # a file's: what opens one answers for it
        return _complain(f"standard input or output: {error.strerror}")
    return 0


def _complain(error: MinillmError | str) -> int:
    text = " ".join(str(error).split())
    print("minillm:", text if len(text) <= 800 else f"{text[:400]} ... {text[-400:]}", file=sys.stderr)
    return 1


# ---- the parser ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm", description="A minimal decoder runtime for large language models.")
    parser.add_argument("--version", action="version", version=f"minillm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable, *groups: argparse.ArgumentParser) -> Callable:
        """A command named like `run` and told by its docstring; returns what adds a flag to those of the groups."""
        name, told = run.__name__.strip("_"), textwrap.dedent(run.__doc__ or "")
        made = commands.add_parser(name, parents=groups, help=told.partition("\n")[0], description=told)
        made.set_defaults(command=run)
        return made.add_argument

    hub, dtype, model, generation, results = _groups()
    add = command(_generate, model, generation)
    add("prompt", nargs="?", type=_text, help="the text; without it (or with -) it is read from stdin")
    add("--file", type=Path, metavar="F", help="read the prompt from this file instead")
    add("--stream", action=argparse.BooleanOptionalAction, help="print pieces as they come (default on a terminal)")
    marks = "mark the tokens that a draft guessed right: in colour on a terminal, else in [brackets]"
    add("--show-draft", action="store_true", help=marks)

    add = command(_chat, model, generation)
    add("--system", type=_text, metavar="TEXT", help="the system message")
    add("--max-cache-len", type=_count, metavar="N", help="tokens the conversation may hold")

    add = command(_inspect, model)
    add("--trace", type=_text, metavar="TEXT", help="also walk one forward pass over this text")

    add = command(_bench, model, results)
    add("--lengths", type=_counts, metavar="N,N", help="prompt lengths (default: 64,256,1024)")
    sizes = "cache sizes to decode in (default: 128,1024,4096,16384)"
    add("--capacities", type=_counts, metavar="N,N", help=sizes)
    add("--batch", type=_counts, default=(), metavar="N,N", help="also decode so many rows at once, such as 1,2,4,8,16")
    add("--busy", action="store_true", help="also decode beside a process that keeps one core busy")
    add("--new-tokens", type=_count, default=32, metavar="N", help="decoded per measurement (default: 32)")
    add("--repeats", type=_count, default=5, metavar="N", help="(default: 5)")
    add("--perplexity", type=Path, metavar="FILE", help="bits per byte of this text instead of speed")
    words = "with --perplexity: compare these, such as bf16,int8,int4-g32"
    add("--formats", type=lambda text: text.split(","), metavar="F,F", help=words)

    add = command(_memory, dtype, hub, results)
    add("model", nargs="?", default="demo", metavar="M", help="demo, a folder or a Hub id")
    add("--batch", type=_count, default=1, metavar="B", help="rows (default: 1)")
    add("--context", type=_count, metavar="N", help="tokens per row (default: 4096, or all positions)")

    add = command(_quantize, hub)
    add("model", metavar="MODEL", help="demo, a folder or a Hub id")
    add("out", type=Path, metavar="OUT", help="a new folder")
    add("--to", required=True, metavar="FORMAT", help=", ".join(QUANTIZED_FORMATS))
    add("--head", action="store_true", help="the output head too, in int8")
    return parser


def _groups() -> list[argparse.ArgumentParser]:
    """Flags that commands share: where to find a model, its dtype, how to run it, what to ask, how to tell results."""
    hub, dtype, generation, results = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    hub.add_argument("--revision", help="branch, tag or commit of a Hub id")
    hub.add_argument("--local-files-only", action="store_true", help="do not ask the Hub for anything")

    dtype.add_argument("--dtype", default="auto", help=f"{', '.join(DTYPES)} (default: the checkpoint's)")

    model = argparse.ArgumentParser(add_help=False, parents=[dtype, hub])
    add = model.add_argument
    add("--model", default="demo", metavar="M", help="demo, demo-draft, a folder or a Hub id (default: demo)")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--quantize", metavar="FORMAT", help=f"{', '.join(QUANTIZED_FORMATS)} (default: none)")
    add("--quantize-head", action="store_true", help="the output head too, in int8")
    add("--attention", default="auto", help=f"{', '.join(ATTENTION)} (auto: the fastest that fits)")
    how = "auto: record steps and replay them (default); on: torch.compile, slow to start; off: neither"
    add("--compile", choices=_COMPILE, default="auto", help=how)

    for field in _OPTIONS:
        rule = field.metadata
        generation.add_argument(
            "--stop" if field.name == "stop_strings" else f"--{field.name.replace('_', '-')}",
            dest=field.name,
            type=partial(_value, rule["kind"], rule["word"]),
            action="append" if field.name == "stop_strings" else "store",
            metavar={int: "N", float: "X", str: "TEXT"}[rule["kind"]],
            help=rule["help"],
        )
    generation.add_argument("--draft-model", metavar="M", help="a smaller model with the same tokenizer guesses ahead")

    results.add_argument("--json", action="store_true", help="print JSON instead of a table")
    results.add_argument("--plot", type=Path, metavar="PNG", help="draw it into this file")
    return [hub, dtype, model, generation, results]


def _value(kind: type, word: str | None, argument: str):
    """The argument as `kind`, or the word that may stand for one; what is neither is wrong usage."""
    try:
        argument.encode()  # bytes that are no text arrive as lone surrogates
        return argument if argument == word else kind(argument)
    except ValueError:
        wanted = {int: "a whole number", float: "a number", str: "valid text"}[kind]
        raise argparse.ArgumentTypeError(f"{argument[:40]!r} is not {wanted}") from None


_text = partial(_value, str, None)


def _count(argument: str) -> int:
    count = _value(int, None, argument)
    if not 1 <= count <= _MOST:
        raise argparse.ArgumentTypeError(f"{argument[:40]!r} is not from 1 to {_MOST}")
    return count


def _counts(argument: str) -> list[int]:
    return [_count(one) for one in argument.split(",")]


# ---- the commands ----


def _load(options: argparse.Namespace, **changes):
    from minillm.llm import LLM

    asked = vars(options) | changes
    names = "dtype device attention quantize quantize_head revision local_files_only".split()
    return LLM.from_pretrained(asked["model"], compile=_COMPILE[options.compile], **{n: asked[n] for n in names})


def _find(options: argparse.Namespace, weights: bool = False) -> Path:
    from minillm.load.hub import find_checkpoint

    return find_checkpoint(options.model, options.revision, local_files_only=options.local_files_only, weights=weights)


def _asked(options: argparse.Namespace) -> dict:
    """The generation options that were given; a `RequestError` for a wrong one before anything is loaded."""
    asked = {field.name: getattr(options, field.name) for field in _OPTIONS}
    asked = {name: value for name, value in asked.items() if value is not None}
    GenerationConfig(**asked)
    return asked


def _draft(options: argparse.Namespace):
    """The `LLM` that guesses ahead, if one was named: as it is stored, where the other one is."""
    if options.draft_model is None:
        return None
    return _load(options, model=options.draft_model, quantize=None, quantize_head=False, revision=None)


def _generate(options: argparse.Namespace) -> None:
    """Print a text and its continuation."""
    if options.show_draft and options.stream:
        raise RequestError("--show-draft prints the text when it is complete: leave out --stream")
    if options.show_draft and options.draft_model is None and options.prompt_lookup_num_tokens is None:
        raise RequestError("--show-draft needs somebody who drafts: --draft-model or --prompt-lookup-num-tokens")
    asked, prompt = _asked(options), _read_prompt(options)
    llm = _load(options)
    asked["assistant_model"] = _draft(options)
    if options.show_draft:
        _show_draft(llm, prompt, llm.generate(prompt, **asked), options.stop_strings or ())
        return
    streaming = sys.stdout.isatty() if options.stream is None else options.stream
    _say(itertools.chain([prompt], llm.stream(prompt, **asked) if streaming else [llm.generate(prompt, **asked).text]))


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


def _chat(options: argparse.Namespace) -> None:
    """Talk to a model.

    Piped in, each line is a message; on a terminal, Ctrl-C stops an answer and Ctrl-D ends the chat.
    """
    asked = _asked(options)
    llm = _load(options)
    chat = llm.conversation(options.system, options.max_cache_len, assistant_model=_draft(options), **asked)
    terminal = sys.stdin.isatty()
    while True:
        try:
            message = _read("stdin", lambda: input("> " if terminal else ""))
        except EOFError:
            return
        try:
            if message.strip():
                _say(chat.stream(message))
        except RequestError as error:
            if not terminal:
                raise
            _complain(error)
        except KeyboardInterrupt:
            if not terminal:
                raise


def _inspect(options: argparse.Namespace) -> None:
    """Show how a checkpoint's config is understood."""
    from minillm.llm import choose_device, choose_dtype
    from minillm.load.config_json import load_config
    from minillm.measure.describe import facts, how_it_runs, trace

    config = load_config(_find(options))
    rows = facts(config, choose_dtype(options.dtype, config), options.quantize, options.quantize_head)
    rows += how_it_runs(config, choose_device(options.device), options.attention, _COMPILE[options.compile])
    for name, value in rows:
        print(_fill(f"{name:<20}{value}", indent=20))
    if options.trace is not None:
        print("", *map(_fill, trace(_load(options), options.trace).as_text().splitlines()), sep="\n")


def _bench(options: argparse.Namespace) -> None:
    """Time a model beside this machine's memory bandwidth, or score it on a text (--perplexity)."""
    if options.formats is not None and options.perplexity is None:
        raise RequestError("--formats compares formats on a text: give it with --perplexity FILE")
    if options.plot is not None and options.perplexity is not None:
        raise RequestError("--plot draws speeds: leave out --perplexity")
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


def _memory(options: argparse.Namespace) -> None:
    """Show how much memory a model will take, from config.json and the headers of its weights alone."""
    from minillm.llm import choose_dtype
    from minillm.load.config_json import load_config
    from minillm.measure.memory import model_sizes, save_plot

    folder = _find(options)
    config = load_config(folder)
    dtype = choose_dtype(options.dtype, config)
    where = options.model, folder, options.revision, options.local_files_only
    sizes = model_sizes(config, dtype, options.batch, options.context, *where)
    _tell(options, sizes, lambda path: save_plot(path, config, dtype, options.batch, sizes.context))


def _tell(options: argparse.Namespace, results, draw: Callable[[Path], None] | None = None) -> None:
    """Print results as a table or as JSON, and draw them if a file was named."""
    print(json.dumps(results.as_dict(), indent=2) if options.json else results.as_text(), flush=True)
    if options.plot is not None:
        draw(options.plot)
        print(f"wrote {options.plot}", file=sys.stderr)


def _quantize(options: argparse.Namespace) -> None:
    """Write a quantized copy of a checkpoint."""
    from minillm.load.quantized_copy import quantize_checkpoint

    quantize_checkpoint(_find(options, weights=True), options.out, options.to, options.head)
    print(options.out)


def _fill(line: str, indent: int = 0) -> str:
    """Wrapped to the terminal's width, within reason; to 80 columns when piped."""
    width = max(40, min(shutil.get_terminal_size().columns, 100))
    return textwrap.fill(line, width, subsequent_indent=" " * indent)
