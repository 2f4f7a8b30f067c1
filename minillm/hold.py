"""Who may write to a cache: one model until it is emptied, one request at a time, one forward pass at a time."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from minillm.errors import CacheError

_WAY_OUT = "let it end or close() it, or give each its own StaticCache"


class Hold:
    """The state of it, shared by a `StaticCache` and the rows cut from it."""

    def __init__(self):
        # Taken out while a pass or a request lasts; `list.pop` is atomic, so of two threads one gets it. Unlike a
        # lock, a list is copied with its cache, and `reset` can put it back where an interrupt struck badly.
        self._no_pass, self._no_request = [True], [True]
        self._request: str | None = None  # who has the cache,
        self._thread: int | None = None  # and in which thread that is at work just now
        self._embedding: weakref.ref | None = None  # of the decoder that fills it

    @contextmanager
    def by(self, request: str) -> Iterator[None]:
        """Keep the cache for one request as long as it lives: others may not write, and it only in a `turn` of it.

        Raises `CacheError` while another request has it.
        """
        try:
            self._no_request.pop()
        except IndexError:
            raise CacheError(f"the cache is in use by {self._request}: {_WAY_OUT}") from None
        try:
            self._request = request
            yield
        finally:
            self._request, self._no_request[:] = None, [True]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While this lasts the request itself is at work, in this thread. Between turns its caller is."""
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    def check_turn(self) -> None:
        """Raise `CacheError` where a request has the cache and this is not its turn."""
        if self._request is not None and self._thread != threading.get_ident():
            raise CacheError(f"the cache is in use by {self._request}: {_WAY_OUT}")

    def check_model(self, embedding: nn.Module) -> None:
        """Raise `CacheError` if the decoder with this embedding is not the one that fills the cache."""
        if self._embedding is not None and self._embedding() is not embedding:
            raise CacheError("the cache holds keys of another model: reset() it, or give each model its own")

    @contextmanager
    def a_pass(self, embedding: nn.Module) -> Iterator[None]:
        """Around one forward pass of the decoder with this embedding. Raises `CacheError` during another one."""
        self.check_turn()
        try:
            self._no_pass.pop()
        except IndexError:
            raise CacheError(f"the cache is in use by another forward pass: {_WAY_OUT}") from None
        try:
            self._embedding = self._embedding or weakref.ref(embedding)
            yield
        finally:
            self._no_pass[:] = [True]

    def forget(self) -> None:
        """The cache is emptied: any model may fill it."""
        self.check_turn()
        self._embedding, self._no_pass[:] = None, [True]
        if self._request is None:
            self._no_request[:] = [True]
