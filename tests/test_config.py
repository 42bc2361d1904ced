"""The settings of a compression, and recipes, where they are right or nearly so."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorap.config import PRESETS, CompressionConfig, Override, load_recipe
from lorap.errors import UsageError


def write(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    "given",
    [
        {"ratio": np.float32(0.25), "samples": np.int64(3), "seed": np.uint8(2)},
        {"ratio": Fraction(1, 4), "allocation": 2, "seqlen": np.int16(9)},
        {"least_important": np.float64(0.5), "batch_size": np.int32(4)},
    ],
)
def test_numbers_of_any_kind_are_stored_as_plain_ones(given: dict[str, Any]) -> None:
    config = CompressionConfig(**given)
    for name, value in given.items():
        stored = getattr(config, name)
        assert stored == value
        assert type(stored) is type(CompressionConfig.__dataclass_fields__[name].default) or (
            name in ("ratio", "batch_size")
            and type(stored) is {"ratio": float, "batch_size": int}[name]
        )
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_numbers_of_an_override_are_stored_as_plain_ones() -> None:
    assert type(Override("layers.0", rank=np.int64(3)).rank) is int
    assert type(Override("layers.0", width=np.int64(3)).width) is int
    assert type(Override("layers.0", ratio=np.float32(0.5)).ratio) is float


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        ({"ratio": True}, "ratio: expected a number, got True"),
        ({"ratio": np.bool_(True)}, "ratio: expected a number"),
        ({"ratio": 1j}, "ratio: expected a number"),
        ({"ratio": "0.2"}, "ratio: expected a number, got '0.2'"),
        ({"samples": True}, "samples: expected a whole number of at least 1, got True"),
        ({"samples": 3.0}, "samples: expected a whole number"),
        ({"samples": np.float64(3)}, "samples: expected a whole number"),
        ({"allocation": 10**400}, "allocation: expected a number"),
        (
            {"allocation": 1000.1},
            "allocation: expected a number from 0.001 to 1000, or one of mgaa",
        ),
        ({"multiple_of": 0}, "multiple_of: expected a whole number of at least 1, got 0"),
        ({"multiple_of": 8.0}, "multiple_of: expected a whole number"),
        ({"refine": -1}, "refine: expected a whole number of at least 0, got -1"),
        ({"refine": True}, "refine: expected a whole number of at least 0, got True"),
        ({"dense_target": 1.01}, "dense_target: expected a share from 0 to 1, got 1.01"),
        ({"ridge": 0}, "ridge: expected a share from 1e-06 to 1, got 0.0"),
        ({"ridge": 1.5}, "ridge: expected a share from 1e-06 to 1"),
        ({"selection": "best"}, "selection: expected one of scores, obs, got 'best'"),
        ({"update": True}, "update: expected one of none, least-squares, got True"),
        ({"sublayers": "mlp"}, "sublayers: expected one of mha, ffn, got 'mlp'"),
        ({"sublayers": ""}, "sublayers"),
        ({"sublayers": None}, "sublayers: expected mha, ffn or both, got None"),
        ({"sublayers": [["mha"]]}, "sublayers: expected mha, ffn or both"),
        ({"sublayers": "mha,mha"}, "sublayers: expected mha, ffn or both"),
        ({"overrides": [{"match": "layers.0"}]}, "overrides: expected Override, got {'match'"),
        ({"overrides": Override("layers.0", skip=True)}, "overrides: expected a sequence"),
        ({"overrides": None}, "overrides: expected a sequence of Override, got NoneType"),
    ],
)
def test_values_of_another_kind_are_refused(given: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UsageError) as caught:
        CompressionConfig(**given)
    assert fragment in str(caught.value)


def test_a_preset_gives_defaults() -> None:
    for name, settings in PRESETS.items():
        config = CompressionConfig.from_preset(name, ratio=0.2)
        assert config == CompressionConfig(ratio=0.2, **settings)
    assert CompressionConfig.from_preset("lorap") == CompressionConfig()


def test_what_is_given_wins_over_a_preset_and_drops_what_has_no_effect_beside_it() -> None:
    best = CompressionConfig.from_preset("best", ffn="pca")
    assert (best.ffn, best.mha, best.selection, best.update) == ("pca", "pca", "scores", "none")
    mgaa = CompressionConfig.from_preset("mgaa", mha="heads", ffn="channels")
    assert (mgaa.joint_qk, mgaa.allocation) == (False, "mgaa")
    with pytest.raises(UsageError, match="importance taylor: has no effect"):
        CompressionConfig.from_preset("best", importance="taylor")
    with pytest.raises(UsageError, match="expected one of lorap, mgaa, best, got 'paper'"):
        CompressionConfig.from_preset("paper")  # type: ignore[arg-type]


@pytest.mark.parametrize("allocation", [0.001, 1, 1000])
def test_bounds_of_the_allocation_are_taken(allocation: float) -> None:
    assert CompressionConfig(allocation=allocation).allocation == allocation


@pytest.mark.parametrize("given", ["mha", ["mha"], ("mha",)])
def test_sublayers_as_text_or_sequence(given: Any) -> None:
    assert CompressionConfig(sublayers=given).sublayers == ("mha",)


def test_sublayers_as_text_may_be_spaced() -> None:
    assert CompressionConfig(sublayers="ffn, mha").sublayers == ("ffn", "mha")  # type: ignore[arg-type]


def test_numbers_of_a_recipe_may_have_an_exponent(tmp_path: Path) -> None:
    text = "ratio: 2e-1\nallocation: 1e+0\nleast_important: .5E-1\nrevision: 12e4567\n"
    text += "overrides: [{match: layers.0, ratio: 1e-1}]\n"
    recipe = load_recipe(write(tmp_path, text))
    config = CompressionConfig(**recipe.settings)
    assert (config.ratio, config.allocation, config.least_important) == (0.2, 1.0, 0.05)
    assert config.overrides[0].ratio == 0.1
    assert recipe.run == {"revision": "12e4567"}


def test_null_in_a_recipe_is_not_given(tmp_path: Path) -> None:
    keys = [*CompressionConfig.__dataclass_fields__, "output", "calibration", "field", "revision"]
    text = "".join(f"{key}: null\n" for key in (*keys, "overwrite", "allow_bin"))
    recipe = load_recipe(write(tmp_path, text))
    assert (recipe.settings, recipe.run) == ({}, {})
    text = "overrides: [{match: layers.0, rank: 3, width: null, skip: null, ratio:}]\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.settings == {"overrides": (Override("layers.0", rank=3),)}


def test_an_anchor_may_be_merged_into_several_overrides(tmp_path: Path) -> None:
    text = "overrides:\n- &x {match: layers.0, rank: 3}\n- {<<: *x, match: layers.1}\n"
    recipe = load_recipe(write(tmp_path, text))
    assert recipe.settings["overrides"] == (
        Override("layers.0", rank=3),
        Override("layers.1", rank=3),
    )


def test_a_setting_of_a_recipe_may_take_effect_by_an_option(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "ratio: 0.2\nasvd_alpha: 1.0\nmgaa_alpha: 0.5\n"))
    config = CompressionConfig(**recipe.settings, mha="asvd", allocation="mgaa")
    assert (config.asvd_alpha, config.mgaa_alpha) == (1.0, 0.5)
    with pytest.raises(UsageError, match="has no effect"):
        CompressionConfig(**recipe.settings)
    with pytest.raises(UsageError, match="asvd_alpha: expected at least 0"):
        load_recipe(write(tmp_path, "asvd_alpha: -1\n"))
