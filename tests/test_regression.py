"""Least squares on both sides, against explicit inputs, NumPy's least squares, and all subsets."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.test_equations import Side

Array = NDArray[np.float64]

RIDGE = 0.01


@pytest.fixture(params=["lorap_reference", "lorap.ops"])
def side(request: pytest.FixtureRequest) -> Side:
    import torch

    return Side(request.param, np.asarray if request.param == "lorap_reference" else torch.tensor)


def problem(seed: int = 0, features: int = 7) -> tuple[Array, Array]:
    """A weight, and inputs that are correlated, one of them dead."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((30, 4)) @ rng.standard_normal((4, features))
    X += 0.1 * rng.standard_normal(X.shape)
    X[:, 2] = 0
    return rng.standard_normal((3, features)), X


def least_error(W: Array, X: Array, kept: Any) -> tuple[Array, float]:
    """The refitted weight and its objective, by the tokens themselves.

    The ridge is as many tokens more, each of which excites one feature alone.
    """
    kept = np.asarray(kept, dtype=int)
    gone = np.setdiff1d(np.arange(W.shape[1]), kept)
    ridges = np.diag(np.sqrt(RIDGE) * np.linalg.norm(X, axis=0))
    tokens = np.concatenate([X, ridges])
    # What the ridge of a removed feature costs is not to be made up for: it has tokens of its own.
    change, *_ = np.linalg.lstsq(tokens[:, kept], tokens[:, gone] @ W[:, gone].T, rcond=None)
    left = tokens[:, gone] @ W[:, gone].T - tokens[:, kept] @ change
    return W[:, kept] + change.T, float(np.sum(left**2))


@pytest.mark.spec("update.ridge")
def test_ridged_correlation(side: Side) -> None:
    _, X = problem()
    d, K = side("regression.ridged_correlation", X.T @ X, RIDGE)
    assert np.allclose(d, np.linalg.norm(X, axis=0))
    for i in range(7):
        for j in range(7):
            expected = 0.0 if 2 in (i, j) else X[:, i] @ X[:, j] / d[i] / d[j]
            assert np.isclose(K[i, j], 1 + RIDGE if i == j else expected)


@pytest.mark.spec("update.solution")
@pytest.mark.parametrize("kept", [[], [0], [1, 2], [0, 2, 3, 6], [0, 1, 3, 4, 5, 6]])
def test_an_update_is_the_least_squares_fit_of_the_tokens(side: Side, kept: list[int]) -> None:
    W, X = problem()
    expected, _ = least_error(W, X, kept)
    chosen = np.array(kept, dtype=np.int64)
    found = side("regression.least_squares_update", W, X.T @ X, chosen, RIDGE)
    assert np.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert np.array_equal(found[:, chosen == 2], W[:, [2]][:, : int(2 in kept)])


@pytest.mark.spec("update.solution")
def test_nothing_removed_changes_nothing(side: Side) -> None:
    W, X = problem()
    every = np.arange(7)
    assert np.array_equal(side("regression.least_squares_update", W, X.T @ X, every, RIDGE), W)


@pytest.mark.spec("update.solution", "update.ridge")
def test_no_feature_s_size_matters_to_another(side: Side) -> None:
    """A feature a million times larger, with a weight as much smaller."""
    W, X = problem()
    kept, size = np.array([0, 3, 5]), np.array([1e6, 1, 1, 1e-3, 1, 1e3, 1])
    plain = side("regression.least_squares_update", W, X.T @ X, kept, RIDGE)
    Z = X * size
    scaled = side("regression.least_squares_update", W / size, Z.T @ Z, kept, RIDGE)
    assert np.allclose(scaled * size[kept], plain, rtol=1e-8, atol=1e-8)
    order, _ = side("regression.removal_order", W, X.T @ X, 5, RIDGE)
    assert np.array_equal(side("regression.removal_order", W / size, Z.T @ Z, 5, RIDGE)[0], order)


@pytest.mark.spec("update.solution")
def test_more_tokens_than_one_are_not_needed(side: Side) -> None:
    """A singular moment, of fewer tokens than features, and of none."""
    W, X = problem()
    for tokens in (0, 1, 2):
        C = X[:tokens].T @ X[:tokens]
        kept = np.array([1, 2, 4])
        found = side("regression.least_squares_update", W, C, kept, 1e-6)
        assert np.isfinite(found).all()
        if tokens == 0:
            assert np.array_equal(found, W[:, kept])
        else:
            assert np.allclose(X[:tokens][:, kept] @ found.T, X[:tokens] @ W.T, atol=1e-3)


@pytest.mark.spec("obs.order")
@pytest.mark.parametrize("seed", range(4))
def test_each_removal_is_the_best_one_of_all_that_are_left(side: Side, seed: int) -> None:
    W, X = problem(seed)
    order, losses = side("regression.removal_order", W, X.T @ X, 7, RIDGE)
    assert order[0] == 2
    before, kept = 0.0, set(range(7))
    for j, loss in zip(order, losses, strict=True):
        costs = {i: least_error(W, X, sorted(kept - {i}))[1] - before for i in kept}
        assert j == min(costs, key=lambda i: costs[i])
        assert np.isclose(loss, costs[j], rtol=1e-8, atol=1e-10)
        before += costs[j]
        kept.remove(int(j))


@pytest.mark.spec("obs.order")
def test_the_first_of_equal_removals_may_make_the_second_dear(side: Side) -> None:
    """Two equal features seem useless, each beside the other; after one has gone, the other stays.

    Scores of single channels would take both.
    """
    X = np.array([[3.0, 3.0, 0.0], [0.0, 0.0, 1.0]])
    W = np.array([[1.0, 1.0, 1.0]])
    assert side("regression.removal_order", W, X.T @ X, 2, 1e-6)[0].tolist() == [0, 2]
    assert min(combinations(range(3), 2), key=lambda gone: error(W, X, gone)) == (0, 2)


def error(W: Array, X: Array, gone: tuple[int, ...]) -> float:
    return least_error(W, X, sorted(set(range(W.shape[1])) - set(gone)))[1]


@pytest.mark.spec("obs.order")
def test_no_removal_costs_less_than_nothing(side: Side) -> None:
    """Three equal features whose weights add up to 0: the last one has nothing left to give."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        W = rng.integers(-9, 10, (2, 3)).astype(np.float64)
        W[:, 2] -= W.sum(axis=1)
        _, losses = side("regression.removal_order", W, np.ones((3, 3)), 3, 1e-10)
        assert (losses >= 0).all()


@pytest.mark.spec("obs.order")
def test_removals_are_nested(side: Side) -> None:
    W, X = problem(3)
    whole = side("regression.removal_order", W, X.T @ X, 6, RIDGE)
    for count in range(6):
        part = side("regression.removal_order", W, X.T @ X, count, RIDGE)
        assert part[0].tolist() == whole[0][:count].tolist()
        assert np.allclose(part[1], whole[1][:count])


@pytest.mark.spec("obs.ties")
def test_of_equal_costs_the_lower_index_goes(side: Side) -> None:
    C = np.diag([1.0, 4.0, 1.0, 0.0, 1.0])
    order, losses = side("regression.removal_order", np.ones((2, 5)), C, 5, 1.0)
    assert order.tolist() == [3, 0, 2, 4, 1]
    assert np.allclose(losses, [0, 4, 4, 4, 16])


@pytest.mark.spec("target.regression", "stats.cross-moment")
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_regression_is_the_least_squares_fit_of_the_targets(side: Side, share: float) -> None:
    W, X = problem()
    others = X + 0.3 * np.random.default_rng(1).standard_normal(X.shape)
    M = side("statistics.cross_moment", others, X)
    assert np.allclose(M, sum(np.outer(a, b) for a, b in zip(others, X, strict=True)))
    found = side("regression.regressed_weight", W, X.T @ X, M, share, RIDGE)
    # The ridge is as many tokens more, each of which excites one feature, and whose target is W's.
    ridges = np.diag(np.sqrt(RIDGE) * np.linalg.norm(X, axis=0))
    targets = (1 - share) * X @ W.T + share * others @ W.T
    tokens, wanted = np.concatenate([X, ridges]), np.concatenate([targets, ridges @ W.T])
    expected = np.linalg.lstsq(tokens, wanted, rcond=None)[0].T
    live = np.linalg.norm(X, axis=0) > 0
    assert np.allclose(found[:, live], expected[:, live], rtol=1e-9, atol=1e-9)
    assert np.array_equal(found[:, ~live], W[:, ~live])


@pytest.mark.spec("target.regression", "update.ridge")
def test_a_feature_whose_square_vanishes_is_dead_and_keeps_its_column(side: Side) -> None:
    """Although its products with what it was in the uncompressed model do not vanish."""
    X, others = np.array([[1.0, 1e-200]]), np.array([[2.0, 1e100]])
    found = side("regression.regressed_weight", np.ones((1, 2)), X.T @ X, others.T @ X, 0.5, RIDGE)
    assert found[0, 0] > 1
    assert found[0, 1] == 1
    found = side("regression.regressed_weight", np.eye(1, 2), X.T @ X, others.T @ X, 0.5, RIDGE)
    assert found[0, 1] == 0


@pytest.mark.spec("update.ridge", "update.solution", "obs.order", "target.regression")
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_narrow_weights_and_moments_are_widened_first(name: str) -> None:
    import torch

    from lorap.ops import regression

    W, X = (torch.from_numpy(part).float() for part in problem())
    W = W.to(getattr(torch, name))
    C, M = X.T @ X, (X + 1).T @ X
    kept = torch.tensor([0, 1, 3, 6])
    moments = C.double(), M.double()
    for norms, exact in zip(
        regression.ridged_correlation(C, RIDGE),
        regression.ridged_correlation(moments[0], RIDGE),
        strict=True,
    ):
        assert norms.dtype == torch.float64
        assert torch.equal(norms, exact)
    results = (
        (
            regression.least_squares_update(W, C, kept, RIDGE),
            regression.least_squares_update(W.double(), moments[0], kept, RIDGE),
        ),
        (
            regression.regressed_weight(W, C, M, 0.5, RIDGE),
            regression.regressed_weight(W.double(), *moments, 0.5, RIDGE),
        ),
    )
    for narrow, wide in results:
        assert narrow.dtype == (torch.float64 if name == "float64" else torch.float32)
        assert torch.equal(narrow, wide.to(narrow.dtype))
    order, losses = regression.removal_order(W, C, 5, RIDGE)
    expected = regression.removal_order(W.double(), moments[0], 5, RIDGE)
    assert torch.equal(order, expected[0])
    assert torch.equal(losses, expected[1])


@pytest.mark.spec("target.regression")
def test_pca_of_a_regression_is_the_nearest_product_to_the_targets(side: Side) -> None:
    """Reduced-rank regression, against many other products of the same rank, refitted by turns."""
    W, X = problem(1)
    X = np.delete(X, 2, axis=1)
    W = np.delete(W, 2, axis=1)
    rng = np.random.default_rng(2)
    others = X + 0.5 * rng.standard_normal(X.shape)
    targets = 0.5 * (X + others) @ W.T
    C, M = X.T @ X, others.T @ X
    fitted = side("regression.regressed_weight", W, C, M, 0.5, 1e-6)
    L, R, _ = side("pca.pca", fitted, C, 1)
    least = float(np.sum((targets - X @ (L @ R).T) ** 2))
    for _ in range(5):
        A = rng.standard_normal((3, 1))
        for _ in range(200):
            B = np.linalg.lstsq(X, targets @ A / float(np.sum(A**2)), rcond=None)[0].T
            A = np.linalg.lstsq(X @ B.T, targets, rcond=None)[0].T
        assert least <= float(np.sum((targets - X @ (A @ B).T) ** 2)) * (1 + 1e-6)
