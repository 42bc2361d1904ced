"""Laws that follow from the equations, whatever the numbers; each side obeys them on its own."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from parity_tests import compare, tolerances
from parity_tests import strategies as own
from parity_tests.tolerances import EPS64

Ranks = dict[str, int | None]
Shapes = Mapping[str, own.Shape]

INVERTIBLE = ("positive", "equal", "outlier")


class Side:
    """One of the two implementations, called with arrays and answering with arrays."""

    def __init__(self, name: str, package: str, make: Callable[[own.Array], Any]) -> None:
        self.name, self.package, self.make = name, package, make

    def __str__(self) -> str:
        return self.name

    def __call__(self, function: str, *arguments: Any) -> Any:
        module, name = function.split(".")
        implementation = getattr(importlib.import_module(f"{self.package}.{module}"), name)
        answer = implementation(*map(self.made, arguments))
        return tuple(map(plain, answer)) if isinstance(answer, tuple) else plain(answer)

    def made(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return [self.made(part) for part in argument]
        if isinstance(argument, dict):
            return {key: self.made(value) for key, value in argument.items()}
        return self.make(argument) if isinstance(argument, np.ndarray) else argument

    def norms(self, X: own.Array) -> own.Array:
        """Eq. (5): the reference takes the tokens, the torch side their sums of squares."""
        given = X if self.name == "reference" else self("statistics.sum_of_squares", X)
        return np.asarray(self("statistics.feature_norms", given))

    def moments(self, X: own.Array) -> tuple[own.Array, own.Array, int]:
        """Return C, t and n, what PCA and AFM know of the inputs."""
        return self("statistics.second_moment", X), self("statistics.token_sum", X), X.shape[0]

    def root_of_error(self, W: own.Array, W_hat: own.Array, scale: own.Array) -> float:
        return float(np.sqrt(self("lowrank.weighted_error", W, W_hat, scale)))


def read_only(array: own.Array) -> own.Array:
    view = array.view()
    view.flags.writeable = False
    return view


def plain(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


both_sides = pytest.mark.parametrize(
    "side",
    [
        Side("reference", "lorap_reference", read_only),
        Side("ours", "lorap.ops", torch.tensor),
    ],
    ids=str,
)

factors = st.one_of(
    st.integers(-20, 20).map(lambda exponent: 2.0**exponent), st.floats(1e-6, 1e6), own.scales
)
"""Positive factors of all activations; a power of two changes no digit."""


CORRELATED = own.OutputProblem(
    np.diag([1.0, 1.0, 1.2]), np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.1], [0.0, 0.0, 1.1]]), 1
)
"""The third feature has the largest norm times its weight, the first two the largest direction."""


def activations(x: own.Array, seed: int) -> own.Array:
    """Return tokens, one to twenty, whose features have about the sizes `x`."""
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((int(rng.integers(1, 21)), x.size)) * x)


# Statistics


@pytest.mark.spec("stats.sum-of-squares", "stats.norm")
@both_sides
@given(X=own.tokens(), data=st.data(), seed=own.seeds)
def test_batches_in_any_order_give_the_statistics_of_the_whole(
    side: Side, X: own.Array, data: st.DataObject, seed: int
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, X.shape[0]), max_size=3), label="cuts"))
    shuffled = np.random.default_rng(seed).permutation(X)
    parts = [shuffled[a:b] for a, b in pairwise([0, *cuts, X.shape[0]])]
    total = np.zeros(X.shape[1])
    for part in parts:
        total += side("statistics.sum_of_squares", part)
    terms = X.shape[0] + len(parts)
    compare.relatively_close(
        f"sum of squares of the batches ({side})",
        total,
        side("statistics.sum_of_squares", X),
        tolerances.positive_sum(terms),
    )
    compare.relatively_close(
        f"norms of the batches ({side})",
        np.sqrt(total),
        side.norms(X),
        tolerances.root_of_positive_sum(terms),
    )


@pytest.mark.spec("stats.magnitudes", "stats.sum", "stats.second-moment")
@both_sides
@given(X=own.tokens(), data=st.data(), seed=own.seeds)
def test_batches_in_any_order_give_the_moments_of_the_whole(
    side: Side, X: own.Array, data: st.DataObject, seed: int
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, X.shape[0]), max_size=3), label="cuts"))
    shuffled = np.random.default_rng(seed).permutation(X)
    parts = [shuffled[a:b] for a, b in pairwise([0, *cuts, X.shape[0]])]
    for name in ("sum_of_magnitudes", "token_sum", "second_moment"):
        function = f"statistics.{name}"
        total = sum(side(function, part) for part in parts)
        magnitude = side(function, np.abs(X))
        bound = tolerances.inner(X.shape[0] + len(parts), magnitude)
        compare.close(f"{name} of the batches ({side})", total, side(function, X), bound)
        assert np.all(np.abs(side(function, X)) <= magnitude + bound)


@pytest.mark.spec("stats.second-moment", "stats.sum-of-squares", "stats.centred-moment")
@both_sides
@given(X=own.tokens())
def test_moments_have_the_sums_of_squares_on_their_diagonal(side: Side, X: own.Array) -> None:
    C, t, n = side.moments(X)
    compare.relatively_close(
        f"diagonal of the second moment ({side})",
        np.diag(C),
        side("statistics.sum_of_squares", X),
        tolerances.positive_sum(n),
    )
    compare.close(
        f"second moment, transposed ({side})", C, C.T, tolerances.inner(n, np.abs(X).T @ np.abs(X))
    )
    C_c = side("statistics.centred_moment", C, t, n)
    # To move all tokens by a vector changes no moment about the mean.
    shifted = X + np.max(np.abs(X), initial=0.0)
    compare.close(
        f"moment about the mean, tokens moved ({side})",
        side("statistics.centred_moment", *side.moments(shifted)),
        C_c,
        tolerances.centred_moment_of(X)
        + tolerances.centred_moment_of(shifted)
        + tolerances.moved_tokens(X, shifted),
    )


@pytest.mark.spec("stats.scale", "awsvd.product")
@both_sides
@given(problem=own.problems(), c=factors, seed=own.seeds)
def test_a_common_factor_of_the_activations_changes_no_product(
    side: Side, problem: own.Problem, c: float, seed: int
) -> None:
    W, r, X = problem.W, problem.rank, activations(problem.scale, seed)
    x, x_c = side.norms(X), side.norms(c * X)
    rounded = tolerances.scaled_norms(X.shape[0])
    compare.relatively_close(f"norms of c X ({side})", x_c, c * x, rounded)
    L, R, S = side("lowrank.awsvd", W, x, r)
    L_c, R_c, S_c = side("lowrank.awsvd", W, x_c, r)
    delta = rounded * float(np.linalg.norm(W * x))
    compare.squared_singular_values(
        f"singular values of W D, D times c ({side})", S_c / c, S, W.shape, delta
    )
    bound = tolerances.awsvd_product(W, x, r, EPS64, delta) if W.size else 0.0
    event("compared" if bound is not None else "no gap")
    if bound is not None:
        compare.spectral(f"AWSVD product, D times c ({side})", L_c @ R_c, L @ R, bound)


@pytest.mark.spec("stats.scale", "importance.group", "prune.keep")
@both_sides
@given(ffn=own.channels(), c=factors, aggregation=own.aggregations, s=own.ratios, seed=own.seeds)
def test_a_common_factor_of_the_activations_changes_no_ranking(
    side: Side, ffn: own.Channels, c: float, aggregation: str, s: float, seed: int
) -> None:
    X_ffn, X_down = activations(ffn.x_ffn, seed), activations(ffn.x_down, seed + 1)

    def scores(factor: float) -> own.Array:
        norms = (side.norms(factor * X_ffn), side.norms(factor * X_down))
        matrices = (ffn.up, ffn.gate, ffn.down)
        return np.asarray(side("importance.group_importance", *matrices, *norms, aggregation))

    C, C_c = scores(1.0), scores(c)
    low, high = side("budget.removed_band", C.size, s, 0.1)
    kept, kept_c = (side("pruning.kept_channels", values, low, high) for values in (C, C_c))
    if np.frexp(c)[0] == 0.5:
        event("a power of two")
        compare.exact(f"scores, activations times a power of two ({side})", C_c, c * C)
        compare.exact(f"kept channels, activations times a power of two ({side})", kept_c, kept)
        return
    event("another factor")
    tokens = max(X_ffn.shape[0], X_down.shape[0])
    relative = tolerances.group_importance(ffn.down.shape[0], EPS64) + tolerances.scaled_norms(
        tokens
    )
    compare.relatively_close(f"scores, activations times c ({side})", C_c / c, C, relative)
    error = relative * C
    ranking = np.argsort(C_c, kind="stable")
    lowest, highest = (C - error)[ranking], (C + error)[ranking]
    assert np.all(np.maximum.accumulate(lowest) <= highest), "the ranking changes"
    compare.kept_channels(
        f"kept channels, activations times c ({side})", kept_c, kept, C, error, (low, high)
    )


# Importance


@pytest.mark.spec("importance.weight", "importance.channel", "importance.group")
@both_sides
@given(ffn=own.channels(), aggregation=own.aggregations, seed=own.seeds)
def test_importance_follows_a_permutation_of_channels_inputs_and_outputs(
    side: Side, ffn: own.Channels, aggregation: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    d_m, d = ffn.up.shape
    channel, feature, output = rng.permutation(d_m), rng.permutation(d), rng.permutation(d)
    compare.exact(
        f"weight importance, permuted ({side})",
        side("importance.weight_importance", ffn.up[channel][:, feature], ffn.x_ffn[feature]),
        side("importance.weight_importance", ffn.up, ffn.x_ffn)[channel][:, feature],
    )
    C = side(
        "importance.group_importance",
        *(ffn.up, ffn.gate, ffn.down, ffn.x_ffn, ffn.x_down),
        aggregation,
    )
    permuted = side(
        "importance.group_importance",
        ffn.up[channel][:, feature],
        ffn.gate[channel][:, feature],
        ffn.down[output][:, channel],
        ffn.x_ffn[feature],
        ffn.x_down[channel],
        aggregation,
    )
    bound = tolerances.group_importance(d, EPS64)
    compare.relatively_close(f"group importance, permuted ({side})", permuted, C[channel], bound)


@pytest.mark.spec("importance.group")
@both_sides
@given(ffn=own.channels(), aggregation=own.aggregations)
def test_group_scores_are_the_sum_of_those_of_the_matrices(
    side: Side, ffn: own.Channels, aggregation: str
) -> None:
    """Eq. (10): each matrix counts as if it stood alone, the others zero."""
    matrices, norms = (ffn.up, ffn.gate, ffn.down), (ffn.x_ffn, ffn.x_down)
    total = np.zeros(ffn.up.shape[0])
    for m in range(3):
        alone = (W if i == m else np.zeros_like(W) for i, W in enumerate(matrices))
        total += side("importance.group_importance", *alone, *norms, aggregation)
    compare.relatively_close(
        f"group importance, matrix by matrix ({side})",
        side("importance.group_importance", *matrices, *norms, aggregation),
        total,
        tolerances.group_importance(ffn.down.shape[0], EPS64),
    )


@pytest.mark.spec("importance.weight", "importance.channel", "importance.group")
@both_sides
@given(ffn=own.channels(), aggregation=own.aggregations, seed=own.seeds)
def test_scores_are_not_negative_and_grow_with_the_magnitude_of_the_weights(
    side: Side, ffn: own.Channels, aggregation: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)

    def larger(W: own.Array) -> own.Array:
        grown = rng.choice((1.0, 1.0, 1.5, 10.0), W.shape)
        return np.asarray(W * grown * rng.choice((-1.0, 1.0), W.shape))

    norms = (ffn.x_ffn, ffn.x_down)
    matrices = (ffn.up, ffn.gate, ffn.down)
    C = side("importance.group_importance", *matrices, *norms, aggregation)
    assert np.all(C >= 0)
    grown = side("importance.group_importance", *map(larger, matrices), *norms, aggregation)
    compare.within(
        f"fall of a score as the weights grow ({side})",
        np.maximum(C - grown, 0),
        tolerances.group_importance(ffn.down.shape[0], EPS64) * C,
    )


@pytest.mark.spec("importance.group-scores", "heads.scores")
@both_sides
@given(ffn=own.channels(), mha=own.heads(), aggregation=own.aggregations)
def test_scores_of_groups_are_the_sum_of_those_of_the_matrices(
    side: Side, ffn: own.Channels, mha: own.Heads, aggregation: str
) -> None:
    """Eq. (10), whatever scores the weights: each matrix counts as if it stood alone."""
    for function, matrices, more, bound in (
        (
            "importance.group_scores",
            (ffn.up, ffn.gate, ffn.down),
            (),
            tolerances.group_importance(ffn.down.shape[0], EPS64),
        ),
        (
            "heads.head_scores",
            mha.matrices,
            (mha.kv_heads,),
            tolerances.head_scores(mha.q.size // mha.kv_heads),
        ),
    ):
        scores = tuple(map(np.abs, matrices))
        total = sum(
            side(
                function,
                *(W if i == m else np.zeros_like(W) for i, W in enumerate(scores)),
                *more,
                aggregation,
            )
            for m in range(len(scores))
        )
        whole = side(function, *scores, *more, aggregation)
        compare.relatively_close(f"{function}, matrix by matrix ({side})", whole, total, bound)


@pytest.mark.spec("importance.group-scores", "importance.channel", "prune.keep")
@both_sides
@given(ffn=own.channels(), s=own.ratios)
def test_the_mean_of_eq_2_selects_what_l1_selects(side: Side, ffn: own.Channels, s: float) -> None:
    """All channels of an FFN have d weights in each matrix: the mean is l1 over d."""
    scores, d = tuple(map(np.abs, (ffn.up, ffn.gate, ffn.down))), ffn.down.shape[0]
    l1, mean = (side("importance.group_scores", *scores, norm) for norm in ("l1", "mean"))
    band = side("budget.removed_band", l1.size, s, 0.1)
    kept_l1, kept_mean = (side("pruning.kept_channels", C, *band) for C in (l1, mean))
    if np.frexp(d)[0] == 0.5:
        event("d a power of two")
        compare.exact(f"scores by mean, times d ({side})", mean * d, l1)
        compare.exact(f"kept channels by mean and l1 ({side})", kept_mean, kept_l1)
        return
    event("another d")
    relative = tolerances.group_importance(d, EPS64) + EPS64
    compare.relatively_close(f"scores by mean, times d ({side})", mean * d, l1, relative)
    compare.kept_channels(
        f"kept channels by mean and l1 ({side})", kept_mean, kept_l1, l1, relative * l1, band
    )


powers_of_two = st.integers(-20, 20).map(lambda exponent: 2.0**exponent)


def gradients_like(matrices: tuple[own.Array, ...], seed: int) -> list[own.Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(W.shape) for W in matrices]


@pytest.mark.spec("importance.magnitude", "importance.taylor", "prune.keep")
@both_sides
@given(
    ffn=own.channels(), mha=own.heads(), c=powers_of_two, s=own.ratios, seed=own.seeds,
    aggregation=own.aggregations,
)  # fmt: skip
def test_the_scale_of_weights_and_of_the_loss_changes_no_selection(
    side: Side,
    ffn: own.Channels,
    mha: own.Heads,
    c: float,
    s: float,
    seed: int,
    aggregation: str,
) -> None:
    """All weights times c, or all gradients (the loss times c): the scores are times c."""
    for function, matrices, more in (
        ("importance.group_scores", (ffn.up, ffn.gate, ffn.down), ()),
        ("heads.head_scores", mha.matrices, (mha.kv_heads,)),
    ):
        G = gradients_like(matrices, seed)

        def kept(scores: list[own.Array], expected: own.Array | None) -> tuple[Any, Any]:
            C = side(function, *scores, *more, aggregation)  # noqa: B023 - called at once
            if expected is not None:
                compare.exact(f"scores of groups, times a power of two ({side})", C, expected)
            band = side("budget.removed_band", C.size, s, 0.1)
            return C, side("pruning.kept_channels", C, *band)

        C, stay = kept([side("importance.magnitude_importance", W) for W in matrices], None)
        _, again = kept([side("importance.magnitude_importance", c * W) for W in matrices], c * C)
        assert again.tolist() == stay.tolist()

        pairs = list(zip(matrices, G, strict=True))
        C, stay = kept([side("importance.taylor_importance", W, g) for W, g in pairs], None)
        for scaled in ([(c * W, g) for W, g in pairs], [(W, c * g) for W, g in pairs]):
            _, again = kept([side("importance.taylor_importance", *pair) for pair in scaled], c * C)
            assert again.tolist() == stay.tolist()


@pytest.mark.spec("importance.magnitude", "importance.taylor")
@both_sides
@given(W=own.matrices(), c=powers_of_two, seed=own.seeds)
def test_taylor_scores_know_no_unit_of_a_weight_and_no_sign(
    side: Side, W: own.Array, c: float, seed: int
) -> None:
    """A weight counted in other units, ``c W``, has the gradient ``G / c``: the same score.

    A magnitude does depend on the unit. Neither sees a sign, of the weight or of the gradient.
    """
    (G,) = gradients_like((W,), seed)
    flips = np.random.default_rng(seed + 1).choice((-1.0, 1.0), W.shape)
    scores = side("importance.taylor_importance", W, G)
    assert np.all(scores >= 0)
    for other in ((c * W, G / c), (flips * W, G), (W, flips * G)):
        compare.exact(
            f"Taylor importance, other units and signs ({side})",
            side("importance.taylor_importance", *other),
            scores,
        )
    compare.exact(
        f"magnitude importance, other signs ({side})",
        side("importance.magnitude_importance", flips * W),
        side("importance.magnitude_importance", W),
    )


# Low rank


def rivals(problem: own.Problem, L: own.Array, R: own.Array, seed: int) -> Iterator[Any]:
    """Yield pairs of factors of the same rank: at random, and near ``L R``.

    The best ``B`` for a given ``A`` is ``A^+ W``, whatever D is: the columns do not meet.
    """
    rng = np.random.default_rng(seed)
    (m, n), r = problem.W.shape, problem.rank
    A = rng.standard_normal((m, r))
    yield A, rng.standard_normal((r, n)) * np.max(np.abs(problem.W), initial=0.0)
    yield A, np.linalg.pinv(A) @ problem.W
    for step in 10.0 ** rng.uniform(-10, 0, 2):
        near = L + step * rng.standard_normal((m, r))
        yield near, np.linalg.pinv(near) @ problem.W
        yield L, R * (1 + step * rng.standard_normal((r, n)))


@pytest.mark.spec("awsvd.product", "awsvd.objective")
@both_sides
@given(problem=own.problems(), seed=own.seeds)
@example(problem=own.Problem(np.diag([2.0, 1.0]), np.array([1.0, 4.0]), 1), seed=0)
@example(
    problem=own.Problem(
        own.from_spectrum((12, 6), "condition_1e12", 1.0, 111),
        own.norm_vector(6, "dead", 1.0, 111),
        3,
    ),
    seed=0,
)
@example(
    problem=own.Problem(
        own.from_spectrum((16, 23), "geometric", 1.0, 41), own.norm_vector(23, "dead", 1.0, 41), 12
    ),
    seed=0,
)
def test_no_product_of_the_same_rank_has_a_smaller_error(
    side: Side, problem: own.Problem, seed: int
) -> None:
    W, scale, r = problem.W, problem.scale, problem.rank
    L, R, S = side("lowrank.awsvd", W, scale, r)
    least = side.root_of_error(W, L @ R, scale)
    room = tolerances.tail_root(S, W.shape, EPS64)
    compare.close(f"least error, from the tail ({side})", least, np.linalg.norm(S[r:]), room)
    for A, B in [*rivals(problem, L, R, seed), side("lowrank.svd_low_rank", W, r)[:2]]:
        error = side.root_of_error(W, A @ B, scale)
        compare.within(
            f"least error above that of another product ({side})",
            max(0.0, least - error),
            room + tolerances.rival(A, B, scale, error),
        )


@pytest.mark.spec("awsvd.product", "awsvd.energy")
@both_sides
@given(problem=own.problems())
def test_the_error_falls_and_the_retained_energy_rises_with_the_rank(
    side: Side, problem: own.Problem
) -> None:
    W, scale = problem.W, problem.scale
    errors, energies = [], []
    for r in range(min(W.shape) + 1):
        L, R, S = side("lowrank.awsvd", W, scale, r)
        errors.append(side.root_of_error(W, L @ R, scale))
        energies.append(side("lowrank.retained_energy", S, r))
    # Each error is within the bound of its tail, and the tails fall.
    compare.within(
        f"rise of the error with the rank ({side})",
        np.maximum(np.diff(errors), 0),
        2 * tolerances.tail_root(S, W.shape, EPS64),
    )
    compare.within(
        f"fall of the retained energy with the rank ({side})",
        np.maximum(-np.diff(energies), 0),
        tolerances.retained_energy(S.size),
    )
    assert energies[0] == (0 if np.any(S) else 1)
    assert energies[-1] == 1


@pytest.mark.spec("awsvd.product", "awsvd.dead", "awsvd.deficient")
@both_sides
@given(problem=st.one_of(own.problems(), own.problems(INVERTIBLE)))
def test_full_rank_gives_the_weight_back(side: Side, problem: own.Problem) -> None:
    W, scale = problem.W, problem.scale
    L, R, S = side("lowrank.awsvd", W, scale, min(W.shape))
    if W.shape[0] <= W.shape[1]:
        event("full row rank")
        bound = tolerances.full_rank(W, EPS64)
    elif np.all(scale > 0):
        event("full column rank")
        bound = tolerances.full_column_rank(W, scale, EPS64) if W.size else 0.0
    else:
        # More outputs than inputs, and dead features: the live columns alone are given back.
        event("live columns alone")
        error = side.root_of_error(W, L @ R, scale)
        bound = tolerances.tail_root(S, W.shape, EPS64)
        compare.within(f"W D at full rank ({side})", error, bound)
        return
    compare.spectral(f"W at full rank ({side})", L @ R, W, bound)


@pytest.mark.spec("awsvd.product", "awsvd.dead", "awsvd.deficient")
@both_sides
@given(problem=own.problems(), seed=own.seeds)
def test_the_product_follows_a_permutation_of_inputs_and_outputs(
    side: Side, problem: own.Problem, seed: int
) -> None:
    W, scale, r = problem.W, problem.scale, problem.rank
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(W.shape[0]), rng.permutation(W.shape[1])
    L, R, S = side("lowrank.awsvd", W, scale, r)
    L_p, R_p, S_p = side("lowrank.awsvd", W[rows][:, columns], scale[columns], r)
    compare.squared_singular_values(f"singular values of W D, permuted ({side})", S_p, S, W.shape)
    bound = tolerances.awsvd_product(W, scale, r, EPS64) if W.size else 0.0
    event("compared" if bound is not None else "no gap")
    if bound is not None:
        compare.spectral(
            f"AWSVD product, permuted ({side})", L_p @ R_p, (L @ R)[rows][:, columns], bound
        )


# ASVD, PCA, AFM, joint factors


@pytest.mark.spec("asvd.scale", "asvd.product", "lowrank.svd")
@both_sides
@given(problem=own.output_problems())
def test_asvd_with_alpha_0_is_the_plain_svd(side: Side, problem: own.OutputProblem) -> None:
    W, X, r = problem.W, problem.X, problem.rank
    magnitudes = side("statistics.sum_of_magnitudes", X)
    scale = side("lowrank.magnitude_scale", magnitudes, problem.n, 0.0)
    assert np.all(scale == 1), "dead features too"
    plain = side("lowrank.svd_low_rank", W, r)
    for part, other in zip(side("lowrank.awsvd", W, scale, r), plain, strict=True):
        compare.exact(f"ASVD with alpha 0, from the plain SVD ({side})", part, other)


@pytest.mark.spec("asvd.scale", "asvd.product", "stats.scale")
@both_sides
@given(problem=own.output_problems(), c=factors, alpha=st.sampled_from((0.25, 0.5, 1.0, 2.0)))
def test_a_common_factor_of_the_activations_changes_no_product_of_asvd(
    side: Side, problem: own.OutputProblem, c: float, alpha: float
) -> None:
    W, X, n, r = problem.W, problem.X, problem.n, problem.rank
    scale, scale_c = (
        side("lowrank.magnitude_scale", side("statistics.sum_of_magnitudes", Y), n, alpha)
        for Y in (X, c * X)
    )
    rounded = tolerances.scaled_magnitudes(n, alpha)
    compare.relatively_close(f"ASVD's scale of c X ({side})", scale_c, c**alpha * scale, rounded)
    L, R, _ = side("lowrank.awsvd", W, scale, r)
    L_c, R_c, _ = side("lowrank.awsvd", W, scale_c, r)
    delta = rounded * float(np.linalg.norm(W * scale))
    bound = tolerances.awsvd_product(W, scale, r, EPS64, delta) if W.size else 0.0
    event("compared" if bound is not None else "no gap")
    if bound is not None:
        compare.spectral(f"ASVD product, activations times c ({side})", L_c @ R_c, L @ R, bound)


@pytest.mark.spec("stats.scale", "pca.product", "afm.product")
@both_sides
@given(problem=own.output_problems(), c=factors)
def test_a_common_factor_of_the_activations_changes_no_product_of_pca_and_afm(
    side: Side, problem: own.OutputProblem, c: float
) -> None:
    W, X, n, r = problem.W, problem.X, problem.n, problem.rank
    moments = side.moments(X)
    C = moments[0]
    moments_c = side.moments(c * X)
    d = np.linalg.norm(X, axis=0)
    # Each entry of c X is one rounding, twice in a product, and the sums are done anew.
    uncentred = tolerances.through(W, tolerances.inner(n + 2, np.outer(d, d)))
    centred = tolerances.through(W, tolerances.scaled_centred_moment(X))
    floor = rounding_floor(W, C, max(W.shape))
    bounds = [tolerances.pca_product(W, C, r, floor, uncentred)]
    C_c = side("statistics.centred_moment", *moments)
    floor = rounding_floor(W, C, max(*W.shape, n))
    bounds.append(tolerances.pca_product(W, C_c, r, floor, centred))
    for name, bound, statistics in (
        ("pca", bounds[0], ((C,), moments_c[:1])),
        ("afm", bounds[1], (moments, moments_c)),
    ):
        event(f"{name}: {'compared' if bound is not None else 'no gap'}")
        if bound is not None:
            (L, R, *_), (L_c, R_c, *_) = (side(f"pca.{name}", W, *of, r) for of in statistics)
            compare.spectral(f"{name}, activations times c ({side})", L_c @ R_c, L @ R, bound)


def rounding_floor(W: own.Array, C: own.Array, terms: int) -> float:
    """What counts as zero among the eigenvalues, by the rule."""
    return float(terms * EPS64 * np.sum(W**2 * np.diag(C)))


@pytest.mark.spec("pca.product", "pca.spectrum", "output.error")
@both_sides
@given(problem=own.output_problems(), seed=own.seeds)
@example(problem=CORRELATED, seed=0)
def test_no_product_of_the_same_rank_has_a_smaller_error_of_the_outputs(
    side: Side, problem: own.OutputProblem, seed: int
) -> None:
    W, X, r = problem.W, problem.X, problem.rank
    C = side.moments(X)[0]
    L, R, S = side("pca.pca", W, C, r)
    least = side("pca.output_error", W, L @ R, C)
    room = tolerances.least_error(W, C, L, R, rounding_floor(W, C, max(W.shape)), least)
    compare.close(f"least error, from the eigenvalues ({side})", least, np.sum(S[r:] ** 2), room)
    norms = side.norms(X)
    others = [
        side("lowrank.svd_low_rank", W, r)[:2],
        side("lowrank.awsvd", W, norms, r)[:2],
        side("lowrank.awsvd", W, np.sqrt(norms), r)[:2],
    ]
    scaled = own.Problem(W, np.ones(W.shape[1]), r)
    for A, B in [*rivals(scaled, L, R, seed), *others]:
        error = side("pca.output_error", W, A @ B, C)
        compare.within(
            f"least error of the outputs above that of another product ({side})",
            max(0.0, least - error),
            room + tolerances.rival_output_error(W, A, B, C, error),
        )


@pytest.mark.spec("afm.product", "afm.bias", "output.error")
@both_sides
@given(problem=own.output_problems(), seed=own.seeds)
@example(problem=CORRELATED, seed=0)
def test_no_affine_map_of_the_same_rank_has_a_smaller_error_than_afm(
    side: Side, problem: own.OutputProblem, seed: int
) -> None:
    """Nor does PCA, which is one without a bias. Errors by the moments, bias included."""
    W, X, r = problem.W, problem.X, problem.rank
    C, t, n = side.moments(X)
    C_c = side("statistics.centred_moment", C, t, n)
    mu = side("statistics.token_mean", t, n)
    L, R, S, bias = side("pca.afm", W, C, t, n, r)

    def error(A: own.Array, B: own.Array, b: own.Array) -> float:
        """``sum_i norm(W x_i - A B x_i - b)^2``: about the mean, and of the mean."""
        cut = (W - A @ B) @ mu - b
        return float(side("pca.output_error", W, A @ B, C_c) + n * np.sum(cut**2))

    least = error(L, R, bias)
    floor = rounding_floor(W, C, max(*W.shape, n))
    delta = tolerances.through(W, tolerances.centred_moment(C, mu, n))
    room = tolerances.least_error(W, C_c, L, R, floor, least, delta=delta)
    room += n * float(np.sum(tolerances.afm_bias(W, L, mu, 0.0) ** 2))
    compare.close(f"least error of AFM ({side})", least, np.sum(S[r:] ** 2), room)
    rng = np.random.default_rng(seed)
    L_pca, R_pca, _ = side("pca.pca", W, C, r)
    scaled = own.Problem(W, np.ones(W.shape[1]), r)
    for A, B in [*rivals(scaled, L, R, seed), (L_pca, R_pca)]:
        cut = (W - A @ B) @ mu
        # Without a bias, as PCA; with the best one; with that and something more.
        for b in (np.zeros(W.shape[0]), cut, cut * rng.uniform(0, 2, cut.size), bias):
            other = error(A, B, b)
            compare.within(
                f"least error of AFM above that of another map ({side})",
                max(0.0, least - other),
                room + tolerances.rival_output_error(W, A, B, C_c, other),
            )


@pytest.mark.spec("afm.product", "afm.bias", "pca.product")
@both_sides
@given(problem=own.output_problems())
def test_afm_of_inputs_with_mean_zero_is_pca(side: Side, problem: own.OutputProblem) -> None:
    W, C, n, r = problem.W, problem.C, problem.n, problem.rank
    L, R, S, bias = side("pca.afm", W, C, np.zeros(C.shape[0]), n, r)
    L_pca, R_pca, S_pca = side("pca.pca", W, C, r)
    compare.exact(f"singular values of AFM without a mean ({side})", S, S_pca)
    compare.exact(f"bias of AFM without a mean ({side})", bias, np.zeros(W.shape[0]))
    # The floors differ where there are more tokens than features.
    floors = [rounding_floor(W, C, terms) for terms in (max(W.shape), max(*W.shape, n))]
    between = (min(floors) < S**2) & (max(floors) >= S**2)
    event("between the floors" if np.any(between) else "compared")
    if not np.any(between):
        compare.exact(f"left factor of AFM without a mean ({side})", L, L_pca)
        compare.exact(f"right factor of AFM without a mean ({side})", R, R_pca)


@pytest.mark.spec("pca.product", "awsvd.product", "output.error", "awsvd.objective")
@both_sides
@given(problem=own.problems())
def test_pca_of_uncorrelated_inputs_is_awsvd(side: Side, problem: own.Problem) -> None:
    """AWSVD knows the diagonal of C alone."""
    W, scale, r = problem.W, problem.scale, problem.rank
    C = np.diag(scale**2)
    L, R, S = side("pca.pca", W, C, r)
    L_a, R_a, S_a = side("lowrank.awsvd", W, scale, r)
    square = tolerances.eigenvalues(W, C, tolerances.through(W, tolerances.inner(1, C)))
    known = square + tolerances.square_of_singular_values(S_a, W.shape)
    compare.close(f"eigenvalues of W D^2 W^T ({side})", S**2, S_a**2, known)
    compare.close(
        f"error of the outputs, from the weighted one ({side})",
        side("pca.output_error", W, L_a @ R_a, C),
        side("lowrank.weighted_error", W, L_a @ R_a, scale),
        tolerances.output_error(W, L_a @ R_a, C),
    )
    floor = rounding_floor(W, C, max(W.shape))
    if r > 0 and S_a[r - 1] ** 2 <= floor + known:
        event("too small to show in the eigenvalues")
        return
    by_moment = tolerances.pca_product(W, C, r, floor, known)
    by_scale = tolerances.awsvd_product(W, scale, r, EPS64) if W.size else 0.0
    determined = by_moment is not None and by_scale is not None
    event("compared" if determined else "no gap")
    if by_moment is not None and by_scale is not None:
        compare.spectral(f"PCA, from AWSVD ({side})", L @ R, L_a @ R_a, by_moment + by_scale)


@pytest.mark.spec("pca.product", "pca.spectrum", "afm.product", "output.error")
@both_sides
@given(problem=own.output_problems())
def test_the_errors_of_pca_and_afm_fall_with_the_rank(
    side: Side, problem: own.OutputProblem
) -> None:
    W, X = problem.W, problem.X
    C, t, n = side.moments(X)
    C_c = side("statistics.centred_moment", C, t, n)
    mu = side("statistics.token_mean", t, n)
    delta = tolerances.through(W, tolerances.centred_moment(C, mu, n))
    for name, moment, statistics, terms, more in (
        ("pca", C, (C,), max(W.shape), 0.0),
        ("afm", C_c, (C, t, n), max(*W.shape, n), delta),
    ):
        errors, bounds, floor = [], [], rounding_floor(W, C, terms)
        for r in range(min(W.shape) + 1):
            L, R, *_ = side(f"pca.{name}", W, *statistics, r)
            errors.append(side("pca.output_error", W, L @ R, moment))
            bounds.append(tolerances.least_error(W, moment, L, R, floor, errors[-1], delta=more))
        compare.within(
            f"rise of the error of {name} with the rank ({side})",
            np.maximum(np.diff(errors), 0),
            np.add(bounds[:-1], bounds[1:]),
        )
        # All of the outputs at full rank; what is there at rank 0.
        compare.within(f"error of {name} at full rank ({side})", errors[-1], bounds[-1])
        compare.close(
            f"error of {name} at rank 0 ({side})",
            errors[0],
            np.trace(W @ moment @ W.T),
            bounds[0],
        )


@pytest.mark.spec("pca.product", "pca.deficient", "afm.product", "afm.deficient", "afm.bias")
@both_sides
@given(problem=own.output_problems())
@example(problem=CORRELATED)
def test_full_rank_of_pca_and_afm_gives_the_weight_back(
    side: Side, problem: own.OutputProblem
) -> None:
    """Where there are no more outputs than inputs: whatever the inputs were."""
    W, X = problem.W, problem.X
    if W.shape[0] > W.shape[1]:
        W = W.T
        X = np.resize(X, (problem.n, W.shape[1]))
    C, t, n = side.moments(X)
    bound = tolerances.full_rank(W, EPS64)
    L, R, _ = side("pca.pca", W, C, W.shape[0])
    compare.spectral(f"W at full rank of PCA ({side})", L @ R, W, bound)
    L, R, _, bias = side("pca.afm", W, C, t, n, W.shape[0])
    compare.spectral(f"W at full rank of AFM ({side})", L @ R, W, bound)
    mu = side("statistics.token_mean", t, n)
    compare.close(
        f"bias at full rank of AFM ({side})",
        bias,
        np.zeros(W.shape[0]),
        tolerances.afm_bias(W, L, mu, bound),
    )


@pytest.mark.spec("pca.product", "pca.deficient")
@both_sides
@given(problem=own.output_problems(), seed=own.seeds)
def test_pca_follows_a_permutation_of_inputs_and_outputs(
    side: Side, problem: own.OutputProblem, seed: int
) -> None:
    W, C, r = problem.W, problem.C, problem.rank
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(W.shape[0]), rng.permutation(W.shape[1])
    L, R, S = side("pca.pca", W, C, r)
    L_p, R_p, S_p = side("pca.pca", W[rows][:, columns], C[columns][:, columns], r)
    known = tolerances.eigenvalues(W, C)
    compare.close(f"eigenvalues of W C W^T, permuted ({side})", S_p**2, S**2, known)
    bound = tolerances.pca_product(W, C, r, rounding_floor(W, C, max(W.shape)))
    event("compared" if bound is not None else "no gap")
    if bound is not None:
        compare.spectral(
            f"PCA product, permuted ({side})", L_p @ R_p, (L @ R)[rows][:, columns], bound
        )


@pytest.mark.spec("joint.stack", "joint.split", "pca.product", "output.error")
@both_sides
@given(problem=own.output_problems(), cut=st.integers(0, 24), data=st.data())
def test_joint_factors_lie_between_those_of_the_parts(
    side: Side, problem: own.OutputProblem, cut: int, data: st.DataObject
) -> None:
    """The error is the sum of those of the parts. At equal rank the parts do better apart, with two
    right factors; at the sum of their ranks they do better together.
    """
    W, C = problem.W, problem.C
    cut = min(cut, W.shape[0])
    parts = [W[:cut], W[cut:]]
    ranks = [data.draw(st.integers(0, min(part.shape)), label="rank") for part in parts]
    stack = side("joint.stacked", parts)
    compare.exact(f"stack ({side})", stack, W)
    floor = rounding_floor(W, C, max(W.shape))

    def joint(r: int) -> tuple[float, float]:
        L, R, _ = side("pca.pca", stack, C, r)
        lefts = side("joint.split", L, [cut, W.shape[0] - cut])
        error = sum(
            side("pca.output_error", part, left @ R, C)
            for part, left in zip(parts, lefts, strict=True)
        )
        whole = side("pca.output_error", W, L @ R, C)
        # The rows of a product may be rounded otherwise than those of the whole.
        twice = 2 * tolerances.rival_output_error(W, L, R, C, whole)
        compare.close(f"error of the stack, part by part ({side})", error, whole, twice)
        return error, tolerances.least_error(W, C, L, R, floor, error) + twice

    def apart(ranks: list[int]) -> tuple[float, float]:
        error = bound = 0.0
        for part, r in zip(parts, ranks, strict=True):
            L, R, _ = side("pca.pca", part, C, r)
            own_error = side("pca.output_error", part, L @ R, C)
            own_floor = rounding_floor(part, C, max(part.shape))
            error += own_error
            bound += tolerances.least_error(part, C, L, R, own_floor, own_error)
        return error, bound

    # By no more than what rounding leaves uncertain in either.
    r = min(ranks)
    together, separate = joint(r), apart([r, r])
    compare.within(
        f"error apart above that together, at equal rank ({side})",
        max(0.0, separate[0] - together[0]),
        separate[1] + together[1],
    )
    together, separate = joint(min(sum(ranks), *W.shape)), apart(ranks)
    compare.within(
        f"error together above that apart, at the sum of the ranks ({side})",
        max(0.0, together[0] - separate[0]),
        separate[1] + together[1],
    )


# Pruning


@st.composite
def distinct_scores(draw: st.DrawFn) -> tuple[own.Array, int, int]:
    """Draw scores all apart, and a band of them to remove."""
    size = draw(st.integers(0, 30))
    C = draw(hnp.arrays(np.float64, size, elements=st.floats(0, 1e6), unique=True), label="C")
    low = draw(st.integers(0, size), label="low")
    return C, low, draw(st.integers(low, size), label="high")


@pytest.mark.spec("prune.keep")
@both_sides
@given(banded=distinct_scores(), seed=own.seeds)
def test_the_kept_channels_follow_a_permutation(
    side: Side, banded: tuple[own.Array, int, int], seed: int
) -> None:
    C, low, high = banded
    order = np.random.default_rng(seed).permutation(C.size)
    kept = side("pruning.kept_channels", C[order], low, high)
    expected = side("pruning.kept_channels", C, low, high)
    assert sorted(order[kept].tolist()) == expected.tolist()


@pytest.mark.spec("prune.keep", "prune.ties", "budget.channels")
@both_sides
@given(
    C=own.scores(),
    two=st.tuples(own.ratios, own.ratios).map(sorted),
    least=st.sampled_from((0.0, 0.01, 0.1, 0.3)),
)
def test_the_kept_channels_are_nested_as_the_ratio_grows(
    side: Side, C: own.Array, two: list[float], least: float
) -> None:
    bands = [side("budget.removed_band", C.size, s, least) for s in two]
    more, fewer = (set(side("pruning.kept_channels", C, *band).tolist()) for band in bands)
    assert fewer <= more
    low = bands[0][0]
    assert low == bands[1][0], "the band of the least important does not depend on the ratio"
    for kept in (more, fewer):
        removed = set(range(C.size)) - kept
        above = sorted(C[list(kept)])[low:]
        event("removed and kept" if removed and above else "all or nothing")
        assert max(C[list(removed)], default=-1.0) <= min(above, default=np.inf)


# Heads


def regrouped(matrix: own.Array, kv_heads: int, order: own.Ids) -> own.Array:
    """Return a matrix with the rows of its groups in another order, group by group."""
    blocks = matrix.reshape(kv_heads, matrix.shape[0] // kv_heads, matrix.shape[1])
    return np.asarray(blocks[order].reshape(matrix.shape))


@pytest.mark.spec("heads.scores", "heads.group")
@both_sides
@given(mha=own.heads(), aggregation=own.aggregations, seed=own.seeds)
def test_scores_of_groups_of_heads_follow_a_permutation_of_the_groups(
    side: Side, mha: own.Heads, aggregation: str, seed: int
) -> None:
    """And no permutation of rows within the groups, or of features, changes them."""
    rng = np.random.default_rng(seed)
    q, k, v, o = map(np.abs, mha.matrices)
    C = side("heads.head_scores", q, k, v, o, mha.kv_heads, aggregation)
    order = rng.permutation(mha.kv_heads)
    permuted = [regrouped(W, mha.kv_heads, order) for W in (q, k, v, o.T)]
    bound = tolerances.head_scores(q.size // mha.kv_heads)
    compare.relatively_close(
        f"scores of groups, groups permuted ({side})",
        side("heads.head_scores", *permuted[:3], permuted[3].T, mha.kv_heads, aggregation),
        C[order],
        bound,
    )

    def shuffled(W: own.Array) -> own.Array:
        blocks = W.reshape(mha.kv_heads, -1, W.shape[1])
        return np.asarray(rng.permuted(rng.permuted(blocks, axis=1), axis=2).reshape(W.shape))

    compare.relatively_close(
        f"scores of groups, weights permuted within them ({side})",
        side(
            "heads.head_scores",
            *map(shuffled, (q, k, v)),
            shuffled(o.T).T,
            mha.kv_heads,
            aggregation,
        ),
        C,
        bound,
    )


@pytest.mark.spec("heads.scores", "importance.channel")
@both_sides
@given(mha=own.heads())
def test_with_l1_a_group_has_the_sum_of_the_scores_of_its_channels(
    side: Side, mha: own.Heads
) -> None:
    """So that with ``l1`` it makes no difference which of the two a group's score is."""
    q, k, v, o = map(np.abs, mha.matrices)
    total = sum(
        np.sum(side("importance.channel_importance", W, 1, "l1").reshape(mha.kv_heads, -1), axis=1)
        for W in (q, k, v, o.T)
    )
    compare.relatively_close(
        f"l1 scores of groups, channel by channel ({side})",
        side("heads.head_scores", q, k, v, o, mha.kv_heads, "l1"),
        total,
        tolerances.head_scores(q.size // mha.kv_heads),
    )


@pytest.mark.spec("heads.slice", "heads.group")
@both_sides
@given(mha=own.heads(), seed=own.seeds, data=st.data())
def test_heads_pruned_twice_are_heads_pruned_once(
    side: Side, mha: own.Heads, seed: int, data: st.DataObject
) -> None:
    rng, groups = np.random.default_rng(seed), mha.kv_heads
    first = rng.permutation(groups)[: data.draw(st.integers(1, groups), label="first")]
    second = rng.permutation(first.size)[: data.draw(st.integers(0, first.size), label="second")]
    once = side("heads.prune_heads", *mha.matrices, first, groups)
    twice = side("heads.prune_heads", *once, second, first.size)
    at_once = side("heads.prune_heads", *mha.matrices, first[second], groups)
    for a, b in zip(twice, at_once, strict=True):
        compare.exact(f"heads pruned twice ({side})", a, b)
    everything = side("heads.prune_heads", *mha.matrices, np.arange(groups), groups)
    for a, b in zip(everything, mha.matrices, strict=True):
        compare.exact(f"heads, none pruned ({side})", a, b)


# Wanda


@pytest.mark.spec("wanda.mask")
@both_sides
@given(W=own.matrices(), s=own.ratios, seed=own.seeds)
def test_each_row_drops_as_many_weights_and_the_smallest(
    side: Side, W: own.Array, s: float, seed: int
) -> None:
    scores = np.abs(W)
    mask = side("wanda.wanda_mask", scores, s)
    assert np.all(np.sum(~mask, axis=1) == int(W.shape[1] * s))
    for row, stay in zip(scores, mask, strict=True):
        assert max(row[~stay], default=0.0) <= min(row[stay], default=np.inf)
    # Rows know nothing of each other, and not their scale.
    rng = np.random.default_rng(seed)
    order, scale = rng.permutation(W.shape[0]), 2.0 ** rng.integers(-20, 21, W.shape[0])
    permuted = side("wanda.wanda_mask", (scores * scale[:, None])[order], s)
    assert np.array_equal(permuted, mask[order])


@pytest.mark.spec("wanda.mask")
@both_sides
@given(W=own.matrices(), two=st.tuples(own.ratios, own.ratios).map(sorted))
def test_masks_are_nested_in_the_sparsity(side: Side, W: own.Array, two: list[float]) -> None:
    more, fewer = (side("wanda.wanda_mask", np.abs(W), s) for s in two)
    assert np.all(more >= fewer)


# Budget


def held(shapes: Shapes, ranks: Ranks) -> int:
    """Return the parameters that the matrices hold."""
    return sum(
        d_out * d_in if ranks[m] is None else (ranks[m] or 0) * (d_out + d_in)
        for m, (d_out, d_in) in shapes.items()
    )


@pytest.mark.spec("budget.slack", "budget.ranks", "budget.overflow")
@both_sides
@given(shapes=own.low_rank_shapes(), s=own.ratios, a=own.allocations, nested=st.booleans())
def test_the_budget_is_spent_but_for_the_stated_slack(
    side: Side, shapes: Shapes, s: float, a: float, nested: bool
) -> None:
    ranks = side("budget.ranks", shapes, s, a, nested)
    p, N = Fraction(1 - s), Fraction(sum(d_out * d_in for d_out, d_in in shapes.values()))
    weighted = {
        m: (Fraction(a) if m in "vo" else 1) * Fraction(d_out * d_in)
        for m, (d_out, d_in) in shapes.items()
    }
    factored = {m: rank for m, rank in ranks.items() if rank is not None}
    if not factored:
        event("all dense")
        assert 1 - p <= tolerances.share(Fraction(1))
        return
    N_dense = sum(d_out * d_in for m, (d_out, d_in) in shapes.items() if m not in factored)
    W = sum(weighted[m] for m in factored)
    event(f"{'a later round' if N_dense else 'the first round'}, {'nested' if nested else 'once'}")
    least = most = Fraction(0)
    for m, rank in factored.items():
        whole = N * weighted[m] / W / sum(shapes[m])
        unspent = (p - N_dense / N) * whole - rank
        d_out, d_in = shapes[m]
        low, high = Fraction(-1 if N_dense else 0), Fraction(1)
        if nested and not N_dense:
            high += whole / Fraction(d_out * d_in, d_out + d_in)
        slip = tolerances.share(whole)
        assert low - slip <= unspent < high + slip
        least += (low - slip) * (d_out + d_in)
        most += (high + slip) * (d_out + d_in)
    assert least <= p * N - held(shapes, ranks) < most


@pytest.mark.spec("budget.ranks", "budget.break-even", "budget.overflow")
@both_sides
@given(shapes=own.low_rank_shapes(), s=own.ratios, a=own.allocations, nested=st.booleans())
def test_ranks_are_below_break_even(
    side: Side, shapes: Shapes, s: float, a: float, nested: bool
) -> None:
    for m, rank in side("budget.ranks", shapes, s, a, nested).items():
        d_out, d_in = shapes[m]
        if rank is not None:
            assert 0 <= rank * (d_out + d_in) < d_out * d_in
            assert rank < side("budget.break_even_rank", shapes[m])


@st.composite
def two_ratios(draw: st.DrawFn) -> tuple[float, float]:
    """Draw a ratio and a smaller one, by 0.001 at least: further apart than rounding can matter."""
    s = draw(own.ratios.filter(lambda ratio: ratio >= 0.001))
    step = draw(st.one_of(st.just(0.001), st.just(0.0025), st.floats(0.001, 1)))
    return s, max(0.0, s - step)


TURNS_DENSE = {"q": (8, 8), "k": (5, 8), "v": (5, 8), "o": (8, 8)}
"""o overflows first, then v with ``a`` = 2.5 just past ``p`` = 0.7."""


@pytest.mark.spec("budget.ranks", "budget.overflow", "budget.slack")
@both_sides
@given(shapes=own.low_rank_shapes(), two=two_ratios(), a=own.allocations, nested=st.booleans())
@example(shapes=TURNS_DENSE, two=(0.3, 0.2975), a=2.5, nested=False)
def test_where_more_is_retained_no_rank_falls(
    side: Side, shapes: Shapes, two: tuple[float, float], a: float, nested: bool
) -> None:
    """But by one, where a matrix turns dense in a later round: a rank there may be one above its
    floored share at one ratio (``budget.slack``: ``(-1, 1)``) and not at the next.
    """
    before, after = (side("budget.ranks", shapes, s, a, nested) for s in two)
    dense, denser = ({m for m in shapes if ranks[m] is None} for ranks in (before, after))
    assert dense <= denser
    monotone = dense in (set(), denser)
    event("no rank may fall" if monotone else "by one at most")
    for m in set(shapes) - denser:
        assert after[m] >= before[m] - (0 if monotone else 1)
    if monotone:
        assert held(shapes, after) >= held(shapes, before)
    else:
        falling = sum(sum(shapes[m]) for m in set(shapes) - denser)
        assert held(shapes, after) > held(shapes, before) - falling


@pytest.mark.spec("budget.overflow", "budget.slack")
@both_sides
def test_a_matrix_that_turns_dense_can_cost_the_others_a_rank(side: Side) -> None:
    """More is retained, less is held: v gains its last parameter, and k loses a rank."""
    before = side("budget.ranks", TURNS_DENSE, 0.3, 2.5, False)
    after = side("budget.ranks", TURNS_DENSE, 0.2975, 2.5, False)
    assert before == {"q": 1, "k": 2, "v": 3, "o": None}
    assert after == {"q": 1, "k": 1, "v": None, "o": None}
    assert (held(TURNS_DENSE, before), held(TURNS_DENSE, after)) == (145, 133)


any_shape = st.tuples(
    st.one_of(st.integers(1, 12), st.integers(1, 9000)),
    st.one_of(st.integers(1, 12), st.integers(1, 9000)),
)


@pytest.mark.spec("budget.ranks", "budget.overflow")
@both_sides
@given(
    one=any_shape,
    vo=st.one_of(st.none(), any_shape),
    s=own.ratios,
    a=own.allocations,
    nested=st.booleans(),
)
def test_equal_shapes_of_a_group_get_equal_ranks(
    side: Side, one: own.Shape, vo: own.Shape | None, s: float, a: float, nested: bool
) -> None:
    shapes = {role: vo or one if role in "vo" else one for role in own.ROLES}
    ranks = side("budget.ranks", shapes, s, a, nested)
    assert len({rank for role, rank in ranks.items() if role not in "vo"}) == 1
    assert ranks["v"] == ranks["o"]


@pytest.mark.spec("budget.ranks", "budget.overflow")
@both_sides
@given(
    shapes=own.low_rank_shapes(),
    s=own.ratios,
    one=st.sampled_from((1, 1.0)),
    nested=st.booleans(),
    names=st.permutations(own.ROLES),
)
def test_allocation_1_treats_all_matrices_alike(
    side: Side, shapes: Shapes, s: float, one: float, nested: bool, names: list[str]
) -> None:
    renamed = dict(zip(own.ROLES, names, strict=True))
    ranks = side("budget.ranks", shapes, s, one, nested)
    others = {renamed[m]: shape for m, shape in shapes.items()}
    assert side("budget.ranks", others, s, one, nested) == {
        renamed[m]: rank for m, rank in ranks.items()
    }


@pytest.mark.spec("budget.channels", "budget.slack")
@both_sides
@given(
    d_m=st.one_of(st.integers(0, 60_000), st.sampled_from((11008, 13824, 17920, 28672))),
    s=own.ratios,
    least=st.one_of(st.sampled_from((0.0, 0.01, 0.05, 0.5, 1.0)), st.floats(0, 1)),
)
def test_the_removed_band_is_the_ratio_of_the_width_within_a_channel(
    side: Side, d_m: int, s: float, least: float
) -> None:
    low, high = side("budget.removed_band", d_m, s, least)
    slip = tolerances.band((Fraction(s) + Fraction(least)) * d_m)
    assert -1 - slip < high - low - Fraction(s) * d_m < 1 + slip
    assert -slip <= Fraction(least) * d_m - low < 1 + slip


# MGAA


@pytest.mark.spec("mgaa.similarity")
@both_sides
@given(streams=own.streams(), data=st.data(), seed=own.seeds)
def test_cosines_of_batches_in_any_order_add_up(
    side: Side, streams: tuple[own.Array, own.Array], data: st.DataObject, seed: int
) -> None:
    X, Y = streams
    cuts = sorted(data.draw(st.lists(st.integers(0, X.shape[0]), max_size=3), label="cuts"))
    order = np.random.default_rng(seed).permutation(X.shape[0])
    parts = [order[a:b] for a, b in pairwise([0, *cuts, X.shape[0]])]
    compare.close(
        f"cosines of the batches ({side})",
        sum(side("mgaa.cosine_sum", X[part], Y[part]) for part in parts),
        side("mgaa.cosine_sum", X, Y),
        tolerances.cosine_sum(X.shape[0], X.shape[1]),
    )


@pytest.mark.spec("mgaa.similarity")
@both_sides
@given(streams=own.streams(), seed=own.seeds)
def test_the_size_of_a_token_changes_no_cosine(
    side: Side, streams: tuple[own.Array, own.Array], seed: int
) -> None:
    X, Y = streams
    rng = np.random.default_rng(seed)
    a, b = (2.0 ** rng.integers(-20, 21, (X.shape[0], 1)) for _ in range(2))
    total = side("mgaa.cosine_sum", X, Y)
    compare.exact(f"cosines, scaled ({side})", side("mgaa.cosine_sum", a * X, b * Y), total)
    compare.exact(f"cosines, turned over ({side})", side("mgaa.cosine_sum", -X, -Y), total)
    compare.exact(f"cosines, exchanged ({side})", side("mgaa.cosine_sum", Y, X), total)
    assert side("mgaa.cosine_sum", X, X) == X.shape[0]


@pytest.mark.spec("mgaa.scores")
@both_sides
@given(similarities=own.similarities(), seed=own.seeds)
def test_standard_scores_follow_order_and_sign(
    side: Side, similarities: list[float], seed: int
) -> None:
    z = side("mgaa.standard_scores", similarities)
    order = np.random.default_rng(seed).permutation(len(z)).tolist()
    permuted = side("mgaa.standard_scores", [similarities[i] for i in order])
    compare.exact(f"standard scores, permuted ({side})", permuted, [z[i] for i in order])
    turned = side("mgaa.standard_scores", [-value for value in similarities])
    compare.exact(f"standard scores, turned over ({side})", turned, [-score for score in z])
    ranking = np.argsort(similarities, kind="stable")
    assert np.all(np.diff(np.array(z)[ranking]) >= 0)


@pytest.mark.spec("mgaa.ratios")
@both_sides
@given(case=own.sublayers(), seed=own.seeds, exponent=st.integers(0, 10))
def test_ratios_follow_a_permutation_and_a_common_factor_of_the_sizes(
    side: Side, case: own.SubLayers, seed: int, exponent: int
) -> None:
    ratios = side("mgaa.sublayer_ratios", *case.arguments)
    order = np.random.default_rng(seed).permutation(len(ratios)).tolist()
    z, sizes, highest = ([v[i] for i in order] for v in (case.z, case.sizes, case.highest))
    larger = [size * 2**exponent for size in sizes]
    permuted = side("mgaa.sublayer_ratios", z, larger, case.target, case.alpha, highest)
    compare.exact(f"sub-layer ratios, permuted ({side})", permuted, [ratios[i] for i in order])


@pytest.mark.spec("mgaa.ratios")
@both_sides
@given(case=own.sublayers())
def test_the_more_alike_input_and_output_the_more_is_removed(
    side: Side, case: own.SubLayers
) -> None:
    ratios = side("mgaa.sublayer_ratios", *case.arguments)
    layers = list(zip(case.z, case.highest, ratios, strict=True))
    for z, highest, ratio in layers:
        assert 0 <= ratio <= highest
        assert all(ratio >= r for other, h, r in layers if other <= z and h <= highest)


@pytest.mark.spec("mgaa.ratios")
@both_sides
@given(case=own.sublayers(), target=own.ratios)
@example(case=own.SubLayers([2.0, 0.0, -1.0, -1.0], [1] * 4, 0.2, 0.5, [1.0] * 4), target=0.3)
def test_where_the_target_grows_no_ratio_falls(
    side: Side, case: own.SubLayers, target: float
) -> None:
    low, high = sorted((case.target, target))
    before, after = (
        side("mgaa.sublayer_ratios", case.z, case.sizes, p_t, case.alpha, case.highest)
        for p_t in (low, high)
    )
    room = 2 * tolerances.ratios(sum(case.sizes), max(map(abs, case.wanted)) + high)
    compare.within(
        f"fall of a ratio, in parameters ({side})",
        [n * max(0.0, b - a) for n, b, a in zip(case.sizes, before, after, strict=True)],
        room,
    )


@pytest.mark.spec("mgaa.ratios", "mgaa.highest")
@both_sides
@given(case=own.sublayers())
def test_without_a_spread_every_ratio_is_the_target(side: Side, case: own.SubLayers) -> None:
    z, sizes, target = case.z, case.sizes, case.target
    expected = [target] * len(z)
    assert side("mgaa.sublayer_ratios", z, sizes, target, 0.0, [1.0] * len(z)) == expected
    bounds = [side("mgaa.highest_ratio", target, 1.0)] * len(z)
    assert side("mgaa.sublayer_ratios", z, sizes, target, case.alpha, bounds) == expected


def start(case: own.Energies) -> int:
    """Return what the floors hold."""
    return sum(
        min(max(1, case.floors[m]) * (d_out + d_in), d_out * d_in)
        for m, (d_out, d_in) in case.shapes.items()
    )


def common_ranks(side: Side, case: own.Energies, budget: float) -> Ranks:
    ranks: Ranks = side("mgaa.common_energy_ranks", case.spectra, case.shapes, budget, case.floors)
    return ranks


@pytest.mark.spec("mgaa.ranks", "mgaa.slack", "mgaa.floors")
@both_sides
@given(case=own.energies())
def test_a_budget_of_energies_is_spent_to_one_rank_of_each(side: Side, case: own.Energies) -> None:
    ranks = common_ranks(side, case, case.budget)
    assert start(case) <= held(case.shapes, ranks)
    if start(case) > case.budget:
        event("out of reach")
        assert held(case.shapes, ranks) == start(case)
        return
    event("dense" if None in ranks.values() else "all factored")
    left = case.budget - held(case.shapes, ranks)
    assert left >= 0
    for m, (d_out, d_in) in case.shapes.items():
        rank = ranks[m]
        if rank is not None:
            assert max(1, case.floors[m]) <= rank
            assert rank * (d_out + d_in) < d_out * d_in
            assert left < min(d_out + d_in, d_out * d_in - rank * (d_out + d_in))


def least_energy(side: Side, case: own.Energies, ranks: Ranks) -> float:
    return min(
        1.0 if rank is None else float(side("mgaa.cumulative_energy", case.spectra[m])[rank - 1])
        for m, rank in ranks.items()
    )


@pytest.mark.spec("mgaa.ranks")
@both_sides
@given(case=own.energies(), more=st.floats(0, 1))
def test_a_larger_budget_retains_more_of_the_least_energy(
    side: Side, case: own.Energies, more: float
) -> None:
    """Single ranks may fall, of what was left over: all of them by less than one rank together."""
    total = sum(d_out * d_in for d_out, d_in in case.shapes.values())
    if start(case) > case.budget:
        return
    before = common_ranks(side, case, case.budget)
    after = common_ranks(side, case, case.budget + more * total)
    assert least_energy(side, case, after) >= least_energy(side, case, before)
    lost = [
        max(0, held({m: shape}, before) - held({m: shape}, after))
        for m, shape in case.shapes.items()
    ]
    event("a rank falls" if any(lost) else "no rank falls")
    assert sum(lost) < max(map(sum, case.shapes.values()))


@pytest.mark.spec("mgaa.ranks", "mgaa.energy")
@both_sides
@given(case=own.energies(), exponent=st.integers(-20, 20))
def test_the_scale_of_a_spectrum_changes_no_rank(
    side: Side, case: own.Energies, exponent: int
) -> None:
    scaled = {m: S * 2.0 ** (exponent + i) for i, (m, S) in enumerate(case.spectra.items())}
    other = own.Energies(scaled, case.shapes, case.budget, case.floors)
    assert common_ranks(side, other, case.budget) == common_ranks(side, case, case.budget)


@pytest.mark.spec("mgaa.ranks")
@both_sides
@given(case=own.energies())
@example(
    case=own.Energies(
        {m: np.zeros(8) for m in "qkv"},
        dict.fromkeys("qkv", (8, 8)),
        112.0,
        dict.fromkeys("qkv", 1),
    )
)
def test_equal_matrices_get_ranks_one_apart_at_most(side: Side, case: own.Energies) -> None:
    """But where one turns dense, which can cost less than a rank: then two."""
    names = list(case.shapes)
    shape, S = case.shapes[names[0]], case.spectra[names[0]]
    share = case.budget / sum(d_out * d_in for d_out, d_in in case.shapes.values())
    budget = share * len(names) * shape[0] * shape[1]
    same = own.Energies(
        dict.fromkeys(names, S), dict.fromkeys(names, shape), budget, dict.fromkeys(names, 1)
    )
    ranks = common_ranks(side, same, budget)
    full = -(-shape[0] * shape[1] // sum(shape))
    steps = [full if rank is None else rank for rank in ranks.values()]
    cheaper = full * sum(shape) > shape[0] * shape[1] and None in ranks.values()
    event("dense for less than a rank" if cheaper else "one apart")
    assert max(steps) - min(steps) <= (2 if cheaper else 1)
    factored = [rank for rank in ranks.values() if rank is not None]
    assert not factored or max(factored) - min(factored) <= 1


@pytest.mark.spec("mgaa.floors")
@both_sides
@given(shapes=own.low_rank_shapes(), retained=own.ratios, floor=own.ratios)
def test_floors_always_fit(side: Side, shapes: Shapes, retained: float, floor: float) -> None:
    budget = retained * sum(d_out * d_in for d_out, d_in in shapes.values())
    floors = side("mgaa.rank_floors", shapes, budget, floor)
    assert sum(rank * sum(shapes[m]) for m, rank in floors.items()) <= budget
    uniform = side("mgaa.rank_floors", shapes, budget, 1.0)
    assert all(0 <= floors[m] <= uniform[m] for m in shapes)
