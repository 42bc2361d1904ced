"""Algorithm 1 step by step: what the pipeline makes of a layer, against the reference."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from lorap.config import CompressionConfig
from lorap.pipeline.layers import LayerResult
from lorap_reference import algorithm1, gradient, heads, llama, pca
from lorap_reference.importance import group_scores
from lorap_reference.statistics import (
    centred_moment,
    feature_norms,
    second_moment,
    sum_of_magnitudes,
    token_sum,
)
from parity_tests import compare, rounding, tolerances, tracked
from parity_tests.llamas import (
    Run,
    close,
    reference_settings,
    reference_shape,
    reference_weights,
    torch_run,
)
from parity_tests.rounding import Known, Precision
from parity_tests.tolerances import EPS64

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """What is known after a layer.

    Attributes
    ----------
    output : Known or None
        The reference's output of the layer and the spread of its distance; None where a product or
        a channel is not determined within the bounds, so that the outputs need not agree.
    """

    output: Known | None


@dataclass(frozen=True)
class Step:
    """One step of Algorithm 1, as the reference is given it.

    Attributes
    ----------
    layer : mapping
        The original weights, names relative to the layer.
    shape : llama.LlamaShape
    h : Known, (N, L, d)
        The reference's input of the layer, and the distance of the pipeline's.
    settings : algorithm1.Settings
    precision : Precision
        Of the pipeline's forward.
    prefix : str
        Of the quantities in the report.
    sizes : algorithm1.Sizes
    gradients, gradient_spreads : mapping or None
        Of the loss by the layer's weights, and the spreads of their distance.
    """

    layer: Mapping[str, Array]
    shape: llama.LlamaShape
    h: Known
    settings: algorithm1.Settings
    precision: Precision
    prefix: str
    sizes: algorithm1.Sizes
    gradients: Mapping[str, Array] | None = None
    gradient_spreads: Mapping[str, Array] | None = None


INPUTS = {"o": "o", "gate": "ffn", "up": "ffn", "down": "down"}
"""Which input of a layer a matrix has, where it is not that of q, k and v."""


def names_of(m: str) -> list[str]:
    """Return the linears of matrix `m`: two of the stack of q and k."""
    return [(algorithm1.MHA | algorithm1.FFN)[part] for part in (["q", "k"] if m == "qk" else [m])]


def product(tensors: Mapping[str, Any], m: str) -> Array:
    """Return ``L R`` of a factored matrix."""
    names = names_of(m)
    left = np.concatenate([compare.as_array(tensors[f"{name}.left.weight"]) for name in names])
    right = llama.SHARED_RIGHT if m == "qk" else f"{names[0]}.right.weight"
    return left @ compare.as_array(tensors[right])


def input_spread(m: str, spreads: rounding.LayerSpreads) -> Array:
    """Return the spread of the distance of a matrix's input."""
    spread: Array = getattr(spreads, INPUTS.get(m, "attention"))
    return spread


def scale_bounds(
    X: Array, spread: Array, method: algorithm1.LowRank, settings: algorithm1.Settings
) -> tuple[Array, Array]:
    """Return the diagonal of D, and a bound on the distance of its entries."""
    tokens = X.reshape(-1, X.shape[-1])
    if method == "svd":
        return np.ones(X.shape[-1]), np.zeros(X.shape[-1])
    if method == "awsvd":
        x, moved, power = feature_norms(tokens), rounding.norm_bounds(X, spread), 1.0
        if settings.weighting == "eq6":
            power = 0.5
    else:
        n, power = len(tokens), settings.asvd_alpha
        x = sum_of_magnitudes(tokens) / n
        moved = tolerances.CONFIDENCE * np.mean(spread.reshape(tokens.shape), axis=0)
        moved = moved + tolerances.positive_sum(n + 1) * x
    if power == 1:
        return x, moved
    # A power of at most 1 is concave, and its distance at most that power of the distance; one of
    # more is convex, and its slope greatest at the far end.
    near = power * moved * (np.where(x > 0, x, 1) ** (power - 1) if power < 1 else 1.0)
    if power > 1:
        bound = power * moved * (x + moved) ** (power - 1)
    else:
        bound = np.where(x > 2 * moved, 2 * near, moved**power)
    return x**power, bound + 4 * EPS64 * x**power


def factor_bound(
    W: Array,
    X: Array,
    spread: Array,
    r: int,
    method: algorithm1.LowRank,
    settings: algorithm1.Settings,
) -> float | None:
    """Bound on the distance of the product of a matrix's factors, in the spectral norm.

    Parameters
    ----------
    W : (d_out, d_in)
    X, spread : (N, L, d_in)
        Its input, and the spread of the distance.
    r, method, settings
        As for ``algorithm1.factor``.

    Returns
    -------
    float or None
        None where the product is not determined within the bounds.
    """
    if method not in ("pca", "afm"):
        scale, moved = scale_bounds(X, spread, method, settings)
        delta = rounding.weighted_bound(W, moved)
        return tolerances.awsvd_product(W, scale, r, EPS64, delta=delta)
    C, floor, delta = moment_bounds(W, X, spread, method)
    return tolerances.pca_product(W, C, r, floor, delta)


def moment_bounds(
    W: Array, X: Array, spread: Array, method: algorithm1.LowRank
) -> tuple[Array, float, float]:
    """Return the moment that PCA or AFM sees, its floor, and a bound on ``W C W^T``'s distance."""
    tokens = X.reshape(-1, X.shape[-1])
    n = len(tokens)
    C, t = second_moment(tokens), token_sum(tokens)
    floor = pca.rounding_floor(W, C, max(W.shape) if method == "pca" else max(*W.shape, n))
    # Outputs Y that are off by E move Y^T Y by 2 Y E and E^2; about the mean by no more.
    off = tolerances.CONFIDENCE * float(
        np.linalg.norm(rounding.mapped(spread.reshape(tokens.shape), W.T))
    )
    Y = float(np.linalg.norm(tokens @ W.T, 2))
    delta = (2 * Y + off) * off
    delta += tolerances.through(W, tolerances.inner(n, np.abs(tokens).T @ np.abs(tokens)))
    if method == "afm":
        delta += tolerances.through(W, tolerances.centred_moment_of(tokens))
        C = centred_moment(C, t, n)
    return C, floor, delta


def spectrum_bound(
    W: Array,
    X: Array,
    spread: Array,
    method: algorithm1.LowRank,
    settings: algorithm1.Settings,
) -> float:
    """Bound on the distance of any singular value that a method sees (Weyl)."""
    if method in ("pca", "afm"):
        C, _, delta = moment_bounds(W, X, spread, method)
        # Of eigenvalues; roots of numbers that are not negative differ by at most its root.
        return float(np.sqrt(tolerances.eigenvalues(W, C, delta)))
    scale, moved = scale_bounds(X, spread, method, settings)
    S = np.linalg.svd(W * scale, compute_uv=False)
    shape = (W.shape[0], W.shape[1])
    return tolerances.singular_values(S, shape, EPS64) + rounding.weighted_bound(W, moved)


def check_layer(ours: LayerResult, output: Array, step: Step) -> Verdict:
    """Compare one step of Algorithm 1 with the reference's.

    Parameters
    ----------
    ours : LayerResult
        What the pipeline made of the layer.
    output : (N, L, d)
        What it computed with it.
    step : Step
    """
    layer, settings, prefix = step.layer, step.settings, step.prefix
    theirs = algorithm1.compress_layer(
        layer, step.shape, step.h.value, settings, step.sizes, step.gradients
    )
    before = rounding.Layer(layer, step.shape, precision=step.precision)
    spreads = rounding.layer_spreads(before, step.h)
    assert ours.tensors.keys() == theirs.weights.keys()

    determined = True
    deviations: dict[str, float] = {}
    for sublayer in settings.sublayers:
        method = settings.low_rank(sublayer)
        if method is None:
            determined &= check_selection(ours, theirs, sublayer, step, spreads)
            # The spreads of the next layer's input know of no distance of a refitted weight.
            determined &= settings.update == "none"
            continue
        for m, W in algorithm1.matrices(layer, sublayer, settings).items():
            rank = theirs.ranks[m]
            if rank is None:
                for name in names_of(m):
                    for kind in ("weight", "bias"):
                        if f"{name}.{kind}" in layer:
                            compare.exact(
                                f"{prefix}dense weights",
                                ours.tensors[f"{name}.{kind}"],
                                layer[f"{name}.{kind}"],
                            )
                continue
            found = product(ours.tensors, m)
            left = compare.as_array(ours.tensors[f"{names_of(m)[0]}.left.weight"])
            compare.exact(f"{prefix}ranks", left.shape[1], rank)
            X = getattr(theirs.trace, INPUTS.get(m, "attention"))
            bound = factor_bound(W, X, input_spread(m, spreads), rank, method, settings)
            if bound is None:
                determined = False
                continue
            deviations |= dict.fromkeys(names_of(m), bound)
            compare.spectral(
                f"{prefix}low-rank products ({method})", found, product(theirs.weights, m), bound
            )
            check_biases(ours, theirs, m, W, X, input_spread(m, spreads), bound, step)
            # The spreads of the next layer's input know of no distance of a bias.
            determined &= method != "afm"
    if not determined:
        return Verdict(None)

    compressed = rounding.Layer(theirs.weights, step.shape, deviations, step.precision)
    spread = rounding.layer_spreads(compressed, step.h).output
    close(f"{prefix}inputs of the next layer", output, theirs.output, spread)
    return Verdict(Known(theirs.output, spread))


def check_biases(
    ours: LayerResult,
    theirs: algorithm1.CompressedLayer,
    m: str,
    W: Array,
    X: Array,
    spread: Array,
    bound: float,
    step: Step,
) -> None:
    """Compare the biases of a factored matrix: those it had, and what AFM adds."""
    names = [f"{name}.left.bias" for name in names_of(m)]
    if names[0] not in theirs.weights:
        return
    found = np.concatenate([compare.as_array(ours.tensors[name]) for name in names])
    expected = np.concatenate([theirs.weights[name] for name in names])
    if settings_method(step.settings, m) != "afm":
        compare.exact(f"{step.prefix}biases", found, expected)
        return
    L = np.concatenate([theirs.weights[f"{name}.left.weight"] for name in names_of(m)])
    tokens = X.reshape(-1, X.shape[-1])
    off = tolerances.CONFIDENCE * np.mean(spread.reshape(tokens.shape), axis=0)
    mu = np.mean(tokens, axis=0)
    allowed = tolerances.afm_bias(W, L, mu, bound)
    allowed = allowed + float(np.linalg.norm(np.abs(W) @ off)) + 2 * EPS64 * np.abs(expected)
    compare.close(f"{step.prefix}biases of AFM", found, expected, allowed)


def settings_method(settings: algorithm1.Settings, m: str) -> algorithm1.LowRank | None:
    """Return the low-rank method that takes matrix `m`."""
    return settings.low_rank("ffn" if m in algorithm1.FFN else "mha")


def weight_score_bounds(
    m: str, step: Step, trace: llama.LayerTrace, spreads: rounding.LayerSpreads
) -> Array:
    """Bound on the distance of the scores of a matrix's single weights, but for their rounding."""
    name = f"{names_of(m)[0]}.weight"
    W = np.abs(step.layer[name])
    if step.settings.importance == "magnitude":
        return np.zeros(W.shape)
    if step.settings.importance == "taylor":
        assert step.gradient_spreads is not None
        return np.asarray(tolerances.CONFIDENCE * W * step.gradient_spreads[name])
    X = algorithm1.input_of(m, trace)
    return np.asarray(W * rounding.norm_bounds(X, input_spread(m, spreads).reshape(X.shape)))


def check_selection(
    ours: LayerResult,
    theirs: algorithm1.CompressedLayer,
    sublayer: algorithm1.Sublayer,
    step: Step,
    spreads: rounding.LayerSpreads,
) -> bool:
    """Compare channels or heads, scores at the cut and new weights; tell if the same are kept."""
    layer, settings, prefix = step.layer, step.settings, step.prefix
    heads_ = sublayer == "mha"
    names = algorithm1.MHA if heads_ else algorithm1.FFN
    if not heads_ and settings.selection == "obs":
        return check_removals(ours, theirs, step, spreads)
    C = theirs.head_scores if heads_ else theirs.scores
    expected_kept = theirs.kept_heads if heads_ else theirs.kept
    assert C is not None
    assert expected_kept is not None
    # Every aggregation is a norm or a mean of magnitudes: the scores of the distances bound the
    # distance of the scores.
    moved = {m: weight_score_bounds(m, step, theirs.trace, spreads) for m in names}
    if heads_:
        bound = heads.head_scores(
            moved["q"], moved["k"], moved["v"], moved["o"], C.size, settings.aggregation
        )
        largest = max(layer[f"{name}.weight"].size for name in names.values()) // C.size
        rounded = tolerances.head_scores(largest)
    else:
        bound = group_scores(moved["up"], moved["gate"], moved["down"], settings.aggregation)
        rounded = tolerances.group_importance(layer["mlp.down_proj.weight"].shape[0], EPS64)
    bound = bound + (rounded + EPS64) * C
    band = step.sizes.heads if heads_ else step.sizes.channels
    assert band is not None
    low, high = band
    if low == high:
        for name in names.values():
            compare.exact(
                f"{prefix}dense weights",
                ours.tensors[f"{name}.weight"],
                layer[f"{name}.weight"],
            )
        return True
    report = ours.modules["self_attn" if heads_ else "mlp"]
    found = report["kept_kv_heads" if heads_ else "kept_channels"]
    check_cut(f"{prefix}scores at the cut", report["scores_at_cut"], np.sort(C), (low, high), bound)
    same = compare.kept_channels(
        f"{prefix}kept {'heads' if heads_ else 'channels'}",
        found,
        expected_kept,
        C,
        bound,
        (low, high),
    )
    check_pruned(ours, sublayer, np.array(found, dtype=np.int64), C.size, step, theirs, spreads)
    return same


def check_pruned(
    ours: LayerResult,
    sublayer: algorithm1.Sublayer,
    kept: NDArray[np.int64],
    units: int,
    step: Step,
    theirs: algorithm1.CompressedLayer,
    spreads: rounding.LayerSpreads,
) -> None:
    """Compare what is left of a block's tensors: bit by bit but for what is refitted."""
    layer, settings = step.layer, step.settings
    names = algorithm1.MHA if sublayer == "mha" else algorithm1.FFN
    for m, name in names.items():
        for kind in ("weight", "bias"):
            whole = layer.get(f"{name}.{kind}")
            if whole is None:
                continue
            found = ours.tensors[f"{name}.{kind}"]
            if m in ("o", "down") and kind == "weight" and settings.update != "none":
                columns = kept
                if m == "o":
                    columns = heads.head_rows(kept, whole.shape[1], units)
                check_update(compare.as_array(found), whole, m, columns, step, theirs, spreads)
            else:
                expected = sliced(whole, m, kept, units)
                compare.exact(f"{step.prefix}pruned weights", found, expected)


def correlation_distance(X: Array, spread: Array, ridge: float) -> tuple[float, float] | None:
    """Bounds on the distance of the correlations of a matrix's input, and of its features' norms.

    With Z the tokens over the norms of the features, a column of Z moves by at most twice the
    relative distance of the feature.

    Returns
    -------
    (float, float) or None
        In the spectral norm, and relative; None where a feature may be dead on one side alone.
    """
    tokens = X.reshape(-1, X.shape[-1])
    d = np.linalg.norm(tokens, axis=0)
    moved = tolerances.CONFIDENCE * np.linalg.norm(spread.reshape(tokens.shape), axis=0)
    if np.any(moved > d / 4):
        return None
    relative = moved / np.where(d > 0, d, 1) + tolerances.root_of_positive_sum(len(tokens))
    _, K = tolerances.correlation_of(tokens.T @ tokens, ridge)
    off = 2 * float(np.linalg.norm(relative))
    reach = np.sqrt(tolerances.spectral_norm(K))
    summed = tolerances.inner(len(tokens), np.asarray(float(len(d))))
    return float(2 * reach * off + off**2 + summed), float(np.max(relative, initial=0.0))


def check_update(
    found: Array,
    W: Array,
    m: str,
    kept: NDArray[np.int64],
    step: Step,
    theirs: algorithm1.CompressedLayer,
    spreads: rounding.LayerSpreads,
) -> None:
    """Compare a refitted weight with the reference's, for the columns that our side keeps."""
    X, ridge = algorithm1.input_of(m, theirs.trace), step.settings.ridge
    known = correlation_distance(X, input_spread(m, spreads), ridge)
    if known is None:
        return
    C = second_moment(X)
    expected = algorithm1.least_squares_update(W, C, kept, ridge)
    bound = tolerances.least_squares_update(W, C, kept, ridge, *known)
    off = np.linalg.norm((found - expected) * feature_norms(X)[kept])
    compare.within(f"{step.prefix}refitted weights", off, bound)


def check_removals(
    ours: LayerResult,
    theirs: algorithm1.CompressedLayer,
    step: Step,
    spreads: rounding.LayerSpreads,
) -> bool:
    """Compare the channels that are removed one by one; tell if the same ones are."""
    W, X = step.layer["mlp.down_proj.weight"], algorithm1.input_of("down", theirs.trace)
    assert step.sizes.channels is not None
    assert theirs.kept is not None
    removed = step.sizes.channels[1] - step.sizes.channels[0]
    kept = np.arange(W.shape[1])
    if removed:
        report = ours.modules["mlp"]
        order = np.array(report["removed_channels"], dtype=np.int64)
        kept = np.array(report["kept_channels"], dtype=np.int64)
        assert len(set(order.tolist())) == removed
        compare.exact(
            f"{step.prefix}kept channels", kept, np.setdiff1d(np.arange(W.shape[1]), order)
        )
        known = correlation_distance(X, input_spread("down", spreads), step.settings.ridge)
        if known is None:
            return False
        compare.removals(
            f"{step.prefix}removals", order, W, second_moment(X), step.settings.ridge, *known
        )
    check_pruned(ours, "ffn", kept, W.shape[1], step, theirs, spreads)
    return np.array_equal(kept, theirs.kept)


def sliced(whole: Array, m: str, kept: NDArray[np.int64], units: int) -> Array:
    """Return what is left of a weight or bias of matrix `m`, by loops over what is kept."""
    if m in ("o", "down"):
        if whole.ndim == 1:
            return whole
        size = whole.shape[1] // units
        return np.concatenate([whole[:, u * size : (u + 1) * size] for u in kept], axis=1)
    size = whole.shape[0] // units
    return np.concatenate([whole[u * size : (u + 1) * size] for u in kept])


def check_cut(
    quantity: str,
    said: Mapping[str, float | None],
    ordered: Array,
    band: tuple[int, int],
    bound: Array,
) -> None:
    """Compare the scores on both sides of the two cuts."""
    low, high = band
    places = {
        "least_important_kept": low - 1,
        "lowest_removed": low,
        "highest_removed": high - 1,
        "lowest_of_top": high,
    }
    for name, at in places.items():
        if 0 <= at < ordered.size:
            # The i-th smallest of scores that each move by less than a bound moves by less than it.
            compare.close(quantity, said[name], ordered[at], np.max(bound))


def steps_of(
    run: Run,
    weights: Mapping[str, Array],
    shape: llama.LlamaShape,
    ids: NDArray[np.int64],
    settings: algorithm1.Settings,
    precision: Precision,
    prefix: str,
) -> Callable[[int, Known], Step]:
    """Return what makes the reference's step of a layer from its input.

    Sizes by MGAA follow from the pipeline's own measurements, so that they agree exactly; the
    measurements are compared by ``check_measurements``.
    """
    sizes = algorithm1.allocate(weights, shape, settings, our_measurements(run))
    gradients: Mapping[str, Array] = {}
    spreads: Mapping[str, Array] = {}
    if settings.importance == "taylor":
        gradients = gradient.loss_gradients(weights, shape, ids)
        found = tracked.loss_gradients(weights, shape, ids)
        spreads = {name: value.spread for name, value in found.items()}

    def step(index: int, h: Known) -> Step:
        return Step(
            llama.layer_weights(weights, index),
            shape,
            h,
            settings,
            precision,
            prefix,
            sizes[index],
            llama.layer_weights(gradients, index),
            llama.layer_weights(spreads, index),
        )

    return step


def our_measurements(run: Run) -> algorithm1.Measurements:
    """Return what the pipeline measured, as the reference takes it."""
    similarities: list[dict[algorithm1.Sublayer, float]] = [{} for _ in run.plan.layers]
    for (index, sublayer), value in run.measurements.similarities.items():
        similarities[index][sublayer] = value
    spectra: list[dict[str, Array]] = [{} for _ in run.plan.layers]
    for index, layer in enumerate(run.plan.layers):
        for name, module in layer.items():
            found = run.measurements.spectra.get(f"layers.{index}.{name}")
            if found is not None:
                spectra[index]["".join(module.roles)] = compare.as_array(found)
    losses = [
        compare.as_array(run.measurements.losses[path])
        for path in (f"layers.{index}.mlp" for index in range(len(run.plan.layers)))
        if path in run.measurements.losses
    ]
    divergences: list[dict[str, float]] = [
        {
            "ffn" if name == "mlp" else "".join(module.roles): found
            for name, module in layer.items()
            if (found := run.measurements.divergences.get(f"layers.{index}.{name}")) is not None
        }
        for index, layer in enumerate(run.plan.layers)
    ]
    return algorithm1.Measurements(similarities, spectra, losses, divergences)


def check_measurements(
    run: Run,
    weights: Mapping[str, Array],
    shape: llama.LlamaShape,
    ids: NDArray[np.int64],
    settings: algorithm1.Settings,
    precision: Precision,
    prefix: str,
) -> None:
    """Compare similarities, spectra, and the plan that follows from them."""
    theirs = algorithm1.measure(weights, shape, ids, settings)
    mine = our_measurements(run)
    h = llama.embed(weights, ids)
    known = Known(h, np.zeros_like(h))
    for index in range(shape.layers):
        layer = llama.layer_weights(weights, index)
        spreads = rounding.layer_spreads(rounding.Layer(layer, shape, precision=precision), known)
        trace = llama.layer_forward(layer, shape, known.value)
        after = Known(trace.output, spreads.output)
        between = Known(trace.middle, spreads.middle)
        if settings.between:
            for sublayer, pair in (("mha", (known, between)), ("ffn", (between, after))):
                compare.close(
                    f"{prefix}similarities",
                    mine.similarities[index][sublayer],
                    theirs.similarities[index][sublayer],
                    cosine_bound(*pair),
                )
        for m, S in theirs.spectra[index].items():
            W = algorithm1.matrices(layer, "ffn" if m in algorithm1.FFN else "mha", settings)[m]
            X = getattr(trace, INPUTS.get(m, "attention"))
            method = settings_method(settings, m)
            assert method is not None
            compare.close(
                f"{prefix}spectra ({method})",
                mine.spectra[index][m],
                S,
                spectrum_bound(W, X, input_spread(m, spreads), method, settings),
            )
        known = after
    check_plan(run, algorithm1.allocate(weights, shape, settings, mine), prefix)


def cosine_bound(*sides: Known) -> float:
    """Bound on the distance of the mean cosine of two residual streams.

    A direction turns by at most twice the distance over the length. A token without a length has
    none, and its cosine is not near another one.
    """
    bound = 0.0
    for side in sides:
        length = np.linalg.norm(side.value, axis=-1)
        off = tolerances.CONFIDENCE * np.linalg.norm(side.spread, axis=-1)
        bound += float(np.mean(np.where(off > 0, 2 * off / np.where(length > 0, length, 1), 0)))
    return bound + 4 * tolerances.EPS64 * sides[0].value.shape[-1]


def check_plan(run: Run, sizes: Sequence[algorithm1.Sizes], prefix: str) -> None:
    """Compare the plan with the sizes that the reference makes of the same measurements."""
    for layer, expected in zip(run.plan.layers, sizes, strict=True):
        bands = {"mlp": expected.channels, "self_attn": expected.heads}
        for name, module in layer.items():
            m = "".join(module.roles)
            if m in expected.ranks:
                assert module.rank == expected.ranks[m], f"{prefix}{name}: rank"
            band = bands.get(name)
            if band is not None:
                removed = band if band[1] > band[0] else None
                assert module.band == removed, f"{prefix}{name}: removed band"


def check_each_layer(
    model: PreTrainedModel,
    config: CompressionConfig,
    ids: NDArray[np.int64],
    precision: Precision,
    prefix: str,
) -> list[Verdict]:
    """Compare every step, the reference being fed the pipeline's own input of the layer."""
    weights, shape = reference_weights(model), reference_shape(model)
    settings = reference_settings(config, model)
    run = torch_run(model, config, ids)
    check_measurements(run, weights, shape, ids, settings, precision, prefix)
    step = steps_of(run, weights, shape, ids, settings, precision, prefix)
    h = llama.embed(weights, ids)
    verdicts = []
    for ours, our_output in zip(run.layers, run.outputs, strict=True):
        known = Known(h, np.zeros_like(h))
        verdicts.append(check_layer(ours, our_output, step(ours.index, known)))
        mine = {name: compare.as_array(value) for name, value in ours.tensors.items()}
        # Whatever is determined: our weights, run by the reference, give our output.
        spreads = rounding.layer_spreads(rounding.Layer(mine, shape, precision=precision), known)
        output = llama.layer_forward(mine, shape, h).output
        close(f"{prefix}output of our weights", our_output, output, spreads.output)
        h = our_output
    return verdicts


def check_chain(
    model: PreTrainedModel,
    config: CompressionConfig,
    ids: NDArray[np.int64],
    precision: Precision,
    prefix: str,
) -> list[Known]:
    """Compare every step, each side fed by its own layers, as far as they are determined.

    Returns
    -------
    list of Known
        The reference's output of each layer that was compared; fewer than there are layers where
        the sides may part.
    """
    weights, shape = reference_weights(model), reference_shape(model)
    settings = reference_settings(config, model)
    run = torch_run(model, config, ids)
    step = steps_of(run, weights, shape, ids, settings, precision, prefix)
    h = llama.embed(weights, ids)
    known = Known(h, np.zeros_like(h))
    compared: list[Known] = []
    for ours, our_output in zip(run.layers, run.outputs, strict=True):
        verdict = check_layer(ours, our_output, step(ours.index, known))
        if verdict.output is None:
            break
        known = verdict.output
        compared.append(known)
    return compared
