"""Ranks and widths of every module, from the model's configuration alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal

from lorap.config import CompressionConfig, Override
from lorap.errors import UsageError
from lorap.ops import budget

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lorap.families import Family, LayerStructure

Kind = Literal["low_rank", "dense", "channels"]


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of one attention projection or feed-forward block.

    Attributes
    ----------
    kind : {"low_rank", "dense", "channels"}
        ``channels`` for a feed-forward block that loses channels.
    rank : int or None
        Of a ``low_rank`` projection.
    width : int or None
        Channels that a feed-forward block keeps.
    band : (int, int) or None
        Removed band ``[low, high)`` of the channels in ascending order of score (Eq. 11).
    parameters_before, parameters : int
        Biases included.
    macs_before, macs : int
        Multiply-accumulates for the plan's tokens.
    """

    kind: Kind
    parameters_before: int
    parameters: int
    macs_before: int
    macs: int
    rank: int | None = None
    width: int | None = None
    band: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what applies to this kind of module."""
        values: dict[str, Any] = {"kind": self.kind}
        if self.rank is not None:
            values["rank"] = self.rank
        if self.width is not None:
            values["width"] = self.width
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

    @property
    def achieved_ratio(self) -> float:
        """Share of all parameters that the plan removes."""
        return 1 - self.parameters / self.parameters_before

    def structure(self) -> list[LayerStructure]:
        """Return the ranks and widths as the compressed model's configuration holds them."""
        layers: list[LayerStructure] = []
        for layer in self.layers:
            structure: dict[str, dict[str, int]] = {}
            for name, module in layer.items():
                if module.rank is not None:
                    structure[name] = {"rank": module.rank}
                elif module.kind == "channels" and module.width is not None:
                    structure[name] = {"width": module.width}
            layers.append(structure)
        return layers

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as ``lorap plan --json`` prints it."""
        return {
            "ratio": self.ratio,
            "ratio_scope": self.ratio_scope,
            "layer_ratio": self.layer_ratio,
            "achieved_ratio": self.achieved_ratio,
            "parameters": {"before": self.parameters_before, "after": self.parameters},
            "macs": {"tokens": self.tokens, "before": self.macs_before, "after": self.macs},
            "layers": [
                {name: module.to_dict() for name, module in layer.items()} for layer in self.layers
            ],
        }


@dataclass(frozen=True)
class _Module:
    """A compressible module as the model has it."""

    layer: int
    name: str
    sublayer: Literal["mha", "ffn"]
    role: str
    shape: tuple[int, int]
    """(d_out, d_in) of a projection; (channels, parameters per channel) of a block."""
    fixed_parameters: int
    """Biases that no compression removes."""
    macs_per_channel: int = 0

    @property
    def compressible(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def path(self) -> str:
        return f"layers.{self.layer}.{self.name}"


class _UnreachableError(Exception):
    """A layer ratio that leaves some module with nothing."""


def plan_checkpoint(
    model: str,
    config: CompressionConfig,
    *,
    revision: str | None = None,
) -> Plan:
    """Plan the compression of a model on disk or on the hub from its ``config.json`` alone.

    Parameters
    ----------
    model : str
        A local folder or a hub name.
    config : CompressionConfig
    revision : str, optional
        Of a model on the hub.

    Raises
    ------
    UsageError
        If the model is not supported or the ratio cannot be reached.
    """
    from lorap.checkpoint.reader import read_config
    from lorap.families import family_of

    model_config = read_config(model, revision=revision)
    return make_plan(model_config, family_of(model_config), config)


def make_plan(model_config: PretrainedConfig, family: Family, config: CompressionConfig) -> Plan:
    """Plan the compression of a model.

    Parameters
    ----------
    model_config : PretrainedConfig
        Of the original model.
    family : Family
        Its family.
    config : CompressionConfig

    Raises
    ------
    UsageError
        If the ratio cannot be reached (the largest reachable one is named), or an override names
        no module, or does not fit the modules that it names.

    Notes
    -----
    SPEC: ``budget.layer-ratio``, ``budget.reachable``, ``budget.overrides``.
    """
    shapes = family.tensor_shapes(family.compressed_config(model_config, None), split=True)
    total = sum(math.prod(shape) for shape in shapes.values())
    modules = _modules(family, shapes, model_config.num_hidden_layers)
    overrides = _resolve_overrides(modules, config)
    free = [m for m in modules if m.sublayer in config.sublayers and m.path not in overrides]

    ratio_of_free = _layer_ratio(config, total, modules, overrides, free)
    try:
        sizes = _sizes(modules, overrides, free, ratio_of_free, config)
    except _UnreachableError as reason:
        largest = _largest_reachable(config, total, modules, overrides, free)
        advice = (
            f"the largest reachable is {largest}"
            if largest is not None
            else "no ratio can be reached with these options"
        )
        raise UsageError(f"ratio {config.ratio} cannot be reached: {reason}; {advice}") from None

    tokens = config.seqlen
    layers: list[dict[str, ModulePlan]] = [{} for _ in range(model_config.num_hidden_layers)]
    for module in modules:
        layers[module.layer][module.name] = _module_plan(module, sizes.get(module.path), tokens)
    planned = [plan for layer in layers for plan in layer.values()]
    removed = sum(plan.parameters_before - plan.parameters for plan in planned)
    macs_before = _other_macs(family, shapes, model_config, tokens) + sum(
        plan.macs_before for plan in planned
    )
    return Plan(
        ratio=config.ratio,
        ratio_scope=config.ratio_scope,
        layer_ratio=ratio_of_free,
        parameters_before=total,
        parameters=total - removed,
        tokens=tokens,
        macs_before=macs_before,
        macs=macs_before - sum(plan.macs_before - plan.macs for plan in planned),
        layers=tuple(layers),
    )


def _modules(family: Family, shapes: Mapping[str, tuple[int, ...]], layers: int) -> list[_Module]:
    modules = []
    for layer in range(layers):
        prefix = f"{family.layers_path}.{layer}."
        for role, name in family.attention.items():
            d_out, d_in = shapes[f"{prefix}{name}.weight"]
            bias = math.prod(shapes.get(f"{prefix}{name}.bias", (0,)))
            modules.append(_Module(layer, name, "mha", role, (d_out, d_in), bias))
        gate, up, down = (f"{prefix}{family.ffn[role]}" for role in ("gate", "up", "down"))
        width, hidden = shapes[f"{up}.weight"]
        macs = hidden * 3
        per_channel = macs + sum(f"{name}.bias" in shapes for name in (gate, up))
        bias = math.prod(shapes.get(f"{down}.bias", (0,)))
        modules.append(
            _Module(layer, family.ffn_block, "ffn", "ffn", (width, per_channel), bias, macs)
        )
    return modules


def _resolve_overrides(
    modules: Sequence[_Module], config: CompressionConfig
) -> dict[str, Override]:
    """Return the override that counts for each module that has one, by path."""
    resolved: dict[str, Override] = {}
    for override in config.overrides:
        matched = [m for m in modules if any(fnmatchcase(p, override.match) for p in _parents(m))]
        if not matched:
            raise UsageError(
                f"override {override.match!r} names no module; modules are named like "
                f"{modules[0].path} and {modules[4].path}, for {modules[-1].layer + 1} layers"
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
    if override.rank is not None:
        if module.sublayer != "mha":
            raise UsageError(f"{where}: rank is for attention projections, not for {module.path}")
        limit = math.ceil(budget.break_even_rank(module.shape)) - 1
        if override.rank > limit:
            raise UsageError(
                f"{where}: rank {override.rank} of {module.path} would hold at least as many "
                f"parameters as the dense matrix; expected 1 to {limit}, or skip: true"
            )
    if override.width is not None:
        if module.sublayer != "ffn":
            raise UsageError(f"{where}: width is for feed-forward blocks, not for {module.path}")
        if override.width > module.shape[0]:
            raise UsageError(
                f"{where}: width {override.width} exceeds the {module.shape[0]} channels "
                f"of {module.path}"
            )


def _layer_ratio(
    config: CompressionConfig,
    total: int,
    modules: Sequence[_Module],
    overrides: Mapping[str, Override],
    free: Sequence[_Module],
) -> float | None:
    """App. C.1 over the modules that no override fixes."""
    if not free:
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
    compressible = sum(m.compressible for m in free)
    fixed = _removed_by_overrides(modules, overrides)
    if not fixed:
        return budget.layer_ratio(total, 1, compressible, config.ratio)
    ratio = (total * config.ratio - fixed) / compressible
    if ratio <= 0:
        raise UsageError(
            f"ratio {config.ratio} of {total} parameters is less than what the overrides alone "
            f"remove ({fixed / total:.4f})"
        )
    return ratio


def _removed_by_overrides(modules: Sequence[_Module], overrides: Mapping[str, Override]) -> float:
    removed: float = 0
    for module in modules:
        override = overrides.get(module.path)
        if override is None or override.skip:
            continue
        if override.ratio is not None:
            removed += override.ratio * module.compressible
        elif override.rank is not None:
            removed += module.compressible - override.rank * sum(module.shape)
        elif override.width is not None:
            removed += (module.shape[0] - override.width) * module.shape[1]
    return removed


_Size = int | tuple[int, int]
"""A rank, or the removed band of a block's channels."""


def _sizes(
    modules: Sequence[_Module],
    overrides: Mapping[str, Override],
    free: Sequence[_Module],
    free_ratio: float | None,
    config: CompressionConfig,
) -> dict[str, _Size]:
    """Return rank or removed band by path, for the modules that are not dense."""
    sizes: dict[str, _Size] = {}
    groups: dict[tuple[int, str, Override | None], list[_Module]] = {}
    free_paths = {m.path for m in free}
    for module in modules:
        override = overrides.get(module.path)
        if override is not None and override.rank is not None:
            sizes[module.path] = override.rank
        elif override is not None and override.width is not None:
            sizes[module.path] = _band_of_width(module.shape[0], override.width, config)
        elif module.path in free_paths or (override is not None and override.ratio is not None):
            groups.setdefault((module.layer, module.sublayer, override), []).append(module)

    for (_, _, override), group in groups.items():
        if override is None:
            assert free_ratio is not None
            sizes |= _group_sizes(group, free_ratio, config)
            continue
        assert override.ratio is not None
        try:
            sizes |= _group_sizes(group, override.ratio, config)
        except _UnreachableError as reason:
            raise UsageError(
                f"override {override.match!r}: ratio {override.ratio} cannot be reached: {reason}"
            ) from None
    return sizes


def _group_sizes(
    group: Sequence[_Module], ratio: float, config: CompressionConfig
) -> dict[str, _Size]:
    """Return the sizes, by path, of the modules of one sub-layer that share a ratio."""
    if ratio >= 1:
        raise _UnreachableError(f"it needs a layer ratio of {ratio:.4f}, and 1 would remove it all")
    if group[0].sublayer == "ffn":
        return {group[0].path: _band_of_ratio(group[0], ratio, config.least_important)}
    ranks = budget.ranks(
        {m.role: m.shape for m in group},
        ratio,
        config.allocation,
        nested=config.ratio_scope == "layer",
    )
    sizes: dict[str, _Size] = {}
    for module in group:
        rank = ranks[module.role]
        if rank == 0:
            raise _UnreachableError(
                f"at a layer ratio of {ratio:.4f} no rank is left for {module.path}"
            )
        if rank is not None:
            sizes[module.path] = rank
    return sizes


def _band_of_ratio(module: _Module, ratio: float, least_important: float) -> tuple[int, int]:
    low, high = budget.removed_band(module.shape[0], ratio, least_important)
    if high >= module.shape[0]:
        raise _UnreachableError(
            f"at a layer ratio of {ratio:.4f} no channel is left for {module.path} beside the "
            f"{low} least important ones"
        )
    return low, high


def _band_of_width(channels: int, width: int, config: CompressionConfig) -> tuple[int, int]:
    low = min(budget.removed_band(channels, 0.0, config.least_important)[0], width - 1)
    return low, low + channels - width


def _largest_reachable(
    config: CompressionConfig,
    total: int,
    modules: Sequence[_Module],
    overrides: Mapping[str, Override],
    free: Sequence[_Module],
) -> float | None:
    """Largest reachable ratio, rounded down to 4 decimals; None where there is none."""

    def reachable(layer_ratio: float) -> bool:
        try:
            _sizes(modules, overrides, free, layer_ratio, config)
        except _UnreachableError:
            return False
        return True

    low, high = 0.0, 1.0
    if not reachable(low):
        return None
    while high - low > 1e-7:
        middle = (low + high) / 2
        if reachable(middle):
            low = middle
        else:
            high = middle
    if config.ratio_scope == "model":
        fixed = _removed_by_overrides(modules, overrides)
        low = (low * sum(m.compressible for m in free) + fixed) / total
    return math.floor(low * 10_000) / 10_000 or None


def _module_plan(module: _Module, size: _Size | None, tokens: int) -> ModulePlan:
    before = module.compressible + module.fixed_parameters
    if module.sublayer == "ffn":
        channels, per_channel = module.shape
        band = size if isinstance(size, tuple) else (0, 0)
        width = channels - (band[1] - band[0])
        return ModulePlan(
            kind="dense" if width == channels else "channels",
            parameters_before=before,
            parameters=width * per_channel + module.fixed_parameters,
            macs_before=tokens * channels * module.macs_per_channel,
            macs=tokens * width * module.macs_per_channel,
            width=width,
            band=None if width == channels else band,
        )
    rank = size if isinstance(size, int) else None
    weights = module.compressible if rank is None else rank * sum(module.shape)
    return ModulePlan(
        kind="dense" if rank is None else "low_rank",
        parameters_before=before,
        parameters=weights + module.fixed_parameters,
        macs_before=tokens * module.compressible,
        macs=tokens * weights,
        rank=rank,
    )


def _other_macs(
    family: Family,
    shapes: Mapping[str, tuple[int, ...]],
    model_config: PretrainedConfig,
    tokens: int,
) -> int:
    """MACs of the head and of attention's two products, which no compression changes."""
    head = tokens * int(model_config.vocab_size * model_config.hidden_size)
    queries = shapes[f"{family.layers_path}.0.{family.attention['o']}.weight"][1]
    attention = 2 * queries * tokens * tokens
    return head + int(model_config.num_hidden_layers) * attention
