"""A chat template is a program by whoever made the checkpoint: it runs in a sandbox, on an account.

jinja2's immutable sandbox keeps it from Python's internals and from its caller's values, not from running for ever or
filling the memory. Here every step of it (an operation, a call, a turn of a loop) and every byte it makes is charged
to an account; what multiplies its input is charged before it is carried out; what cannot be estimated (formatting,
padding) is not there. The process is asked for nothing: no signal, no limit, no thread, no child.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from functools import cached_property, wraps
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from minillm.errors import TokenizerError, first_line

_SECONDS = 1.5  # of this thread's own time: a busy machine is no reason to refuse a conversation
_BYTES, _LARGEST = 2**25, 2**20  # of all values ever made together; of one value with what is in it, and of the text
_STEP = 64  # bytes that any step costs, so that the account bounds their number too
_BITS = 4096  # of a whole number

# What takes no longer, and makes no more, than a few times what it is given, or is charged for in `_growth`.
_METHODS = frozenset(
    """capitalize casefold copy count endswith find get index isalnum isalpha isascii isdecimal isdigit islower
    isnumeric isspace istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper values""".split()
)
_FILTERS = """abs attr capitalize count d default dictsort e escape first float forceescape groupby indent int items
    join last length list lower map max min reject rejectattr replace reverse safe select selectattr sort string title
    trim unique upper""".split()
_TO_LIST = frozenset("join list rsplit sort split splitlines title unique".split())  # of text: of its characters


class ChatTemplate:
    """A chat template as it stands in a checkpoint; compiled when it is first used; for any number of threads."""

    def __init__(self, source: str):
        self.source, self._sandbox = source, _Sandbox()

    def __reduce__(self):
        return ChatTemplate, (self.source,)  # copied and pickled as its source

    def render(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        """The text of a conversation `[{"role": ..., "content": ...}, ...]`.

        Whatever the template does, it gets 1.5 seconds, and 32 MiB (1 MiB of text) on top of some multiples of what it
        is given. Raises `TokenizerError` if that is not enough, or if it fails or refuses the messages (many insist on
        alternating roles).
        """
        try:
            self._sandbox.open_account(_weigh((messages, variables), 2**28))
            return self._sandbox.made(self._template.render(messages=messages, **variables))
        except Exception as error:  # it may fail in any way
            raise TokenizerError(f"the chat template refused these messages: {first_line(error)}") from None

    @cached_property
    def _template(self):
        return self._sandbox.from_string(self.source)


class _Charged(NodeTransformer):
    """Lets the new values of a parsed template, and every turn of its loops, pass by the account."""

    def visit_made(self, node):
        self.generic_visit(node)
        is_index = isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice)
        makes = not is_index and getattr(node, "ctx", "load") == "load"  # not looked up, not assigned to
        return _call("made", [node]) if makes else node

    visit_List = visit_Tuple = visit_Dict = visit_Compare = visit_Getitem = visit_made

    def visit_Concat(self, node):
        return _call("concatenate", self.generic_visit(node).nodes)

    def visit_For(self, node):
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("charge", [nodes.Const(_STEP + 4 * text)]), lineno=node.lineno))
        return node


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class _Namespace(Namespace):
    def __repr__(self) -> str:  # what is in it may hold itself, many times over
        return "<Namespace>"


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self):
        # optimized=False, finalize with a context: nothing is computed while compiling, without an account.
        finalize = pass_context(lambda context, value: self.made(value))
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=finalize)
        self.add_extension(LoopControlExtension)
        self.account = threading.local()
        self.filters = {name: self._guard(name, self.filters[name]) for name in _FILTERS}
        self.filters["tojson"] = self._to_json
        self.tests = {name: self._guard(name, test) for name, test in self.tests.items()}
        self.globals = dict(
            range=self.globals["range"],  # up to 100,000
            dict=lambda **values: values,
            namespace=_Namespace,
            raise_exception=_refuse,
            strftime_now=lambda form: datetime.now().strftime(form[:99]),
        )

    def open_account(self, given: int) -> None:
        self.account.bytes, self.account.largest = _BYTES + 64 * given, _LARGEST + 16 * given
        self.account.deadline = time.thread_time() + _SECONDS * (1 + given / 2**20)

    def charge(self, size: float) -> str:
        """Take `size` bytes from the account."""
        self.account.bytes -= size
        if self.account.bytes < 0 or time.thread_time() > self.account.deadline:
            raise SecurityError("it needs more time or memory than any conversation does")
        return ""

    def made(self, value: Any) -> Any:
        """Charge a value that has come to be, with all that is in it."""
        if isinstance(value, int) and value.bit_length() > _BITS:
            raise SecurityError("it makes a number of over 1,000 digits")
        self.charge(_STEP + _weigh(value, self.account.largest))
        return value

    def concatenate(self, *values: Any) -> str:
        return "".join([str(value) for value in map(self.made, values)])

    def _parse(self, source, name, filename):
        return _Charged().visit(super()._parse(source, name, filename))

    def getitem(self, obj, argument):
        self.charge(_STEP)
        return super().getitem(obj, argument)

    def call_binop(self, context, operator, left, right):
        if operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            self.charge(_size(left) * _size(right))
        elif operator == "**" and isinstance(left, int):
            self.charge(left.bit_length() * abs(right))
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("formatting with % is not available in a chat template")
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context, __function, *args, **kwargs):  # so named that a template may say self=...
        method = getattr(__function, "__wrapped__", __function)  # jinja2 wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | int | float | list | tuple | dict | range | type):
            if method.__name__ not in _METHODS:
                raise SecurityError(f"{method.__name__}() is not available in a chat template")
            __self.charge(_growth(method.__name__, owner, *args, *kwargs.values()))
        return __self._listed(super().call(__context, __function, *args, **kwargs))

    def _guard(self, name: str, function):
        """A filter or a test that is charged for: what it may make before, what it has made after."""

        @wraps(function)
        def guarded(*args, **kwargs):
            given = args[1:] if hasattr(function, "jinja_pass_arg") else args
            self.charge(_STEP + _growth(name, *given, *kwargs.values()))
            return self._listed(function(*args, **kwargs))

        return guarded

    def _listed(self, result: Any) -> Any:
        """What would come only as it is asked for, or change with what it looks at, as a list."""
        if isinstance(result, Iterator | type({}.keys()) | type({}.values()) | type({}.items())):
            result = [one for one in result if self.charge(_STEP) == ""]
        return self.made(result)

    def _to_json(self, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        """As json.dumps writes it, without HTML escapes: what templates expect. At most 16 spaces a level."""
        indent = indent and min(int(indent), 16)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return "".join(map(self.made, encoder.iterencode(value)))


def _weigh(value: Any, most: int) -> int:
    """Bytes of a value and all that is in it, counted as often as it is there. SecurityError beyond `most`."""
    total, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        total += sys.getsizeof(one, _STEP)
        if total > most:
            raise SecurityError("it makes a value larger than any conversation needs")
        if isinstance(one, list | tuple | set | frozenset):
            waiting += one
        elif isinstance(one, dict):
            waiting += (*one.keys(), *one.values())
    return total


def _growth(name: str, value: Any = None, *rest: Any) -> int:
    """Bytes that a method or filter may make where that is more than a few times what it is given."""
    size = 0
    if name == "replace" and len(rest) >= 2:
        size = (str(value).count(str(rest[0])) + 1) * len(str(rest[1]))
    elif name in ("join", "indent"):
        size = _size(value)
        for one in rest:
            size *= max(1, _size(one))
    if name in _TO_LIST and isinstance(value, str):
        separated = "split" in name and rest and isinstance(rest[0], str) and rest[0]
        size += 2 * _STEP * (1 + (value.count(rest[0]) if separated else len(value)))
    return size


def _size(value: Any) -> int:
    return abs(value) if isinstance(value, int) else sys.getsizeof(value, _STEP)


def _refuse(message: str) -> None:
    raise TemplateError(message)
