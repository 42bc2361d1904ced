"""``lorap_report.html``: the report of a compression as a page to look at."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lorap.pages import page
from lorap.pages.charts import GONE, Chart, Series, histogram, lines, stacked
from lorap.wording import duration, named, short, spans

COLOURS = {
    "q": "var(--c0)",
    "k": "var(--c1)",
    "qk": "var(--c0)",
    "v": "var(--c2)",
    "o": "var(--c3)",
    "gate": "var(--c4)",
    "up": "var(--c5)",
    "down": "var(--c6)",
    "mlp": "var(--c4)",
    "self_attn": "var(--c0)",
}
"""Role of a linear, or name of a block, to its colour."""

DASHED = frozenset({"k", "o", "up"})
"""Roles whose curves are told from their neighbours' without colours."""

_BLOCKS = {"self_attn": "attention", "mlp": "feed-forward"}
_SUBLAYERS = {"mha": "attention", "ffn": "feed-forward"}
_SUBLAYER_COLOURS = {"mha": "var(--c0)", "ffn": "var(--c4)"}
_CUT = {
    "least_important_kept": "highest kept at the low end",
    "lowest_removed": "lowest removed",
    "highest_removed": "highest removed",
    "lowest_of_top": "lowest kept at the high end",
}

Layers = Sequence[Mapping[str, Any]]


def report_page(report: Mapping[str, Any], *, name: str) -> str:
    """Return the page.

    Parameters
    ----------
    report : mapping
        The contents of ``lorap_report.json``; histograms of scores and a recovery may be absent.
    name : str
        The model's name, for the title: that of the output folder.

    Returns
    -------
    str
        HTML that needs nothing beside it, the same for the same report.
    """
    layers: Layers = report["layers"]
    parts = [
        page.heading(name, 1),
        page.paragraph(f"{named(report['model'])}, made smaller with lorap", faint=True),
        page.tiles(_headlines(report)),
        *_recovery(report),
        *_sizes(layers),
        *_ratios(report),
        *_losses(layers),
        *_refinement(layers),
        *_scores(report),
        *_costs(report),
        page.heading("Every module"),
        page.folded("the table", _table(layers)),
        *_settings(report),
    ]
    return page.page(f"{name}: report of lorap", parts)


def _headlines(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    of_what = "of all parameters" if report["ratio_scope"] == "model" else "of each layer's"
    asked = "none asked" if report["ratio"] is None else f"{report['ratio']:.2%} {of_what} asked"
    yield "removed of all parameters", f"{report['achieved_ratio']:.2%}", asked
    for what in ("parameters", "macs"):
        before, after = report[what]["before"], report[what]["after"]
        named = "MACs" if what == "macs" else what
        yield named, short(after), f"of {short(before)}: {after / before:.2%}"
    if report["layer_ratio"] is not None:
        yield "layer ratio", f"{report['layer_ratio']:.2%}", "of what no override fixes"
    yield "time", duration(report["seconds"]), f"on {report['device']}"
    for place, size in report["peak_memory_bytes"].items():
        yield f"peak memory, {place}", f"{size / 2**30:.2f} GiB", "at the highest"


def _recovery(report: Mapping[str, Any]) -> list[str]:
    recovery = report.get("recovery")
    if recovery is None:
        return []
    sizes = recovery["merge"]["parameters"]
    return [
        page.paragraph(
            f"An adapter was merged into this model ({recovery['merge']['mode']}): "
            f"{sizes['before']:,} parameters before, {sizes['after']:,} after, which the numbers "
            "above include. All below is of the compression before it."
        )
    ]


def label(module: str) -> str:
    """Return the short name of a module.

    Parameters
    ----------
    module : str
        As the report names it: ``self_attn.q_proj`` is q, ``self_attn.qkv_proj.q`` is q too.
    """
    return module.rpartition(".")[2].removesuffix("_proj")


def by_layer(layers: Layers, key: str) -> dict[str, list[float | None]]:
    """Return what the report says of the modules under a key, by role or block.

    Parameters
    ----------
    layers : sequence of mapping
        Of the report.
    key : str
        ``rank``, ``retained_energy``, ``relative_weighted_error``, ...

    Returns
    -------
    dict
        One value per layer; None where there is none. A value by role becomes one entry for each.
    """
    found: dict[str, list[float | None]] = {}
    for index, layer in enumerate(layers):
        for name, module in layer["modules"].items():
            value = module.get(key)
            values = value if isinstance(value, Mapping) else {label(name): value}
            for role, one in values.items():
                if one is not None:
                    found.setdefault(role, [None] * len(layers))[index] = one
    return {role: found[role] for role in in_order(found)}


def in_order(roles: Iterable[str]) -> list[str]:
    """Return roles and blocks in the order of the computation, others last."""
    order = list(COLOURS)
    return sorted(roles, key=lambda role: order.index(role) if role in order else len(order))


def curves(values: Mapping[str, Sequence[float | None]]) -> list[Series]:
    """Return curves of values by role or block, in their colours."""
    return [
        Series(
            _BLOCKS.get(role, role), list(found), COLOURS.get(role, "var(--ink)"), role in DASHED
        )
        for role, found in values.items()
    ]


def _sizes(layers: Layers) -> list[str]:
    """Parameters, ranks and widths by layer."""
    places = range(len(layers))
    kept: dict[str, list[float | None]] = {}
    gone = [0.0] * len(layers)
    for index, layer in enumerate(layers):
        for name, module in layer["modules"].items():
            block = name.partition(".")[0]
            found = kept.setdefault(block, [0.0] * len(layers))
            found[index] = (found[index] or 0.0) + module["parameters"]
            gone[index] += module["parameters_before"] - module["parameters"]
    # A bias that a method adds may be more than what it removes.
    gone = [max(value, 0.0) for value in gone]
    series = [Series(one.name, one.values, one.colour) for one in curves(kept)]
    bars = stacked(
        "parameters by layer: the whole bar is before, what is in colour is left",
        places,
        [*series, Series("removed", gone, GONE)],
    )
    charts = [bars]
    ranks, widths = by_layer(layers, "rank"), by_layer(layers, "width")
    if ranks:
        charts.append(lines("ranks of the factored matrices", places, curves(ranks)))
    if widths:
        charts.append(lines("channels of the feed-forward blocks", places, curves(widths)))
    heads = by_layer(layers, "kv_heads")
    if heads:
        charts.append(lines("key/value heads", places, curves(heads)))
    dense: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        for name, module in layer["modules"].items():
            if module["kind"] == "dense":
                dense.setdefault(label(name), []).append(index)
    said = [
        f"{_BLOCKS.get(role, role)} (layers {spans(where)})"
        if len(where) < len(layers)
        else f"{_BLOCKS.get(role, role)} (all layers)"
        for role, where in dense.items()
    ]
    left = [page.paragraph(f"Left as it was: {', '.join(said)}.")] if said else []
    return [page.heading("Sizes"), page.figures(charts), *left]


def _ratios(report: Mapping[str, Any]) -> list[str]:
    """Ratios and similarities by layer, where they differ or were measured."""
    layers: Layers = report["layers"]
    allocation = report["settings"]["allocation"]
    measured = isinstance(allocation, str)
    if not measured and all(layer["ratios"] == layers[0]["ratios"] for layer in layers):
        return []
    places = range(len(layers))

    def of(key: str) -> list[Series]:
        names = [s for s in _SUBLAYERS if any(s in (layer[key] or ()) for layer in layers)]
        return [
            Series(
                _SUBLAYERS[sublayer],
                [(layer[key] or {}).get(sublayer) for layer in layers],
                _SUBLAYER_COLOURS[sublayer],
                sublayer == "ffn",
            )
            for sublayer in names
        ]

    charts = [lines("share of the parameters removed", places, of("ratios"), unit="percent")]
    similar = of("similarities")
    if similar:
        charts.append(
            lines("cosine of a sub-layer's input and output", places, similar, unit="number")
        )
    reasons = []
    if measured:
        reasons.append(f"Planned from measurements (allocation {allocation}).")
    elif report["settings"]["overrides"]:
        reasons.append("As the recipe's overrides have it.")
    # Reports of before this setting lack it.
    multiple = report["settings"].get("multiple_of", 1)
    if multiple > 1:
        reasons.append(
            f"Ranks and widths are rounded to multiples of {multiple}; what that adds or takes is "
            "carried to the next layer."
        )
    how = " ".join(reasons)
    return [page.heading("Ratios by layer"), page.paragraph(how), page.figures(charts)]


def _losses(layers: Layers) -> list[str]:
    """Error and energy by module."""
    places = range(len(layers))
    charts = [
        lines(title, places, curves(found), unit="percent")
        for title, key in (
            ("relative weighted error", "relative_weighted_error"),
            ("energy retained", "retained_energy"),
        )
        if (found := by_layer(layers, key))
    ]
    if not charts:
        return []
    return [
        page.heading("What was lost"),
        page.paragraph(
            "The error of a matrix is what its method minimises, as a share of the whole, the root "
            "taken; the energy is the share of the squared singular values, or of the squared "
            "scores, that is kept."
        ),
        page.figures(charts),
    ]


def _refinement(layers: Layers) -> list[str]:
    """What refinement has left of each layer's loss, where there was any."""
    losses = [layer.get("losses") for layer in layers]
    shares = [found[-1] / found[0] if found and found[0] else None for found in losses]
    if not any(losses):
        return []
    return [
        page.heading("Refinement"),
        page.paragraph(
            "The squared distance of each layer's outputs to the uncompressed model's, after "
            "refinement as a share of before."
        ),
        page.figures(
            [
                stacked(
                    "distance left by refinement",
                    range(len(layers)),
                    [Series("", shares, "var(--c0)")],
                    unit="percent",
                )
            ]
        ),
    ]


def _scores(report: Mapping[str, Any]) -> list[str]:
    """Histograms of the scores, and the scores at the cuts."""
    charts: list[Chart] = []
    rows: list[list[str]] = []
    for index, layer in enumerate(report["layers"]):
        for name, module in layer["modules"].items():
            cut = module.get("scores_at_cut")
            if cut is None:
                continue
            where = f"layers.{index}.{name}"
            rows.append([where, *("" if cut[key] is None else f"{cut[key]:.4g}" for key in _CUT)])
            bins = module.get("score_histogram")
            if bins is not None:
                charts.append(histogram(where, bins["edges"], bins["kept"], bins["removed"]))
    if not rows:
        return []
    parts = [page.heading("Scores")]
    if charts:
        parts += [
            page.paragraph(
                "Channels or heads by their score, on a logarithmic axis. What is kept at the low "
                "end is the share of the least important that the settings ask for."
            ),
            page.key([("kept", "var(--c4)"), ("removed", "var(--c2)")]),
            page.figures(charts, small=True),
        ]
    cuts = page.table(["module", *_CUT.values()], rows)
    return [*parts, page.folded("scores at the cuts", cuts)]


def _costs(report: Mapping[str, Any]) -> list[str]:
    layers: Layers = report["layers"]
    seconds = [Series("", [layer["seconds"] for layer in layers], "var(--c1)")]
    resumed = report["resumed_layers"]
    parts = [
        page.heading("Time and memory"),
        page.figures([stacked("time by layer", range(len(layers)), seconds, unit="seconds")]),
    ]
    if resumed:
        parts.append(page.paragraph(f"An earlier run had finished {resumed} of the layers."))
    if report["processes"] > 1:
        parts.append(
            page.paragraph(
                f"By {report['processes']} processes; memory and device are those of the first."
            )
        )
    peak = [
        (f"peak memory, {place}", f"{size / 2**30:.2f} GiB")
        for place, size in report["peak_memory_bytes"].items()
    ]
    in_layers = sum(layer["seconds"] for layer in layers)
    times = [("time in all", duration(report["seconds"])), ("in the layers", duration(in_layers))]
    return [*parts, page.facts([*times, *peak, ("device", report["device"])])]


def _table(layers: Layers) -> str:
    def share(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{role} {one:.2%}" for role, one in value.items())
        return "" if value is None else f"{value:.2%}"

    rows = [
        [
            f"layers.{index}.{name}",
            _becomes(module),
            f"{module['parameters']:,}",
            f"{module['parameters_before']:,}",
            share(module.get("retained_energy")),
            share(module.get("relative_weighted_error")),
        ]
        for index, layer in enumerate(layers)
        for name, module in layer["modules"].items()
    ]
    head = ["module", "becomes", "parameters", "before", "energy", "error"]
    return page.table(head, rows, texts=2)


def _becomes(module: Mapping[str, Any]) -> str:
    for key, word in (("rank", "rank"), ("width", "width"), ("kv_heads", "kv heads")):
        if module["kind"] != "dense" and key in module:
            return f"{word} {module[key]:,}"
    return "as it is"


def _settings(report: Mapping[str, Any]) -> list[str]:
    calibration = report["calibration"]
    data = f"{calibration['samples']} x {calibration['seqlen']} tokens of {calibration['source']}"
    asked = [
        (name.replace("_", " "), _plain(value))
        for name, value in report["settings"].items()
        if value not in (None, [], ())
    ]
    return [
        page.heading("How it was made"),
        page.code(report["command"]),
        page.facts([("calibration", data), ("its sha256", calibration["fingerprint"])]),
        page.folded("settings", page.facts(asked)),
        page.folded("versions", page.facts(list(report["versions"].items()))),
    ]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(_plain(one) for one in value)
    return str(value)
