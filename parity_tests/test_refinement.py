"""The descent of refinement: its preconditioner, its steps, and where it leads."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from lorap.ops import refinement as ours
from lorap_reference import refinement as reference
from parity_tests import compare, tolerances
from parity_tests import strategies as own
from parity_tests.test_regression import Removal, removals
from parity_tests.tolerances import EPS64

Values = Mapping[str, own.Array]

DRAWN = 4
"""Nudged descents that tell how much one magnifies."""


@pytest.mark.spec("refine.preconditioner", "precision.decomposition")
@given(problem=removals())
def test_preconditioner(problem: Removal) -> None:
    C = own.pair(problem.C)
    mine = compare.as_array(ours.preconditioner(C.tensor, problem.ridge))
    theirs = reference.preconditioner(C.array, problem.ridge)
    assert C.unchanged()
    d, K = tolerances.correlation_of(C.array, problem.ridge)
    unit = np.outer(*[np.where(d > 0, d, 1.0)] * 2)
    compare.within(
        "preconditioner",
        np.linalg.norm((mine - theirs) * unit),
        tolerances.inverse_correlation(K),
    )
    for P in (mine, theirs):
        dead = np.flatnonzero(d == 0)
        assert np.allclose(P[dead][:, dead], np.eye(len(dead)) / (1 + problem.ridge), rtol=1e-15)
        assert not P[dead][:, d > 0].any()


@pytest.mark.spec("refine.step")
@given(
    loss=st.floats(0, 1e6),
    slope=st.floats(-1e6, -1e-6),
    trial=st.floats(1e-6, 10),
    found=st.one_of(st.floats(0, 1e7), st.sampled_from((math.inf, math.nan))),
)
@example(loss=4.0, slope=-4.0, trial=1.0, found=1.0)  # (2 - t)^2: the minimum is at 2
@example(loss=1.0, slope=-2.0, trial=1.0, found=-1.0)  # a line: no minimum
@example(loss=1.0, slope=-1.0, trial=0.5, found=math.nan)
@example(loss=8.0, slope=-4.0, trial=0.5, found=6.5)  # the minimum is at 1, two trials off
@example(loss=64.0, slope=-16.0, trial=0.5, found=56.25)  # at 8: too far
def test_step_length(loss: float, slope: float, trial: float, found: float) -> None:
    mine = ours.step_length(loss, slope, trial, found)
    assert mine == reference.step_length(loss, slope, trial, found)
    assert 0 < mine <= 4 * trial
    if not math.isfinite(found):
        assert mine == trial / 4
    elif found > loss:
        # Beyond the trial the parabola only rises.
        assert mine < trial


@dataclass(frozen=True)
class Descent:
    """Outputs ``A tanh(B X)`` to bring near to ``Y``: two weights and tokens in rows."""

    A: own.Array
    B: own.Array
    X: own.Array
    Y: own.Array
    ridge: float

    @property
    def values(self) -> dict[str, own.Array]:
        """The weights by name."""
        return {"A": self.A, "B": self.B}

    @property
    def preconditioners(self) -> dict[str, own.Array]:
        """Of both, by what they are applied to."""
        inputs = {"A": np.tanh(self.X @ self.B.T), "B": self.X}
        return {n: reference.preconditioner(Z.T @ Z, self.ridge) for n, Z in inputs.items()}

    def gradients(self, values: Values) -> tuple[float, dict[str, own.Array]]:
        """The loss and its gradients."""
        Z = np.tanh(self.X @ values["B"].T)
        missed = Z @ values["A"].T - self.Y
        dZ = 2 * missed @ values["A"] * (1 - Z**2)
        return float(np.sum(missed**2)), {"A": 2 * missed.T @ Z, "B": dZ.T @ self.X}


@st.composite
def descents(draw: st.DrawFn) -> Descent:
    """Draw a problem whose features differ in size; one in four has nothing to gain."""
    rng = np.random.default_rng(draw(own.seeds))
    tokens, d_in, between, d_out = (draw(st.integers(1, 8)) for _ in range(4))
    sizes = 10 ** rng.uniform(-2, 2, d_in)
    X = rng.standard_normal((tokens + 2, d_in)) * sizes
    A, B = rng.standard_normal((d_out, between)), rng.standard_normal((between, d_in)) / sizes
    Y = rng.standard_normal((tokens + 2, d_out))
    if draw(st.integers(0, 3)) == 0:
        Y = np.tanh(X @ B.T) @ A.T
    return Descent(A, B, X, Y, draw(st.sampled_from((1e-4, 1e-2, 1.0))))


Gradients = Callable[[Values], tuple[float, dict[str, own.Array]]]


def both(
    start: Values, gradients: Gradients, P: Values, iterations: int
) -> tuple[ours.Descent, reference.Descent]:
    """Return what the two sides make of a problem."""

    def in_torch(values: Mapping[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
        loss, found = gradients({name: value.numpy() for name, value in values.items()})
        return loss, {name: torch.from_numpy(value) for name, value in found.items()}

    mine = ours.conjugate_gradients(
        {name: torch.from_numpy(value.copy()) for name, value in start.items()},
        lambda values: in_torch(values)[0],
        in_torch,
        lambda found: {n: g @ torch.from_numpy(P[n]) for n, g in found.items()},
        iterations,
    )
    return mine, reference.conjugate_gradients(
        start, lambda values: gradients(values)[0], gradients, P, iterations
    )


@pytest.mark.spec("refine.direction", "refine.step")
@given(problem=descents(), iterations=st.integers(0, 6))
def test_conjugate_gradients(problem: Descent, iterations: int) -> None:
    P = problem.preconditioners
    mine, theirs = both(problem.values, problem.gradients, P, iterations)
    for side in (mine, theirs):
        assert all(b <= a for a, b in pairwise(side.losses))
        values = {name: compare.as_array(value) for name, value in side.values.items()}
        assert problem.gradients(values)[0] == side.losses[-1]
    # How much the descent magnifies roundings is measured on the reference: of what it is given,
    # and of what the loss and its gradients are computed to.
    nudge, rng = 1e-11, np.random.default_rng(0)

    def off(M: own.Array) -> own.Array:
        return M * (1 + nudge * rng.standard_normal(M.shape))

    def gradients(values: Values) -> tuple[float, dict[str, own.Array]]:
        loss, found = problem.gradients({name: off(value) for name, value in values.items()})
        return float(off(np.array(loss))), {name: off(value) for name, value in found.items()}

    others = [
        reference.conjugate_gradients(
            problem.values,
            lambda values: gradients(values)[0],
            gradients,
            {name: off(value) for name, value in P.items()},
            iterations,
        )
        for _ in range(DRAWN)
    ]
    if len({len(side.losses) for side in (mine, theirs, *others)}) > 1:
        event("ends at rounding")
        assert min(mine.losses[-1], theirs.losses[-1]) <= 1e-20 * theirs.losses[0]
        return
    terms = max(*problem.X.shape, *problem.Y.shape, problem.A.size)
    a, b = np.array(theirs.losses), np.array(mine.losses)
    spread = np.max([np.abs(np.array(other.losses) - a) for other in others], axis=0)
    if np.max(spread) > 1e-4 * a[0]:
        event("not determined")
        return
    bound = [
        tolerances.measured_condition(s / nudge, 1, terms) for s in np.maximum.accumulate(spread)
    ]
    compare.close("losses of a descent", b, a, np.array(bound) + EPS64 * terms * a[0])


@pytest.mark.spec("refine.direction", "refine.step")
@given(problem=own.output_problems(), seed=own.seeds)
def test_a_single_matrix_is_solved_at_once(problem: own.OutputProblem, seed: int) -> None:
    """Least squares with hardly a ridge: the preconditioned gradient points at the minimum.

    The first iteration goes four trials far, which is half of the way.
    """
    X = problem.X
    if min(X.shape) == 0 or not X.any(axis=0).all():
        return
    if np.linalg.cond(X / np.linalg.norm(X, axis=0)) > 100:
        return
    rng = np.random.default_rng(seed)
    Y = X @ problem.W.T + rng.standard_normal((len(X), len(problem.W)))

    def gradients(values: Values) -> tuple[float, dict[str, own.Array]]:
        missed = X @ values["W"].T - Y
        return float(np.sum(missed**2)), {"W": 2 * missed.T @ X}

    P = {"W": reference.preconditioner(X.T @ X, 1e-6)}
    least = gradients({"W": np.linalg.lstsq(X, Y, rcond=None)[0].T})[0]
    rounding = 1e-12 * float(np.sum(Y**2) + np.sum((X @ problem.W.T) ** 2))
    for side in both({"W": problem.W}, gradients, P, 2):
        first, last = side.losses[0], side.losses[-1]
        assert last <= least + 1e-4 * (first - least) + rounding


def scripted(
    script: Sequence[tuple[float, Sequence[float]]], iterations: int, at_trials: float = 0.0
) -> list[tuple[list[float], list[float]]]:
    """Return the losses and the ends of both sides' descents from 0, without a preconditioner.

    Losses and gradients are those of the script, wherever they are asked for. With a loss of 0 at
    the trials each step is four trials long, the first one 1/4.
    """
    size = len(script[0][1])
    one, two = iter(script), iter(script)

    def in_torch(_: Mapping[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
        loss, gradient = next(one)
        return loss, {"w": torch.tensor([gradient], dtype=torch.float64)}

    def in_numpy(_: Values) -> tuple[float, dict[str, own.Array]]:
        loss, gradient = next(two)
        return loss, {"w": np.array([gradient])}

    start = torch.zeros(1, size, dtype=torch.float64)
    mine = ours.conjugate_gradients({"w": start}, lambda _: at_trials, in_torch, dict, iterations)
    theirs = reference.conjugate_gradients(
        {"w": np.zeros((1, size))}, lambda _: at_trials, in_numpy, {"w": np.eye(size)}, iterations
    )
    assert not start.any()
    return [(side.losses, side.values["w"][0].tolist()) for side in (mine, theirs)]


@pytest.mark.spec("refine.direction", "refine.step")
def test_a_descent_by_hand() -> None:
    """Uphill directions give way, what rises is not taken, and trials follow the steps.

    The steps are 1/4, 1, 4 and 4 long. The second and the third direction, -4 and 4.5, would lead
    uphill; the third step fails.
    """
    script = [(10.0, [1.0]), (9.0, [-2.0]), (8.0, [3.0]), (9.0, [5.0]), (7.0, [0.0])]
    for losses, end in scripted(script, 9):
        assert losses == [10.0, 9.0, 8.0, 8.0, 7.0]
        assert end == [-1 / 4 + 2 - 12]


@pytest.mark.spec("refine.direction")
@pytest.mark.parametrize(
    ("gradient", "direction"),
    [
        # (-1/2, -1/2) has a slope of 0: it does not lead downhill.
        ([-0.5, 0.5], [0.5, -0.5]),
        # (0, -1/2) + (-1, 0) / 4, with a slope of -1/4, does.
        ([0.0, 0.5], [-0.25, -0.5]),
    ],
)
def test_only_what_leads_downhill_is_a_direction(
    gradient: list[float], direction: list[float]
) -> None:
    """The steps are 1/4 along (-1, 0), and 1."""
    for _, end in scripted([(3.0, [1.0, 0.0]), (2.0, gradient), (1.0, [0.0, 0.0])], 2):
        assert end == [direction[0] - 1 / 4, direction[1]]


@pytest.mark.spec("refine.step")
def test_a_step_to_an_equal_loss_is_not_taken() -> None:
    """The first step fails, and the second one, from where that began, is as long."""
    for losses, end in scripted([(1.0, [1.0]), (1.0, [1.0]), (0.0, [1.0])], 2):
        assert losses == [1.0, 1.0, 0.0]
        assert end == [-1 / 4]


@pytest.mark.spec("refine.step")
def test_a_descent_that_is_stuck_goes_on_to_the_end() -> None:
    """Each trial is an eighth of the one before, so that at last its square is 0, and it too."""
    for losses, end in scripted([(1.0, [1.0])] * 501, 500, at_trials=1.0):
        assert losses == [1.0] * 501
        assert end == [0.0]


@pytest.mark.spec("refine.direction")
def test_inner_products_are_summed_in_float64() -> None:
    """Over all weights; arrays of the audit round what is done with them, a float does not."""
    a, b = [[1.0, 2.0**-30]], [[1.0, 1.0]]
    for found in (
        ours._inner(
            {"v": torch.ones(2, 1), "w": torch.tensor(a)},
            {"v": torch.ones(2, 1), "w": torch.tensor(b)},
        ),
        reference._inner(
            {"v": np.ones((2, 1)), "w": np.array(a)}, {"v": np.ones((2, 1)), "w": np.array(b)}
        ),
    ):
        assert type(found) is float
        assert found == 3 + 2.0**-30
