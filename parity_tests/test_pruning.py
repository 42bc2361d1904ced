"""Eq. (9), (11): which channels stay, and what is left of the matrices."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorap.ops import pruning as ours
from lorap_reference import pruning as reference
from parity_tests import compare
from parity_tests import strategies as own


@st.composite
def bands(draw: st.DrawFn, size: int) -> tuple[int, int]:
    """Draw a removed band within `size` channels."""
    low = draw(st.integers(0, size))
    return low, draw(st.integers(low, size))


@pytest.mark.spec("prune.keep", "prune.ties")
@given(C=own.scores(), layout=own.layouts, data=st.data())
def test_kept_channels(C: own.Array, layout: own.Layout, data: st.DataObject) -> None:
    pair = own.pair(C, layout)
    low, high = data.draw(bands(C.size), label="band")
    kept = ours.kept_channels(pair.tensor, low, high)
    assert kept.dtype == torch.int64
    assert pair.unchanged()
    theirs = reference.kept_channels(pair.array, low, high)
    compare.exact("kept channels (same scores)", kept, theirs)
    # Eq. (11) by counting: a channel's place is the number of channels that come before it.
    scores = pair.array
    place = [
        sum((scores[j], j) < (scores[i], i) for j in range(scores.size)) for i in range(scores.size)
    ]
    expected = [i for i in range(scores.size) if not low <= place[i] < high]
    assert theirs.tolist() == expected


@pytest.mark.spec("prune.ties")
@given(size=st.integers(1, 2000), data=st.data())
def test_equal_scores_go_by_channel_index(size: int, data: st.DataObject) -> None:
    low, high = data.draw(bands(size), label="band")
    kept = ours.kept_channels(torch.ones(size, dtype=torch.float64), low, high)
    compare.exact(
        "kept channels (same scores)", kept, reference.kept_channels(np.ones(size), low, high)
    )
    assert kept.tolist() == [*range(low), *range(high, size)]


@pytest.mark.spec("prune.slice")
@given(
    ffn=own.channels(),
    layout=own.layouts,
    dtype=st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16)),
    data=st.data(),
)
def test_prune_ffn(
    ffn: own.Channels, layout: own.Layout, dtype: torch.dtype, data: st.DataObject
) -> None:
    # Values that every dtype holds; the layout and the slices are in question here.
    pairs = tuple(
        own.pair(np.sign(W) * np.arange(W.size).reshape(W.shape), layout, dtype)
        for W in (ffn.up, ffn.gate, ffn.down)
    )
    stay = data.draw(st.sets(st.integers(0, ffn.up.shape[0] - 1)), label="kept")
    kept = np.array(sorted(stay), dtype=np.int64)
    mine = ours.prune_ffn(*(pair.tensor for pair in pairs), torch.from_numpy(kept))
    theirs = reference.prune_ffn(*(pair.array for pair in pairs), kept)
    for pair, a, b in zip(pairs, mine, theirs, strict=True):
        assert pair.unchanged()
        assert a.dtype == dtype
        assert a.untyped_storage().data_ptr() != pair.tensor.untyped_storage().data_ptr()
        compare.exact("pruned matrices", a, b)
