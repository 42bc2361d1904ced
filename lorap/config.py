"""What a compression is asked to do: ``CompressionConfig`` and the recipe file."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, get_args

from lorap import checks
from lorap.errors import UsageError

RatioScope = Literal["model", "layer"]
Sublayer = Literal["mha", "ffn"]
LowRankMethod = Literal["awsvd", "svd", "asvd", "pca", "afm"]
MhaMethod = Literal["awsvd", "svd", "asvd", "pca", "afm", "heads"]
FfnMethod = Literal["channels", "awsvd", "svd", "asvd", "pca", "afm"]
Importance = Literal["activation", "magnitude", "taylor"]
Selection = Literal["scores", "obs"]
Update = Literal["none", "least-squares"]
Aggregation = Literal["l1", "l2", "linf"]
Weighting = Literal["eq7", "eq6"]
MeasuredAllocation = Literal["mgaa", "mgaa-between", "mgaa-within", "marginal"]
Device = Literal["auto", "cpu", "cuda"]
Activations = Literal["auto", "device", "cpu", "disk"]
DType = Literal["float64", "float32", "bfloat16", "float16"]

Preset = Literal["lorap", "mgaa", "best"]

PRESETS: Mapping[Preset, Mapping[str, Any]] = {
    "lorap": {},
    "mgaa": {"mha": "pca", "ffn": "pca", "joint_qk": True, "allocation": "mgaa"},
    "best": {
        "mha": "pca",
        "selection": "obs",
        "update": "least-squares",
        "dense_target": 0.5,
        "refine": 20,
        "allocation": "marginal",
    },
}
"""Defaults that a preset puts in the place of the usual ones."""

SMALLEST_RIDGE = 1e-6
"""Above what the rounding of a moment can take off an eigenvalue of the correlations."""

DEFAULT_ALLOCATION = 3.0
"""Parameters of v and o against those of q and k in the paper."""

LARGEST_ALLOCATION = 1000.0
"""Bound of the allocation; its inverse is the other."""


@dataclass(frozen=True)
class Override:
    """A setting of its own for the modules that a pattern names.

    Exactly one of `skip`, `ratio`, `rank`, `width` and `kv_heads` is given.

    Attributes
    ----------
    match : str
        Glob over module names such as ``layers.3.self_attn.q_proj`` and ``layers.3.mlp``; naming a
        parent (``layers.3``, ``layers.[0-3].self_attn``) names all modules below it. Where several
        overrides name a module, the last one counts.
    skip : bool
        Leave the modules as they are.
    ratio : float
        Share of the modules' parameters to remove.
    rank : int
        Rank of projections.
    width : int
        Channels of feed-forward blocks.
    kv_heads : int
        Key/value heads of attention blocks whose heads are pruned.
    """

    match: str
    skip: bool = False
    ratio: float | None = None
    rank: int | None = None
    width: int | None = None
    kv_heads: int | None = None

    def __post_init__(self) -> None:
        where = f"override {self.match!r}"
        if not isinstance(self.match, str) or not self.match:
            raise UsageError(f"override: expected a pattern under match, got {self.match!r}")
        if type(self.skip) is not bool:
            raise UsageError(f"{where}: expected true or false under skip, got {self.skip!r}")
        given = [
            name
            for name in ("skip", "ratio", "rank", "width", "kv_heads")
            if getattr(self, name) not in (None, False)
        ]
        if len(given) != 1:
            raise UsageError(
                f"{where}: expected exactly one of skip: true, ratio, rank, width and kv_heads, "
                f"got {', '.join(given) or 'none'}"
            )
        if self.ratio is not None:
            object.__setattr__(self, "ratio", _ratio(self.ratio, where))
        for name in ("rank", "width", "kv_heads"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, checks.whole_number(f"{where}: {name}", value, 1))


class _NoEffectError(UsageError):
    """A setting that nothing would obey beside the others."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


@dataclass(frozen=True)
class CompressionConfig:
    """The settings of a compression; every field is an option of ``lorap compress``.

    Attributes
    ----------
    ratio : float or None
        Share of parameters to remove, between 0 and 1, both excluded. None only where `overrides`
        fix every module.
    ratio_scope : {"model", "layer"}
        Whether `ratio` is of all parameters (App. C.1 turns it into the layer ratio) or of the
        compressible ones of each layer.
    mha : {"awsvd", "svd", "asvd", "pca", "afm", "heads"}
        What becomes of attention: low-rank projections by the method named, or fewer heads.
    ffn : {"channels", "awsvd", "svd", "asvd", "pca", "afm"}
        What becomes of the feed-forward blocks: fewer channels, or low-rank projections.
    joint_qk : bool
        Factor q and k together, with one right factor for both.
    allocation : float or {"mgaa", "mgaa-between", "mgaa-within", "marginal"}
        Parameters of v and o against those of q and k (Section 3.2), from 0.001 to 1000; or as
        MGAA has it: ratios by the similarity of a sub-layer's input and output (between), ranks
        by a common retained energy (within), or both. Or ``marginal``: each module of the model
        by the errors of its sizes, and by how much the model minds when it alone is approximated.
    mgaa_alpha : float
        How far MGAA's ratios spread, in standard deviations of the similarity; at least 0.
    mgaa_floor : float
        Share of its even part that a sub-layer, and a matrix, keeps at least, from 0 to 1; with
        ``marginal`` every module.
    multiple_of : int
        Round ranks and widths to multiples of this; layers differ so that the model keeps its size.
    importance : {"activation", "magnitude", "taylor"}
        Score of a single weight, for channels and heads: its magnitude times the norm of its input
        (Eq. 1), its magnitude, or its magnitude times that of the loss's gradient.
    least_important : float
        Share of least important channels that is kept (Eq. 11).
    aggregation : {"l2", "l1", "linf"}
        How the scores of a channel's weights are put together (Eq. 8).
    selection : {"scores", "obs"}
        How the channels that stay are chosen: by their scores, or removed one by one by what each
        costs in the outputs of down after the others have made up for it (optimal brain surgeon).
    update : {"none", "least-squares"}
        What becomes of down after channels are removed, and of o after heads are: the weights that
        stay, or those that come nearest to the outputs with all channels or heads.
    dense_target : float or None
        Fit each matrix, those that stay dense too, to outputs between its own at the compressed
        model's inputs (0) and the uncompressed model's (1), stage by stage: o and down see what is
        compressed before them. None: each matrix is approximated as it is.
    refine : int
        Iterations of conjugate gradients that bring each compressed layer's outputs nearer to the
        uncompressed model's, all of its matrices together; 0 for none.
    ridge : float
        Share of an input feature's sum of squares that ``obs``, ``least-squares``, `dense_target`
        and `refine` add to it, from 1e-6 to 1.
    weighting : {"eq7", "eq6"}
        Whether the squared errors are weighted by the squared norms (Eq. 7) or the norms (Eq. 6).
    asvd_alpha : float
        Power of the mean magnitude that weights a feature in ``asvd``; at least 0.
    sublayers : tuple of {"mha", "ffn"}
        Sub-layers to compress; a text such as ``mha,ffn`` and a list are taken too.
    samples, seqlen : int
        Calibration samples and tokens in each.
    seed : int
        Of the choice of calibration samples.
    batch_size : int or None
        Samples in a forward; None takes about 1024 tokens on a CPU, 8192 on a GPU.
    device : {"auto", "cpu", "cuda"}
        ``auto`` takes the GPU where there is one; a model in memory stays where it is.
    activations : {"auto", "device", "cpu", "disk"}
        Where the samples' hidden states wait between layers; ``auto`` takes the first place in
        which they fit.
    dtype : str or None
        Of the computation outside the decompositions; None takes the checkpoint's own.
    overrides : tuple of Override
        Settings per layer or module.

    Raises
    ------
    UsageError
        If a value is out of range, or has no effect beside the others; the message names the
        option.
    """

    ratio: float | None = None
    ratio_scope: RatioScope = "model"
    mha: MhaMethod = "awsvd"
    ffn: FfnMethod = "channels"
    joint_qk: bool = False
    allocation: float | MeasuredAllocation = DEFAULT_ALLOCATION
    mgaa_alpha: float = 0.35
    mgaa_floor: float = 0.25
    multiple_of: int = 1
    importance: Importance = "activation"
    least_important: float = 0.01
    aggregation: Aggregation = "l2"
    selection: Selection = "scores"
    update: Update = "none"
    dense_target: float | None = None
    refine: int = 0
    ridge: float = 1e-4
    weighting: Weighting = "eq7"
    asvd_alpha: float = 0.5
    sublayers: tuple[Sublayer, ...] = ("mha", "ffn")
    samples: int = 128
    seqlen: int = 128
    seed: int = 0
    batch_size: int | None = None
    device: Device = "auto"
    activations: Activations = "auto"
    dtype: DType | None = None
    overrides: tuple[Override, ...] = field(default=())

    def __post_init__(self) -> None:
        def store(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.ratio is not None:
            store("ratio", _ratio(self.ratio, "ratio"))
        checks.choice("ratio_scope", self.ratio_scope, get_args(RatioScope))
        checks.choice("mha", self.mha, get_args(MhaMethod))
        checks.choice("ffn", self.ffn, get_args(FfnMethod))
        checks.choice("importance", self.importance, get_args(Importance))
        if type(self.joint_qk) is not bool:
            raise UsageError(f"joint_qk: expected true or false, got {self.joint_qk!r}")
        store("allocation", _allocation(self.allocation))
        for name in ("mgaa_alpha", "asvd_alpha"):
            store(name, checks.number(name, getattr(self, name)))
            if getattr(self, name) < 0:
                raise UsageError(f"{name}: expected at least 0, got {getattr(self, name)!r}")
        store("mgaa_floor", checks.number("mgaa_floor", self.mgaa_floor))
        if not 0 <= self.mgaa_floor <= 1:
            raise UsageError(f"mgaa_floor: expected a share from 0 to 1, got {self.mgaa_floor!r}")
        store("least_important", checks.number("least_important", self.least_important))
        if not 0 <= self.least_important < 1:
            raise UsageError(
                f"least_important: expected a share of at least 0 and below 1, "
                f"got {self.least_important!r}"
            )
        checks.choice("aggregation", self.aggregation, get_args(Aggregation))
        checks.choice("selection", self.selection, get_args(Selection))
        checks.choice("update", self.update, get_args(Update))
        if self.dense_target is not None:
            store("dense_target", checks.number("dense_target", self.dense_target))
            if not 0 <= self.dense_target <= 1:
                raise UsageError(
                    f"dense_target: expected a share from 0 to 1, got {self.dense_target!r}"
                )
        store("ridge", checks.number("ridge", self.ridge))
        if not SMALLEST_RIDGE <= self.ridge <= 1:
            raise UsageError(
                f"ridge: expected a share from {SMALLEST_RIDGE:g} to 1, got {self.ridge!r}"
            )
        checks.choice("weighting", self.weighting, get_args(Weighting))
        store("sublayers", _sublayers(self.sublayers))
        if not self.sublayers or len(set(self.sublayers)) != len(self.sublayers):
            raise UsageError(f"sublayers: expected mha, ffn or both, got {list(self.sublayers)}")
        for sublayer in self.sublayers:
            checks.choice("sublayers", sublayer, get_args(Sublayer))
        for name, minimum in (
            ("multiple_of", 1),
            ("refine", 0),
            ("samples", 1),
            ("seqlen", 1),
            ("seed", 0),
        ):
            store(name, checks.whole_number(name, getattr(self, name), minimum))
        if self.batch_size is not None:
            store("batch_size", checks.whole_number("batch_size", self.batch_size, 1))
        checks.choice("device", self.device, get_args(Device))
        checks.choice("activations", self.activations, get_args(Activations))
        if self.dtype is not None:
            checks.choice("dtype", self.dtype, get_args(DType))
        given: object = self.overrides
        if not isinstance(given, list | tuple):
            raise UsageError(f"overrides: expected a sequence of Override, got {_kind(given)}")
        store("overrides", tuple(given))
        for override in given:
            if not isinstance(override, Override):
                raise UsageError(f"overrides: expected Override, got {override!r}")
        self._check_effects()

    def _check_effects(self) -> None:
        """Refuse what nothing would obey."""
        methods = {getattr(self, sublayer) for sublayer in self.sublayers}
        pruned = methods & {"channels", "heads"}
        by_loss = self.selection == "obs" and "channels" in methods
        scored = pruned - {"channels"} if by_loss else pruned
        scores = ("selection scores" if by_loss else "ffn channels") + " or mha heads"
        low_rank = methods & set(get_args(LowRankMethod))
        attention = "mha" in self.sublayers and self.mha != "heads"
        numeric = isinstance(self.allocation, float)
        refitted = self.selection == "obs" and self.update == "least-squares"
        has_curves = "heads" not in methods and ("channels" not in methods or refitted)
        allocated = {
            "marginal": (
                has_curves,
                "low rank, or channels by selection obs and update least-squares, in all sublayers",
            ),
            "mgaa-within": (bool(low_rank), "a low-rank method"),
        }
        needed = {
            "mha": ("mha" in self.sublayers, "mha among the sublayers"),
            "ffn": ("ffn" in self.sublayers, "ffn among the sublayers"),
            "joint_qk": (attention, "low-rank attention"),
            "allocation": allocated.get(
                str(self.allocation),
                (attention or self.measures_similarity, "low-rank attention"),
            ),
            "mgaa_alpha": (self.measures_similarity, "allocation mgaa or mgaa-between"),
            "mgaa_floor": (not numeric, "allocation mgaa, mgaa-between, mgaa-within or marginal"),
            "multiple_of": (methods != {"heads"}, "a low-rank method or ffn channels"),
            "importance": (bool(scored), scores),
            "least_important": (bool(scored), scores),
            "aggregation": (bool(scored), scores),
            "selection": ("channels" in methods, "ffn channels"),
            "update": (bool(pruned), "ffn channels or mha heads"),
            "ridge": (
                by_loss or (bool(pruned) and self.update != "none") or self.carries_dense,
                "selection obs, update least-squares, dense_target or refine",
            ),
            "weighting": ("awsvd" in methods, "mha or ffn awsvd"),
            "asvd_alpha": ("asvd" in methods, "mha or ffn asvd"),
        }
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            obeyed, what = needed.get(field_.name, (True, ""))
            if value != field_.default and not obeyed:
                raise _NoEffectError(
                    field_.name, f"{field_.name} {value}: has no effect without {what}"
                )

    @classmethod
    def from_preset(cls, preset: Preset, **settings: Any) -> Self:
        """Return the settings that a preset stands for, but for those given.

        Parameters
        ----------
        preset : {"lorap", "mgaa", "best"}
            ``lorap``: the paper. ``mgaa``: MGAA, all matrices by PCA of the outputs, q and k
            together. ``best``: the settings that keep most of the model, by the measurements in
            ``bench/RESULTS.md``.
        **settings
            Win over the preset. What of the preset has no effect beside them is left out.

        Raises
        ------
        UsageError
            If there is no such preset, or as for the class.
        """
        checks.choice("preset", preset, get_args(Preset))
        defaults = dict(PRESETS[preset])
        while True:
            try:
                return cls(**(defaults | settings))
            except _NoEffectError as error:
                if error.name in settings or error.name not in defaults:
                    raise
                del defaults[error.name]

    @property
    def measures_similarity(self) -> bool:
        """Whether the sub-layers' ratios come from the similarity of their inputs and outputs."""
        return self.allocation in ("mgaa", "mgaa-between")

    @property
    def pruned_sublayers(self) -> tuple[Sublayer, ...]:
        """Sub-layers that lose channels or heads."""
        return tuple(s for s in self.sublayers if getattr(self, s) in ("channels", "heads"))

    @property
    def energy_sublayers(self) -> tuple[Sublayer, ...]:
        """Sub-layers whose ranks come from the retained energy of all their matrices."""
        if self.allocation not in ("mgaa", "mgaa-within"):
            return ()
        return tuple(s for s in self.sublayers if s not in self.pruned_sublayers)

    @property
    def even_allocation(self) -> float:
        """Parameters of v and o against those of q and k, where ratios are even."""
        if isinstance(self.allocation, float):
            return self.allocation
        return DEFAULT_ALLOCATION if self.is_marginal else 1.0

    @property
    def is_marginal(self) -> bool:
        """Whether all sizes come from errors and sensitivities (``allocation`` marginal)."""
        return self.allocation == "marginal"

    @property
    def spectrum_sublayers(self) -> tuple[Sublayer, ...]:
        """Sub-layers whose matrices' spectra are measured."""
        if not self.is_marginal:
            return self.energy_sublayers
        return tuple(s for s in self.sublayers if s not in self.pruned_sublayers)

    @property
    def carries_dense(self) -> bool:
        """Whether the uncompressed model's hidden states are carried along."""
        return self.dense_target is not None or self.refine > 0

    @property
    def measures_gradients(self) -> bool:
        """Whether the gradient of the loss is asked for."""
        return self.importance == "taylor"

    @property
    def measures(self) -> bool:
        """Whether a pass over the uncompressed model comes before the plan."""
        return (
            self.measures_similarity
            or bool(self.energy_sublayers)
            or self.measures_gradients
            or self.is_marginal
        )

    def without_measurements(self) -> CompressionConfig:
        """Return the same with a measured allocation replaced by the default one."""
        if isinstance(self.allocation, float):
            return self
        return dataclasses.replace(
            self,
            allocation=DEFAULT_ALLOCATION,
            mgaa_alpha=CompressionConfig.mgaa_alpha,
            mgaa_floor=CompressionConfig.mgaa_floor,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for the report."""
        values = dataclasses.asdict(self)
        values["sublayers"] = list(self.sublayers)
        values["overrides"] = [
            {key: value for key, value in override.items() if value not in (None, False)}
            for override in values["overrides"]
        ]
        return values


@dataclass(frozen=True)
class Recipe:
    """A recipe file: the settings of the compression and of the run around it.

    Attributes
    ----------
    settings : mapping
        Fields of ``CompressionConfig`` that the file gives.
    run : mapping
        Of ``RUN_OPTIONS``, those that the file gives.
    preset : {"lorap", "mgaa", "best"}
    """

    settings: Mapping[str, Any]
    run: Mapping[str, Any]
    preset: Preset = "lorap"


RUN_OPTIONS: Mapping[str, type] = {
    "output": str,
    "calibration": str,
    "field": str,
    "revision": str,
    "overwrite": bool,
    "resume": bool,
    "allow_bin": bool,
}
"""Options of ``lorap compress`` that say where to read and write, with their types in a recipe."""


def load_recipe(path: str | Path) -> Recipe:
    """Read ``recipe.yaml``.

    Parameters
    ----------
    path : path
        A YAML mapping whose keys are the options of ``lorap compress`` with underscores, and
        ``overrides``, a list of mappings with the fields of ``Override``. A key without a value
        counts as not given.

    Raises
    ------
    UsageError
        If the file cannot be read, a key is unknown (the nearest valid one is named) or there
        twice, or a value does not fit. Whether all have an effect is for ``CompressionConfig`` to
        check, together with the options of the command line.
    """
    try:
        # Unlike Path.expanduser, this leaves the name of an unknown user as it is.
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path}: cannot be read: {error}") from error
    content = _parse_yaml(text, path)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"recipe {path}: expected a mapping of options, got {_kind(content)}")
    settings_keys = [f.name for f in dataclasses.fields(CompressionConfig)]
    _check_keys(f"recipe {path}", content, [*settings_keys, "preset", *RUN_OPTIONS])

    content = _given(content)
    settings = {key: value for key, value in content.items() if key in settings_keys}
    if "overrides" in settings:
        settings["overrides"] = _overrides(path, settings["overrides"])
    run = {key: value for key, value in content.items() if key in RUN_OPTIONS}
    for key, value in run.items():
        if type(value) is not RUN_OPTIONS[key]:
            expected = "true or false" if RUN_OPTIONS[key] is bool else "a text"
            raise UsageError(f"recipe {path}: {key}: expected {expected}, got {value!r}")
    preset = content.get("preset", "lorap")
    _RecipeSettings.from_preset(preset, **settings)
    return Recipe(settings=settings, run=run, preset=preset)


class _RecipeSettings(CompressionConfig):
    """Settings that others, from the command line, are still to join: these may give effect."""

    def _check_effects(self) -> None:
        pass


def _parse_yaml(text: str, path: str | Path) -> object:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses keys that are there twice, of which YAML silently takes the last."""

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        raise UsageError(
                            f"recipe {path}: the key {key.value!r} is there twice, again in line "
                            f"{key.start_mark.line + 1}"
                        )
                    seen.add(key.value)
            return node

    try:
        return yaml.load(text, Loader)
    # A date that does not exist is a ValueError, and lists nested too deep a RecursionError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from error


_NUMBER_KEYS = (
    "ratio",
    "allocation",
    "least_important",
    "mgaa_alpha",
    "mgaa_floor",
    "asvd_alpha",
    "dense_target",
    "ridge",
)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are not null; numbers such as 1e-1 are text to YAML 1.1."""
    return {
        key: float(value)
        if key in _NUMBER_KEYS
        and isinstance(value, str)
        and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
        else value
        for key, value in values.items()
        if value is not None
    }


def _overrides(path: str | Path, value: object) -> tuple[Override, ...]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UsageError(
            f"recipe {path}: overrides: expected a list of mappings, got {_kind(value)}"
        )
    keys = [f.name for f in dataclasses.fields(Override)]
    overrides = []
    for index, item in enumerate(value):
        where = f"recipe {path}: overrides[{index}]"
        _check_keys(where, item, keys)
        values = _given(item)
        if "match" not in values:
            raise UsageError(f"{where}: expected a pattern under match")
        overrides.append(Override(**values))
    return tuple(overrides)


def _sublayers(value: object) -> tuple[str, ...]:
    """Return the sub-layers that a text such as ``mha,ffn`` or a list names, not yet checked."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise UsageError(f"sublayers: expected mha, ffn or both, got {value!r}")


def _check_keys(where: str, content: Mapping[Any, Any], valid: Sequence[str]) -> None:
    for key in content:
        if key in valid:
            continue
        nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
        hint = (
            f"the nearest valid one is {nearest[0]!r}" if nearest else f"valid: {', '.join(valid)}"
        )
        raise UsageError(f"{where}: unknown key {key!r}; {hint}")


def _allocation(value: object) -> float | str:
    """Return a weight of v and o against q and k, or the name of another way to allocate."""
    names = get_args(MeasuredAllocation)
    if value in names:
        return str(value)
    expected = (
        f"a number from {1 / LARGEST_ALLOCATION:g} to {LARGEST_ALLOCATION:g}, or one of "
        f"{', '.join(names)}"
    )
    try:
        number = float(value) if isinstance(value, str) else checks.number("allocation", value)
    except (UsageError, ValueError):
        raise UsageError(f"allocation: expected {expected}, got {value!r}") from None
    if not 1 / LARGEST_ALLOCATION <= number <= LARGEST_ALLOCATION:
        raise UsageError(f"allocation: expected {expected}, got {value!r}")
    return number


def _ratio(value: object, where: str) -> float:
    number = checks.number(where, value)
    if not 0 < number < 1:
        raise UsageError(
            f"{where}: expected a ratio above 0 and below 1, the share of parameters to remove, "
            f"got {value!r}"
        )
    return number


def _kind(value: object) -> str:
    return type(value).__name__
