"""Statistics of a linear's input: Eq. (5), Section 3.2; those of the methods compared with.

The sums are additive over batches, and taken in float64.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from lorap.ops.precision import rows_at_a_time


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
    total = torch.zeros(inputs.shape[-1], dtype=torch.float64, device=inputs.device)
    for chunk in _chunks(inputs, mask, rows_at_a_time(inputs, once=True)):
        total += chunk.square().sum(dim=0)
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


def sum_of_magnitudes(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over tokens of the magnitudes of the input features.

    Parameters
    ----------
    inputs : (..., d_in)
    mask : (...), optional
        As in ``sum_of_squares``.

    Returns
    -------
    (d_in,) float64
        Additive over batches.

    Notes
    -----
    SPEC: ``stats.magnitudes``, ``stats.padding``, ``precision.statistics``.
    """
    total = torch.zeros(inputs.shape[-1], dtype=torch.float64, device=inputs.device)
    for chunk in _chunks(inputs, mask, rows_at_a_time(inputs, once=True)):
        total += chunk.abs().sum(dim=0)
    return total


def token_sum(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of the tokens.

    Parameters
    ----------
    inputs : (..., d_in)
    mask : (...), optional
        As in ``sum_of_squares``.

    Returns
    -------
    (d_in,) float64
        Additive over batches.

    Notes
    -----
    SPEC: ``stats.sum``, ``stats.padding``, ``precision.statistics``.
    """
    total = torch.zeros(inputs.shape[-1], dtype=torch.float64, device=inputs.device)
    for chunk in _chunks(inputs, mask, rows_at_a_time(inputs, once=True)):
        total += chunk.sum(dim=0)
    return total


def second_moment(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Uncentred second moment of the input features: ``X.T @ X``, not divided by the tokens.

    Parameters
    ----------
    inputs : (..., d_in)
    mask : (...), optional
        As in ``sum_of_squares``.

    Returns
    -------
    (d_in, d_in) float64
        Additive over batches.

    Notes
    -----
    SPEC: ``stats.second-moment``, ``stats.padding``, ``precision.statistics``.
    """
    features = inputs.shape[-1]
    total = torch.zeros(features, features, dtype=torch.float64, device=inputs.device)
    for chunk in _chunks(inputs, mask, rows_at_a_time(inputs, once=False)):
        total.addmm_(chunk.T, chunk)
    return total


def cross_moment(inputs: Tensor, others: Tensor, mask: Tensor | None = None) -> Tensor:
    """Second moment of two inputs of the same tokens: ``inputs.T @ others``.

    Parameters
    ----------
    inputs : (..., d_x)
    others : (..., d_y)
        The leading axes are those of `inputs`.
    mask : (...), optional
        As in ``sum_of_squares``.

    Returns
    -------
    (d_x, d_y) float64
        Additive over batches.

    Notes
    -----
    SPEC: ``stats.cross-moment``, ``stats.padding``, ``precision.statistics``.
    """
    total = torch.zeros(
        inputs.shape[-1], others.shape[-1], dtype=torch.float64, device=inputs.device
    )
    step = min(rows_at_a_time(x, once=False) for x in (inputs, others))
    pairs = zip(_chunks(inputs, mask, step), _chunks(others, mask, step), strict=True)
    for chunk, other in pairs:
        total.addmm_(chunk.T, other)
    return total


def token_mean(total: Tensor, tokens: int) -> Tensor:
    """Mean over tokens, from the sum; 0 where there are none.

    Parameters
    ----------
    total : (d_in,)
        ``token_sum`` or ``sum_of_magnitudes``, added up over the batches.
    tokens : int
        Tokens summed over.

    Returns
    -------
    (d_in,)

    Notes
    -----
    SPEC: ``stats.mean``.
    """
    return total / max(tokens, 1)


def centred_moment(moment: Tensor, total: Tensor, tokens: int) -> Tensor:
    """Second moment about the mean: ``moment - tokens * mean mean^T``, not divided by the tokens.

    Parameters
    ----------
    moment : (d_in, d_in)
        ``second_moment``, added up over the batches.
    total : (d_in,)
        ``token_sum``, likewise.
    tokens : int
        Tokens summed over.

    Returns
    -------
    (d_in, d_in)
        The covariance times `tokens`. What is much smaller than `moment` is lost in the difference.

    Notes
    -----
    SPEC: ``stats.centred-moment``.
    """
    mean = token_mean(total, tokens)
    return moment - tokens * torch.outer(mean, mean)


def _chunks(inputs: Tensor, mask: Tensor | None, step: int) -> Iterator[Tensor]:
    """Yield the tokens that count, ``(step, d_in)`` at a time, widened to float64."""
    features = inputs.shape[-1]
    tokens = inputs.reshape(inputs.shape[:-1].numel(), features)
    if mask is not None:
        tokens = tokens[mask.reshape(-1).bool()]
    for start in range(0, tokens.shape[0], step):
        yield tokens[start : start + step].to(torch.float64)
