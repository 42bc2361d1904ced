"""Compressed layers refined against what the uncompressed model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lorap
from lorap.config import CompressionConfig, Override
from lorap.errors import LorapError
from lorap.ops.refinement import Descent
from lorap.pipeline import refinement
from lorap.pipeline.forward import Batch
from tests.tiny_models import (
    FAMILY_FIELDS,
    VARIANTS,
    save_tiny_checkpoint,
    tiny_family_model,
    tiny_model,
    token_ids,
)

IDS = token_ids(8, 16)
PLAIN: dict[str, Any] = {}
BEST = {"mha": "pca", "selection": "obs", "update": "least-squares", "dense_target": 0.5}
OTHERS = {"mha": "afm", "ffn": "svd", "joint_qk": True}


def config(**settings: Any) -> CompressionConfig:
    return CompressionConfig(**({"ratio": 0.3, "device": "cpu", "refine": 3} | settings))


def missed(model: Any, original: Any) -> float:
    """Squared distance of the outputs of a model's first layer."""
    found = []
    for one in (model, original):
        with torch.no_grad():
            found.append(one.model(IDS, output_hidden_states=True).hidden_states[1])
    return float((found[0] - found[1]).double().square().sum())


@pytest.mark.spec("algorithm.refine", "refine.loss", "refine.weights")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [PLAIN, BEST, OTHERS], ids=["plain", "best", "others"])
def test_the_report_says_how_far_the_layer_is_from_the_uncompressed_one(
    settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path, ids_file: str
) -> None:
    original = save_tiny_checkpoint(tmp_path / "model", dtype=dtype, **VARIANTS["gqa"])
    chosen = config(samples=8, seqlen=16, batch_size=3, **settings)
    report = lorap.compress_checkpoint(
        tmp_path / "model", tmp_path / "out", chosen, calibration=ids_file
    )
    plain = lorap.compress(original, config(refine=0, **settings), calibration=IDS)
    refined = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    in_memory = lorap.compress(original, config(batch_size=3, **settings), calibration=IDS)
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(tensor, refined.state_dict()[name]), name
    for layer in report["layers"]:
        *losses, stored = layer["losses"]
        assert len(losses) == 4
        assert losses == sorted(losses, reverse=True)
        assert stored < losses[0]
        if dtype == torch.float32:
            assert stored == losses[-1]
    first, *_, last = report["layers"][0]["losses"]
    exact = 1e-5 if dtype == torch.float32 else 0.05
    # Upwards of it the model computes as the layers of the pipeline do.
    assert missed(plain, original) == pytest.approx(first, rel=exact)
    assert missed(refined, original) == pytest.approx(last, rel=exact)
    assert report["parameters"] == plain_parameters(report, plain)


def plain_parameters(report: dict[str, Any], plain: Any) -> dict[str, Any]:
    """Return what the report has to say where refinement adds no parameters."""
    return report["parameters"] | {"after": plain.num_parameters()}


def test_norms_biases_and_what_is_skipped_stay() -> None:
    model = tiny_model(**VARIANTS["gqa"])
    settings = config(
        overrides=(Override("layers.1", skip=True), Override("layers.2.*.o_proj", skip=True))
    )
    state = lorap.compress(model, settings, calibration=IDS).state_dict()
    before = model.state_dict()
    same = {name for name, t in before.items() if name in state and torch.equal(t, state[name])}
    assert {n for n in before if n.startswith("model.layers.1.")} <= same
    assert "model.layers.2.self_attn.o_proj.weight" in same
    assert {n for n in before if "norm" in n or (n.endswith("bias") and "mlp" not in n)} <= same
    # What the budget leaves dense is not skipped.
    unrefined = lorap.compress(
        model, config(refine=0, overrides=settings.overrides), calibration=IDS
    ).state_dict()
    changed = {name for name, t in state.items() if not torch.equal(t, unrefined[name])}
    assert {n.rpartition(".")[2] for n in changed} == {"weight"}
    touched = {n for n in state if "proj" in n and n.endswith("weight") and ".1." not in n}
    assert changed == touched - {"model.layers.2.self_attn.o_proj.weight"}


def test_one_sublayer_alone() -> None:
    model = tiny_model()
    state = lorap.compress(model, config(sublayers=("ffn",)), calibration=IDS).state_dict()
    for name, tensor in model.state_dict().items():
        if "self_attn" in name:
            assert torch.equal(tensor, state[name])


@pytest.mark.spec("refine.weights")
@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_every_linear_of_every_family_takes_part(family: str) -> None:
    model = tiny_family_model(family)
    if model.config is not model.config.get_text_config():
        pytest.skip("its language model has a type of its own, which is among the others")
    parts = {"ffn": "mlp", "mha": "self_attn"}
    for sublayers in (("mha",), ("ffn",), ("mha", "ffn")):
        # Where a norm follows, as in OLMo 2, the first steps are far too long.
        settings = {"sublayers": sublayers, "ratio": 0.1}
        plain, refined = (
            lorap.compress(model, config(refine=n, **settings), calibration=IDS).state_dict()
            for n in (0, 8)
        )
        changed = {name for name, tensor in refined.items() if not torch.equal(tensor, plain[name])}
        named = tuple(parts[sublayer] for sublayer in sublayers)
        assert changed == {
            n
            for n in refined
            if any(part in n for part in named) and "norm" not in n and n.endswith(".weight")
        }


@pytest.mark.spec("refine.weights")
def test_what_is_not_better_as_it_is_stored_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(values: Any, loss: Any, *_: Any) -> Descent:
        return Descent({name: value + 1 for name, value in values.items()}, [loss(values), 0.0])

    monkeypatch.setattr(refinement, "conjugate_gradients", worse)
    model = tiny_model()
    plain = lorap.compress(model, config(refine=0), calibration=IDS).state_dict()
    for name, tensor in lorap.compress(model, config(), calibration=IDS).state_dict().items():
        assert torch.equal(tensor, plain[name])


def test_padding_has_no_part() -> None:
    model = tiny_model()
    padded = torch.cat([IDS, torch.full_like(IDS, 3)], dim=1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros_like(IDS)], dim=1)
    whole = lorap.compress(model, config(), calibration=IDS).state_dict()
    masked = lorap.compress(model, config(), calibration=padded, attention_mask=mask).state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, masked[name], rtol=1e-3, atol=1e-4)


def test_a_loss_that_overflows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors may overflow in between where the matrix does not."""
    run = Batch.run

    def overflowing(self: Batch, layer: Any, index: int, hidden: Any = None) -> torch.Tensor:
        output = run(self, layer, index, hidden)
        factored = any(".left." in name for name, _ in layer.named_parameters())
        return output + torch.inf if factored and index == 1 else output

    monkeypatch.setattr(Batch, "run", overflowing)
    with pytest.raises(LorapError, match=r"layers\.1: the distance .* is not finite; .* --dtype"):
        lorap.compress(tiny_model(), config(), calibration=IDS)
