"""Engine: one model for many callers at once, be they threads or asyncio tasks.

    with Engine(llm, seats=8) as engine:
        handle = engine.submit("Once upon a time", seed=7)
        for piece in handle:
            print(piece, end="")

One thread owns model and cache and runs a `Batch` (continuous batching); callers only ever touch a queue and their
`Handle`. What a request says is what it says alone, with the limits that batch.py names.
"""

import asyncio
import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from minillm.batch import Batch
from minillm.cache import StaticCache
from minillm.errors import EngineError, EngineFull, RequestError, first_line
from minillm.llm import LLM
from minillm.options import GenerationConfig
from minillm.request import (
    Completion,
    Prompt,
    as_prompts,
    check_whole,
    completion,
    new_rows,
)
from minillm.row import Row
from minillm.speculative.drafting import Drafting


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing and has done."""

    seats: int
    seats_in_use: int
    waiting: int
    new_tokens: int  # of all requests so far
    seconds: float  # while anybody was served
    reused_tokens: int  # of prompts, held by a seat already and not computed again
    drafted: int
    accepted: int  # drafts that became text

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that became text."""
        return self.accepted / self.drafted if self.drafted else 0.0


class Handle:
    """A request that an engine works on: iterate it for pieces of text as they come (`async for` in asyncio), wait for
    the whole with `result()` (`await` in asyncio), or `cancel()` it.

    In asyncio a task that is cancelled while it waits, and an `async for` that is left early, cancel the request:
    nobody is left to read it.
    """

    def __init__(self, row: Row):
        self._row = row
        self._changed = threading.Condition()
        self._pieces: list[str] = []
        self._outcome: Completion | Exception | None = None
        self._listeners: list[Callable[[], object]] = []  # tasks to wake, each in its own event loop

    @property
    def done(self) -> bool:
        """Whether `result` has not to wait."""
        return self._outcome is not None

    def cancel(self) -> None:
        """The engine stops with the next tick; the result is what was said until then ("cancelled")."""
        self._row.cancelled = True

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the `Completion`. Raises what went wrong, and `TimeoutError` after so many seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"no answer within {timeout} s; cancel() gives its seat to somebody else")
        return self._end()

    def __iter__(self) -> Iterator[str]:
        sent = 0
        while True:
            with self._changed:
                self._changed.wait_for(partial(self._told_more, sent))
                pieces = self._pieces[sent:]
            if not pieces:
                self._end()
                return
            yield from pieces
            sent += len(pieces)

    def __await__(self) -> Generator[None, None, Completion]:
        return self._wait().__await__()

    async def __aiter__(self) -> AsyncIterator[str]:
        sent = 0
        while True:
            await self._news(partial(self._told_more, sent))
            pieces = self._pieces[sent:]
            if not pieces:
                self._end()
                return
            try:
                for piece in pieces:
                    yield piece
            except GeneratorExit:  # its task was cancelled, or had enough
                self.cancel()
                raise
            sent += len(pieces)

    async def _wait(self) -> Completion:
        await self._news(lambda: self.done)
        return self._end()

    async def _news(self, arrived: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                with self._changed:
                    if arrived():
                        return
                    event = asyncio.Event()
                    self._listeners.append(lambda wake=event.set: loop.call_soon_threadsafe(wake))
                await event.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise

    def _told_more(self, sent: int) -> bool:
        return len(self._pieces) > sent or self.done

    def _end(self) -> Completion:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def _tell(self, piece: str, outcome: Completion | Exception | None) -> None:
        """From the engine's thread: what is new."""
        with self._changed:
            if piece:
                self._pieces.append(piece)
            self._outcome = outcome
            listeners, self._listeners = self._listeners, []
            self._changed.notify_all()
        for wake in listeners:
            try:
                wake()
            except RuntimeError:  # its event loop is closed: nobody waits there any more
                self.cancel()


class Engine:
    """Serves requests on one model in a thread of its own.

    Args:
        llm: the model.
        seats: how many requests run at a time; up to 16 keep the bits that they have alone (with drafts: see batch.py).
        max_cache_len: tokens that a seat holds, prompt and answer together (at most the model's positions).
        max_waiting: how many more requests may wait for a seat.
        assistant_model: a smaller `LLM` that drafts for the requests which do not look up in their prompt instead
            (`prompt_lookup_num_tokens`).

    As a context manager it serves what was submitted to the end, unless an error leaves the block: then it cancels.
    """

    def __init__(
        self,
        llm: LLM,
        seats: int = 8,
        max_cache_len: int = 4096,
        max_waiting: int = 32,
        assistant_model: LLM | None = None,
    ):
        check_whole("seats", seats, 1)
        check_whole("max_cache_len", max_cache_len, 1)
        check_whole("max_waiting", max_waiting, 0)
        self._lookup, self._draft = Drafting(llm, None), Drafting(llm, assistant_model)
        self._draft.check(GenerationConfig())
        if llm.model.ranks.joined:
            raise EngineError("an Engine serves callers of one process: ranks share a model for the same calls on each")
        length = min(max_cache_len, llm.config.max_positions)
        cache = StaticCache(llm.config, seats, length, device=llm.device, dtype=llm.dtype)
        self._llm = llm
        self._lookup.make_proposer(GenerationConfig(prompt_lookup_num_tokens=1), cache)
        self._draft.make_proposer(GenerationConfig(), cache)
        self._worker = _Worker(Batch(llm.steps, cache, one_request=False), max_waiting)
        # Without waiting: a collector works anywhere, also under a lock that the thread needs, also in the thread.
        weakref.finalize(self, self._worker.close, cancel=True, wait=False)

    def submit(self, prompt: Prompt, generation_config: GenerationConfig | None = None, **options) -> Handle:
        """Ask for a continuation; options as for `LLM.generate`. It is tokenized and checked here, in the caller's
        thread.

        Raises `RequestError` for a request that cannot be served, `EngineFull` if nobody more may wait, `EngineError`
        if the engine is closed or its thread has failed.
        """
        if "assistant_model" in options:
            raise RequestError("assistant_model is for the whole engine: Engine(llm, assistant_model=...)")
        cache = self._worker.batch.cache
        prompts, single = as_prompts(prompt)
        if not single:
            raise RequestError("submit takes one prompt: call it for each of a list")
        (row,), config = new_rows(self._llm, prompts, generation_config, options, cache.max_cache_len)
        drafting = self._draft if config.prompt_lookup_num_tokens is None else self._lookup
        drafting.check(config)
        drafting.attach(row, config, cache.max_step)
        return self._worker.submit(row)

    def stats(self) -> EngineStats:
        """What it is doing at this moment, and the counts since it began."""
        return self._worker.stats()

    def close(self, cancel: bool = False) -> None:
        """Serve what was submitted to the end, or cancel it, and wait for that; nothing more can be submitted."""
        self._worker.close(cancel)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close(cancel=kind is not None)


class _Worker:
    """The thread and what it shares with the callers. It knows no `Engine`, so that one can be collected."""

    def __init__(self, batch: Batch, max_waiting: int):
        self.batch = batch
        self._most = max_waiting + len(batch.seats)
        self._changed = threading.Condition()  # guards the lists that follow, and whether it is closed
        self._waiting: deque[Handle] = deque()
        self._served: list[tuple[Handle, int]] = []  # with a seat, or about to get one; how much text was handed out
        self._untold: list[tuple[Handle, int]] = []  # the same of those whose news is on its way, the thread's alone
        self._closed = False
        self._failure: BaseException | None = None
        self._seconds = 0.0
        self._ended = dict.fromkeys(("new_tokens", "reused_tokens", "drafted", "accepted"), 0)  # of finished requests
        self._thread = threading.Thread(target=self._work, name="minillm engine", daemon=True)
        self._thread.start()
        _workers.add(self)

    def submit(self, row: Row) -> Handle:
        handle = Handle(row)
        with self._guard:
            if self._failure is not None:
                raise EngineError(f"the engine has stopped: {_told(self._failure)}") from self._failure
            if self._closed:
                raise EngineError("the engine is closed: make another one")
            if not self._thread.is_alive():
                raise EngineError("the engine's thread is not in this process: make an Engine after the fork")
            if len(self._waiting) + len(self._served) >= self._most:
                raise EngineFull(f"{len(self._waiting)} requests are waiting already: come back later")
            self._waiting.append(handle)
            self._changed.notify()
        return handle

    def stats(self) -> EngineStats:
        with self._guard:
            counts = dict(self._ended)
            for handle, _ in self._served:
                _count(counts, handle._row)
            taken = len(self._served), len(self._waiting)
            return EngineStats(len(self.batch.seats), *taken, seconds=self._seconds, **counts)

    def close(self, cancel: bool, wait: bool = True) -> None:
        if self._thread.is_alive():
            with self._changed:
                self._closed = True
                if cancel:
                    for handle in (*self._waiting, *(handle for handle, _ in self._served)):
                        handle.cancel()
                self._changed.notify()
        if wait:
            self._thread.join()

    @property
    def _guard(self) -> AbstractContextManager:
        """The lock, while there is a thread to share it with. A fork leaves the thread behind, the lock as it was."""
        return self._changed if self._thread.is_alive() else nullcontext()

    def _work(self) -> None:
        try:
            while self._seat_waiting(patiently=True):
                started = time.perf_counter()
                for _ in self.batch.run():
                    self._report()
                    self._seat_waiting()
                    now = time.perf_counter()
                    self._seconds, started = self._seconds + now - started, now
        except BaseException as error:
            self._failure = error
        with self._changed:
            left = [*(handle for handle, _ in (*self._untold, *self._served)), *self._waiting]
            self._served, self._waiting = [], deque()
        for handle in left:
            problem = EngineError(f"the engine has stopped: {_told(self._failure)}")
            problem.__cause__ = self._failure
            handle._tell("", problem)

    def _seat_waiting(self, patiently: bool = False) -> bool:
        """Hand on as many requests as there are seats; `patiently` wait for one. False where there will be no more."""
        with self._changed:
            if patiently:
                self._changed.wait_for(lambda: self._waiting or self._closed)
            cancelled = [handle for handle in self._waiting if handle._row.cancelled]
            for handle in cancelled:
                self._waiting.remove(handle)
            while self._waiting and len(self._served) < len(self.batch.seats):
                handle = self._waiting.popleft()
                self._served.append((handle, 0))
                self.batch.waiting.append(handle._row)
            going_on = bool(self._served) or not self._closed
        for handle in cancelled:
            handle._row.finish("cancelled")
            handle._tell("", completion(handle._row))
        return going_on

    def _report(self) -> None:
        """Hand out what is new; first the places of those that ended: who has an answer may ask again."""
        with self._changed:
            self._untold, self._served = self._served, []
            for handle, _ in self._untold:
                if handle._row.finish_reason is None:
                    self._served.append((handle, len(handle._row.text)))
                else:
                    _count(self._ended, handle._row)
        while self._untold:
            handle, sent = self._untold[0]
            row = handle._row
            ended = row.finish_reason is not None
            if ended or len(row.text) > sent:
                handle._tell(row.text[sent:], (row.error or completion(row)) if ended else None)
            self._untold.pop(0)


def _count(counts: dict[str, int], row: Row) -> None:
    for name, value in zip(counts, (len(row.token_ids), row.reused, row.drafted, sum(row.from_draft)), strict=True):
        counts[name] += value


def _told(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {first_line(error)}"
    except Exception:  # one that cannot even say what it is must not keep the callers waiting
        return type(error).__name__


_workers: weakref.WeakSet[_Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """A thread that works on while the interpreter goes would crash it."""
    for worker in [*_workers]:
        worker.close(cancel=True)
