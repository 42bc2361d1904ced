"""Profiles of hypothesis, and the report of the worst deviation per quantity."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from parity_tests.compare import collector

settings.register_profile("dev", max_examples=50, deadline=None)
settings.register_profile(
    "ci", max_examples=120, derandomize=True, deadline=None, print_blob=True, database=None
)
settings.register_profile(
    "nightly",
    max_examples=5000,
    deadline=None,
    print_blob=True,
    database=DirectoryBasedExampleDatabase(".hypothesis/nightly"),
)
# For changed code: that it fails is enough, the smallest example of it is not needed.
settings.register_profile(
    "mutants",
    settings.get_profile("ci"),
    max_examples=200,
    phases=(Phase.explicit, Phase.generate),
)
settings.register_profile("mutants-first", settings.get_profile("mutants"), max_examples=20)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--parity-report``."""
    parser.addoption(
        "--parity-report",
        type=Path,
        metavar="FILE.json",
        help="write the worst observed deviation per quantity, and its bound, to FILE.json",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker of pytest-xdist has recorded."""
    collector().merge(getattr(node, "workeroutput", {}).get("parity", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the report, or hand the records to the process that writes it."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["parity"] = collector().table()
        return
    path = session.config.getoption("--parity-report", default=None)
    if path is not None:
        path.write_text(json.dumps(collector().table(), indent=1) + "\n", encoding="utf-8")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the report."""
    table = collector().table()
    if not table:
        return
    terminalreporter.section("parity: worst deviation per quantity")
    width = max(map(len, table))
    terminalreporter.line(f"{'quantity':{width}}  share of bound  deviation      bound  compared")
    for quantity, row in table.items():
        terminalreporter.line(
            f"{quantity:{width}}  {row['ratio']:14.4f}  {row['deviation']:9.2e}  "
            f"{row['bound']:9.2e}  {row['comparisons']:8d}"
        )
