"""Groups of heads: which rows and columns are theirs, their scores, and what is left of the MHA."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorap.ops import heads as ours
from lorap.ops import pruning
from lorap_reference import budget
from lorap_reference import heads as reference
from lorap_reference import pruning as reference_pruning
from lorap_reference.importance import Aggregation
from parity_tests import compare, llamas, tolerances
from parity_tests import strategies as own
from parity_tests.rounding import Precision

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


HIDDEN = 72
"""A multiple of up to 4 groups of up to 3 heads: LlamaConfig asks for one, before and after."""


@st.composite
def groups(draw: st.DrawFn, kv_heads: int) -> own.Ids:
    """Draw the indices of groups that stay, ascending."""
    stay = draw(st.sets(st.integers(0, kv_heads - 1)), label="kept")
    return np.array(sorted(stay), dtype=np.int64)


@st.composite
def grouped_llamas(draw: st.DrawFn) -> own.SmallLlama:
    """Draw a LLaMA of two to four groups of one to three query heads."""
    model = draw(own.small_llamas(), label="model")
    kv_heads, share = draw(st.integers(2, 4), label="groups"), draw(st.integers(1, 3))
    shape = replace(model.shape, heads=kv_heads * share, kv_heads=kv_heads)
    return replace(model, shape=shape, hidden=HIDDEN)


@pytest.mark.spec("heads.group")
@given(kv_heads=st.integers(1, 8), rows=st.integers(0, 8), data=st.data())
def test_head_rows(kv_heads: int, rows: int, data: st.DataObject) -> None:
    kept = data.draw(groups(kv_heads))
    size = kv_heads * rows
    mine = ours.head_rows(torch.from_numpy(kept), size, kv_heads)
    assert mine.dtype == torch.int64
    theirs = reference.head_rows(kept, size, kv_heads)
    compare.exact("rows of groups", mine, theirs)
    assert theirs.tolist() == [row for row in range(size) if row // rows in kept]


@pytest.mark.spec("heads.scores", "precision.statistics")
@given(
    mha=own.heads(),
    layout=own.layouts,
    dtype=st.sampled_from(FLOATS),
    aggregation=own.aggregations,
    ratio=own.ratios,
)
def test_head_scores(
    mha: own.Heads,
    layout: own.Layout,
    dtype: torch.dtype,
    aggregation: Aggregation,
    ratio: float,
) -> None:
    # Scores that fp16 holds; the sums are float64 whatever they come in.
    pairs = tuple(own.pair(np.minimum(np.abs(W), 6e4), layout, dtype) for W in mha.matrices)
    mine = ours.head_scores(*(pair.tensor for pair in pairs), mha.kv_heads, aggregation)
    assert mine.dtype == torch.float64
    assert all(pair.unchanged() for pair in pairs)
    theirs = reference.head_scores(*(pair.array for pair in pairs), mha.kv_heads, aggregation)
    bound = tolerances.head_scores(max(W.size for W in mha.matrices) // mha.kv_heads)
    compare.relatively_close(f"scores of groups ({aggregation})", mine, theirs, bound)

    band = budget.removed_band(mha.kv_heads, ratio, 0.01)
    compare.kept_channels(
        "kept groups",
        pruning.kept_channels(mine, *band),
        reference_pruning.kept_channels(theirs, *band),
        theirs,
        bound * theirs,
        band,
    )


@pytest.mark.spec("heads.slice")
@given(mha=own.heads(), layout=own.layouts, dtype=st.sampled_from(FLOATS), data=st.data())
def test_prune_heads(
    mha: own.Heads, layout: own.Layout, dtype: torch.dtype, data: st.DataObject
) -> None:
    # Values that every dtype holds; the layout and the slices are in question here.
    pairs = tuple(
        own.pair(np.arange(W.size).reshape(W.shape) % 251, layout, dtype) for W in mha.matrices
    )
    kept = data.draw(groups(mha.kv_heads))
    mine = ours.prune_heads(*(pair.tensor for pair in pairs), torch.from_numpy(kept), mha.kv_heads)
    theirs = reference.prune_heads(*(pair.array for pair in pairs), kept, mha.kv_heads)
    for pair, a, b in zip(pairs, mine, theirs, strict=True):
        assert pair.unchanged()
        assert a.dtype == dtype
        assert a.is_contiguous()
        assert a.untyped_storage().data_ptr() != pair.tensor.untyped_storage().data_ptr()
        compare.exact("pruned heads", a, b)


def without_groups(
    weights: dict[str, own.Array], kept: list[own.Ids], kv_heads: int
) -> dict[str, own.Array]:
    """Return the weights of a model with the groups `kept` of each layer alone."""
    new = dict(weights)
    for index, stay in enumerate(kept):
        names = [f"model.layers.{index}.self_attn.{m}_proj" for m in "qkvo"]
        matrices = [weights[f"{name}.weight"] for name in names]
        pruned = reference.prune_heads(*matrices, stay, kv_heads)
        new |= {f"{name}.weight": W for name, W in zip(names, pruned, strict=True)}
        for bias in (f"{name}.bias" for name in names[:3] if f"{name}.bias" in weights):
            rows = reference.head_rows(stay, weights[bias].size, kv_heads)
            new[bias] = weights[bias][rows]
    return new


def silenced(
    weights: dict[str, own.Array], kept: list[own.Ids], kv_heads: int
) -> dict[str, own.Array]:
    """Return the weights with the columns of o set to zero but for those of the groups `kept`."""
    new = dict(weights)
    for index, stay in enumerate(kept):
        name = f"model.layers.{index}.self_attn.o_proj.weight"
        W = np.zeros_like(weights[name])
        columns = reference.head_rows(stay, W.shape[1], kv_heads)
        W[:, columns] = weights[name][:, columns]
        new[name] = W
    return new


@pytest.mark.spec("heads.group", "heads.slice")
@given(model=grouped_llamas(), length=st.integers(1, 8), seed=own.seeds, data=st.data())
@llamas.float64_throughout()
def test_a_group_without_its_columns_of_o_is_a_group_removed(
    model: own.SmallLlama, length: int, seed: int, data: st.DataObject
) -> None:
    """The layout is that of transformers, which runs both models: all heads, and fewer.

    With another layout the query heads that stay would meet keys and values of other groups.
    """
    shape, ids = model.shape, own.calibration_ids(model, 2, length)
    kv_heads = shape.kv_heads
    count = data.draw(st.integers(1, kv_heads), label="groups that stay")
    rng = np.random.default_rng(seed)
    kept = [np.sort(rng.permutation(kv_heads)[:count]) for _ in range(shape.layers)]
    share = shape.heads // kv_heads
    fewer = replace(model, shape=replace(shape, heads=count * share, kv_heads=count))

    zeroed = silenced(model.weights(), kept, kv_heads)
    pruned = without_groups(model.weights(), kept, kv_heads)
    expected, spread = llamas.forward(zeroed, shape, ids, Precision())
    with torch.no_grad():
        for name, torch_model in (
            ("silenced", model.model_of(zeroed)),
            ("removed", fewer.model_of(pruned)),
        ):
            logits = torch_model(input_ids=torch.from_numpy(ids)).logits
            llamas.close(f"logits, groups {name}", logits, expected, spread)
