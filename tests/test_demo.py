"""The demonstration on the embedded model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lorap import demo
from lorap.cli import app
from lorap.demo import DemoResult, run_demo
from lorap.errors import UsageError

RECORD = json.loads((demo.FOLDER / "embedded.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo") / "small")


def test_a_fifth_is_removed_and_the_perplexity_hardly_rises(result: DemoResult) -> None:
    original, compressed = result.original, result.compressed
    assert original.parameters == RECORD["parameters"]
    assert result.achieved_ratio == 1 - compressed.parameters / original.parameters
    assert result.achieved_ratio == pytest.approx(0.2, abs=0.01)
    assert original.perplexity == pytest.approx(RECORD["heldout_perplexity"], rel=1e-3)
    assert original.perplexity < compressed.perplexity < 1.5 * original.perplexity


def test_the_folder_is_what_was_measured(result: DemoResult) -> None:
    folder = Path(result.output)
    report = json.loads((folder / result.report).read_text())
    assert report["parameters"]["after"] == result.compressed.parameters
    assert report["settings"]["ratio"] == result.ratio
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.num_parameters() == result.compressed.parameters
    assert model.dtype == torch.bfloat16


def test_both_models_write(result: DemoResult) -> None:
    assert all(len(side.continuation) > 20 for side in (result.original, result.compressed))


def test_the_command(result: DemoResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def known(output: str, *, overwrite: bool, progress: object) -> DemoResult:
        asked.append((output, overwrite))
        return result

    monkeypatch.setattr(demo, "run_demo", known)
    shown = CliRunner().invoke(app, ["demo", "--output", str(tmp_path), "--overwrite"]).stdout
    assert asked == [(str(tmp_path), True)]
    for fragment in (
        f"{result.original.parameters:,}",
        f"{result.compressed.parameters:,}",
        f"{result.original.perplexity:.3f}",
        f"{result.compressed.perplexity:.3f}",
        result.protocol,
        result.original.continuation.splitlines()[0],
        result.compressed.continuation.splitlines()[0],
        f"({result.report}) are in {result.output}",
    ):
        assert fragment in shown
    as_json = json.loads(CliRunner().invoke(app, ["demo", "--json"]).stdout)
    assert as_json["compressed"]["perplexity"] == result.compressed.perplexity


def test_an_older_result_is_kept_unless_told(result: DemoResult, tmp_path: Path) -> None:
    shutil.copytree(result.output, tmp_path / "small")
    with pytest.raises(UsageError, match="exists already"):
        run_demo(tmp_path / "small")
