"""Read the rows of text or the token ids that a SOURCE names.

Calibration, perplexity and training share one grammar for a source:

- a named set: a key of `NAMED_SOURCES`;
- ``owner/name:split:field`` on the Hugging Face Hub; the split takes the slices of the `datasets`
  library, such as ``train[:1000]``. For training ``owner/name:split`` and ``owner/name`` will do:
  the split is ``train`` then, the field chosen as in a file;
- a local text file: ``.txt`` (its rows are the lines that are not blank), ``.json``, ``.jsonl`` or
  ``.parquet`` (field ``text``, else ``messages``, else ``instruction``, ``input`` and ``output``;
  for training in the opposite order; or the field that is named);
- a local file of token ids of shape (N, L): ``.npy`` or ``.safetensors``.
"""

import codecs
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from lorap.data.instructions import Instruction
from lorap.errors import LorapError, UsageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, Any]]
"""The messages of one conversation, as a chat template takes them."""

Row: TypeAlias = str | Messages | Instruction

Record: TypeAlias = Mapping[str, Any]
"""A row of a table, by column."""

SplitRole: TypeAlias = Literal["calibration", "evaluation", "training"]

_INSTRUCTION = "instruction with output"
"""Stands for the fields ``instruction`` and ``output``, and ``input`` where there is one."""

DEFAULT_FIELDS = ("text", "messages", _INSTRUCTION)
"""Where no field is named, the first of these that a record has. Some sets of instructions hold
each as one text as well, of which training could not tell the prompt from the response."""


@dataclass(frozen=True)
class HubSource:
    """One field of one split of a dataset on the Hugging Face Hub.

    Attributes
    ----------
    path : str
        ``owner/name``.
    split : str
        Split, with the slice syntax of the `datasets` library.
    field : str or None
        Column that holds the text or the messages; None for the first of those that are usual.
    config : str or None
        Configuration (subset) of the dataset.
    data_file : str or None
        The only file of the dataset to download, relative to its root.
    revision : str or None
        Branch, tag or commit.
    """

    path: str
    split: str
    field: str | None
    config: str | None = None
    data_file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        config = f" ({self.config})" if self.config else ""
        file = f", file {self.data_file}" if self.data_file else ""
        field = f", field {self.field}" if self.field else ""
        return f"{self.path}{config}, split {self.split}{file}{field}"


@dataclass(frozen=True)
class NamedSource:
    """What a short name stands for in each role; None where the set has no split for the role."""

    calibration: HubSource
    evaluation: HubSource | None


_WIKITEXT = {"path": "Salesforce/wikitext", "config": "wikitext-2-raw-v1", "field": "text"}
_PTB = {
    "path": "ptb-text-only/ptb_text_only",
    "revision": "refs/convert/parquet",
    "field": "sentence",
}

NAMED_SOURCES: Mapping[str, NamedSource] = MappingProxyType(
    {
        "bookcorpus": NamedSource(
            calibration=HubSource("rojagtap/bookcorpus", split="train", field="text"),
            evaluation=None,
        ),
        # One file of 1024, and the first 1100 validation rows, are what pruning papers use.
        "c4": NamedSource(
            calibration=HubSource(
                "allenai/c4",
                split="train",
                field="text",
                data_file="en/c4-train.00000-of-01024.json.gz",
            ),
            evaluation=HubSource(
                "allenai/c4",
                split="validation[:1100]",
                field="text",
                data_file="en/c4-validation.00000-of-00008.json.gz",
            ),
        ),
        "wikitext2": NamedSource(
            calibration=HubSource(split="train", **_WIKITEXT),
            evaluation=HubSource(split="test", **_WIKITEXT),
        ),
        "ptb": NamedSource(
            calibration=HubSource(split="train", **_PTB),
            evaluation=HubSource(split="validation", **_PTB),
        ),
    }
)
"""Sets with a short name, all of which load without a loading script."""


@dataclass(frozen=True)
class TextRows:
    """Rows of text, chat messages or instructions.

    Attributes
    ----------
    rows : sequence of Row
        All text, or all messages of a conversation, or all instructions. Rows of the hub and of
        parquet files are read when they are indexed.
    source : str
        The source as it was given.
    description : str
        The source in full: dataset, configuration, split and field, or the file.
    split : str or None
        Split of a hub dataset, None for a local file.
    """

    rows: Sequence[Row]
    source: str
    description: str
    split: str | None

    def render(self, index: int, tokenizer: "PreTrainedTokenizerBase") -> str:
        """Return row `index` as text.

        Chat messages through the tokenizer's chat template, instructions in Alpaca's prompt.

        Raises
        ------
        UsageError
            If the row holds messages that the tokenizer cannot render.
        """
        row = self.rows[index]
        if isinstance(row, str):
            return row
        return row.text() if isinstance(row, Instruction) else self.chat(index, row, tokenizer)

    def chat(
        self,
        index: int,
        messages: Messages,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        reply_follows: bool = False,
    ) -> str:
        """Return messages of row `index` as text, through the tokenizer's chat template.

        Parameters
        ----------
        index : int
        messages : list of dict
            The first messages of the row, or all.
        tokenizer : PreTrainedTokenizerBase
        reply_follows : bool
            End with what the template writes before a message of the assistant.

        Raises
        ------
        UsageError
            If the tokenizer cannot render them.
        """
        where = f"row {index} (counted from 0) of {self.source!r} holds chat messages"
        if getattr(tokenizer, "chat_template", None) is None:
            raise UsageError(f"{where}, but the model's tokenizer has no chat template")
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=reply_follows
            )
        except Exception as error:  # a template may raise anything
            raise UsageError(
                f"{where} that the tokenizer's chat template refuses: {first_line(error)}"
            ) from error
        return str(text)


@dataclass(frozen=True)
class TokenIds:
    """Pre-tokenised ids.

    Attributes
    ----------
    ids : ndarray of integers, shape (N, L)
        Token ids, of any integer dtype, not yet held against a vocabulary.
    source : str
        The source as it was given.
    """

    ids: npt.NDArray[np.integer[Any]]
    source: str


def read_source(
    source: str | os.PathLike[str], *, field: str | None = None, split_role: SplitRole
) -> TextRows | TokenIds:
    """Read a source: see the module's docstring for the grammar.

    Parameters
    ----------
    source : str or path
        Named set, ``owner/name:split:field``, or local file.
    field : str, optional
        Field of a ``.json``, ``.jsonl`` or ``.parquet`` file.
    split_role : {"calibration", "evaluation", "training"}
        Which split of a named set is meant; for training that of calibration.

    Returns
    -------
    TextRows or TokenIds
        At least one row. Rows of a ``.txt`` file are its lines that are not blank, without the line
        ending; rows of other sources are kept as they are, blank ones included.

    Raises
    ------
    UsageError
        If the source is not one of the above, does not exist, is empty or cannot be decoded, or
        if `field` is given where it has no meaning.
    LorapError
        If a dataset cannot be had from the hub, or the `datasets` package is missing.
    """
    source = os.fspath(source)
    hub = _hub_source(source, split_role)
    # Unlike Path.expanduser, this leaves the name of an unknown user as it is.
    path = Path(os.path.expanduser(source))
    reader = None if hub else _FILE_READERS.get(path.suffix.lower())
    with_fields = (_read_json, _read_jsonl, _read_parquet)
    if field is not None and (hub is not None or reader not in with_fields):
        raise UsageError(
            f"the field {field!r} cannot be chosen for {source!r}: a field is for .json, .jsonl "
            "and .parquet files (a hub source names it as its third part: owner/name:split:field)"
        )
    fields = DEFAULT_FIELDS[::-1] if split_role == "training" else DEFAULT_FIELDS
    if hub is not None:
        return _read_hub(hub, source, (hub.field,) if hub.field else fields)
    if reader is None:
        raise UsageError(_unknown_source(source, path, split_role))
    if not path.is_file():
        kind = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise UsageError(f"the data file {source!r} {kind}")
    try:
        return reader(path, source, fields if field is None else (field,))
    except OSError as error:
        raise UsageError(f"{source!r} cannot be read: {first_line(error)}") from error


def _hub_source(source: str, split_role: SplitRole) -> HubSource | None:
    named = NAMED_SOURCES.get(source)
    if named is not None:
        hub = named.evaluation if split_role == "evaluation" else named.calibration
        if hub is None:
            with_role = [name for name, entry in NAMED_SOURCES.items() if entry.evaluation]
            raise UsageError(
                f"{source!r} has no evaluation split; named sets that have one: "
                + ", ".join(with_role)
            )
        return hub
    name, split, field = r"([\w.-]+/[\w.-]+)", r":([^:\[\]]+(?:\[[^\[\]]*\])?)", r":([^:\[\]]+)"
    match = re.fullmatch(f"{name}{split}{field}", source)
    if match is None and split_role == "training":
        match = re.fullmatch(f"{name}(?:{split}(?:{field})?)?", source)
        if match is not None and ":" not in source and _is_file_name(source):
            return None
    return HubSource(match[1], split=match[2] or "train", field=match[3]) if match else None


def _is_file_name(source: str) -> bool:
    """Whether what could be a hub name is the name of a file: by its suffix, or one is there."""
    path = Path(source)
    return path.suffix.lower() in _FILE_READERS or path.exists()


def _unknown_source(source: str, path: Path, split_role: SplitRole) -> str:
    problem = (
        f"{source!r} has a suffix that is not known"
        if path.is_file()
        else f"{source!r} is neither a named set nor a file that exists"
    )
    hub = "owner/name or owner/name:split" if split_role == "training" else "owner/name:split:field"
    return (
        f"{problem}: expected one of {', '.join(NAMED_SOURCES)}, {hub} on the "
        f"hub, or a local file ending in {', '.join(_FILE_READERS)}"
    )


class _LazyRows(Sequence[Row]):
    """Rows that are fetched and checked when they are indexed."""

    def __init__(self, count: int, record: Callable[[int], Record], name: str, where: str) -> None:
        self._count = count
        self._record = record
        self._name = name
        self._where = where

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        where = f"row {index} (counted from 0) of {self._where}"
        return _row_of(self._record(index), self._name, where)


def _row_of(record: Record, name: str, where: str) -> Row:
    """Return what a record holds under the name of a field, or under ``_INSTRUCTION``."""
    if name != _INSTRUCTION:
        return _as_row(record[name], where)
    texts = {
        field: _as_text(record[field], f"field {field!r} of {where}")
        for field in ("instruction", "output")
    }
    given = record.get("input")
    texts["input"] = "" if given is None else _as_text(given, f"field 'input' of {where}")
    return Instruction(**texts)


def _as_text(value: object, where: str) -> str:
    """Return a text, or raise UsageError saying where it stands."""
    if not isinstance(value, str):
        found = "null" if value is None else f"a value of type {type(value).__name__}"
        raise UsageError(f"{where} holds {found}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{where} holds text that is not valid Unicode: {error}") from error
    return value


def _as_row(value: object, where: str) -> Row:
    """Return `value` as a row, or raise UsageError saying where it stands."""
    if isinstance(value, str):
        return _as_text(value, where)
    is_messages = (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, dict) and isinstance(item.get("role"), str) for item in value)
    )
    if is_messages:
        assert isinstance(value, list)
        return value
    found = "null" if value is None else f"a value of type {type(value).__name__}"
    raise UsageError(
        f"{where} holds {found}; expected text, or a list of chat messages with a 'role'"
    )


def _read_text(path: Path, source: str) -> str:
    data = path.read_bytes()
    if not data:
        raise UsageError(f"the data file {source!r} is empty")
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[mark:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = mark + error.start
        raise UsageError(
            f"{source!r} is not UTF-8: byte 0x{data[offset]:02x} at byte offset {offset} "
            "(counted from 0) cannot be decoded"
        ) from error


def _lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank, each with its number counted from 1."""
    # str.splitlines would also cut at characters that JSON strings and prose may hold.
    lines = (line.removesuffix("\r") for line in text.split("\n"))
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _read_txt(path: Path, source: str, fields: Sequence[str]) -> TextRows:
    rows = [line for _, line in _lines(_read_text(path, source))]
    if not rows:
        raise UsageError(f"the data file {source!r} is empty: it holds only blank lines")
    return TextRows(rows, source, f"file {path.name}, lines that are not blank", None)


def _read_jsonl(path: Path, source: str, fields: Sequence[str]) -> TextRows:
    def records() -> Iterable[tuple[str, object]]:
        for number, line in _lines(_read_text(path, source)):
            where = f"line {number} of {source!r}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{where} is not JSON: {first_line(error)}") from error

    rows = _rows_of_records(records(), fields)
    if not rows:
        raise UsageError(f"the data file {source!r} is empty: it holds only blank lines")
    return TextRows(rows, source, f"file {path.name}, {_in_words(fields)}", None)


def _read_json(path: Path, source: str, fields: Sequence[str]) -> TextRows:
    try:
        content = json.loads(_read_text(path, source))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source!r} is not JSON: {first_line(error)}") from error
    if not isinstance(content, list):
        raise UsageError(
            f"{source!r} holds a JSON {type(content).__name__}; expected an array of objects "
            "(one object a line belongs into a .jsonl file)"
        )
    numbered = ((f"record {n} of {source!r}", record) for n, record in enumerate(content, start=1))
    rows = _rows_of_records(numbered, fields)
    if not rows:
        raise UsageError(f"the data file {source!r} is empty: it holds no records")
    return TextRows(rows, source, f"file {path.name}, {_in_words(fields)}", None)


def _rows_of_records(records: Iterable[tuple[str, object]], fields: Sequence[str]) -> list[Row]:
    """Return the rows of records, each given with where it stands; all must be of one kind."""
    rows: list[Row] = []
    for where, record in records:
        if not isinstance(record, dict):
            raise UsageError(f"{where} holds a JSON {type(record).__name__}; expected an object")
        name = _choose_field(record, fields, where)
        row = _row_of(record, name, where if name == _INSTRUCTION else f"field {name!r} in {where}")
        if rows and type(row) is not type(rows[0]):
            raise UsageError(
                f"{where} mixes kinds: a file holds text, chat messages or instructions, the same "
                "throughout"
            )
        rows.append(row)
    return rows


def _in_words(fields: Sequence[str]) -> str:
    return f"field {' or '.join(fields)}"


def _choose_field(available: Mapping[str, object], fields: Sequence[str], where: str) -> str:
    """Return the first of the fields that a record has."""
    for name in fields:
        needed = ("instruction", "output") if name == _INSTRUCTION else (name,)
        if all(field in available for field in needed):
            return name
    expected = " or ".join(repr(name) for name in fields)
    present = ", ".join(repr(name) for name in available) or "none"
    raise UsageError(f"{where} has no field {expected}; its fields: {present}")


def _read_parquet(path: Path, source: str, fields: Sequence[str]) -> TextRows:
    parquet = _import("pyarrow.parquet", "to read a .parquet file", "pyarrow")
    arrow = importlib.import_module("pyarrow")
    try:
        schema = parquet.read_schema(path)
        name = _choose_field(dict.fromkeys(schema.names), fields, repr(source))
        wanted = ["instruction", "input", "output"] if name == _INSTRUCTION else [name]
        table = parquet.read_table(path, columns=[n for n in wanted if n in schema.names])
    except arrow.ArrowException as error:
        raise UsageError(f"{source!r} is not a parquet file: {first_line(error)}") from error
    if table.num_rows == 0:
        raise UsageError(f"the data file {source!r} is empty: it holds no rows")

    def record(index: int) -> Record:
        return {column: table.column(column)[index].as_py() for column in table.column_names}

    rows = _LazyRows(table.num_rows, record, name, f"{source!r}, field {name}")
    _ = rows[0]  # a column of another kind is refused at once
    return TextRows(rows, source, f"file {path.name}, field {name}", None)


def _read_npy(path: Path, source: str, fields: Sequence[str]) -> TokenIds:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UsageError(
            f"{source!r} is not a .npy file of integers: {first_line(error)}"
        ) from error
    if not isinstance(ids, np.ndarray):
        ids.close()
        raise UsageError(f"{source!r} is an archive of several arrays; expected one .npy array")
    return TokenIds(check_ids_array(ids, source), source)


def _read_safetensors(path: Path, source: str, fields: Sequence[str]) -> TokenIds:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            if "input_ids" in names:
                name = "input_ids"
            elif len(names) == 1:
                name = names[0]
            else:
                raise UsageError(
                    f"{source!r} holds {len(names)} tensors; expected one tensor, or one named "
                    "'input_ids'"
                )
            # NumPy has no bfloat16 or float8: the stored dtype is looked at before the tensor.
            dtype = file.get_slice(name).get_dtype()
            if not re.fullmatch(r"[IU]\d+", dtype):
                raise UsageError(_wrong_dtype(source, dtype))
            ids = file.get_tensor(name)
    except SafetensorError as error:
        raise UsageError(
            f"{source!r} is not a whole safetensors file: {first_line(error)}"
        ) from error
    return TokenIds(check_ids_array(ids, source), source)


def _wrong_dtype(source: str, dtype: object) -> str:
    return f"{source!r} holds values of dtype {dtype}; expected token ids of an integer dtype"


def check_ids_array(ids: npt.NDArray[Any], source: str) -> npt.NDArray[np.integer[Any]]:
    """Return `ids` if it is an integer array of shape (N, L) with N, L >= 1.

    Raises
    ------
    UsageError
        If the dtype, the rank or the size is another.
    """
    if not np.issubdtype(ids.dtype, np.integer):
        raise UsageError(_wrong_dtype(source, ids.dtype))
    if ids.ndim != 2:
        raise UsageError(
            f"{source!r} holds an array of shape {ids.shape}; expected token ids of shape (N, L)"
        )
    if ids.size == 0:
        raise UsageError(f"{source!r} is empty: it holds token ids of shape {ids.shape}")
    return ids


_FILE_READERS: Mapping[str, Callable[[Path, str, Sequence[str]], TextRows | TokenIds]] = {
    ".txt": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".npy": _read_npy,
    ".safetensors": _read_safetensors,
}


def _import(module: str, purpose: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LorapError(
            f"the package {package!r} is needed {purpose}: install it with `pip install {package}`"
        ) from error


def _load_hub_table(hub: HubSource) -> Sequence[Mapping[str, object]]:
    """Load a split with the `datasets` library: the one place that calls it."""
    datasets = _import("datasets", "for data from the Hugging Face Hub", "datasets")
    options: dict[str, object] = {}
    if hub.data_file is not None:
        options["data_files"] = {hub.split.partition("[")[0]: hub.data_file}
        # The dataset's card states the sizes of the whole set, which one file does not have.
        options["verification_mode"] = "no_checks"
    table: Sequence[Mapping[str, object]] = datasets.load_dataset(
        hub.path, name=hub.config, split=hub.split, revision=hub.revision, **options
    )
    return table


def _read_hub(hub: HubSource, source: str, fields: Sequence[str]) -> TextRows:
    try:
        table = _load_hub_table(hub)
        count = len(table)
        available: Mapping[str, object] = table[0] if count else {}
    except LorapError:
        raise
    except Exception as error:  # the library and its network layers raise errors of many kinds
        raise LorapError(
            f"the data {source!r} ({hub}) cannot be loaded from the Hugging Face Hub: "
            f"{first_line(error)}"
        ) from error
    if count == 0:
        raise UsageError(f"the data {source!r} ({hub}) is empty: it holds no rows")
    name = _choose_field(available, fields, f"the data {source!r}")
    rows = _LazyRows(count, lambda index: table[index], name, f"{source!r}, field {name}")
    _ = rows[0]  # a column of another kind is refused at once
    return TextRows(rows, source, str(hub), hub.split)
