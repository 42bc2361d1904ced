"""Measuring the cells of a study, each once."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.paper.data import Data
from bench.paper.measures import Row, configured
from bench.paper.studies import Cell
from lorap.pages.files import write_files
from lorap.runtime import versions
from lorap.wording import duration

Say = Callable[[str], None]


class Store:
    """The cells that are measured, one file each in a folder.

    A cell's file is named by a digest of the measurement, its arguments, the contents of model and
    data, and the versions of the packages; what it is called in a table does not matter, so that
    tables share cells. lorap's own code counts by its version alone.

    Parameters
    ----------
    folder : Path
        Made where it is missing.
    data : Data
    """

    def __init__(self, folder: Path, data: Data) -> None:
        self._folder = folder / "cells"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._common = {"data": data.identity(), "versions": versions()}

    def name(self, cell: Cell) -> str:
        """Return the name of a cell's file."""
        text = json.dumps(self._key(cell), sort_keys=True)
        return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def find(self, cell: Cell) -> list[Row] | None:
        """Return what was measured; None where nothing was."""
        path = self._folder / self.name(cell)
        if not path.exists():
            return None
        rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return rows

    def add(self, cell: Cell, rows: Sequence[Row], seconds: float) -> None:
        """Store what was measured: written aside, then renamed."""
        content = self._key(cell) | {"seconds": seconds, "rows": list(rows)}
        write_files(self._folder, {self.name(cell): json.dumps(content, indent=1)})

    def _key(self, cell: Cell) -> dict[str, Any]:
        arguments = dict(cell.arguments)
        if arguments.get("settings") is not None:
            # With the defaults, which may be given or not.
            arguments["settings"] = configured(arguments["settings"]).to_dict()
        return {"measure": cell.measure.__name__, "arguments": arguments, **self._common}


def run(cells: Sequence[Cell], data: Data, store: Store, *, again: bool, say: Say) -> list[Row]:
    """Measure the cells that are not stored, and return the rows of all.

    Parameters
    ----------
    cells : sequence of Cell
    data : Data
    store : Store
    again : bool
        Whether to measure those that are stored too.
    say : callable
        Called with a line after each cell that was measured.
    """
    left = {store.name(cell): cell for cell in cells if again or store.find(cell) is None}
    began = time.perf_counter()
    for done, cell in enumerate(left.values(), 1):
        start = time.perf_counter()
        found = cell.measure(data, **cell.arguments)
        now = time.perf_counter()
        store.add(cell, found, now - start)
        rest = (now - began) / done * (len(left) - done)
        labels = ", ".join(f"{name} {value}" for name, value in cell.labels.items())
        say(
            f"{done} of {len(left)}: {labels or cell.measure.__name__}, {duration(now - start)}; "
            f"about {duration(rest)} left"
        )
    return [{**cell.labels, **row} for cell in cells for row in store.find(cell) or ()]
