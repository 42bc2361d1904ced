"""Sizes by what a parameter is worth: errors of every size, weighed by measured sensitivities.

The error that a size costs is known in the unit of each module's own outputs; how much the model
minds it is measured, by approximating one module at a time. Sizes are made of doubles by the
operations that the rules name and in their order, so that they are the same on every machine.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from torch import Tensor

Shape = tuple[int, int]
Curve = tuple[list[int], list[float]]
"""Parameters of each size, ascending, and the error that it costs; the last one is dense."""

_CHUNK_ELEMENTS = 1 << 21
"""Logits widened to float64 at a time (16 MiB): the workspace does not grow with the tokens."""


def divergence_sum(expected: Tensor, found: Tensor, mask: Tensor | None = None) -> float:
    """Sum over tokens of the Kullback-Leibler divergence of predictions, in nats.

    Parameters
    ----------
    expected, found : (..., vocabulary)
        Logits of the model and of the one that approximates it, of any floating dtype; all leading
        axes are tokens.
    mask : (...), optional
        True (or nonzero) where the token counts.

    Returns
    -------
    float
        Additive over batches; not negative but for rounding.

    Notes
    -----
    SPEC: ``marginal.divergence``, ``stats.padding``, ``precision.statistics``: done in float64.
    """
    vocabulary = expected.shape[-1]
    count = expected.shape[:-1].numel()
    expected, found = expected.reshape(count, vocabulary), found.reshape(count, vocabulary)
    if mask is not None:
        counts = mask.reshape(-1).bool()
        expected, found = expected[counts], found[counts]
    total = torch.zeros((), dtype=torch.float64, device=expected.device)
    step = max(1, _CHUNK_ELEMENTS // vocabulary)
    for start in range(0, expected.shape[0], step):
        p, q = (
            logits[start : start + step].to(torch.float64).log_softmax(-1)
            for logits in (expected, found)
        )
        total += (p.exp() * (p - q)).sum()
    return float(total)


def rank_curve(singular_values: Tensor, shape: Shape, bias: int = 0) -> Curve:
    """Parameters and squared error of a low-rank product, by rank; in the end the dense matrix.

    Parameters
    ----------
    singular_values : (min(d_out, d_in),)
        Of the weighted matrix, descending.
    shape : (d_out, d_in)
    bias : int
        Parameters that a factored matrix has besides.

    Returns
    -------
    parameters : list of int
        Of the ranks 1, 2, ... below the dense size; that one at last.
    errors : list of float
        The squares beyond the rank, added from the right; 0 at last.

    Notes
    -----
    SPEC: ``marginal.curve``.
    """
    per_rank, dense = sum(shape), math.prod(shape)
    squares = (value * value for value in singular_values.double().flip(0).tolist())
    tails = list(accumulate(squares, initial=0.0))[::-1]
    parameters = [rank * per_rank + bias for rank in range(1, len(tails))]
    parameters = [held for held in parameters if held < dense]
    return [*parameters, dense], [*tails[1 : len(parameters) + 1], 0.0]


def channel_curve(losses: Tensor, per_channel: int) -> Curve:
    """Parameters and squared error of a feed-forward block, by width; in the end the dense one.

    Parameters
    ----------
    losses : (width - 1,)
        What the removals of ``removal_order`` cost, in their order.
    per_channel : int
        Parameters of a channel.

    Returns
    -------
    parameters : list of int
        Of the widths from 1 on.
    errors : list of float
        The losses of all removals that lead to a width, added in their order.

    Notes
    -----
    SPEC: ``marginal.curve``.
    """
    errors = list(accumulate(losses.double().tolist(), initial=0.0))[::-1]
    return [width * per_channel for width in range(1, len(errors) + 1)], errors


def middle(count: int) -> int:
    """Return the place on a curve of `count` sizes, at least 2, at which its module is probed.

    Notes
    -----
    SPEC: ``marginal.sensitivity``: the middle of the sizes below the dense one.
    """
    return (count - 2) // 2


def sensitivity(divergence: float, error: float) -> float:
    """Return the divergence of the model for each unit of a module's error.

    Parameters
    ----------
    divergence : float
        Mean over tokens, with this module alone approximated.
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
    """Choose sizes that make the sum of sensitivity times error small within a budget.

    Every module takes the size at which that and a price for each parameter are the least together,
    at the lowest price at which all fit. What is left is spent where it takes off most.

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
    first = {name: bisect_left(held, floors[name]) for name, (held, _) in curves.items()}
    sizes, costs = {}, {}
    for name, (parameters, errors) in curves.items():
        sizes[name] = torch.tensor(parameters[first[name] :], dtype=torch.float64)
        weighed = torch.tensor(errors[first[name] :], dtype=torch.float64)
        costs[name] = sensitivities[name] * weighed

    def left(places: Mapping[str, int]) -> int:
        return budget - sum(int(sizes[name][place]) for name, place in places.items())

    def places_at(price: float) -> dict[str, int]:
        return {name: int((costs[name] + price * sizes[name]).argmin()) for name in curves}

    places = dict.fromkeys(curves, 0)
    if left(places) >= 0:
        price = _lowest_price(lambda price: left(places_at(price)) >= 0)
        places = places_at(price)
        rest = left(places)
        while (step := _steepest_step(sizes, costs, places, rest)) is not None:
            name, place = step
            rest -= int(sizes[name][place] - sizes[name][places[name]])
            places[name] = place
    return {name: first[name] + place for name, place in places.items()}


def _lowest_price(fits: Callable[[float], bool]) -> float:
    """Return the price at which bisection ends: 0, or a double that fits beside one that does not.

    A price that is high enough fits. From 1 on it is doubled, or halved, to the lowest power of two
    that fits.
    """
    if fits(0.0):
        return 0.0
    high = 1.0
    while not fits(high):
        high *= 2
    while fits(high / 2):
        high /= 2
    low = high / 2
    while low < (middle := (low + high) / 2) < high:
        if fits(middle):
            high = middle
        else:
            low = middle
    return high


def _steepest_step(
    sizes: Mapping[str, Tensor], costs: Mapping[str, Tensor], places: Mapping[str, int], rest: int
) -> tuple[str, int] | None:
    """Return the step to a larger size that takes off most for each parameter, of those that fit.

    Parameters
    ----------
    sizes, costs : mapping
        By module, ``(points,)``: parameters, and errors as the model minds them.
    places : mapping
        Where each module is.
    rest : int
        Parameters that are left.

    Returns
    -------
    (str, int) or None
        Module and its new place; None where no step takes anything off.
    """
    best, step = 0.0, None
    for name, place in places.items():
        above = slice(place + 1, None)
        added = sizes[name][above] - sizes[name][place]
        fitting = int((added <= rest).sum())
        if not fitting:
            continue
        gains = (costs[name][place] - costs[name][above][:fitting]) / added[:fitting]
        if float(gains.max()) > best:
            best, step = float(gains.max()), (name, place + 1 + int(gains.argmax()))
    return step
