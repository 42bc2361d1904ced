"""A compressed layer refined: its weights descend to what the uncompressed layer gives.

Conjugate gradients for a function that is not quadratic (Polak and Ribiere, 1969, restarted where
their factor is negative; Nocedal and Wright, Numerical Optimization, section 5.2), preconditioned
by the second moments of the linears' inputs. The step is that of a parabola, so that no rate has to
be chosen.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from . import gradient, llama
from .regression import ridged_correlation
from .statistics import second_moment

Array = NDArray[np.float64]
Values = Mapping[str, Array]

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

    values: dict[str, Array]
    losses: list[float]


def preconditioner(C: Array, ridge: float) -> Array:
    """Inverse of the inputs' second moment, with a ridge: ``(C + ridge diag(C))^-1``.

    Parameters
    ----------
    C : (d_in, d_in)
        ``second_moment`` of the inputs.
    ridge : float
        As in ``regression.ridged_correlation``.

    Returns
    -------
    (d_in, d_in)
        A dead feature, whose gradients are 0, has ``1 / (1 + ridge)`` on the diagonal.

    Notes
    -----
    SPEC: ``refine.preconditioner``.
    """
    d, K = ridged_correlation(C, ridge)
    unit = np.where(d > 0, d, 1.0)
    inverse: Array = linalg.inv(K) / np.outer(unit, unit)
    return inverse


def conjugate_gradients(
    values: Values,
    loss: Callable[[Values], float],
    gradients: Callable[[Values], tuple[float, Values]],
    preconditioners: Mapping[str, Array],
    iterations: int,
) -> Descent:
    """Descend from given weights, a number of iterations.

    Parameters
    ----------
    values : mapping
        Weights ``(d_out, d_in)`` by name.
    loss : callable
        Of the weights; a number that is not finite counts as too high.
    gradients : callable
        The loss, and its gradients by name, in the order of the weights.
    preconditioners : mapping
        ``(d_in, d_in)``, symmetric and positive definite, by name.
    iterations : int

    Returns
    -------
    Descent

    Notes
    -----
    SPEC: ``refine.direction``, ``refine.step``.
    """
    theta = dict(values)
    J, G = gradients(theta)
    losses, trial = [J], FIRST_TRIAL
    direction: Values | None = None
    old, old_gamma = G, 0.0
    for _ in range(iterations):
        Z = {name: G[name] @ preconditioners[name] for name in theta}
        gamma = _inner(Z, G)
        if gamma == 0:
            break
        if direction is not None:
            beta = max(0.0, (gamma - _inner(Z, old)) / old_gamma)
            new = {name: beta * direction[name] - Z[name] for name in theta}
            slope = _inner(G, new)
        if direction is None or slope >= 0:
            new, slope = {name: -z for name, z in Z.items()}, -gamma
        step = step_length(J, slope, trial, loss(_moved(theta, trial, new)))
        there = _moved(theta, step, new)
        J_there, G_there = gradients(there)
        if J_there < J:
            theta, direction, trial = there, new, max(step, trial / WIDEST)
            old, old_gamma, J, G = G, gamma, J_there, G_there
        else:
            direction, trial = None, step / WIDEST
        losses.append(J)
    return Descent(theta, losses)


def step_length(J: float, slope: float, trial: float, J_trial: float) -> float:
    """Where the parabola through loss and slope at 0, and the loss of a trial step, is least.

    Parameters
    ----------
    J, slope : float
        Loss and slope at 0; the slope is negative.
    trial : float
        Positive; 0 once a descent that is stuck has made it too short for a double.
    J_trial : float
        Loss there.

    Returns
    -------
    float
        At most ``WIDEST`` trials; that many where the parabola has no minimum, and one
        ``WIDEST``-th of the trial where the loss there is not finite.

    Notes
    -----
    SPEC: ``refine.step``.
    """
    if not np.isfinite(J_trial):
        return trial / WIDEST
    # The curvature times the trial's square: that of a very short trial underflows.
    rise = J_trial - J - slope * trial
    if rise <= 0:
        return WIDEST * trial
    return min(-slope * trial / (2 * rise), WIDEST) * trial


def _moved(values: Values, step: float, direction: Values) -> dict[str, Array]:
    return {name: value + step * direction[name] for name, value in values.items()}


def _inner(a: Values, b: Values) -> float:
    return float(sum(np.sum(a[name] * b[name]) for name in a))


def layer_loss(layer: Values, shape: llama.LlamaShape, h: Array, target: Array) -> float:
    """Squared distance of a layer's outputs to a target, over all tokens.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    shape : llama.LlamaShape
    h, target : (N, L, d)

    Notes
    -----
    SPEC: ``refine.loss``.
    """
    return float(np.sum((llama.layer_forward(layer, shape, h).output - target) ** 2))


def linear_inputs(layer: Values, shape: llama.LlamaShape, h: Array) -> dict[str, Array]:
    """What each matrix of a layer is applied to, ``(tokens, d_in)`` by the name of its weight."""
    trace = llama.layer_forward(layer, shape, h)
    found: dict[str, Array] = {}
    for names, x in (
        (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), trace.attention),
        (("self_attn.o_proj",), trace.o),
        (("mlp.gate_proj", "mlp.up_proj"), trace.ffn),
        (("mlp.down_proj",), trace.down),
    ):
        X = x.reshape(-1, x.shape[-1])
        for name in names:
            if f"{name}.weight" in layer:
                found[f"{name}.weight"] = X
            else:
                right = llama.right_name(layer, name)
                found[right], found[f"{name}.left.weight"] = X, X @ layer[right].T
    return found


def refined_layer(
    layer: Values,
    names: Collection[str],
    shape: llama.LlamaShape,
    h: Array,
    target: Array,
    iterations: int,
    ridge: float,
) -> Descent:
    """Refine some of a layer's weights against a target of its outputs.

    Parameters
    ----------
    layer : mapping
        Weights of the compressed layer, names relative to it.
    names : collection of str
        Weights that change.
    shape : llama.LlamaShape
    h : (N, L, d)
        Input of the layer.
    target : (N, L, d)
    iterations : int
    ridge : float
        As in ``preconditioner``.

    Notes
    -----
    SPEC: ``refine.loss``, ``refine.weights``, ``refine.preconditioner``.
    """
    inputs = linear_inputs(layer, shape, h)
    preconditioners = {name: preconditioner(second_moment(inputs[name]), ridge) for name in names}

    def loss(values: Values) -> float:
        return layer_loss({**layer, **values}, shape, h, target)

    def gradients(values: Values) -> tuple[float, Values]:
        new = {**layer, **values}
        missed = llama.layer_forward(new, shape, h).output - target
        _, found = gradient.layer_backward(new, shape, h, 2 * missed)
        return float(np.sum(missed**2)), {name: found[name] for name in values}

    start = {name: layer[name] for name in names}
    return conjugate_gradients(start, loss, gradients, preconditioners, iterations)
