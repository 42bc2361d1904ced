"""Section 3.2, App. C.1: ratios, ranks and widths. All of it exact."""

from collections.abc import Mapping
from fractions import Fraction

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from lorap.ops import budget as ours
from lorap.ops.pruning import kept_channels
from lorap_reference import budget as reference
from parity_tests import compare
from parity_tests import strategies as own

Shapes = Mapping[str, own.Shape]


def same_ranks(shapes: Shapes, s: float, a: float, nested: bool) -> dict[str, int | None]:
    """Assert that both sides give the same ranks in the same order, and return them."""
    mine = ours.ranks(shapes, s, a, nested)
    theirs = reference.ranks(shapes, s, a, nested)
    assert list(mine) == list(theirs) == list(shapes)
    for name, rank in theirs.items():
        assert (mine[name] is None) == (rank is None), f"{name}: {mine[name]}, reference {rank}"
        compare.exact("ranks", mine[name] or 0, rank or 0)
        assert rank is None or type(mine[name]) is int
    return mine


@pytest.mark.spec("budget.ranks", "budget.overflow", "budget.ieee")
@given(shapes=own.low_rank_shapes(), s=own.ratios, a=own.allocations, nested=st.booleans())
@example(shapes=dict.fromkeys("qkvo", (4096, 4096)), s=0.34, a=3, nested=True)
@example(shapes=dict.fromkeys("qkvo", (5120, 5120)), s=0.8, a=3, nested=True)
@example(shapes=dict.fromkeys(own.ROLES, (60, 60)), s=0.6, a=3, nested=False)
def test_ranks(shapes: Shapes, s: float, a: float, nested: bool) -> None:
    same_ranks(shapes, s, a, nested)


@pytest.mark.spec("budget.ranks.square")
@given(
    d=st.one_of(st.integers(1, 300), st.integers(1, 9000)),
    s=own.ratios,
    a=st.integers(2, 18).map(lambda n: n / 2),
)
@example(d=4096, s=0.34, a=3)
@example(d=5120, s=0.8, a=3)
def test_on_squares_the_ranks_are_the_authors(d: int, s: float, a: float) -> None:
    shapes = dict.fromkeys("qkvo", (d, d))
    ranks = same_ranks(shapes, s, a, nested=True)
    expected = reference.authors_ranks(d, s, a)
    capped = -(-d // 2) - 1
    for name, rank in expected.items():
        if rank is not None and rank > capped:
            # Where v and o turn dense by rounding alone, the published formula can hand q and k
            # as much as the dense matrix holds; Section 3.2 factors only what gets smaller.
            assert ranks[name] in (None, capped)
        else:
            assert ranks[name] == rank


def waterfill(shapes: Shapes, s: float, a: float) -> tuple[dict[str, Fraction | None], bool]:
    """Return what every matrix is due in exact arithmetic, None where it stays dense.

    Also whether some matrix was ever due its break-even rank but for less than one rank: floors may
    then decide otherwise, and all others move with it.
    """
    p, weight = 1 - Fraction(s), {m: Fraction(a) if m in "vo" else Fraction(1) for m in shapes}
    size = {m: Fraction(d_out * d_in) for m, (d_out, d_in) in shapes.items()}
    dense: set[str] = set()
    close = False
    while True:
        rest = [m for m in shapes if m not in dense]
        left = p * sum(size.values()) - sum(size[m] for m in dense)
        weighted = sum(weight[m] * size[m] for m in rest)
        due = {m: left * weight[m] * size[m] / weighted / sum(shapes[m]) for m in rest}
        even = {m: size[m] / sum(shapes[m]) for m in rest}
        close = close or any(abs(due[m] - even[m]) < 1 + Fraction(1, 10**6) for m in rest)
        full = {m for m in rest if due[m] >= even[m]}
        if not full:
            return {m: due.get(m) for m in shapes}, close
        dense |= full


@pytest.mark.spec("budget.ranks", "budget.overflow", "budget.slack")
@given(shapes=own.low_rank_shapes(), s=own.ratios, a=own.allocations)
def test_ranks_are_what_exact_arithmetic_gives_but_for_one(
    shapes: Shapes, s: float, a: float
) -> None:
    ranks = same_ranks(shapes, s, a, nested=False)
    exact, close = waterfill(shapes, s, a)
    event("within a rank of the break-even rank" if close else "clear of it")
    if close:
        return
    for name, due in exact.items():
        rank = ranks[name]
        if due is None:
            assert rank is None
        else:
            assert rank is not None
            assert abs(rank - due) <= 1 + Fraction(1, 10**6)


@pytest.mark.spec("budget.slack", "budget.overflow")
@given(shapes=own.low_rank_shapes(), s=own.ratios, a=own.allocations, nested=st.booleans())
def test_what_whole_ranks_leave_unspent(shapes: Shapes, s: float, a: float, nested: bool) -> None:
    """The intervals that SPEC states, in exact arithmetic with the double nearest to 1 - s."""
    ranks = same_ranks(shapes, s, a, nested)
    p, weight = Fraction(1 - s), {m: Fraction(a) if m in "vo" else Fraction(1) for m in shapes}
    size = {m: Fraction(d_out * d_in) for m, (d_out, d_in) in shapes.items()}
    factored = [m for m in shapes if ranks[m] is not None]
    N = sum(size.values())
    N_dense = N - sum(size[m] for m in factored)
    W = sum(weight[m] * size[m] for m in factored)
    left = Fraction(0)
    for m in factored:
        rank = ranks[m]
        assert rank is not None
        due = (p * N - N_dense) * weight[m] * (size[m] / sum(shapes[m])) / W
        if N_dense:
            event("a later round")
            low, high = Fraction(-1), Fraction(1)
        else:
            event("the first round, nested" if nested else "the first round")
            low, high = Fraction(0), 1 + nested * weight[m] * N / W
        # A few units in the last place of what is subtracted in doubles.
        slip = Fraction(1, 2**49) * (1 + N * weight[m] * size[m] / W)
        assert low - slip <= due - rank <= high + slip
        left += sum(shapes[m]) * (due - rank)
    held = N_dense + sum((ranks[m] or 0) * sum(shapes[m]) for m in factored)
    assert not factored or left == p * N - held


@pytest.mark.spec("budget.ranks")
@given(shapes=own.low_rank_shapes(), s=own.ratios, a=own.allocations, nested=st.booleans())
def test_a_factored_matrix_is_smaller_than_the_dense_one(
    shapes: Shapes, s: float, a: float, nested: bool
) -> None:
    for name, rank in same_ranks(shapes, s, a, nested).items():
        if rank is not None:
            d_out, d_in = shapes[name]
            assert rank >= 0
            assert rank * (d_out + d_in) < d_out * d_in


@pytest.mark.spec("budget.layer-ratio", "budget.ieee")
@given(
    total=st.integers(1, 10**12),
    layers=st.integers(1, 200),
    layer=st.integers(1, 10**10),
    s=own.ratios,
)
def test_layer_ratio(total: int, layers: int, layer: int, s: float) -> None:
    theirs = reference.layer_ratio(total, layers, layer, s)
    compare.exact("layer ratio", ours.layer_ratio(total, layers, layer, s), theirs)
    exact = Fraction(total) * Fraction(s) / (layers * layer)
    # Two roundings; the second term is for subnormal ratios.
    assert abs(Fraction(theirs) - exact) <= exact * Fraction(1, 2**51) + Fraction(1, 2**1000)


@pytest.mark.spec("budget.break-even")
@given(shape=st.tuples(st.integers(1, 40_000), st.integers(1, 40_000)))
def test_break_even_rank(shape: own.Shape) -> None:
    theirs = reference.break_even_rank(shape)
    compare.exact("break-even rank", ours.break_even_rank(shape), theirs)
    assert abs(theirs * sum(shape) - shape[0] * shape[1]) <= 2**-51 * shape[0] * shape[1]


@pytest.mark.spec("budget.channels", "budget.ieee")
@given(
    d_m=st.integers(0, 60_000),
    s=own.ratios,
    least=st.one_of(st.sampled_from((0.0, 0.01, 0.05, 0.5, 1.0)), st.floats(0, 1)),
)
def test_removed_band(d_m: int, s: float, least: float) -> None:
    low, high = ours.removed_band(d_m, s, least)
    compare.exact("removed band", (low, high), reference.removed_band(d_m, s, least))
    assert type(low) is type(high) is int
    assert 0 <= low <= high
    assert abs(high - low - s * d_m) <= 1 + 1e-6


@pytest.mark.spec("budget.channels")
@given(C=own.scores(), s=own.ratios, least=st.floats(0, 0.5))
def test_a_reachable_band_leaves_the_top_and_the_least_important(
    C: own.Array, s: float, least: float
) -> None:
    low, high = ours.removed_band(C.size, s, least)
    if high >= C.size:
        return
    scores = own.pair(C)
    kept = kept_channels(scores.tensor, low, high).tolist()
    assert len(kept) == C.size - (high - low)
    assert max(C) in C[kept]
    assert low == 0 or min(C) in C[kept]


@st.composite
def layers_of_a_module(draw: st.DrawFn) -> tuple[list[int], int, int, int]:
    """Draw sizes by layer, the parameters of a unit and of the dense module, and a multiple.

    The dense module has a whole number of units, or, as matrices have, any number of parameters.
    """
    u = draw(st.one_of(st.integers(1, 12), st.sampled_from((8192, 12288))), label="u")
    n = draw(st.integers(u + 1, 300 * u), label="n")
    n += draw(st.sampled_from((0, -n % u)), label="rest")
    M = draw(st.one_of(st.integers(1, 12), st.sampled_from((8, 64, 128))), label="M")
    largest = -(-n // u) - 1
    size = st.integers(0, largest)
    alike = st.builds(lambda r_l, count: [r_l] * count, size, st.integers(0, 40))
    return draw(st.one_of(alike, st.lists(size, max_size=40)), label="r"), u, n, M


@pytest.mark.spec("budget.multiple")
@given(case=layers_of_a_module())
@example(case=([10] * 4, 16, 1024, 8))
@example(case=([1228] * 32, 8192, 4096**2, 128))
def test_sizes_as_multiples(case: tuple[list[int], int, int, int]) -> None:
    r, u, n, M = case
    rounded = ours.rounded_sizes(r, u, n, M)
    assert rounded == reference.rounded_sizes(r, u, n, M)
    assert all(type(size) in (int, type(None)) for size in rounded)
    if M == 1:
        assert rounded == r
    owed = 0
    for due, size in zip(r, rounded, strict=True):
        if due < M:
            assert size == due
            continue
        assert size is None or (size >= M and size % M == 0 and size * u < n)
        held = n if size is None else size * u
        assert abs(held - due * u) <= M * u
        owed += due * u - held
        # The sum of the layers so far is kept to half a multiple, so that it is nearest.
        assert 2 * abs(owed) <= M * u
