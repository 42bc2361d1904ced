"""The pass over the uncompressed model: what sizes and Taylor's scores depend on.

One forward of each layer; for the gradient one forward and backward more, the layers taken from the
last to the first; for the marginal allocation the probes of :mod:`lorap.pipeline.probes` besides.
Never more than one layer's weights at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorap.config import CompressionConfig, Sublayer
from lorap.errors import LorapError, UsageError
from lorap.families import Family
from lorap.ops.heads import head_scores
from lorap.ops.importance import group_scores, taylor_importance
from lorap.ops.joint import stacked
from lorap.ops.mgaa import cosine_sum
from lorap.ops.precision import all_finite, compute_dtype
from lorap.ops.regression import removal_order
from lorap.pipeline.activations import Kept, Store
from lorap.pipeline.factors import STATISTICS, factorise
from lorap.pipeline.forward import Batch, Decoder, Head, Samples, targets_of
from lorap.pipeline.probes import Probes
from lorap.pipeline.processes import ALONE, Processes, Result
from lorap.pipeline.progress import Steps
from lorap.pipeline.statistics import INPUT_OF, Collector, Input, InputStatistics, Statistic, Wanted
from lorap.pipeline.streaming import read_ahead
from lorap.pipeline.sublayers import low_rank_method, wanted_statistics
from lorap.plan import LayerPlan, Measurements, ModulePlan, Plan, make_plan


def measured_plan(
    decoder: Decoder,
    samples: Samples,
    store: Store,
    draft: Plan,
    config: CompressionConfig,
    advance: Steps,
    processes: Processes = ALONE,
) -> tuple[Plan, Measurements]:
    """Return the plan, after measuring what it and the scores depend on.

    Parameters
    ----------
    decoder : Decoder
    samples : Samples
        Those of this process.
    store : Store
        Where the hidden states wait between layers.
    draft : Plan
        By ``draft_plan``.
    config : CompressionConfig
    advance : Steps
    processes : Processes
        That measure together.

    Raises
    ------
    UsageError
        If the ratio cannot be reached, or there is no token to predict for the gradient of a loss.
    LorapError
        As ``measure``.
    """
    if not config.measures:
        return draft, Measurements()
    if config.measures_gradients and not samples.targets().any():
        raise UsageError(
            "importance taylor: expected a sample of two tokens that count, to predict one from "
            "the other, got none"
        )
    measured = measure(decoder, samples, store, draft, config, advance, processes)
    return make_plan(decoder.config, decoder.family, config, measured), measured


def measure(
    decoder: Decoder,
    samples: Samples,
    store: Store,
    draft: Plan,
    config: CompressionConfig,
    advance: Steps,
    processes: Processes = ALONE,
) -> Measurements:
    """Measure the uncompressed model, as far as the configuration asks for it.

    Parameters
    ----------
    decoder : Decoder
    samples : Samples
        Those of this process.
    store : Store
        Where the hidden states wait between layers.
    draft : Plan
        For its modules; its ranks and widths do not matter.
    config : CompressionConfig
    advance : Steps
        Called after each layer.
    processes : Processes
        That measure together.

    Raises
    ------
    LorapError
        If activations or gradients are not finite; the message names the layer.

    Notes
    -----
    SPEC: ``mgaa.measure``, ``marginal.measure``, ``algorithm.scores``.
    """
    measured = Measurements()
    hidden: list[list[Kept]] = []

    def layers(indices: Sequence[int]) -> Iterator[_Layer]:
        dense_config = decoder.compressed_config(None)
        for index, original in read_ahead(decoder.tensors, indices):
            module = decoder.build(dense_config, index, original)
            yield _Layer(index, module, original, draft.layers[index])
            advance()

    probes = Probes(decoder, samples, store, config, processes) if config.is_marginal else None
    batches = decoder.embed(samples, store)
    for layer in layers(range(decoder.layers)):
        if config.measures_gradients:
            hidden.append([batch.kept for batch in batches])
        inputs = _measure_forward_(measured, layer, decoder, config, batches, processes)
        if probes is not None:
            probes.advance_(layer.module, layer.index, layer.original, inputs)
    if probes is not None:
        measured.divergences.update(probes.divergences())
    if config.measures_gradients:
        gradients, own = _head_gradients(decoder, samples, batches, store)
        (targets,) = processes.total(own)
        for layer in layers(range(decoder.layers)[::-1]):
            for batch, given in zip(batches, hidden.pop(), strict=True):
                batch.kept = given
            measured.scores[layer.index] = _gradient_scores(
                layer, decoder, config, batches, gradients, store, int(targets), processes
            )
    return measured


@dataclass(frozen=True)
class _Layer:
    index: int
    module: nn.Module
    original: Mapping[str, Tensor]
    plan: LayerPlan


def observe(
    layer: nn.Module,
    index: int,
    family: Family,
    wanted: Mapping[Input, Wanted],
    batches: Sequence[Batch],
    *,
    similarity: bool,
    processes: Processes = ALONE,
) -> tuple[dict[Input, InputStatistics], dict[Sublayer, float]]:
    """Run a layer over the batches, which take its output, and look at what happens in it.

    Parameters
    ----------
    layer : Module
        Decoder layer `index` of the uncompressed model.
    index : int
    family : Family
    wanted : mapping
        Statistics to take of the linears' inputs.
    batches : sequence of Batch
    similarity : bool
        Whether to take the similarities of the sub-layers.
    processes : Processes
        That do this together.

    Returns
    -------
    inputs : dict
        The statistics.
    similarities : dict
        Mean cosine of the residual stream before and after each sub-layer; empty where it was not
        asked for.

    Raises
    ------
    LorapError
        If activations are not finite; the message names the layer.
    """
    between: list[Tensor] = []
    listener = layer.get_submodule(family.ffn_input).register_forward_pre_hook(
        lambda _, inputs: between.append(inputs[0])
    )
    mha, ffn, tokens = 0.0, 0.0, 0
    with torch.no_grad(), Collector(layer, wanted) as collector:
        for batch in batches:
            collector.expect(batch)
            before = batch.kept.load()
            after = batch.run(layer, index, before)
            middle = between.pop()
            if similarity:
                mha += cosine_sum(before, middle, batch.mask)
                ffn += cosine_sum(middle, after, batch.mask)
            batch.advance(after, index)
            tokens += batch.tokens
    listener.remove()
    inputs = collector.statistics(index, processes)
    if not similarity:
        return inputs, {}
    mha, ffn, total = processes.total(mha, ffn, tokens)
    return inputs, {"mha": mha / total, "ffn": ffn / total}


def _measure_forward_(
    measured: Measurements,
    layer: _Layer,
    decoder: Decoder,
    config: CompressionConfig,
    batches: Sequence[Batch],
    processes: Processes,
) -> dict[Input, InputStatistics]:
    """Run a layer over the batches, and add what it tells to what was measured."""
    family = decoder.family

    def statistics_of(module: ModulePlan, role: str) -> frozenset[Statistic]:
        if module.untouched:
            return frozenset()
        if module.sublayer in config.spectrum_sublayers:
            return STATISTICS[low_rank_method(config, module.sublayer)]
        return frozenset({"moment"} if config.is_marginal and role == "down" else ())

    wanted = wanted_statistics(family, layer.plan, statistics_of)
    inputs, similarities = observe(
        layer.module,
        layer.index,
        family,
        wanted,
        batches,
        similarity=config.measures_similarity,
        processes=processes,
    )
    for sublayer, similarity in similarities.items():
        measured.similarities[layer.index, sublayer] = similarity
    names = {**family.attention, **family.ffn}
    original = decoder.split(layer.original)

    def is_factored(module: ModulePlan) -> bool:
        return module.sublayer in config.spectrum_sublayers

    def weight(module: ModulePlan) -> Tensor:
        # By the method: the draft may leave dense what the measured plan prunes.
        roles = module.roles if is_factored(module) else ("down",)
        parts = [original[f"{names[role]}.weight"] for role in roles]
        return parts[0] if len(parts) == 1 else stacked(parts)

    def cost(job: tuple[str, ModulePlan]) -> float:
        shape = weight(job[1]).shape
        return shape.numel() * min(shape) if is_factored(job[1]) else shape[1] ** 3

    def errors(job: tuple[str, ModulePlan]) -> Result:
        """Singular values of what is factored, removals and losses of what loses channels."""
        module = job[1]
        given = inputs.get(INPUT_OF[module.roles[0]])
        if is_factored(module):
            method = low_rank_method(config, module.sublayer)
            factors = factorise(weight(module), given, 0, method, config)
            return {"spectrum": factors.singular_values.cpu()}, None
        moment = inputs["down"].sums["moment"]
        order, losses = removal_order(weight(module), moment, module.units - 1, config.ridge)
        return {"losses": losses.cpu(), "removals": order.cpu()}, None

    jobs = [
        job
        for job in layer.plan.items()
        if not job[1].untouched and (is_factored(job[1]) or config.is_marginal)
    ]
    for (name, _), (found, _) in processes.each(jobs, cost, errors):
        for kind, values in found.items():
            measured.of_modules[kind][f"layers.{layer.index}.{name}"] = values
    return inputs


_IGNORED = -100
"""Label of what is no target."""


def _head_gradients(
    decoder: Decoder, samples: Samples, batches: Sequence[Batch], store: Store
) -> tuple[list[Kept], int]:
    """Return the gradient of the loss by the last layer's output, per batch, and the targets.

    The loss is the SUM of the cross-entropies over all targets: the gradient of their mean would
    vanish in fp16.
    """
    head = Head(decoder)
    gradients, targets = [], 0
    for batch, (ids, mask) in zip(batches, samples.batches(decoder.device), strict=True):
        counts = targets_of(ids, mask)
        labels = ids[:, 1:].masked_fill(~counts, _IGNORED)
        given = batch.kept.load().detach().requires_grad_(True)
        logits = head.logits(ids, mask, given)[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1).to(compute_dtype(logits)),
            labels.flatten(),
            reduction="sum",
            ignore_index=_IGNORED,
        )
        gradients.append(store.keep(torch.autograd.grad(loss, given)[0]))
        targets += int(counts.sum())
    return gradients, targets


def _gradient_scores(
    layer: _Layer,
    decoder: Decoder,
    config: CompressionConfig,
    batches: Sequence[Batch],
    gradients: list[Kept],
    store: Store,
    targets: int,
    processes: Processes,
) -> dict[Sublayer, Tensor]:
    """Return the scores of a layer's channels and heads; `gradients` become those of its input."""
    family = decoder.family
    names = {**family.attention, **family.ffn}
    roles = [
        role
        for module in layer.plan.values()
        if module.sublayer in config.pruned_sublayers
        for role in module.roles
    ]
    linears = list(dict.fromkeys(f"{family.dense_name(names[role])}.weight" for role in roles))
    layer.module.requires_grad_(False)
    weights = [layer.module.get_parameter(name).requires_grad_(True) for name in linears]
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    for number, batch in enumerate(batches):
        hidden = batch.kept.load().detach().requires_grad_(True)
        output = batch.run(layer.module, layer.index, hidden)
        by_input, *found = torch.autograd.grad(
            output, [hidden, *weights], grad_outputs=gradients[number].load()
        )
        if not all_finite(by_input):
            raise LorapError(
                f"layers.{layer.index}: the gradient of the loss holds NaN or inf; computed in "
                f"{output.dtype}: a wider --dtype may help"
            )
        gradients[number] = store.keep(by_input)
        for total, gradient in zip(sums, found, strict=True):
            total += gradient
    processes.sum_(*sums)
    by_weight = decoder.split(dict(zip(linears, sums, strict=True)))
    original = decoder.split(layer.original)
    scores = {
        role: taylor_importance(original[name], by_weight[name] / targets)
        for role, name in ((role, f"{names[role]}.weight") for role in roles)
    }
    result: dict[Sublayer, Tensor] = {}
    if "ffn" in config.pruned_sublayers:
        up, gate, down = (scores[role] for role in ("up", "gate", "down"))
        result["ffn"] = group_scores(up, gate, down, config.aggregation)
    if "mha" in config.pruned_sublayers:
        q, k, v, o = (scores[role] for role in ("q", "k", "v", "o"))
        groups = layer.plan[family.attention_block].units
        result["mha"] = head_scores(q, k, v, o, groups, config.aggregation)
    return result
