"""The torch path on a GPU gives what it gives on a CPU. Skipped where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import lorap
from lorap import CompressionConfig
from tests.tiny_models import VARIANTS, save_tiny_checkpoint, tiny_model, token_ids

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]

IDS = token_ids(8, 16)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gpu_agrees_with_the_cpu(variant: str) -> None:
    settings = CompressionConfig(ratio=0.4, dtype="float64")
    model = tiny_model(dtype=torch.float64, **VARIANTS[variant])
    on_cpu = lorap.compress(model, settings, calibration=IDS).state_dict()
    on_gpu = lorap.compress(model.to("cuda"), settings, calibration=IDS).state_dict()
    assert on_cpu.keys() == on_gpu.keys()
    for name, tensor in on_cpu.items():
        assert on_gpu[name].is_cuda
        if ".right." in name:
            continue
        if ".left.weight" in name:
            right = name.replace("left", "right")
            tensor, other = tensor @ on_cpu[right], (on_gpu[name] @ on_gpu[right]).cpu()
            # Norms and rotary angles are rounded to float32 inside the model.
            torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(on_gpu[name].cpu(), tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compress_on_the_gpu_and_reload(dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model", dtype=dtype)
    np.save(tmp_path / "ids.npy", IDS.numpy())
    lorap.compress_checkpoint(
        tmp_path / "model",
        tmp_path / "out",
        CompressionConfig(ratio=0.4, samples=8, seqlen=16, device="cuda"),
        calibration=str(tmp_path / "ids.npy"),
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cuda")
    assert model.dtype == dtype
    assert torch.isfinite(model(IDS.to("cuda")).logits).all()
