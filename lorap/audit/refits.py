"""Weights refitted on what stays, and channels removed one by one: by the recomputed moment.

The moment that they were found by is not recorded. What rounding does to it is measured by the two
runs (SPEC, "Audit").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorap.audit.comparisons import EPS64, ROOM_LARGEST, ROOM_RMS, number
from lorap.audit.context import Context
from lorap.audit.files import linear_name
from lorap.audit.forward import Pair
from lorap.audit.inputs import INPUT_OF, Input, Inputs
from lorap.audit.results import Check
from lorap.audit.rounding import SPREADS, variance
from lorap.audit.sizes import Module
from lorap.config import Sublayer
from lorap_reference import heads, pca, regression

Array = NDArray[np.float64]

READER: Mapping[Sublayer, str] = {"mha": "o", "ffn": "down"}
"""The linear that reads the channels or heads of a block."""


def refit_checks(
    context: Context,
    module: Module,
    kept: NDArray[np.int64],
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    inputs: Mapping[Input, Inputs],
    said: Mapping[str, Any],
) -> list[Check]:
    """Compare what the least squares of a block gave; none where there were no least squares.

    Parameters
    ----------
    context : Context
    module : Module
        With a band.
    kept : (units,)
        Channels or groups of heads that stay.
    given, held : mapping
        The layer's tensors in the original and in the checkpoint, names relative to it.
    inputs : mapping
        By input.
    said : mapping
        What the report says of the module.
    """
    role = READER[module.sublayer]
    moment = inputs[INPUT_OF[role]].sums.get("moment") if INPUT_OF[role] in inputs else None
    if moment is None:
        return []
    settings = context.record.settings
    name = f"{linear_name(context.reader.family, role)}.weight"
    W, found = given[name].double().numpy(), held[name].double().numpy()
    checks = []
    if module.unit == "channels" and settings.selection == "obs":
        checks += removal_checks(context, module, Pair(W, W), moment, kept, said)
    columns = heads.head_rows(kept, W.shape[1], module.shape[0])
    if settings.update != "none":
        checks.append(_update_check(context, role, W, found, held[name].dtype, moment, columns))
    whole = np.zeros_like(W)
    whole[:, columns] = found
    fit = stored_fit(context, W, moment.rounded, columns, held[name].dtype)
    return [*checks, error_check(context, Pair(whole, whole), Pair(W, W), moment, said, fit)]


def _update_check(
    context: Context,
    role: str,
    W: Array,
    found: Array,
    dtype: torch.dtype,
    moment: Pair[Array],
    kept: NDArray[np.int64],
) -> Check:
    """Compare the objective of refitted weights with the least one.

    At a distance delta from the minimiser the objective is ``trace(delta H delta^T)`` above the
    optimum, H the ridged moment of what is kept. A moment that is off by G moves the minimiser by
    ``E G_K H^-1``, E what is left of W.
    """
    ridge, C = context.record.settings.ridge, moment.exact
    d, K = regression.ridged_correlation(C, ridge)
    best = regression.least_squares_update(W, C, kept, ridge)
    rest = W.copy()
    rest[:, kept] -= best
    inside, unit = K[np.ix_(kept, kept)], np.where(d > 0, d, 1.0)[kept]
    total = float(np.sqrt(pca.output_error(W, np.zeros_like(W), C))) or 1.0

    G = moment.rounded - C
    # What is removed has no part in the ridge.
    pushed = rest @ G[:, kept] + ridge * rest[:, kept] * np.diag(G)[kept]
    root = np.linalg.cholesky(inside)
    solved = np.linalg.solve(root, (pushed / unit).T)
    excess = float(np.linalg.norm(((found - best) * d[kept]) @ root))
    rounding = float(np.sqrt(np.sum(variance(best, dtype) * np.diag(C)[kept] * (1 + ridge))))
    if dtype != torch.float64:
        # By way of float32, which rounds once more.
        rounding *= 1.001
    noise = ROOM_RMS * (float(np.linalg.norm(solved)) + context.compute.eps / 16 * total)
    noise += 100 * EPS64 * len(K) / ridge * total
    bound = noise + SPREADS * rounding
    return Check(f"{role}: error of the outputs above the optimum", excess / total, bound / total)


def error_check(
    context: Context,
    new: Pair[Array],
    W: Pair[Array],
    moment: Pair[Array],
    said: Mapping[str, Any],
    fit: Array | None = None,
    floor: float = 0.0,
) -> Check:
    """Compare the share of the outputs that is lost with the report's.

    Two runs can give nearly one share by chance, though rounding moves it: so the noise takes in
    how far apart the moments of what is lost are, which are matrices. And weights lose less of the
    inputs that they were fitted to than of others: so it takes in what a fit of the rounded run
    loses of its own inputs and of the exact ones.

    Parameters
    ----------
    context : Context
    new : Pair of (d_out, d_in)
        What is left of the weights, 0 for what is gone.
    W : Pair of (d_out, d_in)
    moment : Pair of (d_in, d_in)
        Of their input.
    said : mapping
        What the report says of the module.
    fit : (d_out, d_in), optional
        What the rounded run would leave, as stored; where `new` is what the checkpoint holds.
    floor : float
        Added to the bound.
    """

    def share(new: Array, W: Array, C: Array) -> float:
        size = pca.output_error(W, np.zeros_like(W), C)
        return float(np.sqrt(pca.output_error(W, new, C) / size)) if size else 0.0

    expected, other = (share(*run) for run in zip(new, W, moment, strict=True))
    lost = [w - kept for w, kept in zip(W, new, strict=True)]
    errors, outputs = (
        Pair(*(x @ C @ x.T for x, C in zip(weights, moment, strict=True))) for weights in (lost, W)
    )
    moved = float(np.linalg.norm(errors.rounded - errors.exact))
    moved += expected**2 * float(np.linalg.norm(outputs.rounded - outputs.exact))
    moved /= float(np.trace(outputs.exact)) or 1.0
    # A square s^2 that moves by m takes its root along by m / 2s, and by no more than that of m.
    moved = min(moved / (2 * expected), np.sqrt(moved)) if expected else np.sqrt(moved)
    fitted = 0.0
    if fit is not None:
        of_others, of_own = (share(fit, w, C) for w, C in zip(W, moment, strict=True))
        fitted = of_others - of_own
    noise = math.hypot(other - expected, moved, fitted) + context.compute.eps / 16
    bound = ROOM_RMS * noise + floor
    return number("report: relative output error", expected, said, "relative_output_error", bound)


def stored_fit(
    context: Context,
    W: Array,
    C: Array,
    columns: NDArray[np.int64],
    dtype: torch.dtype,
) -> Array | None:
    """Return the weights refitted to a moment, as stored, 0 for what is gone.

    None where there were no least squares.

    Parameters
    ----------
    context : Context
    W : (d_out, d_in)
    C : (d_in, d_in)
    columns : (k,)
        What stays.
    dtype : torch.dtype
        Of the storage.
    """
    settings = context.record.settings
    if settings.update == "none":
        return None
    fit = np.zeros_like(W)
    best = regression.least_squares_update(W, C, columns, settings.ridge)
    fit[:, columns] = torch.from_numpy(best).to(dtype).double().numpy()
    return fit


def removal_checks(
    context: Context,
    module: Module,
    W: Pair[Array],
    moment: Pair[Array],
    kept: NDArray[np.int64],
    said: Mapping[str, Any],
) -> list[Check]:
    """Compare removals one by one: each the cheapest left, within what rounding does to costs.

    Parameters
    ----------
    context : Context
    module : Module
        That loses channels.
    W : Pair of (d_out, d_in)
        Of down.
    moment : Pair of (d_in, d_in)
        Of its input.
    kept : (width,)
    said : mapping
        What the report says of the module.
    """
    units = module.shape[0]
    name = "report: removed channels"
    order = said.get("removed_channels")
    if not (
        isinstance(order, list)
        and all(type(channel) is int for channel in order)
        and sorted(order) == np.setdiff1d(np.arange(units), kept).tolist()
    ):
        return [Check(name, 1, 0, "expected the channels that are not kept, each once")]
    worst, _ = follow(context, W, moment, order)
    return [Check(name, 0, 0), worst]


def follow(
    context: Context, W: Pair[Array], moment: Pair[Array], order: Sequence[int]
) -> tuple[Check, Pair[Array]]:
    """Remove channels in an order, in both runs.

    Parameters
    ----------
    context : Context
    W : Pair of (d_out, d_in)
        Of down.
    moment : Pair of (d_in, d_in)
        Of its input.
    order : sequence of int
        Channels, each once.

    Returns
    -------
    check : Check
        Whether each was the cheapest left, within what rounding does to costs.
    losses : Pair of (len(order),)
        What each costs.
    """
    ridge = context.record.settings.ridge
    exact = _Removals(W.exact, moment.exact, ridge)
    rounded = _Removals(W.rounded, moment.rounded, ridge)
    losses = Pair(np.zeros(len(order)), np.zeros(len(order)))
    worst = Check("removals", 0.0, 0.0)
    usage = 0.0
    for step, j in enumerate(order):
        cost = exact.costs()
        scale = float(np.max(cost[np.isfinite(cost)]))
        live = np.isfinite(cost) & (cost > 1e-12 * scale)
        other = rounded.costs()
        losses.exact[step], losses.rounded[step] = cost[j], other[j]
        ratios = other[live] / cost[live]
        noise = float(np.sqrt(np.mean((ratios - 1) ** 2))) if live.any() else 0.0
        share = ROOM_LARGEST * (noise + context.compute.eps / 8)
        excess = float(cost[j] - np.min(cost))
        bound = 2 * share * float(cost[j]) + 1e-12 * scale
        if excess > usage * bound:
            usage = excess / bound
            worst = Check("removals", excess / scale, bound / scale, f"at removal {step}")
        exact.remove(j)
        rounded.remove(j)
    return worst, losses


class _Removals:
    """The costs of the next removal (rule ``obs.order``)."""

    def __init__(self, W: Array, C: Array, ridge: float) -> None:
        d, K = regression.ridged_correlation(C, ridge)
        self._V, self._P = W * d, np.linalg.inv(K)
        self._gone = np.zeros(len(d), dtype=bool)

    def costs(self) -> Array:
        """Return what each channel costs; inf for one that is gone."""
        pivots = np.where(self._gone, 1.0, np.diag(self._P))
        return np.where(self._gone, np.inf, np.sum(self._V**2, axis=0) / pivots)

    def remove(self, j: int) -> None:
        """Take a channel out, and update the others."""
        c = self._P[j] / self._P[j, j]
        self._V -= np.outer(self._V[:, j], c)
        self._P -= np.outer(self._P[:, j], c)
        self._gone[j] = True
