"""Layers compressed stage by stage, each matrix regressed to a target of the uncompressed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM

import lorap
from lorap.config import CompressionConfig, Override
from lorap.errors import LorapError
from tests.tiny_models import VARIANTS, save_tiny_checkpoint, tiny_model, token_ids

IDS = token_ids(8, 16)
BEST = {"mha": "pca", "selection": "obs", "update": "least-squares", "dense_target": 0.5}


def config(**settings: Any) -> CompressionConfig:
    return CompressionConfig(**({"ratio": 0.3, "device": "cpu"} | BEST | settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"mha": "heads", "ffn": "afm"}], ids=["best", "heads"])
def test_memory_and_disk_agree_bit_for_bit(
    settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path, ids_file: str
) -> None:
    if settings:
        settings = {"selection": "scores", **settings}
    original = save_tiny_checkpoint(tmp_path / "model", dtype=dtype, **VARIANTS["gqa"])
    chosen = config(samples=8, seqlen=16, batch_size=3, **settings)
    in_memory = lorap.compress(original, chosen, calibration=IDS).state_dict()
    for place in ("cpu", "disk"):
        given = config(samples=8, seqlen=16, batch_size=3, activations=place, **settings)
        report = lorap.compress_checkpoint(
            tmp_path / "model", tmp_path / place, given, calibration=ids_file
        )
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / place, dtype="auto")
        assert {tensor.dtype for tensor in reloaded.state_dict().values()} == {dtype}
        for name, tensor in reloaded.state_dict().items():
            assert torch.equal(tensor, in_memory[name]), name
        assert reloaded.num_parameters() == report["parameters"]["after"]
    assert not list(tmp_path.glob("**/.lorap-hidden-*"))


@pytest.mark.parametrize("settings", [{}, {"ffn": "pca"}, {"mha": "heads"}], ids=str)
def test_sizes_are_those_without_stages(settings: dict[str, Any]) -> None:
    plain = CompressionConfig(ratio=0.3, device="cpu", **settings)
    staged = CompressionConfig(ratio=0.3, device="cpu", dense_target=0.5, **settings)
    shapes = []
    for chosen in (plain, staged):
        state = lorap.compress(tiny_model(), chosen, calibration=IDS).state_dict()
        shapes.append({name: tensor.shape for name, tensor in state.items()})
    assert shapes[0] == shapes[1]


def test_what_stays_dense_is_refitted_and_what_is_skipped_is_not() -> None:
    model = tiny_model()
    settings = config(
        ratio=0.1,
        ratio_scope="layer",
        overrides=(Override("layers.1", skip=True), Override("layers.2.*.o_proj", skip=True)),
    )
    before, after = (
        m.state_dict() for m in (model, lorap.compress(model, settings, calibration=IDS))
    )
    same = {name for name, t in before.items() if name in after and torch.equal(t, after[name])}
    layer = "model.layers.{}.self_attn.{}_proj.weight".format
    assert {n for n in before if n.startswith("model.layers.1.")} <= same
    assert layer(2, "o") in same
    assert layer(2, "v") in after
    assert layer(2, "v") not in same
    assert {n for n in before if "norm" in n or "embed" in n or "head" in n} <= same

    attention = lorap.compress(model, config(sublayers=("ffn",), mha="awsvd"), calibration=IDS)
    for name, tensor in attention.state_dict().items():
        if "self_attn" in name:
            assert torch.equal(tensor, before[name])


def test_where_nothing_was_lost_before_the_target_is_the_weight() -> None:
    """The first layer's q, k and v see the same inputs in both models."""
    model = tiny_model()
    with_target = lorap.compress(model, config(), calibration=IDS).state_dict()
    without = lorap.compress(model, config(dense_target=0.0), calibration=IDS).state_dict()
    for name in ("q", "k", "v"):
        for side in ("left", "right"):
            key = f"model.layers.0.self_attn.{name}_proj.{side}.weight"
            if key in without:
                torch.testing.assert_close(with_target[key], without[key], rtol=0, atol=1e-6)
    key = "model.layers.1.self_attn.v_proj.right.weight"
    assert not torch.allclose(with_target[key], without[key], rtol=0, atol=1e-4)


def test_a_forward_stops_where_its_input_is_known() -> None:
    """Five forwards of the layer in each model, of which one comes to the end."""
    calls: list[str] = []

    def look(module: nn.Module, _: tuple[Any, ...]) -> None:
        calls.append(type(module).__name__)

    handle = register_module_forward_pre_hook(look)
    try:
        lorap.compress(tiny_model(), config(), calibration=IDS)
    finally:
        handle.remove()
    assert calls.count("LlamaDecoderLayer") == 3 * (2 * 4 + 2)
    # Only those that ask for the input of gate and up, or of down, and those at the end.
    assert calls.count("LlamaMLP") == 3 * (2 * 2 + 2)


def test_inputs_that_overflow_are_named() -> None:
    model = tiny_model().half()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(6e4)
        model.model.layers[1].mlp.gate_proj.weight.fill_(6e4)
    with pytest.raises(LorapError, match=r"layers\.1\.mlp\.\w+_proj.*holds NaN or inf"):
        lorap.compress(model, config(), calibration=IDS)
