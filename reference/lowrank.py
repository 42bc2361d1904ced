"""Low-rank factors: Eq. (3), (4), (6), (7); Sections 2.4 and 3.2. The scale of ASVD."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from .statistics import token_mean

Array = NDArray[np.float64]
Weighting = Literal["eq7", "eq6"]


def low_rank_apply(L: Array, R: Array, x: Array) -> Array:
    """Eq. (3): ``y = L R x``, right to left, so that the product L R is never formed.

    Parameters
    ----------
    L : (d_out, r)
    R : (r, d_in)
    x : (..., d_in)

    Returns
    -------
    (..., d_out)

    Notes
    -----
    SPEC: ``lowrank.apply``.
    """
    return (x @ R.T) @ L.T


def svd_low_rank(W: Array, r: int) -> tuple[Array, Array, Array]:
    """Eq. (4): ``W ~ U_r S_r V_r``, the r largest singular values (erratum E-003).

    ``U_r S_r V_r = U_r U_r^T W``: it is the activation-weighted SVD with D the identity, and its
    factors are stored in the same way.

    Parameters
    ----------
    W : (d_out, d_in)
    r : int
        At most ``min(d_out, d_in)``.

    Returns
    -------
    L : (d_out, r)
        ``U_r``; columns beyond the rank of W are zero.
    R : (r, d_in)
        ``U_r^T W``.
    S : (min(d_out, d_in),)
        Singular values of W, descending.

    Notes
    -----
    SPEC: ``lowrank.svd``.
    """
    return awsvd(W, np.ones(W.shape[1]), r)


def column_scale(x: Array, weighting: Weighting = "eq7") -> Array:
    """The diagonal of D in Eq. (7), or the one that makes Eq. (7) minimise Eq. (6) as printed.

    Parameters
    ----------
    x : (d_in,)
        Norms of the input features, Eq. (5).
    weighting : {"eq7", "eq6"}
        ``eq7``: ``D = diag(norm(X_j))``, the method. ``eq6``: ``D = diag(sqrt(norm(X_j)))``
        (erratum E-001).

    Returns
    -------
    (d_in,)

    Notes
    -----
    SPEC: ``awsvd.scale``.
    """
    return x.copy() if weighting == "eq7" else np.sqrt(x)


def magnitude_scale(magnitudes: Array, n: int, alpha: float) -> Array:
    """The diagonal of ASVD's D: the mean magnitude of each input feature, to the power alpha.

    Parameters
    ----------
    magnitudes : (d_in,)
        ``sum_of_magnitudes`` of the linear's input.
    n : int
        Tokens summed over. Without tokens every feature is dead.
    alpha : float
        Not negative. 0 gives ones, dead features included (``0^0 = 1``): the plain SVD.

    Returns
    -------
    (d_in,)

    Notes
    -----
    SPEC: ``asvd.scale``. ``awsvd`` with this D is ASVD (arXiv 2312.05821).
    """
    return np.asarray(token_mean(magnitudes, n) ** alpha)


def weighted_error(W: Array, W_hat: Array, scale: Array) -> float:
    """The objective of Eq. (7): ``norm(W D - W_hat D)^2`` in the Frobenius norm (erratum E-002).

    Parameters
    ----------
    W, W_hat : (d_out, d_in)
    scale : (d_in,)
        Diagonal of D.

    Notes
    -----
    SPEC: ``awsvd.objective``.
    """
    return float(np.sum(((W - W_hat) * scale[None, :]) ** 2))


def awsvd_printed(W: Array, scale: Array, r: int) -> tuple[Array, Array]:
    """The solution of Eq. (7) as printed: ``L = U_r S_r``, ``R = V_r D^-1``; D must be invertible.

    Parameters
    ----------
    W : (d_out, d_in)
    scale : (d_in,)
        Diagonal of D, all positive.
    r : int

    Returns
    -------
    L : (d_out, r)
    R : (r, d_in)

    Notes
    -----
    SPEC: ``awsvd.solution``. ``awsvd`` gives the same product and needs no inverse.
    """
    U, S, V = linalg.svd(W * scale[None, :], full_matrices=False)
    return U[:, :r] * S[:r], V[:r] / scale[None, :]


def awsvd(W: Array, scale: Array, r: int) -> tuple[Array, Array, Array]:
    """Activation-weighted SVD: the rank-r product that minimises Eq. (7), for any D.

    ``L = U_r`` and ``R = U_r^T W`` with U the left singular vectors of ``W D``: where D is
    invertible, ``U_r S_r V_r D^-1 = U_r U_r^T (W D) D^-1 = U_r U_r^T W``, the printed solution.

    Where ``rank(W D) < r``, U_r is completed by the left singular vectors of what is left of W,
    ``W - U U^T W``, which lives in the dead columns alone; where W itself has no more to give, by
    zero columns. This is the limit of Eq. (7) as the weights of the dead features go to zero.

    Parameters
    ----------
    W : (d_out, d_in)
    scale : (d_in,)
        Diagonal of D, zeros allowed.
    r : int
        At most ``min(d_out, d_in)``.

    Returns
    -------
    L : (d_out, r)
        Orthonormal columns, or zero ones.
    R : (r, d_in)
    S : (min(d_out, d_in),)
        Singular values of ``W D``, descending.

    Notes
    -----
    SPEC: ``awsvd.product``, ``awsvd.dead``, ``awsvd.deficient``, ``asvd.product``.
    """
    U, S, _ = linalg.svd(W * scale[None, :], full_matrices=False)
    L = completed(U[:, : min(r, numerical_rank(S, W.shape))], W, r)
    return L, L.T @ W, S


def completed(U: Array, W: Array, r: int) -> Array:
    """Directions to spare: ``U`` followed by those of what is left of W, then by zero columns.

    Parameters
    ----------
    U : (d_out, rho)
        Orthonormal columns, rho at most r: the directions that were found.
    W : (d_out, d_in)
    r : int

    Returns
    -------
    (d_out, r)
        ``U``; the leading left singular vectors of ``W - U U^T W``, as far as their singular values
        exceed ``max(d_out, d_in) * eps * norm(W)``; zeros.

    Notes
    -----
    SPEC: ``awsvd.deficient``, ``pca.deficient``.
    """
    L, rho = np.zeros((W.shape[0], r)), U.shape[1]
    L[:, :rho] = U
    if rho < r:
        # W - U U^T W in a basis of the complement of U: its singular vectors stay orthogonal to U
        # however small it is.
        B = linalg.qr(U)[0][:, rho:]
        U_rest, S_rest, _ = linalg.svd(B.T @ W, full_matrices=False)
        floor = max(W.shape) * np.finfo(np.float64).eps * float(np.linalg.norm(W))
        extra = min(r - rho, int(np.sum(S_rest > floor)))
        L[:, rho : rho + extra] = B @ U_rest[:, :extra]
    return L


def numerical_rank(S: Array, shape: tuple[int, int]) -> int:
    """Number of singular values above ``max(shape) * eps * S[0]`` (SPEC: ``awsvd.deficient``).

    Parameters
    ----------
    S : (k,)
        Singular values, descending.
    shape : (int, int)
        Shape of the matrix they belong to.
    """
    if S.size == 0:
        return 0
    floor = max(shape) * np.finfo(np.float64).eps * S[0]
    return int(np.sum(floor < S))


def retained_energy(S: Array, r: int) -> float:
    """Share of the squared singular values of ``W D`` that rank r keeps; 1 for a zero matrix.

    Parameters
    ----------
    S : (k,)
        Singular values, descending.
    r : int

    Notes
    -----
    SPEC: ``awsvd.energy`` (Table 1 and Section 3.1 of the paper speak of it).
    """
    total = float(np.sum(S**2))
    return float(np.sum(S[:r] ** 2)) / total if total > 0 else 1.0
