"""Algorithm 1: LoRAP, layer by layer, on a LLaMA given as arrays."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import budget, llama
from .importance import Aggregation, group_importance
from .lowrank import Weighting, awsvd, column_scale
from .pruning import kept_channels, prune_ffn
from .statistics import feature_norms

Array = NDArray[np.float64]

MHA = {name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")}
FFN = {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@dataclass(frozen=True)
class Settings:
    """What Algorithm 1 is asked to do.

    Attributes
    ----------
    layer_ratio : float
        Share of the compressible parameters of each layer to remove, ``1 - p_r``.
    a : float
        The ratio (v+o):(q+k).
    least : float
        Share of least important channels that is kept.
    nested : bool
        The authors' nested floors (layer scope) or a single one (model scope).
    aggregation, weighting : str
        As in ``importance.channel_importance`` and ``lowrank.column_scale``.
    mha, ffn : bool
        Sub-layers that are compressed.
    """

    layer_ratio: float
    a: float = 3
    least: float = 0.01
    nested: bool = True
    aggregation: Aggregation = "l2"
    weighting: Weighting = "eq7"
    mha: bool = True
    ffn: bool = True


@dataclass(frozen=True)
class CompressedLayer:
    """One step of Algorithm 1.

    Attributes
    ----------
    weights : dict
        The compressed layer, names relative to it; a factored matrix under ``.left.weight`` and
        ``.right.weight``.
    ranks : dict
        Rank by matrix of the MHA, None where it is dense.
    kept : (width,) or None
        Kept channels, None where the FFN is not compressed.
    scores : (d_m,) or None
        Group scores, Eq. (10).
    trace : llama.LayerTrace
        Inputs of the linears in the forward of the UNcompressed layer, from which the statistics
        are taken.
    output : (N, L, d)
        Output of the compressed layer, the input of the next one.
    """

    weights: dict[str, Array]
    ranks: dict[str, int | None]
    kept: NDArray[np.int64] | None
    scores: Array | None
    trace: llama.LayerTrace
    output: Array


def compress_mha(
    layer: Mapping[str, Array], trace: llama.LayerTrace, settings: Settings
) -> tuple[dict[str, Array], dict[str, int | None]]:
    """The MHA step: ranks, then ``L`` and ``R`` of each matrix by Eq. (7).

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    trace : llama.LayerTrace
    settings : Settings

    Returns
    -------
    weights : dict
        The new tensors of the MHA's linears.
    ranks : dict
        Rank by matrix, None where it stays dense.

    Notes
    -----
    SPEC: ``algorithm.mha``.
    """
    inputs = {"q": trace.attention, "k": trace.attention, "v": trace.attention, "o": trace.o}
    shapes = {m: layer[f"{name}.weight"].shape for m, name in MHA.items()}
    ranks = budget.ranks(
        {m: (shape[0], shape[1]) for m, shape in shapes.items()},
        settings.layer_ratio,
        settings.a,
        settings.nested,
    )
    new: dict[str, Array] = {}
    for m, name in MHA.items():
        W, rank = layer[f"{name}.weight"], ranks[m]
        if rank is None:
            new[f"{name}.weight"] = W
            bias_name = f"{name}.bias"
        else:
            X = inputs[m].reshape(-1, W.shape[1])
            L, R, _ = awsvd(W, column_scale(feature_norms(X), settings.weighting), rank)
            new[f"{name}.left.weight"], new[f"{name}.right.weight"] = L, R
            bias_name = f"{name}.left.bias"
        if f"{name}.bias" in layer:
            new[bias_name] = layer[f"{name}.bias"]
    return new, ranks


def compress_ffn(
    layer: Mapping[str, Array], trace: llama.LayerTrace, settings: Settings
) -> tuple[dict[str, Array], NDArray[np.int64], Array]:
    """The FFN step: group scores by Eq. (10), channels by Eq. (11).

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    trace : llama.LayerTrace
    settings : Settings

    Returns
    -------
    weights : dict
        The new tensors of the FFN's linears.
    kept : (width,)
        Kept channels.
    scores : (d_m,)
        Group scores.

    Notes
    -----
    SPEC: ``algorithm.ffn``. The biases of gate and up lose the entries of the removed channels;
    down's bias belongs to no channel and stays.
    """
    gate, up, down = (layer[f"{FFN[m]}.weight"] for m in ("gate", "up", "down"))
    x_ffn = feature_norms(trace.ffn.reshape(-1, up.shape[1]))
    x_down = feature_norms(trace.down.reshape(-1, down.shape[1]))
    scores = group_importance(up, gate, down, x_ffn, x_down, settings.aggregation)
    low, high = budget.removed_band(up.shape[0], settings.layer_ratio, settings.least)
    kept = kept_channels(scores, low, high)
    up, gate, down = prune_ffn(up, gate, down, kept)
    new = {
        f"{FFN['gate']}.weight": gate,
        f"{FFN['up']}.weight": up,
        f"{FFN['down']}.weight": down,
    }
    for m, name in FFN.items():
        if f"{name}.bias" in layer:
            bias = layer[f"{name}.bias"]
            new[f"{name}.bias"] = bias if m == "down" else bias[kept]
    return new, kept, scores


def compress_layer(
    layer: Mapping[str, Array], shape: llama.LlamaShape, h: Array, settings: Settings
) -> CompressedLayer:
    """Algorithm 1 for one layer: statistics, compression, the next layer's input.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    shape : llama.LlamaShape
    h : (N, L, d)
        Output of the compressed layers before this one.
    settings : Settings

    Returns
    -------
    CompressedLayer

    Notes
    -----
    SPEC: ``algorithm.sequence``: one forward of the uncompressed layer gives the statistics of all
    seven linears, so that o and down see what the uncompressed q, k, v, gate and up give them.
    """
    trace = llama.layer_forward(layer, shape, h)
    new = dict(layer)
    ranks: dict[str, int | None] = dict.fromkeys(MHA)
    kept = scores = None
    if settings.mha:
        mha, ranks = compress_mha(layer, trace, settings)
        new = {k: v for k, v in new.items() if not k.startswith(tuple(MHA.values()))} | mha
    if settings.ffn:
        ffn, kept, scores = compress_ffn(layer, trace, settings)
        new = {k: v for k, v in new.items() if not k.startswith(tuple(FFN.values()))} | ffn
    output = llama.layer_forward(new, shape, h).output
    return CompressedLayer(new, ranks, kept, scores, trace, output)


def compress(
    weights: Mapping[str, Array],
    shape: llama.LlamaShape,
    ids: NDArray[np.int64],
    settings: Settings,
) -> tuple[dict[str, Array], list[CompressedLayer]]:
    """Algorithm 1 for a whole model.

    Parameters
    ----------
    weights : mapping
        Of the whole model, under their names in a Hugging Face checkpoint.
    shape : llama.LlamaShape
    ids : (N, L)
        Calibration samples.
    settings : Settings

    Returns
    -------
    weights : dict
        The compressed model, ready for ``llama.logits``.
    layers : list of CompressedLayer

    Notes
    -----
    SPEC: ``algorithm.sequence``. Embeddings, norms and head are untouched.
    """
    new = {
        name: np.asarray(value, dtype=np.float64)
        for name, value in weights.items()
        if not name.startswith("model.layers.")
    }
    h = llama.embed(weights, ids)
    steps = []
    for index in range(shape.layers):
        step = compress_layer(llama.layer_weights(weights, index), shape, h, settings)
        new |= {f"model.layers.{index}.{name}": value for name, value in step.weights.items()}
        steps.append(step)
        h = step.output
    return new, steps
