"""What of a layer's time several processes share, and what that makes of it on paper.

    python -m bench.processes [--shape medium] [--layers 2] [--samples 32] [-- OPTION ...]

Compresses a random checkpoint in one process and one thread, and takes the CPU time of each part,
which what else the machine does changes little. Forwards are split over the processes by samples;
of the pieces of a layer (the factors of a matrix, the choice of channels), each is done by one
process, so that the time is that of the process with most to do; the rest is nobody's gain. Sending
is left out. Prints a table in Markdown, per layer. What stands behind ``--`` goes to
``lorap compress``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.models import SHAPES, write
from lorap import cli
from lorap.checkpoint.writer import CheckpointWriter
from lorap.pipeline import layers
from lorap.pipeline.forward import Decoder
from lorap.pipeline.processes import shared_out
from lorap.pipeline.sublayers import LayerTensors
from lorap.runtime import versions

PROCESSES = (1, 2, 4, 8)


@contextmanager
def timed(owner: Any, name: str, note: Callable[[tuple[Any, ...], float], None]) -> Iterator[None]:
    """Note arguments and CPU seconds, of the thread, of all calls of a function."""
    real = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        started = time.thread_time()
        try:
            return real(*arguments, **options)
        finally:
            note(arguments, time.thread_time() - started)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, real)


def measure(words: list[str]) -> tuple[dict[str, float], list[float]]:
    """Return the seconds of forwards, reading and writing, and of each piece of a layer, in all."""
    parts = dict.fromkeys(("forwards", "reading", "writing"), 0.0)
    pieces: dict[tuple[str, ...], float] = {}

    def part(name: str) -> Callable[[tuple[Any, ...], float], None]:
        def note(_: tuple[Any, ...], seconds: float) -> None:
            parts[name] += seconds

        return note

    def piece(arguments: tuple[Any, ...], seconds: float) -> None:
        roles = arguments[1].roles
        pieces[roles] = pieces.get(roles, 0.0) + seconds

    with (
        timed(layers, "collect", part("forwards")),
        timed(layers, "run_compressed", part("forwards")),
        timed(Decoder, "tensors", part("reading")),
        timed(CheckpointWriter, "write_shard", part("writing")),
        timed(LayerTensors, "_compressed", piece),
    ):
        cli.app(words, standalone_mode=False)
    return parts, list(pieces.values())


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="medium")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32, help="of 128 tokens")
    parser.add_argument("options", nargs="*", help="of lorap compress, behind --")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = replace(SHAPES[arguments.shape], layers=arguments.layers)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(shape, folder / "model")
        ids = np.random.default_rng(0).integers(3, shape.vocabulary, (arguments.samples, 128))
        np.save(folder / "ids.npy", ids)
        words = ["compress", str(folder / "model"), "--ratio", "0.2", "--device", "cpu"]
        words += ["--samples", str(arguments.samples), "--calibration", str(folder / "ids.npy")]
        words += ["--output", str(folder / "out"), "--json", *arguments.options]
        parts, pieces = measure(words)
    print(f"\n`python -m bench.processes {shlex.join(sys.argv[1:])}`, {json.dumps(versions())}\n")
    print(
        "| processes | forwards, s | pieces, s | of it the longest | reading and writing, s | sum |"
    )
    print("|---|---|---|---|---|---|")
    rest = parts["reading"] + parts["writing"]
    for count in PROCESSES:
        loads = [0.0] * count
        for seconds, owner in zip(pieces, shared_out(pieces, count), strict=True):
            loads[owner] += seconds
        row = (parts["forwards"] / count, max(loads), max(pieces), rest)
        cells = [*row, row[0] + row[1] + rest]
        print(f"| {count} | " + " | ".join(f"{c / arguments.layers:.3f}" for c in cells) + " |")


if __name__ == "__main__":
    main()
