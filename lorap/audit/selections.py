"""Pruned blocks: which channels and heads stay, their tensors, and the numbers of the report."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorap.audit.comparisons import EPS64, equal, number, same_bits
from lorap.audit.context import Context
from lorap.audit.files import linear_name, pruned_axis
from lorap.audit.inputs import INPUT_OF, Input, Inputs
from lorap.audit.refits import READER, refit_checks
from lorap.audit.results import Check
from lorap.audit.sizes import Module
from lorap.config import Sublayer
from lorap_reference import heads, importance, pruning

Array = NDArray[np.float64]
Scores = Mapping[str, Array]
"""Of single weights, by role."""


def selection_checks(
    context: Context,
    module: Module,
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    inputs: Mapping[Input, Inputs],
) -> list[Check]:
    """Compare the channels or heads that a block keeps (SPEC, "Audit").

    Parameters
    ----------
    context : Context
    module : Module
        With a band.
    given, held : mapping
        The layer's tensors in the original and in the checkpoint, names relative to it.
    inputs : mapping
        By input, where the scores are told of them.
    """
    assert module.band is not None
    settings, said = context.record.settings, context.record.said(module.layer, module.name)
    checks = [check for found in inputs.values() for check in found.checks]
    kept, check = listed(module, said)
    checks.append(check)
    if not kept.size:
        return checks
    checks += _sliced(context, module, kept, given, held)
    checks += refit_checks(context, module, kept, given, held, inputs, said)
    if module.unit == "channels" and settings.selection == "obs":
        return checks
    if settings.importance == "taylor":
        return checks + by_scores(context, module, kept, said)

    W = {
        role: given[f"{linear_name(context.reader.family, role)}.weight"].double().numpy()
        for role in module.roles
    }
    dtype = given[f"{linear_name(context.reader.family, module.roles[0])}.weight"].dtype

    def score(of_weights: Scores) -> Array:
        return unit_scores(of_weights, module.sublayer, module.shape[0], settings.aggregation)

    magnitudes = {role: importance.magnitude_importance(weight) for role, weight in W.items()}
    # Scores of weights are products in float32 (float64 for such weights), sums are float64.
    wide = EPS64 if dtype == torch.float64 else float(np.finfo(np.float32).eps)
    terms = module.shape[0] + max(weight.size for weight in W.values()) / module.shape[0]
    relative = 2 * EPS64 * terms
    if settings.importance == "magnitude":
        scores, basis = magnitudes, "magnitudes"
    else:
        relative, basis = relative + 2 * wide, "recorded norms"
        norms = {role: inputs[INPUT_OF[role]].vectors["norms"] for role in W}
        C = score(_weighted(W, norms, "recomputed"))
        # Norms off by a share move the score by that share of what they enter.
        moved = {
            role: norms[role].allowed * weight
            for role, weight in _weighted(W, norms, "recomputed").items()
        }
        band = score(moved)
        checks += cut_checks("recomputed scores", module, C, band, kept)
        scores = _weighted(W, norms, "recorded")
    C = score(scores)
    checks += cut_checks(basis, module, C, relative * C, kept)
    checks += numbers_at_cut(module, C, said, relative)
    return checks + energies(module, scores, kept, said, relative)


def _weighted(W: Scores, norms: Mapping[str, Any], which: str) -> dict[str, Array]:
    return {
        role: importance.weight_importance(weight, getattr(norms[role], which))
        for role, weight in W.items()
    }


def unit_scores(
    scores: Scores, sublayer: Sublayer, groups: int, aggregation: importance.Aggregation
) -> Array:
    """Scores of the channels of an FFN or of the groups of heads of an MHA.

    Parameters
    ----------
    scores : mapping
        Of single weights, by role.
    sublayer : {"mha", "ffn"}
    groups : int
        Of heads.
    aggregation : {"l1", "l2", "linf"}
    """
    if sublayer == "ffn":
        up, gate, down = (scores[role] for role in ("up", "gate", "down"))
        found: Array = importance.group_scores(up, gate, down, aggregation)
    else:
        q, k, v, o = (scores[role] for role in ("q", "k", "v", "o"))
        found = heads.head_scores(q, k, v, o, groups, aggregation)
    return found


def listed(module: Module, said: Mapping[str, Any]) -> tuple[NDArray[np.int64], Check]:
    """Return the kept channels or groups that the report lists; none where it is no such list."""
    units, what = module.shape[0], "channels" if module.unit == "channels" else "kv heads"
    name = f"report: kept {what}"
    found = said.get("kept_channels" if module.unit == "channels" else "kept_kv_heads")
    if (
        isinstance(found, list)
        and len(found) == module.kept
        and all(type(unit) is int and 0 <= unit < units for unit in found)
        and all(a < b for a, b in pairwise(found))
    ):
        return np.array(found, dtype=np.int64), Check(name, 0, 0)
    detail = f"expected {module.kept} ascending {what} below {units}"
    return np.array([], dtype=np.int64), Check(name, 1, 0, detail)


def _sliced(
    context: Context,
    module: Module,
    kept: NDArray[np.int64],
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
) -> list[Check]:
    """Compare what is left of the block's tensors, bit for bit; not what is refitted."""
    checks = []
    refitted = READER[module.sublayer] if context.record.settings.update != "none" else None
    for role in module.roles:
        for kind in ("weight", "bias"):
            name = f"{linear_name(context.reader.family, role)}.{kind}"
            if name not in given or (role == refitted and kind == "weight"):
                continue
            part, axis = given[name], pruned_axis(role, kind)
            if axis is not None:
                rows = heads.head_rows(kept, part.shape[axis], module.shape[0])
                part = part.index_select(axis, torch.from_numpy(rows))
            checks.append(same_bits(name, part, held[name]))
    return checks


def cut_checks(
    name: str, module: Module, C: Array, band: Array, kept: NDArray[np.int64]
) -> list[Check]:
    """Compare the selection with the scores: nothing on the wrong side of a cut by its noise.

    A selection is the one of some scores within the noise of `C` if nothing removed lies above one
    of the top, nor one of the least important above a removed one, by more than the noise of the
    two.
    """
    assert module.band is not None
    low, high = module.band
    expected = set(pruning.kept_channels(C, low, high).tolist())
    others, what = len(expected - set(kept.tolist())), module.unit
    detail = f"{others} {what} differ from the reference's" if others else ""
    removed = np.setdiff1d(np.arange(C.size), kept)
    ascending = kept[np.argsort(C[kept], kind="stable")]
    checks = []
    for cut, below, above in (
        ("top", removed, ascending[low:]),
        ("least important", ascending[:low], removed),
    ):
        if below.size and above.size:
            b = below[np.argmax(C[below] - band[below])]
            a = above[np.argmin(C[above] + band[above])]
            checks.append(
                Check(
                    f"{what} by {name}, {cut}",
                    max(float(C[b] - C[a]), 0.0),
                    float(band[b] + band[a]),
                    detail,
                )
            )
    return checks


def numbers_at_cut(
    module: Module, C: Array, said: Mapping[str, Any], relative: float
) -> list[Check]:
    """Compare the scores on both sides of the two cuts with the report's."""
    assert module.band is not None
    low, high = module.band
    ordered, cut = np.sort(C), said.get("scores_at_cut")
    cut = cut if isinstance(cut, dict) else {}
    places = {
        "least_important_kept": low - 1,
        "lowest_removed": low,
        "highest_removed": high - 1,
        "lowest_of_top": high,
    }
    checks = []
    for key, at in places.items():
        name = f"report: score of {key}"
        if not 0 <= at < C.size:
            checks.append(equal(name, None, cut.get(key)))
            continue
        expected = float(ordered[at])
        checks.append(number(name, expected, cut, key, relative * expected))
    return checks


def energies(
    module: Module,
    scores: Scores,
    kept: NDArray[np.int64],
    said: Mapping[str, Any],
    relative: float,
) -> list[Check]:
    """Compare the squares of the scores that are gone with the report's shares."""
    removed = np.ones(module.shape[0], dtype=bool)
    removed[kept] = False
    errors = said.get("relative_weighted_error")
    errors = errors if isinstance(errors, dict) else {}
    checks, lost, all_energy = [], 0.0, 0.0
    for role, score in scores.items():
        axis = 0 if pruned_axis(role, "weight") == 1 else 1
        lines = importance.channel_importance(score, axis, "l2") ** 2
        energy = lines.reshape(module.shape[0], -1).sum(axis=1)
        gone, total = float(np.sum(energy[removed])), float(np.sum(energy))
        lost, all_energy = lost + gone, all_energy + total
        expected = float(np.sqrt(gone / total)) if total else 0.0
        name = f"report: relative weighted error of {role}"
        checks.append(number(name, expected, errors, role, 2 * relative))
    energy_kept = 1 - lost / all_energy if all_energy else 1.0
    name = "report: retained energy"
    return [*checks, number(name, energy_kept, said, "retained_energy", 4 * relative)]


def by_scores(
    context: Context, module: Module, kept: NDArray[np.int64], said: Mapping[str, Any]
) -> list[Check]:
    """Compare the selection with the recorded scores of gradients, exactly."""
    assert module.band is not None
    C = context.record.recorded(
        f"layers.{module.layer}.{module.sublayer}.scores", (module.shape[0],)
    )
    others = np.setdiff1d(pruning.kept_channels(C, *module.band), kept).size
    detail = f"{others} {module.unit} differ from the reference's" if others else ""
    checks = [Check(f"{module.unit} by recorded scores", others, 0, detail)]
    return checks + numbers_at_cut(module, C, said, 0.0)
