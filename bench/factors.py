"""The two thin products of q, k and v beside the dense ones, by the layout of the factors.

    python -m bench.factors [--device cpu|cuda] [--dtype float32] [--width 2048]
                            [--ranks 614,614 250,250,740] [--tokens 1 16 64 256] [--repeats 15]

Prints a table in Markdown, in microseconds for one layer. ``dense`` is the matrices as they were;
``separate`` what the compressed model does, one product after the other; ``one product`` applies
the right factors, stacked, to their common input at once; ``transposed`` stores all factors with
their other axis first. "Due" is the share of the parameters that is gone. Random weights of several
layers, in turn, so that they do not wait in a cache; on a GPU as CUDA graphs, or one token would
tell how long a launch takes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.timing import Clock, thread_clock
from lorap.runtime import versions

LAYERS = 6


def compare(
    width: int,
    ranks: Sequence[int],
    tokens: int,
    *,
    repeats: int,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, float]:
    """Return the median seconds of a layer by layout.

    Parameters
    ----------
    width : int
        Features of input and outputs.
    ranks : sequence of int
        Of the matrices that share the input.
    tokens : int
    repeats : int
    dtype : torch.dtype
    device : torch.device
    """
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator) / columns**0.5
        moved: Tensor = values.to(device, dtype)
        return moved

    x = random(tokens, width)
    dense = [[random(width, width) for _ in ranks] for _ in range(LAYERS)]
    factors = [[(random(r, width), random(width, r)) for r in ranks] for _ in range(LAYERS)]
    stacked = [torch.cat([right for right, _ in layer]) for layer in factors]
    turned = [[(right.T.contiguous(), left.T.contiguous()) for right, left in f] for f in factors]

    def as_dense() -> None:
        for layer in dense:
            for weight in layer:
                linear(x, weight)

    def separate() -> None:
        for layer in factors:
            for right, left in layer:
                linear(linear(x, right), left)

    def one_product() -> None:
        for layer, rights in zip(factors, stacked, strict=True):
            parts = torch.split(linear(x, rights), list(ranks), -1)
            for (_, left), part in zip(layer, parts, strict=True):
                linear(part, left)

    def transposed() -> None:
        for layer in turned:
            for right, left in layer:
                x @ right @ left

    ways: dict[str, Callable[[], None]] = {
        "dense": as_dense,
        "separate": separate,
        "one product": one_product,
        "transposed": transposed,
    }
    clock, taken = Clock(device, thread_clock()), {name: list[float]() for name in ways}
    with torch.inference_mode():
        if clock.on_gpu:
            ways = {name: captured(work) for name, work in ways.items()}
        for turn in range(repeats + 2):
            for name, work in ways.items():
                seconds = clock(work)
                if turn >= 2:
                    taken[name].append(seconds / LAYERS)
    return {name: statistics.median(values) for name, values in taken.items()}


def captured(work: Callable[[], None]) -> Callable[[], None]:
    """Return work on a GPU as a CUDA graph; it runs a few times before, on a stream of its own."""
    cuda: Any = torch.cuda
    side, graph = cuda.Stream(), cuda.CUDAGraph()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):
        for _ in range(3):
            work()
    cuda.current_stream().wait_stream(side)
    with cuda.graph(graph):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--ranks", nargs="+", default=["614,614", "250,250,740"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    print(f"`python -m bench.factors {shlex.join(sys.argv[1:])}`")
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores\n")
    print("| ranks | tokens | dense, us | separate | one product | transposed | due | saved |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for text in given.ranks:
        ranks = [int(rank) for rank in text.split(",")]
        due = 1 - 2 * sum(ranks) / (len(ranks) * given.width)
        for tokens in given.tokens:
            found = compare(
                given.width,
                ranks,
                tokens,
                repeats=given.repeats,
                dtype=getattr(torch, given.dtype),
                device=torch.device(given.device),
            )
            cells = " | ".join(f"{seconds * 1e6:.0f}" for seconds in found.values())
            saved = 1 - found["separate"] / found["dense"]
            print(f"| {text} | {tokens} | {cells} | {due:.0%} | {saved:.0%} |", flush=True)
    print(f"\n{versions()}")


if __name__ == "__main__":
    main()
