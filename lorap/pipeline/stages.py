"""A layer stage by stage: each matrix regressed to a target that the dense model has part in.

The stages are the inputs of the layer's linears, in the order of the forward. At each of them the
layer, as far as it is compressed by then, is run up to that input, and so is the uncompressed layer
over the uncompressed model's hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorap.families.fused import join
from lorap.ops.regression import regressed_weight
from lorap.ops.statistics import cross_moment
from lorap.pipeline.forward import Batch, Decoder, EnoughError
from lorap.pipeline.processes import Processes, Result
from lorap.pipeline.statistics import (
    INPUT_OF,
    Input,
    InputStatistics,
    Statistic,
    add_to_,
    check_input,
    sum_over_,
)
from lorap.pipeline.sublayers import LayerTensors, statistics_of

if TYPE_CHECKING:
    from lorap.families import LayerStructure
    from lorap.plan import LayerPlan, ModulePlan

STAGES: tuple[Input, ...] = ("attention", "o", "ffn", "down")
"""Inputs of a layer's linears in the order of the forward."""


def compress_by_stages_(
    layer: LayerTensors,
    plan: LayerPlan,
    decoder: Decoder,
    dense: nn.Module,
    batches: Sequence[Batch],
    index: int,
    structure: Sequence[LayerStructure],
    processes: Processes,
) -> None:
    """Carry out the plan of a layer, each stage on what the stages before it give.

    Parameters
    ----------
    layer : LayerTensors
        With the original tensors.
    plan : LayerPlan
    decoder : Decoder
    dense : Module
        The uncompressed layer.
    batches : sequence of Batch
        With the hidden states of both models; they stay where they are.
    index : int
        Of the layer.
    structure : sequence of mapping
        Of the compressed model.
    processes : Processes

    Raises
    ------
    LorapError
        If an input or a compressed weight is not finite; the message names the module.

    Notes
    -----
    SPEC: ``algorithm.stages``, ``target.regression``.
    """
    share, config = layer.config.dense_target, layer.config
    assert share is not None
    family = layer.family
    names = {**family.attention, **family.ffn}
    done: dict[str, ModulePlan] = {}
    for stage in STAGES:
        here = [
            (module, role)
            for module in plan.values()
            for role in module.roles
            if INPUT_OF[role] == stage and not module.untouched
        ]
        if here:
            wanted = frozenset[Statistic]({"moment"}).union(
                *(statistics_of(module, role, config) for module, role in here)
            )
            partial = list(structure)
            partial[index] = {n: s for n, s in structure[index].items() if n in done}
            tensors = join(family, partial[index], layer.tensors)
            current = decoder.build(decoder.compressed_config(partial), index, tensors)
            name = family.dense_name(names[here[0][1]])
            inputs, cross = _collect((current, dense), name, batches, index, wanted, processes)
            del current, tensors
            layer.inputs[stage] = inputs
            moment = inputs.sums["moment"]

            def regressed(
                job: tuple[ModulePlan, str], moment: Tensor = moment, cross: Tensor = cross
            ) -> Result:
                weight = layer.weight(job[1])
                return {"": regressed_weight(weight, moment, cross, share, config.ridge)}, None

            found = processes.each(here, lambda job: layer.weight(job[1]).numel(), regressed)
            for (module, role), (weights, _) in found:
                # What waits for the rest of its block runs as it will be stored.
                waits = _last(module) != stage
                dtype = layer.weight(role).dtype
                layer.replace_(role, weights[""].to(dtype) if waits else weights[""])
        finished = {
            name: module
            for name, module in plan.items()
            if name not in done and _last(module) == stage
        }
        layer.compress_(finished, f"layers.{index}", processes)
        done |= finished


def _last(module: ModulePlan) -> Input:
    """Return the last stage at which a linear of the module reads its input."""
    return max((INPUT_OF[role] for role in module.roles), key=STAGES.index)


def _collect(
    layers: tuple[nn.Module, nn.Module],
    name: str,
    batches: Sequence[Batch],
    index: int,
    wanted: frozenset[Statistic],
    processes: Processes,
) -> tuple[InputStatistics, Tensor]:
    """Take statistics of an input, and its cross moment with that of the uncompressed model.

    Parameters
    ----------
    layers : (Module, Module)
        The layer as far as it is compressed, and the uncompressed one.
    name : str
        Of a linear that has the input, in both.
    batches : sequence of Batch
    index : int
    wanted : frozenset
    processes : Processes
    """
    sums: dict[Statistic, Tensor] = {}
    cross: Tensor | None = None
    with torch.no_grad():
        for batch in batches:
            assert batch.dense is not None
            hidden = (batch.kept.load(), batch.dense.load())
            own, other = (
                input_of(layer, name, batch, index, states)
                for layer, states in zip(layers, hidden, strict=True)
            )
            add_to_(sums, wanted, own, batch.mask)
            found = cross_moment(other, own, batch.mask)
            cross = found if cross is None else cross + found
    assert cross is not None
    sum_over_(processes, sums)
    processes.sum_(cross)
    (tokens,) = processes.total(sum(batch.tokens for batch in batches))
    check_input(layers[0], name, index, (*sums.values(), cross))
    return InputStatistics(int(tokens), sums), cross


def input_of(layer: nn.Module, name: str, batch: Batch, index: int, hidden: Tensor) -> Tensor:
    """Run a layer up to one of its modules, and return what that is given.

    Parameters
    ----------
    layer : Module
    name : str
        Of the module.
    batch : Batch
    index : int
        Of the layer.
    hidden : (batch, L, hidden)
        Its input.
    """
    seen: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise EnoughError

    handle = layer.get_submodule(name).register_forward_pre_hook(stop)
    try:
        batch.run_until(layer, index, hidden)
    finally:
        handle.remove()
    return seen[0]
