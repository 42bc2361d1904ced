"""What a study costs, beforehand: operations, counted from shapes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.models import SHAPES, configuration
from bench.paper.data import SAMPLED, TRAINING, Data
from bench.paper.measures import configured
from bench.paper.studies import PAPER_DATA, Cell
from bench.sampling import CALIBRATION, EVALUATION, LENGTH
from lorap.config import CompressionConfig
from lorap.families import family_of
from lorap.plan import Plan, draft_plan
from lorap.wording import duration

TOKENS: Mapping[str, int] = {
    "wikitext2": 341_000,
    "ptb": 110_000,
    "yahma/alpaca-cleaned": 50_000 * 256,
}
"""In LLaMA's tokenizer, about; of other text, a token for 4 bytes."""

TASK_TOKENS = 69_110 * 80
"""Requests of the seven tasks, taken for 80 tokens each."""

DECOMPOSITION = 30
"""Operations of a decomposition in float64 over the cube of the side: assumed."""

LORA = 1
"""The backward of a training step over its forward: by the activations alone."""

A40 = (0.4 * 150e12, 0.58e12)
"""Operations/s in half precision and in float64 of an A40, the paper's GPU: 40% of its peak, and
its peak."""


@dataclass(frozen=True)
class Cost:
    """Operations, two for each multiply-accumulate.

    Attributes
    ----------
    forward : float
        Of forwards and trainings.
    float64 : float
        Of decompositions.
    """

    forward: float
    float64: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.float64 + other.float64)

    def seconds(self, speeds: tuple[float, float]) -> float:
        """Return the time at so many operations/s of both kinds."""
        return self.forward / speeds[0] + self.float64 / speeds[1]


def cost_of(cells: Sequence[Cell], model: Plan, evaluated: int, trained: int) -> Cost:
    """Return what cells cost.

    Parameters
    ----------
    cells : sequence of Cell
    model : Plan
        For the sizes of the dense model.
    evaluated, trained : int
        Tokens of the evaluation, tasks among them, and of the training data.
    """
    per_token = 2 * model.macs_before / model.tokens
    total = Cost(0.0, 0.0)
    for cell in cells:
        name, arguments = cell.measure.__name__, cell.arguments
        if name == "planned" or arguments.get("shape"):
            continue
        tokens = float(evaluated) if name == "quality" else 0.0
        decompositions = 0.0
        if name in ("rank_shares", "masks"):
            # One forward, of masks up to their layer; each matrix as it is, and weighted.
            share = (arguments["layer"] + 1) / len(model.layers) if name == "masks" else 1.0
            tokens += share * CALIBRATION * LENGTH
            whole = CompressionConfig(ratio=0.5, ffn="awsvd")
            decompositions += 2 * share * _decompositions(model, whole)
        elif arguments["settings"] is not None:
            config = configured(arguments["settings"])
            # Before and after each layer is compressed, and once more to measure.
            passes = 3 if config.measures else 2
            tokens += passes * config.samples * config.seqlen
            decompositions += _decompositions(model, config)
        if "recovery" in arguments:
            tokens += (1 + LORA) * trained * float(arguments["recovery"]["epochs"])
        total += Cost(per_token * tokens, decompositions)
    return total


def _decompositions(model: Plan, config: CompressionConfig) -> float:
    """Return the operations of those that factor the projections; refits are not counted."""
    low_rank = [
        sublayer
        for sublayer in config.sublayers
        if getattr(config, sublayer) not in ("heads", "channels")
    ]
    total = 0.0
    for layer in model.layers:
        for module in layer.values():
            if module.sublayer in low_rank:
                # As if each matrix were square.
                matrices = len(module.roles)
                total += matrices * (module.compressible / matrices) ** 1.5
    return DECOMPOSITION * total


def say_cost(cells: Sequence[Cell], stored: int, data: Data) -> str:
    """Return what all cells cost, for the model and for LLaMA-7B.

    Parameters
    ----------
    cells : sequence of Cell
    stored : int
        Those that are there already.
    data : Data
    """
    from transformers import LlamaConfig

    trained = TRAINING * LENGTH if data.training == SAMPLED else _tokens(data.training)
    own = cost_of(cells, data.dense, _evaluated(data.evaluation, data.tasks), trained)
    llama = LlamaConfig(**configuration(SHAPES["llama-7b"]))
    plan = draft_plan(llama, family_of(llama), CompressionConfig(ratio=0.5, ratio_scope="layer"))
    evaluated = _evaluated(PAPER_DATA["evaluation"], data.tasks)
    whole = cost_of(cells, plan, evaluated, _tokens(PAPER_DATA["training"]))
    here = _speeds()
    return (
        f"{len(cells)} cells, {stored} of them stored.\n"
        f"All, on this model: {own.forward:.1e} operations and {own.float64:.1e} in float64; "
        f"{duration(own.seconds(here))} at the {here[0]:.1e} and {here[1]:.1e} operations/s "
        "of a product of matrices here, without reading, writing and starting.\n"
        f"All, on LLaMA-7B with WikiText2, PTB and Alpaca: {whole.forward:.1e} operations and "
        f"{whole.float64:.1e} in float64; {duration(whole.seconds(A40))} on an A40, assumed to "
        f"do {A40[0]:.1e} and {A40[1]:.1e} operations/s; "
        f"{duration(whole.seconds(here))} here. A decomposition is assumed to take "
        f"{DECOMPOSITION} n^3."
    )


def _evaluated(sources: Sequence[str], tasks: bool) -> int:
    texts = sum(EVALUATION * LENGTH if source == SAMPLED else _tokens(source) for source in sources)
    return texts + (TASK_TOKENS if tasks else 0)


def _tokens(source: str) -> int:
    """Return about how many tokens a source has."""
    path = Path(source).expanduser()
    if path.is_file():
        return path.stat().st_size // 4
    return TOKENS.get(source, TOKENS["wikitext2"])


def _speeds() -> tuple[float, float]:
    """Measure products of matrices: operations/s in float32 and in float64."""
    found = []
    for dtype in (torch.float32, torch.float64):
        side = 512
        matrix = torch.ones(side, side, dtype=dtype)
        matrix @ matrix
        start = time.perf_counter()
        for _ in range(4):
            matrix @ matrix
        found.append(4 * 2 * side**3 / (time.perf_counter() - start))
    return found[0], found[1]
