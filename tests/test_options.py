"""Every option of ``lorap compress`` changes what is written, not only the report that repeats it.

What a run writes is compared with what it writes without the option.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from typer.main import get_command
from typer.testing import CliRunner

from lorap import cli
from lorap.checkpoint.reader import CheckpointReader
from lorap.config import PRESETS
from lorap.pipeline.activations import Store
from tests.tiny_models import save_tiny_checkpoint

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
COVERED = {
    "ratio",
    "ratio_scope",
    "mha",
    "ffn",
    "joint_qk",
    "allocation",
    "mgaa_alpha",
    "mgaa_floor",
    "multiple_of",
    "importance",
    "least_important",
    "aggregation",
    "preset",
    "selection",
    "update",
    "dense_target",
    "refine",
    "ridge",
    "weighting",
    "asvd_alpha",
    "sublayers",
    "samples",
    "seqlen",
    "seed",
    "batch_size",
    "device",
    "activations",
    "dtype",
    "field",
    "revision",
    "allow_bin",
}
ELSEWHERE = {"model", "output", "calibration", "config", "overwrite", "resume", "as_json"}
"""Covered by ``test_cli``, ``test_errors`` and ``test_resume``."""


@dataclass(frozen=True)
class Written:
    """What a run wrote: weights, calibration ids, norms of the inputs, and the structure."""

    weights: dict[str, Tensor]
    ids: Tensor
    norms: dict[str, Tensor]
    layers: list[dict[str, dict[str, int]]]

    def product(self, name: str, layer: int = 0) -> Tensor:
        """The product of a linear's factors, in float64."""
        prefix = f"model.layers.{layer}.{name}"
        return (
            self.weights[f"{prefix}.left.weight"].double()
            @ self.weights[f"{prefix}.right.weight"].double()
        )

    def ranks(self, projection: str) -> list[int]:
        return [layer[f"self_attn.{projection}"]["rank"] for layer in self.layers]

    def widths(self) -> list[int]:
        return [layer.get("mlp", {"width": 48})["width"] for layer in self.layers]


@dataclass(frozen=True)
class Bench:
    """A model, data, and a place to write."""

    model: Path
    text: Path
    place: Path

    def compress(self, *words: object, model: object = None, source: Path | None = None) -> Written:
        output = self.place / f"{len(list(self.place.iterdir()))}"
        # An option that is given twice counts as given last.
        given = ["compress", model or self.model, "--calibration", source or self.text]
        given += ["--output", output, "--ratio", 0.3, "--samples", 6, "--seqlen", 16]
        result = CliRunner().invoke(cli.app, [str(word) for word in (*given, *words)])
        assert result.exit_code == 0, (result.stderr, result.exception)
        weights: dict[str, Tensor] = {}
        for file in output.glob("model*.safetensors"):
            weights |= load_file(file)
        return Written(
            weights,
            load_file(output / "lorap_calibration.safetensors")["input_ids"],
            load_file(output / "lorap_statistics.safetensors"),
            json.loads((output / "config.json").read_text())["lorap"]["layers"],
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("options")
    save_tiny_checkpoint(folder / "model")
    words = np.random.default_rng(0).integers(93, size=(60, 30))
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(f"w{word}" for word in row) for row in words))
    (folder / "place").mkdir()
    return Bench(folder / "model", text, folder / "place")


@pytest.fixture(scope="module")
def base(bench: Bench) -> Written:
    return bench.compress("--device", "cpu")


pytestmark = pytest.mark.usefixtures("loud_transformers")


def same(first: dict[str, Tensor], second: dict[str, Tensor], part: str = "") -> bool:
    """Whether the tensors with the part in their names are equal, bit for bit."""
    names = {name for name in (*first, *second) if part in name}
    assert names
    return names <= set(first) & set(second) and all(
        torch.equal(first[name], second[name]) for name in names
    )


def test_every_option_is_covered() -> None:
    command: Any = get_command(cli.app).commands["compress"]  # type: ignore[attr-defined]
    assert {parameter.name for parameter in command.params} == COVERED | ELSEWHERE
    for name in COVERED:
        assert any(name in test for test in globals() if test.startswith("test_")), name


def test_a_run_repeats_itself(bench: Bench, base: Written) -> None:
    again = bench.compress("--device", "cpu")
    assert same(again.weights, base.weights)
    assert same(again.norms, base.norms)
    assert torch.equal(again.ids, base.ids)


def test_ratio_is_what_is_removed(bench: Bench, base: Written) -> None:
    more = bench.compress("--ratio", 0.5)
    size, base_size = (sum(t.numel() for t in w.weights.values()) for w in (more, base))
    original = sum(t.numel() for t in load_file(bench.model / "model.safetensors").values())
    assert 1 - base_size / original == pytest.approx(0.3, abs=0.01)
    assert 1 - size / original == pytest.approx(0.5, abs=0.01)


def test_ratio_scope_of_the_layers_removes_less(bench: Bench, base: Written) -> None:
    layer = bench.compress("--ratio-scope", "layer")
    assert all(new > old for new, old in zip(layer.widths(), base.widths(), strict=True))
    both = zip(layer.ranks("q_proj"), base.ranks("q_proj"), strict=True)
    assert all(new > old for new, old in both)


def test_allocation_shares_the_ranks_out(bench: Bench, base: Written) -> None:
    even = bench.compress("--allocation", 1)
    assert all(even.ranks(projection) == even.ranks("q_proj") for projection in ATTENTION)
    assert base.ranks("v_proj") == [3 * rank for rank in base.ranks("q_proj")]
    assert even.widths() == base.widths()


def test_mha_is_the_method_for_attention(bench: Bench, base: Written) -> None:
    found = {"awsvd": base}
    for method in ("svd", "asvd", "pca", "afm"):
        found[method] = bench.compress("--mha", method)
        assert found[method].ranks("q_proj") == base.ranks("q_proj")
        assert same(found[method].weights, base.weights, "layers.0.mlp")
    products = [written.product("self_attn.q_proj") for written in found.values()]
    for index, product in enumerate(products):
        for other in products[:index]:
            assert torch.linalg.norm(product - other) > 1e-3 * torch.linalg.norm(other)
    assert "model.layers.0.self_attn.q_proj.left.bias" in found["afm"].weights
    heads = bench.compress("--mha", "heads")
    assert all(layer["self_attn"]["kv_heads"] == 3 for layer in heads.layers)
    assert heads.weights["model.layers.0.self_attn.v_proj.weight"].shape == (24, 32)


def test_ffn_is_the_method_for_feed_forward_blocks(bench: Bench, base: Written) -> None:
    for method in ("awsvd", "svd", "asvd", "pca", "afm"):
        written = bench.compress("--ffn", method)
        assert same(written.weights, base.weights, "layers.0.self_attn")
        for layer in written.layers:
            assert {name for name in layer if "mlp" in name} == {
                "mlp.gate_proj",
                "mlp.up_proj",
                "mlp.down_proj",
            }
        biased = "model.layers.0.mlp.up_proj.left.bias" in written.weights
        assert biased == (method == "afm")


def test_joint_qk_shares_a_right_factor(bench: Bench, base: Written) -> None:
    written = bench.compress("--joint-qk")
    assert all("self_attn.qk_proj" in layer for layer in written.layers)
    rank = written.layers[0]["self_attn.qk_proj"]["rank"]
    assert written.weights["model.layers.0.self_attn.qk_right.weight"].shape == (rank, 32)
    assert rank > base.ranks("q_proj")[0], "one right factor less is paid for"


def test_allocation_by_measurement_gives_each_layer_its_own(bench: Bench, base: Written) -> None:
    size = sum(t.numel() for t in base.weights.values())
    for how in ("mgaa", "mgaa-between", "mgaa-within"):
        written = bench.compress("--allocation", how, "--mha", "pca", "--ffn", "pca")
        ranks = [tuple(entry["rank"] for entry in layer.values()) for layer in written.layers]
        assert len(set(ranks)) == 3
        assert sum(t.numel() for t in written.weights.values()) == pytest.approx(size, rel=0.02)
        measured = {name.rpartition(".")[2] for name in written.norms}
        assert ("similarity" in measured) == (how != "mgaa-within")
        assert ("spectrum" in measured) == (how != "mgaa-between")


def test_mgaa_alpha_spreads_the_ratios(bench: Bench) -> None:
    widths = []
    for alpha in (0, 0.1, 0.35):
        written = bench.compress("--allocation", "mgaa", "--mgaa-alpha", alpha)
        widths.append(written.widths())
    spread = [max(found) - min(found) for found in widths]
    assert spread[0] == 0 < spread[1] < spread[2]


def test_multiple_of_is_what_ranks_and_widths_are_multiples_of(bench: Bench, base: Written) -> None:
    written = bench.compress("--multiple-of", 4)
    for found, rests in ((written, {0}), (base, {1, 2, 3})):
        entries = [entry for layer in found.layers for entry in layer.values()]
        assert len(entries) > 6
        assert {size % 4 for entry in entries for size in entry.values()} == rests
    # Half a multiple of each kind of module: ranks of 32 + 32, channels of 3 * 32 parameters.
    size, base_size = (sum(t.numel() for t in w.weights.values()) for w in (written, base))
    assert abs(size - base_size) <= 2 * (4 * 64 + 96)


def test_mgaa_floor_keeps_every_module_above_it(bench: Bench) -> None:
    words = ["--allocation", "mgaa", "--mgaa-alpha", 3]
    low = bench.compress(*words, "--mgaa-floor", 0.1).widths()
    high = bench.compress(*words, "--mgaa-floor", 0.9).widths()
    assert min(low) < min(high)


def test_importance_chooses_other_channels(bench: Bench, base: Written) -> None:
    found = [base] + [bench.compress("--importance", way) for way in ("magnitude", "taylor")]
    for index, other in ((0, 1), (0, 2), (1, 2)):
        assert same(found[index].weights, found[other].weights, "layers.0.self_attn")
        assert not same(found[index].weights, found[other].weights, "layers.0.mlp")


def test_preset_stands_for_its_settings(bench: Bench, base: Written) -> None:
    assert same(bench.compress("--preset", "lorap").weights, base.weights)
    for preset in ("mgaa", "best"):
        words = [
            word
            for name, value in PRESETS[preset].items()  # type: ignore[index]
            for word in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))
        ]
        written = bench.compress("--preset", preset)
        assert same(written.weights, bench.compress(*words).weights)
        assert not same(written.weights, base.weights)


def test_selection_chooses_other_channels(bench: Bench, base: Written) -> None:
    other = bench.compress("--selection", "obs")
    assert same(other.weights, base.weights, "layers.0.self_attn")
    assert not same(other.weights, base.weights, "layers.0.mlp")
    assert other.widths() == base.widths()


def test_update_refits_what_reads_the_rest(bench: Bench, base: Written) -> None:
    other = bench.compress("--update", "least-squares")
    for part in ("self_attn", "mlp.gate", "mlp.up"):
        assert same(other.weights, base.weights, f"layers.0.{part}")
    assert not same(other.weights, base.weights, "layers.0.mlp.down")
    heads = [
        bench.compress("--mha", "heads", *words) for words in ([], ["--update", "least-squares"])
    ]
    assert same(heads[0].weights, heads[1].weights, "layers.0.self_attn.v")
    assert not same(heads[0].weights, heads[1].weights, "layers.0.self_attn.o")
    assert {name: t.shape for name, t in other.weights.items()} == {
        name: t.shape for name, t in base.weights.items()
    }


def test_dense_target_is_what_the_matrices_are_fitted_to(bench: Bench, base: Written) -> None:
    found = [bench.compress("--dense-target", share) for share in (0, 0.5, 1)]
    for index, (one, two) in enumerate(((0, 1), (1, 2))):
        assert not same(found[one].weights, found[two].weights, "layers.1.mlp.up"), index
    assert all(written.layers == base.layers for written in found)


def test_refine_brings_the_outputs_nearer(bench: Bench, base: Written) -> None:
    found = [base, *(bench.compress("--refine", n) for n in (1, 4))]
    for index, (one, two) in enumerate(itertools.combinations(found, 2)):
        assert not same(one.weights, two.weights, "layers.0.mlp.up"), index
        assert same(one.weights, two.weights, "layernorm"), index
    assert all(written.layers == base.layers for written in found)


def test_ridge_holds_the_weights_back(bench: Bench, base: Written) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    moved = [
        torch.linalg.norm(
            bench.compress("--update", "least-squares", "--ridge", ridge).weights[name]
            - base.weights[name]
        )
        for ridge in (1e-4, 1e-2, 1)
    ]
    assert moved[0] > moved[1] > moved[2] > 0


def test_asvd_alpha_weights_the_features(bench: Bench) -> None:
    flat, steep = (bench.compress("--mha", "asvd", "--asvd-alpha", a) for a in (0, 2))
    plain = bench.compress("--mha", "svd")
    torch.testing.assert_close(
        flat.product("self_attn.q_proj"), plain.product("self_attn.q_proj"), atol=1e-5, rtol=1e-4
    )
    assert not same(steep.weights, flat.weights, "layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["--weighting", "eq6", "--mha", "svd"], "awsvd"),
        (["--asvd-alpha", 1], "asvd"),
        (["--joint-qk", "--mha", "heads"], "low-rank attention"),
        (["--joint-qk", "--sublayers", "ffn"], "low-rank attention"),
        (["--importance", "taylor", "--ffn", "svd"], "ffn channels or mha heads"),
        (["--aggregation", "l1", "--sublayers", "mha"], "ffn channels or mha heads"),
        (["--selection", "obs", "--ffn", "pca"], "ffn channels"),
        (["--selection", "obs", "--importance", "taylor"], "selection scores or mha heads"),
        (["--selection", "obs", "--least-important", 0.1], "selection scores or mha heads"),
        (["--update", "least-squares", "--ffn", "svd"], "ffn channels or mha heads"),
        (["--ridge", 0.1], "selection obs, update least-squares, dense_target or refine"),
        (["--mgaa-alpha", 0.1], "allocation mgaa"),
        (["--mgaa-alpha", 0.1, "--allocation", "mgaa-within"], "allocation mgaa"),
        (["--allocation", "mgaa-within", "--mha", "heads"], "a low-rank method"),
        (["--allocation", 2, "--mha", "heads"], "low-rank attention"),
        (["--mha", "svd", "--sublayers", "ffn"], "mha among the sublayers"),
    ],
)
def test_an_option_without_effect_is_refused(bench: Bench, words: list[Any], needed: str) -> None:
    given = ["compress", bench.model, "--ratio", 0.3, "--calibration", bench.text]
    given += ["--output", bench.place / "none", *words]
    result = CliRunner().invoke(cli.app, [str(word) for word in given])
    assert result.exit_code == 2
    assert "has no effect without" in result.stderr
    assert needed in result.stderr


def test_least_important_chooses_other_channels(bench: Bench, base: Written) -> None:
    other = bench.compress("--least-important", 0.25)
    assert same(other.weights, base.weights, "layers.0.self_attn")
    name = "model.layers.0.mlp.up_proj.weight"
    original = load_file(bench.model / "model.safetensors")[name]
    kept, base_kept = (
        {
            channel
            for channel, row in enumerate(original)
            if (written.weights[name] == row).all(1).any()
        }
        for written in (other, base)
    )
    # A quarter of 48 channels comes from the low end, and hardly any without the option.
    assert abs(len(kept) - len(base_kept)) <= 1
    assert 10 <= len(base_kept - kept) <= 12


def test_aggregation_chooses_other_channels(bench: Bench, base: Written) -> None:
    found = [bench.compress("--aggregation", norm) for norm in ("l2", "l1", "linf")]
    assert same(found[0].weights, base.weights)
    for index, other in ((0, 1), (0, 2), (1, 2)):
        first, second = found[index].weights, found[other].weights
        assert same(first, second, "layers.0.self_attn")
        assert not same(first, second, "mlp")


def test_weighting_gives_other_factors(bench: Bench, base: Written) -> None:
    assert same(bench.compress("--weighting", "eq7").weights, base.weights)
    other = bench.compress("--weighting", "eq6")
    assert other.layers == base.layers
    for projection in ATTENTION:
        assert not same(other.weights, base.weights, f"layers.0.self_attn.{projection}")


def test_sublayers_are_what_is_compressed(bench: Bench) -> None:
    attention = bench.compress("--sublayers", "mha", "--ratio", 0.1)
    assert all(layer and "mlp" not in layer for layer in attention.layers)
    feed_forward = bench.compress("--sublayers", "ffn", "--ratio", 0.1)
    assert [set(layer) for layer in feed_forward.layers] == [{"mlp"}] * 3
    original = load_file(bench.model / "model.safetensors")
    assert same({k: v for k, v in original.items() if "mlp" in k}, attention.weights, "mlp")


def test_samples_and_seqlen_are_the_shape_of_the_ids(bench: Bench, base: Written) -> None:
    assert base.ids.shape == (6, 16)
    fewer, shorter = bench.compress("--samples", 4), bench.compress("--seqlen", 8)
    assert fewer.ids.shape == (4, 16)
    assert shorter.ids.shape == (6, 8)
    for other in (fewer, shorter):
        assert not same(other.norms, base.norms)
        assert not same(other.weights, base.weights, "layers.0.self_attn")


def test_seed_draws_other_samples(bench: Bench, base: Written) -> None:
    other = bench.compress("--seed", 1)
    assert other.ids.shape == base.ids.shape
    assert not torch.equal(other.ids, base.ids)
    assert not same(other.weights, base.weights, "layers.0.self_attn")


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_dtype_is_what_the_forwards_compute_in(dtype: str, bench: Bench, base: Written) -> None:
    other = bench.compress("--dtype", dtype)
    assert not same(other.norms, base.norms)
    closeness = {"float64": 1e-5, "bfloat16": 0.05, "float16": 0.01}[dtype]
    for name, norms in base.norms.items():
        torch.testing.assert_close(other.norms[name], norms, rtol=closeness, atol=closeness)
    assert {tensor.dtype for tensor in other.weights.values()} == {torch.float32}


def layer_inputs(bench: Bench, *words: object) -> list[Tensor]:
    """Return the hidden states that the decoder layers were called with."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        if type(module).__name__ == "LlamaDecoderLayer":
            seen.append(args[0])

    handle = register_module_forward_pre_hook(look)
    try:
        bench.compress(*words)
    finally:
        handle.remove()
    return seen


def test_batch_size_is_the_samples_of_a_forward(bench: Bench, base: Written) -> None:
    assert {len(hidden) for hidden in layer_inputs(bench)} == {6}
    assert [len(hidden) for hidden in layer_inputs(bench, "--batch-size", 4)] == [4, 2] * 6
    split = bench.compress("--batch-size", 1)
    assert torch.equal(split.ids, base.ids)
    for name, norms in base.norms.items():
        torch.testing.assert_close(split.norms[name], norms, rtol=1e-4, atol=1e-6)


def test_device_cpu_is_taken_though_there_is_a_gpu(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    hidden = layer_inputs(bench, "--device", "cpu")
    assert {state.device.type for state in hidden} == {"cpu"}


def test_activations_wait_where_they_are_told_to(
    bench: Bench, base: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[type] = []
    real = Store.keep

    def keep(self: Store, tensor: Tensor) -> Any:
        found = real(self, tensor)
        kept.append(type(found))
        return found

    monkeypatch.setattr(Store, "keep", keep)
    for place, on_disk in (("device", False), ("cpu", False), ("disk", True), ("auto", False)):
        kept.clear()
        written = bench.compress("--activations", place)
        assert same(written.weights, base.weights)
        assert {"OnDisk" in kind.__name__ for kind in kept} == {on_disk}


def test_device_auto_is_the_gpu_where_there_is_one(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AskedError(Exception):
        pass

    def ask(_: object, device: torch.device, __: object) -> None:
        raise AskedError(device.type)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("lorap.pipeline.on_disk.decoder_of", ask)
    words = ["compress", bench.model, "--ratio", 0.3, "--calibration", bench.text]
    words += ["--output", bench.place / "none", "--samples", 6, "--seqlen", 16]
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert isinstance(result.exception, AskedError)
    assert str(result.exception) == "cuda"


def test_field_is_the_one_that_is_read(bench: Bench, tmp_path: Path, base: Written) -> None:
    rows = bench.text.read_text().splitlines()
    records = [{"text": "w1 " * 30, "body": row, "other": row[::-1]} for row in rows]
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps(record) for record in records))
    assert not torch.equal(bench.compress(source=file).ids, base.ids)
    body = bench.compress("--field", "body", source=file)
    assert torch.equal(body.ids, base.ids)
    assert same(body.weights, base.weights)


def test_revision_is_what_is_downloaded(
    bench: Bench, tmp_path: Path, base: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    revisions = {None: bench.model, "v2": tmp_path / "v2"}
    save_tiny_checkpoint(revisions["v2"], seed=1)
    asked = []

    def download(name: str, *, revision: str | None = None, **_: object) -> str:
        assert name == "owner/model"
        asked.append(revision)
        return str(revisions[revision])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(bench.compress(model="owner/model").weights, base.weights)
    assert set(asked) == {None}
    asked.clear()
    other = bench.compress("--revision", "v2", model="owner/model")
    assert set(asked) == {"v2"}
    assert same(other.weights, bench.compress(model=revisions["v2"]).weights)
    assert not same(other.weights, base.weights)


def test_allow_bin_reads_pickled_weights(bench: Bench, tmp_path: Path, base: Written) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(bench.model, pickled)
    state = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(state, pickled / "pytorch_model.bin")
    assert same(bench.compress("--allow-bin", model=pickled).weights, base.weights)
    # Where there are safetensors, they are read all the same.
    state["model.norm.weight"] += 1
    save_file(state, pickled / "model.safetensors", metadata={"format": "pt"})
    both = bench.compress("--allow-bin", model=pickled)
    assert torch.equal(both.weights["model.norm.weight"], state["model.norm.weight"])


def test_disk_space_is_checked_where_the_output_goes_before_weights_are_read(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, elsewhere = tmp_path / "full", tmp_path / "elsewhere"
    full.mkdir()
    elsewhere.symlink_to(full)
    asked: list[Path] = []
    usage = shutil.disk_usage(tmp_path)

    def nearly_full(path: str | os.PathLike[str]) -> Any:
        asked.append(Path(path))
        return usage._replace(free=10_000)

    def work(*_: object, **__: object) -> None:
        raise AssertionError("the work was begun")

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    for name in ("load", "load_others", "iter_tensors"):
        monkeypatch.setattr(CheckpointReader, name, work)
    monkeypatch.setattr("lorap.pipeline.on_disk.compress_layers", work)
    words = ["compress", bench.model, "--ratio", 0.3, "--calibration", bench.text]
    words += ["--output", elsewhere / "new" / "small", "--samples", 6, "--seqlen", 16]
    result = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert result.exit_code == 2, (result.stderr, result.exception)
    message = " ".join(result.stderr.split())
    assert "of disk space" in message
    assert f"{full} has 0.01 MiB free" in message
    assert set(asked) == {full}
    assert list(full.iterdir()) == []
