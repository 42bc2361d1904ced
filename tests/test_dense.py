"""The export to the stock architecture: what it computes, what it refuses, what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from typer.testing import CliRunner

import lorap
from lorap import UsageError, cli
from lorap.dense import export_dense, multiplied_out
from lorap.errors import LorapError
from lorap.families import FAMILIES
from tests.test_families import family_structure
from tests.test_multimodal import logits as llava_logits
from tests.test_multimodal import tiny_llava
from tests.tiny_models import (
    FAMILY_FIELDS,
    randomise_,
    save_tiny_checkpoint,
    tiny_family_model,
    tiny_model,
    tiny_structure,
    tiny_tokenizer,
    token_ids,
    varied_structure,
)

Structure = list[dict[str, dict[str, Any]]]

EVEN: Structure = [
    {
        "self_attn.qk_proj": {"rank": 9},
        "self_attn.o_proj": {"rank": 8},
        "mlp": {"width": 30},
        "mlp.gate_proj": {"rank": 6},
    },
    {"self_attn.v_proj": {"rank": 7}, "mlp": {"width": 30}},
    {"mlp": {"width": 30}},
]
"""Every layer as wide as the others, with factors of many kinds."""

HEADS: Structure = [{"self_attn": {"kv_heads": 1}, "mlp": {"width": 30}}] * 3


def unbiased(structure: Structure) -> Structure:
    """Return a structure without the biases that linears gain."""
    layers: Structure = []
    for layer in structure:
        entries = {
            name: {key: value for key, value in entry.items() if key != "bias"}
            for name, entry in layer.items()
        }
        layers.append({name: entry for name, entry in entries.items() if entry})
    return layers


def save_compressed(
    folder: Path,
    model_type: str,
    layers: Structure,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    **fields: Any,
) -> Any:
    """Write a random compressed model, of a structure given in the names of LLaMA."""
    family = FAMILIES[model_type]
    original = tiny_family_model(model_type, **fields)
    config = family.compressed_config(original.config, family_structure(family, layers))
    model: Any = family.model_class(config)
    randomise_(model, seed, dtype)
    model.eval().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    result: torch.Tensor = model(token_ids() if ids is None else ids).logits
    return result


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


# What it computes


@pytest.mark.spec("export.dense")
@pytest.mark.parametrize(
    ("layers", "pad"),
    [(EVEN, False), (HEADS, False), (tiny_structure(), True), (unbiased(varied_structure()), True)],
    ids=["even", "heads", "widths", "varied"],
)
@pytest.mark.parametrize("model_type", FAMILY_FIELDS)
def test_every_family_exports_to_its_stock_class(
    model_type: str, layers: Structure, pad: bool, tmp_path: Path
) -> None:
    model = save_compressed(tmp_path / "small", model_type, layers)
    report = export_dense(tmp_path / "small", tmp_path / "dense", pad=pad)
    dense, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(dense).__module__.startswith("transformers.models.")
    assert type(dense).__name__ == report["architecture"] == FAMILIES[model_type].stock_class
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-3, atol=1e-3)
    assert float((logits(dense) - logits(model)).abs().mean()) < 1e-5
    assert report["parameters"]["exported"] == dense.num_parameters()
    assert report["parameters"]["compressed"] == model.num_parameters()
    values = config_of(tmp_path / "dense")
    assert values["model_type"] == model_type
    assert not {"lorap", "auto_map"} & set(values)
    if "rope_parameters" in values:
        assert values["rope_theta"] == 500.0
    assert not list((tmp_path / "dense").glob("*.py"))


@pytest.mark.spec("export.dense")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_products_are_done_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(5, 64, generator=generator).to(dtype)
    right = torch.randn(64, 7, generator=generator).to(dtype)
    exact = left.double() @ right.double()
    found = multiplied_out(left, right)
    assert found.dtype == dtype
    # Half a unit in the last place of the dtype, and what 64 additions in float32 add.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() * 1.01
    bound += 64 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * 64
    assert bool(((found.double() - exact).abs() <= bound).all())


@pytest.mark.spec("export.dense")
def test_a_product_by_hand() -> None:
    left, right = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 5.0]])
    assert multiplied_out(left, right).tolist() == [[3.0, 5.0], [6.0, 10.0]]
    # 1 + 2 ** -9 twice is 2 + 2 ** -8, which bfloat16 rounds to 2; summed in it, 1 and 1 as well,
    # but 256 + 1 + 1 is 258, and 256 where each sum is rounded.
    ones = torch.tensor([[256.0, 1.0, 1.0]], dtype=torch.bfloat16)
    assert multiplied_out(ones, torch.ones(3, 1, dtype=torch.bfloat16)).tolist() == [[258.0]]
    # Of two dtypes, the wider one is what is computed in.
    found = multiplied_out(ones.double(), torch.full((3, 1), 1 + 2.0**-20))
    assert found.tolist() == [[258.0 * (1 + 2.0**-20)]]


@pytest.mark.spec("export.dense")
def test_padding_is_zeros_behind_what_there_was(tmp_path: Path) -> None:
    structure: Structure = [{"mlp": {"width": 3}, "self_attn": {"kv_heads": 1}}, {}, {}]
    save_compressed(tmp_path / "small", "llama", structure)
    report = export_dense(tmp_path / "small", tmp_path / "dense", pad=True)
    small = load_file(tmp_path / "small" / "model.safetensors")
    dense = {
        name: tensor
        for file in (tmp_path / "dense").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    start = "model.layers.0."
    for name, axis, kept in (
        ("mlp.gate_proj", 0, 3),
        ("mlp.up_proj", 0, 3),
        ("mlp.down_proj", 1, 3),
        ("self_attn.q_proj", 0, 16),
        ("self_attn.k_proj", 0, 8),
        ("self_attn.v_proj", 0, 8),
        ("self_attn.o_proj", 1, 16),
    ):
        weight = dense[f"{start}{name}.weight"]
        old, new = weight.split([kept, weight.shape[axis] - kept], dim=axis)
        assert torch.equal(old, small[f"{start}{name}.weight"])
        assert not bool(new.any())
    for name, tensor in small.items():
        if not name.startswith(start) or "norm" in name:
            assert torch.equal(dense[name], tensor)
    assert report["padded_layers"] == {"width": [0], "kv_heads": [0]}
    assert (report["width"], report["kv_heads"]) == (48, 2)


def test_it_is_exact_where_nothing_is_factored(tmp_path: Path) -> None:
    model = save_compressed(tmp_path / "small", "llama", HEADS, dtype=torch.bfloat16)
    export_dense(tmp_path / "small", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert dense.dtype == torch.bfloat16
    assert torch.equal(logits(dense), logits(model))
    values = config_of(tmp_path / "dense")
    found = [values[n] for n in ("head_dim", "num_attention_heads", "num_key_value_heads")]
    assert found == [8, 2, 1]
    assert values["intermediate_size"] == 30


WITHOUT_LORAP = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lorap":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
assert type(model) is LlamaForCausalLM
with torch.no_grad():
    logits = model(load_file(sys.argv[2])["ids"]).logits
save_file({"logits": logits}, sys.argv[2])
"""


@pytest.mark.slow
def test_it_loads_as_llama_where_lorap_is_not_installed(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "original")
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 96, (4, 16)))
    config = lorap.CompressionConfig(ratio=0.4, samples=4, seqlen=16, device="cpu")
    lorap.compress_checkpoint(
        tmp_path / "original", tmp_path / "small", config, calibration=str(tmp_path / "ids.npy")
    )
    export_dense(tmp_path / "small", tmp_path / "dense")
    exchanged = tmp_path / "exchanged.safetensors"
    save_file({"ids": token_ids()}, exchanged)
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_LORAP, str(tmp_path / "dense"), str(exchanged)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    torch.testing.assert_close(load_file(exchanged)["logits"], logits(small), rtol=1e-4, atol=1e-4)


def test_the_language_model_of_a_llava(tmp_path: Path) -> None:
    original = tiny_llava("llama")
    original.save_pretrained(tmp_path / "original")
    tiny_tokenizer().save_pretrained(tmp_path / "original")
    np.save(tmp_path / "ids.npy", token_ids(4, 16).numpy())
    config = lorap.CompressionConfig(ratio=0.4, samples=4, seqlen=16, device="cpu")
    lorap.compress_checkpoint(
        tmp_path / "original", tmp_path / "small", config, calibration=str(tmp_path / "ids.npy")
    )
    export_dense(tmp_path / "small", tmp_path / "dense")
    small, dense = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, dtype="auto").eval()
        for name in ("small", "dense")
    )
    assert dense.config.text_config.model_type == "llama"
    torch.testing.assert_close(llava_logits(dense), llava_logits(small), rtol=1e-4, atol=1e-4)


# Biases


@pytest.mark.spec("export.dense")
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "gemma2", "gemma3_text", "olmo2", "smollm3"]
)
def test_biases_have_a_place_where_the_family_has_one(model_type: str, tmp_path: Path) -> None:
    structure: Structure = [{"self_attn.q_proj": {"rank": 5, "bias": True}}, {}, {}]
    model = save_compressed(tmp_path / "small", model_type, structure)
    export_dense(tmp_path / "small", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert dense.config.attention_bias
    assert not getattr(dense.config, "mlp_bias", False)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-3, atol=1e-3)
    assert not bool(dense.model.layers[1].self_attn.o_proj.bias.any())


@pytest.mark.spec("export.dense")
@pytest.mark.parametrize(
    ("model_type", "name", "place"),
    [
        ("mistral", "self_attn.q_proj", "MistralForCausalLM has no place for the bias of self_at"),
        ("qwen2", "self_attn.o_proj", r"bias of self_attn.o_proj \(layers 1\)"),
        ("phi3", "self_attn.v_proj", r"bias of self_attn.qkv_proj \(layers 1\)"),
        ("qwen3", "mlp.down_proj", "Qwen3ForCausalLM has no place for the bias of mlp.down_proj"),
        ("gemma3_text", "mlp.up_proj", "Gemma3ForCausalLM has no place for the bias of mlp.up"),
    ],
)
def test_biases_without_a_place_are_refused(
    model_type: str, name: str, place: str, tmp_path: Path
) -> None:
    save_compressed(tmp_path / "small", model_type, [{}, {name: {"bias": True}}, {}])
    with pytest.raises(UsageError, match=place):
        export_dense(tmp_path / "small", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("model_type", ["llama", "smollm3"])
def test_a_bias_in_both_blocks(model_type: str, tmp_path: Path) -> None:
    structure: Structure = [{}, {"mlp.up_proj": {"bias": True}}, {"self_attn.o_proj": {"rank": 4}}]
    structure[2]["self_attn.o_proj"]["bias"] = True
    model = save_compressed(tmp_path / "small", model_type, structure)
    export_dense(tmp_path / "small", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert (dense.config.attention_bias, dense.config.mlp_bias) == (True, True)
    torch.testing.assert_close(logits(dense), logits(model), rtol=1e-3, atol=1e-3)


# What is refused, and what is left


def test_layers_that_differ_are_named(tmp_path: Path) -> None:
    structure: Structure = [{"mlp": {"width": 30}}, {"mlp": {"width": 31}}, {"mlp": {"width": 30}}]
    structure[1]["self_attn"] = {"kv_heads": 1}
    save_compressed(tmp_path / "small", "llama", structure)
    with pytest.raises(UsageError) as caught:
        export_dense(tmp_path / "small", tmp_path / "dense")
    for fragment in (
        "widths of the feed-forward blocks (layers 0, 2: 30, layer 1: 31)",
        "kv heads (layer 1: 1, layers 0, 2: 2)",
        "LlamaForCausalLM",
        "--pad",
    ):
        assert fragment in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_what_is_no_compressed_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(UsageError, match="plain is no compressed model"):
        export_dense(tmp_path / "plain", tmp_path / "dense")
    save_compressed(tmp_path / "small", "llama", EVEN)
    file = tmp_path / "small" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj.left.weight"
    for damage, message in (
        (tensors[name][:-1].clone(), f"{name} has the shape"),
        (None, f"{name} is missing"),
    ):
        changed = {key: tensor for key, tensor in tensors.items() if key != name}
        if damage is not None:
            changed[name] = damage
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(LorapError, match=message):
            export_dense(tmp_path / "small", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def run(*words: object) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def test_the_command_and_its_report(tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path / "original", num_key_value_heads=2)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(3, 96, (4, 16)))
    data = ("--calibration", tmp_path / "ids.npy", "--samples", 4, "--seqlen", 16)
    options = ("--ratio", 0.3, "--device", "cpu")
    small, dense = tmp_path / "small", tmp_path / "dense"
    assert run("compress", tmp_path / "original", "--output", small, *data, *options).exit_code == 0
    shown = run("export", small, "--format", "dense", "--output", dense)
    assert shown.exit_code == 0, shown.stderr
    report = json.loads((dense / "lorap_export.json").read_text())
    sizes = report["parameters"]
    assert sizes["original"] > sizes["exported"] > sizes["compressed"]
    assert f"{sizes['compressed']:,} -> {sizes['exported']:,}" in shown.stdout
    stored = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    assert 0 < stored - report["bytes"]["exported"] < 20_000
    assert report["command"].startswith("lorap export ")
    card = (dense / "README.md").read_text()
    assert f"{sizes['exported']:,}" in card
    assert str(tmp_path) not in card
    assert (dense / "LICENSE.txt").is_file()
    assert (dense / "tokenizer.json").is_file()
    # As for compress: an existing folder is refused, one's own is replaced, and no other.
    again = run("export", small, "--output", dense)
    assert again.exit_code == 2
    assert "exists already; --overwrite replaces it" in again.stderr
    assert run("export", small, "--output", dense, "--overwrite").exit_code == 0
    (dense / "mine.txt").write_text("x")
    kept = run("export", small, "--output", dense, "--overwrite")
    assert kept.exit_code == 2
    assert "did not write mine.txt" in kept.stderr
    inside = run("export", small, "--output", small, "--overwrite")
    assert inside.exit_code == 2
    assert "which is read, is the same" in inside.stderr
    for words, message in (
        (("export", small, "--format", "gguf", "--output", tmp_path / "x"), "expected dense, got"),
        (("export", dense, "--output", tmp_path / "x"), "is no compressed model"),
    ):
        refused = run(*words)
        assert refused.exit_code == 2
        assert message in refused.stderr
    as_json = run("export", small, "--output", tmp_path / "again", "--json")
    assert json.loads(as_json.stdout)["parameters"] == sizes


def test_an_export_that_outgrows_the_original_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    report = {
        "format": "dense",
        "architecture": "LlamaForCausalLM",
        "bytes": {"compressed": 1, "exported": 1},
        "padded_layers": {},
    }
    for exported, words in (
        (1010, "1,000, and 1.00% more now"),
        (990, "1,000, of which 1.00% stay"),
    ):
        sizes = {"compressed": 800, "exported": exported, "original": 1000}
        cli._print_export(report | {"parameters": sizes}, "dense")
        assert words in capsys.readouterr().out


def test_it_is_written_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_compressed(tmp_path / "small", "llama", EVEN)
    seen: list[list[str]] = []
    real = lorap.dense.CheckpointWriter.write_shard

    def write(self: Any, tensors: Any) -> str:
        seen.append(sorted({name.split(".")[2] for name in tensors if ".layers." in name}))
        return real(self, tensors)

    monkeypatch.setattr(lorap.dense.CheckpointWriter, "write_shard", write)
    steps: list[tuple[int, int]] = []
    export_dense(
        tmp_path / "small", tmp_path / "dense", progress=lambda n, of: steps.append((n, of))
    )
    assert seen[:3] == [["0"], ["1"], ["2"]]
    assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_compressed(tmp_path / "small", "llama", EVEN)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(lorap.dense, "dense_card", fail)
    with pytest.raises(KeyboardInterrupt):
        export_dense(tmp_path / "small", tmp_path / "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_the_configuration_is_the_original_s_but_for_the_sizes(tmp_path: Path) -> None:
    original: PretrainedConfig = tiny_family_model("gemma3_text").config
    save_compressed(tmp_path / "small", "gemma3_text", EVEN)
    export_dense(tmp_path / "small", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config
    expected, found = original.to_dict(), dense.to_dict()
    own = {"_name_or_path", "architectures", "dtype", "transformers_version"}
    changed = {n for n in expected if n not in own and found.get(n) != expected[n]}
    assert changed == {"intermediate_size"}
