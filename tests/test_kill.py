"""A run that is killed, at any moment, leaves the output whole or absent, and is resumed.

The command, as a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorap.demo import CALIBRATION, MODEL

MOMENTS = 12

IN_TEST, IN_FULL = 3, 20
"""Moments at which a run that is resumed is killed, by ``make test`` and by ``make test-full``."""


def start(output: Path, ratio: float, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lorap", "compress", str(MODEL), "--ratio", str(ratio)]
    command += ["--output", str(output), "--calibration", str(CALIBRATION), "--device", "cpu"]
    command += ["--samples", "16", *words]
    # One thread, so that sums are taken in one order and runs are equal to the last bit.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def weights(folder: Path) -> dict[str, bytes]:
    """Return the safetensors files, once the folder was found to load as a model."""
    _, loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not loaded["missing_keys"]
    assert not loaded["mismatched_keys"]
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody killed: what it wrote, and when."""

    small: dict[str, bytes]
    before_writing: float
    writing: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    begun = time.monotonic()
    process = start(folder / "small", 0.2)
    before_writing = wait_for_writing(folder, process, begun)
    assert process.wait() == 0
    return Undisturbed(
        weights(folder / "small"),
        before_writing,
        time.monotonic() - begun - before_writing,
    )


@pytest.fixture(scope="module")
def smaller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, to be overwritten."""
    output = tmp_path_factory.mktemp("smaller") / "smaller"
    assert start(output, 0.4).wait() == 0
    return output


def wait_for_writing(folder: Path, process: subprocess.Popen[bytes], begun: float) -> float:
    """Wait until a run has begun to write; return the seconds since it was begun."""
    while process.poll() is None and not any(folder.glob(".*.partial")):
        time.sleep(0.002)
    return time.monotonic() - begun


def kill(
    output: Path, moment: int, undisturbed: Undisturbed, ratio: float, *words: str
) -> int | None:
    """Kill a run at a random moment: a quarter of them before it writes, the others while it does.

    Returns
    -------
    int or None
        The exit status; None where it ended before.
    """
    chance = random.Random(moment)
    process = start(output, ratio, *words)
    if moment % 4 == 0:
        time.sleep(chance.uniform(0, undisturbed.before_writing))
    else:
        wait_for_writing(output.parent, process, 0.0)
        time.sleep(chance.uniform(0, 1.1 * undisturbed.writing))
    process.kill()
    return process.wait()


@pytest.mark.parametrize(
    "moment",
    [pytest.param(m, marks=[] if m < IN_TEST else [pytest.mark.slow]) for m in range(IN_FULL)],
)
def test_a_run_killed_at_any_moment_is_resumed(
    moment: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output = tmp_path / "small"
    kill(output, 200 + moment, undisturbed, 0.2)
    if not output.exists():
        assert start(output, 0.2, "--resume").wait() == 0
    assert weights(output) == undisturbed.small
    assert not list(tmp_path.glob(".lorap*"))


def fill(file: Path) -> None:
    with open(file, "wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass


@pytest.mark.slow
def test_a_full_disk_is_survived(tmp_path: Path) -> None:
    """A file system of its own, which somebody else fills while the run is at work."""
    disk, words = tmp_path / "disk", ("--refine", "10")
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8M", "none", str(disk)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    try:
        process = start(disk / "small", 0.2, *words)
        while not list(disk.glob(".*.partial/.lorap/layer-00000.json")):
            assert process.poll() is None, "ended before its first layer"
            time.sleep(0.002)
        with pytest.raises(OSError, match="No space left"):
            fill(disk / "filler")
        assert process.wait() == 1
        assert not (disk / "small").exists()
        (disk / "filler").unlink()
        assert start(disk / "small", 0.2, "--resume", *words).wait() == 0
        report = json.loads((disk / "small" / "lorap_report.json").read_text())
        assert 1 <= report["resumed_layers"] < len(report["layers"])
        assert start(tmp_path / "whole", 0.2, *words).wait() == 0
        assert weights(disk / "small") == weights(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_killed_run_leaves_the_output_absent_or_whole(
    moment: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output = tmp_path / "small"
    status = kill(output, moment, undisturbed, 0.2)
    if output.exists():
        assert weights(output) == undisturbed.small
    else:
        assert status != 0


@pytest.mark.slow
def test_what_a_killed_run_leaves_behind_is_in_nobody_s_way(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    output = tmp_path / "small"
    process = start(output, 0.2)
    wait_for_writing(tmp_path, process, 0.0)
    process.kill()
    assert process.wait() != 0
    assert not output.exists()
    assert start(output, 0.2).wait() == 0
    assert weights(output) == undisturbed.small


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(MOMENTS))
def test_a_killed_run_that_overwrites_leaves_the_old_or_the_new(
    moment: int, undisturbed: Undisturbed, smaller: Path, tmp_path: Path
) -> None:
    output = tmp_path / "small"
    shutil.copytree(smaller, output)
    status = kill(output, 100 + moment, undisturbed, 0.2, "--overwrite")
    # Between the two renames of a commit, the old one lies aside.
    found = weights(output if output.exists() else next(tmp_path.glob(".*.replaced")))
    assert found in (weights(smaller), undisturbed.small)
    if status == 0:
        assert found == undisturbed.small


@pytest.mark.slow
def test_the_undisturbed_runs_differ_and_repeat_themselves(
    undisturbed: Undisturbed, smaller: Path, tmp_path: Path
) -> None:
    assert undisturbed.small != weights(smaller)
    assert start(tmp_path / "small", 0.2).wait() == 0
    assert weights(tmp_path / "small") == undisturbed.small
