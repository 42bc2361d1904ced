"""Unstructured pruning by Wanda (arXiv 2306.11695), whose masks Fig. 2 and 3 of the paper show."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def wanda_mask(scores: Array, sparsity: float) -> NDArray[np.bool_]:
    """Mark the weights that stay where each output row drops its least important ones.

    Parameters
    ----------
    scores : (d_out, d_in)
        Scores of the single weights; Wanda's are ``importance.weight_importance``.
    sparsity : float
        Share of every row to drop, from 0 to 1.

    Returns
    -------
    (d_out, d_in) bool
        False for the ``int(d_in * sparsity)`` smallest scores of each row, True for the rest.

    Notes
    -----
    SPEC: ``wanda.mask``. It shows where the important weights are; it compresses nothing.
    """
    dropped = int(scores.shape[1] * sparsity)
    ascending = np.argsort(scores, axis=1, kind="stable")
    mask = np.ones(scores.shape, dtype=np.bool_)
    np.put_along_axis(mask, ascending[:, :dropped], False, axis=1)
    return mask
