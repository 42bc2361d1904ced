"""What of a layer's time several processes share, and what that makes of it on paper.

    python -m bench.processes [--shape medium] [--layers 2] [--samples 32] [--ratio 0.2]
                              [--device cpu|cuda] [-- OPTION ...]

Compresses a random checkpoint in one process. On a CPU in one thread, whose CPU time it takes of
each part: what else the machine does changes that little. On a GPU the second of two runs is
measured, and the GPU is waited for at the ends of a part, so that these do not overlap; reading and
writing, which go through its queue, then hold waits for it.

Forwards are split over the processes by samples; of the pieces of a layer (the factors of a matrix,
the choice of channels), each is done by one process, so that the time is that of the process with
most to do; the rest is nobody's gain. Sending is left out. Prints a table in Markdown, per layer.
What stands behind ``--`` goes to ``lorap compress``.
"""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bench.models import SHAPES, Shape, write
from bench.timing import now
from lorap import cli
from lorap.checkpoint.writer import CheckpointWriter
from lorap.pipeline import layers
from lorap.pipeline.forward import Decoder
from lorap.pipeline.processes import shared_out
from lorap.pipeline.sublayers import LayerTensors
from lorap.runtime import versions

PROCESSES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Row:
    """What a layer takes where some processes share it, in seconds.

    Attributes
    ----------
    processes : int
    forwards : float
    pieces : float
        Of the process that has most to do.
    longest : float
        Of the pieces, the longest.
    files : float
        Reading and writing.
    """

    processes: int
    forwards: float
    pieces: float
    longest: float
    files: float

    @property
    def whole(self) -> float:
        """All of it, one after the other."""
        return self.forwards + self.pieces + self.files


@contextmanager
def timed(
    owner: Any,
    name: str,
    note: Callable[[tuple[Any, ...], float], None],
    now: Callable[[], float],
) -> Iterator[None]:
    """Note arguments and seconds of all calls of a function."""
    real = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        started = now()
        try:
            return real(*arguments, **options)
        finally:
            note(arguments, now() - started)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, real)


def measure(
    words: list[str], device: torch.device
) -> tuple[dict[str, float], dict[tuple[str, ...], float]]:
    """Run the command; return the seconds of forwards, reading and writing, and of each piece."""
    parts = dict.fromkeys(("forwards", "reading", "writing"), 0.0)
    pieces: dict[tuple[str, ...], float] = {}

    def part(name: str) -> Callable[[tuple[Any, ...], float], None]:
        def note(_: tuple[Any, ...], seconds: float) -> None:
            parts[name] += seconds

        return note

    def piece(arguments: tuple[Any, ...], seconds: float) -> None:
        roles = arguments[1].roles
        pieces[roles] = pieces.get(roles, 0.0) + seconds

    # Files are read and written by other threads, which do not wait for the GPU.
    computing = files = time.thread_time
    if device.type == "cuda":
        computing, files = partial(now, device), time.perf_counter
    with (
        timed(layers, "collect", part("forwards"), computing),
        timed(layers, "run_compressed", part("forwards"), computing),
        timed(Decoder, "tensors", part("reading"), files),
        timed(CheckpointWriter, "write_shard", part("writing"), files),
        timed(LayerTensors, "_compressed", piece, computing),
        redirect_stdout(io.StringIO()),
    ):
        status = cli.app(words, standalone_mode=False)
    if status:
        # The command has said what is wrong.
        sys.exit(status)
    return parts, pieces


def share(
    shape: Shape, *, samples: int, ratio: float, device: torch.device, options: Sequence[str] = ()
) -> list[Row]:
    """Compress a random model, and share a layer among 1, 2, 4 and 8 processes on paper.

    Parameters
    ----------
    shape : Shape
    samples : int
        Of 128 tokens.
    ratio : float
        Of the layers' parameters.
    device : torch.device
    options : sequence of str
        Of ``lorap compress``.
    """
    with TemporaryDirectory() as name:
        folder = Path(name)
        write(shape, folder / "model")
        ids = np.random.default_rng(0).integers(3, shape.vocabulary, (samples, 128))
        np.save(folder / "ids.npy", ids)
        words = ["compress", str(folder / "model"), "--ratio", str(ratio), "--ratio-scope", "layer"]
        words += ["--device", device.type, "--samples", str(samples)]
        words += ["--calibration", str(folder / "ids.npy")]
        words += ["--output", str(folder / "out"), "--json", "--overwrite", *options]
        if device.type == "cuda":
            # Libraries are loaded, and kernels chosen, by the first to need them.
            measure(words, device)
        parts, pieces = measure(words, device)
    rows = []
    for count in PROCESSES:
        loads = [0.0] * count
        costs = list(pieces.values())
        for seconds, owner in zip(costs, shared_out(costs, count), strict=True):
            loads[owner] += seconds
        files = parts["reading"] + parts["writing"]
        totals = (parts["forwards"] / count, max(loads), max(costs), files)
        rows.append(Row(count, *(total / shape.layers for total in totals)))
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="medium")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32, help="of 128 tokens")
    parser.add_argument("--ratio", type=float, default=0.2, help="of the layers' parameters")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("options", nargs="*", help="of lorap compress, behind --")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    rows = share(
        replace(SHAPES[arguments.shape], layers=arguments.layers),
        samples=arguments.samples,
        ratio=arguments.ratio,
        device=device,
        options=arguments.options,
    )
    print(f"\n`python -m bench.processes {shlex.join(sys.argv[1:])}`, {json.dumps(versions())}\n")
    print(
        "| processes | forwards, s | pieces, s | of it the longest | reading and writing, s | sum "
        "| times as fast |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        cells = (row.forwards, row.pieces, row.longest, row.files, row.whole)
        speed = rows[0].whole / row.whole
        seconds = " | ".join(f"{cell:.3f}" for cell in cells)
        print(f"| {row.processes} | {seconds} | {speed:.1f} |")


if __name__ == "__main__":
    main()
