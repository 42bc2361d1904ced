"""Low-rank factors from the outputs: PCA (MGAA, Eq. (8) to (11)) and AFM."""

import numpy as np
import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from lorap.ops import pca as ours
from lorap.ops import statistics as our_statistics
from lorap_reference import pca as reference
from lorap_reference import statistics
from parity_tests import compare, tolerances
from parity_tests import strategies as own
from parity_tests.tolerances import EPS32, EPS64, stored

dtypes = st.sampled_from(((torch.float64, EPS64), (torch.float32, EPS32)))
Dtype = tuple[torch.dtype, float]

FLOAT64: Dtype = (torch.float64, EPS64)

CONSTANT = own.OutputProblem(np.diag([1.0, 3.0, 2.0]), np.tile([0.1, 0.7, 1 / 3], (500, 1)), 1)
"""All tokens equal: what is left about their mean is rounding, which grows with their number."""

CANCELLING = own.OutputProblem(
    np.array([[1.0, -3.0], [2.0, -6.0 + 1e-9]]), np.tile([1e6, 1e6 / 3], (3, 1)), 1
)
"""The weight answers to none of the tokens: all eigenvalues are rounding, the largest one too."""

NO_TOKEN = own.OutputProblem(np.diag([1.0, 3.0, 2.0]), np.zeros((0, 3)), 1)

SMALL_DIRECTION = own.OutputProblem(np.diag([1.0, 1e-10]), np.eye(2), 2)
"""A singular value of ``W C^(1/2)`` that its square, an eigenvalue, is too small to show."""


def label(quantity: str, eps: float) -> str:
    """Return the quantity's name in the report, by the dtype computed in."""
    return quantity if eps == EPS64 else f"{quantity} (float32)"


def product(factors: tuple[object, object]) -> own.Array:
    """Return ``L R`` in float64."""
    return compare.as_array(factors[0]) @ compare.as_array(factors[1])


def afm_distance(C: own.Array, t: own.Array, n: int, W: own.Array) -> float:
    """Return the distance of the sides' ``W C_c W^T`` that is due to the centring."""
    mu = statistics.token_mean(t, n)
    return tolerances.through(W, tolerances.centred_moment(C, mu, n))


@pytest.mark.spec("output.moment")
@given(problem=own.output_problems(), layout=own.layouts, dtype=dtypes)
def test_output_moment(problem: own.OutputProblem, layout: own.Layout, dtype: Dtype) -> None:
    W, C = own.pair(problem.W, layout, dtype[0]), own.pair(problem.C)
    mine = ours.output_moment(W.tensor, C.tensor)
    theirs = reference.output_moment(W.array, C.array)
    assert mine.dtype == torch.float64
    assert W.unchanged()
    assert C.unchanged()
    assert torch.equal(mine, mine.T)
    assert np.array_equal(theirs, theirs.T)
    bound = tolerances.output_moment(W.array, C.array)
    compare.close("moment of the outputs", mine, theirs, bound)


@pytest.mark.spec("output.error", "precision.statistics")
@given(problem=own.output_problems(), layout=own.layouts, dtype=dtypes, seed=own.seeds)
def test_output_error(
    problem: own.OutputProblem, layout: own.Layout, dtype: Dtype, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    W, C = own.pair(problem.W, layout, dtype[0]), own.pair(problem.C)
    near = own.pair(problem.W * rng.uniform(-1, 3, problem.W.shape), layout, dtype[0])
    error = ours.output_error(W.tensor, near.tensor, C.tensor)
    theirs = reference.output_error(W.array, near.array, C.array)
    assert type(error) is float
    assert all(pair.unchanged() for pair in (W, near, C))
    bound = tolerances.output_error(W.array, near.array, C.array)
    compare.close("error of the outputs", error, theirs, bound)
    # C itself is a sum over the tokens; the difference of the outputs is another d_in terms.
    Y = problem.X @ (W.array - near.array).T
    reach = np.abs(problem.X) @ np.abs(W.array - near.array).T
    terms = problem.n + 2 * problem.X.shape[1]
    compare.close(
        "error of the outputs, token by token",
        error,
        np.sum(Y**2),
        bound + float(np.sum(tolerances.inner(terms, reach**2))),
    )


@pytest.mark.spec("output.error")
@given(problem=own.output_problems(), seed=own.seeds)
def test_the_error_of_outputs_is_not_negative(problem: own.OutputProblem, seed: int) -> None:
    """Nor where the two differ in directions that no token has, up to rounding."""
    W, C = problem.W, problem.C
    eigenvalues, V = np.linalg.eigh(C)
    unseen = V[:, eigenvalues <= 1e-12 * np.max(eigenvalues, initial=0.0)]
    rng = np.random.default_rng(seed)
    off = (
        rng.standard_normal((W.shape[0], unseen.shape[1])) @ unseen.T * np.max(np.abs(W), initial=0)
    )
    event("unseen directions" if np.any(off) else "none")
    for error in (
        reference.output_error(W, W + off, C),
        ours.output_error(*map(torch.from_numpy, (W, W + off, C))),
    ):
        assert error >= 0


@pytest.mark.spec("pca.deficient", "afm.deficient")
@given(problem=own.output_problems(), terms=st.integers(1, 10**6), dtype=dtypes)
def test_rounding_floor(problem: own.OutputProblem, terms: int, dtype: Dtype) -> None:
    W, C = own.pair(problem.W, "c", dtype[0]), own.pair(problem.C)
    floor = ours.rounding_floor(W.tensor, C.tensor, terms)
    assert type(floor) is float
    compare.relatively_close(
        "floor of the eigenvalues",
        floor,
        reference.rounding_floor(W.array, C.array, terms),
        tolerances.positive_sum(W.array.size + 4),
    )


@pytest.mark.spec("pca.product", "pca.spectrum", "pca.deficient", "precision.decomposition")
@given(problem=own.output_problems(), layout=own.layouts, dtype=dtypes)
@example(problem=CANCELLING, layout="c", dtype=FLOAT64)
@example(problem=NO_TOKEN, layout="c", dtype=FLOAT64)
@example(problem=SMALL_DIRECTION, layout="c", dtype=FLOAT64)
def test_pca(problem: own.OutputProblem, layout: own.Layout, dtype: Dtype) -> None:
    W, C = own.pair(problem.W, layout, dtype[0]), own.pair(problem.C)
    r, eps = problem.rank, dtype[1]
    left, right, S = ours.pca(W.tensor, C.tensor, r)
    assert left.dtype == right.dtype == dtype[0]
    assert S.dtype == torch.float64
    assert W.unchanged()
    assert C.unchanged()
    L, R, S_reference = reference.pca(W.array, C.array, r)
    assert (left.shape, right.shape) == (L.shape, R.shape)
    compare.close(
        "eigenvalues of W C W^T",
        compare.as_array(S) ** 2,
        S_reference**2,
        tolerances.eigenvalues(W.array, C.array),
    )
    floor = reference.rounding_floor(W.array, C.array, max(W.array.shape))
    bound = tolerances.pca_product(W.array, C.array, r, floor)
    event("compared" if bound is not None else "no gap")
    if bound is not None:
        bound += stored(compare.as_array(left), compare.as_array(right), eps)
        compare.spectral(label("PCA product", eps), product((left, right)), L @ R, bound)


@pytest.mark.spec("pca.product", "pca.spectrum", "output.error")
@given(problem=own.output_problems(), dtype=dtypes)
@example(problem=CANCELLING, dtype=FLOAT64)
@example(problem=SMALL_DIRECTION, dtype=FLOAT64)
def test_the_error_of_pca_is_the_sum_of_the_dropped_eigenvalues(
    problem: own.OutputProblem, dtype: Dtype
) -> None:
    """MGAA, Eq. (11), whatever the gap: by singular values of the outputs, which need no C."""
    W, X, C, r = own.pair(problem.W, "c", dtype[0]), problem.X, problem.C, problem.rank
    eps = dtype[1]
    S = np.linalg.svd(X @ W.array.T, compute_uv=False)
    # The outputs are inner products of d_in terms, C a sum over the tokens.
    reach = np.linalg.norm(np.abs(X) @ np.abs(W.array).T) ** 2
    delta = float(tolerances.inner(problem.n + 2 * X.shape[1], np.asarray(reach)))
    floor = reference.rounding_floor(W.array, C, max(W.array.shape))
    for side, factors in (
        ("ours", ours.pca(W.tensor, torch.from_numpy(C), r)),
        ("reference", reference.pca(W.array, C, r)),
    ):
        L, R = map(compare.as_array, factors[:2])
        error = reference.output_error(W.array, L @ R, C)
        side_eps = eps if side == "ours" else EPS64
        compare.close(
            label(f"error of PCA, from the outputs ({side})", side_eps),
            error,
            np.sum(S[r:] ** 2),
            tolerances.least_error(W.array, C, L, R, floor, error, side_eps, delta),
        )


@pytest.mark.spec("pca.product", "pca.deficient", "afm.product", "afm.deficient")
@given(problem=own.output_problems(), dtype=dtypes)
@example(problem=CONSTANT, dtype=FLOAT64)
@example(problem=SMALL_DIRECTION, dtype=FLOAT64)
def test_the_columns_of_the_left_factor_are_orthonormal_or_zero(
    problem: own.OutputProblem, dtype: Dtype
) -> None:
    W, C, t, n, r = (
        own.pair(problem.W, "c", dtype[0]),
        problem.C,
        problem.t,
        problem.n,
        problem.rank,
    )
    C_, t_ = torch.from_numpy(C), torch.from_numpy(t)
    for name, eps, left in (
        ("PCA, ours", dtype[1], ours.pca(W.tensor, C_, r)[0]),
        ("PCA, reference", EPS64, reference.pca(W.array, C, r)[0]),
        ("AFM, ours", dtype[1], ours.afm(W.tensor, C_, t_, n, r)[0]),
        ("AFM, reference", EPS64, reference.afm(W.array, C, t, n, r)[0]),
    ):
        L = compare.as_array(left)
        used = np.any(L != 0, axis=0)
        assert np.all(used[:-1] >= used[1:]), "zero columns come last"
        compare.spectral(
            label(f"orthonormality ({name})", eps),
            L.T @ L,
            np.diag(used.astype(np.float64)),
            tolerances.orthonormality((L.shape[0], W.array.shape[1]), eps),
        )


@pytest.mark.spec("pca.whitened")
@given(problem=own.output_problems(("many", "offset")), dtype=dtypes)
def test_pca_is_the_whitened_solution_where_there_is_one(
    problem: own.OutputProblem, dtype: Dtype
) -> None:
    W, C, r, eps = own.pair(problem.W, "c", dtype[0]), problem.C, problem.rank, dtype[1]
    if C.size == 0:
        return
    G = np.linalg.cholesky(C)
    theirs = reference.whitened(W.array, C, r)
    bound = tolerances.whitened_product(W.array, C, G, theirs[1], r) if W.array.size else 0.0
    event("compared" if bound is not None else "no gap")
    if bound is None:
        return
    for side, side_eps, factors in (
        ("ours", eps, ours.pca(W.tensor, torch.from_numpy(C), r)),
        ("reference", EPS64, reference.pca(W.array, C, r)),
    ):
        L, R = map(compare.as_array, factors[:2])
        # Times G: the inverse of a small direction of C magnifies what lies below e, on one side
        # alone.
        compare.spectral(
            label(f"PCA product times G, from the whitened solution ({side})", side_eps),
            L @ R @ G,
            product(theirs) @ G,
            bound + stored(L, np.abs(R) @ np.abs(G), side_eps),
        )


@pytest.mark.spec("afm.product", "afm.bias", "afm.deficient", "precision.decomposition")
@given(problem=own.output_problems(), layout=own.layouts, dtype=dtypes)
@example(problem=CONSTANT, layout="c", dtype=FLOAT64)
@example(problem=NO_TOKEN, layout="c", dtype=FLOAT64)
def test_afm(problem: own.OutputProblem, layout: own.Layout, dtype: Dtype) -> None:
    W, C, t = own.pair(problem.W, layout, dtype[0]), own.pair(problem.C), own.pair(problem.t)
    n, r, eps = problem.n, problem.rank, dtype[1]
    left, right, S, bias = ours.afm(W.tensor, C.tensor, t.tensor, n, r)
    assert left.dtype == right.dtype == bias.dtype == dtype[0]
    assert S.dtype == torch.float64
    assert all(pair.unchanged() for pair in (W, C, t))
    L, R, S_reference, bias_reference = reference.afm(W.array, C.array, t.array, n, r)
    assert (left.shape, right.shape, bias.shape) == (L.shape, R.shape, bias_reference.shape)

    C_c = statistics.centred_moment(C.array, t.array, n)
    delta = afm_distance(C.array, t.array, n, W.array)
    compare.close(
        "eigenvalues of W C_c W^T",
        compare.as_array(S) ** 2,
        S_reference**2,
        tolerances.eigenvalues(W.array, C_c, delta),
    )
    floor = reference.rounding_floor(W.array, C.array, max(*W.array.shape, n))
    bound = tolerances.pca_product(W.array, C_c, r, floor, delta)
    event("compared" if bound is not None else "no gap")
    if bound is not None:
        mu = statistics.token_mean(t.array, n)
        compare.close(
            label("AFM bias", eps),
            bias,
            bias_reference,
            tolerances.afm_bias(W.array, L, mu, bound, eps),
        )
        bound += stored(compare.as_array(left), compare.as_array(right), eps)
        compare.spectral(label("AFM product", eps), product((left, right)), L @ R, bound)


@pytest.mark.spec("afm.product", "afm.bias", "stats.centred-moment")
@given(problem=own.output_problems(), dtype=dtypes)
@example(problem=CONSTANT, dtype=FLOAT64)
def test_the_error_of_afm_is_the_sum_of_the_dropped_eigenvalues(
    problem: own.OutputProblem, dtype: Dtype
) -> None:
    """By the outputs less their mean, token by token; the bias is what makes it so."""
    W, X, C, t, n = own.pair(problem.W, "c", dtype[0]), problem.X, problem.C, problem.t, problem.n
    r, eps = problem.rank, dtype[1]
    if n == 0:
        return
    Y = X @ W.array.T
    S = np.linalg.svd(Y - np.mean(Y, axis=0), compute_uv=False)
    C_c = statistics.centred_moment(C, t, n)
    reach = np.linalg.norm(np.abs(X) @ np.abs(W.array).T) ** 2
    # The outputs are inner products of d_in terms and lose their mean once more.
    delta = float(tolerances.inner(2 * X.shape[1] + n + 2, np.asarray(reach)))
    delta += tolerances.through(W.array, tolerances.centred_moment_of(X))
    floor = reference.rounding_floor(W.array, C, max(*W.array.shape, n))
    for side, factors in (
        ("ours", ours.afm(W.tensor, torch.from_numpy(C), torch.from_numpy(t), n, r)),
        ("reference", reference.afm(W.array, C, t, n, r)),
    ):
        L, R, _, bias = map(compare.as_array, factors)
        error = float(np.sum((Y - (X @ R.T) @ L.T - bias) ** 2))
        side_eps = eps if side == "ours" else EPS64
        bound = tolerances.least_error(W.array, C_c, L, R, floor, error, side_eps, delta)
        # In the error the bias and the outputs as such are rounded, not their differences.
        size = np.abs(Y) + (np.abs(X) @ np.abs(R).T) @ np.abs(L).T + np.abs(bias)
        terms = X.shape[1] + W.array.shape[0] + r + n
        root = float(np.linalg.norm(tolerances.inner(terms, size)))
        if side_eps != EPS64:
            root += float(np.linalg.norm(tolerances.inner(2, size, side_eps)))
        compare.close(
            label(f"error of AFM, from the outputs ({side})", side_eps),
            error,
            np.sum(S[r:] ** 2),
            bound + 2 * root * np.sqrt(error) + root**2,
        )


@pytest.mark.spec("stats.centred-moment")
@given(problem=own.output_problems(), dtype=dtypes)
@example(problem=CONSTANT, dtype=FLOAT64)
def test_centred_moment(problem: own.OutputProblem, dtype: Dtype) -> None:
    X, n = own.pair(problem.X, "c", dtype[0]).array, problem.n
    C, t = own.pair(X.T @ X), own.pair(np.sum(X, axis=0))
    mine = our_statistics.centred_moment(C.tensor, t.tensor, n)
    theirs = statistics.centred_moment(C.array, t.array, n)
    assert C.unchanged()
    assert t.unchanged()
    mu = statistics.token_mean(t.array, n)
    bound = tolerances.centred_moment(C.array, mu, n)
    compare.close("moment about the mean", mine, theirs, bound)
    Z = X - mu
    compare.close(
        "moment about the mean, token by token", mine, Z.T @ Z, tolerances.centred_moment_of(X)
    )
