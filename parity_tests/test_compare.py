"""Every comparator and every bound passes what is within it, and refuses what is a few times past.

``@pytest.mark.refuses(...)`` names the comparators and bounds that a test shows to refuse an input
that is off by a few times the bound. Each has such a test.
"""

import ast
import inspect
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.fft import dct

from lorap_reference import (
    budget,
    heads,
    importance,
    llama,
    lora,
    lowrank,
    marginal,
    mgaa,
    pca,
    refinement,
    regression,
    statistics,
)
from parity_tests import compare, llamas, rounding, tolerances
from parity_tests import strategies as own
from parity_tests.tolerances import CONFIDENCE, EPS32, EPS64

PAST = 3.0
"""Times the bound, on which a comparator must fail."""

epsilons = st.sampled_from((EPS64, EPS32))


@pytest.fixture(autouse=True)
def aside() -> Iterator[compare.Collector]:
    """Keep what is compared here out of the session's report."""
    with compare.recording() as collector:
        yield collector


NO_BOUNDS = {
    "as_array": "converts",
    "collector": "the report",
    "recording": "the report",
    "Collector": "the report",
    "Worst": "the report",
    "spectral_norm": "a part of others",
    "svd_unit": "a part of others",
    "gap": "a part of others",
    "correlation_of": "a part of others",
    "solved": "a part of others",
    "removed_error": "a part of removals",
    "projector": "a part of awsvd_product",
    "stored_factors": "a part of half",
    "completed_product": "a part of awsvd_product and pca_product",
    "feature_sizes": "a part of others",
    "rank_is_clear": "tells where a comparison makes sense",
}


def test_every_comparator_and_every_bound_is_shown_to_refuse() -> None:
    names = {
        name
        for module in (compare, tolerances)
        for name, value in vars(module).items()
        if inspect.getmodule(value) is module and not name.startswith("_") and callable(value)
    }
    shown = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.refuses":
                shown |= {ast.literal_eval(argument) for argument in node.args}
    assert shown | NO_BOUNDS.keys() == names
    assert not shown & NO_BOUNDS.keys()


def accepts_and_refuses(check: Callable[[float], Any]) -> None:
    """Assert that a comparator passes at a share of its bound and fails at a few times it."""
    check(0.0)
    check(0.9)
    with pytest.raises(AssertionError, match="where the bound is"):
        check(PAST)


@pytest.mark.refuses("within")
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


@pytest.mark.refuses("exact")
def test_exact_fails_on_the_last_bit() -> None:
    x = torch.tensor([1.0, 3.0], dtype=torch.float64)
    compare.exact("q", x, x.numpy())
    with pytest.raises(AssertionError, match="where the bound is 0"):
        compare.exact("q", torch.nextafter(x, x + 1), x.numpy())


@pytest.mark.refuses("relatively_close")
@given(values=own.spectral_matrices(), bound=st.floats(1e-15, 1e-3))
def test_relatively_close(values: own.Array, bound: float) -> None:
    values = np.where(values == 0, 1.0, values)
    # A relative step is known to the rounding of the sum, hence a bound well above eps.
    step = max(bound, 1e-13)
    accepts_and_refuses(
        lambda times: compare.relatively_close("q", values * (1 + times * step), values, step)
    )


@pytest.mark.refuses("close")
@given(values=own.spectral_matrices(), bound=st.floats(1e-15, 1e6), at=st.integers(0, 600))
def test_close(values: own.Array, bound: float, at: int) -> None:
    """A single entry that is off is enough."""
    values = values / max(1.0, float(np.max(np.abs(values))) / bound)
    place = np.zeros(values.size)
    place[at % values.size] = bound
    accepts_and_refuses(
        lambda times: compare.close(
            "q", values + times * place.reshape(values.shape), values, bound
        )
    )


@pytest.mark.refuses("singular_values")
@given(A=own.spectral_matrices(), eps=epsilons, at=st.integers(0, 23))
def test_singular_values(A: own.Array, eps: float, at: int) -> None:
    S = np.linalg.svd(A if A.any() else A + 1, compute_uv=False)
    bound = tolerances.singular_values(S, A.shape, eps)
    place = np.eye(S.size)[at % S.size]
    accepts_and_refuses(
        lambda times: compare.singular_values("q", S + times * bound * place, S, A.shape, eps)
    )


@pytest.mark.refuses("spectral")
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


@given(shape=st.tuples(own.sides(2), own.sides(2)), cut=st.integers(1, 23), seed=own.seeds)
@example(shape=(21, 2), cut=1, seed=2046017)
def test_the_bound_on_products_refuses_the_unweighted_solution(
    shape: own.Shape, cut: int, seed: int
) -> None:
    """The bound is no cover for a wrong formula: plain SVD is far outside it.

    No direction of the inputs is near an axis: there the scale would change next to nothing.
    """
    r, scale = min(cut, min(shape) - 1), np.linspace(1, 3, shape[1])
    U = np.linalg.qr(np.random.default_rng(seed).standard_normal((shape[0], min(shape))))[0]
    s = np.arange(min(shape), 0.0, -1)
    W = (U * s) @ dct(np.eye(shape[1]), norm="ortho")[: min(shape)]
    bound = tolerances.awsvd_product(W, scale, r, EPS32)
    if bound is None:
        return
    L, R, _ = lowrank.awsvd(W, scale, r)
    plain = lowrank.svd_low_rank(W, r)
    with pytest.raises(AssertionError, match="where the bound is"):
        compare.spectral("q", plain[0] @ plain[1], L @ R, bound)


def correlated_problem(
    shape: own.Shape, rank: int, seed_of_inputs: int, seed_of_weight: int
) -> own.OutputProblem:
    """Return a problem whose inputs are correlated and have a mean, with a gap at the cut."""
    rng = np.random.default_rng(seed_of_inputs)
    X = rng.standard_normal((60, shape[1])) @ rng.standard_normal((shape[1], shape[1]))
    X += 3 * rng.standard_normal(shape[1])
    return own.OutputProblem(own.from_spectrum(shape, "linear", 1.0, seed_of_weight), X, rank)


@st.composite
def correlated(draw: st.DrawFn, smallest: int = 2) -> own.OutputProblem:
    """Draw such a problem."""
    shape = (draw(own.sides(smallest)), draw(own.sides(smallest)))
    rank = draw(st.integers(1, min(shape) - 1))
    return correlated_problem(shape, rank, draw(own.seeds), draw(own.seeds))


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
@example(problem=correlated_problem((15, 21), 14, 15, 0))
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
    for other in (np.zeros_like(bias), -bias, W @ mu, bias * (1 + 1e-3)):
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


@pytest.mark.refuses("kept_channels")
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


# Bounds, on inputs that are off

few = settings(max_examples=max(10, settings().max_examples // 8))
"""What is past a bound is so on any input."""


def refuses(check: Callable[[float], Any], times: float = PAST) -> None:
    """Assert that a comparison passes with the input as it is and fails with it off."""
    check(0.0)
    with pytest.raises(AssertionError, match="where the bound is"):
        check(times)


@pytest.mark.refuses("weight_importance")
@few
@given(problem=own.problems(("positive", "outlier")), eps=epsilons)
def test_norms_that_are_off_change_scores_past_their_bound(
    problem: own.Problem, eps: float
) -> None:
    W, x = problem.W, problem.scale
    assume(W.any())
    bound = tolerances.weight_importance(eps)
    # In float64 nothing may differ: not even by the last digit of the norms.
    refuses(
        lambda times: compare.relatively_close(
            "q",
            importance.weight_importance(W, x * (1 + times * max(bound, EPS64))),
            importance.weight_importance(W, x),
            bound,
        )
    )


@pytest.mark.refuses("root")
@few
@given(x=own.norm_vectors(5, ("positive", "equal")))
def test_norms_that_are_off_change_their_roots_past_their_bound(x: own.Array) -> None:
    bound = tolerances.root()
    refuses(
        lambda times: compare.relatively_close(
            "q",
            lowrank.column_scale(x * (1 + 2 * times * bound), "eq6"),
            lowrank.column_scale(x, "eq6"),
            bound,
        )
    )


@pytest.mark.refuses("positive_sum", "root_of_positive_sum", "scaled_norms")
@few
@given(count=st.integers(1, 200), seed=own.seeds)
def test_a_token_that_is_off_changes_sums_past_their_bound(count: int, seed: int) -> None:
    """One token of many takes the whole of the deviation."""
    X = np.random.default_rng(seed).uniform(1, 2, (count, 1))
    total = statistics.sum_of_squares(X)

    def moved(relative: float) -> own.Array:
        other = X.copy()
        other[0] = np.sqrt(X[0] ** 2 + relative * total)
        return other

    bound = tolerances.positive_sum(count)
    refuses(
        lambda times: compare.relatively_close(
            "q", statistics.sum_of_squares(moved(times * bound)), total, bound
        )
    )
    for bound in (tolerances.root_of_positive_sum(count), tolerances.scaled_norms(count)):
        refuses(
            lambda times, bound=bound: compare.relatively_close(
                "q", statistics.feature_norms(moved(2 * times * bound)), np.sqrt(total), bound
            )
        )


@pytest.mark.refuses("channel_importance", "group_importance", "half")
@few
@given(ffn=own.channels(), eps=epsilons, aggregation=own.aggregations)
def test_weights_that_are_off_change_scores_past_their_bound(
    ffn: own.Channels, eps: float, aggregation: importance.Aggregation
) -> None:
    assume(ffn.up.any() and ffn.x_ffn.any())
    terms = ffn.down.shape[0]
    scores = importance.weight_importance(ffn.up, ffn.x_ffn)
    assume(scores.any())
    Phi = importance.channel_importance(scores, 1, aggregation)
    bound = tolerances.channel_importance(scores.shape[1], eps)
    refuses(
        lambda times: compare.relatively_close(
            "q",
            importance.channel_importance(scores * (1 + times * bound), 1, aggregation),
            Phi,
            bound,
        )
    )

    def group(factor: float) -> own.Array:
        matrices = (ffn.up * factor, ffn.gate * factor, ffn.down * factor)
        return importance.group_importance(*matrices, ffn.x_ffn, ffn.x_down, aggregation)

    C = group(1.0)
    for relative in (
        tolerances.group_importance(terms, eps),
        # Where the naive error is 0, or a rounding of bf16.
        tolerances.half(0.0, tolerances.group_importance(terms, EPS32)),
        tolerances.half(2.0**-8, tolerances.group_importance(terms, EPS32)),
    ):
        refuses(
            lambda times, relative=relative: compare.relatively_close(
                "q", group(1 + times * relative), C, relative
            )
        )


@pytest.mark.refuses("weighted_error")
@few
@given(problem=own.problems(("positive", "outlier")), eps=epsilons, seed=own.seeds)
def test_a_scale_that_is_off_changes_the_error_past_its_bound(
    problem: own.Problem, eps: float, seed: int
) -> None:
    W = problem.W
    assume(W.any())
    near = W * np.random.default_rng(seed).uniform(-1, 0.5, W.shape)
    bound = tolerances.weighted_error(W.size, eps)
    error = lowrank.weighted_error(W, near, problem.scale)
    refuses(
        lambda times: compare.relatively_close(
            "q",
            lowrank.weighted_error(W, near, problem.scale * (1 + times * bound / 2)),
            error,
            bound,
        )
    )


@pytest.mark.refuses("squared_singular_values")
@few
@given(A=own.spectral_matrices(), at=st.integers(0, 23))
def test_squared_singular_values(A: own.Array, at: int) -> None:
    S = np.linalg.svd(A if A.any() else A + 1, compute_uv=False)
    bound = tolerances.square_of_singular_values(S, A.shape)
    place = np.eye(S.size)[at % S.size]
    accepts_and_refuses(
        lambda times: compare.squared_singular_values(
            "q", np.sqrt(S**2 + times * bound * place), S, A.shape
        )
    )


def refit_problem(data: st.DataObject) -> tuple[own.Array, own.Array]:
    """Draw a weight without zeros, and the second moment of inputs that excite every feature."""
    m, n = data.draw(st.tuples(own.sides(), own.sides(2)), label="shape")
    rng = np.random.default_rng(data.draw(own.seeds, label="seed"))
    X = rng.standard_normal((3 * n, n))
    return rng.uniform(1, 2, (m, n)), X.T @ X


@pytest.mark.refuses("ridged_correlation")
@few
@given(data=st.data())
def test_correlations_that_are_off_are_past_their_bound(data: st.DataObject) -> None:
    _, C = refit_problem(data)
    K = regression.ridged_correlation(C, 1e-4)[1]
    bound = tolerances.ridged_correlation(K)
    refuses(lambda times: compare.close("q", K + times * bound, K, bound))


@pytest.mark.refuses("inverse_correlation")
@few
@given(data=st.data(), ridge=st.sampled_from((1e-4, 1.0)))
def test_a_preconditioner_of_correlations_that_are_off_is_past_the_bound(
    data: st.DataObject, ridge: float
) -> None:
    _, C = refit_problem(data)
    d, K = tolerances.correlation_of(C, ridge)
    unit = np.outer(*[np.where(d > 0, d, 1.0)] * 2)
    expected, bound = refinement.preconditioner(C, ridge), tolerances.inverse_correlation(K)
    relative = bound / float(np.linalg.norm(expected * unit))
    # A moment that is off by a factor gives the inverse off by its inverse.
    refuses(
        lambda times: compare.within(
            "q",
            np.linalg.norm(
                (refinement.preconditioner(C / (1 + times * relative), ridge) - expected) * unit
            ),
            bound,
        )
    )


@pytest.mark.refuses("least_squares_update", "regressed_weight")
@few
@given(data=st.data(), ridge=st.sampled_from((1e-4, 1.0)))
def test_a_weight_that_is_off_is_refitted_past_the_bounds(
    data: st.DataObject, ridge: float
) -> None:
    W, C = refit_problem(data)
    d, kept = np.sqrt(np.diag(C)), np.arange(1, W.shape[1])
    M = C + 0.1 * np.abs(C)
    for of, norms, bound in (
        (
            lambda W: regression.least_squares_update(W, C, kept, ridge),
            d[kept],
            tolerances.least_squares_update(W, C, kept, ridge),
        ),
        (
            lambda W: regression.regressed_weight(W, C, M, 0.5, ridge),
            d,
            tolerances.regressed_weight(W, C, M, 0.5, ridge),
        ),
    ):
        # Both are linear in the weight.
        expected = of(W)
        relative = bound / float(np.linalg.norm(expected * norms))
        refuses(
            lambda times, of=of, norms=norms, bound=bound, expected=expected, by=relative: (
                compare.within(
                    "q", np.linalg.norm((of(W * (1 + times * by)) - expected) * norms), bound
                )
            )
        )


@pytest.mark.refuses("removal_cost")
@few
@given(data=st.data())
def test_a_weight_that_is_off_changes_the_costs_of_removals_past_their_bound(
    data: st.DataObject,
) -> None:
    W, C = refit_problem(data)
    count = W.shape[1]
    losses = regression.removal_order(W, C, count, 1.0)[1]
    d, K = tolerances.correlation_of(C, 1.0)
    inverse = 1 / float(np.linalg.eigvalsh(K)[0])
    bound = tolerances.removal_cost(W * d, K, inverse, float(np.sum(losses)))
    # Costs are squares in the weight.
    relative = bound / float(np.max(losses))
    refuses(
        lambda times: compare.close(
            "q",
            regression.removal_order(W * np.sqrt(1 + times * relative), C, count, 1.0)[1],
            losses,
            bound,
        )
    )


@pytest.mark.refuses("removals")
def test_a_dearer_removal_is_refused() -> None:
    W, C = np.array([[1.0, 2.0, 3.0]]), np.eye(3)
    assert compare.removals("q", np.array([0, 1, 2]), W, C, 1e-4)
    for order in ([1, 0, 2], [0, 2], [2]):
        with pytest.raises(AssertionError, match="where the bound is"):
            compare.removals("q", np.array(order), W, C, 1e-4)


@pytest.mark.refuses("updated")
@few
@given(sides=st.tuples(own.sides(), own.sides(), own.sides()), eps=epsilons, seed=own.seeds)
def test_an_update_that_is_off_changes_the_output_past_its_bound(
    sides: tuple[int, int, int], eps: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    m, r, n = sides
    # Of one sign, where the sum of the magnitudes is the output itself.
    W, A, B = (rng.uniform(1, 2, shape) for shape in ((m, n), (m, r), (r, n)))
    bound = tolerances.updated(W, 2 * A @ B, 0, r, eps)
    merged = lora.merge_dense(W, A, B, 2.0)
    relative = float(np.min(bound / (2 * A @ B)))
    refuses(
        lambda times: compare.close(
            "q", lora.merge_dense(W, A * (1 + times * relative), B, 2.0), merged, bound
        )
    )


@pytest.mark.refuses("low_rank_apply")
@few
@given(sides=st.tuples(own.sides(), own.sides(), own.sides()), eps=epsilons, seed=own.seeds)
def test_an_input_that_is_off_changes_the_output_past_its_bound(
    sides: tuple[int, int, int], eps: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    m, r, n = sides
    # Of one sign, where the sum of the magnitudes is the output itself.
    L, R, X = (rng.uniform(1, 2, shape) for shape in ((m, r), (r, n), (1, n)))
    bound = tolerances.low_rank_apply(L, R, X, eps)
    y = lowrank.low_rank_apply(L, R, X)
    relative = float(np.min(bound / y))
    refuses(
        lambda times: compare.close(
            "q", lowrank.low_rank_apply(L, R, X * (1 + times * relative)), y, bound
        )
    )


def cut_problem(data: st.DataObject) -> tuple[own.Array, own.Array, int]:
    """Draw a matrix with gaps between its singular values, weights, and a rank that cuts some."""
    shape = data.draw(st.tuples(own.sides(2), own.sides(2)), label="shape")
    kind = data.draw(st.sampled_from(("linear", "geometric")), label="kind")
    W = own.from_spectrum(shape, kind, data.draw(own.scales), data.draw(own.seeds))
    scale = own.norm_vector(shape[1], "positive", 1.0, data.draw(own.seeds))
    return W, scale, data.draw(st.integers(1, min(shape) - 1), label="r")


def turned(A: own.Array, r: int, angle: float) -> own.Array:
    """Return the rotation that turns the last kept left singular vector to the first cut one."""
    U, _, _ = np.linalg.svd(A, full_matrices=False)
    u, v = U[:, r - 1], U[:, r]
    plane = np.outer(u, u) + np.outer(v, v)
    turn = np.outer(v, u) - np.outer(u, v)
    return np.eye(len(A)) + (np.cos(angle) - 1) * plane + np.sin(angle) * turn


@pytest.mark.refuses("svd_product", "awsvd_product")
@few
@given(data=st.data(), eps=epsilons)
def test_a_weight_that_is_turned_changes_the_product_past_its_bound(
    data: st.DataObject, eps: float
) -> None:
    W, scale, r = cut_problem(data)

    def plain(W: own.Array) -> own.Array:
        L, R, _ = lowrank.svd_low_rank(W, r)
        return L @ R

    def weighted(W: own.Array) -> own.Array:
        L, R, _ = lowrank.awsvd(W, scale, r)
        return L @ R

    S = np.linalg.svd(W, compute_uv=False)
    for A, product, bound in (
        (W, plain, tolerances.svd_product(S, r, W.shape, eps)),
        (W * scale, weighted, tolerances.awsvd_product(W, scale, r, eps)),
    ):
        if bound is None:
            continue
        # The last kept direction moves by the angle times what it holds of the weight.
        held = np.linalg.svd(A, full_matrices=False)[0][:, r - 1] @ W
        angle = bound / float(np.linalg.norm(held))
        if PAST * angle < 0.1:
            refuses(
                lambda times, A=A, product=product, bound=bound, angle=angle: compare.spectral(
                    "q", product(turned(A, r, times * angle) @ W), product(W), bound
                ),
                1.01 * PAST,
            )


@pytest.mark.refuses("tail_root", "rival")
@few
@given(data=st.data(), eps=epsilons)
def test_a_tail_that_is_off_is_past_its_bound(data: st.DataObject, eps: float) -> None:
    W, scale, r = cut_problem(data)
    A = W * scale
    U, S, V = np.linalg.svd(A, full_matrices=False)
    tail = float(np.linalg.norm(S[r:]))
    bound = tolerances.tail_root(S, A.shape, eps)
    relative = bound / tail
    # Otherwise what is cut off changes places with what is kept.
    assume((1 + 1.01 * PAST * relative) * S[r] < S[r - 1])

    def root(times: float) -> float:
        moved = A + times * relative * (U[:, r:] * S[r:]) @ V[r:]
        L, R, _ = lowrank.awsvd(moved / scale, scale, r)
        return float(np.sqrt(lowrank.weighted_error(moved / scale, L @ R, scale)))

    refuses(lambda times: compare.close("q", root(times), tail, bound))

    # Another product may not have a smaller error than one that is off by as much.
    L, R, _ = lowrank.awsvd(W, scale, r)
    least = float(np.sqrt(lowrank.weighted_error(W, L @ R, scale)))
    room = tolerances.tail_root(S, A.shape, EPS64) + tolerances.rival(L, R, scale, least)

    def above(times: float) -> float:
        """The error of factors that miss the leading direction by a little."""
        missing = np.sqrt((least + times * room) ** 2 - least**2)
        other = L @ R - missing * np.outer(U[:, 0], V[0]) / scale
        return float(np.sqrt(lowrank.weighted_error(W, other, scale))) - least

    refuses(lambda times: compare.within("q", max(0.0, above(times)), room))


@pytest.mark.refuses("orthonormality", "full_rank", "full_column_rank", "stored")
@few
@given(data=st.data(), eps=st.sampled_from((EPS32, 2.0**-7, 2.0**-10)))
def test_factors_that_are_off_are_past_their_bounds(data: st.DataObject, eps: float) -> None:
    W, scale, _ = cut_problem(data)
    L, R, _ = lowrank.awsvd(W, scale, min(W.shape))
    shape = (W.shape[0], W.shape[1])
    one = np.eye(L.shape[1])
    bound = tolerances.orthonormality(shape, EPS64)
    refuses(
        lambda times: compare.spectral(
            "q", (L * (1 + times * bound / 2)).T @ L * (1 + times * bound / 2), one, bound
        )
    )
    size = tolerances.spectral_norm(W)
    bounds = [tolerances.full_rank(W, EPS64)] if shape[0] <= shape[1] else []
    for bound in [*bounds, tolerances.full_column_rank(W, scale, EPS64)]:
        refuses(
            lambda times, bound=bound: compare.spectral(
                "q", L @ R, W * (1 + times * bound / size), bound
            )
        )
    # Of one sign, where the norm of the magnitudes is that of the product.
    L, R = np.abs(L), np.abs(R)
    bound = tolerances.stored(L, R, eps)
    refuses(
        lambda times: compare.within(
            "q",
            np.linalg.norm((L * (1 + times * tolerances.SECOND_ORDER * eps)) @ R - L @ R),
            bound,
        )
    )


@pytest.mark.refuses("retained_energy")
@few
@given(size=st.integers(1, 20))
def test_singular_values_that_are_off_change_the_energy_past_its_bound(size: int) -> None:
    """Half of the energy before the cut: a relative change of it counts for half."""
    S = np.ones(2 * size)
    bound = tolerances.retained_energy(S.size)

    def energy(times: float) -> float:
        return lowrank.retained_energy(
            np.where(np.arange(S.size) < size, 1 + 2 * times * bound, 1.0), size
        )

    refuses(lambda times: compare.close("q", energy(times), 0.5, bound))


@pytest.mark.refuses("share", "band")
@few
@given(exponent=st.integers(3, 12), data=st.data())
def test_a_ratio_that_is_off_gives_ranks_and_bands_past_the_slack(
    exponent: int, data: st.DataObject
) -> None:
    """Just below a whole number by a few slips: a ratio that is off by as much passes it."""
    half = 2 ** (exponent - 1)
    k = data.draw(st.integers(half // 2, half - 1), label="k")
    square = dict.fromkeys("qkvo", (2 * half, 2 * half))
    slip = tolerances.share(Fraction(half))

    def over(times: float) -> float:
        """What a matrix holds above its share of the budget, in ranks."""
        due = k - Fraction(2) * slip
        s = float(1 - (due + Fraction(times) * slip) / half)
        rank = budget.ranks(square, s, 1, False)["q"]
        assert rank is not None
        return float(max(Fraction(0), rank - due))

    refuses(lambda times: compare.within("q", over(times), float(slip)))

    d_m = 2 * half
    slip = tolerances.band(Fraction(1, 2) * d_m + k)

    def wide(times: float) -> float:
        """What is removed above the share, in channels."""
        due = d_m // 2 + k - Fraction(2) * slip
        s = float((due + Fraction(times) * slip) / d_m)
        _, high = budget.removed_band(d_m, s, 0.0)
        return float(max(Fraction(0), high - due))

    refuses(lambda times: compare.within("q", wide(times), float(slip)))


@pytest.mark.refuses("inner", "output_moment")
@few
@given(sides=st.tuples(own.sides(), own.sides(), own.sides()), seed=own.seeds)
def test_moments_that_are_off_are_past_their_bounds(sides: tuple[int, int, int], seed: int) -> None:
    """Of one sign, where the sum of the magnitudes is the sum itself."""
    rng = np.random.default_rng(seed)
    n, d_in, d_out = sides
    X, W = rng.uniform(1, 2, (n, d_in)), rng.uniform(1, 2, (d_out, d_in))
    C = statistics.second_moment(X)
    relative = max(tolerances.positive_sum(n), EPS64)
    refuses(
        lambda times: compare.close(
            "q",
            statistics.second_moment(X * (1 + times * relative / 2)),
            C,
            tolerances.inner(n, X.T @ X),
        ),
        PAST + 1,
    )
    bound = tolerances.output_moment(W, C)
    M = pca.output_moment(W, C)
    relative = float(np.max(bound / M))
    refuses(
        lambda times: compare.close("q", pca.output_moment(W, C * (1 + times * relative)), M, bound)
    )


@pytest.mark.refuses("quotient", "magnitude_scale", "scaled_magnitudes")
@few
@given(count=st.integers(1, 200), alpha=st.sampled_from((0.25, 0.5, 1.0, 2.0)), seed=own.seeds)
def test_magnitudes_that_are_off_change_means_and_scales_past_their_bounds(
    count: int, alpha: float, seed: int
) -> None:
    total = np.random.default_rng(seed).uniform(1, 2, 5)
    bound = tolerances.quotient()
    # A rounding each to make the total and the quotient.
    refuses(
        lambda times: compare.relatively_close(
            "q",
            statistics.token_mean(total * (1 + times * bound), count),
            statistics.token_mean(total, count),
            bound,
        ),
        PAST + 1,
    )
    for bound in (
        tolerances.magnitude_scale(alpha),
        tolerances.scaled_magnitudes(count, alpha),
    ):
        refuses(
            lambda times, bound=bound: compare.relatively_close(
                "q",
                lowrank.magnitude_scale(total * (1 + times * bound / alpha), count, alpha),
                lowrank.magnitude_scale(total, count, alpha),
                bound,
            ),
            PAST + 1,
        )


@pytest.mark.refuses("taylor_importance")
@few
@given(problem=own.problems(("positive",)), eps=epsilons, seed=own.seeds)
def test_a_gradient_that_is_off_changes_scores_past_their_bound(
    problem: own.Problem, eps: float, seed: int
) -> None:
    W = problem.W
    assume(W.any())
    G = np.random.default_rng(seed).uniform(1, 2, W.shape)
    scores = importance.taylor_importance(W, G)
    bound = tolerances.taylor_importance(W, scores, eps)
    change = np.where(W == 0, 0, np.maximum(bound, EPS64 * scores)) / np.where(W == 0, 1, np.abs(W))
    refuses(
        lambda times: compare.close(
            "q", importance.taylor_importance(W, G + times * change), scores, bound
        )
    )


@pytest.mark.refuses("head_scores")
@few
@given(mha=own.heads(), aggregation=own.aggregations)
def test_weights_that_are_off_change_the_scores_of_heads_past_their_bound(
    mha: own.Heads, aggregation: importance.Aggregation
) -> None:
    scores = tuple(map(np.abs, mha.matrices))
    assume(any(W.any() for W in scores))
    bound = tolerances.head_scores(max(W.size for W in scores) // mha.kv_heads)

    def of(factor: float) -> own.Array:
        return heads.head_scores(*(W * factor for W in scores), mha.kv_heads, aggregation)

    refuses(lambda times: compare.relatively_close("q", of(1 + times * bound), of(1.0), bound))


def regular(data: st.DataObject) -> own.OutputProblem:
    """Draw a problem in which every gap between singular values is wide, and no input is small."""
    shape = data.draw(st.tuples(own.sides(2), own.sides(2)), label="shape")
    rng = np.random.default_rng(data.draw(own.seeds))
    features = shape[1]
    # Orthogonal tokens of three sizes, moved from the origin.
    Q = own.orthonormal(4 * features, features, rng) * rng.uniform(1, 2, features)
    W = own.from_spectrum(shape, "linear", 1.0, data.draw(own.seeds))
    rank = data.draw(st.integers(1, min(shape) - 1), label="r")
    return own.OutputProblem(W, Q + rng.uniform(0.5, 1, features), rank)


@pytest.mark.refuses(
    "centred_moment", "centred_moment_of", "scaled_centred_moment", "moved_tokens", "through"
)
@few
@given(data=st.data())
def test_a_moment_that_is_off_changes_the_centred_one_past_its_bound(data: st.DataObject) -> None:
    problem = regular(data)
    X, C, t, n = problem.X, problem.C, problem.t, problem.n
    C_c = statistics.centred_moment(C, t, n)
    for bound in (
        tolerances.centred_moment(C, statistics.token_mean(t, n), n),
        tolerances.centred_moment_of(X),
        tolerances.scaled_centred_moment(X),
        # What a move adds on its own is less than the rounding of the moments.
        tolerances.moved_tokens(X, X + 100),
    ):
        refuses(
            lambda times, bound=bound: compare.close(
                "q", statistics.centred_moment(C + times * bound, t, n), C_c, bound
            )
        )
    W = np.abs(problem.W) + 0.1
    delta = 1e-9 * np.abs(C)
    refuses(
        lambda times: compare.spectral(
            "q",
            pca.output_moment(W, C + times * delta),
            pca.output_moment(W, C),
            tolerances.through(W, delta),
        )
    )


@pytest.mark.refuses("contract")
@given(first=st.floats(1.5, 1e3), last=st.floats(0, 1))
def test_a_direction_that_is_turned_loses_more_than_the_contract_allows(
    first: float, last: float
) -> None:
    A = np.diag([first, last])
    bound = tolerances.contract(last**2, float(np.linalg.norm(A)), (2, 2))

    def excess(times: float) -> float:
        """What the first axis loses, turned towards the second."""
        sine = np.sqrt(times * bound / (first**2 - last**2))
        u = np.array([np.sqrt(1 - sine**2), sine])
        return max(float(np.linalg.norm(A - np.outer(u, u @ A)) ** 2) - last**2, 0.0)

    refuses(lambda times: compare.within("q", excess(times), bound))


@pytest.mark.refuses("eigenvalues", "square_of_singular_values")
@few
@given(data=st.data())
def test_a_moment_that_is_off_changes_eigenvalues_past_their_bounds(data: st.DataObject) -> None:
    problem = regular(data)
    W, C = problem.W, problem.C
    S = pca.pca(W, C, problem.rank)[2]
    for bound in (
        tolerances.eigenvalues(W, C),
        tolerances.square_of_singular_values(S, (W.shape[0], W.shape[1])),
    ):
        relative = bound / float(S[0] ** 2)
        refuses(
            lambda times, bound=bound, relative=relative: compare.close(
                "q", pca.pca(W, C * (1 + times * relative), problem.rank)[2] ** 2, S**2, bound
            )
        )


@pytest.mark.refuses("pca_product", "whitened_product")
@few
@given(data=st.data())
def test_a_weight_that_is_turned_changes_the_product_by_outputs_past_its_bound(
    data: st.DataObject,
) -> None:
    problem = regular(data)
    W, C, r = problem.W, problem.C, problem.rank
    G = np.linalg.cholesky(C)

    def projected(W: own.Array) -> own.Array:
        L, R, _ = pca.pca(W, C, r)
        return L @ R

    def whitened(W: own.Array) -> own.Array:
        L, R = pca.whitened(W, C, r)
        return L @ R @ G

    floor = pca.rounding_floor(W, C, max(W.shape))
    for seen, product, bound in (
        (W, projected, tolerances.pca_product(W, C, r, floor)),
        (W @ G, whitened, tolerances.whitened_product(W, C, G, pca.whitened(W, C, r)[1], r)),
    ):
        if bound is None:
            continue
        held = np.linalg.svd(W @ G, full_matrices=False)[0][:, r - 1] @ seen
        angle = bound / float(np.linalg.norm(held))
        refuses(
            lambda times, product=product, bound=bound, angle=angle: compare.spectral(
                "q", product(turned(W @ G, r, times * angle) @ W), product(W), bound
            ),
            1.01 * PAST,
        )


@pytest.mark.refuses("output_error", "rounded_product", "least_error", "rival_output_error")
@few
@given(data=st.data(), eps=epsilons)
def test_weights_that_are_off_change_output_errors_past_their_bounds(
    data: st.DataObject, eps: float
) -> None:
    problem = regular(data)
    W, C, r = problem.W, problem.C, problem.rank
    L, R, S = pca.pca(W, C, r)
    G = np.linalg.cholesky(C)
    error = pca.output_error(W, L @ R, C)
    floor = pca.rounding_floor(W, C, max(W.shape))

    bound = tolerances.output_error(W, L @ R, C)
    relative = bound / error / 2
    refuses(
        lambda times: compare.close(
            "q", pca.output_error(W + times * relative * (W - L @ R), L @ R, C), error, bound
        )
    )

    # Another tail: the sum of the eigenvalues that are cut off moves by as much as the error.
    U, sigma, V = np.linalg.svd(W @ G, full_matrices=False)
    bound = tolerances.least_error(W, C, L, R, floor, error, eps)
    whole = float(np.sum(S[r:] ** 2))

    def least(times: float) -> float:
        factor = np.sqrt(1 + times * bound / whole) - 1
        moved = W + factor * np.linalg.solve(G.T, ((U[:, r:] * sigma[r:]) @ V[r:]).T).T
        A, B, _ = pca.pca(moved, C, r)
        return pca.output_error(moved, A @ B, C)

    if PAST * bound / whole < 0.1 and (sigma[r] / sigma[r - 1]) ** 2 < 0.8:
        refuses(lambda times: compare.close("q", least(times), whole, bound))

    # A product of another rank than its factors' may not be better by more than rounding.
    room = tolerances.rival_output_error(W, L, R, C, error)
    relative = room / error / 2
    refuses(
        lambda times: compare.within(
            "q",
            max(0.0, error - pca.output_error(W - times * relative * (W - L @ R), L @ R, C)),
            room,
        )
    )

    # Of one sign, and with features that go together, the root of the error is the bound's norm.
    A, B, d = np.abs(L) + 0.1, np.abs(R) + 0.1, np.sqrt(np.diag(C))
    bound = tolerances.rounded_product(A, B, np.outer(d, d), eps)
    relative = bound / float(np.linalg.norm(A @ B @ d))

    def root(times: float) -> float:
        moved = A * (1 + times * relative)
        return float(np.sqrt(pca.output_error(moved @ B, A @ B, np.outer(d, d))))

    refuses(lambda times: compare.within("q", root(times), bound))


@pytest.mark.refuses("afm_bias")
@few
@given(data=st.data(), eps=epsilons)
def test_tokens_that_are_moved_change_the_bias_past_its_bound(
    data: st.DataObject, eps: float
) -> None:
    """All by the same, which turns no direction of the outputs."""
    problem = regular(data)
    W, X, t, n, r = problem.W, problem.X, problem.t, problem.n, problem.rank
    mu, C_c = statistics.token_mean(t, n), statistics.centred_moment(problem.C, t, n)
    delta = tolerances.through(W, tolerances.centred_moment(problem.C, mu, n))
    floor = pca.rounding_floor(W, problem.C, max(*W.shape, n))
    product = tolerances.pca_product(W, C_c, r, floor, delta)
    assume(product is not None)
    assert product is not None

    def bias(times: float) -> own.Array:
        Y = X + times * relative * mu
        moments = statistics.second_moment(Y), statistics.token_sum(Y)
        return pca.afm(W, *moments, n, r)[3]

    relative = 0.0
    expected = bias(0.0)
    bound = tolerances.afm_bias(W, pca.afm(W, problem.C, t, n, r)[0], mu, product, eps)
    relative = float(np.min(bound / np.abs(expected)))
    # Where it is larger the moments of the tokens moved are known less well.
    assume(relative < 1e-3)
    refuses(lambda times: compare.close("q", bias(times), expected, bound))


@pytest.mark.refuses("central_difference")
@few
@given(at=st.floats(-1, 1), step=st.floats(1e-4, 1e-2), spread=st.floats(0, 1e-15))
def test_a_slope_elsewhere_is_past_the_bound_of_a_central_difference(
    at: float, step: float, spread: float
) -> None:
    """The exponential, whose slope at x is its value there."""

    def difference(step: float) -> float:
        return float(np.exp(at + step) - np.exp(at - step)) / (2 * step)

    near = difference(step)
    bound = tolerances.central_difference(near, difference(2 * step), step, spread)
    refuses(lambda times: compare.close("q", np.exp(at) * (1 + times * bound / near), near, bound))


@pytest.mark.refuses("cosine_sum")
@few
@given(count=st.integers(1, 100), features=own.sides(2), seed=own.seeds)
def test_a_token_that_is_turned_changes_the_cosines_past_their_bound(
    count: int, features: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((count, features))
    aside = np.zeros(features)
    aside[:2] = -X[0, 1], X[0, 0]
    bound = tolerances.cosine_sum(count, features)

    def turned_by(cosine: float) -> own.Array:
        Y = X.copy()
        sine = float(np.sqrt(1 - cosine**2))
        scale = float(np.linalg.norm(X[0]) / np.linalg.norm(aside))
        Y[0] = cosine * X[0] + sine * scale * aside
        return Y

    refuses(
        lambda times: compare.close(
            "q", mgaa.cosine_sum(X, turned_by(1 - times * bound)), count, bound
        )
    )


@pytest.mark.refuses("divergence_sum")
@few
@given(count=st.integers(1, 20), vocabulary=st.integers(2, 50), seed=own.seeds)
def test_a_divergence_that_is_off_is_past_its_bound(count: int, vocabulary: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    Z, Z_hat = rng.standard_normal((2, count, vocabulary))
    bound = tolerances.divergence_sum(count, vocabulary, float(np.max(np.abs([Z, Z_hat]))))
    found = marginal.divergence_sum(Z, Z_hat)
    refuses(lambda times: compare.close("q", found + times * bound, found, bound))


@pytest.mark.refuses("standard_scores")
@few
@given(similarities=own.similarities())
def test_a_similarity_that_is_off_changes_standard_scores_past_their_bound(
    similarities: list[float],
) -> None:
    assume(len(similarities) > 3)
    z = np.array(mgaa.standard_scores(similarities))
    deviation = float(np.std(similarities))
    assume(z.any())
    bound = tolerances.standard_scores(z, deviation)
    # The one nearest to the mean: it hardly moves the deviation, and the mean by a fourth at most.
    at = int(np.argmin(np.abs(z)))
    assume(abs(z[at]) < 0.5)
    step = 2 * deviation * bound[at]

    def of(times: float) -> list[float]:
        moved = list(similarities)
        moved[at] += times * step
        return mgaa.standard_scores(moved)

    refuses(lambda times: compare.close("q", of(times), z, bound))


@pytest.mark.refuses("highest_ratio", "ratios", "rank_floor")
@few
@given(target=st.floats(0.1, 0.9), exponent=st.integers(4, 12), data=st.data())
def test_a_target_that_is_off_changes_ratios_and_floors_past_their_bounds(
    target: float, exponent: int, data: st.DataObject
) -> None:
    bound = tolerances.highest_ratio()
    # Half of what the target is off by.
    refuses(
        lambda times: compare.close(
            "q",
            mgaa.highest_ratio(target + 2 * times * bound, 0.5),
            mgaa.highest_ratio(target, 0.5),
            bound,
        )
    )

    sizes, z, wanted = [4096, 1024], [1.0, -1.0], 0.05
    bound = tolerances.ratios(sum(sizes), wanted + target)

    def removed(times: float) -> float:
        shares = mgaa.sublayer_ratios(
            z, sizes, target + times * bound / sum(sizes), wanted, [1.0, 1.0]
        )
        return float(sum(n * Fraction(p) for n, p in zip(sizes, shares, strict=True)))

    refuses(
        lambda times: compare.close(
            "q", removed(times), float(sum(sizes) * Fraction(target)), bound
        )
    )

    # Just below a whole number by a few slips, as for the budget.
    half = 2**exponent
    k = data.draw(st.integers(half // 4, half // 2), label="k")
    slip = tolerances.rank_floor(Fraction(k))

    def over(times: float) -> float:
        due = k - Fraction(2) * slip
        floor = float((due + Fraction(times) * slip) / half)
        whole = 4 * half * half
        floors = mgaa.rank_floors({"q": (2 * half, 2 * half)}, whole, floor)
        return float(max(Fraction(0), floors["q"] - due))

    refuses(lambda times: compare.within("q", over(times), float(slip)))


@few
@given(model=own.small_llamas(), seed=own.seeds)
def test_an_input_of_a_layer_that_is_off_is_past_the_bounds_of_the_forward(
    model: own.SmallLlama, seed: int
) -> None:
    assume(model.hidden > 2)
    weights = llama.layer_weights(model.weights(), 0)
    h = llama.embed(model.weights(), own.calibration_ids(model, 2, 6))
    spread = 1e-9 * np.abs(h)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), h.shape)
    known = rounding.Known(h, spread)
    spreads = rounding.layer_spreads(rounding.Layer(weights, model.shape), known)
    one = llama.layer_forward(weights, model.shape, h)
    for name in ("attention", "o", "ffn", "down", "output"):

        def check(times: float, name: str = name) -> None:
            moved = h + times * CONFIDENCE * spread * signs
            two = llama.layer_forward(weights, model.shape, moved)
            llamas.close("q", getattr(two, name), getattr(one, name), getattr(spreads, name))

        # Errors that go together can cancel where features are few, those of two under the norm
        # altogether: 0.3 of the bound was seen.
        refuses(check, 10.0)


@pytest.mark.refuses("measured_condition")
@few
@given(model=own.small_llamas(), seed=own.seeds)
def test_embeddings_that_are_off_change_logits_past_their_bound(
    model: own.SmallLlama, seed: int
) -> None:
    weights, shape = model.weights(), model.shape
    ids = own.calibration_ids(model, 2, 6)
    name = "model.embed_tokens.weight"
    noise = np.random.default_rng(seed).standard_normal(weights[name].shape)

    def logits(size: float) -> own.Array:
        return llama.logits({**weights, name: weights[name] * (1 + size * noise)}, shape, ids)

    expected, nudge = logits(0.0), 1e-9
    magnified = float(np.max(np.abs(logits(nudge) - expected))) / nudge
    terms = 1_000_000  # so that the roundings of the two forwards are far below the bound
    bound = tolerances.measured_condition(magnified, shape.layers, terms)
    size = bound / magnified
    refuses(lambda times: compare.close("q", logits(times * size), expected, bound))


@few
@given(X=own.tokens().filter(lambda X: X.any()), size=st.floats(1e-9, 1e-6))
def test_tokens_that_are_off_are_past_the_bound_of_their_norms(X: own.Array, size: float) -> None:
    bound = rounding.norm_bounds(X, size * np.abs(X))
    norms = np.linalg.norm(X, axis=0)
    refuses(
        lambda times: compare.close(
            "q", np.linalg.norm(X * (1 + times * CONFIDENCE * size), axis=0), norms, bound
        )
    )


@few
@given(problem=own.problems(("positive", "equal")))
def test_errors_of_norms_past_their_bounds_are_past_the_weighted_bound(
    problem: own.Problem,
) -> None:
    W, moved = problem.W, problem.scale
    assume(W.any())
    bound = rounding.weighted_bound(W, moved)
    # The bound adds the largest row to the largest column, the norm is at least the larger of both.
    refuses(lambda times: compare.within("q", np.linalg.norm(W * moved * times, 2), bound))


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
