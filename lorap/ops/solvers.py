"""The leading left singular vectors of a matrix: a fast way, and the safe one that it falls to."""

import torch
from torch import Tensor

from lorap.ops.precision import all_finite

ROOM = 10.0
"""Times ``max(m, n) * eps * lambda_1``: what rounding may do to an eigenvalue of a Gram matrix."""

RANGE = 1e3
"""Times the same: below it the last eigenvalue that is kept is not told from rounding."""

TURN = 1e-2
"""Frobenius norm of a correction of the subspace beyond which first order is not enough."""

EXACT = 1e-7
"""That norm, below which its square, which a correction leaves, is rounding."""

CORRECTIONS = 3
"""From ``TURN`` by squares to ``EXACT``."""


def leading_directions(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first left singular vectors, and the singular values.

    By ``gram`` where it can be trusted, else by the SVD.

    Parameters
    ----------
    matrix : (m, n) float64
        Finite.
    rank : int
        At most ``min(m, n)``. With 0 the singular values alone are computed.

    Returns
    -------
    basis : (m, rank)
        Orthonormal columns.
    singular_values : (min(m, n),)
        Descending.

    Notes
    -----
    SPEC: ``solver.contract``, ``solver.gram``.
    """
    if rank == 0:
        values = torch.linalg.svdvals(matrix, **_accurately(matrix))
        return matrix.new_empty(matrix.shape[0], 0), values
    found = gram(matrix, rank)
    if found is None:
        u, s, _ = thin_svd(matrix)
        return u[:, :rank], s
    return found


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD as ``U``, singular values and ``V^T``; on a GPU by the driver that is accurate there.

    Parameters
    ----------
    matrix : (m, n) float64

    Returns
    -------
    u : (m, min(m, n))
    singular_values : (min(m, n),)
    vh : (min(m, n), n)

    Notes
    -----
    SPEC: ``solver.contract``.
    """
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False, **_accurately(matrix))
    return u, s, vh


def _accurately(matrix: Tensor) -> dict[str, str]:
    """Options of an SVD.

    The default of torch on a GPU, cuSOLVER's Jacobi iteration, loses accuracy on matrices that are
    not well conditioned, which are those that are left to the SVD; ``gesvd`` does not.
    """
    return {"driver": "gesvd"} if matrix.is_cuda else {}


def gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """The same from the eigenvectors of the smaller Gram matrix, corrected by the matrix itself.

    An eigenvector of ``A A^T`` is turned by the rounding of that product, which is relative to
    ``sigma_1^2``. In the coordinates of the computed vectors, the rows of ``U^T A``, inner products
    are known relative to the lengths of the two rows: they say to first order how far what is kept
    is turned towards what is cut off. A correction by it leaves the square.

    Parameters
    ----------
    matrix : (m, n) float64
        Finite.
    rank : int
        From 1 to ``min(m, n)``.

    Returns
    -------
    basis, singular_values
        As ``leading_directions`` gives them; or None where the last eigenvalue that is kept is not
        told from the rounding of the first, where the cut is so close that the correction is no
        small one, or where the directions do not hold what their eigenvalues promise.

    Notes
    -----
    SPEC: ``solver.gram``.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if tall else matrix
    product = short @ short.T
    if not all_finite(product):
        return None
    eigenvalues, vectors = torch.linalg.eigh(product)
    del product
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    rounding = max(matrix.shape) * torch.finfo(matrix.dtype).eps * float(eigenvalues[0])
    if not float(eigenvalues[rank - 1]) > RANGE * rounding:
        return None

    rows, kept, rest = vectors.T @ short, vectors[:, :rank], vectors[:, rank:]
    for _ in range(CORRECTIONS):
        if rank == len(rows):
            break
        squares = rows.square().sum(dim=1)
        gaps = squares[:rank, None] - squares[None, rank:]
        turn = (rows[:rank] @ rows[rank:].T) / gaps
        size = float(torch.linalg.norm(turn))
        if not (float(gaps.min()) > 0 and size <= TURN):
            return None
        if size <= EXACT:
            rows = torch.cat([rows[:rank] + turn @ rows[rank:], rows[rank:] - turn.T @ rows[:rank]])
            kept = torch.linalg.qr(kept + rest @ turn.T).Q
            break
        turned = torch.cat([kept + rest @ turn.T, rest - kept @ turn], dim=1)
        kept, rest = torch.linalg.qr(turned).Q.split([rank, len(rows) - rank], dim=1)
        rows = torch.cat([kept, rest], dim=1).T @ short
    else:
        return None

    squares = rows.square().sum(dim=1)
    held, promised = squares[:rank].sum(), eigenvalues[:rank].sum()
    missing = eigenvalues.sum() - short.square().sum()
    if not (
        abs(float(held - promised)) <= rank * ROOM * rounding
        and abs(float(missing)) <= len(rows) * ROOM * rounding
    ):
        return None
    basis = torch.linalg.qr(rows[:rank].T).Q if tall else kept
    return basis, squares.sort(descending=True).values.sqrt()
