"""Least squares: weights refitted on the channels that stay, channels chosen by what that costs.

Optimal brain surgeon (Hassibi and Stork, NIPS 1992) for whole columns of a weight, with the second
moment of the inputs in the place of the Hessian (Frantar and Alistarh, arXiv 2208.11580).
"""

import torch
from torch import Tensor

from lorap.ops.precision import compute_dtype

BLOCK = 128
"""Removals between two updates of the whole matrices in ``removal_order``."""


def ridged_correlation(moment: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Norms of the input features, and their correlations with a ridge on the diagonal.

    Parameters
    ----------
    moment : (d_in, d_in)
        ``second_moment`` of the inputs.
    ridge : float
        Positive: share of its own sum of squares that is added to each feature's.

    Returns
    -------
    norms : (d_in,) float64
        0 for a dead feature.
    correlation : (d_in, d_in) float64
        Positive definite, ``1 + ridge`` on the diagonal. A dead feature is correlated with none.

    Notes
    -----
    SPEC: ``update.ridge``, ``precision.decomposition``.
    """
    moment = moment.double()
    norms = moment.diagonal().sqrt()
    unit = units(norms)
    correlation = moment / unit
    correlation /= unit[:, None]
    correlation.diagonal().fill_(1 + ridge)
    return norms, correlation


def least_squares_update(weight: Tensor, moment: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Weights of the kept input features that come nearest to the outputs of all.

    The squared distance of the outputs, over all tokens, plus `ridge` times the squared change of
    each kept column in the unit of its feature, is the least.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype.
    moment : (d_in, d_in)
        ``second_moment`` of the inputs.
    kept : (k,) int64
        Ascending.
    ridge : float
        As in ``ridged_correlation``.

    Returns
    -------
    (d_out, k)
        In ``compute_dtype(weight)``.

    Notes
    -----
    SPEC: ``update.solution``, ``precision.decomposition``.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    norms, correlation = ridged_correlation(moment, ridge)
    scaled = weight.double() * norms
    lost = scaled[:, gone] @ correlation[gone][:, kept]
    root = torch.linalg.cholesky(correlation[kept][:, kept])
    change = torch.cholesky_solve(lost.T, root).T / units(norms[kept])
    return (weight[:, kept].double() + change).to(compute_dtype(weight))


def removal_order(
    weight: Tensor, moment: Tensor, count: int, ridge: float, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Order in which input features are removed one by one, each time the one that costs least.

    The others make up for it before the next one is chosen. Of the updated weights only the inner
    products of their columns are kept, and of these and of the inverse only the rows that are
    asked for are brought up to date, until `block` removals are carried over at once.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype.
    moment : (d_in, d_in)
        ``second_moment`` of the inputs.
    count : int
        Features to remove, at most d_in.
    ridge : float
        As in ``ridged_correlation``.
    block : int
        Changes nothing but rounding.

    Returns
    -------
    order : (count,) int64
        Indices in the order of removal; among equal costs the lower index.
    losses : (count,) float64
        What each costs, in squared outputs.

    Notes
    -----
    SPEC: ``obs.order``, ``obs.ties``, ``precision.decomposition``. With P the inverse, G the inner
    products, j the feature removed and ``c = P_j / P_jj``, P loses ``P_jj c c^T`` and G loses
    ``c h^T + h c^T``, ``h = G_j - G_jj c / 2``.
    """
    norms, correlation = ridged_correlation(moment, ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(correlation))
    del correlation
    scaled = weight.double() * norms
    products = scaled.T @ scaled
    features = weight.shape[1]
    order = torch.zeros(count, dtype=torch.int64, device=weight.device)
    losses = norms.new_zeros(count)
    left = torch.ones(features, dtype=torch.bool, device=weight.device)
    for start in range(0, count, block):
        size = min(block, count - start)
        pivots = norms.new_zeros(size)
        shares, halves = norms.new_zeros(size, features), norms.new_zeros(size, features)
        inverse_diagonal = inverse.diagonal().clone()
        squares = products.diagonal().clone()
        for step in range(size):
            cost = squares.clamp(min=0) / inverse_diagonal
            cost.masked_fill_(~left, torch.inf)
            # A number: on a GPU each use of a tensor as an index would wait for it again.
            j = int(cost.argmin())
            order[start + step], losses[start + step] = j, cost[j]
            left[j] = False
            done, by = shares[:step], shares[:step, j]
            row = inverse[j] - (pivots[:step] * by) @ done
            product = products[j] - by @ halves[:step] - halves[:step, j] @ done
            pivots[step] = row[j]
            shares[step] = row / row[j]
            halves[step] = product - product[j] / 2 * shares[step]
            inverse_diagonal -= pivots[step] * shares[step].square()
            squares -= 2 * shares[step] * halves[step]
        inverse.addmm_(shares.T * pivots, shares, alpha=-1)
        products.addmm_(shares.T, halves, alpha=-1).addmm_(halves.T, shares, alpha=-1)
    return order, losses


def regressed_weight(
    weight: Tensor, moment: Tensor, cross: Tensor, share: float, ridge: float
) -> Tensor:
    """Regress, from the inputs at hand, outputs between the weight's own and those at other inputs.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype.
    moment : (d_in, d_in)
        ``second_moment`` of the inputs at hand.
    cross : (d_in, d_in)
        ``cross_moment`` of the other inputs of the same tokens, and of these.
    share : float
        Of the outputs at the other inputs in the targets, from 0 to 1.
    ridge : float
        As in ``ridged_correlation``.

    Returns
    -------
    (d_out, d_in)
        In ``compute_dtype(weight)``.

    Notes
    -----
    SPEC: ``target.regression``, ``precision.decomposition``.
    """
    norms, correlation = ridged_correlation(moment, ridge)
    unit = units(norms)
    missed = weight.double() @ (cross.double() - moment.double()) / unit
    change = torch.cholesky_solve(missed.T, torch.linalg.cholesky(correlation)).T / unit
    change.masked_fill_(norms == 0, 0)
    return (weight.double() + share * change).to(compute_dtype(weight))


def units(norms: Tensor) -> Tensor:
    """Return what features are measured in, ``(d_in,)``: their norms, 1 where a feature is dead."""
    return torch.where(norms > 0, norms, 1.0)
