"""A table or figure of the papers, measured on a model, beside the papers' values.

    python -m bench.paper --list
    python -m bench.paper NAME --model MODEL [--calibration SOURCE] [--eval SOURCE ...]

Prints the table, and writes it into the output folder as Markdown and CSV, of a figure the picture
(SVG). Each finished cell is stored at once; a run that was interrupted goes on behind the last one,
and tables share cells. Sources are those of ``lorap compress``, or ``sampled``: sequences sampled
from the dense model. table2 and table3 are on the paper's own data unless told otherwise; what
cannot be had is refused, and nothing put in its place.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.paper import printing
from bench.paper.cost import say_cost
from bench.paper.data import Data
from bench.paper.runner import Store, run
from bench.paper.studies import LOCAL_DATA, PAPER_DATA, STUDIES, Request
from bench.quality import parse_settings
from lorap.errors import LorapError, UsageError
from lorap.pages.files import write_files
from lorap.recovery.settings import RecoveryConfig
from lorap.runtime import versions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    given = _parser().parse_args(words)
    if given.list:
        print(listing())
        return 0
    try:
        _run(given, words)
    except LorapError as error:
        print(f"bench.paper: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def listing() -> str:
    """Return the names, what each is, and what data it is on unless told otherwise."""
    width = max(map(len, STUDIES))
    lines = []
    for name, study in STUDIES.items():
        where = "hub  " if study.paper_data else "local"
        lines.append(f"{name:{width}}  {where}  {study.about}")
    hub = PAPER_DATA
    return "\n".join(
        [
            *lines,
            "",
            "local: on sequences sampled from the dense model; any source can be given.",
            f"hub: --calibration {hub['calibration']} --eval {' '.join(hub['evaluation'])} "
            f"--training {hub['training']} --tasks paper, all of the hub; refused where they cannot"
            " be had. Files, 'sampled' and --tasks none can be given in their place.",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.paper", description=__doc__.split("\n")[0]
    )
    parser.add_argument("name", nargs="?", choices=STUDIES, metavar="NAME", help="of --list")
    parser.add_argument("--list", action="store_true", help="the names, and what data each needs")
    parser.add_argument("--model", help="a local folder or a hub name")
    parser.add_argument(
        "--calibration", metavar="SOURCE", help="as lorap compress takes it, or 'sampled'"
    )
    parser.add_argument("--eval", nargs="+", metavar="SOURCE", help="one or more, likewise")
    parser.add_argument("--training", metavar="SOURCE", help="of what is tuned")
    parser.add_argument("--tasks", choices=["paper", "none"], help="the paper's seven")
    parser.add_argument("--ratios", type=float, nargs="+", help="in the place of the study's own")
    parser.add_argument(
        "--ratio-scope", choices=["model", "layer"], default="model", help="default: model"
    )
    parser.add_argument(
        "--recovery", default="", metavar="'NAME=VALUE ...'", help="settings of lorap recover"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="of generations; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of calibration")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/paper"),
        metavar="FOLDER",
        help="for the table, and for stored cells; default: build/paper",
    )
    parser.add_argument("--again", action="store_true", help="measure stored cells too")
    parser.add_argument("--cost", action="store_true", help="say what it costs, and no more")
    return parser


def _run(given: argparse.Namespace, words: Sequence[str]) -> None:
    if given.name is None or given.model is None:
        raise UsageError("expected NAME and --model MODEL, or --list")
    study = STUDIES[given.name]
    usual = PAPER_DATA if study.paper_data else LOCAL_DATA
    data = Data(
        model=os.path.expanduser(given.model),
        folder=given.output,
        calibration=given.calibration or usual["calibration"],
        evaluation=tuple(given.eval or usual["evaluation"]),
        training=given.training or usual["training"],
        tasks=usual["tasks"] if given.tasks is None else given.tasks == "paper",
        seed=given.seed,
    )
    recovery = _recovery(given.recovery)
    request = Request(
        data=data,
        scope=given.ratio_scope,
        recovery=recovery,
        prompts=tuple(given.prompt),
    )
    cells = study.cells(request, given.ratios or study.ratios)
    given.output.mkdir(parents=True, exist_ok=True)
    store = Store(given.output, data)
    stored = 0 if given.again else sum(store.find(cell) is not None for cell in cells)
    print(say_cost(cells, stored, data), file=sys.stderr, flush=True)
    if given.cost:
        return
    if stored < len(cells):
        data.check(training=any("recovery" in cell.arguments for cell in cells))
    rows = run(cells, data, store, again=given.again, say=lambda line: print(line, file=sys.stderr))
    columns, joined = printing.beside(rows, study)
    table = printing.markdown(columns, joined)
    text = (
        f"`python -m bench.paper {shlex.join(words)}`\n\n{table}\n\n{study.claim}\n\n{versions()}\n"
    )
    print(text)
    files = {
        f"{given.name}.md": text,
        f"{given.name}.csv": printing.comma_separated(columns, joined),
    }
    drawn = printing.picture(given.name, study, rows)
    if drawn is not None:
        files[f"{given.name}.svg"] = drawn
    write_files(given.output, files)


def _recovery(text: str) -> dict[str, Any]:
    """Return all settings of a recovery, of which `text` gives some."""
    settings = parse_settings(text)
    known = [field.name for field in dataclasses.fields(RecoveryConfig)]
    for name in settings:
        if name not in known:
            raise UsageError(f"--recovery: expected names among {', '.join(known)}, got {name!r}")
    return RecoveryConfig(**settings).to_dict()


if __name__ == "__main__":
    sys.exit(main())
