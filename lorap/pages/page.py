"""The frame of a page, and its parts other than charts. All text is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lorap.pages.charts import STYLE, Chart

_STYLE = """\
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 0.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 0.5rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line); }
p { margin: 0.5rem 0; max-width: 46rem; }
.faint, figcaption, dt, th { color: var(--faint); }
.tiles { display: grid; gap: 0.75rem; margin: 1.25rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(45%, 10.5rem), 1fr)); }
.tile { background: var(--panel); border-radius: 0.5rem; padding: 0.75rem 1rem; }
.tile b { display: block; font-size: 1.4rem; line-height: 1.3; overflow-wrap: anywhere; }
.tile span { display: block; font-size: 0.9rem; color: var(--faint); }
.charts { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); }
.charts.small svg text { font-size: 15px; }
figure { margin: 0; background: var(--panel); border-radius: 0.5rem; padding: 0.75rem; }
figcaption { font-size: 0.9rem; margin-bottom: 0.25rem; }
figure svg { display: block; width: 100%; height: auto; }
.key i { display: inline-block; width: 0.8rem; height: 0.8rem; border-radius: 0.15rem;
  margin: 0 0.35rem 0 0; vertical-align: -0.05rem; }
.key span { margin-right: 1rem; white-space: nowrap; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: 0.25rem 1rem;
  margin: 0.5rem 0; }
dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-weight: 400; }
th.text, td.text { text-align: left; }
summary { cursor: pointer; color: var(--faint); padding: 0.25rem 0; }
@media (max-width: 40rem) { .charts:not(.small) svg text { font-size: 13.5px; } }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--panel);
  border-radius: 0.5rem; padding: 0.75rem 1rem; font-size: 0.85rem; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Return a page that needs nothing beside it.

    Parameters
    ----------
    title : str
        Plain text.
    parts : sequence of str
        HTML, from the other functions.
    """
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    """Return a heading."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str, *, faint: bool = False) -> str:
    """Return a paragraph of plain text."""
    kind = ' class="faint"' if faint else ""
    return f"<p{kind}>{escape(text)}</p>"


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return numbers that catch the eye: of each what it is, its value, and a word on it."""
    inner = "".join(
        f'<div class="tile"><span>{escape(what)}</span><b>{escape(value)}</b>'
        f"<span>{escape(word)}</span></div>"
        for what, value, word in entries
    )
    return f'<div class="tiles">{inner}</div>'


def figures(charts: Sequence[Chart], *, small: bool = False) -> str:
    """Return charts side by side, as many as there is room for."""
    inner = "".join(
        f"<figure><figcaption>{escape(chart.title)}</figcaption>{chart.svg()}</figure>\n"
        for chart in charts
    )
    return f'<div class="charts{" small" if small else ""}">\n{inner}</div>'


def key(entries: Sequence[tuple[str, str]]) -> str:
    """Return what colours stand for: names, each with a colour of CSS."""
    inner = "".join(
        f'<span><i style="background: {colour}"></i>{escape(name)}</span>'
        for name, colour in entries
    )
    return f'<p class="key">{inner}</p>'


def facts(entries: Sequence[tuple[str, str]]) -> str:
    """Return names, each with its value."""
    inner = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in entries)
    return f"<dl>{inner}</dl>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Return a table that scrolls where it is too wide.

    Parameters
    ----------
    head : sequence of str
    rows : sequence of sequences of str
    texts : int
        Columns at the left that hold text; the others hold numbers.
    """

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="text"'] * texts + [""] * len(row)
        return "".join(
            f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in zip(row, kinds, strict=False)
        )

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{cells("th", head)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def folded(summary: str, inner: str) -> str:
    """Return something that opens at a click.

    Parameters
    ----------
    summary : str
        Plain text.
    inner : str
        HTML.
    """
    return f"<details><summary>{escape(summary)}</summary>\n{inner}\n</details>"


def code(text: str) -> str:
    """Return text as it was typed."""
    return f"<pre>{escape(text)}</pre>"
