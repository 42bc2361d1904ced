"""Sizes by what a parameter is worth: errors of every size, weighed by measured sensitivities.

Neither paper has this. The error that a size costs is known in the unit of each module's own
outputs; how much the model minds it is measured, by approximating one module at a time. All but the
divergence is done in IEEE doubles, in the order written, so that the sizes are the same everywhere.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from .llama import softmax

Array = NDArray[np.float64]
Shape = tuple[int, int]
Curve = tuple[list[int], list[float]]
"""Parameters of each size, ascending, and the error that it costs; the last one is dense."""


def divergence_sum(Z: Array, Z_hat: Array) -> float:
    """Sum over the tokens of ``KL(softmax(Z_m) || softmax(Z_hat_m))``, in nats.

    Parameters
    ----------
    Z, Z_hat : (tokens, vocabulary)
        Logits of the model and of the one that approximates it.

    Notes
    -----
    SPEC: ``marginal.divergence``.
    """
    log_p, log_q = (z - np.max(z, axis=1, keepdims=True) for z in (Z, Z_hat))
    log_p, log_q = (z - np.log(np.sum(np.exp(z), axis=1, keepdims=True)) for z in (log_p, log_q))
    return float(np.sum(softmax(Z) * (log_p - log_q)))


def rank_curve(S: Array, shape: Shape, bias: int = 0) -> Curve:
    """Parameters and squared error of a low-rank product, by rank; in the end the dense matrix.

    Parameters
    ----------
    S : (min(d_out, d_in),)
        Singular values of the weighted matrix, descending.
    shape : (d_out, d_in)
    bias : int
        Parameters that a factored matrix has besides.

    Returns
    -------
    parameters : list of int
        ``r (d_out + d_in) + bias`` of the ranks 1, 2, ... below the dense size; that one at last.
    errors : list of float
        ``S[r]^2 + S[r + 1]^2 + ...``, added from the right; 0 at last.

    Notes
    -----
    SPEC: ``marginal.curve``.
    """
    d_out, d_in = shape
    tails = [0.0]
    for s in S.tolist()[::-1]:
        tails.append(tails[-1] + s * s)
    tails.reverse()
    parameters, errors = [], []
    r = 1
    while r * (d_out + d_in) + bias < d_out * d_in:
        parameters.append(r * (d_out + d_in) + bias)
        errors.append(tails[r])
        r += 1
    return [*parameters, d_out * d_in], [*errors, 0.0]


def channel_curve(losses: Array, per_channel: int) -> Curve:
    """Parameters and squared error of a feed-forward block, by width; in the end the dense one.

    Parameters
    ----------
    losses : (d_m - 1,)
        What the removals of ``regression.removal_order`` cost, in their order.
    per_channel : int
        Parameters of a channel.

    Returns
    -------
    parameters : list of int
        Of the widths 1 to d_m.
    errors : list of float
        The losses of all removals that lead to a width, added in their order.

    Notes
    -----
    SPEC: ``marginal.curve``.
    """
    errors = [0.0]
    for loss in losses.tolist():
        errors.append(errors[-1] + loss)
    return [(j + 1) * per_channel for j in range(len(errors))], errors[::-1]


def middle(count: int) -> int:
    """Place on a curve of `count` sizes, the dense one among them, at which a module is probed.

    Notes
    -----
    SPEC: ``marginal.sensitivity``.
    """
    return (count - 2) // 2


def sensitivity(divergence: float, error: float) -> float:
    """Divergence of the model for each unit of a module's error.

    Parameters
    ----------
    divergence : float
        Mean over tokens of what approximating this module alone makes of the model.
    error : float
        What the module's size costs by its curve.

    Returns
    -------
    float
        0 where the error is 0, or rounding makes the divergence negative.

    Notes
    -----
    SPEC: ``marginal.sensitivity``.
    """
    return max(divergence, 0.0) / error if error > 0 else 0.0


def marginal_sizes(
    curves: Mapping[str, Curve],
    sensitivities: Mapping[str, float],
    budget: int,
    floors: Mapping[str, int],
) -> dict[str, int]:
    """Place on its curve of each module: the sum of sensitivity times error is made small.

    Every module takes the size at which sensitivity times error plus a price for each parameter is
    the least, at the lowest price at which all fit. What is left of the budget goes, step by step,
    to where it takes off most for each parameter.

    Parameters
    ----------
    curves : mapping
        By module.
    sensitivities : mapping
        By module, not negative.
    budget : int
        Parameters of all together.
    floors : mapping
        Parameters that a module holds at least; at most its dense size.

    Returns
    -------
    dict
        Index into the curve, by module. The smallest sizes where these do not fit.

    Notes
    -----
    SPEC: ``marginal.sizes``.
    """
    first = {m: next(j for j, n in enumerate(P) if n >= floors[m]) for m, (P, _) in curves.items()}
    P = {m: np.array(curves[m][0][j:], dtype=np.float64) for m, j in first.items()}
    E = {m: sensitivities[m] * np.array(curves[m][1][j:]) for m, j in first.items()}

    def held(chosen: Mapping[str, int]) -> int:
        return sum(int(P[m][j]) for m, j in chosen.items())

    def at(price: float) -> dict[str, int]:
        return {m: int(np.argmin(E[m] + price * P[m])) for m in P}

    chosen = dict.fromkeys(P, 0)
    if held(chosen) <= budget:
        chosen = at(0.0)
        if held(chosen) > budget:
            high = 1.0
            while held(at(high)) > budget:
                high *= 2
            while held(at(high / 2)) <= budget:
                high /= 2
            low = high / 2
            while low < (price := (low + high) / 2) < high:
                if held(at(price)) > budget:
                    low = price
                else:
                    high = price
            chosen = at(high)
        while (step := _steepest(P, E, chosen, budget - held(chosen))) is not None:
            m, j = step
            chosen[m] = j
    return {m: first[m] + j for m, j in chosen.items()}


def _steepest(
    P: Mapping[str, Array], E: Mapping[str, Array], chosen: Mapping[str, int], left: int
) -> tuple[str, int] | None:
    """The step that fits and takes off most for each parameter; None where none takes any off."""
    best, step = 0.0, None
    for m, i in chosen.items():
        more = P[m][i + 1 :] - P[m][i]
        gains = (E[m][i] - E[m][i + 1 :])[more <= left] / more[more <= left]
        if gains.size and (gain := float(np.max(gains))) > best:
            best, step = gain, (m, i + 1 + int(np.argmax(gains)))
    return step
