"""Perplexity of compressed models before and after recovery, by both ways to merge.

    python -m bench.recovery MODEL [--ratios 0.2 0.5] [--rows 2000] [--epochs 3] ...

Calibration, training and evaluation sequences are sampled from the dense model, at temperature 1
and from BOS on, one set after the other. Prints a table in Markdown, with the command and the
versions that gave it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import lorap
from bench.sampling import CALIBRATION, EVALUATION, write_samples
from lorap.evaluation import evaluate_perplexity
from lorap.recovery.merging import Mode
from lorap.recovery.training import PACKAGES
from lorap.runtime import versions

MODES: tuple[Mode, ...] = ("exact", "same-size")


def main() -> None:
    """Run the benchmark."""
    defaults = lorap.RecoveryConfig()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a local model folder")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--rows", type=int, default=2000, help="to train and to validate with")
    parser.add_argument("--on", choices=["matrices", "factors"], default=defaults.on)
    parser.add_argument("--epochs", type=float, default=defaults.epochs)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of calibration")
    arguments = parser.parse_args()

    from transformers import AutoModelForCausalLM

    config = lorap.RecoveryConfig(
        on=arguments.on,
        epochs=arguments.epochs,
        batch=arguments.batch,
        micro_batch=min(16, arguments.batch),
        learning_rate=arguments.learning_rate,
    )
    print(f"`python -m bench.recovery {shlex.join(sys.argv[1:])}`\n")
    with TemporaryDirectory() as name:
        folder = Path(name)
        dense = AutoModelForCausalLM.from_pretrained(arguments.model)
        files = {
            folder / "calibration.npy": CALIBRATION,
            folder / "evaluation.npy": EVALUATION,
            folder / "training.npy": arguments.rows,
        }
        write_samples(dense, files, seed=arguments.seed)
        evaluation = str(folder / "evaluation.npy")
        before = evaluate_perplexity(arguments.model, evaluation)
        print("| ratio | model | parameters | perplexity | steps | seconds |")
        print("|---|---|---|---|---|---|")
        whole = sum(parameter.numel() for parameter in dense.parameters())
        print(f"| | dense | {whole:,} | {before.perplexity:.3f} | | |")
        for ratio in arguments.ratios:
            small, adapter = folder / f"small-{ratio}", folder / f"adapter-{ratio}"
            report = lorap.compress_checkpoint(
                arguments.model,
                small,
                lorap.CompressionConfig(ratio=ratio, seed=arguments.seed),
                calibration=str(folder / "calibration.npy"),
            )
            found = evaluate_perplexity(str(small), evaluation)
            size = report["parameters"]["after"]
            print(f"| {ratio:.0%} | compressed | {size:,} | {found.perplexity:.3f} | | |")
            start = time.perf_counter()
            record = lorap.recover(small, adapter, config, data=str(folder / "training.npy"))
            seconds = time.perf_counter() - start
            steps = record["schedule"]["steps"]
            for mode in MODES:
                if mode == "same-size" and config.on == "factors":
                    continue
                merged = folder / f"{mode}-{ratio}"
                report = lorap.merge_adapter(small, adapter, merged, mode=mode)
                found = evaluate_perplexity(str(merged), evaluation)
                size = report["parameters"]["after"]
                print(
                    f"| {ratio:.0%} | recovered, merged {mode} | {size:,} | "
                    f"{found.perplexity:.3f} | {steps} | {seconds:.0f} |",
                    flush=True,
                )
    print(f"\n{before.protocol}; {before.tokens} targets; {config}; {versions(PACKAGES)}")


if __name__ == "__main__":
    main()
