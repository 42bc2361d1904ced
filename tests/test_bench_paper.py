"""The papers' tables: all are there, they resume, and stand beside what the papers print."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers

import lorap
from bench.models import SHAPES, Shape
from bench.paper import cost, data, known, measures, printing, runner, studies
from bench.paper.__main__ import listing, main
from bench.paper.data import SAMPLED, Data
from bench.paper.studies import STUDIES, Cell, Request
from bench.sampling import sample_ids
from lorap.config import CompressionConfig
from lorap.errors import LorapError, UsageError
from lorap.plan import draft_plan
from tests.tiny_models import save_tiny_checkpoint

TABLES = [f"table{number}" for number in (1, 2, 3, 4, 5, 6, 7, 8, 13)]
NAMES = [*TABLES, *(f"fig{number}" for number in range(2, 7)), "seeds", "generations", "mgaa"]


pytestmark = pytest.mark.usefixtures("loud_transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and text for it."""
    folder = tmp_path_factory.mktemp("paper")
    save_tiny_checkpoint(folder / "model", max_position_embeddings=128)
    for seed, name in enumerate(("first", "second")):
        words = np.random.default_rng(seed).integers(3, 90, (150, 8))
        rows = (" ".join(f"w{word}" for word in row) for row in words)
        (folder / f"{name}.txt").write_text("\n".join(rows))
    return folder


def words_for(place: Path, name: str, output: Path, *more: str) -> list[str]:
    texts = ["--calibration", f"{place}/first.txt", "--eval", f"{place}/second.txt"]
    return [name, "--model", f"{place}/model", *texts, "--output", str(output), *more]


def no_sources(place: Path, **more: Any) -> Data:
    return Data(str(place / "model"), place, **more)


def table(output: Path, name: str) -> list[dict[str, str]]:
    with open(output / f"{name}.csv", newline="") as content:
        return list(csv.DictReader(content))


# --- what there is -------------------------------------------------------------------------------


def test_every_name_is_there_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(STUDIES) == NAMES
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = {line.split()[0]: line.split()[1] for line in lines[: len(NAMES)]}
    assert list(found) == NAMES
    assert [name for name, where in found.items() if where == "hub"] == ["table2", "table3"]
    for source in ("bookcorpus", "wikitext2 ptb", "yahma/alpaca-cleaned", "paper"):
        assert source in listing()


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_can_be_asked_for(name: str, place: Path) -> None:
    study = STUDIES[name]
    source = no_sources(place)
    recovery = lorap.RecoveryConfig().to_dict()
    cells = study.cells(Request(source, recovery=recovery), study.ratios)
    keys = [json.dumps([cell.measure.__name__, cell.arguments], sort_keys=True) for cell in cells]
    assert len(set(keys)) == len(keys) > 0, "each measures something of its own"
    labels = [json.dumps(cell.labels) for cell in cells]
    assert len(set(labels)) == len(labels)
    for cell in cells:
        settings = cell.arguments.get("settings")
        if settings is not None:
            config = measures.configured(settings)
            model = transformers.LlamaConfig(num_hidden_layers=2)
            draft_plan(model, source.family, config)
        if "recovery" in cell.arguments:
            lorap.RecoveryConfig(**cell.arguments["recovery"])


def test_each_study_asks_for_what_the_paper_varies(place: Path) -> None:
    def settings(name: str, field: str) -> list[Any]:
        cells = STUDIES[name].cells(Request(no_sources(place)), (0.5,))
        configs = [
            measures.configured(cell.arguments["settings"])
            for cell in cells
            if cell.arguments["settings"]
        ]
        assert {config.ratio for config in configs} <= {0.5, None}
        return list(dict.fromkeys(getattr(config, field) for config in configs))

    assert settings("table5", "least_important") == [0, 0.005, 0.01, 0.02, 0.05]
    assert settings("table6", "allocation") == [1, 2, 3, 4, 5]
    assert settings("table7", "aggregation") == ["l1", "l2", "linf"]
    assert settings("table8", "sublayers") == [("mha",), ("ffn",)]
    assert settings("table8", "mha") == ["heads", "svd", "afm", "awsvd"]
    assert settings("table8", "ffn") == ["channels", "svd", "afm", "awsvd"]
    assert settings("fig5", "samples") == [4, 16, 64, 128, 256, 512, 1024, 2048]
    assert settings("fig5", "seqlen") == [128, 16, 32, 64], "as far as the positions go"
    assert settings("seeds", "seed") == list(range(10))
    assert STUDIES["fig6"].ratios == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    alphas = [config for config in settings("mgaa", "mgaa_alpha") if config]
    assert sorted(alphas) == [0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5]


def test_one_matrix_alone_leaves_the_others(place: Path) -> None:
    source = no_sources(place)
    cells = STUDIES["fig4"].cells(Request(source), (0.5,))
    assert [cell.labels["matrix"] for cell in cells] == ["dense", "q", "k", "v", "o"]
    for cell in cells[1:]:
        plan = draft_plan(
            source.config, source.family, measures.configured(cell.arguments["settings"])
        )
        for layer in plan.layers:
            factored = [name for name, module in layer.items() if module.kind != "dense"]
            assert factored == [source.family.attention[cell.labels["matrix"]]]
            (name,) = factored
            assert layer[name].parameters <= 0.5 * layer[name].compressible


# --- what the papers print -----------------------------------------------------------------------


def test_the_paper_s_table_2() -> None:
    assert len(known.TABLE_2) == 15
    by_label = {(row["ratio"], row["tuned"], row["method"]): row for row in known.TABLE_2}
    ours = by_label[0.5, "no", "LoRAP"]
    assert (ours["paper: WikiText2"], ours["paper: PTB"]) == (56.96, 87.71)
    for row in known.TABLE_2:
        tasks = [row[f"paper: {task}"] for task in lorap.evaluation.PAPER_METRICS]
        assert sum(tasks) / 7 == pytest.approx(row["paper: mean of tasks"], abs=1e-4)
    assert "paper: PTB" not in by_label[0.2, "yes", "LoRAShear"]


def test_the_paper_s_values_stand_beside_ours() -> None:
    row = {"ratio": 0.2, "tuned": "no", "method": "LoRAP", "perplexity, x": 9.0, "picture": [1]}
    columns, rows = printing.beside([row], STUDIES["table2"])
    assert columns[:4] == ["ratio", "tuned", "method", "perplexity, x"]
    assert all(name.startswith("paper: ") for name in columns[4:])
    assert "picture" not in columns
    assert (rows[0]["perplexity, x"], rows[0]["paper: WikiText2"]) == (9.0, 15.69)
    assert len(rows) == 7, "those of the paper that are of 20% behind"
    assert {row["method"] for row in rows[1:]} == {"LLM-Pruner", "LoRAPrune", "LoRAShear", "LoRAP"}
    assert {row["ratio"] for row in rows} == {0.2}
    text = printing.markdown(columns, rows)
    first = text.splitlines()[2]
    assert first.startswith("| 20% | no | LoRAP | 9.000 | 15.690 | 25.860 | 71.93% |")


def test_the_factors_of_table_13_are_the_plan_s(place: Path) -> None:
    for shape, factor in known.FACTORS.items():
        (row,) = measures.planned(no_sources(place), settings={"ratio": 0.2}, shape=shape)
        assert row["factor"] == pytest.approx(factor, abs=5e-6)
        assert row["removed"] == pytest.approx(0.2, abs=1e-3)


def test_the_sizes_of_llama_7b_are_the_authors(place: Path) -> None:
    cells = STUDIES["table4"].cells(Request(no_sources(place)), ())
    assert [cell.labels["model"] for cell in cells] == ["llama-7b"] * 4
    for cell in cells:
        (row,) = cell.measure(no_sources(place), **cell.arguments)
        expected = known.PARAMETERS[cell.labels["ratio"]]
        assert row["parameters"] == pytest.approx(expected, abs=5e4)


def test_mean_and_deviation_by_hand() -> None:
    rows = [
        {"ratio": 0.2, "seed": seed, "removed": 0.2, "perplexity, x": value}
        for seed, value in enumerate((1.0, 2.0, 3.0))
    ]
    summary = STUDIES["seeds"].summary
    assert summary is not None
    assert summary(rows) == [
        {"ratio": 0.2, "seed": "mean", "perplexity, x": 2.0},
        {"ratio": 0.2, "seed": "deviation", "perplexity, x": 1.0},
    ]
    _, joined = printing.beside(rows, STUDIES["seeds"])
    assert joined[3]["paper: WikiText2"] == 15.734


# --- running -------------------------------------------------------------------------------------


def test_a_table_end_to_end_and_resumed(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = words_for(place, "table7", tmp_path, "--ratios", "0.3")
    original = lorap.evaluate_perplexity
    calls: list[str] = []

    def noted(model: str, source: str) -> Any:
        calls.append(model)
        if len(calls) == 3:
            raise LorapError("the power failed")
        return original(model, source)

    monkeypatch.setattr(lorap, "evaluate_perplexity", noted)
    assert main(words) == 1
    assert len(list((tmp_path / "cells").glob("*.json"))) == 2, "stored as soon as finished"
    assert main(words) == 0
    assert len(calls) == 5, "two cells, one that failed, and the two that were left"
    first = capsys.readouterr()
    assert "on LLaMA-7B" in first.err
    assert "2 of them stored" in first.err
    rows = table(tmp_path, "table7")
    assert [(row["ratio"], row["aggregation"]) for row in rows] == [
        ("0.0", "dense"), ("0.3", "l1"), ("0.3", "l2"), ("0.3", "linf"),
    ]  # fmt: skip
    assert "Table 7: comparable at 20%, l2 clearly better at 50%" in first.out
    assert first.out == (tmp_path / "table7.md").read_text() + "\n"

    # By hand, without the runner.
    config = CompressionConfig(ratio=0.3)
    report = lorap.compress_checkpoint(
        place / "model", tmp_path / "small", config, calibration=f"{place}/first.txt"
    )
    found = original(str(tmp_path / "small"), f"{place}/second.txt").perplexity
    assert float(rows[2]["perplexity, second"]) == pytest.approx(found, rel=1e-6)
    assert int(rows[2]["parameters"]) == report["parameters"]["after"]
    assert float(rows[2]["removed"]) == pytest.approx(report["achieved_ratio"])
    dense = original(str(place / "model"), f"{place}/second.txt").perplexity
    assert float(rows[0]["perplexity, second"]) == pytest.approx(dense, rel=1e-6)

    assert main(words) == 0
    assert len(calls) == 5, "nothing is measured twice"
    assert capsys.readouterr().out == first.out
    # Fig. 6 is made of the dense model and the default, whatever it calls them.
    assert main(words_for(place, "fig6", tmp_path, "--ratios", "0.3")) == 0
    assert len(calls) == 5
    assert table(tmp_path, "fig6")[1]["perplexity, second"] == rows[2]["perplexity, second"]
    ElementTree.parse(tmp_path / "fig6.svg")
    assert main([*words, "--again"]) == 0
    assert len(calls) == 5 + 4


def test_cells_know_their_data_by_its_contents(place: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    names = []
    cell = Cell({}, measures.quality, {"settings": {"ratio": 0.5}})
    for content in ("a b", "a b c"):
        text.write_text(content)
        data._identity.cache_clear()
        store = runner.Store(tmp_path, no_sources(place, calibration=str(text)))
        names.append(store.name(cell))
    assert names[0] != names[1]
    renamed = dataclasses.replace(cell, labels={"method": "another"})
    assert store.name(renamed) == names[1]
    other = dataclasses.replace(cell, arguments={"settings": {"ratio": 0.4}})
    assert store.name(other) != names[1]


def test_a_setting_that_is_refused_is_a_row(place: Path, tmp_path: Path) -> None:
    source = Data(str(place / "model"), tmp_path, f"{place}/first.txt", (f"{place}/first.txt",))
    (row,) = measures.quality(source, settings={"ratio": 0.99})
    assert row["note"].startswith("refused: ")
    assert "0.99" in row["note"]


# --- data ----------------------------------------------------------------------------------------


def no_tasks(names: Sequence[str]) -> None:
    raise LorapError(f"the tasks {names} cannot be had")


def test_without_the_hub_the_main_table_is_refused(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(data, "find_tasks", no_tasks)
    words = ["table2", "--model", f"{place}/model", "--output", str(tmp_path)]
    assert main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    for source in (
        "--calibration bookcorpus:", "--eval wikitext2:", "--eval ptb:",
        "--training yahma/alpaca-cleaned:", "--tasks paper: the tasks ['paper'] cannot be had",
    ):  # fmt: skip
        assert source in printed.err
    assert list((tmp_path / "cells").iterdir()) == []
    assert not (tmp_path / "table2.csv").exists()
    # What is given in the place of one is used; the others are refused as before.
    assert main([*words, "--calibration", f"{place}/first.txt", "--tasks", "none"]) == 2
    printed = capsys.readouterr()
    assert "--calibration" not in printed.err
    assert "--tasks paper" not in printed.err
    assert "--eval ptb:" in printed.err
    assert not (tmp_path / "sampled").exists()


def test_a_missing_file_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for(place, "table7", tmp_path)
    assert main([*words, "--eval", str(tmp_path / "nothing.txt")]) == 2
    assert "nothing.txt" in capsys.readouterr().err


def test_an_unknown_setting_of_recovery_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for(place, "table7", tmp_path / "new")
    assert main([*words, "--recovery", "rate=0.1"]) == 2
    error = capsys.readouterr().err
    assert "learning_rate" in error
    assert "got 'rate'" in error
    assert not (tmp_path / "new").exists()


def test_evaluations_of_one_name_are_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "first.txt").write_text("w3 w4")
    source = no_sources(place, evaluation=(f"{place}/first.txt", f"{tmp_path}/first.txt"))
    with pytest.raises(UsageError, match="different names, got first, first"):
        source.check(training=False)


def test_sampled_rows(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CALIBRATION", 4), ("EVALUATION", 6), ("LENGTH", 16)):
        monkeypatch.setattr(data, name, value)
    source = Data(str(place / "model"), tmp_path)
    source.check(training=True)
    calibration = np.load(source.calibration_source(4, 16))
    evaluation = np.load(source.evaluation_sources()[SAMPLED])
    assert (calibration.shape, evaluation.shape) == ((4, 16), (6, 16))
    # Those of bench.quality: one draw for both.
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    both = sample_ids(model, 10, 16, seed=0).numpy()
    assert (np.concatenate([calibration, evaluation]) == both).all()
    # More rows to choose from, and longer ones, are other samples; the longer go on as the shorter.
    pool = np.load(source.calibration_source(10, 16))
    longer = np.load(source.calibration_source(10, 24))
    assert (pool == longer[:, :16]).all()
    assert (pool != both).any(), "not those that are evaluated with"
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*.npy"))
    kept = source.calibration_source(10, 16)
    Path(kept).write_bytes(b"kept")
    assert Path(source.calibration_source(10, 16)).read_bytes() == b"kept", "sampled once"


# --- others --------------------------------------------------------------------------------------


def test_masks_by_hand(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Data(str(place / "model"), tmp_path, f"{place}/first.txt")
    scores: list[torch.Tensor] = []

    def noted(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        scores.append(weight.abs() * norms)
        return scores[-1]

    monkeypatch.setattr(measures, "weight_importance", noted)
    rows = measures.masks(source, roles=["q", "down"], layer=0, sparsity=0.5)
    assert [row["matrix"] for row in rows] == ["q", "down"]
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    assert [tuple(one.shape) for one in scores] == [(32, 32), (32, 48)]
    assert torch.equal(
        scores[0] == 0, model.model.layers[0].self_attn.q_proj.weight.detach().abs() == 0
    )
    kept = np.zeros(32)
    for row in scores[0].numpy():
        kept[np.argsort(row, kind="stable")[16:]] += 1
    assert rows[0]["kept in half of the inputs"] == np.sort(kept)[16:].sum() / kept.sum()
    assert np.array(rows[0]["picture"]).shape == (32, 32)


def test_chance_is_what_masks_at_random_give() -> None:
    generator = np.random.default_rng(0)
    counts = generator.binomial(400, 0.5, (2000, 64))
    upper = np.sort(counts, 1)[:, 32:].sum() / counts.sum()
    by_chance = 0.5 + 0.5 * math.sqrt(400 * 0.25) * math.sqrt(2 / math.pi) / 200
    assert upper == pytest.approx(by_chance, abs=5e-4)


def test_blocks_by_hand() -> None:
    mask = torch.zeros(2, 97, dtype=torch.bool)
    mask[0, :2] = True
    mask[:, -1] = True
    (row,) = measures._blocks(mask)
    assert len(row) == 49
    assert (row[0], row[1], row[-1]) == (0.5, 0, 1)


def test_a_mask_s_picture_is_white_where_weights_stay() -> None:
    (chart,) = studies.mask_charts([{"matrix": "q", "picture": [[0.0, 1.0], [1.0, 1.0]]}])
    paths = ElementTree.fromstring(chart.svg()).findall(".//path")
    assert [path.get("fill") for path in paths] == ["#000", "#fff"]
    assert [path.get("d", "").count("M") for path in paths] == [1, 3]


@pytest.mark.parametrize(
    ("name", "curves", "points"),
    # Of fig5, eight numbers of samples; and lengths up to the model's 128 positions.
    [("fig4", 4, [20]), ("fig5", 1, [8, 4]), ("fig6", 1, [7])],
)
def test_pictures_of_figures(name: str, curves: int, points: list[int], place: Path) -> None:
    study = STUDIES[name]
    cells = study.cells(Request(no_sources(place)), study.ratios)
    rows = [{**cell.labels, "perplexity, x": 10.0 + at} for at, cell in enumerate(cells)]
    assert study.charts is not None
    drawn = study.charts(rows)
    found = []
    for chart in drawn:
        root = ElementTree.fromstring(chart.svg())
        assert len(root.findall(".//polyline")) == curves
        found.append(len(root.findall(".//circle")))
    assert found == points
    text = printing.picture(name, study, rows)
    assert text is not None
    ElementTree.fromstring(text)


def test_rank_shares_are_the_survey_s(place: Path, tmp_path: Path) -> None:
    source = Data(str(place / "model"), tmp_path, f"{place}/first.txt")
    rows = measures.rank_shares(source, seed=0)
    assert [(row["layer"], row["method"]) for row in rows[:4]] == [
        ("mean", "SVD"), ("mean", "AWSVD"), (0, "SVD"), (0, "AWSVD"),
    ]  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model")
    weight = model.model.layers[0].self_attn.q_proj.weight.detach()
    values = torch.linalg.svdvals(weight.double()) ** 2
    retained = (values.cumsum(0) / values.sum()).numpy()
    assert rows[2]["q"] == (np.argmax(retained >= 0.8) + 1) / 32
    assert rows[0]["q"] == pytest.approx(np.mean([row["q"] for row in rows[2::2]]))


def test_sizes_time_both_models(place: Path, tmp_path: Path) -> None:
    source = Data(str(place / "model"), tmp_path, f"{place}/first.txt")
    settings = {"ratio": 0.3, "seqlen": 64}
    (row,) = measures.sizes(source, settings=settings, rounds=2)
    plan = draft_plan(source.config, source.family, CompressionConfig(ratio=0.3, seqlen=64))
    assert (row["parameters"], row["MACs"]) == (plan.parameters, plan.macs)
    assert row["time of dense"] == pytest.approx(row["ms"] / row["ms, dense"])
    assert row["ms"] > 0


def test_what_the_models_write(place: Path, tmp_path: Path) -> None:
    source = Data(str(place / "model"), tmp_path, f"{place}/first.txt", (f"{place}/second.txt",))
    rows = measures.generations(source, settings=None, prompts=[], tokens=5)
    assert len(rows) == 3
    text = " ".join((place / "second.txt").read_text().split())
    assert text.startswith(rows[0]["prompt"])
    assert len(rows[0]["prompt"].split()) >= 7
    (row,) = measures.generations(source, settings={"ratio": 0.5}, prompts=["w5 w6"], tokens=5)
    assert row["prompt"] == "w5 w6"
    assert 0 < len(row["goes on"].split()) <= 5


def test_what_is_tuned_is_recovered_and_merged(place: Path, tmp_path: Path) -> None:
    texts = {"calibration": f"{place}/first.txt", "training": f"{place}/first.txt"}
    source = no_sources(place, evaluation=(f"{place}/second.txt",), **texts)
    source = dataclasses.replace(source, folder=tmp_path)
    quick = {"epochs": 1.0, "batch": 32, "micro_batch": 32, "rank": 2, "device": "cpu"}
    (plain,) = measures.quality(source, settings={"ratio": 0.5})
    (tuned,) = measures.quality(source, settings={"ratio": 0.5}, recovery=quick)
    # Rank 2 of each factored matrix, 32 by 32; all four of three layers at this ratio.
    assert tuned["parameters"] - plain["parameters"] == 3 * 4 * 2 * 64
    assert tuned["perplexity, second"] != plain["perplexity, second"]


def test_cost_by_hand() -> None:
    model = dataclasses.replace(
        draft_plan(transformers.LlamaConfig(), _family(), CompressionConfig(ratio=0.5)),
        macs_before=1000,
        tokens=10,
    )
    dense = Cell({}, measures.quality, {"settings": None})
    assert cost.cost_of([dense], model, 7, 0) == cost.Cost(2 * 100 * 7, 0)
    settings = {"ratio": 0.5, "samples": 3, "seqlen": 5}
    small = Cell({}, measures.quality, {"settings": settings, "recovery": {"epochs": 4}})
    found = cost.cost_of([small], model, 7, 11)
    assert found.forward == 200 * (2 * 15 + 7 + 2 * 11 * 4)
    # Four square matrices of 4096 in each of 32 layers.
    assert found.float64 == pytest.approx(30 * 32 * 4 * 4096**3)
    planned = Cell({}, measures.planned, {"settings": settings, "shape": None})
    assert cost.cost_of([planned], model, 7, 11) == cost.Cost(0, 0)


def _family() -> Any:
    from lorap.families import family_of

    return family_of(transformers.LlamaConfig())


def test_llama_30b_has_its_parameters() -> None:
    shape: Shape = SHAPES["llama-30b"]
    layer = 4 * shape.hidden**2 + 3 * shape.hidden * shape.width + 2 * shape.hidden
    whole = shape.layers * layer + 2 * shape.vocabulary * shape.hidden + shape.hidden
    # 32.5 billion, as LLaMA's own paper has it.
    assert whole == pytest.approx(32.5e9, rel=2e-3)
