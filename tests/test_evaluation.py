"""Perplexity: hand values, a naive loop in float64, the cutting into chunks, the report."""

import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import lorap
from lorap.data import HubSource, sources
from lorap.errors import LorapError, UsageError
from lorap.evaluation import (
    EvaluationProtocol,
    Window,
    evaluate,
    evaluate_perplexity,
    load_evaluation_chunks,
    load_evaluation_documents,
    perplexity,
    rolling_perplexity,
    rolling_windows,
)
from lorap.evaluation.likelihood import default_batch_size
from lorap.runtime import choose_device
from tests.tiny_models import save_tiny_checkpoint

VOCABULARY = 50
SHARED = Path(os.environ.get("LORAP_SHARED", Path(__file__).parents[2] / "shared"))


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def random_chunks(count: int, seqlen: int) -> Tensor:
    return torch.randint(VOCABULARY, (count, seqlen), generator=torch.Generator().manual_seed(1))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 .. w47 are the ids 2 .. 49; a BOS by default, as LLaMA's tokenizers have."""
    words = {"<s>": 0, "<unk>": 1} | {f"w{i}": i + 2 for i in range(VOCABULARY - 2)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


class CharacterTokenizer:
    """One token per character, after a BOS when special tokens are asked for."""

    chat_template = None

    def __call__(self, text: str, *, add_special_tokens: bool, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [ord(character) for character in text]}


def characters() -> PreTrainedTokenizerBase:
    return cast(PreTrainedTokenizerBase, CharacterTokenizer())


def no_tokenizer() -> PreTrainedTokenizerBase:
    raise AssertionError("ids need no tokenizer")


def load(
    source: str | Path,
    tokenizer: Callable[[], PreTrainedTokenizerBase] = characters,
    **options: Any,
) -> tuple[Tensor, EvaluationProtocol]:
    options = {"vocab_size": 128, "max_positions": 64, "seqlen": 4} | options
    return load_evaluation_chunks(source, tokenizer=tokenizer, **options)


def fails(source: str | Path, *fragments: str, **options: Any) -> None:
    with pytest.raises(UsageError) as caught:
        load(source, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)


# --- the number -----------------------------------------------------------------------------------


def test_uniform_logits_have_the_vocabulary_size_as_perplexity() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = perplexity(model, random_chunks(5, 7))
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.mean_nll == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    assert (result.tokens, result.chunks, result.seqlen) == (30, 5, 7)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100, None])
def test_agrees_with_a_naive_loop_in_float64(batch_size: int | None) -> None:
    model, chunks = tiny_model().double(), random_chunks(7, 9)
    losses = []
    for chunk in chunks:
        with torch.no_grad():
            logits = model(input_ids=chunk[None]).logits[0].numpy()
        for position in range(8):
            scores = logits[position] - logits[position].max()
            losses.append(
                math.log(math.fsum(np.exp(scores))) - float(scores[int(chunk[position + 1])])
            )
    result = perplexity(model, chunks, batch_size=batch_size)
    expected = math.fsum(losses) / len(losses)
    assert len(losses) == result.tokens == 56
    assert result.mean_nll == pytest.approx(expected, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-12)
    assert abs(expected - math.log(VOCABULARY)) > 0.01


def test_loss_of_a_low_precision_model_is_taken_in_float32() -> None:
    model, chunks = tiny_model().bfloat16(), random_chunks(4, 8)
    with torch.no_grad():
        logits = model(input_ids=chunks, use_cache=False).logits
    assert logits.dtype == torch.bfloat16
    log_probabilities = logits[:, :-1].double().log_softmax(dim=-1)
    expected = -log_probabilities.gather(2, chunks[:, 1:, None]).mean().item()
    assert perplexity(model, chunks, batch_size=4).mean_nll == pytest.approx(expected, rel=1e-6)


def test_model_is_given_back_in_the_mode_it_came_in() -> None:
    model = tiny_model()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    seen = []
    handle = model.lm_head.register_forward_hook(
        lambda *_: seen.append((model.training, torch.is_grad_enabled()))
    )
    perplexity(model, random_chunks(2, 4))
    handle.remove()
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2


def test_no_cache_is_built_and_progress_counts_chunks() -> None:
    model, done = tiny_model(), []
    caches = []
    handle = model.register_forward_hook(
        lambda module, args, output: caches.append(output.past_key_values)
    )
    perplexity(
        model, random_chunks(5, 4), batch_size=2, progress=lambda n, of: done.append((n, of))
    )
    handle.remove()
    assert caches == [None, None, None]
    assert done == [(0, 5), (2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_the_chunk(value: float) -> None:
    model, chunks = tiny_model(), random_chunks(5, 4).clamp(min=1)
    chunks[3, 1] = 0
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = value
    model.train()
    with pytest.raises(LorapError, match=r"loss of chunk 3 .* nan.*NaN or infinite logits"):
        perplexity(model, chunks, batch_size=2)
    assert model.training


def test_loss_beyond_the_exponential_is_an_error() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    with pytest.raises(LorapError, match="too large"):
        perplexity(model, random_chunks(2, 8))


@pytest.mark.parametrize(
    ("seqlen", "vocabulary", "expected"),
    [(128, 32000, 32), (2048, 32000, 2), (2048, 128256, 1), (8192, 32000, 1), (128, 128256, 16)],
)
def test_default_batch_size(seqlen: int, vocabulary: int, expected: int) -> None:
    assert default_batch_size(seqlen, vocabulary) == expected


@pytest.mark.parametrize(
    ("chunks", "batch_size", "fragment"),
    [
        (torch.zeros(4, dtype=torch.int64), None, "shape"),
        (torch.zeros(0, 4, dtype=torch.int64), None, "shape"),
        (torch.zeros(4, 1, dtype=torch.int64), None, "shape"),
        (torch.zeros(4, 4), None, "int64"),
        (torch.zeros(4, 4, dtype=torch.int64), 0, "batch size"),
    ],
)
def test_bad_arguments_of_perplexity(chunks: Tensor, batch_size: int | None, fragment: str) -> None:
    with pytest.raises(UsageError, match=fragment):
        perplexity(tiny_model(), chunks, batch_size=batch_size)


# --- documents, window by window ------------------------------------------------------------------


@pytest.mark.spec("evaluation.rolling")
@pytest.mark.parametrize(
    ("tokens", "seqlen", "expected"),
    [
        (0, 4, []),
        (1, 4, [([0, 1], 1)]),
        (4, 4, [([0, 1, 2, 3, 4], 4)]),
        (5, 4, [([0, 1, 2, 3, 4], 4), ([1, 2, 3, 4, 5], 1)]),
        (3, 1, [([0, 1], 1), ([1, 2], 1), ([2, 3], 1)]),
    ],
)
def test_windows_of_a_document(
    tokens: int, seqlen: int, expected: list[tuple[list[int], int]]
) -> None:
    windows = list(rolling_windows(np.arange(1, tokens + 1), 0, seqlen))
    assert [(window.ids.tolist(), window.targets) for window in windows] == expected


@pytest.mark.spec("evaluation.rolling")
@pytest.mark.parametrize("batch_size", [1, 2, 3, None])
def test_windows_of_any_length_agree_with_a_naive_loop(batch_size: int | None) -> None:
    model, generator = tiny_model().double(), np.random.default_rng(0)
    documents = [generator.integers(2, VOCABULARY, count) for count in (3, 17, 1, 8, 9, 30)]
    windows = [w for document in documents for w in rolling_windows(document, 0, 8)]
    losses = []
    for document in documents:
        stream = [0, *document.tolist()]
        for start in range(0, len(document), 8):
            end = min(start + 8, len(document))
            seen = stream[max(0, end - 8) : end]
            with torch.no_grad():
                scores = model(torch.tensor([seen])).logits[0].log_softmax(dim=-1)
            for position in range(start + 1, end + 1):
                losses.append(-float(scores[position - end - 1, stream[position]]))
    steps: list[tuple[int, int]] = []
    result = rolling_perplexity(
        model, windows, batch_size=batch_size, progress=lambda n, of: steps.append((n, of))
    )
    assert result.tokens == len(losses) == 68
    assert result.mean_nll == pytest.approx(math.fsum(losses) / 68, rel=1e-12)
    assert (result.chunks, result.seqlen) == (len(windows), 8)
    assert (steps[0], steps[-1]) == ((0, len(windows)), (len(windows), len(windows)))


def test_windows_that_cannot_be_scored() -> None:
    with pytest.raises(UsageError, match="at least one window"):
        rolling_perplexity(tiny_model(), [])
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = math.nan
    windows = [Window(np.array(ids), 2) for ids in ([1, 2, 3], [1, 7, 3], [1, 2, 3, 4])]
    with pytest.raises(LorapError, match="loss of window 1 "):
        rolling_perplexity(model, windows)


def documents(path: Path, text: str, **options: Any) -> tuple[list[Window], EvaluationProtocol]:
    path.write_text(text)
    options = {"vocab_size": VOCABULARY, "max_positions": 64, "seqlen": 4} | options
    return load_evaluation_documents(path, tokenizer=options.pop("tokenizer"), **options)


@pytest.mark.spec("evaluation.rolling")
def test_each_row_is_a_document_without_special_tokens(tmp_path: Path) -> None:
    # The tokenizer adds a BOS by itself; it is shown once, and not scored.
    windows, protocol = documents(
        tmp_path / "a.txt", "w1 w2 w3 w4 w5\n\nw6\n", tokenizer=word_tokenizer
    )
    assert [(window.ids.tolist(), window.targets) for window in windows] == [
        ([0, 3, 4, 5, 6], 4),
        ([3, 4, 5, 6, 7], 1),
        ([0, 8], 1),
    ]
    assert protocol.sentence.startswith("2 documents, each tokenised without special tokens")
    unsure = word_tokenizer()
    unsure.bos_token = None
    unsure.eos_token = "w9"
    windows, _ = documents(tmp_path / "a.txt", "w1", tokenizer=lambda: unsure)
    assert windows[0].ids.tolist() == [11, 3]
    unsure.eos_token = None
    with pytest.raises(UsageError, match="expected a tokenizer with a BOS or EOS"):
        documents(tmp_path / "a.txt", "w1", tokenizer=lambda: unsure)
    with pytest.raises(UsageError, match=r"id 49 at row 0, position 0 .* of row 0 of"):
        documents(tmp_path / "a.txt", "w47", tokenizer=word_tokenizer, vocab_size=49)


def test_the_window_is_by_default_all_that_the_model_takes(checkpoint: Path, text: Path) -> None:
    found = evaluate(checkpoint, perplexity=text, rolling=True, device="cpu").perplexity
    assert found is not None
    # Rows of three words.
    assert (found.seqlen, found.tokens, found.chunks) == (3, 150, 50)
    text.write_text(" ".join(["w1"] * 65))
    found = evaluate(checkpoint, perplexity=text, rolling=True, device="cpu").perplexity
    assert found is not None
    assert (found.seqlen, found.tokens, found.chunks) == (64, 65, 2)


# --- the chunks -----------------------------------------------------------------------------------


def test_rows_are_joined_by_two_newlines_and_the_tail_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abc\n\nde\nfghi\n")
    chunks, protocol = load(path)
    stream = [0, *map(ord, "abc\n\nde\n\nfghi")]
    assert chunks.tolist() == [stream[0:4], stream[4:8], stream[8:12]]
    assert chunks.dtype == torch.int64
    assert protocol.sentence == (
        "3 rows joined with two newlines, tokenised once with the default special tokens, cut into "
        "non-overlapping chunks of 4 tokens, the tail of 2 dropped; exp of the mean cross-entropy "
        "over the 3 targets of each chunk"
    )
    assert (protocol.source, protocol.split) == (str(path), None)


def test_blank_rows_of_a_dataset_are_joined_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HubSource] = []

    def table(hub: HubSource) -> list[dict[str, str]]:
        asked.append(hub)
        return [{"text": ""}, {"text": "a\n"}, {"text": ""}]

    monkeypatch.setattr(sources, "_load_hub_table", table)
    chunks, protocol = load("wikitext2")
    assert chunks.flatten().tolist() == [0, 10, 10, ord("a")]
    assert (asked[0].split, protocol.split) == ("test", "test")
    assert "Salesforce/wikitext (wikitext-2-raw-v1), split test" in protocol.data


def test_chat_messages_get_no_special_tokens_but_the_template_s(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    record = {"messages": [{"role": "user", "content": "w1 w2"}]}
    path.write_text((json.dumps(record) + "\n") * 2)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['content'] }}{% endfor %}"
    chunks, protocol = load(path, lambda: tokenizer, seqlen=3)
    assert chunks.tolist() == [[0, 3, 4], [0, 3, 4]]
    assert "the special tokens of the chat template" in protocol.sentence


def test_rows_of_ids_are_chunks_or_are_cut(tmp_path: Path) -> None:
    ids = np.arange(22, dtype=np.uint8).reshape(2, 11)
    np.save(tmp_path / "a.npy", ids)
    whole, _ = load(tmp_path / "a.npy", no_tokenizer, seqlen=11)
    assert whole.tolist() == ids.tolist()
    cut, protocol = load(tmp_path / "a.npy", no_tokenizer, seqlen=5)
    assert cut.tolist() == [
        [0, 1, 2, 3, 4],
        [5, 6, 7, 8, 9],
        [11, 12, 13, 14, 15],
        [16, 17, 18, 19, 20],
    ]
    assert "2 rows of 11 token ids" in protocol.sentence
    assert "tail of 1 dropped" in protocol.sentence


def test_data_that_is_too_short_or_outside_the_vocabulary(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3], [4, 99, 6]]))
    fails(tmp_path / "a.npy", "3 tokens", "one chunk of 4")
    fails(tmp_path / "a.npy", "id 99 at row 1, position 1", seqlen=2, vocab_size=50)
    (tmp_path / "a.txt").write_text("ab")
    fails(tmp_path / "a.txt", "3 tokens", "one chunk of 4")
    fails(tmp_path / "a.txt", "id 98 at row 0, position 2", "tokenised", seqlen=2, vocab_size=98)


def test_lengths_out_of_range_are_refused_before_the_source_is_read(tmp_path: Path) -> None:
    fails(tmp_path / "none.txt", "at least 2 tokens, got 1", seqlen=1)
    fails(tmp_path / "none.txt", "65 tokens", "64 positions", seqlen=65)


# --- the report -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().bfloat16().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"w{i % 40} w{(i * i) % 48} w{i % 7}" for i in range(50)))
    return path


def test_report_of_a_checkpoint(checkpoint: Path, text: Path) -> None:
    report = evaluate_perplexity(checkpoint, text, seqlen=16, device="cpu", dtype="float32")
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = word_tokenizer()(text.read_text())["input_ids"]
    expected = perplexity(model, torch.tensor(ids[:144]).view(9, 16))
    assert report.perplexity == expected.perplexity
    assert (report.tokens, report.chunks, report.seqlen) == (135, 9, 16)
    assert (report.dtype, report.device, report.split) == ("float32", "cpu", None)
    assert report.versions["torch"] == importlib.metadata.version("torch")
    assert report.versions["lorap"] == lorap.__version__
    assert "datasets" not in report.versions
    as_dict = json.loads(json.dumps(report.to_dict()))
    assert as_dict["perplexity"] == report.perplexity
    assert as_dict["source"] == str(text)
    assert "two newlines" in as_dict["protocol"]


def test_default_dtype_is_the_checkpoint_s_own(checkpoint: Path, text: Path) -> None:
    report = evaluate_perplexity(checkpoint, text, seqlen=16, device="cpu")
    assert report.dtype == "bfloat16"
    same = evaluate_perplexity(checkpoint, text, seqlen=16, device="cpu", dtype=torch.bfloat16)
    assert same == report


def test_version_of_datasets_is_reported_where_it_was_used(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"sentence": "w1 w2 w3"}] * 20
    monkeypatch.setattr(sources, "_load_hub_table", lambda hub: rows)
    report = evaluate_perplexity(checkpoint, "ptb", seqlen=8, device="cpu")
    assert report.split == "validation"
    assert "datasets" in report.versions


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"seqlen": 65}, ["65 tokens", "64 positions"]),
        ({"seqlen": 1}, ["at least 2"]),
        ({"batch_size": 0}, ["batch size"]),
        *[
            ({"device": device}, [f"'{device}'", "auto, cpu or cuda"])
            for device in ("nonsense", "mps", "meta", "cpu:1", "cuda:", "cuda:-1", "")
        ],
        ({"dtype": "int8"}, ["'int8'", "floating-point"]),
        ({"dtype": "float8_e4m3fn"}, ["'float8_e4m3fn'", "floating-point"]),
        ({"dtype": torch.float8_e5m2}, ["float8_e5m2", "floating-point"]),
        ({"revision": "main"}, ["revision", "local folder"]),
        ({"dtype": "nonsense"}, ["'nonsense'", "floating-point"]),
        ({"source": "none.txt", "seqlen": 16}, ["'none.txt' does not exist"]),
    ],
)
def test_bad_requests_are_refused_before_weights_are_loaded(
    checkpoint: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    fragments: list[str],
) -> None:
    import transformers

    def from_pretrained(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(UsageError) as caught:
        evaluate_perplexity(checkpoint, **({"source": text} | options))
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_cuda_without_a_device(
    checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(UsageError, match=f"'{device}': there is no CUDA device here"):
            evaluate_perplexity(checkpoint, text, device=device)


def test_cuda_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    for device in ("cuda:2", "cuda:99999999999"):
        with pytest.raises(UsageError, match=f"'{device}': the last CUDA device here is cuda:1"):
            choose_device(device)


def test_model_or_tokenizer_that_cannot_be_loaded(
    checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty is not a model folder: it holds no config.json"):
        evaluate_perplexity(tmp_path / "empty", text)
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"cannot load Config of the model .*empty") as caught:
        evaluate_perplexity(tmp_path / "empty", text)
    assert "\n" not in str(caught.value)
    tiny_model().save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UsageError, match=r"cannot load Tokenizer of the model .*bare"):
        evaluate_perplexity(tmp_path / "bare", text, seqlen=16)
    np.save(tmp_path / "ids.npy", np.ones((2, 16), dtype=np.int64))
    with pytest.raises(UsageError, match=r"cannot load ModelForCausalLM of the model .*bare"):
        evaluate_perplexity(tmp_path / "bare", tmp_path / "ids.npy", seqlen=16, device="cpu")


def test_damaged_tokenizer_is_a_sentence(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    (folder / "tokenizer.json").write_text('{"a": 1}')
    with pytest.raises(
        UsageError, match=r"cannot load Tokenizer of the model '.*damaged'"
    ) as caught:
        evaluate_perplexity(folder, text, seqlen=16)
    assert "\n" not in str(caught.value)


def spoil(folder: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Edit the tensors of all shards together, and the configuration; leave one shard."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    edit(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(params=["plain", "tied", "compressed", "compressed and tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a model folder that is whole."""
    original = tmp_path / "original"
    save_tiny_checkpoint(original, tie_word_embeddings="tied" in request.param)
    np.save(tmp_path / "ids.npy", np.arange(3, 35).reshape(2, 16))
    if "compressed" not in request.param:
        return original
    lorap.compress_checkpoint(
        original,
        tmp_path / "small",
        lorap.CompressionConfig(ratio=0.3, samples=2, seqlen=16, device="cpu"),
        calibration=str(tmp_path / "ids.npy"),
    )
    return tmp_path / "small"


def test_no_perplexity_of_weights_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    def evaluate() -> float:
        return evaluate_perplexity(folder, tmp_path / "ids.npy", seqlen=16, device="cpu").perplexity

    whole = evaluate()
    spoil(folder, lambda tensors, config: None)
    assert evaluate() == whole
    spoil(folder, lambda tensors, _: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        UsageError, match=r"does not fit its config.json: model.layers.1.mlp.up_proj.weight is miss"
    ) as caught:
        evaluate()
    assert "more" not in str(caught.value)
    spoil(folder, lambda tensors, _: tensors.pop("model.norm.weight"))
    with pytest.raises(UsageError, match=r"up_proj.weight is missing \(and 1 more such weights\)"):
        evaluate()


def test_no_perplexity_of_weights_of_another_shape(folder: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        if "lorap" in config:
            config["lorap"]["layers"][1]["mlp"]["width"] += 1
        else:
            config["intermediate_size"] += 1

    spoil(folder, edit)
    with pytest.raises(
        UsageError, match=r"mlp.down_proj.weight has the shape \(32, \d+\), expected \(32, \d+\)"
    ):
        evaluate_perplexity(folder, tmp_path / "ids.npy", seqlen=16, device="cpu")


@pytest.mark.skipif(
    not (SHARED / "models" / "stories260K").is_dir()
    or not (SHARED / "data" / "wikitext2-test.txt").is_file(),
    reason=f"the model stories260K or the text of WikiText-2 is not under {SHARED}",
)
def test_trained_model_is_better_on_stories_than_on_wikitext(tmp_path: Path) -> None:
    model = SHARED / "models" / "stories260K"
    wikitext = tmp_path / "wikitext.txt"
    with (SHARED / "data" / "wikitext2-test.txt").open(encoding="utf-8") as file:
        wikitext.write_text("".join(line for line, _ in zip(file, range(60), strict=False)))
    stories = tmp_path / "stories.txt"
    stories.write_text(
        "Once upon a time, there was a little girl named Lily. She loved to play in the park.\n"
        "One day, she saw a big dog. The dog was very happy and wanted to play with her.\n"
        "Lily was happy too. They played with a ball all day. Then her mom said it was time.\n"
    )
    numbers = [
        evaluate_perplexity(model, source, seqlen=32, device="cpu").perplexity
        for source in (stories, wikitext)
    ]
    assert 1 < numbers[0] < numbers[1] < 512
