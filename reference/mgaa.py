"""Multi-Granular Adaptive Allocation: what each sub-layer and each matrix in it keeps.

Equations are those of MGAA (arXiv 2507.03294) and so are the letters: p is the share REMOVED, which
LoRAP calls s, and p_t its target. Ratios and ranks end in floors of doubles, so the doubles are
part of the rules: every sum of them is ``math.fsum``, which rounds the exact sum once, or runs from
the left, and all else is in the order written (SPEC: ``mgaa.ieee``).
"""

from collections.abc import Mapping, Sequence
from math import fsum, sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Shape = tuple[int, int]

EQUAL = 2.0**-32
"""Similarities no further apart than this are equal but for rounding (SPEC: ``mgaa.scores``)."""


def cosine_sum(X: Array, Y: Array) -> float:
    """Eq. (12) before its mean: the sum over the tokens m of ``cos(X_m, Y_m)``.

    Parameters
    ----------
    X, Y : (tokens, d)
        The residual stream before and after a sub-layer, the skip connection included.

    Returns
    -------
    float
        Additive over batches. A token that is zero in X and Y counts 1, in one of them 0.

    Notes
    -----
    SPEC: ``mgaa.similarity``. Each token is first divided by its largest magnitude, which changes
    no cosine, so that no square overflows, or vanishes with its token.
    """

    def scaled(Z: Array) -> Array:
        largest = np.max(np.abs(Z), axis=1, keepdims=True)
        return np.asarray(Z / np.where(largest > 0, largest, 1.0))

    x, y = scaled(X), scaled(Y)
    xy, xx, yy = (np.sum(a * b, axis=1) for a, b in ((x, y), (x, x), (y, y)))
    norms = np.sqrt(xx * yy)
    # Where a norm is 0, xx == yy says that both are. What is not a number stays so.
    cosines = np.divide(xy, norms, out=(xx == yy).astype(np.float64), where=norms != 0)
    return float(np.sum(cosines))


def standard_scores(I_s: Sequence[float]) -> list[float]:
    """Eq. (13): ``z = (I - mean(I)) / std(I)`` over the sub-layers.

    Parameters
    ----------
    I_s : sequence
        Mean cosine of every sub-layer, Eq. (12); at least one.

    Returns
    -------
    list
        Mean 0 and mean square 1, for the standard deviation is that of the population; zeros where
        all similarities are equal but for rounding.

    Notes
    -----
    SPEC: ``mgaa.scores``.
    """
    if max(I_s) - min(I_s) <= EQUAL:
        return [0.0] * len(I_s)
    mean = fsum(I_s) / len(I_s)
    deviations = [i - mean for i in I_s]
    std = sqrt(fsum(e * e for e in deviations) / len(I_s))
    return [e / std for e in deviations]


def highest_ratio(p_t: float, floor: float) -> float:
    """Largest ratio of a sub-layer that still keeps ``floor`` times what the target keeps.

    Parameters
    ----------
    p_t : float
        Target, the share of the parameters to remove.
    floor : float
        From 0, no bound, to 1, where every sub-layer keeps ``1 - p_t``.

    Returns
    -------
    float
        ``1 - floor * (1 - p_t)``, in a form that gives p_t itself at 1 and never less.

    Notes
    -----
    SPEC: ``mgaa.highest``.
    """
    return p_t + (1 - floor) * (1 - p_t)


def sublayer_ratios(
    z: Sequence[float],
    sizes: Sequence[int],
    p_t: float,
    alpha: float,
    highest: Sequence[float],
) -> list[float]:
    """Eq. (14) to (16): ``p = alpha z + p_t``, one shift for all, each within its bounds.

    The shift is the least double at which the parameters removed reach those of the target,

        e(shift) = sum over s of n_s * (clip(p_s + shift, 0, highest_s) - p_t) >= 0.

    Rounding is monotone, so each term of e, as computed, never falls as the shift grows, and the
    sum of the terms, rounded once, does not either: there is one such double, and bisection between
    a shift that brings all to 0 and one that brings all to their bounds ends at it.

    Parameters
    ----------
    z : sequence
        Standard scores of the sub-layers; at least one.
    sizes : sequence
        Their parameters n_s, positive.
    p_t : float
        Target, from 0 to 1: the share of the parameters to remove.
    alpha : float
        At least 0; 0.35 in the paper.
    highest : sequence
        Bounds from above, from 0 to 1.

    Returns
    -------
    list
        Ratios, the shares removed. Where not even the bounds remove enough, the bounds: then
        ``e < 0``, which it is not otherwise.

    Notes
    -----
    SPEC: ``mgaa.ratios``.
    """
    p = [alpha * z_s + p_t for z_s in z]

    def clipped(shift: float) -> list[float]:
        return [min(max(0.0, p_s + shift), h) for p_s, h in zip(p, highest, strict=True)]

    def excess(shift: float) -> float:
        return fsum(n * (p_s - p_t) for n, p_s in zip(sizes, clipped(shift), strict=True))

    reached = 2 * (1 + max(map(abs, p)))
    short = -reached
    while short < (middle := (short + reached) / 2) < reached:
        if excess(middle) >= 0:
            reached = middle
        else:
            short = middle
    return clipped(reached)


def cumulative_energy(S: Array) -> Array:
    """Eq. (17), (18), (20): the energy c_r that each rank retains.

    Parameters
    ----------
    S : (k,)
        Singular values of a weighted matrix, descending.

    Returns
    -------
    (k,)
        ``sum over j <= r of S_j^2``, added from the left, over that of all; entry r - 1 is c_r.
        Ones for a zero matrix.

    Notes
    -----
    SPEC: ``mgaa.energy``.
    """
    energy = np.cumsum(S * S)
    if S.size == 0 or energy[-1] == 0:
        return np.ones(S.size)
    return np.asarray(energy / energy[-1])


def rank_floors(shapes: Mapping[str, Shape], budget: float, floor: float) -> dict[str, int]:
    """Ranks that no matrix goes below: ``floor`` times the uniform rank, Eq. (5).

    Parameters
    ----------
    shapes : mapping from name to (d_out, d_in)
        The matrices of a sub-layer.
    budget : float
        Parameters that they may hold together.
    floor : float
        From 0 to 1.

    Returns
    -------
    dict
        Rank by matrix. They fit the budget.

    Notes
    -----
    SPEC: ``mgaa.floors``. The uniform rank of a budget is rounded down, in whole numbers.
    """
    N = sum(d_out * d_in for d_out, d_in in shapes.values())
    floors = {}
    for m, (d_out, d_in) in shapes.items():
        uniform = int(budget) * d_out * d_in // (N * (d_out + d_in))
        floors[m] = int(floor * uniform)
    return floors


def common_energy_ranks(
    spectra: Mapping[str, Array],
    shapes: Mapping[str, Shape],
    budget: float,
    floors: Mapping[str, int],
) -> dict[str, int | None]:
    """Eq. (19) as epsilon goes to 0: ranks with one retained energy; None stands for dense.

    From the floors, the matrix that retains the least energy gains a rank, again and again. One
    whose next rank would hold as many parameters as the matrix becomes dense instead; one whose
    next rank does not fit the budget gains no more.

    Parameters
    ----------
    spectra : mapping from name to (k,)
        Singular values of the weighted matrices, descending, ``k = min(d_out, d_in)``.
    shapes : mapping from name to (d_out, d_in)
        The matrices of a sub-layer; their order breaks the last ties.
    budget : float
        Parameters that they may hold together.
    floors : mapping from name to int
        Ranks to start from; below 1 they count as 1.

    Returns
    -------
    dict
        Rank by matrix in the order of ``shapes``. Where the floors alone exceed the budget, the
        floors: their parameters are then more than the budget, which they are not otherwise.

    Notes
    -----
    SPEC: ``mgaa.ranks``, ``mgaa.slack``.
    """
    size = {m: d_out * d_in for m, (d_out, d_in) in shapes.items()}
    c = {m: cumulative_energy(S) for m, S in spectra.items()}

    def held(m: str, r: int) -> int:
        return min(r * sum(shapes[m]), size[m])

    rank = {m: max(1, floors[m]) for m in shapes}
    left = int(budget) - sum(held(m, rank[m]) for m in shapes)
    closed: set[str] = set()
    while growing := [m for m in shapes if m not in closed and held(m, rank[m]) < size[m]]:
        least = min(growing, key=lambda m: (c[m][rank[m] - 1], held(m, rank[m]) / size[m]))
        step = held(least, rank[least] + 1) - held(least, rank[least])
        if step <= left:
            rank[least] += 1
            left -= step
        else:
            closed.add(least)
    return {m: rank[m] if held(m, rank[m]) < size[m] else None for m in shapes}
