"""What the plan was measured by, recomputed from the original: similarities, spectra, removals.

The divergences of probes are in :mod:`lorap.audit.probes`, the gradients in
:mod:`lorap.audit.gradients`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorap.audit.comparisons import EPS64, ROOM_LARGEST, ROOM_RMS, rms, within_noise
from lorap.audit.context import Context, embedded
from lorap.audit.factors import SVD_FACTOR, Outputs, outputs
from lorap.audit.files import linear_name
from lorap.audit.forward import Pair, Runs, Step
from lorap.audit.gradients import audit_gradients
from lorap.audit.inputs import (
    INPUT_OF,
    TOLD,
    Input,
    Statistic,
    Sums,
    collect,
    live,
    low_rank_method,
    norms_of,
)
from lorap.audit.probes import Probes
from lorap.audit.refits import follow
from lorap.audit.results import Check, ModuleAudit
from lorap.audit.sizes import Module
from lorap_reference import joint, lowrank, mgaa

Array = NDArray[np.float64]


def audit_measurements(
    context: Context,
    ids: NDArray[np.int64],
    chosen: Sequence[int],
    advance: Callable[[], None],
) -> Iterator[ModuleAudit]:
    """Run the layers of the original, and compare what the plan was measured by.

    Parameters
    ----------
    context : Context
    ids : (N, L)
    chosen : sequence of int
        Ascending. The layers after the last one are run for the gradient of the loss, which also
        takes the residual stream before every layer into memory, and for the probes alone.
    advance : callable
        Called after each layer.
    """
    reader, settings = context.reader, context.record.settings
    runs = embedded(context, ids)
    inputs: list[Pair[NDArray[Any]]] = []
    probes = Probes(context, ids) if settings.is_marginal else None
    for index in layers_of(context, chosen):
        if settings.measures_gradients:
            inputs.append(Pair(runs.h.exact.copy(), runs.h.rounded.copy()))
        given = reader.load(f"{reader.family.layers_path}.{index}.")
        if probes is None or index <= chosen[-1]:
            sums, checked = _audit_layer(context, runs, index, given, spectra=index in chosen)
            yield from checked
        if probes is not None:
            probes.advance(index, given, sums if index in chosen else None)
        advance()
    if probes is not None:
        yield from probes.audited()
    if settings.measures_gradients:
        yield from audit_gradients(context, runs, ids, inputs, chosen, advance)


def layers_of(context: Context, chosen: Sequence[int]) -> range:
    """Return the layers of the original to run forwards."""
    settings = context.record.settings
    if not settings.measures:
        return range(0)
    to_the_end = settings.measures_gradients or settings.is_marginal
    return range(context.shape.layers if to_the_end else chosen[-1] + 1)


def _audit_layer(
    context: Context,
    runs: Runs,
    index: int,
    given: Mapping[str, Tensor],
    *,
    spectra: bool,
) -> tuple[dict[Input, Sums], list[ModuleAudit]]:
    """Run a layer of the original, and compare its similarities and, if asked for, spectra.

    Returns
    -------
    sums : dict
        What is known of its inputs.
    audits : list of ModuleAudit
    """
    audits = []
    settings, record = context.record.settings, context.record
    modules = [
        module
        for module in context.plan.layers[index].values()
        if spectra
        and not module.untouched
        and (settings.is_marginal or module.sublayer in settings.energy_sublayers)
    ]

    def needs(module: Module, role: str) -> frozenset[Statistic]:
        if module.unit == "matrix":
            return TOLD[low_rank_method(settings, module.sublayer)]
        return frozenset({"moment"} if role == "down" else ())

    cosines = Cosines()
    where = f"layers.{index}"
    steps: Iterable[Step] = runs.advance(given, f"{where} of the original")
    if settings.measures_similarity:
        steps = cosines.listening(steps)
    sums = collect(steps, modules, needs, where)
    if settings.measures_similarity:
        for sublayer, (mean, noise) in cosines.found().items():
            name = f"{where}.{sublayer}.similarity"
            recorded = float(record.recorded(name, ()))
            bound = ROOM_LARGEST * noise + 4 * EPS64 * runs.h.exact.shape[-1]
            check = Check("similarity", abs(recorded - mean), bound)
            audits.append(ModuleAudit(name, "", (check,)))
    for module in modules:
        if module.unit == "channels":
            audits.append(_losses_audit(context, module, given, sums["down"]["moment"]))
            continue
        kind = INPUT_OF[module.roles[0]]
        weights = [given[f"{linear_name(context.reader.family, m)}.weight"] for m in module.roles]
        W = joint.stacked([weight.double().numpy() for weight in weights])
        spectrum = record.recorded(f"{module.path}.spectrum", (min(module.shape),))
        checks = _spectrum_checks(context, module, W, sums.get(kind, {}), runs.tokens, spectrum)
        audits.append(ModuleAudit(f"{module.path}.spectrum", "", tuple(checks)))
    return sums, audits


def _losses_audit(
    context: Context, module: Module, given: Mapping[str, Tensor], moment: Pair[Array]
) -> ModuleAudit:
    """Compare the recorded removals of channels, and what they cost together for every width."""
    W = given[f"{linear_name(context.reader.family, 'down')}.weight"].double().numpy()
    order = context.record.removals(module.path, module.shape[0])
    worst, losses = follow(context, Pair(W, W), moment, order)
    exact, rounded = (np.cumsum(found) for found in losses)
    recorded = np.cumsum(context.record.recorded(f"{module.path}.losses", exact.shape))
    # A loss below what the solver tells apart is compared with the largest.
    unit = np.maximum(exact, 1e-12 * exact[-1]) if exact[-1] > 0 else np.ones_like(exact)
    checks = within_noise(
        "losses of removals",
        np.abs(recorded - exact) / unit,
        np.abs(rounded - exact) / unit,
        context.compute.eps,
    )
    return ModuleAudit(f"{module.path}.losses", "", (worst, *checks))


class Cosines:
    """Means of the cosines before and after each sub-layer, and their noise."""

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: dict[str, float] = {"mha": 0.0, "ffn": 0.0}
        self._moved: dict[str, float] = {"mha": 0.0, "ffn": 0.0}
        self._squares: dict[str, float] = {"mha": 0.0, "ffn": 0.0}

    def listening(self, steps: Iterable[Step]) -> Iterator[Step]:
        """Pass the steps of a forward on, and take their cosines."""
        for step in steps:
            self._add(step)
            yield step

    def _add(self, step: Step) -> None:
        before, trace = step.before, step.trace
        middle = Pair(trace.exact.middle, trace.rounded.middle)
        after = Pair(trace.exact.output, trace.rounded.output)
        self._tokens += before.exact.shape[0] * before.exact.shape[1]
        for sublayer, x, y in (("mha", before, middle), ("ffn", middle, after)):
            X, Y = _tokens(x.exact), _tokens(y.exact)
            self._sums[sublayer] += mgaa.cosine_sum(X, Y)
            moved = _cosines(_tokens(x.rounded), _tokens(y.rounded)) - _cosines(X, Y)
            self._moved[sublayer] += float(np.sum(moved))
            self._squares[sublayer] += float(np.sum(moved**2))

    def found(self) -> dict[str, tuple[float, float]]:
        """Return by sub-layer the mean, and its noise.

        The noise is how far rounding moves the mean, or would move it if it moved the tokens
        independently: the first alone may be next to nothing by chance.
        """
        n = self._tokens
        return {
            sublayer: (
                total / n,
                float(np.hypot(self._moved[sublayer] / n, np.sqrt(self._squares[sublayer]) / n)),
            )
            for sublayer, total in self._sums.items()
        }


def _tokens(x: NDArray[Any]) -> Array:
    return np.asarray(x.reshape(-1, x.shape[-1]), dtype=np.float64)


def _cosines(X: Array, Y: Array) -> Array:
    """Cosine of each token; 0 where one is zero."""
    norms = np.linalg.norm(X, axis=1) * np.linalg.norm(Y, axis=1)
    return np.asarray(np.sum(X * Y, axis=1) / np.where(norms > 0, norms, 1.0))


def _spectrum_checks(
    context: Context, module: Module, W: Array, sums: Sums, tokens: int, recorded: Array
) -> list[Check]:
    """Compare recorded singular values with those of the reference."""
    settings, eps = context.record.settings, context.compute.eps
    method = low_rank_method(settings, module.sublayer)
    if method == "pca" or method == "afm":
        return _eigenvalue_checks(outputs(W, method, sums, tokens, 0), recorded, eps)
    if method == "svd":
        S = lowrank.svd_low_rank(W, 0)[2]
        return [_exact_check(S, recorded, W)]
    if method == "asvd":
        sizes, power = sums["magnitudes"], settings.asvd_alpha
        scale = lowrank.magnitude_scale(sizes.exact, tokens, power)
    else:
        norms = norms_of(sums)
        assert norms is not None
        sizes, power = norms, 0.5 if settings.weighting == "eq6" else 1.0
        scale = lowrank.column_scale(sizes.exact, settings.weighting)
    S = lowrank.awsvd(W, scale, 0)[2]
    # W D (1 + E) with a diagonal E has the singular values of W D but for factors within 1 +- E;
    # and each moves by a mean of E, of weights that sum to 1, or less, over all that there are.
    noise = np.abs(sizes.rounded - sizes.exact) / live(sizes.exact)
    largest = ROOM_LARGEST * (float(np.max(noise)) + eps / 8)
    mean = ROOM_RMS * (rms(noise) + eps / 16) * np.sqrt(W.shape[1] / S.size)
    unit = _unit(S, W)
    off = np.maximum(np.abs(recorded - S) - unit, 0) / live(S)
    return [
        Check("singular values, rms", rms(off), _share(float(mean), power)),
        Check("singular values, largest", float(np.max(off)), _share(largest, power)),
    ]


def _unit(S: Array, W: Array) -> float:
    return float(SVD_FACTOR * EPS64 * max(W.shape) * S[0])


def _exact_check(S: Array, recorded: Array, W: Array) -> Check:
    return Check("singular values", float(np.max(np.abs(recorded - S))), _unit(S, W))


def _share(allowed: float, power: float) -> float:
    """Bound on how far a power moves, relatively, of a number that moves by a share."""
    return float((1 - allowed) ** -power - 1) if allowed < 1 else float("inf")


def _eigenvalue_checks(seen: Outputs, recorded: Array, eps: float) -> list[Check]:
    """Compare squares of singular values, which are eigenvalues of the outputs' moment.

    By what rounding adds to that moment none moves by more than its spectral norm (Weyl), and all
    together by no more than its Frobenius norm (Hoffman and Wielandt).
    """
    S = seen.S
    first = float(S[0] ** 2) or 1.0
    off = np.abs(recorded**2 - S**2)
    known = seen.known * np.sqrt(S.size)
    moved = ROOM_RMS * (float(np.linalg.norm(seen.moved)) + eps / 16 * seen.size) + known
    largest = ROOM_LARGEST * (float(np.linalg.norm(seen.moved, 2)) + eps / 8 * first) + seen.known
    return [
        Check("eigenvalues, norm", float(np.linalg.norm(off)) / first, moved / first),
        Check("eigenvalues, largest", float(np.max(off)) / first, largest / first),
    ]
