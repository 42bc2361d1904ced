"""Algorithm 1: compress a model layer by layer, each fed by the compressed layers before it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorap.config import CompressionConfig
from lorap.families.fused import join
from lorap.pipeline.forward import Batch, Decoder
from lorap.pipeline.processes import ALONE, Processes
from lorap.pipeline.refinement import refine_layer
from lorap.pipeline.stages import compress_by_stages_
from lorap.pipeline.statistics import collect
from lorap.pipeline.streaming import read_ahead
from lorap.pipeline.sublayers import LayerTensors, statistics_of, wanted_statistics
from lorap.plan import Measurements, Plan

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class LayerResult:
    """One decoder layer, compressed.

    Attributes
    ----------
    index : int
    tensors : dict
        The layer's tensors, names relative to it, in the dtypes of the originals.
    modules : dict
        What the report says of each module, by name.
    statistics : dict
        What the layer was compressed by, as far as it is one number per input feature: ``(d_in,)``
        in float64, by input and statistic (``attention.norms``).
    losses : list of float
        What refinement has come to, as ``refine_layer`` returns it; empty without.
    seconds : float
        Wall time of the layer.
    """

    index: int
    tensors: dict[str, Tensor]
    modules: dict[str, dict[str, Any]]
    statistics: dict[str, Tensor]
    losses: list[float]
    seconds: float

    def record(self) -> dict[str, Any]:
        """Return what the report says of the layer, as plain values."""
        return {"modules": self.modules, "losses": self.losses, "seconds": self.seconds}


def compress_layers(
    decoder: Decoder,
    batches: Sequence[Batch],
    plan: Plan,
    config: CompressionConfig,
    measurements: Measurements,
    first: int = 0,
    processes: Processes = ALONE,
) -> Iterator[LayerResult]:
    """Compress one decoder layer after the other.

    Parameters
    ----------
    decoder : Decoder
    batches : sequence of Batch
        The inputs of layer `first`, of this process's samples; they are carried on.
    plan : Plan
    config : CompressionConfig
    measurements : Measurements
        Holds the scores of channels and heads where ``config.importance`` is ``taylor``.
    first : int
        The first layer to compress.
    processes : Processes
        That do this together.

    Yields
    ------
    LayerResult
        The same in all processes.

    Raises
    ------
    LorapError
        If weights or activations are not finite; the message names layer and module.

    Notes
    -----
    SPEC: ``algorithm.sequence``, ``algorithm.stages``, ``algorithm.refine``. One forward of the
    uncompressed layer gives the statistics of all its linears, or one for each stage of the layer;
    the compressed layer, refined, then computes the next layer's input.
    """
    family = decoder.family
    structure = plan.structure()
    dense_config = decoder.compressed_config(None)
    compressed_config = decoder.compressed_config(structure)
    for index, original in read_ahead(decoder.tensors, range(first, decoder.layers)):
        started = time.perf_counter()
        layer_plan = plan.layers[index]
        scores = measurements.scores.get(index, {})
        layer = LayerTensors(family, config, decoder.split(original), scores=scores)
        if config.dense_target is None:
            wanted = wanted_statistics(
                family, layer_plan, lambda module, role: statistics_of(module, role, config)
            )
            if wanted:
                dense = decoder.build(dense_config, index, original)
                layer.inputs = collect(dense, wanted, batches, index, processes)
                del dense
            layer.compress_(layer_plan, f"layers.{index}", processes)
            if config.refine:
                run_dense(decoder.build(dense_config, index, original), index, batches)
        else:
            dense = decoder.build(dense_config, index, original)
            compress_by_stages_(
                layer, layer_plan, decoder, dense, batches, index, structure, processes
            )
            run_dense(dense, index, batches)
            del dense
        tensors = join(family, structure[index], layer.tensors)
        losses: list[float] = []
        if config.refine:
            tensors, losses = refine_layer(
                decoder, compressed_config, index, tensors, layer_plan, batches, config, processes
            )
        run_compressed(decoder, compressed_config, index, tensors, batches)
        yield LayerResult(
            index,
            tensors,
            layer.report,
            {
                f"{kind}.{name}": vector
                for kind, found in layer.inputs.items()
                for name, vector in found.vectors().items()
            },
            losses,
            time.perf_counter() - started,
        )


def run_dense(layer: nn.Module, index: int, batches: Sequence[Batch]) -> None:
    """Replace the uncompressed model's hidden states by the output of one of its layers."""
    for batch in batches:
        with torch.no_grad():
            batch.advance_dense(layer, index)


def run_compressed(
    decoder: Decoder,
    config: PretrainedConfig,
    index: int,
    tensors: Mapping[str, Tensor],
    batches: Sequence[Batch],
) -> None:
    """Replace the batches' hidden states by the output of a compressed layer.

    Parameters
    ----------
    decoder : Decoder
    config : PretrainedConfig
        Of the compressed model, from ``Decoder.compressed_config``.
    index : int
    tensors : mapping
        The tensors of the compressed layer, names relative to it, on the device.
    batches : sequence of Batch
    """
    compressed = decoder.build(config, index, tensors)
    for batch in batches:
        with torch.no_grad():
            batch.advance(batch.run(compressed, index), index)
