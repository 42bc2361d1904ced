"""Low-rank factors: Eq. (3), (4), (6), (7); Sections 2.4 and 3.2. The scale of ASVD."""

from typing import Literal

import torch
from torch import Tensor

from lorap.ops.precision import compute_dtype
from lorap.ops.solvers import leading_directions, thin_svd
from lorap.ops.statistics import token_mean

Weighting = Literal["eq7", "eq6"]


def low_rank_apply(left: Tensor, right: Tensor, inputs: Tensor) -> Tensor:
    """Eq. (3): ``left @ right @ x``, right to left, so that the product is never formed.

    Parameters
    ----------
    left : (d_out, rank)
    right : (rank, d_in)
    inputs : (..., d_in)

    Returns
    -------
    (..., d_out)

    Notes
    -----
    SPEC: ``lowrank.apply``.
    """
    return torch.nn.functional.linear(torch.nn.functional.linear(inputs, right), left)


def svd_low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (4): the best rank-`rank` product in the unweighted Frobenius norm.

    It is ``awsvd`` with D the identity.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype.
    rank : int
        At most ``min(d_out, d_in)``.

    Returns
    -------
    left : (d_out, rank)
        Orthonormal columns, zero ones beyond the rank of the weight; in ``compute_dtype(weight)``.
    right : (rank, d_in)
        Likewise.
    singular_values : (min(d_out, d_in),) float64
        Of the weight, descending.

    Notes
    -----
    SPEC: ``lowrank.svd``, ``precision.decomposition``.
    """
    return awsvd(weight, torch.ones(weight.shape[1], device=weight.device), rank)


def column_scale(norms: Tensor, weighting: Weighting = "eq7") -> Tensor:
    """The diagonal of D in Eq. (7): the norms, or their square roots for Eq. (6) as printed.

    Parameters
    ----------
    norms : (d_in,)
        ``feature_norms`` of the linear's input.
    weighting : {"eq7", "eq6"}
        ``eq7`` is the method; ``eq6`` is erratum E-001 taken at its word.

    Returns
    -------
    (d_in,)

    Notes
    -----
    SPEC: ``awsvd.scale``.
    """
    return norms.clone() if weighting == "eq7" else norms.sqrt()


def magnitude_scale(magnitudes: Tensor, tokens: int, alpha: float) -> Tensor:
    """The diagonal of ASVD's D: the mean magnitude of each input feature, to the power `alpha`.

    Parameters
    ----------
    magnitudes : (d_in,)
        ``sum_of_magnitudes`` of the linear's input.
    tokens : int
        Tokens summed over. Without tokens every feature is dead.
    alpha : float
        Not negative. 0 gives ones, dead features included: the plain SVD.

    Returns
    -------
    (d_in,)

    Notes
    -----
    SPEC: ``asvd.scale``. ``awsvd`` with this D is ASVD.
    """
    return token_mean(magnitudes, tokens) ** alpha


def weighted_error(weight: Tensor, approximation: Tensor, scale: Tensor) -> float:
    """The objective of Eq. (7): squared Frobenius norm of ``(weight - approximation) D``.

    Parameters
    ----------
    weight, approximation : (d_out, d_in)
    scale : (d_in,)
        Diagonal of D.

    Returns
    -------
    float
        Summed in float64.

    Notes
    -----
    SPEC: ``awsvd.objective``, ``precision.statistics``.
    """
    dtype = compute_dtype(weight)
    difference = weight.to(dtype) - approximation.to(dtype)
    return float(torch.sum((difference.double() * scale.double()).square_()))


def awsvd(weight: Tensor, scale: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activation-weighted SVD: the rank-`rank` product that minimises Eq. (7), for any D.

    ``left`` holds the leading left singular vectors of ``weight D`` and ``right`` is
    ``left.T @ weight``: the printed solution ``U S``, ``V D^-1`` without the inverse, so that dead
    features need no care. Where ``weight D`` has a rank below `rank`, the left singular vectors of
    what remains of the weight follow, then zero columns.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype, finite.
    scale : (d_in,)
        Diagonal of D, zeros allowed.
    rank : int
        At most ``min(d_out, d_in)``.

    Returns
    -------
    left : (d_out, rank)
        Orthonormal columns, or zero ones; in ``compute_dtype(weight)``.
    right : (rank, d_in)
        Likewise.
    singular_values : (min(d_out, d_in),) float64
        Of ``weight D``, descending.

    Notes
    -----
    SPEC: ``awsvd.product``, ``awsvd.dead``, ``awsvd.deficient``, ``asvd.product``,
    ``precision.decomposition``: done in float64. Outlier features spread the singular values of
    ``weight D`` so far that float32 could not tell the small ones from zero.
    """
    dtype = compute_dtype(weight)
    weight = weight.double()
    basis, s = leading_directions(weight * scale.double(), rank)
    found = min(rank, numerical_rank(s, (weight.shape[0], weight.shape[1])))
    left = completed(basis[:, :found], weight, rank)
    return left.to(dtype), (left.T @ weight).to(dtype), s


def completed(basis: Tensor, weight: Tensor, rank: int) -> Tensor:
    """Directions to spare: `basis`, then those of what is left of `weight`, then zero columns.

    Parameters
    ----------
    basis : (d_out, found) float64
        Orthonormal columns, at most `rank`: the directions that were found.
    weight : (d_out, d_in) float64
    rank : int

    Returns
    -------
    (d_out, rank) float64
        `basis`; the leading left singular vectors of ``weight - basis basis^T weight``, as far as
        their singular values exceed ``max(d_out, d_in) * eps * norm(weight)``; zeros.

    Notes
    -----
    SPEC: ``awsvd.deficient``, ``pca.deficient``.
    """
    found = basis.shape[1]
    # Column by column, as decompositions give their vectors.
    left = basis.new_zeros(rank, basis.shape[0]).T
    left[:, :found] = basis
    if found < rank:
        # The remainder in a basis of the complement: its singular vectors stay orthogonal to the
        # given ones however small it is.
        complement = torch.linalg.qr(basis, mode="complete").Q[:, found:]
        u_rest, s_rest, _ = thin_svd(complement.T @ weight)
        floor = max(weight.shape) * torch.finfo(weight.dtype).eps * torch.linalg.norm(weight)
        extra = min(rank - found, int((s_rest > floor).sum()))
        left[:, found : found + extra] = complement @ u_rest[:, :extra]
    return left


def numerical_rank(singular_values: Tensor, shape: tuple[int, int]) -> int:
    """Number of singular values above ``max(shape) * eps * the largest``.

    Parameters
    ----------
    singular_values : (k,)
        Descending; eps is that of their dtype.
    shape : (int, int)
        Shape of the matrix they belong to.

    Notes
    -----
    SPEC: ``awsvd.deficient``.
    """
    if singular_values.numel() == 0:
        return 0
    floor = max(shape) * torch.finfo(singular_values.dtype).eps * singular_values[0]
    return int((singular_values > floor).sum())


def retained_energy(singular_values: Tensor, rank: int) -> float:
    """Share of the squared singular values that `rank` keeps; 1 for a zero matrix.

    Parameters
    ----------
    singular_values : (k,)
        Descending.
    rank : int

    Notes
    -----
    SPEC: ``awsvd.energy``.
    """
    squares = singular_values.double().square()
    total = float(squares.sum())
    return float(squares[:rank].sum()) / total if total > 0 else 1.0
