"""MGAA on both sides against values worked out by hand, brute force, and exact arithmetic."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from itertools import product
from math import fsum, hypot
from typing import Any

import numpy as np
import pytest
import torch

Shape = tuple[int, int]
Ranks = Mapping[str, int | None]


class Side:
    """One of the two implementations, called with lists."""

    def __init__(self, package: str, make: Callable[[Any], Any]) -> None:
        self.mgaa = importlib.import_module(f"{package}.mgaa")
        self.make = make

    def cosine_sum(self, X: Any, Y: Any) -> float:
        before, after = (self.make(np.asarray(tokens, dtype=float)) for tokens in (X, Y))
        value = self.mgaa.cosine_sum(before, after)
        assert type(value) is float
        return value

    def energy(self, singular_values: list[float]) -> list[float]:
        return list(
            self.mgaa.cumulative_energy(self.make(np.asarray(singular_values, dtype=float)))
        )

    def ranks(
        self,
        spectra: Mapping[str, Any],
        shapes: Mapping[str, Shape],
        budget: float,
        floors: Mapping[str, int] | None = None,
    ) -> dict[str, int | None]:
        given = {m: self.make(np.asarray(s, dtype=float)) for m, s in spectra.items()}
        answer: dict[str, int | None] = self.mgaa.common_energy_ranks(
            given, shapes, budget, dict.fromkeys(shapes, 1) if floors is None else floors
        )
        assert list(answer) == list(shapes)
        return answer


@pytest.fixture(params=["lorap_reference", "lorap.ops"])
def side(request: pytest.FixtureRequest) -> Side:
    make = np.asarray if request.param == "lorap_reference" else torch.tensor
    return Side(request.param, make)


def held(shapes: Mapping[str, Shape], ranks: Ranks) -> int:
    """Return the parameters that the matrices hold."""
    return sum(
        d_out * d_in if ranks[m] is None else (ranks[m] or 0) * (d_out + d_in)
        for m, (d_out, d_in) in shapes.items()
    )


# --- similarity ---------------------------------------------------------------------------------


@pytest.mark.spec("mgaa.similarity")
def test_cosines_add_up(side: Side) -> None:
    """24/25 for (3, 4) and (4, 3), then at right angles, then opposite by half: -1."""
    X = [[3.0, 4.0], [1.0, 0.0], [1.0, 2.0]]
    Y = [[4.0, 3.0], [0.0, 7.0], [-0.5, -1.0]]
    parts = [side.cosine_sum(X[m : m + 1], Y[m : m + 1]) for m in range(3)]
    assert parts == pytest.approx([0.96, 0, -1], rel=1e-15)
    assert side.cosine_sum(X, Y) == pytest.approx(-0.04, rel=1e-14)
    assert side.cosine_sum(np.zeros((0, 2)), np.zeros((0, 2))) == 0


@pytest.mark.spec("mgaa.similarity")
def test_a_sublayer_that_changes_nothing_has_a_similarity_of_exactly_one(side: Side) -> None:
    X = np.random.default_rng(0).standard_normal((100, 33))
    assert side.cosine_sum(X, X) == 100
    assert side.cosine_sum(X, -2 * X) == -100


@pytest.mark.spec("mgaa.similarity")
def test_cosine_of_zero_tokens(side: Side) -> None:
    zero, one = [[0.0, 0.0]], [[1.0, 2.0]]
    assert side.cosine_sum(zero, zero) == 1
    assert side.cosine_sum(zero, one) == side.cosine_sum(one, zero) == 0


@pytest.mark.spec("mgaa.similarity")
def test_what_is_not_a_number_is_not_hidden(side: Side) -> None:
    X = [[1.0, 2.0], [np.nan, 2.0]]
    assert np.isnan(side.cosine_sum(X, np.ones((2, 2))))
    assert np.isnan(side.cosine_sum(np.zeros((2, 2)), X))


@pytest.mark.spec("mgaa.similarity")
def test_no_square_overflows_or_vanishes(side: Side) -> None:
    X, Y = np.array([[3.0, 4.0]]), np.array([[4.0, 3.0]])
    for a, b in product((1e-310, 1e-200, 1.0, 1e200, 4e307), repeat=2):
        assert side.cosine_sum(a * X, b * Y) == pytest.approx(0.96, rel=1e-11)


@pytest.mark.spec("mgaa.similarity")
def test_cosines_by_loops(side: Side) -> None:
    rng = np.random.default_rng(1)
    X = rng.standard_normal((20, 7)) * 10.0 ** rng.integers(-3, 4, (20, 1))
    Y = X + rng.standard_normal((20, 7))
    expected = sum(
        fsum(x * y for x, y in zip(a, b, strict=True)) / (hypot(*a) * hypot(*b))
        for a, b in zip(X.tolist(), Y.tolist(), strict=True)
    )
    assert side.cosine_sum(X, Y) == pytest.approx(expected, rel=1e-13)


@pytest.mark.spec("mgaa.similarity", "stats.padding")
def test_what_the_mask_leaves_out_has_no_cosine() -> None:
    from lorap.ops.mgaa import cosine_sum

    before = torch.tensor([[[3.0, 4.0], [torch.nan, 9.0]], [[1.0, 0.0], [5.0, 5.0]]])
    after = torch.tensor([[[4.0, 3.0], [1.0, 9.0]], [[1.0, 0.0], [torch.inf, 5.0]]])
    mask = torch.tensor([[1, 0], [1, 0]])
    assert cosine_sum(before, after, mask) == pytest.approx(1.96, rel=1e-15)


@pytest.mark.spec("mgaa.similarity", "precision.statistics")
def test_cosines_of_half_precision_are_those_of_doubles() -> None:
    from lorap.ops.mgaa import cosine_sum

    before = torch.full((1, 4096), 60000.0, dtype=torch.float16)
    after = before.clone()
    after[0, 0] = -60000
    assert cosine_sum(before, after) == 4094 / 4096


# --- standard scores ----------------------------------------------------------------------------


@pytest.mark.spec("mgaa.scores")
def test_the_deviation_is_that_of_the_population(side: Side) -> None:
    """A sample's, divided by n - 1, would give 0.707 for two, and 0.5 and 1.5 for four."""
    assert side.mgaa.standard_scores([0.25, 0.75]) == [-1, 1]
    thirds = side.mgaa.standard_scores([0.5, 0.5, 0.5, 0.9])
    assert thirds == pytest.approx([-(3**-0.5)] * 3 + [3**0.5], rel=1e-14)


@pytest.mark.spec("mgaa.scores")
def test_equal_similarities_have_scores_of_zero(side: Side) -> None:
    assert side.mgaa.standard_scores([0.9]) == [0]
    assert side.mgaa.standard_scores([0.7] * 5) == [0] * 5
    assert side.mgaa.standard_scores([0.7, 0.7 + 2.0**-33]) == [0, 0]
    assert side.mgaa.standard_scores([0.5, 0.5 + 2.0**-31]) == [-1, 1]
    assert side.mgaa.standard_scores([0.5, 0.5 + 2.0**-32]) == [0, 0]
    # The mean of equal numbers can be another number: without a threshold all would be 1.
    odd = [(1 - 2.0**-53) * 0.97] * 49
    assert side.mgaa.standard_scores(odd) == [0] * 49


@pytest.mark.spec("mgaa.scores")
def test_scores_have_mean_0_and_mean_square_1(side: Side) -> None:
    similarities = np.random.default_rng(2).uniform(0.2, 1, 64).tolist()
    z = side.mgaa.standard_scores(similarities)
    assert np.mean(z) == pytest.approx(0, abs=1e-14)
    assert np.mean(np.square(z)) == pytest.approx(1, rel=1e-13)
    assert np.argsort(z).tolist() == np.argsort(similarities).tolist()


# --- ratios of the sub-layers -------------------------------------------------------------------


@pytest.mark.spec("mgaa.ratios")
def test_where_nothing_is_clipped_the_shift_is_the_printed_one(side: Side) -> None:
    """Two layers, the FFN twice as large: beta = 2, p = .75, .25, .625, .375.

    Eq. (15): p_s = (2 (.25 + .375) / 2 + (.75 + .625) / 2) / 3 = .4375, so all move by .0625.
    """
    ratios = side.mgaa.sublayer_ratios([1, -1, 0.5, -0.5], [1, 2, 1, 2], 0.5, 0.25, [1] * 4)
    assert ratios == [0.8125, 0.3125, 0.6875, 0.4375]


@pytest.mark.spec("mgaa.ratios")
def test_the_shift_is_solved_after_clipping(side: Side) -> None:
    """p = .75, .25, -.25 of a target of .25: the last one stays at 0, so the others lose .125."""
    z, sizes = [2.0, 0.0, -2.0], [1, 1, 1]
    assert side.mgaa.sublayer_ratios(z, sizes, 0.25, 0.25, [1] * 3) == [0.625, 0.125, 0]
    # Bounded by a half the first removes too little; what it lacks just makes up for the last.
    assert side.mgaa.sublayer_ratios(z, sizes, 0.25, 0.25, [0.5, 1, 1]) == [0.5, 0.25, 0]
    # Sizes weigh: 2 * .25 + x = 4 * .25 and y = 0.
    assert side.mgaa.sublayer_ratios(z, [2, 1, 1], 0.25, 0.25, [0.25, 1, 1]) == [0.25, 0.5, 0]


@pytest.mark.spec("mgaa.ratios")
def test_a_target_out_of_reach_gives_the_bounds(side: Side) -> None:
    ratios = side.mgaa.sublayer_ratios([1.0, -1.0], [1, 3], 0.5, 0.35, [0.9, 0.3])
    assert ratios == [0.9, 0.3]
    assert 0.9 + 3 * 0.3 < 4 * 0.5


@pytest.mark.spec("mgaa.ratios")
def test_no_target_removes_nothing(side: Side) -> None:
    ratios = side.mgaa.sublayer_ratios([1.0, -1.0, 0.0], [5, 7, 9], 0.0, 0.35, [1, 1, 1])
    assert ratios == [0, 0, 0]


@pytest.mark.spec("mgaa.ratios", "mgaa.highest")
@pytest.mark.parametrize("target", [0.1, 0.2, 0.3, 1 / 3, 0.7, 0.99])
def test_a_uniform_allocation_is_exactly_the_target(side: Side, target: float) -> None:
    """To the last bit: equal scores, alpha 0, and a floor that leaves no choice."""
    z, sizes = [1.3, -0.4, -0.9], [4 * 4096**2, 3 * 4096 * 11008, 12345677]
    free = [1.0] * 3
    assert side.mgaa.sublayer_ratios([0.0] * 3, sizes, target, 0.35, free) == [target] * 3
    assert side.mgaa.sublayer_ratios(z, sizes, target, 0.0, free) == [target] * 3
    bound = [side.mgaa.highest_ratio(target, 1.0)] * 3
    assert side.mgaa.sublayer_ratios(z, sizes, target, 0.35, bound) == [target] * 3


def exact_ratios(
    p: list[Fraction], sizes: list[int], target: Fraction, highest: list[Fraction]
) -> list[Fraction] | None:
    """Solve for the shift exactly, between two neighbouring corners of the removed share."""
    corners = sorted({-a for a in p} | {h - a for a, h in zip(p, highest, strict=True)})

    def ratios(shift: Fraction) -> list[Fraction]:
        return [min(max(Fraction(0), a + shift), h) for a, h in zip(p, highest, strict=True)]

    def removed(shift: Fraction) -> Fraction:
        return sum((n * a for n, a in zip(sizes, ratios(shift), strict=True)), Fraction(0))

    due = target * sum(sizes)
    if removed(corners[-1]) < due:
        return None
    right = next(corner for corner in corners if removed(corner) >= due)
    before = [corner for corner in corners if corner < right]
    if not before or removed(right) == due:
        return ratios(right)
    left = before[-1]
    part = (due - removed(left)) / (removed(right) - removed(left))
    return ratios(left + part * (right - left))


@pytest.mark.spec("mgaa.ratios")
def test_ratios_are_those_of_exact_arithmetic(side: Side) -> None:
    rng = np.random.default_rng(3)
    reached = 0
    for _ in range(300):
        count = int(rng.integers(1, 9))
        z = (rng.integers(-20, 21, count) / 10).tolist()
        sizes = rng.integers(1, 100, count).tolist()
        highest = rng.choice((0.25, 0.5, 0.75, 1.0), count).tolist()
        target, alpha = float(rng.integers(0, 10)) / 10, float(rng.choice((0.35, 1.0)))
        ratios = side.mgaa.sublayer_ratios(z, sizes, target, alpha, highest)
        p = [Fraction(alpha * score + target) for score in z]
        expected = exact_ratios(p, sizes, Fraction(target), list(map(Fraction, highest)))
        if expected is None:
            assert ratios == highest
            continue
        reached += 1
        assert ratios == pytest.approx([float(value) for value in expected], abs=1e-13)
    assert 150 < reached < 300


@pytest.mark.spec("mgaa.highest")
def test_highest_ratio(side: Side) -> None:
    """Half is to be removed; a sub-layer that keeps a quarter of the other half loses 7/8."""
    assert side.mgaa.highest_ratio(0.5, 0.25) == 0.875
    for target in np.linspace(0, 1, 1001).tolist():
        assert side.mgaa.highest_ratio(target, 1.0) == target
        assert side.mgaa.highest_ratio(target, 0.0) == 1
        assert target <= side.mgaa.highest_ratio(target, 0.25) <= 1


# --- energies and ranks -------------------------------------------------------------------------


@pytest.mark.spec("mgaa.energy")
def test_cumulative_energy(side: Side) -> None:
    assert side.energy([4.0, 3.0, 0.0]) == [16 / 25, 1, 1]
    assert side.energy([0.0, 0.0]) == [1, 1]
    assert side.energy([]) == []


@pytest.mark.spec("mgaa.energy", "mgaa.ieee")
def test_energies_are_added_from_the_left(side: Side) -> None:
    """Each of ten quarters of an eps is lost beside the 1; together they are two and a half."""
    energies = side.energy([1.0] + [2.0**-27] * 10)
    assert energies == [1] * 11


@pytest.mark.spec("mgaa.floors")
def test_rank_floors(side: Side) -> None:
    """Half of 8 x 8 is 2 ranks of 16, half of 4 x 16 is 1.6 ranks of 20; half of these."""
    shapes = {"q": (8, 8), "k": (4, 16)}
    assert side.mgaa.rank_floors(shapes, 64, 1.0) == {"q": 2, "k": 1}
    assert side.mgaa.rank_floors(shapes, 64.9, 0.5) == {"q": 1, "k": 0}
    assert side.mgaa.rank_floors(shapes, 64.9, 0.9) == {"q": 1, "k": 0}
    assert side.mgaa.rank_floors(shapes, 128, 0.0) == {"q": 0, "k": 0}
    # 1692 of 1820 parameters are 14.995 ranks of the second; 0.6 of a parameter more is none.
    uneven = {"up": (34, 17), "down": (23, 54)}
    assert side.mgaa.rank_floors(uneven, 1692.6, 1.0) == {"up": 10, "down": 14}


@pytest.mark.spec("mgaa.floors", "mgaa.slack")
def test_floors_fit_where_rounded_shares_would_not(side: Side) -> None:
    """0.28 of three 100 x 150: 16.8 ranks of 250 each; 0.25 of it is 15 but for the last bit."""
    shapes = dict.fromkeys(("gate", "up", "down"), (100, 150))
    for retained in np.linspace(0.01, 1, 500).tolist():
        budget = retained * 45000
        floors = side.mgaa.rank_floors(shapes, budget, 1.0)
        assert budget - 750 < held(shapes, floors) <= budget


@pytest.mark.spec("mgaa.ranks")
def test_the_least_energy_is_raised(side: Side) -> None:
    """a retains 0.9 at rank 1, b an eighth per rank; a rank is 16 parameters, all are 64."""
    shapes = dict.fromkeys("ab", (8, 8))
    spectra = {"a": [3.0, 1.0, 0, 0, 0, 0, 0, 0], "b": [1.0] * 8}
    assert side.ranks(spectra, shapes, 64) == {"a": 1, "b": 3}
    assert side.ranks(spectra, shapes, 63.9) == {"a": 1, "b": 2}
    # The fourth rank of b would hold all of it: dense. Then a goes on.
    assert side.ranks(spectra, shapes, 80) == {"a": 1, "b": None}
    assert side.ranks(spectra, shapes, 96) == {"a": 2, "b": None}
    assert side.ranks(spectra, shapes, 127) == {"a": 3, "b": None}
    assert side.ranks(spectra, shapes, 128) == {"a": None, "b": None}


@pytest.mark.spec("mgaa.ranks")
def test_the_last_step_to_dense_costs_what_it_adds(side: Side) -> None:
    """4 x 16: three ranks of 20, and the dense 64 for 4 more."""
    spectra, shapes = {"k": [4.0, 3.0, 2.0, 1.0]}, {"k": (4, 16)}
    assert [side.ranks(spectra, shapes, b)["k"] for b in (20, 59, 60, 63, 64)] == [1, 2, 3, 3, None]


@pytest.mark.spec("mgaa.ranks", "mgaa.slack")
def test_what_is_left_over_goes_to_those_it_fits(side: Side) -> None:
    """a, with the least energy, wants 32 more parameters and 20 are left; b takes 16 of them."""
    shapes = {"a": (16, 16), "b": (8, 8)}
    spectra = {"a": [1.0] * 16, "b": [3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]}
    assert side.ranks(spectra, shapes, 48 + 20) == {"a": 1, "b": 2}
    assert side.ranks(spectra, shapes, 48 + 32) == {"a": 2, "b": 1}


@pytest.mark.spec("mgaa.ranks")
def test_a_larger_budget_can_lower_a_rank(side: Side) -> None:
    """So b loses a rank to the first one more of a; the least energy has risen."""
    shapes = {"a": (16, 16), "b": (8, 8)}
    spectra = {"a": [1.0] * 16, "b": [3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]}
    before, after = (side.ranks(spectra, shapes, budget) for budget in (68, 80))
    assert (before["b"], after["b"]) == (2, 1)
    assert (before["a"], after["a"]) == (1, 2)


@pytest.mark.spec("mgaa.ranks", "mgaa.floors")
def test_floors_hold_and_show_a_budget_that_cannot_be_met(side: Side) -> None:
    shapes = dict.fromkeys("ab", (8, 8))
    spectra = {"a": [3.0, 1.0, 0, 0, 0, 0, 0, 0], "b": [1.0] * 8}
    assert side.ranks(spectra, shapes, 80, {"a": 2, "b": 1}) == {"a": 2, "b": 3}
    assert side.ranks(spectra, shapes, 31, {"a": 0, "b": 0}) == {"a": 1, "b": 1}
    assert side.ranks(spectra, shapes, 40, {"a": 2, "b": 1}) == {"a": 2, "b": 1}
    # A floor at the break-even rank is the dense matrix.
    assert side.ranks(spectra, shapes, 95, {"a": 4, "b": 1}) == {"a": None, "b": 1}
    assert side.ranks({"k": [1.0]}, {"k": (1, 9)}, 9) == {"k": None}


@pytest.mark.spec("mgaa.ranks")
def test_ties_go_by_the_share_held_and_then_by_order(side: Side) -> None:
    """Nothing is left to gain: zero matrices retain all of their energy."""
    shapes = {"a": (8, 8), "b": (8, 8), "c": (16, 16)}
    spectra = {m: [0.0] * min(shape) for m, shape in shapes.items()}
    # From one rank each, 64 parameters: c holds an eighth, then two, as a and b do: a, b, c.
    assert side.ranks(spectra, shapes, 64 + 32) == {"a": 1, "b": 1, "c": 2}
    assert side.ranks(spectra, shapes, 64 + 32 + 16) == {"a": 2, "b": 1, "c": 2}
    assert side.ranks(spectra, shapes, 64 + 32 + 32) == {"a": 2, "b": 2, "c": 2}
    # With energy left in c, it comes first.
    spectra["c"] = [1.0] * 16
    assert side.ranks(spectra, shapes, 64 + 96) == {"a": 1, "b": 1, "c": 4}


@pytest.mark.spec("mgaa.ranks")
def test_equal_matrices_differ_by_one_rank_at_most(side: Side) -> None:
    """Dense counts as the break-even rank, here a whole number; zero matrices are no exception."""
    rng = np.random.default_rng(4)
    for spectrum in ([8.0, 7, 6, 5, 4, 3, 2, 1], [2.0, 1, 0, 0, 0, 0, 0, 0], [0.0] * 8):
        shapes = dict.fromkeys("abc", (8, 8))
        for budget in rng.uniform(48, 200, 40).tolist():
            ranks = side.ranks(dict.fromkeys(shapes, spectrum), shapes, budget)
            steps = [4 if rank is None else rank for rank in ranks.values()]
            assert max(steps) - min(steps) <= 1


@pytest.mark.spec("mgaa.ranks")
def test_but_for_a_last_step_to_dense_that_is_cheaper(side: Side) -> None:
    """6 x 20: four ranks of 26, then 16 more. What is left, 17, is too little for b and c."""
    shapes = dict.fromkeys("abc", (6, 20))
    spectra = {m: [6.0, 5, 4, 3, 2, 1] for m in shapes}
    assert side.ranks(spectra, shapes, 10 * 26 + 15) == {"a": 4, "b": 3, "c": 3}
    assert side.ranks(spectra, shapes, 10 * 26 + 17) == {"a": None, "b": 3, "c": 3}
    assert side.ranks(spectra, shapes, 10 * 26 + 26) == {"a": 4, "b": 4, "c": 3}


def combinations(
    shapes: Mapping[str, Shape], floors: Mapping[str, int]
) -> Iterator[dict[str, int | None]]:
    """Yield all ranks from the floors up to below break-even, and dense."""
    choices = []
    for m, (d_out, d_in) in shapes.items():
        ranks = range(floors[m], min(shapes[m]))
        choices.append([*(r for r in ranks if r * (d_out + d_in) < d_out * d_in), None])
    for chosen in product(*choices):
        yield dict(zip(shapes, chosen, strict=True))


def exact_energies(spectrum: list[int]) -> list[Fraction]:
    """Return c_0, c_1, ... of a spectrum of whole numbers."""
    total = sum(s * s for s in spectrum)
    parts = [sum(s * s for s in spectrum[:r]) for r in range(len(spectrum) + 1)]
    return [Fraction(part, total) if total else Fraction(1) for part in parts]


def retained(c: Mapping[str, list[Fraction]], ranks: Ranks) -> list[Fraction]:
    """Return the energies that the matrices retain, the least first."""
    return sorted(c[m][-1 if rank is None else rank] for m, rank in ranks.items())


SMALL: list[dict[str, Shape]] = [
    {"q": (8, 8), "k": (4, 16), "v": (4, 16), "o": (8, 8)},
    {"gate": (12, 6), "up": (12, 6), "down": (6, 12)},
    {"qk": (10, 6), "v": (3, 6), "o": (6, 7)},
]


def drawn(rng: np.random.Generator, largest: int) -> tuple[Any, ...]:
    """Draw shapes, spectra of whole numbers, floors, and a budget that they fit."""
    shapes = SMALL[int(rng.integers(len(SMALL)))]
    spectra = {
        m: sorted(rng.integers(0 if largest < 5 else 1, largest, min(shape)).tolist(), reverse=True)
        for m, shape in shapes.items()
    }
    floors = {m: int(rng.integers(1, 3)) for m in shapes}
    start = held(shapes, floors)
    size = sum(d_out * d_in for d_out, d_in in shapes.values())
    return shapes, spectra, floors, float(rng.uniform(start, 1.02 * size))


@pytest.mark.spec("mgaa.ranks")
def test_no_other_ranks_retain_more_of_the_least_energy(side: Side) -> None:
    """Over all ranks that fit: the least energy is the greatest there is, ties or not."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        shapes, spectra, floors, budget = drawn(rng, largest=4)
        c = {m: exact_energies(s) for m, s in spectra.items()}
        ranks = side.ranks(spectra, shapes, budget, floors)
        assert held(shapes, ranks) <= budget
        assert all(rank is None or rank >= floors[m] for m, rank in ranks.items())
        fitting = (r for r in combinations(shapes, floors) if held(shapes, r) <= budget)
        assert retained(c, ranks)[0] == max(retained(c, r)[0] for r in fitting)


@pytest.mark.spec("mgaa.ranks")
def test_nor_of_the_next_least_where_energies_differ(side: Side) -> None:
    """Without ties the second least is the greatest that the least allows, and so on."""
    rng = np.random.default_rng(6)
    compared = 0
    for _ in range(60):
        shapes, spectra, floors, budget = drawn(rng, largest=10_000)
        c = {m: exact_energies(s) for m, s in spectra.items()}
        levels = [energy for m in shapes for energy in c[m][1:-1]]
        assert len(set(levels)) == len(levels)
        fitting = (r for r in combinations(shapes, floors) if held(shapes, r) <= budget)
        best = max(retained(c, r) for r in fitting)
        assert retained(c, side.ranks(spectra, shapes, budget, floors)) == best
        compared += best[0] < 1
    assert compared > 40


def at_energy(
    c: Mapping[str, list[Fraction]], shapes: Mapping[str, Shape], floors: Ranks, rho: Fraction
) -> dict[str, int | None]:
    """Return the least ranks, floors or more, that retain rho; None from break-even on."""
    ranks: dict[str, int | None] = {}
    for m, (d_out, d_in) in shapes.items():
        rank = next(r for r in range(floors[m] or 0, len(c[m])) if c[m][r] >= rho)
        ranks[m] = rank if rank * (d_out + d_in) < d_out * d_in else None
    return ranks


@pytest.mark.spec("mgaa.ranks")
def test_it_is_bisection_on_a_common_energy_and_then_spending_the_rest(side: Side) -> None:
    rng = np.random.default_rng(7)
    spent = 0
    for trial in range(120):
        shapes, spectra, floors, budget = drawn(rng, largest=4 if trial % 2 else 10_000)
        c = {m: exact_energies(s) for m, s in spectra.items()}
        # The budget that rho needs only grows with it, so the levels can be halved.
        levels = sorted({energy for m in shapes for energy in c[m]})
        low, high = 0, len(levels)
        assert held(shapes, at_energy(c, shapes, floors, levels[0])) <= budget
        while high - low > 1:
            middle = (low + high) // 2
            fits = held(shapes, at_energy(c, shapes, floors, levels[middle])) <= budget
            low, high = (middle, high) if fits else (low, middle)
        base = at_energy(c, shapes, floors, levels[low])
        ranks = side.ranks(spectra, shapes, budget, floors)
        more = {m for m in shapes if base[m] is not None and ranks[m] != base[m]}
        assert all(base[m] == ranks[m] for m in shapes if m not in more)
        assert all(ranks[m] is None or (ranks[m] or 0) > (base[m] or 0) for m in more)
        # Starting there gives the same: the rest is spent by the same rule.
        start = {m: max(shape) if base[m] is None else base[m] for m, shape in shapes.items()}
        assert side.ranks(spectra, shapes, budget, start) == ranks
        spent += bool(more)
    assert spent > 20


@pytest.mark.spec("mgaa.slack")
def test_less_than_one_rank_is_left(side: Side) -> None:
    rng = np.random.default_rng(8)
    for _ in range(100):
        shapes, spectra, floors, budget = drawn(rng, largest=100)
        ranks = side.ranks(spectra, shapes, budget, floors)
        for m, rank in ranks.items():
            if rank is not None:
                d_out, d_in = shapes[m]
                step = min(d_out + d_in, d_out * d_in - rank * (d_out + d_in))
                assert 0 <= budget - held(shapes, ranks) < step


@pytest.mark.spec("mgaa.ranks", "mgaa.slack")
def test_the_matrices_of_llama_7b_together(side: Side) -> None:
    """Thousands of ranks: half of the parameters, met to one rank."""
    shapes = dict.fromkeys("qkvo", (4096, 4096)) | {
        "gate": (11008, 4096),
        "up": (11008, 4096),
        "down": (4096, 11008),
    }
    decays = dict(zip(shapes, (100, 150, 900, 1000, 1500, 1600, 1700), strict=True))
    spectra = {m: np.exp(-np.arange(4096) / decay) for m, decay in decays.items()}
    budget = 0.5 * sum(d_out * d_in for d_out, d_in in shapes.values())
    floors = side.mgaa.rank_floors(shapes, budget, 0.25)
    assert floors == {m: 256 if m in "qkvo" else 373 for m in shapes}
    ranks = side.ranks(spectra, shapes, budget, floors)
    assert budget - 8192 < held(shapes, ranks) <= budget
    # q and k retain more than the others at their floors; the others retain the same.
    assert (ranks["q"], ranks["k"]) == (256, 256)
    energies = {m: np.sum(s[: ranks[m]] ** 2) / np.sum(s**2) for m, s in spectra.items()}
    others = [energy for m, energy in energies.items() if m not in "qk"]
    assert max(others) - min(others) < 5e-4
    assert min(energies["q"], energies["k"]) > max(others)
