"""Refined layers: the reference's descent taken again, from what the two runs make of the layer.

It is taken in float64 and, several times, with every operation rounded as the checkpoint's own were
rounded. How far these are apart is the noise of what the checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorap.audit.comparisons import ROOM_LARGEST, ROOM_RMS, equal, worst
from lorap.audit.context import Context
from lorap.audit.files import linear_name, right_name
from lorap.audit.forward import Compute, Pair, Runs, rounded_forward
from lorap.audit.gradients import plain, rounder
from lorap.audit.results import Check, ModuleAudit
from lorap.audit.rounding import SPREADS, product_variance, variance
from lorap.audit.sizes import Module
from lorap.audit.stages import Compressed
from lorap_reference import gradient, joint, llama, pca, refinement, statistics

Array = NDArray[np.float64]
Values = Mapping[str, Array]
Round = Callable[[NDArray[Any]], NDArray[Any]]

DRAWN = 3
"""Rounded descents beside the first one."""


def refined(
    context: Context,
    runs: Runs,
    dense: Runs,
    index: int,
    found: Compressed,
    held: Mapping[str, Tensor],
) -> list[ModuleAudit]:
    """Compare what a layer was refined to (SPEC, "Audit").

    Parameters
    ----------
    context : Context
    runs : Runs
        The samples before the layer, in the compressed model.
    dense : Runs
        The samples behind the layer, in the uncompressed model.
    index : int
    found : Compressed
        The layer as it was before.
    held : mapping
        The layer's tensors in the checkpoint, names relative to it.

    Returns
    -------
    list of ModuleAudit
        Those of `found`, each with what is compared of its weights, and one of the losses.
    """
    plan = context.plan.layers[index]
    names = [name for module in plan.values() for name in _weights(context, module)]
    said: Any = context.record.said_of_layer(index).get("losses")
    if not names:
        check = equal("report: losses", [], said)
        return [ModuleAudit(f"layers.{index}", "as it was", (check,)), *found.modules]
    start: Pair[Values] = Pair(
        *({n: tensors[n].double().numpy() for n in names} for tensors in found.weights)
    )
    stored = {name: held[name].double().numpy() for name in names}
    objectives = _objectives(context, runs, dense, found.weights)
    moments = objectives.exact.moments(start.exact)
    taken = _descents(context, runs, dense, objectives, start)
    checks = _listed(said, taken)
    best = [run.descent.values for run in taken]
    if checks[0].passed:
        if said[-1] == said[0]:
            checks.append(_not_taken(context, objectives, taken, held))
            best = [run.start for run in taken]
        checks += _loss_checks(context, said, objectives, taken, stored)
    audits = [ModuleAudit(f"layers.{index}", "refined", tuple(checks))]
    for audit in found.modules:
        module = plan.get(audit.name.removeprefix(f"layers.{index}."))
        more: list[Check] = []
        if module is not None and not module.untouched:
            more = _weight_checks(context, module, best, moments, held)
        audits.append(replace(audit, checks=(*audit.checks, *more)))
    return audits


@dataclass(frozen=True)
class _Run:
    """One descent.

    Attributes
    ----------
    start : dict
        The weights at the start.
    descent : Descent
    """

    start: Values
    descent: refinement.Descent


def _objectives(
    context: Context, runs: Runs, dense: Runs, weights: Pair[dict[str, Tensor]]
) -> Pair[_Objective]:
    """Return what the exact and the rounded descent make less."""
    layer, given = context.compute.weights(*weights), (context.shape, runs.batches)
    return Pair(
        _Objective(layer.exact, *given, runs.h.exact, dense.h.exact, None),
        _Objective(layer.rounded, *given, runs.h.rounded, dense.h.rounded, context.compute),
    )


def _descents(
    context: Context,
    runs: Runs,
    dense: Runs,
    objectives: Pair[_Objective],
    start: Pair[Values],
) -> list[_Run]:
    """Descend in float64, and, some more times, rounded as the checkpoint's own descent was.

    A descent magnifies what rounding adds to it, and most of all in one direction, in which any
    single rounded run may happen to be next to nothing. The ``DRAWN`` others are as good: the noise
    of the streams has its signs at random, the layer's input is moved by half a unit in the last
    place at most, so that all roundings behind it are others, and the start is that of either run.
    """
    settings, compute = context.record.settings, context.compute

    def run(objective: _Objective, values: Values) -> _Run:
        inverses = {
            name: refinement.preconditioner(C, settings.ridge)
            for name, C in objective.moments(values).items()
        }
        wrapped = {name: objective.wide(value) for name, value in values.items()}
        descent = refinement.conjugate_gradients(
            wrapped, objective.loss, objective.gradients, inverses, settings.refine
        )
        return _Run(values, descent)

    found = [run(*pair) for pair in zip(objectives, start, strict=True)]
    for seed in range(DRAWN):
        random = np.random.default_rng(seed)
        h, target = (
            pair.exact + (pair.rounded - pair.exact) * random.choice((-1.0, 1.0), pair.exact.shape)
            for pair in (runs.h, dense.h)
        )
        h += h * compute.eps * (random.random(h.shape) - 0.5)
        drawn = objectives.rounded.at(compute.round(h), compute.round(target))
        found.append(run(drawn, start.rounded if seed % 2 else start.exact))
    return found


# --- losses --------------------------------------------------------------------------------------


def _listed(said: Any, taken: Sequence[_Run]) -> list[Check]:
    """Compare the recorded losses among themselves: as many as there have to be, none that rises.

    Where a descent has come to an end before, there are fewer.
    """
    name = "report: losses"
    counts = sorted({len(run.descent.losses) + 1 for run in taken})
    if not (
        isinstance(said, list)
        and len(said) in counts
        and all(type(loss) is float and np.isfinite(loss) for loss in said)
    ):
        return [Check(name, 1, 0, f"expected {counts[-1]} finite numbers")]
    rises = sum(after > before for before, after in pairwise(said[:-1]))
    rises += said[-1] > said[0]
    return [Check(name, rises, 0, "a loss rises" if rises else "")]


def _with_noise(objectives: Pair[_Objective], values: Iterable[Values]) -> tuple[float, float]:
    """Return a loss of the exact run, and its noise.

    The noise is how far rounding moves it, or would move it if it moved the tokens independently.

    Parameters
    ----------
    objectives : Pair of _Objective
    values : iterable of mapping
        The weights, for the exact and for the rounded run.
    """
    exact, rounded = (o.distances(own) for o, own in zip(objectives, values, strict=True))
    moved = rounded - exact
    return float(np.sum(exact)), float(np.hypot(np.sum(moved), np.sqrt(np.sum(moved**2))))


def _loss_checks(
    context: Context,
    said: Sequence[float],
    objectives: Pair[_Objective],
    taken: Sequence[_Run],
    stored: Values,
) -> list[Check]:
    """Compare the recorded losses with those of the descents, and of the weights as stored.

    Parameters
    ----------
    context : Context
    said : sequence of float
        What the report gives.
    objectives : Pair of _Objective
    taken : sequence of _Run
    stored : mapping
        What the checkpoint holds, by name.
    """
    compute = context.compute
    # lorap sums the squares in float32, unless they are float64.
    summed = 10 * float(np.finfo(compute.work).eps)
    _, noise = _with_noise(objectives, [run.start for run in taken[:2]])
    count = min(len(said) - 1, *(len(run.descent.losses) for run in taken))
    recorded = np.array(said[:count])
    exact, *others = (np.array(run.descent.losses[:count]) for run in taken)
    moved = np.max([np.abs(other - exact) for other in others], axis=0)
    # What is wrong at one iteration is handed on to the next.
    moved = np.maximum.accumulate(np.maximum(moved, noise))
    bound = ROOM_LARGEST * (moved + compute.eps / 8 * exact) + summed * exact
    last, noise = _with_noise(objectives, (stored, stored))
    allowed = ROOM_RMS * (noise + compute.eps / 16 * last) + summed * last
    whole = exact[0] or 1.0
    return [
        worst("losses of the iterations", np.abs(recorded - exact) / whole, bound / whole),
        Check("loss as stored", abs(said[-1] - last) / whole, allowed / whole),
    ]


def _not_taken(
    context: Context,
    objectives: Pair[_Objective],
    taken: Sequence[_Run],
    held: Mapping[str, Tensor],
) -> Check:
    """Compare the loss at the start with that of what it is said not to be above."""
    as_stored = [
        {
            name: torch.from_numpy(np.asarray(value)).to(held[name].dtype).double().numpy()
            for name, value in run.descent.values.items()
        }
        for run in taken[:2]
    ]
    first, noise = _with_noise(objectives, [run.start for run in taken[:2]])
    last, other = _with_noise(objectives, as_stored)
    bound = ROOM_RMS * (noise + other + context.compute.eps / 16 * first)
    whole = first or 1.0
    return Check("loss as stored, not taken", max(first - last, 0.0) / whole, bound / whole)


# --- weights -------------------------------------------------------------------------------------


def _weight_checks(
    context: Context,
    module: Module,
    best: Sequence[Values],
    moments: Values,
    held: Mapping[str, Tensor],
) -> list[Check]:
    """Compare the outputs of a module's matrices with those of the exact run's.

    Parameters
    ----------
    context : Context
    module : Module
    best : sequence of mapping
        The weights that the runs come to, the exact one first.
    moments : mapping
        Of the inputs, by weight.
    held : mapping
        The layer's tensors in the checkpoint, names relative to it.
    """
    family = context.reader.family
    linears = {role: linear_name(family, role) for role in module.roles}
    stored = {name: held[name].double().numpy() for name in _weights(context, module)}
    checks = []
    if module.rank is None:
        for role, linear in linears.items():
            name = f"{linear}.weight"
            spread = variance(best[0][name], held[name].dtype)
            weights = [values[name] for values in best]
            title = f"{role}: distance of the outputs"
            checks.append(_distance(context, title, stored[name], weights, moments[name], spread))
        return checks
    right = f"{right_name(family, module)}.weight"

    def factors(values: Values) -> tuple[Array, Array]:
        lefts = [values[f"{linear}.left.weight"] for linear in linears.values()]
        return np.asarray(joint.stacked(lefts)), np.asarray(values[right])

    spread = product_variance(*factors(best[0]), held[right].dtype)
    products = [L @ R for L, R in map(factors, best)]
    L, R = factors(stored)
    title = "distance of the outputs"
    return [_distance(context, title, L @ R, products, moments[right], spread)]


def _distance(
    context: Context, name: str, found: Array, best: Sequence[Array], moment: Array, spread: Array
) -> Check:
    """Compare a matrix with what the exact run gives, by the outputs.

    Parameters
    ----------
    context : Context
    name : str
        Of the check.
    found : (d_out, d_in)
    best : sequence of (d_out, d_in)
        Of the runs, the exact one first.
    moment : (d_in, d_in)
        Of the inputs.
    spread : (d_out, d_in)
        Variance of what rounding to the storage dtype adds.
    """
    exact, *others = best

    def distance(other: Array) -> float:
        return float(np.sqrt(pca.output_error(np.asarray(other, np.float64), exact, moment)))

    total = distance(np.zeros_like(exact)) or 1.0
    off, noise = distance(found), max(map(distance, others))
    rounding = float(np.sqrt(np.sum(spread * np.diag(moment))))
    bound = ROOM_LARGEST * (noise + context.compute.eps / 8 * total) + SPREADS * 1.001 * rounding
    return Check(name, off / total, bound / total)


# --- the descent ---------------------------------------------------------------------------------


def _weights(context: Context, module: Module) -> list[str]:
    """Return the names of the weights that are refined."""
    if module.untouched:
        return []
    linears = [linear_name(context.reader.family, role) for role in module.roles]
    if module.rank is None:
        return [f"{name}.weight" for name in linears]
    right = right_name(context.reader.family, module)
    return [f"{right}.weight", *(f"{name}.left.weight" for name in linears)]


class _Objective:
    """The squared distance of a layer's outputs to the uncompressed model's, in one run.

    Parameters
    ----------
    layer : mapping
        The layer's weights before it is refined, names relative to it.
    shape : llama.LlamaShape
    batches : list of slice
    h, target : (N, L, d)
        The layer's input, and what its outputs are compared with.
    rounding : Compute or None
        What rounds the operations; None rounds none.
    """

    def __init__(
        self,
        layer: Values,
        shape: llama.LlamaShape,
        batches: list[slice],
        h: NDArray[Any],
        target: NDArray[Any],
        rounding: Compute | None,
    ) -> None:
        self._layer, self._shape = layer, shape
        self._batches, self._h, self._target = batches, h, target
        self._forward: Callable[..., llama.LayerTrace] = llama.layer_forward
        self._rounding = rounding
        self._weight: Round = plain
        self._wrap: Round = plain
        self.wide: Round = plain
        if rounding is not None:
            self._forward = partial(rounded_forward, compute=rounding)
            self._weight, self._wrap = rounding.round, rounder(rounding)
            # The weights that descend, their gradients and the loss are not in 16 bits.
            self.wide = rounder(rounding.wide)

    def at(self, h: NDArray[Any], target: NDArray[Any]) -> _Objective:
        """Return the same at another input and target of the layer."""
        return _Objective(self._layer, self._shape, self._batches, h, target, self._rounding)

    def distances(self, values: Values) -> Array:
        """Return the squared distance of each token, ``(N * L,)``."""
        layer = self._with(values)
        parts = [np.sum(self._missed(layer, batch) ** 2, axis=-1) for batch in self._batches]
        return np.concatenate([np.asarray(part, np.float64).reshape(-1) for part in parts])

    def loss(self, values: Values) -> float:
        """Return the sum over all tokens."""
        layer = self._with(values)
        return sum(float(np.sum(self._missed(layer, batch) ** 2)) for batch in self._batches)

    def gradients(self, values: Values) -> tuple[float, dict[str, Array]]:
        """Return the loss, and its gradients."""
        layer, total = self._with(values), 0.0
        wrapped = {name: self._wrap(weight) for name, weight in layer.items()}
        sums: dict[str, Array] = {name: np.zeros(value.shape) for name, value in values.items()}
        for batch in self._batches:
            missed = self._missed(layer, batch)
            h, dy = self._wrap(self._h[batch]), self._wrap(2 * missed)
            _, found = gradient.layer_backward(wrapped, self._shape, h, dy)
            for name, part in sums.items():
                part += np.asarray(found[name])
            total += float(np.sum(missed**2))
        return total, {name: self.wide(value) for name, value in sums.items()}

    def moments(self, values: Values) -> dict[str, Array]:
        """Return the second moments of the inputs, ``(d_in, d_in)``, by weight."""
        wrapped = {name: self._wrap(weight) for name, weight in self._with(values).items()}
        sums: dict[str, Array] = {}
        for batch in self._batches:
            inputs = refinement.linear_inputs(wrapped, self._shape, self._wrap(self._h[batch]))
            for name in values:
                X = np.asarray(inputs[name], dtype=np.float64)
                sums[name] = sums.get(name, 0.0) + statistics.second_moment(X)
        return sums

    def _with(self, values: Values) -> dict[str, Array]:
        return {**self._layer, **{n: self._weight(np.asarray(v)) for n, v in values.items()}}

    def _missed(self, layer: Values, batch: slice) -> Array:
        output = self._forward(layer, self._shape, self._h[batch]).output
        return self.wide(output - self._target[batch])
