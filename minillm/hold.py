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
        self._writing, self._requested = threading.Lock(), threading.Lock()
        self._request: str | None = None  # who has the cache,
        self._thread: int | None = None  # and in which thread that is at work just now
        self._embedding: weakref.ref | None = None  # of the decoder that fills it,
        self._weights: tuple | None = None  # and what its weights were then
        # A reference to the `faster.steps.Steps` that wrote last: it need not look at the weights again.
        self.stepped_by: weakref.ref | None = None

    def __deepcopy__(self, memo) -> "Hold":
        """The copy of a cache belongs to the same model and to no request."""
        copy, embedding = Hold(), self._embedding and self._embedding()
        if embedding is not None:  # or to the model that was copied before it, at the same time
            copy._embedding, copy._weights = weakref.ref(memo.get(id(embedding), embedding)), self._weights
        return copy

    @contextmanager
    def by(self, request: str) -> Iterator[None]:
        """Keep the cache for one request as long as it lives: others may not write, and it only in a `turn` of it.

        Raises `CacheError` while another request has it.
        """
        if not self._requested.acquire(blocking=False):
            raise CacheError(f"the cache is in use by {self._request}: {_WAY_OUT}")
        try:
            self._request = request
            yield
        finally:
            self._request = None
            self._requested.release()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """While this lasts the request itself is at work, in this thread. Between turns its caller is."""
        self._thread = threading.get_ident()
        try:
            yield
        finally:
            self._thread = None

    @property
    def in_turn(self) -> bool:
        """Whether this thread works for the request that has the cache."""
        return self._thread == threading.get_ident()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around whatever changes the cache, checks included: alone, and in its turn if a request has the cache.

        Raises `CacheError` otherwise.
        """
        if self._writing.locked():  # perhaps by this very thread, whose signal handler or hook this is: do not wait
            raise CacheError(f"the cache is being written to by a forward pass: {_WAY_OUT}")
        with self._writing:
            if self._request is not None and not self.in_turn:
                raise CacheError(f"the cache is in use by {self._request}: {_WAY_OUT}")
            self.stepped_by = None
            yield

    def check_model(self, embedding: nn.Module) -> None:
        """Raise `CacheError` if the decoder with this embedding is not the one that fills the cache."""
        if self._embedding is not None and self._embedding() is not embedding:
            raise CacheError("the cache holds keys of another model: reset() it, or give each model its own")

    def bind(self, embedding: nn.Module) -> None:
        """The decoder with this embedding fills the cache from now on. Raises `CacheError` as `check_model` does."""
        self.check_model(embedding)  # once more: whoever asked before may have waited meanwhile
        self._embedding = self._embedding or weakref.ref(embedding)

    def same_weights(self, weights: tuple) -> bool:
        """Whether the weights (`Decoder.fingerprint`) are what they were when this was last asked."""
        before, self._weights = self._weights, weights
        return before in (None, weights)

    def free(self) -> None:
        """The cache is emptied: any model may fill it."""
        self._embedding = self._weights = None
