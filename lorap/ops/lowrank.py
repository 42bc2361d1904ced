"""Low-rank factors: Eq. (3), (4), (6), (7); Sections 2.4 and 3.2."""

from typing import Literal

import torch
from torch import Tensor

from lorap.ops.precision import compute_dtype

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


def svd_low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eq. (4): the best rank-`rank` product in the unweighted Frobenius norm.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype.
    rank : int
        At most ``min(d_out, d_in)``.

    Returns
    -------
    left : (d_out, rank)
    right : (rank, d_in)
        In ``compute_dtype(weight)``.

    Notes
    -----
    SPEC: ``lowrank.svd``, ``precision.decomposition``.
    """
    dtype = compute_dtype(weight)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]).to(dtype), v[:rank].to(dtype)


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
    SPEC: ``awsvd.product``, ``awsvd.dead``, ``awsvd.deficient``, ``precision.decomposition``: done
    in float64. Outlier features spread the singular values of ``weight D`` so far that float32
    could not tell the small ones from zero.
    """
    dtype = compute_dtype(weight)
    weight = weight.double()
    u, s, _ = torch.linalg.svd(weight * scale.double(), full_matrices=False)
    left = u[:, :rank].clone()
    found = min(rank, numerical_rank(s, (weight.shape[0], weight.shape[1])))
    if found < rank:
        left[:, found:] = 0
        # The remainder in a basis of the complement of u: its singular vectors stay orthogonal to u
        # however small it is.
        basis = torch.linalg.qr(u[:, :found], mode="complete").Q[:, found:]
        u_rest, s_rest, _ = torch.linalg.svd(basis.T @ weight, full_matrices=False)
        floor = max(weight.shape) * torch.finfo(weight.dtype).eps * torch.linalg.norm(weight)
        extra = min(rank - found, int((s_rest > floor).sum()))
        left[:, found : found + extra] = basis @ u_rest[:, :extra]
    return left.to(dtype), (left.T @ weight).to(dtype), s


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
