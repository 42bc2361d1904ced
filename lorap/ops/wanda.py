"""Unstructured pruning by Wanda (arXiv 2306.11695), whose masks Fig. 2 and 3 of the paper show."""

import torch
from torch import Tensor


def wanda_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Mark the weights that stay where each output row drops its least important ones.

    Parameters
    ----------
    scores : (d_out, d_in)
        Scores of the single weights, any floating dtype; Wanda's are
        ``importance.weight_importance``.
    sparsity : float
        Share of every row to drop, from 0 to 1.

    Returns
    -------
    (d_out, d_in) bool
        False for the ``int(d_in * sparsity)`` smallest scores of each row, True for the rest.

    Notes
    -----
    SPEC: ``wanda.mask``. It shows where the important weights are; it compresses nothing.
    """
    dropped = int(scores.shape[1] * sparsity)
    ascending = torch.sort(scores, dim=1, stable=True).indices
    mask = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, ascending[:, :dropped], False)
