"""Several processes give what one gives, on the machine as torchrun starts them."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorap import LorapError, cli
from lorap.audit import audit
from lorap.checkpoint import files
from lorap.checkpoint.writer import CheckpointWriter, staging_of
from lorap.errors import ResumableError
from lorap.pipeline import activations, layers, on_disk, processes
from lorap.pipeline.processes import Processes, join, shared_out
from lorap.pipeline.statistics import Statistic, sum_over_
from parity_tests import tolerances
from tests.tiny_models import save_tiny_checkpoint, token_ids

SAMPLES, TOKENS = 8, 16
DIED = "a process of this run died or was stopped"

METHODS = {
    "lorap": "",
    "heads": "--mha heads --importance magnitude --aggregation l1",
    "taylor": "--mha asvd --importance taylor",
    "mgaa": "--mha afm --ffn pca --joint-qk --allocation mgaa",
    "best": "--preset best",
    "refit": "--mha heads --ffn svd --update least-squares --dense-target 0.5",
}

SLOW = ("heads", "taylor", "refit")


# --- what is shared out ---------------------------------------------------------------------------


@pytest.mark.spec("algorithm.processes")
def test_samples_are_split_into_parts_that_follow_each_other() -> None:
    assert [Processes(rank, 3).part(7) for rank in range(3)] == [
        slice(0, 2),
        slice(2, 4),
        slice(4, 7),
    ]
    for count in range(1, 30):
        for size in range(1, count + 1):
            parts = [list(range(count))[Processes(r, size).part(count)] for r in range(size)]
            assert [sample for part in parts for sample in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.spec("algorithm.processes")
def test_the_longest_job_goes_to_whom_has_least_to_do() -> None:
    # 9 to the first, 8 and 8 to the second, which has less both times; 2 and 1 to the first.
    assert shared_out([2, 8, 8, 9, 1], 2) == [0, 1, 1, 0, 0]
    assert shared_out([5, 5, 5], 2) == [0, 1, 0]
    assert shared_out([1, 2, 3, 4], 1) == [0, 0, 0, 0]
    assert shared_out([], 3) == []


def test_sums_are_taken_in_one_order_whatever_that_of_a_set() -> None:
    """The processes of torchrun differ in how they order sets of words."""
    seen: list[list[float]] = []

    class Noting(Processes):
        def sum_(self, *tensors: torch.Tensor) -> None:
            seen[-1].extend(float(tensor) for tensor in tensors)

    sums: dict[Statistic, torch.Tensor] = {
        "sum": torch.tensor(1.0),
        "moment": torch.tensor(2.0),
        "squares": torch.tensor(3.0),
    }
    for order in itertools.permutations(sums):
        seen.append([])
        sum_over_(Noting(), {name: sums[name] for name in order})
    assert seen == [[2.0, 3.0, 1.0]] * 6


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "available_memory", lambda: 1000)
    cpu = torch.device("cpu")
    assert activations.choose_place("auto", 250, cpu, 2) == "cpu"
    assert activations.choose_place("auto", 251, cpu, 2) == "disk"


# --- processes that are started as torchrun does --------------------------------------------------

SPAWN = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Case:
    """A model, its calibration ids, and where to write."""

    folder: Path

    def words(self, *more: str, output: str = "out") -> list[str]:
        return [
            *("compress", str(self.folder / "model"), "--ratio", "0.3", "--device", "cpu"),
            *("--samples", str(SAMPLES), "--seqlen", str(TOKENS), "--batch-size", "4"),
            *("--calibration", str(self.folder / "ids.npy")),
            *("--output", str(self.folder / output), *more),
        ]

    def report(self, output: str = "out") -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / output / files.REPORT).read_text())
        return content

    def weights(self, output: str = "out") -> dict[str, bytes]:
        """Return every file but those that say when and how."""
        unlike = (files.REPORT, files.REPORT_PAGE, files.CARD)
        return {
            file.name: file.read_bytes()
            for file in sorted((self.folder / output).iterdir())
            if file.name not in unlike
        }

    def tensors(self, output: str) -> dict[str, np.ndarray]:
        return {
            name: tensor.double().numpy()
            for file in sorted((self.folder / output).glob("model*.safetensors"))
            for name, tensor in load_file(file).items()
        }

    @property
    def staging(self) -> Path:
        return staging_of((self.folder / "out").resolve())


@pytest.fixture
def case(tmp_path: Path) -> Case:
    save_tiny_checkpoint(tmp_path / "model", num_key_value_heads=2, shard_size="40KB")
    np.save(tmp_path / "ids.npy", token_ids(SAMPLES, TOKENS).numpy())
    return Case(tmp_path)


@dataclass(frozen=True)
class Ended:
    """How processes ended, by their numbers."""

    statuses: list[int | None]
    said: list[str]


Hook = Callable[[], None]


def run_as(
    rank: int, size: int, port: int, words: Sequence[str], said: Path, hook: Hook | None
) -> None:
    """Run the command line as a process of torchrun."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The store is in the process that has started this one, as with torchrun.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    torch.set_num_threads(1)
    number = os.open(said, os.O_WRONLY | os.O_CREAT)
    os.dup2(number, 1)
    os.dup2(number, 2)
    if hook is not None:
        hook()
    sys.argv = ["lorap", *words]
    cli.main()


def together(
    size: int, words: Sequence[str], folder: Path, hooks: dict[int, Hook] | None = None
) -> Ended:
    """Start the processes of a run, and wait until they have ended.

    Parameters
    ----------
    size : int
    words : sequence of str
        Of the command line.
    folder : Path
        For what they say.
    hooks : dict
        By the number of a process, what it does first.
    """
    SPAWN.set_forkserver_preload(["tests.test_resume", "tests.test_distributed"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    run = str(time.monotonic_ns())
    said = [folder / f"said-{run}-{rank}" for rank in range(size)]
    started = [
        SPAWN.Process(
            target=run_as,
            args=(rank, size, store.port, list(words), said[rank], (hooks or {}).get(rank)),
        )
        for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    return Ended(
        [process.exitcode for process in started],
        [file.read_text() if file.exists() else "" for file in said],
    )


def alone(words: Sequence[str]) -> int:
    """Run the command line in this process, and return its exit status."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return int(cli.app(list(words), standalone_mode=False) or 0)
    finally:
        torch.set_num_threads(threads)


# Hooks: how a process goes wrong.


def at_layer(index: int, act: Callable[[], None]) -> None:
    """Act when a layer is compressed, and the statistics of the next one are to be taken."""
    real = layers.run_compressed

    def run(decoder: Any, config: Any, layer: int, *arguments: Any) -> None:
        real(decoder, config, layer, *arguments)
        if layer == index:
            act()

    layers.run_compressed = run


def die() -> None:
    at_layer(1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def fail() -> None:
    def act() -> None:
        raise LorapError("layers.1: NaN of this process's samples")

    at_layer(1, act)


def lose_a_file() -> None:
    def act() -> None:
        raise ResumableError("shard 3 can no longer be read")

    at_layer(1, act)


def run_out_of_memory() -> None:
    def act() -> None:
        raise MemoryError

    at_layer(1, act)


def be_interrupted() -> None:
    at_layer(1, lambda: os.kill(os.getpid(), signal.SIGINT))


def be_told_to_end() -> None:
    at_layer(1, lambda: os.kill(os.getpid(), signal.SIGTERM))


def have_another_torch() -> None:
    real = on_disk.versions
    on_disk.versions = lambda: real() | {"torch": "2.0"}


def have_a_talkative_gloo() -> None:
    real = dist.init_process_group

    def init(*arguments: Any, **options: Any) -> None:
        os.write(1, b"[Gloo] Rank 0 is connected to 1 peer ranks.\n")
        real(*arguments, **options)

    dist.init_process_group = init


def dawdle() -> None:
    """Be at work when another process fails."""
    at_layer(1, lambda: time.sleep(1))


@pytest.mark.processes
@pytest.mark.spec("algorithm.processes")
@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in METHODS],
)
def test_two_processes_give_what_one_gives_to_the_last_bit(method: str, case: Case) -> None:
    """Each has one of the two batches, and the sum of two numbers has one order."""
    words = METHODS[method].split()
    assert alone(case.words(*words, output="one")) == 0
    ended = together(2, case.words(*words), case.folder)
    assert ended.statuses == [0, 0]
    assert ended.said[1] == ""
    assert "in 2 processes" in ended.said[0]
    passes = {"taylor": 3, "mgaa": 2, "best": 2}.get(method, 1)
    assert f"{3 * passes} of {3 * passes} layers" in ended.said[0]
    assert case.weights() == case.weights("one")
    ours, theirs = case.report(), case.report("one")
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    assert ours["command"].startswith("torchrun --nproc-per-node 2 -m lorap compress ")
    for key in ("parameters", "layer_ratio", "achieved_ratio", "calibration", "settings"):
        assert ours[key] == theirs[key]
    for own, other in zip(ours["layers"], theirs["layers"], strict=True):
        assert own["modules"] == other["modules"]


@pytest.mark.processes
@pytest.mark.spec("algorithm.processes")
def test_three_processes_are_off_by_rounding_at_most(case: Case) -> None:
    """Parts of 2, 3 and 3 samples: other batches than those of one process, and other sums."""
    save_tiny_checkpoint(case.folder / "model", dtype=torch.float64, num_key_value_heads=2)
    assert alone(case.words(output="one")) == 0
    assert together(3, case.words(), case.folder).statuses == [0, 0, 0]
    ours, theirs = case.report(), case.report("one")
    for own, other in zip(ours["layers"], theirs["layers"], strict=True):
        for name, module in own["modules"].items():
            for exact in ("rank", "width", "kept_channels"):
                assert module.get(exact) == other["modules"][name].get(exact)
    # In the first layer q, k and v have the same tokens in all runs: only the order of the sums
    # differs.
    prefix = "model.layers.0.self_attn"
    original = case.tensors("model")
    found, expected = case.tensors("out"), case.tensors("one")
    recorded = [
        load_file(case.folder / output / files.STATISTICS)["model.layers.0.attention.norms"].numpy()
        for output in ("out", "one")
    ]
    apart = tolerances.root_of_positive_sum(SAMPLES * TOKENS)
    np.testing.assert_allclose(*recorded, rtol=apart, atol=0)
    for role in "qkv":
        W = original[f"{prefix}.{role}_proj.weight"]
        products = []
        for tensors in (found, expected):
            left, right = (
                tensors[f"{prefix}.{role}_proj.{side}.weight"] for side in ("left", "right")
            )
            products.append(left @ right)
        delta = apart * tolerances.spectral_norm(W * recorded[1])
        rank = ours["layers"][0]["modules"][f"self_attn.{role}_proj"]["rank"]
        bound = tolerances.awsvd_product(W, recorded[1], rank, tolerances.EPS64, delta)
        assert bound is not None
        assert bound < 1e-10
        assert tolerances.spectral_norm(products[0] - products[1]) <= bound
    # All else is held against the reference.
    result = audit(case.folder / "model", case.folder / "out")
    assert result.passed
    AutoModelForCausalLM.from_pretrained(case.folder / "out", dtype="auto")


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1])
def test_a_run_of_which_a_process_died_is_resumed(
    lost: int, case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    assert alone(case.words(output="one")) == 0
    ended = together(2, case.words(), case.folder, {lost: die})
    assert ended.statuses[lost] == -signal.SIGKILL
    assert ended.statuses[1 - lost] == 1
    assert ended.said[lost].strip() in ("", "0 of 3 layers")
    assert ended.said[1 - lost].startswith(f"lorap: {DIED}")
    assert "Traceback" not in ended.said[1 - lost]
    way_on = "--resume goes on with it" if lost else "--resume goes on with what was finished"
    assert way_on in ended.said[1 - lost]
    assert not (case.folder / "out").exists()
    assert case.staging.exists()
    # Sums of another number of processes are other sums.
    assert alone(case.words("--resume")) == 2
    assert (
        "the run that was left is another one: processes was 2 and is 1" in capsys.readouterr().err
    )
    ended = together(2, case.words("--resume"), case.folder)
    assert ended.statuses == [0, 0]
    assert case.report()["resumed_layers"] in (1, 2)
    assert case.weights() == case.weights("one")
    assert not case.staging.exists()


def test_of_three_processes_one_dies(case: Case) -> None:
    ended = together(3, case.words(), case.folder, {2: die})
    assert ended.statuses == [1, 1, -signal.SIGKILL]
    assert DIED in ended.said[0]
    assert "--resume goes on with it" in ended.said[0]
    assert case.staging.exists()


@pytest.mark.parametrize("wrong", [0, 1])
def test_what_one_process_cannot_do_is_said_once(wrong: int, case: Case) -> None:
    ended = together(2, case.words(), case.folder, {wrong: fail})
    assert ended.statuses == [1, 1]
    assert "".join(ended.said) == "lorap: layers.1: NaN of this process's samples\n"
    # As with one process, there is nothing to go on with.
    assert not case.staging.exists()


@pytest.mark.parametrize("wrong", [0, 1])
def test_what_a_process_cannot_read_any_more_costs_nothing(wrong: int, case: Case) -> None:
    ended = together(2, case.words(), case.folder, {wrong: lose_a_file})
    assert ended.statuses == [1, 1]
    assert ended.said[0].startswith(
        "lorap: shard 3 can no longer be read; what was finished is kept"
    )
    assert ended.said[1] == "lorap: shard 3 can no longer be read\n"
    assert case.staging.exists()


def test_a_process_that_runs_out_of_memory_leaves_what_was_finished(case: Case) -> None:
    ended = together(2, case.words(), case.folder, {1: run_out_of_memory})
    assert ended.statuses == [1, 1]
    assert ended.said[1].startswith("lorap: out of memory; a smaller --batch-size")
    assert ended.said[0].startswith("lorap: process 1 of 2 failed: see its message; what was")
    assert case.staging.exists()


def test_an_interrupted_run_says_so_once(case: Case) -> None:
    ended = together(2, case.words(), case.folder, {0: be_interrupted, 1: be_interrupted})
    assert ended.statuses == [128 + signal.SIGINT] * 2
    assert ended.said[0].startswith("lorap: interrupted; what was finished is kept in")
    assert ended.said[1] == ""
    assert case.staging.exists()


def test_torchrun_ends_a_process_that_is_at_work(case: Case) -> None:
    ended = together(2, case.words(), case.folder, {0: be_told_to_end, 1: dawdle})
    assert ended.statuses == [128 + signal.SIGTERM, 1]
    assert "when one has failed or died" in ended.said[0]
    assert ended.said[1] == "lorap: process 0 of 2 was interrupted\n"


def be_told_to_end_while_tidying_up() -> None:
    real = CheckpointWriter.__exit__

    def leave(writer: CheckpointWriter, *error: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(writer, *error)

    CheckpointWriter.__exit__ = leave


def test_torchrun_does_not_interrupt_the_tidying_up(case: Case) -> None:
    hooks = {0: be_told_to_end_while_tidying_up, 1: die}
    ended = together(2, case.words(), case.folder, hooks)
    assert ended.statuses == [1, -signal.SIGKILL]
    assert ended.said[0].startswith(f"lorap: {DIED}; what was finished is kept in")


WRONG = {
    "value": (["--ratio", "1.5"], "lorap: ratio: expected a ratio above 0"),
    "option": (["--rati", "0.5"], "Error: No such option: --rati"),
    "output": (["--output", "{model}"], "exists already"),
    "processes": (["--samples", "1"], "lorap: samples 1: expected at least one for each of the 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_used_is_said_once(name: str, case: Case) -> None:
    words, message = WRONG[name]
    given = case.words(*(word.format(model=case.folder / "model") for word in words))
    hooks = {0: have_a_talkative_gloo, 1: have_a_talkative_gloo}
    ended = together(2, given, case.folder, hooks)
    assert ended.statuses == [2, 2]
    assert sorted(message in said for said in ended.said) == [False, True]
    assert "" in ended.said


def test_processes_that_do_not_have_the_same_are_refused(case: Case) -> None:
    ended = together(2, case.words(), case.folder, {1: have_another_torch})
    assert ended.statuses == [2, 2]
    said = "".join(ended.said)
    assert said.startswith("lorap: process 1 of 2: its version of torch is 2.0, that of process 0")
    assert said.count("lorap: ") == 1


def test_processes_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "MEETING", timedelta(seconds=1))
    with pytest.raises(LorapError, match="the processes did not find each other: "), join():
        pass


def test_other_commands_run_in_one_process(case: Case) -> None:
    ended = together(2, ["plan", str(case.folder / "model"), "--ratio", "0.3"], case.folder)
    assert ended.statuses == [2, 2]
    assert ended.said[0].startswith("lorap: plan: runs in one process, got 2; torchrun is for")
    assert ended.said[1] == ""


def torchrun(case: Case, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "lorap", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_torchrun_itself(case: Case) -> None:
    method = ("--mha", "afm")
    assert alone(case.words(*method, output="one")) == 0
    done = torchrun(case, *case.words(*method, "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    assert case.weights() == case.weights("one")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices here")
def test_two_gpus_give_what_one_gives(case: Case) -> None:
    cuda = ("--device", "cuda")
    assert alone(case.words(*cuda, output="one")) == 0
    done = torchrun(case, *case.words(*cuda, "--json"))
    assert done.returncode == 0, done.stderr
    found, expected = case.tensors("out"), case.tensors("one")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if ".left.weight" in name:
            right = name.replace("left", "right")
            # Norms and rotary angles are rounded to float32 inside the model.
            np.testing.assert_allclose(
                found[name] @ found[right], tensor @ expected[right], rtol=1e-4, atol=1e-5
            )
        elif ".right." not in name:
            np.testing.assert_array_equal(found[name], tensor)
