"""A compressed layer refined: its weights descend to what the uncompressed layer gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorap.errors import LorapError
from lorap.ops.precision import compute_dtype
from lorap.ops.refinement import conjugate_gradients, preconditioner
from lorap.pipeline.forward import Batch, Decoder
from lorap.pipeline.processes import Processes, Result
from lorap.pipeline.statistics import INPUT_OF, Wanted, collect

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lorap.config import CompressionConfig
    from lorap.families import Family
    from lorap.plan import LayerPlan


def refine_layer(
    decoder: Decoder,
    layer_config: PretrainedConfig,
    index: int,
    tensors: Mapping[str, Tensor],
    plan: LayerPlan,
    batches: Sequence[Batch],
    config: CompressionConfig,
    processes: Processes,
) -> tuple[dict[str, Tensor], list[float]]:
    """Return a compressed layer's tensors as refinement leaves them.

    Parameters
    ----------
    decoder : Decoder
    layer_config : PretrainedConfig
        Of the compressed model, from ``Decoder.compressed_config``.
    index : int
    tensors : mapping
        The tensors of the compressed layer, names relative to it, on the device; not changed.
    plan : mapping
        Of the layer. What it leaves untouched stays.
    batches : sequence of Batch
        With the layer's input, and, as the uncompressed model's hidden states, the target.
    config : CompressionConfig
    processes : Processes

    Returns
    -------
    tensors : dict
        In their dtypes.
    losses : list of float
        At the start and after each iteration, and once more with the weights as they are stored.
        If that is not below the first, the tensors are those given, and it is the first. None
        where the plan leaves nothing to refine.

    Raises
    ------
    LorapError
        If an input of a linear or the loss at the start is not finite.

    Notes
    -----
    SPEC: ``refine.loss``, ``refine.weights``.
    """
    readers = weights_by_input(decoder.family, plan, tensors)
    if not readers:
        return dict(tensors), []
    layer = decoder.build(layer_config, index, {name: t.clone() for name, t in tensors.items()})
    names = [name for group in readers.values() for name in group]
    objective = _Objective(layer, names, batches, index, processes)
    start = {name: tensors[name].to(compute_dtype(tensors[name])) for name in names}
    inverses = _preconditioners(layer, index, readers, batches, config.ridge, processes)

    def preconditioned(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def work(name: str) -> Result:
            gradient = gradients[name]
            return {"": (gradient.double() @ inverses[name]).to(gradient.dtype)}, None

        def cost(name: str) -> float:
            return gradients[name].numel() * len(inverses[name])

        return {name: found[""] for name, (found, _) in processes.each(names, cost, work)}

    descent = conjugate_gradients(
        start, objective.loss, objective.gradients, preconditioned, config.refine
    )
    if not math.isfinite(descent.losses[0]):
        raise LorapError(
            f"layers.{index}: the distance of the compressed layer's outputs to the uncompressed "
            f"one's is not finite; computed in {decoder.dtype}: a wider --dtype may help"
        )
    stored = {name: value.to(tensors[name].dtype) for name, value in descent.values.items()}
    stored = processes.share(stored)
    last = objective.loss(stored)
    if not last < descent.losses[0]:
        return dict(tensors), [*descent.losses, descent.losses[0]]
    return {**tensors, **stored}, [*descent.losses, last]


def weights_by_input(
    family: Family, plan: LayerPlan, tensors: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """Return the weights that refinement changes, grouped by what they are applied to.

    Parameters
    ----------
    family : Family
    plan : mapping
        Of the layer.
    tensors : mapping
        Of the compressed layer, fused where that has them fused.

    Returns
    -------
    dict
        By an input, the names of the weights.
    """
    names = {**family.attention, **family.ffn}
    fixed = {
        family.dense_name(names[role])
        for module in plan.values()
        if module.untouched
        for role in module.roles
    }
    found: dict[str, list[str]] = {}
    for module in plan.values():
        for role in module.roles:
            name, whole = names[role], family.dense_name(names[role])
            own = [f"{name}.right.weight", f"{family.joint_right}.weight"]
            if f"{name}.left.weight" in tensors:
                if module.untouched:
                    continue
                found[f"{name}.left"] = [f"{name}.left.weight"]
                applied = next(right for right in own if right in tensors)
            else:
                # A fused linear stays where a part of it has to.
                if whole in fixed:
                    continue
                applied = next(n for n in (f"{whole}.weight", f"{name}.weight") if n in tensors)
            group = found.setdefault(INPUT_OF[role], [])
            if applied not in group:
                group.append(applied)
    return found


def _preconditioners(
    layer: nn.Module,
    index: int,
    readers: Mapping[str, Sequence[str]],
    batches: Sequence[Batch],
    ridge: float,
    processes: Processes,
) -> dict[str, Tensor]:
    """Return the preconditioner of each weight; one for all that have an input in common."""
    wanted = {
        key: Wanted(names[0].removesuffix(".weight"), frozenset({"moment"}))
        for key, names in readers.items()
    }
    inputs = collect(layer, wanted, batches, index, processes)
    inverses = processes.each(
        list(readers),
        lambda key: len(inputs[key].sums["moment"]) ** 3,
        lambda key: ({"": preconditioner(inputs.pop(key).sums["moment"], ridge)}, None),
    )
    return {name: found[""] for key, (found, _) in inverses for name in readers[key]}


class _Objective:
    """The squared distance of a layer's outputs to the target, of all processes' samples.

    Attributes
    ----------
    names : list of str
        Of the weights that it is a function of.
    """

    def __init__(
        self,
        layer: nn.Module,
        names: list[str],
        batches: Sequence[Batch],
        index: int,
        processes: Processes,
    ) -> None:
        self.names = names
        self._layer = layer.requires_grad_(False)
        self._batches = batches
        self._index = index
        self._processes = processes
        parameters = dict(layer.named_parameters())
        self._parameters = [parameters[name] for name in names]

    def loss(self, values: Mapping[str, Tensor]) -> float:
        """Return it for some weights."""
        self._set(values)
        with torch.no_grad():
            total = sum(float(self._of_batch(batch)) for batch in self._batches)
        return self._processes.total(total)[0]

    def gradients(self, values: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """Return it and its gradients, which are summed in float64."""
        self._set(values)
        total = 0.0
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in self._parameters]
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for batch in self._batches:
            loss = self._of_batch(batch)
            # About the mean over the tokens: in fp16 their sum might overflow. Exact otherwise.
            scale = 2.0 ** batch.tokens.bit_length()
            parts = torch.autograd.grad(loss / scale, self._parameters)
            for found, part in zip(sums, parts, strict=True):
                found.add_(part, alpha=scale)
            total += float(loss.detach())
        for parameter in self._parameters:
            parameter.requires_grad_(False)
        self._processes.sum_(*sums)
        gradients = {
            name: found.to(values[name].dtype) for name, found in zip(self.names, sums, strict=True)
        }
        return self._processes.total(total)[0], gradients

    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in zip(self.names, self._parameters, strict=True):
            parameter.data.copy_(values[name])

    def _of_batch(self, batch: Batch) -> Tensor:
        assert batch.dense is not None
        output = batch.run(self._layer, self._index)
        wide = compute_dtype(output)
        missed = output.to(wide) - batch.dense.load().to(wide)
        if batch.mask is not None:
            missed = missed[batch.mask.bool()]
        return missed.square().sum()
