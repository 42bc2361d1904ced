"""Which parts of the project may know of which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = {
    "__future__",
    "bisect",
    "collections",
    "dataclasses",
    "functools",
    "heapq",
    "itertools",
    "math",
    "typing",
}


def imported(file: Path) -> Iterator[str]:
    """Yield the absolute names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""


def top(names: Iterator[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("file", sorted((ROOT / "reference").glob("*.py")), ids=lambda f: f.name)
def test_the_reference_needs_numpy_and_scipy_alone(file: Path) -> None:
    assert top(imported(file)) <= STANDARD | {"numpy", "scipy"}


@pytest.mark.parametrize(
    "file",
    [f for f in sorted((ROOT / "lorap").rglob("*.py")) if f.parent.name != "audit"],
    ids=lambda f: str(f.relative_to(ROOT)),
)
def test_the_torch_path_does_not_know_the_reference(file: Path) -> None:
    assert not top(imported(file)) & {"lorap_reference", "reference", "parity_tests", "tests"}


@pytest.mark.parametrize(
    "file", sorted((ROOT / "lorap" / "ops").glob("*.py")), ids=lambda f: f.name
)
def test_the_math_is_pure(file: Path) -> None:
    names = set(imported(file))
    assert top(iter(names)) <= STANDARD | {"torch", "lorap"}
    assert all(name.startswith("lorap.ops") for name in names if name.startswith("lorap"))


def test_the_shipped_file_needs_torch_and_transformers_alone() -> None:
    file = ROOT / "lorap" / "families" / "modeling_lorap.py"
    allowed = STANDARD | {"functools", "importlib", "os", "pathlib", "torch", "transformers"}
    assert top(imported(file)) <= allowed
