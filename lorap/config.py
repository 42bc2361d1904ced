"""What a compression is asked to do: ``CompressionConfig`` and the recipe file."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

from lorap.errors import UsageError

RatioScope = Literal["model", "layer"]
Sublayer = Literal["mha", "ffn"]
Aggregation = Literal["l1", "l2", "linf"]
Weighting = Literal["eq7", "eq6"]
Device = Literal["auto", "cpu", "cuda"]
DType = Literal["float64", "float32", "bfloat16", "float16"]

LARGEST_ALLOCATION = 1000.0
"""Bound of the allocation; its inverse is the other."""


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
            object.__setattr__(self, "ratio", _ratio(self.ratio, where))
        for name in ("rank", "width"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _int(f"{where}: {name}", value, 1))


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
        Parameters of v and o against those of q and k (Section 3.2), from 0.001 to 1000.
    least_important : float
        Share of least important channels that is kept (Eq. 11).
    aggregation : {"l2", "l1", "linf"}
        How the scores of a channel's weights are put together (Eq. 8).
    weighting : {"eq7", "eq6"}
        Whether the squared errors are weighted by the squared norms (Eq. 7) or the norms (Eq. 6).
    sublayers : tuple of {"mha", "ffn"}
        Sub-layers to compress; a text such as ``mha,ffn`` and a list are taken too.
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
        def store(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.ratio is not None:
            store("ratio", _ratio(self.ratio, "ratio"))
        _check_choice("ratio_scope", self.ratio_scope, get_args(RatioScope))
        store("allocation", _number("allocation", self.allocation))
        if not 1 / LARGEST_ALLOCATION <= self.allocation <= LARGEST_ALLOCATION:
            raise UsageError(
                f"allocation: expected a number from {1 / LARGEST_ALLOCATION:g} to "
                f"{LARGEST_ALLOCATION:g}, got {self.allocation!r}"
            )
        store("least_important", _number("least_important", self.least_important))
        if not 0 <= self.least_important < 1:
            raise UsageError(
                f"least_important: expected a share of at least 0 and below 1, "
                f"got {self.least_important!r}"
            )
        _check_choice("aggregation", self.aggregation, get_args(Aggregation))
        _check_choice("weighting", self.weighting, get_args(Weighting))
        store("sublayers", _sublayers(self.sublayers))
        if not self.sublayers or len(set(self.sublayers)) != len(self.sublayers):
            raise UsageError(f"sublayers: expected mha, ffn or both, got {list(self.sublayers)}")
        for sublayer in self.sublayers:
            _check_choice("sublayers", sublayer, get_args(Sublayer))
        for name, minimum in (("samples", 1), ("seqlen", 1), ("seed", 0)):
            store(name, _int(name, getattr(self, name), minimum))
        if self.batch_size is not None:
            store("batch_size", _int("batch_size", self.batch_size, 1))
        _check_choice("device", self.device, get_args(Device))
        if self.dtype is not None:
            _check_choice("dtype", self.dtype, get_args(DType))
        given: object = self.overrides
        if not isinstance(given, list | tuple):
            raise UsageError(f"overrides: expected a sequence of Override, got {_kind(given)}")
        store("overrides", tuple(given))
        for override in given:
            if not isinstance(override, Override):
                raise UsageError(f"overrides: expected Override, got {override!r}")

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
        ``overrides``, a list of mappings with the fields of ``Override``. A key without a value
        counts as not given.

    Raises
    ------
    UsageError
        If the file cannot be read, a key is unknown (the nearest valid one is named) or there
        twice, or a value does not fit.
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
    _check_keys(f"recipe {path}", content, [*settings_keys, *RUN_OPTIONS])

    content = _given(content)
    settings = {key: value for key, value in content.items() if key in settings_keys}
    if "overrides" in settings:
        settings["overrides"] = _overrides(path, settings["overrides"])
    run = {key: value for key, value in content.items() if key in RUN_OPTIONS}
    for key, value in run.items():
        if type(value) is not RUN_OPTIONS[key]:
            expected = "true or false" if RUN_OPTIONS[key] is bool else "a text"
            raise UsageError(f"recipe {path}: {key}: expected {expected}, got {value!r}")
    CompressionConfig(**settings)
    return Recipe(settings=settings, run=run)


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


_NUMBER_KEYS = ("ratio", "allocation", "least_important")


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


def _ratio(value: object, where: str) -> float:
    number = _number(where, value)
    if not 0 < number < 1:
        raise UsageError(
            f"{where}: expected a ratio above 0 and below 1, the share of parameters to remove, "
            f"got {value!r}"
        )
    return number


def _number(where: str, value: object) -> float:
    """Return a finite number, NumPy's kinds among them, as a float."""
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise UsageError(f"{where}: expected a number, got {value!r}")


def _int(where: str, value: object, minimum: int) -> int:
    """Return a whole number, NumPy's kinds among them, as an int."""
    if not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= minimum:
        return int(value)
    raise UsageError(f"{where}: expected a whole number of at least {minimum}, got {value!r}")


def _check_choice(where: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UsageError(f"{where}: expected one of {', '.join(choices)}, got {value!r}")


def _kind(value: object) -> str:
    return type(value).__name__
