"""Run the tests against changed modules, each in a fork of one process that has loaded the rest.

Importing torch and transformers takes longer than nearly all tests that kill a mutant, so it is
done once. A fork then imports the project, with the changed source in the place of a module's own,
and runs the tests that reach the changed function. Which tests these are is measured: a first run,
of the unchanged sources with a mark at the head of each function, tells which test gets where, how
long it takes, and that all of them pass here.

Only tests that name a rule of SPEC.md count: those are the ones that are to catch a wrong formula.
Not those that start processes of their own: these would load the unchanged source.
"""

import ast
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NoReturn

import pytest

from parity_tests.mutation.generate import Mutant
from parity_tests.mutation.project import Project

FIRST = "mutants-first"
THOROUGH = "mutants"
"""Profiles of hypothesis, see ``parity_tests/conftest.py``."""

THOROUGH_FACTOR = 10
"""Examples of the second profile per example of the first."""

FIRST_SHARE = 0.05
"""Of the time that all tests take: what the tests of a first attempt may take, the quick ones."""

PATIENCE = 10.0
"""A test hangs that takes this many times as long as on the unchanged code, and as many seconds."""

IMPORT_SECONDS = 60.0
MEMORY = 12 << 30
"""Bytes of address space: a shape gone wrong must not take the machine down."""

UNREACHED = "no test reaches it"

_MARK = "__reached__"


class HarnessError(Exception):
    """The tests could not be run as they should; says nothing about a mutant."""


@dataclass
class Baseline:
    """The run of the unchanged code.

    Attributes
    ----------
    seconds : dict
        By test.
    reached : dict
        Tests by ``module:function``, of every function.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    reached: dict[str, list[str]] = field(default_factory=dict)

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Return the tests that reach the changed function, the quick ones first.

        What is outside of functions may be seen by all tests of a file that reaches any of them.
        """
        key, prefix = f"{mutant.module}:{mutant.function}", f"{mutant.module}:"
        tests = self.reached.get(key)
        if tests is None:
            anywhere = (ts for name, ts in self.reached.items() if name.startswith(prefix))
            tests = self.neighbours([test for ts in anywhere for test in ts])
        return sorted(tests, key=lambda test: (self.seconds[test], test))

    def neighbours(self, tests: Sequence[str]) -> list[str]:
        """Return all tests of the files of some tests."""
        files = {test.split("::")[0] for test in tests}
        return [test for test in self.seconds if test.split("::")[0] in files]


@dataclass(frozen=True)
class Result:
    """What became of a mutant.

    Attributes
    ----------
    mutant, change : str
        Its name and fingerprint.
    status : {"killed", "hung", "survived"}
    test : str
        That failed or hung.
    message : str
        First line of its failure.
    seconds : float
    thorough : bool
        Whether all examples were drawn.
    """

    mutant: str
    change: str
    status: str
    test: str = ""
    message: str = ""
    seconds: float = 0.0
    thorough: bool = False


# In the fork


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from a text, as if it stood in the module's file."""

    def __init__(self, name: str, path: str, code: CodeType, names: Mapping[str, Any]) -> None:
        super().__init__(name, path)
        self.code, self.names, self.loaded = code, names, False

    def get_code(self, fullname: str) -> CodeType:
        return self.code

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(self.names)
        super().exec_module(module)
        self.loaded = True


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, loaders: Mapping[str, _Loader]) -> None:
        self.loaders = loaders

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        loader = self.loaders.get(fullname)
        if loader is None:
            return None
        return importlib.util.spec_from_file_location(fullname, loader.path, loader=loader)


class _Watch:
    """Selects the tests, times them, stops what hangs, and notes what fails and what is reached."""

    def __init__(
        self, wanted: Sequence[str] | None, seconds: Mapping[str, float], progress: Path
    ) -> None:
        self.wanted = None if wanted is None else {test: i for i, test in enumerate(wanted)}
        self.allowed, self.progress = seconds, progress
        self.marks: set[str] = set()
        self.shared: dict[str, set[str]] = defaultdict(set)
        self.seconds: dict[str, float] = {}
        self.reached: dict[str, set[str]] = {}
        self.failures: list[tuple[str, str]] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.wanted is not None:
            places = self.wanted
            items[:] = sorted(
                (item for item in items if item.nodeid in places),
                key=lambda item: places[item.nodeid],
            )

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Any:
        # What a test module computes as it is imported, all of its tests may check.
        self.marks.clear()
        try:
            return (yield)
        finally:
            self.shared[collector.nodeid.split("::")[0]] |= self.marks

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: pytest.FixtureRequest) -> Any:
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self.shared[request.node.nodeid.split("::")[0]] |= self.marks

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.progress.write_text(item.nodeid, encoding="utf-8")
        allowed = self.allowed.get(item.nodeid)
        if allowed is not None:
            signal.setitimer(signal.ITIMER_REAL, max(PATIENCE, PATIENCE * allowed))
        self.marks.clear()
        started = time.perf_counter()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.perf_counter() - started
            self.reached[item.nodeid] = set(self.marks)
            if allowed is not None:
                signal.setitimer(signal.ITIMER_REAL, IMPORT_SECONDS)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failures.append((report.nodeid, _crash(report)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures.append((report.nodeid, _crash(report)))


def _crash(report: pytest.TestReport | pytest.CollectReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr).strip().splitlines()[-1]
    return str(text).splitlines()[0][:200] if text else ""


def marked(module: str, source: str) -> tuple[ast.Module, list[str]]:
    """Return the tree of a module in which every function notes that it is reached.

    Returns
    -------
    tree : ast.Module
    keys : list of str
        What is noted, ``module:function`` of every function.
    """
    keys = []

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef):
                keys.append(f"{module}:{prefix}{node.name}")
                mark = ast.parse(f"{_MARK}.add({keys[-1]!r})").body[0]
                after_docstring = int(ast.get_docstring(node, clean=False) is not None)
                node.body.insert(after_docstring, mark)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    tree = ast.parse(source)
    visit(tree.body, "")
    return ast.fix_missing_locations(tree), keys


@dataclass(frozen=True)
class _Job:
    """What a fork has to do."""

    sources: Mapping[str, str | ast.Module]
    """By module."""
    batches: Sequence[Sequence[str] | None]
    """Tests, or None for all."""
    profile: str
    seconds: Mapping[str, float]
    """By test, on the unchanged code; empty where nothing is to be stopped."""


def _work(project: Project, job: _Job, folder: Path) -> None:
    """Run the tests of a job and write ``result.json``; in the fork."""
    os.chdir(project.root)
    os.environ["HYPOTHESIS_PROFILE"] = job.profile
    # Plugins that happen to be installed cost more to import than a test does.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if job.seconds:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.setitimer(signal.ITIMER_REAL, IMPORT_SECONDS)
    watch = _Watch(None, job.seconds, folder / "progress")
    loaders = {
        (name := project.imported_as(module)): _Loader(
            name,
            str(project.path(module)),
            compile(source, str(project.path(module)), "exec", dont_inherit=True),
            {_MARK: watch.marks},
        )
        for module, source in job.sources.items()
    }
    sys.meta_path.insert(0, _Finder(loaders))
    status = 0
    for number, batch in enumerate(job.batches):
        if batch is None:
            chosen = list(project.tests)
        else:
            watch.wanted = {test: place for place, test in enumerate(batch)}
            chosen = ["-x", *dict.fromkeys(test.split("::")[0] for test in batch)]
        status = pytest.main(
            [
                *("-q", "--no-header", "-p", "no:cacheprovider", "-m", project.marker),
                *(option for plugin in project.plugins for option in ("-p", plugin)),
                # Rewriting the assertions takes longer than most tests do.
                "--assert=plain",
                f"--basetemp={folder / f'tmp{number}'}",
                *chosen,
            ],
            plugins=[watch],
        )
        if status != 0:
            break
    shared = watch.shared
    answer = {
        "status": int(status),
        "failures": watch.failures,
        "loaded": [name for name, loader in loaders.items() if loader.loaded],
        "folders": {
            package: str(Path(str(sys.modules[package].__file__)).resolve().parent)
            for package in project.packages.values()
            if package in sys.modules
        },
        "seconds": watch.seconds,
        "reached": {
            test: sorted(marks | shared[test.split("::")[0]])
            for test, marks in watch.reached.items()
        },
    }
    (folder / "result.json").write_text(json.dumps(answer), encoding="utf-8")


def _fork(project: Project, job: _Job, folder: Path) -> int:
    """Start a job in a fork and return its process id; its output goes to a file."""
    folder.mkdir(parents=True)
    pid = os.fork()
    if pid:
        return pid
    _in_fork(project, job, folder)


def _in_fork(project: Project, job: _Job, folder: Path) -> NoReturn:
    status = 1
    try:
        os.setsid()
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        _work(project, job, folder)
        status = 0
    finally:
        # No exit handlers: they belong to the process that was forked.
        sys.stdout.flush()
        os._exit(status)


# In the process that forks


class Runner:
    """Runs tests against mutants.

    Parameters
    ----------
    project : Project
    scratch : Path
        A folder for what the forks write.
    jobs : int
        Forks at a time.

    Raises
    ------
    HarnessError
        If a module of the project is loaded already: a fork could not load it anew.
    """

    def __init__(self, project: Project, scratch: Path, jobs: int = 1) -> None:
        self.project, self.scratch, self.jobs = project, scratch, jobs
        for name in project.preloaded:
            importlib.import_module(name)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        packages = {package.split(".")[0] for package in project.packages.values()}
        loaded = sorted(name for name in sys.modules if name.split(".")[0] in packages)
        if loaded:
            raise HarnessError(f"loaded before the first fork: {', '.join(loaded)}")
        # What is loaded by now stays: no fork need look through it, and copy its pages.
        gc.collect()
        gc.freeze()
        self.count = 0
        self.kills: dict[str, Counter[str]] = defaultdict(Counter)

    def baseline(self, modules: Sequence[str]) -> Baseline:
        """Run all tests on the unchanged modules.

        Raises
        ------
        HarnessError
            If a test fails, or a module is not loaded from the project.
        """
        marks = {module: marked(module, self.project.source(module)) for module in modules}
        sources = {module: tree for module, (tree, _) in marks.items()}
        pid, folder = self._start(_Job(sources, [None], FIRST, {}))
        _wait(pid)
        answer = _answer(folder)
        if answer is None or answer["status"] != 0:
            failures = [
                f"{test}: {message}" for test, message in (answer or {}).get("failures", [])
            ]
            raise HarnessError(
                "the tests do not pass on the unchanged code:\n"
                + "\n".join(failures or [_tail(folder / "output")])
            )
        for path, package in self.project.packages.items():
            found, expected = answer["folders"].get(package), self.project.root / path
            if found != str(expected.resolve()):
                raise HarnessError(f"{package} is imported from {found}, expected {expected}")
        missing = {self.project.imported_as(module) for module in modules} - set(answer["loaded"])
        if missing:
            raise HarnessError(f"no test imports {', '.join(sorted(missing))}")
        reached: dict[str, list[str]] = {key: [] for _, keys in marks.values() for key in keys}
        for test, keys in answer["reached"].items():
            for key in keys:
                reached[key].append(test)
        return Baseline(answer["seconds"], reached)

    def run(
        self, mutants: Sequence[Mutant], baseline: Baseline, thorough: bool = False
    ) -> Iterator[Result]:
        """Run the tests on each mutant until one fails; yield the results as they come.

        Parameters
        ----------
        mutants : sequence of Mutant
        baseline : Baseline
        thorough : bool
            All tests of the files that reach the function, with as many examples as ``make test``
            draws; otherwise the quick ones of those that reach it, with few.
        """
        waiting = list(reversed(mutants))
        running: dict[int, tuple[Mutant, Path, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.jobs:
                    mutant = waiting.pop()
                    tests = self._choice(mutant, baseline, thorough)
                    if not tests:
                        yield Result(
                            mutant.name, mutant.change, "survived", message=UNREACHED, thorough=True
                        )
                        continue
                    pid, folder = self._start(self._job(mutant, tests, baseline, thorough))
                    running[pid] = mutant, folder, time.perf_counter()
                if running:
                    pid, status = os.wait()
                    _end_group(pid)
                    mutant, folder, started = running.pop(pid)
                    seconds = time.perf_counter() - started
                    result = replace(
                        self._result(mutant, folder, status),
                        seconds=round(seconds, 2),
                        thorough=thorough,
                    )
                    # With what the tests have written.
                    shutil.rmtree(folder, ignore_errors=True)
                    self.kills[f"{mutant.module}:{mutant.function}"][result.test] += 1
                    yield result
        finally:
            for pid in running:
                _end_group(pid)

    def output(self, mutant: Mutant, baseline: Baseline) -> str:
        """Run all tests that reach a mutant and return what pytest printed."""
        tests = self._choice(mutant, baseline, thorough=True)
        if not tests:
            return UNREACHED
        pid, folder = self._start(self._job(mutant, tests, baseline, thorough=True))
        _wait(pid)
        return (folder / "output").read_text(encoding="utf-8", errors="replace")

    def _choice(self, mutant: Mutant, baseline: Baseline, thorough: bool) -> list[str]:
        """Return the tests to run, the likely killers first, then the quick ones."""
        tests = baseline.tests_of(mutant)
        if thorough:
            # What a test leaves behind, in a cache or a fixture, another of its file may check.
            return list(dict.fromkeys([*tests, *baseline.neighbours(tests)]))
        kills = self.kills[f"{mutant.module}:{mutant.function}"]
        allowed = FIRST_SHARE * sum(baseline.seconds.values())
        chosen: list[str] = []
        for test in sorted(tests, key=lambda test: -kills[test]):
            allowed -= baseline.seconds[test]
            if chosen and allowed < 0:
                break
            chosen.append(test)
        return chosen

    def _job(
        self, mutant: Mutant, tests: Sequence[str], baseline: Baseline, thorough: bool
    ) -> _Job:
        # One file first: to collect the others takes longer than most kills.
        file = tests[0].split("::")[0]
        near = [test for test in tests if test.split("::")[0] == file]
        far = [test for test in tests if test.split("::")[0] != file]
        more = THOROUGH_FACTOR if thorough else 1
        return _Job(
            {mutant.module: mutant.source},
            [batch for batch in (near, far) if batch],
            THOROUGH if thorough else FIRST,
            {test: more * baseline.seconds[test] for test in tests},
        )

    def _start(self, job: _Job) -> tuple[int, Path]:
        self.count += 1
        folder = self.scratch / str(self.count)
        return _fork(self.project, job, folder), folder

    def _result(self, mutant: Mutant, folder: Path, status: int) -> Result:
        name, change = mutant.name, mutant.change
        progress = folder / "progress"
        test = progress.read_text(encoding="utf-8") if progress.exists() else ""
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            if number == signal.SIGALRM:
                return Result(name, change, "hung", test)
            return Result(name, change, "killed", test, signal.Signals(number).name)
        answer = _answer(folder)
        if answer is None or answer["status"] not in (0, 1, 2):
            raise HarnessError(f"{name}: pytest did not run:\n{_tail(folder / 'output')}")
        if answer["status"] == 0:
            if self.project.imported_as(mutant.module) not in answer["loaded"]:
                raise HarnessError(f"{name}: the tests did not load the changed module")
            return Result(name, change, "survived")
        test, message = answer["failures"][0] if answer["failures"] else (test, "")
        return Result(name, change, "killed", test, message)


def _wait(pid: int) -> None:
    os.waitpid(pid, 0)
    _end_group(pid)


def _end_group(pid: int) -> None:
    """Stop what a fork has left running."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _answer(folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _tail(path: Path, lines: int = 30) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return "\n".join(text.splitlines()[-lines:])
