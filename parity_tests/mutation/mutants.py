"""All mutants of a project: those from the syntax tree, the written ones, and what explains some.

``written.toml`` holds bugs that no rule of syntax would make: the misreadings of the paper that
someone could really write. ``equivalent.toml`` holds the mutants that no test can tell from the
original, each with the reason; an entry that has become untrue is an error.
"""

import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parity_tests.mutation import generate
from parity_tests.mutation.generate import Mutant
from parity_tests.mutation.project import Project

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Written:
    """A bug written by hand: ``old`` stands once in the function, and ``new`` in its place.

    Attributes
    ----------
    module, function, title : str
        The parts of the mutant's name.
    bug : str
        What is wrong with it.
    old, new : str
    """

    module: str
    function: str
    title: str
    bug: str
    old: str
    new: str

    def mutant(self, source: str) -> Mutant:
        """Return the mutant.

        Raises
        ------
        ValueError
            If ``old`` does not stand in the function exactly once.
        """
        name = f"{self.module}:{self.function}:{self.title}"
        start, end = generate.span(source, self.function)
        count = source.count(self.old, start, end)
        if count != 1:
            raise ValueError(f"{name}: {count} times in {self.function}, expected once: {self.old}")
        at = source.index(self.old, start, end)
        changed = source[:at] + self.new + source[at + len(self.old) :]
        return Mutant(
            name, self.module, self.function, changed, *generate.difference(source, changed)
        )


@dataclass(frozen=True)
class Equivalent:
    """Why no test can tell a mutant from the original; ``was`` and ``now`` are the mutant's."""

    was: str
    now: str
    why: str


def read_written(text: str) -> list[Written]:
    """Read ``written.toml``."""
    return [Written(**entry) for entry in tomllib.loads(text).get("mutant", [])]


def read_equivalents(text: str) -> dict[str, Equivalent]:
    """Read ``equivalent.toml``: by name of the mutant."""
    tables: dict[str, dict[str, Any]] = tomllib.loads(text)
    return {name: Equivalent(**table) for name, table in tables.items()}


def all_mutants(
    project: Project,
    written: Sequence[Written],
    wanted: Callable[[str], bool] = lambda _: True,
) -> list[Mutant]:
    """Return the mutants of every module, in the order of the modules.

    Parameters
    ----------
    project : Project
    written : sequence of Written
    wanted : callable, optional
        Whether the mutants of a module are asked for.

    Raises
    ------
    ValueError
        If a written one does not fit its module, or two have one name.
    """
    modules = project.modules()
    sources = {module: project.source(module) for module in modules}
    fields = generate.twin_fields(list(sources.values()))
    chosen = filter(wanted, modules)
    found = [m for module in chosen for m in generate.mutants(module, sources[module], fields)]
    for entry in filter(lambda entry: wanted(entry.module), written):
        source = sources.get(entry.module) or project.source(entry.module)
        found.append(entry.mutant(source))
    counts = Counter(mutant.name for mutant in found)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise ValueError(f"mutants of one name: {', '.join(twice)}")
    return sorted(found, key=lambda mutant: mutant.module)


def stale(mutants: Sequence[Mutant], equivalents: Mapping[str, Equivalent]) -> list[str]:
    """Return what is wrong with the explanations, before anything is run.

    Parameters
    ----------
    mutants : sequence of Mutant
        Of all modules.
    equivalents : mapping
        By name.
    """
    by_name = {mutant.name: mutant for mutant in mutants}
    problems = []
    for name, entry in equivalents.items():
        mutant = by_name.get(name)
        if mutant is None:
            problems.append(f"{name}: there is no such mutant")
        elif (mutant.was, mutant.now) != (entry.was, entry.now):
            problems.append(f"{name}: it is now {mutant.was!r} -> {mutant.now!r}")
    return problems
