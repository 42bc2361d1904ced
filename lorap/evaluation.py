"""Perplexity by the paper's protocol (experiment settings of the paper)."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lorap.checkpoint.reader import fetch_tokenizer_files, is_local
from lorap.data.calibration import check_sequence_length, check_vocabulary, tokenize
from lorap.data.sources import TextRows, TokenIds, read_source
from lorap.errors import LorapError, UsageError
from lorap.runtime import choose_device, choose_dtype, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 4096
"""Tokens of one batch by default."""

BATCH_LOGITS = 2**28
"""Most logits of one batch by default: 1 GiB in float32."""


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


def perplexity(
    model: "PreTrainedModel",
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
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, got {batch_size}")
    count, seqlen = chunks.shape
    embedding = _input_embedding(model)
    if batch_size is None:
        batch_size = _default_batch_size(seqlen, embedding.shape[0])
    # Offloaded weights are on the meta device; accelerate's hooks move the inputs themselves.
    device = torch.device("cpu") if embedding.is_meta else embedding.device
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    total = 0.0
    if progress is not None:
        progress(0, count)
    try:
        with torch.no_grad():
            for start in range(0, count, batch_size):
                batch = chunks[start : start + batch_size].to(device)
                logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
                losses = F.cross_entropy(
                    logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
                    batch[:, 1:].flatten().to(logits.device),
                    reduction="none",
                )
                loss_per_chunk = losses.cpu().double().view(len(batch), seqlen - 1).sum(dim=1)
                _check_finite(loss_per_chunk, start)
                total += float(loss_per_chunk.sum())
                if progress is not None:
                    progress(start + len(batch), count)
    finally:
        for module, training in modes:
            module.training = training
    tokens = count * (seqlen - 1)
    mean_nll = total / tokens
    try:
        value = math.exp(mean_nll)
    except OverflowError as error:
        raise LorapError(
            f"the perplexity is too large for a number: the mean loss is {mean_nll:.6g} nats"
        ) from error
    return Perplexity(value, mean_nll, tokens, count, seqlen)


def _default_batch_size(seqlen: int, vocab_size: int) -> int:
    return max(1, min(BATCH_TOKENS, BATCH_LOGITS // vocab_size) // seqlen)


def _input_embedding(model: "PreTrainedModel") -> Tensor:
    """Return the input embedding of the model, shape (vocabulary, hidden)."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight


def _check_finite(loss_per_chunk: Tensor, start: int) -> None:
    bad = (~torch.isfinite(loss_per_chunk)).nonzero()
    if len(bad):
        first = int(bad[0])
        raise LorapError(
            f"the loss of chunk {start + first} (counted from 0) is {float(loss_per_chunk[first])}"
            ": the model gives NaN or infinite logits on it"
        )


def load_evaluation_chunks(
    source: str | os.PathLike[str],
    *,
    tokenizer: "Callable[[], PreTrainedTokenizerBase]",
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


def _whole_text(
    data: TextRows, tokenizer: "PreTrainedTokenizerBase"
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


def evaluate_perplexity(
    model_path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    seqlen: int = 128,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    field: str | None = None,
    batch_size: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityReport:
    """Load a model with plain transformers and take its perplexity on a source.

    The data is read and checked before the weights are loaded.

    Parameters
    ----------
    model_path : str or path
        Folder or hub name of a causal language model, compressed or not.
    source : str or path
        See `lorap.data.sources`.
    seqlen : int
        Tokens per chunk: 128 in the paper; 2048 is common elsewhere.
    device : str
        A torch device, or "auto": the GPU if there is one.
    dtype : str or torch.dtype, optional
        Floating-point type to run in. By default the checkpoint's own.
    field : str, optional
        Field of a ``.jsonl`` or ``.parquet`` file.
    batch_size : int, optional
        Chunks per forward pass.
    revision : str, optional
        Branch, tag or commit of a model on the hub.
    trust_remote_code : bool
        Run modeling code that the checkpoint brings along.
    progress : callable, optional
        As in `perplexity`.

    Returns
    -------
    PerplexityReport
        The number, the protocol, the data and the versions.

    Raises
    ------
    UsageError
        If an argument is out of range, the model cannot be loaded, or the data cannot be used.
    LorapError
        If the model or a dataset cannot be had from the hub, or the loss is not finite.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"the batch size must be at least 1, got {batch_size}")
    check_sequence_length(seqlen, 2, None)
    torch_device = choose_device(device)
    torch_dtype = choose_dtype(dtype)

    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
    )

    name = os.fspath(model_path)
    location = _locate(name, revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}

    def load(auto_class: Any, **extra: Any) -> Any:
        try:
            return auto_class.from_pretrained(location, **options, **extra)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # damaged files raise errors of many kinds in transformers
            what = auto_class.__name__.removeprefix("Auto")
            kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
            raise UsageError(
                f"cannot load {what} of the model {name!r}: {kind}{' '.join(str(error).split())}"
            ) from error

    whole = load(AutoConfig)
    config = whole.get_text_config()
    chunks, protocol = load_evaluation_chunks(
        source,
        tokenizer=lambda: load(AutoTokenizer),
        seqlen=seqlen,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        field=field,
    )
    # Weights that do not fit are named below; transformers alone would leave them random.
    model, loaded = load(
        AutoModelForCausalLM if whole is config else AutoModelForImageTextToText,
        dtype="auto" if torch_dtype is None else torch_dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    _check_loaded(loaded, name)
    model = model.to(torch_device)
    result = perplexity(model, chunks, batch_size=batch_size, progress=progress)
    return PerplexityReport(
        model=name,
        **asdict(result),
        protocol=protocol.sentence,
        source=protocol.source,
        data=protocol.data,
        split=protocol.split,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(torch_device),
        versions=versions(["datasets"] if protocol.split is not None else []),
    )


def _locate(name: str, revision: str | None) -> str:
    """Return the folder or hub name to load a model from, once it is found.

    Raises
    ------
    UsageError
        If there is no such folder or hub name, or it holds no model.
    LorapError
        If the hub cannot be reached.
    """
    folder = fetch_tokenizer_files(name, revision=revision)
    if not is_local(name):
        return name
    if not (folder / "config.json").is_file():
        raise UsageError(f"{name} is not a model folder: it holds no config.json")
    return str(folder)


def _check_loaded(info: Mapping[str, Any], name: str) -> None:
    """Check what transformers tells about a loading: that no weight was left as initialised.

    Raises
    ------
    UsageError
        Naming the first weight that is missing or has another shape.
    """
    problems = [f"{key} is missing" for key in sorted(info["missing_keys"])]
    problems += [
        f"{key} has the shape {tuple(found)}, expected {tuple(expected)}"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    problems += list(info["error_msgs"])
    if problems:
        others = f" (and {len(problems) - 1} more such weights)" if len(problems) > 1 else ""
        raise UsageError(f"{name} does not fit its config.json: {problems[0]}{others}")
