"""Statistics of a linear's input: Eq. (5), Section 3.2."""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22
"""Elements widened to float64 at a time (32 MiB): the workspace does not grow with the tokens."""


def sum_of_squares(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over tokens of the squared input features.

    Parameters
    ----------
    inputs : (..., d_in)
        Inputs of one linear, any floating dtype; all leading axes are tokens.
    mask : (...), optional
        True (or nonzero) where the token counts; padding is False.

    Returns
    -------
    (d_in,) float64
        Additive over batches. Squared and summed in float64: the square of a float32, fp16 or bf16
        number is exact there.

    Notes
    -----
    SPEC: ``stats.sum-of-squares``, ``stats.padding``, ``precision.statistics``.
    """
    features = inputs.shape[-1]
    tokens = inputs.reshape(inputs.shape[:-1].numel(), features)
    if mask is not None:
        tokens = tokens[mask.reshape(-1).bool()]
    total = torch.zeros(features, dtype=torch.float64, device=inputs.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, features))
    for start in range(0, tokens.shape[0], step):
        total += tokens[start : start + step].to(torch.float64).square().sum(dim=0)
    return total


def feature_norms(squares: Tensor) -> Tensor:
    """Eq. (5): l2 norms of the input features over the tokens, from their sums of squares.

    Parameters
    ----------
    squares : (d_in,)
        ``sum_of_squares``, added up over the batches.

    Returns
    -------
    (d_in,)

    Notes
    -----
    SPEC: ``stats.norm``.
    """
    return squares.sqrt()
