"""The `minillm` command: parse, call the library, print.

Results go to stdout, progress and notices to stderr. Exit status 0: done; 1: a `MinillmError`, told in one line;
2: the command line itself was wrong; 130: interrupted. `process.py` adds what a process of its own needs.
"""

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from minillm import __version__
from minillm.cli import commands, ranks
from minillm.cli.flags import amount, count, counts, groups, text
from minillm.errors import MinillmError
from minillm.options import QUANTIZED_FORMATS


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        try:
            ranks.be_silent()
            options = _parser().parse_args(arguments)
            if ranks.to_start(options):
                return ranks.launch(options.ranks, sys.argv[1:] if arguments is None else arguments)
            if ranks.take_part(options):
                options.command(options)
        finally:
            sys.stdout.flush()
    except MinillmError as error:
        return ranks.tell(error) if ranks.several() else ranks.complain(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        if ranks.several():
            ranks.claim()  # so that no other rank complains
        return 0  # whoever read our output (head, a pager) has enough
    except OSError as error:
        if error.filename is not None:
            raise  # a file's: what opens one answers for it
        return ranks.complain(f"standard input or output: {error.strerror}")
    except Exception as error:
        if not ranks.several():
            raise
        return ranks.tell(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm", description="A minimal decoder runtime for large language models.")
    parser.add_argument("--version", action="version", version=f"minillm {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable, *groups: argparse.ArgumentParser) -> Callable:
        """A command named like `run` and told by its docstring; returns what adds a flag to those of the groups."""
        name, told = run.__name__, textwrap.dedent(run.__doc__ or "")
        made = subparsers.add_parser(name, parents=groups, help=told.partition("\n")[0], description=told)
        made.set_defaults(command=run)
        return made.add_argument

    hub, dtype, model, generation, results, split = groups()
    add = command(commands.generate, model, generation, split)
    add("prompt", nargs="?", type=text, help="the text; without it (or with -) it is read from stdin")
    add("--file", type=Path, metavar="F", help="read the prompt from this file instead")
    add("--each-line", action="store_true", help="each line that is not blank is a prompt of its own")
    add("--seats", type=count, metavar="N", help="with --each-line: prompts that run at a time (default: 16)")
    lines = "with --each-line: print each answer as a line of JSON as soon as it is complete"
    add("--jsonl", action="store_true", help=lines)
    add("--stream", action=argparse.BooleanOptionalAction, help="print pieces as they come (default on a terminal)")
    marks = "mark the tokens that a draft guessed right: in colour on a terminal, else in [brackets]"
    add("--show-draft", action="store_true", help=marks)

    add = command(commands.chat, model, generation, split)
    add("--system", type=text, metavar="TEXT", help="the system message")
    add("--max-cache-len", type=count, metavar="N", help="tokens the conversation may hold")

    add = command(commands.inspect, model)
    add("--trace", type=text, metavar="TEXT", help="also walk one forward pass over this text")

    add = command(commands.bench, model, results, split)
    add("--lengths", type=counts, metavar="N,N", help="prompt lengths (default: 64,256,1024)")
    sizes = "cache sizes to decode in (default: 128,1024,4096,16384)"
    add("--capacities", type=counts, metavar="N,N", help=sizes)
    add("--batch", type=counts, default=(), metavar="N,N", help="also decode so many rows at once, such as 1,2,4,8,16")
    add("--busy", action="store_true", help="also decode beside a process that keeps one core busy")
    add("--new-tokens", type=count, default=32, metavar="N", help="decoded per measurement (default: 32)")
    add("--repeats", type=count, default=5, metavar="N", help="(default: 5)")
    add("--perplexity", type=Path, metavar="FILE", help="bits per byte of this text instead of speed")
    words = "with --perplexity: compare these, such as bf16,int8,int4-g32"
    add("--formats", type=lambda text: text.split(","), metavar="F,F", help=words)

    add = command(commands.memory, dtype, hub, results, split)
    add("model", nargs="?", default="demo", metavar="M", help="demo, a folder or a Hub id")
    add("--batch", type=count, default=1, metavar="B", help="rows (default: 1)")
    add("--context", type=count, metavar="N", help="tokens per row (default: 4096, or all positions)")

    add = command(commands.quantize, hub)
    add("model", metavar="MODEL", help="demo, a folder or a Hub id")
    add("out", type=Path, metavar="OUT", help="a new folder")
    add("--to", required=True, metavar="FORMAT", help=", ".join(QUANTIZED_FORMATS))
    add("--head", action="store_true", help="the output head too, in int8")

    add = command(commands.finetune, hub)
    add("model", metavar="MODEL", help="demo, a folder or a Hub id")
    add("data", type=Path, metavar="DATA", help="a text file, a .jsonl file of conversations, or a folder of them")
    add("out", type=Path, metavar="OUT", help="a new folder; what is unfinished lies in OUT.partial")
    add("--steps", type=count, metavar="N", help="optimizer steps; or")
    add("--epochs", type=amount, metavar="E", help="how often to read the data (default: once); or")
    add("--minutes", type=amount, metavar="M", help="about how long to train, by the speed of one step")
    add("--lora", type=count, metavar="RANK", help="train an adapter of this rank, such as 16, and not all weights")
    add("--quantize", metavar="FORMAT", help=f"what the adapter stands beside: {', '.join(QUANTIZED_FORMATS)}")
    longest = "of a row and of a conversation (default: 2048, or the model's positions); longer text is cut"
    add("--max-length", type=count, metavar="N", help=f"tokens {longest}")
    add("--rows", type=count, metavar="N", help="rows of an optimizer step (default: 8, an epoch at most)")
    add("--rows-at-once", type=count, metavar="N", help="rows of a forward pass (default: 1)")
    add("--learning-rate", type=amount, metavar="X", help="after a warm-up (default: 2e-5; of an adapter 2e-4)")
    add("--held-out", metavar="SHARE|FILE", help="scored before and after, never learned (default: 0.05 of the data)")
    add("--seed", type=int, metavar="N", help="same seed, same weights (default: 0)")
    add("--bf16", action=argparse.BooleanOptionalAction, help="matrix products in bfloat16 (default)")
    add("--compile", action="store_true", default=None, help="torch.compile: minutes to start, then faster")
    add("--recompute", action="store_true", default=None, help="activations on the way back: slower, less memory")
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--plot", type=Path, metavar="PNG", help="draw the loss into this file")

    add = command(commands.merge, hub)
    add("model", metavar="MODEL", help="the adapter's base: demo, a folder or a Hub id")
    add("adapter", metavar="ADAPTER", help="a folder or a Hub id, as PEFT saves it")
    add("out", type=Path, metavar="OUT", help="a new folder")
    return parser
