"""A run that ended early, by whatever, is resumed, and ends as one without a break does."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorap
from lorap import CompressionConfig, LorapError, UsageError
from lorap.checkpoint import files, journal, writer
from lorap.checkpoint.journal import FOLDER, SCRATCH
from lorap.checkpoint.writer import staging_of
from lorap.errors import ResumableError
from lorap.pipeline import layers, on_disk
from tests.tiny_models import save_tiny_checkpoint, tiny_model, token_ids

CONFIG = CompressionConfig(ratio=0.3, samples=8, seqlen=16, batch_size=4, device="cpu")
MEASURED = replace(CONFIG, allocation="mgaa", mha="pca", ffn="svd")
SCORED = replace(CONFIG, importance="taylor")
STAGED = replace(CONFIG, mha="pca", selection="obs", update="least-squares", dense_target=0.5)
REFINED = replace(CONFIG, refine=3)


@dataclass(frozen=True)
class Case:
    """A model, its calibration ids, and where to write."""

    model: Path
    ids: Path
    output: Path

    def run(self, config: CompressionConfig = CONFIG, **options: Any) -> dict[str, Any]:
        return lorap.compress_checkpoint(
            self.model, self.output, config, calibration=str(self.ids), **options
        )

    @property
    def staging(self) -> Path:
        return staging_of(self.output)

    def nothing_left(self) -> bool:
        return not self.staging.exists() and not (self.output / FOLDER).exists()


def weights(folder: Path) -> dict[str, bytes]:
    """Return every file but those that say when and how long."""
    return {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in (files.REPORT, files.REPORT_PAGE, files.CARD)
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    save_tiny_checkpoint(folder / "model", num_key_value_heads=2, shard_size="40KB")
    np.save(folder / "ids.npy", token_ids(8, 16).numpy())
    return folder


@pytest.fixture
def case(original: Path, tmp_path: Path) -> Case:
    shutil.copytree(original / "model", tmp_path / "model")
    return Case(tmp_path / "model", original / "ids.npy", tmp_path / "out")


@pytest.fixture(scope="module")
def whole(
    original: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[CompressionConfig], dict[str, bytes]]:
    """What runs without a break write, each once."""
    known: dict[CompressionConfig, dict[str, bytes]] = {}
    place = tmp_path_factory.mktemp("whole")

    def run(config: CompressionConfig) -> dict[str, bytes]:
        if config not in known:
            output = place / str(len(known))
            Case(original / "model", original / "ids.npy", output).run(config)
            known[config] = weights(output)
        return known[config]

    return run


class InterruptedRun(KeyboardInterrupt):
    """Stands for Ctrl-C."""


def interrupt_after(steps: int) -> Callable[[int, int], None]:
    def progress(done: int, _: int) -> None:
        if done == steps:
            raise InterruptedRun

    return progress


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_resumed_run_ends_as_one_without_a_break(
    done: int, case: Case, whole: Callable[..., dict[str, bytes]]
) -> None:
    with pytest.raises(InterruptedRun) as caught:
        case.run(progress=interrupt_after(done))
    assert any("--resume" in note for note in caught.value.__notes__)
    assert not case.output.exists()
    report = case.run(resume=True)
    # The layer that was being written when the interrupt came may be among them.
    assert report["resumed_layers"] in (done, done - 1)
    assert weights(case.output) == whole(CONFIG)
    assert case.nothing_left()
    said = json.loads((case.output / files.REPORT).read_text())
    assert said["resumed_layers"] == report["resumed_layers"]
    assert all(layer["modules"] for layer in said["layers"])
    AutoModelForCausalLM.from_pretrained(case.output, dtype="auto")


@pytest.mark.parametrize("config", [STAGED, REFINED], ids=["staged", "refined"])
def test_the_uncompressed_model_is_carried_along_again(
    config: CompressionConfig, case: Case
) -> None:
    other = replace(case, output=case.output.with_name("whole"))
    whole = other.run(config)
    with pytest.raises(InterruptedRun):
        case.run(config, progress=interrupt_after(2))
    resumed = case.run(config, resume=True)
    assert resumed["resumed_layers"] in (1, 2)
    assert weights(case.output) == weights(other.output)
    losses = [[layer["losses"] for layer in report["layers"]] for report in (resumed, whole)]
    assert losses[0] == losses[1]
    assert json.loads((case.output / files.REPORT).read_text()) == resumed


@pytest.mark.parametrize("config", [MEASURED, SCORED], ids=["mgaa", "taylor"])
@pytest.mark.parametrize("layer", [1, 2])
def test_what_was_measured_is_taken_over(
    config: CompressionConfig,
    layer: int,
    case: Case,
    whole: Callable[..., dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = whole(config)
    measuring = 3 * (2 if config is SCORED else 1)
    with pytest.raises(InterruptedRun):
        case.run(config, progress=interrupt_after(measuring + layer))
    monkeypatch.setattr(on_disk, "measured_plan", lambda *_: pytest.fail("measured again"))
    steps: list[tuple[int, int]] = []
    report = case.run(config, resume=True, progress=lambda *step: steps.append(step))
    assert report["resumed_layers"] in (layer, layer - 1)
    assert weights(case.output) == expected
    assert steps[-1] == (measuring + 3, measuring + 3)


def test_a_shard_is_read_again_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its checksum, by the thread that wrote it; of a large model it takes as long as that."""
    read: list[str] = []
    checksum = journal._checksum
    monkeypatch.setattr(
        journal, "_checksum", lambda file: [read.append(file.name), checksum(file)][1]
    )
    report = case.run()
    assert len(read) == len(set(read))
    assert len([name for name in read if name.startswith("model-")]) == len(report["layers"])


def test_resume_with_nothing_left_starts_afresh(
    case: Case, whole: Callable[..., dict[str, bytes]]
) -> None:
    assert case.run(resume=True)["resumed_layers"] == 0
    assert weights(case.output) == whole(CONFIG)
    with pytest.raises(UsageError, match="exists already"):
        case.run(resume=True)


def test_leftovers_are_refused_with_both_ways_on(
    case: Case, whole: Callable[..., dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InterruptedRun):
        case.run(progress=interrupt_after(2))
    left = sorted(path.name for path in case.staging.rglob("*"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_disk, "open_checkpoint", lambda *_, **__: pytest.fail("read weights"))
        with pytest.raises(UsageError, match=r"--resume goes on with it, --overwrite starts"):
            case.run()
    assert sorted(path.name for path in case.staging.rglob("*")) == left
    assert case.run(overwrite=True)["resumed_layers"] == 0
    assert weights(case.output) == whole(CONFIG)
    assert case.nothing_left()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def rewritten(case: Case) -> None:
    """The model saved anew, with the same contents."""
    file = next(case.model.glob("*.safetensors"))
    save_file(load_file(file), file, metadata={"format": "pt"})
    os.utime(file, (1, 1))


def changed_unnoticed(case: Case) -> None:
    """A bit of the weights, and neither the size nor the time of change."""
    file = next(case.model.glob("*.safetensors"))
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


DIFFERENT: dict[str, tuple[dict[str, Any], Callable[[Case], None] | None, str]] = {
    "ratio": ({"ratio": 0.4}, None, r"settings\.ratio was 0\.3 and is 0\.4"),
    "method": ({"mha": "svd"}, None, r"settings\.mha was 'awsvd' and is 'svd'"),
    "ids": ({"seqlen": 12}, None, "calibration ids was"),
    "batch": ({"batch_size": 3}, None, r"settings\.batch_size was 4 and is 3"),
    "weights": (
        {},
        rewritten,
        r"model\.model-.*\.modified was '.* UTC' and is '1970-01-01 00:00:01",
    ),
    "weights, times kept": ({}, changed_unnoticed, r"model\.model-.*\.sample was"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_run_is_not_mixed_in(name: str, case: Case) -> None:
    changes, prepare, message = DIFFERENT[name]
    with pytest.raises(InterruptedRun):
        case.run(progress=interrupt_after(2))
    if prepare is not None:
        prepare(case)
    with pytest.raises(UsageError, match=message):
        case.run(replace(CONFIG, **changes), resume=True)
    assert case.staging.exists(), "what was finished is still there"


def test_where_activations_wait_may_change(
    case: Case, whole: Callable[..., dict[str, bytes]]
) -> None:
    with pytest.raises(InterruptedRun):
        case.run(progress=interrupt_after(2))
    report = case.run(replace(CONFIG, activations="disk"), resume=True)
    assert report["resumed_layers"] >= 1
    assert weights(case.output) == whole(CONFIG)
    assert not list(case.output.glob(".lorap*"))


def test_a_run_without_its_description_is_not_resumed(case: Case) -> None:
    with pytest.raises(InterruptedRun):
        case.run(progress=interrupt_after(2))
    os.truncate(case.staging / FOLDER / "run.json", 10)
    with pytest.raises(UsageError, match=r"run\.json.* is missing or damaged; .*--overwrite"):
        case.run(resume=True)
    assert case.run(overwrite=True)["resumed_layers"] == 0


def test_a_place_that_is_taken_meanwhile_costs_nothing(
    case: Case, whole: Callable[..., dict[str, bytes]]
) -> None:
    def take(done: int, of: int) -> None:
        if done == of:
            case.output.mkdir()

    with pytest.raises(UsageError, match="exists already") as caught:
        case.run(progress=take)
    assert "--resume goes on" in caught.value.__notes__[0]
    case.output.rmdir()
    report = case.run(resume=True)
    assert report["resumed_layers"] == len(report["layers"])
    assert weights(case.output) == whole(CONFIG)
    assert case.nothing_left()


def test_a_model_that_cannot_be_read_any_more_costs_nothing(
    case: Case, whole: Callable[..., dict[str, bytes]]
) -> None:
    file = max(case.model.glob("*.safetensors"))
    content, times = file.read_bytes(), file.stat()

    def cut(done: int, _: int) -> None:
        if done == 1:
            os.truncate(file, 100)

    with pytest.raises(ResumableError, match="can no longer be read") as caught:
        case.run(progress=cut)
    assert str(file) in str(caught.value)
    assert "--resume goes on" in caught.value.__notes__[0]
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert case.run(resume=True)["resumed_layers"] >= 1
    assert weights(case.output) == whole(CONFIG)


def test_a_sample_of_a_file(tmp_path: Path) -> None:
    """Every byte of a small one; of a large one its blocks."""
    file, content = tmp_path / "file", bytearray(2**20)
    digests = set()
    for at in (None, 0, 4095, 4096, 2**19 + 1, 2**20 - 4097, 2**20 - 1):
        changed = bytearray(content)
        if at is not None:
            changed[at] = 1
        file.write_bytes(changed)
        digests.add(files.sample_digest(file))
    assert len(digests) == 7
    for size in (0, 1, 4096):
        file.write_bytes(bytes(size))
        digests.add(files.sample_digest(file))
    assert len(digests) == 10
    large = bytearray(2**23)
    for at in (0, 2**23 - 1, (2**23 - 4096) // 2):
        large[at] += 1
        file.write_bytes(large)
        digests.add(files.sample_digest(file))
    assert len(digests) == 13


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped shard": lambda left: flip(left / "model-00002-of-00004.safetensors"),
    "truncated shard": lambda left: os.truncate(left / "model-00002-of-00004.safetensors", 100),
    "missing shard": lambda left: (left / "model-00002-of-00004.safetensors").unlink(),
    "flipped statistics": lambda left: flip(left / FOLDER / "layer-00001.safetensors"),
    "torn record": lambda left: os.truncate(left / FOLDER / "layer-00001.json", 10),
    "missing record": lambda left: (left / FOLDER / "layer-00001.json").unlink(),
    "empty record": lambda left: (left / FOLDER / "layer-00001.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_layer_is_made_again(
    damage: str, case: Case, whole: Callable[..., dict[str, bytes]]
) -> None:
    with pytest.raises(InterruptedRun):
        case.run(progress=interrupt_after(3))
    DAMAGE[damage](case.staging)
    assert case.run(resume=True)["resumed_layers"] == 1
    assert weights(case.output) == whole(CONFIG)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_full_disk_is_survived(
    layer: int,
    case: Case,
    whole: Callable[..., dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, calls = writer.save_file, []

    def full(tensors: Any, file: Path, **options: Any) -> None:
        calls.append(file)
        if len(calls) > layer:
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        real(tensors, file, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            case.run()
    assert not case.output.exists()
    assert case.staging.exists() == (layer > 0)
    assert case.run(resume=True)["resumed_layers"] == layer
    assert weights(case.output) == whole(CONFIG)


def test_what_cannot_be_done_leaves_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = layers.run_compressed

    def broken(decoder: Any, config: Any, index: int, *arguments: Any) -> None:
        if index == 1:
            raise LorapError("layers.1: NaN")
        real(decoder, config, index, *arguments)

    monkeypatch.setattr(layers, "run_compressed", broken)
    with pytest.raises(LorapError, match="NaN"):
        case.run()
    assert case.nothing_left()
    assert not case.output.exists()


def test_two_runs_at_a_time(case: Case) -> None:
    """The second is refused while the first is at work, and leaves it alone."""
    refused: list[str] = []

    def second(done: int, _: int) -> None:
        if done == 1:
            for options in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(UsageError, match="another process is writing it"):
                    case.run(**options)
                refused.append("once")

    case.run(progress=second)
    assert len(refused) == 3
    AutoModelForCausalLM.from_pretrained(case.output, dtype="auto")
    assert case.nothing_left()


# Killed for real. The processes come from a server that has the heavy imports behind it.

SPAWN = multiprocessing.get_context("forkserver")


def compress_until_killed(case: Case, at: int, options: dict[str, Any]) -> None:
    """Compress, and be killed at the file of that number that is written to the disk."""
    torch.set_num_threads(1)
    real, count = files.sync, 0

    def sync(path: Path) -> None:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path)

    for module in (files, journal, writer):
        module.sync = sync  # type: ignore[attr-defined]
    case.run(**options)


@pytest.fixture(scope="module")
def processes() -> Any:
    SPAWN.set_forkserver_preload(["tests.test_resume", "transformers.models.llama.modeling_llama"])
    return SPAWN


def killed(processes: Any, case: Case, at: int, **options: Any) -> bool:
    """Return whether a run was killed; otherwise it ended well."""
    process = processes.Process(target=compress_until_killed, args=(case, at, options))
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return bool(process.exitcode)


@pytest.mark.parametrize("at", [1, 2, 5, 9, 14])
def test_a_killed_run_is_resumed(
    at: int, case: Case, whole: Callable[..., dict[str, bytes]], processes: Any
) -> None:
    assert killed(processes, case, at)
    assert not case.output.exists()
    assert not killed(processes, case, -1, resume=True)
    assert weights(case.output) == whole(CONFIG)
    assert case.nothing_left()


def test_hidden_states_of_a_killed_run_are_not_part_of_the_model(
    case: Case, whole: Callable[..., dict[str, bytes]], processes: Any
) -> None:
    on_disk = replace(CONFIG, activations="disk")
    assert killed(processes, case, 9, config=on_disk)
    assert list((case.staging / FOLDER / SCRATCH).iterdir())
    assert not killed(processes, case, -1, config=on_disk, resume=True)
    assert weights(case.output) == whole(CONFIG)
    assert not list(case.output.glob(".*"))


def compress_until_renamed(case: Case, number: int) -> None:
    """Compress over an older model, and be killed behind the first or the second renaming."""
    torch.set_num_threads(1)
    real, count = Path.rename, 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal count
        result = real(self, target)
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    Path.rename = rename  # type: ignore[method-assign]
    case.run(overwrite=True)


@pytest.mark.parametrize("number", [1, 2])
def test_an_older_model_is_not_lost_when_the_new_one_takes_its_place(
    number: int, case: Case, whole: Callable[..., dict[str, bytes]], processes: Any
) -> None:
    case.run(replace(CONFIG, ratio=0.5))
    older = weights(case.output)
    process = processes.Process(target=compress_until_renamed, args=(case, number))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert case.output.exists() == (number == 2)
    with pytest.raises(UsageError, match="exists already"):
        case.run()
    assert weights(case.output) == (older if number == 1 else whole(CONFIG))
    report = case.run(overwrite=True, resume=True)
    assert report["resumed_layers"] == (len(report["layers"]) if number == 1 else 0)
    assert weights(case.output) == whole(CONFIG)
    assert not list(case.output.parent.glob(".lorap*"))


def test_an_older_model_is_put_back_where_its_place_is_empty(case: Case) -> None:
    case.run()
    older = weights(case.output)
    case.output.rename(case.staging.with_suffix(".replaced"))
    case.output.mkdir()
    with pytest.raises(UsageError, match="exists already"):
        case.run()
    assert weights(case.output) == older


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_older_model_stays_aside_where_its_place_is_taken(overwrite: bool, case: Case) -> None:
    case.run()
    older, aside = weights(case.output), case.staging.with_suffix(".replaced")
    case.output.rename(aside)
    case.output.mkdir()
    (case.output / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"exists already|is not replaced"):
        case.run(overwrite=overwrite)
    assert weights(aside) == older
    assert (case.output / "notes.txt").read_text() == "mine"


def test_a_pickled_model_that_cannot_be_read_any_more_costs_nothing(case: Case) -> None:
    for shard in case.model.glob("*.safetensors*"):
        shard.unlink()
    file = case.model / "pytorch_model.bin"
    torch.save(tiny_model(num_key_value_heads=2).state_dict(), file)

    def take_away(done: int, _: int) -> None:
        if done == 1:
            file.unlink()

    with pytest.raises(ResumableError, match=r"pytorch_model\.bin"):
        case.run(allow_bin=True, progress=take_away)
    assert case.staging.exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, MEASURED], ids=["lorap", "mgaa"])
def test_a_run_killed_at_every_file_is_resumed(
    config: CompressionConfig,
    case: Case,
    whole: Callable[..., dict[str, bytes]],
    processes: Any,
) -> None:
    """Each run is killed one file later than the one before, until one ends by itself."""
    at, resumed = 1, case
    while True:
        fresh = replace(case, output=case.output.with_name(f"out-{at}"))
        if not killed(processes, fresh, at, config=config):
            break
        if fresh.output.exists():
            # Killed when it was in its place, before the journal was removed.
            AutoModelForCausalLM.from_pretrained(fresh.output, dtype="auto")
        else:
            assert not killed(processes, fresh, -1, config=config, resume=True)
        assert weights(fresh.output) == whole(config), at
        resumed, at = fresh, at + 1
    assert at > 20
    assert resumed.output.exists()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_again_and_again_is_resumed(
    seed: int, case: Case, whole: Callable[..., dict[str, bytes]], processes: Any
) -> None:
    chance = np.random.default_rng(seed)
    for _ in range(100):
        if not killed(processes, case, int(chance.integers(1, 24)), resume=True):
            break
        if case.output.exists():
            break
    assert weights(case.output) == whole(CONFIG)
