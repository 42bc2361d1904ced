"""``python -m parity_tests.mutation``: see the package."""

import os

# Before torch is loaded: the forks share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import difflib
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from parity_tests.mutation import mutants as all_of
from parity_tests.mutation import results as kept
from parity_tests.mutation.generate import Mutant
from parity_tests.mutation.project import LORAP, Project
from parity_tests.mutation.runner import HarnessError, Runner

EVERY = 100
"""Mutants between two lines on progress."""


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m parity_tests.mutation",
        description="Change the math in every small way; the tests must notice.",
    )
    parser.add_argument(
        "--module",
        action="append",
        metavar="NAME",
        help="only this module or package, as reference.lowrank or lorap.ops; may be repeated",
    )
    parser.add_argument("--list", action="store_true", help="print the mutants and end")
    parser.add_argument("--mutant", metavar="NAME", help="show and run this one, with its output")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default: 1)")
    parser.add_argument(
        "--keep-killed",
        action="store_true",
        help="take over the kills of an earlier run although sources or tests have changed since",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="where results are kept; an unfinished run goes on (default: build/mutants.jsonl)",
    )
    return parser


def main(argv: Sequence[str] | None = None, project: Project = LORAP) -> int:
    """Run the mutants; return 1 where one survives unexplained or an explanation is stale.

    Parameters
    ----------
    argv : sequence of str, optional
        Of the command line.
    project : Project
        With ``written.toml`` and ``equivalent.toml`` in its folder of notes.
    """
    arguments = parser().parse_args(argv)
    notes = project.root / project.notes
    written = all_of.read_written((notes / "written.toml").read_text(encoding="utf-8"))
    equivalents = all_of.read_equivalents((notes / "equivalent.toml").read_text(encoding="utf-8"))
    if arguments.list:
        for mutant in all_of.all_mutants(project, written, partial(_is_chosen, arguments.module)):
            print(f"{mutant.name}\n    {mutant.was}\n    {mutant.now}")
        return 0
    mutants = all_of.all_mutants(project, written)
    problems = all_of.stale(mutants, equivalents)
    chosen = [m for m in mutants if _is_chosen(arguments.module, m.module)]
    if not chosen:
        sys.exit(f"no mutants in {', '.join(arguments.module)}")

    path = arguments.results or project.root / "build" / "mutants.jsonl"
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        runner = Runner(project, Path(scratch), arguments.jobs)
        try:
            results = _begun(project, runner, mutants, path, arguments.keep_killed)
            if arguments.mutant:
                return _show(project, runner, mutants, results, arguments.mutant)
            _run(runner, chosen, results, path, set(equivalents))
        except HarnessError as error:
            sys.exit(str(error))
    problems += [
        f"{m.name}: killed by {results.of[m.name].test}"
        for m in chosen
        if m.name in equivalents and results.of[m.name].status != "survived"
    ]
    survivors = [
        m for m in chosen if results.of[m.name].status == "survived" and m.name not in equivalents
    ]
    for mutant in survivors:
        print(f"\n{kept.entry(mutant)}")
    for problem in problems:
        print(f"stale explanation: {problem}", file=sys.stderr)
    print(f"\n{kept.table(chosen, results.of, equivalents)}")
    return 1 if survivors or problems else 0


def _is_chosen(names: Sequence[str] | None, module: str) -> bool:
    return names is None or any(f"{module}.".startswith(f"{name}.") for name in names)


def _begun(
    project: Project, runner: Runner, mutants: Sequence[Mutant], path: Path, keep_killed: bool
) -> kept.Results:
    """Return what is known of this state of the tree; measure which tests get where if nothing."""
    digest = project.digest()
    results = kept.read(path)
    changes = {mutant.name: mutant.change for mutant in mutants}
    results.of = {n: r for n, r in results.of.items() if changes.get(n) == r.change}
    if results.digest == digest:
        return results
    started = time.perf_counter()
    baseline = runner.baseline(sorted({mutant.module for mutant in mutants}))
    print(
        f"{len(baseline.seconds)} tests pass on the unchanged code, "
        f"in {time.perf_counter() - started:.0f} s"
    )
    old = results.of if keep_killed else {}
    killed = {name: result for name, result in old.items() if result.status != "survived"}
    results = kept.Results(digest, baseline, killed)
    kept.start(path, results)
    return results


def _run(
    runner: Runner,
    chosen: Sequence[Mutant],
    results: kept.Results,
    path: Path,
    explained: set[str],
) -> None:
    """Run what has no result yet, and thoroughly what survives and is not explained."""
    assert results.baseline is not None
    started = time.perf_counter()
    left = [mutant for mutant in chosen if mutant.name not in results.of]
    for done, result in enumerate(runner.run(left, results.baseline), 1):
        results.of[result.mutant] = result
        kept.append(path, result)
        if done % EVERY == 0 or done == len(left):
            survived = sum(r.status == "survived" for r in results.of.values())
            minutes = (time.perf_counter() - started) / 60
            print(
                f"{done} of {len(left)}, {survived} survive so far, {minutes:.1f} min", flush=True
            )
    again = [
        mutant
        for mutant in chosen
        if results.of[mutant.name].status == "survived"
        and mutant.name not in explained
        and not results.of[mutant.name].thorough
    ]
    for result in runner.run(again, results.baseline, thorough=True):
        results.of[result.mutant] = result
        kept.append(path, result)
        print(f"{result.status} with all examples: {result.mutant}", flush=True)


def _show(
    project: Project, runner: Runner, mutants: Sequence[Mutant], results: kept.Results, name: str
) -> int:
    """Print a mutant, and what the tests say of it."""
    mutant = next((m for m in mutants if m.name == name), None)
    if mutant is None:
        sys.exit(f"there is no mutant {name}; --list prints all")
    file = project.path(mutant.module).relative_to(project.root).as_posix()
    before = project.source(mutant.module).splitlines(keepends=True)
    after = mutant.source.splitlines(keepends=True)
    sys.stdout.writelines(difflib.unified_diff(before, after, fromfile=file, tofile=name))
    assert results.baseline is not None
    print(runner.output(mutant, results.baseline))
    return 0


if __name__ == "__main__":
    sys.exit(main())
