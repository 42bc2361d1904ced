"""Algorithm 1 on tiny models: in memory, on disk, and where it must stop."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorap
from lorap import CompressionConfig, LorapError, UsageError
from lorap.config import Override
from lorap.ops.statistics import sum_of_squares
from lorap.pipeline import in_memory, inspection, on_disk
from lorap.pipeline.statistics import TAKEN, collect
from tests.tiny_models import VARIANTS, save_tiny_checkpoint, tiny_model, token_ids

IDS = token_ids(8, 16)


def config(**settings: Any) -> CompressionConfig:
    values: dict[str, Any] = {"ratio": 0.3, "samples": 8, "seqlen": 16}
    return CompressionConfig(**(values | settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_memory_disk_and_reload_agree_bit_for_bit(
    variant: str, dtype: torch.dtype, tmp_path: Path, ids_file: str
) -> None:
    original = save_tiny_checkpoint(tmp_path / "model", dtype=dtype, **VARIANTS[variant])
    report = lorap.compress_checkpoint(
        tmp_path / "model", tmp_path / "out", config(), calibration=ids_file
    )
    in_memory = lorap.compress(original, config(), calibration=IDS)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert reloaded.dtype == dtype
    expected, got = in_memory.state_dict(), reloaded.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    x = token_ids(2, 9, seed=3)
    with torch.no_grad():
        assert torch.equal(in_memory(x).logits, reloaded(x).logits)
    assert reloaded.num_parameters() == report["parameters"]["after"]
    assert in_memory.num_parameters() == report["parameters"]["after"]


@pytest.mark.spec("algorithm.sequence")
@pytest.mark.parametrize("rope", ["default", "llama3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_layer_by_layer_is_the_forward_of_the_compressed_model(variant: str, rope: str) -> None:
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    model = tiny_model(**VARIANTS[variant])
    if rope == "llama3":
        if not hasattr(model.config, "rope_parameters"):
            pytest.skip("transformers 4 spells the scaling of the frequencies in another way")
        model = tiny_model(**VARIANTS[variant], rope_parameters=scaled)
    outputs: list[torch.Tensor] = []
    real = in_memory.compress_layers

    def recording(decoder: Any, batches: Any, *args: Any) -> Any:
        for layer in real(decoder, batches, *args):
            outputs[:] = [batch.kept.load() for batch in batches]
            yield layer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_memory, "compress_layers", recording)
        compressed = lorap.compress(model, config(batch_size=3), calibration=IDS)
    with torch.no_grad():
        logits = compressed.lm_head(compressed.model.norm(torch.cat(outputs)))
        torch.testing.assert_close(logits, compressed(IDS).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sublayers", [("mha",), ("ffn",), ("mha", "ffn")])
def test_what_is_not_compressed_stays_bit_for_bit(sublayers: tuple[str, ...]) -> None:
    model = tiny_model(**VARIANTS["biased"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compressed = lorap.compress(model, config(sublayers=sublayers, ratio=0.15), calibration=IDS)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), "the original was changed"
    new = compressed.state_dict()
    changed = {
        name for name in before if name not in new or not torch.equal(before[name], new[name])
    }
    assert changed
    for name in changed:
        assert ("self_attn" in name and "mha" in sublayers) or (
            "mlp" in name and "ffn" in sublayers
        )
        assert not name.endswith(("o_proj.bias", "down_proj.bias")) or name not in new
    with torch.no_grad():
        compressed.model.embed_tokens.weight.zero_()
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])


@pytest.mark.spec("algorithm.mha", "algorithm.ffn")
def test_biases_survive_factoring_and_pruning() -> None:
    model = tiny_model(**VARIANTS["biased"])
    compressed = lorap.compress(model, config(ratio=0.4), calibration=IDS)
    old, new = model.model.layers[0], compressed.model.layers[0]
    assert torch.equal(new.self_attn.q_proj.left.bias, old.self_attn.q_proj.bias)
    assert torch.equal(new.mlp.down_proj.bias, old.mlp.down_proj.bias)
    kept = [
        next(i for i in range(48) if torch.equal(old.mlp.up_proj.weight[i], row))
        for row in new.mlp.up_proj.weight
    ]
    assert kept == sorted(set(kept))
    assert torch.equal(new.mlp.up_proj.bias, old.mlp.up_proj.bias[kept])
    assert torch.equal(new.mlp.gate_proj.bias, old.mlp.gate_proj.bias[kept])
    assert torch.equal(new.mlp.down_proj.weight, old.mlp.down_proj.weight[:, kept])


@pytest.mark.spec("algorithm.heads", "algorithm.scores")
@pytest.mark.parametrize(
    ("aggregation", "kept"),
    [("l2", [0, 3, 4, 5, 6]), ("l1", [0, 3, 4, 5, 6]), ("linf", [0, 1, 4, 5, 6])],
)
def test_heads_that_score_least_go_with_their_biases(aggregation: str, kept: list[int]) -> None:
    """Eight groups of two query heads and a key/value head, of four features each."""
    model = tiny_model(
        num_attention_heads=16, num_key_value_heads=8, head_dim=4, attention_bias=True
    )
    settings: dict[str, Any] = {"mha": "heads", "importance": "magnitude", "sublayers": ("mha",)}
    options = config(ratio=0.4, ratio_scope="layer", aggregation=aggregation, **settings)
    compressed = lorap.compress(model, options, calibration=IDS)
    old, new = (m.model.layers[0].self_attn for m in (model, compressed))
    norm = {"l2": 2, "l1": 1, "linf": torch.inf}[aggregation]

    def rows(groups: list[int], share: int) -> list[int]:
        size = 4 * share
        return [size * group + i for group in groups for i in range(size)]

    scores = [
        sum(
            torch.linalg.vector_norm(block.double(), norm).item()
            for block in (
                old.q_proj.weight[rows([group], 2)],
                old.k_proj.weight[rows([group], 1)],
                old.v_proj.weight[rows([group], 1)],
                old.o_proj.weight[:, rows([group], 2)],
            )
        )
        for group in range(8)
    ]
    # int(0.41 * 8) = 3 of them go.
    assert kept == sorted(sorted(range(8), key=scores.__getitem__)[3:])
    for name, share in (("q_proj", 2), ("k_proj", 1), ("v_proj", 1)):
        linear, dense = new.get_submodule(name), old.get_submodule(name)
        assert torch.equal(linear.weight, dense.weight[rows(kept, share)])
        assert torch.equal(linear.bias, dense.bias[rows(kept, share)])
    assert torch.equal(new.o_proj.weight, old.o_proj.weight[:, rows(kept, 2)])
    assert torch.equal(new.o_proj.bias, old.o_proj.bias)


@pytest.mark.spec("stats.padding")
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_counts(side: str) -> None:
    model = tiny_model(**VARIANTS["gqa"])
    padding = torch.randint(3, 90, (8, 5), generator=torch.Generator().manual_seed(9))
    blank, full = torch.zeros_like(padding), torch.ones_like(IDS)
    padded, mask = (
        (torch.cat([padding, IDS], 1), torch.cat([blank, full], 1))
        if side == "left"
        else (torch.cat([IDS, padding], 1), torch.cat([full, blank], 1))
    )
    settings = config(dtype="float64", ratio=0.4)
    expected = lorap.compress(model, settings, calibration=IDS).state_dict()
    got = lorap.compress(
        model, settings, calibration=padded, attention_mask=mask.numpy()
    ).state_dict()
    counted = lorap.compress(model, settings, calibration=padded).state_dict()

    def product(state: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
        name = f"model.layers.{layer}.self_attn.k_proj"
        return state[f"{name}.left.weight"].double() @ state[f"{name}.right.weight"].double()

    # The rotary angles are rounded to float32 and depend on the position, hence not exact.
    for layer in range(3):
        torch.testing.assert_close(product(got, layer), product(expected, layer), rtol=0, atol=1e-5)
    assert torch.equal(
        got["model.layers.0.mlp.up_proj.weight"], expected["model.layers.0.mlp.up_proj.weight"]
    )
    assert (product(counted, 0) - product(expected, 0)).abs().max() > 1e-4


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="attention_mask"):
        lorap.compress(tiny_model(), config(), calibration=IDS, attention_mask=torch.ones(8, 3))


@pytest.mark.spec("stats.sum-of-squares", "algorithm.scores", "mgaa.measure")
@pytest.mark.parametrize("options", [{}, {"importance": "taylor"}, {"allocation": "mgaa"}])
def test_the_batch_size_changes_rounding_at_most(options: dict[str, Any]) -> None:
    model = tiny_model()
    settings = {"dtype": "float64", "ratio": 0.4, **options}
    whole = lorap.compress(model, config(**settings), calibration=IDS).state_dict()
    for size in (1, 3):
        parts = lorap.compress(
            model, config(batch_size=size, **settings), calibration=IDS
        ).state_dict()
        for name in whole:
            if "mlp" in name:
                assert torch.equal(whole[name], parts[name])


@pytest.mark.spec("stats.padding")
def test_each_batch_has_the_mask_of_its_own_samples() -> None:
    """Samples of all lengths, padded on the right to the longest."""
    model = tiny_model()
    lengths = torch.tensor([16, 3, 9, 1, 12, 6, 2, 15])
    mask = torch.arange(16)[None, :] < lengths[:, None]
    settings = {"dtype": "float64", "ratio": 0.4}

    def compressed(ids: torch.Tensor, size: int | None) -> dict[str, torch.Tensor]:
        options = config(batch_size=size, **settings)
        return lorap.compress(model, options, calibration=ids, attention_mask=mask).state_dict()

    noise = token_ids(8, 16, seed=5)
    whole = compressed(IDS, None)
    other = compressed(torch.where(mask, IDS, noise), 3)
    for name in whole:
        if "mlp" in name:
            assert torch.equal(whole[name], other[name])


@pytest.mark.spec("algorithm.mha", "algorithm.ffn")
@pytest.mark.parametrize(
    ("settings", "changed", "same"),
    [
        ({"weighting": "eq6"}, "self_attn.q_proj.right.weight", "mlp.up_proj.weight"),
        ({"aggregation": "linf"}, "mlp.up_proj.weight", "self_attn.q_proj.right.weight"),
        ({"aggregation": "l1"}, "mlp.up_proj.weight", "self_attn.q_proj.right.weight"),
    ],
)
def test_weighting_and_aggregation_change_what_they_are_for(
    settings: dict[str, Any], changed: str, same: str
) -> None:
    """In the first layer; those after it have another input."""
    model = tiny_model()
    usual = lorap.compress(model, config(ratio=0.4), calibration=IDS).model.layers[0].state_dict()
    other = lorap.compress(model, config(ratio=0.4, **settings), calibration=IDS)
    layer = other.model.layers[0].state_dict()
    assert not torch.equal(usual[changed], layer[changed])
    assert torch.equal(usual[same], layer[same])


@pytest.mark.spec("algorithm.sequence")
@pytest.mark.parametrize(
    ("settings", "per_layer"),
    [
        ({"sublayers": ("ffn",)}, 2),
        ({"sublayers": ("mha",), "ratio": 0.3}, 2),
        ({"ratio": 0.5, "ratio_scope": "layer"}, 4),
        # v and o stay dense: only the input of q and k, and those of the feed-forward block.
        ({"ratio": 0.1, "ratio_scope": "layer"}, 3),
    ],
)
def test_nothing_is_collected_that_the_plan_does_not_need(
    settings: dict[str, Any], per_layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counting(inputs: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(inputs.shape)
        return sum_of_squares(inputs, mask)

    monkeypatch.setitem(TAKEN, "squares", counting)
    lorap.compress(tiny_model(), config(batch_size=4, **settings), calibration=IDS)
    assert len(calls) == 3 * 2 * per_layer


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Down's own product is not needed.
        ({"ratio": 0.5}, ["q", "k", "v", "o", "gate", "up"]),
        ({"ratio": 0.5, "sublayers": ("mha",)}, ["q", "k", "v"]),
        # v and o stay dense.
        ({"ratio": 0.1, "sublayers": ("mha",)}, []),
    ],
)
def test_a_forward_for_statistics_ends_with_the_last_of_them(
    settings: dict[str, Any], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def watched(layer: torch.nn.Module, *arguments: Any) -> Any:
        names = {module: name for name, module in layer.named_modules()}
        forward = torch.nn.Linear.forward

        def noting(linear: torch.nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
            ran.append(names[linear].rpartition(".")[2].removesuffix("_proj"))
            return forward(linear, inputs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.Linear, "forward", noting)
            return collect(layer, *arguments)

    monkeypatch.setattr("lorap.pipeline.layers.collect", watched)
    whole = config(batch_size=4, ratio_scope="layer", **settings)
    lorap.compress(tiny_model(), whole, calibration=IDS)
    # In each of three layers, of each of two batches.
    assert ran == 3 * 2 * expected


def test_a_skipped_layer_is_run_but_not_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setitem(
        TAKEN, "squares", lambda x, mask: (seen.append(1), sum_of_squares(x, mask))[1]
    )
    settings = config(overrides=(Override("layers.[01]", skip=True),), ratio_scope="layer")
    model = tiny_model()
    compressed = lorap.compress(model, settings, calibration=IDS)
    assert len(seen) == 3
    state = compressed.state_dict()
    for name, tensor in model.state_dict().items():
        if name.startswith(("model.layers.0.", "model.layers.1.")):
            assert torch.equal(state[name], tensor)


def test_report_and_companions(tmp_path: Path, ids_file: str) -> None:
    save_tiny_checkpoint(tmp_path / "model", **VARIANTS["gqa"])
    returned = lorap.compress_checkpoint(
        tmp_path / "model", tmp_path / "out", config(ratio=0.4), calibration=ids_file
    )
    report = json.loads((tmp_path / "out" / "lorap_report.json").read_text())
    assert report == json.loads(json.dumps(returned))
    assert report["ratio"] == 0.4
    assert report["achieved_ratio"] == pytest.approx(0.4, abs=0.03)
    assert report["calibration"]["source"] == ids_file
    assert report["versions"]["torch"] == torch.__version__
    assert report["peak_memory_bytes"]["cpu"] > 1e8
    stored = load_file(tmp_path / "out" / report["calibration"]["file"])["input_ids"]
    assert torch.equal(stored, IDS)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for index, layer in enumerate(report["layers"]):
        assert layer["seconds"] > 0
        for name, module in layer["modules"].items():
            built = model.model.layers[index].get_submodule(name)
            assert module["parameters"] == sum(p.numel() for p in built.parameters())
            if module["kind"] == "low_rank":
                assert module["rank"] == built.rank
                # Orthonormal left factors: the kept and the lost energy make up the whole.
                assert module["relative_weighted_error"] ** 2 == pytest.approx(
                    1 - module["retained_energy"], abs=1e-5
                )
        mlp = layer["modules"]["mlp"]
        kept = mlp["kept_channels"]
        assert len(kept) == mlp["width"] == len(set(kept))
        up = original.model.layers[index].mlp.up_proj.weight
        assert torch.equal(model.model.layers[index].mlp.up_proj.weight, up[kept])
        norms = load_file(tmp_path / "out" / "lorap_statistics.safetensors")
        ffn = norms[f"model.layers.{index}.ffn.norms"].numpy()
        channels = norms[f"model.layers.{index}.down.norms"].numpy()
        dense = original.model.layers[index].mlp
        scored = {
            "gate": dense.gate_proj.weight.detach().double().numpy() * ffn,
            "up": dense.up_proj.weight.detach().double().numpy() * ffn,
            "down": (dense.down_proj.weight.detach().double().numpy() * channels).T,
        }
        gone = [channel for channel in range(48) if channel not in kept]
        for role, rows in scored.items():
            assert mlp["relative_weighted_error"][role] == pytest.approx(
                np.linalg.norm(rows[gone]) / np.linalg.norm(rows), rel=1e-6
            )
        energy = sum(np.linalg.norm(rows) ** 2 for rows in scored.values())
        held = sum(np.linalg.norm(rows[kept]) ** 2 for rows in scored.values())
        assert mlp["retained_energy"] == pytest.approx(held / energy, rel=1e-6)
        cut = mlp["scores_at_cut"]
        assert cut["lowest_removed"] <= cut["highest_removed"] <= cut["lowest_of_top"]
        assert set(mlp["relative_weighted_error"]) == {"gate", "up", "down"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "40.00%" in card


def test_a_recipe_that_fixes_every_module_needs_no_ratio(tmp_path: Path, ids_file: str) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    overrides = (Override("*.self_attn", rank=5), Override("*.mlp", width=31))
    report = lorap.compress_checkpoint(
        tmp_path / "model",
        tmp_path / "out",
        config(ratio=None, overrides=overrides),
        calibration=ids_file,
    )
    assert report["ratio"] is None
    for layer in report["layers"]:
        assert layer["modules"]["self_attn.v_proj"]["rank"] == 5
        assert layer["modules"]["mlp"]["width"] == 31
    assert "set by the recipe" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_can_be_repeated_from_its_own_calibration_ids(tmp_path: Path, ids_file: str) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    lorap.compress_checkpoint(
        tmp_path / "model", tmp_path / "a", config(seqlen=12, samples=5), calibration=ids_file
    )
    lorap.compress_checkpoint(
        tmp_path / "model",
        tmp_path / "b",
        config(seqlen=12, samples=5, seed=7),
        calibration=str(tmp_path / "a" / "lorap_calibration.safetensors"),
    )
    for name in sorted(p.name for p in (tmp_path / "a").glob("model-*.safetensors")):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_run_interrupted_before_its_first_layer_leaves_nothing(
    tmp_path: Path, ids_file: str
) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    before = sorted(tmp_path.iterdir())

    def interrupt(done: int, _: int) -> None:
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorap.compress_checkpoint(
            tmp_path / "model",
            tmp_path / "out",
            config(),
            calibration=ids_file,
            progress=interrupt,
        )
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("at", [1, 2])
def test_a_signal_while_the_old_checkpoint_makes_way_loses_neither(
    at: int, tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    model, output = tmp_path / "model", tmp_path / "out"
    lorap.compress_checkpoint(model, output, config(), calibration=ids_file)
    before = sorted(path.name for path in tmp_path.iterdir())
    moves: list[Path] = []
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        if output in (self, target):
            moves.append(target)
            if len(moves) == at:
                signal.raise_signal(signal.SIGINT)
        return moved

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorap.compress_checkpoint(
            model, output, config(ratio=0.4), calibration=ids_file, overwrite=True
        )
    assert len(moves) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert json.loads((output / "lorap_report.json").read_text())["ratio"] == 0.4
    AutoModelForCausalLM.from_pretrained(output)


def test_progress_is_told_before_the_first_layer_and_after_each() -> None:
    calls: list[tuple[int, int]] = []
    lorap.compress(
        tiny_model(), config(), calibration=IDS, progress=lambda *call: calls.append(call)
    )
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.embed_tokens.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    layers: list[int] = []
    with pytest.raises(LorapError, match=f"{name}: the weight holds NaN or inf"):
        lorap.compress(
            model, config(), calibration=IDS, progress=lambda done, _: layers.append(done)
        )
    assert layers == []


def test_weights_on_disk_are_checked_while_the_first_layers_are_at_work(
    tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with the last layer does not wait for its turn."""
    model = save_tiny_checkpoint(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    found = threading.Event()
    real = inspection.Inspection._run

    def inspect(self: inspection.Inspection) -> None:
        real(self)
        found.set()

    monkeypatch.setattr(inspection.Inspection, "_run", inspect)
    done: list[int] = []

    def progress(layers: int, _: int) -> None:
        done.append(layers)
        assert found.wait(60)

    with pytest.raises(LorapError, match=r"model\.layers\.2\.mlp\.down_proj\.weight: the weight"):
        lorap.compress_checkpoint(
            tmp_path / "model",
            tmp_path / "out",
            config(),
            calibration=ids_file,
            progress=progress,
        )
    assert max(done) <= 1
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".lorap*"))


def test_a_hub_model_is_not_fetched_for_a_run_that_cannot_be(
    tmp_path: Path, ids_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_checkpoint(tmp_path / "model")
    monkeypatch.setattr(on_disk, "open_checkpoint", lambda *_, **__: pytest.fail("fetched"))
    for settings, calibration, message in (
        (config(ratio=0.99), ids_file, "cannot be reached"),
        (config(), str(tmp_path / "none.npy"), r"none\.npy"),
        (config(seqlen=17), ids_file, "17"),
    ):
        with pytest.raises(UsageError, match=message):
            lorap.compress_checkpoint(
                tmp_path / "model", tmp_path / "out", settings, calibration=calibration
            )


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_head_of_its_own_stays_although_the_configuration_ties(
    on_disk: bool, tmp_path: Path, ids_file: str
) -> None:
    untied = tiny_model(**VARIANTS["gqa"])
    untied.config.tie_word_embeddings = True
    if on_disk:
        state = {name: tensor.contiguous() for name, tensor in untied.state_dict().items()}
        save_tiny_checkpoint(tmp_path / "model", **VARIANTS["tied"])
        save_file(state, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
        lorap.compress_checkpoint(
            tmp_path / "model", tmp_path / "out", config(), calibration=ids_file
        )
        compressed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    else:
        compressed = lorap.compress(untied, config(), calibration=IDS)
    assert torch.equal(compressed.lm_head.weight, untied.lm_head.weight)
    assert torch.equal(compressed.model.embed_tokens.weight, untied.model.embed_tokens.weight)
    assert not compressed.config.tie_word_embeddings


def test_tensors_of_other_dtypes_change_nothing_between_memory_and_disk(
    tmp_path: Path, ids_file: str
) -> None:
    model = tiny_model(dtype=torch.bfloat16)
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.float()
    model.model.norm.weight.data = model.model.norm.weight.data.float()
    model.save_pretrained(tmp_path / "model")
    lorap.compress_checkpoint(tmp_path / "model", tmp_path / "out", config(), calibration=ids_file)
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("model-*.safetensors"):
        stored |= load_file(file)
    in_memory = lorap.compress(model, config(), calibration=IDS).state_dict()
    assert stored.keys() == in_memory.keys()
    for name, tensor in stored.items():
        assert tensor.dtype == in_memory[name].dtype
        assert torch.equal(tensor, in_memory[name])


def test_what_is_no_whole_model_for_language_modelling_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(UsageError, match="no head; load it with AutoModelForCausalLM"):
        lorap.compress(model.model, config(), calibration=IDS)
    with pytest.raises(UsageError, match="offloaded"):
        lorap.compress(model.to("meta"), config(), calibration=IDS)
    with pytest.raises(UsageError, match=r"token ids as a tensor or an array .* got list"):
        lorap.compress(tiny_model(), config(), calibration=IDS.tolist())


def test_activations_that_overflow_are_named() -> None:
    model = tiny_model(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(LorapError, match=r"layers\.1\.mlp\.down_proj: its input holds NaN or inf"):
        lorap.compress(model, config(), calibration=IDS)


@pytest.mark.spec("precision.compute")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_compute_their_factors_in_float32(dtype: torch.dtype) -> None:
    wide = tiny_model()
    narrow = tiny_model(dtype=dtype)
    for parameter, source in zip(wide.parameters(), narrow.parameters(), strict=True):
        parameter.data = source.data.float()
    settings = config(dtype="float32", ratio=0.4)
    exact = lorap.compress(wide, settings, calibration=IDS).model.layers[0].self_attn.q_proj
    rounded = lorap.compress(narrow, settings, calibration=IDS).model.layers[0].self_attn.q_proj
    # Same statistics, same decomposition: the factors differ by one rounding to storage.
    assert torch.equal(rounded.left.weight, exact.left.weight.to(dtype))
    assert torch.equal(rounded.right.weight, exact.right.weight.to(dtype))


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3\n" * 50)
    with pytest.raises(UsageError, match="expected a tokenizer"):
        lorap.compress(tiny_model(), config(), calibration=str(tmp_path / "text.txt"))
