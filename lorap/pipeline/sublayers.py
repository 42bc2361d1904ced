"""What becomes of a layer's tensors: factors, fewer channels, fewer heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorap.ops.heads import head_rows, head_scores, prune_heads
from lorap.ops.importance import (
    channel_importance,
    group_scores,
    magnitude_importance,
    weight_importance,
)
from lorap.ops.joint import split, stacked
from lorap.ops.lowrank import retained_energy
from lorap.ops.pca import output_error
from lorap.ops.precision import compute_dtype
from lorap.ops.pruning import kept_channels, prune_ffn
from lorap.ops.regression import least_squares_update, removal_order
from lorap.pipeline.factors import STATISTICS, factorise, squared_error
from lorap.pipeline.inspection import check_weight
from lorap.pipeline.processes import ALONE, Processes, Result
from lorap.pipeline.statistics import INPUT_OF, Input, InputStatistics, Statistic, Wanted

if TYPE_CHECKING:
    from lorap.config import CompressionConfig, LowRankMethod, Sublayer
    from lorap.families import Family
    from lorap.plan import LayerPlan, ModulePlan


def low_rank_method(config: CompressionConfig, sublayer: Sublayer) -> LowRankMethod:
    """Return the low-rank method of a sub-layer whose modules are factored."""
    method = config.mha if sublayer == "mha" else config.ffn
    assert method != "heads"
    assert method != "channels"
    return method


def wanted_statistics(
    family: Family,
    layer_plan: LayerPlan,
    statistics_of: Callable[[ModulePlan, str], frozenset[Statistic]],
) -> dict[Input, Wanted]:
    """Return the statistics to take of a layer's inputs.

    Parameters
    ----------
    family : Family
    layer_plan : LayerPlan
    statistics_of : callable
        What has to be known of the input of a module's linear of that role.
    """
    names = {**family.attention, **family.ffn}
    asked: dict[Input, set[Statistic]] = {}
    modules: dict[Input, str] = {}
    for module in layer_plan.values():
        for role in module.roles:
            statistics = statistics_of(module, role)
            if statistics:
                asked.setdefault(INPUT_OF[role], set()).update(statistics)
                modules.setdefault(INPUT_OF[role], family.dense_name(names[role]))
    return {kind: Wanted(modules[kind], frozenset(found)) for kind, found in asked.items()}


def statistics_of(module: ModulePlan, role: str, config: CompressionConfig) -> frozenset[Statistic]:
    """Return what has to be known of the input of a module's linear to compress it."""
    if module.kind == "low_rank":
        return STATISTICS[low_rank_method(config, module.sublayer)]
    if module.kind == "dense":
        return frozenset()
    by_loss = module.kind == "channels" and config.selection == "obs"
    if role in ("o", "down") and (by_loss or config.update == "least-squares"):
        # The norms are on its diagonal.
        return frozenset({"moment"})
    if config.importance == "activation" and not by_loss:
        return frozenset({"squares"})
    return frozenset()


@dataclass
class LayerTensors:
    """A layer on its way from the original to the compressed one.

    Attributes
    ----------
    family : Family
    config : CompressionConfig
    tensors : dict
        Names relative to the layer; the compressed ones take the place of the originals.
    inputs : mapping
        Statistics of the linears' inputs.
    scores : mapping
        Scores of channels (``ffn``) or heads (``mha``) that were found beforehand.
    report : dict
        What there is to say of each module, by name.
    dtypes : dict
        What the weights of a linear are stored in, by its name, where ``replace_`` gave it others.
    """

    family: Family
    config: CompressionConfig
    tensors: dict[str, Tensor]
    inputs: dict[Input, InputStatistics] = field(default_factory=dict)
    scores: Mapping[Sublayer, Tensor] = field(default_factory=dict)
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)

    def weight(self, role: str) -> Tensor:
        """Return the weight of a linear, before anything has become of it."""
        return self.tensors[f"{self._name(role)}.weight"]

    def replace_(self, role: str, weight: Tensor) -> None:
        """Compress another weight in the place of a linear's own, and store it in that one's dtype.

        Parameters
        ----------
        role : str
        weight : (d_out, d_in)
            May be of a wider dtype.
        """
        name = self._name(role)
        self.dtypes[name] = self.tensors[f"{name}.weight"].dtype
        self.tensors[f"{name}.weight"] = weight

    def compress_(self, plan: LayerPlan, where: str, processes: Processes = ALONE) -> None:
        """Carry out the plan of the layer, or of some of its modules.

        Parameters
        ----------
        plan : mapping
        where : str
            What the layer is, for the error.
        processes : Processes
            Each module is done by one of them.

        Raises
        ------
        LorapError
            If a compressed weight is not finite; the message begins with `where`.
        """
        for (name, _), (changed, said) in processes.each(
            list(plan.items()), lambda job: self._cost(job[1]), lambda job: self._compressed(job[1])
        ):
            for gone in said["gone"]:
                del self.tensors[gone]
            self.tensors |= changed
            self.report[name] = said["report"]
        for name, tensor in self.tensors.items():
            check_weight(f"{where}.{name}", tensor, "the compressed weight")

    def _cost(self, module: ModulePlan) -> float:
        """Return about how many multiplications a module takes."""
        sides = {role: self.weight(role).shape for role in module.roles}
        if module.kind == "low_rank":
            d_out, d_in = sum(side[0] for side in sides.values()), sides[module.roles[0]][1]
            return d_out * d_in * min(d_out, d_in)
        reader: Input = "down" if "down" in sides else "o"
        if module.kind != "dense" and "moment" in self._sums_of(reader):
            return sides[reader][1] ** 3
        return sum(side.numel() for side in sides.values())

    def _sums_of(self, kind: Input) -> Mapping[Statistic, Tensor]:
        return self.inputs[kind].sums if kind in self.inputs else {}

    def _compressed(self, module: ModulePlan) -> Result:
        """Return the tensors that a module gets, and which go, and what there is to say of it."""
        new = replace(self, tensors=dict(self.tensors))
        report = module.to_dict()
        if module.kind == "low_rank":
            report |= new._factor_(module)
        elif module.kind == "channels":
            report |= new._prune_channels_(module)
        elif module.kind == "heads":
            report |= new._prune_heads_(module)
        for role in module.roles:
            key = f"{self._name(role)}.weight"
            if key in new.tensors:
                new.tensors[key] = new.tensors[key].to(self._dtype(role, new.tensors[key]))
        changed = {
            name: tensor
            for name, tensor in new.tensors.items()
            if tensor is not self.tensors.get(name)
        }
        gone = [name for name in self.tensors if name not in new.tensors]
        return changed, {"report": report, "gone": gone}

    def _dtype(self, role: str, weight: Tensor) -> torch.dtype:
        """Return what a linear's weights are stored in."""
        return self.dtypes.get(self._name(role), weight.dtype)

    def _name(self, role: str) -> str:
        return {**self.family.attention, **self.family.ffn}[role]

    def _factor_(self, module: ModulePlan) -> dict[str, Any]:
        """Put two factors in the place of a weight, or of several stacked by rows.

        SPEC: ``algorithm.mha``, ``algorithm.low-rank``, ``joint.stack``.
        """
        assert module.rank is not None
        names = [self._name(role) for role in module.roles]
        parts = [self.tensors.pop(f"{name}.weight") for name in names]
        weight = parts[0] if len(parts) == 1 else stacked(parts)
        inputs = self.inputs.get(INPUT_OF[module.roles[0]])
        method = low_rank_method(self.config, module.sublayer)
        factors = factorise(weight, inputs, module.rank, method, self.config)
        dtype = self._dtype(module.roles[0], weight)
        right = factors.right.to(dtype).contiguous()
        left = factors.left.to(dtype).contiguous()
        shared = len(names) > 1
        self.tensors[
            f"{self.family.joint_right}.weight" if shared else f"{names[0]}.right.weight"
        ] = right
        sizes = [part.shape[0] for part in parts]
        for name, rows in zip(names, split(left, sizes), strict=True):
            self.tensors[f"{name}.left.weight"] = rows
            if f"{name}.bias" in self.tensors:
                self.tensors[f"{name}.left.bias"] = self.tensors.pop(f"{name}.bias")
        if factors.bias is not None:
            self._add_bias_(names, sizes, factors.bias)
        wide = compute_dtype(weight)
        error = squared_error(weight, left.to(wide) @ right.to(wide), inputs, method, self.config)
        whole = float(factors.singular_values.double().square().sum())
        return {
            "relative_weighted_error": _root_of_share(error, whole),
            "retained_energy": retained_energy(factors.singular_values, module.rank),
        }

    def _add_bias_(self, names: Sequence[str], sizes: Sequence[int], bias: Tensor) -> None:
        for name, part in zip(names, split(bias, sizes), strict=True):
            key = f"{name}.left.bias"
            dtype = self.tensors[f"{name}.left.weight"].dtype
            own = self.tensors.get(key)
            self.tensors[key] = (part if own is None else part + own.to(part.dtype)).to(dtype)

    def _weight_scores(self, role: str) -> Tensor:
        """Scores of the weights of a linear, ``(d_out, d_in)``. SPEC: ``algorithm.scores``."""
        weight = self.tensors[f"{self._name(role)}.weight"]
        if self.config.importance == "magnitude":
            return magnitude_importance(weight)
        return weight_importance(weight, self.inputs[INPUT_OF[role]].norms)

    def _prune_channels_(self, module: ModulePlan) -> dict[str, Any]:
        """Take the removed channels out of a feed-forward block. SPEC: ``algorithm.ffn``."""
        rows_of = {"up": 1, "gate": 1, "down": 0}
        if self.config.selection == "obs":
            kept, said = self._select_by_loss(module)
        elif "ffn" in self.scores:
            kept, said = _select(self.scores["ffn"], module, {})
        else:
            weights = {role: self._weight_scores(role) for role in rows_of}
            scores = group_scores(
                weights["up"], weights["gate"], weights["down"], self.config.aggregation
            )
            energies = {
                role: channel_importance(weights[role], axis, "l2").square()
                for role, axis in rows_of.items()
            }
            kept, said = _select(scores, module, energies)
        names = {role: self._name(role) for role in rows_of}
        up, gate, down = (self.tensors[f"{names[role]}.weight"] for role in rows_of)
        new = prune_ffn(up, gate, down, kept)
        for role, weight in zip(rows_of, new, strict=True):
            self.tensors[f"{names[role]}.weight"] = weight
        for role in ("up", "gate"):
            if f"{names[role]}.bias" in self.tensors:
                self.tensors[f"{names[role]}.bias"] = self.tensors[f"{names[role]}.bias"][kept]
        return {"kept_channels": kept.tolist(), **said, **self._update_("down", down, kept)}

    def _select_by_loss(self, module: ModulePlan) -> tuple[Tensor, dict[str, Any]]:
        """Choose the channels that the removals leave, as ``_select`` does. SPEC: ``obs.keep``."""
        assert module.band is not None
        low, high = module.band
        weight = self.tensors[f"{self._name('down')}.weight"]
        moment = self.inputs["down"].sums["moment"]
        order, _ = removal_order(weight, moment, high - low, self.config.ridge)
        left = torch.ones(module.units, dtype=torch.bool, device=weight.device)
        left[order] = False
        return left.nonzero().flatten(), {"removed_channels": order.tolist()}

    def _update_(self, role: str, weight: Tensor, kept: Tensor) -> dict[str, Any]:
        """Refit what reads the units that stay, and say what is lost of its outputs.

        SPEC: ``algorithm.update``.

        Parameters
        ----------
        role : {"o", "down"}
        weight : (d_out, d_in)
            Before anything was removed.
        kept : (k,) int64
            Input features that stay.
        """
        key = f"{self._name(role)}.weight"
        sums = self._sums_of(INPUT_OF[role])
        if "moment" not in sums:
            return {}
        moment = sums["moment"]
        if self.config.update == "least-squares":
            new = least_squares_update(weight, moment, kept, self.config.ridge)
            self.tensors[key] = new.contiguous()
        # What is measured is what is stored.
        self.tensors[key] = self.tensors[key].to(self._dtype(role, weight))
        wide = weight.double()
        whole = torch.zeros_like(wide)
        whole[:, kept] = self.tensors[key].double()
        error = output_error(wide, whole, moment)
        size = output_error(wide, torch.zeros_like(wide), moment)
        return {"relative_output_error": _root_of_share(error, size)}

    def _prune_heads_(self, module: ModulePlan) -> dict[str, Any]:
        """Take the removed heads out of an attention block. SPEC: ``algorithm.heads``."""
        roles = ("q", "k", "v", "o")
        groups = module.units
        if "mha" in self.scores:
            scores, energies = self.scores["mha"], {}
        else:
            weights = {role: self._weight_scores(role) for role in roles}
            scores = head_scores(
                weights["q"],
                weights["k"],
                weights["v"],
                weights["o"],
                groups,
                self.config.aggregation,
            )
            energies = {
                role: channel_importance(score, 0 if role == "o" else 1, "l2")
                .square()
                .view(groups, -1)
                .sum(1)
                for role, score in weights.items()
            }
        kept, said = _select(scores, module, energies)
        names = {role: self._name(role) for role in roles}
        q, k, v, o = (self.tensors[f"{names[role]}.weight"] for role in roles)
        new = prune_heads(q, k, v, o, kept, groups)
        for role, weight in zip(roles, new, strict=True):
            self.tensors[f"{names[role]}.weight"] = weight
        for role in ("q", "k", "v"):
            bias = self.tensors.get(f"{names[role]}.bias")
            if bias is not None:
                rows = head_rows(kept, len(bias), groups)
                self.tensors[f"{names[role]}.bias"] = bias[rows]
        columns = head_rows(kept, o.shape[1], groups)
        return {"kept_kv_heads": kept.tolist(), **said, **self._update_("o", o, columns)}


def _select(
    scores: Tensor, module: ModulePlan, energies: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Any]]:
    """Choose the channels or heads that stay, and say what the choice was.

    Parameters
    ----------
    scores : (units,)
    module : ModulePlan
    energies : mapping
        By role, the squared scores of a unit's weights, ``(units,)``; empty where the scores of
        single weights are not at hand.

    Returns
    -------
    kept : (new_units,) int64
    report : dict
    """
    assert module.band is not None
    low, high = module.band
    kept = kept_channels(scores, low, high)
    removed = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    removed[kept] = False
    lost = {role: float(energy[removed].sum()) for role, energy in energies.items()}
    whole = {role: float(energy.sum()) for role, energy in energies.items()}
    ordered = scores.sort().values.tolist()
    said: dict[str, Any] = {
        "scores_at_cut": {
            "least_important_kept": ordered[low - 1] if low else None,
            "lowest_removed": ordered[low],
            "highest_removed": ordered[high - 1],
            "lowest_of_top": ordered[high] if high < len(ordered) else None,
        }
    }
    said["score_histogram"] = _histogram(scores, removed)
    if energies:
        total = sum(whole.values())
        said["relative_weighted_error"] = {
            role: _root_of_share(lost[role], whole[role]) for role in energies
        }
        said["retained_energy"] = 1 - sum(lost.values()) / total if total else 1.0
    return kept, said


_BINS = 24
"""Bins of a histogram of scores."""


def _histogram(scores: Tensor, removed: Tensor) -> dict[str, list[Any]]:
    """Count the scores in bins of equal width on a logarithmic axis.

    Parameters
    ----------
    scores : (units,)
        Not negative. Those that are 0 count in the first bin.
    removed : (units,) bool

    Returns
    -------
    dict
        ``edges``, from the lowest score above 0 to the highest; between them the numbers ``kept``
        and ``removed``. One bin where all such scores are equal.
    """
    values, gone = scores.double().cpu(), removed.cpu()
    positive = values[values > 0]
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (0.0, 0.0)
    bins = _BINS if high > low else 1
    inner = values.new_empty(0)
    if bins > 1:
        steps = torch.linspace(math.log(low), math.log(high), bins + 1, dtype=values.dtype)
        inner = steps[1:-1].exp()
    places = torch.bucketize(values, inner, right=True)
    return {
        "edges": [low, *inner.tolist(), high],
        "kept": torch.bincount(places[~gone], minlength=bins).tolist(),
        "removed": torch.bincount(places[gone], minlength=bins).tolist(),
    }


def _root_of_share(error: float, whole: float) -> float:
    """Square root of a squared error's share; 0 where there is nothing to lose."""
    return float((error / whole) ** 0.5) if whole else 0.0
