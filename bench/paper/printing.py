"""A study's rows beside the paper's: as Markdown, as CSV, as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from bench.paper.measures import Row
from bench.paper.studies import Study
from lorap.pages.charts import sheet
from lorap.wording import short

PAPER = "paper: "
"""What the columns of the paper's values begin with."""

_PERCENT = (
    "ratio", "removed", "mean of tasks", "boolq", "piqa", "hellaswag", "winogrande", "arc_easy",
    "arc_challenge", "openbookqa", "q", "k", "v", "o", "gate", "up", "down",
    "kept in half of the inputs", "by chance", "MACs of dense", "time of dense",
    "ratio of the layers",
)  # fmt: skip


def beside(rows: Sequence[Row], study: Study) -> tuple[list[str], list[Row]]:
    """Put the paper's values into the rows that they belong to, its others of these ratios behind.

    Returns
    -------
    columns : list of str
        Ours, then the paper's; what is a list in a row has none.
    rows : list of dict
    """
    ours = [*rows, *(study.summary(rows) if study.summary else [])]
    joined: list[Row] = []
    used: set[int] = set()
    for row in ours:
        more: Row = {}
        for at, known in enumerate(study.paper):
            labels = (name for name in known if not name.startswith(PAPER))
            if all(row.get(name) == known[name] for name in labels):
                used.add(at)
                more |= {name: known[name] for name in known if name.startswith(PAPER)}
        joined.append(row | more)
    ratios = {row.get("ratio") for row in ours}
    joined += [
        dict(known)
        for at, known in enumerate(study.paper)
        if at not in used and known["ratio"] in ratios
    ]
    names = dict.fromkeys(
        name for row in joined for name, value in row.items() if not isinstance(value, list)
    )
    # Stable: what a row is called first, the paper's values last.
    return sorted(names, key=lambda name: name.startswith(PAPER)), joined


def markdown(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Return the table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [written(name, row.get(name, "")).replace("|", "\\|") for name in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comma_separated(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Return the table as CSV, with all digits."""
    target = io.StringIO()
    table = csv.writer(target, lineterminator="\n")
    table.writerow(columns)
    table.writerows([row.get(name, "") for name in columns] for row in rows)
    return target.getvalue()


def picture(name: str, study: Study, rows: Sequence[Row]) -> str | None:
    """Return the picture in SVG; None where the study has none."""
    if study.charts is None:
        return None
    return sheet(f"{name}: {study.about}", study.charts(rows))


def written(column: str, value: Any) -> str:
    """Return a value as the table shows it."""
    if isinstance(value, str):
        return value
    name = column.removeprefix(PAPER)
    if name in _PERCENT:
        return f"{value:.0%}" if name == "ratio" and value == round(value, 2) else f"{value:.2%}"
    if name in ("parameters", "MACs"):
        return f"{value:,}" if value < 1e8 else short(value)
    if name.startswith("ms"):
        return f"{value:.2f}"
    if name == "factor":
        return f"{value:.5f}"
    return f"{value:.3f}" if isinstance(value, float) and name != "alpha" else f"{value}"
