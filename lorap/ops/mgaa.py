"""How MGAA (arXiv 2507.03294) shares out the parameters: between sub-layers and inside each.

A ratio is the share removed, as everywhere in ``lorap``. Ratios and ranks are Python floats and
ints, made by the operations that the rules name and in their order, so that they are the same on
every machine (SPEC: ``mgaa.ieee``).
"""

import heapq
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Shape = tuple[int, int]

EQUAL_SIMILARITIES = 2.0**-32
"""Similarities no further apart than this differ by rounding alone (SPEC: ``mgaa.scores``)."""

_CHUNK_ELEMENTS = 1 << 21
"""Elements widened to float64 at a time (16 MiB): the workspace does not grow with the tokens."""


def cosine_sum(before: Tensor, after: Tensor, mask: Tensor | None = None) -> float:
    """Sum over tokens of the cosine between the residual stream before and after a sub-layer.

    Parameters
    ----------
    before, after : (..., d)
        Any floating dtype; all leading axes are tokens. `after` includes the skip connection.
    mask : (...), optional
        True (or nonzero) where the token counts; padding is False.

    Returns
    -------
    float
        Additive over batches; over the number of tokens it is Eq. (12). A token that is zero before
        and after counts 1, one that is zero on one side 0.

    Notes
    -----
    SPEC: ``mgaa.similarity``, ``stats.padding``, ``precision.statistics``: done in float64.
    """
    features = before.shape[-1]
    count = before.shape[:-1].numel()
    before, after = before.reshape(count, features), after.reshape(count, features)
    if mask is not None:
        counts = mask.reshape(-1).bool()
        before, after = before[counts], after[counts]
    total = torch.zeros((), dtype=torch.float64, device=before.device)
    step = max(1, _CHUNK_ELEMENTS // features)
    for start in range(0, before.shape[0], step):
        x, y = (_scaled(tokens[start : start + step]) for tokens in (before, after))
        dots, x_squares, y_squares = (x * y).sum(1), x.square().sum(1), y.square().sum(1)
        norms = (x_squares * y_squares).sqrt()
        # Where a norm is 0, equal squares say that both are. What is not a number stays so.
        alike = (x_squares == y_squares).to(torch.float64)
        total += torch.where(norms == 0, alike, dots / norms).sum()
    return float(total)


def _scaled(tokens: Tensor) -> Tensor:
    """Return float64 tokens divided by their largest magnitude, which changes no cosine.

    So no square overflows, or vanishes with its token.
    """
    wide = tokens.to(torch.float64)
    largest = wide.abs().amax(dim=1, keepdim=True)
    return wide / largest.masked_fill(largest == 0, 1)


def standard_scores(similarities: Sequence[float]) -> list[float]:
    """Eq. (13): similarities less their mean, over their (population) standard deviation.

    Parameters
    ----------
    similarities : sequence of float
        Mean cosine of every sub-layer; at least one.

    Returns
    -------
    list of float
        Zeros where the similarities differ by rounding alone.

    Notes
    -----
    SPEC: ``mgaa.scores``.
    """
    count = len(similarities)
    if max(similarities) - min(similarities) <= EQUAL_SIMILARITIES:
        return [0.0] * count
    mean = math.fsum(similarities) / count
    # Multiplied, not raised to a power: only a product is rounded alike everywhere.
    squares = [(value - mean) * (value - mean) for value in similarities]
    deviation = math.sqrt(math.fsum(squares) / count)
    return [(value - mean) / deviation for value in similarities]


def highest_ratio(target: float, floor: float) -> float:
    """Largest ratio of a sub-layer that keeps at least `floor` of what the target keeps.

    Parameters
    ----------
    target : float
        Share of the parameters to remove.
    floor : float
        From 0 (no bound) to 1 (every sub-layer gets the target).

    Returns
    -------
    float
        Never below `target`, not even by rounding.

    Notes
    -----
    SPEC: ``mgaa.highest``.
    """
    return target + (1 - floor) * (1 - target)


def sublayer_ratios(
    z: Sequence[float],
    sizes: Sequence[int],
    target: float,
    alpha: float,
    highest: Sequence[float],
) -> list[float]:
    """Eq. (14) to (16): ratios that grow with the similarity and remove the target in all.

    One shift is added to the ratios of Eq. (14), the least double at which the clipped ratios
    remove at least the target. What they remove, as computed, never falls as the shift grows: every
    operation is monotone, rounding included. So there is one such double, whatever the search.

    Parameters
    ----------
    z : sequence of float
        ``standard_scores`` of the sub-layers; at least one.
    sizes : sequence of int
        Parameters of the sub-layers, positive.
    target : float
        Share of the parameters to remove, from 0 to 1.
    alpha : float
        How far the ratios spread, at least 0; 0.35 in the paper.
    highest : sequence of float
        Largest ratio of each sub-layer, from 0 to 1.

    Returns
    -------
    list of float
        Ratios from 0 to `highest`. Equal to `highest` where that removes less than the target,
        ``fsum(size * (ratio - target)) < 0``: such a target cannot be reached.

    Notes
    -----
    SPEC: ``mgaa.ratios``.
    """
    wanted = [alpha * score + target for score in z]
    # These bring every ratio to its bound; the one above also stands for a target out of reach.
    above = 2 * (1 + max(abs(ratio) for ratio in wanted))
    below = -above
    while True:
        shift = (below + above) / 2
        if shift in (below, above):
            return _clipped(wanted, above, highest)
        ratios = _clipped(wanted, shift, highest)
        removed = math.fsum(
            size * (ratio - target) for size, ratio in zip(sizes, ratios, strict=True)
        )
        if removed < 0:
            below = shift
        else:
            above = shift


def _clipped(ratios: Sequence[float], shift: float, highest: Sequence[float]) -> list[float]:
    pairs = zip(ratios, highest, strict=True)
    return [min(max(0.0, ratio + shift), bound) for ratio, bound in pairs]


def cumulative_energy(singular_values: Tensor) -> list[float]:
    """Eq. (17), (18), (20): the share of the squared singular values that each rank retains.

    Parameters
    ----------
    singular_values : (k,)
        Of a weighted matrix, descending.

    Returns
    -------
    list of k floats
        For the ranks 1 to k, added from the left. Ones for a zero matrix.

    Notes
    -----
    SPEC: ``mgaa.energy``.
    """
    energies: list[float] = []
    energy = 0.0
    for value in singular_values.double().tolist():
        energy += value * value
        energies.append(energy)
    return [part / energy for part in energies] if energy > 0 else [1.0] * len(energies)


def rank_floors(shapes: Mapping[str, Shape], budget: float, floor: float) -> dict[str, int]:
    """Ranks to start from: `floor` times the uniform rank of the budget, Eq. (5).

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
    SPEC: ``mgaa.floors``.
    """
    total = sum(d_out * d_in for d_out, d_in in shapes.values())
    floors = {}
    for name, (d_out, d_in) in shapes.items():
        # In integers: a quotient rounded up would not fit.
        uniform = int(budget) * d_out * d_in // (total * (d_out + d_in))
        floors[name] = int(floor * uniform)
    return floors


def common_energy_ranks(
    spectra: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    budget: float,
    floors: Mapping[str, int],
) -> dict[str, int | None]:
    """Eq. (19) as epsilon goes to 0: the least retained energy is raised as far as the budget goes.

    Water-filling: a heap gives the matrix with the least energy, which gains a rank if that fits
    the budget and is done with if not. The next rank of a matrix at the edge of its break-even rank
    is the dense matrix.

    Parameters
    ----------
    spectra : mapping from name to (k,)
        Singular values of the weighted matrices, descending, ``k = min(d_out, d_in)``.
    shapes : mapping from name to (d_out, d_in)
        The matrices of a sub-layer. Equal energies go by the share of the parameters held, then by
        this order.
    budget : float
        Parameters that they may hold together.
    floors : mapping from name to int
        Ranks to start from; below 1 they count as 1.

    Returns
    -------
    dict
        Rank by matrix in the order of `shapes`, None where it stays dense. Where the floors hold
        more than the budget, which then cannot be met, the floors.

    Notes
    -----
    SPEC: ``mgaa.ranks``, ``mgaa.slack``.
    """
    names = list(shapes)
    energies = [cumulative_energy(spectra[name]) for name in names]
    per_rank = [sum(shapes[name]) for name in names]
    sizes = [d_out * d_in for d_out, d_in in shapes.values()]
    ranks = [max(1, floors[name]) for name in names]
    held = [min(rank * step, size) for rank, step, size in zip(ranks, per_rank, sizes, strict=True)]
    left = int(budget) - sum(held)

    def entry(index: int) -> tuple[float, float, int]:
        return energies[index][ranks[index] - 1], held[index] / sizes[index], index

    heap = [entry(index) for index in range(len(names)) if held[index] < sizes[index]]
    heapq.heapify(heap)
    while heap:
        index = heap[0][2]
        step = min(per_rank[index], sizes[index] - held[index])
        if step > left:
            heapq.heappop(heap)
            continue
        ranks[index] += 1
        held[index] += step
        left -= step
        if held[index] == sizes[index]:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, entry(index))
    return {
        name: None if held[index] == sizes[index] else ranks[index]
        for index, name in enumerate(names)
    }
