"""Layers that were compressed stage by stage, each matrix regressed to a target.

Neither the moments nor the regressed weights are recorded: both runs recompute them, each from its
own activations, and how far what they give is apart is the noise of what the checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorap.audit.comparisons import EPS64, ROOM_LARGEST, ROOM_RMS, number, same_bits
from lorap.audit.context import Context
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
from lorap.audit.refits import READER, removal_checks
from lorap.audit.results import Check, ModuleAudit
from lorap.audit.rounding import SPREADS, product_variance, variance
from lorap.audit.selections import by_scores, cut_checks, listed, numbers_at_cut, unit_scores
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
    cross : Pair of (d_in, d_in)
        Of the uncompressed model's input and this one.
    """

    inputs: Inputs
    moment: Pair[Array]
    cross: Pair[Array]


def audit_stages(
    context: Context,
    runs: Runs,
    dense: Runs,
    index: int,
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
) -> Iterator[ModuleAudit]:
    """Compare a layer that was compressed stage by stage (SPEC, "Audit").

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
    plan = context.plan.layers[index]
    current, targets = dict(given), dict[str, Pair[Array]]()
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
            stages[kind] = _collect(context, runs, dense, index, kind, wanted, current, given)
        for module, role in here:
            name = f"{linear_name(family, role)}.weight"
            W, stage = given[name].double().numpy(), stages[kind]
            assert settings.dense_target is not None
            arguments = settings.dense_target, settings.ridge
            targets[role] = Pair(
                regression.regressed_weight(W, stage.moment.exact, stage.cross.exact, *arguments),
                regression.regressed_weight(
                    W, stage.moment.rounded, stage.cross.rounded, *arguments
                ),
            )
            found = torch.from_numpy(targets[role].exact)
            kept = _kept(context, module)
            if kept is not None and role != READER[module.sublayer]:
                # As it is stored, where it is; the rest as it would be.
                found = found.to(given[name].dtype)
                rows = torch.from_numpy(heads.head_rows(kept, len(W), module.shape[0]))
                found[rows] = held[name]
            current[name] = found
        for name, module in plan.items():
            last = max((INPUT_OF[role] for role in module.roles), key=STAGES.index)
            if last != kind:
                continue
            linears = [linear_name(family, role) for role in module.roles]
            own = {n for n in given if n.rpartition(".")[0] in linears}
            touched |= own
            checks = [
                check
                for found_at in dict.fromkeys(INPUT_OF[role] for role in module.roles)
                if found_at in stages
                for check in stages[found_at].inputs.checks
            ]
            if module.untouched:
                checks = [same_bits(n, given[n], held[n]) for n in sorted(own)]
            elif module.rank is not None:
                checks += _factor_checks(context, module, targets, stages[kind], given, held)
            elif module.band is not None:
                checks += _block_checks(context, module, targets, stages, given, held)
            else:
                checks += _dense_checks(context, module, targets, stages, given, held)
            yield ModuleAudit(f"layers.{index}.{name}", module.becomes, tuple(checks))
            prefixes = tuple(f"{linear}." for linear in linears)
            shared = f"{family.joint_right}."
            current = {n: t for n, t in current.items() if not n.startswith(prefixes)}
            if len(linears) == 2 and module.rank is not None:
                prefixes = (*prefixes, shared)
            current |= {n: t for n, t in held.items() if n.startswith(prefixes)}
    for name in (name for name in given if name not in touched):
        same = same_bits("untouched", given[name], held[name])
        yield ModuleAudit(f"layers.{index}.{name}", "as it was", (same,))


def _collect(
    context: Context,
    runs: Runs,
    dense: Runs,
    index: int,
    kind: Input,
    wanted: set[Statistic],
    current: Mapping[str, Tensor],
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

    for own, other in zip(runs.forward(current), dense.forward(given), strict=True):
        X = Pair(*(_tokens(getattr(t, kind)) for t in (own.trace.exact, own.trace.rounded)))
        Z = Pair(*(_tokens(getattr(t, kind)) for t in (other.trace.exact, other.trace.rounded)))
        for statistic in {*wanted, "moment"}:
            take = TAKEN[statistic]
            add(statistic, take(X.exact), take(X.rounded))
        cross = statistics.cross_moment
        add("cross", cross(Z.exact, X.exact), cross(Z.rounded, X.rounded))
    if not all(np.isfinite(pair.exact).all() for pair in totals.values()):
        raise LorapError(f"layers.{index}: the input {kind} holds NaN or inf")
    cross_moment = totals.pop("cross")
    sums: Sums = totals  # type: ignore[assignment]
    record, eps = context.record, context.compute.eps
    return Stage(
        against_record(sums, runs.tokens, kind, index, record, eps), sums["moment"], cross_moment
    )


def _tokens(x: NDArray[Any]) -> Array:
    return np.asarray(x.reshape(-1, x.shape[-1]), dtype=np.float64)


def _kept(context: Context, module: Module) -> NDArray[np.int64] | None:
    """Return the channels or groups that the report lists; None where it lists none that can be."""
    if module.band is None:
        return None
    kept, _ = listed(module, context.record.said(module.layer, module.name))
    return kept if kept.size else None


def _share(context: Context, exact: float, rounded: float) -> float:
    """Bound on a share that the report gives, from what the two runs give."""
    return ROOM_RMS * (abs(rounded - exact) + context.compute.eps / 16) + FLOOR


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
    """Compare matrices that stay dense, and are fitted to their targets."""
    checks = []
    for role in module.roles:
        name = linear_name(context.reader.family, role)
        weight, moment = held[f"{name}.weight"], stages[INPUT_OF[role]].moment.exact
        found = weight.double().numpy()
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
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
) -> list[Check]:
    """Compare the objective of a matrix's factors with the least one."""
    family, settings = context.reader.family, context.record.settings
    method, r = low_rank_method(settings, module.sublayer), module.rank
    assert r is not None
    names = [linear_name(family, role) for role in module.roles]
    W = Pair(
        joint.stacked([targets[role].exact for role in module.roles]),
        joint.stacked([targets[role].rounded for role in module.roles]),
    )
    L = joint.stacked([held[f"{name}.left.weight"].double().numpy() for name in names])
    right = held[f"{right_name(family, module)}.weight"]
    R, sums, n = right.double().numpy(), stage.inputs.sums, stage.inputs.tokens

    def metric(which: Callable[[Pair[Array]], Array]) -> Array:
        """Return the moment that the method weights errors by."""
        if method in ("pca", "afm"):
            C = which(sums["moment"])
            if method == "afm":
                C = statistics.centred_moment(C, which(sums["sum"]), n)
            return C
        if method == "svd":
            return np.eye(W.exact.shape[1])
        if method == "asvd":
            scale = lowrank.magnitude_scale(which(sums["magnitudes"]), n, settings.asvd_alpha)
        else:
            norms = np.sqrt(np.diag(which(sums["moment"])))
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
    checks = [Check("error above the optimum", excess(product) / total, bound / total)]

    said = context.record.said(module.layer, module.name)
    error = float(np.sqrt(pca.output_error(W.exact, product, C.exact) / size)) if size else 0.0
    other_size = pca.output_error(W.rounded, np.zeros_like(W.rounded), C.rounded)
    other = pca.output_error(W.rounded, product, C.rounded) / other_size if other_size else 0.0
    allowed = _share(context, error, float(np.sqrt(other))) + SPREADS * rounding / total
    key = "relative_weighted_error"
    checks.append(number("report: relative weighted error", error, said, key, allowed))
    energy = Pair(*(lowrank.retained_energy(found[2], r) for found in (best.exact, best.rounded)))
    allowed = _share(context, energy.exact, energy.rounded)
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
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
) -> list[Check]:
    """Compare a block that loses channels or heads."""
    settings, said = context.record.settings, context.record.said(module.layer, module.name)
    kept, check = listed(module, said)
    checks = [check]
    if not kept.size:
        return checks
    reader, units = READER[module.sublayer], module.shape[0]
    for role in module.roles:
        name = linear_name(context.reader.family, role)
        weight, target = held[f"{name}.weight"], targets[role]
        moment = stages[INPUT_OF[role]].moment
        found, C = weight.double().numpy(), moment.exact
        if role == reader:
            rows = heads.head_rows(kept, C.shape[0], units)
            best = Pair(target.exact[:, rows], target.rounded[:, rows])
            if settings.update != "none":
                update, ridge = regression.least_squares_update, settings.ridge
                best = Pair(
                    update(target.exact, C, rows, ridge),
                    update(target.rounded, moment.rounded, rows, ridge),
                )
            C = C[np.ix_(rows, rows)]
        else:
            rows = heads.head_rows(kept, len(target.exact), units)
            best = Pair(target.exact[rows], target.rounded[rows])
        title = f"{role}: distance of the outputs from the target's"
        checks.append(_near(context, title, found, best, C, weight.dtype))
        if f"{name}.bias" in given:
            bias = given[f"{name}.bias"]
            if role != reader:
                bias = bias[torch.from_numpy(heads.head_rows(kept, len(bias), units))]
            checks.append(same_bits(f"{role}: bias", bias, held[f"{name}.bias"]))
    checks += _selection(context, module, targets, stages, kept, said)
    moment, target = stages[INPUT_OF[reader]].moment, targets[reader]
    whole = np.zeros_like(target.exact)
    columns = heads.head_rows(kept, whole.shape[1], units)
    whole[:, columns] = held[f"{linear_name(context.reader.family, reader)}.weight"].double()

    def lost(W: Array, C: Array) -> float:
        size = pca.output_error(W, np.zeros_like(W), C)
        return float(np.sqrt(pca.output_error(W, whole, C) / size)) if size else 0.0

    expected = lost(target.exact, moment.exact)
    allowed = _share(context, expected, lost(target.rounded, moment.rounded))
    key = "relative_output_error"
    return [*checks, number("report: relative output error", expected, said, key, allowed)]


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

    def scores(which: Callable[[Pair[Array]], Array]) -> Array:
        of_weights = {}
        for role in module.roles:
            W = which(targets[role])
            if settings.importance == "magnitude":
                of_weights[role] = importance.magnitude_importance(W)
            else:
                norms = np.sqrt(np.diag(which(stages[INPUT_OF[role]].moment)))
                of_weights[role] = importance.weight_importance(W, norms)
        return unit_scores(of_weights, module.sublayer, module.shape[0], settings.aggregation)

    C, near = scores(lambda pair: pair.exact), scores(lambda pair: pair.rounded)
    live = C > 0
    moved = float(np.max(np.abs(near - C)[live] / C[live], initial=0.0))
    share = ROOM_LARGEST * (moved + context.compute.eps / 8) + 100 * EPS64 * len(C)
    checks = cut_checks("recomputed scores", module, C, share * C, kept)
    return checks + numbers_at_cut(module, C, said, share)
