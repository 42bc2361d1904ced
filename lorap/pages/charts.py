"""Charts in SVG: pure functions from numbers to text.

Colours are variables of CSS, which :data:`STYLE` sets for light and dark: a chart stands in a page
that has this style. In a sheet, a picture of its own, they are those of light: not every program
that shows pictures knows variables.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

_COLOURS = {
    "paper": ("#ffffff", "#12161d"),
    "ink": ("#1c2330", "#e6e9ef"),
    "faint": ("#5c6675", "#9aa5b5"),
    "line": ("#dfe3e9", "#2c3440"),
    "gone": ("#c9ced6", "#4a5462"),
    "panel": ("#f6f7f9", "#1a202a"),
    "c0": ("#0060a8", "#6cb6ff"),
    "c1": ("#3a86c8", "#a9d4ff"),
    "c2": ("#c2410c", "#ff9a62"),
    "c3": ("#9a6a10", "#f0c050"),
    "c4": ("#0f766e", "#4fd1b5"),
    "c5": ("#4a7f2c", "#9ade6c"),
    "c6": ("#a8327e", "#f08cc8"),
}
"""Name of a colour to what it is in light and in dark."""

_LETTERS = """\
svg text { font-family: system-ui, sans-serif; font-size: 12px; fill: var(--ink); }
svg .axis { fill: var(--faint); }
svg .grid { stroke: var(--line); fill: none; }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
"""

STYLE = (
    ":root { color-scheme: light dark; "
    + " ".join(f"--{name}: {light};" for name, (light, _) in _COLOURS.items())
    + " }\n@media (prefers-color-scheme: dark) { :root { "
    + " ".join(f"--{name}: {dark};" for name, (_, dark) in _COLOURS.items())
    + " } }\n"
    + _LETTERS
)
"""What the charts' colours and letters are."""

GONE = "var(--gone)"
"""Colour of what was removed."""

Unit = Literal["percent", "number", "log", "seconds"]
"""How values are written; ``log`` are exponents of ten, written as powers."""

_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 20, 10, 38
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
"""Of the places on the horizontal axis, every so many-th is named."""

_MARKED = 48
"""Points of a curve up to which each has a mark."""


@dataclass(frozen=True)
class Series:
    """Values by place on the horizontal axis.

    Attributes
    ----------
    name : str
        For the legend; "" for none.
    values : sequence of float or None
        None where there is none: a gap.
    colour : str
        Of CSS, such as ``var(--c0)``.
    dashed : bool
    opacity : float
        From 0 to 1.
    """

    name: str
    values: Sequence[float | None]
    colour: str
    dashed: bool = False
    opacity: float = 1.0


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes
    ----------
    title : str
        What it shows, as plain text.
    width, height : int
        In its own units.
    body : str
        SVG without the outer element.
    """

    title: str
    width: int
    height: int
    body: str

    def svg(self) -> str:
        """Return it as an element of a page that has the style."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self.title)}">{self.body}</svg>'
        )


def ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers in a range.

    Parameters
    ----------
    low, high : float
        `high` is the greater one.
    """
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    if (high - low) / step > 12:
        step *= 5
    elif (high - low) / step > 6:
        step *= 2
    first = math.ceil(low / step)
    digits = 10 - math.floor(math.log10(step))
    return [round(n * step, digits) for n in range(first, math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Return the exponents of powers of ten in a range; of twice and five times them, if few."""
    between = (0.0, math.log10(2), math.log10(5)) if high - low < 2 else (0.0,)
    every = max(1, math.ceil((high - low) / 8))
    found = [
        exponent + part
        for exponent in range(math.floor(low), math.ceil(high) + 1)
        if exponent % every == 0
        for part in between
    ]
    return [value for value in found if low <= value <= high]


def lines(
    title: str,
    places: Sequence[float],
    series: Sequence[Series],
    *,
    unit: Unit = "number",
    across: str = "layer",
    share: bool = False,
) -> Chart:
    """Return curves over common places, such as one value for each layer.

    Parameters
    ----------
    title : str
    places : sequence of float
        Ascending; where the values stand.
    series : sequence of Series
        As many values each as there are places.
    unit : str
        Of the values. The axis begins at 0, but for ``log``.
    across : str
        What the places are.
    share : bool
        Whether the places are shares, and written as percent, rather than whole numbers.
    """
    frame = _Frame(
        [value for one in series for value in one.values if value is not None],
        (0.0, 1.0) if share else (min(places, default=0.0), max(places, default=0.0)),
        [(one.name, one.colour, one.dashed) for one in series if one.name],
        unit,
    )
    parts = [frame.backdrop(places, across, share)]
    for one in series:
        style = f'stroke="{one.colour}"' + (' stroke-dasharray="5 3"' if one.dashed else "")
        if one.opacity < 1:
            style += f' stroke-opacity="{one.opacity:.2f}"'
        for run in _runs(places, one.values):
            points = " ".join(f"{frame.x(place)},{frame.y(value)}" for place, value in run)
            parts.append(f'<polyline class="curve" points="{points}" {style}/>')
            if len(places) > _MARKED or share:
                continue
            for place, value in run:
                said = f"{across} {place:g}" + (f", {one.name}" if one.name else "")
                parts.append(
                    f'<circle cx="{frame.x(place)}" cy="{frame.y(value)}" r="2.6" '
                    f'fill="{one.colour}">'
                    f"<title>{escape(f'{said}: {written(value, unit)}')}</title></circle>"
                )
    return Chart(title, _WIDTH, frame.height, "".join(parts))


def stacked(
    title: str,
    places: Sequence[int],
    series: Sequence[Series],
    *,
    unit: Unit = "number",
    across: str = "layer",
) -> Chart:
    """Return one bar for each place, the series one above the other.

    Parameters
    ----------
    title : str
    places : sequence of int
        What the bars are of, in ascending order; they stand side by side.
    series : sequence of Series
        From the bottom up; None counts as 0.
    unit, across
        As for ``lines``.
    """
    heights = [sum(one.values[i] or 0.0 for one in series) for i in range(len(places))]
    span = (-0.5, len(places) - 0.5)
    legend = [(one.name, one.colour, False) for one in series if one.name]
    frame = _Frame([*heights, 0.0], span, legend, unit)
    parts = [frame.backdrop(range(len(places)), across, False, names=places)]
    width = max(frame.x(0.8) - frame.x(0.0), 0.5)
    base = [0.0] * len(places)
    for one in series:
        for at, place in enumerate(places):
            value = one.values[at] or 0.0
            if not value:
                continue
            top, bottom = frame.y(base[at] + value), frame.y(base[at])
            said = f"{across} {place}" + (f", {one.name}" if one.name else "")
            parts.append(
                f'<rect x="{_short(frame.x(at) - width / 2)}" y="{top}" width="{_short(width)}" '
                f'height="{_short(bottom - top)}" fill="{one.colour}">'
                f"<title>{escape(f'{said}: {written(value, unit)}')}</title></rect>"
            )
            base[at] += value
    return Chart(title, _WIDTH, frame.height, "".join(parts))


def histogram(
    title: str, edges: Sequence[float], kept: Sequence[int], removed: Sequence[int]
) -> Chart:
    """Return how many scores lie between any two edges, the removed ones above the kept ones.

    Parameters
    ----------
    title : str
    edges : sequence of float
        Ascending, not negative; drawn at equal distances, as they are for a logarithmic axis.
    kept, removed : sequence of int
        One less than there are edges.
    """
    width, height, base = 200, 120, 96
    step = (width - 8) / max(len(kept), 1)
    highest = max((a + b for a, b in zip(kept, removed, strict=True)), default=0) or 1
    parts = [f'<path class="grid" d="M4 {base}H{width - 4}"/>']
    for colour, counts, below in (
        ("var(--c4)", kept, [0] * len(kept)),
        ("var(--c2)", removed, kept),
    ):
        path = []
        for at, (count, under) in enumerate(zip(counts, below, strict=True)):
            if count:
                size = count / highest * (base - 8)
                x, y = 4 + at * step, base - under / highest * (base - 8) - size
                path.append(
                    f"M{_short(x + 0.3)} {_short(y)}h{_short(step - 0.6)}v{_short(size)}"
                    f"h{_short(0.6 - step)}z"
                )
        if path:
            parts.append(f'<path d="{"".join(path)}" fill="{colour}"/>')
    if edges:
        parts.append(f'<text class="axis" x="4" y="114">{edges[0]:.3g}</text>')
        parts.append(
            f'<text class="axis" x="{width - 4}" y="114" text-anchor="end">{edges[-1]:.3g}</text>'
        )
    return Chart(title, width, height, "".join(parts))


def sheet(title: str, charts: Sequence[Chart], columns: int = 2) -> str:
    """Return charts as a picture of its own.

    Parameters
    ----------
    title : str
    charts : sequence of Chart
        Row by row.
    columns : int
    """
    columns = max(1, min(columns, len(charts)))
    gap, head, caption = 16, 44, 22
    rows = [charts[at : at + columns] for at in range(0, len(charts), columns)]
    width = max((chart.width for chart in charts), default=_WIDTH)
    across = columns * (width + gap) + gap
    parts, top = [], head
    for row in rows:
        for column, chart in enumerate(row):
            left = gap + column * (width + gap)
            parts.append(f'<text x="{left + 4}" y="{top + 14}">{escape(chart.title)}</text>')
            parts.append(
                f'<svg x="{left}" y="{top + caption}" width="{chart.width}" '
                f'height="{chart.height}">{chart.body}</svg>'
            )
        top += caption + gap + max(chart.height for chart in row)
    picture = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {top}" '
        f'role="img" aria-label="{escape(title)}">\n<style>\n{_LETTERS}</style>\n'
        f'<rect width="{across}" height="{top}" fill="var(--paper)"/>\n'
        f'<text x="{gap + 4}" y="28" style="font-size: 16px; font-weight: 600">'
        f"{escape(title)}</text>\n" + "\n".join(parts) + "\n</svg>\n"
    )
    return re.sub(r"var\(--(\w+)\)", lambda match: _COLOURS[match[1]][0], picture)


def written(value: float, unit: Unit) -> str:
    """Return a value as the charts write it.

    Parameters
    ----------
    value : float
    unit : str
    """
    if unit == "percent":
        return f"{value:.4g}" if value and abs(value) < 1e-4 else f"{value:.2%}"
    if unit == "log":
        return f"{10.0**value:.3g}"
    if unit == "seconds":
        return f"{value:.3g} s"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


class _Frame:
    """The axes of a chart, and where values lie in them."""

    def __init__(
        self,
        values: Sequence[float],
        span: tuple[float, float],
        legend: Sequence[tuple[str, str, bool]],
        unit: Unit,
    ) -> None:
        self._unit = unit
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        if unit == "log":
            room = 0.05 * (high - low) or 0.5
            low, high = low - room, high + room
        else:
            low, high = min(low, 0.0), max(high, 0.0)
            # What is nearly all of something is read off best where all of it is in sight.
            high = 1.0 if unit == "percent" and 0.9 < high <= 1 else high + 0.04 * (high - low)
        if high == low:
            high = low + 1.0
        self._low, self._high = low, high
        self._first, self._last = span if span[1] > span[0] else (span[0] - 0.5, span[1] + 0.5)
        self._legend, rows = _legend(legend)
        self._top = _TOP + 18 * rows
        self._base = self._top + _HEIGHT - _TOP - _BOTTOM
        self.height = self._base + _BOTTOM

    def x(self, place: float) -> float:
        share = (place - self._first) / (self._last - self._first)
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 2)

    def y(self, value: float) -> float:
        share = (value - self._low) / (self._high - self._low)
        return round(self._base - share * (self._base - self._top), 2)

    def backdrop(
        self,
        places: Sequence[float],
        across: str,
        share: bool,
        names: Sequence[int] | None = None,
    ) -> str:
        """Return axes, grid and legend."""
        parts = [self._legend]
        for value in (_powers if self._unit == "log" else ticks)(self._low, self._high):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
            parts.append(
                f'<text class="axis" x="{_LEFT - 6}" y="{_short(y + 4)}" text-anchor="end">'
                f"{_on_axis(value, self._unit)}</text>"
            )
        every = next(step for step in _STEPS if len(places) <= 9 * step)
        shown = (0.0, 0.25, 0.5, 0.75, 1.0) if share else places[::every]
        for at, place in enumerate(shown):
            name = f"{place:.0%}" if share else f"{names[at * every] if names else place:g}"
            parts.append(
                f'<text class="axis" x="{self.x(place)}" y="{self._base + 16}" '
                f'text-anchor="middle">{name}</text>'
            )
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(
            f'<text class="axis" x="{middle}" y="{self._base + 32}" text-anchor="middle">'
            f"{escape(across)}</text>"
        )
        return "".join(parts)


def _legend(entries: Sequence[tuple[str, str, bool]]) -> tuple[str, int]:
    """Return the legend, and the rows that it takes."""
    if not entries:
        return "", 0
    parts, left, row = [], float(_LEFT), 0
    for name, colour, dashed in entries:
        # Letters are some 6.6 wide on average.
        width = 32 + 6.6 * len(name)
        if left > _LEFT and left + width > _WIDTH:
            left, row = float(_LEFT), row + 1
        y = _TOP + 6 + 18 * row
        dash = ' stroke-dasharray="5 3"' if dashed else ""
        parts.append(
            f'<path d="M{_short(left)} {y}h16" stroke="{colour}" stroke-width="4"{dash}/>'
            f'<text x="{_short(left + 21)}" y="{y + 4}">{escape(name)}</text>'
        )
        left += width
    return "".join(parts), row + 1


def _on_axis(value: float, unit: Unit) -> str:
    if unit == "percent":
        return f"{100 * value:.6g}%"
    if unit == "log":
        return f"{10.0**value:.0f}" if 0 <= value < 6 else f"{10.0**value:.3g}"
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}" + (" s" if unit == "seconds" else "")


def _runs(
    places: Sequence[float], values: Sequence[float | None]
) -> list[list[tuple[float, float]]]:
    """Return the stretches without a gap."""
    runs: list[list[tuple[float, float]]] = [[]]
    for place, value in zip(places, values, strict=True):
        if value is None:
            runs.append([])
        else:
            runs[-1].append((place, value))
    return [run for run in runs if run]


def _short(value: float) -> str:
    return f"{round(value, 2):g}"
