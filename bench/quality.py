"""Perplexity before and after compression, by ratio and by method.

    python -m bench.quality MODEL [--ratios 0.1 0.2 0.5] [--calibration SOURCE --evaluation SOURCE]
    python -m bench.quality MODEL --settings 'mha=pca' 'mha=heads importance=taylor'
    python -m bench.quality MODEL --methods

Without sources, calibration and evaluation sequences are sampled from the dense model itself, at
temperature 1 and from BOS on: a text that the model knows, wherever it comes from. ``--settings``
compares settings of ``lorap compress``, a preset among them, ``--methods`` all of ``METHODS``;
without either the settings are the default ones. Prints a table in Markdown, with the command and
the versions that gave it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

import lorap
from bench.sampling import CALIBRATION, EVALUATION, write_samples
from lorap.evaluation import evaluate_perplexity
from lorap.runtime import versions

METHODS: tuple[str, ...] = (
    "",
    "mha=svd",
    "mha=asvd",
    "mha=asvd asvd_alpha=1.0",
    "mha=pca",
    "mha=afm",
    "weighting=eq6",
    "joint_qk=true",
    "mha=pca joint_qk=true",
    "mha=heads",
    "ffn=svd",
    "ffn=awsvd",
    "ffn=pca",
    "mha=pca ffn=pca allocation=1.0",
    "mha=afm ffn=afm",
    "importance=magnitude",
    "importance=taylor",
    "mha=heads importance=taylor",
    "aggregation=l1",
    "aggregation=linf",
    "allocation=mgaa",
    "allocation=mgaa mha=pca ffn=pca",
    "allocation=mgaa mha=pca ffn=pca joint_qk=true",
    "allocation=mgaa-between mha=pca ffn=pca",
    "allocation=mgaa-within mha=pca ffn=pca",
)
"""Settings that the papers compare, and LoRAP itself first."""


def parse_settings(text: str) -> dict[str, Any]:
    """Return the settings in ``name=value name=value``; values are read as YAML."""
    pairs = (word.partition("=") for word in text.split())
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def row(
    model: str,
    settings: Mapping[str, Any],
    calibration: str,
    evaluation: str,
    folder: Path,
) -> str:
    """Compress, evaluate, and return the rest of a row of the table."""
    start = time.perf_counter()
    settings = dict(settings)
    preset = settings.pop("preset", "lorap")
    try:
        report = lorap.compress_checkpoint(
            model,
            folder,
            lorap.CompressionConfig.from_preset(preset, **settings),
            calibration=calibration,
            overwrite=True,
        )
    except lorap.UsageError as error:
        return f"| refused: {error} | | | |"
    seconds = time.perf_counter() - start
    after = evaluate_perplexity(str(folder), evaluation)
    parameters = report["parameters"]
    return (
        f"| {report['achieved_ratio']:.2%} | {parameters['after']:,} of "
        f"{parameters['before']:,} | {after.perplexity:.3f} | {seconds:.1f} |"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a local model folder or a hub name")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.2, 0.5])
    parser.add_argument("--ratio-scope", choices=["model", "layer"], default="model")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--settings", nargs="+", default=[""], metavar="'NAME=VALUE ...'", help="one per row"
    )
    which.add_argument("--methods", action="store_true", help="those that the papers compare")
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
            files = {
                folder / "calibration.npy": CALIBRATION,
                folder / "evaluation.npy": EVALUATION,
            }
            write_samples(dense, files, seed=arguments.seed)
            calibration = calibration or str(folder / "calibration.npy")
            evaluation = evaluation or str(folder / "evaluation.npy")
        before = evaluate_perplexity(arguments.model, evaluation)
        print(f"`python -m bench.quality {shlex.join(sys.argv[1:])}`\n")
        print("| settings | asked | achieved | parameters | perplexity | seconds |")
        print("|---|---|---|---|---|---|")
        print(f"| dense | | | | {before.perplexity:.3f} | |", flush=True)
        for text in METHODS if arguments.methods else arguments.settings:
            for ratio in arguments.ratios:
                settings = {
                    "ratio": ratio,
                    "ratio_scope": arguments.ratio_scope,
                    "seed": arguments.seed,
                } | parse_settings(text)
                rest = row(arguments.model, settings, calibration, evaluation, folder / "out")
                print(f"| {text or 'default'} | {ratio:.0%} {rest}", flush=True)
        print(f"\n{before.protocol}; {before.tokens} targets; {versions()}")


if __name__ == "__main__":
    main()
