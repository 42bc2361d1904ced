"""Algorithm 1 whole: the reference on arrays against the pipeline on transformers' modules."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from lorap.config import CompressionConfig, FfnMethod, MhaMethod
from lorap.demo import MODEL
from lorap.pipeline.in_memory import compress
from lorap_reference import algorithm1, budget, llama, mgaa
from parity_tests import compare, llamas, rounding, steps, tolerances
from parity_tests import strategies as own
from parity_tests.rounding import Known, Precision
from parity_tests.tolerances import EPS32

SUBLAYERS: tuple[tuple[Literal["mha", "ffn"], ...], ...] = (
    ("mha", "ffn"),
    ("mha", "ffn"),
    ("ffn",),
    ("mha",),
)
RATIOS = (0.05, 0.1, 0.2, 0.3, 0.34, 0.4, 0.5, 0.6, 0.7)


IMPORTANCE = ("activation", "activation", "magnitude", "taylor")


@st.composite
def methods(draw: st.DrawFn, importance: Sequence[str] = IMPORTANCE) -> dict[str, Any]:
    """Draw what becomes of the sub-layers; one half of the draws are the paper's own method."""
    sublayers = draw(st.sampled_from(SUBLAYERS), label="sublayers")
    if draw(st.booleans(), label="as in the paper"):
        chosen: dict[str, Any] = {"mha": "awsvd", "ffn": "channels"}
    else:
        chosen = {
            "mha": draw(st.sampled_from(get_args(MhaMethod)), label="mha"),
            "ffn": draw(st.sampled_from(get_args(FfnMethod)), label="ffn"),
        }
    used = {chosen[sublayer] for sublayer in sublayers}
    settings: dict[str, Any] = {name: chosen[name] for name in sublayers}
    settings["sublayers"] = sublayers
    low_rank_attention = "mha" in sublayers and chosen["mha"] != "heads"
    allocations: list[float | str] = [3.0]
    if low_rank_attention:
        allocations += [1.0, 0.5]
        settings["joint_qk"] = draw(st.booleans(), label="joint_qk")
    if used - {"heads", "channels"}:
        allocations.append("mgaa-within")
    allocations += ["mgaa-between"]
    if used - {"heads", "channels"}:
        allocations.append("mgaa")
    settings["allocation"] = draw(st.sampled_from(allocations), label="allocation")
    if "awsvd" in used:
        settings["weighting"] = draw(st.sampled_from(("eq7", "eq7", "eq6")), label="weighting")
    if "asvd" in used:
        settings["asvd_alpha"] = draw(st.sampled_from((0.5, 1.0, 0.0, 1.5)), label="asvd_alpha")
    if used & {"heads", "channels"}:
        settings["update"] = draw(st.sampled_from(("none", "least-squares")), label="update")
        if "channels" in used and draw(st.integers(0, 3), label="obs") == 0:
            settings["selection"] = "obs"
        if "selection" in settings or settings["update"] != "none":
            settings["ridge"] = draw(st.sampled_from((1e-4, 1e-6, 0.1)), label="ridge")
    if "heads" in used or ("channels" in used and "selection" not in settings):
        settings["importance"] = draw(st.sampled_from(importance), label="importance")
        settings["aggregation"] = draw(st.sampled_from(("l2", "l1", "linf")), label="aggregation")
        settings["least_important"] = draw(st.sampled_from((0.0, 0.01, 0.1)), label="least")
    if used != {"heads"}:
        settings["multiple_of"] = draw(st.sampled_from((1, 1, 2, 3)), label="multiple_of")
    if settings["allocation"] in ("mgaa", "mgaa-between"):
        settings["mgaa_alpha"] = draw(st.sampled_from((0.35, 0.05, 0.0)), label="mgaa_alpha")
    return settings


@st.composite
def configs(draw: st.DrawFn, model: own.SmallLlama, importance: Sequence[str]) -> CompressionConfig:
    """Draw a configuration whose ratio the model can reach."""
    config = CompressionConfig(
        ratio=0.05,
        ratio_scope=draw(st.sampled_from(("layer", "model")), label="ratio_scope"),
        batch_size=draw(st.sampled_from((None, 1, 2)), label="batch_size"),
        dtype="float64",
        **draw(methods(importance)),
    )
    dense = model.model()
    if config.multiple_of > most(model, config):
        config = replace(config, multiple_of=1)
    within_reach = [
        other
        for ratio in RATIOS
        if llamas.reachable(dense, other := replace(config, ratio=ratio))
        and within_budget(dense, other)
    ]
    if not within_reach:
        # A width of 5 or more always has a channel to lose.
        return CompressionConfig(
            ratio=0.05, ratio_scope="layer", sublayers=("ffn",), dtype="float64"
        )
    return draw(st.sampled_from(within_reach), label="config")


def most(model: own.SmallLlama, config: CompressionConfig) -> int:
    """Return the largest rank or width that the model can keep and still be smaller."""
    settings = llamas.reference_settings(config, model.model())
    layer, sizes = llama.layer_weights(model.weights(), 0), [1]
    for sublayer in settings.sublayers:
        if settings.low_rank(sublayer) is not None:
            for W in algorithm1.matrices(layer, sublayer, settings).values():
                d_out, d_in = W.shape
                sizes.append(ceil(budget.break_even_rank((d_out, d_in))) - 1)
        elif sublayer == "ffn":
            sizes.append(model.width - 1)
    return max(sizes)


def within_budget(model: PreTrainedModel, config: CompressionConfig) -> bool:
    """Tell whether MGAA leaves every module something, whatever is measured.

    At the highest ratio that a sub-layer may get, one rank for each matrix must fit.
    """
    if isinstance(config.allocation, float):
        return True
    settings = llamas.reference_settings(config, model)
    highest = mgaa.highest_ratio(settings.layer_ratio, settings.mgaa_floor)
    even = replace(config.without_measurements(), ratio=highest, ratio_scope="layer")
    if not 0 < highest < 1 or not llamas.reachable(model, even):
        return False
    layer = llama.layer_weights(llamas.reference_weights(model), 0)
    for sublayer in settings.sublayers:
        if settings.low_rank(sublayer) is not None:
            W = algorithm1.matrices(layer, sublayer, settings).values()
            if sum(sum(w.shape) for w in W) > (1 - highest) * sum(w.size for w in W):
                return False
    return True


@st.composite
def cases(
    draw: st.DrawFn, importance: Sequence[str] = IMPORTANCE
) -> tuple[own.SmallLlama, CompressionConfig, own.Ids]:
    """Draw a model, a configuration and calibration ids."""
    model = draw(own.small_llamas(), label="model")
    config = draw(configs(model, importance))
    # The loss of a gradient needs a token to predict.
    shortest = 2 if config.importance == "taylor" else 1
    length = draw(st.integers(shortest, 8), label="L")
    samples = draw(st.integers(1, 3), label="samples")
    return model, config, own.calibration_ids(model, samples, length)


Case = tuple[own.SmallLlama, CompressionConfig, own.Ids]


@pytest.mark.spec(
    "algorithm.sequence",
    "algorithm.mha",
    "algorithm.ffn",
    "algorithm.low-rank",
    "algorithm.heads",
    "algorithm.scores",
    "algorithm.update",
    "obs.keep",
    "budget.layer-ratio",
    "budget.multiple",
    "mgaa.measure",
    "mgaa.plan",
)
@own.of_whole_models
@given(case=cases())
@llamas.float64_throughout()
def test_each_layer(case: Case) -> None:
    llama_, config, ids = case
    model = llama_.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for verdict in steps.check_each_layer(model, config, ids, Precision(), "layer: "):
        event("determined" if verdict.output is not None else "not determined")
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.spec("algorithm.sequence")
@own.of_whole_models
@given(case=cases())
@llamas.float64_throughout()
def test_whole_model(case: Case) -> None:
    llama_, config, ids = case
    model = llama_.model()
    compared = steps.check_chain(model, config, ids, Precision(), "model: ")
    weights, shape = llama_.weights(), llama_.shape
    new, _ = algorithm1.compress(weights, shape, ids, llamas.reference_settings(config, model))

    compressed = compress(model, config, calibration=torch.from_numpy(ids))
    with torch.no_grad():
        logits = compare.as_array(compressed(input_ids=torch.from_numpy(ids)).logits)
    # Whatever is determined: our weights, run by the reference, give our logits.
    mine = llamas.reference_weights(compressed)
    expected, spread = llamas.forward(mine, shape, ids, Precision())
    llamas.close("model: logits of our weights", logits, expected, spread)
    determined = len(compared) == shape.layers
    event("determined" if determined else "not determined")
    if determined:
        spread = rounding.logit_spreads(weights, shape, compared[-1])
        llamas.close("model: logits", logits, llama.logits(new, shape, ids), spread)


@pytest.mark.spec("algorithm.sequence")
def test_the_defaults_of_both_sides_are_the_same() -> None:
    model = own.SmallLlama(llama.LlamaShape(1, 2, 2, 2), 4, 6, 8, False, False, False, 0).model()
    config = CompressionConfig(ratio=0.2, ratio_scope="layer")
    assert llamas.reference_settings(config, model) == algorithm1.Settings(0.2)


@pytest.mark.spec("algorithm.sequence", "algorithm.mha", "algorithm.ffn")
@own.of_whole_models
@given(case=cases(importance=("activation", "magnitude")))
def test_each_layer_as_transformers_ships_it(case: Case) -> None:
    """RMSNorm and the rotary angles in float32, as users run it: the bounds widen accordingly.

    Those of gradients (``tracked``) know of float64 alone.
    """
    llama_, config, ids = case
    verdicts = steps.check_each_layer(
        llama_.model(), config, ids, llamas.AS_SHIPPED, "layer as shipped: "
    )
    for verdict in verdicts:
        event("determined" if verdict.output is not None else "not determined")


@pytest.mark.spec("stats.padding", "algorithm.sequence")
@own.of_whole_models
@given(case=cases(), padding=st.integers(1, 5), seed=own.seeds)
@llamas.float64_throughout()
def test_padding_changes_nothing(case: Case, padding: int, seed: int) -> None:
    """Samples padded with arbitrary tokens on the right, and masked, compress as without them."""
    llama_, config, ids = case
    model = llama_.model()
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, llama_.vocabulary, (ids.shape[0], padding))
    padded = np.concatenate([ids, noise], axis=1)
    mask = np.arange(padded.shape[1])[None, :].repeat(len(ids), axis=0) < ids.shape[1]
    weights, shape = llama_.weights(), llama_.shape
    settings = llamas.reference_settings(config, model)
    run = llamas.torch_run(model, config, padded, mask)
    steps.check_measurements(run, weights, shape, ids, settings, Precision(), "padded: ")
    step = steps.steps_of(run, weights, shape, ids, settings, Precision(), "padded: ")
    h = llama.embed(weights, ids)
    known: Known | None = Known(h, np.zeros_like(h))
    for ours, output in zip(run.layers, run.outputs, strict=True):
        if known is None:
            return
        trimmed = output[:, : ids.shape[1]]
        known = steps.check_layer(ours, trimmed, step(ours.index, known)).output


@pytest.mark.spec("algorithm.sequence")
@own.of_whole_models
@given(llama_=own.small_llamas(), samples=st.integers(1, 3), length=st.integers(1, 12))
def test_the_reference_is_the_model_that_transformers_runs(
    llama_: own.SmallLlama, samples: int, length: int
) -> None:
    ids = own.calibration_ids(llama_, samples, length)
    precision = Precision(EPS32, EPS32, EPS32)
    model = llama_.model(torch.float32)
    weights = llamas.reference_weights(model)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)).logits
    expected, spread = llamas.forward(weights, llama_.shape, ids, precision)
    llamas.close("logits of the dense model (float32)", logits, expected, spread)


@pytest.fixture(scope="module")
def embedded() -> PreTrainedModel:
    """The embedded model, in float64."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()


@pytest.fixture(scope="module")
def embedded_ids(embedded: PreTrainedModel) -> own.Ids:
    """Three rows of 64 tokens, sampled from the model itself."""
    torch.manual_seed(0)
    start = torch.randint(embedded.config.vocab_size, (3, 1))
    rows = embedded.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        min_length=64,
        max_length=64,
        pad_token_id=0,
    )
    return rows.numpy()


@pytest.mark.spec("algorithm.sequence", "algorithm.mha", "algorithm.ffn")
@pytest.mark.parametrize("ratio", [0.2, 0.5])
@llamas.float64_throughout()
def test_each_layer_of_the_embedded_model(
    embedded: PreTrainedModel, embedded_ids: own.Ids, ratio: float
) -> None:
    config = CompressionConfig(ratio=ratio, ratio_scope="layer", dtype="float64")
    verdicts = steps.check_each_layer(
        embedded, config, embedded_ids, Precision(), "embedded layer: "
    )
    assert all(verdict.output is not None for verdict in verdicts)


@pytest.mark.spec("algorithm.sequence")
@pytest.mark.parametrize("ratio", [0.2, 0.5])
@llamas.float64_throughout()
def test_the_embedded_model_whole(
    embedded: PreTrainedModel, embedded_ids: own.Ids, ratio: float
) -> None:
    """Both sides on their own from the first layer to the logits."""
    config = CompressionConfig(ratio=ratio, ratio_scope="layer", dtype="float64")
    shape = llamas.reference_shape(embedded)
    compared = steps.check_chain(embedded, config, embedded_ids, Precision(), "embedded model: ")
    assert len(compared) >= 2

    weights, settings = (
        llamas.reference_weights(embedded),
        llamas.reference_settings(config, embedded),
    )
    new, layers = algorithm1.compress(weights, shape, embedded_ids, settings)
    compressed = compress(embedded, config, calibration=torch.from_numpy(embedded_ids))
    with torch.no_grad():
        logits = compare.as_array(compressed(input_ids=torch.from_numpy(embedded_ids)).logits)
    expected, spread = llamas.forward(
        llamas.reference_weights(compressed), shape, embedded_ids, Precision()
    )
    llamas.close("embedded model: logits of our weights", logits, expected, spread)

    theirs = llama.logits(new, shape, embedded_ids)
    # The bounds of one layer upon another are too wide after a few; how much the whole algorithm
    # magnifies a small error is measured on the reference instead.
    nudge = 1e-9
    embeddings = weights["model.embed_tokens.weight"]
    noise = 1 + nudge * np.random.default_rng(0).standard_normal(embeddings.shape)
    nudged = {**weights, "model.embed_tokens.weight": embeddings * noise}
    other, other_layers = algorithm1.compress(nudged, shape, embedded_ids, settings)
    for one, two in zip(layers, other_layers, strict=True):
        assert np.array_equal(one.kept, two.kept), "the nudge must not change what is kept"
    moved = np.max(np.abs(llama.logits(other, shape, embedded_ids) - theirs))
    bound = tolerances.measured_condition(
        moved / nudge, shape.layers, embedded.config.intermediate_size
    )
    compare.close("embedded model: logits", logits, theirs, bound)


STAGED: dict[str, dict[str, Any]] = {
    "best": {"mha": "pca", "selection": "obs", "update": "least-squares"},
    "plain": {},
    "heads": {"ratio": 0.5, "mha": "heads", "update": "least-squares", "aggregation": "l1"},
    "heads alone": {"ratio": 0.5, "sublayers": ("mha",), "mha": "heads", "importance": "taylor"},
    "joint": {"mha": "asvd", "ffn": "pca", "joint_qk": True},
    "afm": {"mha": "afm", "ffn": "afm"},
    "taylor": {"importance": "taylor", "mha": "svd"},
    "ffn": {"sublayers": ("ffn",), "selection": "obs"},
    "mha": {"sublayers": ("mha",), "mha": "pca", "allocation": "mgaa"},
}


NUDGE = 1e-9


@dataclass(frozen=True)
class Sides:
    """What both sides make of a small model, each on its own, with padding on ours.

    Attributes
    ----------
    llama : own.SmallLlama
    ids : (N, L)
        Calibration samples, without padding.
    settings : algorithm1.Settings
    layers, nudged : list of algorithm1.CompressedLayer
        The reference's, of the model and of one that is off by ``NUDGE``.
    logits, moved : (N, L, vocabulary)
        Likewise.
    weights : dict
        Ours.
    losses : list of list of float
        Ours, of the refinement by layer.
    """

    llama: own.SmallLlama
    ids: own.Ids
    settings: algorithm1.Settings
    layers: list[algorithm1.CompressedLayer]
    nudged: list[algorithm1.CompressedLayer]
    logits: own.Array
    moved: own.Array
    weights: dict[str, own.Array]
    losses: list[list[float]]

    def bound(self, there: own.Array, here: own.Array) -> float:
        """Bound on what the nudge moves from here to there, after all layers."""
        moved = float(np.max(np.abs(there - here)))
        return tolerances.measured_condition(
            moved / NUDGE, self.llama.shape.layers, self.llama.width
        )


def both_sides(llama_: own.SmallLlama, quantity: str, **settings: Any) -> Sides:
    """Compress a model on both sides, and compare the logits."""
    model, ids = llama_.model(), own.calibration_ids(llama_, 8, 12)
    config = CompressionConfig(
        **{"ratio": 0.4, "ratio_scope": "layer", "dtype": "float64", "batch_size": 3} | settings
    )
    weights, shape = llama_.weights(), llama_.shape
    asked = llamas.reference_settings(config, model)
    new, layers = algorithm1.compress(weights, shape, ids, asked)
    with llamas.nudged(weights, NUDGE) as moved_weights:
        other, nudged = algorithm1.compress(moved_weights, shape, ids, asked)
    padded, mask = llamas.with_padding(ids)
    compressed = compress(model, config, calibration=padded, attention_mask=mask)
    found = llamas.reference_weights(compressed)
    assert found.keys() == new.keys()
    logits = [llama.logits(values, shape, ids) for values in (new, other)]
    losses = [layer.losses for layer in llamas.torch_run(model, config, padded, mask).layers]
    sides = Sides(llama_, ids, asked, layers, nudged, *logits, found, losses)
    with torch.no_grad():
        ours = compare.as_array(compressed(input_ids=torch.from_numpy(ids)).logits)
    compare.close(quantity, ours, sides.logits, sides.bound(sides.moved, sides.logits))
    return sides


@pytest.mark.spec("algorithm.stages", "target.regression")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", STAGED)
@llamas.float64_throughout()
def test_stages(name: str, share: float) -> None:
    """Both sides on their own, from the first layer to the logits, with padding on ours."""
    sides = both_sides(
        own.grouped_llama(3, seed=7), "stages: logits", dense_target=share, **STAGED[name]
    )
    for one, two in zip(sides.layers, sides.nudged, strict=True):
        assert np.array_equal(one.kept, two.kept), "the nudge must not change what is kept"
        assert np.array_equal(one.kept_heads, two.kept_heads)
        assert (one.kept_heads is not None and one.kept_heads.size == 1) == ("heads" in name)
    if share:
        weights, shape = sides.llama.weights(), sides.llama.shape
        dense = llama.logits(weights, shape, sides.ids)
        none = replace(sides.settings, dense_target=0.0)
        plain, _ = algorithm1.compress(weights, shape, sides.ids, none)
        away = llama.logits(plain, shape, sides.ids) - sides.logits
        assert np.linalg.norm(away) > 1e-3 * np.linalg.norm(dense)


REFINED: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "heads": {"ratio": 0.5, "mha": "heads", "update": "least-squares"},
    "joint afm": {"mha": "afm", "ffn": "afm", "joint_qk": True},
    "ffn alone": {"sublayers": ("ffn",), "dense_target": 0.0},
    "best": STAGED["best"] | {"dense_target": 0.5},
}


@pytest.mark.spec("algorithm.refine", "refine.loss", "refine.weights")
@pytest.mark.parametrize("name", REFINED)
@llamas.float64_throughout()
def test_refined(name: str) -> None:
    """Both sides on their own, from the first layer to the logits, with padding on ours."""
    sides = both_sides(
        own.grouped_llama(2, seed=7), "refinement: logits", refine=4, ridge=1e-2, **REFINED[name]
    )
    for one, two, losses in zip(sides.layers, sides.nudged, sides.losses, strict=True):
        theirs = np.array(one.losses)
        assert len(theirs) == 5
        assert theirs[-1] < theirs[0]
        bound = sides.bound(np.array(two.losses), theirs)
        compare.close("refinement: losses", np.array(losses), [*theirs, theirs[-1]], bound)
    weights = sides.llama.weights()
    for key, value in sides.weights.items():
        if "norm" in key:
            compare.exact("what is not refined", value, weights[key])
