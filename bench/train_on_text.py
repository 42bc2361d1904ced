"""Train a small LLaMA of any shape on a text file: to try settings on models of other shapes.

    python -m bench.train_on_text TEXT --output FOLDER [--hidden 192 --layers 4 ...]

The first nine tenths of the text train the tokenizer and the model; the last tenth is left to
``FOLDER/calibration.txt`` (its first half) and ``FOLDER/heldout.txt``, line by line as it stands.
The model is in ``FOLDER/model``. Everything is seeded.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench import train_embedded
from bench.train_embedded import ROW, ROWS_PER_STEP


def split(text: str) -> tuple[str, str, str]:
    """Return the parts of a text for training, calibration and evaluation."""
    lines = text.splitlines(keepends=True)
    first, second = len(lines) * 9 // 10, len(lines) * 19 // 20
    return "".join(lines[:first]), "".join(lines[first:second]), "".join(lines[second:])


def training_rows(tokenizer: tokenizers.Tokenizer, text: str, rows: int, seed: int) -> Tensor:
    """Cut rows of ``ROW`` tokens out of a text, each from a random place on and after a BOS.

    Returns
    -------
    Tensor
        Token ids (rows, ``ROW``), int64.

    Raises
    ------
    ValueError
        If the text is shorter than a row.
    """
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    if len(ids) < ROW:
        raise ValueError(f"expected a text of at least {ROW} tokens, got {len(ids)}")
    rng = random.Random(seed)
    starts = [rng.randrange(len(ids) - ROW + 2) for _ in range(rows)]
    bos = tokenizer.token_to_id(train_embedded.BOS)
    cut = [np.concatenate([[bos], ids[start : start + ROW - 1]]) for start in starts]
    return torch.from_numpy(np.stack(cut))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=6)
    parser.add_argument("--steps", type=int, default=train_embedded.STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text, calibration, heldout = split(arguments.text.read_text(encoding="utf-8"))
    folder = arguments.output / "model"
    folder.mkdir(parents=True)
    (arguments.output / "calibration.txt").write_text(calibration, encoding="utf-8")
    (arguments.output / "heldout.txt").write_text(heldout, encoding="utf-8")
    tokenizer = train_embedded.train_tokenizer(text.splitlines(keepends=True))
    train_embedded.save_tokenizer(tokenizer, folder)
    rows = training_rows(tokenizer, text, arguments.steps * ROWS_PER_STEP, arguments.seed)
    torch.manual_seed(arguments.seed)
    shape = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=arguments.hidden,
        intermediate_size=arguments.ffn,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        max_position_embeddings=ROW,
        initializer_range=0.04,
        bos_token_id=tokenizer.token_to_id(train_embedded.BOS),
        eos_token_id=tokenizer.token_to_id(train_embedded.EOS),
        pad_token_id=None,
    )
    model = LlamaForCausalLM(shape)
    train_embedded.train(model, rows)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
