"""Channel pruning of the FFN: Eq. (11), Section 3.3."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def kept_channels(C: Array, low: int, high: int) -> NDArray[np.int64]:
    """Eq. (11): keep the least important band and the top, drop what lies between.

    Parameters
    ----------
    C : (d_m,)
        Scores of the groups, Eq. (10).
    low, high : int
        The removed band ``[low, high)`` of the channels in ascending order of score
        (``budget.removed_band``).

    Returns
    -------
    (d_m - high + low,)
        Indices of the kept channels in their original order.

    Notes
    -----
    SPEC: ``prune.keep``, and ``prune.ties``: equal scores are ordered by channel index.
    """
    ascending = np.argsort(C, kind="stable")
    kept = np.concatenate([ascending[:low], ascending[high:]])
    return np.sort(kept).astype(np.int64)


def prune_ffn(
    W_up: Array, W_gate: Array, W_down: Array, kept: NDArray[np.int64]
) -> tuple[Array, Array, Array]:
    """Eq. (9) and (11): take the kept rows of up and gate and the kept columns of down.

    Parameters
    ----------
    W_up, W_gate : (d_m, d)
    W_down : (d, d_m)
    kept : (width,)
        Indices of the channels that stay.

    Returns
    -------
    up : (width, d)
    gate : (width, d)
    down : (d, width)

    Notes
    -----
    SPEC: ``prune.slice``.
    """
    return W_up[kept], W_gate[kept], W_down[:, kept]
