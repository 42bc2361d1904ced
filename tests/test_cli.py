"""The command line where all is well: output, JSON, recipes, progress, imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from typer.main import get_command
from typer.testing import CliRunner

import lorap
from lorap import cli
from lorap.config import PRESETS, RUN_OPTIONS, CompressionConfig
from lorap.data import NAMED_SOURCES
from lorap.wording import spans
from tests.tiny_models import save_tiny_checkpoint

COMMANDS: dict[str, Any] = get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    save_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(3, 96, (4, 16)))
    return file


pytestmark = pytest.mark.usefixtures("loud_transformers")


def run(*words: object) -> Any:
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def compress(model: Path, ids: Path, output: Path, *words: object) -> Any:
    data = ("--calibration", ids, "--samples", 4, "--seqlen", 16, "--device", "cpu")
    return run("compress", model, "--output", output, *data, *words)


# --- help, version, imports -----------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize(
    "command", [None, "plan", "compress", "inspect", "compare", "evaluate", "export", "demo"]
)
def test_help_everywhere(command: str | None, flag: str) -> None:
    shown = run(*([command] if command else []), flag).stdout
    if command is None:
        assert all(name in shown for name in COMMANDS)
    else:
        assert all(option in shown for p in COMMANDS[command].params for option in p.opts[:1])


@pytest.mark.parametrize("command", ["compress", "inspect", "evaluate"])
def test_help_names_every_named_source(command: str) -> None:
    assert all(name in run(command, "-h").stdout for name in NAMED_SOURCES)


def test_every_setting_is_an_option_or_a_list_in_the_recipe() -> None:
    names = {parameter.name for parameter in COMMANDS["compress"].params}
    settings = {field for field in CompressionConfig.__dataclass_fields__ if field != "overrides"}
    assert settings | set(RUN_OPTIONS) <= names
    assert names - settings - set(RUN_OPTIONS) == {"model", "config", "preset", "as_json"}


def test_defaults_in_the_help_are_those_of_the_settings() -> None:
    shown = {p.name: p.show_default for p in COMMANDS["compress"].params}
    defaults = CompressionConfig()
    texts = ("ratio_scope", "mha", "ffn", "importance", "aggregation", "weighting", "device")
    for name in (*texts, "selection", "update"):
        assert shown[name] == getattr(defaults, name)
    for name in ("samples", "seqlen", "seed", "multiple_of", "refine"):
        assert shown[name] == str(getattr(defaults, name))
    shares = ("allocation", "least_important", "asvd_alpha", "mgaa_alpha", "mgaa_floor", "ridge")
    for name in shares:
        assert float(shown[name]) == getattr(defaults, name)
    assert (shown["joint_qk"], defaults.joint_qk) == ("no", False)
    assert (shown["dense_target"], defaults.dense_target) == ("off", None)
    assert shown["sublayers"] == ",".join(defaults.sublayers)


@pytest.mark.parametrize("words", [["--help"], ["compress", "--help"], ["--version"]])
def test_help_and_version_import_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['lorap', *{words!r}]\n"
        "from lorap.cli import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    assert not error.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'datasets', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_version_and_the_module_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lorap", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"lorap {lorap.__version__}\n"


# --- plan -----------------------------------------------------------------------------------------


def test_a_sublayer_that_loses_nothing_is_told() -> None:
    few_heads = Path(lorap.__file__).parent / "demo" / "model"
    result = run("plan", few_heads, "--ratio", 0.3, "--mha", "heads", "--json")
    assert "warning: nothing is removed from attention" in result.stderr
    assert json.loads(result.stdout)["layers"]
    assert "warning" not in run("plan", few_heads, "--ratio", 0.3).stderr


def test_plan_as_json_is_the_plan(model: Path) -> None:
    shown = json.loads(run("plan", model, "--ratio", 0.3, "--seqlen", 16, "--json").stdout)
    expected = lorap.plan_checkpoint(str(model), CompressionConfig(ratio=0.3, seqlen=16))
    assert shown == expected.to_dict()
    assert list(shown) == [
        "ratio",
        "ratio_scope",
        "layer_ratio",
        "achieved_ratio",
        "parameters",
        "macs",
        "estimate",
        "layers",
    ]


def test_plan_needs_no_weights(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    alone = run("plan", tmp_path, "--ratio", 0.3, "--json").stdout
    assert alone == run("plan", model, "--ratio", 0.3, "--json").stdout


def test_plan_of_llama_7b_is_the_table_of_the_authors(tmp_path: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path)
    words = ("plan", tmp_path, "--ratio", 0.2, "--ratio-scope", "layer")
    shown = json.loads(run(*words, "--json").stdout)
    layers = [layer["modules"] for layer in shown["layers"]]
    assert layers[0]["self_attn.q_proj"]["rank"] == 1228
    assert layers[31]["self_attn.v_proj"]["kind"] == "dense"
    assert layers[31]["mlp"]["width"] == 8807
    assert round(shown["achieved_ratio"], 4) == 0.1922
    table = run(*words).stdout
    assert "0-31" in table
    assert "rank 1228" in table
    assert "width 8807" in table
    assert "19.22% of all parameters removed; 20.00% of the layers' parameters asked" in table
    assert "6,738,415,616 -> " in table
    assert re.search(r"peak memory \d+\.\d\d GiB \(cpu\).*, estimated; hidden states", table)
    assert re.search(r"files +\d+\.\d\d GiB read and \d+\.\d\d GiB written, estimated", table)


def test_equal_layers_are_grouped_wherever_they_are(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("overrides: [{match: layers.1, skip: true}]\nratio: 0.2\n")
    table = run("plan", model, "--config", recipe).stdout
    assert "0, 2" in table
    assert sum("mlp" in line for line in table.splitlines()) == 2


def test_counts_and_times_in_words() -> None:
    counts = (7, 999, 1000, 999_949, 999_960, 1_234_567, 10**9, 2 * 10**15)
    assert [cli._short(n) for n in counts] == [
        "7",
        "999",
        "1k",
        "999.9k",
        "1M",
        "1.235M",
        "1G",
        "2000T",
    ]
    times = (0.04, 9.94, 59.4, 59.6, 3599.4, 3600, 7260)
    assert [cli._duration(t) for t in times] == [
        "0.0 s",
        "9.9 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
        "2 h 1 min",
    ]
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


# --- compress -------------------------------------------------------------------------------------


def test_summary_ends_with_the_next_command(model: Path, ids: Path, tmp_path: Path) -> None:
    output = tmp_path / "a folder"
    result = compress(model, ids, output, "--ratio", 0.3)
    report = json.loads((output / "lorap_report.json").read_text())
    lines = result.stdout.splitlines()
    assert lines[-1] == f"next: lorap evaluate '{output}' --perplexity wikitext2"
    assert f"{report['parameters']['before']:,} -> {report['parameters']['after']:,}" in lines[1]
    assert f"{report['achieved_ratio']:.2%} of all parameters removed; 30.00% asked" in lines[0]
    assert lines[-3] == f"report       {output / 'lorap_report.html'}"
    for word in ("time", "peak memory", "output"):
        assert any(line.startswith(word) for line in lines)
    assert "3 of 3 layers" in result.stderr
    assert report["command"].startswith(f"lorap compress {model} --output '{output}'")


def test_json_is_the_report_and_alone_on_stdout(model: Path, ids: Path, tmp_path: Path) -> None:
    result = compress(model, ids, tmp_path / "o", "--ratio", 0.3, "--json")
    assert json.loads(result.stdout) == json.loads(
        (tmp_path / "o" / "lorap_report.json").read_text()
    )


OPTIONS: list[dict[str, Any]] = [
    {
        "ratio": 0.25,
        "ratio_scope": "layer",
        "allocation": 2.0,
        "weighting": "eq6",
        "sublayers": "mha",
        "joint_qk": True,
        "samples": 3,
        "seqlen": 8,
        "seed": 7,
        "batch_size": 2,
        "device": "cpu",
        "activations": "disk",
        "dtype": "float64",
    },
    {
        "mha": "heads",
        "least_important": 0.05,
        "aggregation": "l1",
        "importance": "taylor",
    },
    {
        "selection": "obs",
        "update": "least-squares",
        "dense_target": 0.5,
        "refine": 2,
        "ridge": 0.01,
    },
    {
        "mha": "pca",
        "ffn": "asvd",
        "asvd_alpha": 1.0,
        "allocation": "mgaa",
        "mgaa_alpha": 0.2,
        "mgaa_floor": 0.5,
        "multiple_of": 2,
    },
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_reaches_the_report(
    options: dict[str, Any], model: Path, ids: Path, tmp_path: Path
) -> None:
    small = {"ratio": 0.3, "samples": 4, "seqlen": 16, "dtype": "float32", "device": "cpu"}
    options = small | options
    words = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))
    ]
    run("compress", model, "--output", tmp_path / "o", "--calibration", ids, *words)
    settings = json.loads((tmp_path / "o" / "lorap_report.json").read_text())["settings"]
    if "sublayers" in options:
        options["sublayers"] = options["sublayers"].split(",")
    assert settings == CompressionConfig().to_dict() | options
    weights = load_file(tmp_path / "o" / "model-00001-of-00004.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.parametrize("in_recipe", [False, True])
def test_a_preset_is_recorded_as_what_it_stands_for(
    in_recipe: bool, model: Path, ids: Path, tmp_path: Path
) -> None:
    words: list[Any] = ["--preset", "best"]
    if in_recipe:
        (tmp_path / "recipe.yaml").write_text("preset: best\nseed: 3\n")
        words = ["--config", tmp_path / "recipe.yaml"]
    compress(model, ids, tmp_path / "o", "--ratio", 0.3, *words, "--mha", "svd")
    settings = json.loads((tmp_path / "o" / "lorap_report.json").read_text())["settings"]
    expected = {**PRESETS["best"], "mha": "svd", "ratio": 0.3}
    assert {name: settings[name] for name in expected} == expected
    assert "preset" not in settings


def test_the_options_above_are_all_that_there_are() -> None:
    given = {name for options in OPTIONS for name in options}
    assert given == set(CompressionConfig.__dataclass_fields__) - {"overrides"}


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults(
    model: Path, ids: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    content = {
        "ratio": 0.2,
        "seed": 5,
        "samples": 3,
        "seqlen": 16,
        "sublayers": ["mha", "ffn"],
        "calibration": str(ids),
        "output": str(tmp_path / "from-recipe"),
        "overwrite": True,
        "overrides": [{"match": "layers.0", "skip": True}],
    }
    recipe.write_text(yaml.safe_dump(content))
    (tmp_path / "from-recipe").mkdir()
    run("compress", model, "--config", recipe, "--ratio", 0.3, "--seed", 0)
    report = json.loads((tmp_path / "from-recipe" / "lorap_report.json").read_text())
    assert report["ratio"] == 0.3
    assert (report["settings"]["seed"], report["settings"]["samples"]) == (0, 3)
    assert report["settings"]["weighting"] == "eq7"
    assert report["settings"]["overrides"] == [{"match": "layers.0", "skip": True}]
    assert report["layers"][0]["modules"]["mlp"]["kind"] == "dense"

    refused = CliRunner().invoke(
        cli.app, ["compress", str(model), "--config", str(recipe), "--no-overwrite"]
    )
    assert refused.exit_code == 2
    assert "exists already" in refused.stderr
    run("compress", model, "--config", recipe, "--output", tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "config.json").is_file()


def test_a_recipe_that_fixes_every_module_needs_no_ratio(
    model: Path, ids: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "overrides: [{match: layers.*.self_attn, rank: 4}, {match: layers.*.mlp, width: 20}]\n"
    )
    result = compress(model, ids, tmp_path / "o", "--config", recipe)
    assert "none asked" in result.stdout
    assert "none asked" in run("plan", model, "--config", recipe).stdout


def test_chat_messages_and_a_field(model: Path, tmp_path: Path) -> None:
    words = " ".join(f"w{index % 90}" for index in range(40))
    file = tmp_path / "chat.jsonl"
    record = {"messages": [{"role": "user", "content": words}], "body": words}
    file.write_text(json.dumps(record) + "\n")
    for index, extra in enumerate(([], ["--field", "body"])):
        compress(model, file, tmp_path / str(index), "--ratio", 0.3, *extra)
        stored = load_file(tmp_path / str(index) / "lorap_calibration.safetensors")
        assert stored["input_ids"].shape == (4, 16)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    with cli._progress("layers") as progress:
        progress(1, 4)
        progress(2, 4)
        time.sleep(0.3)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "layers" in captured.err
    assert "2/4" in captured.err
    assert "left" in captured.err


def test_lines_of_progress_tell_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The 90 s before the first layer are no measure of what a layer takes.
    clock = iter([0.0, 90.0, 91.0, 100.0, 110.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    show = cli._line_printer("layers")
    for done in (0, 1, 2, 4):
        show(done, 4)
    assert capsys.readouterr().err.splitlines() == [
        "1 of 4 layers, 1 min 31 s elapsed, about 3.0 s left",
        "2 of 4 layers, 1 min 40 s elapsed, about 10 s left",
        "4 of 4 layers, 1 min 50 s elapsed",
    ]


# --- evaluate -------------------------------------------------------------------------------------


def test_evaluation_of_original_and_compressed(model: Path, ids: Path, tmp_path: Path) -> None:
    compress(model, ids, tmp_path / "o", "--ratio", 0.5)
    words = ("--perplexity", ids, "--seqlen", 8, "--device", "cpu")
    values = []
    for folder in (model, tmp_path / "o"):
        result = run("evaluate", folder, *words, "--json")
        report = json.loads(result.stdout)["perplexity"]
        assert (report["tokens"], report["chunks"], report["seqlen"]) == (56, 8, 8)
        values.append(report["perplexity"])
        shown = run("evaluate", folder, *words).stdout
        assert shown.splitlines()[0] == f"perplexity  {report['perplexity']:.4f}"
        for fragment in ("protocol", "56 targets in 8 chunks", "8 tokens in a chunk", "torch "):
            assert fragment in shown
        assert "Loading weights" not in result.stderr
    assert values[0] != values[1]


def test_what_a_model_s_own_code_prints_stays_off_stdout(
    model: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = lorap.evaluate

    def noisy(*args: Any, **kwargs: Any) -> Any:
        print("noise")
        return real(*args, **kwargs)

    monkeypatch.setattr(lorap, "evaluate", noisy, raising=False)
    result = run("evaluate", model, "--perplexity", ids, "--seqlen", 8, "--json")
    assert json.loads(result.stdout)["perplexity"]["chunks"] == 8
    assert "noise" in result.stderr


def test_a_tilde_is_the_home_folder(
    model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "ids.npy").symlink_to(ids)
    content = {"ratio": 0.3, "samples": 4, "seqlen": 16, "device": "cpu", "output": "~/o"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content | {"calibration": "~/ids.npy"}))
    run("compress", "~/model", "--config", "~/recipe.yaml")
    report = run("evaluate", "~/o", "--perplexity", "~/ids.npy", "--seqlen", 8, "--json").stdout
    assert json.loads(report)["perplexity"]["chunks"] == 8
    assert (tmp_path / "o" / "config.json").is_file()


# --- processes ------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_is_no_news(model: Path) -> None:
    command = [sys.executable, "-m", "lorap", "plan", str(model), "--ratio", "0.3", "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writing)
    assert done.stderr == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_and_leaves_nothing(
    number: signal.Signals, model: Path, ids: Path, tmp_path: Path
) -> None:
    code = (
        "import time, lorap.pipeline.factors as factors\n"
        "def wait(*args):\n    print('computing', flush=True)\n    time.sleep(60)\n"
        "factors.awsvd = wait\n"
        "from lorap.cli import main\nmain()\n"
    )
    words = ["compress", model, "--ratio", 0.3, "--output", tmp_path / "o", "--calibration", ids]
    words += ["--samples", 4, "--seqlen", 16, "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "computing\n"
        assert [file.suffix for file in tmp_path.iterdir()] == [".partial"]
        process.send_signal(number)
        _, message = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "interrupted" in message
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


def test_nohup_has_a_run_outlive_its_terminal(model: Path) -> None:
    code = (
        "import os, signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "import lorap.cli as cli\n"
        "cli._quieten = lambda: os.kill(os.getpid(), signal.SIGHUP)\n"
        "cli.main()\n"
    )
    words = ["plan", str(model), "--ratio", "0.3", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ratio"] == 0.3
