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
Indices = NDArray[np.int64]

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

CONTRACT_SHARE = 1e-6
"""Share of the least squared error that leading directions may lose beyond it."""

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


def inner(terms: int, magnitude: Array, eps: float = EPS64) -> Array:
    """Entry-by-entry distance of inner products of `terms` terms of any sign, in whatever order.

    A product of two terms and each addition err by eps / 2: ``terms * eps / 2`` of the sum of the
    magnitudes per side.

    Parameters
    ----------
    terms : int
        Of several products in a row, the sum of their terms.
    magnitude : array
        The same products of the magnitudes.
    """
    return np.asarray(SECOND_ORDER * terms * eps * magnitude)


def root_of_positive_sum(terms: int, eps: float = EPS64) -> float:
    """Relative distance of the roots of two such sums: half of it, and that of two roots."""
    return SECOND_ORDER * terms / 2 * eps + root(eps)


def root(eps: float = EPS64) -> float:
    """Relative distance of two roots of one number.

    NumPy's is correctly rounded, eps / 2; torch's vectorised one may err by eps.
    """
    return 1.5 * eps


def quotient() -> float:
    """Relative distance of two quotients: accelerators multiply by a rounded reciprocal instead."""
    return 1.5 * EPS64


def magnitude_scale(alpha: float) -> float:
    """Relative distance of a mean to the power alpha: each power may err by a last place, eps."""
    return SECOND_ORDER * (alpha * quotient() + 2 * EPS64)


def scaled_magnitudes(tokens: int, alpha: float) -> float:
    """Relative distance of ASVD's scale of ``c X`` from ``c^alpha`` times that of X.

    The sums are known to ``positive_sum``, the entries of ``c X`` are one rounding more, both to
    the power alpha; and there are three powers and a product.
    """
    return alpha * positive_sum(tokens + 1) + magnitude_scale(alpha) + 2 * EPS64


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


def low_rank_apply(L: Array, R: Array, X: Array, eps: float, spacing: float = 0.0) -> Array:
    """Entry-by-entry distance of ``L R x``.

    An inner product of n terms errs by at most ``n * eps / 2`` of the sum of the magnitudes of its
    terms, in any order; two of them in a row, of d_in and of r terms, on both sides. What is stored
    of either also errs by half the spacing of the dtype's smallest numbers, if those are near.
    """
    magnitude = (np.abs(X) @ np.abs(R).T) @ np.abs(L).T
    small = spacing / 2 * (1 + np.sum(np.abs(L), axis=1))
    return np.asarray(inner(L.shape[1] + R.shape[1], magnitude, eps) + small)


def updated(
    beside: Array, update: Array, terms: int, update_terms: int, eps: float = EPS64
) -> Array:
    """Entry-by-entry distance of what is beside an update of LoRA, plus the update.

    Products of some terms each, as in ``inner``; the factor, which float32 rounds, the product by
    it and the addition are three more.

    Parameters
    ----------
    beside, update : array
        Sums of the magnitudes, the factor in those of the update.
    terms, update_terms : int
        Of the products; of several in a row the sum of their terms.
    """
    return inner(max(terms, update_terms) + 3, beside + update, eps)


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
    ``sigma_rho(W D)`` against 0. The second is that of ``completed_product``.

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
    return completed_product(W, U[:, :rho], r, projector(S[:rho], rho, shape, eps, delta), eps)


def completed_product(W: Array, U: Array, r: int, first: float, eps: float = EPS64) -> float | None:
    """Distance of ``L L^T W``, L being the directions found and those that complete them.

    The directions found are known to `first`, and so ``U U^T W`` to ``delta_1 = first * norm(W)``.
    Those that complete them belong to ``(I - U U^T) W``, which the sides know to the same; their
    product is off by at most that, and by their projector's deviation times
    ``norm((I - U U^T) W)``. What is left of W below the floor of the rule may be taken by one side
    and not by the other.

    Parameters
    ----------
    W : (d_out, d_in)
    U : (d_out, rho)
        The directions found, rho below r.
    r : int
    first : float
        Distance of the projectors on the directions found.

    Returns
    -------
    float or None
        None where it is not determined.
    """
    if np.isinf(first):
        return None
    shape, rho = (W.shape[0], W.shape[1]), U.shape[1]
    delta_1 = (first + SVD_FACTOR * max(shape) * eps) * spectral_norm(W)
    rest = W - U @ (U.T @ W)
    rest_S = np.linalg.svd(rest, compute_uv=False)
    floor = max(shape) * eps * float(np.linalg.norm(W))
    clear = int(np.sum(floor + delta_1 < rest_S))
    if clear < r - rho and np.any(rest_S[clear:] > 0.5 * floor):
        return None
    extra = min(r - rho, clear)
    second = projector(rest_S, extra, shape, eps, delta_1)
    if np.isinf(second):
        return None
    return 2 * delta_1 + floor + second * (spectral_norm(rest) + delta_1)


def feature_sizes(C: Array) -> Array:
    """Norms of the input features, from their second moment: ``abs(C_ij) <= d_i d_j``."""
    return np.asarray(np.sqrt(np.maximum(np.diag(C), 0)))


def centred_moment(C: Array, mu: Array, n: int) -> Array:
    """Entry-by-entry distance of ``C - n mu mu^T``, both sides given the same C and t.

    ``n * mu_i * mu_j`` is four roundings (two means, two products), or six where a division is done
    by a reciprocal; the difference is one more, of at most the sum of the magnitudes.
    """
    return inner(6, np.abs(C) + n * np.abs(np.outer(mu, mu)))


def centred_moment_of(X: Array) -> Array:
    """Entry-by-entry distance of ``C - n mu mu^T`` from the moment about the mean, by the tokens.

    With d the norms of the features, ``n mu mu^T`` and the sum of the magnitudes behind ``X^T X``
    are at most ``d d^T`` (Cauchy and Schwarz). In units of ``eps d d^T``, n tokens: C errs by
    n / 2, mu by as much of the mean magnitudes, which ``n mu mu^T`` doubles to n, and
    ``centred_moment`` by six. On the other side the error of mu drops out, since the centred
    tokens add up to nothing; their products err by n / 2, their own roundings by two.
    """
    d = np.linalg.norm(X, axis=0)
    return inner(2 * X.shape[0] + 8, np.outer(d, d))


def scaled_centred_moment(X: Array) -> Array:
    """Entry-by-entry distance of the moment about the mean from that of ``c X``, divided by c^2.

    Each is ``centred_moment_of`` from the exact one; the entries of ``c X`` are rounded once more,
    twice in a product, and so is c^2 times the result.
    """
    d = np.linalg.norm(X, axis=0)
    return 2 * centred_moment_of(X) + inner(4, np.outer(d, d))


def moved_tokens(X: Array, moved: Array) -> Array:
    """Entry-by-entry change of the moment about the mean, by rounding when the tokens were moved.

    An entry is off by eps / 2 of what it became, in a product with another that is centred.
    """
    Z, size = np.abs(X - np.mean(X, axis=0)) if X.size else np.abs(X), np.abs(moved)
    return inner(1, size.T @ Z + Z.T @ size) + inner(1, size.T @ size) * EPS64


def output_moment(W: Array, C: Array) -> Array:
    """Entry-by-entry distance of ``W C W^T``: two products of d_in terms, and their mean."""
    return inner(2 * C.shape[0] + 1, np.abs(W) @ np.abs(C) @ np.abs(W).T)


def through(W: Array, delta: Array) -> float:
    """Distance of ``W C W^T`` in the spectral norm, by an entry-by-entry distance of C."""
    return spectral_norm(np.abs(W) @ delta @ np.abs(W).T)


def eigenvalues(W: Array, C: Array, delta: float = 0.0) -> float:
    """Distance e of ``W C W^T`` as decomposed, in the spectral norm, and of each eigenvalue (Weyl).

    Forming it errs by ``output_moment``, entry by entry. The decomposition errs by some
    ``eps * d_out * lambda_1``, as that of singular values does, ``SVD_FACTOR`` of it between the
    sides; `delta` is the distance of what they were given.
    """
    M = W @ C @ W.T
    formed = spectral_norm(output_moment(W, C))
    return formed + SVD_FACTOR * svd_unit(spectral_norm(M), (M.shape[0], M.shape[0]), EPS64) + delta


def pca_product(W: Array, C: Array, r: int, floor: float, delta: float = 0.0) -> float | None:
    """Distance of ``U_r U_r^T W`` in the spectral norm, U the eigenvectors of ``W C W^T``.

    As ``awsvd_product``, with eigenvalues in place of singular values and their distance e in place
    of that of the decomposition alone: the projector turns by at most ``2 e / gap`` (Davis and
    Kahan), where the gap of the EIGENVALUES at the cut is at least ``2 e``.

    Parameters
    ----------
    W : (d_out, d_in)
    C : (d_in, d_in)
        The moment that the directions come from.
    r : int
    floor : float
        Of the rule, for what counts as zero.
    delta : float
        Distance of the two ``W C W^T``, where the sides were not given the same.

    Returns
    -------
    float or None
        None where the product is not determined, or where an eigenvalue is so near the floor that
        the two sides may count differently.
    """
    if r == 0:
        return 0.0
    lam, U = np.linalg.eigh(W @ C @ W.T)
    lam, U = lam[::-1], U[:, ::-1]
    known, square = eigenvalues(W, C, delta), (W.shape[0], W.shape[0])
    beyond = known - SVD_FACTOR * svd_unit(float(lam[0]), square, EPS64)
    rho = int(np.sum(floor + known < lam))
    if rho >= r:
        first = projector(lam, r, square, EPS64, beyond)
        room = SVD_FACTOR * max(W.shape) * EPS64
        return None if np.isinf(first) else (first + room) * spectral_norm(W)
    if np.any(lam[rho:] > 0.5 * floor):
        return None
    return completed_product(W, U[:, :rho], r, projector(lam, rho, square, EPS64, beyond))


def output_error(W: Array, W_hat: Array, C: Array) -> float:
    """Distance of ``trace(E C E^T)`` with ``E = W - W_hat``.

    E is one rounding, squared; then two products of d_in terms, and a sum over the outputs. What is
    clipped at 0 moves towards the exact value.
    """
    E = np.abs(W - W_hat)
    terms = 2 * W.shape[1] + W.shape[0] + 2
    return float(np.sum(inner(terms, (E @ np.abs(C)) * E)))


def rounded_product(L: Array, R: Array, C: Array, eps: float = EPS64) -> float:
    """Root of the output error that is made by rounding ``L R``, and its factors to the dtype.

    An entry-by-entry error delta of the product has a root of the output error of at most
    ``norm(delta d)``, d the norms of the features.
    """
    delta = low_rank_apply(L, R, np.eye(R.shape[1]), EPS64).T
    if eps != EPS64:
        delta = delta + SECOND_ORDER * eps * (np.abs(L) @ np.abs(R))
    return float(np.linalg.norm(delta @ feature_sizes(C)))


def least_error(
    W: Array,
    C: Array,
    L: Array,
    R: Array,
    floor: float,
    error: float,
    eps: float = EPS64,
    delta: float = 0.0,
) -> float:
    """Distance of the output error of ``U_r U_r^T W`` from the sum of the dropped eigenvalues.

    No gap is needed. With the directions of ``M + E``, ``norm(E) <= e``, the error
    ``trace((I - P) M)`` is the sum of the dropped eigenvalues of ``M + E``, to ``d_out * e``; these
    are within ``d_out * e`` of those of M. Directions at or below the floor may be replaced by
    others: up to r times the floor more. Then the root of the error moves by the rounding of the
    product and by what the columns lack in orthonormality, and the evaluation errs.

    Parameters
    ----------
    W : (d_out, d_in)
    C : (d_in, d_in)
        The moment that the directions come from.
    L, R : arrays
        The factors, as rounded to the compute dtype.
    floor : float
        Of the rule, for what counts as zero.
    error : float
        The output error found.
    eps : float
        Of the compute dtype, which the factors were rounded to.
    delta : float
        Distance of the ``W C W^T`` that the factors come from.
    """
    total = float(np.sum(np.maximum(np.diag(W @ C @ W.T), 0)))
    root = rounded_product(L, R, C, eps) + orthonormality(W.shape, EPS64) * float(np.sqrt(total))
    known = eigenvalues(W, C, delta)
    return (
        W.shape[0] * (2 * known + floor)
        + 2 * root * float(np.sqrt(error))
        + root**2
        + output_error(W, L @ R, C)
    )


def rival_output_error(W: Array, A: Array, B: Array, C: Array, error: float) -> float:
    """Room for the output error of ``A B``, as computed, below that of the product itself.

    Rounded, it is no longer of the rank of its factors: the root of its error is off by
    ``rounded_product``. Evaluating it errs as well.
    """
    root = rounded_product(A, B, C)
    return 2 * root * float(np.sqrt(error)) + root**2 + output_error(W, A @ B, C)


def square_of_singular_values(S: Array, shape: tuple[int, int]) -> float:
    """Distance of the squares of singular values, each of which is off by ``singular_values``."""
    return (2 * float(S[0]) if S.size else 0.0) * singular_values(S, shape, EPS64)


def contract(optimum: float, size: float, shape: tuple[int, int]) -> float:
    """What leading directions may lose beyond the least squared error: ``solver.contract``."""
    return CONTRACT_SHARE * optimum + 2 * SVD_FACTOR * max(*shape, 1) * EPS64 * size**2


def afm_bias(W: Array, L: Array, mu: Array, product: float, eps: float = EPS64) -> Array:
    """Entry-by-entry distance of ``(I - L L^T) W mu``, `product` being that of ``L L^T W``.

    The three products, of d_in, d_out and r terms, and the difference; one more for a narrower
    dtype.
    """
    y = np.abs(W) @ np.abs(mu)
    magnitude = y + np.abs(L) @ (np.abs(L).T @ y)
    rounding = inner(W.shape[1] + W.shape[0] + L.shape[1] + 1, magnitude)
    if eps != EPS64:
        rounding = rounding + inner(1, magnitude, eps)
    return np.asarray(product * float(np.linalg.norm(mu)) + rounding)


def whitened_product(W: Array, C: Array, G: Array, R: Array, r: int) -> float | None:
    """Distance of ``U_r U_r^T W G`` from that of the whitened solution, ``C = G G^T``.

    The computed Cholesky factor has ``abs(G G^T - C) <= (d_in + 1) eps d d^T`` (Demmel), d the
    norms of the features; ``W G`` is rounded by ``d_in * eps / 2 * abs(W) abs(G)`` and decomposed
    to ``SVD_FACTOR * u``, each twice in ``W G G^T W^T``. So its left singular vectors are the
    eigenvectors of a matrix that is within
    ``(2 d_in + 1) eps norm(abs(W) d)^2 + 2 SVD_FACTOR u sigma_1`` of ``W C W^T``. The triangular
    solve and the product with G err by ``d_in * eps * abs(R) abs(G)`` in the rows of V, each.

    Parameters
    ----------
    W : (d_out, d_in)
    C, G : (d_in, d_in)
        The moment and its lower Cholesky factor.
    R : (r, d_in)
        Right factor of the whitened solution, ``V_r G^-1``.
    r : int

    Returns
    -------
    float or None
        None where the gap does not exceed its bound.
    """
    if r == 0:
        return 0.0
    S = np.linalg.svd(W @ G, compute_uv=False)
    u, n = svd_unit(float(S[0]), (W.shape[0], W.shape[1]), EPS64), W.shape[1]
    reach = float(np.linalg.norm(np.abs(W) @ feature_sizes(C)))
    delta = inner(2 * n + 1, np.asarray(reach**2)) + 2 * SVD_FACTOR * u * float(S[0])
    lam = np.zeros(W.shape[0])
    lam[: S.size] = S**2
    beyond = float(eigenvalues(W, C) + delta)
    turned = projector(lam, r, (W.shape[0], W.shape[0]), EPS64, beyond)
    if np.isinf(turned):
        return None
    solved = 2 * n * EPS64 * spectral_norm(np.abs(R) @ np.abs(G))
    room = SVD_FACTOR * max(W.shape) * EPS64
    return (turned + solved + 2 * room) * float(S[0]) + room * float(reach)


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


def cosine_sum(tokens: int, features: int) -> float:
    """Distance of two sums of the cosines of `tokens` tokens of `features` features.

    Each entry is divided once, eps / 2. An inner product of d terms, each a product of two such
    entries, errs by ``(d + 2) eps / 2`` of the sum of the magnitudes of its terms, which is at most
    the product of the norms (Cauchy); so does each sum of squares, relatively. Over the root of
    two of these, which takes half of their relative errors and three roundings more, a cosine errs
    by ``(d + 4) eps``. It is at most 1, and adding up n of them costs ``n * eps / 2`` of n.
    """
    return SECOND_ORDER * tokens * (2 * (features + 4) + tokens) * EPS64


def divergence_sum(tokens: int, vocabulary: int, largest: float) -> float:
    """Distance of two sums of divergences over `tokens` tokens, of logits of that magnitude.

    Of v logits of at most z, those less the largest one err by ``z eps``, the logarithm of the sum
    of their exponentials by ``(v + 2 z) eps`` and what a magnitude of at most ``2 z + log v`` is
    rounded by; a logarithm of a probability by the sum of these, and the probability relatively by
    as much. A term is a probability, all of them 1, times a difference of logarithms of at most
    ``2 (2 z + log v)``. Adding up the v terms costs ``v eps / 2`` of the sum of their magnitudes,
    adding up the tokens as much with n.
    """
    error = (vocabulary + 8 * (1 + largest) + tokens) * EPS64
    return SECOND_ORDER * tokens * 8 * error * (1 + largest + np.log(max(vocabulary, 1)))


def standard_scores(z: Array, deviation: float) -> Array:
    """Distance of standard scores of cosines from exact ones.

    The mean is at most 1 and rounded twice: it errs by eps, which moves all scores by
    ``eps / deviation`` and their sum of squares by the square of that alone. The rest, the
    difference, the product, the sum, the mean, the root (half of the errors before it) and the
    quotient, are fewer than eight roundings more, relatively.
    """
    return np.asarray(SECOND_ORDER * EPS64 * (1 / deviation + 4 * np.abs(z)))


def highest_ratio() -> float:
    """Distance of the largest ratio of a sub-layer: four roundings of numbers of at most 1."""
    return 2 * EPS64


def rank_floor(due: Fraction) -> Fraction:
    """Distance of a share of a rank, before it is floored: one rounding."""
    return Fraction(EPS64) * due


def ratios(total: int, spread: float) -> float:
    """Distance in parameters of what the ratios of the sub-layers remove, and of each from exact.

    The shift is the least double that removes enough: at the one before, which is eps of it away,
    too little is removed. Within that, a ratio errs by eps / 2 in adding the shift, and what it
    removes by eps / 2 each for the difference from the target, the size, the product and their sum:
    ``(shift + 4) eps`` in all, and the shift is at most ``1 + spread``. All ratios are off in the
    same direction, so that the bound holds for the sum of their distances too.

    Parameters
    ----------
    total : int
        Parameters of all sub-layers.
    spread : float
        Largest magnitude of ``alpha * z + p_t``.
    """
    return SECOND_ORDER * (5 + spread) * EPS64 * total


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


def correlation_of(C: Array, ridge: float) -> tuple[Array, Array]:
    """Norms of the features, and what is decomposed in ``regression``, as the rule has it."""
    d = feature_sizes(C)
    unit = np.where(d > 0, d, 1.0)
    K = C / np.outer(unit, unit)
    np.fill_diagonal(K, 1 + ridge)
    return d, K


def ridged_correlation(K: Array) -> Array:
    """Entry-by-entry distance of the correlations: two roots and two quotients."""
    return np.asarray(SECOND_ORDER * (2 * root() + 2 * quotient()) * np.abs(K))


def solved(K: Array) -> float:
    """Backward error, in the spectral norm, of solving by the Cholesky factor of K, of both sides.

    ``abs(dK) <= (3 k + 1) eps / 2 * abs(G) abs(G)^T`` (Higham, Accuracy and Stability, Theorem
    10.4), and the squares of the entries of the factor G add up to the trace of K.
    """
    return SECOND_ORDER * (3 * len(K) + 1) * EPS64 * float(np.trace(K))


def inverse_correlation(K: Array) -> float:
    """Distance of the inverses of the correlations, in the Frobenius norm.

    Both sides invert a matrix that is off by the correlations' roundings and by the backward error
    of its factor.

    Parameters
    ----------
    K : (d_in, d_in)
        From ``correlation_of``.
    """
    if not K.size:
        return 0.0
    inverse = np.linalg.inv(K)
    moved = float(np.linalg.norm(ridged_correlation(K))) + solved(K)
    return spectral_norm(inverse) ** 2 * moved + 4 * EPS64 * float(np.linalg.norm(inverse))


def least_squares_update(
    W: Array, C: Array, kept: Indices, ridge: float, delta: float = 0.0, relative: float = 0.0
) -> float:
    """Distance of the refitted columns, each times the norm of its feature: Frobenius norm.

    The change, in the units of the features, is ``B K^-1`` with ``B = V_R K_RK`` and V the weight
    times the norms. It moves by ``(dB - B K^-1 dK) K^-1``.

    Parameters
    ----------
    W : (d_out, d_in)
    C : (d_in, d_in)
    kept : (k,)
    ridge : float
    delta : float
        Distance of the sides' correlations, in the spectral norm, where they were not given the
        same moment.
    relative : float
        The same of the norms of the features, each over itself.
    """
    removed = np.setdiff1d(np.arange(W.shape[1]), kept)
    d, K = correlation_of(C, ridge)
    V, inside, across = W * d, K[np.ix_(kept, kept)], K[np.ix_(removed, kept)]
    inverse = 1 / float(np.linalg.eigvalsh(inside)[0]) if kept.size else 0.0
    change = V[:, removed] @ across @ np.linalg.inv(inside)
    size, reach = float(np.linalg.norm(change)), float(np.linalg.norm(V[:, removed]))
    rounded = float(np.linalg.norm(ridged_correlation(across))) + delta
    off = relative + root() + EPS64
    by_lost = reach * rounded + off * reach * spectral_norm(across)
    by_lost += float(np.linalg.norm(inner(removed.size, np.abs(V[:, removed]) @ np.abs(across))))
    moved = float(np.linalg.norm(ridged_correlation(inside))) + delta + solved(inside)
    whole = float(np.linalg.norm(V[:, kept])) + size
    return inverse * (by_lost + size * moved) + (relative + 4 * EPS64) * whole


def removal_cost(
    V: Array, K: Array, inverse: float, lost: float, delta: float = 0.0, relative: float = 0.0
) -> float:
    """Distance of what one more removal costs, in ``regression.removal_order``.

    A cost is the difference of two least values of ``trace(E K E^T)``. Such a value moves by at
    most ``norm(E)^2 norm(dK)``, and ``norm(E)^2`` is at most the value times ``norm(K^-1)``; by
    twice the relative distance of V it moves itself. The side that keeps inner products of the
    columns errs by ``eps`` of their squares with every removal.

    Parameters
    ----------
    V : (d_out, d_in)
        The weight times the norms of the features.
    K : (d_in, d_in)
    inverse : float
        Spectral norm of its inverse.
    lost : float
        The least value after the removal.
    delta, relative : float
        As for ``least_squares_update``.
    """
    moved = delta + float(np.linalg.norm(ridged_correlation(K))) + 4 * solved(K)
    columns = float(np.linalg.norm(V)) + float(np.sqrt(lost * inverse))
    summed = 8 * sum(V.shape) * EPS64 * columns**2 * (K[0, 0] if len(K) else 0.0)
    return 4 * lost * inverse * moved + 4 * (relative + 4 * EPS64) * lost + summed


def regressed_weight(W: Array, C: Array, M: Array, share: float, ridge: float) -> float:
    """Distance of regressed weights, each column times the norm of its feature: Frobenius norm.

    The change in these units is ``N K^-1``, ``N = W (M - C) D^-1``.
    """
    d, K = correlation_of(C, ridge)
    if not len(d):
        return 0.0
    unit = np.where(d > 0, d, 1.0)
    N = W @ (M - C) / unit
    inverse = 1 / float(np.linalg.eigvalsh(K)[0])
    size = float(np.linalg.norm(N @ np.linalg.inv(K)))
    terms = np.abs(W) @ (np.abs(M) + np.abs(C)) / unit
    missed = float(np.linalg.norm(inner(len(d) + 3, terms)))
    moved = float(np.linalg.norm(ridged_correlation(K))) + solved(K)
    whole = float(np.linalg.norm(W * d)) + share * size
    return share * inverse * (missed + size * moved) + 6 * EPS64 * whole
