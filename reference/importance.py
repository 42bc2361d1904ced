"""Importance of weights, channels and groups: Eq. (1), (2), (8) to (10); Sections 2.2 to 3.3.

A score of a single weight is Eq. (1), the method's, or one of those that the paper compares with:
the magnitude, and the Taylor expansion of the loss. What puts them together takes any of them.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Aggregation = Literal["mean", "l1", "l2", "linf"]


def weight_importance(W: Array, x: Array) -> Array:
    """Eq. (1): ``I(W_ij) = abs(W_ij) * norm(X_j)``.

    Parameters
    ----------
    W : (d_out, d_in)
        Weights of a linear.
    x : (d_in,)
        Norms of its input features, Eq. (5).

    Returns
    -------
    (d_out, d_in)
        Scores of the single weights.

    Notes
    -----
    SPEC: ``importance.weight``.
    """
    return np.abs(W) * x[None, :]


def magnitude_importance(W: Array) -> Array:
    """``I(W_ij) = abs(W_ij)``: Eq. (1) as if all inputs were of one size.

    Parameters
    ----------
    W : (d_out, d_in)
        Weights of a linear.

    Returns
    -------
    (d_out, d_in)
        Scores of the single weights.

    Notes
    -----
    SPEC: ``importance.magnitude``.
    """
    return np.abs(W)


def taylor_importance(W: Array, G: Array) -> Array:
    """``I(W_ij) = abs(W_ij G_ij)``: change of the loss, to first order, as the weight turns zero.

    Parameters
    ----------
    W : (d_out, d_in)
        Weights of a linear.
    G : (d_out, d_in)
        Gradient of the loss by them (``gradient.loss_gradients``).

    Returns
    -------
    (d_out, d_in)
        Scores of the single weights, in units of the loss.

    Notes
    -----
    SPEC: ``importance.taylor``. LLM-Pruner (arXiv 2305.11627) calls it ``param_first``.
    """
    return np.abs(W * G)


def channel_importance(scores: Array, axis: int, aggregation: Aggregation = "l2") -> Array:
    """Eq. (8), and Eq. (2) for ``mean``: the scores of a channel's weights put together.

    Parameters
    ----------
    scores : (d_out, d_in)
        Scores of the single weights of a matrix.
    axis : {0, 1}
        The axis summed over: 1 scores the rows (output channels of up and gate), 0 the columns
        (input channels of down).
    aggregation : {"mean", "l1", "l2", "linf"}
        Eq. (2), or a norm; Eq. (8) and the default is ``l2``.

    Returns
    -------
    (d_out,) or (d_in,)
        ``Phi`` of every channel.

    Notes
    -----
    SPEC: ``importance.channel``.
    """
    if aggregation == "mean":
        return np.asarray(np.mean(scores, axis=axis))
    if aggregation == "l1":
        return np.asarray(np.sum(scores, axis=axis))
    if aggregation == "l2":
        return np.asarray(np.sqrt(np.sum(scores**2, axis=axis)))
    return np.asarray(np.max(scores, axis=axis, initial=0.0))


def group_scores(
    scores_up: Array, scores_gate: Array, scores_down: Array, aggregation: Aggregation = "l2"
) -> Array:
    """Eq. (9) and (10) on scores of weights: ``C_i = Phi(up_i,:) + Phi(gate_i,:) + Phi(down_:,i)``.

    Parameters
    ----------
    scores_up, scores_gate : (d_m, d)
        Scores of the single weights; row i belongs to channel i.
    scores_down : (d, d_m)
        Column i belongs to channel i.
    aggregation : {"mean", "l1", "l2", "linf"}
        As in ``channel_importance``.

    Returns
    -------
    (d_m,)
        Scores of the groups.

    Notes
    -----
    SPEC: ``importance.group-scores``.
    """
    up = channel_importance(scores_up, 1, aggregation)
    gate = channel_importance(scores_gate, 1, aggregation)
    down = channel_importance(scores_down, 0, aggregation)
    return up + gate + down


def group_importance(
    W_up: Array,
    W_gate: Array,
    W_down: Array,
    x_ffn: Array,
    x_down: Array,
    aggregation: Aggregation = "l2",
) -> Array:
    """Eq. (9) and (10): ``group_scores`` of the weight scores of Eq. (1).

    Parameters
    ----------
    W_up, W_gate : (d_m, d)
        Row i belongs to channel i.
    W_down : (d, d_m)
        Column i belongs to channel i.
    x_ffn : (d,)
        Norms of the input of up and gate.
    x_down : (d_m,)
        Norms of down's own input, the channels themselves.
    aggregation : {"mean", "l1", "l2", "linf"}
        As in ``channel_importance``.

    Returns
    -------
    (d_m,)
        Scores of the groups.

    Notes
    -----
    SPEC: ``importance.group``.
    """
    return group_scores(
        weight_importance(W_up, x_ffn),
        weight_importance(W_gate, x_ffn),
        weight_importance(W_down, x_down),
        aggregation,
    )
