"""Algorithm 1 on both sides: how to run them, and how far apart they may come out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

from lorap.config import CompressionConfig
from lorap.families import family_of
from lorap.pipeline import LayerResult, compress_layers
from lorap.plan import make_plan
from lorap_reference import algorithm1, budget, llama
from lorap_reference.importance import group_importance
from lorap_reference.statistics import feature_norms
from parity_tests import compare, rounding, tolerances
from parity_tests.rounding import Known, Precision
from parity_tests.tolerances import EPS32, EPS64

Array = NDArray[np.float64]

AS_SHIPPED = Precision(linear=EPS64, norm=EPS32, rotary=EPS32)
"""A float64 model of transformers: RMSNorm and the rotary angles are float32 nevertheless."""


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Make transformers compute RMSNorm and the rotary angles in float64."""

    def norm(self: Any, x: Tensor) -> Tensor:
        square = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(square + self.variance_epsilon))

    def rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        parameters = getattr(config, "rope_parameters", None) or {}
        theta = parameters.get("rope_theta") or config.rope_theta
        frequency = theta ** (-torch.arange(0, config.head_dim, 2).double() / config.head_dim)
        angle = position_ids[..., None].double() * frequency
        both = torch.cat((angle, angle), dim=-1)
        return both.cos(), both.sin()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
        patch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", rotary)
        yield


def reference_weights(model: PreTrainedModel) -> dict[str, Array]:
    """Return a model's weights as the reference takes them."""
    return {name: compare.as_array(value) for name, value in model.state_dict().items()}


def reference_shape(model: PreTrainedModel) -> llama.LlamaShape:
    """Return what the weights do not say."""
    config = model.config
    parameters = getattr(config, "rope_parameters", None) or {}
    return llama.LlamaShape(
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        rope_theta=parameters.get("rope_theta") or config.rope_theta,
        rms_eps=config.rms_norm_eps,
    )


def reference_settings(config: CompressionConfig, model: PreTrainedModel) -> algorithm1.Settings:
    """Return the settings of the reference: in model scope App. C.1 gives the layer ratio."""
    assert config.ratio is not None
    mha, ffn = "mha" in config.sublayers, "ffn" in config.sublayers
    ratio = config.ratio
    if config.ratio_scope == "model":
        layer = model.model.layers[0]
        compressible = [layer.self_attn.get_submodule(f"{m}_proj").weight for m in "qkvo" if mha]
        for name in ("gate", "up", "down") if ffn else ():
            linear = layer.mlp.get_submodule(f"{name}_proj")
            compressible.append(linear.weight)
            # A removed channel takes its entry of these biases along; down's belongs to none.
            if name != "down" and linear.bias is not None:
                compressible.append(linear.bias)
        ratio = budget.layer_ratio(
            sum(parameter.numel() for parameter in model.parameters()),
            len(model.model.layers),
            sum(parameter.numel() for parameter in compressible),
            config.ratio,
        )
    return algorithm1.Settings(
        layer_ratio=ratio,
        a=config.allocation,
        least=config.least_important,
        nested=config.ratio_scope == "layer",
        aggregation=config.aggregation,
        weighting=config.weighting,
        mha=mha,
        ffn=ffn,
    )


def reachable(weights: Mapping[str, Array], settings: algorithm1.Settings) -> bool:
    """Tell whether every matrix and every FFN is left with something."""
    if settings.layer_ratio >= 1:
        return False
    layer = llama.layer_weights(weights, 0)
    shapes = {m: layer[f"{name}.weight"].shape for m, name in algorithm1.MHA.items()}
    ranks = budget.ranks(
        {m: (shape[0], shape[1]) for m, shape in shapes.items()},
        settings.layer_ratio,
        settings.a,
        settings.nested,
    )
    channels = layer["mlp.up_proj.weight"].shape[0]
    _, high = budget.removed_band(channels, settings.layer_ratio, settings.least)
    return not (settings.mha and 0 in ranks.values()) and not (settings.ffn and high >= channels)


def torch_layers(
    model: PreTrainedModel,
    config: CompressionConfig,
    ids: NDArray[np.int64],
    mask: NDArray[np.bool_] | None = None,
) -> list[LayerResult]:
    """Return what the pipeline makes of each layer."""
    family = family_of(model.config)
    prefix = f"{family.layers_path}."
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}

    def load_layer(index: int) -> dict[str, Tensor]:
        start = f"{prefix}{index}."
        return {name[len(start) :]: t for name, t in state.items() if name.startswith(start)}

    return list(
        compress_layers(
            family,
            model.config,
            make_plan(model.config, family, config),
            config,
            {name: tensor for name, tensor in state.items() if not name.startswith(prefix)},
            load_layer,
            torch.from_numpy(ids),
            mask=None if mask is None else torch.from_numpy(mask),
            device=torch.device("cpu"),
            dtype=torch.float64,
        )
    )


def outputs(layer: LayerResult) -> Array:
    """Return the output of a layer for all samples, ``(N, L, d)``."""
    return compare.as_array(torch.cat(layer.outputs))


def trimmed(layer: LayerResult, length: int) -> LayerResult:
    """Return the same with the outputs of the first `length` tokens alone."""
    return replace(layer, outputs=[output[:, :length] for output in layer.outputs])


def close(quantity: str, ours: object, reference: Array, spread: Array) -> None:
    """Assert that activations agree within ``CONFIDENCE`` spreads."""
    compare.close(quantity, ours, reference, tolerances.CONFIDENCE * spread)


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


def forward(
    weights: Mapping[str, Array],
    shape: llama.LlamaShape,
    ids: NDArray[np.int64],
    precision: Precision,
) -> tuple[Array, Array]:
    """Return the reference's logits, and the spread of the distance of another side's."""
    h = llama.embed(weights, ids)
    known = Known(h, np.zeros_like(h))
    for index in range(shape.layers):
        layer = llama.layer_weights(weights, index)
        spreads = rounding.layer_spreads(rounding.Layer(layer, shape, precision=precision), known)
        known = Known(llama.layer_forward(layer, shape, known.value).output, spreads.output)
    return llama.logits(weights, shape, ids), rounding.logit_spreads(
        weights, shape, known, precision
    )


def torch_gradients(
    model: PreTrainedModel, ids: NDArray[np.int64]
) -> tuple[float, dict[str, Array]]:
    """Return the mean cross-entropy of the next token and, by autograd, all of its gradients.

    The loss that transformers computes by itself is of float32 logits, whatever the model's dtype.
    """
    tokens = torch.from_numpy(ids)
    logits = model(input_ids=tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    model.zero_grad()
    loss.backward()
    gradients = {name: compare.as_array(weight.grad) for name, weight in model.named_parameters()}
    return loss.item(), gradients


def product(tensors: Mapping[str, Any], name: str) -> Array:
    """Return ``L R`` of a factored linear."""
    left = compare.as_array(tensors[f"{name}.left.weight"])
    return left @ compare.as_array(tensors[f"{name}.right.weight"])


def check_layer(
    ours: LayerResult,
    layer: Mapping[str, Array],
    shape: llama.LlamaShape,
    h: Known,
    settings: algorithm1.Settings,
    precision: Precision,
    prefix: str,
) -> Verdict:
    """Compare one step of Algorithm 1 with the reference's, fed `h`.

    Parameters
    ----------
    ours : LayerResult
        What the pipeline made of the layer.
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
    """
    theirs = algorithm1.compress_layer(layer, shape, h.value, settings)
    trace = theirs.trace
    spreads = rounding.layer_spreads(rounding.Layer(layer, shape, precision=precision), h)

    determined = True
    deviations: dict[str, float] = {}
    for m, name in algorithm1.MHA.items():
        rank = theirs.ranks[m]
        assert (f"{name}.weight" in ours.tensors) == (rank is None), f"{name}: dense or not"
        bias = next((k for k in (f"{name}.bias", f"{name}.left.bias") if k in theirs.weights), None)
        assert bias is None or bias in ours.tensors
        if bias is not None:
            compare.exact(f"{prefix}biases", ours.tensors[bias], theirs.weights[bias])
        if rank is None:
            compare.exact(
                f"{prefix}dense weights", ours.tensors[f"{name}.weight"], layer[f"{name}.weight"]
            )
            continue
        compare.exact(f"{prefix}ranks", ours.tensors[f"{name}.right.weight"].shape[0], rank)
        X, spread = (trace.o, spreads.o) if m == "o" else (trace.attention, spreads.attention)
        W = layer[f"{name}.weight"]
        x = feature_norms(X.reshape(-1, W.shape[1]))
        moved = rounding.norm_bounds(X, spread)
        if settings.weighting == "eq6":
            moved = np.where(x > 0, moved / np.sqrt(np.where(x > 0, x, 1)), np.sqrt(moved))
            x = np.sqrt(x)
        bound = tolerances.awsvd_product(W, x, rank, EPS64, delta=rounding.weighted_bound(W, moved))
        if bound is None:
            determined = False
            continue
        deviations[name] = bound
        compare.spectral(
            f"{prefix}low-rank products",
            product(ours.tensors, name),
            product(theirs.weights, name),
            bound,
        )

    if settings.ffn:
        determined &= check_ffn(ours, theirs, layer, spreads, settings, prefix)
    if not determined:
        return Verdict(None)

    compressed = rounding.Layer(theirs.weights, shape, deviations, precision)
    spread = rounding.layer_spreads(compressed, h).output
    close(f"{prefix}inputs of the next layer", outputs(ours), theirs.output, spread)
    return Verdict(Known(theirs.output, spread))


def check_ffn(
    ours: LayerResult,
    theirs: algorithm1.CompressedLayer,
    layer: Mapping[str, Array],
    spreads: rounding.LayerSpreads,
    settings: algorithm1.Settings,
    prefix: str,
) -> bool:
    """Compare channels, scores at the cut and weights of the FFN; tell if the same are kept."""
    gate, up, down = (layer[f"mlp.{m}_proj.weight"] for m in ("gate", "up", "down"))
    assert theirs.scores is not None
    assert theirs.kept is not None
    C, trace = theirs.scores, theirs.trace
    # Every aggregation is a norm or a mean of magnitudes: the scores of the distances bound the
    # distance of the scores.
    moved = group_importance(
        up,
        gate,
        down,
        rounding.norm_bounds(trace.ffn, spreads.ffn),
        rounding.norm_bounds(trace.down, spreads.down),
        settings.aggregation,
    )
    bound = moved + tolerances.group_importance(down.shape[0], EPS64) * C
    low, high = budget.removed_band(C.size, settings.layer_ratio, settings.least)
    if low == high:
        compare.exact(f"{prefix}dense weights", ours.tensors["mlp.up_proj.weight"], up)
        return True
    report = ours.modules["mlp"]
    ordered = np.sort(C)
    cut = report["scores_at_cut"]
    expected = {
        "least_important_kept": low - 1,
        "lowest_removed": low,
        "highest_removed": high - 1,
        "lowest_of_top": high,
    }
    for name, at in expected.items():
        if 0 <= at < C.size:
            # The i-th smallest of scores that each move by less than a bound moves by less than it.
            compare.close(f"{prefix}scores at the cut", cut[name], ordered[at], np.max(bound))
    same = compare.kept_channels(
        f"{prefix}kept channels", report["kept_channels"], theirs.kept, C, bound, (low, high)
    )
    kept = np.array(report["kept_channels"], dtype=np.int64)
    slices = {"up": up[kept], "gate": gate[kept], "down": down[:, kept]}
    for m, expected_weight in slices.items():
        name = f"mlp.{m}_proj"
        compare.exact(f"{prefix}pruned weights", ours.tensors[f"{name}.weight"], expected_weight)
        if f"{name}.bias" in layer:
            bias = layer[f"{name}.bias"]
            compare.exact(
                f"{prefix}biases",
                ours.tensors[f"{name}.bias"],
                bias if m == "down" else bias[kept],
            )
    return same


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
    h = llama.embed(weights, ids)
    verdicts = []
    for ours in torch_layers(model, config, ids):
        layer = llama.layer_weights(weights, ours.index)
        known = Known(h, np.zeros_like(h))
        verdicts.append(check_layer(ours, layer, shape, known, settings, precision, prefix))
        mine = {name: compare.as_array(value) for name, value in ours.tensors.items()}
        # Whatever is determined: our weights, run by the reference, give our output.
        spreads = rounding.layer_spreads(rounding.Layer(mine, shape, precision=precision), known)
        output = llama.layer_forward(mine, shape, h).output
        close(f"{prefix}output of our weights", outputs(ours), output, spreads.output)
        h = outputs(ours)
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
    h = llama.embed(weights, ids)
    known = Known(h, np.zeros_like(h))
    compared: list[Known] = []
    for ours in torch_layers(model, config, ids):
        layer = llama.layer_weights(weights, ours.index)
        verdict = check_layer(ours, layer, shape, known, settings, precision, prefix)
        if verdict.output is None:
            break
        known = verdict.output
        compared.append(known)
    return compared
