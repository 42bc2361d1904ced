"""The low-rank methods under one form: factors of a weight, given what is known of its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lorap.ops.lowrank import awsvd, column_scale, magnitude_scale, svd_low_rank, weighted_error
from lorap.ops.pca import afm, output_error, pca
from lorap.ops.statistics import centred_moment
from lorap.pipeline.statistics import InputStatistics, Statistic

if TYPE_CHECKING:
    from lorap.config import CompressionConfig, LowRankMethod

STATISTICS: Mapping[LowRankMethod, frozenset[Statistic]] = {
    "svd": frozenset(),
    "awsvd": frozenset({"squares"}),
    "asvd": frozenset({"magnitudes"}),
    "pca": frozenset({"moment"}),
    "afm": frozenset({"moment", "sum"}),
}
"""What a method has to know of a linear's input."""

_NOTHING = InputStatistics(0, {})


@dataclass(frozen=True)
class Factors:
    """``weight ~ left @ right``.

    Attributes
    ----------
    left : (d_out, rank)
    right : (rank, d_in)
    singular_values : (min(d_out, d_in),) float64
        Descending; the squares of those beyond the rank add up to the method's objective.
    bias : (d_out,) or None
        What the method adds to the linear's own bias.
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor
    bias: Tensor | None = None


def factorise(
    weight: Tensor,
    inputs: InputStatistics | None,
    rank: int,
    method: LowRankMethod,
    config: CompressionConfig,
) -> Factors:
    """Factor a weight.

    Parameters
    ----------
    weight : (d_out, d_in)
    inputs : InputStatistics or None
        With the statistics that ``STATISTICS`` names; None where it names none.
    rank : int
    method : {"awsvd", "svd", "asvd", "pca", "afm"}
    config : CompressionConfig
        Gives ``weighting`` and ``asvd_alpha``.

    Notes
    -----
    SPEC: ``algorithm.low-rank``.
    """
    given = inputs or _NOTHING
    if method == "svd":
        return Factors(*svd_low_rank(weight, rank))
    if method == "pca":
        return Factors(*pca(weight, given.sums["moment"], rank))
    if method == "afm":
        moment, total = given.sums["moment"], given.sums["sum"]
        return Factors(*afm(weight, moment, total, given.tokens, rank))
    return Factors(*awsvd(weight, _scale(given, method, config), rank))


def squared_error(
    weight: Tensor,
    product: Tensor,
    inputs: InputStatistics | None,
    method: LowRankMethod,
    config: CompressionConfig,
) -> float:
    """Return what the method minimises, at a product of two factors.

    Parameters
    ----------
    weight, product : (d_out, d_in)
    inputs, method, config
        As for ``factorise``.
    """
    given = inputs or _NOTHING
    if method == "pca":
        return output_error(weight, product, given.sums["moment"])
    if method == "afm":
        moment, total = given.sums["moment"], given.sums["sum"]
        return output_error(weight, product, centred_moment(moment, total, given.tokens))
    if method == "svd":
        return weighted_error(weight, product, weight.new_ones(weight.shape[1]))
    return weighted_error(weight, product, _scale(given, method, config))


def _scale(inputs: InputStatistics, method: LowRankMethod, config: CompressionConfig) -> Tensor:
    """Return the diagonal of D."""
    if method == "asvd":
        return magnitude_scale(inputs.sums["magnitudes"], inputs.tokens, config.asvd_alpha)
    return column_scale(inputs.norms, config.weighting)
