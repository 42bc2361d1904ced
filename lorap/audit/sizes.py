"""Ranks, widths, heads and parameters of every module, by the reference alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any, Literal

from lorap.audit.record import Record
from lorap.checkpoint.reader import CheckpointReader
from lorap.config import CompressionConfig, Override, Sublayer
from lorap_reference import budget, marginal, mgaa


@dataclass(frozen=True)
class Module:
    """A compressible module, and what becomes of it.

    Attributes
    ----------
    layer : int
    name : str
        Relative to the layer.
    sublayer : {"mha", "ffn"}
    unit : {"matrix", "channels", "heads"}
        What of it a ratio removes: ranks of a matrix, channels or groups of heads of a block.
    roles : tuple of str
        Its linears: one, q and k together, or those of a block.
    shape : (int, int)
        ``(d_out, d_in)`` of a matrix; of a block, channels or groups and the parameters of each.
    fixed : int
        Parameters of the biases that stay.
    gained : int
        Parameters of the biases that its linears have once it is factored, and lack before.
    affine : bool
        Whether its factors come with a bias, as AFM's do.
    rank : int or None
        Of a matrix that is factored.
    band : (int, int) or None
        Of a block, what is removed in the ascending order of the scores; None where nothing is.
    untouched : bool
        Whether nothing may change it: its sub-layer is not compressed, or an override skips it.
    """

    layer: int
    name: str
    sublayer: Sublayer
    unit: Literal["matrix", "channels", "heads"]
    roles: tuple[str, ...]
    shape: tuple[int, int]
    fixed: int
    gained: int = 0
    affine: bool = False
    rank: int | None = None
    band: tuple[int, int] | None = None
    untouched: bool = False

    @property
    def path(self) -> str:
        """Name within the model."""
        return f"layers.{self.layer}.{self.name}"

    @property
    def compressible(self) -> int:
        """Parameters that a ratio is a share of."""
        return prod(self.shape)

    @property
    def kept(self) -> int:
        """Channels or groups of heads that stay."""
        low, high = self.band or (0, 0)
        return self.shape[0] - (high - low)

    @property
    def removed(self) -> int:
        """Parameters that are gone; fewer than none where a bias costs more than the rank saves."""
        if self.rank is not None:
            return self.compressible - self.rank * sum(self.shape) - self.gained
        return (self.shape[0] - self.kept) * self.shape[1]

    @property
    def structure(self) -> dict[str, Any] | None:
        """Entry of ``config.json``; None for a module that stays as it was."""
        if self.rank is not None:
            return {"rank": self.rank} | ({"bias": True} if self.gained else {})
        if self.band is None:
            return None
        return {"width" if self.unit == "channels" else "kv_heads": self.kept}

    @property
    def becomes(self) -> str:
        """What the module becomes, in two words."""
        if self.rank is not None:
            return f"rank {self.rank}"
        if self.band is None:
            return "as it was"
        return f"{self.kept} {'channels' if self.unit == 'channels' else 'kv heads'}"

    @property
    def report(self) -> dict[str, Any]:
        """What the report must say of its size."""
        dense = "dense" if self.band is None else self.unit
        values: dict[str, Any] = {"kind": dense if self.rank is None else "low_rank"}
        if self.rank is not None:
            values["rank"] = self.rank
        if self.unit != "matrix":
            values["width" if self.unit == "channels" else "kv_heads"] = self.kept
        before = self.compressible + self.fixed
        return values | {"parameters": before - self.removed, "parameters_before": before}


@dataclass(frozen=True)
class Plan:
    """What every module becomes.

    Attributes
    ----------
    layers : tuple of mapping
        By layer, the modules by name.
    layer_ratio : float or None
        Of the modules that no override fixes; None where there are none.
    before, after : int
        Parameters of the whole model.
    """

    layers: tuple[Mapping[str, Module], ...]
    layer_ratio: float | None
    before: int
    after: int

    def ratios(self, layer: int) -> dict[str, float]:
        """Return the share that each sub-layer of a layer loses."""
        found = {}
        for sublayer in ("mha", "ffn"):
            modules = [m for m in self.layers[layer].values() if m.sublayer == sublayer]
            removed = sum(m.removed for m in modules)
            found[sublayer] = removed / sum(m.compressible for m in modules)
        return found


Key = tuple[int, Sublayer]


def make_plan(reader: CheckpointReader, record: Record) -> Plan:
    """Plan what the recorded settings and measurements make of the original.

    Parameters
    ----------
    reader : CheckpointReader
        Of the original, for the shapes of its tensors.
    record : Record

    Raises
    ------
    UsageError
        If a measurement that the settings ask for is not recorded.

    Notes
    -----
    By the rules ``budget.*``, ``mgaa.*`` and ``marginal.*`` of SPEC.md.
    """
    settings, total = record.settings, sum(prod(t.shape) for t in reader.tensors.values())
    count = int(reader.config.num_hidden_layers)
    modules = [m for layer in range(count) for m in _modules(reader, settings, layer)]
    overrides: dict[str, Override] = {}
    for module in modules:
        if module.sublayer in settings.sublayers:
            matching = [o for o in settings.overrides if _names(o.match, module.path)]
            overrides |= {module.path: matching[-1]} if matching else {}
    free = [m for m in modules if m.sublayer in settings.sublayers and m.path not in overrides]
    ratio = _layer_ratio(settings, total, modules, free, overrides)

    sized, free_paths = {m.path: m for m in modules}, {m.path for m in free}
    shared: dict[tuple[Key, Override | None], list[Module]] = {}
    for module in modules:
        override = overrides.get(module.path)
        kept = None if override is None else override.width or override.kv_heads
        if override is not None and override.rank is not None:
            sized[module.path] = replace(module, rank=override.rank)
        elif kept is not None:
            sized[module.path] = _keeping(module, kept, settings)
        elif module.path in free_paths or (override is not None and override.ratio is not None):
            shared.setdefault(((module.layer, module.sublayer), override), []).append(module)
    ratios = {} if ratio is None else _ratios(free, ratio, record)
    even: dict[str, Module] = {}
    for (key, override), group in shared.items():
        own = ratios[key] if override is None else override.ratio
        assert own is not None
        found = {module.path: module for module in _shared_out(group, own, record)}
        sized |= found
        even |= found if override is None else {}
    if settings.is_marginal and ratio is not None:
        sized |= {m.path: m for m in _by_worth(list(even.values()), ratio, record)}
    by_ratio = [m.path for group in shared.values() for m in group if m.unit != "heads"]
    sized |= _rounded([sized[path] for path in by_ratio], overrides, settings)

    layers: list[dict[str, Module]] = [{} for _ in range(count)]
    for module in sized.values():
        override = overrides.get(module.path)
        skipped = override is not None and override.skip
        untouched = skipped or module.sublayer not in settings.sublayers
        layers[module.layer][module.name] = replace(module, untouched=untouched)
    lost = sum(module.removed for module in sized.values())
    return Plan(tuple(layers), ratio, total, total - lost)


def _modules(reader: CheckpointReader, settings: CompressionConfig, layer: int) -> Iterator[Module]:
    """Yield the modules of a layer in the order in which they share a budget."""
    family, prefix = reader.family, f"{reader.family.layers_path}.{layer}."

    def sides(name: str) -> tuple[int, int]:
        d_out, d_in = reader.tensors[f"{prefix}{name}.weight"].shape
        return d_out, d_in

    def biases(names: Sequence[str]) -> int:
        found = (reader.tensors.get(f"{prefix}{name}.bias") for name in names)
        return sum(prod(tensor.shape) for tensor in found if tensor is not None)

    def matrix(sublayer: Sublayer, name: str, linears: Mapping[str, str], method: str) -> Module:
        shapes = [sides(linear) for linear in linears.values()]
        d_out, fixed = sum(shape[0] for shape in shapes), biases(list(linears.values()))
        affine, shape = method == "afm", (d_out, shapes[0][1])
        gained = d_out - fixed if affine else 0
        return Module(layer, name, sublayer, "matrix", tuple(linears), shape, fixed, gained, affine)

    def block(
        sublayer: Sublayer, name: str, linears: Mapping[str, str], units: int, last: str
    ) -> Module:
        """A block whose last linear keeps its bias."""
        removable = sum(prod(sides(linear)) for linear in linears.values())
        removable += biases([linear for role, linear in linears.items() if role != last])
        unit: Literal["channels", "heads"] = "heads" if sublayer == "mha" else "channels"
        shape = (units, removable // units)
        fixed = biases([linears[last]])
        return Module(layer, name, sublayer, unit, tuple(linears), shape, fixed)

    attention, ffn = dict(family.attention), dict(family.ffn)
    compressed = settings.sublayers
    if settings.mha == "heads" and "mha" in compressed:
        groups = reader.config.num_key_value_heads or reader.config.num_attention_heads
        yield block("mha", family.attention_block, attention, int(groups), "o")
    else:
        if settings.joint_qk and "mha" in compressed:
            joint = {role: attention.pop(role) for role in ("q", "k")}
            yield matrix("mha", family.joint_qk, joint, settings.mha)
        for role, name in attention.items():
            yield matrix("mha", name, {role: name}, settings.mha)
    if settings.ffn != "channels" and "ffn" in compressed:
        for role, name in ffn.items():
            yield matrix("ffn", name, {role: name}, settings.ffn)
    else:
        yield block("ffn", family.ffn_block, ffn, sides(ffn["up"])[0], "down")


def _names(pattern: str, path: str) -> bool:
    """Whether a pattern names a module or one of its parents (rule ``budget.overrides``)."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(2, len(parts) + 1))


def _layer_ratio(
    settings: CompressionConfig,
    total: int,
    modules: Sequence[Module],
    free: Sequence[Module],
    overrides: Mapping[str, Override],
) -> float | None:
    """Layer ratio of the free modules, None where there are none."""
    if not free or settings.ratio is None:
        return None
    if settings.ratio_scope == "layer":
        return settings.ratio
    compressible = sum(module.compressible for module in free)
    fixed: float = 0
    for module in modules:
        override = overrides.get(module.path)
        if override is None:
            continue
        kept = override.width or override.kv_heads
        if override.ratio is not None:
            fixed += override.ratio * module.compressible
        elif override.rank is not None:
            fixed += module.compressible - override.rank * sum(module.shape)
        elif kept is not None:
            fixed += (module.shape[0] - kept) * module.shape[1]
    if not fixed:
        return float(budget.layer_ratio(total, 1, compressible, settings.ratio))
    return (total * settings.ratio - fixed) / compressible


def _ratios(free: Sequence[Module], ratio: float, record: Record) -> dict[Key, float]:
    """Ratio of the free modules of every sub-layer that has any (rule ``mgaa.ratios``)."""
    settings = record.settings
    sizes: dict[Key, int] = {}
    for module in free:
        key = (module.layer, module.sublayer)
        sizes[key] = sizes.get(key, 0) + module.compressible
    if not settings.measures_similarity:
        return dict.fromkeys(sizes, ratio)
    similarities = [
        float(record.recorded(f"layers.{layer}.{sublayer}.similarity", ()))
        for layer, sublayer in sizes
    ]
    highest = mgaa.highest_ratio(ratio, settings.mgaa_floor)
    shares = mgaa.sublayer_ratios(
        mgaa.standard_scores(similarities),
        list(sizes.values()),
        ratio,
        settings.mgaa_alpha,
        [highest] * len(sizes),
    )
    return dict(zip(sizes, shares, strict=True))


def _shared_out(group: Sequence[Module], ratio: float, record: Record) -> list[Module]:
    """Size the modules of one sub-layer that share a ratio."""
    settings, first = record.settings, group[0]
    if ratio == 0:
        return list(group)
    if first.unit != "matrix":
        band = budget.removed_band(first.shape[0], ratio, settings.least_important)
        return [_banded(first, band)]
    shapes = {"".join(module.roles): module.shape for module in group}
    if first.sublayer in settings.energy_sublayers:
        kept = (1 - ratio) * sum(module.compressible for module in group)
        floors = mgaa.rank_floors(shapes, kept, settings.mgaa_floor)
        spectra = {
            "".join(module.roles): record.recorded(f"{module.path}.spectrum", (min(module.shape),))
            for module in group
        }
        ranks = mgaa.common_energy_ranks(spectra, shapes, kept, floors)
    else:
        nested = settings.ratio_scope == "layer"
        ranks = budget.ranks(shapes, ratio, settings.even_allocation, nested)
    return [replace(module, rank=ranks["".join(module.roles)]) for module in group]


def curve(module: Module, record: Record) -> marginal.Curve:
    """Return the recorded errors of a module's sizes (rule ``marginal.curve``)."""
    units, per_unit = module.shape
    if module.unit == "channels":
        losses = record.recorded(f"{module.path}.losses", (units - 1,))
        return marginal.channel_curve(losses, per_unit)
    spectrum = record.recorded(f"{module.path}.spectrum", (min(module.shape),))
    return marginal.rank_curve(spectrum, module.shape, module.gained)


def at_place(module: Module, place: int, count: int) -> Module:
    """Return a module with the size at a place of its curve of `count` sizes."""
    if module.unit == "channels":
        return replace(
            module, rank=None, band=(0, count - 1 - place) if place < count - 1 else None
        )
    return replace(module, rank=place + 1 if place < count - 1 else None, band=None)


def _by_worth(even: Sequence[Module], ratio: float, record: Record) -> list[Module]:
    """Size the free modules by what a parameter is worth (rule ``marginal.plan``)."""
    curves = {module.path: curve(module, record) for module in even}
    sensitivities, floors = {}, {}
    for module in even:
        held, errors = curves[module.path]
        sensitivities[module.path] = 0.0
        if len(held) > 1:
            divergence = float(record.recorded(f"{module.path}.divergence", ()))
            error = errors[marginal.middle(len(held))]
            sensitivities[module.path] = marginal.sensitivity(divergence, error)
        floor = record.settings.mgaa_floor * ((1 - ratio) * module.compressible)
        floors[module.path] = int(floor)
    total = sum(module.compressible - module.removed for module in even)
    places = marginal.marginal_sizes(curves, sensitivities, total, floors)
    return [at_place(m, places[m.path], len(curves[m.path][0])) for m in even]


def _banded(module: Module, band: tuple[int, int]) -> Module:
    return replace(module, band=band if band[1] > band[0] else None)


def _keeping(module: Module, kept: int, settings: CompressionConfig) -> Module:
    """A block that keeps a number of its units (rule ``budget.overrides``)."""
    low = min(budget.removed_band(module.shape[0], 0.0, settings.least_important)[0], kept - 1)
    return _banded(module, (low, low + module.shape[0] - kept))


def _rounded(
    modules: Sequence[Module], overrides: Mapping[str, Override], settings: CompressionConfig
) -> dict[str, Module]:
    """Round the sizes of the modules of all layers (rule ``budget.multiple``)."""
    alike: dict[tuple[str, Override | None], list[Module]] = {}
    for module in modules:
        if module.rank is not None or module.band is not None:
            alike.setdefault((module.name, overrides.get(module.path)), []).append(module)
    rounded: dict[str, Module] = {}
    for group in alike.values():
        first = group[0]
        u = sum(first.shape) if first.unit == "matrix" else first.shape[1]
        r = [module.kept if module.rank is None else module.rank for module in group]
        found = budget.rounded_sizes(r, u, first.compressible, settings.multiple_of)
        for module, size in zip(group, found, strict=True):
            if module.unit == "matrix":
                rounded[module.path] = replace(module, rank=size)
            else:
                kept = module.shape[0] if size is None else size
                rounded[module.path] = _keeping(module, kept, settings)
    return rounded
