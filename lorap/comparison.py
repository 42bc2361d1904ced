"""Compressed models side by side, from what their folders say of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorap.checkpoint.evaluations import read_evaluations
from lorap.checkpoint.files import EVALUATION, REPORT
from lorap.errors import UsageError
from lorap.pages.report_page import by_layer, in_order
from lorap.report import read_report
from lorap.wording import duration, named


@dataclass(frozen=True)
class Comparison:
    """Compressed models side by side.

    Attributes
    ----------
    models : tuple of dict
        What is told of each, as JSON can hold it.
    """

    models: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as ``lorap compare --json`` prints them."""
        return {"models": list(self.models)}

    def rows(self) -> list[tuple[str, list[str]]]:
        """Return a table: what a row is about, and its cell for each model.

        A row is left out where it has nothing to say of any model; an empty cell is not known.
        """
        rows = [
            ("original", [named(one["original"]) for one in self.models]),
            ("method", [one["method"] for one in self.models]),
            ("ratio asked", [_share(one["ratio"]["asked"]) for one in self.models]),
            ("of", [one["ratio"]["scope"] for one in self.models]),
            ("removed of all", [_share(one["ratio"]["achieved"]) for one in self.models]),
            ("parameters", [f"{one['parameters']['after']:,}" for one in self.models]),
            ("  before", [f"{one['parameters']['before']:,}" for one in self.models]),
            ("MACs", [f"{one['macs']['after']:,}" for one in self.models]),
            ("  before", [f"{one['macs']['before']:,}" for one in self.models]),
            ("  of tokens", [f"{one['macs']['tokens']:,}" for one in self.models]),
            ("calibration", [one["calibration"] for one in self.models]),
            ("recovered", [one["recovered"] or "" for one in self.models]),
            ("time", [duration(one["seconds"]) for one in self.models]),
        ]
        for key, name in (("errors", "error"), ("energies", "energy")):
            for role in in_order(_union(one[key] for one in self.models)):
                cells = [_share(one[key].get(role)) for one in self.models]
                rows.append((f"{name}, {role}", cells))
        for kind in ("perplexity", "tasks"):
            for what in _union(one[kind] for one in self.models):
                found = [one[kind].get(what, {}) for one in self.models]
                for side, name in (("value", what), ("baseline", "  of the dense model")):
                    values = [one.get(side) for one in found]
                    cells = ["" if v is None else f"{v:.4f}" for v in values]
                    rows.append((name, cells))
        return [(name, cells) for name, cells in rows if any(cells)]


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Put compressed models side by side.

    Parameters
    ----------
    folders : sequence of str or Path
        That ``lorap compress`` or ``lorap merge`` wrote; at least one.

    Raises
    ------
    UsageError
        If one holds no report that can be read.
    """
    return Comparison(tuple(_model(folder) for folder in folders))


def _model(folder: str | Path) -> dict[str, Any]:
    path = Path(os.path.expanduser(folder))
    report = read_report(path, str(folder))
    try:
        told = _told(report)
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path / REPORT}: not the report of a compression: {error!r}") from error
    evaluations = read_evaluations(path / EVALUATION)
    try:
        results = {
            "perplexity": _perplexities(evaluations["perplexity"]),
            "tasks": _tasks(evaluations["tasks"]),
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path / EVALUATION}: expected the results of evaluations: {error!r}"
        ) from error
    return {"folder": str(folder), **told, **results}


def _told(report: Mapping[str, Any]) -> dict[str, Any]:
    settings, calibration = report["settings"], report["calibration"]
    recovery = report.get("recovery")
    return {
        "original": report["model"],
        "method": _method(settings),
        "ratio": {
            "asked": report["ratio"],
            "scope": report["ratio_scope"],
            "achieved": report["achieved_ratio"],
        },
        "parameters": dict(report["parameters"]),
        "macs": dict(report["macs"]),
        "calibration": f"{calibration['samples']} x {calibration['seqlen']} of "
        f"{named(calibration['source'])}",
        "recovered": None if recovery is None else recovery["merge"]["mode"],
        "seconds": report["seconds"],
        "errors": _means(report["layers"], "relative_weighted_error"),
        "energies": _means(report["layers"], "retained_energy"),
    }


def _method(settings: Mapping[str, Any]) -> str:
    parts = [settings[sublayer] for sublayer in ("mha", "ffn") if sublayer in settings["sublayers"]]
    if settings["joint_qk"]:
        parts.append("joint qk")
    said = [" + ".join(parts), f"allocation {str(settings['allocation']).removesuffix('.0')}"]
    # Reports of before these settings lack them.
    if settings.get("selection", "scores") != "scores":
        said.append(str(settings["selection"]))
    if settings.get("update", "none") != "none":
        said.append(str(settings["update"]))
    if settings.get("dense_target") is not None:
        said.append(f"dense target {settings['dense_target']:g}")
    if settings.get("refine"):
        said.append(f"refined by {settings['refine']}")
    if settings.get("multiple_of", 1) != 1:
        said.append(f"multiples of {settings['multiple_of']}")
    return ", ".join(said)


def _means(layers: Sequence[Mapping[str, Any]], key: str) -> dict[str, float]:
    """Return means over the layers in which there is a value, by role or block."""
    found = {}
    for role, values in by_layer(layers, key).items():
        known = [value for value in values if value is not None]
        found[role] = sum(known) / len(known)
    return found


def _perplexities(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    found = {}
    for entry in entries:
        result, baseline = entry["result"], entry["baseline"]
        # Other texts, protocols and tokenizers have other targets: only like is put beside like.
        split = f" {result['split']}" if result["split"] else ""
        what = (
            f"perplexity, {named(result['source'])}{split}, {result['seqlen']} tokens, "
            f"{result['tokens']:,} targets"
        )
        found[what] = {
            "value": result["perplexity"],
            "baseline": None if baseline is None else baseline["perplexity"],
        }
    return found


def _tasks(entries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    found: dict[str, dict[str, float | None]] = {}
    for entry in entries:
        result, baseline = entry["result"], entry["baseline"]
        limited = "" if result["limit"] is None else f", first {result['limit']}"
        for task, metrics in result["results"].items():
            for metric, score in metrics.items():
                if metric == result["mean_of"].get(task, metric):
                    other = {} if baseline is None else baseline["results"].get(task, {})
                    dense = other.get(metric)
                    found[f"{task}, {metric}{limited}"] = {
                        "value": score["value"],
                        "baseline": None if dense is None else dense["value"],
                    }
        if result["mean"] is not None:
            found[f"mean of the paper's seven{limited}"] = {
                "value": result["mean"],
                "baseline": None if baseline is None else baseline["mean"],
            }
    return found


def _union(keys: Any) -> list[str]:
    """Return all keys of some mappings, in the order in which they come."""
    return list(dict.fromkeys(key for one in keys for key in one))


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2%}"
