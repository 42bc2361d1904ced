"""Bad input on the command line: a clear message, the right exit status, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import errors
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lorap.cli import app
from lorap.ops.lowrank import awsvd
from tests.tiny_models import save_tiny_checkpoint, tiny_model


class Bench:
    """A folder with a model, calibration ids, and a place for the output."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.place = folder / "place"
        self.output = self.place / "small"
        self.ids = folder / "ids.npy"
        self.recipe = folder / "recipe.yaml"
        self.place.mkdir()
        save_tiny_checkpoint(self.model)
        self.save_ids(np.arange(3, 35).reshape(2, 16))

    def save_ids(self, ids: Any) -> None:
        np.save(self.ids, ids)

    def write(self, name: str, content: str | bytes) -> Path:
        file = self.folder / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    def edit_config(self, **values: Any) -> None:
        file = self.model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    def edit_weights(self, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
        file = self.model / "model.safetensors"
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    def arguments(self, **options: Any) -> list[str]:
        """Return a command line that works, but for the options given; None leaves one out."""
        values = {
            "ratio": 0.3,
            "output": self.output,
            "calibration": self.ids,
            "samples": 2,
            "seqlen": 16,
            "device": "cpu",
        } | options
        model = values.pop("model", self.model)
        words = ["compress", str(model)]
        for name, value in values.items():
            if value is not None:
                flag = f"--{name.replace('_', '-')}"
                words += [flag] if value is True else [flag, str(value)]
        return words


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


pytestmark = pytest.mark.usefixtures("loud_transformers")


def fails(arguments: list[str], status: int, *fragments: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == status, (result.exit_code, result.stderr, result.exception)
    assert result.stdout == ""
    message = " ".join(result.stderr.split())
    for fragment in fragments:
        assert fragment in message


def nothing_written(bench: Bench) -> None:
    assert list(bench.place.iterdir()) == []


Options = dict[str, Any]
Case = tuple[Callable[[Bench], Options], int, list[str]]


def given(**options: Any) -> Callable[[Bench], Options]:
    return lambda bench: options


def unknown_type(bench: Bench) -> Options:
    bench.edit_config(model_type="gpt2")
    return {}


def quantised(bench: Bench) -> Options:
    bench.edit_config(quantization_config={"quant_method": "gptq", "bits": 4})
    return {}


def not_a_model_folder(bench: Bench) -> Options:
    (bench.folder / "empty").mkdir()
    return {"model": bench.folder / "empty"}


def a_file_as_model(bench: Bench) -> Options:
    return {"model": bench.model / "model.safetensors"}


def only_bin(bench: Bench) -> Options:
    torch.save(load_file(bench.model / "model.safetensors"), bench.model / "pytorch_model.bin")
    (bench.model / "model.safetensors").unlink()
    return {}


def malicious_bin(bench: Bench) -> Options:
    only_bin(bench)
    torch.save({"model.norm.weight": Bench}, bench.model / "pytorch_model.bin")
    return {"allow_bin": True}


def missing_shard(bench: Bench) -> Options:
    tiny_model().save_pretrained(bench.folder / "sharded", max_shard_size="40KB")
    next((bench.folder / "sharded").glob("model-00002-of-*.safetensors")).unlink()
    return {"model": bench.folder / "sharded"}


def truncated_shard(bench: Bench) -> Options:
    file = bench.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return {}


def empty_text(bench: Bench) -> Options:
    return {"calibration": bench.write("text.txt", "")}


def short_text(bench: Bench) -> Options:
    return {"calibration": bench.write("text.txt", "w1 w2 w3\n")}


def latin_text(bench: Bench) -> Options:
    return {"calibration": bench.write("text.txt", "w1 caf\xe9".encode("latin-1"))}


def ids_of(array: Any) -> Callable[[Bench], Options]:
    def prepare(bench: Bench) -> Options:
        bench.save_ids(array)
        return {}

    return prepare


def bad_weights(value: float, name: str) -> Callable[[Bench], Options]:
    def prepare(bench: Bench) -> Options:
        def edit(tensors: dict[str, torch.Tensor]) -> None:
            tensors[name][0, 0] = value

        bench.edit_weights(edit)
        return {}

    return prepare


def overflow(bench: Bench) -> Options:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].half()
        tensors["model.layers.1.mlp.up_proj.weight"][:] = 6e4

    bench.edit_weights(edit)
    return {}


def output_exists(bench: Bench) -> Options:
    (bench.folder / "taken").mkdir()
    return {"output": bench.folder / "taken"}


def output_is_not_ours(bench: Bench) -> Options:
    return {"output": bench.model, "overwrite": True}


def output_below_a_file(bench: Bench) -> Options:
    return {"output": bench.ids / "small"}


def recipe(content: Any, **options: Any) -> Callable[[Bench], Options]:
    def prepare(bench: Bench) -> Options:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        return {"config": bench.write("recipe.yaml", text)} | options

    return prepare


CASES: dict[str, Case] = {
    "ratio 0": (given(ratio=0), 2, ["ratio", "above 0 and below 1", "got 0.0"]),
    "ratio 1": (given(ratio=1), 2, ["above 0 and below 1", "got 1.0"]),
    "ratio negative": (given(ratio=-0.2), 2, ["above 0 and below 1", "got -0.2"]),
    "ratio nan": (given(ratio="nan"), 2, ["ratio", "expected a number", "got nan"]),
    "ratio a word": (given(ratio="half"), 2, ["--ratio", "valid"]),
    "ratio missing": (given(ratio=None), 2, ["ratio", "got none"]),
    "ratio not reachable": (
        given(ratio=0.95),
        2,
        ["ratio 0.95 cannot be reached", "the largest reachable is 0."],
    ),
    "output missing": (given(output=None), 2, ["output", "--output", "recipe"]),
    "calibration missing": (given(calibration=None), 2, ["calibration", "--calibration"]),
    "unknown option": (given(ratios=0.2), 2, ["--ratios", "--ratio"]),
    "unknown type": (
        unknown_type,
        2,
        ["model type gpt2 is not supported", "supported: gemma2", "llama"],
    ),
    "quantised": (quantised, 2, ["quantised", "gptq", "unquantised"]),
    "not a model folder": (not_a_model_folder, 2, ["empty", "not a model folder", "config.json"]),
    "a file as model": (a_file_as_model, 2, ["expected a model folder, got a file"]),
    "no such folder": (given(model="./no/such/folder"), 2, ["no such folder"]),
    "only .bin weights": (only_bin, 2, ["pytorch_model.bin", "save_pretrained", "--allow-bin"]),
    "a .bin that runs code": (malicious_bin, 2, ["pytorch_model.bin", "tensors alone"]),
    "missing shard": (missing_shard, 2, ["model-00002-of-", "missing"]),
    "truncated shard": (truncated_shard, 2, ["model.safetensors", "truncated", "bytes, got"]),
    "empty calibration": (empty_text, 2, ["text.txt", "empty"]),
    "short calibration": (short_text, 2, ["text.txt", "3 tokens", "one sample of 16"]),
    "calibration not UTF-8": (latin_text, 2, ["text.txt", "not UTF-8", "0xe9 at byte offset 6"]),
    "no such calibration": (given(calibration="none.txt"), 2, ["none.txt", "does not exist"]),
    "calibration of no such user": (
        given(calibration="~no-such-user/text.txt"),
        2,
        ["'~no-such-user/text.txt' does not exist"],
    ),
    "recipe of no such user": (
        given(config="~no-such-user/recipe.yaml"),
        2,
        ["~no-such-user/recipe.yaml", "cannot be read"],
    ),
    "unknown calibration": (given(calibration="wikitext"), 2, ["wikitext2", "owner/name:split"]),
    "ids outside": (
        ids_of(np.full((2, 16), 96)),
        2,
        ["id 96 at row 0, position 0", "96 entries, 0 to 95"],
    ),
    "ids negative": (ids_of(np.full((2, 16), -1)), 2, ["id -1", "negative"]),
    "ids of rank 1": (ids_of(np.arange(32)), 2, ["shape (32,)", "expected token ids", "(N, L)"]),
    "ids as floats": (ids_of(np.zeros((2, 16))), 2, ["float64", "integer dtype"]),
    "too few ids": (ids_of(np.ones((1, 16), int)), 2, ["1 rows of 16", "2 samples of 16"]),
    "ids too short": (ids_of(np.ones((2, 15), int)), 2, ["2 rows of 15", "2 samples of 16"]),
    "sequence too long": (given(seqlen=65), 2, ["65 tokens", "64 positions"]),
    "NaN in a weight": (
        bad_weights(float("nan"), "model.layers.1.self_attn.k_proj.weight"),
        1,
        ["layers.1.self_attn.k_proj.weight", "NaN or inf"],
    ),
    "inf in a weight": (
        bad_weights(float("inf"), "model.layers.2.mlp.gate_proj.weight"),
        1,
        ["layers.2.mlp.gate_proj.weight", "NaN or inf"],
    ),
    "NaN in the embedding": (
        bad_weights(float("nan"), "model.embed_tokens.weight"),
        1,
        ["model.embed_tokens.weight", "NaN or inf"],
    ),
    "overflow of activations": (
        overflow,
        1,
        ["layers.1.mlp.down_proj", "input holds NaN or inf", "torch.float16", "--dtype"],
    ),
    "output exists": (output_exists, 2, ["taken", "exists already", "--overwrite"]),
    "output not ours": (output_is_not_ours, 2, ["not replaced", "lorap_report.json"]),
    "output a file": (
        lambda bench: {"output": bench.ids},
        2,
        ["ids.npy", "expected a folder, got a file"],
    ),
    "output below a file": (output_below_a_file, 2, ["cannot be written"]),
    "unknown recipe key": (
        recipe({"ratios": 0.2}),
        2,
        ["recipe.yaml", "unknown key 'ratios'", "'ratio'"],
    ),
    "unknown key of an override": (
        recipe({"overrides": [{"match": "layers.0", "ranks": 4}]}),
        2,
        ["overrides[0]", "unknown key 'ranks'", "'rank'"],
    ),
    "unknown recipe key, near none": (
        recipe({"xyzzy": 1}),
        2,
        ["unknown key 'xyzzy'; valid: ratio, ratio_scope,", "overwrite, resume, allow_bin"],
    ),
    "recipe key twice": (
        recipe("ratio: 0.2\nseed: 1\nratio: 0.3\n"),
        2,
        ["recipe.yaml", "'ratio' is there twice", "line 3"],
    ),
    "key of an override twice": (
        recipe("overrides: [{match: layers.0, rank: 2, rank: 3}]"),
        2,
        ["recipe.yaml", "'rank' is there twice"],
    ),
    "override without match": (
        recipe("overrides: [{match: null, rank: 2}]"),
        2,
        ["overrides[0]", "expected a pattern under match"],
    ),
    "recipe with an impossible date": (recipe("seed: 2020-13-45"), 2, ["recipe.yaml", "month"]),
    "recipe with a huge number": (
        recipe(f"least_important: 1{'0' * 400}"),
        2,
        ["least_important", "expected a number"],
    ),
    "override of nothing": (
        recipe({"overrides": [{"match": "layers.7", "skip": True}]}),
        2,
        ["'layers.7' names no module", "3 layers"],
    ),
    "recipe of a wrong type": (recipe({"samples": "many"}), 2, ["samples", "'many'"]),
    "recipe not YAML": (recipe("ratio: [0.2"), 2, ["recipe.yaml", "not YAML"]),
    "recipe not a mapping": (recipe("- ratio"), 2, ["expected a mapping", "got list"]),
    "no such recipe": (given(config="none.yaml"), 2, ["none.yaml", "cannot be read"]),
    "device unknown": (given(device="tpu"), 2, ["device", "auto, cpu, cuda", "'tpu'"]),
    "dtype unknown": (given(dtype="int8"), 2, ["dtype", "float64, float32", "'int8'"]),
    "sublayers unknown": (given(sublayers="mha,mlp"), 2, ["sublayers", "mha, ffn", "'mlp'"]),
    "scope unknown": (given(ratio_scope="all"), 2, ["ratio_scope", "model, layer", "'all'"]),
    "allocation too large": (
        given(allocation="1e308"),
        2,
        ["allocation", "from 0.001 to 1000", "got '1e308'"],
    ),
    "allocation too small": (given(allocation="1e-9"), 2, ["from 0.001 to 1000", "got '1e-9'"]),
    "allocation 0": (given(allocation=0), 2, ["allocation", "from 0.001 to 1000", "got '0'"]),
    "device of others": (given(device="mps"), 2, ["device", "auto, cpu, cuda", "'mps'"]),
    "dtype of quantised": (
        given(dtype="float8_e4m3fn"),
        2,
        ["float64, float32", "'float8_e4m3fn'"],
    ),
    "samples beyond all bounds": (
        lambda bench: (
            {"samples": 10**12} | {"calibration": bench.write("text.txt", "w1 w2 w3 " * 9)}
        ),
        2,
        ["1000000000000 samples of 16 tokens", "at most 2147483648"],
    ),
    "samples 0": (given(samples=0), 2, ["samples", "at least 1", "got 0"]),
    "field of ids": (given(field="text"), 2, ["field 'text'", ".jsonl"]),
    "revision of a folder": (given(revision="main"), 2, ["revision", "local folder"]),
    "a hub name, offline": (
        given(model="nobody/no-such-model"),
        1,
        ["nobody/no-such-model is not a folder here", "hub cannot be reached"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_and_nothing_is_written(name: str, bench: Bench) -> None:
    prepare, status, fragments = CASES[name]
    fails(bench.arguments(**prepare(bench)), status, *fragments)
    nothing_written(bench)


def test_the_command_line_that_the_cases_spoil_works(bench: Bench) -> None:
    result = CliRunner().invoke(app, bench.arguments())
    assert result.exit_code == 0, result.stderr
    assert [entry.name for entry in bench.place.iterdir()] == ["small"]


def test_allowed_bin_weights_are_read(bench: Bench) -> None:
    CliRunner().invoke(app, bench.arguments())
    expected = load_file(bench.output / "model-00001-of-00004.safetensors")
    result = CliRunner().invoke(
        app, bench.arguments(output=bench.place / "bin", allow_bin=True, **only_bin(bench))
    )
    assert result.exit_code == 0, result.stderr
    found = load_file(bench.place / "bin" / "model-00001-of-00004.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_compressed_checkpoint_is_not_compressed_again(bench: Bench) -> None:
    CliRunner().invoke(app, bench.arguments())
    fails(
        bench.arguments(model=bench.output, output=bench.place / "again"),
        2,
        "compressed already",
        "compress the original",
    )
    assert [entry.name for entry in bench.place.iterdir()] == ["small"]


def test_cuda_without_a_device(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(bench.arguments(device="cuda"), 2, "'cuda'", "no CUDA device here", "cpu or auto")
    nothing_written(bench)


@pytest.mark.parametrize(
    ("error", "status", "fragments"),
    [
        (errors.GatedRepoError, 2, ["owner/model is gated", "accept its terms", "hf auth login"]),
        (errors.RepositoryNotFoundError, 2, ["owner/model", "neither a folder here nor a model"]),
        (errors.RevisionNotFoundError, 2, ["owner/model has no revision"]),
    ],
)
def test_a_hub_name_that_cannot_be_had(
    error: type[errors.HfHubHTTPError],
    status: int,
    fragments: list[str],
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error.__new__(error)  # their constructors differ from version to version

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    fails(bench.arguments(model="owner/model"), status, *fragments)
    nothing_written(bench)


def test_a_failure_leaves_an_older_output_as_it_was(bench: Bench) -> None:
    CliRunner().invoke(app, bench.arguments())
    before = {file.name: file.read_bytes() for file in bench.output.iterdir()}
    bench.edit_weights(lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    fails(bench.arguments(overwrite=True), 1, "model.norm.weight")
    assert {file.name: file.read_bytes() for file in bench.output.iterdir()} == before
    assert [entry.name for entry in bench.place.iterdir()] == ["small"]


@pytest.mark.parametrize("moment", ["reading", "computing"])
def test_an_interrupt_leaves_nothing(
    moment: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    target = {"reading": "on_disk.load_calibration", "computing": "factors.awsvd"}[moment]
    monkeypatch.setattr(f"lorap.pipeline.{target}", interrupt)
    fails(bench.arguments(), 130, "interrupted")
    nothing_written(bench)


@pytest.mark.parametrize(
    ("error", "fragments"),
    [
        (OSError(28, "No space left on device"), ["No space left on device"]),
        (torch.OutOfMemoryError("CUDA out of memory"), ["out of memory", "--batch-size"]),
        (MemoryError(), ["out of memory", "--batch-size"]),
    ],
)
def test_a_full_disk_or_memory_is_a_sentence(
    error: Exception, fragments: list[str], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("lorap.pipeline.factors.awsvd", refuse)
    fails(bench.arguments(), 1, *fragments)
    nothing_written(bench)


def test_what_needs_less_memory_and_keeps_what_is_finished(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def scarce(*arguments: Any) -> Any:
        calls.append(1)
        # Of four matrices in a layer.
        if len(calls) > 4:
            raise MemoryError
        return awsvd(*arguments)

    monkeypatch.setattr("lorap.pipeline.factors.awsvd", scarce)
    fails(
        bench.arguments(), 1, "--activations cpu or disk, which --resume allows to change; what was"
    )
    monkeypatch.undo()
    resumed = CliRunner().invoke(app, [*bench.arguments(), "--resume", "--activations", "disk"])
    assert resumed.exit_code == 0, resumed.output
    report = json.loads((bench.output / "lorap_report.json").read_text())
    assert report["resumed_layers"] >= 1


def test_a_defect_is_not_hidden(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("lorap.pipeline.factors.awsvd", fail)
    result = CliRunner().invoke(app, bench.arguments())
    assert isinstance(result.exception, RuntimeError)
    nothing_written(bench)


@pytest.mark.parametrize(
    ("options", "status", "fragments"),
    [
        (["--perplexity", "none.txt", "--seqlen", "16"], 2, ["'none.txt' does not exist"]),
        (["--perplexity", "bookcorpus", "--seqlen", "16"], 2, ["no evaluation split", "wikitext2"]),
        (["--perplexity", "IDS", "--seqlen", "65"], 2, ["65 tokens", "64 positions"]),
        (["--perplexity", "IDS", "--seqlen", "17"], 2, ["16 tokens", "one chunk of 17"]),
        (["--perplexity", "IDS", "--seqlen", "16", "--dtype", "int8"], 2, ["'int8'"]),
        (["--perplexity", "IDS", "--seqlen", "16", "--batch-size", "0"], 2, ["at least 1"]),
        ([], 2, ["--perplexity"]),
    ],
)
def test_bad_evaluations(
    options: list[str], status: int, fragments: list[str], bench: Bench
) -> None:
    words = [str(bench.ids) if word == "IDS" else word for word in options]
    fails(["evaluate", str(bench.model), *words], status, *fragments)


@pytest.mark.parametrize(
    ("model", "status", "fragment"),
    [
        ("nosuch", 1, "nosuch is not a folder here, and the hub cannot be reached for it"),
        ("nobody/nosuch", 1, "nobody/nosuch is not a folder here, and the hub cannot be reached"),
        ("./nosuch", 2, "./nosuch: no such folder"),
        ("no/such/folder", 2, "no/such/folder: no such folder"),
        ("no such name", 2, "no such name: neither a folder here nor a model on the hub"),
        ("IDS", 2, "ids.npy: expected a model folder, got a file"),
    ],
)
@pytest.mark.parametrize("command", ["compress", "evaluate"])
def test_a_model_that_is_not_there(
    command: str, model: str, status: int, fragment: str, bench: Bench
) -> None:
    name = str(bench.ids) if model == "IDS" else model
    words = {
        "compress": bench.arguments(model=name),
        "evaluate": ["evaluate", name, "--perplexity", str(bench.ids), "--seqlen", "16"],
    }
    fails(words[command], status, fragment)
    nothing_written(bench)


def test_evaluation_of_what_is_no_model(bench: Bench) -> None:
    fails(
        ["evaluate", str(bench.place), "--perplexity", str(bench.ids), "--seqlen", "16"],
        2,
        f"{bench.place} is not a model folder",
    )


def test_evaluation_of_weights_with_nan(bench: Bench) -> None:
    bench.edit_weights(lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    fails(
        ["evaluate", str(bench.model), "--perplexity", str(bench.ids), "--seqlen", "16"],
        1,
        "loss of chunk 0",
        "NaN",
    )
