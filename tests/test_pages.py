"""The report as a page: what it shows, that nothing breaks out of it, and the charts in it."""

from __future__ import annotations

import copy
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import lorap
from lorap.checkpoint.files import REPORT, REPORT_PAGE
from lorap.checkpoint.writer import check_output
from lorap.pages import page
from lorap.pages.charts import Series, histogram, lines, sheet, stacked, ticks, written
from lorap.pages.report_page import by_layer, label, report_page
from lorap.pipeline.sublayers import _histogram
from tests.tiny_models import save_tiny_checkpoint

VOID = {"meta"}
SVG = "{http://www.w3.org/2000/svg}"


class Strict(HTMLParser):
    """Reads a page and raises where tags do not nest, or something is asked of a network."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object", "use"), tag
        for name, value in attrs:
            assert name not in ("src", "href", "xlink:href", "srcset"), (tag, name)
            assert not name.startswith("on"), (tag, name)
            assert value is not None
            assert "url(" not in value
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> Strict:
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert "@import" not in text
    assert "url(" not in text
    assert text.startswith("<!doctype html>\n")
    return parser


def element(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" '))


# --- charts ---------------------------------------------------------------------------------------


def test_curves_lie_where_their_values_are() -> None:
    chart = lines("ranks", [0, 1, 2, 3], [Series("q", [0, 10, None, 20], "var(--c0)")])
    dots = element(chart.svg()).findall(f"{SVG}circle")
    x = [float(dot.get("cx", "")) for dot in dots]
    y = [float(dot.get("cy", "")) for dot in dots]
    assert x[1] - x[0] == pytest.approx((x[2] - x[0]) / 3, abs=0.02)
    assert y[0] > y[1] > y[2]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.02)
    said = [dot.findtext(f"{SVG}title") for dot in dots]
    assert said == ["layer 0, q: 0", "layer 1, q: 10", "layer 3, q: 20"]
    runs = element(chart.svg()).findall(f"{SVG}polyline")
    assert [len(run.get("points", "").split()) for run in runs] == [2, 1]
    # The grid's line at 10 is where 10 is.
    names = {t.text: float(t.get("y", "")) - 4 for t in element(chart.svg()).findall(f"{SVG}text")}
    assert names["10"] == pytest.approx(y[1], abs=0.02)


def test_bars_stand_on_each_other() -> None:
    chart = stacked(
        "parameters",
        [4, 7],
        [Series("a", [1, 2], "var(--c0)"), Series("b", [3, None], "var(--c1)")],
    )
    bars = element(chart.svg()).findall(f"{SVG}rect")
    said = [bar.findtext(f"{SVG}title") for bar in bars]
    assert said == ["layer 4, a: 1", "layer 7, a: 2", "layer 4, b: 3"]
    tops = [float(bar.get("y", "")) for bar in bars]
    heights = [float(bar.get("height", "")) for bar in bars]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.03)
    assert heights[2] == pytest.approx(3 * heights[0], abs=0.03)
    assert tops[2] + heights[2] == pytest.approx(tops[0], abs=0.02)
    assert tops[0] + heights[0] == pytest.approx(tops[1] + heights[1], abs=0.02)
    assert bars[0].get("x") != bars[1].get("x")


def areas(path: str) -> list[tuple[float, float, float]]:
    """Return left, top and height of each bar of a histogram."""
    found = re.findall(r"M([\d.]+) ([\d.]+)h[\d.]+v([\d.]+)", path)
    return [tuple(map(float, one)) for one in found]  # type: ignore[misc]


def test_removed_scores_stand_on_the_kept_ones() -> None:
    chart = histogram("scores", [1, 10, 100], [4, 2], [0, 6])
    paths = element(chart.svg()).findall(f"{SVG}path")[1:]
    kept, removed = (areas(path.get("d", "")) for path in paths)
    assert [path.get("fill") for path in paths] == ["var(--c4)", "var(--c2)"]
    assert [size for *_, size in kept] == pytest.approx([44, 22])
    assert [size for *_, size in removed] == pytest.approx([66])
    assert removed[0][1] + 66 == pytest.approx(kept[1][1])
    texts = [t.text for t in element(chart.svg()).findall(f"{SVG}text")]
    assert texts == ["1", "100"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 350, [0, 100, 200, 300]),
        (0, 3.1e-9, [0, 1e-9, 2e-9, 3e-9]),
        (-0.3, 2e12, [0, 5e11, 1e12, 1.5e12, 2e12]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_axes_of_powers_are_named_by_the_values() -> None:
    def named(values: list[float]) -> list[str | None]:
        chart = lines("x", [0, 1], [Series("", values, "var(--c0)")], unit="log")
        return [t.text for t in element(chart.svg()).findall(f"{SVG}text")]

    assert named([-1.0, 0.0])[:4] == ["0.1", "0.2", "0.5", "1"]
    assert named([-3.0, 1.0])[:5] == ["0.001", "0.01", "0.1", "1", "10"]


def test_values_are_written_by_their_unit() -> None:
    assert [written(0.2, "percent"), written(2e-6, "percent")] == ["20.00%", "2e-06"]
    assert [written(1234567, "number"), written(0.25, "number")] == ["1,234,567", "0.25"]
    assert [written(2, "log"), written(1.5, "seconds")] == ["100", "1.5 s"]


@pytest.mark.parametrize("values", [[], [0.0], [5.0], [None, None], [1e-300, 1e300], [-1.0, -2.0]])
@pytest.mark.parametrize("unit", ["number", "percent", "log", "seconds"])
def test_a_chart_of_anything_is_well_formed(values: list[float | None], unit: Any) -> None:
    if unit == "log":
        values = [None if v is None else max(min(v, 30), -30) for v in values]
    series = [Series("x", values, "var(--c0)"), Series("y", values, "var(--c1)", True, 0.5)]
    for chart in (
        lines("t", range(len(values)), series, unit=unit),
        stacked("t", range(len(values)), series, unit=unit),
        histogram("t", [0.0, 0.0], [3], [0]),
        histogram("t", [], [], []),
    ):
        for node in element(chart.svg()).iter():
            for name, value in node.attrib.items():
                assert "nan" not in value, name
                assert "inf" not in value, name


def test_eighty_layers_have_axes_that_can_be_read() -> None:
    chart = lines("x", range(80), [Series("", [1.0] * 80, "var(--c0)")])
    texts = [t.text for t in element(chart.svg()).findall(f"{SVG}text")]
    assert [int(t) for t in texts if t and t.isdigit() and int(t) > 1] == [
        10,
        20,
        30,
        40,
        50,
        60,
        70,
    ]


def test_a_sheet_needs_nothing_beside_it() -> None:
    charts = [lines("a < b", [0, 1], [Series("q & k", [1, 2], "var(--c0)")])] * 3
    text = sheet('"title" <x>', charts)
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert len(root.findall(f"{SVG}svg")) == 3
    assert "var(" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    titles = [node.text for node in root.findall(f"{SVG}text")]
    assert titles == ['"title" <x>', "a < b", "a < b", "a < b"]


# --- parts of a page ------------------------------------------------------------------------------

EVIL = "</title></style><script>alert('1')</script> & \"<img src=x onerror=y>"


def test_every_part_escapes_its_text() -> None:
    chart = lines(EVIL, [0], [Series(EVIL, [1], "var(--c0)")])
    bars = stacked(EVIL, [0], [Series(EVIL, [1], "var(--c0)")], across=EVIL)
    parts = {
        "heading": page.heading(EVIL),
        "paragraph": page.paragraph(EVIL),
        "tiles": page.tiles([(EVIL, EVIL, EVIL)]),
        "figures": page.figures([chart, bars, histogram(EVIL, [1, 2], [1], [1])]),
        "key": page.key([(EVIL, "red")]),
        "facts": page.facts([(EVIL, EVIL)]),
        "table": page.table([EVIL], [[EVIL]]),
        "folded": page.folded(EVIL, ""),
        "code": page.code(EVIL),
    }
    for name, part in parts.items():
        assert EVIL in "".join(read(page.page("x", [part])).text), name
    assert EVIL in "".join(read(page.page(EVIL, [])).text)


# --- the report -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model, and of models compressed from it."""
    folder = tmp_path_factory.mktemp("pages")
    save_tiny_checkpoint(folder / "model")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, 96, (4, 16)))
    for name, settings in SETTINGS.items():
        config = lorap.CompressionConfig(
            **({"ratio": 0.3, "samples": 4, "seqlen": 16, "device": "cpu"} | settings)
        )
        lorap.compress_checkpoint(
            folder / "model", folder / name, config, calibration=str(folder / "ids.npy")
        )
    return folder


SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {},
    "measured": {"allocation": "mgaa", "joint_qk": True},
    "factors": {"ffn": "svd", "sublayers": ("ffn",)},
    "heads": {"mha": "heads", "importance": "taylor", "ratio": 0.4},
    "rounded": {"multiple_of": 8},
    "refined": {"refine": 2},
}


def said(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / REPORT).read_text())
    return report


@pytest.mark.parametrize("name", SETTINGS)
def test_the_page_is_whole_and_says_what_the_report_does(folder: Path, name: str) -> None:
    report = said(folder / name)
    text = (folder / name / REPORT_PAGE).read_text()
    assert text == report_page(report, name=name)
    assert text == report_page(copy.deepcopy(report), name=name)
    shown = "".join(read(text).text)
    for fragment in (
        f"{report['achieved_ratio']:.2%}",
        f"{report['ratio']:.2%} of all parameters asked",
        report["calibration"]["fingerprint"],
        report["command"],
        *report["versions"].values(),
    ):
        assert fragment in shown, fragment
    for index, layer in enumerate(report["layers"]):
        for module, found in layer["modules"].items():
            assert f"layers.{index}.{module}" in shown
            assert f"{found['parameters']:,}" in shown
            for key, word in (("rank", "rank"), ("width", "width"), ("kv_heads", "kv heads")):
                if key in found and found["kind"] != "dense":
                    assert f"{word} {found[key]:,}" in shown
    assert ("Ratios by layer" in shown) == (name in ("measured", "rounded"))
    assert ("rounded to multiples of 8;" in shown) == (name == "rounded")
    assert "As the recipe's overrides have it." not in shown
    assert ("cosine of" in shown) == (name == "measured")
    assert ("Scores" in shown) == (name != "factors")
    assert ("ranks of the factored matrices" in shown) == (name != "heads")
    assert ("key/value heads" in shown) == (name == "heads")


def bars_of(text: str, title: str) -> dict[str, float]:
    """Return what the bars of a chart say, by what they are of."""
    svg = re.search(rf"<figcaption>{title}.*?</figcaption>(<svg.*?</svg>)", text)
    assert svg is not None
    found = {}
    for node in element(svg[1]).iter(f"{SVG}title"):
        name, _, value = (node.text or "").partition(": ")
        found[name] = float(value.replace(",", "").rstrip("s% "))
    return found


def test_bars_and_curves_are_those_of_the_report(folder: Path) -> None:
    report, text = said(folder / "measured"), (folder / "measured" / REPORT_PAGE).read_text()
    bars = bars_of(text, "parameters by layer")
    ranks, energies = (bars_of(text, title) for title in ("ranks of", "energy retained"))
    ratios, widths = bars_of(text, "share of the parameters removed"), bars_of(text, "channels of")
    for index, layer in enumerate(report["layers"]):
        modules = layer["modules"]
        for block, name in (("self_attn", "attention"), ("mlp", "feed-forward")):
            own = [m for key, m in modules.items() if key.partition(".")[0] == block]
            assert bars[f"layer {index}, {name}"] == sum(m["parameters"] for m in own)
        removed = sum(m["parameters_before"] - m["parameters"] for m in modules.values())
        assert bars[f"layer {index}, removed"] == removed
        for name, module in modules.items():
            where, energy = f"layer {index}, {label(name)}", module.get("retained_energy")
            assert ranks.get(where) == module.get("rank")
            if name != "mlp" and energy is not None:
                assert energies[where] == pytest.approx(100 * energy, abs=0.01)
        assert widths[f"layer {index}, feed-forward"] == modules["mlp"]["width"]
        for sublayer, name in (("mha", "attention"), ("ffn", "feed-forward")):
            found = ratios[f"layer {index}, {name}"]
            assert found == pytest.approx(100 * layer["ratios"][sublayer], abs=0.01)
    times = bars_of(text, "time by layer")
    assert times["layer 0"] == pytest.approx(report["layers"][0]["seconds"], rel=0.01)


def test_what_refinement_leaves_is_in_the_page(folder: Path) -> None:
    report, text = said(folder / "refined"), (folder / "refined" / REPORT_PAGE).read_text()
    bars = bars_of(text, "distance left by refinement")
    for index, layer in enumerate(report["layers"]):
        losses = layer["losses"]
        assert bars[f"layer {index}"] == pytest.approx(100 * losses[-1] / losses[0], abs=0.01)
    assert "Refinement" not in (folder / "paper" / REPORT_PAGE).read_text()


def test_the_report_s_histograms_are_in_the_page(folder: Path) -> None:
    report, text = said(folder / "paper"), (folder / "paper" / REPORT_PAGE).read_text()
    for index, layer in enumerate(report["layers"]):
        module = layer["modules"]["mlp"]
        bins, cut = module["score_histogram"], module["scores_at_cut"]
        assert sum(bins["kept"]) == module["width"] == len(module["kept_channels"])
        assert sum(bins["removed"]) == 48 - module["width"]
        # The removed band lies between the scores at the cut.
        at = [i for i, count in enumerate(bins["removed"]) if count]
        assert bins["edges"][at[0]] <= cut["lowest_removed"] * (1 + 1e-12)
        assert cut["highest_removed"] <= bins["edges"][at[-1] + 1] * (1 + 1e-12)
        chart = histogram(f"layers.{index}.mlp", bins["edges"], bins["kept"], bins["removed"])
        assert chart.svg() in text


def test_a_report_of_before_histograms_and_a_recovered_one_have_a_page(folder: Path) -> None:
    report = said(folder / "paper")
    for layer in report["layers"]:
        del layer["modules"]["mlp"]["score_histogram"]
    report |= {"ratio": None, "layer_ratio": None, "resumed_layers": 2, "processes": 3}
    report["recovery"] = {"merge": {"mode": "exact", "parameters": {"before": 10, "after": 12345}}}
    shown = "".join(read(report_page(report, name="x")).text)
    assert "12,345 after" in shown
    assert "none asked" in shown
    assert "finished 2 of the layers" in shown
    assert "By 3 processes" in shown
    assert "scores at the cuts" in shown
    assert "logarithmic" not in shown


def test_what_a_report_says_cannot_break_out_of_the_page(folder: Path) -> None:
    report = said(folder / "measured")
    report |= {"model": EVIL, "command": EVIL, "device": EVIL, "versions": {EVIL: EVIL}}
    report["calibration"]["source"] = EVIL
    report["settings"]["overrides"] = [{"match": EVIL}]
    report["peak_memory_bytes"] = {EVIL: 1}
    layer = report["layers"][0]["modules"]
    layer[f"mlp.{EVIL}"] = {"kind": "low_rank", "rank": 3, "retained_energy": 0.5} | {
        "parameters": 1,
        "parameters_before": 2,
        "relative_weighted_error": {EVIL: 0.5},
    }
    shown = "".join(read(report_page(report, name=EVIL)).text)
    assert shown.count(EVIL) > 10


def test_a_path_is_shown_by_its_last_part(folder: Path) -> None:
    text = (folder / "paper" / REPORT_PAGE).read_text()
    title = text.partition("</h1>")[2][:200]
    assert ">model, made smaller" in title


def test_values_by_layer_know_gaps_and_roles() -> None:
    layers = [
        {"modules": {"mlp": {"e": {"down": 0.5, "up": 0.1}}, "self_attn.q_proj": {"e": 1.0}}},
        {"modules": {"mlp": {}, "self_attn.qkv_proj.q": {"e": 2.0}, "self_attn.v_proj": {}}},
    ]
    found = by_layer(layers, "e")
    assert found == {"q": [1.0, 2.0], "up": [0.1, None], "down": [0.5, None]}
    assert list(found) == ["q", "up", "down"]
    assert [label(n) for n in ("self_attn.q_proj", "mlp", "mlp.gate_up_proj.up")] == [
        "q",
        "mlp",
        "up",
    ]


def test_the_page_belongs_to_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "paper", tmp_path / "copy")
    assert check_output(tmp_path / "copy", overwrite=True) == tmp_path / "copy"


# --- histograms of scores -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_histograms_count_every_score_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.exp(rng.normal(size=200) * 3)
    scores[:3] = 0
    removed = rng.random(200) < 0.4
    found = _histogram(torch.tensor(scores), torch.tensor(removed))
    edges = np.array(found["edges"])
    low, high = scores[scores > 0].min(), scores.max()
    assert edges[[0, -1]].tolist() == [low, high]
    np.testing.assert_allclose(np.diff(np.log(edges)), np.log(high / low) / 24, rtol=1e-9)
    for name, chosen in (("kept", ~removed), ("removed", removed)):
        part = scores[chosen]
        counts, _ = np.histogram(part[part > 0], bins=edges)
        counts[0] += (part == 0).sum()
        assert found[name] == counts.tolist()


def test_a_score_on_an_edge_counts_above_it_but_for_the_highest() -> None:
    scores = torch.tensor([1.0, 2.0**12, 2.0**24], dtype=torch.float64)
    found = _histogram(scores, torch.tensor([False, True, False]))
    kept, removed = found["kept"], found["removed"]
    assert (kept[0], kept[-1], sum(kept)) == (1, 1, 2)
    middle = found["edges"][12]
    assert removed.index(1) == (12 if middle <= 2.0**12 else 11)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_equal_scores_are_in_one_bin(value: float) -> None:
    found = _histogram(torch.full((5,), value), torch.tensor([True, False, False, False, True]))
    assert found == {"edges": [value, value], "kept": [3], "removed": [2]}
