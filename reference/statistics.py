"""Statistics of a linear's input: Eq. (5), Section 3.2; those of the methods compared with.

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


def sum_of_magnitudes(X: Array) -> Array:
    """Sum over tokens of the magnitudes of the input features: ``sum_i abs(X_ij)`` for every j.

    Parameters
    ----------
    X : (tokens, d_in)

    Returns
    -------
    (d_in,)
        Additive over batches.

    Notes
    -----
    SPEC: ``stats.magnitudes``.
    """
    return np.asarray(np.sum(np.abs(np.asarray(X, dtype=np.float64)), axis=0))


def token_sum(X: Array) -> Array:
    """Sum of the tokens: ``t = sum_i X_i``.

    Parameters
    ----------
    X : (tokens, d_in)

    Returns
    -------
    (d_in,)
        Additive over batches.

    Notes
    -----
    SPEC: ``stats.sum``.
    """
    return np.asarray(np.sum(X, axis=0, dtype=np.float64))


def second_moment(X: Array) -> Array:
    """Uncentred second moment of the input features: ``C = X^T X``, not divided by the tokens.

    Parameters
    ----------
    X : (tokens, d_in)

    Returns
    -------
    (d_in, d_in)
        Additive over batches; its diagonal is ``sum_of_squares``.

    Notes
    -----
    SPEC: ``stats.second-moment``.
    """
    X = np.asarray(X, dtype=np.float64)
    return np.asarray(X.T @ X)


def cross_moment(X: Array, Y: Array) -> Array:
    """Second moment of two inputs of the same tokens: ``X^T Y``.

    Parameters
    ----------
    X : (tokens, d_x)
    Y : (tokens, d_y)

    Returns
    -------
    (d_x, d_y)
        Additive over batches.

    Notes
    -----
    SPEC: ``stats.cross-moment``.
    """
    X, Y = np.asarray(X, dtype=np.float64), np.asarray(Y, dtype=np.float64)
    return np.asarray(X.T @ Y)


def token_mean(total: Array, n: int) -> Array:
    """Mean over tokens, from the sum; 0 where there are none.

    Parameters
    ----------
    total : (d_in,)
        ``token_sum`` or ``sum_of_magnitudes``.
    n : int
        Tokens summed over.

    Returns
    -------
    (d_in,)

    Notes
    -----
    SPEC: ``stats.mean``.
    """
    return total / max(n, 1)


def centred_moment(C: Array, t: Array, n: int) -> Array:
    """Second moment about the mean: ``C_c = sum_i (X_i - mu)(X_i - mu)^T = C - n mu mu^T``.

    Parameters
    ----------
    C : (d_in, d_in)
        ``second_moment``.
    t : (d_in,)
        ``token_sum``.
    n : int
        Tokens summed over; ``mu = t / n``.

    Returns
    -------
    (d_in, d_in)
        The covariance times n. What is much smaller than C is lost in the difference: entry i, j is
        known to about ``n * eps * sqrt(C_ii C_jj)``.

    Notes
    -----
    SPEC: ``stats.centred-moment``.
    """
    mu = token_mean(t, n)
    return C - n * np.outer(mu, mu)
