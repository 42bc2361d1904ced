"""Train the embedded model: a tiny LLaMA with grouped queries, on the text of `bench.grammar`.

``python -m bench.train_embedded --output lorap/demo`` writes the model with its tokenizer, the
held-out and the calibration text, and ``embedded.json`` with the measured perplexities.
``python -m bench.train_embedded --check lorap/demo`` trains again with the settings recorded there
and compares the two perplexities. Everything is seeded; the number of threads changes the result in
the last digits only.
"""

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.grammar import corpus, paragraph

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
VOCABULARY = 1024
ROW = 512
ROWS_PER_STEP = 2
CHUNK = 128
HELDOUT_SEED, HELDOUT_CHARACTERS = 1_000_001, 80_000
CALIBRATION_SEED, CALIBRATION_CHARACTERS = 1_000_002, 180_000
STEPS = 2000
PEAK_RATE, WARM_UP, WEIGHT_DECAY = 3e-3, 0.05, 0.1
SEPARATOR = "\n\n"
PROTOCOL = (
    "lines of heldout.txt joined by two newlines, tokenised once with the tokenizer's special "
    f"tokens, cut into non-overlapping chunks of {CHUNK} tokens, tail dropped; exp of the mean "
    f"cross-entropy over the {CHUNK - 1} targets of each chunk"
)
UNIGRAM = "add-one smoothing, p(b) = (c(b) + 1) / (N + V)"
BIGRAM = "p(b | a) = (c(a b) + p_unigram(b)) / (c(a) + 1)"


def fresh_paragraphs(seed: int, characters: int, taken: frozenset[str]) -> list[str]:
    """Draw different paragraphs, none of them in `taken`, until they hold `characters`."""
    chosen: dict[str, None] = {}
    rng, size = random.Random(seed), 0
    while size < characters:
        text = paragraph(rng)
        if text not in taken and text not in chosen:
            chosen[text] = None
            size += len(text) + 1
    return list(chosen)


def documents(seed: int, taken: frozenset[str]) -> Iterator[str]:
    """Draw training documents of 1 to 12 paragraphs, without the paragraphs in `taken`."""
    rng = random.Random(seed)
    while True:
        count = rng.randint(1, 12)
        texts = [text for text in (paragraph(rng) for _ in range(count)) if text not in taken]
        if texts:
            yield SEPARATOR.join(texts)


def train_tokenizer(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer of `VOCABULARY` entries that puts BOS in front of a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=UNK))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, _token_id(tokenizer, BOS))],
    )
    return tokenizer


def _token_id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    index = tokenizer.token_to_id(token)
    assert index is not None
    return index


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write the tokenizer so that every transformers release finds the generic fast class."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNK,
        "clean_up_tokenization_spaces": False,
        # transformers 4 would add token types, which LLaMA does not take.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write_json(folder / "tokenizer_config.json", settings)


def training_rows(
    tokenizer: tokenizers.Tokenizer, seed: int, rows: int, taken: frozenset[str]
) -> Tensor:
    """Pack training documents into rows.

    Half of the rows begin with a document, so that BOS is seen at position 0; the others go on
    where the row before ended, as chunks of a long text do.

    Returns
    -------
    Tensor
        Token ids (rows, `ROW`), int64.
    """
    bos, eos = _token_id(tokenizer, BOS), _token_id(tokenizer, EOS)
    source, rng = documents(seed, taken), random.Random(seed)
    packed = np.empty((rows, ROW), dtype=np.int64)
    rest: list[int] = []
    for row in packed:
        if rng.random() < 0.5:
            rest = []
        while len(rest) < ROW:
            rest += [bos, *tokenizer.encode(next(source), add_special_tokens=False).ids, eos]
        row[:] = rest[:ROW]
        rest = rest[ROW:]
    return torch.from_numpy(packed)


def build_model(tokenizer: tokenizers.Tokenizer) -> LlamaForCausalLM:
    """Make the untrained model in float32; the global torch seed fixes its weights."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=ROW,
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        tie_word_embeddings=False,
        bos_token_id=_token_id(tokenizer, BOS),
        eos_token_id=_token_id(tokenizer, EOS),
        pad_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, rows: Tensor) -> None:
    """Train in place with AdamW and a cosine schedule, `ROWS_PER_STEP` rows a step.

    Three steps of four cut their rows in half: short rows are cheaper, long ones keep all positions
    trained.
    """
    steps = len(rows) // ROWS_PER_STEP
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    warm_up = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm_up,
            0.5 * (1 + np.cos(np.pi * max(0, step - warm_up) / max(1, steps - warm_up))),
        ),
    )
    model.train()
    start = time.monotonic()
    smooth = None
    for step, batch in enumerate(rows.reshape(steps, ROWS_PER_STEP, ROW)):
        ids = batch if step % 4 == 3 else batch.reshape(-1, ROW // 2)
        loss = _loss(model, ids)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        smooth = loss.item() if smooth is None else 0.95 * smooth + 0.05 * loss.item()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            seconds = time.monotonic() - start
            print(f"step {step + 1}/{steps}  loss {smooth:.4f}  {seconds:.0f} s", flush=True)


def _loss(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting ``ids[:, 1:]``; ids (batch, length)."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def heldout_chunks(text: str, folder: Path) -> Tensor:
    """Tokenise held-out text, one paragraph per line, and cut it into ids (chunks, `CHUNK`)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(SEPARATOR.join(text.splitlines()), verbose=False)["input_ids"])
    return ids[: len(ids) // CHUNK * CHUNK].reshape(-1, CHUNK)


def model_perplexity(folder: Path, chunks: Tensor) -> float:
    """Perplexity of the saved model, computed in the precision it is stored in."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.inference_mode():
        losses = [_loss(model, chunk[None]).item() for chunk in chunks]
    return float(np.exp(np.mean(losses)))


def ngram_perplexities(rows: Tensor, chunks: Tensor) -> tuple[float, float]:
    """Perplexities on `chunks` of the `UNIGRAM` and the `BIGRAM` model fitted on `rows`."""
    before, after = rows[:, :-1].numpy().ravel(), rows[:, 1:].numpy().ravel()
    unigram = np.bincount(rows.numpy().ravel(), minlength=VOCABULARY) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(before * VOCABULARY + after, minlength=VOCABULARY**2)
    counts = pairs.reshape(VOCABULARY, VOCABULARY).astype(np.float64)
    bigram = (counts + unigram) / (counts.sum(axis=1, keepdims=True) + 1.0)
    previous, target = chunks[:, :-1].numpy().ravel(), chunks[:, 1:].numpy().ravel()
    return _perplexity(unigram[target]), _perplexity(bigram[previous, target])


def _perplexity(probabilities: npt.NDArray[np.float64]) -> float:
    return float(np.exp(-np.log(probabilities).mean()))


def make(output: Path, steps: int, seed: int) -> dict[str, Any]:
    """Train everything and write it to `output`.

    Parameters
    ----------
    output : Path
        Folder for ``model/``, ``heldout.txt``, ``calibration.txt`` and ``embedded.json``.
    steps : int
        Optimiser steps of ``ROWS_PER_STEP * ROW`` tokens.
    seed : int
        Seed of the training text and of the weights; held-out and calibration text are fixed.

    Returns
    -------
    dict
        The contents of ``embedded.json``.
    """
    start = time.monotonic()
    folder = output / "model"
    folder.mkdir(parents=True, exist_ok=True)
    heldout = fresh_paragraphs(HELDOUT_SEED, HELDOUT_CHARACTERS, frozenset())
    calibration = fresh_paragraphs(CALIBRATION_SEED, CALIBRATION_CHARACTERS, frozenset(heldout))
    for name, lines in (("heldout.txt", heldout), ("calibration.txt", calibration)):
        (output / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = train_tokenizer(corpus(seed, 4000))
    save_tokenizer(tokenizer, folder)
    rows = training_rows(
        tokenizer, seed, steps * ROWS_PER_STEP, frozenset(heldout) | frozenset(calibration)
    )
    print(f"{rows.numel()} training tokens after {time.monotonic() - start:.0f} s", flush=True)

    torch.manual_seed(seed)
    model = build_model(tokenizer)
    train(model, rows)
    model.bfloat16()
    model.save_pretrained(folder)
    seconds = time.monotonic() - start

    chunks = heldout_chunks((output / "heldout.txt").read_text(encoding="utf-8"), folder)
    unigram, bigram = ngram_perplexities(rows, chunks)
    record = {
        "heldout_perplexity": round(model_perplexity(folder, chunks), 4),
        "unigram_perplexity": round(unigram, 4),
        "bigram_perplexity": round(bigram, 4),
        "protocol": PROTOCOL,
        "unigram": UNIGRAM,
        "bigram": BIGRAM,
        "heldout_tokens": chunks.numel(),
        "training_tokens": rows.numel(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "bfloat16",
        "steps": steps,
        "seed": seed,
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    _write_json(output / "embedded.json", record)
    return record


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def check(committed: Path) -> bool:
    """Train again as ``committed/embedded.json`` says and compare the perplexities within 1%."""
    expected = json.loads((committed / "embedded.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        found = make(Path(folder), expected["steps"], expected["seed"])
    ratio = found["heldout_perplexity"] / expected["heldout_perplexity"]
    print(
        f"held-out perplexity: committed {expected['heldout_perplexity']}, "
        f"now {found['heldout_perplexity']}, ratio {ratio:.4f}"
    )
    return bool(abs(ratio - 1) <= 0.01)


def main() -> int:
    """Run the command line; the exit status is 1 where ``--check`` finds another perplexity."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--output", type=Path, help="write the trained model and its texts here")
    task.add_argument("--check", type=Path, help="train again and compare with this folder")
    parser.add_argument("--steps", type=int, default=STEPS, help="only with --output")
    parser.add_argument("--seed", type=int, default=0, help="only with --output")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.check is not None:
        return 0 if check(arguments.check) else 1
    print(json.dumps(make(arguments.output, arguments.steps, arguments.seed), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
