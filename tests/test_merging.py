"""Adapters merged into compressed models: what the result computes, holds and says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lorap
from lorap.errors import UsageError
from lorap.recovery.layers import target_modules
from tests.tiny_models import save_tiny_checkpoint, tiny_family_model, tiny_tokenizer, token_ids

IDS = token_ids(3, 16)

METHODS: dict[str, dict[str, Any]] = {
    "as in the paper": {},
    "joint q and k": {"joint_qk": True},
    "factors throughout": {"ffn": "svd", "mha": "pca"},
    "with biases": {"mha": "afm", "ffn": "afm", "joint_qk": True},
    "fewer heads": {"mha": "heads"},
}


def compressed(folder: Path, ratio: float = 0.5, **settings: Any) -> Path:
    """Compress the model in ``folder/model`` into ``folder/small``."""
    config = lorap.CompressionConfig(ratio=ratio, samples=4, seqlen=16, device="cpu", **settings)
    np.save(folder / "ids.npy", np.random.default_rng(0).integers(3, 96, (4, 16)))
    lorap.compress_checkpoint(
        folder / "model", folder / "small", config, calibration=str(folder / "ids.npy")
    )
    return folder / "small"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def adapted(small: Path, on: str = "matrices", rank: int = 2, **options: Any) -> PeftModel:
    """Return the model with updates on it that are not small."""
    model = load(small)
    options = {"target_modules": target_modules(model, on), "lora_alpha": 3 * rank} | options  # type: ignore[arg-type]
    config = LoraConfig(r=rank, bias="none", task_type="CAUSAL_LM", **options)
    with_updates = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in with_updates.named_parameters():
        if "lora_" in name:
            parameter.data = 0.2 * rank**-0.25 * torch.randn(parameter.shape, generator=generator)
    return with_updates


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.spec("lora.merge-dense", "lora.merge-factors", "lora.break-even", "lora.joint")
@pytest.mark.parametrize("on", ["matrices", "factors"])
@pytest.mark.parametrize("rank", [1, 2, 40])
@pytest.mark.parametrize("method", METHODS)
def test_the_exactly_merged_model_is_the_adapted_one(
    method: str, rank: int, on: str, tmp_path: Path
) -> None:
    save_tiny_checkpoint(tmp_path / "model", num_key_value_heads=2)
    small = compressed(tmp_path, **METHODS[method])
    model = adapted(small, on, rank)
    adapter = saved(model, tmp_path / "adapter")
    report = lorap.merge_adapter(small, adapter, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    expected = logits(model)
    # Far from the model without the adapter, and next to the one with it.
    assert (logits(load(small)) - expected).abs().max() > 0.01
    assert torch.allclose(logits(merged), expected, rtol=2e-4, atol=2e-4)
    assert report["parameters"]["after"] == merged.num_parameters()
    changed = report["recovery"]["merge"]["modules"]
    assert (on == "matrices") or changed == {}
    assert report["recovery"]["merge"]["factors"] == [3.0]
