"""Importance of weights, channels and groups: Eq. (1), (2), (8) to (10); Sections 2.2 to 3.3.

A score of a single weight is Eq. (1), the method's, or one of those that the paper compares with:
the magnitude, and the Taylor expansion of the loss. What puts them together takes any of them.
"""

from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from lorap.ops.precision import compute_dtype, rows_at_a_time

Aggregation = Literal["mean", "l1", "l2", "linf"]


def weight_importance(weight: Tensor, norms: Tensor) -> Tensor:
    """Eq. (1): magnitude of each weight times the norm of its input feature.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype.
    norms : (d_in,)
        ``feature_norms`` of the linear's input.

    Returns
    -------
    (d_out, d_in)
        In ``compute_dtype(weight)``.

    Notes
    -----
    SPEC: ``importance.weight``.
    """
    dtype = compute_dtype(weight)
    return weight.to(dtype).abs().mul_(norms.to(dtype))


def magnitude_importance(weight: Tensor) -> Tensor:
    """Magnitude of each weight: Eq. (1) as if all inputs were of one size.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype.

    Returns
    -------
    (d_out, d_in)
        In ``compute_dtype(weight)``.

    Notes
    -----
    SPEC: ``importance.magnitude``.
    """
    return weight.to(compute_dtype(weight)).abs()


def taylor_importance(weight: Tensor, gradient: Tensor) -> Tensor:
    """Magnitude of each weight times the gradient of the loss by it.

    It is how much the loss changes, to first order, as the weight turns zero.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype.
    gradient : (d_out, d_in)
        Of the mean cross-entropy, any floating dtype.

    Returns
    -------
    (d_out, d_in)
        In ``compute_dtype(weight)``; in units of the loss.

    Notes
    -----
    SPEC: ``importance.taylor``. LLM-Pruner (arXiv 2305.11627) calls it ``param_first``.
    """
    dtype = compute_dtype(weight)
    return (weight.to(dtype) * gradient.to(dtype)).abs()


def channel_importance(scores: Tensor, axis: int, aggregation: Aggregation = "l2") -> Tensor:
    """Eq. (8), and Eq. (2) for ``mean``: the scores of a channel's weights put together.

    Parameters
    ----------
    scores : (d_out, d_in)
        Scores of the single weights of a matrix, any floating dtype.
    axis : {0, 1}
        The axis summed over: 1 scores the rows (output channels of up and gate), 0 the columns
        (input channels of down).
    aggregation : {"mean", "l1", "l2", "linf"}
        Eq. (2), or a norm; Eq. (8) and the default is ``l2``.

    Returns
    -------
    (d_out,) or (d_in,) float64

    Notes
    -----
    SPEC: ``importance.channel``, ``precision.statistics``: sums are taken in float64.
    """

    def together(rows: Tensor) -> Tensor:
        wide = rows.double()
        if aggregation == "linf":
            return wide.amax(dim=axis)
        return (wide.square() if aggregation == "l2" else wide).sum(dim=axis)

    parts = map(together, torch.split(scores, rows_at_a_time(scores, once=True)))
    if axis == 1:
        found = torch.cat(list(parts))
    else:
        found = reduce(torch.maximum if aggregation == "linf" else torch.add, parts)
    if aggregation == "mean":
        return found / scores.shape[axis]
    return found.sqrt() if aggregation == "l2" else found


def group_scores(up: Tensor, gate: Tensor, down: Tensor, aggregation: Aggregation = "l2") -> Tensor:
    """Eq. (9) and (10) on scores of weights: row of up, row of gate and column of down, added.

    Parameters
    ----------
    up, gate : (width, d)
        Scores of the single weights, any floating dtype; row i belongs to channel i.
    down : (d, width)
        Column i belongs to channel i.
    aggregation : {"mean", "l1", "l2", "linf"}
        As in ``channel_importance``.

    Returns
    -------
    (width,) float64

    Notes
    -----
    SPEC: ``importance.group-scores``.
    """
    return (
        channel_importance(up, 1, aggregation)
        + channel_importance(gate, 1, aggregation)
        + channel_importance(down, 0, aggregation)
    )


def group_importance(
    up: Tensor,
    gate: Tensor,
    down: Tensor,
    ffn_norms: Tensor,
    down_norms: Tensor,
    aggregation: Aggregation = "l2",
) -> Tensor:
    """Eq. (9) and (10): ``group_scores`` of the weight scores of Eq. (1).

    Parameters
    ----------
    up, gate : (width, d)
        Row i belongs to channel i.
    down : (d, width)
        Column i belongs to channel i.
    ffn_norms : (d,)
        ``feature_norms`` of the input of up and gate.
    down_norms : (width,)
        ``feature_norms`` of down's own input, the channels themselves.
    aggregation : {"mean", "l1", "l2", "linf"}
        As in ``channel_importance``.

    Returns
    -------
    (width,) float64

    Notes
    -----
    SPEC: ``importance.group``.
    """
    return group_scores(
        weight_importance(up, ffn_norms),
        weight_importance(gate, ffn_norms),
        weight_importance(down, down_norms),
        aggregation,
    )
