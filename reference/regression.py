"""Least squares: weights refitted on the channels that stay, channels chosen by what that costs.

Of ``Y = X W^T`` some input features are removed, those in ``removed``. The others can make up for
them as far as they are correlated: optimal brain surgeon (Hassibi and Stork, NIPS 1992) for whole
columns of W, with the second moment of the inputs in the place of the Hessian, as Optimal Brain
Compression has it (Frantar and Alistarh, arXiv 2208.11580).
"""

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def ridged_correlation(C: Array, ridge: float) -> tuple[Array, Array]:
    """Norms of the input features, and ``D^-1 C D^-1 + ridge I`` with D their diagonal.

    Parameters
    ----------
    C : (d_in, d_in)
        ``second_moment`` of the inputs.
    ridge : float
        Positive: share of its own sum of squares that is added to each feature's.

    Returns
    -------
    d : (d_in,)
        Norms; 0 for a dead feature.
    K : (d_in, d_in)
        Positive definite, ``1 + ridge`` on the diagonal. A dead feature is correlated with none.

    Notes
    -----
    SPEC: ``update.ridge``.
    """
    d = np.sqrt(np.diag(C))
    unit = np.where(d > 0, d, 1.0)
    K = C / unit / unit[:, None]
    np.fill_diagonal(K, 1 + ridge)
    return d, K


def least_squares_update(W: Array, C: Array, kept: Indices, ridge: float) -> Array:
    """Weights of the kept input features that come nearest to the outputs of all.

    ``W_K + W_R C_RK (C_KK + ridge diag(C_KK))^-1``: they minimise
    ``norm(X W^T - X_K V^T)^2 + ridge * sum over k in K of C_kk norm(V_k - W_k)^2``.

    Parameters
    ----------
    W : (d_out, d_in)
    C : (d_in, d_in)
        ``second_moment`` of the inputs.
    kept : (k,)
        Ascending.
    ridge : float
        As in ``ridged_correlation``.

    Returns
    -------
    (d_out, k)

    Notes
    -----
    SPEC: ``update.solution``.
    """
    removed = np.setdiff1d(np.arange(W.shape[1]), kept)
    d, K = ridged_correlation(C, ridge)
    lost = (W[:, removed] * d[removed]) @ K[np.ix_(removed, kept)]
    change = linalg.cho_solve(linalg.cho_factor(K[np.ix_(kept, kept)], lower=True), lost.T).T
    return np.asarray(W[:, kept] + change / np.where(d[kept] > 0, d[kept], 1.0))


def removal_order(W: Array, C: Array, count: int, ridge: float) -> tuple[Indices, Array]:
    """Remove the input feature that costs least, update the others, and so on: OBS.

    Parameters
    ----------
    W : (d_out, d_in)
    C : (d_in, d_in)
        ``second_moment`` of the inputs.
    count : int
        Features to remove, at most d_in.
    ridge : float
        As in ``ridged_correlation``.

    Returns
    -------
    order : (count,)
        Indices in the order of removal; among equal costs the lower index.
    losses : (count,)
        What each costs: the first n add up to the least value of what ``least_squares_update``
        minimises without these n.

    Notes
    -----
    SPEC: ``obs.order``, ``obs.ties``.
    """
    d, K = ridged_correlation(C, ridge)
    V, P = W * d, linalg.inv(K)
    order, losses = np.zeros(count, dtype=np.int64), np.zeros(count)
    left = np.ones(W.shape[1], dtype=bool)
    for n in range(count):
        cost = np.full(W.shape[1], np.inf)
        cost[left] = np.sum(V[:, left] ** 2, axis=0) / np.diag(P)[left]
        j = order[n] = int(np.argmin(cost))
        losses[n] = cost[j]
        left[j] = False
        c = P[j] / P[j, j]
        V = V - np.outer(V[:, j], c)
        P = P - np.outer(P[:, j], c)
    return order, losses


def regressed_weight(W: Array, C: Array, M: Array, share: float, ridge: float) -> Array:
    """Regress, from the inputs X at hand, outputs between ``X W^T`` and those at other inputs.

    With ``X_d`` the other inputs of the same tokens, the targets are
    ``(1 - share) X W^T + share X_d W^T``, and the regression is
    ``W + share W (M - C) (C + ridge diag(C))^-1``.

    Parameters
    ----------
    W : (d_out, d_in)
    C : (d_in, d_in)
        ``second_moment`` of X.
    M : (d_in, d_in)
        ``cross_moment`` of X_d and X.
    share : float
        From 0 to 1.
    ridge : float
        As in ``ridged_correlation``.

    Returns
    -------
    (d_out, d_in)

    Notes
    -----
    SPEC: ``target.regression``.
    """
    d, K = ridged_correlation(C, ridge)
    unit = np.where(d > 0, d, 1.0)
    missed = (W @ (M - C)) / unit
    change = linalg.cho_solve(linalg.cho_factor(K, lower=True), missed.T).T / unit
    return np.asarray(W + share * np.where(d > 0, change, 0.0))
