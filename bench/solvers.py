"""Ways to find the leading left singular vectors of a matrix: time, and what they lose.

    python -m bench.solvers [--shapes 256x2048 1024x1024 2048x2048] [--spectra decay outliers]
                            [--device cpu|cuda] [--repeats 1] [--seed 0]

Prints a table in Markdown: seconds, the share of the full SVD's time in the same run, and the
excess of the squared error over the least one as a share of what ``solver.contract`` of SPEC.md
allows (above 1 the contract is broken; ``refused`` where a solver says itself that it cannot be
trusted). The weights are random; ``decay`` and ``outliers`` are what their columns are weighed by.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bench.timing import Clock
from lorap.ops import solvers
from lorap.runtime import versions

Solver = Callable[[Tensor, int], tuple[Tensor, Tensor] | None]
"""Takes a matrix in float64 and a rank; returns the basis and singular values, or None."""

SHAPES = {
    "cpu": ("256x2048", "1024x1024", "2048x2048"),
    "cuda": ("256x2048", "2048x2048", "4096x4096", "4096x11008"),
}
"""k and q of TinyLlama; q, k and down of LLaMA-7B."""

SHARE = 0.3
"""Rank, as a share of the smaller side: q and k of LLaMA-7B at 20%."""


def full_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """All of the SVD in float64."""
    u, s, _ = solvers.thin_svd(matrix)
    return u[:, :rank], s


def gram_single(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the smaller Gram matrix, in float32 and as they are."""
    tall = matrix.shape[0] > matrix.shape[1]
    short = (matrix.T if tall else matrix).float()
    eigenvalues, vectors = torch.linalg.eigh(short @ short.T)
    values = eigenvalues.flip(0).clamp(min=0).sqrt().double()
    leading = vectors.flip(1)[:, :rank].double()
    if tall:
        leading = matrix @ leading
    # Also where it has nothing to correct: to float64, the vectors are not orthonormal.
    return torch.linalg.qr(leading).Q, values


def subspace(
    matrix: Tensor, rank: int, *, oversampling: int = 32, iterations: int = 4
) -> tuple[Tensor, Tensor]:
    """Block subspace iteration in float64, from a random block.

    Parameters
    ----------
    matrix : (m, n)
    rank : int
    oversampling : int
        Columns of the block beyond the rank.
    iterations : int
        Of ``A A^T``.
    """
    m, n = matrix.shape
    generator = torch.Generator(matrix.device).manual_seed(0)
    width = min(rank + oversampling, m, n)
    start = torch.randn(n, width, generator=generator, dtype=matrix.dtype, device=matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(iterations):
        back = torch.linalg.qr(matrix.T @ basis).Q
        basis = torch.linalg.qr(matrix @ back).Q
    rows = basis.T @ matrix
    eigenvalues, vectors = torch.linalg.eigh(rows @ rows.T)
    return basis @ vectors.flip(1)[:, :rank], eigenvalues.flip(0).clamp(min=0).sqrt()


def gram_refined(
    matrix: Tensor, rank: int, *, corrections: int = 8
) -> tuple[Tensor, Tensor] | None:
    """Eigenvectors of the smaller Gram matrix in float32, refined to float64 by products alone.

    Of the vectors on either side of the cut, those next to it, which float32 does not tell apart,
    are found anew among themselves (Rayleigh and Ritz); the others are turned across the cut as
    ``lorap.ops.solvers.gram`` does, to first order, as often as it takes. Newton and Schulz' step
    keeps them orthonormal.

    Parameters
    ----------
    matrix : (m, n)
    rank : int
    corrections : int
        At most so many.

    Returns
    -------
    basis, singular_values
        Or None where that was not enough, or the vectors are turned too far for first order.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if tall else matrix
    width = len(short) // 16
    near = slice(max(0, rank - width), rank + width)
    vectors = torch.linalg.eigh((short @ short.T).float()).eigenvectors.flip(1).double()
    for _ in range(corrections):
        vectors = 1.5 * vectors - 0.5 * (vectors @ (vectors.T @ vectors))
        rows = vectors.T @ short
        among = torch.linalg.eigh(rows[near] @ rows[near].T).eigenvectors.flip(1)
        vectors[:, near], rows[near] = vectors[:, near] @ among, among.T @ rows[near]
        squares = rows.square().sum(dim=1)
        gaps = squares[:rank, None] - squares[None, rank:]
        turn = (rows[:rank] @ rows[rank:].T) / gaps
        size = float(torch.linalg.norm(turn))
        if not size < 1:
            return None
        kept, rest = vectors[:, :rank], vectors[:, rank:]
        vectors = torch.cat([kept + rest @ turn.T, rest - kept @ turn], dim=1)
        if size <= solvers.EXACT:
            values = squares.sort(descending=True).values.sqrt()
            leading = vectors[:, :rank]
            return torch.linalg.qr(matrix @ leading if tall else leading).Q, values
    return None


def spectral(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Spectral divide and conquer: the projector onto the eigenvalues above the cut.

    It is half of the identity and of the sign of the Gram matrix less the middle of the gap, which
    dynamically weighted Halley iterations give (QDWH: Nakatsukasa, Bai and Gygi, SIAM J. Matrix
    Anal. Appl. 31, 2010; by Cholesky's factors where they are accurate, section 4 there). All in
    float64; the eigenvalues, for the middle, without their vectors. None where the last one that is
    kept is not told from the rounding of the first.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    short = matrix.T if tall else matrix
    product = short @ short.T
    eigenvalues = torch.linalg.eigvalsh(product).flip(0)
    values = eigenvalues.clamp(min=0).sqrt()
    rounding = max(matrix.shape) * torch.finfo(matrix.dtype).eps * float(eigenvalues[0])
    if not float(eigenvalues[rank - 1]) > solvers.RANGE * rounding:
        return None
    if rank == len(product):
        return torch.linalg.qr(matrix).Q if tall else torch.eye(rank).to(matrix), values
    middle = (eigenvalues[rank - 1] + eigenvalues[rank]) / 2
    identity = torch.eye(len(product)).to(product)
    sign = product - middle * identity
    largest = float((eigenvalues - middle).abs().max())
    sign /= largest
    least = float((eigenvalues - middle).abs().min()) / largest
    least = max(least, torch.finfo(product.dtype).eps)
    while 1 - least > 1e-15:
        square = least**2
        d = (4 * (1 - square) / square**2) ** (1 / 3)
        root = (1 + d) ** 0.5
        a = root + 0.5 * (8 - 4 * d + 8 * (2 - square) / (square * root)) ** 0.5
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        if c > 100:
            both = torch.linalg.qr(torch.cat([c**0.5 * sign, identity])).Q
            first, second = both[: len(product)], both[len(product) :]
            sign = b / c * sign + (a - b / c) / c**0.5 * (first @ second.T)
        else:
            factor = torch.linalg.cholesky(identity + c * (sign @ sign))
            sign = b / c * sign + (a - b / c) * torch.cholesky_solve(sign, factor)
        sign = (sign + sign.T) / 2
        least = min(1.0, least * (a + b * square) / (1 + c * square))
    generator = torch.Generator(matrix.device).manual_seed(0)
    leading = torch.randn(
        len(product), rank, generator=generator, dtype=product.dtype, device=product.device
    )
    # Twice: what is random may lie badly.
    for _ in range(2):
        leading = torch.linalg.qr((leading + sign @ leading) / 2).Q
    return torch.linalg.qr(matrix @ leading).Q if tall else leading, values


SOLVERS: dict[str, Solver] = {
    "full SVD": full_svd,
    "gram": solvers.gram,
    "gram, float32": gram_single,
    "gram, float32 refined": gram_refined,
    "subspace, 4 iterations": subspace,
    "divide and conquer": spectral,
}
"""The full SVD is what the others are compared with."""


def weighted_matrix(
    shape: tuple[int, int], spectrum: str, device: torch.device, seed: int
) -> Tensor:
    """Return a weight times the norms of its inputs, in float64.

    Parameters
    ----------
    shape : (int, int)
    spectrum : {"decay", "outliers"}
        ``decay``: the singular values of the weight fall off as ``(1 + i)^-0.5``, and the norms are
        spread by half an order. ``outliers``: a thousandth of the features is 100 times larger
        besides, as in LLaMAs.
    device : torch.device
    seed : int
    """
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    # Without orthogonal factors, which would take longer to make than the solvers take.
    k = min(shape)
    left = torch.randn(m, k, generator=generator, dtype=torch.float64) / m**0.5
    right = torch.randn(k, n, generator=generator, dtype=torch.float64) / n**0.5
    values = (1 + torch.arange(k, dtype=torch.float64)) ** -0.5
    norms = torch.exp(0.5 * torch.randn(n, generator=generator, dtype=torch.float64))
    if spectrum == "outliers":
        chosen = torch.randperm(n, generator=generator)[: max(1, n // 1000)]
        norms[chosen] *= 100
    left, right, values, norms = (x.to(device) for x in (left, right, values, norms))
    product: Tensor = ((left * values) @ right) * norms
    return product


def seconds(
    work: Callable[[], object], device: torch.device, repeats: int, *, warm_up: bool = True
) -> float:
    """Return the median time of some runs; on a GPU by events, and after one run to warm up."""
    clock = Clock(device)
    if clock.on_gpu and warm_up:
        work()
    return statistics.median(clock(work) for _ in range(repeats))


def contract_share(matrix: Tensor, basis: Tensor, singular_values: Tensor) -> float:
    """Return the excess over the least squared error, as a share of what the contract allows.

    Parameters
    ----------
    matrix : (m, n) float64
    basis : (m, rank)
    singular_values : (min(m, n),)
        Of the matrix, by the full SVD.
    """
    rank = basis.shape[1]
    lost = float(torch.linalg.norm(matrix - basis @ (basis.T @ matrix)) ** 2)
    least = float(singular_values[rank:].square().sum())
    whole = float(singular_values.square().sum())
    rounding = 20 * torch.finfo(torch.float64).eps * max(matrix.shape) * whole
    return max(lost - least, 0.0) / (1e-6 * least + rounding)


def compare(
    shape: tuple[int, int], spectrum: str, device: torch.device, repeats: int, seed: int
) -> list[dict[str, float | str]]:
    """Run all solvers on a matrix.

    Returns
    -------
    list of dict
        ``solver``, ``seconds``, ``ratio`` (to the full SVD's time) and ``excess`` (share of what
        the contract allows) of each; without the last where it refused.
    """
    matrix = weighted_matrix(shape, spectrum, device, seed)
    rank = max(1, round(SHARE * min(shape)))
    exact: Tensor | None = None
    rows: list[dict[str, float | str]] = []
    reference = 0.0
    for name, solver in SOLVERS.items():
        found: list[tuple[Tensor, Tensor] | None] = []

        def work(
            solver: Solver = solver, found: list[tuple[Tensor, Tensor] | None] = found
        ) -> None:
            found[:] = [solver(matrix, rank)]

        # The SVD takes by far the longest: once, the library loaded by a small one.
        slow = solver is full_svd
        if slow:
            solver(matrix[:64, :64], 1)
        taken = seconds(work, device, 1 if slow else repeats, warm_up=not slow)
        row: dict[str, float | str] = {"solver": name, "seconds": taken}
        if exact is None:
            assert found[0] is not None
            exact, reference = found[0][1], taken
        row["ratio"] = reference / taken
        if found[0] is not None:
            row["excess"] = contract_share(matrix, found[0][0], exact)
        rows.append(row)
    return rows


def shape_of(text: str) -> tuple[int, int]:
    """Read ``256x2048``."""
    m, n = (int(side) for side in text.split("x"))
    return m, n


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", metavar="MxN")
    parser.add_argument("--spectra", nargs="+", default=["decay", "outliers"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(f"`python -m bench.solvers {shlex.join(sys.argv[1:])}`")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{where}, {torch.get_num_threads()} threads of {os.cpu_count()} cores\n")
    print("| matrix | rank | columns | solver | seconds | times the SVD's speed | excess |")
    print("|---|---|---|---|---|---|---|")
    for text in arguments.shapes or SHAPES[arguments.device]:
        shape = shape_of(text)
        for spectrum in arguments.spectra:
            for row in compare(shape, spectrum, device, arguments.repeats, arguments.seed):
                excess = f"{row['excess']:.1e}" if "excess" in row else "refused"
                print(
                    f"| {text} | {round(SHARE * min(shape))} | {spectrum} | {row['solver']} | "
                    f"{row['seconds']:.3f} | {row['ratio']:.2f} | {excess} |",
                    flush=True,
                )
    print(f"\n{versions()}")


if __name__ == "__main__":
    main()
