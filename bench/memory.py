"""Peak memory and time of ``lorap compress`` on random checkpoints of several depths.

    python -m bench.memory [--shape tinyllama] [--layers 11 22 44] [--samples 128] [-- OPTION ...]

Writes the checkpoints into a temporary folder, compresses each in a process of its own, and prints
a table in Markdown. The peak is that of the whole process as the operating system keeps it
(``VmHWM`` on Linux: mapped pages count). What stands behind ``--`` goes to ``lorap compress``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from bench.models import SHAPES, write
from lorap.runtime import versions


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--layers", type=int, nargs="+", default=[11, 22, 44])
    parser.add_argument("--samples", type=int, default=128, help="of 128 tokens")
    parser.add_argument("--ratio", default="0.2")
    parser.add_argument("options", nargs="*", help="of lorap compress, behind --")
    arguments = parser.parse_args()
    print(f"`python -m bench.memory {shlex.join(sys.argv[1:])}`, {os.cpu_count()} cores\n")
    print("| layers | weights, GiB | peak memory, GiB | seconds | of it in layers |")
    print("|---|---|---|---|---|", flush=True)
    for layers in arguments.layers:
        shape = replace(SHAPES[arguments.shape], layers=layers)
        with TemporaryDirectory() as name:
            folder = Path(name)
            write(shape, folder / "model")
            ids = np.random.default_rng(0).integers(3, shape.vocabulary, (arguments.samples, 128))
            np.save(folder / "ids.npy", ids)
            command = [sys.executable, "-m", "lorap", "compress", str(folder / "model")]
            command += ["--ratio", arguments.ratio, "--calibration", str(folder / "ids.npy")]
            command += ["--samples", str(arguments.samples), "--output", str(folder / "out")]
            start = time.perf_counter()
            subprocess.run([*command, *arguments.options], check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - start
            report = json.loads((folder / "out" / "lorap_report.json").read_text())
            size = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
            peak = report["peak_memory_bytes"]["cpu"]
            in_layers = sum(layer["seconds"] for layer in report["layers"])
            print(
                f"| {layers} | {size / 2**30:.2f} | {peak / 2**30:.3f} | {seconds:.0f} | "
                f"{in_layers:.0f} |",
                flush=True,
            )
    print(f"\n{versions()}")


if __name__ == "__main__":
    main()
