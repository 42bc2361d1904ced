"""Peak memory and time of ``lorap compress`` on random checkpoints of several depths.

    python -m bench.memory [--shape tinyllama] [--layers 11 22 44] [--samples 128] [-- OPTION ...]

Writes the checkpoints into a temporary folder, compresses each in a process of its own, and prints
a table in Markdown, with what ``lorap plan`` estimates beside what was measured. The peak is that
of the whole process as the operating system keeps it (``VmHWM`` on Linux: mapped pages count); on a
GPU another row gives that of its tensors. What stands behind ``--`` goes to ``lorap plan`` and to
``lorap compress``.
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


def _lorap(*words: str) -> str:
    """Run the command in a process of its own, and return what it prints on stdout."""
    command = [sys.executable, "-m", "lorap", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


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
    print(
        "| layers | weights, GiB | device | peak memory, GiB | estimated | seconds | of it in "
        "layers |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for layers in arguments.layers:
        shape = replace(SHAPES[arguments.shape], layers=layers)
        with TemporaryDirectory() as name:
            folder = Path(name)
            write(shape, folder / "model")
            ids = np.random.default_rng(0).integers(3, shape.vocabulary, (arguments.samples, 128))
            np.save(folder / "ids.npy", ids)
            options = [str(folder / "model"), "--ratio", arguments.ratio]
            options += ["--samples", str(arguments.samples), *arguments.options]
            plan = json.loads(_lorap("plan", *options, "--json"))
            start = time.perf_counter()
            written = ["--calibration", str(folder / "ids.npy"), "--output", str(folder / "out")]
            _lorap("compress", *options, *written)
            seconds = time.perf_counter() - start
            report = json.loads((folder / "out" / "lorap_report.json").read_text())
            size = sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
            in_layers = sum(layer["seconds"] for layer in report["layers"])
            for device, peak in report["peak_memory_bytes"].items():
                estimated = plan["estimate"]["peak_memory_bytes"][device]
                print(
                    f"| {layers} | {size / 2**30:.2f} | {device} | {peak / 2**30:.3f} | "
                    f"{estimated / 2**30:.3f} | {seconds:.0f} | {in_layers:.0f} |",
                    flush=True,
                )
    print(f"\n{versions()}")


if __name__ == "__main__":
    main()
