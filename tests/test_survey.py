"""``lorap inspect``: spectra, effective ranks, outliers and similarities against plain NumPy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lorap
from lorap import cli
from lorap.errors import LorapError, UsageError
from lorap.pages.survey_page import file_names, survey_files, survey_page
from lorap.pipeline.survey import ENERGIES, Spectrum, Survey, outlier_ratio
from tests.test_pages import read
from tests.tiny_models import save_tiny_checkpoint, tiny_family_model

ROLES = {
    **{role: f"self_attn.{role}_proj" for role in ("q", "k", "v", "o")},
    **{role: f"mlp.{role}_proj" for role in ("gate", "up", "down")},
}
INPUTS = {"attention": "q", "o": "o", "ffn": "gate", "down": "down"}
SAMPLES: dict[str, Any] = {"samples": 4, "seqlen": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    save_tiny_checkpoint(folder, num_key_value_heads=2)
    return folder


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "ids.npy"
    np.save(file, np.random.default_rng(0).integers(3, 96, (4, 16)))
    return file


@pytest.fixture(scope="module")
def survey(model: Path, ids: Path) -> Survey:
    return lorap.inspect_checkpoint(model, calibration=str(ids), **SAMPLES)


@pytest.fixture(scope="module")
def truth(model: Path, ids: Path) -> dict[str, Any]:
    """Return weights, inputs of the linears and the residual stream, by transformers alone."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    seen: dict[str, np.ndarray[Any, Any]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any = None) -> None:
            seen[name] = inputs[0].detach().double().numpy().reshape(-1, inputs[0].shape[-1])

        return hook

    for index, layer in enumerate(dense.model.layers):
        for role, name in ROLES.items():
            layer.get_submodule(name).register_forward_pre_hook(keep(f"{index}.{role}"))
        layer.input_layernorm.register_forward_pre_hook(keep(f"{index}.before"))
        layer.post_attention_layernorm.register_forward_pre_hook(keep(f"{index}.between"))
    dense.model.norm.register_forward_pre_hook(keep("3.before"))
    with torch.no_grad():
        dense(torch.tensor(np.load(ids)))
    weights = {
        f"{index}.{role}": layer.get_submodule(name).weight.detach().double().numpy()
        for index, layer in enumerate(dense.model.layers)
        for role, name in ROLES.items()
    }
    return {"weights": weights, "seen": seen}


def least_rank(values: np.ndarray[Any, Any], share: float) -> int:
    squares = values**2
    return next(r for r in range(1, len(values) + 1) if squares[:r].sum() >= share * squares.sum())


def cosine(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    products = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(products.mean())


def test_spectra_and_effective_ranks_are_numpy_s(survey: Survey, truth: dict[str, Any]) -> None:
    assert [layer.index for layer in survey.layers] == [0, 1, 2]
    for layer in survey.layers:
        assert list(layer.svd) == list(layer.awsvd) == list(ROLES)
        for role in ROLES:
            weight = truth["weights"][f"{layer.index}.{role}"]
            norms = np.linalg.norm(truth["seen"][f"{layer.index}.{role}"], axis=0)
            for found, matrix in ((layer.svd[role], weight), (layer.awsvd[role], weight * norms)):
                values = np.linalg.svd(matrix, compute_uv=False)
                assert found.count == len(values) == found.ranks[-1]
                assert found.ranks == tuple(range(1, len(values) + 1))
                np.testing.assert_allclose(
                    found.singular_values, values, rtol=1e-4, atol=1e-5 * values[0]
                )
                energies = np.cumsum(values**2) / (values**2).sum()
                np.testing.assert_allclose(found.energies, energies, rtol=1e-5)
                for share in ENERGIES:
                    expected = least_rank(values, share)
                    assert found.effective_ranks[share] == expected
                    assert found.rank_share(share) == expected / len(values)


def test_outliers_and_similarities_are_numpy_s(survey: Survey, truth: dict[str, Any]) -> None:
    seen = truth["seen"]
    for layer in survey.layers:
        for kind, role in INPUTS.items():
            norms = np.linalg.norm(seen[f"{layer.index}.{role}"], axis=0)
            found = layer.norms[kind]  # type: ignore[index]
            np.testing.assert_allclose(found, norms, rtol=1e-5)
            expected = norms.max() / np.median(norms)
            assert layer.outliers[kind] == pytest.approx(expected, rel=1e-5)  # type: ignore[index]
        stream = [seen[f"{layer.index}.before"], seen[f"{layer.index}.between"]]
        stream.append(seen[f"{layer.index + 1}.before"])
        assert layer.similarities["mha"] == pytest.approx(cosine(*stream[:2]), rel=1e-5)
        assert layer.similarities["ffn"] == pytest.approx(cosine(*stream[1:]), rel=1e-5)


def test_means_are_over_the_layers(survey: Survey) -> None:
    for method in ("svd", "awsvd"):
        means = survey.mean_rank_shares(0.8)[method]
        for role in ROLES:
            shares = [getattr(layer, method)[role].rank_share(0.8) for layer in survey.layers]
            assert means[role] == pytest.approx(np.mean(shares))


def test_a_sample_of_layers_is_what_all_layers_have_there(
    model: Path, ids: Path, survey: Survey
) -> None:
    calls: list[tuple[int, int]] = []
    some = lorap.inspect_checkpoint(
        model,
        calibration=str(ids),
        layers=[1],
        progress=lambda done, total: calls.append((done, total)),
        **SAMPLES,
    )
    assert some.layers == survey.layers[1:2]
    for kind, norms in survey.layers[1].norms.items():
        assert torch.equal(some.layers[0].norms[kind], norms)
    # The layer before it is run, the one after it is not.
    assert calls == [(0, 2), (1, 2), (2, 2)]
    alone = lorap.inspect_checkpoint(model, layers=[2, 0, 2], device="cpu")
    assert [layer.index for layer in alone.layers] == [0, 2]
    assert [layer.svd for layer in alone.layers] == [survey.layers[i].svd for i in (0, 2)]
    assert alone.layers[0].awsvd == alone.layers[0].outliers == alone.layers[0].similarities == {}
    assert alone.calibration is None


def test_layers_that_are_not_looked_at_are_not_read(model: Path, tmp_path: Path) -> None:
    lame = tmp_path / "lame"
    lame.mkdir()
    for file in model.iterdir():
        (lame / file.name).write_bytes(file.read_bytes())
    tensors = load_file(lame / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, lame / "model.safetensors", metadata={"format": "pt"})
    assert len(lorap.inspect_checkpoint(lame, layers=[0, 1], device="cpu").layers) == 2
    with pytest.raises(LorapError, match=r"layers\.2\.mlp\.up_proj\.weight: .*NaN"):
        lorap.inspect_checkpoint(lame, device="cpu")


def test_a_family_with_fused_linears(tmp_path: Path, ids: Path) -> None:
    dense = tiny_family_model("phi3")
    dense.save_pretrained(tmp_path / "phi3")
    found = lorap.inspect_checkpoint(tmp_path / "phi3", calibration=str(ids), **SAMPLES)
    fused = dense.get_submodule("model.layers.1.self_attn.qkv_proj").weight.detach().double()
    k = np.linalg.svd(fused[32:48].numpy(), compute_uv=False)
    np.testing.assert_allclose(found.layers[1].svd["k"].singular_values, k, rtol=1e-5)
    assert found.layers[1].awsvd.keys() == found.layers[1].svd.keys() == ROLES.keys()


# --- pure parts -----------------------------------------------------------------------------------


def test_a_long_spectrum_is_told_at_some_ranks() -> None:
    values = torch.arange(1000, 0, -1, dtype=torch.float64)
    found = Spectrum.of(values)
    assert len(found.ranks) == 64
    assert (found.ranks[0], found.ranks[-1]) == (16, 1000)
    assert found.singular_values[0] == 985
    assert found.energies[-1] == pytest.approx(1)
    squares = np.arange(1000, 0, -1.0) ** 2
    assert found.energies[0] == pytest.approx(squares[:16].sum() / squares.sum())


@pytest.mark.parametrize(
    ("values", "ranks"),
    [
        # Energies 0.5, 1.
        ([1.0, 1.0], [1, 2, 2, 2, 2]),
        # Energies 16/20, 20/20: 80% is retained by the first one.
        ([4.0, 2.0], [1, 1, 2, 2, 2]),
        ([3.0], [1] * 5),
        ([0.0, 0.0, 0.0], [1] * 5),
        # 0.9, 0.99, 0.999.
        ([30.0, math.sqrt(90), 3.0, 1.0], [1, 1, 1, 2, 2]),
    ],
)
def test_effective_ranks_by_hand(values: list[float], ranks: list[int]) -> None:
    found = Spectrum.of(torch.tensor(values, dtype=torch.float64))
    assert [found.effective_ranks[share] for share in ENERGIES] == ranks


def test_outliers_by_hand() -> None:
    assert outlier_ratio(torch.tensor([1.0, 2.0, 12.0])) == 6
    assert outlier_ratio(torch.tensor([1.0, 3.0, 8.0, 2.0])) == 3.2
    assert outlier_ratio(torch.tensor([0.0, 0.0, 5.0])) is None


# --- pictures, page and command -------------------------------------------------------------------


def test_pictures_and_page_are_well_formed(survey: Survey) -> None:
    found = survey.to_dict()
    files = survey_files(found)
    assert list(files) == file_names(True)
    assert files == survey_files(json.loads(json.dumps(found)))
    for name, text in files.items():
        if name.endswith(".svg"):
            ElementTree.fromstring(text)
            assert "var(" not in text
    shown = "".join(read(files["lorap_inspection.html"]).text)
    for share in found["mean_rank_shares"]["0.8"]["awsvd"].values():
        assert f"{share:.2%}" in shown
    assert json.loads(files["lorap_inspection.json"]) == json.loads(json.dumps(found))
    evil = found | {"model": "<script>x</script>"}
    assert "<script>x</script>" in "".join(read(survey_page(evil)).text)


def test_a_dead_input_and_a_zero_matrix_have_pictures(model: Path, tmp_path: Path) -> None:
    found = lorap.inspect_checkpoint(model, device="cpu").to_dict()
    for layer in found["layers"]:
        layer["svd"]["q"]["singular_values"] = [0.0] * 32
        layer["outliers"] = dict.fromkeys(INPUTS)
        layer["similarities"] = {"mha": 1.0, "ffn": 0.5}
    for text in survey_files(found).values():
        assert "nan" not in text.replace("finance", "").lower().split("versions")[0]


def run(*words: object) -> Any:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


DATA = ("--samples", 4, "--seqlen", 16, "--device", "cpu")


def test_the_command_prints_tables_and_writes_pictures(
    model: Path, ids: Path, tmp_path: Path, survey: Survey
) -> None:
    output = tmp_path / "a" / "looks"
    done = run("inspect", model, "--calibration", ids, "--output", output, *DATA)
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert sorted(file.name for file in output.iterdir()) == sorted(file_names(True))
    lines = done.stdout.splitlines()
    assert lines[0] == "share of the ranks that retains 80% of the energy, SVD"
    assert lines[1].split() == ["layer", *ROLES]
    shares = [f"{survey.layers[0].svd[role].rank_share(0.8):.2%}" for role in ROLES]
    assert lines[2].split() == ["0", *shares]
    assert f"{survey.layers[2].similarities['ffn']:.4f}" in done.stdout
    assert f"{survey.layers[1].outliers['down']:.4g}" in done.stdout
    assert "3 of 3 layers" in done.stderr
    assert lines[-1] == f"output       {output}"
    page = (output / "lorap_inspection.html").read_text()

    refused = run("inspect", model, "--output", output, "--device", "cpu")
    assert refused.exit_code == 2
    assert "holds a lorap_inspection.json already; --overwrite replaces it" in refused.stderr
    assert (output / "lorap_inspection.html").read_text() == page
    assert (
        run("inspect", model, "--output", output, "--overwrite", "--device", "cpu").exit_code == 0
    )
    assert (output / "lorap_inspection.html").read_text() != page


def test_json_is_alone_on_stdout(model: Path) -> None:
    done = run("inspect", model, "--layers", "0,2", "--json", "--device", "cpu")
    found = json.loads(done.stdout)
    assert [layer["layer"] for layer in found["layers"]] == [0, 2]
    assert found["layers"][0]["awsvd"] is None
    assert found["calibration"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", 4], "samples 4: has no effect without calibration data"),
        (["--overwrite"], "overwrite: has no effect without --output"),
        (["--layers", "0,3"], "expected layers from 0 to 2, got 3"),
        (["--layers", "x"], "expected numbers and rising spans"),
        (["--dtype", "float12", "--calibration", "x.npy"], "dtype"),
        (["--calibration", "none.npy", "--seqlen", 16], "none.npy"),
    ],
)
def test_what_cannot_be_used_is_refused(model: Path, words: list[Any], message: str) -> None:
    done = run("inspect", model, "--device", "cpu", *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_no_layers_and_a_folder_that_is_a_file_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"from 0 to 2, got none"):
        lorap.inspect_checkpoint(model, layers=[])
    (tmp_path / "file").touch()
    done = run("inspect", model, "--output", tmp_path / "file")
    assert done.exit_code == 2
    assert "cannot be written" in done.stderr
