"""Perplexity of a model in memory (experiment settings of the paper), and of whole documents."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lorap.errors import LorapError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096
"""Tokens of one batch by default."""

BATCH_LOGITS = 2**28
"""Most logits of one batch by default: 1 GiB in float32."""

_IGNORED = -100
"""Target of a position that is not scored."""


class Window(NamedTuple):
    """A stretch of a document, some of whose tokens are scored.

    Attributes
    ----------
    ids : ndarray of int64, shape (n + 1,)
        The n tokens that the model sees, and the one after them.
    targets : int
        How many of the ids are scored: the last ones.
    """

    ids: npt.NDArray[np.int64]
    targets: int


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a model on chunks of tokens.

    Attributes
    ----------
    perplexity : float
        exp of `mean_nll`.
    mean_nll : float
        Mean cross-entropy over all targets, in nats per token.
    tokens : int
        Targets scored: ``chunks * (seqlen - 1)``.
    chunks : int
        Number of chunks.
    seqlen : int
        Tokens per chunk.
    """

    perplexity: float
    mean_nll: float
    tokens: int
    chunks: int
    seqlen: int


def perplexity(
    model: PreTrainedModel,
    chunks: Tensor,
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Return exp of the mean cross-entropy over the last ``seqlen - 1`` tokens of each chunk.

    The logits are computed in the model's own dtype, the cross-entropy of a token in float32 or
    wider, and their sum in float64. The model runs in evaluation mode and is given back in the
    mode in which it came.

    Parameters
    ----------
    model : PreTrainedModel
        Causal language model of transformers.
    chunks : Tensor of int64, shape (C, seqlen)
        Token ids, without padding.
    batch_size : int, optional
        Chunks per forward pass. By default about 4096 tokens and at most 2**28 logits.
    progress : callable, optional
        Called before the first batch and after each with the number of chunks done and of all.

    Returns
    -------
    Perplexity
        The number and what it was taken over.

    Raises
    ------
    UsageError
        If the chunks have another shape or dtype, or `batch_size` is below 1.
    LorapError
        If a loss is NaN or infinite, or the mean is too large for its exponential.
    """
    if chunks.ndim != 2 or chunks.shape[0] < 1 or chunks.shape[1] < 2:
        raise UsageError(
            "chunks must have shape (C, seqlen) with C >= 1 and seqlen >= 2, got "
            f"{tuple(chunks.shape)}"
        )
    if chunks.dtype != torch.int64:
        raise UsageError(f"chunks must be int64, got {chunks.dtype}")
    check_batch_size(batch_size)
    count, seqlen = chunks.shape
    rows = batch_size or default_batch_size(seqlen, _input_embedding(model).shape[0])
    total = 0.0
    with _evaluating(model) as device:
        if progress is not None:
            progress(0, count)
        for start in range(0, count, rows):
            batch = chunks[start : start + rows]
            logits = model(input_ids=batch.to(device), use_cache=False).logits[:, :-1]
            losses = _loss_of_rows(logits, batch[:, 1:])
            _check_finite(losses, "chunk", range(start, start + len(batch)))
            total += float(losses.sum())
            if progress is not None:
                progress(start + len(batch), count)
    tokens = count * (seqlen - 1)
    return Perplexity(_exponential(total / tokens), total / tokens, tokens, count, seqlen)


def rolling_windows(document: npt.NDArray[np.int64], start: int, seqlen: int) -> Iterator[Window]:
    """Cut a document into windows that score each of its tokens once.

    A window shows the model `seqlen` tokens, those before its last target; the first one begins
    with `start`, and shows fewer if the document is shorter. A last window that scores fewer tokens
    shows more of those before it.

    Parameters
    ----------
    document : ndarray of int64, shape (tokens,)
    start : int
        Id of the token that comes before the first one.
    seqlen : int
        Tokens that the model sees at once, at least 1.

    Notes
    -----
    SPEC: ``evaluation.rolling``. lm-eval's rolling log-likelihood scores the same (its
    ``get_rolling_token_windows`` with a context of 1).
    """
    stream = np.concatenate([np.array([start], dtype=np.int64), document])
    done = 0
    while done < len(document):
        end = min(done + seqlen, len(document))
        yield Window(stream[max(0, end - seqlen) : end + 1], end - done)
        done = end


def rolling_perplexity(
    model: PreTrainedModel,
    windows: Sequence[Window],
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Return exp of the mean cross-entropy over the targets of all windows.

    Windows of like length are run together, the longest first, filled up at the end, where a
    causal model does not look. Precision and mode are those of `perplexity`.

    Parameters
    ----------
    model : PreTrainedModel
        Causal language model of transformers.
    windows : sequence of Window
        At least one.
    batch_size : int, optional
        Windows per forward pass. By default about 4096 tokens and at most 2**28 logits.
    progress : callable, optional
        Called before the first batch and after each with the number of windows done and of all.

    Returns
    -------
    Perplexity
        With the windows as its chunks, and their greatest length as `seqlen`.

    Raises
    ------
    UsageError
        If there is no window, or `batch_size` is below 1.
    LorapError
        If a loss is NaN or infinite, or the mean is too large for its exponential.

    Notes
    -----
    SPEC: ``evaluation.rolling``.
    """
    if not windows:
        raise UsageError("expected at least one window, got none")
    check_batch_size(batch_size)
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].ids))
    vocab_size = _input_embedding(model).shape[0]
    total, done = 0.0, 0
    with _evaluating(model) as device:
        if progress is not None:
            progress(0, len(windows))
        while done < len(order):
            length = len(windows[order[done]].ids)
            rows = batch_size or default_batch_size(length - 1, vocab_size)
            chosen = order[done : done + rows]
            ids, targets = _padded([windows[index] for index in chosen], length)
            logits = model(input_ids=ids.to(device), use_cache=False).logits
            losses = _loss_of_rows(logits, targets)
            _check_finite(losses, "window", chosen)
            total += float(losses.sum())
            done += len(chosen)
            if progress is not None:
                progress(done, len(windows))
    tokens = sum(window.targets for window in windows)
    longest = len(windows[order[0]].ids) - 1
    return Perplexity(_exponential(total / tokens), total / tokens, tokens, len(windows), longest)


def _padded(windows: Sequence[Window], length: int) -> tuple[Tensor, Tensor]:
    """Return what the model sees and what it is asked for, each (windows, length - 1)."""
    ids = torch.zeros(len(windows), length - 1, dtype=torch.int64)
    targets = torch.full_like(ids, _IGNORED)
    for row, window in enumerate(windows):
        own = torch.from_numpy(window.ids)
        last = len(own) - 1
        ids[row, :last] = own[:-1]
        targets[row, last - window.targets : last] = own[len(own) - window.targets :]
    return ids, targets


def check_batch_size(batch_size: int | None) -> None:
    """Raise UsageError if a batch size is below 1."""
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, got {batch_size}")


def default_batch_size(seqlen: int, vocab_size: int) -> int:
    """Return how many sequences of `seqlen` tokens a batch holds by default."""
    return max(1, min(BATCH_TOKENS, BATCH_LOGITS // vocab_size) // seqlen)


def _input_embedding(model: PreTrainedModel) -> Tensor:
    """Return the input embedding of the model, shape (vocabulary, hidden)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[torch.device]:
    """Have a model in evaluation mode and without gradients; yield where its inputs go."""
    embedding = _input_embedding(model)
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    try:
        with torch.no_grad():
            # Offloaded weights are on the meta device; accelerate's hooks move the inputs then.
            yield torch.device("cpu") if embedding.is_meta else embedding.device
    finally:
        for module, training in modes:
            module.training = training


def _loss_of_rows(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of each row in float64, shape (rows,).

    Parameters
    ----------
    logits : Tensor, shape (rows, tokens, vocabulary)
    targets : Tensor of int64, shape (rows, tokens)
    """
    losses = F.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        targets.flatten().to(logits.device),
        reduction="none",
        ignore_index=_IGNORED,
    )
    return losses.cpu().double().view(targets.shape).sum(dim=1)


def _check_finite(losses: Tensor, kind: str, numbers: Sequence[int]) -> None:
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise LorapError(
            f"the loss of {kind} {numbers[first]} (counted from 0) is {float(losses[first])}"
            ": the model gives NaN or infinite logits on it"
        )


def _exponential(mean_nll: float) -> float:
    try:
        return math.exp(mean_nll)
    except OverflowError as error:
        raise LorapError(
            f"the perplexity is too large for a number: the mean loss is {mean_nll:.6g} nats"
        ) from error
