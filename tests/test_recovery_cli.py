"""``lorap recover`` and ``lorap merge`` on the command line: what they print, and how they fail."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import lorap
from lorap import cli
from lorap.recovery import RecoveryConfig
from tests.tiny_models import save_tiny_checkpoint

QUICK = (
    "--epochs", "1", "--batch", "4", "--micro-batch", "2", "--learning-rate", "0.01",
    "--cutoff", "16", "--device", "cpu",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("loud_transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recovery-cli")
    save_tiny_checkpoint(folder / "model")
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, 96, (4, 16)))
    config = lorap.CompressionConfig(ratio=0.5, samples=4, seqlen=16, device="cpu")
    lorap.compress_checkpoint(
        folder / "model", folder / "small", config, calibration=str(folder / "ids.npy")
    )
    rows = [{"instruction": f"w{n}", "output": f"w{n + 1} w{n + 2}"} for n in range(30)]
    (folder / "data.json").write_text(json.dumps(rows))
    texts = [{"text": f"w{n} w{n + 1} w{n + 2}"} for n in range(30)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def invoke(*words: object) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def recover(place: Path, output: Path, *words: object, data: str = "texts.jsonl") -> Any:
    source = ("--data", place / data, "--output", output)
    return invoke("recover", place / "small", *source, *QUICK, *words)


def test_recover_and_merge(place: Path, tmp_path: Path) -> None:
    result = recover(place, tmp_path / "adapter")
    assert result.exit_code == 0, (result.stderr, result.exception)
    words = (line.partition(" ") for line in result.stdout.splitlines())
    lines = {first: rest.strip() for first, _, rest in words}
    assert lines["data"].startswith("27 examples of file texts.jsonl")
    assert lines["data"].endswith("3 more for validation")
    assert lines["steps"] == "7 of 4 samples"
    assert "before" in lines["validation"]
    assert lines["next:"].startswith("lorap merge")
    assert "before training: validation loss" in result.stderr
    assert "step 2: training loss" in result.stderr

    merged = invoke("merge", place / "small", tmp_path / "adapter", "--output", tmp_path / "exact")
    assert merged.exit_code == 0, (merged.stderr, merged.exception)
    assert "% more" in merged.stdout
    assert "dense now" in merged.stdout
    same = invoke(
        "merge", place / "small", tmp_path / "adapter", "--output", tmp_path / "same",
        "--mode", "same-size", "--device", "cpu", "--json",
    )  # fmt: skip
    assert same.exit_code == 0, (same.stderr, same.exception)
    report = json.loads(same.stdout)
    assert report["recovery"]["merge"]["mode"] == "same-size"
    assert report["recovery"]["merge"]["command"].startswith("lorap merge ")
    assert report["recovery"]["training"]["command"].startswith("lorap recover ")
    again = invoke("merge", place / "small", tmp_path / "adapter", "--output", tmp_path / "same")
    assert (again.exit_code, again.stdout) == (2, "")
    assert "--overwrite replaces it" in again.stderr


def test_json_is_all_that_stdout_holds(place: Path, tmp_path: Path) -> None:
    result = recover(place, tmp_path / "adapter", "--json", "--on", "factors")
    assert result.exit_code == 0, (result.stderr, result.exception)
    record = json.loads(result.stdout)
    assert record["settings"] == json.loads(
        json.dumps(
            RecoveryConfig(
                on="factors", learning_rate=0.01, batch=4, micro_batch=2,
                epochs=1, cutoff=16, device="cpu",
            ).to_dict()
        )
    )  # fmt: skip


def test_defaults_are_those_of_the_settings() -> None:
    (command,) = (
        c for c in cli.app.registered_commands if c.callback is not None
        and c.callback.__name__ == "recover"
    )  # fmt: skip
    defaults = command.callback.__defaults__ or ()  # type: ignore[union-attr]
    names = command.callback.__code__.co_varnames[: command.callback.__code__.co_argcount]  # type: ignore[union-attr]
    found = dict(zip(names[-len(defaults) :], defaults, strict=True))
    settings = RecoveryConfig().to_dict()
    assert settings.items() <= found.items()


def test_prompts_that_fill_the_cutoff_leave_nothing(place: Path, tmp_path: Path) -> None:
    result = recover(place, tmp_path / "adapter", data="data.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "have no token to predict within 16 tokens" in result.stderr
    result = recover(place, tmp_path / "adapter", "--cutoff", "64", data="data.json")
    assert result.exit_code == 0, (result.stderr, result.exception)


def test_a_process_that_is_not_the_first_says_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lorap, "recover", lambda *_, **__: {})
    monkeypatch.setenv("RANK", "1")
    result = recover(place, tmp_path / "adapter")
    assert (result.exit_code, result.stdout) == (0, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--rank", "0"), "rank: expected a whole number of at least 1, got 0"),
        (("--alpha", "nan"), "alpha: expected a number, got nan"),
        (("--on", "heads"), "on: expected one of matrices, factors, got 'heads'"),
        (("--batch", "3"), "batch 3: expected a multiple of the 2 samples of a micro-batch"),
        (("--dtype", "float16"), "dtype float16: on a CPU expected float32 or bfloat16"),
        (("--field", "body"), "no field 'body'"),
        (("--dropout", "1"), "dropout: expected a share of at least 0 and below 1"),
    ],
)
def test_options_that_cannot_be_used(
    place: Path, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    result = recover(place, tmp_path / "adapter", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_and_resume(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lorap.recover

    def interrupted(*given: Any, progress: Any, **options: Any) -> Any:
        def notify(done: int, total: int) -> None:
            progress(done, total)
            if done == 3:
                os.kill(os.getpid(), signal.SIGINT)

        return real(*given, progress=notify, **options)

    with monkeypatch.context() as patch:
        patch.setattr(lorap, "recover", interrupted)
        result = recover(place, tmp_path / "adapter")
    assert (result.exit_code, result.stdout) == (130, "")
    assert "interrupted; step " in result.stderr
    assert "is saved: the same command with --resume goes on from there" in result.stderr
    refused = recover(place, tmp_path / "adapter")
    assert refused.exit_code == 2
    assert "--resume goes on with it" in refused.stderr
    result = recover(place, tmp_path / "adapter", "--resume")
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert "going on after step" in result.stderr
