"""Low-rank factors from the outputs: PCA and AFM, which the LoRAP and MGAA papers compare with.

PCA projects the outputs of a linear on the leading directions of their second moment
(arXiv 2507.03294, MGAA, Eq. (8) to (11)), AFM on those of their covariance, with the bias that
belongs to it (Yu and Wu, AAAI 2023, doi 10.1609/aaai.v37i9.26304).
"""

import torch
from torch import Tensor

from lorap.ops.lowrank import completed
from lorap.ops.precision import compute_dtype
from lorap.ops.statistics import centred_moment, token_mean


def output_moment(weight: Tensor, moment: Tensor) -> Tensor:
    """Second moment of the outputs: ``weight moment weight^T``, symmetric to the last bit.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype.
    moment : (d_in, d_in)
        ``second_moment`` or ``centred_moment`` of the inputs.

    Returns
    -------
    (d_out, d_out) float64

    Notes
    -----
    SPEC: ``output.moment``, ``precision.decomposition``.
    """
    weight = weight.double()
    product = weight @ moment.double() @ weight.T
    return (product + product.T) / 2


def output_error(weight: Tensor, approximation: Tensor, moment: Tensor) -> float:
    """Squared error of the outputs, summed over outputs and tokens, from the moment of the inputs.

    Parameters
    ----------
    weight, approximation : (d_out, d_in)
        Any floating dtype.
    moment : (d_in, d_in)
        ``second_moment`` of the inputs. With their ``centred_moment`` it is the error that is left
        when the best bias is added to the approximation.

    Returns
    -------
    float
        Summed in float64. Not negative: an output's own error that rounding makes negative counts
        as 0.

    Notes
    -----
    SPEC: ``output.error``, ``precision.statistics``.
    """
    difference = weight.double() - approximation.double()
    by_output = ((difference @ moment.double()) * difference).sum(dim=1)
    return float(by_output.clamp(min=0).sum())


def rounding_floor(weight: Tensor, moment: Tensor, terms: int) -> float:
    """Below this an eigenvalue of the outputs' moment is rounding.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype.
    moment : (d_in, d_in)
        ``second_moment`` of the inputs, never the centred one.
    terms : int
        Of the longest sum that made the eigenvalue.

    Returns
    -------
    float
        ``terms * eps * sum of weight_ij^2 moment_jj``, eps that of float64.

    Notes
    -----
    SPEC: ``pca.deficient``, ``afm.deficient``.
    """
    squares = weight.double().square() @ moment.diagonal().double()
    return terms * torch.finfo(torch.float64).eps * float(squares.sum())


def pca(weight: Tensor, moment: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The rank-`rank` product with the least error in the outputs.

    ``left`` holds the leading eigenvectors of ``weight moment weight^T`` and ``right`` is
    ``left.T @ weight``. Nothing is factored or inverted, so that the moment may be singular. Where
    the outputs have fewer directions than `rank`, those of what remains of the weight follow, then
    zero columns.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype, finite.
    moment : (d_in, d_in)
        ``second_moment`` of the inputs.
    rank : int
        At most ``min(d_out, d_in)``.

    Returns
    -------
    left : (d_out, rank)
        Orthonormal columns, or zero ones; in ``compute_dtype(weight)``.
    right : (rank, d_in)
        Likewise.
    singular_values : (min(d_out, d_in),) float64
        Of ``weight moment^(1/2)``, descending; the squares of those beyond `rank` add up to the
        least error.

    Notes
    -----
    SPEC: ``pca.product``, ``pca.spectrum``, ``pca.deficient``, ``precision.decomposition``.
    """
    dtype = compute_dtype(weight)
    weight = weight.double()
    floor = rounding_floor(weight, moment, max(weight.shape))
    left, singular_values = _directions(weight, moment, floor, rank)
    return left.to(dtype), (left.T @ weight).to(dtype), singular_values


def afm(
    weight: Tensor, moment: Tensor, total: Tensor, tokens: int, rank: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The affine map ``left @ right @ x + bias`` with the least error in the outputs.

    ``left`` holds the leading eigenvectors of the outputs' moment about their mean, ``right`` is
    ``left.T @ weight``, and ``bias`` the part of the mean output that the projection cuts off. A
    bias of the linear's own stays as it is, and adds to this one.

    Parameters
    ----------
    weight : (d_out, d_in)
        Any floating dtype, finite.
    moment : (d_in, d_in)
        ``second_moment`` of the inputs, uncentred.
    total : (d_in,)
        ``token_sum`` of the inputs.
    tokens : int
        Tokens summed over.
    rank : int
        At most ``min(d_out, d_in)``.

    Returns
    -------
    left : (d_out, rank)
        Orthonormal columns, or zero ones; in ``compute_dtype(weight)``.
    right : (rank, d_in)
        Likewise.
    singular_values : (min(d_out, d_in),) float64
        Of ``weight centred_moment^(1/2)``, descending; the squares of those beyond `rank` add up to
        the least error.
    bias : (d_out,)
        In ``compute_dtype(weight)``.

    Notes
    -----
    SPEC: ``afm.product``, ``afm.bias``, ``afm.deficient``, ``precision.decomposition``.
    """
    dtype = compute_dtype(weight)
    weight, moment, total = weight.double(), moment.double(), total.double()
    floor = rounding_floor(weight, moment, max(*weight.shape, tokens))
    centred = centred_moment(moment, total, tokens)
    left, singular_values = _directions(weight, centred, floor, rank)
    mean = weight @ token_mean(total, tokens)
    bias = mean - left @ (left.T @ mean)
    return left.to(dtype), (left.T @ weight).to(dtype), singular_values, bias.to(dtype)


def _directions(weight: Tensor, moment: Tensor, floor: float, rank: int) -> tuple[Tensor, Tensor]:
    """Leading directions of the outputs, completed to `rank`, and all singular values."""
    eigenvalues, vectors = torch.linalg.eigh(output_moment(weight, moment))
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    found = min(rank, int((eigenvalues > floor).sum()))
    left = completed(vectors[:, :found], weight, rank)
    return left, eigenvalues[: min(weight.shape)].clamp(min=0).sqrt()
