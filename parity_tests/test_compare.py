"""Every comparator passes within its bound and fails a few times past it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorap_reference import importance, lowrank, pca, statistics
from parity_tests import compare, tolerances
from parity_tests import strategies as own
from parity_tests.tolerances import EPS32, EPS64

PAST = 3.0
"""Times the bound, on which a comparator must fail."""

epsilons = st.sampled_from((EPS64, EPS32))


@pytest.fixture(autouse=True)
def aside() -> Iterator[compare.Collector]:
    """Keep what is compared here out of the session's report."""
    with compare.recording() as collector:
        yield collector


def accepts_and_refuses(check: Callable[[float], Any]) -> None:
    """Assert that a comparator passes at a share of its bound and fails at a few times it."""
    check(0.0)
    check(0.9)
    with pytest.raises(AssertionError, match="where the bound is"):
        check(PAST)


@given(bound=st.floats(1e-12, 1e6))
def test_within(bound: float) -> None:
    accepts_and_refuses(lambda times: compare.within("q", times * bound, bound))


def test_within_looks_at_every_entry() -> None:
    assert compare.within("q", [0.0, 0.5, 0.1], [1.0, 1.0, 1.0]) == 0.5
    with pytest.raises(AssertionError, match="deviation 2"):
        compare.within("q", [0.0, 2.0, 0.1], [1.0, 1.0, 1.0])
    with pytest.raises(AssertionError, match="q: deviation"):
        compare.within("q", [0.0, 0.1], [1.0, 0.0])


def test_within_refuses_what_is_not_a_number() -> None:
    with pytest.raises(AssertionError, match="deviation nan"):
        compare.within("q", [0.0, float("nan")], 1.0)
    with pytest.raises(AssertionError, match="deviation inf"):
        compare.within("q", float("inf"), float("inf"))


def test_no_deviation_is_within_no_bound() -> None:
    assert compare.within("q", 0.0, 0.0) == 0
    assert compare.within("q", np.zeros((0, 3)), np.zeros((0, 3))) == 0


@pytest.mark.parametrize("comparator", ["close", "exact", "spectral", "relatively_close"])
def test_other_shapes_fail(comparator: str) -> None:
    bound = () if comparator == "exact" else (1.0,)
    with pytest.raises(AssertionError, match="shape"):
        getattr(compare, comparator)("q", np.zeros((2, 1)), np.zeros((1, 2)), *bound)


def test_exact_fails_on_the_last_bit() -> None:
    x = torch.tensor([1.0, 3.0], dtype=torch.float64)
    compare.exact("q", x, x.numpy())
    with pytest.raises(AssertionError, match="where the bound is 0"):
        compare.exact("q", torch.nextafter(x, x + 1), x.numpy())


@given(values=own.spectral_matrices(), bound=st.floats(1e-15, 1e-3))
def test_relatively_close(values: own.Array, bound: float) -> None:
    values = np.where(values == 0, 1.0, values)
    # A relative step is known to the rounding of the sum, hence a bound well above eps.
    step = max(bound, 1e-13)
    accepts_and_refuses(
        lambda times: compare.relatively_close("q", values * (1 + times * step), values, step)
    )


@given(A=own.spectral_matrices(), eps=epsilons, at=st.integers(0, 23))
def test_singular_values(A: own.Array, eps: float, at: int) -> None:
    S = np.linalg.svd(A if A.any() else A + 1, compute_uv=False)
    bound = tolerances.singular_values(S, A.shape, eps)
    place = np.eye(S.size)[at % S.size]
    accepts_and_refuses(
        lambda times: compare.singular_values("q", S + times * bound * place, S, A.shape, eps)
    )


@given(problem=own.problems(), eps=epsilons, seed=own.seeds)
def test_products(problem: own.Problem, eps: float, seed: int) -> None:
    """A product that is off by a few bounds, in any direction, is refused."""
    bound = tolerances.awsvd_product(problem.W, problem.scale, problem.rank, eps)
    if not bound:
        return
    L, R, _ = lowrank.awsvd(problem.W, problem.scale, problem.rank)
    off = np.random.default_rng(seed).standard_normal(problem.W.shape)
    off /= tolerances.spectral_norm(off)
    # Below eps of the product itself nothing can be added to it.
    bound = max(bound, 1e-13 * tolerances.spectral_norm(L @ R))
    accepts_and_refuses(
        lambda times: compare.spectral("q", L @ R + times * bound * off, L @ R, bound)
    )


@given(shape=st.tuples(own.sides(2), own.sides(2)), seed=own.seeds, data=st.data())
def test_the_bound_on_products_refuses_the_unweighted_solution(
    shape: own.Shape, seed: int, data: st.DataObject
) -> None:
    """The bound is no cover for a wrong formula: plain SVD is far outside it."""
    r = data.draw(st.integers(1, min(shape) - 1), label="r")
    W = own.from_spectrum(shape, "linear", 1.0, seed)
    scale = np.linspace(1, 3, shape[1])
    bound = tolerances.awsvd_product(W, scale, r, EPS32)
    if bound is None:
        return
    L, R, _ = lowrank.awsvd(W, scale, r)
    plain = lowrank.svd_low_rank(W, r)
    with pytest.raises(AssertionError, match="where the bound is"):
        compare.spectral("q", plain[0] @ plain[1], L @ R, bound)


@st.composite
def correlated(draw: st.DrawFn, smallest: int = 2) -> own.OutputProblem:
    """Draw a problem whose inputs are correlated and have a mean, with a gap at the cut."""
    shape = (draw(own.sides(smallest)), draw(own.sides(smallest)))
    rng = np.random.default_rng(draw(own.seeds))
    X = rng.standard_normal((60, shape[1])) @ rng.standard_normal((shape[1], shape[1]))
    X += 3 * rng.standard_normal(shape[1])
    W = own.from_spectrum(shape, "linear", 1.0, draw(own.seeds))
    return own.OutputProblem(W, X, draw(st.integers(1, min(shape) - 1)))


def refused(L: own.Array, R: own.Array, product: own.Array, bound: float) -> None:
    with pytest.raises(AssertionError, match="where the bound is"):
        compare.spectral("q", L @ R, product, bound)


@given(problem=correlated())
def test_the_bound_on_pca_refuses_other_solutions(problem: own.OutputProblem) -> None:
    """By the diagonal of the moment, by the moment about the mean, with a factor in float32."""
    W, C, t, n, r = problem.W, problem.C, problem.t, problem.n, problem.rank
    floor = pca.rounding_floor(W, C, max(W.shape))
    bound = tolerances.pca_product(W, C, r, floor)
    if bound is None:
        return
    L, R, _ = pca.pca(W, C, r)
    refused(*lowrank.awsvd(W, np.sqrt(np.diag(C)), r)[:2], L @ R, bound)
    refused(*pca.afm(W, C, t, n, r)[:2], L @ R, bound)
    refused(L.astype(np.float32), R, L @ R, bound)


@given(problem=correlated())
def test_the_bound_on_the_least_error_refuses_other_solutions(problem: own.OutputProblem) -> None:
    W, C, r = problem.W, problem.C, problem.rank
    _, _, S = pca.pca(W, C, r)
    L, R, _ = lowrank.awsvd(W, np.sqrt(np.diag(C)), r)
    error = pca.output_error(W, L @ R, C)
    floor = pca.rounding_floor(W, C, max(W.shape))
    bound = tolerances.least_error(W, C, L, R, floor, error)
    with pytest.raises(AssertionError, match="where the bound is"):
        compare.close("q", error, np.sum(S[r:] ** 2), bound)


@given(problem=correlated())
def test_the_bound_on_the_bias_refuses_others(problem: own.OutputProblem) -> None:
    """None, the opposite, all of the mean output, and one that is only nearly right."""
    W, C, t, n, r = problem.W, problem.C, problem.t, problem.n, problem.rank
    mu, C_c = statistics.token_mean(t, n), statistics.centred_moment(C, t, n)
    delta = tolerances.through(W, tolerances.centred_moment(C, mu, n))
    product = tolerances.pca_product(W, C_c, r, pca.rounding_floor(W, C, n), delta)
    if product is None:
        return
    L, _, _, bias = pca.afm(W, C, t, n, r)
    bound = tolerances.afm_bias(W, L, mu, product)
    for other in (np.zeros_like(bias), -bias, W @ mu, bias * (1 + 1e-6)):
        with pytest.raises(AssertionError, match="where the bound is"):
            compare.close("q", other, bias, bound)


@given(problem=correlated())
def test_the_bound_on_moments_refuses_a_token_too_many(problem: own.OutputProblem) -> None:
    X, n = problem.X, problem.n
    C, t = problem.C, problem.t
    C_c = statistics.centred_moment(C, t, n)
    for bound in (
        tolerances.centred_moment(C, statistics.token_mean(t, n), n),
        tolerances.centred_moment_of(X),
    ):
        for other in (C, statistics.centred_moment(C, t, n + 1), C_c / n):
            with pytest.raises(AssertionError, match="where the bound is"):
                compare.close("q", other, C_c, bound)


@given(X=own.tokens().filter(lambda X: X.any()))
def test_the_bound_on_norms_refuses_a_token_counted_twice(X: own.Array) -> None:
    twice = np.concatenate([X, X[np.any(X != 0, axis=1)][:1]])
    bound = tolerances.root_of_positive_sum(X.shape[0])
    with pytest.raises(AssertionError, match="where the bound is"):
        compare.relatively_close(
            "q", statistics.feature_norms(twice), statistics.feature_norms(X), bound
        )


@given(ffn=own.channels(), eps=epsilons, at=st.integers(0, 23))
def test_scores(ffn: own.Channels, eps: float, at: int) -> None:
    C = importance.group_importance(ffn.up, ffn.gate, ffn.down, ffn.x_ffn, ffn.x_down)
    place = np.eye(C.size)[at % C.size]
    if C[at % C.size] == 0:
        return
    bound = max(tolerances.group_importance(ffn.down.shape[0], eps), 1e-13)
    accepts_and_refuses(
        lambda times: compare.relatively_close("q", C * (1 + times * bound * place), C, bound)
    )


@given(size=st.integers(4, 30), seed=own.seeds, data=st.data())
def test_kept_channels(size: int, seed: int, data: st.DataObject) -> None:
    """Neighbours at the cut may change places where their scores are that close, and only there."""
    low = data.draw(st.integers(0, size - 2), label="low")
    high = data.draw(st.integers(low + 1, size - 1), label="high")
    place = np.random.default_rng(seed).permutation(size)
    C = place.astype(np.float64)
    by_score = np.argsort(place)
    kept = np.sort(np.concatenate([by_score[:low], by_score[high:]]))
    assert compare.kept_channels("q", kept, kept, C, 0.0, (low, high))

    swapped = np.setdiff1d(np.append(kept, by_score[high - 1]), by_score[high])
    # The two scores are 1 apart, so that an error of 0.5 in each can swap them.
    assert not compare.kept_channels("q", swapped, kept, C, 0.51, (low, high))
    with pytest.raises(AssertionError, match="where the bound is"):
        compare.kept_channels("q", swapped, kept, C, 0.49, (low, high))


def test_kept_channels_refuses_a_channel_far_from_the_cut() -> None:
    C = np.arange(10.0)
    with pytest.raises(AssertionError, match="where the bound is"):
        compare.kept_channels("q", [0, 1, 2], [7, 8, 9], C, 0.51, (0, 7))


def test_kept_channels_refuses_another_count_or_order() -> None:
    C = np.arange(3.0)
    with pytest.raises(AssertionError, match="1 kept, reference 2"):
        compare.kept_channels("q", [2], [1, 2], C, 1.0, (0, 1))
    with pytest.raises(AssertionError, match="out of order"):
        compare.kept_channels("q", [2, 1], [1, 2], C, 1.0, (0, 1))


def test_removals_refuses_one_that_costs_more() -> None:
    W, C, ridge = np.array([[1.0, 2.0, 3.0]]), np.eye(3), 0.01
    assert compare.removals("q", np.array([0, 1]), W, C, ridge)
    for order in ([1, 0], [0, 2]):
        with pytest.raises(AssertionError, match="where the bound is"):
            compare.removals("q", np.array(order), W, C, ridge)


def test_removals_of_equal_costs_may_be_either() -> None:
    for order in ([0, 1], [1, 0]):
        assert not compare.removals("q", np.array(order), np.ones((1, 2)), np.eye(2), 0.01)
    # Twice the least cost passes where the correlations are known to a half.
    W = np.array([[1.0, np.sqrt(2.0)]])
    assert not compare.removals("q", np.array([1]), W, np.eye(2), 0.01, delta=0.5)


def test_the_worst_comparison_is_kept(aside: compare.Collector) -> None:
    for deviation in (0.2, 0.7, 0.1):
        compare.within("q", deviation, 1.0)
    assert aside.table() == {"q": {"ratio": 0.7, "deviation": 0.7, "bound": 1.0, "comparisons": 3}}


def test_tables_of_several_processes_are_put_together(aside: compare.Collector) -> None:
    compare.within("q", 0.2, 1.0)
    other = compare.Collector()
    other.add("q", 0.4, 1.0, 0.4)
    other.add("q", 0.1, 1.0, 0.1)
    other.add("p", 0.0, 0.0, 0.0)
    aside.merge(other.table())
    assert aside.table()["q"] == {
        "ratio": 0.4, "deviation": 0.4, "bound": 1.0, "comparisons": 3
    }  # fmt: skip
    assert aside.table()["p"]["comparisons"] == 1


def test_recording_leaves_the_outer_collector_alone(aside: compare.Collector) -> None:
    with compare.recording() as inner:
        compare.within("q", 0.0, 1.0)
    assert inner.table()
    assert not aside.table()
    assert compare.collector() is aside


@pytest.mark.parametrize("eps", [EPS64, EPS32])
def test_a_product_that_is_not_determined_has_no_bound(eps: float) -> None:
    """Equal singular values on both sides of the cut: any of them may be taken."""
    n = 6
    assert tolerances.awsvd_product(np.eye(n), np.ones(n), 3, eps) is None
    assert tolerances.svd_product(np.ones(n), 3, (n, n), eps) is None
    assert tolerances.pca_product(np.eye(n), np.eye(n), 3, 0.0) is None
    assert tolerances.pca_product(np.eye(n), np.eye(n), n, 0.0) is not None
    assert tolerances.awsvd_product(np.eye(n), np.ones(n), n, eps) is not None
    assert tolerances.awsvd_product(np.eye(n), np.ones(n), 0, eps) == 0
