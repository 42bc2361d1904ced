"""The benchmarks run, and those for a GPU are ready for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench import baseline, factors, gpu, inference, processes, solvers
from bench.models import SHAPES, Shape
from bench.stand_ins import ROOT, wrapt


def test_the_stages_are_listed() -> None:
    command = [sys.executable, "-m", "bench.gpu", "--list"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(gpu.STAGES)


def test_without_a_gpu_stages_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["solvers"]) == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_an_unknown_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["nonsense"])
    assert "no stage nonsense" in capsys.readouterr().err


class Fake:
    """Stages that note what was run."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.broken = {"second"}

    def stages(self) -> dict[str, gpu.Stage]:
        tasks = {name: self.task(name) for name in ("first", "second", "third")}
        return {
            "checked": gpu.Stage("", {"only": self.task("only")}, timed=False),
            "timed": gpu.Stage("", tasks),
        }

    def task(self, name: str) -> gpu.Task:
        def work(machine: gpu.Machine) -> gpu.Values:
            self.ran.append(name)
            if name in self.broken:
                raise RuntimeError("out of memory")
            return {"ceiling": machine.ceilings.get("speed")}

        return work

    def run(self, results: Path, device: str = "card", again: bool = False) -> int:
        self.ran = []
        return gpu.run_stages(
            self.stages(),
            results,
            gpu.Machine(results.parent, {}, {}),
            device=device,
            again=again,
            measure_ceilings=lambda _: {"speed": 2.0},
        )


def test_stages_resume(tmp_path: Path) -> None:
    results, fake = tmp_path / "new" / "results.jsonl", Fake()
    assert fake.run(results) == 1
    assert fake.ran == ["only", "first", "second", "third"]
    lines = list(gpu.read(results))
    assert [line["task"] for line in lines if line["stage"] != "ceilings"] == fake.ran
    assert lines[0]["values"] == {"ceiling": None}
    assert lines[2]["values"] == {"ceiling": 2.0}
    assert lines[3]["error"] == "RuntimeError: out of memory"
    fake.broken = set()
    assert fake.run(results) == 0
    assert fake.ran == ["second"], "what failed, alone"
    assert fake.run(results) == 0
    assert fake.ran == []
    assert len(list(gpu.read(results))) == 7, "no ceilings where there is nothing to time"
    assert fake.run(results, device="another card") == 0
    assert len(fake.ran) == 4
    assert fake.run(results, again=True) == 0
    assert len(fake.ran) == 4


def test_a_task_of_which_a_part_failed_is_run_again(tmp_path: Path) -> None:
    def stages(failures: list[str]) -> dict[str, gpu.Stage]:
        return {"modes": gpu.Stage("", {"all": lambda _: {"failures": failures}}, timed=False)}

    results, machine = tmp_path / "results.jsonl", gpu.Machine(tmp_path, {}, {})
    assert gpu.run_stages(stages(["graphs"]), results, machine, device="card") == 1
    assert gpu.run_stages(stages([]), results, machine, device="card") == 0
    assert gpu.run_stages(stages(["not run"]), results, machine, device="card") == 0


def test_a_line_that_was_cut_off_is_run_again(tmp_path: Path) -> None:
    results, fake = tmp_path / "results.jsonl", Fake()
    fake.broken = set()
    fake.run(results)
    results.write_text(results.read_text()[:-20])
    fake.run(results)
    assert fake.ran == ["third"]
    assert [line["task"] for line in gpu.read(results)][-1] == "third"
    assert fake.run(results) == 0
    assert fake.ran == []


def test_without_ceilings_nothing_is_timed(tmp_path: Path) -> None:
    fake = Fake()

    def broken(_: gpu.Machine) -> gpu.Values:
        raise RuntimeError("no disk")

    machine = gpu.Machine(tmp_path, {}, {})
    results = tmp_path / "results.jsonl"
    failures = gpu.run_stages(
        fake.stages(), results, machine, device="card", measure_ceilings=broken
    )
    assert failures == 1
    assert fake.ran == ["only"]


def test_the_floor_by_hand() -> None:
    found = {
        "bytes before": 100,
        "bytes after": 60,
        "layer parameters before": 40,
        "layer parameters after": 20,
    }
    ceiling = {
        "disk read, bytes/s": 50.0,
        "disk write, bytes/s": 20.0,
        "matmul bfloat16, operations/s": 12.0,
    }
    assert gpu._floor(found, 3, ceiling) == 2 + 3 + 2 * 3 * 60 / 12


def test_one_more_layer_by_hand() -> None:
    # The first of a pass bears what is done once.
    assert gpu.steady([[9.0, 1.0, 2.0, 6.0], [5.0, 0.5]]) == 2.5
    assert gpu.steady([[9.0]]) == 9.0


@pytest.mark.parametrize("preset", ["lorap", "mgaa"])
def test_what_is_measured_of_a_compression(preset: str, tmp_path: Path) -> None:
    model = gpu._model(tmp_path, "tiny", Shape(64, 176, 3, 4, 4, 512))
    gpu._evict(model)
    assert gpu._model(tmp_path, "tiny", Shape(64, 176, 3, 4, 4, 512)) == model
    found = gpu.compress_child(
        {
            "model": str(model),
            "output": str(tmp_path / "out"),
            "samples": 4,
            "ratio": 0.2,
            "preset": preset,
            "vocabulary": 512,
            "device": "cpu",
        }
    )
    passes = found["layer seconds"]
    assert [len(layers) for layers in passes] == [3] * (1 if preset == "lorap" else 2)
    assert 0 < sum(sum(layers) for layers in passes) < found["seconds"]
    assert found["bytes before"] == 2 * (found["layer parameters before"] + 64 * (2 * 512 + 7))
    share = found["layer parameters after"] / found["layer parameters before"]
    assert share == pytest.approx(0.8, abs=0.01)
    assert (found["estimated memory"] is None) == (preset == "mgaa")
    # Another model makes room, and only that of models.
    (tmp_path / "stand-ins").mkdir()
    other = gpu._model(tmp_path, "tiny", Shape(64, 176, 1, 4, 4, 512))
    assert other.is_dir()
    assert not model.exists()
    assert (tmp_path / "stand-ins").is_dir()


def test_a_disk_has_ceilings(tmp_path: Path) -> None:
    found = gpu.disk_ceilings(tmp_path, 2**24)
    assert all(value > 0 for value in found.values())
    assert list(tmp_path.iterdir()) == []


def test_what_stands_in_for_wrapt_calls_at_once() -> None:
    called: list[ModuleType] = []
    wrapt.register_post_import_hook(called.append, "json")
    wrapt.register_post_import_hook(called.append, "peft")
    wrapt.register_post_import_hook(called.append, "no_such_module_of_any_name")
    assert called == [json]


def test_lorap_runs_without_wrapt(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from bench import stand_ins\n"
        "stand_ins.missing = lambda package: package == 'wrapt'\n"
        f"stand_ins.provide(pathlib.Path({str(tmp_path)!r}))\n"
        "import lorap, wrapt\n"
        f"assert wrapt.__file__.startswith({str(tmp_path)!r}), wrapt.__file__\n"
        "from transformers import AutoConfig\n"
        "AutoConfig.for_model('lorap_llama')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize("spectrum", ["decay", "outliers"])
@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_solvers_are_compared(shape: tuple[int, int], spectrum: str) -> None:
    rows = {
        row["solver"]: row for row in solvers.compare(shape, spectrum, torch.device("cpu"), 1, 0)
    }
    assert list(rows) == list(solvers.SOLVERS)
    assert rows["full SVD"]["ratio"] == 1
    for name in ("full SVD", "gram", "gram, float32 refined", "divide and conquer"):
        assert float(rows[name]["excess"]) <= 1


@pytest.mark.parametrize("solver", [solvers.gram_refined, solvers.spectral])
def test_solvers_that_are_tried_refuse_what_they_cannot_do(solver: solvers.Solver) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 20, generator=generator, dtype=torch.float64)
    matrix = matrix @ torch.randn(20, 90, generator=generator, dtype=torch.float64)
    assert solver(matrix, 30) is None


def test_excess_by_hand() -> None:
    # The second direction in the place of the first: 4 is lost where 1 would be.
    matrix = torch.diag(torch.tensor([2.0, 1.0], dtype=torch.float64))
    values = torch.tensor([2.0, 1.0], dtype=torch.float64)
    second = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    allowed = 1e-6 + 20 * torch.finfo(torch.float64).eps * 2 * 5
    assert solvers.contract_share(matrix, second, values) == pytest.approx(3 / allowed)
    assert solvers.contract_share(matrix, second.flip(0), values) == 0


def test_the_baseline_does_what_lorap_does() -> None:
    found = baseline.compare(
        Shape(64, 176, 2, 4, 4, 512),
        ratio=0.4,
        samples=4,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert found.difference < 1e-4
    assert found.same_channels == 1
    assert list(found.parts) == ["statistics", "decompositions", "pruning", "forward"]


TINY = Shape(64, 176, 2, 4, 4, 512)


@pytest.fixture(scope="module")
def timed() -> list[inference.Model]:
    settings = {"prompt": 10, "dtype": torch.float32, "device": torch.device("cpu")}
    return list(inference.models(TINY, [0.2], [1, 8], **settings))


def test_a_ratio_out_of_range_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        inference.main(["--shape", "small", "--layers", "1", "--ratios", "1.5"])
    assert stopped.value.code == 2
    assert "above 0 and below 1" in capsys.readouterr().err


def test_macs_and_bytes_by_hand(timed: list[inference.Model]) -> None:
    dense, exact, rounded = timed
    linears, norms, head = 2 * (4 * 64 * 64 + 3 * 64 * 176), 5 * 64, 512 * 64
    # Scores and values of 10 tokens in two layers, and the logits of the last one.
    assert dense.macs == 10 * linears + 2 * 2 * 64 * 10 * 10 + head
    assert dense.weights == 4 * (linears + norms + head)
    assert dense.size == dense.weights + 4 * head
    assert [model.name for model in timed] == ["dense", "20%", "20%, multiples of 8"]
    saved = dense.size - exact.size
    assert saved == pytest.approx(0.2 * dense.size, rel=0.03)
    assert (dense.weights - exact.weights, dense.macs - exact.macs) == (saved, 10 * saved / 4)
    weights = [p for p in rounded.module.model.layers.parameters() if p.ndim > 1]
    assert {size % 8 for p in weights for size in p.shape} == {0}


def test_prefill_and_decode_are_the_forward_of_the_whole(timed: list[inference.Model]) -> None:
    ids = torch.randint(512, (3, 10), generator=torch.Generator().manual_seed(0))
    for model in timed:
        with torch.no_grad():
            run = inference.Run(model, "eager", ids, 2)
            whole = torch.cat([ids, run.next, run.next], dim=1)
            logits = model.module(whole).logits
            for _ in range(2):
                torch.testing.assert_close(run.prefill()[:, -1], logits[:, 9])
                torch.testing.assert_close(run.decode()[:, -1], logits[:, 11])


def test_all_models_are_timed_and_a_mode_that_fails_is_told(
    timed: list[inference.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(forward: Any, **_: Any) -> Any:
        def wrong(**words: Any) -> Any:
            output = forward(**words)
            output.logits = output.logits * 1.01
            return output

        return wrong

    monkeypatch.setattr(torch, "compile", off)
    sizes = {"batches": [2], "prompt": 4, "new_tokens": 3, "repeats": 1}
    found = list(inference.compare(timed, modes=["compile", "eager"], **sizes))
    assert isinstance(found[0], str)
    assert found[0].startswith("compile, batch 2: RuntimeError: the logits of dense differ by")
    rows = found[1]
    assert [(row.model, row.phase, row.tokens) for row in rows if not isinstance(row, str)] == [
        (model.name, phase, tokens)
        for model in timed
        for phase, tokens in (("prefill", 8), ("decode", 2))
    ]
    assert all(row.seconds > 0 for row in rows if not isinstance(row, str))


def test_what_is_saved_by_hand() -> None:
    models = [
        inference.Model(name, None, m, w, w) for name, m, w in (("dense", 10, 8), ("a", 5, 6))
    ]
    rows = [
        inference.Row(model, mode, phase, 1, seconds, 1, 0)
        for model, mode, phase, seconds in (
            ("dense", "eager", "prefill", 4.0),
            ("dense", "compile", "prefill", 2.0),
            ("a", "eager", "prefill", 1.5),
            ("a", "compile", "prefill", 1.6),
            ("dense", "eager", "decode", 1.0),
            ("a", "eager", "decode", 0.5),
        )
    ]
    prefill, decode = inference.savings(models, rows)
    assert (prefill.time, prefill.due, prefill.modes) == (0.25, 0.5, ("compile", "eager"))
    assert prefill.of_aim == pytest.approx(0.25 / 0.45)
    assert (decode.time, decode.due) == (0.5, 0.25)
    assert len(list(inference.shares([prefill, decode]))) == 4
    assert len(list(inference.times(models, rows))) == 6


def test_graphs_are_refused_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        inference.main(["--modes", "graphs"])
    assert "CUDA graphs need --device cuda" in capsys.readouterr().err


def test_layouts_of_factors_are_compared() -> None:
    found = factors.compare(
        32, (4, 8), 3, repeats=1, dtype=torch.float32, device=torch.device("cpu")
    )
    assert list(found) == ["dense", "separate", "one product", "transposed"]
    assert all(seconds > 0 for seconds in found.values())


def test_a_layer_is_shared_on_paper() -> None:
    shape = Shape(64, 176, 2, 4, 4, 512)
    rows = processes.share(shape, samples=4, ratio=0.2, device=torch.device("cpu"))
    assert [row.processes for row in rows] == [1, 2, 4, 8]
    one = rows[0]
    assert min(one.forwards, one.longest, one.files) > 0
    for row in rows:
        assert row.forwards == pytest.approx(one.forwards / row.processes)
        assert (row.files, row.longest) == (one.files, one.longest)
        assert max(one.longest, one.pieces / row.processes) <= row.pieces * (1 + 1e-9)
        assert row.whole == row.forwards + row.pieces + row.files
    # At 20% v and o stay as they are: q, k and the channels are all that there is to do.
    assert rows[3].pieces == pytest.approx(one.longest)


@pytest.mark.slow
def test_processes_exchange_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", Shape(64, 176, 2, 4, 4, 512))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = gpu.exchange("cpu", 2)(gpu.Machine(tmp_path, environment, {}))
    assert found["processes"] == 2
    assert "gloo" in found["backends"]
    assert found["largest relative difference of products"] <= 1e-2, "bf16"
    assert not found["other tensors that differ"]
    alone = gpu.exchange("cpu", 1)(gpu.Machine(tmp_path, environment, {}))
    assert alone.keys() == {"processes", "backends"}


def test_differences_by_hand(tmp_path: Path) -> None:
    one = {
        "q.left.weight": torch.tensor([[1.0], [0.0]]),
        "q.right.weight": torch.tensor([[3.0, 4.0]]),
        "up.weight": torch.ones(2),
        "norm.weight": torch.ones(3),
    }
    # The same product but for its first entry, from factors that are scaled otherwise.
    other = one | {
        "q.left.weight": torch.tensor([[2.0], [0.0]]),
        "q.right.weight": torch.tensor([[1.5, 1.0]]),
        "up.weight": torch.tensor([1.0, 2.0]),
    }
    for name, tensors in (
        ("one", one),
        ("other", other),
        ("third", {"norm.weight": one["up.weight"]}),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    assert gpu.differences(tmp_path / "one", tmp_path / "other") == {
        "largest relative difference of products": pytest.approx(2 / 5),
        "other tensors that differ": ["up.weight"],
    }
    with pytest.raises(RuntimeError, match="other tensors"):
        gpu.differences(tmp_path / "one", tmp_path / "third")
