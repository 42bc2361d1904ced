"""Which samples are chosen, that the choice repeats, and which requests are refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lorap.data import Calibration, calibration, calibration_from_ids, load_calibration
from lorap.errors import UsageError

BOS, VOCABULARY = 0, 130


class CharacterTokenizer:
    """One token per character, with a BOS when special tokens are asked for."""

    chat_template = None

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str, *, add_special_tokens: bool, **_: object) -> dict[str, list[int]]:
        self.characters += len(text)
        return {"input_ids": [BOS] * add_special_tokens + [ord(character) for character in text]}


def characters() -> PreTrainedTokenizerBase:
    return cast(PreTrainedTokenizerBase, CharacterTokenizer())


def no_tokenizer() -> PreTrainedTokenizerBase:
    raise AssertionError("ids need no tokenizer")


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 .. w99 are the ids 2 .. 101; a BOS by default, as LLaMA's tokenizers have."""
    words = {"<s>": BOS, "<unk>": 1} | {f"w{i}": i + 2 for i in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>", model_max_length=8
    )


def load(
    source: str | Path,
    tokenizer: Callable[[], PreTrainedTokenizerBase] = characters,
    **options: Any,
) -> Calibration:
    options = {"vocab_size": VOCABULARY, "max_positions": 512} | options
    return load_calibration(source, tokenizer=tokenizer, **options)


def texts(samples: Calibration) -> list[str]:
    return ["".join(map(chr, row)) for row in samples.input_ids.tolist()]


def fails(source: str | Path, *fragments: str, **options: Any) -> None:
    with pytest.raises(UsageError) as caught:
        load(source, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str) -> Path:
        path = tmp_path / "rows.txt"
        path.write_text("\n".join(lines))
        return path

    return write


# --- text -----------------------------------------------------------------------------------------


def test_crops_of_long_rows_stay_inside_one_row(rows: Callable[..., Path]) -> None:
    lines = ["abcdefghij", "klmnopqrst", "uvwxyzABCD"]
    chosen = texts(load(rows(*lines), samples=300, seqlen=4))
    possible = {line[i : i + 4] for line in lines for i in range(7)}
    assert set(chosen) == possible


def test_row_of_exactly_the_length_is_not_joined(rows: Callable[..., Path]) -> None:
    assert set(texts(load(rows("abcd", "efgh"), samples=40, seqlen=4))) == {"abcd", "efgh"}


def test_short_rows_are_joined_by_newlines_to_as_few_as_suffice(rows: Callable[..., Path]) -> None:
    # From "ab": 8 tokens need "ab\ncd\nef" (8). From "cd": "cd\nef\ng" is 7, so "cd\nef\ng\nhi".
    # From "ef" on: "ef\ng\nhi" is 7, the end of the data, hence never a start.
    chosen = set(texts(load(rows("ab", "cd", "", "ef", "g", "hi"), samples=200, seqlen=8)))
    assert chosen == {"ab\ncd\nef", "cd\nef\ng\n", "d\nef\ng\nh", "\nef\ng\nhi"}


def test_joining_many_rows_takes_the_fewest(rows: Callable[..., Path]) -> None:
    # Each row and its newline are 3 tokens: 50 tokens need 17 rows, 17 * 3 - 1 = 50.
    lines = [f"{i:02d}" for i in range(60)]
    whole = "\n".join(lines)
    chosen = texts(load(rows(*lines), samples=100, seqlen=50))
    starts = {whole.index(text) for text in chosen}
    assert all(start % 3 == 0 for start in starts)
    assert max(starts) <= 3 * 43
    assert len(starts) > 20


def test_text_is_not_wrapped_and_short_tails_are_drawn_again(rows: Callable[..., Path]) -> None:
    lines = ["abcdefgh", *["x"] * 3]
    assert set(texts(load(rows(*lines), samples=50, seqlen=8))) == {"abcdefgh"}


def test_data_of_exactly_one_sample(rows: Callable[..., Path]) -> None:
    assert texts(load(rows("ab", "cd"), samples=3, seqlen=5)) == ["ab\ncd"] * 3


def test_data_shorter_than_one_sample_gives_both_numbers(rows: Callable[..., Path]) -> None:
    fails(rows("ab", "cd"), "5 tokens", "one sample of 6", samples=1, seqlen=6)


def test_parquet_of_blank_rows_only_is_too_short(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["", " \n", ""]}), tmp_path / "a.parquet")
    fails(tmp_path / "a.parquet", "0 tokens", "one sample of 2", samples=1, seqlen=2)


def test_only_the_rows_drawn_are_tokenised(rows: Callable[..., Path]) -> None:
    tokenizer = CharacterTokenizer()
    path = rows(*["x" * 100] * 1000)
    load(path, lambda: cast(PreTrainedTokenizerBase, tokenizer), samples=5, seqlen=10)
    assert tokenizer.characters <= 500


def test_same_seed_same_samples_and_another_seed_others(rows: Callable[..., Path]) -> None:
    path = rows(*[chr(40 + i % 60) * (1 + i % 7) for i in range(300)])
    first, again, other = (load(path, samples=20, seqlen=16, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.fingerprint == again.fingerprint
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.fingerprint != other.fingerprint


def test_samples_have_the_shape_dtype_and_source(rows: Callable[..., Path]) -> None:
    path = rows("abcdefgh" * 40)
    samples = load(path)
    assert samples.input_ids.shape == (128, 128)
    assert samples.input_ids.dtype == torch.int64
    assert samples.source == str(path)


def test_no_bos_although_the_tokenizer_adds_one_by_default(rows: Callable[..., Path]) -> None:
    tokenizer = word_tokenizer()
    assert tokenizer("w0")["input_ids"] == [BOS, 2]
    path = rows(*[" ".join(f"w{(7 * i + j) % 100}" for j in range(12)) for i in range(20)])
    samples = load(path, lambda: tokenizer, samples=30, seqlen=12)
    assert samples.input_ids.min() >= 2
    assert {tuple(row) for row in samples.input_ids.tolist()} <= {
        tuple((7 * i + j) % 100 + 2 for j in range(12)) for i in range(20)
    }


def test_long_text_gives_no_warning(
    rows: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    load(rows(" ".join(["w1"] * 50)), word_tokenizer, samples=1, seqlen=8)
    assert caplog.records == []


def write_chat(path: Path) -> Path:
    messages = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    return path


def test_chat_messages_keep_the_special_tokens_of_the_template(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}"
    samples = load(write_chat(tmp_path / "a.jsonl"), lambda: tokenizer, samples=2, seqlen=5)
    assert samples.input_ids.tolist() == [[BOS, 3, 4, BOS, 5]] * 2


def test_chat_messages_that_cannot_be_rendered(tmp_path: Path) -> None:
    path = write_chat(tmp_path / "a.jsonl")
    fails(path, "row 0", "no chat template", tokenizer=word_tokenizer, samples=1, seqlen=2)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    fails(
        path,
        "row 0",
        "refuses: roles must alternate",
        tokenizer=lambda: tokenizer,
        samples=1,
        seqlen=2,
    )


def test_tokenizer_of_another_model(rows: Callable[..., Path]) -> None:
    fails(
        rows("aaaz"),
        "token id 122 at row 0, position 3",
        "tokenised text",
        "100 entries, 0 to 99",
        vocab_size=100,
        samples=1,
        seqlen=4,
    )


# --- ids ------------------------------------------------------------------------------------------


@pytest.fixture
def ids_file(tmp_path: Path) -> Callable[[Any], Path]:
    def write(ids: Any) -> Path:
        path = tmp_path / "ids.npy"
        np.save(path, np.asarray(ids))
        return path

    return write


IDS = np.arange(120, dtype=np.int32).reshape(10, 12)


@pytest.mark.parametrize("seed", [0, 5])
def test_ids_of_the_size_asked_for_are_taken_in_order(
    ids_file: Callable[[Any], Path], seed: int
) -> None:
    samples = load(ids_file(IDS), no_tokenizer, samples=10, seqlen=12, seed=seed)
    assert samples.input_ids.tolist() == IDS.tolist()


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i4", "u2", "i8", "u8"])
def test_ids_of_any_integer_dtype_give_the_same_samples(
    ids_file: Callable[[Any], Path], dtype: str
) -> None:
    reference = calibration_from_ids(IDS, vocab_size=120, max_positions=None)
    samples = load(ids_file(IDS.astype(dtype)), no_tokenizer, samples=10, seqlen=12)
    assert samples.input_ids.dtype == torch.int64
    assert samples.fingerprint == reference.fingerprint


def test_more_rows_are_chosen_from_without_replacement(ids_file: Callable[[Any], Path]) -> None:
    path = ids_file(IDS)
    choices = [load(path, samples=9, seqlen=12, seed=s).input_ids.tolist() for s in range(20)]
    for rows in choices:
        assert len({tuple(row) for row in rows}) == 9
        assert all(row in IDS.tolist() for row in rows)
    assert len({str(rows) for rows in choices}) > 10
    assert choices[3] == load(path, samples=9, seqlen=12, seed=3).input_ids.tolist()


def test_longer_rows_are_cropped_once_each(ids_file: Callable[[Any], Path]) -> None:
    path = ids_file(IDS)
    seen = set()
    for seed in range(20):
        crops = load(path, samples=10, seqlen=10, seed=seed).input_ids
        offsets = crops[:, 0] - torch.arange(0, 120, 12)
        seen |= set(offsets.tolist())
        assert torch.equal(crops, crops[:, :1] + torch.arange(10))
    assert seen == {0, 1, 2}


def test_fewer_ids_than_asked_for_state_both(ids_file: Callable[[Any], Path]) -> None:
    path = ids_file(IDS)
    stated = "10 rows of 12 token ids"
    fails(path, stated, "11 samples of 12", samples=11, seqlen=12)
    fails(path, stated, "10 samples of 13", samples=10, seqlen=13)


@pytest.mark.parametrize(("value", "problem"), [(120, "outside"), (-1, "negative"), (-100, "neg")])
def test_ids_outside_the_vocabulary(
    ids_file: Callable[[Any], Path], value: int, problem: str
) -> None:
    ids = IDS.copy()
    ids[3, 7] = ids[4, 1] = value
    path = ids_file(ids)
    fails(
        path,
        f"token id {value} at row 3, position 7",
        problem,
        str(path),
        "120 entries, 0 to 119",
        vocab_size=120,
        samples=1,
        seqlen=4,
    )


def test_unsigned_id_beyond_int64(ids_file: Callable[[Any], Path]) -> None:
    ids = np.array([[1, 2**64 - 1]], dtype=np.uint64)
    fails(ids_file(ids), f"token id {2**64 - 1} at row 0, position 1", samples=1, seqlen=2)


def test_safetensors_of_ids(tmp_path: Path) -> None:
    save_file({"input_ids": torch.from_numpy(IDS)}, tmp_path / "a.safetensors")
    samples = load(tmp_path / "a.safetensors", no_tokenizer, samples=10, seqlen=12)
    assert samples.input_ids.tolist() == IDS.tolist()


def test_fingerprint_is_that_of_the_docstring() -> None:
    samples = calibration_from_ids(
        torch.tensor([[1, 2], [3, 258]]), vocab_size=300, max_positions=None
    )
    stream = b"".join(n.to_bytes(8, "little") for n in (2, 2, 1, 2, 3, 258))
    assert samples.fingerprint == hashlib.sha256(stream).hexdigest()
    flat = calibration_from_ids(torch.tensor([[1, 2, 3, 258]]), vocab_size=300, max_positions=None)
    assert flat.fingerprint != samples.fingerprint


# --- ids in memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_and_tensors_in_memory_follow_the_same_rules(
    ids_file: Callable[[Any], Path], order: Any
) -> None:
    array = np.array(IDS, order=order)
    array.setflags(write=False)
    options: dict[str, Any] = {"vocab_size": 120, "max_positions": 12, "samples": 4, "seqlen": 5}
    from_file = load(ids_file(IDS), no_tokenizer, seed=2, **options)
    from_array = calibration_from_ids(array, seed=2, **options)
    from_tensor = calibration_from_ids(torch.from_numpy(IDS.copy()), seed=2, **options)
    assert from_file.fingerprint == from_array.fingerprint == from_tensor.fingerprint
    assert np.array_equal(array, IDS)


def test_samples_do_not_share_memory_with_the_ids_given() -> None:
    ids = torch.arange(6).reshape(2, 3)
    samples = calibration_from_ids(ids, vocab_size=6, max_positions=None)
    ids += 100
    assert samples.input_ids.tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_tensors_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(UsageError, match=f"dtype .*{name}.*integer"):
        calibration_from_ids(torch.zeros(2, 3, dtype=dtype), vocab_size=5, max_positions=None)


def test_tensors_in_memory_of_wrong_rank_or_ids() -> None:
    with pytest.raises(UsageError, match=r"shape \(4,\)"):
        calibration_from_ids(torch.zeros(4, dtype=torch.int64), vocab_size=5, max_positions=None)
    with pytest.raises(UsageError, match=r"id 5 at row 0, position 1 .* given in memory"):
        calibration_from_ids(torch.tensor([[0, 5]]), vocab_size=5, max_positions=None)
    with pytest.raises(UsageError, match=r"2 tokens .* 1 positions"):
        calibration_from_ids(torch.tensor([[0, 1]]), vocab_size=5, max_positions=1)


# --- requests -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"samples": 0}, ["samples", "at least 1", "got 0"]),
        ({"seqlen": 0}, ["sequence length", "at least 1", "got 0"]),
        ({"seqlen": 513}, ["513 tokens", "512 positions"]),
        ({"seed": -1}, ["seed", "-1"]),
    ],
)
def test_requests_out_of_range_are_refused_before_the_source_is_read(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, int], fragments: list[str]
) -> None:
    def read_source(*_: object, **__: object) -> None:
        raise AssertionError("the source was read")

    monkeypatch.setattr(calibration, "read_source", read_source)
    fails("c4", *fragments, **options)


def test_sequence_as_long_as_the_positions_and_no_limit(rows: Callable[..., Path]) -> None:
    path = rows("a" * 600)
    assert load(path, samples=1, seqlen=512).input_ids.shape == (1, 512)
    assert load(path, samples=1, seqlen=600, max_positions=None).input_ids.shape == (1, 600)
