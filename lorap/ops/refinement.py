"""Conjugate gradients, preconditioned, with steps by a parabola: the descent of refinement.

Polak and Ribiere (1969), restarted where their factor is negative (Nocedal and Wright, Numerical
Optimization, section 5.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lorap.ops.regression import ridged_correlation, units

Values = Mapping[str, Tensor]

FIRST_TRIAL = 1 / 16
"""Of 1/2, where ``norm(X A^T - Y)^2`` is least along the preconditioned gradient but for the ridge:
several matrices that move together overshoot."""

WIDEST = 4.0
"""How much longer than the trial a step is at most, and how much shorter the next trial."""


@dataclass(frozen=True)
class Descent:
    """Where a descent has led.

    Attributes
    ----------
    values : dict
        The weights of the least loss, by name.
    losses : list of float
        At the start, and after each iteration; none is higher than the one before.
    """

    values: dict[str, Tensor]
    losses: list[float]


def preconditioner(moment: Tensor, ridge: float) -> Tensor:
    """Inverse of the inputs' second moment, with a ridge.

    Parameters
    ----------
    moment : (d_in, d_in)
        ``second_moment`` of the inputs.
    ridge : float
        As in ``ridged_correlation``.

    Returns
    -------
    (d_in, d_in) float64
        A dead feature, whose gradients are 0, has ``1 / (1 + ridge)`` on the diagonal.

    Notes
    -----
    SPEC: ``refine.preconditioner``, ``precision.decomposition``.
    """
    norms, correlation = ridged_correlation(moment, ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
    unit = units(norms)
    inverse /= unit
    inverse /= unit[:, None]
    return inverse


def conjugate_gradients(
    values: Values,
    loss: Callable[[Values], float],
    gradients: Callable[[Values], tuple[float, Values]],
    preconditioned: Callable[[Values], Values],
    iterations: int,
) -> Descent:
    """Descend from given weights, a number of iterations.

    Parameters
    ----------
    values : mapping
        Weights ``(d_out, d_in)`` by name; not changed.
    loss : callable
        Of the weights; a number that is not finite counts as too high.
    gradients : callable
        The loss, and its gradients by name, in the order and the dtypes of the weights.
    preconditioned : callable
        Gradients, each multiplied by its ``preconditioner`` from the right, in their order.
    iterations : int
        Each takes one of `gradients` and one of `loss`; before the first one there is one of
        `gradients`.

    Returns
    -------
    Descent

    Notes
    -----
    SPEC: ``refine.direction``, ``refine.step``. Inner products are summed in float64.
    """
    here = dict(values)
    lowest, gradient = gradients(here)
    losses, trial = [lowest], FIRST_TRIAL
    direction: dict[str, Tensor] | None = None
    old, old_product = gradient, 0.0
    for _ in range(iterations):
        downhill = preconditioned(gradient)
        product = _inner(downhill, gradient)
        if product == 0:
            break
        if direction is not None:
            factor = max(0.0, (product - _inner(downhill, old)) / old_product)
            new = {name: direction[name].mul(factor).sub_(z) for name, z in downhill.items()}
            slope = _inner(gradient, new)
        if direction is None or slope >= 0:
            new, slope = {name: -z for name, z in downhill.items()}, -product
        step = step_length(lowest, slope, trial, loss(_moved(here, trial, new)))
        there = _moved(here, step, new)
        found, gradient_there = gradients(there)
        if found < lowest:
            here, direction, lowest = there, new, found
            trial = max(step, trial / WIDEST)
            old, old_product, gradient = gradient, product, gradient_there
        else:
            direction, trial = None, step / WIDEST
        losses.append(lowest)
    return Descent(here, losses)


def step_length(loss: float, slope: float, trial: float, loss_at_trial: float) -> float:
    """Where the parabola through loss and slope at 0, and the loss of a trial step, is least.

    Parameters
    ----------
    loss, slope : float
        At 0; the slope is negative.
    trial : float
        Positive; 0 once a descent that is stuck has made it too short for a double.
    loss_at_trial : float

    Returns
    -------
    float
        At most ``WIDEST`` trials; that many where the parabola has no minimum, and one
        ``WIDEST``-th of the trial where the loss there is not finite.

    Notes
    -----
    SPEC: ``refine.step``.
    """
    if not math.isfinite(loss_at_trial):
        return trial / WIDEST
    # The curvature times the trial's square: that of a very short trial underflows.
    rise = loss_at_trial - loss - slope * trial
    if rise <= 0:
        return WIDEST * trial
    return min(-slope * trial / (2 * rise), WIDEST) * trial


def _moved(values: Values, step: float, direction: Values) -> dict[str, Tensor]:
    return {name: value.add(direction[name], alpha=step) for name, value in values.items()}


def _inner(a: Values, b: Values) -> float:
    return sum(float(torch.sum(a[name] * b[name], dtype=torch.float64)) for name in a)
