"""Tasks of the LM Evaluation Harness, which is an optional dependency."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from lorap.errors import LorapError, UsageError, first_line
from lorap.runtime import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAPER = "paper"
"""Name that stands for the paper's tasks."""

PAPER_METRICS: Mapping[str, str] = MappingProxyType(
    {
        "boolq": "acc",
        "piqa": "acc",
        "hellaswag": "acc_norm",
        "winogrande": "acc",
        "arc_easy": "acc",
        "arc_challenge": "acc_norm",
        "openbookqa": "acc_norm",
    }
)
"""The seven tasks of the paper's Table 2, without examples, to the metric that it reports."""

BATCH_SIZE = 8
"""Requests in one forward by default."""


@dataclass(frozen=True)
class TaskReport:
    """What a model reached in tasks, and how.

    Attributes
    ----------
    model : str
        Model folder or hub name.
    results : dict
        Task or group of tasks to its metrics; a metric is ``{"value": v, "stderr": s}`` with None
        for an error that is not known.
    mean : float or None
        Of the paper's seven tasks in the paper's metrics, where ``paper`` was asked for.
    mean_of : dict
        The tasks that the mean is of, to the metric that counts.
    samples, shots, task_versions : dict
        Task to the number of its samples that were scored, of examples shown before each, and to
        its version.
    limit : int or None
        Most samples of a task that were asked for.
    batch_size : int
        Requests in one forward.
    dtype, device : str
        Data type and device the model ran in.
    versions : dict of str to str
        Versions of the packages that the numbers depend on.
    """

    model: str
    results: dict[str, dict[str, dict[str, float | None]]]
    mean: float | None
    mean_of: dict[str, str]
    samples: dict[str, int]
    shots: dict[str, int]
    task_versions: dict[str, str]
    limit: int | None
    batch_size: int
    dtype: str
    device: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class TaskSet:
    """Tasks that were found, with their data; see :func:`find_tasks`."""

    with_paper: bool
    limit: int | None
    _tasks: Sequence[Any]
    _manager: Any


def parse_tasks(text: str) -> list[str]:
    """Return the names in a list such as ``paper,mmlu``, each once.

    Raises
    ------
    UsageError
        If it holds none, or an empty one.
    """
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(f"tasks: expected names separated by commas, got {text!r}")
    return list(dict.fromkeys(names))


def find_tasks(
    names: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
) -> TaskSet:
    """Find tasks of lm-eval and read their data.

    Parameters
    ----------
    names : sequence of str
        Tasks, groups and tags of lm-eval; ``paper`` stands for the paper's seven.
    limit : int, optional
        Most samples of a task.
    include_path : str or path, optional
        Folder with further tasks in YAML. They come before lm-eval's own of the same name.

    Raises
    ------
    UsageError
        If lm-eval is not installed, a name is not known, or `limit` is below 1.
    LorapError
        If a task's data cannot be had.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit: expected at least 1 sample, got {limit}")
    folder = None if include_path is None else Path(os.path.expanduser(include_path))
    if folder is not None and not folder.is_dir():
        raise UsageError(f"include_path: expected a folder of tasks, {include_path} is none")
    wanted = list(
        dict.fromkeys(one for name in names for one in (PAPER_METRICS if name == PAPER else [name]))
    )
    manager = _manager(wanted, folder)
    known = manager.all_tasks
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, PAPER], n=3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise UsageError(
                f"tasks: lm-eval {importlib.metadata.version('lm_eval')} knows no task "
                f"{name!r}{hint}; `lm-eval ls tasks` lists them all"
            )
    try:
        found = manager.load(wanted)
    except Exception as error:  # of a task's own code and of the packages that read data, any
        raise LorapError(
            f"the data of the tasks {', '.join(wanted)} cannot be read: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    groups = [found["groups"][name] for name in wanted if name in found.get("groups", {})]
    grouped = {task.task_name for group in groups for task in group.get_all_tasks()}
    alone = [task for name, task in found["tasks"].items() if name not in grouped]
    return TaskSet(PAPER in names, limit, [*groups, *alone], manager)


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """Return lm-eval's index of tasks; of the folder alone where it holds all that is wanted."""
    try:
        import lm_eval.models.huggingface  # noqa: F401  (with all that a model needs)
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise UsageError(
            "tasks: the LM Evaluation Harness is needed, and is not installed: "
            "`pip install 'lm-eval[hf]'` installs it"
        ) from error
    if folder is not None:
        # Its own tasks are so many that to index them takes a while.
        local = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(local.all_subtasks):
            return local
    return TaskManager(include_path=None if folder is None else str(folder))


def run_tasks(
    tasks: TaskSet,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    batch_size: int | None = None,
) -> TaskReport:
    """Have lm-eval score a model in memory.

    Parameters
    ----------
    tasks : TaskSet
    model : PreTrainedModel
        Causal language model of transformers, where it shall run.
    tokenizer : PreTrainedTokenizerBase
    name : str
        Of the model, for the report.
    batch_size : int, optional
        Requests in one forward, 8 by default.

    Raises
    ------
    LorapError
        If a metric that the mean needs is missing.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    rows = batch_size or BATCH_SIZE
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows)
    found: Any = simple_evaluate(
        model=wrapped,
        tasks=list(tasks._tasks),
        limit=tasks.limit,
        batch_size=rows,
        log_samples=False,
        task_manager=tasks._manager,
    )
    results = {task: _metrics(values) for task, values in found["results"].items()}
    return TaskReport(
        model=name,
        results=results,
        mean=_paper_mean(results) if tasks.with_paper else None,
        mean_of=dict(PAPER_METRICS) if tasks.with_paper else {},
        samples={task: counts["effective"] for task, counts in found["n-samples"].items()},
        shots=dict(found["n-shot"]),
        task_versions={task: str(version) for task, version in found["versions"].items()},
        limit=tasks.limit,
        batch_size=rows,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(torch.device(model.device)),
        versions=versions(["lm_eval", "datasets"]),
    )


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the metrics of a task under their names, with their errors.

    lm-eval names a metric ``acc,none`` and its error ``acc_stderr,none``, after the filter of the
    answers; the filter ``none`` is left out.
    """
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, comma, answers = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{answers}")
        found[metric if answers == "none" else key] = {
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
        }
    return found


def _paper_mean(results: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> float:
    """Return the mean of the paper's seven numbers."""
    total = 0.0
    for task, metric in PAPER_METRICS.items():
        value = results.get(task, {}).get(metric, {}).get("value")
        if value is None:
            raise LorapError(f"tasks: expected the metric {metric} of {task}, got none")
        total += value
    return total / len(PAPER_METRICS)
