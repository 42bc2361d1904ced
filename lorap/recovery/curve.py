"""The loss curve: points, a line of text, and a small picture."""

from __future__ import annotations

from collections.abc import Sequence

from lorap.pages.charts import ticks

Point = tuple[int, float]
"""Step, and the loss there in nats per token."""

_LEVELS = "▁▂▃▄▅▆▇█"
_WIDTH, _HEIGHT, _MARGIN = 640, 320, 48


def sparkline(losses: Sequence[float], width: int = 40) -> str:
    """Return losses as a line of blocks, the highest as a full one.

    Parameters
    ----------
    losses : sequence of float
        Of more than `width`, some are left out evenly.
    width : int
    """
    if len(losses) > width:
        losses = [losses[round(i * (len(losses) - 1) / (width - 1))] for i in range(width)]
    low, high = min(losses, default=0.0), max(losses, default=0.0)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((loss - low) * scale)] for loss in losses)


def svg(training: Sequence[Point], validation: Sequence[Point]) -> str:
    """Return the curves of both losses as a picture in SVG.

    Parameters
    ----------
    training, validation : sequence of (step, loss)
        In ascending order of the steps; either may be empty.
    """
    points = [*training, *validation]
    last = max((step for step, _ in points), default=1) or 1
    low = min((loss for _, loss in points), default=0.0)
    high = max((loss for _, loss in points), default=1.0)
    room = 0.05 * (high - low) or 0.5
    low, high = low - room, high + room

    def at(step: float, loss: float) -> tuple[float, float]:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * step / last
        y = _HEIGHT - _MARGIN - (_HEIGHT - 2 * _MARGIN) * (loss - low) / (high - low)
        return round(x, 1), round(y, 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="11" fill="#333">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
    ]
    for loss in ticks(low, high):
        x, y = at(0, loss)
        parts.append(f'<path d="M{x} {y}H{_WIDTH - _MARGIN}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{loss:g}</text>')
    for step in (0, last):
        x, _ = at(step, low)
        parts.append(
            f'<text x="{x}" y="{_HEIGHT - _MARGIN + 16}" text-anchor="middle">{step}</text>'
        )
    parts.append(
        f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 12}" text-anchor="middle">step</text>'
        f'<text x="{_MARGIN}" y="24">loss, nats per token: '
        '<tspan fill="#888">training</tspan>, <tspan fill="#c33">validation</tspan></text>'
    )
    for curve, colour in ((training, "#888"), (validation, "#c33")):
        if curve:
            path = " ".join("{},{}".format(*at(step, loss)) for step, loss in curve)
            parts.append(
                f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            )
    for step, loss in validation:
        x, y = at(step, loss)
        parts.append(f'<circle cx="{x}" cy="{y}" r="2.5" fill="#c33"/>')
    return "\n".join([*parts, "</svg>\n"])
