"""The solvers find the directions that a matrix was made with, or say that they cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorap.ops import solvers


def made(singular_values: list[float], shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, ...]:
    """A matrix of given singular values, and its left singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = len(singular_values)
    u, v = (
        torch.linalg.qr(torch.randn(side, k, generator=generator, dtype=torch.float64)).Q
        for side in shape
    )
    return (u * torch.tensor(singular_values, dtype=torch.float64)) @ v.T, u


@pytest.mark.spec("solver.gram")
def test_gram_by_hand() -> None:
    # A A^T = diag(9, 16): the second axis leads.
    basis, values = solvers.gram(torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64), 1)
    assert basis.abs().tolist() == [[0.0], [1.0]]
    assert values.tolist() == [4.0, 3.0]


@pytest.mark.spec("solver.gram")
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (6, 6)])
@pytest.mark.parametrize("rank", range(1, 7))
def test_gram_finds_the_directions_that_a_matrix_was_made_with(
    shape: tuple[int, int], rank: int
) -> None:
    spectrum = [5.0, 3.0, 1.0, 0.1, 0.03, 1e-3]
    matrix, u = made(spectrum, shape)
    found = solvers.gram(matrix, rank)
    assert found is not None
    basis, values = found
    assert basis.shape == (shape[0], rank)
    projector = u[:, :rank] @ u[:, :rank].T
    gap = spectrum[rank - 1] - (spectrum[rank] if rank < 6 else 0.0)
    torch.testing.assert_close(basis @ basis.T, projector, rtol=0, atol=9 * 2.3e-16 * 50 / gap)
    torch.testing.assert_close(
        values, torch.tensor(spectrum, dtype=torch.float64), rtol=0, atol=9 * 2.3e-16 * 50
    )


@pytest.mark.spec("solver.gram")
def test_a_correction_makes_up_for_the_rounding_of_the_product() -> None:
    """At a cut 3e-5 below the first, the eigenvectors alone are off by 1e5 times more."""
    spectrum = [1.0, *torch.linspace(4e-5, 3e-5, 10).tolist(), 2.9999e-5, 1e-5]
    matrix, u = made(spectrum, (13, 13))
    projector = u[:, :11] @ u[:, :11].T

    def off(basis: Tensor) -> float:
        return float(torch.linalg.norm(basis @ basis.T - projector, 2))

    found = solvers.gram(matrix, 11)
    assert found is not None
    plain = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :11]
    # u / gap of the SVD: 13 * 2.2e-16 / 1e-9.
    assert off(found[0]) < 3e-6 < off(plain)


@pytest.mark.spec("solver.gram")
@pytest.mark.parametrize(
    ("diagonal", "why"),
    [
        ([1.0, 1e-9, 1e-12], "the second is lost in the rounding of the first"),
        ([1.0, 0.5, 0.5], "the cut is between equals"),
        ([0.0, 0.0, 0.0], "there is none"),
    ],
)
def test_gram_says_where_it_cannot_be_trusted(diagonal: list[float], why: str) -> None:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    assert solvers.gram(matrix, 2) is None, why
    basis, values = solvers.leading_directions(matrix, 2)
    u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.equal(basis, u[:, :2])
    assert torch.equal(values, s)


@pytest.mark.spec("solver.gram")
def test_what_overflows_is_left_to_the_svd() -> None:
    matrix = torch.diag(torch.tensor([1e200, 1.0], dtype=torch.float64))
    assert solvers.gram(matrix, 1) is None
    assert solvers.leading_directions(matrix, 1)[1].tolist() == [1e200, 1.0]


@pytest.mark.spec("solver.gram")
def test_eigenvectors_that_hold_less_than_they_promise_are_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix, _ = made([3.0, 2.0, 1.0], (3, 5))
    eigh = torch.linalg.eigh

    def wrong(product: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(product)
        return values * torch.tensor([1.0, 1.0, 1.001]), vectors

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    assert solvers.gram(matrix, 1) is None
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda product: (eigh(product)[0], torch.eye(3).double())
    )
    assert solvers.gram(matrix, 1) is None


@pytest.mark.spec("solver.contract")
def test_a_rank_of_zero_asks_for_singular_values_alone() -> None:
    matrix, _ = made([1.0, 1e-9, 1e-13], (3, 4))
    basis, values = solvers.leading_directions(matrix, 0)
    assert basis.shape == (3, 0)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix), rtol=0, atol=0)
