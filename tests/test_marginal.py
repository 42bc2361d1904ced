"""The marginal allocation on both sides: hand values, brute force, and what the pipeline does."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lorap
from lorap.config import CompressionConfig, Override
from lorap.errors import LorapError, UsageError
from lorap.families import family_of
from lorap.pipeline.forward import PROBES
from lorap.plan import Measurements, draft_plan, make_plan, probe_plan
from tests.tiny_models import save_tiny_checkpoint, tiny_config, tiny_model, token_ids

BEST: dict[str, Any] = {
    "mha": "pca",
    "selection": "obs",
    "update": "least-squares",
    "allocation": "marginal",
}


class Side:
    """One of the two implementations, called with lists."""

    def __init__(self, package: str, make: Callable[[Any], Any]) -> None:
        self.marginal = importlib.import_module(f"{package}.marginal")
        self.make = make

    def divergence(self, Z: Any, Z_hat: Any) -> float:
        found = self.marginal.divergence_sum(
            *(self.make(np.asarray(z, dtype=float)) for z in (Z, Z_hat))
        )
        assert type(found) is float
        return found


@pytest.fixture(params=["lorap_reference", "lorap.ops"])
def side(request: pytest.FixtureRequest) -> Side:
    make = np.asarray if request.param == "lorap_reference" else torch.tensor
    return Side(request.param, make)


@pytest.mark.spec("marginal.divergence")
def test_divergence_by_loops(side: Side) -> None:
    rng = np.random.default_rng(0)
    Z, Z_hat = 3 * rng.standard_normal((2, 5, 7))
    expected = 0.0
    for z, z_hat in zip(Z.tolist(), Z_hat.tolist(), strict=True):
        total, total_hat = sum(map(exp, z)), sum(map(exp, z_hat))
        for a, b in zip(z, z_hat, strict=True):
            p, p_hat = exp(a) / total, exp(b) / total_hat
            expected += p * log(p / p_hat)
    assert side.divergence(Z, Z_hat) == pytest.approx(expected, rel=1e-12)
    assert side.divergence(Z_hat, Z) != pytest.approx(expected, rel=1e-3)
    assert side.divergence(Z, Z) == 0
    assert side.divergence(Z, Z + rng.standard_normal((5, 1))) == pytest.approx(0, abs=1e-13)


@pytest.mark.spec("marginal.divergence")
def test_large_logits_do_not_overflow(side: Side) -> None:
    assert side.divergence([[1e4, 0.0]], [[1e4 - 3, 0.0]]) == pytest.approx(0, abs=1e-12)
    assert side.divergence([[1e4, 0.0]], [[0.0, 1e4]]) == pytest.approx(1e4)


@pytest.mark.spec("marginal.divergence", "stats.padding")
def test_what_the_mask_leaves_out_does_not_diverge() -> None:
    ops = importlib.import_module("lorap.ops.marginal")
    Z, Z_hat = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    expected = ops.divergence_sum(Z[mask.bool()], Z_hat[mask.bool()])
    assert ops.divergence_sum(Z, Z_hat, mask) == pytest.approx(expected, rel=1e-14)
    assert ops.divergence_sum(Z, Z_hat, torch.zeros(3, 4)) == 0


@pytest.mark.spec("marginal.curve")
def test_ranks_that_save_nothing_are_no_sizes(side: Side) -> None:
    """A square matrix of 4: rank 2 holds as much as the dense one. A row has no rank at all."""
    S = side.make(np.array([2.0, 1.0, 1.0, 1.0]))
    assert side.marginal.rank_curve(S, (4, 4)) == ([8, 16], [3.0, 0.0])
    assert side.marginal.rank_curve(S, (4, 4), 8) == ([16], [0.0])
    assert side.marginal.rank_curve(side.make(np.array([2.0])), (1, 9)) == ([9], [0.0])


@pytest.mark.spec("marginal.curve")
def test_errors_are_added_from_the_smallest_on(side: Side) -> None:
    small = 2.0**-27  # its square is half a unit of 1.0
    S = side.make(np.array([4.0, 1.0, small, small, 0.0]))
    _, errors = side.marginal.rank_curve(S, (5, 50))
    assert errors[:2] == [1 + 2.0**-53, 2.0**-53]
    assert errors[0] > 1 or 1 + 2.0**-53 == 1
    _, errors = side.marginal.channel_curve(side.make(np.array([1.0, 2.0**-53, 2.0**-53])), 1)
    assert errors == [1.0, 1.0, 1.0, 0.0]


@pytest.mark.spec("marginal.sizes")
def test_sizes_by_brute_force(side: Side) -> None:
    """Convex curves of one step: the steps fit, and the sizes are the best of all."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        curves, weights = {}, {}
        for name in "abc":
            drops = np.sort(rng.integers(1, 100, 4))
            errors = [*np.cumsum(drops)[::-1].astype(float).tolist(), 0.0]
            curves[name] = ([3 * (j + 1) for j in range(5)], errors)
            weights[name] = float(rng.choice([0.5, 1.0, 7.0]))
        budget = int(rng.integers(9, 46))

        def loss(places: tuple[int, ...], curves: Any = curves, weights: Any = weights) -> float:
            return sum(weights[m] * curves[m][1][j] for m, j in zip(curves, places, strict=True))

        fitting = [
            places
            for places in product(range(5), repeat=3)
            if sum(3 * (j + 1) for j in places) <= budget
        ]
        found = side.marginal.marginal_sizes(curves, weights, budget, dict.fromkeys(curves, 0))
        assert tuple(found.values()) in fitting
        assert loss(tuple(found.values())) == pytest.approx(min(map(loss, fitting)), rel=1e-12)


@pytest.mark.spec("marginal.sizes")
def test_a_jump_to_the_dense_matrix_is_seen(side: Side) -> None:
    """The last rank of `a` saves next to nothing against the one before, and the matrix all."""
    curves = {
        "a": ([10, 20, 30], [9.0, 8.9, 0.0]),
        "b": ([10, 20, 30], [4.0, 1.0, 0.0]),
    }
    one = {"a": 1.0, "b": 1.0}
    sizes = side.marginal.marginal_sizes
    assert sizes(curves, one, 40, {"a": 0, "b": 0}) == {"a": 2, "b": 0}
    assert sizes(curves, one, 40, {"a": 0, "b": 11}) == {"a": 0, "b": 2}
    assert sizes(curves, {"a": 0.0, "b": 1.0}, 60, {"a": 0, "b": 0}) == {"a": 0, "b": 2}
    assert sizes(curves, one, 60, {"a": 0, "b": 0}) == {"a": 2, "b": 2}
    assert sizes(curves, one, 19, {"a": 0, "b": 0}) == {"a": 0, "b": 0}


def measured(divergences: dict[str, float], hidden: int = 32, width: int = 48) -> Measurements:
    """Measurements of the tiny model: flat spectra, equal losses in order, divergences by name."""
    spectra, losses, removals, found = {}, {}, {}, {}
    for layer in range(3):
        for name in ("q", "k", "v", "o"):
            path = f"layers.{layer}.self_attn.{name}_proj"
            spectra[path] = torch.ones(16 if name in "kv" else hidden, dtype=torch.float64)
            found[path] = divergences.get(name, 1.0)
        losses[f"layers.{layer}.mlp"] = torch.ones(width - 1, dtype=torch.float64)
        removals[f"layers.{layer}.mlp"] = torch.arange(1, width)
        found[f"layers.{layer}.mlp"] = divergences.get("mlp", 1.0)
    return Measurements(spectra=spectra, losses=losses, removals=removals, divergences=found)


@pytest.mark.spec("marginal.plan")
def test_what_the_model_minds_most_keeps_most() -> None:
    config, model = CompressionConfig(ratio=0.3, ratio_scope="layer", **BEST), tiny_config()
    family = family_of(model)
    even = draft_plan(model, family, config)
    minds_ffn = make_plan(model, family, config, measured({"mlp": 1e6}))
    minds_q = make_plan(model, family, config, measured({"mlp": 1e-6, "q": 1e6}))
    minds_no_ffn = make_plan(model, family, config, measured({"mlp": 0.0}))
    for plan in (minds_ffn, minds_q):
        assert even.parameters - 3 * 96 <= plan.parameters <= even.parameters
    assert all(layer["mlp"].kind == "dense" for layer in minds_ffn.layers)
    assert all(layer["self_attn.q_proj"].kind == "dense" for layer in minds_q.layers)
    for layer in minds_no_ffn.layers:
        module = layer["mlp"]
        floor = 0.25 * 0.7 * module.compressible
        assert floor <= module.parameters < floor + 96


@pytest.mark.spec("marginal.plan")
def test_what_a_recipe_fixes_takes_no_part() -> None:
    model = tiny_config()
    overrides = (
        Override("layers.0.mlp", width=40),
        Override("layers.1.self_attn.q_proj", skip=True),
        Override("layers.2.self_attn.*", ratio=0.5),
    )
    config = CompressionConfig(ratio=0.4, ratio_scope="layer", overrides=overrides, **BEST)
    known = measured({})
    for path in ("layers.0.mlp", "layers.1.self_attn.q_proj"):
        del known.divergences[path]
    plan = make_plan(model, family_of(model), config, known)
    even = draft_plan(model, family_of(model), config)
    assert plan.layers[0]["mlp"].width == 40
    assert plan.layers[1]["self_attn.q_proj"].untouched
    for name, module in plan.layers[2].items():
        if "self_attn" in name:
            assert module.rank == even.layers[2][name].rank
    assert plan.parameters <= even.parameters
    probed = probe_plan(model, family_of(model), config)
    kinds = {name: module.kind for name, module in probed.layers[0].items()}
    assert kinds["mlp"] == "dense"
    assert kinds["self_attn.v_proj"] == "low_rank"
    assert all(m.kind == "dense" for name, m in probed.layers[2].items() if "self_attn" in name)


@pytest.mark.spec("marginal.sensitivity")
def test_a_module_is_probed_in_the_middle_of_its_sizes() -> None:
    model = tiny_config()
    plan = probe_plan(model, family_of(model), CompressionConfig(ratio=0.4, **BEST))
    for layer in plan.layers:
        # q is 32 x 32: ranks 1 to 15, the middle one of which is 8. Widths 1 to 48.
        assert layer["self_attn.q_proj"].rank == 8
        assert layer["mlp"].width == 24


def test_a_floor_that_does_not_fit_is_refused() -> None:
    model = tiny_config()
    config = CompressionConfig(ratio=0.45, ratio_scope="layer", mgaa_floor=1.0, **BEST)
    with pytest.raises(UsageError, match="a smaller ratio or mgaa_floor leaves room"):
        make_plan(model, family_of(model), config, measured({}))
    # It depends on no measurement, so that none is made for nothing.
    with pytest.raises(UsageError, match="a smaller ratio or mgaa_floor leaves room"):
        draft_plan(model, family_of(model), config)


@pytest.mark.parametrize("mha", ["pca", "afm"])
@pytest.mark.parametrize("floor", [0.0, 0.25, 0.8, 0.9])
def test_the_floors_are_the_sizes_of_what_the_model_minds_least(mha: str, floor: float) -> None:
    """Where nothing matters every module gets its smallest size, which the draft knows already."""
    model = tiny_config()
    settings = BEST | {"mha": mha, "mgaa_floor": floor}
    config = CompressionConfig(ratio=0.3, ratio_scope="layer", **settings)
    every = ("q", "k", "v", "o", "mlp")
    plan = make_plan(model, family_of(model), config, measured(dict.fromkeys(every, 0.0)))
    for layer in plan.layers:
        for module in layer.values():
            least = floor * 0.7 * module.compressible
            bias = 32 if module.bias else 0
            step = 96 if module.kind == "channels" else 64
            if module.kind != "dense":
                assert least <= module.parameters < max(least, bias + 1) + step


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"selection": "obs"},
        {"update": "least-squares"},
        {"mha": "heads", "ffn": "pca"},
        {"mha": "heads", "sublayers": ("mha",)},
    ],
)
def test_where_there_are_no_curves_it_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="allocation marginal: has no effect without low rank, or"):
        CompressionConfig(ratio=0.2, allocation="marginal", **settings)


def test_the_preset_leaves_it_out_where_there_are_no_curves() -> None:
    assert CompressionConfig.from_preset("best", ratio=0.2).allocation == "marginal"
    assert CompressionConfig.from_preset("best", ratio=0.2, ffn="pca").allocation == "marginal"
    assert CompressionConfig.from_preset("best", ratio=0.2, mha="heads").allocation == 3.0
    assert CompressionConfig.from_preset("best", ratio=0.2, selection="scores").allocation == 3.0


@pytest.mark.spec("marginal.measure")
def test_only_the_first_samples_are_probed(tmp_path: Path) -> None:
    """And only the tokens that count: others change the curves, but no more."""
    torch.manual_seed(0)
    save_tiny_checkpoint(tmp_path / "model", dtype=torch.float64)
    from transformers import AutoModelForCausalLM

    from lorap.pipeline.forward import Samples
    from lorap.pipeline.in_memory import decoder_of
    from lorap.pipeline.measure import measured_plan
    from lorap.pipeline.progress import Steps

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    config = CompressionConfig(ratio=0.3, dtype="float64", **(BEST | {"mha": "svd"}))

    def divergences(ids: Tensor, mask: Tensor | None = None, **settings: Any) -> dict[str, float]:
        decoder = decoder_of(model, model.config, torch.device("cpu"), torch.float64)
        samples = Samples(ids, mask, settings.get("batch_size"))
        draft = draft_plan(model.config, decoder.family, config)
        store = decoder.store(samples, config)
        _, found = measured_plan(
            decoder, samples, store, draft, config, Steps(None, config, decoder.layers)
        )
        return found.divergences

    ids = token_ids(PROBES + 4, 10)
    base = divergences(ids)
    assert len(base) == 15
    assert all(value > 0 for value in base.values())
    other = ids.clone()
    other[PROBES:] = other[PROBES:].flip(1)
    # The svd is told nothing of the samples; what down is refitted by is.
    changed = divergences(other)
    for path, value in base.items():
        if "mlp" not in path:
            assert changed[path] == pytest.approx(value, rel=1e-9)
    mask = torch.ones_like(ids)
    padded = torch.cat([ids, ids[:, :3]], dim=1)
    masked = divergences(padded, torch.cat([mask, torch.zeros_like(mask[:, :3])], dim=1))
    batched = divergences(ids, batch_size=3)
    for path, value in base.items():
        assert masked[path] == pytest.approx(value, rel=1e-9)
        assert batched[path] == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 0.001},
        {"ratio": 0.1, "overrides": (Override("layers.1.mlp", width=48),)},
        {"ratio": 0.1, "overrides": (Override("layers.1.mlp", ratio=0.001),)},
    ],
)
def test_a_block_that_even_ratios_leave_whole_is_measured(settings: dict[str, Any]) -> None:
    config = CompressionConfig(**BEST, **settings)
    compressed = lorap.compress(tiny_model(), config, calibration=token_ids(4, 10))
    assert sum(p.numel() for p in compressed.parameters()) < sum(
        p.numel() for p in tiny_model().parameters()
    )


def test_nothing_is_measured_of_what_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorap.pipeline import measure

    seen = []
    real = measure.observe

    def observe(layer: Any, index: int, family: Any, wanted: Any, *more: Any, **also: Any) -> Any:
        seen.append(set(wanted))
        return real(layer, index, family, wanted, *more, **also)

    monkeypatch.setattr(measure, "observe", observe)
    overrides = (Override("layers.1.self_attn.o_proj", skip=True),)
    config = CompressionConfig(
        ratio=0.1, mha="pca", allocation="marginal", sublayers=("mha",), overrides=overrides
    )
    lorap.compress(tiny_model(), config, calibration=token_ids(4, 10))
    assert seen == [{"attention", "o"}, {"attention"}, {"attention", "o"}]


def test_probes_without_a_token_that_counts_are_refused() -> None:
    ids = token_ids(PROBES + 4, 10)
    mask = torch.ones_like(ids)
    mask[:PROBES] = 0
    config = CompressionConfig(ratio=0.3, **BEST)
    with pytest.raises(UsageError, match="attention_mask: expected a token that counts in the fir"):
        lorap.compress(tiny_model(), config, calibration=ids, attention_mask=mask)
    mask[PROBES - 1, -1] = 1
    lorap.compress(tiny_model(), config, calibration=ids, attention_mask=mask)


def test_predictions_that_are_not_finite_are_refused() -> None:
    """The hidden states are, and without the check the sizes would be the smallest."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    assert torch.isfinite(model.lm_head.weight).all()
    config = CompressionConfig(ratio=0.3, **BEST)
    with pytest.raises(LorapError, match=r"layers.0.self_attn.q_proj: the predictions .* NaN or i"):
        lorap.compress(model, config, calibration=token_ids(4, 10))


def test_the_divergence_is_that_of_the_model_that_has_the_module_small(tmp_path: Path) -> None:
    """By the command itself: one module compressed to the probed size, all others skipped."""
    from transformers import AutoModelForCausalLM

    save_tiny_checkpoint(tmp_path / "model", dtype=torch.float32)
    np.save(tmp_path / "ids.npy", token_ids(20, 12).numpy())
    source = str(tmp_path / "ids.npy")
    shape = {"samples": 20, "seqlen": 12, "device": "cpu"}
    lorap.compress_checkpoint(
        tmp_path / "model",
        tmp_path / "out",
        CompressionConfig(ratio=0.3, **BEST, **shape),
        calibration=source,
    )
    from safetensors.torch import load_file

    from lorap.checkpoint.files import CALIBRATION, STATISTICS

    recorded = load_file(tmp_path / "out" / STATISTICS)
    ids = load_file(tmp_path / "out" / CALIBRATION)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for name, size in (("self_attn.v_proj", {"rank": 8}), ("mlp", {"width": 24})):
        alone = (Override("*", skip=True), Override(f"layers.1.{name}", **size))
        settings = BEST | {"allocation": 3.0}
        small = lorap.compress(
            model, CompressionConfig(overrides=alone, **settings, **shape), calibration=ids
        )
        with torch.no_grad():
            p, q = (
                m(input_ids=ids[:PROBES]).logits.double().log_softmax(-1) for m in (model, small)
            )
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        found = float(recorded[f"model.layers.1.{name}.divergence"])
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_resumed_run_plans_by_what_it_measured(tmp_path: Path) -> None:
    """The curves and the removals come back from the journal bit by bit."""
    known = measured({"q": 0.25})
    again = Measurements.of_tensors(
        known.tensors("model.layers"), "model.layers", torch.device("cpu")
    )
    assert again.divergences == known.divergences
    for kind, theirs in known.of_modules.items():
        ours = again.of_modules[kind]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[path], theirs[path]) for path in theirs)
        assert all(ours[path].dtype == theirs[path].dtype for path in theirs)
