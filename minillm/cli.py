"""The `minillm` command: parse, call the library, print.

Results go to stdout, progress and notices to stderr. Exit status 0: done; 1: a `MinillmError`, told in
one line; 2: the command line itself was wrong; 130: interrupted.
"""

import argparse
import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from minillm.errors import MinillmError, RequestError

_COMPILE = {"auto": "auto", "on": True, "off": False}


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except MinillmError as error:
        print(f"minillm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output (head, a pager) has enough. Python would complain again at exit.
        sys.stdout = None
        return 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm", description="A minimal decoder runtime for large language models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue a text", description="Print a text and its continuation.")
    generate.add_argument("prompt", nargs="?", help="the text; without it (or with -) it is read from stdin")
    generate.add_argument("--file", type=Path, metavar="F", help="read the prompt from this file instead")
    generate.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print pieces as they come (default on a terminal)",
    )
    generate.add_argument(
        "--show-draft",
        action="store_true",
        help="mark the tokens that a draft guessed right: in colour on a terminal, else in [brackets]",
    )
    _model_options(generate)
    _generation_options(generate)
    generate.set_defaults(command=_generate)

    chat = commands.add_parser(
        "chat",
        help="talk to a model",
        description="Talk to a model. Piped in, each line is a message; on a terminal, Ctrl-C stops an answer and "
        "Ctrl-D ends the chat.",
    )
    chat.add_argument("--system", metavar="TEXT", help="the system message")
    chat.add_argument("--max-cache-len", type=int, metavar="N", help="tokens the conversation may hold")
    _model_options(chat)
    _generation_options(chat)
    chat.set_defaults(command=_chat)

    inspect = commands.add_parser(
        "inspect", help="what a checkpoint is made of", description="Show how a checkpoint's config is understood."
    )
    inspect.add_argument("--trace", metavar="TEXT", help="also walk one forward pass over this text")
    _model_options(inspect)
    inspect.set_defaults(command=_inspect)

    bench = commands.add_parser(
        "bench",
        help="how fast a model runs here",
        description="Time a model beside this machine's memory bandwidth, or score it on a text (--perplexity).",
    )
    bench.add_argument("--lengths", type=_numbers, metavar="N,N", help="prompt lengths (default: 64,256,1024)")
    bench.add_argument(
        "--capacities", type=_numbers, metavar="N,N", help="cache sizes to decode in (default: 128,1024,4096,16384)"
    )
    bench.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decoded per measurement (default: 32)")
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="(default: 5)")
    bench.add_argument("--perplexity", type=Path, metavar="FILE", help="bits per byte of this text instead of speed")
    bench.add_argument(
        "--formats",
        type=lambda text: text.split(","),
        metavar="F,F",
        help="with --perplexity: compare these, such as bf16,int8,int4-g32",
    )
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.add_argument("--plot", type=Path, metavar="PNG", help="draw the speeds into this file")
    _model_options(bench)
    bench.set_defaults(command=_bench)

    memory = commands.add_parser(
        "memory",
        help="how many bytes a model takes",
        description="Show what a model will take, from config.json and the headers of its weights alone.",
    )
    memory.add_argument("model", nargs="?", default="demo", metavar="M", help="demo, a folder or a Hub id")
    memory.add_argument("--batch", type=int, default=1, metavar="B", help="rows (default: 1)")
    memory.add_argument("--context", type=int, metavar="N", help="tokens per row (default: 4096, or all positions)")
    memory.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: the checkpoint's)")
    memory.add_argument("--revision", help="branch, tag or commit of a Hub id")
    memory.add_argument("--local-files-only", action="store_true", help="do not ask the Hub for anything")
    memory.add_argument("--json", action="store_true", help="print JSON instead of a table")
    memory.add_argument("--plot", type=Path, metavar="PNG", help="draw memory against context into this file")
    memory.set_defaults(command=_memory)

    quantize = commands.add_parser(
        "quantize", help="write a quantized copy of a checkpoint", description="Write a quantized copy of a checkpoint."
    )
    quantize.add_argument("model", metavar="MODEL", help="demo, a folder or a Hub id")
    quantize.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    quantize.add_argument("--to", required=True, metavar="FORMAT", help="int8, int4-g32, int4-g64 or int4-g128")
    quantize.add_argument("--head", action="store_true", help="the output head too, in int8")
    quantize.add_argument("--revision", help="branch, tag or commit of a Hub id")
    quantize.add_argument("--local-files-only", action="store_true", help="do not ask the Hub for anything")
    quantize.set_defaults(command=_quantize)
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="demo", metavar="M", help="demo, demo-draft, a folder or a Hub id (default: demo)"
    )
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: the checkpoint's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument(
        "--quantize", metavar="FORMAT", help="int8, int4, int4-g32, int4-g64, int4-g128 (default: none)"
    )
    parser.add_argument("--quantize-head", action="store_true", help="the output head too, in int8")
    parser.add_argument("--attention", default="auto", help="math, sdpa, c, triton (default: the fastest that fits)")
    parser.add_argument(
        "--compile",
        choices=_COMPILE,
        default="auto",
        help="auto: record steps and replay them (default); on: torch.compile, slow to start; off: neither",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--local-files-only", action="store_true", help="do not ask the Hub for anything")


def _generation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-new-tokens", type=int, metavar="N")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--min-p", type=float, metavar="P")
    parser.add_argument("--repetition-penalty", type=float, metavar="R")
    parser.add_argument("--seed", type=int, metavar="S")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    parser.add_argument("--draft-model", metavar="M", help="a smaller model with the same tokenizer guesses ahead")
    parser.add_argument(
        "--num-assistant-tokens",
        type=lambda text: text if text == "auto" else int(text),
        metavar="N",
        help="how many tokens it guesses per step (default: auto)",
    )
    parser.add_argument(
        "--prompt-lookup-num-tokens", type=int, metavar="N", help="guess ahead by copying from the text so far"
    )


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _load(options: argparse.Namespace, name: str | None = None):
    from minillm.llm import LLM  # here, so that --help and usage errors do not wait for torch

    return LLM.from_pretrained(
        name or options.model,
        dtype=options.dtype,
        device=options.device,
        attention=options.attention,
        quantize=None if name else options.quantize,
        quantize_head=options.quantize_head and not name,
        compile=_COMPILE[options.compile],
        revision=None if name else options.revision,
        local_files_only=options.local_files_only,
    )


def _asked(options: argparse.Namespace) -> dict:
    """The generation options that were given on the command line."""
    names = """
        max_new_tokens temperature top_k top_p min_p repetition_penalty seed num_assistant_tokens
        prompt_lookup_num_tokens
    """.split()
    asked = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.stop:
        asked["stop_strings"] = options.stop
    if options.draft_model is not None:
        asked["assistant_model"] = _load(options, options.draft_model)
    return asked


def _generate(options: argparse.Namespace) -> None:
    if options.show_draft and options.stream:
        raise RequestError("--show-draft prints the text when it is complete: leave out --stream")
    if options.show_draft and options.draft_model is None and options.prompt_lookup_num_tokens is None:
        raise RequestError("--show-draft needs somebody who drafts: --draft-model or --prompt-lookup-num-tokens")
    prompt = _read_prompt(options)
    llm = _load(options)
    if options.show_draft:
        _show_draft(llm, prompt, llm.generate(prompt, **_asked(options)), options.stop or ())
        return
    streaming = sys.stdout.isatty() if options.stream is None else options.stream
    if not streaming:
        completion = llm.generate(prompt, **_asked(options))
        print(prompt + completion.text)
        return
    pieces = llm.stream(prompt, **_asked(options))
    print(prompt, end="", flush=True)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


def _show_draft(llm, prompt: str, completion, stops: Sequence[str]) -> None:
    """Print the text with its accepted drafts marked, and on stderr what they were good for."""
    from rich.console import Console
    from rich.text import Text

    from minillm.tokenizer import TextStream

    stream = TextStream(llm.tokenizer, llm.tokenizer.encode(prompt), stops)
    said = completion.token_ids[:-1] if completion.finish_reason == "eos" else completion.token_ids
    pieces = [*map(stream.push, said), stream.finish()]
    drafts = [*completion.from_draft[: len(said)], False]
    text = Text(prompt)
    terminal = sys.stdout.isatty()
    for drafted, group in itertools.groupby(zip(drafts, pieces, strict=True), key=lambda pair: pair[0]):
        run = "".join(piece for _, piece in group)
        text.append(run if terminal or not drafted else f"[{run}]", style="green" if drafted else "")
    Console(highlight=False).print(text, soft_wrap=True)
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
        try:
            return options.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"--file {options.file}: {error}") from None
    if options.prompt not in (None, "-"):
        return options.prompt
    if sys.stdin.isatty():
        print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not UTF-8 text: {error}") from None


def _chat(options: argparse.Namespace) -> None:
    llm = _load(options)
    chat = llm.conversation(system=options.system, max_cache_len=options.max_cache_len, **_asked(options))
    terminal = sys.stdin.isatty()
    while True:
        try:
            message = input("> " if terminal else "")
        except EOFError:
            return
        if not message.strip():
            continue
        try:
            _answer(chat.stream(message))
        except RequestError as error:
            if not terminal:
                raise
            print(f"minillm: {error}", file=sys.stderr)


def _answer(pieces) -> None:
    """Print an answer as it comes; Ctrl-C ends the answer, not the chat."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    print(flush=True)


def _inspect(options: argparse.Namespace) -> None:
    from minillm.llm import choose_dtype
    from minillm.load.config_json import load_config
    from minillm.measure.describe import facts, trace

    config = load_config(_find(options))
    for name, value in facts(config, choose_dtype(options.dtype, config), options.quantize, options.quantize_head):
        print(textwrap.fill(f"{name:<20}{value}", _width(), subsequent_indent=" " * 20))
    if options.trace is None:
        return
    walk = trace(_load(options), options.trace)
    print()
    print(textwrap.fill(f"{len(walk.tokens)} tokens: {' | '.join(map(repr, walk.tokens))}", _width()))
    print(f"\n{'step':<31}{'result':<20}{'dtype':<10}{'ms':>8}")
    for step in walk.steps:
        dtype = str(step.dtype).removeprefix("torch.")
        print(f"{step.name:<31}{list(step.shape)!s:<20}{dtype:<10}{step.milliseconds:>8.3f}")
    candidates = ", ".join(f"{text!r} {p:.1%}" for text, p in walk.candidates)
    print("\n" + textwrap.fill(f"likeliest next tokens: {candidates}", _width()))


def _find(options: argparse.Namespace, weights: bool = False) -> Path:
    from minillm.load.hub import find_checkpoint

    return find_checkpoint(
        options.model, revision=options.revision, local_files_only=options.local_files_only, weights=weights
    )


def _bench(options: argparse.Namespace) -> None:
    if options.formats is not None and options.perplexity is None:
        raise RequestError("--formats compares formats on a text: give it with --perplexity FILE")
    if options.plot is not None and options.perplexity is not None:
        raise RequestError("--plot draws speeds: leave out --perplexity")
    if options.perplexity is not None:
        _score(options)
        return
    from minillm.measure.bench import measure, save_plot

    speeds = measure(lambda: _load(options), options.lengths, options.capacities, options.new_tokens, options.repeats)
    print(json.dumps(speeds.as_dict(), indent=2) if options.json else speeds.as_text())
    if options.plot is not None:
        save_plot(options.plot, speeds)
        print(f"wrote {options.plot}", file=sys.stderr)


def _score(options: argparse.Namespace) -> None:
    from minillm.measure.perplexity import parse_format, read_documents, score_text, scores_as_text

    asked = [(options.dtype, options.quantize)]
    if options.formats is not None:
        asked = [parse_format(word, options.dtype) for word in options.formats]
    scores = []
    for dtype, quantize in asked:
        llm = _load(argparse.Namespace(**vars(options) | {"dtype": dtype, "quantize": quantize}))
        scores.append(score_text(llm, read_documents(options.perplexity, llm.tokenizer)))
    if options.json:
        print(json.dumps([score.as_dict() for score in scores], indent=2))
    else:
        print(scores_as_text(options.perplexity.name, scores))


def _memory(options: argparse.Namespace) -> None:
    from minillm.llm import choose_dtype
    from minillm.load.config_json import load_config
    from minillm.measure.memory import report, save_plot

    folder = _find(options)
    config = load_config(folder)
    dtype = choose_dtype(options.dtype, config)
    sizes = report(
        config, dtype, options.batch, options.context, options.model, folder, options.revision, options.local_files_only
    )
    print(json.dumps(sizes.as_dict(), indent=2) if options.json else sizes.as_text())
    if options.plot is not None:
        save_plot(options.plot, config, dtype, options.batch, sizes.context)
        print(f"wrote {options.plot}", file=sys.stderr)


def _quantize(options: argparse.Namespace) -> None:
    from minillm.load.quantized_copy import quantize_checkpoint

    quantize_checkpoint(_find(options, weights=True), options.out, options.to, options.head)
    print(options.out)


def _width() -> int:
    """Columns to fill: the terminal's, within reason; 80 when piped."""
    return max(40, min(shutil.get_terminal_size().columns, 100))
