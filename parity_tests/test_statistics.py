"""Eq. (5): sums of squares and norms of input features. The sums behind ASVD, PCA and AFM."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorap.ops import precision
from lorap.ops import statistics as ours
from lorap_reference import statistics as reference
from parity_tests import compare, tolerances
from parity_tests import strategies as own

every_sum = pytest.mark.parametrize(
    "name", ["sum_of_squares", "sum_of_magnitudes", "token_sum", "second_moment"]
)


def bound(name: str, X: own.Array, roundings: int) -> own.Array:
    """Return the bound on a sum over tokens: relative to the same sum of the magnitudes."""
    return tolerances.inner(roundings, getattr(reference, name)(np.abs(X)))


@pytest.mark.spec("stats.sum-of-squares", "stats.magnitudes", "stats.sum", "stats.second-moment")
@every_sum
@given(X=own.tokens(), layout=own.layouts)
def test_sums_over_tokens(name: str, X: own.Array, layout: own.Layout) -> None:
    pair = own.pair(X, layout)
    total = getattr(ours, name)(pair.tensor)
    assert total.dtype == torch.float64
    assert pair.unchanged()
    theirs = getattr(reference, name)(pair.array)
    compare.close(name, total, theirs, bound(name, pair.array, X.shape[0]))


@pytest.mark.spec("stats.sum-of-squares", "stats.magnitudes", "stats.sum", "stats.second-moment")
@every_sum
@given(X=own.tokens(), data=st.data())
def test_sums_add_up_over_batches(name: str, X: own.Array, data: st.DataObject) -> None:
    pair = own.pair(X)
    cuts = sorted(data.draw(st.lists(st.integers(0, X.shape[0]), max_size=3), label="cuts"))
    bounds = [0, *cuts, X.shape[0]]
    parts = [pair.tensor[a:b] for a, b in pairwise(bounds)]
    total = torch.stack([getattr(ours, name)(part) for part in parts]).sum(dim=0)
    compare.close(
        f"{name} (batches)",
        total,
        getattr(reference, name)(pair.array),
        bound(name, X, X.shape[0] + len(parts)),
    )


@pytest.mark.spec(
    "stats.sum-of-squares",
    "stats.magnitudes",
    "stats.sum",
    "stats.second-moment",
    "precision.statistics",
)
@every_sum
@given(X=own.tokens(), chunk=st.integers(1, 40))
def test_sums_do_not_depend_on_the_workspace(name: str, X: own.Array, chunk: int) -> None:
    pair = own.pair(X)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "CHUNK_ELEMENTS", chunk)
        patch.setattr(precision, "CACHED_ELEMENTS", chunk)
        total = getattr(ours, name)(pair.tensor)
    compare.close(
        f"{name} (in chunks)",
        total,
        getattr(reference, name)(pair.array),
        bound(name, X, 2 * X.shape[0] + 1),
    )


@pytest.mark.spec("stats.padding")
@every_sum
@given(X=own.tokens(), data=st.data())
def test_padding_never_counts(name: str, X: own.Array, data: st.DataObject) -> None:
    keep = data.draw(
        st.lists(st.booleans(), min_size=X.shape[0], max_size=X.shape[0]), label="mask"
    )
    mask = np.array(keep, dtype=bool)
    # What stands in padding must not even be read into a sum: not a number there changes nothing.
    filled = np.where(mask[:, None], X, np.nan)
    dtype: Any = data.draw(st.sampled_from((torch.bool, torch.int64, torch.float32)), label="dtype")
    total = getattr(ours, name)(torch.from_numpy(filled), torch.from_numpy(mask).to(dtype))
    compare.close(
        f"{name} (padding)",
        total,
        getattr(reference, name)(X[mask]),
        bound(name, X[mask], X.shape[0]),
    )


@pytest.mark.spec(
    "stats.padding",
    "stats.sum-of-squares",
    "stats.magnitudes",
    "stats.sum",
    "stats.second-moment",
)
@every_sum
@given(shape=st.tuples(st.integers(1, 4), st.integers(1, 6), own.sides()), seed=own.seeds)
def test_leading_axes_are_all_tokens(name: str, shape: tuple[int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    X, mask = rng.standard_normal(shape), rng.integers(0, 2, shape[:2]).astype(bool)
    compare.close(
        f"{name} (padding)",
        getattr(ours, name)(torch.from_numpy(X), torch.from_numpy(mask)),
        getattr(reference, name)(X[mask]),
        bound(name, X[mask], shape[0] * shape[1]),
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


@pytest.mark.spec("stats.mean")
@given(X=own.tokens(), extra=st.integers(0, 10**6))
def test_token_mean(X: own.Array, extra: int) -> None:
    pair, tokens = own.pair(reference.token_sum(X)), X.shape[0] + extra
    mean = ours.token_mean(pair.tensor, tokens)
    assert pair.unchanged()
    theirs = reference.token_mean(pair.array, tokens)
    compare.relatively_close("mean over tokens", mean, theirs, tolerances.quotient())


@pytest.mark.spec("precision.statistics")
@every_sum
@given(
    X=own.tokens(),
    layout=own.layouts,
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
)
def test_narrow_inputs_are_summed_in_float64(
    name: str, X: own.Array, layout: own.Layout, dtype: torch.dtype
) -> None:
    # 1e4 is the largest power of ten that fp16 holds.
    largest = float(np.max(np.abs(X), initial=0.0))
    pair = own.pair(X / max(1.0, largest / 1e4), layout, dtype)
    total = getattr(ours, name)(pair.tensor)
    assert total.dtype == torch.float64
    assert pair.unchanged()
    compare.close(
        f"{name} (narrow inputs)",
        total,
        getattr(reference, name)(pair.array),
        bound(name, pair.array, X.shape[0]),
    )
