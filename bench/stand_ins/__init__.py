"""What a machine lacks on which nothing can be installed: put on the path in place of packages."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def missing(package: str) -> bool:
    """Whether a package cannot be imported."""
    return importlib.util.find_spec(package) is None


def provide(folder: Path) -> dict[str, str]:
    """Make the packages importable that can be stood in for, here and in processes to come.

    ``wrapt`` by the one function that lorap needs at its import, ``lorap_reference`` by the
    repository's own folder, where it is not installed.

    Parameters
    ----------
    folder : Path
        For links; made where it is missing.

    Returns
    -------
    dict
        The environment for other processes.
    """
    here = Path(__file__).parent
    wanted = {"wrapt": here / "wrapt.py", "lorap_reference": ROOT / "reference"}
    paths = [str(ROOT)]
    for package, source in wanted.items():
        if missing(package):
            folder.mkdir(parents=True, exist_ok=True)
            link = folder / f"{package}{source.suffix}"
            if not link.exists():
                link.symlink_to(source)
            paths.append(str(folder.resolve()))
    sys.path[1:1] = [path for path in dict.fromkeys(paths) if path not in sys.path]
    given = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*dict.fromkeys(paths), *([given] if given else [])]),
    }
