"""The running error analysis of the reference's code holds, and is no wider than it must be."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, target
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from lorap.demo import MODEL
from lorap_reference import gradient, llama
from parity_tests import compare, llamas, rounding, tracked
from parity_tests import strategies as own
from parity_tests.rounding import Known
from parity_tests.tolerances import CONFIDENCE, EPS64
from parity_tests.tracked import Tracked


@pytest.fixture(autouse=True)
def aside() -> Iterator[compare.Collector]:
    """Keep what is compared here out of the session's report."""
    with compare.recording() as collector:
        yield collector


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "add a number": lambda a, b: 3.0 + a,
    "subtract": lambda a, b: a - b,
    "negative": lambda a, b: -a,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "square": lambda a, b: a**2,
    "power": lambda a, b: a**b,
    "power of a number": lambda a, b: 10.0**a,
    "sqrt": lambda a, b: np.sqrt(a),
    "exp": lambda a, b: np.exp(a),
    "log": lambda a, b: np.log(a + 1.5),
    "cos": lambda a, b: np.cos(a),
    "sin": lambda a, b: np.sin(a),
    "matmul": lambda a, b: a @ b.transpose(0, 2, 1),
    "matmul with a plain matrix": lambda a, b: a @ np.arange(12.0).reshape(4, 3),
    "sum": lambda a, b: np.sum(a, axis=-1),
    "sum of all": lambda a, b: np.sum(a),
    "mean": lambda a, b: np.mean(a, axis=1, keepdims=True),
    "max": lambda a, b: np.max(a, axis=-1, keepdims=True),
    "where": lambda a, b: np.where(np.eye(3, 4, dtype=bool), a, b),
    "where, masked out": lambda a, b: np.exp(np.where(np.eye(3, 4, dtype=bool), -np.inf, a)),
    "concatenate": lambda a, b: np.concatenate([a, b], axis=1),
    "repeat": lambda a, b: np.repeat(a, 2, axis=1),
    "slice": lambda a, b: a[:, 1:, :2],
    "reshape": lambda a, b: a.reshape(2, 12).T,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_passes_a_known_error_on(name: str) -> None:
    """Over many draws the largest error of an entry is a few spreads, neither more nor less."""
    rng, operation, size = np.random.default_rng(0), OPERATIONS[name], 1e-8
    shares = []
    for _ in range(200):
        values = [rng.uniform(0.5, 2.0, (2, 3, 4)) for _ in range(2)]
        spreads = [size * rng.uniform(0.5, 2.0, (2, 3, 4)) for _ in range(2)]
        moved = [
            value + spread * rng.standard_normal(value.shape)
            for value, spread in zip(values, spreads, strict=True)
        ]
        expected = operation(*values)
        result = operation(*map(Tracked, values, spreads))
        assert np.array_equal(result.value, expected)
        distance = np.abs(operation(*moved) - expected)
        # What is of the second order in the errors is none of the analysis's.
        bound = CONFIDENCE * result.spread + 1e3 * size**2
        shares.append(compare.within(name, distance, bound))
    assert 0.15 < max(shares) < 0.6


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - {"negative", "slice", "reshape"}))
def test_an_operation_on_what_is_known_adds_its_own_rounding(name: str) -> None:
    rng, operation = np.random.default_rng(0), OPERATIONS[name]
    exact = {"max", "where", "concatenate", "repeat"}
    spread = operation(*(Tracked(rng.uniform(0.5, 2.0, (2, 3, 4))) for _ in range(2))).spread
    assert np.all(spread == 0) if name in exact else np.max(spread) > EPS64 / 4
    assert np.max(spread) < 1000 * EPS64


def test_what_the_analysis_does_not_know_is_refused() -> None:
    x = Tracked(np.ones(3))
    for unknown in (
        lambda: np.tanh(x),
        lambda: np.add.reduce(x),
        lambda: np.add(x, x, out=np.ones(3)),
        lambda: np.cumsum(x),
    ):
        with pytest.raises(TypeError):
            unknown()


def first_layer(model: own.SmallLlama) -> tuple[dict[str, own.Array], own.Array]:
    ids = own.calibration_ids(model, 2, 6)
    weights = model.weights()
    return llama.layer_weights(weights, 0), llama.embed(weights, ids)


@given(model=own.small_llamas())
def test_the_forward_is_that_of_the_analysis_by_hand(model: own.SmallLlama) -> None:
    """``rounding`` and the code's own operations find spreads of one order of magnitude."""
    weights, h = first_layer(model)
    by_hand = rounding.layer_spreads(
        rounding.Layer(weights, model.shape), Known(h, np.zeros_like(h))
    )
    by_code = llama.layer_forward(weights, tracked.turning(model.shape), Tracked(h))
    for name in ("attention", "o", "ffn", "down", "output"):
        ratio = np.median(getattr(by_code, name).spread / getattr(by_hand, name))
        assert 0.1 < ratio < 10


@given(model=own.small_llamas(), seed=own.seeds)
def test_known_errors_come_out_of_a_layer_s_backward_within_their_bounds(
    model: own.SmallLlama, seed: int
) -> None:
    """And not far within: a spread that were too wide by a thousand would prove nothing."""
    weights, h = first_layer(model)
    rng = np.random.default_rng(seed)
    dy = rng.standard_normal(h.shape)
    spreads = 1e-8 * np.abs(h), 1e-8 * np.abs(dy)
    moved = [
        value + spread * rng.standard_normal(value.shape)
        for value, spread in zip((h, dy), spreads, strict=True)
    ]
    dh, one = gradient.layer_backward(weights, model.shape, h, dy)
    dh_moved, two = gradient.layer_backward(weights, model.shape, *moved)
    inputs = Tracked(h, spreads[0]), Tracked(dy, spreads[1])
    dh_known, known = gradient.layer_backward(weights, tracked.turning(model.shape), *inputs)
    shares = []
    for name, expected, other, result in (
        ("dh", dh, dh_moved, dh_known),
        *((name, one[name], two[name], known[name]) for name in weights),
    ):
        assert np.all(np.abs(result.value - expected) <= CONFIDENCE * result.spread)
        # The second order in 1e-8, magnified as the first is.
        bound = CONFIDENCE * result.spread * (1 + 1e-4) + 1e-12
        shares.append(compare.within(name, np.abs(other - expected), bound))
        target(shares[-1], label=name)
    assert max(shares) > 0.003


@given(model=own.small_llamas(), length=st.integers(2, 8))
def test_the_values_are_those_of_the_reference(model: own.SmallLlama, length: int) -> None:
    """Also of the loop over the layers, which is the only text of its own."""
    weights, ids = model.weights(), own.calibration_ids(model, 2, length)
    loss = tracked.loss(weights, model.shape, ids)
    distance = abs(loss.value - gradient.loss(weights, model.shape, ids))
    assert distance <= CONFIDENCE * loss.spread
    expected = gradient.loss_gradients(weights, model.shape, ids)
    found = tracked.loss_gradients(weights, model.shape, ids)
    assert found.keys() == expected.keys() == weights.keys()
    for name, value in expected.items():
        assert np.all(np.abs(found[name].value - value) <= CONFIDENCE * found[name].spread)


def test_the_bounds_of_a_trained_model_are_sharp() -> None:
    """Six layers forward and backward: ten digits of every gradient are pinned, and more."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64)
    weights, shape = llamas.reference_weights(model), llamas.reference_shape(model)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (1, 32))
    loss = tracked.loss(weights, shape, ids)
    assert CONFIDENCE * loss.spread < 1e-12 * loss.value
    for result in tracked.loss_gradients(weights, shape, ids).values():
        bound = CONFIDENCE * np.max(result.spread)
        assert 0 < bound < 1e-10 * np.max(np.abs(result.value))
