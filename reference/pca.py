"""Low-rank factors from the outputs: PCA and AFM, which the LoRAP and MGAA papers compare with.

With the tokens in the rows of X, a linear's outputs are ``Y = X W^T``. Both methods project them on
their r leading directions. PCA takes the directions of ``Y^T Y = W C W^T`` (arXiv 2507.03294,
MGAA, Eq. (8) to (11)), AFM those of the outputs' covariance, and adds the bias that belongs to them
(Yu and Wu, AAAI 2023, doi 10.1609/aaai.v37i9.26304).
"""

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from .lowrank import completed
from .statistics import centred_moment, token_mean

Array = NDArray[np.float64]


def output_moment(W: Array, C: Array) -> Array:
    """Second moment of the outputs: ``W C W^T``, symmetric to the last bit.

    Parameters
    ----------
    W : (d_out, d_in)
    C : (d_in, d_in)
        ``second_moment`` or ``centred_moment`` of the inputs.

    Returns
    -------
    (d_out, d_out)

    Notes
    -----
    SPEC: ``output.moment`` (MGAA, Eq. (8)).
    """
    M = W @ C @ W.T
    return (M + M.T) / 2


def output_error(W: Array, W_hat: Array, C: Array) -> float:
    """Squared error of the outputs over all tokens: ``trace((W - W_hat) C (W - W_hat)^T)``.

    Parameters
    ----------
    W, W_hat : (d_out, d_in)
    C : (d_in, d_in)
        ``second_moment`` of the inputs: ``norm(X W^T - X W_hat^T)^2``. ``centred_moment``: the same
        with the best bias added to ``X W_hat^T``.

    Returns
    -------
    float
        Not negative. An output's own error that rounding makes negative counts as 0.

    Notes
    -----
    SPEC: ``output.error``.
    """
    E = W - W_hat
    return float(np.sum(np.maximum(np.sum((E @ C) * E, axis=1), 0)))


def rounding_floor(W: Array, C: Array, terms: int) -> float:
    """Below this an eigenvalue of ``W C W^T`` is rounding: ``terms * eps * sum W_ij^2 C_jj``.

    Parameters
    ----------
    W : (d_out, d_in)
    C : (d_in, d_in)
        ``second_moment`` of the inputs, never the centred one.
    terms : int
        Of the longest sum that made the eigenvalue.

    Notes
    -----
    SPEC: ``pca.deficient``, ``afm.deficient``.
    """
    return terms * float(np.finfo(np.float64).eps) * float(np.sum(W**2 @ np.diag(C)))


def pca(W: Array, C: Array, r: int) -> tuple[Array, Array, Array]:
    """The rank-r product with the least error in the outputs: ``L = U_r``, ``R = U_r^T W``.

    U holds the eigenvectors of ``W C W^T``, the left singular vectors of ``W C^(1/2)`` for any root
    of C. No root is formed and nothing is inverted, so that C may be singular.

    Parameters
    ----------
    W : (d_out, d_in)
    C : (d_in, d_in)
        ``second_moment`` of the inputs: symmetric, no negative eigenvalue but by rounding.
    r : int
        At most ``min(d_out, d_in)``.

    Returns
    -------
    L : (d_out, r)
        Orthonormal columns, or zero ones.
    R : (r, d_in)
    S : (min(d_out, d_in),)
        Singular values of ``W C^(1/2)``, descending: roots of the eigenvalues of ``W C W^T``. The
        least error is ``sum(S[r:]^2)``.

    Notes
    -----
    SPEC: ``pca.product``, ``pca.spectrum``, ``pca.deficient`` (MGAA, Eq. (8) to (11)).
    """
    return _project(W, C, rounding_floor(W, C, max(W.shape)), r)


def afm(W: Array, C: Array, t: Array, n: int, r: int) -> tuple[Array, Array, Array, Array]:
    """The affine map of rank r with the least error in the outputs: ``x -> L R x + bias``.

    ``L = U_r`` and ``R = U_r^T W`` with U the eigenvectors of ``W C_c W^T``, ``C_c`` the moment
    about the mean, and ``bias = (I - U_r U_r^T) W mu``: the mean of what the projection cuts off.
    A bias of the linear's own stays as it is, and adds to this one.

    Parameters
    ----------
    W : (d_out, d_in)
    C : (d_in, d_in)
        ``second_moment`` of the inputs, uncentred.
    t : (d_in,)
        ``token_sum`` of the inputs.
    n : int
        Tokens summed over.
    r : int
        At most ``min(d_out, d_in)``.

    Returns
    -------
    L : (d_out, r)
        Orthonormal columns, or zero ones.
    R : (r, d_in)
    S : (min(d_out, d_in),)
        Singular values of ``W C_c^(1/2)``, descending. The least error is ``sum(S[r:]^2)``.
    bias : (d_out,)

    Notes
    -----
    SPEC: ``afm.product``, ``afm.bias``, ``afm.deficient``.
    """
    floor = rounding_floor(W, C, max(*W.shape, n))
    L, R, S = _project(W, centred_moment(C, t, n), floor, r)
    y = W @ token_mean(t, n)
    return L, R, S, y - L @ (L.T @ y)


def whitened(W: Array, C: Array, r: int) -> tuple[Array, Array]:
    """``pca`` by whitening, as SVD-LLM does it: ``C = G G^T``, ``L = U_r S_r``, ``R = V_r G^-1``.

    Parameters
    ----------
    W : (d_out, d_in)
    C : (d_in, d_in)
        Positive definite, beyond rounding.
    r : int

    Returns
    -------
    L : (d_out, r)
    R : (r, d_in)

    Raises
    ------
    numpy.linalg.LinAlgError
        If C has no Cholesky factor.

    Notes
    -----
    SPEC: ``pca.whitened`` (arXiv 2403.07378). ``pca`` gives the same product and needs no factor.
    """
    G = linalg.cholesky(C, lower=True)
    U, S, V = linalg.svd(W @ G, full_matrices=False)
    return U[:, :r] * S[:r], linalg.solve_triangular(G, V[:r].T, lower=True, trans="T").T


def _project(W: Array, C: Array, floor: float, r: int) -> tuple[Array, Array, Array]:
    """Eigenvectors of ``W C W^T`` whose eigenvalues exceed the floor, completed to r columns."""
    eigenvalues, U = np.linalg.eigh(output_moment(W, C))
    eigenvalues, U = eigenvalues[::-1], U[:, ::-1]
    L = completed(U[:, : min(r, int(np.sum(eigenvalues > floor)))], W, r)
    return L, L.T @ W, np.sqrt(np.maximum(eigenvalues[: min(W.shape)], 0))
