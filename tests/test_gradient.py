"""The gradient by hand against what it must be: values by hand, differences, adjoints, balances."""

import tracemalloc
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lorap_reference import gradient, llama
from parity_tests import tolerances, tracked
from parity_tests.tolerances import CONFIDENCE
from parity_tests.tracked import Tracked

Array = NDArray[np.float64]
Arrays = dict[str, Array]

STEP = 2.0**-16
"""Of the differences. In float64 a power of two loses nothing, and ``eps^(1/3)`` is the best size:
the rounding of the values falls with the step, and what is beyond the slope grows with its square.
"""

D, WIDTH, VOCABULARY = 6, 5, 7
SHAPE = llama.LlamaShape(2, heads=4, kv_heads=2, head_dim=2, rope_theta=100.0, rms_eps=1e-3)
IDS = np.array([[0, 3, 5, 1, 3], [6, 2, 2, 4, 0]])

LINEARS = {
    "self_attn.q_proj": (8, D),
    "self_attn.k_proj": (4, D),
    "self_attn.v_proj": (4, D),
    "self_attn.o_proj": (D, 8),
    "mlp.gate_proj": (WIDTH, D),
    "mlp.up_proj": (WIDTH, D),
    "mlp.down_proj": (D, WIDTH),
}


def model(
    tied: bool = False, biases: bool = True, factored: bool = False, layers: int = 2
) -> Arrays:
    """Return the weights of a LLaMA of SHAPE, with a row of the embeddings per token of IDS."""
    rng = np.random.default_rng(0)
    weights = {
        llama.EMBEDDINGS: rng.standard_normal((VOCABULARY, D)),
        llama.FINAL_NORM: rng.uniform(0.5, 1.5, D),
    }
    if not tied:
        weights[llama.HEAD] = rng.standard_normal((VOCABULARY, D)) / 2
    for index in range(layers):
        prefix = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = rng.uniform(0.5, 1.5, D)
        for name, (d_out, d_in) in LINEARS.items():
            left = ".left" if factored else ""
            if factored:
                weights[f"{prefix}{name}.right.weight"] = rng.standard_normal((3, d_in)) / 2
            weights[f"{prefix}{name}{left}.weight"] = rng.standard_normal(
                (d_out, 3 if factored else d_in)
            ) / np.sqrt(3 if factored else d_in)
            if biases:
                weights[f"{prefix}{name}{left}.bias"] = rng.standard_normal(d_out) / 2
    return weights


# The loss


@pytest.mark.spec("gradient.loss")
def test_the_loss_of_a_model_that_knows_nothing_is_the_logarithm_of_the_vocabulary() -> None:
    weights = model() | {llama.HEAD: np.zeros((VOCABULARY, D))}
    assert gradient.loss(weights, SHAPE, IDS) == pytest.approx(np.log(VOCABULARY), rel=1e-15)


@pytest.mark.spec("gradient.loss")
def test_the_loss_counts_every_target_once() -> None:
    """From the logits, by loops: the first token is no target, the last one predicts nothing."""
    weights = model()
    logits = llama.logits(weights, SHAPE, IDS)
    entropies = [
        np.log(sum(np.exp(z) for z in logits[n, i])) - logits[n, i, IDS[n, i + 1]]
        for n in range(2)
        for i in range(4)
    ]
    assert gradient.targets(IDS) == len(entropies) == 8
    assert gradient.loss(weights, SHAPE, IDS) == pytest.approx(sum(entropies) / 8, rel=1e-13)


@pytest.mark.spec("gradient.loss")
def test_no_logit_is_too_large_for_the_loss() -> None:
    logits, targets = np.array([[1e4, 0.0], [0.0, 1e4]]), np.array([0, 0])
    assert gradient.cross_entropy(logits, targets).tolist() == [0, 1e4]
    assert gradient.cross_entropy_backward(logits, targets).tolist() == [[0, 0], [-1, 1]]


@pytest.mark.spec("gradient.loss", "gradient.backward")
@pytest.mark.parametrize("shape", [(0, 5), (2, 1), (2, 0)])
def test_without_a_target_there_is_no_loss(shape: tuple[int, int]) -> None:
    for function in (gradient.loss, gradient.loss_gradients):
        with pytest.raises(ValueError, match="at least one sample of two tokens"):
            function(model(), SHAPE, np.zeros(shape, dtype=np.int64))


# Values by hand


@pytest.mark.spec("gradient.backward")
def test_a_model_without_layers_by_hand() -> None:
    """One feature, normed to 1 and -1; the head gives logits (0, log 3): probabilities 1/4, 3/4."""
    weights = {
        llama.EMBEDDINGS: np.array([[2.0], [-5.0]]),
        llama.FINAL_NORM: np.array([1.0]),
        llama.HEAD: np.array([[0.0], [np.log(3)]]),
    }
    shape = llama.LlamaShape(layers=0, heads=1, kv_heads=1, head_dim=2, rms_eps=0.0)
    ids = np.array([[0, 0]])
    assert gradient.loss(weights, shape, ids) == pytest.approx(np.log(4))
    gradients = gradient.loss_gradients(weights, shape, ids)
    np.testing.assert_allclose(gradients[llama.HEAD], [[-0.75], [0.75]], rtol=1e-15)
    # The norm's output is 1 whatever the embedding; its gain has head^T (p - one hot).
    np.testing.assert_allclose(gradients[llama.FINAL_NORM], [0.75 * np.log(3)], rtol=1e-15)
    np.testing.assert_allclose(gradients[llama.EMBEDDINGS], [[0.0], [0.0]], atol=1e-15)


@pytest.mark.spec("gradient.backward")
def test_pieces_by_hand() -> None:
    # d(x / s) of (3, 4) with s^2 = 12.5, along dy = (1, 0): (1 - 9 / 25) / s, -12 / 25 / s.
    s = 12.5**0.5
    dx, dgain = gradient.rms_norm_backward(
        np.array([[3.0, 4.0]]), np.array([2.0, 1.0]), 0.0, np.array([[1.0, 0.0]])
    )
    np.testing.assert_allclose(dx, [[2 * 0.64 / s, -2 * 0.48 / s]], rtol=1e-14)
    np.testing.assert_allclose(dgain, [3 / s, 0])
    p = np.array([0.25, 0.75])
    assert gradient.softmax_backward(p, np.array([1.0, 0.0])).tolist() == [0.1875, -0.1875]
    assert gradient.silu_backward(np.array([0.0]), np.array([3.0])).tolist() == [1.5]
    heads = np.arange(4.0).reshape(1, 4, 1, 1)
    assert gradient.repeat_backward(heads, 2).reshape(-1).tolist() == [1, 5]
    rows = gradient.embed_backward(3, np.array([[2, 0, 2]]), np.array([[[1.0], [5.0], [10.0]]]))
    assert rows.tolist() == [[5], [0], [11]]
    # At position 1 a head of two features turns by 1 radian; backward it turns back.
    turned = gradient.rotary_backward(np.array([[[[1.0, 0.0], [1.0, 0.0]]]]), 100.0)
    np.testing.assert_allclose(turned[0, 0], [[1, 0], [np.cos(1), -np.sin(1)]], rtol=1e-15)


# Adjoints: <J u, v> = <u, J^T v>, piece by piece


def slopes(g: Callable[[float], float]) -> tuple[float, float]:
    """Return the slopes of g at 0 by central differences, of the step and of twice the step."""
    near, far = ((g(h) - g(-h)) / (2 * h) for h in (STEP, 2 * STEP))
    return near, far


def linear_piece(factored: bool) -> tuple[Callable[..., Any], Callable[..., Any], Arrays]:
    rng = np.random.default_rng(1)
    names = {"f.left.weight": (4, 2), "f.right.weight": (2, 3), "f.left.bias": (4,)}
    shapes = names if factored else {"f.weight": (4, 3), "f.bias": (4,)}
    inputs = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    inputs["x"] = rng.standard_normal((2, 5, 3))

    def backward(a: Arrays, dy: Array) -> Arrays:
        dx, gradients = gradient.linear_backward(a, "f", a["x"], dy)
        return gradients | {"x": dx}

    return lambda a: llama.linear(a, "f", a["x"]), backward, inputs


def layer_piece(
    forward: Callable[..., Any], backward: Callable[..., Any], *parts: str
) -> tuple[Callable[..., Any], Callable[..., Any], Arrays]:
    """A piece with weights of a layer: those whose names begin with one of `parts`."""
    layer = llama.layer_weights(model(), 0)
    inputs = {name: value for name, value in layer.items() if name.startswith(parts)}
    inputs["x"] = np.random.default_rng(1).standard_normal((2, 5, D))

    def adjoint(a: Arrays, dy: Array) -> Arrays:
        dx, gradients = backward(a, dy)
        return gradients | {"x": dx}

    return forward, adjoint, inputs


def normed(a: Arrays, dy: Array) -> Arrays:
    dx, dgain = gradient.rms_norm_backward(a["x"], a["gain"], 1e-3, dy)
    return {"x": dx, "gain": dgain}


def last(a: Arrays, dy: Array) -> Arrays:
    dx, gradients = gradient.head_backward(a, SHAPE, a["x"], dy)
    return gradients | {"x": dx}


def random(*shape: int) -> Array:
    return np.random.default_rng(2).standard_normal(shape)


TARGETS = np.array([[1, 0, 6], [3, 3, 2]])

PIECES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Arrays]] = {
    "cross_entropy": (
        lambda a: gradient.cross_entropy(a["x"], TARGETS),
        lambda a, dy: {"x": gradient.cross_entropy_backward(a["x"], TARGETS) * dy[..., None]},
        {"x": random(2, 3, VOCABULARY)},
    ),
    "linear, dense": linear_piece(factored=False),
    "linear, factored": linear_piece(factored=True),
    "rms_norm": (
        lambda a: llama.rms_norm(a["x"], a["gain"], 1e-3),
        normed,
        {"x": random(2, 5, D), "gain": random(D)},
    ),
    "rotary": (
        lambda a: llama.rotary(a["x"], 100.0),
        lambda a, dy: {"x": gradient.rotary_backward(dy, 100.0)},
        {"x": random(2, 3, 5, 4)},
    ),
    "softmax": (
        lambda a: llama.softmax(a["x"]),
        lambda a, dy: {"x": gradient.softmax_backward(llama.softmax(a["x"]), dy)},
        {"x": random(2, 5, 5)},
    ),
    "silu": (
        lambda a: llama.silu(a["x"]),
        lambda a, dy: {"x": gradient.silu_backward(a["x"], dy)},
        {"x": 3 * random(2, 5, 4)},
    ),
    "repeat": (
        lambda a: np.repeat(a["x"], 3, axis=1),
        lambda a, dy: {"x": gradient.repeat_backward(dy, 3)},
        {"x": random(2, 2, 5, 4)},
    ),
    "attention": layer_piece(
        lambda a: llama.attention(a, SHAPE, a["x"]),
        lambda a, dy: gradient.attention_backward(a, SHAPE, a["x"], dy),
        *(f"self_attn.{m}" for m in "qkv"),
    ),
    "channels": layer_piece(
        lambda a: llama.channels(a, a["x"]),
        lambda a, dy: gradient.channels_backward(a, a["x"], dy),
        "mlp.gate",
        "mlp.up",
    ),
    "layer_forward": layer_piece(
        lambda a: llama.layer_forward(a, SHAPE, a["x"]).output,
        lambda a, dy: gradient.layer_backward(a, SHAPE, a["x"], dy),
        "",
    ),
    "head": (
        lambda a: llama.head(a, SHAPE, a["x"]),
        last,
        {"x": random(2, 5, D), llama.FINAL_NORM: random(D), llama.HEAD: random(VOCABULARY, D)},
    ),
}


@pytest.mark.spec("gradient.backward")
@pytest.mark.parametrize("piece", PIECES)
def test_each_backward_is_the_adjoint_of_its_piece(piece: str) -> None:
    forward, backward, inputs = PIECES[piece]
    rng = np.random.default_rng(3)
    v = rng.standard_normal(forward(inputs).shape)
    spread = np.sum(forward(inputs | {"x": Tracked(inputs["x"])}) * v).spread
    adjoint = backward(inputs, v)
    assert adjoint.keys() == inputs.keys()
    for name, value in inputs.items():
        assert adjoint[name].shape == value.shape
        for _ in range(3):
            u = rng.standard_normal(value.shape)
            moved = lambda t, name=name, u=u: inputs | {name: inputs[name] + t * u}  # noqa: E731
            near, far = slopes(lambda t, moved=moved: float(np.sum(forward(moved(t)) * v)))
            tolerance = tolerances.central_difference(near, far, STEP, spread)
            assert tolerance < 1e-6 * np.linalg.norm(adjoint[name]) * np.linalg.norm(u)
            assert abs(np.sum(u * adjoint[name]) - near) <= tolerance, name


@pytest.mark.spec("gradient.backward")
def test_the_backward_of_the_embeddings_is_the_adjoint_of_the_look_up() -> None:
    """The look-up is linear in the table, so that no difference is needed."""
    table, v = random(VOCABULARY, D), np.random.default_rng(4).standard_normal((*IDS.shape, D))
    looked_up = llama.embed({llama.EMBEDDINGS: table}, IDS)
    adjoint = gradient.embed_backward(VOCABULARY, IDS, v)
    assert np.sum(looked_up * v) == pytest.approx(np.sum(table * adjoint), rel=1e-13)


# The whole, entry by entry


@pytest.mark.spec("gradient.backward")
@pytest.mark.parametrize("kind", [{}, {"tied": True, "biases": False}, {"factored": True}], ids=str)
def test_every_gradient_is_the_slope_of_the_loss(kind: dict[str, bool]) -> None:
    """Central differences by every single weight of the model."""
    weights = model(**kind)
    spread = float(tracked.loss(weights, SHAPE, IDS).spread)
    gradients = gradient.loss_gradients(weights, SHAPE, IDS)
    assert gradients.keys() == weights.keys()
    for name, value in weights.items():
        assert gradients[name].shape == value.shape
        loosest = 0.0
        for at in np.ndindex(value.shape):
            place = np.zeros_like(value)
            place[at] = 1

            def loss(t: float, name: str = name, place: Array = place) -> float:
                moved = weights | {name: weights[name] + t * place}
                return gradient.loss(moved, SHAPE, IDS)

            near, far = slopes(loss)
            tolerance = tolerances.central_difference(near, far, STEP, spread)
            loosest = max(loosest, tolerance)
            assert abs(gradients[name][at] - near) <= tolerance, f"{name}{at}"
        assert loosest < 1e-5 * np.max(np.abs(gradients[name])), name


# Balances: what leaves the loss as it is has no slope


def balanced(weights: Arrays, *terms: tuple[str, Callable[[Any], Any], float]) -> None:
    """Assert that sums of weights times gradients cancel.

    Parameters
    ----------
    weights : mapping
    *terms : (name, sums, sign)
        Names of weights; `sums` adds up the products that belong together; +1 or -1.
    """
    spreads = tracked.loss_gradients(weights, SHAPE, IDS)
    gradients = gradient.loss_gradients(weights, SHAPE, IDS)
    total = sum(sign * sums(gradients[name] * weights[name]) for name, sums, sign in terms)
    size = sum(sums(np.abs(gradients[name] * weights[name])) for name, sums, _ in terms)
    known: Any = sum(sign * sums(spreads[name] * weights[name]) for name, sums, sign in terms)
    assert np.all(np.abs(total) <= CONFIDENCE * known.spread)
    assert np.all(CONFIDENCE * known.spread < 1e-9 * size)


@pytest.mark.spec("gradient.backward")
def test_a_channel_s_scale_can_move_from_up_to_down() -> None:
    weights = model()
    for index in range(2):
        mlp = f"model.layers.{index}.mlp"
        balanced(
            weights,
            (f"{mlp}.up_proj.weight", lambda p: np.sum(p, axis=1), 1),
            (f"{mlp}.up_proj.bias", lambda p: p, 1),
            (f"{mlp}.down_proj.weight", lambda p: np.sum(p, axis=0), -1),
        )


@pytest.mark.spec("gradient.backward", "heads.group")
def test_the_scale_of_values_can_move_to_the_columns_of_o_that_read_them() -> None:
    """Head h reads group ``h // 2``: with another layout the sums would not cancel."""
    weights = model()
    for index in range(2):
        attention = f"model.layers.{index}.self_attn"
        balanced(
            weights,
            (f"{attention}.v_proj.weight", lambda p: np.sum(p, axis=1), 1),
            (f"{attention}.v_proj.bias", lambda p: p, 1),
            (
                f"{attention}.o_proj.weight",
                # (group, share, head_dim): to the channels of the group's values.
                lambda p: np.sum(np.sum(p, axis=0).reshape(2, 2, 2), axis=1).reshape(4),
                -1,
            ),
        )


@pytest.mark.spec("gradient.backward", "heads.group")
def test_the_scale_of_keys_can_move_to_the_queries_that_meet_them() -> None:
    """Of a group as a whole: its two features turn together, and have one scale."""
    weights = model()

    def by_group(p: Any) -> Any:
        sums = np.sum(p, axis=1) if len(p.shape) == 2 else p
        return np.sum(sums.reshape(2, sums.shape[0] // 2), axis=1)

    for index in range(2):
        attention = f"model.layers.{index}.self_attn"
        balanced(
            weights,
            *((f"{attention}.k_proj.{part}", by_group, 1) for part in ("weight", "bias")),
            *((f"{attention}.q_proj.{part}", by_group, -1) for part in ("weight", "bias")),
        )


@pytest.mark.spec("gradient.backward")
def test_the_scale_of_a_norm_can_move_to_the_matrix_behind_it() -> None:
    """Feature by feature: the gain of the last norm against the column of the head."""
    balanced(
        model(),
        (llama.FINAL_NORM, lambda p: p, 1),
        (llama.HEAD, lambda p: np.sum(p, axis=0), -1),
    )


@pytest.mark.spec("gradient.backward")
def test_a_shift_of_all_logits_has_no_slope() -> None:
    """The rows of the head's gradient add up to nothing: a softmax does not see what is common."""
    weights = model()
    head = gradient.loss_gradients(weights, SHAPE, IDS)[llama.HEAD]
    known = tracked.loss_gradients(weights, SHAPE, IDS)[llama.HEAD]
    bound = CONFIDENCE * np.sum(known, axis=0).spread
    assert np.all(np.abs(np.sum(head, axis=0)) <= bound)
    assert np.all(bound < 1e-9 * np.sum(np.abs(head), axis=0))


# Memory


def peak(weights: Mapping[str, Array], shape: llama.LlamaShape, ids: NDArray[np.int64]) -> int:
    """Return the most bytes that a call of ``loss_gradients`` has at a time."""
    tracemalloc.start()
    try:
        gradient.loss_gradients(weights, shape, ids)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.spec("gradient.backward")
def test_no_more_than_a_sample_s_logits_are_held_at_a_time() -> None:
    vocabulary, samples, length = 4000, 16, 9
    rng = np.random.default_rng(0)
    weights = {
        llama.EMBEDDINGS: rng.standard_normal((vocabulary, 2)),
        llama.FINAL_NORM: np.ones(2),
        llama.HEAD: rng.standard_normal((vocabulary, 2)),
    }
    shape = llama.LlamaShape(layers=0, heads=1, kv_heads=1, head_dim=2)
    ids = rng.integers(0, vocabulary, (samples, length))
    of_a_sample = (length - 1) * vocabulary * 8
    assert peak(weights, shape, ids) < 8 * of_a_sample < samples * of_a_sample


@pytest.mark.spec("gradient.backward")
def test_a_layer_more_costs_its_input_and_its_gradients() -> None:
    """Not its trace: the attention patterns alone are 32 times the residual stream here."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (8, 48))
    stream = ids.size * D * 8
    few, many = model(biases=False, layers=2), model(biases=False, layers=10)
    gradients = sum(value.nbytes for name, value in many.items() if name.startswith("model.layers"))
    shapes = (llama.LlamaShape(layers, heads=4, kv_heads=2, head_dim=2) for layers in (2, 10))
    less, more = (peak(w, shape, ids) for w, shape in zip((few, many), shapes, strict=True))
    assert more - less < 8 * stream + gradients + 0.1 * less
