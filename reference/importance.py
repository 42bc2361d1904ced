"""Importance of weights, channels and groups: Eq. (1), (2), (8) to (10); Sections 2.2 to 3.3."""

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


def channel_importance(scores: Array, axis: int, aggregation: Aggregation = "l2") -> Array:
    """Eq. (8), and Eq. (2) for ``mean``: the scores of a channel's weights put together.

    Parameters
    ----------
    scores : (d_out, d_in)
        ``weight_importance`` of a matrix.
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


def group_importance(
    W_up: Array,
    W_gate: Array,
    W_down: Array,
    x_ffn: Array,
    x_down: Array,
    aggregation: Aggregation = "l2",
) -> Array:
    """Eq. (9) and (10): ``C_i = Phi(up_i,:) + Phi(gate_i,:) + Phi(down_:,i)``.

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
    up = channel_importance(weight_importance(W_up, x_ffn), 1, aggregation)
    gate = channel_importance(weight_importance(W_gate, x_ffn), 1, aggregation)
    down = channel_importance(weight_importance(W_down, x_down), 0, aggregation)
    return up + gate + down
