"""fp16 and bf16 are stored, not computed in: our error is near that of the naive computation."""

import numpy as np
import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from lorap.ops import importance, lowrank, pca
from lorap.ops.precision import compute_dtype
from lorap_reference import importance as reference_importance
from lorap_reference import lowrank as reference_lowrank
from lorap_reference import pca as reference_pca
from parity_tests import compare, tolerances
from parity_tests import strategies as own
from parity_tests.tolerances import EPS32, EPS64

halves = st.sampled_from((torch.float16, torch.bfloat16))

GAPS = ("linear", "geometric", "outlier")


def name(quantity: str, dtype: torch.dtype) -> str:
    """Return the quantity's name in the report."""
    return f"{quantity} ({str(dtype).removeprefix('torch.')})"


@st.composite
def half_problems(draw: st.DrawFn) -> own.Problem:
    """Draw a problem whose numbers fp16 holds, with gaps between its singular values."""
    shape = (draw(own.sides()), draw(own.sides()))
    W = own.from_spectrum(shape, draw(st.sampled_from(GAPS)), 1.0, draw(own.seeds))
    W = W / max(1.0, float(np.max(np.abs(W))))
    kind = draw(st.sampled_from(("positive", "equal")))
    scale = own.norm_vector(shape[1], kind, 1.0, draw(own.seeds))
    return own.Problem(W, scale, draw(st.integers(1, min(shape))))


@pytest.mark.spec("precision.compute", "awsvd.product")
@given(problem=half_problems(), dtype=halves, layout=own.layouts)
def test_awsvd(problem: own.Problem, dtype: torch.dtype, layout: own.Layout) -> None:
    W, scale = own.pair(problem.W, layout, dtype), own.pair(problem.scale)
    r, eps = problem.rank, torch.finfo(dtype).eps
    left, right, _ = lowrank.awsvd(W.tensor, scale.tensor, r)
    assert left.dtype == right.dtype == torch.float32
    assert W.unchanged()
    bound = tolerances.awsvd_product(W.array, scale.array, r, EPS64)
    event("compared" if bound is not None else "no gap")
    if bound is None:
        return
    L, R, _ = reference_lowrank.awsvd(W.array, scale.array, r)

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        stored = compare.as_array(a.to(dtype)) @ compare.as_array(b.to(dtype))
        return float(np.linalg.norm(stored - L @ R))

    # In the storage dtype all along, but for the decomposition, which there is none for.
    weighted = W.tensor * scale.tensor.to(dtype)
    u, s, v = torch.linalg.svd(weighted.float(), full_matrices=False)
    naive = error((u[:, :r] * s[:r]).to(dtype), v[:r].to(dtype) / scale.tensor.to(dtype))
    floor = np.sqrt(r) * bound + tolerances.stored_factors(L, R, eps)
    compare.within(
        name("AWSVD product, stored", dtype), error(left, right), tolerances.half(naive, floor)
    )


@pytest.mark.spec("precision.compute", "precision.decomposition", "pca.product", "afm.bias")
@given(problem=half_problems(), dtype=halves, layout=own.layouts, seed=own.seeds)
def test_pca_and_afm(
    problem: own.Problem, dtype: torch.dtype, layout: own.Layout, seed: int
) -> None:
    W, r, eps = own.pair(problem.W, layout, dtype), problem.rank, torch.finfo(dtype).eps
    X = own.input_tokens(W.array.shape[1], "many", 1.0, seed) + 1
    C, t, n = X.T @ X, np.sum(X, axis=0), X.shape[0]
    left, right, _ = pca.pca(W.tensor, torch.from_numpy(C), r)
    assert left.dtype == right.dtype == torch.float32
    *afm_factors, _, bias = pca.afm(W.tensor, torch.from_numpy(C), torch.from_numpy(t), n, r)
    assert all(part.dtype == torch.float32 for part in (*afm_factors, bias))
    assert W.unchanged()
    floor = reference_pca.rounding_floor(W.array, C, max(W.array.shape))
    bound = tolerances.pca_product(W.array, C, r, floor)
    event("compared" if bound is not None else "no gap")
    if bound is None:
        return
    L, R, _ = reference_pca.pca(W.array, C, r)

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        stored = compare.as_array(a.to(dtype)) @ compare.as_array(b.to(dtype))
        return float(np.linalg.norm(stored - L @ R))

    # In the storage dtype all along, but for the decomposition, which there is none for.
    half = torch.from_numpy(C).to(dtype)
    vectors = torch.linalg.eigh((W.tensor @ half @ W.tensor.T).float())[1].flip(1)[:, :r].to(dtype)
    naive = error(vectors, vectors.T @ W.tensor)
    least = np.sqrt(r) * bound + tolerances.stored_factors(L, R, eps)
    compare.within(
        name("PCA product, stored", dtype), error(left, right), tolerances.half(naive, least)
    )


@pytest.mark.spec("precision.compute", "importance.group")
@given(ffn=own.channels(), dtype=halves, layout=own.layouts, aggregation=own.aggregations)
def test_group_importance(
    ffn: own.Channels,
    dtype: torch.dtype,
    layout: own.Layout,
    aggregation: reference_importance.Aggregation,
) -> None:
    # To magnitudes whose squares fp16 holds.
    weights = tuple(
        own.pair(W / max(1.0, float(np.max(np.abs(W)))), layout, dtype)
        for W in (ffn.up, ffn.gate, ffn.down)
    )
    norms = tuple(own.pair(x / max(1.0, float(np.max(x)))) for x in (ffn.x_ffn, ffn.x_down))
    ours = importance.group_importance(
        *(pair.tensor for pair in weights), *(pair.tensor for pair in norms), aggregation
    )
    assert ours.dtype == torch.float64
    assert all(pair.unchanged() for pair in (*weights, *norms))
    theirs = reference_importance.group_importance(
        *(pair.array for pair in weights), *(pair.array for pair in norms), aggregation
    )

    def phi(W: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
        scores = W.abs() * x.to(dtype)
        if aggregation == "mean":
            return scores.mean(dim=axis)
        if aggregation == "l1":
            return scores.sum(dim=axis)
        return scores.amax(dim=axis) if aggregation == "linf" else (scores**2).sum(dim=axis).sqrt()

    up, gate, down = (pair.tensor for pair in weights)
    x_ffn, x_down = (pair.tensor for pair in norms)
    naive = compare.as_array(phi(up, x_ffn, 1) + phi(gate, x_ffn, 1) + phi(down, x_down, 0))
    floor = tolerances.group_importance(down.shape[0], EPS32) * theirs
    for mine, expected, plain, least in zip(
        compare.as_array(ours), theirs, naive, floor, strict=True
    ):
        compare.within(
            name("group importance", dtype),
            abs(mine - expected),
            tolerances.half(abs(plain - expected), least),
        )


@pytest.mark.spec("lowrank.apply", "precision.compute")
@given(problem=half_problems(), count=st.integers(1, 5), dtype=halves, seed=own.seeds)
@example(
    problem=own.Problem(np.ones((3, 1)), np.ones(1), 1), count=1, dtype=torch.float16, seed=205148
)
def test_low_rank_apply(problem: own.Problem, count: int, dtype: torch.dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    (m, n), r = problem.W.shape, problem.rank
    L, R, X = (
        own.pair(rng.uniform(-1, 1, shape), "c", dtype) for shape in ((m, r), (r, n), (count, n))
    )
    mine, about = lowrank.low_rank_apply(L.tensor, R.tensor, X.tensor), torch.finfo(dtype)
    assert mine.dtype == dtype
    compare.close(
        name("low-rank apply", dtype),
        mine,
        reference_lowrank.low_rank_apply(L.array, R.array, X.array),
        tolerances.low_rank_apply(
            L.array, R.array, X.array, about.eps, about.smallest_normal * about.eps
        ),
    )


@pytest.mark.spec("precision.compute")
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16,), torch.float32),
        ((torch.bfloat16,), torch.float32),
        ((torch.float32,), torch.float32),
        ((torch.float64,), torch.float64),
        ((torch.float16, torch.float64), torch.float64),
        ((torch.bfloat16, torch.float32), torch.float32),
    ],
)
def test_what_is_computed_in(dtypes: tuple[torch.dtype, ...], expected: torch.dtype) -> None:
    assert compute_dtype(*(torch.zeros(1, dtype=dtype) for dtype in dtypes)) == expected


@pytest.mark.spec("precision.compute")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_factors_come_in_the_dtype_computed_in(dtype: torch.dtype) -> None:
    W, x = torch.eye(3, dtype=dtype), torch.ones(3, dtype=torch.float64)
    assert all(factor.dtype == torch.float32 for factor in lowrank.svd_low_rank(W, 2)[:2])
    assert importance.weight_importance(W, x).dtype == torch.float32
    assert importance.magnitude_importance(W).dtype == torch.float32
    assert importance.taylor_importance(W, W).dtype == torch.float32
    assert all(factor.dtype == torch.float32 for factor in lowrank.awsvd(W, x, 2)[:2])
