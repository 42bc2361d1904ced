"""q and k factored together (MGAA)."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorap.ops import joint as ours
from lorap_reference import joint as reference
from parity_tests import compare
from parity_tests import strategies as own

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.spec("joint.stack", "joint.split")
@given(
    rows=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    d_in=st.integers(0, 6),
    layout=own.layouts,
    dtype=st.sampled_from(DTYPES),
    seed=own.seeds,
)
def test_stacked_and_split(
    rows: list[int], d_in: int, layout: own.Layout, dtype: torch.dtype, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pairs = [own.pair(rng.standard_normal((d, d_in)), layout, dtype) for d in rows]
    mine = ours.stacked([pair.tensor for pair in pairs])
    theirs = reference.stacked([pair.array for pair in pairs])
    assert mine.dtype == dtype
    compare.exact("stack", mine, theirs)
    split, split_reference = ours.split(mine, rows), reference.split(theirs, rows)
    for part, part_reference, pair in zip(split, split_reference, pairs, strict=True):
        assert part.dtype == dtype
        compare.exact("part of a stack", part, part_reference)
        compare.exact("part of a stack, as it was", part, pair.array)
    compare.exact("part of a bias", ours.split(mine[:, :1].squeeze(1), rows)[-1] if d_in else [],
                  reference.split(theirs[:, 0], rows)[-1] if d_in else [])  # fmt: skip
    assert all(pair.unchanged() for pair in pairs)
