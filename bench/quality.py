"""Perplexity before and after compression, at several ratios.

    python -m bench.quality MODEL [--ratios 0.1 0.2 0.5] [--calibration SOURCE --evaluation SOURCE]

Without sources, calibration and evaluation sequences are sampled from the dense model itself, at
temperature 1 and from BOS on: a text that the model knows, wherever it comes from. Prints a table
in Markdown, with the command and the versions that gave it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

import lorap
from lorap.evaluation import evaluate_perplexity
from lorap.runtime import versions


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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a local model folder or a hub name")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.5])
    parser.add_argument("--ratio-scope", choices=["model", "layer"], default="model")
    parser.add_argument("--calibration", help="SOURCE; default: 128 sampled sequences")
    parser.add_argument("--evaluation", help="SOURCE; default: 192 sampled sequences")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of calibration")
    arguments = parser.parse_args()

    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as name:
        folder = Path(name)
        calibration, evaluation = arguments.calibration, arguments.evaluation
        if calibration is None or evaluation is None:
            dense = AutoModelForCausalLM.from_pretrained(arguments.model)
            sampled = sample_ids(dense, 128 + 192, 128, arguments.seed).numpy()
            np.save(folder / "calibration.npy", sampled[:128])
            np.save(folder / "evaluation.npy", sampled[128:])
            calibration = calibration or str(folder / "calibration.npy")
            evaluation = evaluation or str(folder / "evaluation.npy")
        before = evaluate_perplexity(arguments.model, evaluation)
        print(f"`python -m bench.quality {shlex.join(sys.argv[1:])}`\n")
        print("| asked | achieved | parameters | perplexity | seconds |")
        print("|---|---|---|---|---|")
        rows = [f"| dense | 0 | | {before.perplexity:.3f} | |"]
        for ratio in arguments.ratios:
            output = folder / f"{ratio}"
            start = time.perf_counter()
            report = lorap.compress_checkpoint(
                arguments.model,
                output,
                lorap.CompressionConfig(
                    ratio=ratio, ratio_scope=arguments.ratio_scope, seed=arguments.seed
                ),
                calibration=calibration,
            )
            seconds = time.perf_counter() - start
            after = evaluate_perplexity(str(output), evaluation)
            rows.append(
                f"| {ratio:.0%} | {report['achieved_ratio']:.2%} | "
                f"{report['parameters']['after']:,} of {report['parameters']['before']:,} | "
                f"{after.perplexity:.3f} | {seconds:.1f} |"
            )
        print("\n".join(rows))
        print(f"\n{before.protocol}; {before.tokens} targets; {versions()}")


if __name__ == "__main__":
    main()
