"""Wanda: which weights of a row stay."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorap.ops import wanda as ours
from lorap_reference import wanda as reference
from parity_tests import compare
from parity_tests import strategies as own


@pytest.mark.spec("wanda.mask")
@given(
    W=own.matrices(),
    layout=own.layouts,
    dtype=st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16)),
    sparsity=own.ratios,
)
def test_wanda_mask(W: own.Array, layout: own.Layout, dtype: torch.dtype, sparsity: float) -> None:
    # fp16 holds no more than 65504, and rounds small scores to ties at 0.
    pair = own.pair(np.minimum(np.abs(W), 6e4), layout, dtype)
    mask = ours.wanda_mask(pair.tensor, sparsity)
    assert mask.dtype == torch.bool
    assert pair.unchanged()
    theirs = reference.wanda_mask(pair.array, sparsity)
    compare.exact("Wanda's mask (same scores)", mask, theirs)
    # By counting: a weight's place is the number of weights of its row that come before it.
    dropped = int(W.shape[1] * sparsity)
    for row, kept in zip(pair.array, theirs, strict=True):
        place = [sum((row[k], k) < (row[j], j) for k in range(row.size)) for j in range(row.size)]
        assert kept.tolist() == [at >= dropped for at in place]


@pytest.mark.spec("wanda.mask")
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 2000)), sparsity=own.ratios)
def test_equal_scores_go_by_index(shape: own.Shape, sparsity: float) -> None:
    mask = ours.wanda_mask(torch.ones(shape, dtype=torch.float64), sparsity)
    compare.exact(
        "Wanda's mask (same scores)", mask, reference.wanda_mask(np.ones(shape), sparsity)
    )
    dropped = int(shape[1] * sparsity)
    assert mask.tolist() == [[False] * dropped + [True] * (shape[1] - dropped)] * shape[0]
