"""The edges that the parity tests are meant to meet do occur; the helpers make what they say."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lorap_reference.budget import break_even_rank, ranks, removed_band
from lorap_reference.mgaa import common_energy_ranks, cumulative_energy, sublayer_ratios
from parity_tests import strategies as own

EXAMPLES = 400
"""Examples within which each edge occurs: two tests' worth of the ``ci`` profile."""

STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "matrices": own.matrices(),
    "problems": own.problems(),
    "tokens": own.tokens(),
    "outputs": own.output_problems(),
    "bands": st.tuples(own.scores(), own.ratios),
    "budgets": st.tuples(own.low_rank_shapes(), own.ratios, own.allocations),
    "streams": own.streams(),
    "similarities": own.similarities(),
    "sublayers": own.sublayers(),
    "energies": own.energies(),
    "llamas": own.small_llamas(),
    "heads": own.heads(),
    "masks": st.tuples(own.matrices(), own.ratios),
}


@cache
def examples(name: str) -> list[Any]:
    """Return the first examples of a strategy, derandomised."""
    drawn: list[Any] = []

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        # Drawing is all that happens here; a slow machine is no fault of the strategy.
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(STRATEGIES[name])
    def draw(example: Any) -> None:
        drawn.append(example)

    draw()
    return drawn


def occurs(name: str, edge: Callable[[Any], bool]) -> bool:
    """Tell whether one of the first examples of a strategy is at an edge."""
    return any(edge(example) for example in examples(name))


def condition(A: own.Array) -> float:
    S = np.linalg.svd(A, compute_uv=False)
    return float(S[0] / S[-1]) if S.size and S[-1] > 0 else float("inf")


def deficient(problem: own.Problem) -> bool:
    A = problem.W * problem.scale
    return A.size > 0 and int(np.linalg.matrix_rank(A)) < problem.rank


MATRIX_EDGES: dict[str, Callable[[own.Array], bool]] = {
    "no rows": lambda A: A.shape[0] == 0 and A.shape[1] > 0,
    "no columns": lambda A: A.shape[1] == 0 and A.shape[0] > 0,
    "1 x 1": lambda A: A.shape == (1, 1),
    "tall": lambda A: A.shape[0] > 2 * A.shape[1] > 0,
    "wide": lambda A: A.shape[1] > 2 * A.shape[0] > 0,
    "zero": lambda A: A.size > 1 and not A.any(),
    "duplicate columns": lambda A: (
        A.shape[1] > 1 and A.any() and bool(np.all(A[:, -1:] == A[:, -2:-1]))
    ),
    "rank-deficient": lambda A: A.any() and int(np.linalg.matrix_rank(A)) < min(A.shape),
    "condition number 1e12": lambda A: A.size > 0 and 1e11 < condition(A) < 1e13,
    "outlier channel": lambda A: (
        A.shape[0] > 0
        and A.shape[1] > 2
        and float(np.max(np.abs(A))) > 50 * float(np.sort(np.max(np.abs(A), axis=0))[-2])
    ),
    "tiny": lambda A: A.any() and float(np.max(np.abs(A))) < 1e-5,
    "huge": lambda A: A.size > 0 and float(np.max(np.abs(A))) > 1e5,
}


@pytest.mark.parametrize("name", MATRIX_EDGES)
def test_matrices_reach(name: str) -> None:
    assert occurs("matrices", MATRIX_EDGES[name])


PROBLEM_EDGES: dict[str, Callable[[own.Problem], bool]] = {
    "rank 0": lambda p: p.rank == 0 and p.W.size > 0,
    "full rank": lambda p: p.rank == min(p.W.shape) > 1,
    "dead feature": lambda p: bool(np.any(p.scale == 0) and np.any(p.scale > 0)),
    "all features dead": lambda p: p.scale.size > 1 and not p.scale.any(),
    "outlier feature": lambda p: (
        p.scale.size > 2 and float(np.max(p.scale)) > 100 * float(np.sort(p.scale)[-2]) > 0
    ),
    "rank(W D) below the rank": deficient,
}


@pytest.mark.parametrize("name", PROBLEM_EDGES)
def test_problems_reach(name: str) -> None:
    assert occurs("problems", PROBLEM_EDGES[name])


TOKEN_EDGES: dict[str, Callable[[own.Array], bool]] = {
    "no token": lambda X: X.shape[0] == 0 and X.shape[1] > 0,
    "one token": lambda X: X.shape[0] == 1 and X.shape[1] > 1,
    "many tokens": lambda X: X.shape[0] > 100,
    "dead feature": lambda X: X.shape[0] > 10 and bool(np.any(np.all(X == 0, axis=0))),
}


@pytest.mark.parametrize("name", TOKEN_EDGES)
def test_tokens_reach(name: str) -> None:
    assert occurs("tokens", TOKEN_EDGES[name])


def rank_of_outputs(p: own.OutputProblem) -> int:
    return int(np.linalg.matrix_rank(p.X @ p.W.T)) if p.W.size and p.n else 0


def invertible(p: own.OutputProblem) -> bool:
    S = np.linalg.svd(p.C, compute_uv=False)
    return S.size > 2 and bool(S[-1] > 1e-10 * S[0])


def mean_dominates(p: own.OutputProblem) -> bool:
    spread = np.std(p.X, axis=0) if p.n > 10 else np.zeros(0)
    return spread.size > 0 and bool(np.all(spread > 0) and np.all(np.abs(p.t / p.n) > 10 * spread))


OUTPUT_EDGES: dict[str, Callable[[own.OutputProblem], bool]] = {
    "no token": lambda p: p.n == 0 and p.W.size > 0,
    "one token": lambda p: p.n == 1 and p.W.size > 1,
    "fewer tokens than features": lambda p: 1 < p.n < p.X.shape[1] and p.W.size > 0,
    "a moment that can be inverted": invertible,
    "dead feature": lambda p: p.n > 10 and bool(np.any(np.diag(p.C) == 0) and p.C.any()),
    "all tokens equal": lambda p: p.n > 10 and p.X.any() and not np.any(np.ptp(p.X, axis=0)),
    "a mean far above the spread": mean_dominates,
    "rank of the outputs below the rank": lambda p: 0 < rank_of_outputs(p) < p.rank,
    "outputs all zero at a rank above 0": lambda p: p.rank > 0 and rank_of_outputs(p) == 0,
    "more outputs than inputs": lambda p: p.W.shape[0] > p.W.shape[1] > 1,
    "full rank": lambda p: p.rank == min(p.W.shape) > 1,
    "tiny": lambda p: p.X.any() and float(np.max(np.abs(p.X))) < 1e-4,
    "huge": lambda p: p.X.size > 0 and float(np.max(np.abs(p.X))) > 1e5,
}


@pytest.mark.parametrize("name", OUTPUT_EDGES)
def test_output_problems_reach(name: str) -> None:
    assert occurs("outputs", OUTPUT_EDGES[name])


def test_moments_are_those_of_the_tokens() -> None:
    problem = own.OutputProblem(np.eye(2), np.array([[1.0, 2.0], [3.0, -4.0]]), 1)
    assert problem.C.tolist() == [[10, -10], [-10, 20]]
    assert problem.t.tolist() == [4, -2]
    assert problem.n == 2


def tie_at_the_cut(example: tuple[own.Array, float]) -> bool:
    C, s = example
    ascending = np.sort(C)
    cuts = [cut for cut in removed_band(C.size, s, 0.01) if 0 < cut < C.size]
    return len(set(C)) > 1 and any(ascending[cut - 1] == ascending[cut] for cut in cuts)


SCORE_EDGES: dict[str, Callable[[tuple[own.Array, float]], bool]] = {
    "all scores equal": lambda e: e[0].size > 2 and len(set(e[0])) == 1,
    "tie at the cut": tie_at_the_cut,
    "ratio 0": lambda e: e[1] == 0,
    "ratio 1": lambda e: e[1] == 1,
    "no channel": lambda e: e[0].size == 0,
}


@pytest.mark.parametrize("name", SCORE_EDGES)
def test_scores_reach(name: str) -> None:
    assert occurs("bands", SCORE_EDGES[name])


Budget = tuple[dict[str, own.Shape], float, float]


def surplus(example: Budget) -> bool:
    found = ranks(*example, nested=True).values()
    return None in found and any(rank is not None and rank > 0 for rank in found)


def overflows_twice(example: Budget) -> bool:
    """Tell whether a matrix turns dense only by what others hand on."""
    shapes, s, a = example
    N = sum(m * n for m, n in shapes.values())
    weight = {name: a if name in "vo" else 1 for name in shapes}
    W = sum(weight[name] * m * n for name, (m, n) in shapes.items())
    dense = {name for name, rank in ranks(shapes, s, a, False).items() if rank is None}
    at_once = {
        name
        for name, shape in shapes.items()
        if int((1 - s) * break_even_rank(shape) * (weight[name] * N) / W) >= break_even_rank(shape)
    }
    return bool(at_once) and dense > at_once


BUDGET_EDGES: dict[str, Callable[[Budget], bool]] = {
    "grouped queries": lambda e: {"q", "k"} <= e[0].keys() and e[0]["k"][0] < e[0]["q"][0],
    "a single matrix": lambda e: len(e[0]) == 1,
    "all of the attention": lambda e: e[0].keys() == set("qkvo"),
    "q and k joint": lambda e: "qk" in e[0] and "v" in e[0],
    "the FFN alone": lambda e: e[0].keys() == {"gate", "up", "down"},
    "attention and FFN": lambda e: "v" in e[0] and "down" in e[0],
    "surplus handed on": surplus,
    "surplus overflows again": overflows_twice,
    "rank 0": lambda e: 0 in ranks(*e, nested=True).values(),
}


@pytest.mark.parametrize("name", BUDGET_EDGES)
def test_budgets_reach(name: str) -> None:
    assert occurs("budgets", BUDGET_EDGES[name])


Streams = tuple[own.Array, own.Array]


def zero(tokens: own.Array) -> Any:
    return ~tokens.any(axis=1)


STREAM_EDGES: dict[str, Callable[[Streams], bool]] = {
    "no token": lambda e: e[0].shape[0] == 0,
    "one feature": lambda e: e[0].shape[1] == 1 and e[0].any(),
    "zero before and after": lambda e: bool(np.any(zero(e[0]) & zero(e[1]))),
    "zero on one side": lambda e: bool(np.any(zero(e[0]) != zero(e[1]))),
    "unchanged": lambda e: bool(np.any(np.all(e[0] == e[1], axis=1) & ~zero(e[0]))),
    "squares that overflow": lambda e: np.max(np.abs(e[0]), initial=0) > 1e200,
    "squares that vanish": lambda e: bool(np.any(np.max(np.abs(e[0][~zero(e[0])]), 1) < 1e-200)),
}


@pytest.mark.parametrize("name", STREAM_EDGES)
def test_streams_reach(name: str) -> None:
    assert occurs("streams", STREAM_EDGES[name])


SIMILARITY_EDGES: dict[str, Callable[[list[float]], bool]] = {
    "a single one": lambda e: len(e) == 1,
    "all equal": lambda e: len(e) > 1 and len(set(e)) == 1,
    "equal but for rounding": lambda e: 0 < max(e) - min(e) < 2.0**-33,
    "near the threshold": lambda e: 2.0**-33 < max(e) - min(e) < 2.0**-31,
    "apart": lambda e: max(e) - min(e) > 0.5,
}


@pytest.mark.parametrize("name", SIMILARITY_EDGES)
def test_similarities_reach(name: str) -> None:
    assert occurs("similarities", SIMILARITY_EDGES[name])


def some_ratios(case: own.SubLayers, choose: Callable[[float, float], bool]) -> bool:
    """Tell whether a reachable target leaves a ratio, beside its bound, as `choose` asks."""
    found = sublayer_ratios(*case.arguments)
    removed = sum(n * (r - case.target) for n, r in zip(case.sizes, found, strict=True))
    reached = removed > -1e-6 * sum(case.sizes)
    return reached and any(choose(r, h) for r, h in zip(found, case.highest, strict=True))


SUBLAYER_EDGES: dict[str, Callable[[own.SubLayers], bool]] = {
    "a single one": lambda e: len(e.z) == 1,
    "equal scores": lambda e: len(e.z) > 1 and not any(e.z),
    "nothing to remove": lambda e: e.target == 0,
    "alpha 0": lambda e: e.alpha == 0 and any(e.z),
    "out of reach": lambda e: (
        sum(n * (h - e.target) for n, h in zip(e.sizes, e.highest, strict=True)) < -1e-6
    ),
    "clipped at 0": lambda e: e.target > 0 and some_ratios(e, lambda r, h: r == 0 < h),
    "clipped above": lambda e: some_ratios(e, lambda r, h: r == h > 0),
    "nothing clipped": lambda e: (
        len(set(e.wanted)) > 1
        and some_ratios(e, lambda r, h: 0 < r < h)
        and not some_ratios(e, lambda r, h: r in (0, h))
    ),
}


@pytest.mark.parametrize("name", SUBLAYER_EDGES)
def test_sublayers_reach(name: str) -> None:
    assert occurs("sublayers", SUBLAYER_EDGES[name])


def energy_ranks(case: own.Energies) -> dict[str, int | None]:
    return common_energy_ranks(case.spectra, case.shapes, case.budget, case.floors)


def spent(case: own.Energies) -> int:
    return sum(
        m * n if rank is None else rank * (m + n)
        for rank, (m, n) in zip(energy_ranks(case).values(), case.shapes.values(), strict=True)
    )


def tie(case: own.Energies) -> bool:
    """Tell whether two matrices that are not alike retain the same energy, short of all of it."""
    seen: dict[float, own.Shape] = {}
    for m, S in case.spectra.items():
        for c in set(cumulative_energy(S)[:-1].tolist()) - {1.0}:
            if seen.setdefault(c, case.shapes[m]) != case.shapes[m]:
                return True
    return False


ENERGY_EDGES: dict[str, Callable[[own.Energies], bool]] = {
    "a single matrix": lambda e: len(e.shapes) == 1,
    "all alike": lambda e: len(e.shapes) > 2 and len(set(e.shapes.values())) == 1,
    "a zero matrix beside another": lambda e: len({bool(S.any()) for S in e.spectra.values()}) == 2,
    "equal energies": tie,
    "out of reach": lambda e: spent(e) > e.budget,
    "all dense": lambda e: not any(energy_ranks(e).values()) and len(e.shapes) > 1,
    "dense beside factored": lambda e: (
        {None} < set(energy_ranks(e).values()) and spent(e) <= e.budget
    ),
    "a rank at its floor": lambda e: (
        spent(e) <= e.budget
        and any(e.floors[m] == rank > 1 for m, rank in energy_ranks(e).items() if rank)
    ),
    "a floor past break-even": lambda e: any(
        e.floors[m] * (d_out + d_in) > d_out * d_in for m, (d_out, d_in) in e.shapes.items()
    ),
    "no rank below break-even": lambda e: any(1 in shape for shape in e.shapes.values()),
}


@pytest.mark.parametrize("name", ENERGY_EDGES)
def test_energies_reach(name: str) -> None:
    assert occurs("energies", ENERGY_EDGES[name])


@given(own.energies())
def test_spectra_of_energies_are_descending(case: own.Energies) -> None:
    for m, S in case.spectra.items():
        assert S.shape == (min(case.shapes[m]),)
        assert np.all(np.diff(S) <= 0)
        assert np.all(S >= 0)


LLAMA_EDGES: dict[str, Callable[[own.SmallLlama], bool]] = {
    "grouped queries": lambda m: m.shape.heads > m.shape.kv_heads > 1,
    "as many keys as queries": lambda m: m.shape.heads == m.shape.kv_heads > 1,
    "tied": lambda m: m.tied,
    "untied": lambda m: not m.tied,
    "all biases": lambda m: m.attention_bias and m.mlp_bias,
    "no bias": lambda m: not m.attention_bias and not m.mlp_bias,
    "several layers": lambda m: m.shape.layers == 3,
}


@pytest.mark.parametrize("name", LLAMA_EDGES)
def test_llamas_reach(name: str) -> None:
    assert occurs("llamas", LLAMA_EDGES[name])


HEAD_EDGES: dict[str, Callable[[own.Heads], bool]] = {
    "grouped queries": lambda h: h.kv_heads > 1 and h.q.shape[0] > h.k.shape[0],
    "as many keys as queries": lambda h: h.kv_heads > 1 and h.q.shape[0] == h.k.shape[0],
    "one group": lambda h: h.kv_heads == 1,
    "one row a head": lambda h: h.k.shape[0] == h.kv_heads > 1,
    "one feature": lambda h: h.q.shape[1] == 1,
    "all groups equal": lambda h: h.kv_heads > 2 and h.q.any() and len(set(h.q.flat)) == 1,
    "no weight but 0": lambda h: not any(matrix.any() for matrix in h.matrices),
}


@pytest.mark.parametrize("name", HEAD_EDGES)
def test_heads_reach(name: str) -> None:
    assert occurs("heads", HEAD_EDGES[name])


def tie_in_a_row(example: tuple[own.Array, float]) -> bool:
    W, s = example
    dropped = int(W.shape[1] * s)
    ascending = np.sort(np.abs(W), axis=1)
    return 0 < dropped < W.shape[1] and bool(
        np.any(ascending[:, dropped - 1] == ascending[:, dropped])
    )


MASK_EDGES: dict[str, Callable[[tuple[own.Array, float]], bool]] = {
    "tie at the cut": tie_in_a_row,
    "no row": lambda e: e[0].shape[0] == 0 and e[0].shape[1] > 0,
    "no column": lambda e: e[0].shape[1] == 0 and e[0].shape[0] > 0,
    "nothing dropped": lambda e: e[0].size > 0 and e[1] == 0,
    "all dropped": lambda e: e[0].size > 0 and e[1] == 1,
}


@pytest.mark.parametrize("name", MASK_EDGES)
def test_masks_reach(name: str) -> None:
    assert occurs("masks", MASK_EDGES[name])


@pytest.mark.parametrize("layout", own.LAYOUTS)
@given(values=own.matrices(smallest=1))
def test_layouts_are_what_they_say(values: own.Array, layout: own.Layout) -> None:
    pair = own.pair(values, layout)
    assert pair.array.shape == tuple(pair.tensor.shape) == values.shape
    assert np.array_equal(pair.array, pair.tensor.numpy())
    assert not np.shares_memory(pair.array, pair.tensor.numpy())
    expected = np.broadcast_to(values[:1], values.shape) if layout == "expanded" else values
    assert np.array_equal(pair.array, expected)
    if min(values.shape) > 1:
        rows, columns = values.shape
        strides = {
            "c": (columns, 1),
            "transposed": (1, rows),
            "strided": (4 * columns, 2),
            "expanded": (0, 1),
        }
        assert pair.tensor.stride() == strides[layout]
        assert tuple(stride // 8 for stride in pair.array.strides) == strides[layout]


def test_a_reference_that_writes_into_its_input_raises() -> None:
    pair = own.pair(np.ones((2, 2)))
    with pytest.raises(ValueError, match="read-only"):
        pair.array[0, 0] = 2


def test_a_torch_function_that_writes_into_its_input_is_seen() -> None:
    pair = own.pair(np.ones((2, 2)))
    assert pair.unchanged()
    pair.tensor[0, 0] = 2
    assert not pair.unchanged()
    assert pair.array[0, 0] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_sides_get_the_rounded_values(dtype: torch.dtype) -> None:
    pair = own.pair(np.array([[1 / 3]]), dtype=dtype)
    assert pair.tensor.dtype == dtype
    assert pair.array[0, 0] == float(pair.tensor[0, 0]) != 1 / 3


@given(st.tuples(own.sides(), own.sides()), st.sampled_from(own.SPECTRA), own.scales, own.seeds)
def test_spectra_are_what_they_say(shape: own.Shape, kind: str, scale: float, seed: int) -> None:
    A = own.from_spectrum(shape, kind, scale, seed)
    assert A.shape == shape
    S = np.linalg.svd(A, compute_uv=False) / scale
    k = min(shape)
    if kind == "flat":
        assert np.allclose(S, 1)
    elif kind == "condition_1e12":
        assert np.allclose(S, np.logspace(0, -12, k), atol=1e-13)
    elif kind == "deficient":
        assert np.allclose(S[k // 2 :], 0, atol=1e-13 * k)
    elif kind == "duplicate":
        assert np.array_equal(
            A[:, shape[1] // 2 :], np.repeat(A[:, :1], shape[1] - shape[1] // 2, 1)
        )
    elif kind == "outlier":
        sizes = np.sort(np.linalg.norm(A, axis=0))
        assert shape[1] == 1 or sizes[-1] > 1.5 * sizes[-2]


@given(st.integers(0, 20), st.sampled_from(own.NORM_KINDS), own.scales, own.seeds)
def test_norms_are_what_they_say(size: int, kind: str, scale: float, seed: int) -> None:
    x = own.norm_vector(size, kind, scale, seed)
    assert x.shape == (size,)
    assert np.all(x >= 0)
    if kind in ("positive", "equal", "outlier"):
        assert np.all(x > 0)
    if kind == "dead" and size > 0:
        assert np.any(x == 0)
    if kind == "all_dead":
        assert not x.any()


@given(own.small_llamas())
@settings(max_examples=10)
def test_a_small_llama_is_the_model_of_its_weights(llama: own.SmallLlama) -> None:
    weights, model = llama.weights(), llama.model()
    state = model.state_dict()
    assert set(weights) == set(state) - ({"lm_head.weight"} if llama.tied else set())
    assert all(np.array_equal(state[name].numpy(), value) for name, value in weights.items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == llama.tied
