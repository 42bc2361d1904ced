"""``lorap compare``: compressed models side by side, from their reports and evaluations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import lorap
from lorap import cli, comparison
from lorap.checkpoint.files import EVALUATION, REPORT
from lorap.errors import UsageError
from tests.tiny_models import save_tiny_checkpoint

SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {"ratio": 0.3},
    "factors": {"ratio": 0.5, "ffn": "svd", "mha": "pca", "joint_qk": True, "multiple_of": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    save_tiny_checkpoint(folder / "model")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, 96, (4, 16)))
    for name, settings in SETTINGS.items():
        config = lorap.CompressionConfig(samples=4, seqlen=16, device="cpu", **settings)
        lorap.compress_checkpoint(
            folder / "model", folder / name, config, calibration=str(folder / "ids.npy")
        )
    lorap.evaluate(
        folder / "paper",
        perplexity=str(folder / "ids.npy"),
        seqlen=8,
        baseline=str(folder / "model"),
        device="cpu",
        card=True,
    )
    return folder


def said(folder: Path, file: str = REPORT) -> Any:
    return json.loads((folder / file).read_text())


def run(*words: object) -> Any:
    return CliRunner().invoke(cli.app, ["compare", *map(str, words)])


def test_numbers_are_those_of_the_reports(folder: Path) -> None:
    found = lorap.compare([folder / name for name in SETTINGS])
    for model, name in zip(found.models, SETTINGS, strict=True):
        report = said(folder / name)
        assert model["folder"] == str(folder / name)
        assert model["ratio"]["achieved"] == report["achieved_ratio"]
        assert (model["parameters"], model["macs"]) == (report["parameters"], report["macs"])
        for key, told in (("errors", "relative_weighted_error"), ("energies", "retained_energy")):
            for role, mean in model[key].items():
                values = []
                for layer in report["layers"]:
                    for module, about in layer["modules"].items():
                        value = about.get(told)
                        if isinstance(value, dict):
                            values += [value[role]] if role in value else []
                        elif value is not None and module.endswith((f".{role}_proj", role)):
                            values.append(value)
                assert 0 < len(values) <= 3
                assert mean == pytest.approx(sum(values) / len(values))
    assert list(found.models[0]["errors"]) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert {"qk", "gate", "down"} <= found.models[1]["errors"].keys()


def test_evaluations_are_put_in_where_there_are_any(folder: Path) -> None:
    first, second = lorap.compare([folder / "paper", folder / "factors"]).models
    (entry,) = said(folder / "paper", EVALUATION)["perplexity"]
    ((name, values),) = first["perplexity"].items()
    assert name == "perplexity, ids.npy, 8 tokens, 56 targets"
    assert values == {
        "value": entry["result"]["perplexity"],
        "baseline": entry["baseline"]["perplexity"],
    }
    assert second["perplexity"] == {}


def test_the_table_has_a_cell_for_each_model(folder: Path) -> None:
    names = [folder / name for name in SETTINGS]
    done = run(*names)
    assert done.exit_code == 0, (done.stderr, done.exception)
    rows = dict(lorap.compare(names).rows())
    reports = [said(name) for name in names]
    assert rows["parameters"] == [f"{report['parameters']['after']:,}" for report in reports]
    assert rows["ratio asked"] == ["30.00%", "50.00%"]
    assert rows["method"] == [
        "awsvd + channels, allocation 3",
        "pca + svd + joint qk, allocation 3, multiples of 2",
    ]
    assert rows["error, qk"][0] == ""
    best = said(folder / "paper")
    best["settings"] |= {"selection": "obs", "update": "least-squares", "dense_target": 0.5}
    assert comparison._method(best["settings"]) == (
        "awsvd + channels, allocation 3, obs, least-squares, dense target 0.5"
    )
    assert "recovered" not in rows
    lines = done.stdout.splitlines()
    assert lines[0].split() == [str(name) for name in names]
    for (name, cells), line in zip(lorap.compare(names).rows(), lines[1:], strict=True):
        assert line.startswith(name)
        assert line.split()[-len(" ".join(cells).split()) :] == " ".join(cells).split()
    assert json.loads(run(*names, "--json").stdout) == lorap.compare(names).to_dict()


def test_tasks_and_protocols_stay_apart(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "factors", tmp_path / "a")
    score = {"value": 0.5, "stderr": 0.1}
    result = {
        "results": {"boolq": {"acc": score, "acc_norm": score}, "piqa": {"acc": score}},
        "mean": 0.5,
        "mean_of": {"boolq": "acc"},
        "limit": 10,
    }
    other = {"results": {"piqa": {"acc": {"value": 0.75, "stderr": None}}}, "mean": 0.25}
    asked = {"source": "c4", "split": "validation", "seqlen": 8}
    perplexities = [
        {"result": asked | {"tokens": tokens, "perplexity": 2.0}, "baseline": None}
        for tokens in (56, 64)
    ]
    (tmp_path / "a" / EVALUATION).write_text(
        json.dumps({"perplexity": perplexities, "tasks": [{"result": result, "baseline": other}]})
    )
    (model,) = lorap.compare([tmp_path / "a"]).models
    assert model["tasks"] == {
        "boolq, acc, first 10": {"value": 0.5, "baseline": None},
        "piqa, acc, first 10": {"value": 0.5, "baseline": 0.75},
        "mean of the paper's seven, first 10": {"value": 0.5, "baseline": 0.25},
    }
    assert list(model["perplexity"]) == [
        "perplexity, c4 validation, 8 tokens, 56 targets",
        "perplexity, c4 validation, 8 tokens, 64 targets",
    ]


def test_means_are_of_the_layers_that_have_a_value(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "paper", tmp_path / "a")
    report = said(tmp_path / "a")
    for layer, error in zip(report["layers"], (0.25, None, 0.75), strict=True):
        module = layer["modules"]["self_attn.q_proj"]
        del module["relative_weighted_error"]
        if error is not None:
            module["relative_weighted_error"] = error
    (tmp_path / "a" / REPORT).write_text(json.dumps(report))
    (model,) = lorap.compare([tmp_path / "a"]).models
    assert model["errors"]["q"] == 0.5


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (REPORT, None, "holds no lorap_report.json"),
        (REPORT, "{", "not readable as a report"),
        (REPORT, "[]", "not readable as a report"),
        (REPORT, "{}", "expected format_version 1, got None"),
        (REPORT, '{"format_version": 1}', "not the report of a compression: KeyError"),
        (EVALUATION, "{", "expected the results of evaluations"),
        (EVALUATION, '{"perplexity": [{}], "tasks": []}', "expected the results of evaluations"),
    ],
)
def test_what_is_no_result_of_lorap_is_refused(
    folder: Path, tmp_path: Path, file: str, text: str | None, message: str
) -> None:
    shutil.copytree(folder / "paper", tmp_path / "a")
    if text is None:
        (tmp_path / "a" / file).unlink()
    else:
        (tmp_path / "a" / file).write_text(text)
    with pytest.raises(UsageError, match=message):
        lorap.compare([folder / "factors", tmp_path / "a"])
    assert run(tmp_path / "a").exit_code == 2
    assert run().exit_code == 2
