"""How far a run has come, over all of its passes."""

from __future__ import annotations

from collections.abc import Callable

from lorap.config import CompressionConfig

Progress = Callable[[int, int], None]
"""Called with the layers done and the layers in all, those of every pass counted; first with 0."""


class Steps:
    """Counts the layers done, over all passes of a run.

    Parameters
    ----------
    progress : Progress or None
        Called at once, and whenever a layer is done.
    config : CompressionConfig
        Says which passes there are.
    layers : int
        Decoder layers of the model.
    compresses : bool
        Whether a pass follows those that measure.
    """

    def __init__(
        self,
        progress: Progress | None,
        config: CompressionConfig,
        layers: int,
        *,
        compresses: bool = True,
    ) -> None:
        passes = compresses + config.measures + config.measures_gradients
        self._progress, self._total, self._done = progress, passes * layers, -1
        self._layers = layers
        self()

    def skip_measurement(self) -> None:
        """Count the passes that measure as done."""
        self._done = self._total - self._layers - 1
        self()

    def __call__(self) -> None:
        """Count one more layer."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
