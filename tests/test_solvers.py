"""The solvers find the directions that a matrix was made with, or say that they cannot."""

from __future__ import annotations

import math
from types import SimpleNamespace

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
def test_the_last_eigenvalue_must_rise_above_the_rounding_of_the_first() -> None:
    """1000 * 4 * eps is 60^2 + 20^2 in units of 2^-52: taken beyond it, and not at it."""
    for scale in (1.0, 2.0**10):
        at, above = (torch.zeros(3, 4, dtype=torch.float64) for _ in range(2))
        for matrix, root in ((at, 60.0), (above, 61.0)):
            matrix[0, 0], matrix[1, 1:3] = scale, scale * 2.0**-26 * torch.tensor([root, 20.0])
            matrix[2, 3] = scale * 2.0**-40
        assert solvers.gram(at, 2) is None
        assert solvers.gram(above, 2) is not None


@pytest.mark.spec("solver.gram")
@pytest.mark.parametrize(
    "rows",
    [
        [[1e200, 0.0], [0.0, 1.0]],
        # LAPACK does not find the eigenvalues of a product that is not a number in places.
        [[1e200, 1e200, 0, 0], [1e200, -1e200, 0, 1], [1, 1, 1, 1], [0, 0, 1, 3]],
    ],
)
def test_what_overflows_is_left_to_the_svd(rows: list[list[float]]) -> None:
    matrix = torch.tensor(rows, dtype=torch.float64)
    assert solvers.gram(matrix, 1) is None
    expected = torch.linalg.svdvals(matrix)
    torch.testing.assert_close(solvers.leading_directions(matrix, 1)[1], expected)


@pytest.mark.spec("solver.contract")
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_the_svd_is_thin(shape: tuple[int, int]) -> None:
    matrix, _ = made([4.0, 3.0, 2.0, 1.0], shape)
    u, values, vh = solvers.thin_svd(matrix)
    assert (u.shape, values.shape, vh.shape) == ((shape[0], 4), (4,), (4, shape[1]))
    torch.testing.assert_close((u * values) @ vh, matrix, rtol=0, atol=1e-14)


@pytest.mark.spec("solver.contract")
def test_on_a_gpu_the_svd_is_not_by_jacobi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, **how: (matrix, how, "vh"))
    on_gpu = SimpleNamespace(is_cuda=True)
    asked = {"full_matrices": False, "driver": "gesvd"}
    assert solvers.thin_svd(on_gpu) == (on_gpu, asked, "vh")
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix, **how: (matrix, how))
    on_gpu = SimpleNamespace(is_cuda=True, shape=(2, 3), new_empty=lambda *sizes: sizes)
    expected = ((2, 0), (on_gpu, {"driver": "gesvd"}))
    assert solvers.leading_directions(on_gpu, 0) == expected


@pytest.mark.spec("solver.gram")
def test_the_svd_is_not_asked_where_the_eigenvectors_will_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.linalg, "svd")
    for ours, expected in zip(
        solvers.leading_directions(SMALL, 2), solvers.gram(SMALL, 2), strict=True
    ):
        assert torch.equal(ours, expected)


SMALL = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
DELTA = 3 * 2.0**-52 * 9
"""What rounding does to an eigenvalue of its Gram matrix, by the rule."""


def decomposed(
    monkeypatch: pytest.MonkeyPatch, values: list[float], vectors: Tensor | None = None
) -> None:
    """Let the eigenvalues, descending, and eigenvectors be these, by default the unit vectors."""
    found = torch.tensor(values, dtype=torch.float64)
    axes = torch.eye(len(values), dtype=torch.float64) if vectors is None else vectors
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: (found.flip(0), axes.flip(1)))


@pytest.mark.spec("solver.gram", "awsvd.energy")
@pytest.mark.parametrize("height", [3, 4])
@pytest.mark.parametrize("third", [0.0, 1.0])
def test_what_is_cut_off_is_corrected_as_what_is_kept_is(
    third: float, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second axis and the third are turned by 5e-8 into each other."""
    matrix = torch.zeros(height, 3, dtype=torch.float64)
    matrix[:3] = torch.diag(torch.tensor([3.0, 2.0, third], dtype=torch.float64))
    vectors = torch.eye(3, dtype=torch.float64)
    cosine, sine = math.cos(5e-8), math.sin(5e-8)
    vectors[1:, 1:] = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
    decomposed(monkeypatch, [9.0, 4.0, third**2], vectors)
    found = solvers.gram(matrix, 2)
    assert found is not None
    basis, values = found
    assert values.tolist() == pytest.approx([3.0, 2.0, third], abs=1e-14)
    torch.testing.assert_close(basis.abs(), torch.eye(height, 2).double(), rtol=0, atol=1e-14)


def turned(size: float) -> Tensor:
    """Two axes turned so that the correction is of a given size: half the tangent of twice."""
    angle = math.atan(2 * size) / 2
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)


@pytest.mark.spec("solver.gram")
def test_a_correction_beyond_first_order_is_left_to_the_svd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = torch.diag(torch.tensor([4.0, 3.0], dtype=torch.float64))
    decomposed(monkeypatch, [16.0, 9.0], turned(0.0099))
    found = solvers.gram(matrix, 1)
    assert found is not None
    torch.testing.assert_close(found[0].abs(), torch.eye(2).double()[:, :1], rtol=0, atol=1e-15)
    decomposed(monkeypatch, [16.0, 9.0], turned(0.0101))
    assert solvers.gram(matrix, 1) is None


@pytest.mark.spec("solver.gram")
def test_corrections_end_with_one_whose_square_is_rounding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Wide enough that a square of 1e-14 passes for rounding.
    matrix = torch.zeros(2, 16, dtype=torch.float64)
    matrix[0, 0], matrix[1, 1] = 4.0, 3.0
    made_orthonormal, qr = [], torch.linalg.qr

    def counted(columns: Tensor) -> object:
        made_orthonormal.append(columns)
        return qr(columns)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    for size, corrections in ((0.9e-7, 1), (1.1e-7, 2)):
        made_orthonormal.clear()
        decomposed(monkeypatch, [16.0, 9.0], turned(size))
        assert solvers.gram(matrix, 1) is not None
        assert len(made_orthonormal) == corrections


@pytest.mark.spec("solver.gram")
def test_there_are_three_corrections_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kept are turned among themselves, each takes off only a part.

    The sizes are 2e-4, 2e-6, 3e-8; and 6e-3, 7e-5, 9e-7.
    """
    matrix = torch.diag(torch.tensor([5.0, 4.0, 2.0, 1.0], dtype=torch.float64))
    among, between = torch.zeros(2, 4, 4, dtype=torch.float64)
    among[0, 1] = among[2, 3] = 0.02
    between[0, 2] = between[1, 3] = between[1, 2] = 1.0
    between[0, 3] = -1.0
    for size, is_found in ((1e-4, True), (3e-3, False)):
        vectors = torch.matrix_exp(among - among.T) @ torch.matrix_exp(size * (between - between.T))
        decomposed(monkeypatch, [25.0, 16.0, 4.0, 1.0], vectors)
        found = solvers.gram(matrix, 2)
        assert (found is not None) == is_found
        if found is not None:
            basis, values = found
            expected = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])).double()
            torch.testing.assert_close(basis @ basis.T, expected, rtol=0, atol=1e-9)
            torch.testing.assert_close(values, matrix.diagonal(), rtol=0, atol=1e-3)


@pytest.mark.spec("solver.gram")
def test_a_kept_direction_that_holds_less_than_one_cut_off_is_left_to_the_svd(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Although the difference is within what the check at the end forgives."""
    matrix = torch.diag(torch.tensor([1.0, 1 + 2.0**-51, 0.5], dtype=torch.float64))
    decomposed(monkeypatch, [1 + 2.0**-50, 1.0, 0.25], torch.eye(3)[:, [0, 1, 2]].double())
    assert solvers.gram(matrix, 1) is None
    decomposed(monkeypatch, [1 + 2.0**-50, 1.0, 0.25], torch.eye(3)[:, [1, 0, 2]].double())
    assert solvers.gram(matrix, 1) is not None


@pytest.mark.spec("solver.gram")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("moved", "limit"),
    [
        ((0, 1, -1), 2 * 10 * DELTA),  # of what two directions hold
        ((0, 0, 1), 3 * 10 * DELTA),  # of all eigenvalues
        ((0, 1, -1), None),
        ((0, 0, 1), None),
    ],
)
def test_what_is_held_may_be_off_by_rounding_and_no_more(
    monkeypatch: pytest.MonkeyPatch, moved: tuple[int, ...], limit: float | None, sign: int
) -> None:
    for by, is_found in ((0.95, True), (1.05, False)) if limit else ((0.1, False),):
        off = sign * by * (limit or 1.0)
        values = [value + off * part for value, part in zip((9, 4, 1), moved, strict=True)]
        decomposed(monkeypatch, values)
        assert (solvers.gram(SMALL, 2) is not None) == is_found


@pytest.mark.spec("solver.gram")
@pytest.mark.parametrize("limit", ["ROOM", "TURN", "EXACT"])
def test_what_is_at_a_limit_is_within_it(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """Nothing is rounded here, so that a limit of 0 is met."""
    decomposed(monkeypatch, [9.0, 4.0, 1.0])
    monkeypatch.setattr(solvers, limit, 0.0)
    assert solvers.gram(SMALL, 2) is not None


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
