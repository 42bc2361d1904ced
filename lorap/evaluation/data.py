"""What a perplexity is taken over: chunks of the joined text, or documents window by window."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorap.data.calibration import check_sequence_length, check_vocabulary, tokenize
from lorap.data.sources import TextRows, TokenIds, read_source
from lorap.errors import UsageError
from lorap.evaluation.likelihood import Window, rolling_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EvaluationProtocol:
    """How the chunks of an evaluation were made.

    Attributes
    ----------
    sentence : str
        The protocol in words.
    source : str
        The source as it was given.
    data : str
        The source in full.
    split : str or None
        Split of a hub dataset, None for a local file.
    """

    sentence: str
    source: str
    data: str
    split: str | None


def load_evaluation_chunks(
    source: str | os.PathLike[str],
    *,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    seqlen: int,
    vocab_size: int,
    max_positions: int | None,
    field: str | None = None,
) -> tuple[Tensor, EvaluationProtocol]:
    """Read a source and cut it into the chunks that perplexity is taken over.

    Text: all rows joined with two newlines, tokenised once with the tokenizer's default special
    tokens, cut into non-overlapping chunks, the tail dropped. (Of chat messages the special tokens
    are those that the chat template writes, and no others.) A ``.txt`` file has no blank rows, so
    that WikiText-2 as a text file gives a slightly different number than the dataset's own rows,
    whose blank ones the paper's protocol joins too.

    Token ids of shape (N, L): each row is cut into non-overlapping chunks, its tail dropped.

    Parameters
    ----------
    source : str or path
        See `lorap.data.sources`.
    tokenizer : callable
        Returns the model's tokenizer. Called only for text.
    seqlen : int
        Tokens per chunk, at least 2.
    vocab_size : int
        Size of the model's vocabulary.
    max_positions : int or None
        Longest sequence the model takes, in tokens; None if it has no such limit.
    field : str, optional
        Field of a ``.jsonl`` or ``.parquet`` file.

    Returns
    -------
    chunks : Tensor of int64, shape (C, seqlen)
        Token ids, C >= 1.
    protocol : EvaluationProtocol
        How they were made.

    Raises
    ------
    UsageError
        If `seqlen` is out of range, the source cannot be read, the data is shorter than one chunk,
        or an id is outside the vocabulary.
    LorapError
        If a dataset cannot be had from the hub.
    """
    check_sequence_length(seqlen, 2, max_positions)
    data = read_source(source, field=field, split_role="evaluation")
    scoring = f"exp of the mean cross-entropy over the {seqlen - 1} targets of each chunk"
    if isinstance(data, TokenIds):
        check_vocabulary(data.ids, vocab_size, repr(data.source))
        rows, length = data.ids.shape
        chunks = _cut(data.ids, seqlen, f"the rows of {data.source!r} hold")
        sentence = (
            f"{rows} rows of {length} token ids, each row cut into non-overlapping chunks of "
            f"{seqlen} tokens, its tail of {length % seqlen} dropped; {scoring}"
        )
        return chunks, EvaluationProtocol(sentence, data.source, f"file {data.source}", None)
    ids, special_tokens = _whole_text(data, tokenizer())
    chunks = _cut(ids, seqlen, f"the text of {data.source!r} has")
    check_vocabulary(ids, vocab_size, f"the tokenised text of {data.source!r}")
    sentence = (
        f"{len(data.rows)} rows joined with two newlines, tokenised once with {special_tokens}, "
        f"cut into non-overlapping chunks of {seqlen} tokens, the tail of "
        f"{ids.shape[1] % seqlen} dropped; {scoring}"
    )
    return chunks, EvaluationProtocol(sentence, data.source, data.description, data.split)


def load_evaluation_documents(
    source: str | os.PathLike[str],
    *,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    seqlen: int,
    vocab_size: int,
    max_positions: int | None,
    field: str | None = None,
) -> tuple[list[Window], EvaluationProtocol]:
    """Read a source whose rows are documents, and cut each into windows of at most `seqlen` inputs.

    Parameters
    ----------
    source, tokenizer, vocab_size, max_positions, field
        As for `load_evaluation_chunks`. Rows without a token are passed over.
    seqlen : int
        Tokens that the model sees at once, at least 1.

    Returns
    -------
    windows : list of Window
        In the order of the rows, at least one.
    protocol : EvaluationProtocol
        How they were made.

    Raises
    ------
    UsageError
        As `load_evaluation_chunks`; and if the source holds token ids, or the tokenizer has no
        token for a document to begin with.
    LorapError
        If a dataset cannot be had from the hub.

    Notes
    -----
    SPEC: ``evaluation.rolling``.
    """
    check_sequence_length(seqlen, 1, max_positions)
    data = read_source(source, field=field, split_role="evaluation")
    if isinstance(data, TokenIds):
        raise UsageError(
            f"rolling: expected text, one document in a row; {data.source!r} holds token ids"
        )
    windows: list[Window] = []
    documents = 0
    for ids, start in _documents(data, tokenizer(), vocab_size):
        documents += 1
        windows += rolling_windows(ids, start, seqlen)
    if not windows:
        raise UsageError(f"rolling: the rows of {data.source!r} hold no token")
    sentence = (
        f"{documents} documents, each tokenised without special tokens and scored whole after a "
        f"first BOS (EOS where there is none), in windows of at most {seqlen} tokens that score "
        "every token once; exp of the mean cross-entropy over all tokens"
    )
    return windows, EvaluationProtocol(sentence, data.source, data.description, data.split)


def _documents(
    data: TextRows, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Iterator[tuple[npt.NDArray[np.int64], int]]:
    """Yield the ids of each row that has any, shape (tokens,), and what it begins with."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if not isinstance(start, int):
        raise UsageError("rolling: expected a tokenizer with a BOS or EOS, got one without")
    for index in range(len(data.rows)):
        ids = tokenize(data.render(index, tokenizer), tokenizer, add_special_tokens=False)
        if len(ids):
            where = f"row {index} of {data.source!r}, tokenised"
            check_vocabulary(np.append(ids, start)[None], vocab_size, where)
            yield ids, start


def _whole_text(
    data: TextRows, tokenizer: PreTrainedTokenizerBase
) -> tuple[npt.NDArray[np.int64], str]:
    """Return the ids of all rows, shape (1, tokens), and which special tokens are among them."""
    chat = isinstance(data.rows[0], list)
    text = "\n\n".join(data.render(index, tokenizer) for index in range(len(data.rows)))
    ids = tokenize(text, tokenizer, add_special_tokens=not chat)
    special = "the special tokens of the chat template" if chat else "the default special tokens"
    return ids[None, :], special


def _cut(ids: npt.NDArray[np.integer[Any]], seqlen: int, subject: str) -> Tensor:
    """Cut each row of `ids`, shape (N, L), into chunks, and return them, shape (C, seqlen)."""
    length = ids.shape[1]
    if length < seqlen:
        raise UsageError(f"{subject} {length} tokens, fewer than one chunk of {seqlen}")
    whole = ids[:, : length - length % seqlen].astype(np.int64)
    return torch.from_numpy(whole.reshape(-1, seqlen))
