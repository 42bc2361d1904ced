"""The reference's LLaMA and Algorithm 1 against hand values, loops, and the steps one by one."""

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from lorap_reference import (
    algorithm1,
    budget,
    gradient,
    heads,
    importance,
    llama,
    lowrank,
    mgaa,
    pca,
    pruning,
    regression,
    statistics,
)
from lorap_reference.algorithm1 import Settings, Sizes
from lorap_reference.llama import LlamaShape

Array = NDArray[np.float64]

SHAPE = LlamaShape(layers=2, heads=6, kv_heads=2, head_dim=2, rope_theta=100.0, rms_eps=0.25)
D, D_M, VOCABULARY = 6, 30, 11

pytestmark = pytest.mark.spec("algorithm.sequence")


def close(a: Any, b: Any) -> bool:
    return bool(np.allclose(a, b, rtol=1e-13, atol=1e-13))


def random_weights(bias: bool = True, tied: bool = False) -> dict[str, Array]:
    """A model of which no two sizes are equal that could be taken for each other."""
    rng = np.random.default_rng(0)
    q, kv = SHAPE.heads * SHAPE.head_dim, SHAPE.kv_heads * SHAPE.head_dim
    linears = {
        "self_attn.q_proj": (q, D),
        "self_attn.k_proj": (kv, D),
        "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, q),
        "mlp.gate_proj": (D_M, D),
        "mlp.up_proj": (D_M, D),
        "mlp.down_proj": (D, D_M),
    }
    weights = {
        "model.embed_tokens.weight": rng.standard_normal((VOCABULARY, D)),
        "model.norm.weight": rng.uniform(0.5, 1.5, D),
    }
    if not tied:
        weights["lm_head.weight"] = rng.standard_normal((VOCABULARY, D))
    for index in range(SHAPE.layers):
        prefix = f"model.layers.{index}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = rng.uniform(0.5, 1.5, D)
        for name, shape in linears.items():
            weights[f"{prefix}{name}.weight"] = rng.standard_normal(shape)
            if bias:
                weights[f"{prefix}{name}.bias"] = rng.standard_normal(shape[0])
    return weights


@pytest.fixture
def weights() -> dict[str, Array]:
    return random_weights()


@pytest.fixture
def layer(weights: dict[str, Array]) -> dict[str, Array]:
    return llama.layer_weights(weights, 0)


@pytest.fixture
def h(weights: dict[str, Array]) -> Array:
    return llama.embed(weights, np.random.default_rng(1).integers(VOCABULARY, size=(3, 4)))


# --- the model ----------------------------------------------------------------------------------


def test_a_linear_is_dense_or_factored_with_a_bias_or_without() -> None:
    x, W, bias = np.array([[1.0, 2.0]]), np.array([[3.0, 4.0], [5.0, 6.0]]), np.array([10.0, 20.0])
    L, R = np.array([[1.0], [2.0]]), np.array([[1.0, 1.0]])
    assert llama.linear({"a.weight": W}, "a", x).tolist() == [[11, 17]]
    assert llama.linear({"a.weight": W, "a.bias": bias}, "a", x).tolist() == [[21, 37]]
    factored = {"a.left.weight": L, "a.right.weight": R}
    assert llama.linear(factored, "a", x).tolist() == [[3, 6]]
    assert llama.linear(factored | {"a.left.bias": bias}, "a", x).tolist() == [[13, 26]]


def test_rms_norm_is_over_features_with_eps_under_the_root() -> None:
    x, gain = np.array([[3.0, 4.0], [0.0, 1.0]]), np.array([1.0, 2.0])
    expected = [[3 / 13**0.5, 8 / 13**0.5], [0, 2]]
    assert close(llama.rms_norm(x, gain, 0.5), expected)


def test_rotary_turns_a_feature_of_each_half_by_the_position() -> None:
    x = np.arange(1.0, 25.0).reshape(1, 2, 3, 4)
    turned = llama.rotary(x, 100.0)
    assert turned.shape == x.shape
    for head in range(2):
        for position in range(3):
            a, b, c, d = x[0, head, position]
            # theta^0 and theta^(-2 / 4).
            for one, two, first, angle in ((a, c, 0, position), (b, d, 1, position * 0.1)):
                cos, sin = math.cos(angle), math.sin(angle)
                got = turned[0, head, position, [first, first + 2]]
                assert close(got, [one * cos - two * sin, two * cos + one * sin])


def test_softmax_is_over_the_last_axis_and_does_not_overflow() -> None:
    x = np.array([[0.0, math.log(3)], [1000.0, -np.inf]])
    assert close(llama.softmax(x), [[0.25, 0.75], [1, 0]])


def test_silu() -> None:
    expected = [0, 1 / (1 + math.exp(-1)), -2 / (1 + math.exp(2))]
    assert close(llama.silu(np.array([0.0, 1.0, -2.0])), expected)


def test_attention_by_loops(layer: dict[str, Array], h: Array) -> None:
    """Query heads 0 to 2 read key head 0, 3 to 5 read 1; a token sees itself and those before."""
    got = llama.attention(layer, SHAPE, h)
    assert got.shape == (3, 4, 12)

    def heads(name: str, count: int, turned: bool) -> Array:
        y = h @ layer[f"self_attn.{name}.weight"].T + layer[f"self_attn.{name}.bias"]
        parts = [y[:, None, :, 2 * i : 2 * i + 2] for i in range(count)]
        whole = np.concatenate(parts, axis=1)
        return llama.rotary(whole, 100.0) if turned else whole

    q, k, v = heads("q_proj", 6, True), heads("k_proj", 2, True), heads("v_proj", 2, False)
    for n in range(3):
        for head in range(6):
            for token in range(4):
                seen = range(token + 1)
                logits = [q[n, head, token] @ k[n, head // 3, j] / 2**0.5 for j in seen]
                powers = [math.exp(value) for value in logits]
                expected = sum(
                    power / sum(powers) * v[n, head // 3, j]
                    for power, j in zip(powers, seen, strict=True)
                )
                assert close(got[n, token, 2 * head : 2 * head + 2], expected)


def test_a_layer_adds_attention_and_then_the_ffn(layer: dict[str, Array], h: Array) -> None:
    def linear(name: str, x: Array) -> Array:
        return np.asarray(x @ layer[f"{name}.weight"].T + layer[f"{name}.bias"])

    def norm(name: str, x: Array) -> Array:
        return np.asarray(layer[name] * x / np.sqrt((x**2).mean(-1)[..., None] + 0.25))

    trace = llama.layer_forward(layer, SHAPE, h)
    assert close(trace.attention, norm("input_layernorm.weight", h))
    assert close(trace.o, llama.attention(layer, SHAPE, trace.attention))
    middle = h + linear("self_attn.o_proj", trace.o)
    assert close(trace.ffn, norm("post_attention_layernorm.weight", middle))
    gate = linear("mlp.gate_proj", trace.ffn)
    assert close(trace.down, gate / (1 + np.exp(-gate)) * linear("mlp.up_proj", trace.ffn))
    assert close(trace.output, middle + linear("mlp.down_proj", trace.down))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_last_layer_by_the_head(tied: bool) -> None:
    weights = random_weights(tied=tied)
    ids = np.array([[3, 0, 10]])
    h = weights["model.embed_tokens.weight"][ids]
    assert close(llama.embed(weights, ids), h)
    for index in (0, 1):
        h = llama.layer_forward(llama.layer_weights(weights, index), SHAPE, h).output
    head = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    expected = llama.rms_norm(h, weights["model.norm.weight"], 0.25) @ head.T
    assert close(llama.logits(weights, SHAPE, ids), expected)


def test_everything_is_computed_in_float64() -> None:
    narrow = {name: value.astype(np.float32) for name, value in random_weights().items()}
    wide = {name: value.astype(np.float64) for name, value in narrow.items()}
    ids = np.array([[3, 0, 10]])
    assert np.array_equal(llama.logits(narrow, SHAPE, ids), llama.logits(wide, SHAPE, ids))
    new, _ = algorithm1.compress(narrow, SHAPE, ids, Settings(0.3))
    assert all(value.dtype == np.float64 for value in new.values())


def test_layers_are_told_apart_by_their_whole_number() -> None:
    weights = {f"model.layers.{index}.a": np.array([index]) for index in (1, 10, 11)}
    weights["model.layers.1.model.layers.1.b"] = np.array([7])
    named = llama.layer_weights(weights, 1)
    assert {name: value.tolist() for name, value in named.items()} == {
        "a": [1],
        "model.layers.1.b": [7],
    }


# --- Algorithm 1 --------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_paper() -> None:
    assert Settings(0.2) == Settings(
        layer_ratio=0.2,
        a=3,
        least=0.01,
        nested=True,
        aggregation="l2",
        weighting="eq7",
        mha="awsvd",
        ffn="channels",
        joint_qk=False,
        importance="activation",
        asvd_alpha=0.5,
        between=False,
        within=False,
        mgaa_alpha=0.35,
        mgaa_floor=0.25,
    )
    assert LlamaShape(1, 1, 1, 2) == LlamaShape(1, 1, 1, 2, 10000.0, 1e-6)


@pytest.mark.spec("stats.sum-of-squares")
def test_sums_of_narrow_inputs_are_taken_in_float64() -> None:
    X = np.full((3, 1), 1 + 2.0**-20, dtype=np.float32)
    squares = statistics.sum_of_squares(X)
    assert squares.dtype == np.float64
    assert squares.tolist() == [3 * (1 + 2.0**-20) ** 2]


@pytest.mark.spec("algorithm.mha")
@pytest.mark.parametrize("weighting", ["eq7", "eq6"])
@pytest.mark.parametrize(("ratio", "nested"), [(0.5, True), (0.5, False), (0.1, True)])
def test_each_projection_is_factored_by_the_norms_of_its_own_input(
    layer: dict[str, Array], h: Array, ratio: float, nested: bool, weighting: lowrank.Weighting
) -> None:
    trace = llama.layer_forward(layer, SHAPE, h)
    settings = Settings(ratio, a=2, nested=nested, weighting=weighting)
    sizes = algorithm1.layer_sizes(layer, SHAPE, settings)
    ranks = sizes.ranks
    new = algorithm1.factor_matrices(layer, trace, "mha", sizes, settings)
    shapes = {"q": (12, 6), "k": (4, 6), "v": (4, 6), "o": (6, 12)}
    assert (None in ranks.values()) == (ratio == 0.1)
    assert ranks == budget.ranks(shapes, ratio, 2, nested)
    expected = {}
    for m, rank in ranks.items():
        name = f"self_attn.{m}_proj"
        W, bias = layer[f"{name}.weight"], layer[f"{name}.bias"]
        if rank is None:
            expected |= {f"{name}.weight": W, f"{name}.bias": bias}
            continue
        X = (trace.o if m == "o" else trace.attention).reshape(12, -1)
        x = np.sqrt((X**2).sum(axis=0))
        L, R, _ = lowrank.awsvd(W, x if weighting == "eq7" else np.sqrt(x), rank)
        expected |= {f"{name}.left.weight": L, f"{name}.right.weight": R, f"{name}.left.bias": bias}
    assert new.keys() == expected.keys()
    assert all(close(new[name], expected[name]) for name in expected)


@pytest.mark.spec("algorithm.mha")
def test_where_there_is_no_bias_none_is_made(h: Array) -> None:
    layer = llama.layer_weights(random_weights(bias=False), 0)
    step = algorithm1.compress_layer(layer, SHAPE, h, Settings(0.3))
    assert not any("bias" in name for name in step.weights)


@pytest.mark.spec("algorithm.ffn")
@pytest.mark.parametrize("aggregation", ["l2", "linf"])
def test_channels_are_those_of_the_group_scores(
    layer: dict[str, Array], h: Array, aggregation: importance.Aggregation
) -> None:
    trace = llama.layer_forward(layer, SHAPE, h)
    settings = Settings(0.4, least=0.1, aggregation=aggregation)
    band = algorithm1.layer_sizes(layer, SHAPE, settings).channels
    assert band == (3, 15)
    new, kept, scores = algorithm1.compress_ffn(layer, trace, band, settings)
    gate, up, down = (layer[f"mlp.{m}_proj.weight"] for m in ("gate", "up", "down"))
    x_ffn, x_down = (statistics.feature_norms(X.reshape(12, -1)) for X in (trace.ffn, trace.down))
    expected = importance.group_importance(up, gate, down, x_ffn, x_down, aggregation)
    assert close(scores, expected)
    # 3 of the least important stay, and 15 of the top.
    assert kept.tolist() == pruning.kept_channels(expected, 3, 15).tolist()
    assert kept.size == 18
    assert {name: value.tolist() for name, value in new.items()} == {
        "mlp.gate_proj.weight": gate[kept].tolist(),
        "mlp.up_proj.weight": up[kept].tolist(),
        "mlp.down_proj.weight": down[:, kept].tolist(),
        "mlp.gate_proj.bias": layer["mlp.gate_proj.bias"][kept].tolist(),
        "mlp.up_proj.bias": layer["mlp.up_proj.bias"][kept].tolist(),
        "mlp.down_proj.bias": layer["mlp.down_proj.bias"].tolist(),
    }


@pytest.mark.spec("algorithm.mha", "algorithm.ffn")
@pytest.mark.parametrize(
    ("mha", "ffn"), [("awsvd", "channels"), ("awsvd", None), (None, "channels")]
)
def test_a_layer_takes_its_statistics_from_one_uncompressed_forward(
    layer: dict[str, Array],
    h: Array,
    mha: Literal["awsvd"] | None,
    ffn: Literal["channels"] | None,
) -> None:
    settings = Settings(0.4, mha=mha, ffn=ffn)
    step = algorithm1.compress_layer(layer, SHAPE, h, settings)
    trace = llama.layer_forward(layer, SHAPE, h)
    assert all(
        close(a, b) for a, b in zip(vars(step.trace).values(), vars(trace).values(), strict=True)
    )
    expected = dict(layer)
    sizes = algorithm1.layer_sizes(layer, SHAPE, settings)
    assert step.ranks == sizes.ranks
    assert bool(sizes.ranks) == (mha is not None)
    if mha:
        new = algorithm1.factor_matrices(layer, trace, "mha", sizes, settings)
        expected = {n: v for n, v in expected.items() if not n.startswith("self_attn.")} | new
    if ffn:
        assert sizes.channels is not None
        new, kept, scores = algorithm1.compress_ffn(layer, trace, sizes.channels, settings)
        expected = {n: v for n, v in expected.items() if not n.startswith("mlp.")} | new
        assert step.kept is not None
        assert step.kept.tolist() == kept.tolist()
        assert step.scores is not None
        assert close(step.scores, scores)
    else:
        assert sizes.channels is step.kept is step.scores is None
    assert step.weights.keys() == expected.keys()
    assert all(close(step.weights[name], expected[name]) for name in expected)
    assert close(step.output, llama.layer_forward(expected, SHAPE, h).output)
    assert not close(step.output, trace.output)


def test_each_layer_is_fed_by_the_compressed_ones_before_it(weights: dict[str, Array]) -> None:
    ids = np.random.default_rng(2).integers(VOCABULARY, size=(3, 4))
    settings = Settings(0.4)
    new, steps = algorithm1.compress(weights, SHAPE, ids, settings)
    h = weights["model.embed_tokens.weight"][ids]
    expected = {n: v for n, v in weights.items() if not n.startswith("model.layers.")}
    for index, step in enumerate(steps):
        layer = llama.layer_weights(weights, index)
        alone = algorithm1.compress_layer(layer, SHAPE, h, settings)
        assert close(step.output, alone.output)
        expected |= {f"model.layers.{index}.{n}": v for n, v in alone.weights.items()}
        h = alone.output
    assert len(steps) == 2
    assert new.keys() == expected.keys()
    assert all(close(new[name], expected[name]) for name in expected)
    # Fewer layers than there are weights for: the shape says how many count.
    _, one = algorithm1.compress(weights, replace(SHAPE, layers=1), ids, settings)
    assert len(one) == 1


FACTORED: dict[str, Any] = {
    "svd": lambda W, X: lowrank.svd_low_rank(W, 2),
    "awsvd": lambda W, X: lowrank.awsvd(W, np.linalg.norm(X, axis=0) ** 0.5, 2),
    "asvd": lambda W, X: lowrank.awsvd(W, np.mean(np.abs(X), axis=0) ** 1.5, 2),
    "pca": lambda W, X: pca.pca(W, X.T @ X, 2),
    "afm": lambda W, X: pca.afm(W, X.T @ X, X.sum(axis=0), len(X), 2),
}


@pytest.mark.spec("algorithm.low-rank", "afm.bias")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("method", FACTORED)
@pytest.mark.parametrize("joint", [True, False])
def test_each_method_factors_by_what_it_has_to_know_of_the_input(
    method: algorithm1.LowRank, joint: bool, bias: bool, h: Array
) -> None:
    layer = llama.layer_weights(random_weights(bias), 0)
    trace = llama.layer_forward(layer, SHAPE, h)
    settings = Settings(
        0.5, mha=method, ffn=method, joint_qk=joint, weighting="eq6", asvd_alpha=1.5
    )
    inputs = {
        "self_attn.q_proj": trace.attention,
        "self_attn.k_proj": trace.attention,
        "self_attn.v_proj": trace.attention,
        "self_attn.o_proj": trace.o,
        "mlp.gate_proj": trace.ffn,
        "mlp.up_proj": trace.ffn,
        "mlp.down_proj": trace.down,
    }
    for sublayer in ("mha", "ffn"):
        names = algorithm1.MHA if sublayer == "mha" else algorithm1.FFN
        matrices = algorithm1.matrices(layer, sublayer, settings)
        if joint and sublayer == "mha":
            assert list(matrices) == ["qk", "v", "o"]
            q, k = (layer[f"self_attn.{m}_proj.weight"] for m in "qk")
            assert np.array_equal(matrices["qk"], np.concatenate([q, k]))
        else:
            assert list(matrices) == list(names)
        sizes = Sizes(dict.fromkeys(matrices, 2))
        new = algorithm1.factor_matrices(layer, trace, sublayer, sizes, settings)
        expected: dict[str, Array] = {}
        for m, W in matrices.items():
            parts = ["self_attn.q_proj", "self_attn.k_proj"] if m == "qk" else [names[m]]
            X = inputs[parts[0]].reshape(12, -1)
            L, R, _, *more = FACTORED[method](W, X)
            ends = np.cumsum([len(layer[f"{name}.weight"]) for name in parts])
            expected["self_attn.qk_right.weight" if m == "qk" else f"{parts[0]}.right.weight"] = R
            for name, end in zip(parts, ends, strict=True):
                rows = slice(end - len(layer[f"{name}.weight"]), end)
                expected[f"{name}.left.weight"] = L[rows]
                own = [layer[f"{name}.bias"]] if bias else []
                if own or more:
                    expected[f"{name}.left.bias"] = sum([*own, *(b[rows] for b in more)])
        assert new.keys() == expected.keys()
        assert all(close(new[name], expected[name]) for name in expected)


@pytest.mark.spec("algorithm.heads", "algorithm.update")
@pytest.mark.parametrize("bias", [True, False])
def test_o_is_refitted_on_the_heads_that_stay(
    bias: bool, layer: dict[str, Array], h: Array
) -> None:
    if not bias:
        layer = {name: value for name, value in layer.items() if not name.endswith("bias")}
    trace = llama.layer_forward(layer, SHAPE, h)
    settings = Settings(0.5, mha="heads", update="least-squares")
    new, kept, _ = algorithm1.compress_heads(layer, trace, SHAPE, (0, 1), settings)
    assert {name for name in new if name.endswith("bias")} == {
        f"self_attn.{m}_proj.bias" for m in "qkvo" if bias
    }
    columns = np.arange(12).reshape(2, 6)[kept].reshape(-1)
    W, X = layer["self_attn.o_proj.weight"], trace.o.reshape(-1, 12)
    refitted = regression.least_squares_update(W, X.T @ X, columns, settings.ridge)
    assert close(new["self_attn.o_proj.weight"], refitted)
    assert not close(refitted, W[:, columns])


@pytest.mark.spec("algorithm.mha", "algorithm.low-rank")
def test_q_and_k_that_are_joint_stay_dense_together(layer: dict[str, Array], h: Array) -> None:
    trace = llama.layer_forward(layer, SHAPE, h)
    sizes = Sizes({"qk": None, "v": 1, "o": 2})
    settings = Settings(0.5, joint_qk=True)
    new = algorithm1.factor_matrices(layer, trace, "mha", sizes, settings)
    for name in (f"self_attn.{m}_proj.{kind}" for m in "qk" for kind in ("weight", "bias")):
        assert new[name] is layer[name]
    assert {name.split(".")[1] for name in new} == {f"{m}_proj" for m in "qkvo"}


@pytest.mark.spec("obs.keep", "budget.channels")
def test_as_many_channels_go_as_the_band_holds(layer: dict[str, Array], h: Array) -> None:
    trace = llama.layer_forward(layer, SHAPE, h)
    settings = Settings(0.5, selection="obs")
    _, kept, scores = algorithm1.compress_ffn(layer, trace, (2, 7), settings)
    X = trace.down.reshape(-1, D_M)
    W = layer["mlp.down_proj.weight"]
    order, _ = regression.removal_order(W, X.T @ X, 5, settings.ridge)
    assert kept.size == D_M - 5
    assert kept.tolist() == sorted(set(range(D_M)) - set(order.tolist()))
    assert scores is None


@pytest.mark.spec("algorithm.stages")
def test_the_first_layer_has_the_input_of_the_uncompressed_model(
    layer: dict[str, Array], h: Array
) -> None:
    settings = Settings(0.5, mha="pca", dense_target=0.5)
    alone = algorithm1.compress_layer(layer, SHAPE, h, settings)
    given = algorithm1.compress_layer(layer, SHAPE, h, settings, h_dense=h)
    assert np.array_equal(alone.output, given.output)
    assert not np.array_equal(
        alone.output, algorithm1.compress_layer(layer, SHAPE, h, settings, h_dense=2 * h).output
    )


@pytest.mark.spec("algorithm.stages", "algorithm.heads", "algorithm.ffn")
def test_what_a_staged_layer_tells_of_itself(layer: dict[str, Array], h: Array) -> None:
    """What is kept follows the scores; the inputs are those that each stage has seen."""
    settings = Settings(0.5, mha="heads", dense_target=0.5, aggregation="l1", least=0.1)
    step = algorithm1.compress_layer(layer, SHAPE, h, settings)
    assert step.ranks == {}
    assert step.scores is not None
    assert step.head_scores is not None
    assert step.scores.shape == (D_M,)
    assert step.head_scores.shape == (2,)
    assert step.kept is not None
    assert step.kept_heads is not None
    assert step.kept.tolist() == pruning.kept_channels(step.scores, 3, 18).tolist()
    assert step.kept_heads.tolist() == [int(np.argmax(step.head_scores))]
    before = llama.layer_forward(layer, SHAPE, h)
    assert close(step.trace.attention, before.attention)
    # Of all heads and channels: what is pruned is pruned by what it reads.
    assert step.trace.o.shape == before.o.shape
    assert step.trace.down.shape == before.down.shape
    assert not close(step.trace.ffn, before.ffn)
    assert close(step.output, llama.layer_forward(step.weights, SHAPE, h).output)

    factored = Settings(0.5, mha="svd", ffn="pca", dense_target=0.5)
    step = algorithm1.compress_layer(layer, SHAPE, h, factored)
    assert step.ranks == algorithm1.layer_sizes(layer, SHAPE, factored).ranks
    assert step.kept is step.kept_heads is step.scores is step.head_scores is None


@pytest.mark.spec("algorithm.refine")
def test_one_iteration_is_enough_to_be_refined(layer: dict[str, Array], h: Array) -> None:
    """Towards what the uncompressed layer gives; of the same input where no other is given."""
    settings = Settings(0.5, a=1, refine=1, ridge=1e-2)
    plain = algorithm1.compress_layer(layer, SHAPE, h, replace(settings, refine=0))
    step = algorithm1.compress_layer(layer, SHAPE, h, settings)
    dense = llama.layer_forward(layer, SHAPE, h).output
    assert plain.losses == []
    assert len(step.losses) == 2
    for found, loss in zip((plain, step), step.losses, strict=True):
        assert loss == pytest.approx(np.sum((found.output - dense) ** 2), rel=1e-9)
    assert step.losses[1] < 0.99 * step.losses[0]
    assert close(step.output, llama.layer_forward(step.weights, SHAPE, h).output)
    moved = {n for n, value in step.weights.items() if not np.array_equal(value, plain.weights[n])}
    assert moved == {n for n in plain.weights if n.endswith(".weight") and "norm" not in n}
    given = algorithm1.compress_layer(layer, SHAPE, h, settings, h_dense=h)
    assert np.array_equal(step.output, given.output)
    _, (first, *_) = algorithm1.compress(random_weights(), SHAPE, np.arange(6)[None], settings)
    assert len(first.losses) == 2


@pytest.mark.spec("algorithm.heads", "algorithm.scores")
@pytest.mark.parametrize("importance", ["activation", "magnitude", "taylor"])
@pytest.mark.parametrize("aggregation", ["l2", "linf"])
def test_heads_and_channels_are_scored_by_the_importance_asked_for(
    aggregation: Any, importance: Any, layer: dict[str, Array], h: Array
) -> None:
    rng = np.random.default_rng(3)
    gradients = {name: rng.standard_normal(value.shape) for name, value in layer.items()}
    settings = Settings(0.5, least=0, mha="heads", aggregation=aggregation, importance=importance)
    sizes = algorithm1.layer_sizes(layer, SHAPE, settings)
    assert (sizes.ranks, sizes.heads, sizes.channels) == ({}, (0, 1), (0, 15))
    step = algorithm1.compress_layer(layer, SHAPE, h, settings, None, gradients)
    assert step.kept is not None
    assert step.kept_heads is not None
    trace = step.trace
    of = {
        "activation": lambda name, X: (
            np.abs(layer[name]) * np.linalg.norm(X.reshape(12, -1), axis=0)
        ),
        "magnitude": lambda name, X: np.abs(layer[name]),
        "taylor": lambda name, X: np.abs(layer[name] * gradients[name]),
    }[importance]
    norm = {"l2": None, "linf": np.inf}[aggregation]
    q, k, v, o = (
        of(f"self_attn.{m}_proj.weight", trace.o if m == "o" else trace.attention) for m in "qkvo"
    )
    # Groups of three query heads of two features.
    scores = [
        sum(
            np.linalg.norm(block.ravel(), norm)
            for block in (
                q[6 * g : 6 * g + 6],
                k[2 * g : 2 * g + 2],
                v[2 * g : 2 * g + 2],
                o[:, 6 * g : 6 * g + 6],
            )
        )
        for g in (0, 1)
    ]
    assert close(step.head_scores, scores)
    g = int(np.argmax(scores))
    assert step.kept_heads.tolist() == [g]
    for m, rows in (("q", 6), ("k", 2), ("v", 2)):
        for kind in ("weight", "bias"):
            name = f"self_attn.{m}_proj.{kind}"
            assert np.array_equal(step.weights[name], layer[name][rows * g : rows * g + rows])
    name = "self_attn.o_proj.weight"
    assert np.array_equal(step.weights[name], layer[name][:, 6 * g : 6 * g + 6])
    assert np.array_equal(step.weights["self_attn.o_proj.bias"], layer["self_attn.o_proj.bias"])
    up, gate, down = (
        of(f"mlp.{m}_proj.weight", trace.down if m == "down" else trace.ffn)
        for m in ("up", "gate", "down")
    )
    scores = [
        sum(np.linalg.norm(part, norm) for part in (up[i], gate[i], down[:, i])) for i in range(D_M)
    ]
    assert close(step.scores, scores)
    assert step.kept.tolist() == sorted(np.argsort(scores)[15:].tolist())


@pytest.mark.spec("algorithm.scores", "gradient.backward")
def test_gradients_are_those_of_the_uncompressed_model(weights: dict[str, Array]) -> None:
    """For the second layer too, when the first has lost a group of heads."""
    ids = np.random.default_rng(2).integers(VOCABULARY, size=(3, 4))
    settings = Settings(0.5, least=0, mha="heads", ffn=None, importance="taylor")
    _, steps = algorithm1.compress(weights, SHAPE, ids, settings)
    G = gradient.loss_gradients(weights, SHAPE, ids)
    for index, step in enumerate(steps):
        names = [f"model.layers.{index}.self_attn.{m}_proj.weight" for m in "qkvo"]
        scores = heads.head_scores(*(np.abs(weights[n] * G[n]) for n in names), SHAPE.kv_heads)
        assert step.kept_heads is not None
        assert step.kept_heads.size == 1
        assert close(step.head_scores, scores)


@pytest.mark.spec("gradient.backward")
def test_the_factor_that_q_and_k_share_has_the_gradient_of_both(weights: dict[str, Array]) -> None:
    """The slope of the loss as the factor moves in some direction."""
    rng = np.random.default_rng(4)
    prefix = "model.layers.0.self_attn."
    for m, size in (("q", 12), ("k", 4)):
        del weights[f"{prefix}{m}_proj.weight"], weights[f"{prefix}{m}_proj.bias"]
        weights[f"{prefix}{m}_proj.left.weight"] = rng.standard_normal((size, 3))
    shared, ids = f"{prefix}qk_right.weight", np.array([[3, 0, 10, 7]])
    weights[shared] = rng.standard_normal((3, D))
    direction = rng.standard_normal((3, D))

    def loss(step: float) -> float:
        return gradient.loss({**weights, shared: weights[shared] + step * direction}, SHAPE, ids)

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    G = gradient.loss_gradients(weights, SHAPE, ids)[shared]
    assert float(np.sum(G * direction)) == pytest.approx(slope, rel=1e-6)


@pytest.mark.spec("mgaa.measure")
def test_similarities_are_those_of_the_stream_and_spectra_those_of_the_method(
    weights: dict[str, Array],
) -> None:
    ids = np.random.default_rng(2).integers(VOCABULARY, size=(3, 4))
    settings = Settings(0.5, mha="pca", ffn="svd", within=True)
    found = algorithm1.measure(weights, SHAPE, ids, settings)
    h = llama.embed(weights, ids)
    for index in (0, 1):
        layer = llama.layer_weights(weights, index)
        trace = llama.layer_forward(layer, SHAPE, h)
        for sublayer, before, after in (
            ("mha", h, trace.middle),
            ("ffn", trace.middle, trace.output),
        ):
            cosines = [
                a @ b / math.sqrt((a @ a) * (b @ b))
                for a, b in zip(before.reshape(12, D), after.reshape(12, D), strict=True)
            ]
            assert close(found.similarities[index][sublayer], sum(cosines) / 12)
        spectra = found.spectra[index]
        assert list(spectra) == ["q", "k", "v", "o", "gate", "up", "down"]
        X = trace.o.reshape(12, -1)
        W = layer["self_attn.o_proj.weight"]
        assert np.allclose(spectra["o"], np.linalg.svd(X @ W.T, compute_uv=False), rtol=1e-9)
        down = np.linalg.svd(layer["mlp.down_proj.weight"], compute_uv=False)
        assert close(spectra["down"], down)
        h = trace.output
    # Where nothing within a sub-layer is asked, or a sub-layer is not factored.
    for other in (Settings(0.5, mha="pca", between=True), Settings(0.5, mha=None, within=True)):
        found = algorithm1.measure(weights, SHAPE, ids, other)
        assert found.spectra == [{}, {}]
        assert found.losses == found.divergences == []


@pytest.mark.spec("mgaa.plan")
def test_what_a_ratio_is_a_share_of(layer: dict[str, Array]) -> None:
    """q 12 x 6, k and v 4 x 6, o 6 x 12; gate and up 30 x 6, down 6 x 30; a bias each."""
    bare = llama.layer_weights(random_weights(bias=False), 0)
    mha, ffn = 72 + 24 + 24 + 72, 3 * 180
    for given, more_mha, more_ffn in ((layer, 12 + 4 + 4, 30 + 30), (bare, 0, 0)):
        factored = Settings(0.5, mha="svd", ffn="pca")
        assert algorithm1.compressible(given, "mha", factored) == mha
        assert algorithm1.compressible(given, "ffn", factored) == ffn
        pruned = Settings(0.5, mha="heads")
        assert algorithm1.compressible(given, "mha", pruned) == mha + more_mha
        assert algorithm1.compressible(given, "ffn", pruned) == ffn + more_ffn


@pytest.mark.spec("mgaa.plan")
@pytest.mark.parametrize("allocation", ["between", "within", "marginal"])
def test_each_allocation_alone_is_measured_for(weights: dict[str, Array], allocation: str) -> None:
    ids = np.random.default_rng(2).integers(VOCABULARY, size=(3, 4))
    chosen: dict[str, Any] = {allocation: True}
    settings = Settings(0.5, nested=False, mha="svd", ffn="pca", **chosen)
    measured = algorithm1.measure(weights, SHAPE, ids, settings)
    sizes = algorithm1.allocate(weights, SHAPE, settings, measured)
    _, layers = algorithm1.compress(weights, SHAPE, ids, settings)
    assert [step.ranks for step in layers] == [size.ranks for size in sizes]
    even = algorithm1.allocate(weights, SHAPE, Settings(0.5, nested=False, mha="svd", ffn="pca"))
    assert [size.ranks for size in sizes] != [size.ranks for size in even]


@pytest.mark.spec("mgaa.plan", "mgaa.floors")
def test_no_rank_is_below_its_floor() -> None:
    """Of 40 x 40 each at 30%: a uniform rank of 14, of which the floor is a half."""
    layer = {f"self_attn.{m}_proj.weight": np.zeros((40, 40)) for m in "qkvo"}
    layer["mlp.up_proj.weight"] = np.zeros((80, 40))
    spectra = {m: (0.1 if m == "o" else 1.0) ** np.arange(40) for m in "qkvo"}
    settings = Settings(0.3, mha="svd", within=True, mgaa_floor=0.5)
    sizes = algorithm1.layer_sizes(layer, SHAPE, settings, spectra=spectra)
    assert sizes.ranks["o"] == 7


@pytest.mark.spec("mgaa.plan", "budget.ranks")
@pytest.mark.parametrize("within", [False, True])
def test_both_sub_layers_have_ranks(layer: dict[str, Array], within: bool) -> None:
    settings = Settings(0.4, mha="svd", ffn="pca", within=within)
    spectra = {
        m: np.linalg.svd(W, compute_uv=False)
        for sublayer in settings.sublayers
        for m, W in algorithm1.matrices(layer, sublayer, settings).items()
    }
    for dense in ({}, {"mha": 0.0}, {"ffn": 0.0}):
        ratios: dict[algorithm1.Sublayer, float] = {"mha": 0.4, "ffn": 0.4} | dense
        given = spectra if within else None
        ranks = algorithm1.layer_sizes(layer, SHAPE, settings, ratios, given).ranks
        assert list(ranks) == ["q", "k", "v", "o", "gate", "up", "down"]
        for sublayer, names in (("mha", "qkvo"), ("ffn", ("gate", "up", "down"))):
            assert {ranks[m] is None for m in names} == {sublayer in dense}


@pytest.mark.spec("mgaa.plan")
@pytest.mark.parametrize("floor", [0.3, 0.9])
@pytest.mark.parametrize(("between", "within"), [(True, False), (False, True), (True, True)])
def test_sizes_are_those_of_the_ratios_and_of_the_spectra(
    weights: dict[str, Array], between: bool, within: bool, floor: float
) -> None:
    """A floor of 0.9 holds the highest ratio down."""
    settings = Settings(
        0.4, mha="svd", between=between, within=within, mgaa_alpha=0.2, mgaa_floor=floor
    )
    similarities = [{"mha": 0.9, "ffn": 0.5}, {"mha": 0.7, "ffn": 0.8}]
    layers = [llama.layer_weights(weights, index) for index in (0, 1)]
    spectra = [
        {m: np.linalg.svd(layer[f"self_attn.{m}_proj.weight"], compute_uv=False) for m in "qkvo"}
        for layer in layers
    ]
    found = algorithm1.allocate(
        weights,
        SHAPE,
        settings,
        algorithm1.Measurements(similarities, spectra),
    )
    ratios = [0.4] * 4
    if between:
        ratios = mgaa.sublayer_ratios(
            mgaa.standard_scores([0.9, 0.5, 0.7, 0.8]),
            [192, 600, 192, 600],
            0.4,
            0.2,
            [0.4 + (1 - floor) * 0.6] * 4,
        )
        assert len(set(ratios)) == (2 if floor == 0.9 else 4)
    shapes = {"q": (12, 6), "k": (4, 6), "v": (4, 6), "o": (6, 12)}
    for index, (sizes, (p_mha, p_ffn)) in enumerate(
        zip(found, (ratios[:2], ratios[2:]), strict=True)
    ):
        assert sizes.heads is None
        assert sizes.channels == budget.removed_band(D_M, p_ffn, 0.01)
        if within:
            kept = (1 - p_mha) * 192
            floors = mgaa.rank_floors(shapes, kept, floor)
            expected = mgaa.common_energy_ranks(spectra[index], shapes, kept, floors)
        else:
            expected = budget.ranks(shapes, p_mha, 1, True)
        assert sizes.ranks == expected


@pytest.mark.spec("budget.multiple")
def test_sizes_of_all_layers_are_rounded_together(weights: dict[str, Array]) -> None:
    """Of 30 channels 18 are due: 20, then 15, or 16 twice."""
    exact = algorithm1.allocate(weights, SHAPE, Settings(0.4, a=1, least=0.3))
    settings = Settings(0.4, a=1, least=0.3, multiple=2)
    for name, (d_out, d_in) in {"q": (12, 6), "k": (4, 6), "v": (4, 6), "o": (6, 12)}.items():
        r = [sizes.ranks[name] for sizes in exact]
        found = [sizes.ranks[name] for sizes in algorithm1.allocate(weights, SHAPE, settings)]
        assert found == budget.rounded_sizes(r, d_out + d_in, d_out * d_in, 2)
    assert [sizes.channels for sizes in exact] == [(9, 21)] * 2
    wide = algorithm1.allocate(weights, SHAPE, replace(settings, multiple=5))
    assert [sizes.channels for sizes in wide] == [(9, 19), (9, 24)]
    # 16 of the low end are kept of 18 channels, and 15 of 16.
    narrow = algorithm1.allocate(weights, SHAPE, replace(settings, least=0.55, multiple=16))
    assert [sizes.channels for sizes in narrow] == [(15, 29)] * 2


@pytest.mark.spec("budget.multiple")
def test_each_matrix_is_rounded_by_itself_and_what_is_dense_is_not(layer: dict[str, Array]) -> None:
    """In order, whatever keeps the parameters of the layers so far nearest to those given.

    A rank of q and o holds 18 of 72, of gate, up and down 36 of 180. Of 30 channels 21 are due: 24
    stay, 3 too many; where none goes none is looked at; of 26 less 3, 24 stay, of 13 less 1, 8; of
    29 and 4, all.
    """
    settings = Settings(0.4, mha="svd", ffn="pca", multiple=2)
    exact = [
        Sizes({"q": 3, "k": 1, "v": 2, "o": None, "gate": 3, "up": 2, "down": 3}),
        Sizes({"q": 3, "k": None, "v": 1, "o": 3, "gate": 3, "up": None, "down": 4}),
        Sizes({"q": 1, "k": 1, "v": 2, "o": 3, "gate": None, "up": 3, "down": 3}),
    ]
    given = [dict(size.ranks) for size in exact]
    found = [size.ranks for size in algorithm1.as_multiples(exact, layer, settings)]
    assert found == [
        {"q": 2, "k": 1, "v": 2, "o": None, "gate": 2, "up": 2, "down": 2},
        {"q": None, "k": None, "v": 1, "o": 2, "gate": 4, "up": None, "down": None},
        {"q": 1, "k": 1, "v": 2, "o": None, "gate": None, "up": 2, "down": 2},
    ]
    assert [size.ranks for size in exact] == given
    pruned = Settings(0.4, mha=None, least=0.3, multiple=8)
    bands = [(9, 18), (9, 9), (9, 13), (0, 17), (9, 10)]
    wide = algorithm1.as_multiples([Sizes({}, None, band) for band in bands], layer, pruned)
    assert [size.channels for size in wide] == [(9, 15), (9, 9), (9, 15), (7, 29), (9, 9)]


@pytest.mark.spec("mgaa.plan")
def test_what_loses_nothing_stays_dense(layer: dict[str, Array]) -> None:
    settings = Settings(0.4, mha="svd", between=True)
    sizes = algorithm1.layer_sizes(layer, SHAPE, settings, {"mha": 0.0, "ffn": 0.4})
    assert sizes.ranks == dict.fromkeys("qkvo")
    # Even ranks would be rounded down here.
    q, k = (f"self_attn.{m}_proj.weight" for m in "qk")
    narrow = {**layer, q: layer[q][:8, :5], k: layer[k][:2, :5]}
    narrow["self_attn.v_proj.weight"] = narrow[k]
    narrow["self_attn.o_proj.weight"] = narrow[q].T
    sizes = algorithm1.layer_sizes(narrow, SHAPE, settings, {"mha": 0.0, "ffn": 0.4})
    assert sizes.ranks == dict.fromkeys("qkvo")


# --- the marginal allocation --------------------------------------------------------------------


@pytest.mark.spec("marginal.measure", "marginal.sensitivity")
@pytest.mark.parametrize("ffn", ["channels", "svd"])
def test_each_module_is_made_small_alone(
    ffn: Literal["channels", "svd"], weights: dict[str, Array]
) -> None:
    """In the middle of its curve, by all samples; what that does to the first 16 is told."""
    ids = np.random.default_rng(2).integers(VOCABULARY, size=(17, 3))
    settings = Settings(0.5, nested=False, mha="pca", ffn=ffn, selection="obs", marginal=True)
    found = algorithm1.measure(weights, SHAPE, ids, settings)
    # Of ranks 1 to 3 of q and o, 1 and 2 of k and v, 1 to 4 in the FFN, and the dense matrix.
    probed = {"q": 2, "k": 1, "v": 1, "o": 2}
    probed |= {"ffn": 15} if ffn == "channels" else dict.fromkeys(("gate", "up", "down"), 2)
    h = llama.embed(weights, ids)
    for index in (0, 1):
        layer = llama.layer_weights(weights, index)
        trace = llama.layer_forward(layer, SHAPE, h)
        W, X = layer["self_attn.k_proj.weight"], trace.attention.reshape(-1, D)
        S = np.linalg.svd(X @ W.T, compute_uv=False)
        assert np.allclose(found.spectra[index]["k"], S, rtol=1e-9)
        assert list(found.spectra[index]) == [m for m in probed if m != "ffn"]
        if ffn == "channels":
            W, X = layer["mlp.down_proj.weight"], trace.down.reshape(-1, D_M)
            _, losses = regression.removal_order(W, X.T @ X, D_M - 1, settings.ridge)
            assert close(found.losses[index], losses)
        assert list(found.divergences[index]) == list(probed)
        for m, size in probed.items():
            sublayer: Literal["mha", "ffn"] = "mha" if m in algorithm1.MHA else "ffn"
            if m == "ffn":
                new, _, _ = algorithm1.compress_ffn(layer, trace, (0, 30 - size), settings)
            else:
                sizes = Sizes({**dict.fromkeys(probed), m: size})
                new = algorithm1.factor_matrices(layer, trace, sublayer, sizes, settings)
            gone = f"layers.{index}.{'self_attn' if sublayer == 'mha' else 'mlp'}."
            small = {name: value for name, value in weights.items() if gone not in name}
            small |= {f"model.layers.{index}.{name}": value for name, value in new.items()}
            p, q = (llama.softmax(llama.logits(each, SHAPE, ids[:16])) for each in (weights, small))
            expected = float(np.sum(p * np.log(p / q))) / 48
            assert found.divergences[index][m] == pytest.approx(expected, rel=1e-9)
        h = trace.output
    assert len(found.losses) == (2 if ffn == "channels" else 0)


def hand_measured(*divergences: dict[str, float]) -> algorithm1.Measurements:
    """Singular values n, ..., 2, 1, in layer i times i + 1; losses 1, 2, ..., 29 times i + 1."""
    sides = {"k": 4, "v": 4, **dict.fromkeys(("qk", "q", "o", "gate", "up", "down"), 6)}
    spectra = [
        {m: (i + 1) * np.arange(n, 0.0, -1) for m, n in sides.items()}
        for i in range(len(divergences))
    ]
    losses = [(i + 1) * np.arange(1.0, D_M) for i in range(len(divergences))]
    return algorithm1.Measurements([], spectra, losses, list(divergences))


@pytest.mark.spec("marginal.curve", "afm.bias")
def test_a_curve_counts_the_biases_that_afm_adds(layer: dict[str, Array]) -> None:
    """q 12 x 6, k 4 x 6 and gate 30 x 6: 18, 10 and 36 parameters a rank; q on k: 22."""
    bare = llama.layer_weights(random_weights(bias=False), 0)
    known = hand_measured({}, {})

    def curves(layer: dict[str, Array], index: int = 0, **settings: Any) -> dict[str, Any]:
        return algorithm1.curves_of(layer, index, known, Settings(0.5, **settings))

    for given in (bare, layer):
        for settings in ({"mha": "pca"}, {"mha": "afm"}):
            added = settings["mha"] == "afm" and given is bare
            found = curves(given, **settings)
            assert list(found) == ["q", "k", "v", "o", "ffn"]
            q, k = ([30, 48, 66, 72], [14, 24]) if added else ([18, 36, 54, 72], [10, 20, 24])
            assert found["q"] == (q, [55, 30, 14, 0])
            assert found["k"] == (k, [14, 0] if added else [14, 5, 0])
            u = 18 if given is bare else 20
            assert found["ffn"][0] == [u * width for width in range(1, 31)]
            assert found["ffn"][1] == [sum(range(1, 31 - width)) for width in range(1, 31)]
    assert curves(layer, 1, mha="pca")["q"][1] == [4 * 55, 4 * 30, 4 * 14, 0]
    assert curves(layer, 1)["ffn"][1][-3:] == [2 + 4, 2, 0]
    ffn = curves(bare, mha=None, ffn="afm")
    assert list(ffn) == ["gate", "up", "down"]
    assert ffn["gate"][0] == ffn["up"][0] == [66, 102, 138, 174, 180]
    assert ffn["down"][0] == [42, 78, 114, 150, 180]
    for own, expected in (
        ("", [38, 60, 82, 96]),
        ("q", [26, 48, 70, 92, 96]),
        ("k", [34, 56, 78, 96]),
        ("qk", [22, 44, 66, 88, 96]),
    ):
        names = [f"self_attn.{m}_proj.bias" for m in own]
        given = bare | {name: layer[name] for name in names}
        assert curves(given, mha="afm", joint_qk=True)["qk"][0] == expected


@pytest.mark.spec("marginal.plan", "afm.bias")
def test_what_a_layer_holds_by_hand(layer: dict[str, Array]) -> None:
    """q 2 ranks, k dense, v 2 ranks; 18 channels of 30. AFM's gate holds more than the matrix."""
    bare = llama.layer_weights(random_weights(bias=False), 0)
    pruned = Sizes({"q": 2, "k": None, "v": 2, "o": 3}, None, (3, 15))
    factored = Sizes(pruned.ranks | {"gate": 5, "up": None, "down": 1})
    mha, ffn = 36 + 24 + 20 + 54, 180 + 180 + 36
    for given, channel, of_mha, of_ffn in ((layer, 20, 0, 0), (bare, 18, 12 + 4 + 6, 30 + 6)):
        pca, afm = Settings(0.5, mha="pca"), Settings(0.5, mha="afm", ffn="afm")
        assert algorithm1.parameters_of(given, pruned, pca) == mha + 18 * channel
        assert algorithm1.parameters_of(given, factored, afm) == mha + of_mha + ffn + of_ffn


@pytest.mark.spec("marginal.plan")
def test_channels_go_where_the_model_minds_them_least(weights: dict[str, Array]) -> None:
    """24 in two layers. The n-th costs n D / 120 of what the model minds, by D at the 15th.

    That is 16 where D is 1 and 8 where it is 2.1; one more of either would cost 17 or 18.9.
    """
    settings = Settings(0.4, least=0.1, mha=None, selection="obs", marginal=True)
    even = algorithm1.layer_sizes(llama.layer_weights(weights, 0), SHAPE, settings)
    assert even.channels == (3, 15)
    for first, second, expected in ((1.0, 2.1, (16, 8)), (2.1, 1.0, (8, 16))):
        known = hand_measured({"ffn": first}, {"ffn": second})
        sizes = algorithm1.allocate(weights, SHAPE, settings, known)
        assert sizes == [Sizes({}, None, (3, 3 + count)) for count in expected]


@pytest.mark.spec("marginal.plan")
def test_what_the_model_does_not_mind_keeps_the_floor(weights: dict[str, Array]) -> None:
    """By 0.73 * 0.6: 31 of 72 parameters, 10 of 24, and 262 of 600 at 20 for each channel."""
    settings = Settings(0.4, mha="pca", selection="obs", marginal=True, mgaa_floor=0.73)
    nothing = dict.fromkeys(("q", "k", "v", "o", "ffn"), 0.0)
    sizes = algorithm1.allocate(weights, SHAPE, settings, hand_measured(nothing, nothing))
    assert sizes == [Sizes({"q": 2, "k": 1, "v": 1, "o": 2}, None, (0, 16))] * 2


ODD = LlamaShape(layers=1, heads=2, kv_heads=1, head_dim=2)
"""With a width of 3: q 4 x 3, k and v 2 x 3, o 3 x 4."""


def odd_weights() -> dict[str, Array]:
    rng = np.random.default_rng(4)
    shapes = {"q": (4, 3), "k": (2, 3), "v": (2, 3), "o": (3, 4)}
    linears = {f"self_attn.{m}_proj": sides for m, sides in shapes.items()}
    linears |= {"mlp.gate_proj": (5, 3), "mlp.up_proj": (5, 3), "mlp.down_proj": (3, 5)}
    weights = {f"model.layers.0.{n}.weight": rng.standard_normal(s) for n, s in linears.items()}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        weights[f"model.layers.0.{norm}.weight"] = np.ones(3)
    weights["model.embed_tokens.weight"] = rng.standard_normal((VOCABULARY, 3))
    weights["model.norm.weight"] = np.ones(3)
    return weights


@pytest.mark.spec("marginal.measure")
def test_a_matrix_of_one_size_is_not_probed() -> None:
    """A rank of k or v, and AFM's bias, hold 7 parameters; the matrix 6."""
    ids = np.array([[3, 0, 10]])
    settings = Settings(0.1, mha="afm", ffn=None, marginal=True)
    found = algorithm1.measure(odd_weights(), ODD, ids, settings)
    assert list(found.spectra[0]) == ["q", "k", "v", "o"]
    assert list(found.divergences[0]) == ["q", "o"]
    assert found.losses == []


@pytest.mark.spec("marginal.plan", "afm.bias")
def test_even_ratios_are_counted_to_the_last_parameter() -> None:
    """A rank each: 11 + 7 + 7 + 10. Of that k and v take 6, which leaves 2 more for q or o.

    q would be dense for 1, o for 2, and o is minded more. Both would need 3.
    """
    weights = odd_weights()
    settings = Settings(0.1, a=1, mha="afm", ffn=None, marginal=True, mgaa_floor=0)
    even = algorithm1.layer_sizes(llama.layer_weights(weights, 0), ODD, settings)
    assert even.ranks == dict.fromkeys("qkvo", 1)
    spectra = {m: np.arange(2.0 if m in "kv" else 3.0, 0, -1) for m in "qkvo"}
    known = algorithm1.Measurements([], [spectra], [], [{"q": 1.0, "o": 3.0}])
    (sizes,) = algorithm1.marginal_allocation(weights, ODD, settings, known)
    assert sizes == Sizes({"q": 1, "k": None, "v": None, "o": None})
