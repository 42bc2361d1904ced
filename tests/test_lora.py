"""LoRA's equations against hand values and loops, on both sides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lorap.ops import lora as ours
from lorap.ops.lowrank import weighted_error
from lorap_reference import lora as reference

Array = NDArray[np.float64]


def both(name: str, *given: Any) -> list[Any]:
    """Return what each side makes of the same arguments, as arrays."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(plain(part) for part in value)
        return value.numpy() if isinstance(value, torch.Tensor) else value

    tensors = [torch.tensor(v) if isinstance(v, np.ndarray) else v for v in given]
    return [getattr(reference, name)(*given), plain(getattr(ours, name)(*tensors))]


def case(seed: int = 0) -> tuple[Array, Array, Array, Array, Array]:
    """Return L, R, A, B and x: 4 outputs, 3 inputs, ranks 2 and 1."""
    rng = np.random.default_rng(seed)
    shapes = ((4, 2), (2, 3), (4, 1), (1, 3), (3,))
    return tuple(rng.standard_normal(shape) for shape in shapes)  # type: ignore[return-value]


def by_loops(L: Array, R: Array, A: Array, B: Array, gamma: float) -> Array:
    """Return ``L R + gamma A B``, an entry at a time."""
    M = np.zeros((len(L), R.shape[1]))
    for i in range(len(L)):
        for j in range(R.shape[1]):
            M[i, j] = sum(L[i, k] * R[k, j] for k in range(len(R)))
            M[i, j] += gamma * sum(A[i, k] * B[k, j] for k in range(len(B)))
    return M


@pytest.mark.spec("lora.scaling")
def test_by_table_14_an_update_counts_twice() -> None:
    assert both("scaling", 16, 8) == [2.0, 2.0]
    assert both("scaling", 16, 64) == [0.25, 0.25]


@pytest.mark.spec("lora.dense", "lora.merge-dense")
def test_beside_a_matrix_and_merged_into_it() -> None:
    W, A, B = np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([[3.0], [1.0]]), np.array([[1.0, -1.0]])
    for found in both("dense_apply", W, A, B, 2.0, np.array([2.0, 1.0])):
        assert found.tolist() == [10.0, 3.0]
    for found in both("merge_dense", W, A, B, 2.0):
        assert found.tolist() == [[7.0, -4.0], [2.0, -1.0]]


@pytest.mark.spec("lora.factored", "lora.merge-factors")
def test_beside_factors_and_merged_into_them() -> None:
    L, R, A, B, x = case()
    M = by_loops(L, R, A, B, 2.0)
    for found in both("factored_apply", L, R, A, B, 2.0, x):
        np.testing.assert_allclose(found, M @ x, rtol=1e-13)
    for left, right in both("merge_factors", L, R, A, B, 2.0):
        assert (left.shape, right.shape) == ((4, 3), (3, 3))
        np.testing.assert_allclose(left @ right, M, rtol=1e-13)
    product = ours.merged_product(*map(torch.tensor, (L, R, A, B)), 2.0)
    np.testing.assert_allclose(product.numpy(), M, rtol=1e-13)


@pytest.mark.spec("lora.merge-dense", "lora.merge-factors", "precision.compute")
@pytest.mark.parametrize("wide", [0, 1, 2, 3, None])
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16, torch.float32])
def test_merging_is_done_in_the_widest_dtype_of_all(wide: int | None, narrow: torch.dtype) -> None:
    """Each in turn is float64, and the others are narrower."""
    parts = [torch.tensor(part).to(narrow) for part in case()[:4]]
    if wide is not None:
        parts[wide] = parts[wide].double()
    expected = torch.float32 if wide is None else torch.float64
    for found, plain in zip(
        ours.merge_factors(*parts, 0.3),
        ours.merge_factors(*(part.to(expected) for part in parts), 0.3),
        strict=True,
    ):
        assert found.dtype == expected
        assert torch.equal(found, plain)
    W, A, B = parts[0] @ parts[1].to(parts[0].dtype), parts[2], parts[3]
    expected = torch.float64 if wide in (0, 2, 3) else torch.float32
    merged = ours.merge_dense(W, A, B, 0.3)
    assert merged.dtype == expected
    assert torch.equal(merged, ours.merge_dense(*(M.to(expected) for M in (W, A, B)), 0.3))


@pytest.mark.spec("lora.break-even")
def test_break_even_is_where_factors_hold_no_less() -> None:
    # 12 and 4: break-even at 3, where factors hold 3 * 16 = 48 = 12 * 4.
    assert both("merged_rank", (12, 4), 1, 1) == [2, 2]
    assert both("merged_rank", (12, 4), 1, 2) == [None, None]
    assert both("merged_rank", (12, 4), 2, 2) == [None, None]


@pytest.mark.spec("lora.joint")
def test_updates_of_a_stack_keep_to_their_rows() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((2, 1)), rng.standard_normal((1, 3)))]
    pairs += [(np.zeros((4, 0)), np.zeros((0, 3)))]
    pairs += [(rng.standard_normal((1, 2)), rng.standard_normal((2, 3)))]
    expected = np.concatenate([A @ B for A, B in pairs])
    tensors = [(torch.tensor(A), torch.tensor(B)) for A, B in pairs]
    for A, B in (reference.stacked_update(pairs), ours.stacked_update(tensors)):
        assert (A.shape, B.shape) == ((7, 3), (3, 3))
        np.testing.assert_allclose(np.asarray(A) @ np.asarray(B), expected, rtol=1e-13)


@pytest.mark.spec("lora.merge-same-size")
@pytest.mark.parametrize("seed", range(3))
def test_no_factors_of_the_rank_are_nearer(seed: int) -> None:
    L, R, A, B, _ = case(seed)
    rng = np.random.default_rng(seed)
    scale, M = rng.uniform(0.1, 3, 3), by_loops(L, R, A, B, 1.5)
    tail = float(np.sum(np.linalg.svd(M * scale, compute_uv=False)[2:] ** 2))
    for left, right, S in both("merge_same_size", L, R, A, B, 1.5, scale):
        assert (left.shape, right.shape) == (L.shape, R.shape)
        error = weighted_error(torch.tensor(M), torch.tensor(left @ right), torch.tensor(scale))
        assert error == pytest.approx(tail) == pytest.approx(float(S[2:] @ S[2:]))
        for _ in range(200):
            # The best right factor for a random left one, so that the rivals are good ones.
            Q = np.linalg.qr(rng.standard_normal((4, 2)))[0]
            assert float(np.sum(((M - Q @ (Q.T @ M)) * scale) ** 2)) > error


@pytest.mark.spec("lora.gradient")
def test_gradients_by_hand() -> None:
    A, B = np.array([[3.0]]), np.array([[1.0, -1.0]])
    x, dy = np.array([[2.0, 1.0], [0.0, 1.0]]), np.array([[1.0], [2.0]])
    # z = B x = 1 and -1; dA = 2 (1 * 1 + 2 * -1); dz = 2 * 3 * dy = 6 and 12.
    dA, dB, dx = reference.gradients(A, B, 2.0, x, dy)
    assert (dA.tolist(), dB.tolist()) == ([[-2.0]], [[12.0, 18.0]])
    assert dx.tolist() == [[6.0, -6.0], [12.0, -12.0]]


@pytest.mark.spec("lora.gradient")
def test_at_the_start_only_a_learns() -> None:
    """LoRA starts from A = 0, PEFT's lora_B: the first step cannot move B."""
    _, _, A, B, x = case()
    dA, dB, _ = reference.gradients(np.zeros_like(A), B, 2.0, x, np.ones(4))
    assert np.abs(dA).min() > 0
    assert not dB.any()
