"""What a compression takes, estimated beforehand from the shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import lorap
from lorap.config import CompressionConfig
from lorap.families import family_of
from lorap.pipeline.estimate import (
    CUBLAS,
    LIBRARIES,
    Estimate,
    estimate,
    forward_workspace,
    low_rank_workspace,
    pruning_workspace,
)
from lorap.plan import draft_plan, make_plan
from tests.tiny_models import save_tiny_checkpoint, tiny_config, token_ids


def estimated(model: LlamaConfig | None = None, **settings: Any) -> Estimate:
    model = model or tiny_config(dtype="bfloat16", tie_word_embeddings=False)
    config = CompressionConfig(**{"ratio": 0.4, "ratio_scope": "layer", "device": "cpu"} | settings)
    family = family_of(model)
    plan = draft_plan(model, family, replace(config, importance="activation"))
    return estimate(model, family, config, plan)


def test_a_small_forward_by_hand() -> None:
    # Two samples of three tokens, hidden 8, width 20, in bf16: 4 x 6 x 8 x 2 bytes of the stream;
    # 6 x 20 x 2 of the product, and twice it in float64.
    sizes = {"hidden": 8, "width": 20, "queries": 8, "heads": 2}
    assert forward_workspace(6, 2, sizes, 2, eager=False) == 384 + 240 + 2 * 8 * 120
    # Six of 6 x 400 x 2 for the queries, and 6 x 3 x 2 scores of 2 + 4 bytes.
    sizes["queries"] = 400
    assert forward_workspace(6, 2, sizes, 2, eager=True) == 384 + 6 * 4800 + 216
    assert forward_workspace(6, 2, sizes, 2, eager=False) == 384 + 6 * 4800


def test_a_large_forward_widens_a_chunk_at_a_time() -> None:
    sizes = {"hidden": 1, "width": 2**13, "queries": 1, "heads": 1}
    tokens = 2**15
    width = tokens * 2**13
    assert forward_workspace(tokens, 1, sizes, 2, eager=False) == 4 * tokens * 2 + 3 * width * 2


def test_factors_by_hand() -> None:
    # (3, 5) at rank 2: 2 x 15, and 15 + 7 x 9 + 2 x 2 x 1.
    assert low_rank_workspace((3, 5), 2, "awsvd", 2) == 8 * (30 + 82)
    assert low_rank_workspace((5, 3), 2, "svd", 4) == 8 * (30 + 82)
    # A wide one: the coordinates, old and new, are the most.
    assert low_rank_workspace((2, 100), 1, "asvd", 2) == 8 * (400 + 400 + 12 + 2)
    # The outputs' moment and its eigenvectors, 6 x 9, beside the weight.
    assert low_rank_workspace((3, 5), 2, "pca", 2) == 8 * (15 + 54)
    assert low_rank_workspace((3, 5), 2, "afm", 2) == 8 * (15 + 54 + 50)


def test_scores_by_hand() -> None:
    # Scores in float32 of all, and scores and squares in float64 of the largest.
    assert pruning_workspace([(6, 4), (6, 4), (4, 5)], 2) == 4 * 68 + 16 * 24
    assert pruning_workspace([(6, 4), (6, 4), (4, 5)], 8) == 8 * 68 + 8 * 24


def test_a_tiny_model_by_hand() -> None:
    """Hidden 32, width 48, three layers, in bf16."""
    model = tiny_config(dtype="bfloat16", tie_word_embeddings=False)
    layer = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    embedding = 2 * model.vocab_size * 32
    others = 2 * embedding + 2 * 32
    found = estimated(model, samples=8, seqlen=16)
    memory = found.memory["cpu"]
    assert list(found.memory) == ["cpu"]
    assert memory["libraries"] == LIBRARIES["cpu"]
    assert memory["weights"] == 2 * layer
    assert memory["activations"] == 8 * 16 * 32 * 2
    assert memory["mapped"] == max(embedding, 2 * 32 * 48) + 2 * 32 * 48
    # Of the norms of the four inputs.
    assert memory["statistics"] == 8 * (32 + 32 + 32 + 48)
    assert found.activations == "cpu"
    assert found.peak_memory == {"cpu": sum(memory.values())}

    plan = make_plan(model, family_of(model), CompressionConfig(ratio=0.4, ratio_scope="layer"))
    after = 3 * layer - 2 * (plan.parameters_before - plan.parameters)
    assert found.read == {
        "model": 2 * (3 * layer + others) + embedding + 2 * 32,
        "layers written": after,
    }
    assert found.written == {"model": after + others}


def test_on_a_gpu_the_tensors_are_there() -> None:
    found = estimated(device="cuda", samples=8, seqlen=16)
    assert found.device == "cuda"
    assert found.memory["cuda"]["libraries"] == CUBLAS
    assert found.memory["cuda"]["activations"] == 8 * 16 * 32 * 2
    assert "activations" not in found.memory["cpu"]
    on_cpu = estimated(device="cuda", samples=8, seqlen=16, activations="cpu")
    assert "activations" not in on_cpu.memory["cuda"]
    assert on_cpu.memory["cpu"]["activations"] == 8 * 16 * 32 * 2


def test_hidden_states_on_disk_are_read_and_written() -> None:
    state = 8 * 16 * 32 * 2
    found = estimated(samples=8, seqlen=16, activations="disk")
    assert "activations" not in found.memory["cpu"]
    # The embedded samples and the output of each of three layers; two forwards of each.
    assert found.written["activations"] == 4 * state
    assert found.read["activations"] == 6 * state


def test_another_dtype_takes_a_copy() -> None:
    layer = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
    heavy = {"samples": 1, "seqlen": 1, "sublayers": ("ffn",)}
    narrow, wide = estimated(**heavy), estimated(dtype="float32", **heavy)
    assert narrow.memory["cpu"]["weights"] == 2 * layer
    assert wide.memory["cpu"]["weights"] in (2 * layer, 4 * layer)
    assert wide.peak_memory["cpu"] >= narrow.peak_memory["cpu"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"mha": "pca", "ffn": "afm"}, {"mha": "heads"}, {"joint_qk": True}],
    ids=str,
)
def test_memory_does_not_grow_with_depth(settings: dict[str, Any], device: str) -> None:
    peaks = {
        layers: estimated(
            tiny_config(num_hidden_layers=layers, dtype="bfloat16"), device=device, **settings
        ).peak_memory
        for layers in (1, 4)
    }
    assert peaks[1] == peaks[4]


def test_gradients_need_the_inputs_of_all_layers() -> None:
    settings = {"importance": "taylor", "samples": 64, "seqlen": 64}
    four, eight = (
        estimated(tiny_config(num_hidden_layers=layers), **settings).memory["cpu"]["activations"]
        for layers in (4, 8)
    )
    assert eight - four == 4 * 64 * 64 * 32 * 4


def test_moments_count_where_a_method_takes_them() -> None:
    settings: dict[str, Any] = {"ffn": "pca", "mha": "pca", "allocation": 1.0}
    found = estimated(**settings, samples=1, seqlen=1)
    assert found.memory["cpu"]["statistics"] >= 8 * (3 * 32**2 + 48**2)


def test_the_plan_of_a_checkpoint_has_an_estimate(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model", dtype=torch.float32)
    config = CompressionConfig(ratio=0.4, samples=8, seqlen=16, device="cpu")
    plan = lorap.plan_checkpoint(tmp_path / "model", config)
    assert plan.estimate is not None
    shown = plan.to_dict()["estimate"]
    assert shown["peak_memory_bytes"] == plan.estimate.peak_memory
    np.save(tmp_path / "ids.npy", token_ids(8, 16).numpy())
    measured = replace(config, allocation="mgaa")
    source = str(tmp_path / "ids.npy")
    calls: list[tuple[int, int]] = []
    again = lorap.plan_checkpoint(
        tmp_path / "model",
        measured,
        calibration=source,
        progress=lambda *call: calls.append(call),
    ).estimate
    # A plan measures, and compresses nothing.
    assert calls[-1][0] == calls[-1][1] > 0
    assert again is not None
    assert again.read["model"] > plan.estimate.read["model"]


def test_probes_are_kept_for_every_module() -> None:
    """Sixteen samples of 8 tokens, 32 wide: a stream for each of five modules of three layers."""
    best = {"mha": "pca", "selection": "obs", "update": "least-squares"}
    shape: dict[str, Any] = {"samples": 20, "seqlen": 8}
    even, marginal = (
        estimated(**best, **shape, **more) for more in ({}, {"allocation": "marginal"})
    )
    state = 8 * 32 * 2
    assert even.memory["cpu"].get("activations", 0) <= 20 * state
    assert marginal.memory["cpu"]["activations"] == 20 * state + 16 * 16 * state
    # On disk they are written behind every layer from their own on.
    on_disk = [
        estimated(**best, **shape, **more, activations="disk").written["activations"]
        for more in ({"allocation": "mgaa-between"}, {"allocation": "marginal"})
    ]
    assert on_disk[1] - on_disk[0] == 16 * state * (5 * (3 + 2 + 1) + 4)


def test_predictions_of_a_large_vocabulary_are_counted() -> None:
    """Three times 16 samples of 64 tokens, and the weights of embedding and head."""
    model = tiny_config(vocab_size=60_000, dtype="float32", tie_word_embeddings=False)
    best = {"mha": "pca", "ffn": "pca", "allocation": "marginal"}
    found = estimated(model, seqlen=64, **best).memory["cpu"]
    assert found["workspace"] == 3 * 4 * 16 * 64 * 60_000
    assert found["weights"] == 4 * (2 * 60_000 * 32 + 32)


def test_the_bytes_written_are_those_of_the_files(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    np.save(tmp_path / "ids.npy", token_ids(8, 16).numpy())
    config = CompressionConfig(ratio=0.4, samples=8, seqlen=16, device="cpu")
    plan = lorap.plan_checkpoint(tmp_path / "model", config)
    assert plan.estimate is not None
    lorap.compress_checkpoint(
        tmp_path / "model", tmp_path / "out", config, calibration=str(tmp_path / "ids.npy")
    )
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("model*.safetensors"))
    # The headers are on top.
    assert 0 < size - plan.estimate.written["model"] < 20_000
