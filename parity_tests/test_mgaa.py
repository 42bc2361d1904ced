"""MGAA: similarities within rounding; scores, ratios and ranks to the last bit."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from lorap.ops import mgaa as ours
from lorap_reference import mgaa as reference
from parity_tests import compare, tolerances
from parity_tests import strategies as own

Streams = tuple[own.Array, own.Array]


@pytest.mark.spec("mgaa.similarity")
@given(streams=own.streams(), layout=own.layouts)
def test_cosine_sum(streams: Streams, layout: own.Layout) -> None:
    before, after = (own.pair(tokens, layout) for tokens in streams)
    mine = ours.cosine_sum(before.tensor, after.tensor)
    assert type(mine) is float
    assert before.unchanged()
    assert after.unchanged()
    theirs = reference.cosine_sum(before.array, after.array)
    bound = tolerances.cosine_sum(*before.array.shape)
    compare.close("cosines", mine, theirs, bound)
    compare.within("cosines above 1", max(0.0, abs(mine) - before.array.shape[0]), bound)


@pytest.mark.spec("mgaa.similarity", "precision.statistics")
@given(
    streams=own.streams(),
    chunk=st.integers(1, 100),
    dtype=st.sampled_from((torch.float64, torch.float32, torch.float16, torch.bfloat16)),
)
def test_cosines_depend_on_neither_the_workspace_nor_the_dtype(
    streams: Streams, chunk: int, dtype: torch.dtype
) -> None:
    before, after = (own.pair(np.clip(tokens, -6e4, 6e4), "c", dtype) for tokens in streams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_CHUNK_ELEMENTS", chunk)
        mine = ours.cosine_sum(before.tensor, after.tensor)
    theirs = reference.cosine_sum(before.array, after.array)
    compare.close("cosines", mine, theirs, tolerances.cosine_sum(*before.array.shape))


@pytest.mark.spec("mgaa.similarity", "stats.padding")
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), own.sides()),
    dtype=st.sampled_from((torch.bool, torch.int64, torch.float32)),
    seed=own.seeds,
)
def test_padding_has_no_cosine(shape: tuple[int, int, int], dtype: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    X, mask = rng.standard_normal((2, *shape)), rng.integers(0, 2, shape[:2]).astype(bool)
    filled = np.where(mask[..., None], X, np.nan)
    mine = ours.cosine_sum(*torch.from_numpy(filled), torch.from_numpy(mask).to(dtype))
    theirs = reference.cosine_sum(X[0][mask], X[1][mask])
    compare.close("cosines (padding)", mine, theirs, tolerances.cosine_sum(mask.sum(), shape[2]))


@pytest.mark.spec("mgaa.scores", "mgaa.ieee")
@given(similarities=own.similarities())
@example(similarities=[(1 - 2.0**-53) * 0.97] * 49)
@example(similarities=[0.5, 0.5 + 2.0**-32])
def test_standard_scores(similarities: list[float]) -> None:
    given = list(similarities)
    z = ours.standard_scores(similarities)
    assert similarities == given
    compare.exact("standard scores", z, reference.standard_scores(similarities))
    if max(similarities) - min(similarities) <= 2.0**-32:
        event("equal but for rounding")
        assert not any(z)
        return
    mean = sum(map(Fraction, similarities)) / len(z)
    deviations = [Fraction(value) - mean for value in similarities]
    deviation = float(sum(e * e for e in deviations) / len(z)) ** 0.5
    expected = np.array([float(e) for e in deviations]) / deviation
    bound = tolerances.standard_scores(expected, deviation)
    compare.close("standard scores, from exact ones", z, expected, bound)


def exact_removed(case: own.SubLayers, ratios: list[float]) -> Fraction:
    """Return what the ratios remove beyond the target, in parameters."""
    return sum(
        (
            n * (Fraction(r) - Fraction(case.target))
            for n, r in zip(case.sizes, ratios, strict=True)
        ),
        Fraction(0),
    )


@pytest.mark.spec("mgaa.ratios", "mgaa.ieee")
@given(case=own.sublayers())
@example(case=own.SubLayers([1, -1, 0.5, -0.5], [1, 2, 1, 2], 0.5, 0.25, [1.0] * 4))
@example(case=own.SubLayers([2.0, 0.0, -2.0], [2, 1, 1], 0.25, 0.25, [0.25, 1.0, 1.0]))
@example(case=own.SubLayers([0.0] * 3, [3, 4, 5], 0.2, 0.35, [1.0] * 3))
@example(case=own.SubLayers([-5.375, 0.0], [1, 100], 0.5, 0.35, [1.0, 0.0]))
def test_sublayer_ratios(case: own.SubLayers) -> None:
    ratios = ours.sublayer_ratios(*case.arguments)
    compare.exact("sub-layer ratios", ratios, reference.sublayer_ratios(*case.arguments))
    assert all(0 <= ratio <= h for ratio, h in zip(ratios, case.highest, strict=True))
    excess = exact_removed(case, ratios)
    room = tolerances.ratios(sum(case.sizes), max(map(abs, case.wanted)))
    if exact_removed(case, case.highest) < 0:
        event("out of reach")
        if excess < -room:
            assert ratios == case.highest
    else:
        at_bounds = any(r in (0, h) for r, h in zip(ratios, case.highest, strict=True))
        event("clipped" if at_bounds else "free")
        compare.within("parameters removed beyond the target", abs(float(excess)), room)


def exact_ratios(case: own.SubLayers) -> list[Fraction]:
    """Solve for the shift in exact arithmetic, by walking along the corners of what is removed."""
    p, highest = list(map(Fraction, case.wanted)), list(map(Fraction, case.highest))
    ratios = [Fraction(0)] * len(p)
    due = Fraction(case.target) * sum(case.sizes)
    corners = sorted({-a for a in p} | {h - a for a, h in zip(p, highest, strict=True)})
    for left, right in pairwise(corners):
        free = [-a <= left and h - a >= right for a, h in zip(p, highest, strict=True)]
        slope = sum(n for n, rises in zip(case.sizes, free, strict=True) if rises)
        gain = slope * (right - left)
        step = right - left if gain <= due else due / slope
        ratios = [r + step if rises else r for r, rises in zip(ratios, free, strict=True)]
        due -= slope * step
        if not due:
            break
    return ratios


@pytest.mark.spec("mgaa.ratios")
@given(case=own.sublayers())
def test_ratios_are_those_of_exact_arithmetic(case: own.SubLayers) -> None:
    expected = exact_ratios(case)
    away = sum(
        n * abs(Fraction(r) - e)
        for n, r, e in zip(case.sizes, ours.sublayer_ratios(*case.arguments), expected, strict=True)
    )
    room = tolerances.ratios(sum(case.sizes), max(map(abs, case.wanted)))
    compare.within("sub-layer ratios, from exact ones, in parameters", float(away), room)


@pytest.mark.spec("mgaa.highest", "mgaa.ieee")
@given(target=own.ratios, floor=own.ratios)
def test_highest_ratio(target: float, floor: float) -> None:
    highest = ours.highest_ratio(target, floor)
    compare.exact("highest ratio", highest, reference.highest_ratio(target, floor))
    assert target <= highest <= 1
    assert highest == target or floor < 1
    assert highest == 1 or floor > 0
    exact = 1 - Fraction(floor) * (1 - Fraction(target))
    away = abs(float(Fraction(highest) - exact))
    compare.within("highest ratio, from the exact one", away, tolerances.highest_ratio())


@pytest.mark.spec("mgaa.energy", "mgaa.ieee")
@given(case=own.energies(), layout=own.layouts)
def test_cumulative_energy(case: own.Energies, layout: own.Layout) -> None:
    for values in case.spectra.values():
        S = own.pair(values, layout)
        c = ours.cumulative_energy(S.tensor)
        assert S.unchanged()
        compare.exact("cumulative energies", c, reference.cumulative_energy(S.array))
        assert sorted(c) == c
        assert c[-1] == 1


@pytest.mark.spec("mgaa.floors", "mgaa.ieee")
@given(shapes=own.low_rank_shapes(), retained=own.ratios, floor=own.ratios)
@example(shapes={"up": (34, 17), "down": (23, 54)}, retained=0.93, floor=1.0)
def test_rank_floors(shapes: dict[str, own.Shape], retained: float, floor: float) -> None:
    total = sum(d_out * d_in for d_out, d_in in shapes.values())
    budget = retained * total
    floors = ours.rank_floors(shapes, budget, floor)
    theirs = reference.rank_floors(shapes, budget, floor)
    assert list(floors) == list(theirs) == list(shapes)
    compare.exact("rank floors", list(floors.values()), list(theirs.values()))
    assert all(type(rank) is int for rank in floors.values())
    assert sum(floors[m] * sum(shapes[m]) for m in shapes) <= budget
    for m, (d_out, d_in) in shapes.items():
        # A budget in whole parameters, a uniform rank and its share, each rounded down.
        per_parameter = Fraction(d_out * d_in, total * (d_out + d_in))
        due = Fraction(floor) * Fraction(budget) * per_parameter
        slip = tolerances.rank_floor(due)
        assert -slip <= due - floors[m] < 1 + Fraction(floor) * (1 + per_parameter) + slip


@pytest.mark.spec("mgaa.ranks", "mgaa.slack", "mgaa.ieee")
@given(case=own.energies())
@example(
    case=own.Energies(
        {m: np.zeros(8) for m in "qkv"},
        dict.fromkeys("qkv", (8, 8)),
        112.0,
        dict.fromkeys("qkv", 1),
    )
)
def test_common_energy_ranks(case: own.Energies) -> None:
    pairs = {m: own.pair(S) for m, S in case.spectra.items()}
    mine = ours.common_energy_ranks(
        {m: pair.tensor for m, pair in pairs.items()}, case.shapes, case.budget, case.floors
    )
    assert all(pair.unchanged() for pair in pairs.values())
    theirs = reference.common_energy_ranks(
        {m: pair.array for m, pair in pairs.items()}, case.shapes, case.budget, case.floors
    )
    assert list(mine) == list(theirs) == list(case.shapes)
    for m, rank in theirs.items():
        assert (mine[m] is None) == (rank is None), f"{m}: {mine[m]}, reference {rank}"
        compare.exact("ranks of a common energy", mine[m] or 0, rank or 0)
        assert rank is None or type(mine[m]) is int
