"""Decompositions are done in float64, whatever the dtype of the weight."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorap.ops import lowrank as ops
from lorap_reference import lowrank as ref


@pytest.mark.spec("precision.decomposition")
@given(
    seed=st.integers(0, 2**32 - 1),
    decades=st.integers(0, 7),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_outlier_features_cost_no_accuracy(seed: int, decades: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    weight = torch.tensor(rng.standard_normal((12, 16))).to(dtype)
    scale = np.logspace(0, -decades, 16)
    rank = 10
    left, right, values = ops.awsvd(weight, torch.tensor(scale), rank)
    # The reference is given the stored numbers, which float64 holds exactly.
    W = weight.double().numpy()
    L, R, S = ref.awsvd(W, scale, rank)
    assert ref.numerical_rank(S, W.shape) == 12
    lost = ref.weighted_error(W, (left.double() @ right.double()).numpy(), scale)
    optimal = ref.weighted_error(W, L @ R, scale)
    # What rounding the factors to float32 adds: at most (2 * rank + 2) * eps / 2 of the product,
    # entry by entry, in the weighted norm.
    eps = float(np.finfo(np.float32).eps)
    magnitude = np.abs(left.double().numpy()) @ np.abs(right.double().numpy())
    added = eps * np.linalg.norm(magnitude * scale)
    assert lost**0.5 <= optimal**0.5 + 1.01 * added
    np.testing.assert_allclose(
        values.numpy(), S, rtol=0, atol=160 * np.finfo(np.float64).eps * S[0]
    )
