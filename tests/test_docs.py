"""The documentation builds without a warning, from the docstrings and files that there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lorap

ROOT = Path(__file__).parents[1]


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    for name in set(lorap.__all__) - {"__version__"}:
        assert f'id="{name.lower()}"' in api, name
    budget = (tmp_path / "site" / "api" / "lorap_reference" / "budget" / "index.html").read_text()
    assert "layer_ratio" in budget
