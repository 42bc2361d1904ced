"""The evaluation of a model on disk or on the hub."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lorap.checkpoint.evaluations import check_card, record_evaluation
from lorap.data.calibration import check_sequence_length
from lorap.errors import UsageError
from lorap.evaluation.data import (
    EvaluationProtocol,
    load_evaluation_chunks,
    load_evaluation_documents,
)
from lorap.evaluation.likelihood import (
    Perplexity,
    check_batch_size,
    perplexity,
    rolling_perplexity,
)
from lorap.evaluation.loading import Candidate, find_model
from lorap.evaluation.tasks import TaskReport, find_tasks, run_tasks
from lorap.runtime import choose_device, choose_dtype, versions

PAPER_SEQLEN = 128
"""Tokens in a chunk by default."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PerplexityReport:
    """Everything needed to quote a perplexity and to repeat it.

    Attributes
    ----------
    model : str
        Model folder or hub name.
    perplexity, mean_nll, tokens, chunks, seqlen
        As in `Perplexity`.
    protocol, source, data, split
        As in `EvaluationProtocol`; `protocol` is its sentence.
    dtype, device : str
        Data type and device the model ran in.
    versions : dict of str to str
        Versions of the packages that the number depends on.
    """

    model: str
    perplexity: float
    mean_nll: float
    tokens: int
    chunks: int
    seqlen: int
    protocol: str
    source: str
    data: str
    split: str | None
    dtype: str
    device: str
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured of a model, and of the dense one beside it.

    Attributes
    ----------
    model : str
        Model folder or hub name.
    perplexity : PerplexityReport or None
    tasks : TaskReport or None
    baseline : Evaluation or None
        The same of the model to compare with.
    """

    model: str
    perplexity: PerplexityReport | None
    tasks: TaskReport | None
    baseline: Evaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the evaluation as values that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class _Text:
    """What a perplexity is asked of."""

    source: str | os.PathLike[str]
    seqlen: int | None
    field: str | None
    rolling: bool

    def prepare(self, model: Candidate) -> tuple[Measure, EvaluationProtocol]:
        """Read the data for a model, and return what takes the perplexity of it."""
        options: dict[str, Any] = {
            "tokenizer": model.tokenizer,
            "vocab_size": model.config.vocab_size,
            "max_positions": model.max_positions,
            "field": self.field,
        }
        if not self.rolling:
            seqlen = PAPER_SEQLEN if self.seqlen is None else self.seqlen
            chunks, protocol = load_evaluation_chunks(self.source, seqlen=seqlen, **options)
            return lambda *args, **more: perplexity(args[0], chunks, **more), protocol
        window = model.max_positions if self.seqlen is None else self.seqlen
        if window is None:
            raise UsageError(
                f"rolling: {model.name} has no longest sequence: expected a seqlen, got none"
            )
        windows, protocol = load_evaluation_documents(self.source, seqlen=window, **options)
        return lambda *args, **more: rolling_perplexity(args[0], windows, **more), protocol


Measure = Callable[..., Perplexity]


def evaluate(
    model_path: str | os.PathLike[str],
    *,
    perplexity: str | os.PathLike[str] | None = None,
    seqlen: int | None = None,
    field: str | None = None,
    rolling: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
    baseline: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    card: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Load a model with plain transformers, and take its perplexity, or have lm-eval score it.

    All that can be checked is, and all data read, before any weights are loaded.

    Parameters
    ----------
    model_path : str or path
        Folder or hub name of a causal language model, compressed or not.
    perplexity : str or path, optional
        A source of data; see `lorap.data.sources`.
    seqlen : int, optional
        Tokens per chunk, 128 by default as in the paper. Of rolling windows, what the model sees at
        once, by default all that it takes.
    field : str, optional
        Field of a ``.jsonl`` or ``.parquet`` file.
    rolling : bool
        Take each row for a document, and score it whole.
    tasks : sequence of str
        Tasks of lm-eval; ``paper`` stands for the paper's seven.
    limit : int, optional
        Most samples of a task.
    include_path : str or path, optional
        Folder with further tasks.
    baseline : str or path, optional
        The dense model, to be evaluated in the same way.
    batch_size : int, optional
        Sequences in one forward: about 4096 tokens for a perplexity, and 8 requests of a task.
    device : str
        A torch device, or "auto": the GPU if there is one.
    dtype : str or torch.dtype, optional
        Floating-point type to run in. By default the checkpoint's own.
    revision : str, optional
        Branch, tag or commit of a hub name; not of the baseline's.
    trust_remote_code : bool
        Run modeling code that the model brings along. Models that lorap compressed do not need it.
    card : bool
        Write the results into the folder, as a file and in the model card.
    progress : callable, optional
        Called before the first batch of a perplexity and after each with the number of chunks done
        and of all.

    Raises
    ------
    UsageError
        If an argument is out of range, contradicts another or has no effect, a model cannot be
        loaded, or the data cannot be used.
    LorapError
        If a model or a dataset cannot be had from the hub, or the loss is not finite.
    """
    if perplexity is None and not tasks:
        raise UsageError(
            "nothing to evaluate: expected --perplexity SOURCE or --tasks NAMES, or both"
        )
    if perplexity is None:
        _without("perplexity", seqlen=seqlen, field=field, rolling=rolling or None)
    if not tasks:
        _without("tasks", limit=limit, include_path=include_path)
    check_batch_size(batch_size)
    text = None if perplexity is None else _Text(perplexity, seqlen, field, rolling)
    if text is not None and seqlen is not None:
        check_sequence_length(seqlen, 1 if rolling else 2, None)
    placed, precision = choose_device(device), choose_dtype(dtype)
    if card:
        check_card(model_path)
    candidates = [find_model(model_path, revision=revision, trust_remote_code=trust_remote_code)]
    if baseline is not None:
        candidates.append(find_model(baseline, trust_remote_code=trust_remote_code))
    task_set = None
    if tasks:
        tokenizers = [candidate.tokenizer() for candidate in candidates]
        task_set = find_tasks(tasks, limit=limit, include_path=include_path)
    prepared = [None if text is None else text.prepare(candidate) for candidate in candidates]
    found = []
    for index, candidate in enumerate(candidates):
        # Two models need not fit at once.
        gc.collect()
        model = candidate.load(precision, placed)
        report, scores = None, None
        measure = prepared[index]
        if measure is not None:
            result = measure[0](model, batch_size=batch_size, progress=progress)
            report = _report(candidate, result, measure[1], model, placed)
        if task_set is not None:
            scores = run_tasks(
                task_set, model, tokenizers[index], name=candidate.name, batch_size=batch_size
            )
        found.append(Evaluation(candidate.name, report, scores))
        del model
    evaluation = replace(found[0], baseline=found[1]) if baseline is not None else found[0]
    if card:
        record_evaluation(model_path, evaluation.to_dict())
    return evaluation


def _without(needed: str, **options: object) -> None:
    """Refuse options that do nothing without another one.

    Raises
    ------
    UsageError
        Naming the first that was given.
    """
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name}: it has no effect without {needed}")


def _report(
    candidate: Candidate,
    result: Perplexity,
    protocol: EvaluationProtocol,
    model: Any,
    device: torch.device,
) -> PerplexityReport:
    return PerplexityReport(
        model=candidate.name,
        **asdict(result),
        protocol=protocol.sentence,
        source=protocol.source,
        data=protocol.data,
        split=protocol.split,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(device),
        versions=versions(["datasets"] if protocol.split is not None else []),
    )


def evaluate_perplexity(
    model_path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    seqlen: int = PAPER_SEQLEN,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    field: str | None = None,
    batch_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PerplexityReport:
    """Return the perplexity of a model by the paper's protocol; see `evaluate`.

    Parameters
    ----------
    model_path : str or path
        Folder or hub name of a causal language model, compressed or not.
    source : str or path
        See `lorap.data.sources`.
    seqlen : int
        Tokens per chunk: 128 in the paper; 2048 is common elsewhere.
    device, dtype, field, batch_size, revision, trust_remote_code, progress
        As for `evaluate`.

    Raises
    ------
    UsageError, LorapError
        As for `evaluate`.
    """
    found = evaluate(
        model_path,
        perplexity=source,
        seqlen=seqlen,
        device=device,
        dtype=dtype,
        field=field,
        batch_size=batch_size,
        revision=revision,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    assert found.perplexity is not None
    return found.perplexity
