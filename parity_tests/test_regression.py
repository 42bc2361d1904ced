"""Least-squares updates of what reads the channels that stay, and channels removed one by one."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from lorap.ops import regression as ours
from lorap.ops import statistics
from lorap_reference import regression as reference
from lorap_reference import statistics as reference_statistics
from parity_tests import compare, tolerances
from parity_tests import strategies as own
from parity_tests.tolerances import EPS32, EPS64

dtypes = st.sampled_from(((torch.float64, EPS64), (torch.float32, EPS32)))
Dtype = tuple[torch.dtype, float]
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)


@dataclass(frozen=True)
class Removal:
    """A weight ``W`` (d_out, d_in), inputs ``X`` (tokens, d_in), and how many columns go."""

    W: own.Array
    X: own.Array
    count: int
    ridge: float

    @property
    def C(self) -> own.Array:  # noqa: N802 - the letter of SPEC.md
        """Second moment of the inputs."""
        return self.X.T @ self.X


@st.composite
def removals(draw: st.DrawFn) -> Removal:
    """Draw a weight, inputs, a ridge, and from no column to all of them."""
    problem = draw(own.output_problems())
    count = draw(st.integers(0, problem.W.shape[1]), label="count")
    return Removal(problem.W, problem.X, count, draw(st.sampled_from(RIDGES), label="ridge"))


@pytest.mark.spec("update.ridge")
@given(problem=removals())
def test_ridged_correlation(problem: Removal) -> None:
    C = own.pair(problem.C)
    d, K = ours.ridged_correlation(C.tensor, problem.ridge)
    d_ref, K_ref = reference.ridged_correlation(C.array, problem.ridge)
    assert C.unchanged()
    assert d.dtype == K.dtype == torch.float64
    compare.close("norms by the moment", d, d_ref, tolerances.root() * d_ref)
    compare.close("correlations", K, K_ref, tolerances.ridged_correlation(K_ref))
    if len(K_ref):
        assert np.linalg.eigvalsh(K_ref)[0] > problem.ridge / 2


@pytest.mark.spec("update.solution", "precision.decomposition")
@given(problem=removals(), layout=own.layouts, dtype=dtypes, seed=own.seeds)
def test_least_squares_update(
    problem: Removal, layout: own.Layout, dtype: Dtype, seed: int
) -> None:
    W, C = own.pair(problem.W, layout, dtype[0]), own.pair(problem.C)
    features = W.array.shape[1]
    chosen = np.random.default_rng(seed).permutation(features)[problem.count :]
    kept = np.sort(chosen).astype(np.int64)
    mine = ours.least_squares_update(W.tensor, C.tensor, torch.from_numpy(kept), problem.ridge)
    theirs = reference.least_squares_update(W.array, C.array, kept, problem.ridge)
    assert W.unchanged()
    assert C.unchanged()
    assert mine.dtype == dtype[0]
    if problem.count == 0:
        compare.exact("update of nothing", mine, W.array)
        assert np.array_equal(theirs, W.array)
        return
    d = np.sqrt(np.diag(C.array))[kept]
    compare.exact("update of dead columns", mine[:, d == 0], W.array[:, kept][:, d == 0])
    bound = tolerances.least_squares_update(W.array, C.array, kept, problem.ridge)
    if dtype[1] != EPS64:
        bound += dtype[1] * float(np.linalg.norm(theirs * d))
    deviation = np.linalg.norm((compare.as_array(mine) - theirs) * d)
    compare.within("least-squares update", deviation, bound)


@pytest.mark.spec("obs.order", "obs.ties", "precision.decomposition")
@given(problem=removals(), layout=own.layouts, dtype=dtypes, block=st.sampled_from((1, 2, 3, 128)))
def test_removal_order(problem: Removal, layout: own.Layout, dtype: Dtype, block: int) -> None:
    W, C = own.pair(problem.W, layout, dtype[0]), own.pair(problem.C)
    mine, losses = ours.removal_order(W.tensor, C.tensor, problem.count, problem.ridge, block)
    theirs, expected = reference.removal_order(W.array, C.array, problem.count, problem.ridge)
    assert W.unchanged()
    assert C.unchanged()
    assert mine.dtype == torch.int64
    assert theirs.dtype == np.int64
    assert losses.dtype == torch.float64
    assert len(set(mine.tolist())) == problem.count
    arguments = (W.array, C.array, problem.ridge)
    clear = compare.removals("removals", mine.numpy(), *arguments)
    clear &= compare.removals("removals of the reference", theirs, *arguments)
    event("determined" if clear else "not determined")
    if clear:
        compare.exact("removals that are determined", mine, theirs)
    d, K = tolerances.correlation_of(C.array, problem.ridge)
    if problem.count and np.array_equal(mine.numpy(), theirs):
        inverse = 1 / float(np.linalg.eigvalsh(K)[0])
        bound = tolerances.removal_cost(W.array * d, K, inverse, float(np.sum(expected)))
        compare.close("costs of removals", losses, expected, bound)


@pytest.mark.spec("obs.ties")
@given(size=st.integers(1, 60), count=st.integers(0, 60), seed=own.seeds)
def test_equal_costs_go_by_index(size: int, count: int, seed: int) -> None:
    """Weights of 0 and dead features cost nothing on either side, exactly."""
    rng = np.random.default_rng(seed)
    W = rng.integers(0, 2, (1, size)).astype(np.float64)
    C = np.diag(rng.integers(0, 2, size).astype(np.float64))
    count = min(count, size)
    mine, losses = ours.removal_order(torch.from_numpy(W), torch.from_numpy(C), count, 1.0, 4)
    theirs, expected = reference.removal_order(W, C, count, 1.0)
    compare.exact("removals of equal costs", mine, theirs)
    compare.relatively_close("equal costs", losses, expected, tolerances.positive_sum(4))
    costs = W[0] * np.diag(C)
    assert theirs.tolist() == sorted(range(size), key=lambda j: (costs[j], j))[:count]


@pytest.mark.spec("target.regression", "precision.decomposition")
@given(
    problem=removals(),
    layout=own.layouts,
    dtype=dtypes,
    share=st.sampled_from((0.0, 0.3, 1.0)),
    seed=own.seeds,
)
def test_regressed_weight(
    problem: Removal, layout: own.Layout, dtype: Dtype, share: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    W, C = own.pair(problem.W, layout, dtype[0]), own.pair(problem.C)
    others = problem.X * rng.uniform(0.5, 1.5, problem.X.shape)
    M = own.pair(others.T @ problem.X)
    arguments = (share, problem.ridge)
    mine = ours.regressed_weight(W.tensor, C.tensor, M.tensor, *arguments)
    theirs = reference.regressed_weight(W.array, C.array, M.array, *arguments)
    assert all(pair.unchanged() for pair in (W, C, M))
    assert mine.dtype == dtype[0]
    d = np.sqrt(np.diag(C.array))
    if share == 0:
        compare.exact("regression without a share", mine, W.array)
    compare.exact("regression of dead columns", mine[:, d == 0], W.array[:, d == 0])
    bound = tolerances.regressed_weight(W.array, C.array, M.array, *arguments)
    if dtype[1] != EPS64:
        bound += dtype[1] * float(np.linalg.norm(theirs * d))
    deviation = np.linalg.norm((compare.as_array(mine) - theirs) * d)
    compare.within("regressed weight", deviation, bound)


@pytest.mark.spec("stats.cross-moment", "stats.padding", "precision.statistics")
@given(problem=removals(), layout=own.layouts, dtype=dtypes, masked=st.booleans(), seed=own.seeds)
def test_cross_moment(
    problem: Removal, layout: own.Layout, dtype: Dtype, masked: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    Y = rng.standard_normal((len(problem.X), int(rng.integers(1, 6))))
    pairs = own.pair(problem.X, layout, dtype[0]), own.pair(Y, layout, dtype[0])
    mask = rng.random(len(Y)) < 0.5 if masked else np.ones(len(Y), dtype=bool)
    mine = statistics.cross_moment(
        pairs[0].tensor, pairs[1].tensor, torch.from_numpy(mask) if masked else None
    )
    X, Y = (pair.array[mask] for pair in pairs)
    assert all(pair.unchanged() for pair in pairs)
    bound = tolerances.inner(len(X), np.abs(X).T @ np.abs(Y))
    compare.close("cross moment", mine, reference_statistics.cross_moment(X, Y), bound)
