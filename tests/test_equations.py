"""Every equation on both sides against values worked out by hand, or by loops over its indices."""

import importlib
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

SPECIAL = (0.0, 0.1, 0.2, 1 / 3, 0.34, 0.5, 0.8)


class Side:
    """One of the two implementations, called with lists and answering with arrays."""

    def __init__(self, package: str, make: Callable[[Any], Any]) -> None:
        self.package, self.make = package, make

    def module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")

    def __call__(self, function: str, *arguments: Any) -> Any:
        module, name = function.split(".")
        given = [
            self.make(np.asarray(a, dtype=np.int64 if name == "prune_ffn" and i == 3 else float))
            if isinstance(a, list | np.ndarray)
            else a
            for i, a in enumerate(arguments)
        ]
        answer = getattr(self.module(module), name)(*given)
        if isinstance(answer, tuple):
            return tuple(as_array(part) for part in answer)
        return answer if isinstance(answer, float | int | dict) else as_array(answer)

    def norms(self, X: list[list[float]]) -> Any:
        """Eq. (5): the reference takes the tokens, the torch side their sums of squares."""
        if self.package == "lorap.ops":
            return self("statistics.feature_norms", self("statistics.sum_of_squares", X))
        return self("statistics.feature_norms", X)


def as_array(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value


@pytest.fixture(params=["lorap_reference", "lorap.ops"])
def side(request: pytest.FixtureRequest) -> Side:
    make = np.asarray if request.param == "lorap_reference" else torch.tensor
    return Side(request.param, make)


def close(a: Any, b: Any) -> bool:
    return bool(np.allclose(a, b, rtol=1e-13, atol=1e-13))


# Two tokens of three features; the last is dead.
X = [[3.0, 1.0, 0.0], [4.0, -2.0, 0.0]]


@pytest.mark.spec("stats.sum-of-squares")
def test_sum_of_squares(side: Side) -> None:
    assert side("statistics.sum_of_squares", X).tolist() == [25, 5, 0]


@pytest.mark.spec("stats.sum-of-squares")
def test_no_token_and_no_feature(side: Side) -> None:
    assert side("statistics.sum_of_squares", np.zeros((0, 2))).tolist() == [0, 0]
    assert side("statistics.sum_of_squares", np.zeros((2, 0))).shape == (0,)


@pytest.mark.spec("stats.sum-of-squares")
def test_sums_stay_where_the_inputs_are() -> None:
    from lorap.ops.statistics import sum_of_squares

    assert sum_of_squares(torch.ones(3, 2, device="meta")).device.type == "meta"


@pytest.mark.spec("stats.norm")
def test_feature_norms(side: Side) -> None:
    assert close(side.norms(X), [5, 5**0.5, 0])


@pytest.mark.spec("stats.scale")
def test_a_common_factor_of_the_norms_changes_nothing(side: Side) -> None:
    W = [[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [1.0, 1.0, 1.0]]
    x = np.array([1.0, 2.0, 3.0])
    one, two = (side("lowrank.awsvd", W, factor * x, 1) for factor in (1.0, 7.0))
    assert close(one[0] @ one[1], two[0] @ two[1])
    scores = [
        side("importance.group_importance", W, W, W, factor * x, factor * x, "l2")
        for factor in (1.0, 7.0)
    ]
    assert np.argsort(scores[0]).tolist() == np.argsort(scores[1]).tolist()


@pytest.mark.spec("stats.padding")
def test_what_the_mask_leaves_out_does_not_count() -> None:
    from lorap.ops.statistics import sum_of_squares

    inputs = torch.tensor([[[3.0, 1.0], [torch.nan, 9.0]], [[4.0, 2.0], [5.0, 5.0]]])
    mask = torch.tensor([[1, 0], [1, 0]])
    assert sum_of_squares(inputs, mask).tolist() == [25, 5]


@pytest.mark.spec("precision.statistics")
def test_a_million_small_tokens_beside_a_large_one_are_not_lost() -> None:
    """In float32, 4096^2 = 2^24 swallows every 1 that is added to it."""
    from lorap.ops.statistics import sum_of_squares

    inputs = torch.ones(1_000_001, 1)
    inputs[0] = 4096
    assert sum_of_squares(inputs).item() == 2**24 + 1_000_000
    half = torch.full((4096, 1), 60000.0, dtype=torch.float16)
    assert sum_of_squares(half).item() == 4096 * 60000.0**2


@pytest.mark.spec("importance.weight")
def test_weight_importance(side: Side) -> None:
    scores = side("importance.weight_importance", [[1.0, -2.0, 3.0]], [5.0, 0.5, 0.0])
    assert scores.tolist() == [[5, 1, 0]]


@pytest.mark.spec("importance.channel")
@pytest.mark.parametrize(
    ("aggregation", "rows", "columns"),
    [
        ("mean", [3.5, 6], [1.5, 8]),
        ("l1", [7, 12], [3, 16]),
        ("l2", [5, 12], [3, 160**0.5]),
        ("linf", [4, 12], [3, 12]),
    ],
)
def test_channel_importance(
    side: Side, aggregation: str, rows: list[float], columns: list[float]
) -> None:
    scores = [[3.0, 4.0], [0.0, 12.0]]
    assert close(side("importance.channel_importance", scores, 1, aggregation), rows)
    assert close(side("importance.channel_importance", scores, 0, aggregation), columns)


@pytest.mark.spec("importance.group")
def test_group_importance(side: Side) -> None:
    """Rows of up and gate against their input, columns of down against its own."""
    up, gate = [[3.0, 4.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 2.0]]
    down = [[1.0, 0.0], [0.0, 5.0], [0.0, 12.0]]
    scores = side("importance.group_importance", up, gate, down, [1.0, 2.0], [10.0, 0.5], "l2")
    # Channel 0: (3, 8) -> sqrt(73), (1, 0) -> 1, 10 * 1. Channel 1: (0, 2), (0, 4), 0.5 * 13.
    assert close(scores, [73**0.5 + 11, 2 + 4 + 6.5])


@pytest.mark.spec("importance.group")
@pytest.mark.parametrize("aggregation", ["mean", "l1", "l2", "linf"])
def test_group_importance_by_loops(side: Side, aggregation: str) -> None:
    rng = np.random.default_rng(0)
    d_m, d = 5, 3
    up, gate, down = (rng.standard_normal(shape) for shape in ((d_m, d), (d_m, d), (d, d_m)))
    x_ffn, x_down = rng.uniform(0, 2, d), rng.uniform(0, 2, d_m)
    phi: dict[str, Callable[[list[float]], float]] = {
        "mean": lambda s: sum(s) / len(s),
        "l1": sum,
        "l2": lambda s: sum(v * v for v in s) ** 0.5,
        "linf": max,
    }
    expected = [
        phi[aggregation]([abs(up[i, j]) * x_ffn[j] for j in range(d)])
        + phi[aggregation]([abs(gate[i, j]) * x_ffn[j] for j in range(d)])
        + phi[aggregation]([abs(down[k, i]) * x_down[i] for k in range(d)])
        for i in range(d_m)
    ]
    scores = side("importance.group_importance", up, gate, down, x_ffn, x_down, aggregation)
    assert close(scores, expected)


@pytest.mark.spec("lowrank.apply")
def test_low_rank_apply(side: Side) -> None:
    left, right = [[1.0], [2.0]], [[3.0, 0.0, -1.0]]
    assert side("lowrank.low_rank_apply", left, right, [[1.0, 7.0, 2.0]]).tolist() == [[1, 2]]
    assert side("lowrank.low_rank_apply", np.zeros((2, 0)), np.zeros((0, 3)), [[1.0, 7.0, 2.0]]
                ).tolist() == [[0, 0]]  # fmt: skip


@pytest.mark.spec("lowrank.svd")
def test_svd_low_rank(side: Side) -> None:
    """``diag(3, 2, 1)`` loses its smallest; a product of rank one is found again."""
    left, right = side("lowrank.svd_low_rank", np.diag([3.0, 1.0, 2.0]), 2)
    assert close(left @ right, np.diag([3, 0, 2]))
    one = np.outer([1, 2, 3], [4, 5])
    left, right = side("lowrank.svd_low_rank", one, 1)
    assert close(left @ right, one)


@pytest.mark.spec("awsvd.scale")
def test_column_scale(side: Side) -> None:
    assert side("lowrank.column_scale", [4.0, 0.0, 9.0]).tolist() == [4, 0, 9]
    assert side("lowrank.column_scale", [4.0, 0.0, 9.0], "eq7").tolist() == [4, 0, 9]
    assert side("lowrank.column_scale", [4.0, 0.0, 9.0], "eq6").tolist() == [2, 0, 3]


@pytest.mark.spec("awsvd.objective")
def test_weighted_error(side: Side) -> None:
    """Squared: the norm of a feature enters with its square in Eq. (7), as it is in Eq. (6)."""
    W, near = [[1.0, 2.0], [3.0, 4.0]], [[0.0, 2.0], [3.0, 2.0]]
    error = side("lowrank.weighted_error", W, near, [3.0, 5.0])
    assert error == 9 + 4 * 25
    assert type(error) is float
    scale = side("lowrank.column_scale", [9.0, 25.0], "eq6")
    assert side("lowrank.weighted_error", W, near, scale) == 9 + 4 * 25


@pytest.mark.spec("precision.compute")
def test_the_weight_decides_what_its_error_is_computed_in() -> None:
    from lorap.ops.lowrank import weighted_error

    def error(weight: float, dtype: torch.dtype, near: float, near_dtype: torch.dtype) -> float:
        one = torch.ones(1, dtype=torch.float64)
        return weighted_error(
            torch.tensor([[weight]], dtype=dtype), torch.tensor([[near]], dtype=near_dtype), one
        )

    small = 2.0**-20
    for half in (torch.bfloat16, torch.float16):
        assert error(1.0, half, 1 + small, torch.float32) == small**2
        assert error(1.0, torch.float32, 1.0, half) == 0
    tiny = 2.0**-40
    assert error(1 + tiny, torch.float64, 1.0, torch.float32) == tiny**2
    assert error(1.0, torch.float32, 1 + tiny, torch.float64) == 0


def best_direction(A: np.ndarray[Any, Any]) -> float:
    """Least error of a rank-one product of a matrix of two rows, over all its directions."""
    angles = np.linspace(0, np.pi, 200_001)
    u = np.stack([np.cos(angles), np.sin(angles)])
    return float(np.min(np.sum(A**2) - np.sum((u.T @ A) ** 2, axis=1)))


@pytest.mark.spec("awsvd.product", "awsvd.objective")
@pytest.mark.parametrize("weighting", ["eq7", "eq6"])
def test_awsvd_minimises_what_it_says(side: Side, weighting: str) -> None:
    """By trying all directions: Eq. (7) with D, Eq. (6) with its square root, in printed terms."""
    rng = np.random.default_rng(1)
    W, x = rng.standard_normal((2, 4)), np.array([0.1, 1.0, 2.0, 10.0])
    left, right, _ = side("lowrank.awsvd", W, side("lowrank.column_scale", x, weighting), 1)
    power = 2 if weighting == "eq7" else 1
    printed = sum(
        (W[i, j] - (left @ right)[i, j]) ** 2 * x[j] ** power
        for i, j in product(range(2), range(4))
    )
    assert printed == pytest.approx(best_direction(W * x ** (power / 2)), rel=1e-8)
    plain = side("lowrank.svd_low_rank", W, 1)
    worse = np.sum((W - plain[0] @ plain[1]) ** 2 * x**power)
    assert worse > 1.01 * printed


@pytest.mark.spec("awsvd.product")
def test_awsvd_by_hand(side: Side) -> None:
    """``W D = diag(2, 9)`` where ``W = diag(2, 1)``: the norms turn the order round."""
    left, right, S = side("lowrank.awsvd", np.diag([2.0, 1.0]), [1.0, 9.0], 1)
    assert close(S, [9, 2])
    assert close(left @ right, np.diag([0, 1]))


@pytest.mark.spec("awsvd.solution")
def test_awsvd_is_the_printed_solution() -> None:
    from lorap_reference.lowrank import awsvd_printed

    W, x = np.array([[1.0, 2.0, 0.0], [0.0, 1.0, 4.0]]), np.array([1.0, 0.5, 2.0])
    left, right = awsvd_printed(W, x, 1)
    U, S, V = np.linalg.svd(W @ np.diag(x))
    assert close(left @ right, S[0] * np.outer(U[:, 0], V[0]) @ np.linalg.inv(np.diag(x)))
    reference, ops = (Side("lorap_reference", np.asarray), Side("lorap.ops", torch.tensor))
    for other in (reference, ops):
        L, R, _ = other("lowrank.awsvd", W, x, 1)
        assert close(L @ R, left @ right)


@pytest.mark.spec("awsvd.dead")
def test_dead_features_follow_the_live_ones(side: Side) -> None:
    """``U_r U_r^T W`` in the dead column, where the printed solution divides by zero."""
    W = [[1.0, 3.0], [1.0, 1.0]]
    left, right, S = side("lowrank.awsvd", W, [2.0, 0.0], 1)
    # The live column is (1, 1): the dead one, (3, 1), is projected on it.
    assert close(left @ right, [[1, 2], [1, 2]])
    assert close(S, [2 * 2**0.5, 0])


@pytest.mark.spec("awsvd.deficient")
def test_directions_to_spare_go_to_what_is_left_of_the_weight(side: Side) -> None:
    W = [[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 5.0]]
    for rank, expected in ((1, [1, 0, 0]), (2, [1, 0, 5]), (3, [1, 2, 5])):
        left, right, _ = side("lowrank.awsvd", W, [1.0, 0.0, 0.0], rank)
        assert close(left @ right, np.diag(expected))
        assert close(left.T @ left, np.eye(rank))


@pytest.mark.spec("awsvd.deficient")
def test_where_the_weight_has_no_more_to_give_columns_are_zero(side: Side) -> None:
    left, right, S = side("lowrank.awsvd", np.outer([3.0, 4.0], [1.0, 2.0]), [1.0, 0.0], 2)
    assert close(np.abs(left), [[0.6, 0], [0.8, 0]])
    assert left[:, 1].tolist() == [0, 0]
    assert right[1].tolist() == [0, 0]
    assert close(left @ right, np.outer([3, 4], [1, 2]))
    assert close(S, [5, 0])


@pytest.mark.spec("awsvd.deficient")
def test_a_spare_direction_just_above_rounding_stays_orthogonal(side: Side) -> None:
    """The remainder is 1e-14 of the weight: its direction must not take in the first one's."""
    rng = np.random.default_rng(0)
    Q, _ = np.linalg.qr(rng.standard_normal((6, 6)))
    W = np.outer(Q[:, 0], [1.0, 0.7, 0.2, 0.1]) + 3e-14 * np.outer(Q[:, 1], [0.0, 0.3, 1.0, 0.0])
    left, right, _ = side("lowrank.awsvd", W, [1.0, 0.0, 0.0, 0.0], 2)
    assert np.abs(left.T @ left - np.eye(2)).max() < 1e-13
    assert close(left @ right, W)


EPS = 2.0**-52


def diagonal(shape: tuple[int, int], *values: float) -> np.ndarray[Any, Any]:
    W = np.zeros(shape)
    np.fill_diagonal(W, [*values, *[0.0] * (min(shape) - len(values))])
    return W


@pytest.mark.spec("awsvd.deficient")
@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
def test_a_direction_counts_above_eps_times_the_longer_side(
    side: Side, shape: tuple[int, int]
) -> None:
    """Of ``W D`` with the singular values 1 and t: below the threshold the dead column is next."""
    W = diagonal(shape, 1.0, 1.0, 5.0)
    for t, expected in ((9 * EPS, (1.0, 1.0, 0.0)), (7 * EPS, (1.0, 0.0, 5.0))):
        scale = np.array([1.0, t, *[0.0] * (shape[1] - 2)])
        left, right, _ = side("lowrank.awsvd", W, scale, 2)
        assert close(left @ right, diagonal(shape, *expected))


@pytest.mark.spec("awsvd.deficient")
@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
def test_a_spare_direction_counts_above_eps_times_the_longer_side_times_the_norm(
    side: Side, shape: tuple[int, int]
) -> None:
    """Two live columns of norm 1, so that the Frobenius norm is the root of 2, and a dead one."""
    scale = np.array([1.0, 1.0, *[0.0] * (shape[1] - 2)])
    floor = 8 * 2**0.5 * EPS
    for size, used in ((1.1 * floor, 1), (0.9 * floor, 0)):
        left, right, _ = side("lowrank.awsvd", diagonal(shape, 1.0, 1.0, size), scale, 3)
        assert close(left.T @ left, np.diag([1, 1, used]))
        # So much smaller than the other entries that only its own size tells.
        assert (left @ right)[2, 2] == pytest.approx(used * size, rel=1e-3)


@pytest.mark.spec("awsvd.deficient")
def test_a_spare_direction_at_the_floor_does_not_count(side: Side) -> None:
    """``norm(W)`` is 1 in doubles, and the remainder exactly 8 eps."""
    for size, used in ((8 * EPS, 0), (8 * EPS * (1 + EPS), 1)):
        left, _, _ = side("lowrank.awsvd", diagonal((8, 2), 1.0, size), [1.0, 0.0], 2)
        assert close(left.T @ left, np.diag([1, used]))


@pytest.mark.spec("awsvd.deficient", "precision.decomposition")
def test_a_narrow_scale_does_not_coarsen_the_floor() -> None:
    from lorap.ops.lowrank import awsvd

    W = torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    left, right, _ = awsvd(W, torch.tensor([1.0, 0.0], dtype=torch.float32), 2)
    assert (left @ right)[1, 1].item() == pytest.approx(1e-9)


@pytest.mark.spec("awsvd.product")
def test_rank_zero_and_empty_matrices(side: Side) -> None:
    left, right, S = side("lowrank.awsvd", [[1.0, 2.0]], [1.0, 1.0], 0)
    assert (left.shape, right.shape, S.shape) == ((1, 0), (0, 2), (1,))
    left, right, S = side("lowrank.awsvd", np.zeros((0, 3)), [1.0, 1.0, 1.0], 0)
    assert (left.shape, right.shape, S.shape) == ((0, 0), (0, 3), (0,))


@pytest.mark.spec("awsvd.deficient")
def test_numerical_rank(side: Side) -> None:
    assert side("lowrank.numerical_rank", [1.0, 0.5, 0.0], (3, 4)) == 2
    assert side("lowrank.numerical_rank", [1.0, 4.5 * EPS, 0.0], (3, 4)) == 2
    assert side("lowrank.numerical_rank", [1.0, 4 * EPS, 0.0], (3, 4)) == 1
    assert type(side("lowrank.numerical_rank", [1.0, 0.5], (2, 2))) is int
    assert side("lowrank.numerical_rank", [0.0, 0.0], (2, 2)) == 0
    assert side("lowrank.numerical_rank", np.zeros(0), (0, 2)) == 0


@pytest.mark.spec("awsvd.energy")
def test_retained_energy(side: Side) -> None:
    energies = [side("lowrank.retained_energy", [4.0, 3.0, 0.0], r) for r in range(4)]
    assert energies == [0, 16 / 25, 1, 1]
    assert all(type(energy) is float for energy in energies)
    assert side("lowrank.retained_energy", [0.0, 0.0], 1) == 1


@pytest.mark.spec("awsvd.energy", "precision.statistics")
def test_the_energy_of_narrow_singular_values_is_summed_in_float64() -> None:
    from lorap.ops.lowrank import retained_energy

    small = 2.0**-13
    energy = retained_energy(torch.tensor([1.0, small], dtype=torch.float32), 1)
    assert energy == 1 / (1 + small**2)


@pytest.mark.spec("awsvd.energy")
def test_the_least_error_is_the_energy_of_the_tail(side: Side) -> None:
    rng = np.random.default_rng(2)
    W, x = rng.standard_normal((4, 6)), rng.uniform(0.1, 3, 6)
    for rank in range(5):
        left, right, S = side("lowrank.awsvd", W, x, rank)
        error = side("lowrank.weighted_error", W, left @ right, x)
        assert error == pytest.approx(float(np.sum(S[rank:] ** 2)), rel=1e-12, abs=1e-12)


@pytest.mark.spec("prune.keep")
def test_the_least_important_and_the_top_stay(side: Side) -> None:
    scores = [50.0, 10.0, 40.0, 20.0, 30.0]
    assert side("pruning.kept_channels", scores, 1, 3).tolist() == [0, 1, 2]
    assert side("pruning.kept_channels", scores, 0, 0).tolist() == [0, 1, 2, 3, 4]
    assert side("pruning.kept_channels", scores, 0, 5).tolist() == []


@pytest.mark.spec("prune.ties")
def test_of_equal_scores_the_first_channels_are_the_least(side: Side) -> None:
    assert side("pruning.kept_channels", [1.0, 1.0, 1.0, 1.0], 1, 3).tolist() == [0, 3]
    assert side("pruning.kept_channels", [2.0, 1.0, 2.0, 1.0, 2.0], 1, 3).tolist() == [1, 2, 4]
    # More than the 16 up to which an unstable sort is stable by accident.
    assert side("pruning.kept_channels", np.ones(500), 5, 300).tolist() == [
        *range(5), *range(300, 500)
    ]  # fmt: skip


@pytest.mark.spec("prune.slice")
def test_rows_of_up_and_gate_and_columns_of_down(side: Side) -> None:
    up, gate, down = side(
        "pruning.prune_ffn",
        [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
        [[10.0, 20.0], [30.0, 40.0], [50.0, 60.0]],
        [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
        [0, 2],
    )
    assert up.tolist() == [[1, 2], [5, 6]]
    assert gate.tolist() == [[10, 20], [50, 60]]
    assert down.tolist() == [[1, 3], [4, 6]]


@pytest.mark.spec("budget.layer-ratio")
def test_layer_ratio(side: Side) -> None:
    """LLaMA-7B, whose factor Table 13 of the paper gives as 1.0405."""
    d, d_m, layers, vocabulary = 4096, 11008, 32, 32000
    layer = 4 * d * d + 3 * d * d_m
    total = 2 * vocabulary * d + d + layers * (layer + 2 * d)
    ratio = side("budget.layer_ratio", total, layers, layer, 0.2)
    assert round(ratio / 0.2, 4) == 1.0405
    assert abs(Fraction(ratio) - Fraction(0.2) * total / (layers * layer)) < Fraction(1, 2**50)


@pytest.mark.spec("budget.break-even")
def test_break_even_rank(side: Side) -> None:
    assert side("budget.break_even_rank", (4096, 4096)) == 2048
    assert side("budget.break_even_rank", (1024, 4096)) == 819.2


@pytest.mark.spec("budget.ranks.square")
@pytest.mark.parametrize(
    ("d", "s", "qk", "vo"),
    [
        # int(0.67 * 51) = 34, times 1.5 just the 51 of break-even.
        (102, 0.33, 17, None),
        (4096, 0.20, 1228, None),
        (4096, 0.2081, 1195, None),
        (4096, 0.30, 819, None),
        (4096, 0.34, 675, 2026),
        (4096, 0.40, 614, 1842),
        (4096, 0.50, 512, 1536),
        (4096, 0.5203, 491, 1473),
        (5120, 0.20, 1536, None),
        (5120, 0.50, 640, 1920),
        (5120, 0.80, 255, 766),
    ],
)
def test_the_authors_ranks(side: Side, d: int, s: float, qk: int, vo: int | None) -> None:
    ranks = side("budget.mha_ranks", dict.fromkeys("qkvo", (d, d)), s, 3, True)
    assert ranks == {"q": qk, "k": qk, "v": vo, "o": vo}
    if side.package == "lorap_reference":
        assert side("budget.authors_ranks", d, s, 3) == ranks


@pytest.mark.spec("budget.ranks")
def test_a_single_floor_can_give_one_more(side: Side) -> None:
    shapes = dict.fromkeys("qkvo", (4096, 4096))
    assert side("budget.mha_ranks", shapes, 0.34, 3, True)["v"] == 2026
    assert side("budget.mha_ranks", shapes, 0.34, 3, False)["v"] == 2027


@pytest.mark.spec("budget.ranks")
def test_ranks_of_grouped_queries_by_hand(side: Side) -> None:
    """q, o 8 x 8 (break-even 4), k, v 4 x 8 (32 / 12 ranks): N = 192, W = 64 + 32 + 96 + 192."""
    shapes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}
    # p = 0.5: q 0.5 * 4 * 192 / 384 = 1, k 0.67, o 3, v 2.
    ranks = side("budget.mha_ranks", shapes, 0.5, 3, False)
    assert ranks == {"q": 1, "k": 0, "v": 2, "o": 3}
    # Nested, floor(0.5 * 32 / 12) = 1 comes first: v gets 1.5, k 0.5.
    nested = side("budget.mha_ranks", shapes, 0.5, 3, True)
    assert nested == {"q": 1, "k": 0, "v": 1, "o": 3}


@pytest.mark.spec("budget.overflow")
def test_the_surplus_is_handed_on(side: Side) -> None:
    """p = 0.75 of four 100 x 100: v and o are due 56 of 50 and stay dense; q and k get the rest."""
    ranks = side("budget.mha_ranks", dict.fromkeys("qkvo", (100, 100)), 0.25, 3, True)
    assert ranks == {"q": 25, "k": 25, "v": None, "o": None}


@pytest.mark.spec("budget.overflow")
def test_all_of_the_surplus_goes_to_a_single_matrix(side: Side) -> None:
    """2.7 dense matrices in all, 2 of them v and o: 0.7 of q, 35 ranks of 50."""
    shapes = {"q": (100, 100), "v": (100, 100), "o": (100, 100)}
    ranks = side("budget.mha_ranks", shapes, 0.1, 4, False)
    assert ranks == {"q": 35, "v": None, "o": None}


@pytest.mark.spec("budget.overflow")
def test_the_surplus_may_overflow_again(side: Side) -> None:
    """v and o are due 1.0875 of their size, by whole ranks 4 of 4 (o) and 2 of 2.67 (v).

    o overflows at once; v then gets the whole of its share, 2.9, and overflows too. The rest,
    0.725 * 192 - 96, is 0.45 of q and k.
    """
    shapes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}
    ranks = side("budget.mha_ranks", shapes, 0.275, 3, False)
    assert ranks == {"q": 1, "k": 1, "v": None, "o": None}


@pytest.mark.spec("budget.overflow")
def test_a_rank_stays_below_break_even_where_two_floors_give_one_too_many(side: Side) -> None:
    """o and then v stay dense; k is due 0.8 * 0.8 * 40 / 20 - 20 * 0.8 / 20 = 1.28 - 0.8 ranks.

    Floored one by one they leave 1, above its break-even rank of 0.8.
    """
    shapes = {"q": (4, 4), "k": (1, 4), "v": (1, 4), "o": (4, 4)}
    ranks = side("budget.mha_ranks", shapes, 0.2, 2, False)
    assert ranks == {"q": 1, "k": 0, "v": None, "o": None}


@pytest.mark.spec("budget.overflow")
def test_what_overflows_in_one_round_turns_dense_at_once(side: Side) -> None:
    """All of v and o are due exactly half of a side in doubles; q and k get the rest.

    0.7 * 15 * 2.5 * 4 / 7 = 15, and 0.625 * 2048 * 4 / 2.5 = 2048 with q and k for v and o. One
    after the other, the second is due a rounding less than that.
    """
    square = dict.fromkeys("qkvo", (30, 30))
    ranks = side("budget.mha_ranks", square, 0.3, 2.5, False)
    assert ranks == {"q": 6, "k": 6, "v": None, "o": None}
    square = dict.fromkeys("qkvo", (4096, 4096))
    ranks = side("budget.mha_ranks", square, 0.375, 0.25, False)
    assert ranks == {"q": None, "k": None, "v": 512, "o": 512}


@pytest.mark.spec("budget.overflow")
def test_equal_weights_round_nothing(side: Side) -> None:
    """Of v and o, 288 parameters, 0.8 * 576 - 288 are left: 6.4 - 4 ranks of o.

    With a weight of 0.1 the 4 would be the floor of 3.9999999999999996.
    """
    shapes = {"q": (8, 8), "k": (28, 8), "v": (28, 8), "o": (8, 8)}
    ranks = side("budget.mha_ranks", shapes, 0.2, 0.1, True)
    assert ranks == {"q": None, "k": None, "v": 3, "o": 2}


@pytest.mark.spec("budget.slack")
def test_no_more_is_spent_than_the_budget_where_nothing_overflows(side: Side) -> None:
    for s, a in product((0.4, 0.5, 0.6, 0.7, 0.9), (1, 2, 3)):
        shapes = {"q": (48, 40), "k": (16, 40), "v": (16, 40), "o": (40, 48)}
        ranks = side("budget.mha_ranks", shapes, s, a, False)
        if None in ranks.values():
            continue
        spent = sum(rank * sum(shapes[m]) for m, rank in ranks.items())
        budget = (1 - s) * sum(m * n for m, n in shapes.values())
        assert budget - sum(map(sum, shapes.values())) < spent <= budget


@pytest.mark.spec("budget.channels")
def test_removed_band(side: Side) -> None:
    """LLaMA-7B at the ratios of the authors' table: channels kept."""
    kept = {0.20: 8807, 0.2081: 8718, 0.30: 7706, 0.40: 6605, 0.50: 5504, 0.5203: 5281}
    for s, expected in kept.items():
        low, high = side("budget.removed_band", 11008, s, 0.01)
        assert low == 110
        assert 11008 - (high - low) == expected
    assert side("budget.removed_band", 50, 0.5, 0.01) == (0, 25)


@pytest.mark.spec("budget.ieee")
def test_products_are_those_of_doubles(side: Side) -> None:
    """0.29 * 100 is 28.999999999999996, and (0.57 + 0.01) * 100 is 57.99999999999999."""
    assert side("budget.removed_band", 100, 0.57, 0.29) == (28, int((0.57 + 0.29) * 100))
    assert side("budget.removed_band", 100, 0.57, 0.01) == (1, 57)
