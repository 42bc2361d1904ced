"""A look at every weight of a model, in the background of the work on its first layers."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from torch import Tensor

from lorap.errors import LorapError
from lorap.ops.precision import all_finite


def check_weight(name: str, tensor: Tensor, what: str = "the weight") -> None:
    """Raise LorapError where a tensor is not finite."""
    if not all_finite(tensor):
        raise LorapError(f"{name}: {what} holds NaN or inf")


class Inspection:
    """Checks that all weights are finite, in a thread of its own, as a context manager.

    What is wrong is raised by the next ``check``, or by leaving the context.

    Parameters
    ----------
    tensors : iterable of (name, Tensor)
        Gone through once.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        self._tensors = tensors
        self._error: Exception | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lorap-inspect", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self._stopped.set()
        self.finish()

    def finish(self) -> None:
        """Wait until all has been looked at, and raise what has been found.

        Raises
        ------
        LorapError
            If a weight is not finite.
        """
        self._thread.join()
        if not self._stopped.is_set():
            self.check()

    def check(self) -> None:
        """Raise what has been found by now.

        Raises
        ------
        LorapError
            If a weight is not finite.
        """
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            for name, tensor in self._tensors:
                check_weight(name, tensor)
                if self._stopped.is_set():
                    return
        except Exception as error:
            # Raised where somebody waits for it.
            self._error = error
