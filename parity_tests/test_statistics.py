"""Eq. (5): sums of squares and norms of input features."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorap.ops import statistics as ours
from lorap_reference import statistics as reference
from parity_tests import compare, tolerances
from parity_tests import strategies as own


@pytest.mark.spec("stats.sum-of-squares")
@given(X=own.tokens(), layout=own.layouts)
def test_sum_of_squares(X: own.Array, layout: own.Layout) -> None:
    pair = own.pair(X, layout)
    squares = ours.sum_of_squares(pair.tensor)
    assert squares.dtype == torch.float64
    assert pair.unchanged()
    bound = tolerances.positive_sum(X.shape[0])
    compare.relatively_close("sum of squares", squares, reference.sum_of_squares(pair.array), bound)


@pytest.mark.spec("stats.sum-of-squares")
@given(X=own.tokens(), data=st.data())
def test_sums_of_squares_add_up_over_batches(X: own.Array, data: st.DataObject) -> None:
    pair = own.pair(X)
    cuts = sorted(data.draw(st.lists(st.integers(0, X.shape[0]), max_size=3), label="cuts"))
    bounds = [0, *cuts, X.shape[0]]
    parts = [pair.tensor[a:b] for a, b in pairwise(bounds)]
    total = torch.stack([ours.sum_of_squares(part) for part in parts]).sum(dim=0)
    compare.relatively_close(
        "sum of squares (batches)",
        total,
        reference.sum_of_squares(pair.array),
        tolerances.positive_sum(X.shape[0] + len(parts)),
    )


@pytest.mark.spec("stats.sum-of-squares", "precision.statistics")
@given(X=own.tokens(), chunk=st.integers(1, 40))
def test_sums_of_squares_do_not_depend_on_the_workspace(X: own.Array, chunk: int) -> None:
    pair = own.pair(X)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_CHUNK_ELEMENTS", chunk)
        squares = ours.sum_of_squares(pair.tensor)
    compare.relatively_close(
        "sum of squares (in chunks)",
        squares,
        reference.sum_of_squares(pair.array),
        tolerances.positive_sum(2 * X.shape[0] + 1),
    )


@pytest.mark.spec("stats.padding")
@given(X=own.tokens(), data=st.data())
def test_padding_never_counts(X: own.Array, data: st.DataObject) -> None:
    keep = data.draw(
        st.lists(st.booleans(), min_size=X.shape[0], max_size=X.shape[0]), label="mask"
    )
    mask = np.array(keep, dtype=bool)
    # What stands in padding must not even be read into a sum: not a number there changes nothing.
    filled = np.where(mask[:, None], X, np.nan)
    dtype: Any = data.draw(st.sampled_from((torch.bool, torch.int64, torch.float32)), label="dtype")
    squares = ours.sum_of_squares(torch.from_numpy(filled), torch.from_numpy(mask).to(dtype))
    compare.relatively_close(
        "sum of squares (padding)",
        squares,
        reference.sum_of_squares(X[mask]),
        tolerances.positive_sum(X.shape[0]),
    )


@pytest.mark.spec("stats.padding", "stats.sum-of-squares")
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 6), own.sides()), seed=own.seeds)
def test_leading_axes_are_all_tokens(shape: tuple[int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    X, mask = rng.standard_normal(shape), rng.integers(0, 2, shape[:2]).astype(bool)
    compare.relatively_close(
        "sum of squares (padding)",
        ours.sum_of_squares(torch.from_numpy(X), torch.from_numpy(mask)),
        reference.sum_of_squares(X[mask]),
        tolerances.positive_sum(shape[0] * shape[1]),
    )


@pytest.mark.spec("stats.norm")
@given(X=own.tokens(), layout=own.layouts)
def test_feature_norms(X: own.Array, layout: own.Layout) -> None:
    pair = own.pair(X, layout)
    squares = ours.sum_of_squares(pair.tensor)
    before = squares.clone()
    norms = ours.feature_norms(squares)
    assert torch.equal(squares, before)
    compare.relatively_close(
        "feature norms",
        norms,
        reference.feature_norms(pair.array),
        tolerances.root_of_positive_sum(X.shape[0]),
    )
    dead = np.all(pair.array == 0, axis=0)
    assert np.array_equal(norms.numpy() == 0, dead), "zero for dead features alone"


@pytest.mark.spec("precision.statistics")
@given(
    X=own.tokens(),
    layout=own.layouts,
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
)
def test_narrow_inputs_are_summed_in_float64(
    X: own.Array, layout: own.Layout, dtype: torch.dtype
) -> None:
    # 1e4 is the largest power of ten that fp16 holds.
    largest = float(np.max(np.abs(X), initial=0.0))
    pair = own.pair(X / max(1.0, largest / 1e4), layout, dtype)
    squares = ours.sum_of_squares(pair.tensor)
    assert squares.dtype == torch.float64
    assert pair.unchanged()
    compare.relatively_close(
        "sum of squares (narrow inputs)",
        squares,
        reference.sum_of_squares(pair.array),
        tolerances.positive_sum(X.shape[0]),
    )
