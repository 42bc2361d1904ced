"""Layers of which the checkpoint does not tell what they were made by.

Where a layer was compressed stage by stage, each matrix regressed to a target, neither the moments
nor the regressed weights are recorded; where it was refined, the weights are not those that its
compression gave. Both runs recompute them, each from its own activations, and how far what they
give is apart is the noise of what the checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorap.audit.comparisons import EPS64, ROOM_LARGEST, ROOM_RMS, number, same_bits
from lorap.audit.context import Context
from lorap.audit.factors import factored
from lorap.audit.files import linear_name, right_name
from lorap.audit.forward import Pair, Runs
from lorap.audit.inputs import (
    INPUT_OF,
    TAKEN,
    Input,
    Inputs,
    Statistic,
    Sums,
    against_record,
    low_rank_method,
    needed,
)
from lorap.audit.refits import READER, error_check, removal_checks, stored_fit
from lorap.audit.results import Check, ModuleAudit
from lorap.audit.rounding import SPREADS, product_variance, variance
from lorap.audit.selections import (
    by_scores,
    cut_checks,
    energies,
    listed,
    numbers_at_cut,
    unit_scores,
)
from lorap.audit.sizes import Module
from lorap.errors import LorapError
from lorap_reference import heads, importance, joint, lowrank, pca, regression, statistics

Array = NDArray[np.float64]

STAGES: tuple[Input, ...] = ("attention", "o", "ffn", "down")

FLOOR = 1e-7
"""Root of what float64 leaves of a difference of squares, as a share of their root."""


@dataclass(frozen=True)
class Stage:
    """What both runs give of one input.

    Attributes
    ----------
    inputs : Inputs
        Beside what is recorded.
    moment : Pair of (d_in, d_in)
    cross : Pair of (d_in, d_in) or None
        Of the uncompressed model's input and this one, where there is a target.
    """

    inputs: Inputs
    moment: Pair[Array]
    cross: Pair[Array] | None


@dataclass(frozen=True)
class Compressed:
    """A layer gone through, up to its refinement.

    Attributes
    ----------
    modules : list of ModuleAudit
    weights : Pair of dict
        The layer as both runs have it before it is refined, names relative to it, as it would be
        stored; what the checkpoint holds where nothing is refined.
    """

    modules: list[ModuleAudit]
    weights: Pair[dict[str, Tensor]]


def audit_stages(
    context: Context,
    runs: Runs,
    dense: Runs,
    index: int,
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
) -> Compressed:
    """Compare a layer that was compressed stage by stage, or refined (SPEC, "Audit").

    Parameters
    ----------
    context : Context
    runs, dense : Runs
        The samples before the layer, in the compressed and in the uncompressed model.
    index : int
    given, held : mapping
        The layer's tensors in the original and in the checkpoint, names relative to it.
    """
    family, settings = context.reader.family, context.record.settings
    plan, modules = context.plan.layers[index], list[ModuleAudit]()
    current, targets = Pair(dict(given), dict(given)), dict[str, Pair[Array]]()
    stages: dict[Input, Stage] = {}
    touched: set[str] = set()
    for kind in STAGES:
        here = [
            (module, role)
            for module in plan.values()
            for role in module.roles
            if INPUT_OF[role] == kind and not module.untouched
        ]
        if here:
            wanted = {s for module, role in here for s in needed(module, role, settings)}
            seen: Pair[Mapping[str, Tensor]] = Pair(given, given)
            if settings.dense_target is not None:
                seen = Pair(current.exact, current.rounded)
            stages[kind] = _collect(context, runs, dense, index, kind, wanted, seen, given)
        for module, role in here:
            name = f"{linear_name(family, role)}.weight"
            targets[role] = _targets(context, given[name].double().numpy(), stages[kind])
            found = Pair(*(torch.from_numpy(W) for W in targets[role]))
            kept = _kept(context, module)
            if kept is not None and role != READER[module.sublayer]:
                # As it is stored, where it is; the rest as it would be.
                found = Pair(*(W.to(given[name].dtype, copy=True) for W in found))
                if not settings.refine:
                    rows = heads.head_rows(kept, len(given[name]), module.shape[0])
                    for W in found:
                        W[torch.from_numpy(rows)] = held[name]
            for tensors, W in zip(current, found, strict=True):
                tensors[name] = W
        for name, module in plan.items():
            last = max((INPUT_OF[role] for role in module.roles), key=STAGES.index)
            if last != kind:
                continue
            own = _names(context, module, given)
            touched |= set(own)
            checks = [
                check
                for found_at in dict.fromkeys(INPUT_OF[role] for role in module.roles)
                if found_at in stages
                for check in stages[found_at].inputs.checks
            ]
            kept = _kept(context, module)
            if settings.refine and not module.untouched and (kept is not None or not module.band):
                made = _made(context, module, targets, stages, kept, given)
            else:
                part = {n: held[n] for n in _names(context, module, held)}
                made = Pair(part, part)
            if module.untouched:
                checks = [same_bits(n, given[n], held[n]) for n in own]
            elif module.rank is not None:
                checks += _factor_checks(context, module, targets, stages[kind], made, given, held)
            elif module.band is not None:
                checks += _block_checks(context, module, targets, stages, made, given, held)
            else:
                checks += _dense_checks(context, module, targets, stages, given, held)
            modules.append(ModuleAudit(f"layers.{index}.{name}", module.becomes, tuple(checks)))
            for tensors, new in zip(current, made, strict=True):
                for gone in own:
                    del tensors[gone]
                tensors |= new
    for name in (name for name in given if name not in touched):
        same = same_bits("untouched", given[name], held[name])
        modules.append(ModuleAudit(f"layers.{index}.{name}", "as it was", (same,)))
    return Compressed(modules, current)


def _collect(
    context: Context,
    runs: Runs,
    dense: Runs,
    index: int,
    kind: Input,
    wanted: set[Statistic],
    current: Pair[Mapping[str, Tensor]],
    given: Mapping[str, Tensor],
) -> Stage:
    """Run the layer as far as it is compressed, and the uncompressed one, up to an input."""
    totals: dict[str, Pair[Array]] = {}

    def add(name: str, exact: Array, rounded: Array) -> None:
        before = totals.get(name)
        totals[name] = (
            Pair(exact, rounded)
            if before is None
            else Pair(before.exact + exact, before.rounded + rounded)
        )

    staged = context.record.settings.dense_target is not None
    steps = runs.forward(current.exact, current.rounded)
    for own, other in zip(steps, dense.forward(given), strict=True):
        X = Pair(*(_tokens(getattr(t, kind)) for t in own.trace))
        for statistic in {*wanted, "moment"}:
            add(statistic, *(TAKEN[statistic](x) for x in X))
        if staged:
            Z = Pair(*(_tokens(getattr(t, kind)) for t in other.trace))
            cross = statistics.cross_moment
            add("cross", cross(Z.exact, X.exact), cross(Z.rounded, X.rounded))
    if not all(np.isfinite(pair.exact).all() for pair in totals.values()):
        raise LorapError(f"layers.{index}: the input {kind} holds NaN or inf")
    # Of a forward that is not of a stage, what its methods are not told of is not recorded.
    known = {*wanted, "moment"} if staged else wanted
    sums: Sums = {statistic: totals[statistic] for statistic in known}
    record, eps = context.record, context.compute.eps
    return Stage(
        against_record(sums, runs.tokens, kind, index, record, eps),
        totals["moment"],
        totals.get("cross"),
    )


def _names(context: Context, module: Module, tensors: Iterable[str]) -> list[str]:
    """Return those of some names that are of a module's tensors, sorted."""
    family = context.reader.family
    prefixes = tuple(f"{linear_name(family, role)}." for role in module.roles)
    if len(module.roles) == 2:
        prefixes = (*prefixes, f"{family.joint_right}.")
    return sorted(name for name in tensors if name.startswith(prefixes))


def _targets(context: Context, W: Array, stage: Stage) -> Pair[Array]:
    """Return what a matrix is fitted to: itself, or by regression to a target of its outputs."""
    settings = context.record.settings
    if stage.cross is None:
        return Pair(W, W)
    assert settings.dense_target is not None
    return Pair(
        *(
            regression.regressed_weight(W, C, M, settings.dense_target, settings.ridge)
            for C, M in zip(stage.moment, stage.cross, strict=True)
        )
    )


def _made(
    context: Context,
    module: Module,
    targets: Mapping[str, Pair[Array]],
    stages: Mapping[Input, Stage],
    kept: NDArray[np.int64] | None,
    given: Mapping[str, Tensor],
) -> Pair[dict[str, Tensor]]:
    """Return what both runs make of a module, as it would be stored.

    Parameters
    ----------
    context : Context
    module : Module
    targets : mapping
        By role.
    stages : mapping
        By input.
    kept : (units,) or None
        What stays of a block that loses something: as the report has it.
    given : mapping
        The layer's tensors in the original, names relative to it.
    """
    family, settings = context.reader.family, context.record.settings
    names = {role: linear_name(family, role) for role in module.roles}
    found: Pair[dict[str, Tensor]] = Pair({}, {})

    def put(name: str, values: Pair[Array], like: str) -> None:
        for tensors, value in zip(found, values, strict=True):
            tensors[name] = torch.from_numpy(value).to(given[like].dtype)

    if module.rank is None:
        for role, name in names.items():
            weight = f"{name}.weight"
            put(weight, _best(context, module, role, targets, stages, kept), weight)
            if f"{name}.bias" in given:
                bias = given[f"{name}.bias"]
                if kept is not None and role != READER[module.sublayer]:
                    rows = heads.head_rows(kept, len(bias), module.shape[0])
                    bias = bias[torch.from_numpy(rows)]
                for tensors in found:
                    tensors[f"{name}.bias"] = bias
        return found
    stage, first = stages[INPUT_OF[module.roles[0]]], f"{names[module.roles[0]]}.weight"
    sums, tokens = stage.inputs.sums, stage.inputs.tokens
    known = Pair(
        {name: pair.exact for name, pair in sums.items()},
        {name: pair.rounded for name, pair in sums.items()},
    )
    factors = [
        factored(settings, module, W, of_run, tokens)
        for W, of_run in zip(_stacked(module, targets), known, strict=True)
    ]
    put(f"{right_name(family, module)}.weight", Pair(*(R for _, R, _ in factors)), first)
    start = 0
    for name in names.values():
        rows = slice(start, start + len(given[f"{name}.weight"]))
        start = rows.stop
        put(f"{name}.left.weight", Pair(*(L[rows] for L, _, _ in factors)), first)
        own = given.get(f"{name}.bias")
        if own is not None or module.affine:
            before = 0.0 if own is None else own.double().numpy()
            added = (np.zeros(len(L)) if bias is None else bias for L, _, bias in factors)
            put(f"{name}.left.bias", Pair(*(before + bias[rows] for bias in added)), first)
    return found


def _stacked(module: Module, targets: Mapping[str, Pair[Array]]) -> Pair[Array]:
    return Pair(
        joint.stacked([targets[role].exact for role in module.roles]),
        joint.stacked([targets[role].rounded for role in module.roles]),
    )


def _best(
    context: Context,
    module: Module,
    role: str,
    targets: Mapping[str, Pair[Array]],
    stages: Mapping[Input, Stage],
    kept: NDArray[np.int64] | None,
) -> Pair[Array]:
    """Return what both runs make of a matrix that is not factored.

    Parameters
    ----------
    context, module, targets, stages, kept
        As for ``_made``.
    role : str
        Of the matrix.
    """
    target, settings, units = targets[role], context.record.settings, module.shape[0]
    if kept is None:
        return target
    if role != READER[module.sublayer]:
        rows = heads.head_rows(kept, len(target.exact), units)
        return Pair(*(W[rows] for W in target))
    columns = heads.head_rows(kept, target.exact.shape[1], units)
    if settings.update == "none":
        return Pair(*(W[:, columns] for W in target))
    moment = stages[INPUT_OF[role]].moment
    return Pair(
        *(
            regression.least_squares_update(W, C, columns, settings.ridge)
            for W, C in zip(target, moment, strict=True)
        )
    )


def _tokens(x: NDArray[Any]) -> Array:
    return np.asarray(x.reshape(-1, x.shape[-1]), dtype=np.float64)


def _kept(context: Context, module: Module) -> NDArray[np.int64] | None:
    """Return the channels or groups that the report lists; None where it lists none that can be."""
    if module.band is None:
        return None
    kept, _ = listed(module, context.record.said(module.layer, module.name))
    return kept if kept.size else None


def _share(context: Context, exact: float, rounded: float, moved: float = 0.0) -> float:
    """Bound on a share that the report gives, from what the two runs give.

    Parameters
    ----------
    context : Context
    exact, rounded : float
    moved : float
        How far rounding may move it where the two are near each other by chance.
    """
    noise = float(np.hypot(rounded - exact, moved))
    return ROOM_RMS * (noise + context.compute.eps / 16) + FLOOR


# --- single matrices -----------------------------------------------------------------------------


def _near(
    context: Context, name: str, found: Array, best: Pair[Array], moment: Array, dtype: torch.dtype
) -> Check:
    """Compare weights with those that the two runs give, by the outputs.

    Parameters
    ----------
    context : Context
    name : str
        Of the check.
    found : (d_out, k)
    best : Pair of (d_out, k)
    moment : (k, k)
        Of the inputs.
    dtype : torch.dtype
        That they are stored in.
    """
    total = float(np.sqrt(pca.output_error(best.exact, np.zeros_like(found), moment))) or 1.0
    off, noise = (
        float(np.sqrt(pca.output_error(other, best.exact, moment)))
        for other in (found, best.rounded)
    )
    rounding = float(np.sqrt(np.sum(variance(best.exact, dtype) * np.diag(moment))))
    # Those that wait for the rest of their block are rounded on the way, by float32 at least.
    bound = ROOM_RMS * (noise + context.compute.eps / 16 * total) + SPREADS * 1.001 * rounding
    return Check(name, off / total, (bound + FLOOR * total) / total)


def _dense_checks(
    context: Context,
    module: Module,
    targets: Mapping[str, Pair[Array]],
    stages: Mapping[Input, Stage],
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
) -> list[Check]:
    """Compare matrices that stay dense, and are fitted to their targets if they are not refined."""
    checks = []
    for role in module.roles:
        name = linear_name(context.reader.family, role)
        weight, moment = held[f"{name}.weight"], stages[INPUT_OF[role]].moment.exact
        found = weight.double().numpy()
        if not context.record.settings.refine:
            title = f"{role}: distance of the outputs from the target's"
            checks.append(_near(context, title, found, targets[role], moment, weight.dtype))
        if f"{name}.bias" in given:
            checks.append(same_bits(f"{role}: bias", given[f"{name}.bias"], held[f"{name}.bias"]))
    return checks


def _factor_checks(
    context: Context,
    module: Module,
    targets: Mapping[str, Pair[Array]],
    stage: Stage,
    made: Pair[dict[str, Tensor]],
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
) -> list[Check]:
    """Compare the objective of a matrix's factors with the least one, unless they are refined."""
    family, settings = context.reader.family, context.record.settings
    method, r = low_rank_method(settings, module.sublayer), module.rank
    assert r is not None
    names = [linear_name(family, role) for role in module.roles]
    W = _stacked(module, targets)
    right = made.exact[f"{right_name(family, module)}.weight"]
    factors = [
        (
            joint.stacked([own[f"{name}.left.weight"].double().numpy() for name in names]),
            own[f"{right_name(family, module)}.weight"].double().numpy(),
        )
        for own in made
    ]
    (L, R), others = factors
    n = stage.inputs.tokens

    def metric(which: Callable[[Pair[Array]], Array]) -> Array:
        """Return the moment that the method weights errors by."""
        if method in ("pca", "afm"):
            C = which(stage.moment)
            if method == "afm":
                C = statistics.centred_moment(C, which(stage.inputs.sums["sum"]), n)
            return C
        if method == "svd":
            return np.eye(W.exact.shape[1])
        if method == "asvd":
            magnitudes = which(stage.inputs.sums["magnitudes"])
            scale = lowrank.magnitude_scale(magnitudes, n, settings.asvd_alpha)
        else:
            norms = np.sqrt(np.diag(which(stage.moment)))
            scale = lowrank.column_scale(norms, settings.weighting)
        return np.diag(scale**2)

    C = Pair(metric(lambda pair: pair.exact), metric(lambda pair: pair.rounded))
    best = Pair(pca.pca(W.exact, C.exact, r), pca.pca(W.rounded, C.rounded, r))
    optimum = pca.output_error(W.exact, best.exact[0] @ best.exact[1], C.exact)
    size = pca.output_error(W.exact, np.zeros_like(W.exact), C.exact)
    total = float(np.sqrt(size)) or 1.0

    def excess(product: Array) -> float:
        error = pca.output_error(W.exact, product, C.exact)
        return float(np.sqrt(max(error - optimum, 0.0)))

    product = L @ R
    norms = np.sqrt(np.maximum(np.diag(C.exact), 0))
    U, R_best = best.exact[0], best.exact[1]
    spread = product_variance(U, R_best, right.dtype) + product_variance(L, R, right.dtype)
    rounding = float(np.linalg.norm(np.sqrt(spread) * norms))
    noise = excess(best.rounded[0] @ best.rounded[1]) + context.compute.eps / 16 * total
    bound = ROOM_RMS * noise + SPREADS * rounding + FLOOR * total
    checks = []
    if not settings.refine:
        checks.append(Check("error above the optimum", excess(product) / total, bound / total))

    said = context.record.said(module.layer, module.name)
    error = float(np.sqrt(pca.output_error(W.exact, product, C.exact) / size)) if size else 0.0
    other_size = pca.output_error(W.rounded, np.zeros_like(W.rounded), C.rounded)
    other = pca.output_error(W.rounded, others[0] @ others[1], C.rounded)
    other = other / other_size if other_size else 0.0
    allowed = _share(context, error, float(np.sqrt(other))) + SPREADS * rounding / total
    key = "relative_weighted_error"
    checks.append(number("report: relative weighted error", error, said, key, allowed))
    energy = Pair(*(lowrank.retained_energy(found[2], r) for found in (best.exact, best.rounded)))
    squares = Pair(*(found[2] ** 2 for found in (best.exact, best.rounded)))
    moved = float(np.linalg.norm(squares.rounded - squares.exact))
    moved /= float(np.sum(squares.exact)) or 1.0
    allowed = _share(context, energy.exact, energy.rounded, moved)
    key = "retained_energy"
    checks.append(number("report: retained energy", energy.exact, said, key, allowed))
    return [*checks, *_bias_checks(context, names, method, W, L, R, stage, given, held)]


def _bias_checks(
    context: Context,
    names: Sequence[str],
    method: str,
    W: Pair[Array],
    L: Array,
    R: Array,
    stage: Stage,
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
) -> list[Check]:
    """Compare biases: as they were, and what AFM adds."""
    checks, start = [], 0
    for name in names:
        rows = slice(start, start + len(held[f"{name}.left.weight"]))
        start = rows.stop
        own = given.get(f"{name}.bias")
        if method != "afm":
            if own is not None:
                checks.append(same_bits(f"{name}.bias", own, held[f"{name}.left.bias"]))
            continue
        bias = held[f"{name}.left.bias"]
        total, n = stage.inputs.sums["sum"], stage.inputs.tokens
        mu = Pair(*(statistics.token_mean(t, n) for t in (total.exact, total.rounded)))
        added = (W.exact - L @ R)[rows] @ mu.exact
        moved = (W.rounded - L @ R)[rows] @ mu.rounded - added
        before = np.zeros(len(added)) if own is None else own.double().numpy()
        off = bias.double().numpy() - before - added
        reach = np.abs(W.exact[rows]) @ np.abs(mu.exact) + np.abs(before)
        eps = torch.finfo(bias.dtype).eps
        bound = ROOM_RMS * (
            np.linalg.norm(moved) + context.compute.eps / 16 * np.linalg.norm(reach)
        )
        bound += (
            SPREADS * eps * float(np.linalg.norm(np.abs(L[rows]) @ np.abs(R) @ np.abs(mu.exact)))
        )
        bound += eps * float(np.linalg.norm(before + added))
        checks.append(Check(f"{name}.bias", float(np.linalg.norm(off)), float(bound)))
    return checks


# --- blocks --------------------------------------------------------------------------------------


def _block_checks(
    context: Context,
    module: Module,
    targets: Mapping[str, Pair[Array]],
    stages: Mapping[Input, Stage],
    made: Pair[dict[str, Tensor]],
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
) -> list[Check]:
    """Compare a block that loses channels or heads; not its weights where they are refined."""
    settings, said = context.record.settings, context.record.said(module.layer, module.name)
    kept, check = listed(module, said)
    checks = [check]
    if not kept.size:
        return checks
    reader, units = READER[module.sublayer], module.shape[0]
    for role in module.roles:
        name = linear_name(context.reader.family, role)
        if not settings.refine:
            weight, C = held[f"{name}.weight"], stages[INPUT_OF[role]].moment.exact
            best = _best(context, module, role, targets, stages, kept)
            if role == reader:
                columns = heads.head_rows(kept, len(C), units)
                C = C[np.ix_(columns, columns)]
            title = f"{role}: distance of the outputs from the target's"
            checks.append(_near(context, title, weight.double().numpy(), best, C, weight.dtype))
        if f"{name}.bias" in given:
            bias = given[f"{name}.bias"]
            if role != reader:
                bias = bias[torch.from_numpy(heads.head_rows(kept, len(bias), units))]
            checks.append(same_bits(f"{role}: bias", bias, held[f"{name}.bias"]))
    checks += _selection(context, module, targets, stages, kept, said)
    stage, target = stages[INPUT_OF[reader]], targets[reader]
    if "moment" not in stage.inputs.sums:
        return checks
    columns = heads.head_rows(kept, target.exact.shape[1], units)

    name = f"{linear_name(context.reader.family, reader)}.weight"
    new = Pair(np.zeros_like(target.exact), np.zeros_like(target.rounded))
    for whole, own in zip(new, made, strict=True):
        whole[:, columns] = own[name].double().numpy()
    fit = None
    if not settings.refine:
        C = stage.moment.rounded
        fit = stored_fit(context, target.rounded, C, columns, held[name].dtype)
    return [*checks, error_check(context, new, target, stage.moment, said, fit, FLOOR)]


def _selection(
    context: Context,
    module: Module,
    targets: Mapping[str, Pair[Array]],
    stages: Mapping[Input, Stage],
    kept: NDArray[np.int64],
    said: Mapping[str, Any],
) -> list[Check]:
    """Compare the choice of what stays."""
    settings, reader = context.record.settings, READER[module.sublayer]
    if module.unit == "channels" and settings.selection == "obs":
        moment = stages[INPUT_OF[reader]].moment
        return removal_checks(context, module, targets[reader], moment, kept, said)
    if settings.importance == "taylor":
        return by_scores(context, module, kept, said)

    def of_weights(which: Callable[[Pair[Array]], Array]) -> dict[str, Array]:
        found = {}
        for role in module.roles:
            W = which(targets[role])
            if settings.importance == "magnitude":
                found[role] = importance.magnitude_importance(W)
            else:
                norms = np.sqrt(np.diag(which(stages[INPUT_OF[role]].moment)))
                found[role] = importance.weight_importance(W, norms)
        return found

    scores = Pair(of_weights(lambda pair: pair.exact), of_weights(lambda pair: pair.rounded))
    C, near = (
        unit_scores(each, module.sublayer, module.shape[0], settings.aggregation) for each in scores
    )
    live = C > 0
    moved = float(np.max(np.abs(near - C)[live] / C[live], initial=0.0))
    share = ROOM_LARGEST * (moved + context.compute.eps / 8) + 100 * EPS64 * len(C)
    checks = cut_checks("recomputed scores", module, C, share * C, kept)
    checks += numbers_at_cut(module, C, said, share)
    return checks + energies(module, scores.exact, kept, said, share)
