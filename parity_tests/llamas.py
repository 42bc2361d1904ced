"""LLaMAs on both sides: the same model, settings and samples for each."""

from collections.abc import Callable, Iterator, Mapping
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
from lorap.pipeline.forward import Samples
from lorap.pipeline.in_memory import decoder_of
from lorap.pipeline.layers import LayerResult, compress_layers
from lorap.pipeline.measure import measured_plan
from lorap.pipeline.progress import Steps
from lorap.plan import Measurements, Plan, draft_plan
from lorap_reference import algorithm1, budget, llama, statistics
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


def with_padding(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return ids with three more tokens behind each sample, and the mask that leaves them out."""
    padded = np.concatenate([ids, ids[::-1, :3]], axis=1)
    mask = np.arange(padded.shape[1])[None, :].repeat(len(ids), axis=0) < ids.shape[1]
    return padded, mask


@contextmanager
def nudged(weights: Mapping[str, Array], nudge: float) -> Iterator[dict[str, Array]]:
    """Give weights whose embeddings are off by a share, and put moments off by as much meanwhile.

    How far the reference magnifies roundings is measured so: those of the residual stream, and
    those of the moments, whose difference may be solved for.
    """
    rng = np.random.default_rng(0)
    embeddings = weights["model.embed_tokens.weight"]
    noise = 1 + nudge * rng.standard_normal(embeddings.shape)
    exact = {"cross_moment": statistics.cross_moment, "second_moment": statistics.second_moment}

    def off(name: str) -> Callable[..., Any]:
        def moment(*inputs: Any) -> Any:
            found = exact[name](*inputs)
            shift = nudge * np.sqrt(np.outer(*(np.sum(x**2, axis=0) for x in (inputs * 2)[:2])))
            errors = rng.standard_normal(found.shape)
            return found + shift * (errors + (errors.T if name == "second_moment" else 0))

        return moment

    with pytest.MonkeyPatch.context() as patch:
        for name in exact:
            patch.setattr(statistics, name, off(name))
        yield {**weights, "model.embed_tokens.weight": embeddings * noise}


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
    settings = algorithm1.Settings(
        layer_ratio=config.ratio,
        a=config.even_allocation,
        least=config.least_important,
        nested=config.ratio_scope == "layer",
        aggregation=config.aggregation,
        weighting=config.weighting,
        mha=config.mha if "mha" in config.sublayers else None,
        ffn=config.ffn if "ffn" in config.sublayers else None,
        joint_qk=config.joint_qk,
        importance=config.importance,
        selection=config.selection,
        update=config.update,
        dense_target=config.dense_target,
        refine=config.refine,
        ridge=config.ridge,
        asvd_alpha=config.asvd_alpha,
        between=config.measures_similarity,
        within=bool(config.energy_sublayers),
        marginal=config.is_marginal,
        mgaa_alpha=config.mgaa_alpha,
        mgaa_floor=config.mgaa_floor,
        multiple=config.multiple_of,
    )
    if config.ratio_scope == "layer":
        return settings
    layer = llama.layer_weights(reference_weights(model), 0)
    ratio = budget.layer_ratio(
        sum(parameter.numel() for parameter in model.parameters()),
        len(model.model.layers),
        sum(algorithm1.compressible(layer, sub, settings) for sub in settings.sublayers),
        config.ratio,
    )
    return replace(settings, layer_ratio=ratio)


def reachable(model: PreTrainedModel, config: CompressionConfig) -> bool:
    """Tell whether every matrix and every block is left with something, by even ratios."""
    weights, shape = reference_weights(model), reference_shape(model)
    settings = reference_settings(config.without_measurements(), model)
    if settings.layer_ratio >= 1:
        return False
    layer = llama.layer_weights(weights, 0)
    sizes = algorithm1.layer_sizes(layer, shape, settings)
    units = {"heads": shape.kv_heads, "channels": layer["mlp.up_proj.weight"].shape[0]}
    bands = {"heads": sizes.heads, "channels": sizes.channels}
    return 0 not in sizes.ranks.values() and all(
        band is None or band[1] < units[kind] for kind, band in bands.items()
    )


@dataclass(frozen=True)
class Run:
    """What the pipeline makes of a model.

    Attributes
    ----------
    measurements : Measurements
        Of the uncompressed model; empty where there was nothing to measure.
    plan : Plan
    layers : list of LayerResult
    outputs : list of (N, L, d)
        Of the compressed layers.
    """

    measurements: Measurements
    plan: Plan
    layers: list[LayerResult]
    outputs: list[Array]


def torch_run(
    model: PreTrainedModel,
    config: CompressionConfig,
    ids: NDArray[np.int64],
    mask: NDArray[np.bool_] | None = None,
) -> Run:
    """Run the pipeline, in float64 and on the CPU."""
    decoder = decoder_of(model, model.config, torch.device("cpu"), torch.float64)
    samples = Samples(
        torch.from_numpy(ids),
        None if mask is None else torch.from_numpy(mask),
        config.batch_size,
    )
    draft = draft_plan(model.config, decoder.family, config)
    advance = Steps(None, config, decoder.layers)
    store = decoder.store(samples, config)
    plan, measurements = measured_plan(decoder, samples, store, draft, config, advance)
    batches = decoder.embed(samples, store, dense=config.carries_dense)
    run = Run(measurements, plan, [], [])
    for layer in compress_layers(decoder, batches, plan, config, measurements):
        run.layers.append(layer)
        hidden = torch.cat([batch.kept.load() for batch in batches])
        run.outputs.append(compare.as_array(hidden))
    return run


def close(quantity: str, ours: object, reference: Array, spread: Array) -> None:
    """Assert that activations agree within ``CONFIDENCE`` spreads."""
    compare.close(quantity, ours, reference, tolerances.CONFIDENCE * spread)


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
