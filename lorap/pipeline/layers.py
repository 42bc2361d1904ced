"""Algorithm 1: compress a model layer by layer, each fed by the compressed layers before it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorap.config import CompressionConfig
from lorap.families.fused import join
from lorap.pipeline.forward import Decoder, Samples
from lorap.pipeline.statistics import Collector
from lorap.pipeline.sublayers import LayerTensors, statistics_of, wanted_statistics
from lorap.plan import Measurements, Plan


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
    seconds : float
        Wall time of the layer.
    outputs : list of Tensor
        Output of the compressed layer, ``(batch, L, hidden)`` per calibration batch: the input of
        the next layer.
    """

    index: int
    tensors: dict[str, Tensor]
    modules: dict[str, dict[str, Any]]
    statistics: dict[str, Tensor]
    seconds: float
    outputs: list[Tensor]


def compress_layers(
    decoder: Decoder,
    samples: Samples,
    plan: Plan,
    config: CompressionConfig,
    measurements: Measurements,
) -> Iterator[LayerResult]:
    """Compress one decoder layer after the other.

    Parameters
    ----------
    decoder : Decoder
    samples : Samples
    plan : Plan
    config : CompressionConfig
    measurements : Measurements
        Holds the scores of channels and heads where ``config.importance`` is ``taylor``.

    Yields
    ------
    LayerResult

    Raises
    ------
    LorapError
        If weights or activations are not finite; the message names layer and module.

    Notes
    -----
    SPEC: ``algorithm.sequence``: one forward of the uncompressed layer gives the statistics of all
    its linears; the compressed layer then computes the next layer's input.
    """
    family = decoder.family
    dense_config = decoder.compressed_config(None)
    compressed_config = decoder.compressed_config(plan.structure())
    batches = decoder.embed(samples)
    for index, layer_plan in enumerate(plan.layers):
        started = time.perf_counter()
        original = decoder.tensors(index)
        wanted = wanted_statistics(family, layer_plan, lambda module: statistics_of(module, config))
        inputs = {}
        if wanted:
            dense = decoder.build(dense_config, index, original)
            with torch.no_grad(), Collector(dense, wanted) as collector:
                for batch in batches:
                    collector.expect(batch)
                    batch.run(dense, index)
            inputs = collector.statistics(index)
            del dense
        scores = measurements.scores.get(index, {})
        layer = LayerTensors(family, config, decoder.split(original), inputs, scores)
        layer.compress_(layer_plan, f"layers.{index}")
        tensors = join(family, plan.structure()[index], layer.tensors)
        compressed = decoder.build(compressed_config, index, tensors)
        for batch in batches:
            batch.advance(compressed, index)
        yield LayerResult(
            index,
            tensors,
            layer.report,
            {
                f"{kind}.{name}": vector
                for kind, found in inputs.items()
                for name, vector in found.vectors().items()
            },
            time.perf_counter() - started,
            [batch.hidden for batch in batches],
        )
