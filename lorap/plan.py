"""Ranks, widths and heads of every module, before any of them is compressed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from lorap.config import CompressionConfig, Override, Sublayer
from lorap.errors import UsageError
from lorap.ops import budget, marginal, mgaa

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

    from lorap.families import Family, LayerStructure
    from lorap.pipeline.estimate import Estimate

Kind = Literal["low_rank", "dense", "channels", "heads"]


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of a projection, of q and k together, or of a whole block.

    Attributes
    ----------
    kind : {"low_rank", "dense", "channels", "heads"}
        ``channels`` for a feed-forward block that loses channels, ``heads`` for an attention block
        that loses heads.
    sublayer : {"mha", "ffn"}
    roles : tuple of str
        The linears that it is about: one, or several of ``q``, ``k``, ``v``, ``o``, ``gate``,
        ``up``, ``down``.
    compressible : int
        Parameters that the ratio is a share of.
    parameters_before, parameters : int
        Biases included.
    macs_before, macs : int
        Multiply-accumulates for the plan's tokens.
    rank : int or None
        Of a ``low_rank`` projection.
    bias : bool
        Whether a ``low_rank`` projection has a bias of its own that the original lacks.
    width : int or None
        Channels that a feed-forward block keeps.
    kv_heads : int or None
        Key/value heads that an attention block keeps.
    band : (int, int) or None
        Removed band ``[low, high)`` of the channels or heads in ascending order of score (Eq. 11).
    untouched : bool
        Whether nothing may change it: its sub-layer is not compressed, or an override skips it.
    """

    kind: Kind
    sublayer: Sublayer
    roles: tuple[str, ...]
    compressible: int
    parameters_before: int
    parameters: int
    macs_before: int
    macs: int
    rank: int | None = None
    bias: bool = False
    width: int | None = None
    kv_heads: int | None = None
    band: tuple[int, int] | None = None
    untouched: bool = False

    @property
    def removed(self) -> int:
        """Parameters that are gone."""
        return self.parameters_before - self.parameters

    @property
    def units(self) -> int:
        """Channels or key/value heads before any was removed; of a block, not of a projection."""
        low, high = self.band or (0, 0)
        return (self.width or self.kv_heads or 0) + high - low

    def structure(self) -> dict[str, Any] | None:
        """Return the entry of the compressed model's configuration; None where there is none."""
        if self.kind == "low_rank":
            return {"rank": self.rank} | ({"bias": True} if self.bias else {})
        if self.kind == "channels":
            return {"width": self.width}
        return {"kv_heads": self.kv_heads} if self.kind == "heads" else None

    def to_dict(self) -> dict[str, Any]:
        """Return what applies to this kind of module."""
        values: dict[str, Any] = {"kind": self.kind}
        for name in ("rank", "width", "kv_heads"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        values["parameters"] = self.parameters
        values["parameters_before"] = self.parameters_before
        values["macs"] = self.macs
        values["macs_before"] = self.macs_before
        return values


LayerPlan = Mapping[str, ModulePlan]


@dataclass(frozen=True)
class Plan:
    """Ranks, widths and sizes of a compressed model.

    Attributes
    ----------
    ratio : float or None
        As asked.
    ratio_scope : str
        As asked.
    layer_ratio : float or None
        Ratio of the compressible parameters that no override fixes; None where there are none.
    parameters_before, parameters : int
        Of the whole model, tied ones once.
    tokens : int
        Length of the one sequence that the MACs are counted for.
    macs_before, macs : int
        Multiply-accumulates of a forward over that sequence: linears, head, and the two products
        of attention.
    layers : tuple of mapping
        Module plans by name (``self_attn.q_proj``, ..., ``mlp``), one mapping per decoder layer.
    estimate : Estimate or None
        What it takes to carry the plan out, where that was asked for.
    """

    ratio: float | None
    ratio_scope: str
    layer_ratio: float | None
    parameters_before: int
    parameters: int
    tokens: int
    macs_before: int
    macs: int
    layers: tuple[LayerPlan, ...]
    estimate: Estimate | None = None

    @property
    def achieved_ratio(self) -> float:
        """Share of all parameters that the plan removes."""
        return 1 - self.parameters / self.parameters_before

    def ratios(self) -> list[dict[str, float]]:
        """Return by layer and sub-layer the share of the compressible parameters removed."""
        return [
            {
                sublayer: sum(m.removed for m in modules) / sum(m.compressible for m in modules)
                for sublayer in ("mha", "ffn")
                if (modules := [m for m in layer.values() if m.sublayer == sublayer])
            }
            for layer in self.layers
        ]

    def structure(self) -> list[LayerStructure]:
        """Return the ranks and widths as the compressed model's configuration holds them."""
        return [
            {
                name: structure
                for name, module in layer.items()
                if (structure := module.structure()) is not None
            }
            for layer in self.layers
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as ``lorap plan --json`` prints it."""
        return {
            "ratio": self.ratio,
            "ratio_scope": self.ratio_scope,
            "layer_ratio": self.layer_ratio,
            "achieved_ratio": self.achieved_ratio,
            "parameters": {"before": self.parameters_before, "after": self.parameters},
            "macs": {"tokens": self.tokens, "before": self.macs_before, "after": self.macs},
            **({} if self.estimate is None else {"estimate": self.estimate.to_dict()}),
            "layers": [
                {
                    "ratios": ratios,
                    "modules": {name: module.to_dict() for name, module in layer.items()},
                }
                for ratios, layer in zip(self.ratios(), self.layers, strict=True)
            ],
        }


@dataclass(frozen=True)
class Measurements:
    """What plan and scores have to know of the uncompressed model beyond its shapes.

    Attributes
    ----------
    similarities : mapping
        Mean cosine of the residual stream before and after a sub-layer, by layer and sub-layer.
    spectra : mapping
        Singular values, descending, that the method of a module sees, float64 and on the CPU, by
        path (``layers.3.self_attn.q_proj``).
    losses : mapping
        What the removals of a block's channels cost one by one, all but the last, float64 and on
        the CPU, by path.
    removals : mapping
        These channels, in the order of their removal, int64 and on the CPU, by path.
    divergences : mapping
        Mean divergence of the predictions where a module alone has the size of ``probe_plan``, by
        path.
    scores : mapping
        Scores of channels (``ffn``) and heads (``mha``) by gradients, by layer and sub-layer.
    """

    similarities: dict[tuple[int, Sublayer], float] = field(default_factory=dict)
    spectra: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    removals: dict[str, Tensor] = field(default_factory=dict)
    divergences: dict[str, float] = field(default_factory=dict)
    scores: dict[int, dict[Sublayer, Tensor]] = field(default_factory=dict)

    @property
    def of_modules(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of modules by path, under the names that they are recorded by."""
        return {"spectrum": self.spectra, "losses": self.losses, "removals": self.removals}

    def similarities_of(self, layer: int) -> dict[str, float] | None:
        """Return the similarities of a layer's sub-layers; None where they were not measured."""
        found = {sub: value for (at, sub), value in self.similarities.items() if at == layer}
        return {str(sublayer): value for sublayer, value in found.items()} or None

    @classmethod
    def of_tensors(
        cls, tensors: Mapping[str, Tensor], layers_path: str, device: torch.device
    ) -> Measurements:
        """Return the measurements that ``tensors`` gave.

        Parameters
        ----------
        tensors : mapping
        layers_path : str
        device : torch.device
            For the scores.
        """
        found = cls()
        of_modules = found.of_modules
        for full, tensor in tensors.items():
            index, _, rest = full.removeprefix(f"{layers_path}.").partition(".")
            name, _, kind = rest.rpartition(".")
            path = f"layers.{index}.{name}"
            if kind in of_modules:
                of_modules[kind][path] = tensor
                continue
            if kind == "divergence":
                found.divergences[path] = float(tensor)
                continue
            sublayer: Sublayer = "mha" if name == "mha" else "ffn"
            if kind == "similarity":
                found.similarities[int(index), sublayer] = float(tensor)
            else:
                found.scores.setdefault(int(index), {})[sublayer] = tensor.to(device)
        return found

    def tensors(self, layers_path: str) -> dict[str, Tensor]:
        """Return all that was measured as tensors, under the names of the layers.

        ``{layers_path}.3.mha.similarity`` (a scalar), ``...3.self_attn.q_proj.spectrum``,
        ``...3.mlp.losses``, ``...3.mlp.removals``, ``...3.mlp.divergence`` (a scalar),
        ``...3.ffn.scores``; float64, but for the removals.

        Parameters
        ----------
        layers_path : str
            Prefix of the decoder layers' names.
        """
        import torch

        named: dict[str, Tensor] = {}
        for (layer, sublayer), value in self.similarities.items():
            name = f"{layers_path}.{layer}.{sublayer}.similarity"
            named[name] = torch.tensor(value, dtype=torch.float64)
        divergences = {
            path: torch.tensor(value, dtype=torch.float64)
            for path, value in self.divergences.items()
        }
        for kind, found in {**self.of_modules, "divergence": divergences}.items():
            for path, values in found.items():
                named[f"{layers_path}.{path.removeprefix('layers.')}.{kind}"] = values
        for layer, by_sublayer in self.scores.items():
            for sublayer, scores in by_sublayer.items():
                named[f"{layers_path}.{layer}.{sublayer}.scores"] = scores
        return named


@dataclass(frozen=True)
class _Module:
    """A compressible module as the model has it."""

    layer: int
    name: str
    sublayer: Sublayer
    kind: Literal["matrix", "channels", "heads"]
    roles: tuple[str, ...]
    shape: tuple[int, int]
    """(d_out, d_in) of a matrix; of a block (channels or heads, parameters per channel or head)."""
    fixed_parameters: int
    """Biases that no compression removes."""
    macs_per_unit: int = 0
    """Of a channel or head, per token."""
    new_bias: int = 0
    """Parameters of the bias that the factored matrix has and the dense one lacks."""

    @property
    def compressible(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def path(self) -> str:
        return f"layers.{self.layer}.{self.name}"


class _UnreachableError(Exception):
    """A layer ratio that leaves some module with nothing."""


def make_plan(
    model_config: PretrainedConfig,
    family: Family,
    config: CompressionConfig,
    measurements: Measurements | None = None,
) -> Plan:
    """Plan the compression of a model.

    Parameters
    ----------
    model_config : PretrainedConfig
        Of the original model.
    family : Family
        Its family.
    config : CompressionConfig
    measurements : Measurements, optional
        Needed where ``config.allocation`` is no number.

    Raises
    ------
    UsageError
        If the ratio cannot be reached (the largest reachable one is named), or an override names
        no module, or does not fit the modules that it names, or no module can keep as much as the
        sizes are to be multiples of.

    Notes
    -----
    SPEC: ``budget.layer-ratio``, ``budget.reachable``, ``budget.overrides``, ``budget.multiple``,
    ``mgaa.plan``, ``marginal.plan``.
    """
    planner = _Planner(model_config, family, config, measurements)
    with planner.refusing():
        sizes = planner.sizes(planner.layer_ratio)
    return planner.plan(planner.rounded(sizes))


def draft_plan(model_config: PretrainedConfig, family: Family, config: CompressionConfig) -> Plan:
    """Plan with even ratios in the place of those that measurements would give.

    It has the modules of the plan to come, and about its size.

    Parameters
    ----------
    model_config, family, config
        As for ``make_plan``.

    Raises
    ------
    UsageError
        As ``make_plan``, and if the floors of ``marginal`` alone are too much: before anything is
        measured.
    """
    plan = make_plan(model_config, family, config.without_measurements())
    if config.is_marginal and plan.layer_ratio is not None:
        planner = _Planner(model_config, family, config, None)
        with planner.refusing():
            planner.floors_and_budget(plan.layer_ratio)
    return plan


def probe_plan(model_config: PretrainedConfig, family: Family, config: CompressionConfig) -> Plan:
    """Plan a size in the middle for every module that may get one by ``allocation`` marginal.

    Parameters
    ----------
    model_config, family, config
        As for ``make_plan``.

    Returns
    -------
    Plan
        For measuring how much the model minds, one module at a time. Modules that an override
        fixes, and those of one size only, are dense in it.

    Notes
    -----
    SPEC: ``marginal.sensitivity``.
    """
    planner = _Planner(model_config, family, config.without_measurements(), None)
    sizes = {}
    for module in planner.free:
        count = _most(module, module.new_bias)
        if count:
            sizes[module.path] = _size_at(module, marginal.middle(count + 1), config)
    return planner.plan(sizes)


_Size = int | tuple[int, int]
"""A rank, or the removed band of a block's channels or heads."""


class _Planner:
    """The modules of a model, and what a configuration makes of them."""

    def __init__(
        self,
        model_config: PretrainedConfig,
        family: Family,
        config: CompressionConfig,
        measurements: Measurements | None,
    ) -> None:
        if config.mha == "heads" and "mha" in config.sublayers and not family.prunes_heads:
            raise UsageError(
                f"mha heads: a model of type {family.model_type} normalises q and k over all heads "
                "together, so that none can be left out"
            )
        self.config = config
        self.measurements = measurements
        self.model_config = model_config
        self.family = family
        self.shapes = family.tensor_shapes(family.compressed_config(model_config, None), split=True)
        self.total = sum(math.prod(shape) for shape in self.shapes.values())
        self.modules = [
            module
            for layer in range(model_config.num_hidden_layers)
            for module in _modules(family, model_config, self.shapes, layer, config)
        ]
        _check_multiple(self.modules, config)
        self.overrides = _resolve_overrides(self.modules, config)
        self.free = [
            m
            for m in self.modules
            if m.sublayer in config.sublayers and m.path not in self.overrides
        ]
        self.layer_ratio = self._layer_ratio()

    def _layer_ratio(self) -> float | None:
        """App. C.1 over the modules that no override fixes."""
        config = self.config
        if not self.free:
            if config.ratio is not None:
                raise UsageError(
                    f"ratio {config.ratio} has nothing to act on: the overrides fix or skip every "
                    "module; leave ratio out"
                )
            return None
        if config.ratio is None:
            raise UsageError("ratio: expected a share of parameters to remove, got none")
        if config.ratio_scope == "layer":
            return config.ratio
        compressible = sum(m.compressible for m in self.free)
        fixed = self._removed_by_overrides()
        if not fixed:
            return budget.layer_ratio(self.total, 1, compressible, config.ratio)
        ratio = (self.total * config.ratio - fixed) / compressible
        if ratio <= 0:
            raise UsageError(
                f"ratio {config.ratio} of {self.total} parameters is less than what the overrides "
                f"alone remove ({fixed / self.total:.4f})"
            )
        return ratio

    def _removed_by_overrides(self) -> float:
        removed: float = 0
        for module in self.modules:
            override = self.overrides.get(module.path)
            if override is None or override.skip:
                continue
            kept = override.width if override.kv_heads is None else override.kv_heads
            if override.ratio is not None:
                removed += override.ratio * module.compressible
            elif override.rank is not None:
                removed += module.compressible - _held(module, override.rank)
            elif kept is not None:
                removed += (module.shape[0] - kept) * module.shape[1]
        return removed

    def sizes(self, free_ratio: float | None) -> dict[str, _Size]:
        """Return rank or removed band by path, for the modules that are not dense.

        Parameters
        ----------
        free_ratio : float or None
            Share of the compressible parameters of the free modules; None where there are none.
        """
        sizes: dict[str, _Size] = {}
        groups: dict[tuple[int, Sublayer, Override | None], list[_Module]] = {}
        free_paths = {m.path for m in self.free}
        for module in self.modules:
            override = self.overrides.get(module.path)
            kept = override and (override.width or override.kv_heads)
            if override is not None and override.rank is not None:
                sizes[module.path] = override.rank
            elif kept:
                sizes[module.path] = _band_of_size(module.shape[0], kept, self.config)
            elif module.path in free_paths or (override is not None and override.ratio is not None):
                groups.setdefault((module.layer, module.sublayer, override), []).append(module)

        ratios = self._ratios_of_free(free_ratio)
        if self.config.is_marginal and free_ratio is not None:
            groups = {key: group for key, group in groups.items() if key[2] is not None}
            sizes |= self._marginal_sizes(free_ratio)
        for (layer, sublayer, override), group in groups.items():
            if override is None:
                sizes |= self._group_sizes(group, ratios[layer, sublayer])
                continue
            assert override.ratio is not None
            try:
                sizes |= self._group_sizes(group, override.ratio)
            except _UnreachableError as reason:
                raise UsageError(
                    f"override {override.match!r}: ratio {override.ratio} cannot be reached: "
                    f"{reason}"
                ) from None
        return sizes

    def _ratios_of_free(self, ratio: float | None) -> dict[tuple[int, Sublayer], float]:
        """Return the ratio of the free modules of every sub-layer that has any."""
        parameters: dict[tuple[int, Sublayer], int] = {}
        for module in self.free:
            key = (module.layer, module.sublayer)
            parameters[key] = parameters.get(key, 0) + module.compressible
        if ratio is None:
            return {}
        if ratio >= 1:
            raise _UnreachableError(
                f"it needs a layer ratio of {ratio:.4f}, and 1 would remove it all"
            )
        if not self.config.measures_similarity:
            return dict.fromkeys(parameters, ratio)
        known = self._measured().similarities
        shares = mgaa.sublayer_ratios(
            mgaa.standard_scores([known[key] for key in parameters]),
            list(parameters.values()),
            ratio,
            self.config.mgaa_alpha,
            [mgaa.highest_ratio(ratio, self.config.mgaa_floor)] * len(parameters),
        )
        return dict(zip(parameters, shares, strict=True))

    def _marginal_sizes(self, ratio: float) -> dict[str, _Size]:
        """Return the sizes, by path, of the free modules that ``marginal`` does not leave dense."""
        config, known = self.config, self._measured()
        floors, budget_left = self.floors_and_budget(ratio)
        curves: dict[str, marginal.Curve] = {}
        sensitivities: dict[str, float] = {}
        for module in self.free:
            path = module.path
            if module.kind == "matrix":
                curve = marginal.rank_curve(known.spectra[path], module.shape, module.new_bias)
            else:
                curve = marginal.channel_curve(known.losses[path], module.shape[1])
            curves[path] = curve
            sensitivities[path] = 0.0
            if path in known.divergences:
                error = curve[1][marginal.middle(len(curve[1]))]
                sensitivities[path] = marginal.sensitivity(known.divergences[path], error)
        places = marginal.marginal_sizes(curves, sensitivities, budget_left, floors)
        return {
            module.path: _size_at(module, places[module.path], config)
            for module in self.free
            if places[module.path] < len(curves[module.path][0]) - 1
        }

    def floors_and_budget(self, ratio: float) -> tuple[dict[str, int], int]:
        """Return what ``marginal`` leaves each free module at least, by path, and all together."""
        even = _Planner(self.model_config, self.family, self.config.without_measurements(), None)
        held = even.plan(even.sizes(ratio))
        floors: dict[str, int] = {}
        budget_left, least = 0, 0
        for module in self.free:
            floor = int(self.config.mgaa_floor * ((1 - ratio) * module.compressible))
            floors[module.path] = floor
            least += _least_held(module, floor)
            budget_left += held.layers[module.layer][module.name].parameters
            budget_left -= module.fixed_parameters
        if least > budget_left:
            raise _UnreachableError(
                f"at a layer ratio of {ratio:.4f} the least that every module keeps is too much"
            )
        return floors, budget_left

    def _measured(self) -> Measurements:
        if self.measurements is None:
            raise UsageError(
                f"allocation {self.config.allocation} depends on the weights and on calibration "
                "data: expected measurements, got none"
            )
        return self.measurements

    def _group_sizes(self, group: Sequence[_Module], ratio: float) -> dict[str, _Size]:
        """Return the sizes, by path, of the modules of one sub-layer that share a ratio."""
        first, config = group[0], self.config
        if ratio == 0:
            return {}
        if first.kind != "matrix":
            return {first.path: _band_of_ratio(first, ratio, config.least_important)}
        shapes = {m.path: m.shape for m in group}
        ranks: Mapping[str, int | None]
        if first.sublayer in config.energy_sublayers:
            kept = (1 - ratio) * sum(m.compressible for m in group)
            floors = mgaa.rank_floors(shapes, kept, config.mgaa_floor)
            spectra = {path: self._measured().spectra[path] for path in shapes}
            ranks = mgaa.common_energy_ranks(spectra, shapes, kept, floors)
            held = sum(_held(m, ranks[m.path]) for m in group)
            if held > kept:
                raise _UnreachableError(
                    f"at a ratio of {ratio:.4f} one rank for each matrix of layers.{first.layer} "
                    "is too much"
                )
        else:
            role_of = {m.path: "".join(m.roles) for m in group}
            by_role = budget.ranks(
                {role_of[path]: shape for path, shape in shapes.items()},
                ratio,
                config.even_allocation,
                nested=config.ratio_scope == "layer",
            )
            ranks = {path: by_role[role] for path, role in role_of.items()}
        for path, rank in ranks.items():
            if rank == 0:
                raise _UnreachableError(
                    f"at a layer ratio of {ratio:.4f} no rank is left for {path}"
                )
        return {path: rank for path, rank in ranks.items() if rank is not None}

    def rounded(self, sizes: Mapping[str, _Size]) -> dict[str, _Size]:
        """Return the sizes with those that ratios gave rounded to multiples."""
        shared: dict[tuple[str, Override | None], list[_Module]] = {}
        for module in self.modules:
            override = self.overrides.get(module.path)
            of_ratio = override is None or override.ratio is not None
            if not of_ratio or module.kind == "heads" or module.path not in sizes:
                continue
            # A band may be empty, and its block dense.
            if _units_kept(module, sizes[module.path]) < module.shape[0]:
                shared.setdefault((module.name, override), []).append(module)
        rounded = dict(sizes)
        for modules in shared.values():
            first = modules[0]
            found = budget.rounded_sizes(
                [_units_kept(module, sizes[module.path]) for module in modules],
                sum(first.shape) if first.kind == "matrix" else first.shape[1],
                first.compressible,
                self.config.multiple_of,
            )
            for module, size in zip(modules, found, strict=True):
                if size is None:
                    del rounded[module.path]
                elif module.kind == "matrix":
                    rounded[module.path] = size
                else:
                    rounded[module.path] = _band_of_size(module.shape[0], size, self.config)
        return rounded

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Turn a ratio that cannot be reached into what the user is told."""
        try:
            yield
        except _UnreachableError as reason:
            raise UsageError(
                f"ratio {self.config.ratio} cannot be reached: {reason}; {self.advice()}"
            ) from None

    def advice(self) -> str:
        """Say which ratio can be reached: the largest, rounded down to 4 decimals."""
        if self.config.is_marginal:
            return "a smaller ratio or mgaa_floor leaves room for each module"
        if not isinstance(self.config.allocation, float):
            return "a smaller ratio or a larger mgaa_floor leaves each module more"

        def reachable(layer_ratio: float) -> bool:
            try:
                self.sizes(layer_ratio)
            except _UnreachableError:
                return False
            return True

        low, high = 0.0, 1.0
        if not reachable(low):
            return "no ratio can be reached with these options"
        while high - low > 1e-7:
            middle = (low + high) / 2
            if reachable(middle):
                low = middle
            else:
                high = middle
        if self.config.ratio_scope == "model":
            fixed = self._removed_by_overrides()
            low = (low * sum(m.compressible for m in self.free) + fixed) / self.total
        largest = math.floor(low * 10_000) / 10_000
        if not largest:
            return "no ratio can be reached with these options"
        return f"the largest reachable is {largest}"

    def plan(self, sizes: Mapping[str, _Size]) -> Plan:
        """Return the plan that gives the modules these sizes."""
        tokens = self.config.seqlen
        layers: list[dict[str, ModulePlan]] = [{} for _ in range(self.modules[-1].layer + 1)]
        for module in self.modules:
            made = _module_plan(module, sizes.get(module.path), tokens)
            override = self.overrides.get(module.path)
            skipped = override is not None and override.skip
            untouched = skipped or module.sublayer not in self.config.sublayers
            layers[module.layer][module.name] = replace(made, untouched=untouched)
        planned = [plan for layer in layers for plan in layer.values()]
        removed = sum(plan.removed for plan in planned)
        macs_before = sum(plan.macs_before for plan in planned) + _other_macs(
            self.family, self.shapes, self.model_config, self.modules, tokens
        )
        return Plan(
            ratio=self.config.ratio,
            ratio_scope=self.config.ratio_scope,
            layer_ratio=self.layer_ratio,
            parameters_before=self.total,
            parameters=self.total - removed,
            tokens=tokens,
            macs_before=macs_before,
            macs=macs_before - sum(plan.macs_before - plan.macs for plan in planned),
            layers=tuple(layers),
        )


def _modules(
    family: Family,
    model_config: PretrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    layer: int,
    config: CompressionConfig,
) -> Iterator[_Module]:
    """Yield the modules of a layer, as the methods for its sub-layers take them."""
    prefix = f"{family.layers_path}.{layer}."

    def sides(name: str) -> tuple[int, int]:
        d_out, d_in = shapes[f"{prefix}{name}.weight"]
        return d_out, d_in

    def bias(name: str) -> int:
        return math.prod(shapes.get(f"{prefix}{name}.bias", (0,)))

    def matrix(sublayer: Sublayer, name: str, roles: Mapping[str, str], method: str) -> _Module:
        """One linear, or several that are stacked by rows."""
        d_out, d_in = sum(sides(n)[0] for n in roles.values()), sides(next(iter(roles.values())))[1]
        own = sum(bias(n) for n in roles.values())
        return _Module(
            layer,
            name,
            sublayer,
            "matrix",
            tuple(roles),
            (d_out, d_in),
            own,
            new_bias=d_out - own if method == "afm" else 0,
        )

    attention, ffn = dict(family.attention), dict(family.ffn)
    if config.mha == "heads" and "mha" in config.sublayers:
        yield _attention_block(family, model_config, layer, sides, bias, config.seqlen)
    else:
        if config.joint_qk and "mha" in config.sublayers:
            joint = {role: attention.pop(role) for role in ("q", "k")}
            yield matrix("mha", family.joint_qk, joint, config.mha)
        for role, name in attention.items():
            yield matrix("mha", name, {role: name}, config.mha)
    if config.ffn != "channels" and "ffn" in config.sublayers:
        for role, name in ffn.items():
            yield matrix("ffn", name, {role: name}, config.ffn)
        return
    width, hidden = sides(ffn["up"])
    per_channel = 3 * hidden + sum(bias(ffn[role]) for role in ("gate", "up")) // width
    yield _Module(
        layer,
        family.ffn_block,
        "ffn",
        "channels",
        tuple(ffn),
        (width, per_channel),
        bias(ffn["down"]),
        macs_per_unit=3 * hidden * config.seqlen,
    )


def _attention_block(
    family: Family,
    model_config: PretrainedConfig,
    layer: int,
    sides: Callable[[str], tuple[int, int]],
    bias: Callable[[str], int],
    tokens: int,
) -> _Module:
    """An attention block whose unit is a key/value head with the query heads that share it."""
    kv_heads = int(model_config.num_key_value_heads or model_config.num_attention_heads)
    q, k, v, o = (family.attention[role] for role in ("q", "k", "v", "o"))
    queries, hidden = sides(q)
    weights = hidden * sum(sides(name)[0] for name in (q, k, v)) + queries * sides(o)[0]
    biases = bias(q) + bias(k) + bias(v)
    return _Module(
        layer,
        family.attention_block,
        "mha",
        "heads",
        tuple(family.attention),
        (kv_heads, (weights + biases) // kv_heads),
        bias(o),
        macs_per_unit=(tokens * weights + 2 * queries * tokens * tokens) // kv_heads,
    )


def _check_multiple(modules: Sequence[_Module], config: CompressionConfig) -> None:
    rounded = [m for m in modules if m.sublayer in config.sublayers and m.kind != "heads"]
    # What is pruned by whole heads alone has been refused already.
    largest = max((_most(module) for module in rounded), default=config.multiple_of)
    if config.multiple_of > largest:
        raise UsageError(
            f"multiple_of {config.multiple_of}: has no effect, since no module of this model can "
            f"keep as many ranks or channels and still be smaller; the most is {largest}"
        )


def _most(module: _Module, new_bias: int = 0) -> int:
    """Return the largest rank, or number of channels, that is smaller than the dense module.

    Parameters
    ----------
    module : _Module
    new_bias : int
        Parameters that a factored matrix has besides.
    """
    if module.kind != "matrix":
        return module.shape[0] - 1
    return max(0, (module.compressible - new_bias - 1) // sum(module.shape))


def _resolve_overrides(
    modules: Sequence[_Module], config: CompressionConfig
) -> dict[str, Override]:
    """Return the override that counts for each module that has one, by path."""
    resolved: dict[str, Override] = {}
    for override in config.overrides:
        matched = [m for m in modules if any(fnmatchcase(p, override.match) for p in _parents(m))]
        if not matched:
            names = " and ".join(m.path for m in (modules[0], modules[-1]))
            raise UsageError(
                f"override {override.match!r} names no module; modules are named like {names}, "
                f"for {modules[-1].layer + 1} layers"
            )
        chosen = [m for m in matched if m.sublayer in config.sublayers]
        if not chosen:
            raise UsageError(
                f"override {override.match!r} names only modules that sublayers "
                f"({', '.join(config.sublayers)}) leaves as they are"
            )
        for module in chosen:
            _check_override(override, module)
            resolved[module.path] = override
    return resolved


def _parents(module: _Module) -> Iterator[str]:
    parts = module.path.split(".")
    for end in range(2, len(parts) + 1):
        yield ".".join(parts[:end])


def _check_override(override: Override, module: _Module) -> None:
    where = f"override {override.match!r}"
    for name, kind, what in (
        ("rank", "matrix", "low-rank projections"),
        ("width", "channels", "feed-forward blocks that lose channels"),
        ("kv_heads", "heads", "attention blocks that lose heads"),
    ):
        value = getattr(override, name)
        if value is None:
            continue
        if module.kind != kind:
            raise UsageError(f"{where}: {name} is for {what}, not for {module.path}")
        if kind != "matrix":
            if value > module.shape[0]:
                raise UsageError(
                    f"{where}: {name} {value} exceeds the {module.shape[0]} {_UNITS[kind]}s of "
                    f"{module.path}"
                )
            continue
        limit = _most(module)
        if value > limit:
            raise UsageError(
                f"{where}: rank {value} of {module.path} would hold at least as many "
                f"parameters as the dense matrix; expected 1 to {limit}, or skip: true"
            )


_UNITS = {"channels": "channel", "heads": "key/value head"}


def _held(module: _Module, rank: int | None) -> int:
    return module.compressible if rank is None else rank * sum(module.shape)


def _least_held(module: _Module, floor: int) -> int:
    """Return the parameters of the smallest size that holds at least so many."""
    per_unit = sum(module.shape) if module.kind == "matrix" else module.shape[1]
    units = max(1, math.ceil((floor - module.new_bias) / per_unit))
    if units > _most(module, module.new_bias):
        return module.compressible
    return units * per_unit + module.new_bias


def _size_at(module: _Module, place: int, config: CompressionConfig) -> _Size:
    """Return the size at a place of a module's curve."""
    if module.kind == "matrix":
        return place + 1
    return _band_of_size(module.shape[0], place + 1, config)


def _units_kept(module: _Module, size: _Size) -> int:
    """Return a rank, or the number of channels that a band leaves."""
    return size if isinstance(size, int) else module.shape[0] - (size[1] - size[0])


def _band_of_ratio(module: _Module, ratio: float, least_important: float) -> tuple[int, int]:
    low, high = budget.removed_band(module.shape[0], ratio, least_important)
    if high >= module.shape[0]:
        raise _UnreachableError(
            f"at a layer ratio of {ratio:.4f} no {_UNITS[module.kind]} is left for {module.path} "
            f"beside the {low} least important ones"
        )
    return low, high


def _band_of_size(units: int, kept: int, config: CompressionConfig) -> tuple[int, int]:
    low = min(budget.removed_band(units, 0.0, config.least_important)[0], kept - 1)
    return low, low + units - kept


def _module_plan(module: _Module, size: _Size | None, tokens: int) -> ModulePlan:
    before = module.compressible + module.fixed_parameters
    if module.kind == "matrix":
        rank = size if isinstance(size, int) else None
        new_bias = 0 if rank is None else module.new_bias
        return ModulePlan(
            kind="dense" if rank is None else "low_rank",
            sublayer=module.sublayer,
            roles=module.roles,
            compressible=module.compressible,
            parameters_before=before,
            parameters=_held(module, rank) + new_bias + module.fixed_parameters,
            macs_before=tokens * module.compressible,
            macs=tokens * _held(module, rank),
            rank=rank,
            bias=new_bias > 0,
        )
    units, per_unit = module.shape
    band = size if isinstance(size, tuple) else (0, 0)
    kept = _units_kept(module, band)
    return ModulePlan(
        kind="dense" if kept == units else module.kind,
        sublayer=module.sublayer,
        roles=module.roles,
        compressible=module.compressible,
        parameters_before=before,
        parameters=kept * per_unit + module.fixed_parameters,
        macs_before=units * module.macs_per_unit,
        macs=kept * module.macs_per_unit,
        width=kept if module.kind == "channels" else None,
        kv_heads=kept if module.kind == "heads" else None,
        band=None if kept == units else band,
    )


def _other_macs(
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    model_config: PretrainedConfig,
    modules: Sequence[_Module],
    tokens: int,
) -> int:
    """MACs of the head, and of attention's two products where no module counts them."""
    head = tokens * int(model_config.vocab_size * model_config.hidden_size)
    queries = shapes[f"{family.layers_path}.0.{family.attention['o']}.weight"][1]
    counted = {m.layer for m in modules if m.kind == "heads"}
    layers = int(model_config.num_hidden_layers) - len(counted)
    return head + layers * 2 * queries * tokens * tokens
