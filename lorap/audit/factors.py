"""Low-rank modules: factors, bias, objective, and what the report says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorap.audit.comparisons import EPS64, ROOM_RMS, number, same_bits, worst
from lorap.audit.context import Context
from lorap.audit.files import linear_name, right_name
from lorap.audit.inputs import Inputs, Method, Statistic, Sums, low_rank_method
from lorap.audit.results import Check
from lorap.audit.rounding import (
    SPREADS,
    applied_variance,
    product_variance,
    projection_variance,
    spacing,
    variance,
)
from lorap.audit.sizes import Module
from lorap.config import CompressionConfig
from lorap_reference import joint, lowrank, pca, statistics

Array = NDArray[np.float64]

SVD_FACTOR = 20.0
"""Two decompositions of a matrix in float64, in ``eps * max(m, n) * sigma_1``: see the class
"product" of SPEC.md. For eigenvalues of ``W C W^T``, in floors of ``pca.deficient``."""

GAUGE = 0.05
"""Factors whose base differs from the reference's by more than this are not compared entry by
entry; a change of an entry that is as large shows in the product."""


@dataclass(frozen=True)
class Factored:
    """A matrix, or several stacked by rows, and its factors as stored.

    Attributes
    ----------
    W : (d_out, d_in)
    L : (d_out, r)
    R : (r, d_in)
    dtype : torch.dtype
        Of the factors.
    """

    W: Array
    L: Array
    R: Array
    dtype: torch.dtype

    @property
    def r(self) -> int:
        """Rank."""
        return int(self.L.shape[1])

    @property
    def slack(self) -> float:
        """What products and orthonormal bases in float64 may be off by, entry by entry."""
        return float(10 * EPS64 * max(self.W.shape) * np.linalg.norm(self.W, 2))


def factored(
    settings: CompressionConfig,
    module: Module,
    W: Array,
    known: Mapping[Statistic, Array],
    tokens: int,
) -> tuple[Array, Array, Array | None]:
    """Factor a matrix as a module of its method and rank.

    Parameters
    ----------
    settings : CompressionConfig
    module : Module
        With a rank.
    W : (d_out, d_in)
    known : mapping
        What the method is told of the input.
    tokens : int
        That it was summed over.

    Returns
    -------
    L : (d_out, r)
    R : (r, d_in)
    bias : (d_out,) or None
        What the method adds to the linear's own.
    """
    method, r = low_rank_method(settings, module.sublayer), module.rank
    assert r is not None
    if method == "svd":
        return (*lowrank.svd_low_rank(W, r)[:2], None)
    if method == "pca":
        return (*pca.pca(W, known["moment"], r)[:2], None)
    if method == "afm":
        L, R, _, bias = pca.afm(W, known["moment"], known["sum"], tokens, r)
        return L, R, bias
    if method == "asvd":
        scale = lowrank.magnitude_scale(known["magnitudes"], tokens, settings.asvd_alpha)
    else:
        scale = lowrank.column_scale(np.sqrt(known["squares"]), settings.weighting)
    return (*lowrank.awsvd(W, scale, r)[:2], None)


def factor_checks(
    context: Context,
    module: Module,
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    inputs: Inputs | None,
) -> list[Check]:
    """Compare the factors of a module (SPEC, "Audit").

    Parameters
    ----------
    context : Context
    module : Module
        With a rank.
    given, held : mapping
        The layer's tensors in the original and in the checkpoint, names relative to it.
    inputs : Inputs or None
        Of the module's linears; None for a method that is told nothing.
    """
    family, settings = context.reader.family, context.record.settings
    names = [linear_name(family, role) for role in module.roles]
    right = held[f"{right_name(family, module)}.weight"]
    matrix = Factored(
        joint.stacked([given[f"{name}.weight"].double().numpy() for name in names]),
        joint.stacked([held[f"{name}.left.weight"].double().numpy() for name in names]),
        right.double().numpy(),
        right.dtype,
    )
    method = low_rank_method(settings, module.sublayer)
    said = context.record.said(module.layer, module.name)
    checks = [] if inputs is None else inputs.checks
    if method == "pca" or method == "afm":
        assert inputs is not None
        seen = outputs(matrix.W, method, inputs.sums, inputs.tokens, matrix.r)
        checks += _by_moment(matrix, seen, context.compute.eps, said)
        if method == "afm":
            checks += _afm_bias(matrix, seen, inputs, names, given, held)
    else:
        checks += _by_scale(matrix, _scales(method, settings, matrix, inputs), said)
    if method != "afm":
        for name in names:
            if f"{name}.bias" in given:
                title = "bias" if len(names) == 1 else f"{name}.bias"
                checks.append(same_bits(title, given[f"{name}.bias"], held[f"{name}.left.bias"]))
    return checks


# --- svd, awsvd, asvd ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scales:
    """The diagonal of D by what is recorded and by what was recomputed.

    Attributes
    ----------
    recorded, recomputed : (d_in,)
    factor : float
        Bound on the quotient of any entry of the one and of the other.
    """

    recorded: Array
    recomputed: Array
    factor: float


def _scales(
    method: Method, settings: CompressionConfig, matrix: Factored, inputs: Inputs | None
) -> _Scales:
    if inputs is None:
        ones = np.ones(matrix.W.shape[1])
        return _Scales(ones, ones, 1.0)
    if method == "asvd":
        vector, power, n = inputs.vectors["magnitudes"], settings.asvd_alpha, inputs.tokens
        recorded = lowrank.magnitude_scale(vector.recorded, n, power)
        recomputed = lowrank.magnitude_scale(vector.recomputed, n, power)
    else:
        vector, power = inputs.vectors["norms"], 0.5 if settings.weighting == "eq6" else 1.0
        recorded = lowrank.column_scale(vector.recorded, settings.weighting)
        recomputed = lowrank.column_scale(vector.recomputed, settings.weighting)
    return _Scales(recorded, recomputed, quotient(vector.allowed, power))


def quotient(allowed: float, power: float) -> float:
    """Bound on the quotient of two numbers to a power, each within ``1 +- allowed`` of a third."""
    return float(((1 + allowed) / (1 - allowed)) ** power) if allowed < 1 else float("inf")


def _by_scale(matrix: Factored, scales: _Scales, said: Mapping[str, Any]) -> list[Check]:
    """Compare factors that follow from the record: to the last bit of their dtype."""
    W, L, R, r, dtype = matrix.W, matrix.L, matrix.R, matrix.r, matrix.dtype
    scale, again = scales.recorded, scales.recomputed
    U, R_ref, S = lowrank.awsvd(W, scale, r)
    unit = SVD_FACTOR * EPS64 * max(W.shape) * float(S[0])
    product, as_written = L @ R, False
    # The reference's factors rounded, and those stored: they may have been rescaled and rounded
    # again, or be in another basis.
    noise = np.sqrt(product_variance(U, R_ref, dtype) + product_variance(L, R, dtype))
    gap = float(S[r - 1] - (S[r] if r < S.size else 0.0))
    if gap > 2 * unit:
        turned = 2 * unit / gap * float(np.linalg.norm(W, 2)) + matrix.slack
        checks = [worst("product", np.abs(product - U @ R_ref), SPREADS * noise + turned)]
        entries, as_written = _entry_checks(matrix, U, R_ref, S, unit)
        checks += entries
    else:
        # Any basis of a degenerate subspace is right: the product is some projection of W.
        checks, as_written = _projection_checks(matrix, U, R_ref)

    S_again = S if again is scale else np.linalg.svd(W * again, compute_uv=False)
    optimum = float(np.linalg.norm(S_again[r:]))
    rounding = SPREADS * float(np.linalg.norm(noise * again))
    whole = float(np.linalg.norm(W * again)) or 1.0
    slack = (scales.factor - 1) * optimum + rounding + unit * float(np.sqrt(min(W.shape)))
    excess = np.sqrt(lowrank.weighted_error(W, product, again)) - optimum
    checks.append(
        Check("weighted error above the optimum", max(excess, 0.0) / whole, slack / whole)
    )

    whole = float(np.linalg.norm(S))
    error = np.sqrt(lowrank.weighted_error(W, product, scale)) / whole if whole else 0.0
    allowed = 10 * EPS64 * max(W.shape)
    if whole:
        allowed += 2 * _evaluation(matrix, scale) / whole
    if not as_written and whole:
        # It was taken before these factors were rounded once more.
        allowed += SPREADS * float(np.linalg.norm(noise * scale)) / whole
    return [
        *checks,
        number("report: relative weighted error", error, said, "relative_weighted_error", allowed),
        number(
            "report: retained energy",
            lowrank.retained_energy(S, r),
            said,
            "retained_energy",
            10 * EPS64 * max(W.shape),
        ),
    ]


def _evaluation(matrix: Factored, scale: Array) -> float:
    """Rounding of the root of an error that the report gives.

    The product and its difference from W are taken in float32 unless the weights are float64.
    """
    wide = EPS64 if matrix.dtype == torch.float64 else float(np.finfo(np.float32).eps)
    terms = np.sqrt(matrix.r) * np.sqrt(matrix.L**2 @ matrix.R**2)
    return wide * float(np.linalg.norm((np.abs(matrix.W) + terms) * scale))


def _entry_checks(
    matrix: Factored, U: Array, R_ref: Array, S: Array, unit: float
) -> tuple[list[Check], bool]:
    """Compare the factors entry by entry, up to signs and one common scale.

    Nothing is compared where they are given in another basis, such as that of equal singular
    values: then the product alone counts. Returns also whether they are in the reference's own
    basis and scale.
    """
    W, L, R, r, dtype = matrix.W, matrix.L, matrix.R, matrix.r, matrix.dtype
    C = U.T @ L
    empty = ~U.any(axis=0)
    C[empty, empty] = 1.0
    common = float(np.median(np.abs(np.diag(C))))
    sign = np.where(np.diag(C) < 0, -1.0, 1.0)
    if np.max(np.abs(C - common * np.diag(sign))) > GAUGE * common:
        return [], False
    rescaled = abs(common - 1) > torch.finfo(dtype).eps
    c: Array = common * sign if rescaled else sign
    # Rescaled: half a unit twice, the first of which the scale may make twice as many.
    ulps = 2.0 if rescaled else 0.5
    # A single vector turns by the error over the distance to the nearest other singular value.
    distance = np.abs(S[:r, None] - S[None, :])
    distance[np.arange(r), np.arange(r)] = np.inf
    with np.errstate(divide="ignore"):
        turned = 2 * unit / np.min(distance, axis=1)
    # Stored by way of float32, which rounds once more.
    ulps *= 1.001
    columns = np.linalg.norm(W, axis=0)
    checks = [
        worst(
            "left factor",
            np.abs(L - U * c),
            ulps * spacing(L, dtype) + np.abs(turned * c),
        ),
        worst(
            "right factor",
            np.abs(R - R_ref / c[:, None]),
            ulps * spacing(R, dtype) + np.abs(turned / c)[:, None] * columns,
        ),
    ]
    return checks, not rescaled


# --- any projection ------------------------------------------------------------------------------


def _projection_checks(matrix: Factored, U: Array, R_ref: Array) -> tuple[list[Check], bool]:
    """Compare the product with the projection of W on the left factor's own columns.

    Parameters
    ----------
    matrix : Factored
    U, R_ref : arrays
        Factors about as large, entry by entry, as those that were first rounded: by the reference,
        from what the record does not determine.

    Returns
    -------
    checks : list of Check
    as_written : bool
        Whether the columns are orthonormal.
    """
    W, L, R, dtype = matrix.W, matrix.L, matrix.R, matrix.dtype
    spread = projection_variance(W, U, R_ref, dtype) + projection_variance(W, L, R, dtype)
    projected = L @ (np.linalg.pinv(L) @ W)
    bound = SPREADS * np.sqrt(spread) + matrix.slack
    checks = [worst("projection", np.abs(L @ R - projected), bound)]

    gram = L.T @ L
    live = np.diag(gram) > 0
    c = float(np.sqrt(np.mean(np.diag(gram)[live]))) if live.any() else 1.0
    eps = torch.finfo(dtype).eps
    off = np.abs(gram / c**2 - np.diag(live.astype(np.float64)))
    if np.max(off) > 3 * eps + matrix.slack / (float(np.linalg.norm(W, 2)) or 1.0):
        return checks, False
    rescaled = abs(c - 1) > eps
    return [*checks, *_own_basis_checks(matrix, c if rescaled else 1.0)], not rescaled


def _own_basis_checks(matrix: Factored, c: float) -> list[Check]:
    """Compare factors with orthogonal columns of one length `c` with one another.

    With ``L = c (U + e)`` and ``R = (U^T W + f) / c``, e and f the roundings,
    ``c R - L^T W / c = f - e^T W``: entry by entry it is what is left of R, and by its component
    along W (least squares) it gives back e. No sum over the rank hides an entry.
    """
    W, dtype = matrix.W, matrix.dtype
    L, R = matrix.L / c, matrix.R * c
    # A second rounding, should these be the factors of another basis, or, rescaled, a second one
    # of which the scale may have doubled the first.
    roundings = 2.0 if c == 1 else 5.0
    e, f = roundings * variance(L, dtype), roundings * variance(R, dtype)
    rest = R - L.T @ W
    spread = np.sqrt(f + e.T @ W**2)
    bound = SPREADS * spread + matrix.slack
    checks = [worst("right factor by the left one", np.abs(rest), bound)]

    power = float(np.mean(f)) / (float(np.mean(e)) or 1.0)
    moment = W @ W.T
    power = max(power, SVD_FACTOR * EPS64 * float(np.trace(moment))) or 1.0
    gain = np.linalg.solve(moment + power * np.eye(len(W)), W)  # (d_out, d_in)
    hidden = gain @ W.T
    found = np.abs(gain @ rest.T)
    spread = np.sqrt(hidden**2 @ e + gain**2 @ f.T)
    slack = matrix.slack * np.sum(np.abs(gain), axis=1, keepdims=True)
    return [*checks, worst("left factor by the right one", found, SPREADS * spread + slack)]


# --- pca, afm ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """What PCA or AFM makes of a matrix by its recomputed outputs, and what rounding does to them.

    Attributes
    ----------
    U : (d_out, r)
    R : (r, d_in)
    S : (min(d_out, d_in),)
        As ``lorap_reference.pca`` gives them.
    moment : (d_in, d_in)
        Of the inputs, about the mean for AFM.
    change : (d_in, d_in)
        What rounding adds to it.
    moved : (d_out, d_out)
        The same of the outputs.
    total : float
        Trace of the moment of the outputs.
    size : float
        Its Frobenius norm.
    known : float
        To which float64 knows an eigenvalue.
    """

    U: Array
    R: Array
    S: Array
    moment: Array
    change: Array
    moved: Array
    total: float
    size: float
    known: float


def outputs(W: Array, method: Literal["pca", "afm"], sums: Sums, tokens: int, r: int) -> Outputs:
    """Return what PCA or AFM makes of a matrix, and of its outputs.

    Parameters
    ----------
    W : (d_out, d_in)
    method : {"pca", "afm"}
    sums : mapping
        Of its input, with ``moment`` and, for AFM, ``sum``.
    tokens : int
    r : int
        Rank of the factors.
    """
    C, near = sums["moment"].exact, sums["moment"].rounded
    known = SVD_FACTOR * pca.rounding_floor(W, C, max(*W.shape, tokens))
    if method == "pca":
        U, R, S = pca.pca(W, C, r)
    else:
        t = sums["sum"]
        U, R, S, _ = pca.afm(W, C, t.exact, tokens, r)
        C = statistics.centred_moment(C, t.exact, tokens)
        near = statistics.centred_moment(near, t.rounded, tokens)
    M = pca.output_moment(W, C)
    return Outputs(
        U,
        R,
        S,
        moment=C,
        change=near - C,
        moved=pca.output_moment(W, near - C),
        total=float(np.trace(M)),
        size=float(np.linalg.norm(M)),
        known=known,
    )


def _by_moment(matrix: Factored, seen: Outputs, eps: float, said: Mapping[str, Any]) -> list[Check]:
    """Compare factors whose moment is not recorded: with one another, and by the objective."""
    W, L, R, r, dtype = matrix.W, matrix.L, matrix.R, matrix.r, matrix.dtype
    U, R_ref, S = seen.U, seen.R, seen.S
    checks, as_written = _projection_checks(matrix, U, R_ref)

    # Directions that are best for M + E lose at most tr((P - P_0) E) more, with P - P_0 of a
    # Frobenius norm of at most sqrt(2 min(r, d_out - r)), and of 2 sqrt(2) norm(E) / gap (Davis and
    # Kahan, as Yu, Wang and Samworth have it).
    off = ROOM_RMS * (float(np.linalg.norm(seen.moved)) + eps / 16 * seen.size)
    gap = float(S[r - 1] ** 2 - (S[r] ** 2 if r < S.size else 0.0)) - 2 * seen.known
    turned = float(np.sqrt(2 * min(r, len(W) - r)))
    if gap > 0:
        turned = min(turned, float(np.sqrt(8)) * off / gap)
    beyond = turned * off + 2 * len(W) * seen.known
    optimum = float(np.sum(S[r:] ** 2))
    error = pca.output_error(W, L @ R, seen.moment)
    norms = np.sqrt(np.maximum(np.diag(seen.moment), 0))
    spread = np.sqrt(product_variance(U, R_ref, dtype) + product_variance(L, R, dtype))
    rounding = SPREADS * float(np.linalg.norm(spread * norms))
    whole = float(np.sqrt(max(seen.total, 0))) or 1.0
    slack = float(np.sqrt(optimum + beyond) - np.sqrt(optimum)) + rounding
    excess = float(np.sqrt(error) - np.sqrt(optimum))
    checks.append(Check("output error above the optimum", max(excess, 0.0) / whole, slack / whole))

    # The report was written by the moment that is not recorded.
    def noise(E: Array) -> float:
        """What rounding may change of the outputs' squares, output by output."""
        size = np.sum((E @ seen.moment) * E)
        moved = np.sum(np.abs(np.sum((E @ seen.change) * E, axis=1)))
        return float(ROOM_RMS * (moved + eps / 16 * abs(size)) + len(W) * seen.known)

    moved = noise(W)
    share = error / seen.total if seen.total > 0 else 0.0
    low, high = _quotients(error, noise(W - L @ R), seen.total, moved)
    expected = float(np.sqrt(share))
    allowed = max(np.sqrt(high) - expected, expected - np.sqrt(low))
    allowed += 2 * _evaluation(matrix, norms) / whole
    if not as_written:
        allowed += rounding / whole
    checks.append(
        number(
            "report: relative weighted error", expected, said, "relative_weighted_error", allowed
        )
    )
    expected = lowrank.retained_energy(S, r)
    low, high = _quotients(optimum, noise(W - U @ R_ref) + beyond, seen.total, moved)
    allowed = max(1 - low - expected, expected - (1 - high))
    checks.append(number("report: retained energy", expected, said, "retained_energy", allowed))
    return checks


def _quotients(part: float, moved: float, whole: float, of_whole: float) -> tuple[float, float]:
    """Least and largest share of two numbers that are known within bounds; from 0 to 1."""
    low = max(part - moved, 0.0) / (whole + of_whole) if whole + of_whole > 0 else 0.0
    high = (part + moved) / (whole - of_whole) if whole > of_whole else 1.0
    return low, min(high, 1.0)


def _afm_bias(
    matrix: Factored,
    seen: Outputs,
    inputs: Inputs,
    names: list[str],
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
) -> list[Check]:
    """Compare AFM's bias, ``(W - L R) mu`` beside the linear's own, by the recorded sum."""
    W, L, R, dtype = matrix.W, matrix.L, matrix.R, matrix.dtype
    mu = statistics.token_mean(inputs.vectors["sum"].recorded, inputs.tokens)
    added = (W - L @ R) @ mu
    spread = applied_variance(seen.U, seen.R, mu, dtype) + applied_variance(L, R, mu, dtype)
    wide = EPS64 if dtype == torch.float64 else float(np.finfo(np.float32).eps)
    checks, start = [], 0
    for name in names:
        found = held[f"{name}.left.bias"].double().numpy()
        part = slice(start, start + found.size)
        start += found.size
        own = given.get(f"{name}.bias")
        before = np.zeros(found.size) if own is None else own.double().numpy()
        bound = SPREADS * np.sqrt(spread[part]) + spacing(found, dtype)
        bound += wide * (np.abs(added[part]) + np.abs(before))
        bound += 10 * EPS64 * max(W.shape) * float(np.linalg.norm(np.abs(W) @ np.abs(mu)))
        title = "bias" if len(names) == 1 else f"{name}.bias"
        checks.append(worst(title, np.abs(found - before - added[part]), bound))
    return checks
