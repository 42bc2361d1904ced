"""Writing pictures and pages into a folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from lorap.errors import UsageError


def check_folder(folder: str | Path, names: Iterable[str], *, overwrite: bool) -> Path:
    """Return the folder, made if it was not there, if files of these names can be written there.

    Parameters
    ----------
    folder : str or Path
    names : iterable of str
        Of the files.
    overwrite : bool
        Whether such files may be replaced.

    Raises
    ------
    UsageError
        If one is there and may not be replaced, or the folder cannot be written.
    """
    path = Path(os.path.expanduser(folder))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} cannot be written")
    there = [name for name in names if os.path.lexists(path / name)]
    if there and not overwrite:
        raise UsageError(f"{folder} holds a {there[0]} already; --overwrite replaces it")
    return path


def write_files(folder: Path, texts: Mapping[str, str]) -> None:
    """Write files, each aside and then renamed.

    Parameters
    ----------
    folder : Path
    texts : mapping
        Name to contents.
    """
    for name, text in texts.items():
        aside = folder / f".{name}.partial"
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(folder / name)
        finally:
            aside.unlink(missing_ok=True)
