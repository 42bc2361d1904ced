"""LoRA beside dense and factored matrices (Eq. (12), (13)), and both ways to merge it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, event, example, given
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model

from lorap.config import CompressionConfig
from lorap.families import FAMILIES
from lorap.families.modeling_lorap import LowRankLinear
from lorap.ops import lora as ours
from lorap.pipeline.forward import Decoder, Samples
from lorap.pipeline.in_memory import compress
from lorap.recovery import merging
from lorap.recovery.adapter import Adapter, Update
from lorap_reference import joint, llama
from lorap_reference import lora as reference
from lorap_reference.statistics import feature_norms
from parity_tests import compare, llamas, rounding, steps, tolerances
from parity_tests import strategies as own
from parity_tests.rounding import Known
from parity_tests.tolerances import EPS32, EPS64

Array = own.Array

dtypes = st.sampled_from(((torch.float64, EPS64), (torch.float32, EPS32)))
Dtype = tuple[torch.dtype, float]
gammas = st.sampled_from((2.0, 1.0, 0.5, 16 / 7, -1.5, 0.0))


@dataclass(frozen=True)
class Case:
    """A matrix, dense and in factors, with an update and some inputs."""

    W: Array
    L: Array
    R: Array
    A: Array
    B: Array
    X: Array
    gamma: float

    def pairs(self, names: str, layout: own.Layout, dtype: torch.dtype) -> list[own.Pair]:
        return [own.pair(getattr(self, name), layout, dtype) for name in names]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw shapes, ranks from 0 on, and values of two kinds."""
    m, n = draw(own.sides(), label="d_out"), draw(own.sides(), label="d_in")
    r, r_l = draw(st.integers(0, min(m, n)), label="r"), draw(st.integers(0, 6), label="r_l")
    rng = np.random.default_rng(draw(own.seeds, label="seed"))
    whole = draw(st.booleans(), label="integers")

    def values(*shape: int) -> Array:
        found = rng.integers(-3, 4, shape) if whole else rng.standard_normal(shape)
        return found.astype(np.float64)

    return Case(
        W=values(m, n),
        L=values(m, r),
        R=values(r, n),
        A=values(m, r_l),
        B=values(r_l, n),
        X=values(draw(st.integers(0, 5), label="tokens"), n),
        gamma=draw(gammas, label="gamma"),
    )


def label(quantity: str, eps: float) -> str:
    """Return the quantity's name in the report, by the dtype computed in."""
    return quantity if eps == EPS64 else f"{quantity} (float32)"


def magnitude(*factors: Array) -> Array:
    """Return the product of the magnitudes."""
    found = np.abs(factors[0])
    for factor in factors[1:]:
        found = found @ np.abs(factor)
    return np.asarray(found)


@pytest.mark.spec("lora.dense")
@given(case=cases(), layout=own.layouts, dtype=dtypes)
def test_beside_a_dense_matrix(case: Case, layout: own.Layout, dtype: Dtype) -> None:
    W, A, B, X = pairs = case.pairs("WABX", layout, dtype[0])
    mine = ours.dense_apply(W.tensor, A.tensor, B.tensor, case.gamma, X.tensor)
    assert mine.dtype == dtype[0]
    assert all(pair.unchanged() for pair in pairs)
    (r_l, d_in), gamma = B.array.shape, case.gamma
    compare.close(
        label("update beside a dense matrix", dtype[1]),
        mine,
        reference.dense_apply(W.array, A.array, B.array, gamma, X.array),
        tolerances.updated(
            magnitude(X.array, W.array.T),
            abs(gamma) * magnitude(X.array, B.array.T, A.array.T),
            d_in,
            d_in + r_l,
            dtype[1],
        ),
    )


@pytest.mark.spec("lora.factored")
@given(case=cases(), layout=own.layouts, dtype=dtypes)
def test_beside_two_factors(case: Case, layout: own.Layout, dtype: Dtype) -> None:
    L, R, A, B, X = pairs = case.pairs("LRABX", layout, dtype[0])
    mine = ours.factored_apply(L.tensor, R.tensor, A.tensor, B.tensor, case.gamma, X.tensor)
    assert mine.dtype == dtype[0]
    assert all(pair.unchanged() for pair in pairs)
    (r_l, d_in), gamma = B.array.shape, case.gamma
    compare.close(
        label("update beside two factors", dtype[1]),
        mine,
        reference.factored_apply(L.array, R.array, A.array, B.array, gamma, X.array),
        tolerances.updated(
            magnitude(X.array, R.array.T, L.array.T),
            abs(gamma) * magnitude(X.array, B.array.T, A.array.T),
            d_in + R.array.shape[0],
            d_in + r_l,
            dtype[1],
        ),
    )


@pytest.mark.spec("lora.scaling")
@given(alpha=st.floats(1e-3, 1e3), rank=st.integers(1, 512))
def test_scaling(alpha: float, rank: int) -> None:
    compare.exact("factor of an update", ours.scaling(alpha, rank), reference.scaling(alpha, rank))


@pytest.mark.spec("lora.gradient")
@given(case=cases(), seed=own.seeds)
def test_gradients(case: Case, seed: int) -> None:
    """By hand, by autograd, by differences, and by way of the gradient of the whole matrix."""
    assume(case.A.size > 0)
    assume(case.X.size > 0)
    A, B, X = (torch.tensor(m, requires_grad=True) for m in (case.A, case.B, case.X))
    dy = np.random.default_rng(seed).standard_normal((len(case.X), len(case.W)))
    W, L, R = (torch.tensor(m) for m in (case.W, case.L, case.R))
    theirs = reference.gradients(case.A, case.B, case.gamma, case.X, dy)
    gamma, (r_l, d_in), tokens = abs(case.gamma), case.B.shape, len(case.X)
    bounds = [
        # Rows of dy and of X B^T; of dy A and of X.
        gamma * tolerances.inner(tokens + d_in + 2, magnitude(dy.T, case.X, case.B.T)),
        gamma * tolerances.inner(tokens + len(case.W) + 2, magnitude(case.A.T, dy.T, case.X)),
    ]
    for beside in ("dense", "factored"):
        for leaf in (A, B):
            leaf.grad = None
        y = (
            ours.dense_apply(W, A, B, case.gamma, X)
            if beside == "dense"
            else ours.factored_apply(L, R, A, B, case.gamma, X)
        )
        (y * torch.tensor(dy)).sum().backward()
        for name, leaf, expected, bound in zip("AB", (A, B), theirs[:2], bounds, strict=True):
            compare.close(f"gradient by {name}", leaf.grad, expected, bound)
    by_matrix = reference.gradients_of_update(dy.T @ case.X, case.A, case.B, case.gamma)
    for name, found, expected, bound in zip("AB", by_matrix, theirs[:2], bounds, strict=True):
        compare.close(f"gradient by {name}, from the matrix's", found, expected, bound)

    def loss(A: Array, B: Array) -> float:
        return float(
            np.sum(dy * reference.factored_apply(case.L, case.R, A, B, case.gamma, case.X))
        )

    def rounded(A: Array, B: Array) -> float:
        beside = magnitude(case.X, case.R.T, case.L.T)
        update = gamma * magnitude(case.X, B.T, A.T)
        terms = d_in + max(len(case.R), r_l) + dy.size
        return float(np.sum(tolerances.updated(np.abs(dy) * beside, np.abs(dy) * update, terms, 0)))

    # Linear in each of the two: any step is exact but for rounding.
    for k in range(r_l):
        i, j = k % len(case.W), k % d_in
        step_A, step_B = np.zeros_like(case.A), np.zeros_like(case.B)
        step_A[i, k], step_B[k, j] = 1, 1
        at_A = [(case.A + sign * step_A, case.B) for sign in (1, -1)]
        at_B = [(case.A, case.B + sign * step_B) for sign in (1, -1)]
        for name, (up, down), expected, bound in (
            ("A", at_A, theirs[0][i, k], bounds[0][i, k]),
            ("B", at_B, theirs[1][k, j], bounds[1][k, j]),
        ):
            difference = (loss(*up) - loss(*down)) / 2
            allowed = bound + (rounded(*up) + rounded(*down)) / 2
            compare.close(f"gradient by {name}, from differences", difference, expected, allowed)


@pytest.mark.spec("lora.factored", "lora.scaling", "lora.gradient")
@given(case=cases(), biased=st.booleans())
def test_the_layer_that_peft_is_given(case: Case, biased: bool) -> None:
    """Forward and gradients of ``FactoredLora`` around a factored linear."""
    (r_l, d_in), r = case.B.shape, case.L.shape[1]
    assume(r_l > 0)
    assume(r > 0)
    factored = LowRankLinear(d_in, len(case.W), r, bias=biased, dtype=torch.float64)
    factored.left.weight.data, factored.right.weight.data = map(torch.tensor, (case.L, case.R))
    model = torch.nn.ModuleDict({"q": factored})
    config = LoraConfig(r=r_l, lora_alpha=case.gamma * r_l, target_modules=["q"])  # type: ignore[arg-type]
    layer: Any = inject_adapter_in_model(config, model)["q"]
    A, B = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    assert A.abs().sum() == 0, "a new update must change nothing"
    assert (A.shape, B.shape) == (case.A.shape, case.B.shape)
    A.data, B.data = torch.tensor(case.A), torch.tensor(case.B)
    X = torch.tensor(case.X, requires_grad=True)
    y = layer(X)
    gamma = reference.scaling(case.gamma * r_l, r_l)
    expected = reference.factored_apply(case.L, case.R, case.A, case.B, gamma, case.X)
    beside = magnitude(case.X, case.R.T, case.L.T)
    if biased:
        bias = compare.as_array(factored.left.bias)
        expected, beside = expected + bias, beside + np.abs(bias)
    update = abs(gamma) * magnitude(case.X, case.B.T, case.A.T)
    compare.close(
        "PEFT's layer around two factors",
        y,
        expected,
        tolerances.updated(beside, update, d_in + r + 1, d_in + r_l),
    )
    dy = np.ones(y.shape)
    y.sum().backward()
    theirs = reference.gradients(case.A, case.B, gamma, case.X, dy)
    tokens = len(case.X)
    for name, leaf, by_hand, size in (
        ("A", A, theirs[0], magnitude(dy.T, case.X, case.B.T)),
        ("B", B, theirs[1], magnitude(case.A.T, dy.T, case.X)),
    ):
        bound = abs(gamma) * tolerances.inner(tokens + sum(case.W.shape) + 2, size)
        compare.close(f"gradient by {name} in PEFT's layer", leaf.grad, by_hand, bound)


@pytest.mark.spec("lora.merge-dense")
@given(case=cases(), layout=own.layouts, dtype=dtypes)
def test_merge_dense(case: Case, layout: own.Layout, dtype: Dtype) -> None:
    W, A, B = pairs = case.pairs("WAB", layout, dtype[0])
    mine = ours.merge_dense(W.tensor, A.tensor, B.tensor, case.gamma)
    assert mine.dtype == dtype[0]
    assert all(pair.unchanged() for pair in pairs)
    update = abs(case.gamma) * magnitude(A.array, B.array)
    compare.close(
        label("merged dense matrix", dtype[1]),
        mine,
        reference.merge_dense(W.array, A.array, B.array, case.gamma),
        tolerances.updated(np.abs(W.array), update, 0, B.array.shape[0], dtype[1]),
    )


@pytest.mark.spec("lora.merge-factors")
@given(case=cases(), layout=own.layouts, dtype=dtypes)
def test_merge_factors(case: Case, layout: own.Layout, dtype: Dtype) -> None:
    L, R, A, B, X = pairs = case.pairs("LRABX", layout, dtype[0])
    left, right = ours.merge_factors(L.tensor, R.tensor, A.tensor, B.tensor, case.gamma)
    assert left.dtype == right.dtype == dtype[0]
    L_new, R_new = reference.merge_factors(L.array, R.array, A.array, B.array, case.gamma)
    compare.exact("merged right factor", right, R_new)
    # Both round one product; float32 the factor too.
    bound = 0.0 if dtype[1] == EPS64 else tolerances.SECOND_ORDER * dtype[1]
    compare.relatively_close(label("merged left factor", dtype[1]), left, L_new, bound)
    # The merged factors compute what the factors and the update beside them do.
    r, r_l, d_in = L.array.shape[1], *B.array.shape
    compare.close(
        "merged factors, from those with the update beside them",
        reference.factored_apply(L_new, R_new, A.array[:, :0], B.array[:0], 1.0, X.array),
        reference.factored_apply(L.array, R.array, A.array, B.array, case.gamma, X.array),
        tolerances.updated(
            magnitude(X.array, R.array.T, L.array.T),
            abs(case.gamma) * magnitude(X.array, B.array.T, A.array.T),
            d_in + r + r_l,
            d_in + r + r_l,
        ),
    )
    assert all(pair.unchanged() for pair in pairs)


@pytest.mark.spec("lora.break-even")
@given(
    shape=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    r=st.integers(0, 80),
    r_l=st.integers(0, 80),
)
# At break-even itself.
@example(shape=(12, 4), r=1, r_l=2)
@example(shape=(12, 8), r=1, r_l=2)
def test_break_even(shape: own.Shape, r: int, r_l: int) -> None:
    theirs = reference.merged_rank(shape, r, r_l)
    assert ours.merged_rank(shape, r, r_l) == theirs
    # Factors that hold less, and no others.
    assert (theirs is not None) == ((r + r_l) * sum(shape) < shape[0] * shape[1])
    assert theirs in (None, r + r_l)


@pytest.mark.spec("lora.joint")
@given(
    sizes=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=4),
    d_in=st.integers(1, 6),
    layout=own.layouts,
    seed=own.seeds,
)
def test_stacked_updates(
    sizes: list[tuple[int, int]], d_in: int, layout: own.Layout, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pairs = [
        (
            own.pair(rng.standard_normal((rows, r_l)), layout),
            own.pair(rng.standard_normal((r_l, d_in)), layout),
        )
        for rows, r_l in sizes
    ]
    left, right = ours.stacked_update([(A.tensor, B.tensor) for A, B in pairs])
    A_all, B_all = reference.stacked_update([(A.array, B.array) for A, B in pairs])
    compare.exact("stacked updates, A", left, A_all)
    compare.exact("stacked updates, B", right, B_all)
    each = joint.split(A_all @ B_all, [rows for rows, _ in sizes])
    for found, (A, B) in zip(each, pairs, strict=True):
        bound = tolerances.inner(B_all.shape[0] + 1, magnitude(A.array, B.array))
        compare.close("product of a stacked update", found, A.array @ B.array, bound)
    assert all(pair.unchanged() for both in pairs for pair in both)


@pytest.mark.spec("lora.merge-same-size", "lora.break-even", "precision.decomposition")
@given(case=cases(), layout=own.layouts, dtype=dtypes, data=st.data())
def test_merge_same_size(case: Case, layout: own.Layout, dtype: Dtype, data: st.DataObject) -> None:
    L, R, A, B = pairs = case.pairs("LRAB", layout, dtype[0])
    x = data.draw(own.norm_vectors(case.W.shape[1]), label="norms")
    parts = (L.array, R.array, A.array, B.array)
    r, r_l, shape = L.array.shape[1], B.array.shape[0], (case.W.shape[0], case.W.shape[1])
    M = reference.merge_dense(L.array @ R.array, A.array, B.array, case.gamma)
    off = tolerances.updated(
        magnitude(L.array, R.array), abs(case.gamma) * magnitude(A.array, B.array), r, r + r_l
    )
    tensors = [pair.tensor for pair in pairs]
    compare.close("merged product", ours.merged_product(*tensors, case.gamma), M, off)
    left, right, S = ours.merge_same_size(*tensors, case.gamma, torch.from_numpy(x))
    assert left.dtype == right.dtype == S.dtype == torch.float64
    assert all(pair.unchanged() for pair in pairs)
    L_new, R_new, S_reference = reference.merge_same_size(*parts, case.gamma, x)
    assert (left.shape, right.shape) == (L_new.shape, R_new.shape) == (case.L.shape, case.R.shape)
    delta = float(np.linalg.norm(off * x))
    compare.squared_singular_values(
        "singular values of the merged product", S, S_reference, shape, delta
    )
    bound = tolerances.awsvd_product(M, x, r, EPS64, delta=delta)
    event("compared" if bound is not None else "not determined")
    if bound is not None:
        compare.spectral(
            "product cut back to its rank",
            compare.as_array(left) @ compare.as_array(right),
            L_new @ R_new,
            bound + float(np.linalg.norm(off)),
        )


METHODS: tuple[dict[str, Any], ...] = (
    {},
    {"joint_qk": True},
    {"mha": "svd", "ffn": "svd"},
    {"mha": "pca", "ffn": "pca", "joint_qk": True},
    {"mha": "afm", "ffn": "afm"},
    {"sublayers": ("ffn",)},
)


@dataclass(frozen=True)
class Recovered:
    """A compressed model with updates, as both sides get it."""

    decoder: Decoder
    adapter: Adapter
    weights: dict[str, Array]
    updates: list[dict[str, reference.Update]]
    shape: llama.LlamaShape
    ids: own.Ids

    @property
    def plans(self) -> list[merging.LayerMerge]:
        family, config = self.decoder.family, self.decoder.config
        return [
            merging.LayerMerge.of(family, config, index, updates)
            for index, updates in enumerate(self.adapter.layers)
        ]


@st.composite
def recovered(draw: st.DrawFn, on: tuple[str, ...]) -> Recovered:
    """Draw a model, how it is compressed, and updates of some of its linears, or of factors."""
    llama_ = draw(own.small_llamas(), label="model")
    ids = own.calibration_ids(llama_, draw(st.integers(1, 3), label="samples"), 6)
    dense = llama_.model()
    config = CompressionConfig(
        ratio=draw(st.sampled_from((0.1, 0.3, 0.5)), label="ratio"),
        ratio_scope="layer",
        dtype="float64",
        **draw(st.sampled_from(METHODS), label="method"),
    )
    assume(llamas.reachable(dense, config))
    small = compress(dense, config, calibration=torch.from_numpy(ids))
    factors = draw(st.sampled_from(on), label="on") == "factors"
    rng = np.random.default_rng(draw(own.seeds, label="seed"))
    # One rank for all, as an adapter has it.
    r_l, gamma = draw(st.integers(1, 3), label="r_l"), draw(gammas, label="gamma")
    theirs: list[dict[str, reference.Update]] = [{} for _ in range(llama_.shape.layers)]
    for index, layer in enumerate(small.model.layers):
        for name, module in layer.named_modules():
            if not hasattr(module, "in_features") or rng.random() < 0.2:
                continue
            is_factor = name.endswith(("left", "right"))
            if isinstance(module, torch.nn.Linear) if factors else not is_factor:
                A = rng.standard_normal((module.out_features, r_l)) / 4
                B = rng.standard_normal((r_l, module.in_features)) / 4
                theirs[index][name] = reference.Update(A, B, gamma)
    mine = [
        {name: Update(torch.tensor(u.A), torch.tensor(u.B), u.gamma) for name, u in layer.items()}
        for layer in theirs
    ]
    return Recovered(
        decoder_of_compressed(small),
        Adapter(Path(), mine),
        llamas.reference_weights(small),
        theirs,
        llama_.shape,
        ids,
    )


def decoder_of_compressed(small: Any) -> Decoder:
    """Return a compressed model in memory layer by layer."""
    state = {name: tensor.detach() for name, tensor in small.state_dict().items()}

    def load(index: int) -> dict[str, torch.Tensor]:
        start = f"model.layers.{index}."
        return {name.removeprefix(start): t for name, t in state.items() if name.startswith(start)}

    def load_others(with_head: bool) -> dict[str, torch.Tensor]:
        return {name: t for name, t in state.items() if not name.startswith("model.layers.")}

    return Decoder(
        FAMILIES["llama"], small.config, load, load_others, torch.device("cpu"), torch.float64
    )


def product_bound(layer: dict[str, Array], name: str, update: reference.Update | None) -> Array:
    """Return how far the two sides' ``L R + gamma A B`` are apart, entry by entry."""
    L, R = layer[f"{name}.left.weight"], layer[llama.right_name(layer, name)]
    moved = 0.0 if update is None else abs(update.gamma) * magnitude(update.A, update.B)
    ranks = 0 if update is None else 2 * len(update.B)
    return tolerances.updated(magnitude(L, R), np.asarray(moved), len(R) + ranks, 0)


def merging_bounds(
    layer: dict[str, Array], updates: dict[str, reference.Update], exact: dict[str, Array]
) -> dict[str, Array]:
    """Return how far the two sides' exactly merged matrices are apart, entry by entry."""
    bounds = {}
    for name in exact:
        linear, _, kind = name.rpartition(".")
        update = updates.get(linear)
        if kind != "weight":
            continue
        if name not in layer:
            bounds[name] = product_bound(layer, linear, update)
        elif update is not None and exact[name].shape == layer[name].shape:
            moved = abs(update.gamma) * magnitude(update.A, update.B)
            bounds[name] = tolerances.updated(np.abs(layer[name]), moved, 0, len(update.B))
    return bounds


@pytest.mark.spec(
    "lora.sequence", "lora.merge-dense", "lora.merge-factors", "lora.joint", "lora.break-even"
)
@given(case=recovered(on=("matrices", "factors")))
@own.of_whole_models
@llamas.float64_throughout()
def test_exactly_merged_layers(case: Recovered) -> None:
    merged = merging.merge_exactly(case.decoder, case.adapter, case.plans)
    h, layers = llama.embed(case.weights, case.ids), []
    for index, found in enumerate(merged):
        layer, updates = llama.layer_weights(case.weights, index), case.updates[index]
        exact = reference.merge_exact(layer, updates)
        h = llama.layer_forward(exact, case.shape, h).output
        layers.append((exact, h))
        assert found.tensors.keys() == exact.keys()
        event("became dense" if exact.keys() - layer.keys() else "as before")
        bounds = merging_bounds(layer, updates, exact)
        for name, expected in exact.items():
            ours_ = found.tensors[name]
            compare.close("exactly merged weights", ours_, expected, bounds.get(name, 0.0))
    h = llama.embed(case.weights, case.ids)
    for index, (exact, expected) in enumerate(layers):
        layer = llama.layer_weights(case.weights, index)
        new, h = reference.merge_layer(layer, case.shape, h, case.updates[index], "exact")
        assert_same(new, exact)
        assert np.array_equal(h, expected)
    check_whole_model(case, "exact", [new for new, _ in layers])


def assert_same(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def check_whole_model(
    case: Recovered, mode: reference.Mode, layers: list[dict[str, Array]]
) -> None:
    """Assert that the reference merges a model layer by layer, and leaves the rest alone."""
    expected = {n: value for n, value in case.weights.items() if not n.startswith("model.layers.")}
    for index, layer in enumerate(layers):
        expected |= {f"model.layers.{index}.{name}": value for name, value in layer.items()}
    whole = reference.merge(case.weights, case.shape, case.ids, case.updates, mode)
    assert_same(whole, expected)


@pytest.mark.spec("lora.sequence", "lora.merge-same-size", "lora.joint")
@given(case=recovered(on=("matrices",)))
@own.of_whole_models
@llamas.float64_throughout()
def test_layers_cut_back_to_size(case: Recovered) -> None:
    samples = Samples(torch.from_numpy(case.ids))
    merged = merging.merge_to_size(case.decoder, case.adapter, case.plans, samples)
    h, layers = llama.embed(case.weights, case.ids), []
    for index, of_layer in enumerate(case.updates):
        layer = llama.layer_weights(case.weights, index)
        new, h = reference.merge_layer(layer, case.shape, h, of_layer, "same-size")
        layers.append(new)
    check_whole_model(case, "same-size", layers)
    h = llama.embed(case.weights, case.ids)
    known = Known(h, np.zeros_like(h))
    for index, found in enumerate(merged):
        layer, updates = llama.layer_weights(case.weights, index), case.updates[index]
        exact = reference.merge_exact(layer, updates)
        off = {
            name.removesuffix(".weight"): float(np.linalg.norm(bound))
            for name, bound in merging_bounds(layer, updates, exact).items()
        }
        spreads = rounding.layer_spreads(rounding.Layer(exact, case.shape, off), known)
        trace = llama.layer_forward(exact, case.shape, known.value)
        theirs, output = reference.merge_layer(layer, case.shape, known.value, updates, "same-size")
        assert {name: tuple(tensor.shape) for name, tensor in found.tensors.items()} == {
            name: value.shape for name, value in theirs.items()
        }
        for group in case.plans[index].groups:
            m = "qk" if len(group.names) > 1 else group.names[0].split(".")[1].split("_")[0]
            X, spread = (
                getattr(trace, steps.INPUTS.get(m, "attention")),
                steps.input_spread(m, spreads),
            )
            tokens = X.reshape(-1, X.shape[-1])
            x, moved = feature_norms(tokens), rounding.norm_bounds(X, spread)
            parts = [(layer, name, updates.get(name)) for name in group.names]
            M = np.concatenate([merged_matrix(*part) for part in parts])
            rough = np.concatenate([product_bound(*part) for part in parts])
            delta = rounding.weighted_bound(M, moved) + float(np.linalg.norm(rough * (x + moved)))
            bound = tolerances.awsvd_product(M, x, group.rank, EPS64, delta=delta)
            if bound is None:
                event("not determined")
                return
            bound += float(np.linalg.norm(rough))
            off |= dict.fromkeys(group.names, bound)
            compare.spectral(
                "products cut back to their rank",
                steps.product(found.tensors, m),
                steps.product(theirs, m),
                bound,
            )
        event("determined")
        for name, expected in theirs.items():
            if name in layer and name.removesuffix(".weight") in updates:
                compare.close(
                    "dense weights with their updates",
                    found.tensors[name],
                    expected,
                    merging_bounds(layer, updates, theirs)[name],
                )
        spread = rounding.layer_spreads(rounding.Layer(theirs, case.shape, off), known).output
        outputs = torch.cat([kept.load() for kept in found.outputs])
        llamas.close("inputs of the next layer, merged", outputs, output, spread)
        known = Known(output, spread)


def merged_matrix(layer: dict[str, Array], name: str, update: reference.Update | None) -> Array:
    """Return ``L R + gamma A B``."""
    product = layer[f"{name}.left.weight"] @ layer[llama.right_name(layer, name)]
    return product if update is None else product + update.gamma * (update.A @ update.B)
