"""LoRA on a compressed model, and the merging of its updates: Eq. (12), (13), Section 3.4.

The paper writes an update ``A B``, A of ``(d_out, r_l)`` and B of ``(r_l, d_in)``. LoRA's own paper
and PEFT swap the letters: PEFT's ``lora_B`` is A here, its ``lora_A`` is B.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from . import joint, llama
from .budget import Shape, break_even_rank
from .gradient import outer
from .llama import LlamaShape, Weights
from .lowrank import awsvd, low_rank_apply
from .statistics import feature_norms

Array = NDArray[np.float64]
Mode = Literal["exact", "same-size"]


def scaling(alpha: float, r: int) -> float:
    """The factor gamma of an update of rank r: ``alpha / r``.

    Notes
    -----
    SPEC: ``lora.scaling``.
    """
    return alpha / r


def dense_apply(W: Array, A: Array, B: Array, gamma: float, x: Array) -> Array:
    """Eq. (12): ``y = (W + gamma A B) x``, the update beside the matrix.

    Parameters
    ----------
    W : (d_out, d_in)
    A : (d_out, r_l)
    B : (r_l, d_in)
    gamma : float
    x : (..., d_in)

    Returns
    -------
    (..., d_out)

    Notes
    -----
    SPEC: ``lora.dense``.
    """
    return x @ W.T + gamma * low_rank_apply(A, B, x)


def factored_apply(L: Array, R: Array, A: Array, B: Array, gamma: float, x: Array) -> Array:
    """Eq. (13): ``y = (L R + gamma A B) x``, the update beside both factors.

    Parameters
    ----------
    L : (d_out, r)
    R : (r, d_in)
    A : (d_out, r_l)
    B : (r_l, d_in)
    gamma : float
    x : (..., d_in)

    Returns
    -------
    (..., d_out)

    Notes
    -----
    SPEC: ``lora.factored``.
    """
    return low_rank_apply(L, R, x) + gamma * low_rank_apply(A, B, x)


def gradients(A: Array, B: Array, gamma: float, x: Array, dy: Array) -> tuple[Array, Array, Array]:
    """Backward of ``y = gamma A (B x)``.

    Parameters
    ----------
    A : (d_out, r_l)
    B : (r_l, d_in)
    gamma : float
    x : (..., d_in)
    dy : (..., d_out)
        Gradient of the loss by the output.

    Returns
    -------
    dA : (d_out, r_l)
    dB : (r_l, d_in)
    dx : (..., d_in)

    Notes
    -----
    SPEC: ``lora.gradient``.
    """
    z, dz = x @ B.T, gamma * (dy @ A)
    return gamma * outer(dy, z), outer(dz, x), dz @ B


def gradients_of_update(G: Array, A: Array, B: Array, gamma: float) -> tuple[Array, Array]:
    """Gradients by A and B where that by the whole matrix, ``W + gamma A B``, is G.

    Parameters
    ----------
    G : (d_out, d_in)
    A : (d_out, r_l)
    B : (r_l, d_in)
    gamma : float

    Returns
    -------
    dA : (d_out, r_l)
    dB : (r_l, d_in)

    Notes
    -----
    SPEC: ``lora.gradient``.
    """
    return gamma * G @ B.T, gamma * A.T @ G


def merge_dense(W: Array, A: Array, B: Array, gamma: float) -> Array:
    """Eq. (12) merged: ``W + gamma A B``.

    Parameters
    ----------
    W : (d_out, d_in)
    A : (d_out, r_l)
    B : (r_l, d_in)
    gamma : float

    Returns
    -------
    (d_out, d_in)

    Notes
    -----
    SPEC: ``lora.merge-dense``.
    """
    return W + gamma * (A @ B)


def merge_factors(L: Array, R: Array, A: Array, B: Array, gamma: float) -> tuple[Array, Array]:
    """Eq. (13) merged without loss: ``[L, gamma A]`` and ``[R; B]``, of rank ``r + r_l``.

    Parameters
    ----------
    L : (d_out, r)
    R : (r, d_in)
    A : (d_out, r_l)
    B : (r_l, d_in)
    gamma : float

    Returns
    -------
    L : (d_out, r + r_l)
    R : (r + r_l, d_in)

    Notes
    -----
    SPEC: ``lora.merge-factors``.
    """
    return np.concatenate([L, gamma * A], axis=1), np.concatenate([R, B])


def merged_rank(shape: Shape, r: int, r_l: int) -> int | None:
    """Rank of a factored matrix after its update is merged; None where it is stored dense.

    Parameters
    ----------
    shape : (d_out, d_in)
    r, r_l : int
        Ranks of the factors and of the update.

    Notes
    -----
    SPEC: ``lora.break-even``.
    """
    return r + r_l if r + r_l < break_even_rank(shape) else None


def stacked_update(updates: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The update of stacked matrices: ``A = diag(A_1, A_2, ...)``, ``B = [B_1; B_2; ...]``.

    Parameters
    ----------
    updates : sequence of (A_m, B_m)
        ``(d_m, r_m)`` and ``(r_m, d_in)``, in the order of the stack. A matrix without an update
        has one of rank 0.

    Returns
    -------
    A : (sum of d_m, sum of r_m)
    B : (sum of r_m, d_in)

    Notes
    -----
    SPEC: ``lora.joint``.
    """
    # SciPy gives a block without columns its rows, which is what rank 0 needs.
    return linalg.block_diag(*(A for A, _ in updates)), np.concatenate([B for _, B in updates])


def merge_same_size(
    L: Array, R: Array, A: Array, B: Array, gamma: float, scale: Array
) -> tuple[Array, Array, Array]:
    """Eq. (13) merged and cut back to rank r: the AWSVD of ``L R + gamma A B``.

    Parameters
    ----------
    L : (d_out, r)
    R : (r, d_in)
    A : (d_out, r_l)
    B : (r_l, d_in)
    gamma : float
    scale : (d_in,)
        Diagonal of D: the norms of the input features.

    Returns
    -------
    L : (d_out, r)
    R : (r, d_in)
    S : (min(d_out, d_in),)
        Singular values of ``(L R + gamma A B) D``, descending.

    Notes
    -----
    SPEC: ``lora.merge-same-size``.
    """
    return awsvd(merge_dense(L @ R, A, B, gamma), scale, L.shape[1])


@dataclass(frozen=True)
class Update:
    """An update of a linear: ``A`` (d_out, r_l), ``B`` (r_l, d_in), ``gamma``."""

    A: Array
    B: Array
    gamma: float


Updates = Mapping[str, Update]
"""By the linear's name relative to its layer; also by that of a factor, such as
``self_attn.q_proj.left``."""

_INPUTS = {
    "self_attn.q_proj": "attention",
    "self_attn.k_proj": "attention",
    "self_attn.v_proj": "attention",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "ffn",
    "mlp.up_proj": "ffn",
    "mlp.down_proj": "down",
}


@dataclass(frozen=True)
class _Factored:
    """Linears with one right factor: one of its own, or q and k."""

    names: tuple[str, ...]
    right: str


def _factored(weights: Weights, updates: Updates) -> list[_Factored]:
    """The factored linears that have updates, those that share a right factor together."""
    found: dict[str, tuple[str, ...]] = {}
    for name in _INPUTS:
        if f"{name}.left.weight" in weights:
            right = llama.right_name(weights, name)
            found[right] = (*found.get(right, ()), name)
    return [
        _Factored(names, right)
        for right, names in found.items()
        if any(name in updates for name in names)
    ]


def _stack(
    weights: Weights, updates: Updates, group: _Factored
) -> tuple[Array, Array, Array, Array, float]:
    """L, R, A, B and gamma of a group, stacked by rows."""
    Ls = [weights[f"{name}.left.weight"] for name in group.names]
    R = weights[group.right]
    gamma = next(updates[name].gamma for name in group.names if name in updates)
    none = [(np.zeros((L.shape[0], 0)), np.zeros((0, R.shape[1]))) for L in Ls]
    pairs = [
        (updates[name].A, updates[name].B) if name in updates else nothing
        for name, nothing in zip(group.names, none, strict=True)
    ]
    return joint.stacked(Ls), R, *stacked_update(pairs), gamma


def add_updates(weights: Weights, updates: Updates) -> dict[str, Array]:
    """A layer with the updates of its matrices added: the dense ones, and single factors.

    Parameters
    ----------
    weights : mapping
        Of one layer, names relative to it, dense or factored.
    updates : mapping

    Notes
    -----
    SPEC: ``lora.merge-dense``.
    """
    merged = dict(weights)
    for name, update in updates.items():
        if f"{name}.weight" in weights:
            W = weights[f"{name}.weight"]
            merged[f"{name}.weight"] = merge_dense(W, update.A, update.B, update.gamma)
    return merged


def merge_exact(weights: Weights, updates: Updates) -> dict[str, Array]:
    """A layer that computes what it does with its updates beside it.

    Parameters
    ----------
    weights : mapping
        Of one layer, names relative to it, dense or factored.
    updates : mapping

    Returns
    -------
    dict
        Names as in `weights`; a factored linear that became dense under ``.weight`` and ``.bias``.

    Notes
    -----
    SPEC: ``lora.merge-factors``, ``lora.break-even``, ``lora.joint``.
    """
    merged = add_updates(weights, updates)
    for group in _factored(merged, updates):
        L, R, A, B, gamma = _stack(merged, updates, group)
        if merged_rank((L.shape[0], R.shape[1]), L.shape[1], A.shape[1]) is not None:
            L, R = merge_factors(L, R, A, B, gamma)
            merged |= _split(merged, group, L, "left.weight") | {group.right: R}
            continue
        merged |= _split(merged, group, merge_dense(L @ R, A, B, gamma), "weight")
        del merged[group.right]
        for name in group.names:
            del merged[f"{name}.left.weight"]
            if f"{name}.left.bias" in merged:
                merged[f"{name}.bias"] = merged.pop(f"{name}.left.bias")
    return merged


def _split(weights: Weights, group: _Factored, stack: Array, kind: str) -> dict[str, Array]:
    """The rows of a stack that belong to each linear of a group, by name."""
    sizes = [weights[f"{name}.left.weight"].shape[0] for name in group.names]
    parts = joint.split(stack, sizes)
    return {f"{name}.{kind}": part for name, part in zip(group.names, parts, strict=True)}


def merge_layer(
    weights: Weights, shape: LlamaShape, h: Array, updates: Updates, mode: Mode
) -> tuple[dict[str, Array], Array]:
    """Merge the updates of one layer.

    Parameters
    ----------
    weights : mapping
        Of one layer, names relative to it, dense or factored.
    shape : LlamaShape
    h : (N, L, d)
        Input of the layer: the output of the merged layers before it.
    updates : mapping
    mode : {"exact", "same-size"}

    Returns
    -------
    weights : dict
    output : (N, L, d)
        Of the merged layer, the input of the next one.

    Notes
    -----
    SPEC: ``lora.sequence``.
    """
    exact = merge_exact(weights, updates)
    trace = llama.layer_forward(exact, shape, h)
    if mode == "exact":
        return exact, trace.output
    cut = add_updates(weights, updates)
    for group in _factored(cut, updates):
        X = getattr(trace, _INPUTS[group.names[0]])
        x = feature_norms(X.reshape(-1, X.shape[-1]))
        L, R, _ = merge_same_size(*_stack(cut, updates, group), scale=x)
        cut |= _split(cut, group, L, "left.weight") | {group.right: R}
    return cut, llama.layer_forward(cut, shape, h).output


def merge(
    weights: Weights, shape: LlamaShape, ids: llama.Ids, updates: Sequence[Updates], mode: Mode
) -> dict[str, Array]:
    """Merge the updates of a whole model.

    Parameters
    ----------
    weights : mapping
        Under their names in a Hugging Face checkpoint, dense or factored.
    shape : LlamaShape
    ids : (N, L)
        Samples that the statistics are taken on; for ``exact`` they do not matter.
    updates : sequence of mappings
        One per layer.
    mode : {"exact", "same-size"}

    Returns
    -------
    dict

    Notes
    -----
    SPEC: ``lora.sequence``.
    """
    merged = {name: value for name, value in weights.items() if not name.startswith("model.layers")}
    h = llama.embed(weights, ids)
    for index, of_layer in enumerate(updates):
        layer = llama.layer_weights(weights, index)
        new, h = merge_layer(layer, shape, h, of_layer, mode)
        merged |= {f"model.layers.{index}.{name}": value for name, value in new.items()}
    return merged
