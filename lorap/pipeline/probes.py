"""How much the model minds: a few samples run through it once for each module, small by itself.

The streams of all modules before a layer go through it together, so that a layer is built once for
all of them; in the end the predictions are compared with the model's own. Of several processes each
has the streams of some modules, and all samples.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorap.config import CompressionConfig
from lorap.errors import LorapError, UsageError
from lorap.families.fused import join
from lorap.ops.marginal import divergence_sum
from lorap.pipeline.activations import Store
from lorap.pipeline.forward import Batch, Decoder, Head, Samples
from lorap.pipeline.processes import Processes
from lorap.pipeline.statistics import Input, InputStatistics
from lorap.pipeline.sublayers import LayerTensors
from lorap.plan import probe_plan

if TYPE_CHECKING:
    from lorap.families import LayerStructure


class Probes:
    """Samples on their way through the model and, for each module, through one that has it small.

    Parameters
    ----------
    decoder : Decoder
    samples : Samples
        Their probes are taken.
    store : Store
        Where the hidden states wait between layers.
    config : CompressionConfig
    processes : Processes

    Raises
    ------
    UsageError
        If no token of the probes counts.

    Notes
    -----
    SPEC: ``marginal.measure``.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: Samples,
        store: Store,
        config: CompressionConfig,
        processes: Processes,
    ) -> None:
        self._samples = samples.probes()
        if self._samples.mask is not None and not self._samples.mask.any():
            raise UsageError(
                f"attention_mask: expected a token that counts in the first "
                f"{len(self._samples.input_ids)} samples, which allocation marginal measures by, "
                "got none"
            )
        self._decoder, self._config, self._processes = decoder, config, processes
        self._plan = probe_plan(decoder.config, decoder.family, config)
        self._own = decoder.embed(self._samples, store)
        self._streams: dict[str, list[Batch]] = {}
        self._owners: dict[str, int] = {}

    def advance_(
        self,
        layer: nn.Module,
        index: int,
        original: Mapping[str, Tensor],
        inputs: Mapping[Input, InputStatistics],
    ) -> None:
        """Run all streams through a layer, and begin those of its modules.

        Parameters
        ----------
        layer : Module
            Decoder layer `index` of the model.
        index : int
        original : mapping
            Its tensors, names relative to it.
        inputs : mapping
            Statistics of its linears' inputs.

        Raises
        ------
        LorapError
            If activations are not finite; the message names the layer.
        """
        for stream in self._streams.values():
            _run(layer, index, stream)
        for name, module in self._plan.layers[index].items():
            if module.kind == "dense":
                continue
            path = f"layers.{index}.{name}"
            self._owners[path] = len(self._owners) % self._processes.size
            if self._owners[path] != self._processes.rank:
                continue
            small = LayerTensors(
                self._decoder.family, self._config, self._decoder.split(original), dict(inputs)
            )
            small.compress_({name: module}, f"layers.{index}")
            structure: list[LayerStructure] = [{} for _ in self._plan.layers]
            structure[index] = {name: module.structure() or {}}
            built = self._decoder.build(
                self._decoder.compressed_config(structure),
                index,
                join(self._decoder.family, structure[index], small.tensors),
            )
            self._streams[path] = stream = [copy.copy(batch) for batch in self._own]
            _run(built, index, stream)
        _run(layer, index, self._own)

    def divergences(self) -> dict[str, float]:
        """Return by path of a module the mean divergence of the predictions, over the tokens.

        Raises
        ------
        LorapError
            If predictions are not finite.
        """
        head = Head(self._decoder)
        totals = dict.fromkeys(self._streams, 0.0)
        with torch.no_grad():
            forwards = self._samples.batches(self._decoder.device)
            for number, (ids, mask) in enumerate(forwards):
                expected = head.logits(ids, mask, self._own[number].kept.load())
                for path, stream in self._streams.items():
                    logits = head.logits(ids, mask, stream[number].kept.load())
                    totals[path] += divergence_sum(expected, logits, mask)
        tokens = sum(batch.tokens for batch in self._own)
        found = {
            path: self._processes.tell(totals.get(path, 0.0), owner) / tokens
            for path, owner in self._owners.items()
        }
        for path, divergence in found.items():
            if not math.isfinite(divergence):
                raise LorapError(
                    f"{path}: the predictions of the model, or of the one that has it small, hold "
                    f"NaN or inf; computed in {self._decoder.dtype}: a wider --dtype may help"
                )
        return found


def _run(layer: nn.Module, index: int, stream: list[Batch]) -> None:
    with torch.no_grad():
        for batch in stream:
            batch.advance(batch.run(layer, index), index)
