"""Reading ahead and writing behind, so that neither keeps the computation waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


def read_ahead(load: Callable[[int], T], indices: Iterable[int]) -> Iterator[tuple[int, T]]:
    """Load one item after the other, the next one while the last one is worked on.

    Parameters
    ----------
    load : callable
        Called from a thread of its own.
    indices : iterable of int

    Yields
    ------
    tuple of int and the item
        At most one more is held, complete or on its way.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="lorap-read") as pool:
        pending: Future[T] | None = None
        last = 0
        for index in indices:
            coming = pool.submit(load, index)
            if pending is not None:
                yield last, pending.result()
            pending, last = coming, index
        if pending is not None:
            yield last, pending.result()


class WriteBehind:
    """Does work in a thread, one piece at a time and in order, as a context manager.

    An error in the thread is raised by the next call, or by leaving the context. Leaving it by an
    exception waits for the piece in hand.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lorap-write")
        self._pending: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self._pool.shutdown(wait=True)

    def __call__(self, work: Callable[..., object], *arguments: Any) -> None:
        """Begin a piece of work once the last one is done."""
        self.finish()
        self._pending = self._pool.submit(work, *arguments)

    def finish(self) -> None:
        """Wait for the piece in hand."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
