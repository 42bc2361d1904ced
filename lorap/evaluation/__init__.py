"""Perplexity by the paper's protocol, and tasks of the LM Evaluation Harness."""

from lorap.evaluation.data import (
    EvaluationProtocol,
    load_evaluation_chunks,
    load_evaluation_documents,
)
from lorap.evaluation.likelihood import (
    Perplexity,
    Window,
    perplexity,
    rolling_perplexity,
    rolling_windows,
)
from lorap.evaluation.run import Evaluation, PerplexityReport, evaluate, evaluate_perplexity
from lorap.evaluation.tasks import PAPER_METRICS, TaskReport

__all__ = [
    "PAPER_METRICS",
    "Evaluation",
    "EvaluationProtocol",
    "Perplexity",
    "PerplexityReport",
    "TaskReport",
    "Window",
    "evaluate",
    "evaluate_perplexity",
    "load_evaluation_chunks",
    "load_evaluation_documents",
    "perplexity",
    "rolling_perplexity",
    "rolling_windows",
]
