"""Results of evaluations beside the model: as a file, and in its model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorap.checkpoint.files import CARD, EVALUATION, REPORT, sync
from lorap.errors import UsageError

BEGIN, END = "<!-- lorap evaluation -->", "<!-- /lorap evaluation -->"
"""What the section in the model card stands between."""


def check_card(folder: str | os.PathLike[str]) -> None:
    """Check that results can be written into a folder.

    Raises
    ------
    UsageError
        If it is none that lorap wrote, or cannot be written to.
    """
    path = Path(os.path.expanduser(folder))
    if not (path / REPORT).is_file() or not (path / CARD).is_file():
        raise UsageError(
            f"card: expected a folder that lorap wrote, with a {REPORT} and a {CARD}; "
            f"{os.fspath(folder)} is none"
        )
    if not os.access(path, os.W_OK):
        raise UsageError(f"card: {os.fspath(folder)} cannot be written to")


def record_evaluation(folder: str | os.PathLike[str], evaluation: Mapping[str, Any]) -> None:
    """Write an evaluation into the folder of its model.

    ``lorap_evaluation.json`` gets it in full, beside those of before; it takes the place of one of
    the same data and tasks. The section "Evaluation" of the model card is written anew.

    Parameters
    ----------
    folder : str or path
        As :func:`check_card` allows it.
    evaluation : mapping
        As ``lorap evaluate --json`` prints it.

    Raises
    ------
    UsageError
        If the folder holds a damaged ``lorap_evaluation.json``.
    """
    path = Path(os.path.expanduser(folder))
    known = read_evaluations(path / EVALUATION)
    baseline = evaluation["baseline"] or {}
    for kind in known:
        result = evaluation[kind]
        if result is not None:
            entry = {"result": result, "baseline": baseline.get(kind)}
            others = [old for old in known[kind] if _key(old["result"]) != _key(result)]
            known[kind] = [*others, entry]
    card = (path / CARD).read_text(encoding="utf-8")
    before, begin, rest = card.partition(BEGIN)
    after = rest.partition(END)[2] if begin else ""
    section = f"{before.rstrip()}\n\n{BEGIN}\n{_section(known)}\n{END}\n{after.lstrip()}"
    _replace(path / EVALUATION, json.dumps(known, indent=2, allow_nan=False) + "\n")
    _replace(path / CARD, section)


def read_evaluations(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the results of evaluations that a file holds; none where there is no such file.

    Parameters
    ----------
    file : Path

    Returns
    -------
    dict
        By ``perplexity`` and ``tasks``, results each with its baseline.

    Raises
    ------
    UsageError
        If the file is damaged.
    """
    known: dict[str, list[dict[str, Any]]] = {"perplexity": [], "tasks": []}
    if file.exists():
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            known = {kind: list(content[kind]) for kind in known}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{file}: expected the results of evaluations: {error!r}") from error
    return known


def _key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what an evaluation was of."""
    if "results" in result:
        return (sorted(result["results"]), result["limit"])
    return (result["data"], result["protocol"])


def _replace(file: Path, text: str) -> None:
    """Write a file aside and rename it."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.replace(file)


def task_rows(
    result: Mapping[str, Any], baseline: Mapping[str, Any] | None
) -> list[tuple[str, str, str, str]]:
    """Return a table of the results of tasks.

    Parameters
    ----------
    result : mapping
        A ``TaskReport`` as a dictionary.
    baseline : mapping or None
        That of the model to compare with.

    Returns
    -------
    list of (task, metric, value, value of the baseline)
        Of the paper's tasks the paper's metric alone, where their mean is known; then the mean.
    """
    compared = {} if baseline is None else baseline["results"]
    rows = []
    for task, metrics in result["results"].items():
        for metric, found in metrics.items():
            if metric == result["mean_of"].get(task, metric):
                other = compared.get(task, {}).get(metric)
                rows.append((task, metric, _value(found), _value(other)))
    if result["mean"] is not None:
        other = "" if baseline is None else f"{baseline['mean']:.4f}"
        rows.append(("mean of the paper's seven", "", f"{result['mean']:.4f}", other))
    return rows


def _value(found: Mapping[str, float | None] | None) -> str:
    if found is None:
        return ""
    error = found["stderr"]
    return f"{found['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _section(known: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return the section of the model card, without its last newline."""
    lines = ["## Evaluation"]
    for entry in known["perplexity"]:
        result, baseline = entry["result"], entry["baseline"]
        split = f", split {result['split']}" if result["split"] else ""
        lines += ["", *_table_head("perplexity on", "", baseline)]
        values = [f"{side['perplexity']:.4f}" for side in (result, baseline) if side]
        lines += [f"| {_public(result['source'])}{split} | | {' | '.join(values)} |", ""]
        lines.append(f"{result['protocol']}. In {result['dtype']}. {_versions(result)}")
    for entry in known["tasks"]:
        result, baseline = entry["result"], entry["baseline"]
        lines += ["", *_table_head("task", "metric", baseline)]
        for *what, value, other in task_rows(result, baseline):
            values = [value] if baseline is None else [value, other]
            lines.append(f"| {' | '.join([*what, *values])} |")
        shots = sorted(set(result["shots"].values()))
        lines += ["", f"Examples shown: {', '.join(map(str, shots))}. In {result['dtype']}, "]
        lines[-1] += f"{result['batch_size']} requests in a forward. {_versions(result)}"
        if result["limit"] is not None:
            lines.append(f"Only the first {result['limit']} samples of each task were scored.")
    return "\n".join(lines)


def _table_head(first: str, second: str, baseline: Mapping[str, Any] | None) -> list[str]:
    names = [first, second, "this model"]
    if baseline is not None:
        names.append(_public(baseline["model"]))
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def _versions(result: Mapping[str, Any]) -> str:
    return f"Versions: {', '.join(f'{k} {v}' for k, v in result['versions'].items())}."


def _public(name: str) -> str:
    """Return a name as others may know it: of a file or folder here, the last part."""
    path = Path(os.path.expanduser(name))
    return path.resolve().name if path.exists() else name
