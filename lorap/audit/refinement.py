"""Refined layers: the descent taken again, in both runs.

The reference's descent starts from what each run makes of the layer. In the rounded run every loss
and every gradient is rounded as the checkpoint's own were; how far the two descents are apart is
the noise of what the checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from lorap.audit.forward import Pair, Runs, rounded_forward
from lorap.audit.gradients import plain, rounder
from lorap.audit.results import Check, ModuleAudit
from lorap.audit.rounding import SPREADS, product_variance, variance
from lorap.audit.sizes import Module
from lorap.audit.stages import Compressed
from lorap_reference import gradient, joint, llama, pca, refinement, statistics

Array = NDArray[np.float64]
Values = Mapping[str, Array]


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
    plan, settings = context.plan.layers[index], context.record.settings
    names = [name for module in plan.values() for name in _weights(context, module)]
    said = context.record.said_of_layer(index).get("losses")
    if not names:
        check = equal("report: losses", [], said)
        return [ModuleAudit(f"layers.{index}", "as it was", (check,)), *found.modules]
    start = Pair(*({n: tensors[n].double().numpy() for n in names} for tensors in found.weights))
    stored = {name: held[name].double().numpy() for name in names}
    objectives = _objectives(context, runs, dense, found.weights)
    moments = Pair(*(o.moments(values) for o, values in zip(objectives, start, strict=True)))
    descents = Pair(
        *(
            objective.descend(values, of_inputs, settings.refine, settings.ridge)
            for objective, values, of_inputs in zip(objectives, start, moments, strict=True)
        )
    )
    best = Pair(*(descent.values for descent in descents))
    checks = _listed(said, descents)
    if checks[0].passed:
        if said[-1] == said[0]:
            checks.append(_not_taken(context, objectives, start, best, held))
            best = start
        checks += _loss_checks(said, objectives, start, descents, stored, context.compute.eps)
    audits = [ModuleAudit(f"layers.{index}", "refined", tuple(checks))]
    for audit in found.modules:
        module = plan.get(audit.name.removeprefix(f"layers.{index}."))
        more: list[Check] = []
        if module is not None and not module.untouched:
            more = _weight_checks(context, module, best, moments.exact, held)
        audits.append(replace(audit, checks=(*audit.checks, *more)))
    return audits


def _objectives(
    context: Context, runs: Runs, dense: Runs, weights: Pair[dict[str, Tensor]]
) -> Pair[_Objective]:
    layer, compute = context.compute.weights(weights.exact, weights.rounded), context.compute
    forward = partial(rounded_forward, compute=compute)
    given = context.shape, runs.batches
    return Pair(
        _Objective(
            layer.exact, *given, runs.h.exact, dense.h.exact, llama.layer_forward, plain, plain
        ),
        _Objective(
            layer.rounded,
            *given,
            runs.h.rounded,
            dense.h.rounded,
            forward,
            compute.round,
            rounder(compute),
        ),
    )


# --- losses --------------------------------------------------------------------------------------


def _listed(said: Any, descents: Pair[refinement.Descent]) -> list[Check]:
    """Compare the recorded losses among themselves: as many as there have to be, none that rises.

    Where a descent has come to an end before, there are fewer.
    """
    name = "report: losses"
    counts = sorted({len(descent.losses) + 1 for descent in descents})
    if not (
        isinstance(said, list)
        and len(said) in counts
        and all(type(loss) is float and np.isfinite(loss) for loss in said)
    ):
        return [Check(name, 1, 0, f"expected {counts[-1]} finite numbers")]
    rises = sum(after > before for before, after in pairwise(said[:-1]))
    rises += said[-1] > said[0]
    return [Check(name, rises, 0, "a loss rises" if rises else "")]


def _with_noise(objectives: Pair[_Objective], values: Pair[Values]) -> tuple[float, float]:
    """Return a loss, and its noise.

    The noise is how far rounding moves it, or would move it if it moved the tokens independently.
    """
    exact, rounded = (o.distances(v) for o, v in zip(objectives, values, strict=True))
    moved = rounded - exact
    return float(np.sum(exact)), float(np.hypot(np.sum(moved), np.sqrt(np.sum(moved**2))))


def _loss_checks(
    said: Sequence[float],
    objectives: Pair[_Objective],
    start: Pair[Values],
    descents: Pair[refinement.Descent],
    stored: Values,
    eps: float,
) -> list[Check]:
    """Compare the recorded losses with those of the two descents, and of the weights as stored."""
    _, noise = _with_noise(objectives, start)
    count = min(len(said) - 1, *(len(descent.losses) for descent in descents))
    exact, rounded, recorded = (
        np.array(losses[:count])
        for losses in (descents.exact.losses, descents.rounded.losses, said)
    )
    # What is wrong at one iteration is handed on to the next.
    moved = np.maximum.accumulate(np.maximum(np.abs(rounded - exact), noise))
    bound = ROOM_LARGEST * (moved + eps / 8 * exact)
    last, noise = _with_noise(objectives, Pair(stored, stored))
    return [
        worst("losses of the iterations", np.abs(recorded - exact) / exact[0], bound / exact[0]),
        Check(
            "loss as stored",
            abs(said[-1] - last) / last,
            ROOM_RMS * (noise + eps / 16 * last) / last,
        ),
    ]


def _not_taken(
    context: Context,
    objectives: Pair[_Objective],
    start: Pair[Values],
    best: Pair[Values],
    held: Mapping[str, Tensor],
) -> Check:
    """Compare the loss at the start with that of what it is said not to be above."""
    as_stored = Pair(
        *(
            {n: torch.from_numpy(v).to(held[n].dtype).double().numpy() for n, v in values.items()}
            for values in best
        )
    )
    (first, noise), (last, other) = (_with_noise(objectives, v) for v in (start, as_stored))
    bound = ROOM_RMS * (noise + other + context.compute.eps / 16 * first)
    return Check("loss as stored, not taken", max(first - last, 0.0) / first, bound / first)


# --- weights -------------------------------------------------------------------------------------


def _weight_checks(
    context: Context,
    module: Module,
    best: Pair[Values],
    moments: Values,
    held: Mapping[str, Tensor],
) -> list[Check]:
    """Compare the outputs of a module's matrices with those of the exact run's.

    Parameters
    ----------
    context : Context
    module : Module
    best : Pair of dict
        The weights that both runs come to.
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
            spread = variance(best.exact[name], held[name].dtype)
            weights = Pair(*(values[name] for values in best))
            title = f"{role}: distance of the outputs"
            checks.append(_distance(context, title, stored[name], weights, moments[name], spread))
        return checks
    right = f"{right_name(family, module)}.weight"

    def factors(values: Values) -> tuple[Array, Array]:
        lefts = [values[f"{linear}.left.weight"] for linear in linears.values()]
        return joint.stacked(lefts), values[right]

    spread = product_variance(*factors(best.exact), held[right].dtype)
    products = Pair(*(L @ R for L, R in map(factors, best)))
    L, R = factors(stored)
    title = "distance of the outputs"
    return [_distance(context, title, L @ R, products, moments[right], spread)]


def _distance(
    context: Context, name: str, found: Array, best: Pair[Array], moment: Array, spread: Array
) -> Check:
    """Compare a matrix with what the exact run gives, by the outputs.

    Parameters
    ----------
    context : Context
    name : str
        Of the check.
    found : (d_out, d_in)
    best : Pair of (d_out, d_in)
    moment : (d_in, d_in)
        Of the inputs.
    spread : (d_out, d_in)
        Variance of what rounding to the storage dtype adds.
    """
    total = float(np.sqrt(pca.output_error(best.exact, np.zeros_like(found), moment))) or 1.0
    off, noise = (
        float(np.sqrt(pca.output_error(other, best.exact, moment)))
        for other in (found, best.rounded)
    )
    rounding = float(np.sqrt(np.sum(spread * np.diag(moment))))
    bound = ROOM_RMS * (noise + context.compute.eps / 16 * total) + SPREADS * 1.001 * rounding
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
    forward : callable
        As ``llama.layer_forward``.
    rounded : callable
        Rounds weights to the dtype of the run.
    wrap : callable
        Makes an array one whose operations are rounded.
    """

    def __init__(
        self,
        layer: Values,
        shape: llama.LlamaShape,
        batches: list[slice],
        h: NDArray[Any],
        target: NDArray[Any],
        forward: Callable[..., llama.LayerTrace],
        rounded: Callable[[NDArray[Any]], NDArray[Any]],
        wrap: Callable[[NDArray[Any]], NDArray[Any]],
    ) -> None:
        self._layer, self._shape = layer, shape
        self._batches, self._h, self._target = batches, h, target
        self._forward, self._rounded, self._wrap = forward, rounded, wrap

    def distances(self, values: Values) -> Array:
        """Return the squared distance of each token, ``(N * L,)``."""
        layer = self._with(values)
        parts = [np.sum(self._missed(layer, batch) ** 2, axis=-1) for batch in self._batches]
        return np.concatenate([part.reshape(-1) for part in parts])

    def loss(self, values: Values) -> float:
        """Return the sum over all tokens."""
        return float(np.sum(self.distances(values)))

    def gradients(self, values: Values) -> tuple[float, dict[str, Array]]:
        """Return the loss, and its gradients."""
        layer, total = self._with(values), 0.0
        wrapped = {name: self._wrap(weight) for name, weight in layer.items()}
        sums: dict[str, Array] = {name: np.zeros_like(value) for name, value in values.items()}
        for batch in self._batches:
            missed = self._missed(layer, batch)
            h, dy = self._wrap(self._h[batch]), self._wrap(2 * missed)
            _, found = gradient.layer_backward(wrapped, self._shape, h, dy)
            for name, part in sums.items():
                part += np.asarray(found[name])
            total += float(np.sum(missed**2))
        return total, sums

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

    def descend(
        self, start: Values, moments: Values, iterations: int, ridge: float
    ) -> refinement.Descent:
        """Descend from given weights, preconditioned by the moments of their inputs."""
        inverses = {name: refinement.preconditioner(C, ridge) for name, C in moments.items()}
        return refinement.conjugate_gradients(
            start, self.loss, self.gradients, inverses, iterations
        )

    def _with(self, values: Values) -> dict[str, Array]:
        return {**self._layer, **{name: self._rounded(value) for name, value in values.items()}}

    def _missed(self, layer: Values, batch: slice) -> Array:
        output = self._forward(layer, self._shape, self._h[batch]).output
        return np.asarray(output - self._target[batch], dtype=np.float64)
