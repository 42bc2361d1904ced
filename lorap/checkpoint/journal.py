"""What a run that ended early had finished, so that another one can go on from there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lorap.checkpoint.files import sync
from lorap.errors import UsageError

FOLDER = ".lorap"
"""Folder of the journal in that of the checkpoint, until this is whole."""

_RUN = "run.json"

SCRATCH = "scratch"

_KEYS = ("content", "files")
"""Of a record."""


class Journal:
    """Records of finished pieces of work, each with the checksums of its files.

    A record is written when its files are on the disk, aside and then renamed: what it says is
    true, whenever the run ends. Checksums tell whether it still is.

    Parameters
    ----------
    folder : Path
        Of the checkpoint that grows; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._checkpoint = folder
        self._folder = folder / FOLDER

    def begin(self, run: Mapping[str, Any]) -> None:
        """Start afresh.

        Parameters
        ----------
        run : mapping
            All that the results depend on, as JSON can hold it.
        """
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        self._clear_scratch()
        self._write(_RUN, dict(run))

    def resume(self, run: Mapping[str, Any]) -> None:
        """Go on with what another run has left.

        Raises
        ------
        UsageError
            If that run was of another kind; the message says what differs.
        """
        then = self._read(_RUN)
        if then is None:
            raise UsageError(
                f"resume: {self._folder / _RUN}, which says what the run was that was left, is "
                "missing or damaged; start afresh with --overwrite"
            )
        differing = _differences(then, json.loads(json.dumps(run)))
        if differing:
            more = f", and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise UsageError(
                "resume: the run that was left is another one: "
                f"{'; '.join(differing[:3])}{more}. Give the same again, or start afresh with "
                "--overwrite"
            )
        self._clear_scratch()

    @property
    def scratch(self) -> Path:
        """A folder for files that are of no use to another run; it goes with the journal."""
        return self._folder / SCRATCH

    def _clear_scratch(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()

    @property
    def records(self) -> int:
        """Number of records, true or not."""
        return len(list(self._folder.glob("*.json"))) - (self._folder / _RUN).is_file()

    def record(
        self,
        name: str,
        content: Mapping[str, Any],
        *,
        files: Sequence[str] = (),
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Note a finished piece of work.

        Parameters
        ----------
        name : str
        content : mapping
            What JSON can hold.
        files : sequence of str
            Names of files of the checkpoint, complete and on the disk.
        tensors : mapping, optional
            Kept with the record.
        """
        sums = {file: _checksum(self._checkpoint / file) for file in files}
        if tensors:
            kept = f"{FOLDER}/{name}.safetensors"
            save_file({key: t.cpu().contiguous() for key, t in tensors.items()}, self._path(kept))
            sync(self._path(kept))
            sums[kept] = _checksum(self._path(kept))
        self._write(f"{name}.json", {"content": dict(content), "files": sums})

    def find(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return content and tensors of a record; None where it is missing or no longer true."""
        record = self._read(f"{name}.json")
        if record is None or not all(isinstance(record.get(key), dict) for key in _KEYS):
            return None
        for file, expected in record["files"].items():
            path = self._path(file)
            if not path.is_file() or _checksum(path) != expected:
                return None
        return record["content"], self.tensors(name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return what is kept with a record that this run has written, or found to be true."""
        kept = self._folder / f"{name}.safetensors"
        return load_file(kept) if kept.is_file() else {}

    def remove(self, checkpoint: Path) -> None:
        """Remove the journal, once its checkpoint is whole and in its place."""
        shutil.rmtree(checkpoint / FOLDER, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self._checkpoint / name

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            values = json.loads((self._folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return values if isinstance(values, dict) else None

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        aside = self._folder / f"{name}.aside"
        aside.write_text(json.dumps(values, allow_nan=False), encoding="utf-8")
        sync(aside)
        aside.replace(self._folder / name)
        sync(self._folder)


def lock(folder: Path) -> int | None:
    """Lock a folder against other processes.

    Returns
    -------
    int or None
        A descriptor that holds the lock until it is closed, by a kill too; None where another
        process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have renamed or removed it in between.
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _checksum(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _differences(then: Any, now: Any, where: str = "") -> list[str]:
    """Return what differs between two values that came from JSON, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        found = []
        for key in {**then, **now}:
            inner = f"{where}.{key}" if where else str(key)
            found += _differences(then.get(key), now.get(key), inner)
        return found
    return [] if then == now else [f"{where} was {then!r} and is {now!r}"]
