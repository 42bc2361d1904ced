"""Channel pruning of the FFN: Eq. (11), Section 3.3."""

import torch
from torch import Tensor


def kept_channels(scores: Tensor, low: int, high: int) -> Tensor:
    """Eq. (11): keep the least important band and the top, drop what lies between.

    Parameters
    ----------
    scores : (width,)
        ``group_importance``.
    low, high : int
        The removed band ``[low, high)`` of the channels in ascending order of score
        (``budget.removed_band``).

    Returns
    -------
    (width - high + low,) int64
        Indices of the kept channels in their original order.

    Notes
    -----
    SPEC: ``prune.keep``, and ``prune.ties``: equal scores are ordered by channel index.
    """
    ascending = torch.sort(scores, stable=True).indices
    return torch.cat([ascending[:low], ascending[high:]]).sort().values


def prune_ffn(
    up: Tensor, gate: Tensor, down: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (9) and (11): the kept rows of up and gate and the kept columns of down, as copies.

    Parameters
    ----------
    up, gate : (width, d)
    down : (d, width)
    kept : (new_width,) int64

    Returns
    -------
    up : (new_width, d)
    gate : (new_width, d)
    down : (d, new_width)

    Notes
    -----
    SPEC: ``prune.slice``.
    """
    return up[kept], gate[kept], down[:, kept].contiguous()
