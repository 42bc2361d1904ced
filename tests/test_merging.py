"""Adapters merged into compressed models: what the result computes, holds and says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
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
from lorap.audit import audit
from lorap.checkpoint.files import CALIBRATION, CARD, REPORT
from lorap.errors import LorapError, UsageError
from lorap.recovery.layers import target_modules
from tests.tiny_models import (
    FAMILY_FIELDS,
    save_tiny_checkpoint,
    tiny_family_model,
    tiny_tokenizer,
    token_ids,
)

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
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.2 * parameter.shape["lora_B" in name] ** -0.25 * noise
    return with_updates


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def saved(model: PeftModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def agree(merged: Any, with_adapter: Any, without: Any) -> None:
    """Assert that a merged model is next to that with the adapter, and far from that without."""
    expected = logits(with_adapter)
    assert (logits(without) - expected).abs().max() > 0.01
    assert torch.allclose(logits(merged), expected, rtol=2e-4, atol=2e-4)


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
    agree(merged, model, load(small))
    assert report["parameters"]["after"] == merged.num_parameters()
    assert report["recovery"]["merge"]["factors"] == [3.0]
    modules = report["recovery"]["merge"]["modules"]
    assert (on == "matrices") or modules == {}
    for module in modules.values():
        assert module["rank"] in (None, *(module["rank_before"] + rank * n for n in (1, 2)))
    growth = sum(m["parameters"] - m["parameters_before"] for m in modules.values())
    sizes = report["recovery"]["merge"]["parameters"]
    assert sizes["after"] - sizes["before"] == growth
    assert report["macs"]["after"] - json.loads((small / REPORT).read_text())["macs"]["after"] == (
        growth * report["macs"]["tokens"]
    )


@pytest.mark.spec("lora.break-even")
def test_a_matrix_beyond_break_even_becomes_dense_and_that_is_said(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    small = compressed(tmp_path)
    ranks = {
        name: entry["rank"]
        for name, entry in load(small).config.layer_structure(0).items()
        if "rank" in entry
    }
    adapter = saved(adapted(small, rank=8), tmp_path / "adapter")
    report = lorap.merge_adapter(small, adapter, tmp_path / "merged")
    merged = load(tmp_path / "merged")
    modules = report["recovery"]["merge"]["modules"]
    found = {}
    for name, rank in ranks.items():
        entry = merged.config.layer_structure(0).get(name)
        found[name] = None if entry is None else entry["rank"]
        # 32 x 32: factors of rank 16 hold as much as the matrix.
        assert found[name] == (rank + 8 if rank + 8 < 16 else None)
        assert modules[f"layers.0.{name}"]["rank"] == found[name]
    assert None in found.values()
    assert set(found.values()) != {None}


@pytest.mark.spec("lora.merge-dense", "lora.merge-factors", "lora.joint", "family.parts")
@pytest.mark.parametrize("rank", [1, 40])
@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_every_family(family: str, rank: int, tmp_path: Path) -> None:
    tiny_family_model(family).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    small = compressed(tmp_path)
    model = adapted(small, rank=rank)
    adapter = saved(model, tmp_path / "adapter")
    lorap.merge_adapter(small, adapter, tmp_path / "exact")
    agree(load(tmp_path / "exact"), model, load(small))
    lorap.merge_adapter(small, adapter, tmp_path / "same", mode="same-size")
    assert load(tmp_path / "same").num_parameters() == load(small).num_parameters()


@pytest.mark.spec("lora.merge-same-size", "lora.sequence")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "fewer heads"])
def test_cut_back_to_the_size_it_is_nearer_than_without_the_updates(
    method: str, tmp_path: Path
) -> None:
    save_tiny_checkpoint(tmp_path / "model", num_key_value_heads=2)
    small = compressed(tmp_path, **METHODS[method])
    model = adapted(small, lora_alpha=0.5)
    adapter = saved(model, tmp_path / "adapter")
    report = lorap.merge_adapter(small, adapter, tmp_path / "same", mode="same-size")
    merged = load(tmp_path / "same")
    assert merged.config.lorap == load(small).config.lorap
    assert report["parameters"] == json.loads((small / REPORT).read_text())["parameters"]
    expected = logits(model)
    off, without = (float((logits(other) - expected).norm()) for other in (merged, load(small)))
    assert 0 < off < 0.9 * without
    for module in report["recovery"]["merge"]["modules"].values():
        assert 0 < module["relative_weighted_error"] < 0.5
        assert module["relative_weighted_error"] ** 2 == pytest.approx(
            1 - module["retained_energy"], rel=1e-3
        )


@pytest.mark.spec("lora.merge-same-size")
def test_an_update_within_the_factors_is_cut_back_without_loss(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    small = compressed(tmp_path)
    model = adapted(small)
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module.get_base_layer(), "left"):
            right = module.get_base_layer().right.weight
            module.lora_A["default"].weight.data = right[:2].clone()
    adapter = saved(model, tmp_path / "adapter")
    lorap.merge_adapter(small, adapter, tmp_path / "same", mode="same-size")
    agree(load(tmp_path / "same"), model, load(small))


def test_statistics_from_a_source_that_is_given(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    small = compressed(tmp_path)
    adapter = saved(adapted(small), tmp_path / "adapter")

    def merged(name: str, calibration: str | None, batch_size: int | None = None) -> bytes:
        lorap.merge_adapter(
            small,
            adapter,
            tmp_path / name,
            mode="same-size",
            calibration=calibration,
            batch_size=batch_size,
        )
        return b"".join(
            f.read_bytes() for f in sorted((tmp_path / name).glob("model*.safetensors"))
        )

    kept, same = merged("a", None), merged("b", str(tmp_path / "ids.npy"))
    assert kept == same
    np.save(tmp_path / "other.npy", np.random.default_rng(1).integers(3, 96, (4, 16)))
    assert merged("c", str(tmp_path / "other.npy")) != kept
    (small / CALIBRATION).unlink()
    with pytest.raises(UsageError, match="give the data for the statistics"):
        merged("d", None)


def test_a_model_stored_in_half_precision(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    small = compressed(tmp_path)
    model = adapted(small)
    adapter = saved(model, tmp_path / "adapter")
    lorap.merge_adapter(small, adapter, tmp_path / "merged")
    files = sorted((tmp_path / "merged").glob("model*.safetensors"))
    assert {t.dtype for file in files for t in load_file(file).values()} == {torch.bfloat16}
    expected = logits(model)
    off = (logits(load(tmp_path / "merged")) - expected).norm() / expected.norm()
    assert off < 0.05


def test_updates_of_other_ranks_and_by_the_root_of_the_rank(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    small = compressed(tmp_path, joint_qk=True)
    for number, options in enumerate(
        ({"rank_pattern": {"q_proj": 1, "up_proj": 3}}, {"use_rslora": True}, {"lora_alpha": 1})
    ):
        model = adapted(small, **options)
        adapter = saved(model, tmp_path / f"adapter-{number}")
        lorap.merge_adapter(small, adapter, tmp_path / f"merged-{number}")
        agree(load(tmp_path / f"merged-{number}"), model, load(small))


def test_a_merged_model_can_be_recovered_and_merged_again(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    small = compressed(tmp_path)
    first = saved(adapted(small, rank=1), tmp_path / "first")
    once = lorap.merge_adapter(small, first, tmp_path / "once")
    model = adapted(tmp_path / "once", rank=1)
    second = saved(model, tmp_path / "second")
    with pytest.raises(UsageError, match="exists already"):
        lorap.merge_adapter(tmp_path / "once", second, tmp_path / "once")
    twice = lorap.merge_adapter(tmp_path / "once", second, tmp_path / "twice")
    agree(load(tmp_path / "twice"), model, load(tmp_path / "once"))
    assert twice["recovery"]["previous"] == once["recovery"]
    assert "## Recovery" in (tmp_path / "twice" / CARD).read_text()
    with pytest.raises(UsageError, match="was recovered, and its weights trained"):
        audit(tmp_path / "model", tmp_path / "twice")


# --- errors ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merging")
    save_tiny_checkpoint(folder / "model")
    small = compressed(folder)
    saved(adapted(small), folder / "adapter")
    saved(adapted(small, on="factors"), folder / "factors")
    return folder


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, adapter / "adapter_model.safetensors")

    return edit


Q_LEFT = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
Q_RIGHT = Q_LEFT.replace("lora_B", "lora_A")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda adapter: (adapter / "adapter_config.json").unlink(), "holds no adapter_config"),
        (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "holds no adapter_mod"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "not readable as JSON"),
        (edit_config(peft_type="IA3"), "expected an adapter of the type LORA, got IA3"),
        (edit_config(use_dora=True), "use_dora True: only plain LoRA can be merged"),
        (edit_config(init_lora_weights="pissa"), "the model's own weights were changed with it"),
        (edit_config(lora_alpha="16"), "lora_alpha: expected a number"),
        (edit_tensors(lambda t: t.clear()), "holds no tensors"),
        (edit_tensors(lambda t: t.pop(Q_LEFT)), "expected lora_A and lora_B, got lora_A"),
        (edit_tensors(lambda t: t.update({Q_LEFT: torch.ones(5, 2)})), "do not fit the linear's"),
        (edit_tensors(lambda t: t.update({Q_LEFT: t[Q_LEFT] * torch.nan})), "expected finite"),
        (edit_tensors(lambda t: t.update({"base_model.x": torch.ones(1)})), "expected updates of"),
        (
            edit_tensors(lambda t: t.update({Q_LEFT.replace("q_p", "z_p"): torch.ones(32, 2)})),
            "has no such linear",
        ),
    ],
)
def test_adapters_that_cannot_be_merged(
    place: Path, tmp_path: Path, edit: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    edit(tmp_path / "adapter")
    with pytest.raises(UsageError, match=message):
        lorap.merge_adapter(place / "small", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "half"}, "mode: expected one of exact, same-size, got 'half'"),
        ({"calibration": "c4"}, "calibration c4: has no effect with mode exact"),
        ({"batch_size": 4}, "batch_size 4: has no effect with mode exact"),
        ({"mode": "same-size", "field": "text"}, "has no effect without calibration"),
        ({"mode": "same-size", "batch_size": 0}, "batch_size: expected a whole number"),
        ({"mode": "same-size", "adapter": "factors"}, "no update around a factored matrix"),
        ({"model": "model"}, "model"),
        ({"adapter": "none"}, "holds no adapter_config.json"),
    ],
)
def test_options_that_cannot_be_used(
    place: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model, adapter = (place / options.pop(name, default) for name, default in
                      (("model", "small"), ("adapter", "adapter")))  # fmt: skip
    with pytest.raises(UsageError, match=message):
        lorap.merge_adapter(model, adapter, tmp_path / "merged", **options)
    assert not (tmp_path / "merged").exists()


def test_a_merged_weight_that_overflows(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    edit_tensors(lambda t: t.update({Q_LEFT: torch.full_like(t[Q_LEFT], 3e38)}))(
        tmp_path / "adapter"
    )
    with pytest.raises(LorapError, match=r"layers\.0\.self_attn.*holds NaN or inf"):
        lorap.merge_adapter(place / "small", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_model(place: Path, tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "model", seed=1)
    other = compressed(tmp_path)
    shutil.copytree(place / "adapter", tmp_path / "adapter")
    record = {"format_version": 1, "model": "that one", "model_fingerprint": "0"}
    (tmp_path / "adapter" / "lorap_recovery.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="was trained on that one, which is not"):
        lorap.merge_adapter(other, tmp_path / "adapter", tmp_path / "merged")
    (tmp_path / "adapter" / "lorap_recovery.json").write_text("[]")
    with pytest.raises(UsageError, match="expected a record of format version 1"):
        lorap.merge_adapter(other, tmp_path / "adapter", tmp_path / "merged")
