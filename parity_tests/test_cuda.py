"""The formulas on a GPU, in every dtype, against the reference. Skipped where there is no GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorap.ops import importance, lowrank, statistics
from lorap.ops.precision import compute_dtype
from lorap_reference import importance as reference_importance
from lorap_reference import lowrank as reference_lowrank
from lorap_reference import statistics as reference_statistics
from parity_tests import compare, tolerances
from parity_tests import strategies as own
from parity_tests.tolerances import EPS64

DEVICE = torch.device("cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)


def small(values: own.Array) -> own.Array:
    """Numbers that fp16 holds."""
    return values / max(1.0, float(np.max(np.abs(values), initial=0.0)))


def there(values: own.Array, dtype: torch.dtype = torch.float64) -> tuple[own.Array, torch.Tensor]:
    """Return the same values for both sides."""
    pair = own.pair(values, "c", dtype)
    return pair.array, pair.tensor.to(DEVICE)


@every_dtype
@given(X=own.tokens())
def test_sums_over_tokens(dtype: torch.dtype, X: own.Array) -> None:
    array, tensor = there(small(X), dtype)
    for name in ("sum_of_squares", "sum_of_magnitudes", "token_sum", "second_moment"):
        magnitude = getattr(reference_statistics, name)(np.abs(array))
        compare.close(
            f"{name} (CUDA)",
            getattr(statistics, name)(tensor),
            getattr(reference_statistics, name)(array),
            tolerances.inner(array.shape[0], magnitude),
        )


@every_dtype
@given(problem=own.problems())
def test_awsvd(dtype: torch.dtype, problem: own.Problem) -> None:
    W, W_tensor = there(small(problem.W), dtype)
    scale, scale_tensor = there(problem.scale)
    r, shape = problem.rank, (W.shape[0], W.shape[1])
    left, right, S = lowrank.awsvd(W_tensor, scale_tensor, r)
    L, R, S_reference = reference_lowrank.awsvd(W, scale, r)
    compare.close(
        "squares of the singular values (CUDA)",
        compare.as_array(S) ** 2,
        S_reference**2,
        tolerances.square_of_singular_values(S_reference, shape),
    )
    bound = tolerances.awsvd_product(W, scale, r, EPS64) if r else None
    if bound is not None:
        a, b = compare.as_array(left), compare.as_array(right)
        eps = torch.finfo(left.dtype).eps
        compare.spectral(
            f"AWSVD product (CUDA, {left.dtype})",
            a @ b,
            L @ R,
            bound + tolerances.stored(a, b, eps),
        )


@every_dtype
@given(ffn=own.channels(), aggregation=st.sampled_from(("l2", "l1", "linf")))
def test_group_importance(
    dtype: torch.dtype, ffn: own.Channels, aggregation: reference_importance.Aggregation
) -> None:
    weights = [there(small(W), dtype) for W in (ffn.up, ffn.gate, ffn.down)]
    norms = [there(x) for x in (ffn.x_ffn, ffn.x_down)]
    eps = torch.finfo(compute_dtype(weights[0][1])).eps
    compare.relatively_close(
        "group importance (CUDA)",
        importance.group_importance(*(tensor for _, tensor in weights + norms), aggregation),
        reference_importance.group_importance(*(a for a, _ in weights + norms), aggregation),
        tolerances.group_importance(ffn.down.shape[0], eps),
    )
