"""Every tolerance of the parity tests, each derived. No test states one of its own.

Notation: ``eps`` is the spacing of the compute dtype at 1 (a rounding errs by at most eps / 2), and
``u(A) = eps * max(m, n) * sigma_1(A)`` the unit in which a singular value decomposition errs. Two
sides that both err are apart by the sum of their errors; terms in eps^2 are left out, and covered
by ``SECOND_ORDER``.
"""

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EPS64 = float(np.finfo(np.float64).eps)
EPS32 = float(np.finfo(np.float32).eps)

SECOND_ORDER = 1.01
"""Room for the terms in eps^2, n * eps < 0.01 throughout."""

TINY32 = 2.0**-150
"""Half the spacing of the float32 numbers next to 0, which have lost their digits."""

SVD_FACTOR = 10.0
"""Bound on the deviations of a decomposition, in u. Measured over 6,000 random cases per dtype on a
CPU: singular values within 0.52 u, residual within 1.6 u, rank-r product within
``1.03 u (1 + sigma_r / gap)``. The room is for other LAPACK builds and for accelerators."""

CONFIDENCE = 10.0
"""Spreads that make a bound in the probabilistic analysis of ``rounding``: the probability of one
more is below 1e-21, which leaves room for errors that are not quite independent."""

HALF_FACTOR = 2.0
"""In fp16 and bf16, our error against the float64 reference is at most this many times that of the
same formula computed naively in the storage dtype."""


def spectral_norm(A: Array) -> float:
    """Largest singular value, 0 for an empty matrix."""
    return float(np.linalg.norm(A, 2)) if A.size else 0.0


def svd_unit(sigma_1: float, shape: tuple[int, int], eps: float) -> float:
    """``u = eps * max(m, n) * sigma_1``."""
    return eps * max(shape) * sigma_1


def half(naive: float, floor: float) -> float:
    """Bound on our error in fp16 or bf16, from that of the naive computation.

    Where the naive one happens to be exact, `floor` counts instead: the bound for float32, in which
    we compute, and the rounding of what is stored.
    """
    return HALF_FACTOR * max(naive, floor)


def stored_factors(L: Array, R: Array, eps_storage: float) -> float:
    """Error of ``L R`` in the Frobenius norm by rounding both factors to the storage dtype.

    Each entry errs by at most eps / 2 of itself, independently: the errors of the products add up
    in quadrature, twice.
    """
    return eps_storage * float(np.linalg.norm(np.sqrt(L**2 @ R**2)))


def stored(L: Array, R: Array, eps_storage: float) -> float:
    """Bound on the same, whatever the errors: eps of the magnitudes, and nothing in float64.

    The decompositions are done in float64 for every dtype; only their factors are rounded.
    """
    if eps_storage == EPS64:
        return 0.0
    return SECOND_ORDER * eps_storage * float(np.linalg.norm(np.abs(L) @ np.abs(R)))


def positive_sum(terms: int, eps: float = EPS64) -> float:
    """Relative distance of two sums of `terms` positive numbers, added in whatever order.

    Each of the ``terms - 1`` additions errs by eps / 2, and so does making each term (a square, a
    product): ``terms * eps / 2`` per side.
    """
    return SECOND_ORDER * terms * eps


def root_of_positive_sum(terms: int, eps: float = EPS64) -> float:
    """Relative distance of the roots of two such sums: half of it, and that of two roots."""
    return SECOND_ORDER * terms / 2 * eps + root(eps)


def root(eps: float = EPS64) -> float:
    """Relative distance of two roots of one number.

    NumPy's is correctly rounded, eps / 2; torch's vectorised one may err by eps.
    """
    return 1.5 * eps


def scaled_norms(tokens: int) -> float:
    """Relative distance of the norms of ``c X`` from c times those of X.

    Each entry of c X is rounded once more, which its square doubles; c times a norm, or what is
    made of the norms of c X over c, is one more rounding.
    """
    return root_of_positive_sum(tokens + 2) + EPS64


def weight_importance(eps: float) -> float:
    """Relative distance of ``abs(W_ij) * norm(X_j)`` from the float64 value.

    0 in float64, where both sides round the same product once. In float32 the norm is rounded to
    float32 and then the product: eps in all.
    """
    return 0.0 if eps == EPS64 else SECOND_ORDER * eps


def taylor_importance(W: Array, scores: Array, eps: float) -> Array:
    """Distance of ``abs(W_ij G_ij)`` from the float64 value, entry by entry.

    0 in float64, where both sides round the same product once. In float32 the gradient is rounded
    and then the product: eps in all, of numbers that float32 has its digits for. Where one of the
    two is too small for that, it errs by ``TINY32``, the gradient's error times the weight.

    Parameters
    ----------
    W, scores : (d_out, d_in)
        The weights, and their scores in float64.
    eps : float
        Of the compute dtype.
    """
    if eps == EPS64:
        return np.zeros_like(scores)
    return np.asarray(SECOND_ORDER * eps * scores + TINY32 * (1 + np.abs(W)))


def channel_importance(terms: int, eps_scores: float) -> float:
    """Relative distance of a channel's score, for every aggregation.

    The scores of the single weights are not negative, so each aggregation keeps their relative
    error. The sums are float64 on both sides; a mean divides once more, the l2 norm takes a root.
    """
    return weight_importance(eps_scores) + positive_sum(terms) + root()


def group_importance(terms: int, eps_scores: float) -> float:
    """Relative distance of the sum of three channel scores: two more additions on each side."""
    return channel_importance(terms, eps_scores) + positive_sum(2)


def head_scores(terms: int) -> float:
    """Relative distance of the score of a group of heads, both sides fed the same weight scores.

    Four norms of blocks of at most `terms` weights, and three additions on each side.
    """
    return channel_importance(terms, EPS64) + positive_sum(3)


def weighted_error(entries: int, eps: float) -> float:
    """Relative distance of ``sum(((W - W_hat) * scale)^2)`` over `entries` entries.

    The difference is taken in the compute dtype (eps / 2, squared: eps), all else in float64: two
    roundings before the square, doubled by it, then the square and the sum.
    """
    difference = 0.0 if eps == EPS64 else SECOND_ORDER * eps
    return difference + positive_sum(entries + 4)


def low_rank_apply(L: Array, R: Array, X: Array, eps: float) -> Array:
    """Entry-by-entry distance of ``L R x``.

    An inner product of n terms errs by at most ``n * eps / 2`` of the sum of the magnitudes of its
    terms, in any order; two of them in a row, of d_in and of r terms, on both sides.
    """
    magnitude = (np.abs(X) @ np.abs(R).T) @ np.abs(L).T
    return np.asarray(SECOND_ORDER * (L.shape[1] + R.shape[1]) * eps * magnitude)


def singular_values(S: Array, shape: tuple[int, int], eps: float) -> float:
    """Distance of any singular value: ``SVD_FACTOR * u``."""
    return SVD_FACTOR * svd_unit(float(S[0]) if S.size else 0.0, shape, eps)


def gap(S: Array, r: int) -> float:
    """``sigma_r - sigma_(r+1)``, the last one against 0; infinite where nothing is cut (r = 0)."""
    if r == 0:
        return float("inf")
    return float(S[r - 1] - (S[r] if r < S.size else 0.0))


def svd_product(S: Array, r: int, shape: tuple[int, int], eps: float) -> float | None:
    """Distance of the rank-r product of Eq. (4): ``SVD_FACTOR * u * (1 + sigma_r / gap)``.

    Returns
    -------
    float or None
        None where the gap does not exceed ``SVD_FACTOR * u``: the product is then not determined by
        the matrix to working precision. Where nothing is cut off there is no gap to exceed.
    """
    if r == 0:
        return 0.0
    u = svd_unit(float(S[0]), shape, eps)
    if r == S.size:
        return SVD_FACTOR * u
    if gap(S, r) <= SVD_FACTOR * u:
        return None
    return SVD_FACTOR * u * (1 + float(S[r - 1]) / gap(S, r))


def projector(S: Array, r: int, shape: tuple[int, int], eps: float, delta: float = 0.0) -> float:
    """Distance of the projector on the leading r left singular vectors of A.

    Wedin: a change of A by E turns the subspace by at most ``norm(E) / (gap - norm(E))``, that is
    ``2 norm(E) / gap`` where ``norm(E) <= gap / 2``. Both sides decompose their A with a backward
    error of some u, ``SVD_FACTOR * u`` between them; `delta` is the distance of the A they were
    given. Orthonormality of the computed vectors is within ``max(m, n) * eps``, which is
    u / sigma_1 and so below u / gap.

    Returns
    -------
    float
        Infinite where ``SVD_FACTOR * u + delta`` exceeds half the gap.
    """
    if r == 0:
        return 0.0
    E = SVD_FACTOR * svd_unit(float(S[0]), shape, eps) + delta
    if E == 0:
        return 0.0
    if r == shape[0]:
        # All of the space: only the orthonormality of the basis is in question.
        return SVD_FACTOR * max(shape) * eps
    g = gap(S, r)
    return 2 * E / g if g >= 2 * E else float("inf")


def awsvd_product(W: Array, scale: Array, r: int, eps: float, delta: float = 0.0) -> float | None:
    """Distance of ``U_r U_r^T W`` in the spectral norm.

    Where ``rank(W D) >= r`` it is the projector's (see ``projector``), times ``norm(W)``, plus the
    two products ``L (L^T W)``: ``max(m, n) * eps * norm(W)``, within the bound on the projector.

    Where ``rho = rank(W D) < r``, the projector has two parts. The first, of rank rho, has the gap
    ``sigma_rho(W D)`` against 0. The second, of the remaining ranks, belongs to ``(I - P_rho) W``,
    which the sides know to the deviation of the first part, ``delta_1 = projector * norm(W)``; its
    product is off by at most that, and by its projector's deviation times ``norm((I - P_rho) W)``.
    What is left of W below the floor of the rule may be taken by one side and not by the other.

    Parameters
    ----------
    W : (d_out, d_in)
    scale : (d_in,)
        Diagonal of D.
    r : int
    eps : float
        Of the compute dtype.
    delta : float
        Distance of the two ``W D``, where the sides were not given the same.

    Returns
    -------
    float or None
        None where a gap that is needed does not exceed its bound, or where a singular value is so
        near the threshold of the numerical rank that the two sides may count differently.
    """
    if r == 0:
        return 0.0
    shape = (W.shape[0], W.shape[1])
    A = W * scale[None, :]
    U, S, _ = np.linalg.svd(A, full_matrices=False)
    size = spectral_norm(W)
    noise = SVD_FACTOR * svd_unit(float(S[0]), shape, eps) + delta
    threshold = svd_unit(float(S[0]), shape, EPS64)
    rho = int(np.sum(noise + svd_unit(float(S[0]), shape, eps) < S))
    if rho >= r:
        first = projector(S, r, shape, eps, delta)
        return None if np.isinf(first) else (first + SVD_FACTOR * max(shape) * eps) * size
    if np.any(S[rho:] > 0.5 * threshold):
        return None
    first = projector(S[:rho], rho, shape, eps, delta)
    delta_1 = (first + SVD_FACTOR * max(shape) * eps) * size
    rest = W - U[:, :rho] @ (U[:, :rho].T @ W)
    rest_S = np.linalg.svd(rest, compute_uv=False)
    floor = max(shape) * eps * float(np.linalg.norm(W))
    clear = int(np.sum(floor + delta_1 < rest_S))
    if clear < r - rho and np.any(rest_S[clear:] > 0.5 * floor):
        return None
    extra = min(r - rho, clear)
    second = projector(rest_S, extra, shape, eps, delta_1)
    if np.isinf(first) or np.isinf(second):
        return None
    return 2 * delta_1 + floor + second * (spectral_norm(rest) + delta_1)


def rank_is_clear(S: Array, shape: tuple[int, int], eps: float) -> bool:
    """Tell whether no singular value is where the two sides may differ on its being zero.

    The reference counts those above ``u`` in float64, the other side those above ``u`` in its own
    dtype, each knowing them within its ``SVD_FACTOR * u``; exact zeros come out within 0.52 u.
    """
    if S.size == 0:
        return True
    low = svd_unit(float(S[0]), shape, EPS64)
    high = (1 + SVD_FACTOR) * svd_unit(float(S[0]), shape, eps)
    return not np.any((0.6 * low < S) & (high >= S))


def orthonormality(shape: tuple[int, int], eps: float) -> float:
    """Distance of ``L^T L`` from the identity, for singular vectors of a matrix of this shape.

    That of a product of Householder reflections: ``max(m, n) * eps`` at most, times the same room
    as the decomposition's.
    """
    return SVD_FACTOR * max(*shape, 1) * eps


def full_rank(W: Array, eps: float) -> float:
    """Distance of the product at full row rank from W itself.

    Either the left factor is a basis of the whole space, orthonormal within ``orthonormality``, or
    what it lacks is below the floor of the rule, ``max(m, n) * eps * norm(W)`` in the Frobenius
    norm.
    """
    shape = (W.shape[0], W.shape[1])
    return (orthonormality(shape, eps) + max(shape) * eps) * float(np.linalg.norm(W))


def full_column_rank(W: Array, scale: Array, eps: float) -> float:
    """Distance of the product at full column rank from W itself, where no feature is dead.

    ``(I - U U^T) W D`` is at most the error of the decomposition of W D, ``SVD_FACTOR * u(W D)``;
    the inverse of D magnifies it by ``1 / min(D)``. The rest is that of ``full_rank``.
    """
    magnified = svd_unit(spectral_norm(W * scale), (W.shape[0], W.shape[1]), eps) / np.min(scale)
    return SVD_FACTOR * float(magnified) + full_rank(W, eps)


def tail_root(S: Array, shape: tuple[int, int], eps: float) -> float:
    """Distance of the root of the error of Eq. (7) from that of the tail energy.

    ``norm(W D - L R D)`` in the Frobenius norm is at most ``sqrt(min(m, n))`` times the spectral
    norm of the deviation, ``SVD_FACTOR * u``, which also covers the rounding of the product.
    """
    return float(np.sqrt(min(shape))) * singular_values(S, shape, eps)


def rival(A: Array, B: Array, scale: Array, root_of_error: float, eps: float = EPS64) -> float:
    """Room for the root of the error of ``A B``, as computed, below that of the product itself.

    The rounded product is no longer of the rank of its factors: entry by entry it is off by
    ``low_rank_apply`` of the identity, and the root of its error by the Frobenius norm of that
    times D. Evaluating the error is a sum as in ``weighted_error``, under a root.
    """
    rounding = low_rank_apply(A, B, np.eye(B.shape[1]), eps).T * scale
    entries = A.shape[0] * B.shape[1]
    return float(np.linalg.norm(rounding)) + root_of_positive_sum(entries + 4, eps) * root_of_error


def share(whole: Fraction) -> Fraction:
    """Distance of a share of the budget, in ranks, computed in doubles from the exact one.

    Of ``p * b_m * (w_m * N / W)`` the break-even rank is one rounding, W with its products and sums
    four, and the other products and the quotient four: nine of eps / 2 each. A later round
    subtracts ``N_dense * w_m * b_m / W'``, with as many, from ``p * (N * w_m * b_m / W')``. Both
    are at most ``whole``, so that ``9 eps * whole`` holds for the two and for what is of eps^2.

    Parameters
    ----------
    whole : Fraction
        ``N * w_m * b_m / W`` of the round.
    """
    return 9 * Fraction(EPS64) * whole


def band(whole: Fraction) -> Fraction:
    """Distance of the width of the removed band, computed in doubles, before it is floored.

    ``(s + least) * d_m`` is two roundings of eps / 2 and ``least * d_m`` one; ``2 eps * whole``
    also covers what is of eps^2.

    Parameters
    ----------
    whole : Fraction
        ``(s + least) * d_m``, exact.
    """
    return 2 * Fraction(EPS64) * whole


def central_difference(near: float, far: float, step: float, spread: float) -> float:
    """Distance of ``(g(h) - g(-h)) / 2h`` from the slope of g at 0.

    To the next order it is ``h^2 / 6`` times the third derivative, of which the slope by twice the
    step has four times as much: a third of the distance of the two, and all of it covers what is
    beyond. Each value of g errs by ``CONFIDENCE`` spreads, hence the slope by as much over h, that
    by twice the step by half of it, and their distance by the sum.

    Parameters
    ----------
    near, far : float
        The slopes by the step and by twice the step.
    step : float
        h.
    spread : float
        Of the rounding of a value of g.
    """
    return abs(far - near) + 2.5 * CONFIDENCE * spread / step


def retained_energy(terms: int) -> float:
    """Distance of a share of a sum of squares, at most 1: two sums and a division."""
    return 2 * positive_sum(terms + 1)


def measured_condition(magnified: float, layers: int, terms: int) -> float:
    """Bound on the distance of the logits after the whole of Algorithm 1.

    Parameters
    ----------
    magnified : float
        Largest change of a logit by a relative change of the embeddings, per unit of it.
    layers : int
        Each adds roundings of its own to the residual stream.
    terms : int
        Of the longest inner product: relative roundings of ``sqrt(terms) * eps``.
    """
    return CONFIDENCE * magnified * layers * float(np.sqrt(terms)) * EPS64
