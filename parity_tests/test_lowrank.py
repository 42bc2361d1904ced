"""Eq. (3), (4), (6), (7): low-rank factors, weighted and not."""

import numpy as np
import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from lorap.ops import lowrank as ours
from lorap_reference import lowrank as reference
from parity_tests import compare, tolerances
from parity_tests import strategies as own
from parity_tests.tolerances import EPS32, EPS64, stored

dtypes = st.sampled_from(((torch.float64, EPS64), (torch.float32, EPS32)))
Dtype = tuple[torch.dtype, float]

THIRD_DIRECTION_BELOW_ROUNDING = own.Problem(
    own.from_spectrum((4, 3), "condition_1e12", 1.0, 0), np.array([1500.0, 0.9, 0.6]), 3
)
"""Of rank 2 to working precision once weighted, with a third direction in the weight alone."""

INVERTIBLE = ("positive", "equal", "outlier")


def label(quantity: str, eps: float) -> str:
    """Return the quantity's name in the report, by the dtype computed in."""
    return quantity if eps == EPS64 else f"{quantity} (float32)"


def product(factors: tuple[object, object]) -> own.Array:
    """Return ``L R`` in float64."""
    return compare.as_array(factors[0]) @ compare.as_array(factors[1])


@pytest.mark.spec("lowrank.apply")
@given(
    problem=own.problems(),
    count=st.integers(0, 5),
    layout=own.layouts,
    dtype=dtypes,
    seed=own.seeds,
)
def test_low_rank_apply(
    problem: own.Problem, count: int, layout: own.Layout, dtype: Dtype, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    (m, n), r = problem.W.shape, problem.rank
    L = own.pair(rng.standard_normal((m, r)), layout, dtype[0])
    R = own.pair(rng.standard_normal((r, n)), layout, dtype[0])
    X = own.pair(rng.standard_normal((count, n)), layout, dtype[0])
    mine = ours.low_rank_apply(L.tensor, R.tensor, X.tensor)
    assert mine.dtype == dtype[0]
    assert all(pair.unchanged() for pair in (L, R, X))
    compare.close(
        label("low-rank apply", dtype[1]),
        mine,
        reference.low_rank_apply(L.array, R.array, X.array),
        tolerances.low_rank_apply(L.array, R.array, X.array, dtype[1]),
    )


@pytest.mark.spec("lowrank.svd", "precision.decomposition")
@given(problem=own.problems(), layout=own.layouts, dtype=dtypes)
def test_svd_low_rank(problem: own.Problem, layout: own.Layout, dtype: Dtype) -> None:
    W, r, eps = own.pair(problem.W, layout, dtype[0]), problem.rank, dtype[1]
    left, right, S = ours.svd_low_rank(W.tensor, r)
    assert left.dtype == right.dtype == dtype[0]
    assert S.dtype == torch.float64
    assert W.unchanged()
    L, R, S_reference = reference.svd_low_rank(W.array, r)
    assert (left.shape, right.shape) == (L.shape, R.shape)
    shape = problem.W.shape
    # Eq. (4) at its word.
    U, S_printed, V = np.linalg.svd(W.array, full_matrices=False)
    compare.squared_singular_values("singular values of W (ours)", S, S_printed, shape)
    compare.singular_values(
        "singular values of W (reference)", S_reference, S_printed, shape, EPS64
    )
    rounded = stored(compare.as_array(left), compare.as_array(right), eps)
    compare.close(
        label("error of the SVD's product, from the tail", eps),
        np.linalg.norm(W.array - product((left, right))),
        np.linalg.norm(S_printed[r:]),
        rounded + (tolerances.tail_root(S_printed, shape, EPS64) if W.array.size else 0.0),
    )
    bound = tolerances.svd_product(S_printed, r, shape, EPS64)
    event("compared" if bound is not None else "no gap")
    if bound is not None:
        printed = (U[:, :r] * S_printed[:r]) @ V[:r]
        compare.spectral(label("SVD product", eps), product((left, right)), L @ R, bound + rounded)
        compare.spectral("SVD product, from Eq. (4)", L @ R, printed, bound)


@pytest.mark.spec("awsvd.scale")
@given(problem=own.problems(), weighting=st.sampled_from(("eq7", "eq6")), layout=own.layouts)
# Roots of it differ by a unit in the last place.
@example(
    problem=own.Problem(np.zeros((0, 1)), np.array([8.77915352e-05]), 0),
    weighting="eq6",
    layout="c",
)
def test_column_scale(
    problem: own.Problem, weighting: reference.Weighting, layout: own.Layout
) -> None:
    x = own.pair(problem.scale, layout)
    scale = ours.column_scale(x.tensor, weighting)
    theirs = reference.column_scale(x.array, weighting)
    bound = 0.0 if weighting == "eq7" else tolerances.root()
    compare.relatively_close(f"column scale ({weighting})", scale, theirs, bound)
    scale += 1
    theirs += 1
    assert x.unchanged(), "the scale must not be the norms themselves"


@pytest.mark.spec("asvd.scale")
@given(
    X=own.tokens(),
    alpha=st.one_of(st.sampled_from((0.0, 0.5, 1.0)), st.floats(0, 3)),
    layout=own.layouts,
)
def test_magnitude_scale(X: own.Array, alpha: float, layout: own.Layout) -> None:
    magnitudes = own.pair(np.sum(np.abs(X), axis=0), layout)
    scale = ours.magnitude_scale(magnitudes.tensor, X.shape[0], alpha)
    theirs = reference.magnitude_scale(magnitudes.array, X.shape[0], alpha)
    compare.relatively_close("ASVD's scale", scale, theirs, tolerances.magnitude_scale(alpha))
    assert np.array_equal(theirs == 0, (magnitudes.array == 0) & (alpha > 0))
    scale += 1
    theirs += 1
    assert magnitudes.unchanged(), "the scale must not be the sums themselves"


@pytest.mark.spec("awsvd.objective", "precision.statistics")
@given(problem=own.problems(), layout=own.layouts, dtype=dtypes, seed=own.seeds)
def test_weighted_error(problem: own.Problem, layout: own.Layout, dtype: Dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    W, scale = own.pair(problem.W, layout, dtype[0]), own.pair(problem.scale)
    near = own.pair(problem.W * rng.uniform(-1, 3, problem.W.shape), layout, dtype[0])
    error = ours.weighted_error(W.tensor, near.tensor, scale.tensor)
    assert type(error) is float
    assert W.unchanged()
    assert near.unchanged()
    assert scale.unchanged()
    compare.relatively_close(
        label("weighted error", dtype[1]),
        error,
        reference.weighted_error(W.array, near.array, scale.array),
        tolerances.weighted_error(W.array.size, dtype[1]),
    )


@pytest.mark.spec("awsvd.product", "awsvd.dead", "awsvd.deficient", "precision.decomposition")
@given(problem=own.problems(), layout=own.layouts, dtype=dtypes)
# rank(W D) = 1 of the rank 2 asked for: the dead column gives the second direction.
@example(
    problem=own.Problem(np.array([[1.0, 0.0], [1.0, 2.0]]), np.array([1.0, 0.0]), 2),
    layout="c",
    dtype=(torch.float64, EPS64),
)
@example(
    problem=own.Problem(np.array([[3.0, 0.0], [0.0, 1.0]]), np.array([0.0, 0.0]), 1),
    layout="c",
    dtype=(torch.float64, EPS64),
)
def test_awsvd(problem: own.Problem, layout: own.Layout, dtype: Dtype) -> None:
    W, scale = own.pair(problem.W, layout, dtype[0]), own.pair(problem.scale)
    r, eps = problem.rank, dtype[1]
    shape = (problem.W.shape[0], problem.W.shape[1])
    left, right, S = ours.awsvd(W.tensor, scale.tensor, r)
    assert left.dtype == right.dtype == dtype[0]
    assert S.dtype == torch.float64
    assert W.unchanged()
    assert scale.unchanged()
    L, R, S_reference = reference.awsvd(W.array, scale.array, r)
    assert (left.shape, right.shape) == (L.shape, R.shape)

    compare.squared_singular_values("singular values of W D", S, S_reference, shape)
    if r == 0:
        return
    bound = tolerances.awsvd_product(W.array, scale.array, r, EPS64)
    event("compared" if bound is not None else "no gap")
    if bound is not None:
        bound += stored(compare.as_array(left), compare.as_array(right), eps)
        compare.spectral(label("AWSVD product", eps), product((left, right)), L @ R, bound)


@pytest.mark.spec("awsvd.product", "awsvd.deficient")
@given(problem=own.problems(), dtype=dtypes)
@example(problem=THIRD_DIRECTION_BELOW_ROUNDING, dtype=(torch.float64, EPS64))
def test_the_columns_of_the_left_factor_are_orthonormal_or_zero(
    problem: own.Problem, dtype: Dtype
) -> None:
    W, scale = own.pair(problem.W, "c", dtype[0]), own.pair(problem.scale)
    for side, eps, left in (
        ("ours", dtype[1], ours.awsvd(W.tensor, scale.tensor, problem.rank)[0]),
        ("reference", EPS64, reference.awsvd(W.array, scale.array, problem.rank)[0]),
    ):
        L = compare.as_array(left)
        used = np.any(L != 0, axis=0)
        assert np.all(used[:-1] >= used[1:]), "zero columns come last"
        compare.spectral(
            label(f"orthonormality ({side})", dtype[1]),
            L.T @ L,
            np.diag(used.astype(np.float64)),
            tolerances.orthonormality((L.shape[0], W.array.shape[1]), eps),
        )


@pytest.mark.spec("awsvd.energy", "awsvd.product", "awsvd.objective")
@given(problem=own.problems(), layout=own.layouts, dtype=dtypes)
def test_the_error_of_awsvd_is_the_tail_energy(
    problem: own.Problem, layout: own.Layout, dtype: Dtype
) -> None:
    """Eckart-Young: whatever the gap, no product of rank r has a smaller objective."""
    W, scale = own.pair(problem.W, layout, dtype[0]), own.pair(problem.scale)
    r, eps = problem.rank, dtype[1]
    shape = (problem.W.shape[0], problem.W.shape[1])
    S = np.linalg.svd(W.array * scale.array, compute_uv=False)
    bound = tolerances.tail_root(S, shape, EPS64) if W.array.size else 0.0
    left, right, _ = ours.awsvd(W.tensor, scale.tensor, r)
    error = reference.weighted_error(W.array, product((left, right)), scale.array)
    compare.close(
        label("error of AWSVD, from the tail", eps),
        np.sqrt(error),
        np.linalg.norm(S[r:]),
        bound + stored(compare.as_array(left), compare.as_array(right) * scale.array, eps),
    )
    L, R, _ = reference.awsvd(W.array, scale.array, r)
    compare.close(
        "error of the reference's AWSVD, from the tail",
        np.sqrt(reference.weighted_error(W.array, L @ R, scale.array)),
        np.linalg.norm(S[r:]),
        bound,
    )


@pytest.mark.spec("awsvd.solution")
@given(problem=own.problems(INVERTIBLE), dtype=dtypes)
@example(problem=THIRD_DIRECTION_BELOW_ROUNDING, dtype=(torch.float64, EPS64))
def test_awsvd_is_the_printed_solution_where_there_is_one(
    problem: own.Problem, dtype: Dtype
) -> None:
    W, scale = own.pair(problem.W, "c", dtype[0]), own.pair(problem.scale)
    r, eps = problem.rank, dtype[1]
    shape = (problem.W.shape[0], problem.W.shape[1])
    S = np.linalg.svd(W.array * scale.array, compute_uv=False)
    bound = tolerances.svd_product(S, r, shape, EPS64)
    event("compared" if bound is not None else "no gap")
    if bound is None:
        return
    left, right, _ = ours.awsvd(W.tensor, scale.tensor, r)
    bound += stored(compare.as_array(left), compare.as_array(right) * scale.array, eps)
    # Times D: the inverse of a small norm magnifies what lies below u, on the printed side alone.
    compare.spectral(
        label("AWSVD product times D, from the printed solution", eps),
        product((left, right)) * scale.array,
        product(reference.awsvd_printed(W.array, scale.array, r)) * scale.array,
        bound,
    )


@pytest.mark.spec("awsvd.dead", "awsvd.deficient")
@given(problem=own.problems(("dead", "all_dead")), dtype=dtypes)
def test_directions_to_spare_go_to_the_dead_features(problem: own.Problem, dtype: Dtype) -> None:
    """At full rank nothing is lost, dead features included; no gap is needed for it."""
    wide = problem.W if problem.W.shape[0] <= problem.W.shape[1] else problem.W.T
    live = np.resize(problem.scale, wide.shape[1])
    W, scale = own.pair(wide, "c", dtype[0]), own.pair(live)
    full, eps = wide.shape[0], dtype[1]
    bound = tolerances.full_rank(W.array, EPS64)
    for side, factors in (
        ("ours", ours.awsvd(W.tensor, scale.tensor, full)),
        ("reference", reference.awsvd(W.array, scale.array, full)),
    ):
        rounded = stored(*map(compare.as_array, factors[:2]), eps) if side == "ours" else 0.0
        compare.spectral(
            label(f"W at full rank ({side})", eps), product(factors[:2]), W.array, bound + rounded
        )


@st.composite
def spectra(draw: st.DrawFn) -> own.Array:
    """Draw descending singular values: of a matrix, or small integers with ties and zeros."""
    if draw(st.booleans()):
        values = draw(st.lists(st.integers(0, 5), max_size=6))
        return np.array(sorted(values, reverse=True), dtype=np.float64)
    return np.linalg.svd(draw(own.matrices()), compute_uv=False)


@pytest.mark.spec("awsvd.energy")
@given(S=spectra(), data=st.data(), dtype=dtypes)
def test_retained_energy(S: own.Array, data: st.DataObject, dtype: Dtype) -> None:
    pair, r = own.pair(S, "c", dtype[0]), data.draw(st.integers(0, S.size), label="r")
    energy = ours.retained_energy(pair.tensor, r)
    assert type(energy) is float
    assert pair.unchanged()
    compare.close(
        "retained energy",
        energy,
        reference.retained_energy(pair.array, r),
        tolerances.retained_energy(S.size),
    )


@pytest.mark.spec("awsvd.deficient")
@given(S=spectra(), rows=st.integers(1, 100), columns=st.integers(1, 100))
def test_numerical_rank(S: own.Array, rows: int, columns: int) -> None:
    pair = own.pair(S)
    compare.exact(
        "numerical rank",
        ours.numerical_rank(pair.tensor, (rows, columns)),
        reference.numerical_rank(pair.array, (rows, columns)),
    )


@pytest.mark.spec("awsvd.deficient", "precision.decomposition")
@given(problem=own.problems(), dtype=dtypes)
def test_numerical_rank_of_a_product(problem: own.Problem, dtype: Dtype) -> None:
    """Both sides see the same rank wherever no singular value is near the threshold."""
    W, scale = own.pair(problem.W, "c", dtype[0]), own.pair(problem.scale)
    shape = (problem.W.shape[0], problem.W.shape[1])
    _, _, S = ours.awsvd(W.tensor, scale.tensor, 0)
    _, _, S_reference = reference.awsvd(W.array, scale.array, 0)
    clear = tolerances.rank_is_clear(S_reference, shape, EPS64)
    event("clear" if clear else "near the threshold")
    if clear:
        compare.exact(
            "numerical rank of W D",
            ours.numerical_rank(S, shape),
            reference.numerical_rank(S_reference, shape),
        )
