"""LoRA on a compressed model, and the merging of its updates: Eq. (12), (13), Section 3.4.

An update is ``factor * left @ right``, the paper's ``A B``. PEFT names the matrices in the order in
which they are applied: its ``lora_B`` is the left one, its ``lora_A`` the right one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorap.ops.budget import Shape, break_even_rank
from lorap.ops.lowrank import awsvd, low_rank_apply
from lorap.ops.precision import compute_dtype


def scaling(alpha: float, rank: int) -> float:
    """The factor of an update: ``alpha / rank``.

    Notes
    -----
    SPEC: ``lora.scaling``.
    """
    return alpha / rank


def dense_apply(
    weight: Tensor, update_left: Tensor, update_right: Tensor, factor: float, inputs: Tensor
) -> Tensor:
    """Eq. (12): a matrix with its update beside it.

    Parameters
    ----------
    weight : (d_out, d_in)
    update_left : (d_out, update_rank)
    update_right : (update_rank, d_in)
    factor : float
    inputs : (..., d_in)

    Returns
    -------
    (..., d_out)

    Notes
    -----
    SPEC: ``lora.dense``. In a model it is the layer of PEFT that computes it.
    """
    update = low_rank_apply(update_left, update_right, inputs)
    return torch.nn.functional.linear(inputs, weight) + factor * update


def factored_apply(
    left: Tensor,
    right: Tensor,
    update_left: Tensor,
    update_right: Tensor,
    factor: float,
    inputs: Tensor,
) -> Tensor:
    """Eq. (13): two factors with one update beside both.

    Parameters
    ----------
    left : (d_out, rank)
    right : (rank, d_in)
    update_left : (d_out, update_rank)
    update_right : (update_rank, d_in)
    factor : float
    inputs : (..., d_in)

    Returns
    -------
    (..., d_out)

    Notes
    -----
    SPEC: ``lora.factored``. In a model it is ``lorap.recovery.layers`` that computes it.
    """
    update = low_rank_apply(update_left, update_right, inputs)
    return low_rank_apply(left, right, inputs) + factor * update


def merge_dense(weight: Tensor, update_left: Tensor, update_right: Tensor, factor: float) -> Tensor:
    """Eq. (12) merged: ``weight + factor * update_left @ update_right``.

    Parameters
    ----------
    weight : (d_out, d_in)
    update_left : (d_out, update_rank)
    update_right : (update_rank, d_in)
    factor : float

    Returns
    -------
    (d_out, d_in)
        In ``compute_dtype`` of all three: to be rounded once.

    Notes
    -----
    SPEC: ``lora.merge-dense``.
    """
    dtype = compute_dtype(weight, update_left, update_right)
    return weight.to(dtype) + factor * (update_left.to(dtype) @ update_right.to(dtype))


def merge_factors(
    left: Tensor, right: Tensor, update_left: Tensor, update_right: Tensor, factor: float
) -> tuple[Tensor, Tensor]:
    """Eq. (13) merged without loss: factors of rank ``rank + update_rank``.

    Parameters
    ----------
    left : (d_out, rank)
    right : (rank, d_in)
    update_left : (d_out, update_rank)
    update_right : (update_rank, d_in)
    factor : float

    Returns
    -------
    left : (d_out, rank + update_rank)
        ``[left, factor * update_left]``, in ``compute_dtype`` of all four.
    right : (rank + update_rank, d_in)
        ``[right; update_right]``, likewise.

    Notes
    -----
    SPEC: ``lora.merge-factors``.
    """
    dtype = compute_dtype(left, right, update_left, update_right)
    return (
        torch.cat([left.to(dtype), factor * update_left.to(dtype)], dim=1),
        torch.cat([right.to(dtype), update_right.to(dtype)]),
    )


def merged_product(
    left: Tensor, right: Tensor, update_left: Tensor, update_right: Tensor, factor: float
) -> Tensor:
    """Eq. (13) multiplied out: ``left @ right + factor * update_left @ update_right``.

    Parameters
    ----------
    left, right, update_left, update_right, factor
        As for ``merge_factors``.

    Returns
    -------
    (d_out, d_in) float64

    Notes
    -----
    SPEC: ``lora.break-even``, ``lora.merge-same-size``.
    """
    wide = merge_factors(left, right, update_left.double(), update_right, factor)
    return wide[0] @ wide[1]


def merged_rank(shape: Shape, rank: int, update_rank: int) -> int | None:
    """Rank of a factored matrix after its update is merged; None where it is stored dense.

    Parameters
    ----------
    shape : (d_out, d_in)
    rank, update_rank : int

    Notes
    -----
    SPEC: ``lora.break-even``.
    """
    merged = rank + update_rank
    return merged if merged < break_even_rank(shape) else None


def stacked_update(updates: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The update of stacked matrices, of the sum of their updates' ranks.

    Parameters
    ----------
    updates : sequence of (update_left, update_right)
        ``(rows, update_rank)`` and ``(update_rank, d_in)``, in the order of the stack. A matrix
        without an update has one of rank 0.

    Returns
    -------
    update_left : (sum of rows, sum of update ranks)
        Block by block on the diagonal.
    update_right : (sum of update ranks, d_in)
        One above the other.

    Notes
    -----
    SPEC: ``lora.joint``.
    """
    lefts, rights = zip(*updates, strict=True)
    return torch.block_diag(*lefts), torch.cat(rights)  # type: ignore[no-untyped-call]


def merge_same_size(
    left: Tensor,
    right: Tensor,
    update_left: Tensor,
    update_right: Tensor,
    factor: float,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (13) merged and cut back to its rank: the activation-weighted SVD of the product.

    Parameters
    ----------
    left, right, update_left, update_right, factor
        As for ``merge_factors``.
    scale : (d_in,)
        Diagonal of D: the norms of the input features.

    Returns
    -------
    left : (d_out, rank) float64
        To be rounded once.
    right : (rank, d_in) float64
    singular_values : (min(d_out, d_in),) float64
        Of the product times D, descending.

    Notes
    -----
    SPEC: ``lora.merge-same-size``, ``precision.decomposition``.
    """
    product = merged_product(left, right, update_left, update_right, factor)
    return awsvd(product, scale, left.shape[1])
