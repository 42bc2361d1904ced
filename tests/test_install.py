"""An installation that is not editable: everything is in the wheel, and works from there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "lorap", "reference")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, since the build writes beside its sources.
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*command, "--no-index", "--quiet", "--wheel-dir", folder, source],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("LICENSE")]
    expected = {
        f"{name}/{file.relative_to(ROOT / folder)}"
        for folder, name in (("lorap", "lorap"), ("reference", "lorap_reference"))
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert held == expected
    assert len(licences) == 1


def test_the_installed_package_works_on_its_own(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
import lorap, lorap_reference, lorap.demo
for module in (lorap, lorap_reference, lorap.demo):
    assert module.__file__.startswith({str(tmp_path / "site")!r}), module.__file__
import json
record = json.loads((lorap.demo.FOLDER / "embedded.json").read_text())
plan = lorap.plan_checkpoint(str(lorap.demo.MODEL), lorap.CompressionConfig(ratio=0.2))
assert plan.parameters_before == record["parameters"]
assert lorap.demo.CALIBRATION.is_file() and lorap.demo.HELDOUT.is_file()
from transformers import AutoConfig
assert type(AutoConfig.for_model("lorap_llama")).__module__ == "lorap.families.modeling_lorap"
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
