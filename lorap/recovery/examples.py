"""Training examples: token ids, and which of them the loss counts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lorap.data.calibration import check_vocabulary, tokenize
from lorap.data.instructions import Instruction
from lorap.data.sources import Messages, TextRows, TokenIds, read_source
from lorap.errors import UsageError
from lorap.recovery.settings import held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int64]
Kind = Literal["instructions", "messages", "text", "ids"]

IGNORED = -100
"""Label of a token that the loss does not count, as torch and transformers have it."""


class Example(NamedTuple):
    """A sample to train on.

    Attributes
    ----------
    ids : (L,) int32
    counts : (L,) bool
        Whether the loss counts the token, as one to be predicted.
    """

    ids: npt.NDArray[np.int32]
    counts: npt.NDArray[np.bool_]

    @property
    def targets(self) -> int:
        """Tokens that are predicted; the first one never is."""
        return int(self.counts[1:].sum())


@dataclass
class Tally:
    """What became of the rows of a source.

    Attributes
    ----------
    cut : int
        Rows that are longer than the cutoff: text goes on in another example, the end of all else
        is left out.
    without_target : int
        Rows left out, since nothing of them is to be predicted.
    all_counts : int
        Conversations of which all tokens count, since their template does not show where the
        assistant speaks.
    """

    cut: int = 0
    without_target: int = 0
    all_counts: int = 0


@dataclass(frozen=True)
class TrainingData:
    """Examples to train on and to validate with.

    Attributes
    ----------
    training, validation : list of Example
    kind : {"instructions", "messages", "text", "ids"}
    rows : int
        Of the source.
    source, description : str
        As it was given, and in full.
    fingerprint : str
        SHA-256 of all examples, in hexadecimal.
    tally : Tally
    """

    training: list[Example]
    validation: list[Example]
    kind: Kind
    rows: int
    source: str
    description: str
    fingerprint: str
    tally: Tally = field(default_factory=Tally)


def load_examples(
    source: str,
    *,
    tokenizer: Callable[[], PreTrainedTokenizerBase],
    vocab_size: int,
    cutoff: int,
    validation: int,
    seed: int,
    field: str | None = None,
) -> TrainingData:
    """Read a source and make examples of its rows.

    Parameters
    ----------
    source : str
        See `lorap.data.sources`.
    tokenizer : callable
        Returns the model's tokenizer. Called for all sources but token ids.
    vocab_size : int
        Of the model.
    cutoff : int
        Tokens in an example at most.
    validation : int
        Rows to hold out; a tenth of all at most.
    seed : int
        Of the split.
    field : str, optional
        Field of a ``.json``, ``.jsonl`` or ``.parquet`` file.

    Raises
    ------
    UsageError
        If the source cannot be read, a token is outside the vocabulary, or there is nothing to
        train on.
    LorapError
        If a dataset cannot be had from the hub.

    Notes
    -----
    SPEC: ``recovery.split``, ``recovery.labels``.
    """
    data = read_source(source, field=field, split_role="training")
    tally = Tally()
    if isinstance(data, TokenIds):
        check_vocabulary(data.ids, vocab_size, repr(data.source))
        kind: Kind = "ids"
        rows, description = len(data.ids), f"file {data.source}"
        made: Callable[[int], list[Example]] = lambda row: pieces(data.ids[row], cutoff, tally)  # noqa: E731
    else:
        rows, description = len(data.rows), data.description
        maker = _Maker(data, tokenizer(), cutoff, tally)
        kind, made = maker.kind, maker.examples
    order = np.random.default_rng(seed).permutation(rows)
    held = held_out(rows, validation)
    parts = [[e for row in part for e in made(int(row))] for part in np.split(order, [held])]
    if not parts[1]:
        raise UsageError(
            f"{source!r} leaves nothing to train on: of {rows} rows, {held} are held out and "
            f"{tally.without_target} have no token to predict within {cutoff} tokens"
        )
    digest = hashlib.sha256()
    for example in (*parts[0], *parts[1]):
        check_vocabulary(example.ids[None], vocab_size, f"the tokenised text of {source!r}")
        digest.update(np.int64(len(example.ids)).tobytes())
        digest.update(example.ids.astype("<i4").tobytes() + example.counts.tobytes())
    return TrainingData(
        parts[1], parts[0], kind, rows, source, description, digest.hexdigest(), tally
    )


def pieces(ids: npt.NDArray[np.integer], cutoff: int, tally: Tally) -> list[Example]:
    """Cut a text into examples of at most `cutoff` tokens, all of which count.

    Parameters
    ----------
    ids : (L,)
    cutoff : int
    tally : Tally
        Is told of texts that are cut, or too short.
    """
    tally.cut += len(ids) > cutoff
    found = [
        Example(part.astype(np.int32), np.ones(len(part), dtype=np.bool_))
        for start in range(0, len(ids), cutoff)
        if len(part := ids[start : start + cutoff]) > 1
    ]
    tally.without_target += not found
    return found


def common_prefix(a: Ids, b: Ids) -> int:
    """Return how many tokens two texts have in common from the first one on."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length


class _Maker:
    """Makes examples of the rows of a text."""

    def __init__(
        self, data: TextRows, tokenizer: PreTrainedTokenizerBase, cutoff: int, tally: Tally
    ) -> None:
        self._data = data
        self._tokenizer = tokenizer
        self._cutoff = cutoff
        self._tally = tally
        first = data.rows[0]
        self.kind: Kind = (
            "text"
            if isinstance(first, str)
            else "instructions"
            if isinstance(first, Instruction)
            else "messages"
        )

    def examples(self, index: int) -> list[Example]:
        """Return what becomes of a row."""
        row = self._data.rows[index]
        if isinstance(row, str):
            return pieces(self._ids(row), self._cutoff, self._tally)
        if isinstance(row, Instruction):
            return self._kept(*self._instruction(row))
        return self._kept(*self._conversation(index, row))

    def _ids(self, text: str, *, special: bool = True) -> Ids:
        return tokenize(text, self._tokenizer, add_special_tokens=special)

    def _kept(self, ids: Ids, counts: npt.NDArray[np.bool_]) -> list[Example]:
        """Cut off what is too long, and leave out what has no target."""
        self._tally.cut += len(ids) > self._cutoff
        example = Example(ids[: self._cutoff].astype(np.int32), counts[: self._cutoff])
        if example.targets:
            return [example]
        self._tally.without_target += 1
        return []

    def _instruction(self, row: Instruction) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """Prompt and response, of which the response counts; the end of the text is its last token.

        The prompt ends where the tokens of prompt and response leave those of the prompt alone: a
        tokenizer may join the last character of one with the first of the other.
        """
        ids, end = self._ids(row.text()), self._tokenizer.eos_token_id
        if end is not None and ids[-1:].tolist() != [end]:
            ids = np.append(ids, end)
        counts = np.arange(len(ids)) >= common_prefix(self._ids(row.prompt()), ids)
        return ids, counts

    def _conversation(self, index: int, messages: Messages) -> tuple[Ids, npt.NDArray[np.bool_]]:
        """A conversation, of which the assistant's messages count.

        Where a message stands is found by the template itself: from the conversation before it, up
        to and with what the template puts before a reply, to the conversation with it.
        """
        text = self._data.chat(index, messages, self._tokenizer)
        ids = self._ids(text, special=False)
        counts = np.zeros(len(ids), dtype=np.bool_)
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            spans = [
                self._data.chat(index, messages[:count], self._tokenizer, reply_follows=follows)
                if count
                else ""
                for count, follows in ((number, True), (number + 1, False))
            ]
            if not (spans[1].startswith(spans[0]) and text.startswith(spans[1])):
                self._tally.all_counts += 1
                return ids, np.ones(len(ids), dtype=np.bool_)
            start, end = (common_prefix(self._ids(span, special=False), ids) for span in spans)
            counts[start:end] = True
        return ids, counts


def labels(examples: Sequence[Example]) -> list[Ids]:
    """Return the labels of examples: their ids, or ``IGNORED`` where the loss does not count.

    SPEC: ``recovery.labels``.
    """
    return [np.where(example.counts, example.ids, IGNORED).astype(np.int64) for example in examples]
