"""Choose the calibration samples: N sequences of L token ids (experiment settings of the paper)."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorap.data.sources import TextRows, check_ids_array, read_source
from lorap.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST_TOKENS = 2**31
"""Most tokens of calibration that are cut from text: 16 GiB of ids."""


@dataclass(frozen=True)
class Calibration:
    """The calibration samples and where they come from.

    Attributes
    ----------
    input_ids : Tensor of int64, shape (N, L)
        Token ids on the CPU, without padding.
    source : str
        The source as it was given.
    fingerprint : str
        SHA-256, in hexadecimal, of N, L and then the ids in row-major order, each as a
        little-endian int64.
    """

    input_ids: Tensor
    source: str
    fingerprint: str


def load_calibration(
    source: str | os.PathLike[str],
    *,
    tokenizer: "Callable[[], PreTrainedTokenizerBase]",
    vocab_size: int,
    max_positions: int | None,
    samples: int = 128,
    seqlen: int = 128,
    seed: int = 0,
    field: str | None = None,
) -> Calibration:
    """Read a source and choose the calibration samples from it.

    Text follows the paper's protocol, "pick a random row, take a random crop": rows are drawn at
    random with replacement. A row shorter than `seqlen` is joined by newlines with the rows that
    follow it, as few as make it long enough; blank rows are passed over. A crop at a random
    position of the result is the sample. Where the rows up to the end of the data are too short,
    another row is drawn, from before that one; there is no wrapping to the first row. So long rows
    behave as in the paper, and the one-sentence rows of BookCorpus are joined. Only the rows drawn
    are tokenised, without special tokens: no BOS is prepended. Chat messages keep the special
    tokens that the chat template writes.

    Token ids of shape (N, L): where N and L are what is asked for, exactly those rows in that
    order; where N is larger, a random choice of rows without replacement; where L is larger, a
    random crop of each chosen row.

    All draws are from ``numpy.random.default_rng(seed)``.

    Parameters
    ----------
    source : str or path
        See `lorap.data.sources`.
    tokenizer : callable
        Returns the model's tokenizer. Called only for text.
    vocab_size : int
        Size of the model's vocabulary.
    max_positions : int or None
        Longest sequence the model takes, in tokens; None if it has no such limit.
    samples, seqlen : int
        Number of samples and their length in tokens.
    seed : int
        Seed of the draws.
    field : str, optional
        Field of a ``.jsonl`` or ``.parquet`` file.

    Returns
    -------
    Calibration
        `samples` rows of `seqlen` ids.

    Raises
    ------
    UsageError
        If an argument is out of range, if the source cannot be read (`read_source`), if the data
        is shorter than what is asked for, or if an id is outside the vocabulary.
    LorapError
        If a dataset cannot be had from the hub.
    """
    _check_request(samples, seqlen, seed, max_positions)
    data = read_source(source, field=field, split_role="calibration")
    rng = np.random.default_rng(seed)
    if isinstance(data, TextRows):
        ids = _samples_of_text(data, tokenizer(), samples, seqlen, rng)
        check_vocabulary(ids, vocab_size, f"the tokenised text of {data.source!r}")
    else:
        check_vocabulary(data.ids, vocab_size, repr(data.source))
        ids = _samples_of_ids(data.ids, data.source, samples, seqlen, rng)
    return _calibration(ids, data.source)


def calibration_from_ids(
    ids: Tensor | npt.NDArray[Any],
    *,
    vocab_size: int,
    max_positions: int | None,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    source: str = "token ids given in memory",
) -> Calibration:
    """Choose the calibration samples from token ids in memory, as `load_calibration` does.

    Parameters
    ----------
    ids : Tensor or ndarray, shape (N, L)
        Token ids of any integer dtype, on any device. Not changed.
    vocab_size : int
        Size of the model's vocabulary.
    max_positions : int or None
        Longest sequence the model takes, in tokens; None if it has no such limit.
    samples, seqlen : int, optional
        Number of samples and their length in tokens; by default all rows, whole.
    seed : int
        Seed of the choice of rows and of the crops.
    source : str
        Name of the data for messages and reports.

    Returns
    -------
    Calibration
        `samples` rows of `seqlen` ids.

    Raises
    ------
    UsageError
        If an argument is out of range, if the ids have another rank or dtype, are fewer than what
        is asked for, or are outside the vocabulary.
    """
    if isinstance(ids, Tensor):
        if ids.dtype.is_floating_point or ids.dtype.is_complex:
            raise UsageError(
                f"{source!r} holds values of dtype {ids.dtype}; expected token ids of an "
                "integer dtype"
            )
        ids = ids.detach().cpu().numpy()
    array = check_ids_array(ids, source)
    samples = array.shape[0] if samples is None else samples
    seqlen = array.shape[1] if seqlen is None else seqlen
    _check_request(samples, seqlen, seed, max_positions)
    check_vocabulary(array, vocab_size, repr(source))
    rng = np.random.default_rng(seed)
    return _calibration(_samples_of_ids(array, source, samples, seqlen, rng), source)


def check_vocabulary(ids: npt.NDArray[np.integer[Any]], vocab_size: int, where: str) -> None:
    """Check that all ids, of shape (N, L), lie in ``0 .. vocab_size - 1``.

    Raises
    ------
    UsageError
        Naming the first id outside, its place and the vocabulary's size.
    """
    if int(ids.min()) >= 0 and int(ids.max()) < vocab_size:
        return
    row, position = np.argwhere((ids < 0) | (ids >= vocab_size))[0].tolist()
    value = int(ids[row, position])
    problem = "is negative" if value < 0 else "is outside the vocabulary"
    raise UsageError(
        f"token id {value} at row {row}, position {position} (counted from 0) of {where} "
        f"{problem}: the model's vocabulary has {vocab_size} entries, 0 to {vocab_size - 1}"
    )


def check_sequence_length(seqlen: int, shortest: int, max_positions: int | None) -> None:
    """Check that a sequence length is one that the model and the task take.

    Raises
    ------
    UsageError
        If `seqlen` is below `shortest` or above `max_positions`.
    """
    if seqlen < shortest:
        raise UsageError(f"the sequence length must be at least {shortest} tokens, got {seqlen}")
    if max_positions is not None and seqlen > max_positions:
        raise UsageError(
            f"sequences of {seqlen} tokens are longer than the {max_positions} positions of the "
            "model"
        )


def _check_request(samples: int, seqlen: int, seed: int, max_positions: int | None) -> None:
    if samples < 1:
        raise UsageError(f"the number of calibration samples must be at least 1, got {samples}")
    if seed < 0:
        raise UsageError(f"the seed must not be negative, got {seed}")
    check_sequence_length(seqlen, 1, max_positions)


def _samples_of_ids(
    ids: npt.NDArray[np.integer[Any]],
    source: str,
    samples: int,
    seqlen: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    rows, length = ids.shape
    if rows < samples or length < seqlen:
        raise UsageError(
            f"{source!r} holds {rows} rows of {length} token ids; {samples} samples of {seqlen} "
            "tokens were asked for"
        )
    if rows > samples:
        ids = ids[rng.choice(rows, size=samples, replace=False)]
    if length > seqlen:
        starts = rng.integers(length - seqlen + 1, size=samples)
        ids = np.take_along_axis(ids, starts[:, None] + np.arange(seqlen), axis=1)
    return ids.astype(np.int64, order="C")


def _samples_of_text(
    data: TextRows,
    tokenizer: "PreTrainedTokenizerBase",
    samples: int,
    seqlen: int,
    rng: np.random.Generator,
) -> npt.NDArray[np.int64]:
    if samples * seqlen > MOST_TOKENS:
        raise UsageError(
            f"{samples} samples of {seqlen} tokens were asked for: expected at most {MOST_TOKENS} "
            "tokens of calibration"
        )
    chosen = np.empty((samples, seqlen), dtype=np.int64)
    passages: dict[int, npt.NDArray[np.int64]] = {}
    # Rows from `limit` on are known to be followed by too little text. Drawing below it is what
    # drawing again until a row fits comes to, without the wait.
    limit = len(data.rows)
    for sample in range(samples):
        while True:
            start = int(rng.integers(limit))
            if start not in passages:
                passages[start] = _passage(data, start, tokenizer, seqlen)
            passage = passages[start]
            if len(passage) >= seqlen:
                break
            if start == 0:
                raise UsageError(
                    f"the text of {data.source!r} has {len(passage)} tokens, fewer than one "
                    f"sample of {seqlen}"
                )
            limit = start
        crop = int(rng.integers(len(passage) - seqlen + 1))
        chosen[sample] = passage[crop : crop + seqlen]
    return chosen


def _passage(
    data: TextRows, start: int, tokenizer: "PreTrainedTokenizerBase", seqlen: int
) -> npt.NDArray[np.int64]:
    """Return the ids of row `start` joined with as few following rows as give `seqlen` tokens.

    The number of rows is doubled until they are long enough, then bisected, so that joining
    hundreds of short rows takes few calls of the tokenizer. Shorter than `seqlen` if all rows up to
    the end are.
    """
    texts: list[str] = []
    row = start

    def tokens(count: int) -> npt.NDArray[np.int64]:
        nonlocal row
        while len(texts) < count and row < len(data.rows):
            text = data.render(row, tokenizer)
            row += 1
            if text.strip():
                texts.append(text)
        return tokenize("\n".join(texts[:count]), tokenizer, add_special_tokens=False)

    too_few, count = 0, 1
    ids = tokens(count)
    while len(ids) < seqlen and len(texts) == count:
        too_few, count = count, 2 * count
        ids = tokens(count)
    if len(ids) < seqlen:
        return ids
    enough = min(count, len(texts))
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        candidate = tokens(middle)
        if len(candidate) < seqlen:
            too_few = middle
        else:
            enough, ids = middle, candidate
    return ids


def tokenize(
    text: str, tokenizer: "PreTrainedTokenizerBase", *, add_special_tokens: bool
) -> npt.NDArray[np.int64]:
    """Return the token ids of `text`, shape (tokens,)."""
    # verbose=False: a text longer than the model's positions is cut here, so no warning is due.
    encoding = tokenizer(
        text, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
    )
    return np.asarray(encoding["input_ids"], dtype=np.int64)


def _calibration(ids: npt.NDArray[np.int64], source: str) -> Calibration:
    digest = hashlib.sha256(np.asarray(ids.shape, dtype="<i8").tobytes())
    digest.update(ids.astype("<i8").tobytes())
    return Calibration(torch.from_numpy(ids), source, digest.hexdigest())
