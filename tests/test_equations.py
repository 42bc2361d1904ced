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
            tuple(self.make(numbers(part)) for part in a)
            if isinstance(a, tuple)
            else self.make(a)
            if isinstance(a, np.ndarray)
            else a
            for a in map(numbers, arguments)
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


def numbers(value: Any) -> Any:
    """Return lists as arrays; whole numbers in an array are indices, all else is float."""
    if isinstance(value, np.ndarray) and value.dtype == np.int64:
        return value
    return np.asarray(value, dtype=float) if isinstance(value, list | np.ndarray) else value


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


X32 = torch.tensor(X, dtype=torch.float32)


@pytest.mark.spec(
    "stats.sum-of-squares",
    "stats.magnitudes",
    "stats.sum",
    "stats.second-moment",
    "stats.cross-moment",
    "heads.group",
    "wanda.mask",
    "lowrank.svd",
    "pca.product",
    "afm.product",
    "mgaa.similarity",
    "marginal.divergence",
    "update.solution",
    "obs.order",
    "target.regression",
)
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("statistics.sum_of_squares", (X32,)),
        ("statistics.sum_of_magnitudes", (X32,)),
        ("statistics.token_sum", (X32,)),
        ("statistics.second_moment", (X32,)),
        ("statistics.cross_moment", (X32, X32)),
        ("heads.head_rows", (torch.tensor([1]), 6, 2)),
        ("wanda.wanda_mask", (X32, 0.5)),
        ("lowrank.svd_low_rank", (X32, 2)),
        ("pca.pca", (X32, X32.T @ X32, 2)),
        ("pca.afm", (X32, X32.T @ X32, X32.sum(0), 2, 2)),
        ("mgaa.cosine_sum", (X32, X32)),
        ("marginal.divergence_sum", (X32, X32 + 1)),
        ("regression.least_squares_update", (X32, X32.T @ X32, torch.tensor([0, 1]), 0.01)),
        ("regression.removal_order", (X32, X32.T @ X32, 2, 0.01)),
        ("regression.regressed_weight", (X32, X32.T @ X32, X32.T @ X32, 0.5, 0.01)),
    ],
)
def test_new_tensors_are_made_where_the_inputs_are(
    function: str, arguments: tuple[Any, ...]
) -> None:
    """And not on the default device, which here is one without memory."""
    module, name = function.split(".")
    operation = getattr(importlib.import_module(f"lorap.ops.{module}"), name)
    expected = operation(*arguments)
    with torch.device("meta"):
        answer = operation(*arguments)
    parts = answer if isinstance(answer, tuple) else (answer,)
    for part, other in zip(parts, expected if len(parts) > 1 else (expected,), strict=True):
        assert part == other if isinstance(part, float) else torch.equal(part, other)


@pytest.mark.spec(
    "stats.sum-of-squares",
    "stats.magnitudes",
    "stats.sum",
    "stats.second-moment",
    "stats.cross-moment",
)
def test_the_reference_sums_narrow_inputs_in_float64() -> None:
    from lorap_reference import statistics

    narrow = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    for name in ("sum_of_squares", "sum_of_magnitudes", "token_sum", "second_moment"):
        found = getattr(statistics, name)(narrow)
        assert found.dtype == np.float64
        expected = getattr(statistics, name)(narrow.astype(np.float64))
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    found, wide = statistics.cross_moment(narrow, narrow), narrow.astype(np.float64)
    np.testing.assert_allclose(found, statistics.cross_moment(wide, wide), rtol=1e-12)


@pytest.mark.spec("stats.norm")
def test_feature_norms(side: Side) -> None:
    assert close(side.norms(X), [5, 5**0.5, 0])


@pytest.mark.spec("stats.magnitudes")
def test_sum_of_magnitudes(side: Side) -> None:
    assert side("statistics.sum_of_magnitudes", X).tolist() == [7, 3, 0]
    assert side("statistics.sum_of_magnitudes", np.zeros((0, 2))).tolist() == [0, 0]


@pytest.mark.spec("stats.sum", "stats.mean")
def test_token_sum_and_mean(side: Side) -> None:
    assert side("statistics.token_sum", X).tolist() == [7, -1, 0]
    assert side("statistics.token_sum", np.zeros((0, 2))).tolist() == [0, 0]
    assert side("statistics.token_mean", [7.0, -1.0, 0.0], 2).tolist() == [3.5, -0.5, 0]
    assert side("statistics.token_mean", [0.0, 0.0], 0).tolist() == [0, 0]


@pytest.mark.spec("stats.second-moment")
def test_second_moment(side: Side) -> None:
    assert side("statistics.second_moment", X).tolist() == [[25, -5, 0], [-5, 5, 0], [0, 0, 0]]
    assert side("statistics.second_moment", np.zeros((0, 2))).tolist() == [[0, 0], [0, 0]]
    assert side("statistics.second_moment", np.zeros((2, 0))).shape == (0, 0)


@pytest.mark.spec("stats.centred-moment")
def test_centred_moment(side: Side) -> None:
    """The mean is (3.5, -0.5, 0), the tokens are half of (-1, 3, 0) to either side of it."""
    C, t = side("statistics.second_moment", X), side("statistics.token_sum", X)
    C_c = side("statistics.centred_moment", C, t, 2)
    assert C_c.tolist() == [[0.5, -1.5, 0], [-1.5, 4.5, 0], [0, 0, 0]]
    one = side("statistics.second_moment", X[:1])
    assert side("statistics.centred_moment", one, X[0], 1).tolist() == np.zeros((3, 3)).tolist()
    none = np.zeros((3, 3))
    assert side("statistics.centred_moment", none, [0.0, 0.0, 0.0], 0).tolist() == none.tolist()


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
    from lorap.ops import statistics

    inputs = torch.tensor([[[3.0, 1.0], [torch.nan, 9.0]], [[-4.0, 2.0], [5.0, 5.0]]])
    mask = torch.tensor([[1, 0], [1, 0]])
    assert statistics.sum_of_squares(inputs, mask).tolist() == [25, 5]
    assert statistics.sum_of_magnitudes(inputs, mask).tolist() == [7, 3]
    assert statistics.token_sum(inputs, mask).tolist() == [-1, 3]
    assert statistics.second_moment(inputs, mask).tolist() == [[25, -5], [-5, 5]]


@pytest.mark.spec("precision.statistics")
def test_a_million_small_tokens_beside_a_large_one_are_not_lost() -> None:
    """In float32, 4096^2 = 2^24 swallows every 1 that is added to it."""
    from lorap.ops.statistics import sum_of_squares

    inputs = torch.ones(1_000_001, 1)
    inputs[0] = 4096
    assert sum_of_squares(inputs).item() == 2**24 + 1_000_000
    half = torch.full((4096, 1), 60000.0, dtype=torch.float16)
    assert sum_of_squares(half).item() == 4096 * 60000.0**2


@pytest.mark.spec("precision.statistics")
def test_no_sum_over_tokens_loses_what_is_small() -> None:
    """In float32, 2^24 swallows every 1 that is added to it."""
    from lorap.ops import statistics

    inputs = torch.ones(100_001, 2)
    inputs[0] = 2**24
    for sums in (statistics.sum_of_magnitudes(inputs), statistics.token_sum(inputs)):
        assert sums.tolist() == [2**24 + 100_000] * 2
    inputs[0] = 4096
    assert statistics.second_moment(inputs).tolist() == [[2**24 + 100_000] * 2] * 2


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


@pytest.mark.spec("importance.magnitude")
def test_magnitude_importance(side: Side) -> None:
    scores = side("importance.magnitude_importance", [[1.5, -2.0], [0.0, -0.25]])
    assert scores.tolist() == [[1.5, 2], [0, 0.25]]


@pytest.mark.spec("importance.taylor")
def test_taylor_importance(side: Side) -> None:
    scores = side("importance.taylor_importance", [[2.0, -3.0, 4.0]], [[-5.0, -0.5, 0.0]])
    assert scores.tolist() == [[10, 1.5, 0]]


@pytest.mark.spec("importance.taylor")
def test_taylor_scores_are_the_change_of_a_linear_loss_without_the_weight(side: Side) -> None:
    """A loss that is linear in the weights has no other terms: one after the other is zeroed."""
    rng = np.random.default_rng(0)
    W, G = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    changes = np.zeros_like(W)
    for at in np.ndindex(W.shape):
        without = W.copy()
        without[at] = 0
        changes[at] = abs(np.sum(G * without) - np.sum(G * W))
    assert close(side("importance.taylor_importance", W, G), changes)


@pytest.mark.spec("importance.group-scores")
def test_group_scores(side: Side) -> None:
    """Rows of up and gate, columns of down: 5 + 2 + 13 and 1 + 0 + 2 in the l2 norm."""
    up, gate, down = [[3.0, 4.0], [1.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]], [[5.0, 2.0], [12.0, 0.0]]
    expected = {"l2": [20, 3], "l1": [26, 3], "linf": [18, 3], "mean": [13, 1.5]}
    for aggregation, scores in expected.items():
        assert close(side("importance.group_scores", up, gate, down, aggregation), scores)


@pytest.mark.spec("importance.group-scores", "importance.group")
@pytest.mark.parametrize("aggregation", ["mean", "l1", "l2", "linf"])
def test_group_importance_is_the_group_scores_of_eq_1_to_the_last_bit(
    side: Side, aggregation: str
) -> None:
    rng = np.random.default_rng(0)
    up, gate, down = (rng.standard_normal(shape) for shape in ((7, 5), (7, 5), (5, 7)))
    x_ffn, x_down = rng.uniform(0, 2, 5), rng.uniform(0, 2, 7)
    phi = [
        side("importance.channel_importance", np.abs(W) * x, axis, aggregation)
        for W, x, axis in ((up, x_ffn, 1), (gate, x_ffn, 1), (down, x_down, 0))
    ]
    C = side("importance.group_importance", up, gate, down, x_ffn, x_down, aggregation)
    assert C.tolist() == (phi[0] + phi[1] + phi[2]).tolist()
    weights = [np.abs(up) * x_ffn, np.abs(gate) * x_ffn, np.abs(down) * x_down]
    assert C.tolist() == side("importance.group_scores", *weights, aggregation).tolist()


@pytest.mark.spec("heads.group")
def test_head_rows(side: Side) -> None:
    """Six rows of three groups, two each; the order of the groups is the order of the rows."""
    assert side("heads.head_rows", np.array([0, 2]), 6, 3).tolist() == [0, 1, 4, 5]
    assert side("heads.head_rows", np.array([2, 1]), 6, 3).tolist() == [4, 5, 2, 3]
    assert side("heads.head_rows", np.array([], dtype=np.int64), 6, 3).tolist() == []


@pytest.mark.spec("heads.group")
def test_rows_that_the_groups_cannot_share_are_refused(side: Side) -> None:
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        side("heads.head_rows", np.array([0]), 7, 3)
    with pytest.raises((ValueError, RuntimeError), match="shape"):
        side("heads.head_scores", *[np.ones((3, 2))] * 3, np.ones((2, 3)), 2)


@pytest.mark.spec("heads.scores")
@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("l2", [13 + 4 + 3 + 5, 1 + 2 + 0 + 0]),
        ("l1", [19 + 4 + 3 + 9, 1 + 2 + 0 + 0]),
        ("linf", [12 + 4 + 3 + 4, 1 + 2 + 0 + 0]),
        ("mean", [19 / 4 + 2 + 1.5 + 9 / 4, 1 / 4 + 1 + 0 + 0]),
    ],
)
def test_head_scores(side: Side, aggregation: str, expected: list[float]) -> None:
    """Two groups of two query heads, one row each; k and v have a row a group, o the columns."""
    q = [[3.0, 4.0], [0.0, 12.0], [1.0, 0.0], [0.0, 0.0]]
    k, v = [[0.0, 4.0], [2.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]]
    o = [[2.0, 1.0, 0.0, 0.0], [2.0, 4.0, 0.0, 0.0]]
    assert close(side("heads.head_scores", q, k, v, o, 2, aggregation), expected)


@pytest.mark.spec("heads.scores")
@pytest.mark.parametrize("aggregation", ["mean", "l1", "l2", "linf"])
def test_head_scores_by_loops(side: Side, aggregation: str) -> None:
    rng = np.random.default_rng(0)
    kv_heads, share, head_dim, d = 3, 2, 2, 5
    queries, keys = kv_heads * share * head_dim, kv_heads * head_dim
    q, k, v, o = (
        rng.uniform(0, 1, shape) for shape in ((queries, d), (keys, d), (keys, d), (d, queries))
    )
    phi: dict[str, Callable[[list[float]], float]] = {
        "mean": lambda s: sum(s) / len(s),
        "l1": sum,
        "l2": lambda s: sum(a * a for a in s) ** 0.5,
        "linf": max,
    }
    expected = []
    for group in range(kv_heads):
        heads = [h for h in range(kv_heads * share) if h // share == group]
        of_q = [h * head_dim + i for h in heads for i in range(head_dim)]
        of_k = [group * head_dim + i for i in range(head_dim)]
        blocks = (
            [q[i, j] for i in of_q for j in range(d)],
            [k[i, j] for i in of_k for j in range(d)],
            [v[i, j] for i in of_k for j in range(d)],
            [o[j, i] for i in of_q for j in range(d)],
        )
        expected.append(sum(phi[aggregation](block) for block in blocks))
    assert close(side("heads.head_scores", q, k, v, o, kv_heads, aggregation), expected)


@pytest.mark.spec("heads.scores", "importance.group-scores")
def test_scores_are_l2_norms_where_nothing_is_said(side: Side) -> None:
    ones, one = np.ones((2, 4)), np.ones((1, 4))
    assert side("importance.group_scores", ones, ones, ones.T).tolist() == [2 + 2 + 2] * 2
    assert close(side("heads.head_scores", ones, one, one, ones.T, 1), [2 * 8**0.5 + 4])


@pytest.mark.spec("heads.scores")
def test_how_a_head_spreads_over_its_channels_does_not_matter_to_l2(side: Side) -> None:
    """D-032: v turned by a rotation, o turned back; one channel could hold all that the two had."""
    v, o = [[3.0, 0.0], [0.0, 4.0]], [[3.0, 0.0], [0.0, 4.0]]
    Q = np.array([[0.6, 0.8], [-0.8, 0.6]])
    none = np.zeros((2, 2))
    scores = [
        side("heads.head_scores", none, none, np.abs(A @ v), np.abs(o @ A.T), 1, "l2")
        for A in (np.eye(2), Q)
    ]
    assert close(scores[0], [10])
    assert close(scores[1], scores[0])


@pytest.mark.spec("heads.slice")
def test_rows_of_q_k_and_v_and_columns_of_o(side: Side) -> None:
    q = [[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]]
    k, v = [[10.0], [20.0], [30.0]], [[-1.0], [-2.0], [-3.0]]
    o = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    parts = side("heads.prune_heads", q, k, v, o, np.array([0, 2]), 3)
    assert [part.tolist() for part in parts] == [
        [[1], [2], [5], [6]],
        [[10], [30]],
        [[-1], [-3]],
        [[1, 2, 5, 6]],
    ]


@pytest.mark.spec("wanda.mask")
def test_wanda_mask(side: Side) -> None:
    """Each row drops its own: the 5 of the first row goes, the 1 of the second stays."""
    scores = [[9.0, 5.0, 7.0, 8.0, 6.0], [0.5, 1.0, 0.0, 2.0, 0.25]]
    assert side("wanda.wanda_mask", scores, 0.5).tolist() == [
        [True, False, True, True, False],
        [True, True, False, True, False],
    ]
    assert side("wanda.wanda_mask", scores, 0.0).all()
    assert not side("wanda.wanda_mask", scores, 1.0).any()


@pytest.mark.spec("wanda.mask")
def test_of_equal_scores_among_others_wanda_drops_the_first(side: Side) -> None:
    scores = np.random.default_rng(0).integers(0, 4, (2, 500)).astype(np.float64)
    for row, mask in zip(scores, side("wanda.wanda_mask", scores, 0.4), strict=True):
        dropped = sorted(range(500), key=lambda j, row=row: (row[j], j))[:200]
        assert np.flatnonzero(~np.asarray(mask)).tolist() == sorted(dropped)


@pytest.mark.spec("wanda.mask")
def test_of_equal_scores_wanda_drops_the_first(side: Side) -> None:
    # More than the 16 up to which an unstable sort is stable by accident.
    mask = side("wanda.wanda_mask", np.ones((2, 500)), 0.3)
    assert mask.tolist() == [[False] * 150 + [True] * 350] * 2


@pytest.mark.spec("wanda.mask")
def test_wanda_counts_in_doubles(side: Side) -> None:
    """0.29 * 100 is 28.999999999999996."""
    assert np.sum(~side("wanda.wanda_mask", np.ones((1, 100)), 0.29)) == 28


@pytest.mark.spec("lowrank.apply")
def test_low_rank_apply(side: Side) -> None:
    left, right = [[1.0], [2.0]], [[3.0, 0.0, -1.0]]
    assert side("lowrank.low_rank_apply", left, right, [[1.0, 7.0, 2.0]]).tolist() == [[1, 2]]
    assert side("lowrank.low_rank_apply", np.zeros((2, 0)), np.zeros((0, 3)), [[1.0, 7.0, 2.0]]
                ).tolist() == [[0, 0]]  # fmt: skip


@pytest.mark.spec("lowrank.svd")
def test_svd_low_rank(side: Side) -> None:
    """``diag(3, 2, 1)`` loses its smallest; a product of rank one is found again."""
    left, right, S = side("lowrank.svd_low_rank", np.diag([3.0, 1.0, 2.0]), 2)
    assert close(left @ right, np.diag([3, 0, 2]))
    assert close(S, [3, 2, 1])
    # The factors are U_r and U_r^T W, signs aside.
    assert close(np.abs(left), [[1, 0], [0, 0], [0, 1]])
    assert close(np.abs(right), [[3, 0, 0], [0, 0, 2]])
    one = np.outer([3.0, 4.0], [4.0, 5.0])
    left, right, S = side("lowrank.svd_low_rank", one, 2)
    assert close(left @ right, one)
    assert close(S, [5 * 41**0.5, 0])
    assert left[:, 1].tolist() == [0, 0], "zero beyond the rank"


@pytest.mark.spec("awsvd.scale")
def test_column_scale(side: Side) -> None:
    assert side("lowrank.column_scale", [4.0, 0.0, 9.0]).tolist() == [4, 0, 9]
    assert side("lowrank.column_scale", [4.0, 0.0, 9.0], "eq7").tolist() == [4, 0, 9]
    assert side("lowrank.column_scale", [4.0, 0.0, 9.0], "eq6").tolist() == [2, 0, 3]


@pytest.mark.spec("asvd.scale")
def test_magnitude_scale(side: Side) -> None:
    magnitudes = [8.0, 0.0, 2.0]
    for alpha, expected in ((0.5, [2, 0, 1]), (1.0, [4, 0, 1]), (0.0, [1, 1, 1]), (2, [16, 0, 1])):
        assert side("lowrank.magnitude_scale", magnitudes, 2, alpha).tolist() == expected
    assert side("lowrank.magnitude_scale", [0.0, 0.0], 0, 0.5).tolist() == [0, 0]
    assert side("lowrank.magnitude_scale", [0.0, 0.0], 0, 0.0).tolist() == [1, 1]


@pytest.mark.spec("asvd.product")
def test_asvd_by_hand(side: Side) -> None:
    """``W D = diag(2, 9^alpha)``: the power decides between the rows of ``diag(2, 1)``."""
    W = np.diag([2.0, 1.0])
    for alpha, kept, S in ((0.0, [2, 0], [2, 1]), (0.5, [0, 1], [3, 2]), (1.0, [0, 1], [9, 2])):
        scale = side("lowrank.magnitude_scale", [3.0, 27.0], 3, alpha)
        left, right, found = side("lowrank.awsvd", W, scale, 1)
        assert close(left @ right, np.diag(kept))
        assert close(found, S)


@pytest.mark.spec("asvd.product")
def test_asvd_is_its_printed_solution(side: Side) -> None:
    """``U_r S_r V_r D^-1`` with the mean of the magnitudes, by loops over the tokens."""
    rng = np.random.default_rng(3)
    W, tokens = rng.standard_normal((3, 4)), rng.standard_normal((7, 4)) * [1, 2, 4, 8]
    mean = [sum(abs(token[j]) for token in tokens) / 7 for j in range(4)]
    D = np.diag(np.array(mean) ** 0.5)
    U, S, V = np.linalg.svd(W @ D, full_matrices=False)
    scale = side("lowrank.magnitude_scale", side("statistics.sum_of_magnitudes", tokens), 7, 0.5)
    left, right, found = side("lowrank.awsvd", W, scale, 2)
    assert close(left @ right, U[:, :2] * S[:2] @ V[:2] @ np.linalg.inv(D))
    assert close(found, S)


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
    # Squares of float32 numbers are exact in float64, and so is their sum here.
    narrow, none = torch.tensor([[1.0, 2.0**-13]]), torch.zeros(1, 2)
    assert weighted_error(narrow, none, torch.ones(2)) == 1 + 2.0**-26
    assert weighted_error(none + 1, none, narrow[0].double() + 2.0**-40) > 1 + 2.0**-26 + 2.0**-40
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


@pytest.mark.spec("joint.stack", "joint.split")
def test_joint_factors_by_hand(side: Side) -> None:
    """Three rows along one direction: a single right factor gives all of them back."""
    q, k = [[3.0, 4.0]], [[6.0, 8.0], [-3.0, -4.0]]
    stack = side("joint.stacked", (q, k))
    assert stack.tolist() == [*q, *k]
    left, right, _ = side("lowrank.svd_low_rank", stack, 1)
    left_q, left_k = side("joint.split", left, (1, 2))
    assert (left_q.shape, left_k.shape) == ((1, 1), (2, 1))
    assert close(left_q @ right, q)
    assert close(left_k @ right, k)
    bias_q, bias_k = side("joint.split", [1.0, 2.0, 3.0], (1, 2))
    assert (bias_q.tolist(), bias_k.tolist()) == ([1], [2, 3])


@pytest.mark.spec("joint.split")
def test_parts_of_a_joint_factor_are_stored_apart() -> None:
    from lorap.ops.joint import split

    whole = torch.zeros(3, 2)
    for part in split(whole, (1, 2)):
        part += 1
    assert not whole.any()


def outputs(X: Any, W: Any) -> np.ndarray[Any, Any]:
    """Outputs of a linear, token by token and output by output."""
    return np.array(
        [[sum(w * x for w, x in zip(row, token, strict=True)) for row in W] for token in X]
    )


def moments(side: Side, X: Any) -> tuple[Any, Any, int]:
    return side("statistics.second_moment", X), side("statistics.token_sum", X), len(X)


@pytest.mark.spec("output.moment")
def test_output_moment(side: Side) -> None:
    W = [[1.0, 2.0, 5.0], [0.0, -1.0, 1.0]]
    # The outputs of the two tokens are (5, -1) and (0, 2).
    assert outputs(X, W).tolist() == [[5, -1], [0, 2]]
    C, t, n = moments(side, X)
    assert side("pca.output_moment", W, C).tolist() == [[25, -5], [-5, 5]]
    C_c = side("statistics.centred_moment", C, t, n)
    assert side("pca.output_moment", W, C_c).tolist() == [[12.5, -7.5], [-7.5, 4.5]]


@pytest.mark.spec("output.error")
def test_output_error(side: Side) -> None:
    W, near = [[1.0, 2.0, 5.0], [0.0, -1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    # Off by (1, -1) for the first token, by (-2, 2) for the second.
    C, _, _ = moments(side, X)
    assert side("pca.output_error", W, near, C) == 1 + 1 + 4 + 4
    assert side("pca.output_error", W, W, C) == 0


@pytest.mark.spec("output.error")
def test_an_output_error_is_never_negative(side: Side) -> None:
    """The rows are in directions that no token has: rounding makes some errors negative."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((50, 1)) @ rng.standard_normal((1, 30))
    C = side("statistics.second_moment", tokens)
    rows = rng.standard_normal((40, 29)) @ np.linalg.svd(tokens)[2][1:]
    assert np.any(np.sum((rows @ C) * rows, axis=1) < 0)
    errors = [side("pca.output_error", rows[i : i + 1], np.zeros((1, 30)), C) for i in range(40)]
    assert min(errors) == 0
    # What is negative takes nothing from the error of another output.
    assert side("pca.output_error", np.eye(2), np.zeros((2, 2)), np.diag([-1.0, 1.0])) == 1


def best_direction_of_outputs(Y: np.ndarray[Any, Any]) -> float:
    """Least error of outputs, two of them, projected on one direction, over all directions."""
    return best_direction(Y.T)


@pytest.mark.spec("pca.product", "pca.spectrum")
def test_pca_by_hand(side: Side) -> None:
    """Outputs along (1, 1), though both features have the same norm and both rows the same size."""
    left, right, S = side("pca.pca", np.eye(2), [[5.0, 5.0], [5.0, 5.0]], 1)
    assert close(left @ right, [[0.5, 0.5], [0.5, 0.5]])
    assert close(S**2, [10, 0])
    # Outputs of (2, 1) times independent features, of 4 and 25: 16 and 25.
    left, right, S = side("pca.pca", np.diag([2.0, 1.0]), np.diag([4.0, 25.0]), 1)
    assert close(left @ right, np.diag([0, 1]))
    assert close(S, [5, 4])


@pytest.mark.spec("pca.product", "pca.spectrum", "output.error")
def test_pca_minimises_the_error_of_the_outputs(side: Side) -> None:
    """By trying all directions of the outputs of the tokens."""
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((20, 3)) @ rng.standard_normal((3, 4))
    W = rng.standard_normal((2, 4))
    Y, C = outputs(mixed, W), side("statistics.second_moment", mixed)
    left, right, S = side("pca.pca", W, C, 1)
    error = side("pca.output_error", W, left @ right, C)
    assert error == pytest.approx(np.sum((Y - outputs(mixed, left @ right)) ** 2), rel=1e-10)
    assert error == pytest.approx(best_direction_of_outputs(Y), rel=1e-8)
    assert error == pytest.approx(S[1] ** 2, rel=1e-10)
    norms = side.norms(mixed.tolist())
    for factors in (side("lowrank.awsvd", W, norms, 1), side("lowrank.svd_low_rank", W, 1)):
        assert side("pca.output_error", W, factors[0] @ factors[1], C) > 1.01 * error


@pytest.mark.spec("pca.whitened")
def test_whitening_by_hand() -> None:
    """``C = G G^T`` with ``G = [[2, 0], [1, 2]]``; the truncated SVD of W G, times the inverse."""
    from lorap_reference.pca import whitened

    W, C = np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([[4.0, 2.0], [2.0, 5.0]])
    G = np.array([[2.0, 0.0], [1.0, 2.0]])
    U, S, V = np.linalg.svd(W @ G)
    left, right = whitened(W, C, 1)
    assert close(left @ right, S[0] * np.outer(U[:, 0], V[0]) @ np.linalg.inv(G))
    for package in (Side("lorap_reference", np.asarray), Side("lorap.ops", torch.tensor)):
        L, R, found = package("pca.pca", W, C, 1)
        assert close(L @ R, left @ right)
        assert close(found, S)
    with pytest.raises(np.linalg.LinAlgError):
        whitened(W, np.diag([1.0, 0.0]), 1)


@pytest.mark.spec("pca.deficient")
def test_directions_that_the_outputs_lack_go_to_what_is_left_of_the_weight(side: Side) -> None:
    W = np.diag([1.0, 2.0, 5.0])
    for C in (np.diag([9.0, 0.0, 0.0]), [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]):
        for rank, expected in ((1, [1, 0, 0]), (2, [1, 0, 5]), (3, [1, 2, 5])):
            left, right, _ = side("pca.pca", W, C, rank)
            assert close(left @ right, np.diag(expected))
            assert close(left.T @ left, np.eye(rank))
    # No token: the plain SVD. No weight: zero columns.
    left, right, S = side("pca.pca", W, np.zeros((3, 3)), 2)
    assert close(left @ right, np.diag([0, 2, 5]))
    assert S.tolist() == [0, 0, 0]
    left, right, _ = side("pca.pca", np.outer([3.0, 4.0], [1.0, 2.0]), np.eye(2), 2)
    assert close(np.abs(left), [[0.6, 0], [0.8, 0]])
    assert left[:, 1].tolist() == [0, 0]


@pytest.mark.spec("pca.deficient")
def test_rounding_of_what_cancels_is_no_direction(side: Side) -> None:
    """The weight answers to none of the tokens: all eigenvalues are rounding, the first one too."""
    token, W = [1e6, 1e6 / 3], np.array([[1.0, -3.0], [2.0, -6.0 + 1e-9]])
    C = side("statistics.second_moment", [token] * 3)
    floor = side("pca.rounding_floor", W, C, 2)
    assert floor == pytest.approx(2 * 2**-52 * 3e12 * ((1 + 4) + (9 + 36) / 9), rel=1e-9)
    assert np.max(np.abs(np.linalg.eigvalsh(W @ C @ W.T))) < floor
    left, right, _ = side("pca.pca", W, C, 1)
    U, S, V = np.linalg.svd(W)
    assert close(left @ right, S[0] * np.outer(U[:, 0], V[0]))


@pytest.mark.spec("pca.deficient", "pca.spectrum")
def test_a_direction_too_small_for_its_square_comes_from_the_weight(side: Side) -> None:
    W = np.diag([1.0, 1e-10])
    left, right, S = side("pca.pca", W, np.eye(2), 2)
    np.testing.assert_allclose(left @ right, W, rtol=1e-12, atol=0)
    assert S[0] == pytest.approx(1)
    assert S[1] < 1e-7


@pytest.mark.spec("pca.deficient", "afm.deficient")
@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
@pytest.mark.parametrize("tokens", [None, 2, 11])
def test_an_eigenvalue_counts_above_eps_times_the_longest_sum(
    side: Side, shape: tuple[int, int], tokens: int | None
) -> None:
    """Of the outputs' moment diag(1, t, 0, 0): below the floor the unexcited feature is next.

    For AFM the tokens are such that nothing is centred away, and their number counts as a sum.
    """
    terms = max(8, tokens or 0)
    W = diagonal(shape, 1.0, 1.0, 5.0)
    for times, expected in ((1.1, (1.0, 1.0, 0.0)), (0.9, (1.0, 0.0, 5.0))):
        moment = np.diag([1.0, times * terms * EPS, *[0.0] * (shape[1] - 2)])
        if tokens is None:
            left, right, _ = side("pca.pca", W, moment, 2)
        else:
            left, right, *_ = side("pca.afm", W, moment, np.zeros(shape[1]), tokens, 2)
        assert close(left @ right, diagonal(shape, *expected))


@pytest.mark.spec("pca.deficient")
def test_an_eigenvalue_at_the_floor_does_not_count(side: Side) -> None:
    W = diagonal((4, 3), 1.0, 1.0, 5.0)
    at = 4 * EPS * (1 + 4 * EPS)
    floor = side("pca.rounding_floor", W, np.diag([1.0, at, 0.0]), 4)
    assert floor == at
    assert type(floor) is float
    left, right, _ = side("pca.pca", W, np.diag([1.0, at, 0.0]), 2)
    assert close(left @ right, diagonal((4, 3), 1.0, 0.0, 5.0))


@pytest.mark.spec("output.moment", "output.error", "pca.deficient", "pca.product", "afm.product")
def test_moments_may_be_narrower_than_the_weight() -> None:
    from lorap.ops import pca

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(20, 3, generator=generator) + 1
    W = torch.randn(4, 3, generator=generator).double()
    C, t = tokens.T @ tokens, tokens.sum(0)
    wide = C.double(), t.double()
    assert torch.equal(pca.output_moment(W, C), pca.output_moment(W, wide[0]))
    assert pca.output_error(W, W / 2, C) == pca.output_error(W, W / 2, wide[0])
    assert pca.rounding_floor(W, C, 4) == pca.rounding_floor(W, wide[0], 4)
    for narrow, exact in (
        (pca.pca(W, C, 2), pca.pca(W, wide[0], 2)),
        (pca.afm(W, C, t, 20, 2), pca.afm(W, *wide, 20, 2)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(narrow, exact, strict=True))


@pytest.mark.spec("output.error")
def test_an_error_of_outputs_is_a_number(side: Side) -> None:
    """Of each output by itself, never negative: here the moment is, as rounding could make it."""
    error = side("pca.output_error", np.eye(2), np.zeros((2, 2)), np.diag([4.0, -3.0]))
    assert error == 4
    assert type(error) is float


@pytest.mark.spec("pca.product", "afm.product")
def test_pca_and_afm_of_rank_zero_and_of_empty_matrices(side: Side) -> None:
    for W, rank in (([[1.0, 2.0]], 0), (np.zeros((0, 2)), 0), (np.zeros((3, 2)), 2)):
        d_out = len(W)
        left, right, S = side("pca.pca", W, np.eye(2), rank)
        assert (left.shape, right.shape) == ((d_out, rank), (rank, 2))
        assert S.shape == (min(d_out, 2),)
        left, right, S, bias = side("pca.afm", W, np.eye(2), [1.0, 1.0], 2, rank)
        assert (left.shape, right.shape) == ((d_out, rank), (rank, 2))
        assert (S.shape, bias.shape) == ((min(d_out, 2),), (d_out,))
        # Of nothing but the bias, the mean output.
        assert close(bias, np.asarray(W) @ [0.5, 0.5])


@pytest.mark.spec("afm.product", "afm.bias")
def test_afm_by_hand(side: Side) -> None:
    """The mean is large and does not vary: it is for the bias, the direction for what varies."""
    tokens = [[10.0, 1.0], [10.0, -1.0]]
    left, right, S, bias = side("pca.afm", np.eye(2), *moments(side, tokens), 1)
    assert close(left @ right, np.diag([0, 1]))
    assert close(bias, [10, 0])
    assert close(S**2, [2, 0])
    # Without the bias it would be far behind PCA, whose direction is that of the mean.
    C, _, _ = moments(side, tokens)
    L, R, _ = side("pca.pca", np.eye(2), C, 1)
    assert side("pca.output_error", np.eye(2), L @ R, C) == pytest.approx(2)
    assert side("pca.output_error", np.eye(2), left @ right, C) == pytest.approx(200)


def best_affine_line(Y: np.ndarray[Any, Any]) -> float:
    """Least error of outputs, two of them, put on a line, over all directions and offsets."""
    angles = np.linspace(0, np.pi, 2001)
    normals = np.stack([-np.sin(angles), np.cos(angles)])
    distances = Y @ normals
    offsets = np.linspace(distances.min(), distances.max(), 2001)
    return min(float(np.min(np.sum((distances - o) ** 2, axis=0))) for o in offsets)


@pytest.mark.spec("afm.product", "afm.bias")
def test_afm_minimises_the_error_over_affine_maps(side: Side) -> None:
    """By trying all lines in the plane of two outputs: where they point and where they pass."""
    rng = np.random.default_rng(4)
    tokens = rng.standard_normal((15, 3)) * [1.0, 2.0, 0.5] + [3.0, -1.0, 2.0]
    W = rng.standard_normal((2, 3))
    C, t, n = moments(side, tokens)
    left, right, S, bias = side("pca.afm", W, C, t, n, 1)
    Y = outputs(tokens, W)
    error = float(np.sum((Y - outputs(tokens, left @ right) - bias) ** 2))
    assert error == pytest.approx(best_affine_line(Y), rel=1e-4)
    assert error == pytest.approx(S[1] ** 2, rel=1e-10)
    C_c = side("statistics.centred_moment", C, t, n)
    assert error == pytest.approx(side("pca.output_error", W, left @ right, C_c), rel=1e-10)
    L, R, _ = side("pca.pca", W, C, 1)
    assert np.sum((Y - outputs(tokens, L @ R)) ** 2) > 1.01 * error


@pytest.mark.spec("afm.bias")
def test_a_bias_of_the_linears_own_stays(side: Side) -> None:
    """Yu and Wu's two factors with a bias each, from the outputs with the bias in them."""
    rng = np.random.default_rng(5)
    tokens, W, b = rng.standard_normal((30, 4)) + 2, rng.standard_normal((3, 4)), [1.0, -5.0, 2.0]
    Y = outputs(tokens, W) + b
    mean = np.mean(Y, axis=0)
    U = np.linalg.eigh(np.cov(Y.T))[1][:, ::-1][:, :2]
    theirs = (tokens @ (U.T @ W).T + U.T @ b) @ U.T + mean - U @ (U.T @ mean)
    left, right, _, bias = side("pca.afm", W, *moments(side, tokens), 2)
    assert close(outputs(tokens, left @ right) + bias + b, theirs)


@pytest.mark.spec("afm.deficient")
@pytest.mark.parametrize("count", [0, 1, 50, 1001])
def test_where_nothing_varies_afm_is_the_plain_svd_with_the_outputs_in_the_bias(
    side: Side, count: int
) -> None:
    token, W = (
        np.array([0.1, 0.7, 1 / 3]),
        np.array([[1.0, 0.2, 0.0], [0.0, 2.0, 0.3], [0.5, 0, 5]]),
    )
    C, t, n = moments(side, np.tile(token, (count, 1)))
    left, right, _, bias = side("pca.afm", W, C, t, n, 1)
    U, S, V = np.linalg.svd(W)
    assert close(left @ right, S[0] * np.outer(U[:, 0], V[0]))
    if count:
        np.testing.assert_allclose(left @ right @ token + bias, W @ token, rtol=1e-12)
    else:
        assert bias.tolist() == [0, 0, 0]


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
        np.array([0, 2]),
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
        # Of 25 times 1.5 a half is cut off.
        (100, 0.50, 12, 37),
        (4096, 0.5203, 491, 1473),
        (5120, 0.20, 1536, None),
        (5120, 0.50, 640, 1920),
        (5120, 0.80, 255, 766),
    ],
)
def test_the_authors_ranks(side: Side, d: int, s: float, qk: int, vo: int | None) -> None:
    ranks = side("budget.ranks", dict.fromkeys("qkvo", (d, d)), s, 3, True)
    assert ranks == {"q": qk, "k": qk, "v": vo, "o": vo}
    if side.package == "lorap_reference":
        assert side("budget.authors_ranks", d, s, 3) == ranks


@pytest.mark.spec("budget.ranks")
def test_a_single_floor_can_give_one_more(side: Side) -> None:
    shapes = dict.fromkeys("qkvo", (4096, 4096))
    assert side("budget.ranks", shapes, 0.34, 3, True)["v"] == 2026
    assert side("budget.ranks", shapes, 0.34, 3, False)["v"] == 2027


@pytest.mark.spec("budget.ranks")
def test_ranks_of_grouped_queries_by_hand(side: Side) -> None:
    """q, o 8 x 8 (break-even 4), k, v 4 x 8 (32 / 12 ranks): N = 192, W = 64 + 32 + 96 + 192."""
    shapes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}
    # p = 0.5: q 0.5 * 4 * 192 / 384 = 1, k 0.67, o 3, v 2.
    ranks = side("budget.ranks", shapes, 0.5, 3, False)
    assert ranks == {"q": 1, "k": 0, "v": 2, "o": 3}
    # Nested, floor(0.5 * 32 / 12) = 1 comes first: v gets 1.5, k 0.5.
    nested = side("budget.ranks", shapes, 0.5, 3, True)
    assert nested == {"q": 1, "k": 0, "v": 1, "o": 3}


@pytest.mark.spec("budget.ranks", "budget.ieee")
def test_a_rank_is_the_floor_of_doubles_in_the_order_of_the_rule(side: Side) -> None:
    """With w N / W = 5/3 for v and o, o is due 0.45 * 32 * 5 / 3 = 24; the doubles fall short."""
    shapes = {"q": (64, 64), "k": (16, 64), "v": (16, 64), "o": (64, 64)}
    ranks = side("budget.ranks", shapes, 0.55, 5, False)
    assert ranks == {"q": 4, "k": 1, "v": 9, "o": 23}


@pytest.mark.spec("budget.ranks")
@pytest.mark.parametrize("nested", [True, False])
def test_an_ffn_alone_gets_the_uniform_rank(side: Side, nested: bool) -> None:
    """0.8 of LLaMA-7B's 11008 x 4096, over 15104 parameters a rank, is 2388.2; 0.5 is 1492.6."""
    shapes = {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    for s, rank in ((0.2, 2388), (0.5, 1492)):
        assert side("budget.ranks", shapes, s, 3, nested) == dict.fromkeys(shapes, rank)


@pytest.mark.spec("budget.ranks")
def test_a_joint_matrix_weighs_what_q_and_k_do(side: Side) -> None:
    """qk 16 x 8 (a rank: 24 parameters), v, o 8 x 8: N = 256, W = 128 + 3 * 128, so w N / W = 1/2.

    p = 0.5: qk 0.5 * 128 / 24 / 2 = 1.33, v and o 0.5 * 4 * 1.5 = 3.
    """
    shapes = {"qk": (16, 8), "v": (8, 8), "o": (8, 8)}
    assert side("budget.ranks", shapes, 0.5, 3, False) == {"qk": 1, "v": 3, "o": 3}


@pytest.mark.spec("budget.ranks")
def test_all_but_v_and_o_weigh_one(side: Side) -> None:
    """Seven of 60 x 60, W = 11 * 3600: 30 p * 7 / 11 ranks each, and v and o three times that."""
    shapes = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), (60, 60))
    ranks = side("budget.ranks", shapes, 0.6, 3, False)
    assert ranks == {m: 22 if m in "vo" else 7 for m in shapes}


@pytest.mark.spec("budget.overflow")
def test_the_surplus_is_handed_on(side: Side) -> None:
    """p = 0.75 of four 100 x 100: v and o are due 56 of 50 and stay dense; q and k get the rest."""
    ranks = side("budget.ranks", dict.fromkeys("qkvo", (100, 100)), 0.25, 3, True)
    assert ranks == {"q": 25, "k": 25, "v": None, "o": None}


@pytest.mark.spec("budget.overflow")
def test_all_of_the_surplus_goes_to_a_single_matrix(side: Side) -> None:
    """2.7 dense matrices in all, 2 of them v and o: 0.7 of q, 35 ranks of 50."""
    shapes = {"q": (100, 100), "v": (100, 100), "o": (100, 100)}
    ranks = side("budget.ranks", shapes, 0.1, 4, False)
    assert ranks == {"q": 35, "v": None, "o": None}


@pytest.mark.spec("budget.overflow")
def test_the_surplus_may_overflow_again(side: Side) -> None:
    """v and o are due 1.0875 of their size, by whole ranks 4 of 4 (o) and 2 of 2.67 (v).

    o overflows at once; v then gets the whole of its share, 2.9, and overflows too. The rest,
    0.725 * 192 - 96, is 0.45 of q and k.
    """
    shapes = {"q": (8, 8), "k": (4, 8), "v": (4, 8), "o": (8, 8)}
    ranks = side("budget.ranks", shapes, 0.275, 3, False)
    assert ranks == {"q": 1, "k": 1, "v": None, "o": None}


@pytest.mark.spec("budget.overflow")
def test_a_rank_stays_below_break_even_where_two_floors_give_one_too_many(side: Side) -> None:
    """o and then v stay dense; k is due 0.8 * 0.8 * 40 / 20 - 20 * 0.8 / 20 = 1.28 - 0.8 ranks.

    Floored one by one they leave 1, above its break-even rank of 0.8.
    """
    shapes = {"q": (4, 4), "k": (1, 4), "v": (1, 4), "o": (4, 4)}
    ranks = side("budget.ranks", shapes, 0.2, 2, False)
    assert ranks == {"q": 1, "k": 0, "v": None, "o": None}


@pytest.mark.spec("budget.overflow")
def test_what_overflows_in_one_round_turns_dense_at_once(side: Side) -> None:
    """All of v and o are due exactly half of a side in doubles; q and k get the rest.

    0.7 * 15 * 2.5 * 4 / 7 = 15, and 0.625 * 2048 * 4 / 2.5 = 2048 with q and k for v and o. One
    after the other, the second is due a rounding less than that.
    """
    square = dict.fromkeys("qkvo", (30, 30))
    ranks = side("budget.ranks", square, 0.3, 2.5, False)
    assert ranks == {"q": 6, "k": 6, "v": None, "o": None}
    square = dict.fromkeys("qkvo", (4096, 4096))
    ranks = side("budget.ranks", square, 0.375, 0.25, False)
    assert ranks == {"q": None, "k": None, "v": 512, "o": 512}


@pytest.mark.spec("budget.overflow")
def test_equal_weights_round_nothing(side: Side) -> None:
    """Of v and o, 288 parameters, 0.8 * 576 - 288 are left: 6.4 - 4 ranks of o.

    With a weight of 0.1 the 4 would be the floor of 3.9999999999999996.
    """
    shapes = {"q": (8, 8), "k": (28, 8), "v": (28, 8), "o": (8, 8)}
    ranks = side("budget.ranks", shapes, 0.2, 0.1, True)
    assert ranks == {"q": None, "k": None, "v": 3, "o": 2}


@pytest.mark.spec("budget.slack")
def test_no_more_is_spent_than_the_budget_where_nothing_overflows(side: Side) -> None:
    for s, a in product((0.4, 0.5, 0.6, 0.7, 0.9), (1, 2, 3)):
        shapes = {"q": (48, 40), "k": (16, 40), "v": (16, 40), "o": (40, 48)}
        ranks = side("budget.ranks", shapes, s, a, False)
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


@pytest.mark.spec("budget.multiple")
@pytest.mark.parametrize(
    ("sizes", "per_unit", "dense", "multiple", "expected"),
    [
        # Due 10, 12, 14, 8: 12 is as near to 8 as to 16.
        ([10] * 4, 16, 1024, 8, [8, 8, 16, 8]),
        # Due 14, 6 (never 0), 12, 20 - 4: what was too much is taken off, and comes back.
        ([14, 8, 14, 12], 3, 1000, 8, [16, 8, 8, 16]),
        # 36 are nearer to 38, the dense module, than to 32; then 34 are not, and then 38 are due.
        ([9, 9, 9], 4, 38, 8, [None, 8, None]),
        # 36 are as near to 32 as to 40, the dense module.
        ([9, 9], 4, 40, 8, [8, None]),
        # Smaller than a multiple: as it is, and of no effect on the others.
        ([10, 3, 10], 16, 1024, 8, [8, 3, 8]),
        ([1, 2, 3], 7, 70, 1, [1, 2, 3]),
        ([0, 5], 7, 70, 1, [0, 5]),
        ([], 7, 70, 4, []),
    ],
)
def test_sizes_as_multiples(
    side: Side,
    sizes: list[int],
    per_unit: int,
    dense: int,
    multiple: int,
    expected: list[int | None],
) -> None:
    assert side("budget.rounded_sizes", sizes, per_unit, dense, multiple) == expected


@pytest.mark.spec("mgaa.similarity")
def test_features_of_all_sizes_have_a_cosine(side: Side) -> None:
    """Divided by the largest of a token no square overflows; by the smallest it would."""
    token = [[1e-200, 1e200]]
    assert side("mgaa.cosine_sum", token, token) == 1
    assert side("mgaa.cosine_sum", token, [[1e200, 1e-200]]) < 1e-300
