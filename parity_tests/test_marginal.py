"""The marginal allocation: divergences within rounding, curves and sizes to the last bit."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st

from lorap.config import CompressionConfig
from lorap.ops import marginal as ours
from lorap_reference import algorithm1, llama
from lorap_reference import marginal as reference
from parity_tests import compare, llamas, steps, tolerances
from parity_tests import strategies as own
from parity_tests.rounding import Precision

Curves = dict[str, tuple[list[int], list[float]]]


@st.composite
def logits(draw: st.DrawFn) -> tuple[own.Array, own.Array]:
    """Draw two sets of logits, far apart or close, or equal."""
    shape = (draw(st.integers(0, 6)), draw(st.integers(1, 40)))
    rng = np.random.default_rng(draw(own.seeds))
    spread = draw(st.sampled_from((0.0, 0.1, 3.0, 50.0)), label="spread")
    moved = draw(st.sampled_from((0.0, 1e-6, 0.1, 3.0, 100.0)), label="moved")
    Z = spread * rng.standard_normal(shape) + draw(st.sampled_from((0.0, -300.0, 1e4)))
    return Z, Z + moved * rng.standard_normal(shape)


@pytest.mark.spec("marginal.divergence", "precision.statistics")
@given(pair=logits(), chunk=st.integers(1, 100))
def test_divergence_sum(pair: tuple[own.Array, own.Array], chunk: int) -> None:
    Z, Z_hat = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "_CHUNK_ELEMENTS", chunk)
        mine = ours.divergence_sum(torch.tensor(Z), torch.tensor(Z_hat))
    theirs = reference.divergence_sum(Z, Z_hat)
    largest = float(np.max(np.abs([Z, Z_hat]), initial=0.0))
    bound = tolerances.divergence_sum(*Z.shape, largest)
    compare.close("divergences", mine, theirs, bound)
    compare.within("divergences below 0", max(0.0, -mine), bound)
    if np.array_equal(Z, Z_hat):
        assert mine == 0


@pytest.mark.spec("marginal.divergence", "stats.padding")
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 9)),
    dtype=st.sampled_from((torch.bool, torch.int64, torch.float32)),
    seed=own.seeds,
)
def test_padding_diverges_from_nothing(shape: tuple[int, int, int], dtype: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    Z, mask = rng.standard_normal((2, *shape)), rng.integers(0, 2, shape[:2]).astype(bool)
    filled = np.where(mask[..., None], Z, np.nan)
    mine = ours.divergence_sum(*torch.from_numpy(filled), torch.from_numpy(mask).to(dtype))
    theirs = reference.divergence_sum(Z[0][mask], Z[1][mask])
    bound = tolerances.divergence_sum(int(mask.sum()), shape[2], float(np.max(np.abs(Z))))
    compare.close("divergences (padding)", mine, theirs, bound)


spectra = st.lists(st.sampled_from((0.0, 0.5, 1.0, 3.0, 1e-9, 7e8, 0.1)), min_size=1, max_size=12)


@pytest.mark.spec("marginal.curve")
@given(values=spectra, longer=st.integers(0, 30), tall=st.booleans(), bias=st.integers(0, 30))
def test_rank_curve(values: list[float], longer: int, tall: bool, bias: int) -> None:
    short, long = len(values), len(values) + longer
    shape = (long, short) if tall else (short, long)
    S = np.array(sorted(values, reverse=True))
    held, errors = ours.rank_curve(torch.tensor(S), shape, bias)
    compare.exact("curves", (held, errors), reference.rank_curve(S, shape, bias))
    assert held == sorted(set(held))
    assert held[-1] == short * long
    assert errors[-1] == 0
    assert all(later <= earlier for earlier, later in pairwise(errors))
    for rank, (parameters, error) in enumerate(zip(held[:-1], errors[:-1], strict=True), 1):
        assert parameters == rank * (short + long) + bias
        assert error == pytest.approx(float(np.sum(S[rank:] ** 2)), rel=1e-14)


@pytest.mark.spec("marginal.curve")
@given(losses=spectra, per_channel=st.integers(1, 9))
def test_channel_curve(losses: list[float], per_channel: int) -> None:
    found = ours.channel_curve(torch.tensor(losses, dtype=torch.float64), per_channel)
    compare.exact("curves", found, reference.channel_curve(np.array(losses), per_channel))
    held, errors = found
    assert held == [per_channel * width for width in range(1, len(losses) + 2)]
    assert errors[0] == pytest.approx(sum(losses), rel=1e-14)
    assert errors[-1] == 0


@pytest.mark.spec("marginal.sensitivity")
@given(
    divergence=st.sampled_from((0.0, -1e-17, 1e-9, 0.3)),
    error=st.sampled_from((0.0, 1e-300, 0.7, 1e9)),
    count=st.integers(2, 9),
)
def test_sensitivity(divergence: float, error: float, count: int) -> None:
    found = ours.sensitivity(divergence, error)
    compare.exact("sensitivities", found, reference.sensitivity(divergence, error))
    compare.exact("probed sizes", ours.middle(count), reference.middle(count))
    assert 0 <= ours.middle(count) < count - 1


@st.composite
def allocations(draw: st.DrawFn) -> tuple[Curves, dict[str, float], int, dict[str, int]]:
    """Draw curves with ties, jumps and flat parts, sensitivities, a budget and floors."""
    curves: Curves = {}
    for index in range(draw(st.integers(1, 4), label="modules")):
        steps_ = draw(st.lists(st.integers(1, 9), min_size=1, max_size=8), label="parameters")
        held = np.cumsum(steps_).tolist()
        drops = st.sampled_from((0.0, 1.0, 2.0, 0.25, 1e-3, 1e6))
        falls = draw(st.lists(drops, min_size=len(held) - 1, max_size=len(held) - 1))
        errors = [*np.cumsum(falls[::-1]).tolist()[::-1], 0.0]
        curves[f"m{index}"] = (held, errors)
    weights = st.sampled_from((0.0, 1.0, 1.0, 3.0, 1e-12, 1e5, 0.3))
    sensitivities = {m: draw(weights, label=m) for m in curves}
    whole = sum(held[-1] for held, _ in curves.values())
    floors = {m: draw(st.integers(0, held[-1]), label="floor") for m, (held, _) in curves.items()}
    if draw(st.booleans(), label="no floors"):
        floors = dict.fromkeys(curves, 0)
    return curves, sensitivities, draw(st.integers(0, whole), label="budget"), floors


JUMP: tuple[Curves, dict[str, float], int, dict[str, int]] = (
    {"a": ([2, 4, 6], [5.0, 4.0, 0.0]), "b": ([2, 4, 6], [4.0, 2.0, 0.0])},
    {"a": 1.0, "b": 1.0},
    8,
    {"a": 0, "b": 0},
)
"""Steps from the smallest sizes on would take `b` all the way; the jump of `a` is worth more."""

NO_POWER_OF_TWO: tuple[Curves, dict[str, float], int, dict[str, int]] = (
    {
        "a": ([1, 2, 3], [9.0, 3.0, 0.0]),
        "b": ([3, 4], [3.0, 0.0]),
        "c": ([4, 6], [7.0, 0.0]),
    },
    {"a": 1.0, "b": 1.0, "c": 1.0},
    12,
    {"a": 0, "b": 0, "c": 0},
)
"""At the lowest power of two that fits, and by steps from there, the sizes are worse."""

FOR_EACH_PARAMETER: tuple[Curves, dict[str, float], int, dict[str, int]] = (
    {
        "a": ([3, 8, 12, 15], [22.0, 16.0, 7.0, 0.0]),
        "b": ([1, 3, 6, 7], [7.0, 6.0, 3.0, 0.0]),
        "c": ([5, 7, 8], [8.0, 7.0, 0.0]),
    },
    {"a": 1.0, "b": 1.0, "c": 1.0},
    18,
    {"a": 0, "b": 0, "c": 0},
)
"""The step that takes most off is not the one that does for each parameter."""

BELOW_ONE = (
    NO_POWER_OF_TWO[0],
    dict.fromkeys("abc", 2.0**-6),
    *NO_POWER_OF_TWO[2:],
)
"""The same at a price below 1."""

CLOSE: tuple[Curves, dict[str, float], int, dict[str, int]] = (
    {"a": ([1, 2], [1.0, 0.0]), "b": ([1, 2], [1 + 2.0**-40, 0.0])},
    {"a": 1.0, "b": 1.0},
    3,
    {"a": 0, "b": 0},
)
"""Errors that are equal in float32."""

FLAT_FIRST: tuple[Curves, dict[str, float], int, dict[str, int]] = (
    {"a": ([3, 4, 5, 8], [12.0, 12.0, 9.0, 0.0])},
    {"a": 1.0},
    5,
    {"a": 0},
)
"""The least that a step of the module takes off is nothing; another takes off something."""

FLAT_LAST: tuple[Curves, dict[str, float], int, dict[str, int]] = (
    {"a": ([1, 5, 8, 10, 11], [30.0, 24.0, 24.0, 23.0, 0.0])},
    {"a": 1.0},
    9,
    {"a": 0},
)
"""A larger size takes off as much, and less for each parameter."""

STEEPER_IN_ONE: tuple[Curves, dict[str, float], int, dict[str, int]] = (
    {"a": ([2, 5, 6, 7], [11.0, 8.0, 5.0, 0.0]), "b": ([5, 7, 8], [12.0, 5.0, 0.0])},
    {"a": 1.0, "b": 1.0},
    14,
    {"a": 3, "b": 4},
)
"""The best step of `a` is above the best of `b`, and the worst below it."""


@pytest.mark.spec("marginal.sizes")
@given(case=allocations())
@example(case=JUMP)
@example(case=NO_POWER_OF_TWO)
@example(case=FOR_EACH_PARAMETER)
@example(case=BELOW_ONE)
@example(case=CLOSE)
@example(case=FLAT_FIRST)
@example(case=FLAT_LAST)
@example(case=STEEPER_IN_ONE)
def test_marginal_sizes(
    case: tuple[Curves, dict[str, float], int, dict[str, int]],
) -> None:
    curves, sensitivities, budget, floors = case
    found = ours.marginal_sizes(*case)
    theirs = reference.marginal_sizes(*case)
    assert list(found) == list(theirs) == list(curves)
    compare.exact("sizes", list(found.values()), list(theirs.values()))
    first = {
        m: min(j for j, n in enumerate(held) if n >= floors[m]) for m, (held, _) in curves.items()
    }
    left = budget - sum(curves[m][0][j] for m, j in found.items())
    if left < 0:
        event("out of reach")
        assert found == first
        return
    assert all(found[m] >= first[m] for m in curves)
    for m, j in found.items():
        held, errors = curves[m]
        for more in range(j + 1, len(held)):
            if held[more] - held[j] <= left:
                assert sensitivities[m] * errors[more] == sensitivities[m] * errors[j]
    event("nothing left" if left == 0 else "something left")


@pytest.mark.spec("marginal.sizes")
@given(case=allocations())
def test_no_sizes_that_hold_as_much_lose_less(
    case: tuple[Curves, dict[str, float], int, dict[str, int]],
) -> None:
    """By brute force: with a budget that the sizes at a price use up, they are the best."""
    curves, sensitivities, _, floors = case
    E = {m: [sensitivities[m] * e for e in errors] for m, (_, errors) in curves.items()}
    allowed = {
        m: [j for j, n in enumerate(held) if n >= floors[m]] for m, (held, _) in curves.items()
    }
    price = 0.25
    at = {
        m: min(allowed[m], key=lambda j, m=m: (E[m][j] + price * curves[m][0][j], j))
        for m in curves
    }
    budget = sum(curves[m][0][j] for m, j in at.items())
    found = ours.marginal_sizes(curves, sensitivities, budget, floors)
    loss = sum(E[m][j] for m, j in found.items())
    assert loss <= sum(E[m][j] for m, j in at.items()) * (1 + 1e-12)


MEASURED: dict[str, dict[str, Any]] = {
    "best": {"mha": "pca", "selection": "obs", "update": "least-squares"},
    "joint": {"mha": "asvd", "ffn": "pca", "joint_qk": True, "multiple_of": 3},
    "afm": {"mha": "afm", "ffn": "awsvd", "mgaa_floor": 0.0},
    "ffn": {"sublayers": ("ffn",), "selection": "obs", "update": "least-squares"},
    "mha": {"sublayers": ("mha",), "mha": "svd", "mgaa_floor": 0.6},
}


@pytest.mark.spec("marginal.measure", "marginal.plan")
@pytest.mark.parametrize(
    ("name", "ratio"), [(name, (0.2, 0.5)[place % 2]) for place, name in enumerate(MEASURED)]
)
@llamas.float64_throughout()
def test_what_is_measured_and_planned(name: str, ratio: float) -> None:
    """More samples than probes, padding on ours; grouped queries and biases."""
    llama_ = own.grouped_llama(2, seed=11)
    model, ids = llama_.model(), own.calibration_ids(llama_, 20, 10)
    config = CompressionConfig(
        ratio=ratio,
        ratio_scope="layer",
        dtype="float64",
        batch_size=3,
        allocation="marginal",
        **MEASURED[name],
    )
    weights, shape = llama_.weights(), llama_.shape
    settings = llamas.reference_settings(config, model)
    padded, mask = llamas.with_padding(ids)
    run = llamas.torch_run(model, config, padded, mask)
    mine, theirs = (
        steps.our_measurements(run),
        algorithm1.measure(weights, shape, ids, settings),
    )

    nudge = 1e-9
    with llamas.nudged(weights, nudge) as moved_weights:
        other = algorithm1.measure(moved_weights, shape, ids, settings)
    logits_ = llama.logits(weights, shape, ids)
    rounded = tolerances.divergence_sum(1, llama_.vocabulary, 2 * float(np.max(np.abs(logits_))))

    def close(what: str, value: Callable[[algorithm1.Measurements], Any]) -> None:
        one, two = np.array(value(theirs)), np.array(value(other))
        moved = float(np.max(np.abs(one - two)))
        bound = tolerances.measured_condition(moved / nudge, shape.layers, llama_.width)
        compare.close(what, np.array(value(mine)), one, bound + rounded)

    steps.check_measurements(run, weights, shape, ids, settings, Precision(), "marginal: ")
    assert len(mine.divergences) == shape.layers
    for index in range(shape.layers):
        assert mine.divergences[index].keys() == theirs.divergences[index].keys()
        for m in theirs.divergences[index]:
            close("divergences of probes", lambda found, i=index, m=m: found.divergences[i][m])
        if theirs.losses:
            close("losses of removals", lambda found, i=index: found.losses[i])
    sizes = algorithm1.allocate(weights, shape, settings, mine)
    steps.check_plan(run, sizes, "marginal: ")
    # Multiples may miss the budget, by half of one for each kind of module.
    assert config.multiple_of > 1 or (
        run.plan.parameters
        <= llamas.torch_run(model, config.without_measurements(), ids).plan.parameters
    )


@pytest.mark.spec("marginal.plan", "afm.bias")
@pytest.mark.parametrize("joint_qk", [False, True])
@llamas.float64_throughout()
def test_the_budget_counts_the_biases_that_even_ratios_add(joint_qk: bool) -> None:
    """At 0.05 some of the even ranks hold more than the matrix, with AFM's bias."""
    shape = llama.LlamaShape(1, heads=4, kv_heads=2, head_dim=2)
    llama_ = own.SmallLlama(
        shape,
        hidden=8,
        width=16,
        vocabulary=40,
        tied=False,
        attention_bias=False,
        mlp_bias=False,
        seed=7,
    )
    model, ids = llama_.model(), own.calibration_ids(llama_, 4, 6)
    config = CompressionConfig(
        ratio=0.05,
        ratio_scope="layer",
        dtype="float64",
        allocation="marginal",
        mha="afm",
        ffn="afm",
        joint_qk=joint_qk,
    )
    weights, settings = llama_.weights(), llamas.reference_settings(config, model)
    layer = llama.layer_weights(weights, 0)
    even = algorithm1.layer_sizes(layer, shape, settings)
    assert any(
        r * sum(W.shape) + W.shape[0] > W.size
        for sublayer in settings.sublayers
        for m, W in algorithm1.matrices(layer, sublayer, settings).items()
        if (r := even.ranks[m]) is not None
    )
    run = llamas.torch_run(model, config, ids)
    sizes = algorithm1.allocate(weights, shape, settings, steps.our_measurements(run))
    steps.check_plan(run, sizes, "marginal: ")
