"""What a compression is asked to do: ``CompressionConfig`` and the recipe file."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lorap.errors import UsageError

RatioScope = Literal["model", "layer"]
Sublayer = Literal["mha", "ffn"]
Aggregation = Literal["l1", "l2", "linf"]
Weighting = Literal["eq7", "eq6"]
Device = Literal["auto", "cpu", "cuda"]
DType = Literal["float64", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Override:
    """A setting of its own for the modules that a pattern names.

    Exactly one of `skip`, `ratio`, `rank` and `width` is given.

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
        Rank of attention projections.
    width : int
        Channels of feed-forward blocks.
    """

    match: str
    skip: bool = False
    ratio: float | None = None
    rank: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        where = f"override {self.match!r}"
        if not isinstance(self.match, str) or not self.match:
            raise UsageError(f"override: expected a pattern under match, got {self.match!r}")
        if type(self.skip) is not bool:
            raise UsageError(f"{where}: expected true or false under skip, got {self.skip!r}")
        given = [
            name
            for name in ("skip", "ratio", "rank", "width")
            if getattr(self, name) not in (None, False)
        ]
        if len(given) != 1:
            raise UsageError(
                f"{where}: expected exactly one of skip: true, ratio, rank and width, "
                f"got {', '.join(given) or 'none'}"
            )
        if self.ratio is not None:
            _check_ratio(self.ratio, where)
        for name in ("rank", "width"):
            value = getattr(self, name)
            if value is not None:
                _check_int(f"{where}: {name}", value, 1)


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
    allocation : float
        Parameters of v and o against those of q and k (Section 3.2).
    least_important : float
        Share of least important channels that is kept (Eq. 11).
    aggregation : {"l2", "l1", "linf"}
        How the scores of a channel's weights are put together (Eq. 8).
    weighting : {"eq7", "eq6"}
        Whether the squared errors are weighted by the squared norms (Eq. 7) or the norms (Eq. 6).
    sublayers : tuple of {"mha", "ffn"}
        Sub-layers to compress.
    samples, seqlen : int
        Calibration samples and tokens in each.
    seed : int
        Of the choice of calibration samples.
    batch_size : int or None
        Samples in a forward; None takes about 8192 tokens.
    device : {"auto", "cpu", "cuda"}
        ``auto`` takes the GPU where there is one; a model in memory stays where it is.
    dtype : str or None
        Of the computation outside the decompositions; None takes the checkpoint's own.
    overrides : tuple of Override
        Settings per layer or module.

    Raises
    ------
    UsageError
        If a value is out of range; the message names the option.
    """

    ratio: float | None = None
    ratio_scope: RatioScope = "model"
    allocation: float = 3.0
    least_important: float = 0.01
    aggregation: Aggregation = "l2"
    weighting: Weighting = "eq7"
    sublayers: tuple[Sublayer, ...] = ("mha", "ffn")
    samples: int = 128
    seqlen: int = 128
    seed: int = 0
    batch_size: int | None = None
    device: Device = "auto"
    dtype: DType | None = None
    overrides: tuple[Override, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.ratio is not None:
            _check_ratio(self.ratio, "ratio")
        _check_choice("ratio_scope", self.ratio_scope, get_args(RatioScope))
        _check_number("allocation", self.allocation)
        if self.allocation <= 0:
            raise UsageError(f"allocation: expected a number above 0, got {self.allocation!r}")
        _check_number("least_important", self.least_important)
        if not 0 <= self.least_important < 1:
            raise UsageError(
                f"least_important: expected a share of at least 0 and below 1, "
                f"got {self.least_important!r}"
            )
        _check_choice("aggregation", self.aggregation, get_args(Aggregation))
        _check_choice("weighting", self.weighting, get_args(Weighting))
        object.__setattr__(self, "sublayers", tuple(self.sublayers))
        if not self.sublayers or len(set(self.sublayers)) != len(self.sublayers):
            raise UsageError(f"sublayers: expected mha, ffn or both, got {list(self.sublayers)}")
        for sublayer in self.sublayers:
            _check_choice("sublayers", sublayer, get_args(Sublayer))
        _check_int("samples", self.samples, 1)
        _check_int("seqlen", self.seqlen, 1)
        _check_int("seed", self.seed, 0)
        if self.batch_size is not None:
            _check_int("batch_size", self.batch_size, 1)
        _check_choice("device", self.device, get_args(Device))
        if self.dtype is not None:
            _check_choice("dtype", self.dtype, get_args(DType))
        object.__setattr__(self, "overrides", tuple(self.overrides))

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
    """

    settings: Mapping[str, Any]
    run: Mapping[str, Any]


RUN_OPTIONS: Mapping[str, type] = {
    "output": str,
    "calibration": str,
    "field": str,
    "revision": str,
    "overwrite": bool,
    "allow_bin": bool,
}
"""Options of ``lorap compress`` that say where to read and write, with their types in a recipe."""


def load_recipe(path: str | Path) -> Recipe:
    """Read ``recipe.yaml``.

    Parameters
    ----------
    path : path
        A YAML mapping whose keys are the options of ``lorap compress`` with underscores, and
        ``overrides``, a list of mappings with the fields of ``Override``.

    Raises
    ------
    UsageError
        If the file cannot be read, a key is unknown (the nearest valid one is named) or a value
        does not fit.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {path}: not YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"recipe {path}: expected a mapping of options, got {_kind(content)}")
    settings_keys = [f.name for f in dataclasses.fields(CompressionConfig)]
    _check_keys(f"recipe {path}", content, [*settings_keys, *RUN_OPTIONS])

    settings = {key: value for key, value in content.items() if key in settings_keys}
    if "sublayers" in settings:
        settings["sublayers"] = parse_sublayers(settings["sublayers"])
    if "overrides" in settings:
        settings["overrides"] = _overrides(path, settings["overrides"])
    run = {key: value for key, value in content.items() if key in RUN_OPTIONS}
    for key, value in run.items():
        if type(value) is not RUN_OPTIONS[key]:
            expected = "true or false" if RUN_OPTIONS[key] is bool else "a text"
            raise UsageError(f"recipe {path}: {key}: expected {expected}, got {value!r}")
    CompressionConfig(**settings)
    return Recipe(settings=settings, run=run)


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
        if "match" not in item:
            raise UsageError(f"{where}: expected a pattern under match")
        overrides.append(Override(**item))
    return tuple(overrides)


def parse_sublayers(value: object) -> tuple[str, ...]:
    """Return the sub-layers that a text such as ``mha,ffn`` or a list names, not yet checked.

    Raises
    ------
    UsageError
        If it is neither.
    """
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise UsageError(f"sublayers: expected mha, ffn or both, got {value!r}")


def _check_keys(where: str, content: Mapping[Any, Any], valid: Sequence[str]) -> None:
    for key in content:
        if key in valid:
            continue
        nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.0)[0]
        raise UsageError(f"{where}: unknown key {key!r}; the nearest valid one is {nearest!r}")


def _check_ratio(value: object, where: str) -> None:
    _check_number(where, value)
    if not 0 < value < 1:  # type: ignore[operator]  # a number, by the check above
        raise UsageError(
            f"{where}: expected a ratio above 0 and below 1, the share of parameters to remove, "
            f"got {value!r}"
        )


def _check_number(where: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{where}: expected a number, got {value!r}")


def _check_int(where: str, value: object, minimum: int) -> None:
    if type(value) is not int or value < minimum:
        raise UsageError(f"{where}: expected a whole number of at least {minimum}, got {value!r}")


def _check_choice(where: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{where}: expected one of {', '.join(choices)}, got {value!r}")


def _kind(value: object) -> str:
    return type(value).__name__
