"""The grammar of a SOURCE, each kind of file, the hub, and what is said when one cannot be read."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file as save_torch

from lorap.data import NAMED_SOURCES, HubSource, TextRows, TokenIds, read_source, sources
from lorap.data.instructions import Instruction
from lorap.errors import LorapError, UsageError


def read_text(source: str | Path, **options: Any) -> TextRows:
    data = read_source(source, split_role="calibration", **options)
    assert isinstance(data, TextRows)
    return data


def read_ids(source: str | Path) -> TokenIds:
    data = read_source(source, split_role="calibration")
    assert isinstance(data, TokenIds)
    return data


def fails(source: str | Path, *fragments: str, **options: Any) -> None:
    with pytest.raises(UsageError) as caught:
        read_source(source, split_role=options.pop("split_role", "calibration"), **options)
    for fragment in fragments:
        assert fragment in str(caught.value)


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- text files -----------------------------------------------------------------------------------


def test_txt_rows_are_the_lines_that_are_not_blank(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff first \r\n\r\n   \nsecond\u2028still second\x0b\nthird".encode())
    data = read_text(path)
    assert list(data.rows) == [" first ", "second\u2028still second\x0b", "third"]
    assert data.source == str(path)
    assert data.split is None


def test_suffix_is_recognised_in_any_case(tmp_path: Path) -> None:
    path = tmp_path / "A.TXT"
    path.write_text("one\n")
    assert list(read_text(path).rows) == ["one"]


@pytest.mark.parametrize(("mark", "offset"), [(b"", 4), (b"\xef\xbb\xbf", 7)])
def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path, mark: bytes, offset: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(mark + b"caf\n\xe9t\xe9")
    fails(path, "not UTF-8", "0xe9", f"byte offset {offset} ", str(path))


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
@pytest.mark.parametrize("content", [b"", b"\n \n\t\r\n"])
def test_empty_text_files(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    fails(path, "is empty", str(path))


def test_jsonl_text_messages_and_named_field(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    text = write_jsonl(tmp_path / "t.jsonl", {"text": "a\u2028b", "body": "x"}, {"text": ""})
    assert list(read_text(text).rows) == ["a\u2028b", ""]
    chat = write_jsonl(tmp_path / "m.jsonl", {"messages": messages})
    assert list(read_text(chat).rows) == [messages]
    both = write_jsonl(tmp_path / "b.jsonl", {"messages": messages, "text": "t", "body": "x"})
    assert list(read_text(both).rows) == ["t"]
    assert list(read_text(both, field="messages").rows) == [messages]
    assert list(read_text(both, field="body").rows) == ["x"]


@pytest.mark.parametrize(
    ("line", "fragments"),
    [
        ("{not json", ["line 3", "is not JSON"]),
        ("[" * 100_000, ["line 3", "is not JSON"]),
        ("[1]", ["line 3", "JSON list", "expected an object"]),
        ('{"body": "x"}', ["line 3", "'text' or 'messages'", "'body'"]),
        ("{}", ["line 3", "'text' or 'messages'", "none"]),
        ('{"text": 5}', ["line 3", "'text'", "int", "expected text"]),
        ('{"text": null}', ["line 3", "null"]),
        ('{"messages": []}', ["line 3", "'messages'", "list", "'role'"]),
        ('{"messages": [{"content": "x"}]}', ["line 3", "'role'"]),
        ('{"text": "\\ud800"}', ["line 3", "not valid Unicode"]),
        ('{"messages": [{"role": "user", "content": "x"}]}', ["line 3", "mixes"]),
    ],
)
def test_bad_jsonl_line_is_named_by_its_number(
    tmp_path: Path, line: str, fragments: list[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    fails(path, str(path), *fragments)


def test_missing_named_field_of_jsonl(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "x"})
    fails(path, "line 1", "no field 'body'", "'text'", field="body")


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return path


def test_parquet_text_messages_and_named_field(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    path = write_parquet(
        tmp_path / "a.parquet", text=["one", ""], body=["x", "y"], chat=[messages, messages]
    )
    rows = read_text(path).rows
    assert list(rows) == ["one", ""]
    assert rows[0:1] == ["one"]
    with pytest.raises(IndexError):
        rows[2]
    assert list(read_text(path, field="body").rows) == ["x", "y"]
    assert list(read_text(path, field="chat").rows) == [messages, messages]


def test_bad_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["x", None], number=[1, 2])
    fails(path, "no field 'text' or 'messages'", "'body', 'number'")
    fails(path, "no field 'other'", field="other")
    fails(path, "int", "expected text", field="number")
    rows = read_text(path, field="body").rows
    with pytest.raises(UsageError, match=r"row 1 .* holds null"):
        rows[1]
    fails(write_parquet(tmp_path / "empty.parquet", text=[]), "is empty")
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 this is not parquet")
    fails(broken, "is not a parquet file", str(broken))


# --- files of ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i4", "u4", "i8", "u8"])
def test_npy_of_any_integer_dtype(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6, dtype=dtype).reshape(2, 3))
    assert read_ids(path).ids.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("array", "fragments"),
    [
        (np.zeros((2, 3), dtype=np.float32), ["dtype float32", "integer"]),
        (np.zeros((2, 3), dtype=bool), ["dtype bool", "integer"]),
        (np.zeros(3, dtype=np.int64), ["shape (3,)", "(N, L)"]),
        (np.zeros((1, 2, 3), dtype=np.int64), ["shape (1, 2, 3)", "(N, L)"]),
        (np.zeros((0, 3), dtype=np.int64), ["empty", "(0, 3)"]),
        (np.zeros((3, 0), dtype=np.int64), ["empty", "(3, 0)"]),
        (np.array([[{}]], dtype=object), ["not a .npy file of integers"]),
    ],
)
def test_bad_npy_arrays(tmp_path: Path, array: np.ndarray, fragments: list[str]) -> None:
    path = tmp_path / "a.npy"
    np.save(path, array)
    fails(path, str(path), *fragments)


def test_npy_that_is_broken_truncated_or_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for content in (b"", b"no array", b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        fails(path, "not a .npy file of integers")
    np.save(path, np.zeros((4, 4), dtype=np.int64))
    path.write_bytes(path.read_bytes()[:-20])
    fails(path, "not a .npy file of integers")
    with path.open("wb") as file:
        np.savez(file, a=np.zeros((2, 2), dtype=np.int64))
    fails(path, "archive")


def test_safetensors_one_tensor_or_input_ids(tmp_path: Path) -> None:
    ids = np.arange(6, dtype=np.uint16).reshape(2, 3)
    path = tmp_path / "a.safetensors"
    save_numpy({"anything": ids}, path)
    assert read_ids(path).ids.tolist() == ids.tolist()
    save_numpy({"input_ids": ids, "other": np.zeros((1, 1), dtype=np.int8)}, path)
    assert read_ids(path).ids.tolist() == ids.tolist()


def test_bad_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_numpy({"a": np.zeros((1, 1), dtype=np.int8), "b": np.zeros((1, 1), dtype=np.int8)}, path)
    fails(path, "2 tensors", "'input_ids'")
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float32, "F32"), (torch.bool, "BOOL")):
        save_torch({"a": torch.zeros(2, 2, dtype=dtype)}, path)
        fails(path, f"dtype {name}", "integer")
    save_torch({"a": torch.zeros(2, dtype=torch.int32)}, path)
    fails(path, "shape (2,)")
    path.write_bytes(path.read_bytes()[:-1])
    fails(path, "not a whole safetensors file")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet", "npy", "safetensors"])
def test_file_that_does_not_exist(tmp_path: Path, suffix: str) -> None:
    fails(tmp_path / f"none.{suffix}", "does not exist", f"none.{suffix}")


def test_folder_with_the_suffix_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    fails(tmp_path / "a.txt", "is a folder")


def test_unknown_sources_list_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x")
    known = ["bookcorpus, c4, wikitext2, ptb", "owner/name:split:field"]
    suffixes = ".txt, .json, .jsonl, .parquet, .npy, .safetensors"
    fails(path, "suffix that is not known", *known, suffixes)
    for source in ("wikitext", "owner/name", "owner/name:train", "a.csv", ""):
        fails(source, f"{source!r} is neither a named set nor a file", *known, suffixes)


def test_field_is_refused_where_it_has_no_meaning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for source in (tmp_path / "a.txt", tmp_path / "a.npy", "c4", "owner/name:train:text"):
        fails(source, "field 'body'", ".jsonl and .parquet", field="body")


# --- the hub --------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[HubSource]:
    """Replace the hub by a table of two rows, and record what is asked of it."""
    calls: list[HubSource] = []

    def load(hub: HubSource) -> list[dict[str, object]]:
        calls.append(hub)
        return [{hub.field: "one\n"}, {hub.field: ""}]

    monkeypatch.setattr(sources, "_load_hub_table", load)
    return calls


def test_named_sets_load_what_is_written_down(asked: list[HubSource]) -> None:
    expected = {
        ("bookcorpus", "calibration"): HubSource("rojagtap/bookcorpus", "train", "text"),
        ("c4", "calibration"): HubSource(
            "allenai/c4", "train", "text", data_file="en/c4-train.00000-of-01024.json.gz"
        ),
        ("c4", "evaluation"): HubSource(
            "allenai/c4",
            "validation[:1100]",
            "text",
            data_file="en/c4-validation.00000-of-00008.json.gz",
        ),
        ("wikitext2", "calibration"): HubSource(
            "Salesforce/wikitext", "train", "text", config="wikitext-2-raw-v1"
        ),
        ("wikitext2", "evaluation"): HubSource(
            "Salesforce/wikitext", "test", "text", config="wikitext-2-raw-v1"
        ),
        ("ptb", "calibration"): HubSource(
            "ptb-text-only/ptb_text_only", "train", "sentence", revision="refs/convert/parquet"
        ),
        ("ptb", "evaluation"): HubSource(
            "ptb-text-only/ptb_text_only", "validation", "sentence", revision="refs/convert/parquet"
        ),
    }
    assert {name for name, _ in expected} == set(NAMED_SOURCES)
    for (name, role), hub in expected.items():
        data = read_source(name, split_role=role)  # type: ignore[arg-type]
        assert asked.pop() == hub
        assert isinstance(data, TextRows)
        assert (data.source, data.split) == (name, hub.split)
        assert hub.path in data.description
        assert list(data.rows) == ["one\n", ""]


def test_bookcorpus_has_no_evaluation_split(asked: list[HubSource]) -> None:
    fails("bookcorpus", "no evaluation split", "c4, wikitext2, ptb", split_role="evaluation")
    assert asked == []


@pytest.mark.parametrize("split", ["train", "train[:100]", "train[10%:20%]"])
def test_any_dataset_of_the_hub(asked: list[HubSource], split: str) -> None:
    data = read_text(f"owner/na-me_1.0:{split}:body")
    assert asked == [HubSource("owner/na-me_1.0", split, "body")]
    assert data.split == split


def test_hub_field_that_is_missing_or_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_load_hub_table", lambda hub: [{"a": 1, "b": "x"}])
    fails("o/n:train:text", "'o/n:train:text'", "no field 'text'", "'a', 'b'")
    fails("o/n:train:a", "'o/n:train:a'", "int", "expected text")
    monkeypatch.setattr(sources, "_load_hub_table", lambda hub: [])
    fails("o/n:train:text", "'o/n:train:text'", "is empty")


def test_load_dataset_is_called_with_the_files_and_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[tuple[str, dict[str, object]]] = []

    def load_dataset(path: str, **options: object) -> list[dict[str, str]]:
        calls.append((path, options))
        return [{"text": "x", "sentence": "x"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read_source("c4", split_role="evaluation")
    read_source("ptb", split_role="evaluation")
    assert calls == [
        (
            "allenai/c4",
            {
                "name": None,
                "split": "validation[:1100]",
                "revision": None,
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
                "verification_mode": "no_checks",
            },
        ),
        (
            "ptb-text-only/ptb_text_only",
            {"name": None, "split": "validation", "revision": "refs/convert/parquet"},
        ),
    ]


def test_rows_of_a_real_datasets_table(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    messages = [{"role": "user", "content": "hello"}]
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "chat": [messages, messages]})
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: table)
    assert list(read_text("o/n:train:text").rows) == ["one", "two"]
    assert list(read_text("o/n:train:chat").rows) == [messages, messages]


@pytest.mark.parametrize(
    "error", [ConnectionError("no route to host\ndetails"), ValueError("Unknown split"), OSError()]
)
def test_absent_hub_is_one_sentence_that_names_the_source(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(path: str, **options: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(LorapError) as caught:
        read_source("wikitext2", split_role="calibration")
    message = str(caught.value)
    assert "'wikitext2'" in message
    assert "Salesforce/wikitext" in message
    assert "cannot be loaded from the Hugging Face Hub" in message
    assert "\n" not in message
    assert (str(error).split("\n")[0] or "OSError") in message


@pytest.mark.parametrize(
    ("module", "source", "package"),
    [("datasets", "c4", "datasets"), ("pyarrow.parquet", "a.parquet", "pyarrow")],
)
def test_missing_package_is_said_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, package: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LorapError, match=f"pip install {package}") as caught:
        read_source(source, split_role="calibration")
    assert not isinstance(caught.value, UsageError)


# --- instructions ---------------------------------------------------------------------------------

ADD = {"instruction": "Add.", "input": "1 2", "output": "3"}
ROWS = [Instruction("Add.", "1 2", "3"), Instruction("Say hello.", "", "Hello.")]
RECORDS = [ADD, {"instruction": "Say hello.", "output": "Hello.", "input": None}]


def read_training(source: str | Path, **options: Any) -> TextRows:
    data = read_source(source, split_role="training", **options)
    assert isinstance(data, TextRows)
    return data


def test_instructions_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    write_jsonl(tmp_path / "a.jsonl", *RECORDS)
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    for suffix in ("json", "jsonl", "parquet"):
        assert list(read_training(tmp_path / f"a.{suffix}").rows) == ROWS
        # Calibration takes them as text, prompt and response.
        data = read_text(tmp_path / f"a.{suffix}")
        assert data.render(0, None) == ROWS[0].text()  # type: ignore[arg-type]


def test_training_prefers_instructions_and_calibration_text(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", {**ADD, "text": "all in one"})
    assert list(read_training(file).rows) == ROWS[:1]
    assert list(read_text(file).rows) == ["all in one"]
    assert list(read_training(file, field="text").rows) == ["all in one"]


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        ("{}", ["holds a JSON dict; expected an array of objects"]),
        ("[", ["is not JSON"]),
        ("[]", ["is empty: it holds no records"]),
        ('["a"]', ["record 1", "holds a JSON str; expected an object"]),
        ('[{"text": "x"}, {"text": null}]', ["record 2", "null"]),
        ('[{"instruction": "x"}]', ["record 1", "no field"]),
        ('[{"instruction": "x", "output": 3}]', ["'output'", "int; expected text"]),
        ('[{"instruction": "x", "input": [], "output": "y"}]', ["'input'", "list; expected text"]),
        ('[{"instruction": "x", "output": "y"}, {"text": "z"}]', ["record 2", "mixes kinds"]),
    ],
)
def test_bad_json_files(tmp_path: Path, content: str, fragments: list[str]) -> None:
    (tmp_path / "a.json").write_text(content)
    fails(tmp_path / "a.json", *fragments, split_role="training")


def test_sets_of_instructions_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's reader as it is, on a table of the columns that yahma/alpaca-cleaned has."""
    datasets = pytest.importorskip("datasets")
    calls: list[tuple[str, dict[str, object]]] = []
    table = datasets.Dataset.from_list(RECORDS)

    def load_dataset(path: str, **options: object) -> Any:
        calls.append((path, options))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source, split in (
        ("yahma/alpaca-cleaned", "train"),
        ("yahma/alpaca-cleaned:train[:2]", "train[:2]"),
        ("owner/other:test:output", "test"),
    ):
        data = read_training(source)
        assert calls.pop() == (
            source.split(":")[0],
            {"name": None, "split": split, "revision": None},
        )
        assert data.split == split
        assert list(data.rows) == (ROWS if "alpaca" in source else ["3", "Hello."])
    fails("yahma/alpaca-cleaned", "is neither a named set nor a file that exists")


def test_a_file_is_not_taken_for_a_name_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fails("data/a.jsonl", "does not exist", split_role="training")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("x")
    fails("data/a.csv", "suffix that is not known", "owner/name", split_role="training")
