"""Algorithm 1: LoRAP, layer by layer, on a LLaMA given as arrays.

And the same with the methods that the papers compare with in the place of AWSVD and of channel
pruning, and with MGAA's allocation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import budget, gradient, heads, joint, llama, lowrank, marginal, mgaa, pca, statistics
from .importance import (
    Aggregation,
    group_scores,
    magnitude_importance,
    taylor_importance,
    weight_importance,
)
from .lowrank import Weighting
from .pruning import kept_channels, prune_ffn
from .refinement import refined_layer
from .regression import least_squares_update, regressed_weight, removal_order

Array = NDArray[np.float64]
LowRank = Literal["awsvd", "svd", "asvd", "pca", "afm"]
Sublayer = Literal["mha", "ffn"]
Stage = Literal["attention", "o", "ffn", "down"]

SUBLAYERS: tuple[Sublayer, ...] = ("mha", "ffn")
PROBES = 16
"""Samples, the first ones, that tell how much the model minds (SPEC: ``marginal.measure``)."""
MHA = {name: f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")}
FFN = {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}

STAGES: tuple[Stage, ...] = ("attention", "o", "ffn", "down")
STAGE_OF: Mapping[str, Stage] = {
    **dict.fromkeys(("q", "k", "qk", "v"), "attention"),
    "o": "o",
    **dict.fromkeys(("gate", "up"), "ffn"),
    "down": "down",
}
"""Matrix to its input, a field of ``llama.LayerTrace``."""


@dataclass(frozen=True)
class Settings:
    """What Algorithm 1 is asked to do.

    Attributes
    ----------
    layer_ratio : float
        Share of the compressible parameters to remove, ``1 - p_r``: of each layer, or with
        ``between`` of all of them.
    a : float
        The ratio (v+o):(q+k).
    least : float
        Share of least important channels, or heads, that is kept.
    nested : bool
        The authors' nested floors (layer scope) or a single one (model scope).
    aggregation, weighting : str
        As in ``importance.channel_importance`` and ``lowrank.column_scale``.
    mha : {"awsvd", "svd", "asvd", "pca", "afm", "heads"} or None
        What becomes of the MHA; None leaves it.
    ffn : {"channels", "awsvd", "svd", "asvd", "pca", "afm"} or None
        What becomes of the FFN; None leaves it.
    joint_qk : bool
        Factor the stack of q and k.
    importance : {"activation", "magnitude", "taylor"}
        Scores of single weights.
    selection : {"scores", "obs"}
        Channels by Eq. (11), or removed one by one by ``regression.removal_order``.
    update : {"none", "least-squares"}
        Whether down and o are refitted on the channels and heads that stay.
    dense_target : float or None
        Share of the uncompressed model's outputs in what each matrix is regressed to, stage by
        stage; None: each matrix is approximated as it is, by one forward of the layer.
    refine : int
        Iterations of ``refinement.refined_layer``.
    ridge : float
        As in ``regression.ridged_correlation``.
    asvd_alpha : float
        As in ``lowrank.magnitude_scale``.
    between, within : bool
        MGAA between the sub-layers and within them.
    mgaa_alpha, mgaa_floor : float
        As in ``mgaa.sublayer_ratios``, ``mgaa.highest_ratio`` and ``mgaa.rank_floors``; the floor
        also as in ``marginal_allocation``.
    marginal : bool
        All sizes by ``marginal_allocation``; needs low rank, or channels by ``obs``.
    multiple : int
        What ranks and numbers of channels are multiples of.
    """

    layer_ratio: float
    a: float = 3
    least: float = 0.01
    nested: bool = True
    aggregation: Aggregation = "l2"
    weighting: Weighting = "eq7"
    mha: LowRank | Literal["heads"] | None = "awsvd"
    ffn: LowRank | Literal["channels"] | None = "channels"
    joint_qk: bool = False
    importance: Literal["activation", "magnitude", "taylor"] = "activation"
    selection: Literal["scores", "obs"] = "scores"
    update: Literal["none", "least-squares"] = "none"
    dense_target: float | None = None
    refine: int = 0
    ridge: float = 1e-4
    asvd_alpha: float = 0.5
    between: bool = False
    within: bool = False
    mgaa_alpha: float = 0.35
    mgaa_floor: float = 0.25
    marginal: bool = False
    multiple: int = 1

    @property
    def carries_dense(self) -> bool:
        """Whether the uncompressed model's hidden states are carried along."""
        return self.dense_target is not None or self.refine > 0

    @property
    def sublayers(self) -> tuple[Sublayer, ...]:
        """Sub-layers that are compressed."""
        return tuple(sub for sub in SUBLAYERS if (self.mha if sub == "mha" else self.ffn))

    def low_rank(self, sublayer: Sublayer) -> LowRank | None:
        """Low-rank method of a sub-layer; None where it has none."""
        method = self.mha if sublayer == "mha" else self.ffn
        return None if method == "heads" or method == "channels" else method


@dataclass(frozen=True)
class Sizes:
    """What a layer keeps.

    Attributes
    ----------
    ranks : dict
        By matrix (``q``, ``k`` or ``qk``, ``v``, ``o``, ``gate``, ``up``, ``down``) that takes
        part in a low-rank method; None where it stays dense.
    heads, channels : (int, int) or None
        Removed bands of the groups of heads, and of the channels, in ascending order of score.
    """

    ranks: dict[str, int | None]
    heads: tuple[int, int] | None = None
    channels: tuple[int, int] | None = None


@dataclass(frozen=True)
class CompressedLayer:
    """One step of Algorithm 1.

    Attributes
    ----------
    weights : dict
        The compressed layer, names relative to it; a factored matrix under ``.left.weight`` and
        ``.right.weight``, the right factor that q and k share under ``llama.SHARED_RIGHT``.
    ranks : dict
        As in ``Sizes``.
    kept, kept_heads : (width,) and (groups,), or None
        Channels and groups of heads that stay, None where none are pruned.
    scores, head_scores : (d_m,) and (kv_heads,), or None
        Their scores, Eq. (10); None where there are none.
    trace : llama.LayerTrace
        Inputs of the linears from which the statistics are taken: in the forward of the
        UNcompressed layer, or of each stage where there are stages.
    output : (N, L, d)
        Output of the compressed layer, the input of the next one.
    losses : list of float
        Of ``refinement.Descent``; empty where nothing is refined.
    """

    weights: dict[str, Array]
    ranks: dict[str, int | None]
    kept: NDArray[np.int64] | None
    kept_heads: NDArray[np.int64] | None
    scores: Array | None
    head_scores: Array | None
    trace: llama.LayerTrace
    output: Array
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Factors:
    """Factors of a matrix.

    Attributes
    ----------
    L : (d_out, r)
    R : (r, d_in)
    S : (min(d_out, d_in),)
        Singular values of the matrix as the method weights it.
    bias : (d_out,) or None
        What the method adds to the linear's own bias.
    """

    L: Array
    R: Array
    S: Array
    bias: Array | None = None


def factor(W: Array, X: Array, r: int, method: LowRank, settings: Settings) -> Factors:
    """Factor a matrix by the low-rank method named.

    Parameters
    ----------
    W : (d_out, d_in)
    X : (tokens, d_in)
        Its input.
    r : int
    method : {"awsvd", "svd", "asvd", "pca", "afm"}
    settings : Settings

    Notes
    -----
    SPEC: ``algorithm.low-rank``.
    """
    n = X.shape[0]
    if method == "svd":
        return Factors(*lowrank.svd_low_rank(W, r))
    if method == "pca":
        return Factors(*pca.pca(W, statistics.second_moment(X), r))
    if method == "afm":
        C, t = statistics.second_moment(X), statistics.token_sum(X)
        return Factors(*pca.afm(W, C, t, n, r))
    if method == "asvd":
        magnitudes = statistics.sum_of_magnitudes(X)
        scale = lowrank.magnitude_scale(magnitudes, n, settings.asvd_alpha)
    else:
        scale = lowrank.column_scale(statistics.feature_norms(X), settings.weighting)
    return Factors(*lowrank.awsvd(W, scale, r))


def matrices(
    layer: Mapping[str, Array], sublayer: Sublayer, settings: Settings
) -> dict[str, Array]:
    """Matrices of a sub-layer that a low-rank method takes, q and k stacked where they are joint.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    sublayer : {"mha", "ffn"}
    settings : Settings
    """
    names = MHA if sublayer == "mha" else FFN
    W = {m: layer[f"{name}.weight"] for m, name in names.items()}
    if sublayer == "mha" and settings.joint_qk:
        W = {"qk": joint.stacked([W.pop("q"), W.pop("k")]), **W}
    return W


def input_of(m: str, trace: llama.LayerTrace) -> Array:
    """Input of matrix `m`, ``(tokens, d_in)``: one for q, k and v, one for gate and up."""
    X: Array = getattr(trace, STAGE_OF[m])
    return X.reshape(-1, X.shape[-1])


def layer_sizes(
    layer: Mapping[str, Array],
    shape: llama.LlamaShape,
    settings: Settings,
    ratios: Mapping[Sublayer, float] | None = None,
    spectra: Mapping[str, Array] | None = None,
) -> Sizes:
    """Ranks, channels and heads of a layer, before any is rounded to a multiple.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    shape : llama.LlamaShape
    settings : Settings
    ratios : mapping, optional
        MGAA's ratio of each sub-layer; the layer ratio by default.
    spectra : mapping, optional
        Singular values by matrix, for MGAA within the sub-layers.

    Notes
    -----
    SPEC: ``budget.ranks``, ``budget.channels``, ``algorithm.heads``, ``mgaa.plan``.
    """
    ranks: dict[str, int | None] = {}
    bands: dict[Sublayer, tuple[int, int]] = {}
    for sublayer in settings.sublayers:
        s = settings.layer_ratio if ratios is None else ratios[sublayer]
        if settings.low_rank(sublayer) is None:
            d_m = layer[f"{FFN['up']}.weight"].shape[0]
            units = shape.kv_heads if sublayer == "mha" else d_m
            bands[sublayer] = budget.removed_band(units, s, settings.least)
        else:
            W = matrices(layer, sublayer, settings)
            shapes = {m: (w.shape[0], w.shape[1]) for m, w in W.items()}
            if s == 0:
                # What MGAA leaves alone; uniform ranks would be rounded down.
                ranks |= dict.fromkeys(shapes)
            elif spectra is None:
                a = 1 if settings.between else settings.a
                ranks |= budget.ranks(shapes, s, a, settings.nested)
            else:
                kept = (1 - s) * sum(w.size for w in W.values())
                floors = mgaa.rank_floors(shapes, kept, settings.mgaa_floor)
                own = {m: spectra[m] for m in shapes}
                ranks |= mgaa.common_energy_ranks(own, shapes, kept, floors)
    return Sizes(ranks, bands.get("mha"), bands.get("ffn"))


def factor_matrices(
    layer: Mapping[str, Array],
    trace: llama.LayerTrace,
    sublayer: Sublayer,
    sizes: Sizes,
    settings: Settings,
    stage: Stage | None = None,
) -> dict[str, Array]:
    """New tensors of a sub-layer's linears: ``L`` and ``R``, or the matrix where it stays dense.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    trace : llama.LayerTrace
    sublayer : {"mha", "ffn"}
    sizes : Sizes
    settings : Settings
    stage : str, optional
        Only the matrices that have this input.

    Notes
    -----
    SPEC: ``algorithm.mha``, ``algorithm.low-rank``.
    """
    method = settings.low_rank(sublayer)
    assert method is not None
    names = MHA if sublayer == "mha" else FFN
    new: dict[str, Array] = {}
    for m, W in matrices(layer, sublayer, settings).items():
        if stage not in (None, STAGE_OF[m]):
            continue
        rows = ["q", "k"] if m == "qk" else [m]
        r = sizes.ranks[m]
        if r is None:
            for part in rows:
                new |= {k: v for k, v in layer.items() if k.startswith(f"{names[part]}.")}
            continue
        factors = factor(W, input_of(m, trace), r, method, settings)
        counts = [layer[f"{names[part]}.weight"].shape[0] for part in rows]
        new[llama.SHARED_RIGHT if m == "qk" else f"{names[m]}.right.weight"] = factors.R
        for part, L in zip(rows, joint.split(factors.L, counts), strict=True):
            new[f"{names[part]}.left.weight"] = L
        extra = np.zeros(W.shape[0]) if factors.bias is None else factors.bias
        for part, b in zip(rows, joint.split(extra, counts), strict=True):
            own = layer.get(f"{names[part]}.bias")
            if own is not None:
                new[f"{names[part]}.left.bias"] = own + b
            elif factors.bias is not None:
                new[f"{names[part]}.left.bias"] = b
    return new


def weight_scores(
    layer: Mapping[str, Array],
    trace: llama.LayerTrace,
    m: str,
    settings: Settings,
    gradients: Mapping[str, Array] | None,
    original: Mapping[str, Array] | None = None,
) -> Array:
    """Scores of the single weights of matrix `m`, ``(d_out, d_in)``.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    trace : llama.LayerTrace
    m : str
    settings : Settings
    gradients : mapping or None
        Gradients of the loss by the layer's weights, for ``taylor``.
    original : mapping, optional
        The weights that they belong to; `layer` by default.

    Notes
    -----
    SPEC: ``algorithm.scores``.
    """
    name = f"{(MHA | FFN)[m]}.weight"
    if settings.importance == "magnitude":
        return magnitude_importance(layer[name])
    if settings.importance == "taylor":
        assert gradients is not None
        return taylor_importance((original or layer)[name], gradients[name])
    return weight_importance(layer[name], statistics.feature_norms(input_of(m, trace)))


def compress_ffn(
    layer: Mapping[str, Array],
    trace: llama.LayerTrace,
    band: tuple[int, int],
    settings: Settings,
    gradients: Mapping[str, Array] | None = None,
    original: Mapping[str, Array] | None = None,
) -> tuple[dict[str, Array], NDArray[np.int64], Array | None]:
    """The FFN step: group scores by Eq. (10), channels by Eq. (11); or by least squares.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    trace : llama.LayerTrace
    band : (int, int)
        Removed band of the channels.
    settings : Settings
    gradients : mapping, optional
        As for ``weight_scores``.
    original : mapping, optional
        The weights that the gradients belong to; `layer` by default.

    Returns
    -------
    weights : dict
        The new tensors of the FFN's linears.
    kept : (width,)
        Kept channels.
    scores : (d_m,) or None
        Group scores; None for ``obs``.

    Notes
    -----
    SPEC: ``algorithm.ffn``, ``algorithm.update``, ``obs.keep``. The biases of gate and up lose the
    entries of the removed channels; down's bias belongs to no channel and stays.
    """
    gate, up, W_down = (layer[f"{name}.weight"] for name in FFN.values())
    scores = None
    if settings.selection == "obs":
        C = statistics.second_moment(input_of("down", trace))
        order, _ = removal_order(W_down, C, band[1] - band[0], settings.ridge)
        kept = np.setdiff1d(np.arange(W_down.shape[1]), order)
    else:
        of_gate, of_up, of_down = (
            weight_scores(layer, trace, m, settings, gradients, original) for m in FFN
        )
        scores = group_scores(of_up, of_gate, of_down, settings.aggregation)
        kept = kept_channels(scores, *band)
    up, gate, down = prune_ffn(up, gate, W_down, kept)
    down = updated(down, W_down, input_of("down", trace), kept, settings)
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


def updated(
    pruned: Array, W: Array, X: Array, kept: NDArray[np.int64], settings: Settings
) -> Array:
    """What reads the channels or heads that stay: as it was, or by least squares.

    Parameters
    ----------
    pruned : (d_out, k)
        The kept columns of W.
    W : (d_out, d_in)
    X : (tokens, d_in)
        Its input.
    kept : (k,)
    settings : Settings

    Notes
    -----
    SPEC: ``algorithm.update``.
    """
    if settings.update == "none":
        return pruned
    return least_squares_update(W, statistics.second_moment(X), kept, settings.ridge)


def compress_heads(
    layer: Mapping[str, Array],
    trace: llama.LayerTrace,
    shape: llama.LlamaShape,
    band: tuple[int, int],
    settings: Settings,
    gradients: Mapping[str, Array] | None = None,
    original: Mapping[str, Array] | None = None,
) -> tuple[dict[str, Array], NDArray[np.int64], Array]:
    """The MHA step by head pruning: scores of the groups of heads, and those that stay.

    Parameters
    ----------
    layer, trace, settings, gradients, original
        As for ``compress_ffn``.
    shape : llama.LlamaShape
    band : (int, int)
        Removed band of the groups.

    Returns
    -------
    weights : dict
        The new tensors of the MHA's linears.
    kept : (groups,)
        Kept groups.
    scores : (kv_heads,)
        Their scores.

    Notes
    -----
    SPEC: ``algorithm.heads``, ``algorithm.update``.
    """
    q, k, v, o = (weight_scores(layer, trace, m, settings, gradients, original) for m in MHA)
    scores = heads.head_scores(q, k, v, o, shape.kv_heads, settings.aggregation)
    kept = kept_channels(scores, *band)
    q, k, v, o = (layer[f"{name}.weight"] for name in MHA.values())
    new = {
        f"{name}.weight": pruned
        for name, pruned in zip(
            MHA.values(), heads.prune_heads(q, k, v, o, kept, shape.kv_heads), strict=True
        )
    }
    name, W_o = f"{MHA['o']}.weight", layer[f"{MHA['o']}.weight"]
    columns = heads.head_rows(kept, W_o.shape[1], shape.kv_heads)
    new[name] = updated(new[name], W_o, input_of("o", trace), columns, settings)
    for m, name in MHA.items():
        if f"{name}.bias" in layer:
            bias = layer[f"{name}.bias"]
            rows = heads.head_rows(kept, bias.size, shape.kv_heads)
            new[f"{name}.bias"] = bias if m == "o" else bias[rows]
    return new, kept, scores


def compress_layer(
    layer: Mapping[str, Array],
    shape: llama.LlamaShape,
    h: Array,
    settings: Settings,
    sizes: Sizes | None = None,
    gradients: Mapping[str, Array] | None = None,
    h_dense: Array | None = None,
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
    sizes : Sizes, optional
        By default ``layer_sizes``, as they are.
    gradients : mapping, optional
        Gradients of the loss of the UNcompressed model by the layer's weights, for ``taylor``.
    h_dense : (N, L, d), optional
        Output of the UNcompressed layers before this one; `h` by default.

    Returns
    -------
    CompressedLayer

    Notes
    -----
    SPEC: ``algorithm.sequence``, ``algorithm.stages``, ``algorithm.refine``.
    """
    sizes = layer_sizes(layer, shape, settings) if sizes is None else sizes
    if not settings.carries_dense:
        return compress_at_once(layer, shape, h, settings, sizes, gradients)
    dense = llama.layer_forward(layer, shape, h if h_dense is None else h_dense)
    if settings.dense_target is None:
        step = compress_at_once(layer, shape, h, settings, sizes, gradients)
    else:
        step = compress_by_stages(layer, shape, h, settings, sizes, gradients, dense)
    if settings.refine == 0:
        return step
    linears = [n for sub in settings.sublayers for n in (MHA if sub == "mha" else FFN).values()]
    names = [
        name
        for name in step.weights
        if name.endswith(".weight") and name.startswith((*linears, llama.SHARED_RIGHT))
    ]
    descent = refined_layer(
        step.weights, names, shape, h, dense.output, settings.refine, settings.ridge
    )
    weights = {**step.weights, **descent.values}
    output = llama.layer_forward(weights, shape, h).output
    return replace(step, weights=weights, output=output, losses=descent.losses)


def compress_at_once(
    layer: Mapping[str, Array],
    shape: llama.LlamaShape,
    h: Array,
    settings: Settings,
    sizes: Sizes,
    gradients: Mapping[str, Array] | None,
) -> CompressedLayer:
    """A layer by the statistics of one forward.

    Parameters
    ----------
    layer, shape, h, settings, sizes, gradients
        As for ``compress_layer``.

    Notes
    -----
    SPEC: ``algorithm.sequence``: one forward of the uncompressed layer gives the statistics of all
    seven linears, so that o and down see what the uncompressed q, k, v, gate and up give them.
    """
    trace = llama.layer_forward(layer, shape, h)
    mha: dict[str, Array] | None = None
    ffn: dict[str, Array] | None = None
    kept = kept_heads = scores = head_scores = None
    if sizes.heads is not None:
        mha, kept_heads, head_scores = compress_heads(
            layer, trace, shape, sizes.heads, settings, gradients
        )
    elif settings.mha is not None:
        mha = factor_matrices(layer, trace, "mha", sizes, settings)
    if sizes.channels is not None:
        ffn, kept, scores = compress_ffn(layer, trace, sizes.channels, settings, gradients)
    elif settings.ffn is not None:
        ffn = factor_matrices(layer, trace, "ffn", sizes, settings)
    new = dict(layer)
    for names, part in ((MHA, mha), (FFN, ffn)):
        if part is not None:
            new = {k: v for k, v in new.items() if not k.startswith(tuple(names.values()))} | part
    output = llama.layer_forward(new, shape, h).output
    return CompressedLayer(new, sizes.ranks, kept, kept_heads, scores, head_scores, trace, output)


def compress_by_stages(
    layer: Mapping[str, Array],
    shape: llama.LlamaShape,
    h: Array,
    settings: Settings,
    sizes: Sizes,
    gradients: Mapping[str, Array] | None,
    dense: llama.LayerTrace,
) -> CompressedLayer:
    """A layer stage by stage, each matrix regressed to a target that the dense model has part in.

    Parameters
    ----------
    layer, shape, h, settings, sizes, gradients
        As for ``compress_layer``.
    dense : llama.LayerTrace
        Of the layer in the UNcompressed model.

    Notes
    -----
    SPEC: ``algorithm.stages``, ``target.regression``.
    """
    assert settings.dense_target is not None
    targets, current = dict(layer), dict(layer)
    kept = kept_heads = scores = head_scores = None
    seen: dict[str, Array] = {}
    for stage in STAGES:
        trace = llama.layer_forward(current, shape, h)
        X, X_d = (getattr(t, stage) for t in (trace, dense))
        seen[stage] = X
        X, X_d = (x.reshape(-1, x.shape[-1]) for x in (X, X_d))
        C, M = statistics.second_moment(X), statistics.cross_moment(X_d, X)
        for sublayer in settings.sublayers:
            names = MHA if sublayer == "mha" else FFN
            for m, linear in names.items():
                if STAGE_OF[m] == stage:
                    name = f"{linear}.weight"
                    targets[name] = current[name] = regressed_weight(
                        layer[name], C, M, settings.dense_target, settings.ridge
                    )
            new: dict[str, Array] = {}
            if settings.low_rank(sublayer) is not None:
                new = factor_matrices(targets, trace, sublayer, sizes, settings, stage)
            elif sublayer == "mha" and stage == "o":
                assert sizes.heads is not None
                new, kept_heads, head_scores = compress_heads(
                    targets, trace, shape, sizes.heads, settings, gradients, layer
                )
            elif sublayer == "ffn" and stage == "down":
                assert sizes.channels is not None
                new, kept, scores = compress_ffn(
                    targets, trace, sizes.channels, settings, gradients, layer
                )
            done = tuple(names[m] for m in names if any(k.startswith(f"{names[m]}.") for k in new))
            current = {k: v for k, v in current.items() if not k.startswith(done)} | new
    output = llama.layer_forward(current, shape, h)
    trace = replace(output, **seen)
    return CompressedLayer(
        current, sizes.ranks, kept, kept_heads, scores, head_scores, trace, output.output
    )


@dataclass(frozen=True)
class Measurements:
    """What an allocation has to know of the uncompressed model.

    Attributes
    ----------
    similarities : list of dict
        Eq. (12) of each sub-layer, by layer.
    spectra : list of dict
        Singular values by matrix, as the method weights it, by layer.
    losses : list of arrays (d_m - 1,)
        What the removals of channels cost one by one, by layer; empty where not asked for.
    divergences : list of dict
        By matrix, or ``ffn``, mean divergence of the model that has it alone at the middle of its
        curve, by layer; empty where not asked for.
    """

    similarities: list[dict[Sublayer, float]]
    spectra: list[dict[str, Array]]
    losses: list[Array] = field(default_factory=list)
    divergences: list[dict[str, float]] = field(default_factory=list)


def measure(
    weights: Mapping[str, Array],
    shape: llama.LlamaShape,
    ids: NDArray[np.int64],
    settings: Settings,
) -> Measurements:
    """One forward of the uncompressed model: similarities and spectra of its sub-layers.

    With ``marginal`` the losses of its channels too, and a forward of the probes for each module.

    Parameters
    ----------
    weights, shape, ids, settings
        As for ``compress``.

    Notes
    -----
    SPEC: ``mgaa.measure``, ``marginal.measure``.
    """
    h = llama.embed(weights, ids)
    measured = Measurements([], [])
    for index in range(shape.layers):
        layer = llama.layer_weights(weights, index)
        trace = llama.layer_forward(layer, shape, h)
        before, between, after = (
            x.reshape(-1, h.shape[-1]) for x in (h, trace.middle, trace.output)
        )
        measured.similarities.append(
            {
                "mha": mgaa.cosine_sum(before, between) / before.shape[0],
                "ffn": mgaa.cosine_sum(between, after) / before.shape[0],
            }
        )
        found: dict[str, Array] = {}
        for sublayer in settings.sublayers:
            method = settings.low_rank(sublayer)
            if method is not None and (settings.within or settings.marginal):
                for m, W in matrices(layer, sublayer, settings).items():
                    found[m] = factor(W, input_of(m, trace), 0, method, settings).S
        measured.spectra.append(found)
        if settings.marginal and settings.ffn == "channels":
            W, C = layer[f"{FFN['down']}.weight"], statistics.second_moment(input_of("down", trace))
            measured.losses.append(removal_order(W, C, W.shape[1] - 1, settings.ridge)[1])
        if settings.marginal:
            curves = curves_of(layer, index, measured, settings)
            measured.divergences.append(
                probe(weights, shape, ids[:PROBES], index, trace, curves, settings)
            )
        h = trace.output
    return measured


def probe(
    weights: Mapping[str, Array],
    shape: llama.LlamaShape,
    ids: NDArray[np.int64],
    index: int,
    trace: llama.LayerTrace,
    curves: Mapping[str, marginal.Curve],
    settings: Settings,
) -> dict[str, float]:
    """How much the model minds when one matrix of a layer, or its FFN, alone is made small.

    Parameters
    ----------
    weights, shape, settings
        As for ``compress``.
    ids : (N, L)
        The probes.
    index : int
        Of the layer.
    trace : llama.LayerTrace
        Its forward over all calibration samples.
    curves : mapping
        Of the layer, as ``curves_of`` returns them.

    Returns
    -------
    dict
        By matrix, or ``ffn``; without those that have one size only.

    Notes
    -----
    SPEC: ``marginal.measure``, ``marginal.sensitivity``.
    """
    layer = llama.layer_weights(weights, index)
    Z = llama.logits(weights, shape, ids)
    found: dict[str, float] = {}
    for m, (held, _) in curves.items():
        if len(held) == 1:
            continue
        at = marginal.middle(len(held))
        sublayer: Sublayer = "ffn" if m == "ffn" or m in FFN else "mha"
        if m == "ffn":
            new, _, _ = compress_ffn(layer, trace, (0, len(held) - 1 - at), settings)
        else:
            others = dict.fromkeys(matrices(layer, sublayer, settings))
            sizes = Sizes({**others, m: at + 1})
            new = factor_matrices(layer, trace, sublayer, sizes, settings)
        names = tuple((MHA if sublayer == "mha" else FFN).values())
        prefix = f"model.layers.{index}."
        small = {
            name: value
            for name, value in weights.items()
            if not name.removeprefix(prefix).startswith(names)
        }
        small |= {f"{prefix}{name}": value for name, value in new.items()}
        Z_hat = llama.logits(small, shape, ids)
        tokens = (z.reshape(-1, z.shape[-1]) for z in (Z, Z_hat))
        found[m] = marginal.divergence_sum(*tokens) / ids.size
    return found


def curves_of(
    layer: Mapping[str, Array], index: int, measured: Measurements, settings: Settings
) -> dict[str, marginal.Curve]:
    """Curves of a layer's matrices, and of its FFN where that loses channels.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    index : int
        Of the layer.
    measured : Measurements
    settings : Settings

    Returns
    -------
    dict
        By matrix, or ``ffn``.

    Notes
    -----
    SPEC: ``marginal.curve``.
    """
    curves: dict[str, marginal.Curve] = {}
    for sublayer in settings.sublayers:
        if settings.low_rank(sublayer) is None:
            u = per_channel(layer, settings)
            curves["ffn"] = marginal.channel_curve(measured.losses[index], u)
            continue
        for m, W in matrices(layer, sublayer, settings).items():
            bias = new_bias(layer, sublayer, m, settings)
            S = measured.spectra[index][m]
            curves[m] = marginal.rank_curve(S, (W.shape[0], W.shape[1]), bias)
    return curves


def new_bias(layer: Mapping[str, Array], sublayer: Sublayer, m: str, settings: Settings) -> int:
    """Parameters of the bias that a matrix has once it is factored, and has not yet: AFM's.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    sublayer : {"mha", "ffn"}
    m : str
    settings : Settings
    """
    if settings.low_rank(sublayer) != "afm":
        return 0
    names = [(MHA | FFN)[part] for part in (m if m == "qk" else [m])]
    return sum(layer[f"{n}.weight"].shape[0] for n in names if f"{n}.bias" not in layer)


def per_channel(layer: Mapping[str, Array], settings: Settings) -> int:
    """Parameters of a channel of the FFN: a row of gate and of up, their biases, a column of down.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    settings : Settings
    """
    d_m: int = layer[f"{FFN['up']}.weight"].shape[0]
    return compressible(layer, "ffn", settings) // d_m


def parameters_of(layer: Mapping[str, Array], sizes: Sizes, settings: Settings) -> int:
    """Parameters of a layer's matrices, and of its FFN's channels, at the sizes given.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    sizes : Sizes
    settings : Settings

    Notes
    -----
    SPEC: ``marginal.plan``. More than those of the matrix itself, where AFM's bias makes it so.
    """
    held = 0
    for sublayer in settings.sublayers:
        if settings.low_rank(sublayer) is None:
            assert sizes.channels is not None
            low, high = sizes.channels
            held += compressible(layer, sublayer, settings)
            held -= (high - low) * per_channel(layer, settings)
            continue
        for m, W in matrices(layer, sublayer, settings).items():
            r = sizes.ranks[m]
            if r is None:
                held += W.size
            else:
                held += r * sum(W.shape) + new_bias(layer, sublayer, m, settings)
    return held


def allocate(
    weights: Mapping[str, Array],
    shape: llama.LlamaShape,
    settings: Settings,
    measured: Measurements | None = None,
) -> list[Sizes]:
    """Sizes of all layers: MGAA's, by similarities (between) and spectra (within), or marginal.

    Parameters
    ----------
    weights, shape, settings
        As for ``compress``.
    measured : Measurements, optional
        For MGAA and the marginal allocation.

    Returns
    -------
    list of Sizes
        By layer.

    Notes
    -----
    SPEC: ``mgaa.plan``, ``budget.multiple``.
    """
    layers = [llama.layer_weights(weights, index) for index in range(shape.layers)]
    if settings.marginal:
        assert measured is not None
        sizes = marginal_allocation(weights, shape, settings, measured)
        return as_multiples(sizes, layers[0], settings)
    keys = [(index, sublayer) for index in range(shape.layers) for sublayer in settings.sublayers]
    p = dict.fromkeys(keys, settings.layer_ratio)
    if settings.between:
        assert measured is not None
        highest = mgaa.highest_ratio(settings.layer_ratio, settings.mgaa_floor)
        p = dict(
            zip(
                keys,
                mgaa.sublayer_ratios(
                    mgaa.standard_scores([measured.similarities[i][sub] for i, sub in keys]),
                    [compressible(layers[i], sub, settings) for i, sub in keys],
                    settings.layer_ratio,
                    settings.mgaa_alpha,
                    [highest] * len(keys),
                ),
                strict=True,
            )
        )
    spectra: list[dict[str, Array] | None] = [None] * shape.layers
    if settings.within:
        assert measured is not None
        spectra = list(measured.spectra)
    sizes = [
        layer_sizes(layer, shape, settings, {s: p[index, s] for s in settings.sublayers}, spectrum)
        for index, (layer, spectrum) in enumerate(zip(layers, spectra, strict=True))
    ]
    return as_multiples(sizes, layers[0], settings)


def as_multiples(
    sizes: Sequence[Sizes], layer: Mapping[str, Array], settings: Settings
) -> list[Sizes]:
    """Round what each matrix and each FFN keeps to a multiple, over all layers.

    Parameters
    ----------
    sizes : sequence of Sizes
        By layer.
    layer : mapping
        Weights of one of them, names relative to it.
    settings : Settings

    Notes
    -----
    SPEC: ``budget.multiple``.
    """
    new = [replace(size, ranks=dict(size.ranks)) for size in sizes]
    for sublayer in settings.sublayers:
        if settings.low_rank(sublayer) is None:
            continue
        for m, W in matrices(layer, sublayer, settings).items():
            r = {i: size.ranks[m] for i, size in enumerate(new)}
            factored = {i: r_l for i, r_l in r.items() if r_l is not None}
            rounded = budget.rounded_sizes(
                list(factored.values()), sum(W.shape), W.size, settings.multiple
            )
            for i, r_l in zip(factored, rounded, strict=True):
                new[i].ranks[m] = r_l
    bands = {i: size.channels for i, size in enumerate(new) if size.channels is not None}
    d_m = layer[f"{FFN['up']}.weight"].shape[0]
    kept = {i: d_m - (high - low) for i, (low, high) in bands.items() if high > low}
    # All channels hold as much.
    rounded = budget.rounded_sizes(list(kept.values()), 1, d_m, settings.multiple)
    for i, k in zip(kept, rounded, strict=True):
        channels = band_of_width(d_m, d_m if k is None else k, settings)
        new[i] = replace(new[i], channels=channels)
    return new


def band_of_width(d_m: int, k: int, settings: Settings) -> tuple[int, int]:
    """Removed band that leaves `k` of `d_m` channels, one of the top among them.

    Parameters
    ----------
    d_m, k : int
    settings : Settings

    Notes
    -----
    SPEC: ``budget.multiple``.
    """
    low = min(budget.removed_band(d_m, 0, settings.least)[0], k - 1)
    return low, low + d_m - k


def marginal_allocation(
    weights: Mapping[str, Array],
    shape: llama.LlamaShape,
    settings: Settings,
    measured: Measurements,
) -> list[Sizes]:
    """Sizes of all layers by what a parameter is worth, of as many as even ratios would keep.

    Parameters
    ----------
    weights, shape, settings, measured
        As for ``allocate``.

    Notes
    -----
    SPEC: ``marginal.plan``.
    """
    layers = [llama.layer_weights(weights, index) for index in range(shape.layers)]
    of_layers = [curves_of(layer, i, measured, settings) for i, layer in enumerate(layers)]
    curves: dict[str, marginal.Curve] = {}
    sensitivities: dict[str, float] = {}
    floors: dict[str, int] = {}
    for index, of_layer in enumerate(of_layers):
        for m, (held, errors) in of_layer.items():
            name = f"{index}.{m}"
            curves[name] = (held, errors)
            divergence = measured.divergences[index].get(m, 0.0)
            error = errors[marginal.middle(len(held))]
            sensitivities[name] = marginal.sensitivity(divergence, error)
            floors[name] = int(settings.mgaa_floor * ((1 - settings.layer_ratio) * held[-1]))
    even = sum(
        parameters_of(layer, layer_sizes(layer, shape, settings), settings) for layer in layers
    )
    places = marginal.marginal_sizes(curves, sensitivities, even, floors)
    sizes = []
    for index, of_layer in enumerate(of_layers):
        ranks: dict[str, int | None] = {}
        channels = None
        for m, curve in of_layer.items():
            at = places[f"{index}.{m}"]
            last = len(curve[0]) - 1
            if m == "ffn":
                channels = (0, last - at)
            else:
                ranks[m] = None if at == last else at + 1
        sizes.append(Sizes(ranks, None, channels))
    return sizes


def compressible(layer: Mapping[str, Array], sublayer: Sublayer, settings: Settings) -> int:
    """Parameters of a sub-layer that a ratio is a share of.

    Parameters
    ----------
    layer : mapping
        Weights of the layer, names relative to it.
    sublayer : {"mha", "ffn"}
    settings : Settings

    Notes
    -----
    SPEC: ``mgaa.plan``. Biases are among them where they go with a channel or a head.
    """
    names = MHA if sublayer == "mha" else FFN
    weights = sum(layer[f"{name}.weight"].size for name in names.values())
    if settings.low_rank(sublayer) is not None:
        return weights
    whole = [name for m, name in names.items() if m not in ("o", "down")]
    return weights + sum(layer[f"{name}.bias"].size for name in whole if f"{name}.bias" in layer)


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
    measured = None
    if settings.between or settings.within or settings.marginal:
        measured = measure(weights, shape, ids, settings)
    sizes = allocate(weights, shape, settings, measured)
    gradients: Mapping[str, Array] = {}
    if settings.importance == "taylor":
        gradients = gradient.loss_gradients(weights, shape, ids)
    h = h_dense = llama.embed(weights, ids)
    steps = []
    for index in range(shape.layers):
        layer = llama.layer_weights(weights, index)
        own = llama.layer_weights(gradients, index)
        step = compress_layer(layer, shape, h, settings, sizes[index], own, h_dense)
        if settings.carries_dense:
            h_dense = llama.layer_forward(layer, shape, h_dense).output
        new |= {f"model.layers.{index}.{name}": value for name, value in step.weights.items()}
        steps.append(step)
        h = step.output
    return new, steps
