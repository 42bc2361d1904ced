"""Tasks of the LM Evaluation Harness: both routes to its numbers, the paper's, the model card."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lorap
from lorap import UsageError, cli
from lorap.checkpoint.evaluations import check_card
from lorap.errors import LorapError
from lorap.evaluation import PAPER_METRICS, evaluate, tasks
from lorap.evaluation.tasks import find_tasks, parse_tasks
from tests.tiny_models import save_tiny_checkpoint, tiny_tokenizer

pytest.importorskip("lm_eval")

CHOICES = {
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "test_split": "test",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [
        {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
    ],
}
QUESTIONS = 12
DOCUMENTS = 5


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(f"w{index}" for index in rng.integers(0, 90, count))


def write_task(folder: Path, name: str, content: dict[str, Any], rows: list[Any]) -> None:
    split = "validation" if content is CHOICES else "test"
    data = folder / f"{name}.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = {"data_files": {split: str(data)}}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, **content}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | {"metadata": {"version": 1.0}}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``original``, its compressed form ``small``, and local ``tasks``."""
    root = tmp_path_factory.mktemp("tasks")
    save_tiny_checkpoint(root / "original")
    np.save(root / "ids.npy", np.random.default_rng(0).integers(3, 96, (4, 16)))
    config = lorap.CompressionConfig(ratio=0.4, samples=4, seqlen=16, device="cpu")
    lorap.compress_checkpoint(
        root / "original", root / "small", config, calibration=str(root / "ids.npy")
    )
    (root / "tasks").mkdir()
    rng = np.random.default_rng(1)

    def questions() -> list[dict[str, Any]]:
        return [
            {
                "question": words(rng, 4),
                "choices": [f" {words(rng, count)}" for count in (1, 3, 2)],
                "answer": int(rng.integers(3)),
            }
            for _ in range(QUESTIONS)
        ]

    # Longer than the 64 positions of the model, and shorter.
    documents = [{"text": words(rng, count)} for count in (150, 7, 64, 65, 1)]
    write_task(root / "tasks", "tiny_choice", CHOICES, questions())
    write_task(root / "tasks", "tiny_rolling", ROLLING, documents)
    for name in PAPER_METRICS:
        write_task(root / "tasks", name, CHOICES, questions())
    (root / "documents.txt").write_text("\n".join(row["text"] for row in documents))
    return root


@pytest.fixture(autouse=True)
def _quick_and_offline(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    import datasets

    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    # It asks every package and device of the machine for its version, at each evaluation.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture(autouse=True)
def _loud() -> Iterator[None]:
    import logging

    yield
    untyped: Any = transformers.logging
    untyped.set_verbosity_warning()
    untyped.enable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.NOTSET)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in arguments])


# Both routes

STOCK = """
import json
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lorap":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocker())
import lm_eval.evaluator
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

lm_eval.evaluator.add_env_info = lambda results: None
folder, tasks = sys.argv[1:]
found = simple_evaluate(
    model="hf",
    model_args=f"pretrained={folder},trust_remote_code=True",
    tasks=["tiny_choice", "tiny_rolling"],
    # That of the command line holds thousands of tasks, which take long to find.
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    batch_size=8,
    device="cpu",
    log_samples=False,
)
assert not any(name.split(".")[0] == "lorap" for name in sys.modules)
print("RESULTS", json.dumps(found["results"]))
"""
NAMES = ["tiny_choice", "tiny_rolling"]


def stock_numbers(printed: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return lm-eval's own results: task to metric to value."""
    return {
        task: {
            key.removesuffix(",none"): value
            for key, value in values.items()
            if key.endswith(",none") and "_stderr" not in key
        }
        for task, values in printed.items()
    }


def our_numbers(report: Any) -> dict[str, dict[str, float]]:
    return {
        task: {metric: found["value"] for metric, found in metrics.items()}
        for task, metrics in report.results.items()
    }


def environment(folder: Path) -> dict[str, str]:
    caches = {name: str(folder / "cache" / name) for name in ("HF_HOME", "HF_MODULES_CACHE")}
    return os.environ | {"HF_HUB_OFFLINE": "1", **caches}


def test_the_stock_route_gives_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    ours = evaluate(
        folder / "small", tasks=NAMES, include_path=folder / "tasks", device="cpu"
    ).tasks
    assert ours is not None
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, str(folder / "small"), str(folder / "tasks")],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = (row for row in done.stdout.splitlines() if row.startswith("RESULTS "))
    expected = stock_numbers(json.loads(line.removeprefix("RESULTS ")))
    assert our_numbers(ours) == expected
    assert set(expected) == set(NAMES)
    assert set(expected["tiny_choice"]) == {"acc", "acc_norm"}
    assert expected["tiny_rolling"]["word_perplexity"] > 1


@pytest.mark.slow
def test_the_command_of_lm_eval_gives_the_same_numbers(folder: Path, tmp_path: Path) -> None:
    ours = evaluate(folder / "small", tasks=NAMES, include_path=folder / "tasks", device="cpu")
    done = subprocess.run(
        [
            *(sys.executable, "-I", "-m", "lm_eval", "run", "--model", "hf", "--model_args"),
            f"pretrained={folder / 'small'},trust_remote_code=True",
            *("--tasks", ",".join(NAMES), "--include_path", str(folder / "tasks")),
            *("--device", "cpu", "--batch_size", "8", "--output_path", str(tmp_path / "out")),
        ],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert our_numbers(ours.tasks) == stock_numbers(json.loads(file.read_text())["results"])


def test_the_numbers_are_those_of_a_plain_loop(folder: Path) -> None:
    report = evaluate(
        folder / "small", tasks=NAMES, include_path=folder / "tasks", dtype="float64", device="cpu"
    ).tasks
    assert report is not None
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float64)
    tokenizer = tiny_tokenizer()

    @torch.no_grad()
    def likelihoods(ids: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(dim=-1)
        return logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    hits = normalised = 0
    for line in (folder / "tasks" / "tiny_choice.jsonl").read_text().splitlines():
        row = json.loads(line)
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(row["question"] + choice)["input_ids"]
            scores.append(float(likelihoods(ids)[3:].sum()))
        hits += int(np.argmax(scores)) == row["answer"]
        lengths = [len(choice) for choice in row["choices"]]
        normalised += int(np.argmax(np.divide(scores, lengths))) == row["answer"]
    found = our_numbers(report)
    assert found["tiny_choice"] == {"acc": hits / QUESTIONS, "acc_norm": normalised / QUESTIONS}
    # Every word of a document once, 64 at a time; the windows are those of the rolling perplexity.
    total, count = 0.0, 0
    for text in (folder / "documents.txt").read_text().splitlines():
        ids = [1, *tokenizer(text)["input_ids"]]
        for start in range(1, len(ids), 64):
            end = min(start + 64, len(ids))
            total += float(likelihoods(ids[max(0, end - 65) : end])[start - end :].sum())
        count += len(text.split())
    assert found["tiny_rolling"]["word_perplexity"] == pytest.approx(math.exp(-total / count))
    rolling = evaluate(
        folder / "small",
        perplexity=folder / "documents.txt",
        rolling=True,
        dtype="float64",
        device="cpu",
    ).perplexity
    assert rolling is not None
    # A word is a token here.
    assert rolling.tokens == count
    assert rolling.perplexity == pytest.approx(math.exp(-total / count), rel=1e-10)


# The paper's tasks


def test_the_paper_s_seven_and_their_mean(folder: Path) -> None:
    result = evaluate(
        folder / "small",
        tasks=["paper", "tiny_choice"],
        include_path=folder / "tasks",
        baseline=folder / "original",
        limit=5,
        device="cpu",
    )
    report = result.tasks
    assert report is not None
    assert set(report.results) == {*PAPER_METRICS, "tiny_choice"}
    numbers = [report.results[task][metric]["value"] for task, metric in PAPER_METRICS.items()]
    assert report.mean == pytest.approx(sum(number or 0.0 for number in numbers) / 7)
    assert [PAPER_METRICS[task] for task in ("hellaswag", "boolq")] == ["acc_norm", "acc"]
    assert set(report.samples.values()) == {5}
    assert set(report.shots.values()) == {0}
    assert (report.limit, report.batch_size, report.dtype) == (5, 8, "float32")
    assert report.versions["lm_eval"]
    assert result.baseline is not None
    assert result.baseline.tasks is not None
    alone = evaluate(
        folder / "original",
        tasks=["paper"],
        include_path=folder / "tasks",
        limit=5,
        device="cpu",
    ).tasks
    assert alone is not None
    assert alone.mean == result.baseline.tasks.mean


def test_the_metrics_of_the_paper_are_pinned() -> None:
    assert dict(PAPER_METRICS) == {
        "boolq": "acc",
        "piqa": "acc",
        "hellaswag": "acc_norm",
        "winogrande": "acc",
        "arc_easy": "acc",
        "arc_challenge": "acc_norm",
        "openbookqa": "acc_norm",
    }


@pytest.mark.slow
def test_lm_eval_has_the_paper_s_tasks_with_these_metrics_and_no_examples() -> None:
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    for task, metric in PAPER_METRICS.items():
        content = index[task].cfg
        assert content is not None
        assert metric in {entry["metric"] for entry in content["metric_list"]}
        assert not content.get("num_fewshot")


def test_a_metric_that_the_mean_needs_is_missed() -> None:
    with pytest.raises(LorapError, match="expected the metric acc of boolq, got none"):
        tasks._paper_mean({"boolq": {"acc_norm": {"value": 1.0, "stderr": None}}})


def test_filters_of_answers_are_part_of_a_metric_s_name() -> None:
    found = tasks._metrics(
        {
            "alias": "x",
            "acc,none": 1,
            "acc_stderr,none": 0.5,
            "em,strict": 0.25,
            "em_stderr,strict": "N/A",
        }
    )
    assert found == {
        "acc": {"value": 1.0, "stderr": 0.5},
        "em,strict": {"value": 0.25, "stderr": None},
    }


# The command


def test_the_table_and_the_json(folder: Path) -> None:
    words = ("--tasks", "tiny_choice", "--include-path", folder / "tasks", "--device", "cpu")
    words += ("--baseline", folder / "original", "--perplexity", folder / "ids.npy", "--seqlen", 16)
    shown = run("evaluate", folder / "small", *words)
    assert shown.exit_code == 0, shown.stderr
    content = json.loads(run("evaluate", folder / "small", *words, "--json").stdout)
    lines = shown.stdout.splitlines()
    assert lines[0] == f"perplexity  {content['perplexity']['perplexity']:.4f}"
    dense = content["baseline"]["perplexity"]["perplexity"]
    assert lines[1] == f"baseline    {dense:.4f} of {folder / 'original'}"
    assert dense != content["perplexity"]["perplexity"]
    (row,) = (line.split() for line in lines if line.startswith("tiny_choice  acc "))
    for column, side in ((2, content), (5, content["baseline"])):
        value = side["tasks"]["results"]["tiny_choice"]["acc"]
        assert row[column : column + 3] == [f"{value['value']:.4f}", "±", f"{value['stderr']:.4f}"]
    assert f"samples     tiny_choice {QUESTIONS}" in lines
    limited = run("evaluate", folder / "small", *words[:6], "--limit", 3).stdout
    assert "3 samples of each task: not the task's own numbers" in limited


def test_results_in_the_model_card(folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    for file in (folder / "small").iterdir():
        (small / file.name).write_bytes(file.read_bytes())
    card = (small / "README.md").read_text()
    words = ("--include-path", folder / "tasks", "--device", "cpu", "--card")
    perplexity = ("--perplexity", folder / "ids.npy", "--seqlen", 16, "--device", "cpu", "--card")
    assert run("evaluate", small, *perplexity).exit_code == 0
    dense = ("--baseline", folder / "original")
    assert run("evaluate", small, "--tasks", "paper", "--limit", 4, *words, *dense).exit_code == 0
    first = (small / "README.md").read_text()
    # Again, which takes the place of the first.
    assert run("evaluate", small, "--tasks", "paper", "--limit", 4, *words, *dense).exit_code == 0
    written = (small / "README.md").read_text()
    assert written == first
    assert written.startswith(card.rstrip())
    assert str(folder) not in written.removeprefix(card.rstrip())
    results = json.loads((small / "lorap_evaluation.json").read_text())
    assert {kind: len(found) for kind, found in results.items()} == {"perplexity": 1, "tasks": 1}
    value = results["perplexity"][0]["result"]["perplexity"]
    assert f"| ids.npy | | {value:.4f} |" in written
    entry = results["tasks"][0]
    sides = [entry[side]["mean"] for side in ("result", "baseline")]
    assert f"| mean of the paper's seven |  | {sides[0]:.4f} | {sides[1]:.4f} |" in written
    rows = [line for line in written.splitlines() if line.startswith("| hellaswag |")]
    assert [row.split(" | ")[1] for row in rows] == ["acc_norm"]
    assert "| task | metric | this model | original |" in written
    assert "Only the first 4 samples" in written
    assert "in the folder" not in written
    (small / "lorap_evaluation.json").write_text("{")
    damaged = run("evaluate", small, *perplexity)
    assert damaged.exit_code == 2
    assert "expected the results of evaluations" in damaged.stderr
    # The folder is still one that lorap wrote.
    again = run(
        *("compress", folder / "original", "--ratio", 0.3, "--output", small, "--overwrite"),
        *("--calibration", folder / "ids.npy", "--samples", 4, "--seqlen", 16, "--device", "cpu"),
    )
    assert again.exit_code == 0, again.stderr


def test_no_card_in_a_folder_of_others(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"card: expected a folder that lorap wrote.*original"):
        check_card(folder / "original")


# What is refused, before the weights are loaded


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_pretrained(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ([], ["nothing to evaluate", "--perplexity SOURCE", "--tasks NAMES"]),
        (["--limit", "3", "--perplexity", "x.npy"], ["limit: it has no effect without tasks"]),
        (["--include-path", "x", "--perplexity", "x.npy"], ["include_path: it has no effect"]),
        (["--tasks", "boolq", "--seqlen", "3"], ["seqlen: it has no effect without perplexity"]),
        (["--tasks", "boolq", "--field", "x"], ["field: it has no effect without perplexity"]),
        (["--tasks", "boolq", "--rolling"], ["rolling: it has no effect without perplexity"]),
        (["--tasks", "boolq,,piqa"], ["expected names separated by commas, got 'boolq,,piqa'"]),
        (["--tasks", "TASKS", "--limit", "0"], ["limit: expected at least 1 sample, got 0"]),
        (["--tasks", "boolq", "--include-path", "none"], ["expected a folder of tasks, none is"]),
        (["--tasks", "TASKS", "--batch-size", "0"], ["the batch size must be at least 1"]),
        (["--tasks", "TASKS", "--card"], ["card: expected a folder that lorap wrote"]),
        (["--tasks", "TASKS", "--baseline", "./none"], ["./none: no such folder"]),
        (["--perplexity", "IDS", "--rolling"], ["rolling: expected text", "holds token ids"]),
        (["--perplexity", "IDS", "--rolling", "--seqlen", "65"], ["65 tokens", "64 positions"]),
        (["--perplexity", "IDS", "--rolling", "--seqlen", "0"], ["at least 1 tokens, got 0"]),
    ],
)
def test_bad_requests(words: list[str], fragments: list[str], folder: Path) -> None:
    names = {"IDS": str(folder / "ids.npy"), "TASKS": "tiny_choice"}
    if "TASKS" in words:
        words = [*words, "--include-path", str(folder / "tasks")]
    done = run("evaluate", folder / "original", *(names.get(word, word) for word in words))
    assert done.exit_code == 2, done.stderr
    for fragment in fragments:
        assert fragment in done.stderr


@pytest.mark.usefixtures("no_weights")
def test_a_task_that_is_not_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    # The index of all of lm-eval's tasks takes long to make.
    monkeypatch.setattr(
        tasks,
        "_manager",
        lambda names, path: TaskManager(include_path=str(path), include_defaults=False),
    )
    done = run("evaluate", folder / "small", "--tasks", "boolk", "--include-path", folder / "tasks")
    assert done.exit_code == 2
    assert "knows no task 'boolk'; near it are boolq" in done.stderr
    assert "`lm-eval ls tasks` lists them all" in done.stderr


@pytest.mark.usefixtures("no_weights")
def test_data_that_cannot_be_read(folder: Path, tmp_path: Path) -> None:
    write_task(tmp_path, "gone", CHOICES, [])
    (tmp_path / "gone.jsonl").unlink()
    done = run("evaluate", folder / "small", "--tasks", "gone", "--include-path", tmp_path)
    assert done.exit_code == 1
    assert "the data of the tasks gone cannot be read: FileNotFoundError" in done.stderr


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("module", ["lm_eval", "lm_eval.models.huggingface"])
def test_lm_eval_that_is_not_installed(
    module: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    done = run("evaluate", folder / "small", "--tasks", "tiny_choice")
    assert done.exit_code == 2
    assert "is not installed: `pip install 'lm-eval[hf]'`" in done.stderr


def test_names_of_tasks() -> None:
    assert parse_tasks(" paper, boolq,paper ") == ["paper", "boolq"]


def test_local_tasks_need_no_index_of_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval.tasks

    real = lm_eval.tasks.TaskManager
    made: list[dict[str, Any]] = []

    def manager(**options: Any) -> Any:
        made.append(options)
        return real(**options | {"include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)
    find_tasks(["tiny_choice", "paper"], include_path=folder / "tasks")
    assert [options.get("include_defaults") for options in made] == [False]
    with pytest.raises(UsageError, match="knows no task 'mmlu'"):
        find_tasks(["mmlu"], include_path=folder / "tasks")
    assert [options.get("include_defaults", True) for options in made] == [False, False, True]
