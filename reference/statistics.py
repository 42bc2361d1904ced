"""Statistics of a linear's input: Eq. (5), Section 3.2.

Notation (SPEC.md, "Notation"): ``X`` holds one token per row and one input feature per column, so
``X[:, j]`` is the paper's ``X_j``, the j-th feature over the ``N * L`` calibration tokens.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def sum_of_squares(X: Array) -> Array:
    """Sum over tokens of the squared input features: ``norm(X_j)^2`` for every j.

    Parameters
    ----------
    X : (tokens, d_in)
        Inputs of one linear; padding is left out by the caller.

    Returns
    -------
    (d_in,)
        Additive over batches: the statistics of two batches are the sum of theirs.

    Notes
    -----
    SPEC: ``stats.sum-of-squares``.
    """
    return np.asarray(np.sum(np.asarray(X, dtype=np.float64) ** 2, axis=0))


def feature_norms(X: Array) -> Array:
    """Eq. (5): the vector ``x = (norm(X_1), ..., norm(X_d_in))`` of l2 norms over tokens.

    Parameters
    ----------
    X : (tokens, d_in)
        Inputs of one linear.

    Returns
    -------
    (d_in,)
        Zero for a dead feature, that is one which no token ever excites.

    Notes
    -----
    SPEC: ``stats.norm``. The authors' code divides by ``sqrt(N)``; a common factor changes no
    ranking and no low-rank product (``stats.scale``).
    """
    return np.sqrt(sum_of_squares(X))
