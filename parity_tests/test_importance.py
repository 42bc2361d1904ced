"""Eq. (1), (2), (8), (9), (10): importance of weights, channels and groups."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorap.ops import importance as ours
from lorap.ops import precision
from lorap.ops.precision import compute_dtype
from lorap_reference import importance as reference
from parity_tests import compare, tolerances
from parity_tests import strategies as own
from parity_tests.tolerances import EPS32, EPS64

dtypes = st.sampled_from(((torch.float64, EPS64), (torch.float32, EPS32)))
Dtype = tuple[torch.dtype, float]


def label(quantity: str, eps: float) -> str:
    """Return the quantity's name in the report, by the dtype computed in."""
    return quantity if eps == EPS64 else f"{quantity} (float32)"


@pytest.mark.spec("importance.weight", "precision.compute")
@given(problem=own.problems(), layout=own.layouts, dtype=dtypes)
def test_weight_importance(problem: own.Problem, layout: own.Layout, dtype: Dtype) -> None:
    W, x = own.pair(problem.W, layout, dtype[0]), own.pair(problem.scale)
    scores = ours.weight_importance(W.tensor, x.tensor)
    assert scores.dtype == dtype[0]
    assert W.unchanged()
    assert x.unchanged()
    compare.relatively_close(
        label("weight importance", dtype[1]),
        scores,
        reference.weight_importance(W.array, x.array),
        tolerances.weight_importance(dtype[1]),
    )


@pytest.mark.spec("importance.magnitude", "precision.compute")
@given(
    W=own.matrices(),
    layout=own.layouts,
    dtype=st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16)),
)
def test_magnitude_importance(W: own.Array, layout: own.Layout, dtype: torch.dtype) -> None:
    # fp16 holds no more than 65504.
    pair = own.pair(np.clip(W, -6e4, 6e4), layout, dtype)
    scores = ours.magnitude_importance(pair.tensor)
    assert scores.dtype == compute_dtype(pair.tensor)
    assert pair.unchanged()
    compare.exact("magnitude importance", scores, reference.magnitude_importance(pair.array))


@pytest.mark.spec("importance.taylor", "precision.compute")
@given(
    W=own.matrices(),
    seed=own.seeds,
    size=own.scales,
    layout=own.layouts,
    dtype=dtypes,
    gradient_dtype=dtypes,
)
def test_taylor_importance(
    W: own.Array,
    seed: int,
    size: float,
    layout: own.Layout,
    dtype: Dtype,
    gradient_dtype: Dtype,
) -> None:
    gradient = size * np.random.default_rng(seed).standard_normal(W.shape)
    weight, G = own.pair(W, layout, dtype[0]), own.pair(gradient, layout, gradient_dtype[0])
    scores = ours.taylor_importance(weight.tensor, G.tensor)
    assert scores.dtype == dtype[0]
    assert weight.unchanged()
    assert G.unchanged()
    theirs = reference.taylor_importance(weight.array, G.array)
    compare.close(
        label("Taylor importance", dtype[1]),
        scores,
        theirs,
        tolerances.taylor_importance(weight.array, theirs, dtype[1]),
    )


@pytest.mark.spec("importance.channel")
@given(
    scores=own.matrices(smallest=1),
    layout=own.layouts,
    axis=st.sampled_from((0, 1)),
    aggregation=own.aggregations,
    widened=st.sampled_from((1, 7, 20, precision.CACHED_ELEMENTS)),
)
def test_channel_importance(
    scores: own.Array,
    layout: own.Layout,
    axis: int,
    aggregation: reference.Aggregation,
    widened: int,
) -> None:
    pair = own.pair(np.abs(scores), layout)
    theirs = reference.channel_importance(pair.array, axis, aggregation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "CACHED_ELEMENTS", widened)
        mine = ours.channel_importance(pair.tensor, axis, aggregation)
    assert mine.dtype == torch.float64
    assert pair.unchanged()
    if aggregation == "linf":
        compare.exact("channel importance (linf)", mine, theirs)
    else:
        bound = tolerances.channel_importance(scores.shape[axis], EPS64)
        compare.relatively_close(f"channel importance ({aggregation})", mine, theirs, bound)


@pytest.mark.spec("importance.channel")
@given(scores=own.matrices(smallest=1))
def test_the_default_aggregation_is_the_l2_norm(scores: own.Array) -> None:
    pair = own.pair(np.abs(scores))
    bound = tolerances.channel_importance(scores.shape[1], EPS64)
    expected = reference.channel_importance(pair.array, 1, "l2")
    compare.relatively_close(
        "channel importance (l2)", ours.channel_importance(pair.tensor, 1), expected, bound
    )
    compare.exact(
        "channel importance (default)", reference.channel_importance(pair.array, 1), expected
    )


@pytest.mark.spec("importance.group-scores", "precision.statistics")
@given(ffn=own.channels(), layout=own.layouts, dtype=dtypes, aggregation=own.aggregations)
def test_group_scores(
    ffn: own.Channels, layout: own.Layout, dtype: Dtype, aggregation: reference.Aggregation
) -> None:
    pairs = tuple(own.pair(np.abs(W), layout, dtype[0]) for W in (ffn.up, ffn.gate, ffn.down))
    scores = ours.group_scores(*(pair.tensor for pair in pairs), aggregation)
    assert scores.dtype == torch.float64
    assert all(pair.unchanged() for pair in pairs)
    compare.relatively_close(
        f"group scores ({aggregation})",
        scores,
        reference.group_scores(*(pair.array for pair in pairs), aggregation),
        tolerances.group_importance(ffn.down.shape[0], EPS64),
    )


@pytest.mark.spec("importance.group", "precision.statistics")
@given(ffn=own.channels(), layout=own.layouts, dtype=dtypes, aggregation=own.aggregations)
def test_group_importance(
    ffn: own.Channels, layout: own.Layout, dtype: Dtype, aggregation: reference.Aggregation
) -> None:
    up, gate, down = (own.pair(W, layout, dtype[0]) for W in (ffn.up, ffn.gate, ffn.down))
    x_ffn, x_down = own.pair(ffn.x_ffn), own.pair(ffn.x_down)
    pairs = (up, gate, down, x_ffn, x_down)
    scores = ours.group_importance(*(pair.tensor for pair in pairs), aggregation)
    assert scores.dtype == torch.float64
    assert all(pair.unchanged() for pair in pairs)
    compare.relatively_close(
        label("group importance", dtype[1]),
        scores,
        reference.group_importance(*(pair.array for pair in pairs), aggregation),
        tolerances.group_importance(ffn.down.shape[0], dtype[1]),
    )
