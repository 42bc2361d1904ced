"""Ranks, widths and sizes from a configuration alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lorap.config import CompressionConfig, Override
from lorap.errors import UsageError
from lorap.families import family_of
from lorap.plan import Measurements, Plan, make_plan
from tests.tiny_models import VARIANTS, tiny_config, tiny_model

LLAMA_7B = LlamaConfig(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
)
LLAMA_13B = LlamaConfig(
    vocab_size=32000,
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
)
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def plan(config: LlamaConfig, **settings: Any) -> Plan:
    overrides = tuple(Override(**override) for override in settings.pop("overrides", ()))
    return make_plan(config, family_of(config), CompressionConfig(**settings, overrides=overrides))


@pytest.mark.spec("budget.ranks.square", "budget.channels")
@pytest.mark.parametrize(
    ("config", "ratio", "q", "v", "width", "billions", "removed"),
    [
        (LLAMA_7B, 0.20, 1228, None, 8807, 5.4430, 0.1922),
        (LLAMA_7B, 0.2081, 1195, None, 8718, 5.3907, 0.2000),
        (LLAMA_7B, 0.30, 819, None, 7706, 4.7957, 0.2883),
        (LLAMA_7B, 0.40, 614, 1842, 6605, 4.1473, 0.3845),
        (LLAMA_7B, 0.50, 512, 1536, 5504, 3.5004, 0.4805),
        (LLAMA_7B, 0.5203, 491, 1473, 5281, 3.3687, 0.5001),
        (LLAMA_13B, 0.20, 1536, None, 11059, 10.478, 0.1950),
        (LLAMA_13B, 0.50, 640, 1920, 6912, 6.672, 0.4874),
    ],
)
def test_the_authors_sizes_in_layer_scope(
    config: LlamaConfig,
    ratio: float,
    q: int,
    v: int | None,
    width: int,
    billions: float,
    removed: float,
) -> None:
    result = plan(config, ratio=ratio, ratio_scope="layer")
    for layer in result.layers:
        ranks = [layer[f"self_attn.{name}_proj"].rank for name in "qkvo"]
        assert ranks == [q, q, v, v]
        assert layer["mlp"].width == width
    assert result.parameters / 1e9 == pytest.approx(billions, abs=6e-4)
    assert result.achieved_ratio == pytest.approx(removed, abs=5.1e-5)


@pytest.mark.spec("budget.layer-ratio")
@pytest.mark.parametrize(
    ("config", "factor"), [(LLAMA_7B, 1.04052), (LLAMA_13B, 1.02586)], ids=["7B", "13B"]
)
def test_factor_of_table_13(config: LlamaConfig, factor: float) -> None:
    # 4 attention and 3 feed-forward matrices in a layer, as lorap counts them too.
    assert plan(config, ratio=0.2).layer_ratio == pytest.approx(0.2 * factor, rel=1e-5)


@pytest.mark.spec("budget.slack")
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.2, 1 / 3, 0.35, 0.5, 0.6])
@pytest.mark.parametrize("variant", [*VARIANTS, "llama-3-8b"])
def test_model_scope_meets_the_ratio_to_one_rank_and_one_channel(
    ratio: float, variant: str
) -> None:
    config = LLAMA_3_8B if variant == "llama-3-8b" else tiny_config(**VARIANTS[variant])
    result = plan(config, ratio=ratio)
    shapes = family_of(config).tensor_shapes(family_of(config).compressed_config(config, None))
    slack = 0
    for layer in range(config.num_hidden_layers):
        for name in "qkvo":
            slack += sum(shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"])
        slack += 3 * config.hidden_size + 2 * config.mlp_bias
    removed = result.parameters_before - result.parameters
    assert abs(removed - ratio * result.parameters_before) <= slack


@pytest.mark.spec("budget.layer-ratio")
@pytest.mark.parametrize("ratio", [0.2, 0.35])
@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_are_those_of_the_model_that_is_built(variant: str, ratio: float) -> None:
    config = tiny_config(**VARIANTS[variant])
    family = family_of(config)
    result = plan(config, ratio=ratio, overrides=[{"match": "layers.1", "skip": True}])
    with torch.device("meta"):
        built = family.model_class(family.compressed_config(config, result.structure()))
    dense = tiny_model(**VARIANTS[variant])
    assert result.parameters_before == sum(p.numel() for p in dense.parameters())
    assert result.parameters == sum(p.numel() for p in built.parameters())
    for index, layer in enumerate(result.layers):
        for name, module in layer.items():
            parts = [p.numel() for p in built.model.layers[index].get_submodule(name).parameters()]
            assert module.parameters == sum(parts)


def test_macs_of_a_dense_and_a_compressed_layer_by_hand() -> None:
    config = tiny_config(num_hidden_layers=1)
    result = plan(config, ratio=0.3, ratio_scope="layer", seqlen=10)
    # 4 projections of 32 x 32, 3 of 32 x 48, the head of 96 x 32, and two products of attention.
    assert result.macs_before == 10 * (4 * 32 * 32 + 3 * 32 * 48 + 96 * 32) + 2 * 32 * 10 * 10
    module = result.layers[0]["self_attn.q_proj"]
    assert module.macs == 10 * module.rank * 64
    saved = sum(m.macs_before - m.macs for m in result.layers[0].values())
    assert result.macs == result.macs_before - saved


@pytest.mark.spec("budget.reachable")
@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("sublayers", [("mha",), ("ffn",), ("mha", "ffn")])
def test_the_largest_reachable_ratio_is_reachable_and_a_little_more_is_not(
    scope: str, sublayers: tuple[str, ...]
) -> None:
    settings = {"ratio_scope": scope, "sublayers": sublayers}
    with pytest.raises(UsageError, match="the largest reachable is") as caught:
        plan(LLAMA_7B, ratio=0.9999, **settings)
    largest = float(str(caught.value).rsplit(" ", 1)[1])
    assert 0.25 < largest < 1
    plan(LLAMA_7B, ratio=largest, **settings)
    with pytest.raises(UsageError, match=rf"largest reachable is {largest}"):
        plan(LLAMA_7B, ratio=largest + 2e-4, **settings)


@pytest.mark.spec("budget.reachable", "budget.channels")
def test_a_band_up_to_the_last_channel_is_refused() -> None:
    """Of 48 channels 24 stay at the low end, and the other 24 would go."""
    settings: dict[str, Any] = {"sublayers": ("ffn",), "ratio_scope": "layer", "ratio": 0.5}
    with pytest.raises(UsageError, match=r"no channel is left .* beside the 24 least important"):
        plan(tiny_config(), least_important=0.5, **settings)
    (layer, *_) = plan(tiny_config(), least_important=0.49, **settings).layers
    assert layer["mlp"].band == (23, 47)


@pytest.mark.spec("budget.ranks")
def test_allocation_is_what_v_and_o_get_of_what_q_and_k_get() -> None:
    for allocation, q, v in ((1, 1024, 1024), (3, 512, 1536), (0.5, 1365, 682)):
        (layer, *_) = plan(LLAMA_7B, ratio=0.5, ratio_scope="layer", allocation=allocation).layers
        assert [layer[f"self_attn.{name}_proj"].rank for name in "qkvo"] == [q, q, v, v]


def sizes_of(result: Plan, name: str) -> list[int | None]:
    modules = [layer[name] for layer in result.layers]
    return [m.rank if m.kind == "low_rank" else m.width for m in modules]


@pytest.mark.spec("budget.multiple")
@pytest.mark.parametrize("multiple", [8, 64, 128, 96])
@pytest.mark.parametrize(("ratio", "scope"), [(0.2, "model"), (0.5, "model"), (0.34, "layer")])
def test_sizes_are_multiples_and_the_model_keeps_its_size(
    multiple: int, ratio: float, scope: str
) -> None:
    exact = plan(LLAMA_7B, ratio=ratio, ratio_scope=scope)
    result = plan(LLAMA_7B, ratio=ratio, ratio_scope=scope, multiple_of=multiple)
    slack = 0
    for name, cost in [*((f"self_attn.{m}_proj", 8192) for m in "qkvo"), ("mlp", 3 * 4096)]:
        sizes, due = sizes_of(result, name), sizes_of(exact, name)
        assert all(size is None or size % multiple == 0 for size in sizes)
        near = zip(sizes, due, strict=True)
        assert all(abs(s - d) <= multiple for s, d in near if s is not None and d is not None)
        held, was = (sum(layer[name].parameters for layer in p.layers) for p in (result, exact))
        assert abs(held - was) <= multiple * cost / 2
        slack += multiple * cost // 2
    assert abs(result.parameters - exact.parameters) <= slack
    # The half of a multiple for all 32 layers; 128 misses the ratio by less than a thousandth.
    assert abs(result.achieved_ratio - exact.achieved_ratio) < 1e-3


@pytest.mark.spec("budget.multiple")
def test_layers_differ_by_a_multiple_and_a_rank_at_the_dense_size_stays_dense() -> None:
    """Layer scope, 20%: ranks of 1228 and 8807 channels. At 34% v and o are due 2026 of 2048."""
    result = plan(LLAMA_7B, ratio=0.2, ratio_scope="layer", multiple_of=128)
    assert sizes_of(result, "self_attn.q_proj")[:5] == [1280, 1152, 1280, 1152, 1280]
    assert sizes_of(result, "self_attn.v_proj") == [None] * 32
    assert set(sizes_of(result, "mlp")) == {8704, 8832}
    result = plan(LLAMA_7B, ratio=0.34, ratio_scope="layer", multiple_of=128)
    assert sizes_of(result, "self_attn.v_proj")[:4] == [None, None, 1920, None]


@pytest.mark.spec("budget.multiple", "budget.overrides")
def test_sizes_of_their_own_are_kept_and_ratios_of_their_own_are_rounded_apart() -> None:
    result = plan(
        LLAMA_7B,
        ratio=0.2,
        ratio_scope="layer",
        multiple_of=128,
        overrides=[
            {"match": "layers.0.self_attn.q_proj", "rank": 1000},
            {"match": "layers.1.mlp", "width": 8807},
            {"match": "layers.3", "skip": True},
            {"match": "layers.[46]", "ratio": 0.3},
        ],
    )
    # Layers 1, 2, 5 and 7 are due 1228, 1176, 1252 and 1200; layers 4 and 6 are due 819 and 870.
    ranks = sizes_of(result, "self_attn.q_proj")[:8]
    assert ranks == [1000, 1280, 1152, None, 768, 1280, 896, 1152]
    # Layers 0, 2 and 5 are due 8807, 8782 and 8757; layers 4 and 6 are due 7706 and 7732.
    assert sizes_of(result, "mlp")[:7] == [8832, 8807, 8832, 11008, 7680, 8704, 7680]


@pytest.mark.spec("budget.multiple", "budget.channels")
@pytest.mark.parametrize(("least", "band"), [(0.1, (4, 20)), (0.75, (31, 47))])
def test_a_rounded_width_keeps_the_least_important_but_for_one_of_the_top(
    least: float, band: tuple[int, int]
) -> None:
    """Of 48 channels 37 are due: 32."""
    result = plan(
        tiny_config(num_hidden_layers=1),
        ratio=0.23,
        ratio_scope="layer",
        sublayers=("ffn",),
        least_important=least,
        multiple_of=16,
    )
    assert result.layers[0]["mlp"].band == band


@pytest.mark.spec("budget.multiple", "mgaa.plan")
def test_a_block_whose_ratio_removes_no_channel_takes_no_part() -> None:
    """Ratios of 28%, 1% and 14.5% leave 35, 48 and 41 of 48 channels.

    The first layer gets 40, and so does the last, which is due 36. The second would be due 43.
    """
    similarities = {(layer, "ffn"): value for layer, value in enumerate((0.9, 0.7, 0.8))}
    config = CompressionConfig(
        ratio=0.145,
        ratio_scope="layer",
        sublayers=("ffn",),
        allocation="mgaa-between",
        mgaa_alpha=0.135 / 1.5**0.5,
        multiple_of=20,
    )
    result = make_plan(
        tiny_config(), family_of(tiny_config()), config, Measurements(similarities=similarities)
    )
    assert sizes_of(result, "mlp") == [40, 48, 40]
    assert result.layers[1]["mlp"].kind == "dense"


@pytest.mark.spec("budget.multiple")
def test_a_multiple_that_no_module_can_keep_is_refused() -> None:
    plan(tiny_config(), ratio=0.3, multiple_of=47)
    with pytest.raises(UsageError, match=r"multiple_of 48: has no effect, .* the most is 47"):
        plan(tiny_config(), ratio=0.3, multiple_of=48)
    with pytest.raises(UsageError, match="the most is 15"):
        plan(tiny_config(), ratio=0.3, sublayers=("mha",), multiple_of=16)
    with pytest.raises(UsageError, match="multiple_of 8: has no effect without a low-rank"):
        plan(tiny_config(), ratio=0.3, sublayers=("mha",), mha="heads", multiple_of=8)


@pytest.mark.spec("mgaa.plan", "mgaa.floors")
@pytest.mark.parametrize(("floor", "q"), [(0.0, 1), (0.5, 4), (1.0, 8)])
def test_a_matrix_of_one_direction_keeps_the_floor_of_the_uniform_rank(
    floor: float, q: int
) -> None:
    """Four of 32 x 32, of which half is kept: the uniform rank is 0.5 * 1024 / 64 = 8."""
    one = torch.zeros(32, dtype=torch.float64)
    one[0] = 1
    spectra = {
        f"layers.{layer}.self_attn.{m}_proj": one if m == "q" else torch.ones_like(one)
        for layer in range(3)
        for m in "qkvo"
    }
    config = CompressionConfig(
        ratio=0.5,
        ratio_scope="layer",
        sublayers=("mha",),
        allocation="mgaa-within",
        mgaa_floor=floor,
    )
    result = make_plan(
        tiny_config(), family_of(tiny_config()), config, Measurements(spectra=spectra)
    )
    ranks = [result.layers[0][f"self_attn.{m}_proj"].rank for m in "qkvo"]
    # The others share the rest, 32 - q ranks: one more each, in their order.
    rest = 32 - q
    assert ranks == [q, *(rest // 3 + (i < rest % 3) for i in range(3))]


@pytest.mark.spec("mgaa.plan", "mgaa.ratios")
def test_what_changes_the_stream_least_loses_most() -> None:
    """The root of 3 / 2 deviations above and below the mean, and one at it."""
    similarities = {(layer, "ffn"): value for layer, value in enumerate((0.9, 0.8, 0.7))}
    config = CompressionConfig(
        ratio=0.4,
        ratio_scope="layer",
        sublayers=("ffn",),
        allocation="mgaa-between",
        mgaa_alpha=0.1,
    )
    result = make_plan(
        tiny_config(), family_of(tiny_config()), config, Measurements(similarities=similarities)
    )
    assert [layer["mlp"].width for layer in result.layers] == [
        48 - int((0.4 + shift + 0.01) * 48) for shift in (0.1 * 1.5**0.5, 0.0, -0.1 * 1.5**0.5)
    ]


def test_a_subset_of_sublayers_carries_the_whole_ratio() -> None:
    result = plan(LLAMA_7B, ratio=0.3, sublayers=("ffn",))
    assert result.achieved_ratio == pytest.approx(0.3, abs=1e-4)
    assert all(layer["self_attn.q_proj"].kind == "dense" for layer in result.layers)
    ffn = 32 * 3 * 4096 * 11008
    assert result.layer_ratio == pytest.approx(0.3 * result.parameters_before / ffn)


@pytest.mark.spec("budget.overrides")
def test_what_overrides_fix_the_others_make_up_for() -> None:
    result = plan(
        LLAMA_7B,
        ratio=0.2,
        overrides=[
            {"match": "layers.[0-3]", "skip": True},
            {"match": "layers.5.mlp", "width": 1000},
            {"match": "layers.6.*.q_proj", "rank": 7},
            {"match": "layers.9", "ratio": 0.9},
        ],
    )
    assert result.achieved_ratio == pytest.approx(0.2, abs=1e-4)
    assert all(module.kind == "dense" for layer in result.layers[:4] for module in layer.values())
    assert result.layers[5]["mlp"].width == 1000
    assert result.layers[6]["self_attn.q_proj"].rank == 7
    alone = plan(LLAMA_7B, ratio=0.9, ratio_scope="layer").layers[0]
    assert result.layers[9]["mlp"].width == alone["mlp"].width
    assert abs(result.layers[9]["self_attn.v_proj"].rank - alone["self_attn.v_proj"].rank) <= 2
    assert result.layers[6]["mlp"].width == result.layers[31]["mlp"].width < 11008


@pytest.mark.spec("budget.overrides")
@pytest.mark.parametrize(
    ("width", "band"), [(48, None), (47, (4, 5)), (5, (4, 47)), (4, (3, 47)), (1, (0, 47))]
)
def test_a_width_of_its_own_keeps_one_of_the_top_at_least(
    width: int, band: tuple[int, int] | None
) -> None:
    """10% of 48 channels, 4 whole ones, are the low end."""
    overrides = [{"match": "*.mlp", "width": width}]
    result = plan(
        tiny_config(), ratio=None, sublayers=("ffn",), least_important=0.1, overrides=overrides
    )
    assert all(layer["mlp"].band == band for layer in result.layers)


@pytest.mark.spec("budget.overrides")
def test_the_last_override_that_names_a_module_counts() -> None:
    result = plan(
        tiny_config(),
        overrides=[
            {"match": "layers.*", "skip": True},
            {"match": "layers.1.self_attn", "rank": 3},
            {"match": "layers.2.mlp", "width": 20},
        ],
    )
    kinds = [[module.kind for module in layer.values()] for layer in result.layers]
    assert kinds[0] == ["dense"] * 5
    assert kinds[1] == ["low_rank"] * 4 + ["dense"]
    assert kinds[2] == ["dense"] * 4 + ["channels"]
    assert result.layers[2]["mlp"].width == 20
    assert result.layer_ratio is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 0.2, "overrides": [{"match": "layers.7", "skip": True}]}, "names no module"),
        ({"ratio": 0.2, "overrides": [{"match": "layers.0.mlp", "rank": 3}]}, "not for layers.0"),
        (
            {"ratio": 0.2, "overrides": [{"match": "layers.0.self_attn.q_proj", "width": 3}]},
            "not for layers.0.self_attn.q_proj",
        ),
        (
            {"ratio": 0.2, "overrides": [{"match": "layers.0.self_attn.q_proj", "rank": 16}]},
            "expected 1 to 15",
        ),
        ({"ratio": 0.2, "overrides": [{"match": "layers.0.mlp", "width": 49}]}, "48 channels"),
        ({"ratio": 0.2, "overrides": [{"match": "*", "skip": True}]}, "nothing to act on"),
        (
            {"ratio": 0.2, "sublayers": ("ffn",), "overrides": [{"match": "*.q_proj", "rank": 2}]},
            "leaves as they are",
        ),
        ({"ratio": 0.05, "overrides": [{"match": "layers.0", "ratio": 0.9}]}, "less than what"),
        (
            {"ratio": 0.2, "overrides": [{"match": "layers.0.mlp", "ratio": 0.9999}]},
            r"override 'layers.0.mlp': ratio 0.9999 cannot be reached: .* no channel is left",
        ),
        ({}, "ratio: expected"),
    ],
)
def test_overrides_that_cannot_be_obeyed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(tiny_config(), **settings)


def test_json_form() -> None:
    result = json.loads(json.dumps(plan(tiny_config(), ratio=0.4).to_dict()))
    assert set(result) == {
        "ratio",
        "ratio_scope",
        "layer_ratio",
        "achieved_ratio",
        "parameters",
        "macs",
        "layers",
    }
    assert set(result["parameters"]) == {"before", "after"}
    assert len(result["layers"]) == 3
    assert set(result["layers"][0]["ratios"]) == {"mha", "ffn"}
    layer = result["layers"][0]["modules"]
    assert list(layer) == [*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp"]
    assert layer["self_attn.q_proj"]["kind"] == "low_rank"
    assert {"rank", "parameters", "macs"} <= set(layer["self_attn.q_proj"])
    assert layer["mlp"]["kind"] == "channels"
    assert {"width", "parameters", "macs"} <= set(layer["mlp"])
