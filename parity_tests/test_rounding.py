"""The analysis of rounding holds, and is no wider than it must be."""

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, target
from hypothesis import strategies as st

from lorap_reference import llama
from parity_tests import compare, rounding
from parity_tests import strategies as own
from parity_tests.rounding import Known
from parity_tests.tolerances import CONFIDENCE, EPS64


@pytest.fixture(autouse=True)
def aside() -> Iterator[compare.Collector]:
    """Keep what is compared here out of the session's report."""
    with compare.recording() as collector:
        yield collector


def first_layer(model: own.SmallLlama) -> tuple[dict[str, own.Array], own.Array]:
    ids = own.calibration_ids(model, 2, 6)
    weights = model.weights()
    return llama.layer_weights(weights, 0), llama.embed(weights, ids)


TINY = own.SmallLlama(
    llama.LlamaShape(1, 1, 1, 2, 100.0, 1e-5), 2, 5, 8, False, True, False, 600966989
)
"""Of so few numbers all may be moved next to nowhere by chance."""


@given(model=own.small_llamas(), seed=own.seeds)
@example(model=TINY, seed=13343)
def test_a_known_error_of_the_input_comes_out_within_its_bound(
    model: own.SmallLlama, seed: int
) -> None:
    """And not far within: a spread that were too wide by a thousand would prove nothing."""
    weights, h = first_layer(model)
    spread = 1e-7 * np.abs(h)
    moved = h + spread * np.random.default_rng(seed).standard_normal(h.shape)
    one = llama.layer_forward(weights, model.shape, h)
    two = llama.layer_forward(weights, model.shape, moved)
    spreads = rounding.layer_spreads(rounding.Layer(weights, model.shape), Known(h, spread))
    for name in ("attention", "o", "ffn", "down", "output"):
        distance = np.abs(getattr(two, name) - getattr(one, name))
        # What is of the second order in 1e-7 is none of the analysis's.
        bound = CONFIDENCE * getattr(spreads, name) + 1e-12
        share = compare.within(name, distance, bound)
        target(share, label=name)
        assert share > 0.001


@given(model=own.small_llamas(), size=st.floats(1e-9, 1e-6), seed=own.seeds)
def test_a_known_error_of_a_product_comes_out_within_its_bound(
    model: own.SmallLlama, size: float, seed: int
) -> None:
    weights, h = first_layer(model)
    rng = np.random.default_rng(seed)
    names = [f"self_attn.{m}_proj" for m in "qkvo"]
    other = dict(weights)
    for name in names:
        noise = rng.standard_normal(weights[f"{name}.weight"].shape)
        noise *= size / np.linalg.norm(noise, 2)
        other[f"{name}.weight"] = weights[f"{name}.weight"] + noise
    layer = rounding.Layer(weights, model.shape, dict.fromkeys(names, size))
    spread = rounding.layer_spreads(layer, Known(h, np.zeros_like(h))).output
    one = llama.layer_forward(weights, model.shape, h).output
    two = llama.layer_forward(other, model.shape, h).output
    assert compare.within("output", np.abs(two - one), CONFIDENCE * spread + 1e-11) > 0.001


@given(model=own.small_llamas())
@example(
    model=own.SmallLlama(
        llama.LlamaShape(1, 1, 1, 8, 100.0, 1e-5), 2, 5, 13, True, False, False, 89022603
    )
)
def test_a_layer_of_its_own_adds_some_roundings(model: own.SmallLlama) -> None:
    weights, h = first_layer(model)
    layer = rounding.Layer(weights, model.shape)
    spread = rounding.layer_spreads(layer, Known(h, np.zeros_like(h))).output
    size = np.max(np.abs(llama.layer_forward(weights, model.shape, h).output))
    assert np.all(spread > 0)
    assert np.max(spread) < 10_000 * EPS64 * size


@given(W=own.matrices(), seed=own.seeds)
def test_weighted_bound(W: own.Array, seed: int) -> None:
    moved = np.random.default_rng(seed).uniform(0, 1, W.shape[1])
    bound = rounding.weighted_bound(W, moved)
    errors = np.random.default_rng(seed + 1).standard_normal(W.shape[1]) * moved / CONFIDENCE
    if W.size:
        compare.within("weighted", np.linalg.norm(W * errors, 2), bound + 1e-300)


@given(X=own.tokens().filter(lambda X: X.size > 0), size=st.floats(1e-9, 1e-6), seed=own.seeds)
def test_norm_bounds(X: own.Array, size: float, seed: int) -> None:
    spread = size * np.abs(X)
    moved = X + spread * np.random.default_rng(seed).standard_normal(X.shape)
    distance = np.abs(np.linalg.norm(moved, axis=0) - np.linalg.norm(X, axis=0))
    compare.within("norms", distance, rounding.norm_bounds(X, spread))
