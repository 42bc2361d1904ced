"""What ``lorap inspect`` found, as pictures and as a page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorap.pages import page
from lorap.pages.charts import Chart, Series, lines, sheet
from lorap.pages.report_page import COLOURS, DASHED
from lorap.wording import named

NUMBERS, PAGE = "lorap_inspection.json", "lorap_inspection.html"
"""Files with the numbers, and with all pictures."""

METHODS = {"svd": "SVD", "awsvd": "AWSVD"}
"""Spectra of the weights, and of the weights times the norms of their inputs."""

TABLE_1 = "0.8"
"""The share of the energy in the paper's Table 1."""

INPUTS = {
    "attention": ("q, k, v", "var(--c0)"),
    "o": ("o", "var(--c3)"),
    "ffn": ("gate, up", "var(--c4)"),
    "down": ("down", "var(--c6)"),
}
"""Input of the linears to the linears that have it, and a colour."""

_SUBLAYERS = {"mha": ("attention", "var(--c0)"), "ffn": ("feed-forward", "var(--c4)")}

Layers = Sequence[Mapping[str, Any]]


def survey_charts(survey: Mapping[str, Any]) -> dict[str, tuple[str, list[Chart]]]:
    """Return the charts in groups.

    Parameters
    ----------
    survey : mapping
        As ``lorap inspect --json`` prints it.

    Returns
    -------
    dict
        By the name of a file without its ending, a title and charts.
    """
    layers: Layers = survey["layers"]
    places = [layer["layer"] for layer in layers]
    methods = [method for method in METHODS if layers[0][method] is not None]
    groups: dict[str, tuple[str, list[Chart]]] = {
        "effective_ranks": (
            "Share of the ranks that retains 80% of the energy",
            [
                lines(
                    METHODS[method],
                    places,
                    [
                        Series(
                            role,
                            [layer[method][role]["rank_shares"][TABLE_1] for layer in layers],
                            COLOURS[role],
                            role in DASHED,
                        )
                        for role in layers[0][method]
                    ],
                    unit="percent",
                )
                for method in methods
            ],
        )
    }
    for method in methods:
        roles = list(layers[0][method])
        groups[f"energy_{method}"] = (
            f"Energy that each share of the ranks retains, {METHODS[method]}",
            [_by_rank(layers, method, role, "energies") for role in roles],
        )
        groups[f"spectra_{method}"] = (
            f"Singular values over the largest, by share of the ranks, {METHODS[method]}",
            [_by_rank(layers, method, role, "singular_values") for role in roles],
        )
    if layers[0]["outliers"] is not None:
        groups["activations"] = ("Activations", _activations(layers, places))
    return groups


def _by_rank(layers: Layers, method: str, role: str, key: str) -> Chart:
    """Return the curves of all layers for one matrix, faint for the first layer."""
    first = layers[0][method][role]
    places = [rank / first["count"] for rank in first["ranks"]]
    series = []
    for at, layer in enumerate(layers):
        values = layer[method][role][key]
        largest = layer[method][role]["singular_values"][0] or 1.0
        if key == "singular_values":
            values = [math.log10(value / largest) if value > 0 else None for value in values]
        opacity = 0.25 + 0.75 * at / max(len(layers) - 1, 1) if len(layers) > 1 else 1.0
        series.append(Series("", values, COLOURS[role], opacity=opacity))
    unit: Any = "percent" if key == "energies" else "log"
    return lines(role, places, series, unit=unit, across="share of the ranks", share=True)


def _activations(layers: Layers, places: Sequence[int]) -> list[Chart]:
    def curves(key: str, names: Mapping[str, tuple[str, str]]) -> list[Series]:
        return [
            Series(name, [layer[key][kind] for layer in layers], colour, kind in ("o", "ffn"))
            for kind, (name, colour) in names.items()
        ]

    return [
        lines(
            "outliers: largest norm of an input feature over the median one",
            places,
            [
                Series(
                    one.name,
                    [None if value is None else math.log10(value) for value in one.values],
                    one.colour,
                    one.dashed,
                )
                for one in curves("outliers", INPUTS)
            ],
            unit="log",
        ),
        lines(
            "cosine of a sub-layer's input and output", places, curves("similarities", _SUBLAYERS)
        ),
    ]


def file_names(measured: bool) -> list[str]:
    """Return the names of the files that ``survey_files`` gives.

    Parameters
    ----------
    measured : bool
        Whether there is calibration data.
    """
    methods = list(METHODS) if measured else ["svd"]
    pictures = ["effective_ranks"]
    for method in methods:
        pictures += [f"energy_{method}", f"spectra_{method}"]
    pictures += ["activations"] if measured else []
    return [NUMBERS, PAGE, *(f"{name}.svg" for name in pictures)]


def survey_files(survey: Mapping[str, Any]) -> dict[str, str]:
    """Return numbers, page and pictures.

    Parameters
    ----------
    survey : mapping
        As ``lorap inspect --json`` prints it.

    Returns
    -------
    dict
        Name of a file to its text.
    """
    numbers = json.dumps(survey, indent=2, allow_nan=False) + "\n"
    return {NUMBERS: numbers, PAGE: survey_page(survey), **survey_sheets(survey)}


def survey_sheets(survey: Mapping[str, Any]) -> dict[str, str]:
    """Return the charts as pictures.

    Parameters
    ----------
    survey : mapping
        As ``lorap inspect --json`` prints it.

    Returns
    -------
    dict
        Name of a file to SVG.
    """
    return {
        f"{name}.svg": sheet(title, charts, columns=2)
        for name, (title, charts) in survey_charts(survey).items()
    }


def survey_page(survey: Mapping[str, Any]) -> str:
    """Return all of it as a page that needs nothing beside it.

    Parameters
    ----------
    survey : mapping
        As ``lorap inspect --json`` prints it.
    """
    parts = [page.heading(named(survey["model"]), 1)]
    about = survey["calibration"]
    said = "Weights alone; activations need calibration data."
    if about is not None:
        said = (
            f"Activations over {about['samples']} x {about['seqlen']} tokens of "
            f"{named(about['source'])}, seed {about['seed']}."
        )
    parts.append(page.paragraph(said, faint=True))
    means = survey["mean_rank_shares"]
    roles = list(means[TABLE_1]["svd"])
    rows = [
        [f"{float(energy):.0%}", METHODS[method], *(f"{shares[role]:.2%}" for role in roles)]
        for energy, by_method in means.items()
        for method, shares in by_method.items()
    ]
    parts += [
        page.heading("Effective ranks"),
        page.paragraph(
            "Share of the ranks that retains a share of the energy, the squared singular values; "
            "mean over the layers."
        ),
        page.table(["energy", "", *roles], rows, texts=2),
    ]
    for title, charts in survey_charts(survey).values():
        parts += [page.heading(title)]
        if charts[0].title == "q":
            parts.append(page.paragraph("The first layer is faint, the last one full.", faint=True))
        parts.append(page.figures(charts))
    versions = ", ".join(f"{name} {version}" for name, version in survey["versions"].items())
    parts += [page.heading("Versions"), page.paragraph(versions, faint=True)]
    return page.page(f"{named(survey['model'])}: inspected by lorap", parts)
