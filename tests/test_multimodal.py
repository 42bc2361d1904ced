"""LLaVA: its language model compressed in place, everything else as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import lorap
from lorap import CompressionConfig, UsageError
from lorap.audit import audit
from lorap.checkpoint import open_checkpoint
from lorap.families import FAMILIES, family_of
from tests.tiny_models import randomise_, tiny_family_model, tiny_tokenizer, token_ids

IDS = token_ids(8, 16)
IMAGE = 95
PATCHES = 4


def tiny_llava(model_type: str, **text: Any) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=tiny_family_model(model_type, **text).config,
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    randomise_(model, seed=0)
    return model.eval()


def prompt() -> dict[str, torch.Tensor]:
    ids = token_ids(2, 9)
    ids[:, 2 : 2 + PATCHES] = IMAGE
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(**prompt()).logits
    return result


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with ``original``, its compressed form ``out``, and ``ids.npy``."""
    root = tmp_path_factory.mktemp(request.param)
    fields = {"sliding_window": None} if request.param == "mistral" else {}
    tiny_llava(request.param, **fields).save_pretrained(root / "original", max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(root / "original")
    (root / "original" / "preprocessor_config.json").write_text("{}")
    np.save(root / "ids.npy", IDS.numpy())
    lorap.compress_checkpoint(
        root / "original",
        root / "out",
        CompressionConfig(ratio=0.3, samples=8, seqlen=16),
        calibration=str(root / "ids.npy"),
    )
    return root


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in folder.glob("model*.safetensors") for n, t in load_file(file).items()}


def test_the_language_model_is_compressed_and_all_else_copied(folder: Path) -> None:
    before, after = stored(folder / "original"), stored(folder / "out")
    outside = {name for name in before if not name.startswith("language_model.")}
    assert any("vision_tower" in name for name in outside)
    assert any("multi_modal_projector" in name for name in outside)
    assert {name for name in after if not name.startswith("language_model.")} == outside
    assert all(torch.equal(before[name], after[name]) for name in outside)
    assert "language_model.model.layers.1.self_attn.q_proj.left.weight" in after
    assert (folder / "out" / "preprocessor_config.json").is_file()
    assert not (folder / "out" / "modeling_lorap.py").exists()
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["model_type"] == "llava"
    assert config["text_config"]["model_type"].startswith("lorap_")
    card = (folder / "out" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card


def test_it_is_what_compressing_the_language_model_alone_gives(folder: Path) -> None:
    original = open_checkpoint(folder / "original")
    alone = AutoModelForCausalLM.from_config(original.config)
    alone.load_state_dict(original.load())
    settings = CompressionConfig(ratio=0.3)
    expected = lorap.compress(alone, settings, calibration=IDS).state_dict()
    found = {
        name.removeprefix("language_model."): tensor
        for name, tensor in stored(folder / "out").items()
        if name.startswith("language_model.")
    }
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in found)


def test_it_loads_as_a_llava_around_the_compressed_class(folder: Path, tmp_path: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is LlavaForConditionalGeneration
    family = open_checkpoint(folder / "original").family
    assert type(model.model.language_model) is family.base_class
    assert model.num_parameters() < tiny_llava(family.model_type).num_parameters()
    generated = [
        model.generate(**prompt(), max_new_tokens=5, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*generated)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_with_nothing_removed_it_computes_what_the_original_computes(
    folder: Path, tmp_path: Path
) -> None:
    skip = (lorap.config.Override("layers.[0-9]", skip=True),)
    lorap.compress_checkpoint(
        folder / "original",
        tmp_path / "out",
        CompressionConfig(ratio=None, overrides=skip, samples=8, seqlen=16),
        calibration=str(folder / "ids.npy"),
    )
    models = [
        AutoModelForImageTextToText.from_pretrained(path)
        for path in (folder / "original", tmp_path / "out")
    ]
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_it_is_planned_evaluated_and_audited_as_a_language_model(
    folder: Path, tmp_path: Path
) -> None:
    plan = lorap.plan_checkpoint(str(folder / "original"), CompressionConfig(ratio=0.3))
    report = json.loads((folder / "out" / "lorap_report.json").read_text())
    assert report["parameters"]["after"] == plan.parameters
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8\n" * 30)
    result = lorap.evaluate_perplexity(
        str(folder / "original"), str(tmp_path / "text.txt"), seqlen=8, device="cpu"
    )
    assert result.perplexity > 1
    assert audit(folder / "original", folder / "out").passed


def test_a_changed_vision_tower_fails_the_audit(folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder / "out", tmp_path / "changed")
    for file in copied.glob("model*.safetensors"):
        state = load_file(file)
        for name in (name for name in state if name.endswith("projector.linear_1.weight")):
            state[name][0, 0] += 1
            save_file(state, file, metadata={"format": "pt"})
    failed = [m.name for m in audit(folder / "original", copied).modules if not m.passed]
    assert failed == ["outside the language model"]


def test_it_is_replaced_only_where_lorap_wrote_it(folder: Path, tmp_path: Path) -> None:
    settings = CompressionConfig(ratio=0.3, samples=8, seqlen=16)
    for _ in range(2):
        lorap.compress_checkpoint(
            folder / "original",
            tmp_path / "out",
            settings,
            calibration=str(folder / "ids.npy"),
            overwrite=True,
        )
    with pytest.raises(UsageError, match="compressed already"):
        open_checkpoint(tmp_path / "out")


def test_a_llava_in_memory_and_one_without_a_language_model_are_refused(tmp_path: Path) -> None:
    model = tiny_llava("llama")
    settings = CompressionConfig(ratio=0.3)
    with pytest.raises(UsageError, match=r"got LlavaForCond.*; use compress_checkpoint"):
        lorap.compress(model, settings, calibration=IDS)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {name: t for name, t in state.items() if "language" not in name},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UsageError, match=r"expected tensors .* named language_model\.\*"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config": {"model_type": "gpt2"}}, "model type gpt2 is not supported"),
        ({"text_config": {"model_type": "lorap_llama"}}, "compressed already"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
    ],
)
def test_the_language_model_must_be_of_a_family(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        family_of({"model_type": "llava"} | values)


def test_the_family_of_a_llava_is_that_of_its_language_model() -> None:
    assert family_of({"model_type": "llava"}) is FAMILIES["llama"]
    text = {"model_type": "qwen2"}
    assert family_of({"model_type": "llava", "text_config": text}) is FAMILIES["qwen2"]
