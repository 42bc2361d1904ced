"""Sequences sampled from a model: text that it knows, wherever it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

LENGTH, CALIBRATION, EVALUATION = 128, 128, 192
"""Tokens in a row, and rows to calibrate and to evaluate with."""


def sample_ids(model: Any, count: int, length: int, seed: int) -> torch.Tensor:
    """Sample sequences from a model, at temperature 1.

    Parameters
    ----------
    model : PreTrainedModel
    count, length : int
        Sequences, and tokens in each, BOS included.
    seed : int

    Returns
    -------
    (count, length) Tensor of int64
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((count, 1), model.config.bos_token_id)
    cache = None
    step = ids
    with torch.no_grad():
        for _ in range(length - 1):
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            probabilities = output.logits[:, -1].double().softmax(-1)
            step = torch.multinomial(probabilities, 1, generator=generator)
            ids = torch.cat([ids, step], dim=1)
    return ids


def write_samples(
    model: Any, files: Mapping[Path, int], length: int = LENGTH, seed: int = 0
) -> None:
    """Sample sequences from a model, and share them out to files of token ids.

    Parameters
    ----------
    model : PreTrainedModel
    files : mapping
        File (``.npy``) to its number of rows; each is written aside, then renamed.
    length, seed : int
        As for ``sample_ids``, which is called once.
    """
    rows = sample_ids(model, sum(files.values()), length, seed).numpy()
    bounds = np.cumsum(list(files.values()))[:-1]
    for path, part in zip(files, np.split(rows, bounds), strict=True):
        aside = path.with_name(f".{path.name}")
        np.save(aside, part)
        aside.replace(path)
