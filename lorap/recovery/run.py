"""A training run that has not ended: the folder of its checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorap.errors import UsageError

IDENTITY, LOCK, BEST, ADAPTER = "run.json", "lock", "best", "adapter"
"""What lies beside the Trainer's checkpoints."""

BEST_STEP = "best.json"


class Run:
    """The folder beside an output in which its training goes on.

    Parameters
    ----------
    output : Path
        Absolute; it appears when the run has ended.
    main : bool
        Whether this process is the one that writes.
    """

    def __init__(self, output: Path, main: bool) -> None:
        self.output = output
        self.main = main
        self.folder = output.with_name(f"{output.name}.unfinished")

    @contextlib.contextmanager
    def held(self, identity: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
        """Make the folder, or take over that of an earlier run; let no other run have it meanwhile.

        A folder without a checkpoint is removed at the end, whatever happened.

        Parameters
        ----------
        identity : mapping
            What checkpoints depend on, as plain values.
        resume : bool
            Whether to go on with an earlier run.

        Raises
        ------
        UsageError
            If there is an earlier run that is not to be resumed, or is another one, or is going on.
        """
        if not self.main:
            yield
            return
        if self.folder.exists() and not resume:
            raise UsageError(
                f"{self.folder} holds a run that did not end: --resume goes on with it; delete the "
                "folder to start anew"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(f"{self.folder}: another run is going on there") from error
            self._identify(identity)
            try:
                yield
            finally:
                if self.last_checkpoint() is None:
                    shutil.rmtree(self.folder, ignore_errors=True)

    def _identify(self, identity: Mapping[str, Any]) -> None:
        """Write down what the run is, or compare with what was written."""
        file = self.folder / IDENTITY
        if not file.exists() or self.last_checkpoint() is None:
            shutil.rmtree(self.folder / BEST, ignore_errors=True)
            file.write_text(json.dumps(identity, indent=2), encoding="utf-8")
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, value in identity.items():
            if before.get(name) != value:
                raise UsageError(
                    f"{self.folder} cannot be resumed: {name} was {before.get(name)!r} and is "
                    f"{value!r} now; delete the folder to start anew"
                )

    def last_checkpoint(self) -> Path | None:
        """Return the last checkpoint that is whole; None where there is none."""
        found = {
            int(number): folder
            for folder in self.folder.glob("checkpoint-*")
            if (number := folder.name.removeprefix("checkpoint-")).isdecimal()
        }
        for step in sorted(found, reverse=True):
            # The Trainer writes it last.
            with contextlib.suppress(OSError, ValueError):
                json.loads((found[step] / "trainer_state.json").read_text("utf-8"))
                return found[step]
        return None

    def best(self) -> tuple[int, float] | None:
        """Return step and validation loss of the best adapter so far; None where there is none."""
        try:
            found = json.loads((self.folder / BEST / BEST_STEP).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return int(found["step"]), float(found["loss"])

    def keep_best(self, written: Path, step: int, loss: float) -> None:
        """Put an adapter in the place of the best one so far.

        Parameters
        ----------
        written : Path
            Folder that holds it; it is renamed.
        step : int
        loss : float
            On the validation data.
        """
        (written / BEST_STEP).write_text(json.dumps({"step": step, "loss": loss}), "utf-8")
        shutil.rmtree(self.folder / BEST, ignore_errors=True)
        written.rename(self.folder / BEST)

    def drop_best_after(self, step: int) -> None:
        """Forget a best adapter of steps that will be made again."""
        best = self.best()
        if self.main and best is not None and best[0] > step:
            shutil.rmtree(self.folder / BEST)

    def finish(self, adapter: Path) -> None:
        """Put the adapter folder in the place of the output, and remove the rest.

        Parameters
        ----------
        adapter : Path
            In the folder of the run, complete.

        Raises
        ------
        UsageError
            If the output was created meanwhile.
        """
        if self.output.exists():
            raise UsageError(f"{self.output} was created meanwhile; the adapter is in {adapter}")
        os.rename(adapter, self.output)
        shutil.rmtree(self.folder, ignore_errors=True)
