"""Everything that is to be measured on a GPU, in stages of a few minutes.

    python -m bench.gpu --list
    python -m bench.gpu [STAGE ...] [--results FILE] [--folder FOLDER] [--again]

Without a stage all run, in order: first whether it is correct, then how fast. Each task of a stage
is written to the results, a file of JSON lines, as soon as it is done; a run that was cut off goes
on behind the last one. A task that failed is written with its error, and tried again. The ceilings
of the machine are measured in every run that times something, so that both come from one machine.

It needs torch, transformers and what they bring; from the root of the repository, with nothing
installed. The CUDA tests run where pytest and hypothesis are.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.stand_ins import ROOT, missing, provide

Values = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """What a task is given.

    Attributes
    ----------
    folder : Path
        For models and what comes of them; several ten GB.
    environment : mapping
        For other processes.
    ceilings : mapping
        As measured in this run; empty for stages that are not timed.
    """

    folder: Path
    environment: Mapping[str, str]
    ceilings: Mapping[str, float]


Task = Callable[[Machine], Values]


@dataclass(frozen=True)
class Stage:
    """Tasks that belong together.

    Attributes
    ----------
    about : str
    tasks : mapping
        By name.
    timed : bool
        Whether it needs the ceilings.
    """

    about: str
    tasks: Mapping[str, Task]
    timed: bool = True


# --- correct -------------------------------------------------------------------------------------


def cuda_tests(machine: Machine) -> Values:
    """Run the tests that need a GPU: float64, float32, bf16 and fp16."""
    lacking = [package for package in ("pytest", "hypothesis") if missing(package)]
    if lacking:
        return {"skipped": f"without {' and '.join(lacking)}"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    # Warnings of other versions of torch are none of the tests' business.
    command += ["-o", "filterwarnings=", "tests/test_cuda.py", "parity_tests/test_cuda.py"]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(machine.environment), capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-1000:])
    return {"pytest": done.stdout.strip().splitlines()[-1]}


def agreement(dtype: torch.dtype) -> Task:
    """Compress a random model on the GPU and on the CPU; what is lost must be the same."""

    def work(machine: Machine) -> Values:
        import lorap
        from bench.models import Shape, write
        from lorap import CompressionConfig

        folder = machine.folder / "agreement"
        write(Shape(256, 704, 2, 4, 2, 512), folder, dtype)
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(folder)
        model = loaded.to(dtype)
        shutil.rmtree(folder)
        ids = torch.randint(3, 512, (16, 64), generator=torch.Generator().manual_seed(0))
        config = CompressionConfig(ratio=0.4)
        lost: dict[str, list[float]] = {}
        for device in ("cpu", "cuda"):
            compressed: Any = lorap.compress(model.to(device), config, calibration=ids)
            lost[device] = [
                _lost(dense, factored)
                for dense, factored in zip(model.model.layers, compressed.model.layers, strict=True)
            ]
        worst = max(abs(a - b) / a for a, b in zip(lost["cpu"], lost["cuda"], strict=True))
        bound = torch.finfo(dtype).eps ** 0.5
        if not worst <= bound:
            raise RuntimeError(f"what q loses differs by {worst:.2e}, more than {bound:.2e}")
        return {"relative difference": worst, "bound": bound}

    return work


def _lost(dense: Any, compressed: Any) -> float:
    factored = compressed.self_attn.q_proj
    product = factored.left.weight.double() @ factored.right.weight.double()
    return float(torch.linalg.norm(dense.self_attn.q_proj.weight.double() - product))


# --- ceilings ------------------------------------------------------------------------------------


def ceilings(machine: Machine) -> Values:
    """Measure what the machine can do: bytes and operations per second."""
    from bench.solvers import seconds

    cuda = torch.device("cuda")
    found: Values = {}
    source = torch.empty(2**30, dtype=torch.uint8, device=cuda)
    target = torch.empty_like(source)
    # Read and written.
    found["copy, bytes/s"] = 2 * 2**30 / seconds(partial(target.copy_, source), cuda, 10)
    for name, pinned in (("pageable", False), ("pinned", True)):
        # Written: pages that never were are all one page of zeros.
        host = torch.ones(2**28, dtype=torch.uint8, pin_memory=pinned)
        taken = seconds(partial(source[: 2**28].copy_, host), cuda, 5)
        found[f"to the GPU ({name}), bytes/s"] = 2**28 / taken
    for dtype, side in ((torch.float32, 8192), (torch.bfloat16, 8192), (torch.float64, 4096)):
        a = torch.randn(side, side, device=cuda).to(dtype)
        taken = seconds(partial(torch.matmul, a, a), cuda, 5)
        found[f"matmul {str(dtype).removeprefix('torch.')}, operations/s"] = 2 * side**3 / taken
    return found | disk_ceilings(machine.folder)


def disk_ceilings(folder: Path, size: int = 2**31) -> Values:
    """Measure the folder's disk: written and synced, and read again (from the cache, mostly)."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "ceiling"
    block = os.urandom(2**24)
    start = time.perf_counter()
    with open(file, "wb") as target:
        for _ in range(size // len(block)):
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    written = time.perf_counter() - start
    start = time.perf_counter()
    with open(file, "rb", buffering=0) as content:
        while content.read(2**24):
            pass
    read = time.perf_counter() - start
    file.unlink()
    return {"disk write, bytes/s": size / written, "disk read, bytes/s": size / read}


# --- timed ---------------------------------------------------------------------------------------


def solver(shape: str, spectrum: str) -> Task:
    """Time the solvers on a matrix, by events, after a run to warm up."""

    def work(_: Machine) -> Values:
        from bench.solvers import compare, shape_of

        return {"rows": compare(shape_of(shape), spectrum, torch.device("cuda"), 3, 0)}

    return work


def baseline(shape: str, layers: int, ratio: float) -> Task:
    """Compare with the paper-literal baseline."""

    def work(_: Machine) -> Values:
        from dataclasses import asdict

        from bench.baseline import compare
        from bench.models import SHAPES

        found = compare(
            replace(SHAPES[shape], layers=layers),
            ratio=ratio,
            samples=128,
            dtype=torch.float16,
            device=torch.device("cuda"),
        )
        torch.cuda.empty_cache()
        first, second = found.decompositions
        return asdict(found) | {
            "ratio end to end": found.baseline / found.lorap,
            "ratio of the decompositions": first / second,
        }

    return work


def inference(
    shape: str,
    ratios: Sequence[float],
    multiple: int = 1,
    *,
    layers: int | None = None,
    modes: Sequence[str] = ("eager", "compile", "graphs"),
) -> Task:
    """Time prefill and decode of compressed models beside the dense one."""

    def work(_: Machine) -> Values:
        from dataclasses import asdict

        from bench.inference import compare, models, savings
        from bench.models import SHAPES

        whole = SHAPES[shape]
        timed = list(
            models(
                replace(whole, layers=layers or whole.layers),
                ratios,
                [multiple],
                prompt=64,
                dtype=torch.float16,
                device=torch.device("cuda"),
            )
        )
        found = list(compare(timed, modes=modes, repeats=9))
        rows = [row for rows in found if not isinstance(rows, str) for row in rows]
        shares = [asdict(s) | {"share of the aim": s.of_aim} for s in savings(timed, rows)]
        values = {
            "macs": {model.name: model.macs for model in timed},
            "rows": [asdict(row) for row in rows],
            "savings": shares,
            "failures": [text for text in found if isinstance(text, str)],
        }
        del timed
        torch.cuda.empty_cache()
        return values

    return work


def factors(width: int, ranks: Sequence[int], tokens: int) -> Task:
    """Time the layouts of the factors of q, k and v."""

    def work(_: Machine) -> Values:
        from bench.factors import compare

        half, cuda = torch.float16, torch.device("cuda")
        seconds = compare(width, ranks, tokens, repeats=15, dtype=half, device=cuda)
        return {"seconds": seconds}

    return work


def disk_to_disk(
    shape: str,
    ratio: float,
    *,
    layers: int | None = None,
    samples: int = 128,
    preset: str = "lorap",
    cached: bool = True,
) -> Task:
    """Compress a checkpoint into a folder, in a process of its own.

    Parameters
    ----------
    shape : str
        Of ``bench.models``.
    ratio : float
        Of the layers' parameters.
    layers : int, optional
        Fewer than the model has; the time of all is extrapolated.
    samples : int
        Of 128 tokens.
    preset : str
        Of ``lorap compress``.
    cached : bool
        Whether the system may hold the model's files in memory already.
    """

    def work(machine: Machine) -> Values:
        from bench.models import SHAPES

        whole = SHAPES[shape]
        sizes = replace(whole, layers=layers or whole.layers)
        model = _model(machine.folder, shape, sizes)
        if not cached:
            _evict(model)
        request = {
            "task": "compress",
            "model": str(model),
            "output": str(machine.folder / "out"),
            "samples": samples,
            "ratio": ratio,
            "preset": preset,
            "vocabulary": sizes.vocabulary,
            "device": "cuda",
        }
        start = time.perf_counter()
        printed = _run([sys.executable, "-m", "bench.gpu", "--child", json.dumps(request)], machine)
        wall = time.perf_counter() - start
        found: Values = json.loads(printed.splitlines()[-1])
        shutil.rmtree(machine.folder / "out", ignore_errors=True)
        missing = whole.layers - sizes.layers
        floor = _floor(found, samples * 128, machine.ceilings)
        return found | {
            "layers": sizes.layers,
            "process seconds": wall,
            "floor seconds": floor,
            "share of the floor": floor / found["seconds"],
            "seconds for all layers": found["seconds"] + missing * steady(found["layer seconds"]),
            "all layers": whole.layers,
        }

    return work


def steady(passes: Sequence[Sequence[float]]) -> float:
    """Return the seconds that one more layer adds.

    Parameters
    ----------
    passes : sequence of sequence of float
        Of each pass over the layers, the seconds of each. The first layer of a pass bears what is
        done once, so that it does not count where there are others.
    """
    return sum(statistics.median(layers[1:] or layers) for layers in passes)


def shared_layer(shape: str, ratio: float) -> Task:
    """Share a layer among several GPUs, on paper, from the parts that are measured on one."""

    def work(_: Machine) -> Values:
        from dataclasses import asdict

        from bench.models import SHAPES
        from bench.processes import share

        sizes = replace(SHAPES[shape], layers=2)
        rows = share(sizes, samples=128, ratio=ratio, device=torch.device("cuda"))
        torch.cuda.empty_cache()
        return {"rows": [asdict(row) | {"sum": row.whole} for row in rows]}

    return work


def exchange(device: str, count: int) -> Task:
    """Exchange tensors; of several processes, compress with all, and compare with one.

    Parameters
    ----------
    device : {"cuda", "cpu"}
        By NCCL, which gives no two processes one GPU, or by gloo.
    count : int
        Processes. One is alone with NCCL.
    """

    def work(machine: Machine) -> Values:
        import numpy as np

        from bench.models import SHAPES

        request = json.dumps({"task": "exchange", "device": device})
        child = [*_torchrun(count), "-m", "bench.gpu", "--child", request]
        found: Values = {"processes": count} | json.loads(_run(child, machine).splitlines()[-1])
        if count == 1:
            return found
        sizes = replace(SHAPES["small"], layers=2)
        model = _model(machine.folder, "small", sizes)
        ids = np.random.default_rng(0).integers(3, sizes.vocabulary, (64, 128))
        np.save(model / "ids.npy", ids)
        outputs = []
        for processes in (1, count):
            outputs.append(machine.folder / f"from-{processes}")
            options = ["--ratio", "0.4", "--samples", "64", "--device", device, "--overwrite"]
            options += ["--calibration", str(model / "ids.npy"), "--output", str(outputs[-1])]
            _run([*_torchrun(processes), "-m", "lorap", "compress", str(model), *options], machine)
        found |= differences(*outputs)
        for output in outputs:
            shutil.rmtree(output)
        return found

    return work


def differences(one: Path, other: Path) -> Values:
    """Compare two compressed checkpoints: products of factors, all other tensors bit by bit.

    Raises
    ------
    RuntimeError
        If tensors or their shapes differ: another plan.
    """
    from safetensors.torch import load_file

    first, second = (
        {
            name: tensor
            for shard in sorted(folder.glob("model*.safetensors"))
            for name, tensor in load_file(shard).items()
        }
        for folder in (one, other)
    )
    if {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in second.items()}:
        raise RuntimeError("the two have other tensors, or others' shapes")
    worst, unlike = 0.0, []
    for name, tensor in first.items():
        if name.endswith(".left.weight"):
            right = name.replace(".left.", ".right.")
            products = [x[name].double() @ x[right].double() for x in (first, second)]
            difference = torch.linalg.norm(products[0] - products[1])
            worst = max(worst, float(difference / torch.linalg.norm(products[0])))
        elif ".right." not in name and not torch.equal(tensor, second[name]):
            unlike.append(name)
    return {"largest relative difference of products": worst, "other tensors that differ": unlike}


def exchange_child(request: Mapping[str, Any]) -> Values:
    """Sum and send tensors, as a run of several processes does."""
    import torch.distributed as dist

    from lorap.pipeline.processes import join

    with join() as processes:
        device = processes.device(torch.device(request["device"]))
        total = torch.ones(3, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        if total.tolist() != [processes.size] * 3:
            raise RuntimeError(f"{processes.size} ones come to {total.tolist()}")
        sent = torch.full((5,), processes.rank, dtype=torch.uint8, device=device)
        dist.broadcast(sent, src=processes.size - 1)
        if sent.tolist() != [processes.size - 1] * 5:
            raise RuntimeError(f"process {processes.size - 1} sent {sent.tolist()}")
        return {"backends": dist.get_backend_config()}


def _torchrun(processes: int) -> list[str]:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *words]


def _run(command: Sequence[str], machine: Machine) -> str:
    """Run a command in a process of its own; return what it prints on stdout."""
    environment = dict(machine.environment)
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def _model(folder: Path, name: str, sizes: Any) -> Path:
    """Return a random checkpoint, written unless it is there; others make room for it."""
    from bench.models import write

    path = folder / "models" / f"{name}-{sizes.layers}"
    if not (path / "config.json").exists():
        shutil.rmtree(path.parent, ignore_errors=True)
        # The configuration is written last.
        write(sizes, path, device="cuda" if torch.cuda.is_available() else "cpu")
        # Or the system would write them while something is timed.
        os.sync()
    return path


def _evict(folder: Path) -> None:
    """Ask the system to forget the contents of the files of a folder, so that a disk is read."""
    for file in folder.iterdir():
        with open(file, "rb") as content:
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _floor(found: Mapping[str, Any], tokens: int, ceiling: Mapping[str, float]) -> float:
    """Return the least time: weights read and written once, and two forwards of the tokens.

    At the disk's and the matmuls' speed, one after the other. Without the decompositions.
    """
    moved: float = found["bytes before"] / ceiling["disk read, bytes/s"]
    moved += found["bytes after"] / ceiling["disk write, bytes/s"]
    operations: int = (
        2 * tokens * (found["layer parameters before"] + found["layer parameters after"])
    )
    return moved + operations / ceiling["matmul bfloat16, operations/s"]


def compress_child(request: Mapping[str, Any]) -> Values:
    """Compress as asked, in this process; its peaks are then those of the compression."""
    import numpy as np

    import lorap
    from lorap import CompressionConfig

    model, output = Path(request["model"]), Path(request["output"])
    ids = np.random.default_rng(0).integers(3, request["vocabulary"], (request["samples"], 128))
    np.save(model / "ids.npy", ids)
    config = CompressionConfig.from_preset(
        request["preset"],
        ratio=request["ratio"],
        ratio_scope="layer",
        samples=request["samples"],
        device=request["device"],
    )
    estimated = None
    if not config.measures:
        # Else it would take as long as the compression does to measure.
        plan = lorap.plan_checkpoint(model, config)
        assert plan.estimate is not None
        estimated = plan.estimate.peak_memory
    stamps: list[float] = []
    report = lorap.compress_checkpoint(
        model,
        output,
        config,
        calibration=str(model / "ids.npy"),
        overwrite=True,
        progress=lambda done, of: stamps.append(time.perf_counter()),
    )
    each, layers = [b - a for a, b in pairwise(stamps)], len(report["layers"])
    modules = [module for layer in report["layers"] for module in layer["modules"].values()]
    return {
        "seconds": report["seconds"],
        "layer seconds": [each[at : at + layers] for at in range(0, len(each), layers)],
        "peak memory": report["peak_memory_bytes"],
        # With what the allocator holds beside the tensors.
        "reserved memory": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0,
        "estimated memory": estimated,
        "bytes before": 2 * report["parameters"]["before"],
        "bytes after": 2 * report["parameters"]["after"],
        "layer parameters before": sum(module["parameters_before"] for module in modules),
        "layer parameters after": sum(module["parameters"] for module in modules),
        "achieved ratio": report["achieved_ratio"],
    }


CHILDREN: dict[str, Callable[[Mapping[str, Any]], Values]] = {
    "compress": compress_child,
    "exchange": exchange_child,
}
"""What is done in a process of its own, by the ``task`` of the request."""

SOLVER_SHAPES = ("256x2048", "2048x2048", "4096x4096", "4096x11008")

STAGES: dict[str, Stage] = {
    "correct": Stage(
        "tests on CUDA (float64, float32, bf16, fp16), and the GPU against the CPU",
        {"tests": cuda_tests}
        | {
            f"agreement {name}": agreement(getattr(torch, name))
            for name in ("float32", "bfloat16", "float16")
        },
        timed=False,
    ),
    "solvers": Stage(
        "time and accuracy of the solvers, shapes of TinyLlama and LLaMA-7B",
        {f"{s} {kind}": solver(s, kind) for s in SOLVER_SHAPES for kind in ("decay", "outliers")},
    ),
    "baseline": Stage(
        "two layers of LLaMA-7B beside the paper-literal baseline, fp16",
        {f"llama-7b {ratio}": baseline("llama-7b", 2, ratio) for ratio in (0.2, 0.5)},
    ),
    "llama-7b": Stage(
        "disk to disk, all 32 layers; of two runs the second finds the files in memory",
        {
            f"{ratio}{name}": disk_to_disk("llama-7b", ratio, cached=cached)
            for ratio in (0.2, 0.5)
            for name, cached in (("", False), (", in memory", True))
        },
    ),
    "llama-13b": Stage(
        "disk to disk, 10 of 40 layers, extrapolated",
        {f"{ratio}": disk_to_disk("llama-13b", ratio, layers=10) for ratio in (0.2, 0.5)},
    ),
    "llama-3-8b": Stage(
        "disk to disk, 8 of 32 layers, extrapolated",
        {f"{ratio}": disk_to_disk("llama-3-8b", ratio, layers=8) for ratio in (0.2, 0.5)},
    ),
    "llama-3-70b": Stage(
        "disk to disk, 3 of 80 layers, extrapolated",
        {f"{ratio}": disk_to_disk("llama-3-70b", ratio, layers=3) for ratio in (0.2, 0.5)},
    ),
    "presets": Stage(
        "disk to disk by preset, 4 of LLaMA-7B's 32 layers, extrapolated",
        {
            f"{preset} {ratio}": disk_to_disk("llama-7b", ratio, layers=4, preset=preset)
            for ratio in (0.2, 0.5)
            for preset in ("lorap", "mgaa", "best")
        },
    ),
    "inference": Stage(
        "the compressed LLaMA-7B beside the dense one, fp16: all layers, and 4 of them compiled; "
        "multiples in CUDA graphs alone",
        {"all layers, eager": inference("llama-7b", (0.2, 0.5), modes=["eager"])}
        | {f"{ratio}, compiled": inference("llama-7b", (ratio,), layers=4) for ratio in (0.2, 0.5)}
        | {
            f"{ratio}, multiples of {multiple}": inference(
                "llama-7b", (ratio,), multiple, layers=4, modes=["graphs"]
            )
            for ratio in (0.2, 0.5)
            for multiple in (8, 64, 128)
        },
    ),
    "factors": Stage(
        "layouts of the factors of q, k and v of LLaMA-7B at 20% and 50%",
        {
            f"{ranks}, {tokens} tokens": factors(4096, ranks, tokens)
            for ranks in ((1228, 1228), (512, 512, 1536))
            for tokens in (1, 16, 64, 1024)
        },
    ),
    "processes": Stage(
        "NCCL; two layers of LLaMA-7B, shared among up to 8 GPUs on paper",
        {"exchange": exchange("cuda", torch.cuda.device_count())}
        | {f"llama-7b {ratio}": shared_layer("llama-7b", ratio) for ratio in (0.2, 0.5)},
        timed=False,
    ),
    "curves": Stage(
        "time and memory against width, depth, tokens and ratio",
        {
            f"width {name}": disk_to_disk(name, 0.2, layers=3)
            for name in ("small", "medium", "tinyllama", "llama-7b")
        }
        | {f"depth {n}": disk_to_disk("tinyllama", 0.2, layers=n) for n in (2, 4, 8, 16)}
        | {
            f"tokens {128 * n}": disk_to_disk("tinyllama", 0.2, layers=3, samples=n)
            for n in (32, 128, 512, 2048)
        }
        | {
            f"ratio {ratio}": disk_to_disk("tinyllama", ratio, layers=3)
            for ratio in (0.1, 0.2, 0.3, 0.4, 0.5)
        },
    ),
}


# --- running them --------------------------------------------------------------------------------


def finished(results: Path, device: str) -> set[tuple[str, str]]:
    """Return the tasks that the results hold for a device, without those that failed."""
    return {
        (line["stage"], line["task"])
        for line in read(results)
        if line["device"] == device and _succeeded(line)
    }


def _succeeded(outcome: Mapping[str, Any]) -> bool:
    """Whether a task is done: a part of it may have failed, and its values tell of the others."""
    return "error" not in outcome and not outcome["values"].get("failures")


def read(results: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of the results; one that was cut off is left out."""
    if not results.exists():
        return
    for text in results.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(text)
        except ValueError:
            continue


def append(results: Path, line: Mapping[str, Any]) -> None:
    """Write a line, and see to it that it is on the disk."""
    results.parent.mkdir(parents=True, exist_ok=True)
    data = json.dumps(line)
    # What a cut-off run has left of a line must not spoil this one.
    before = results.read_bytes() if results.exists() else b""
    with open(results, "a", encoding="utf-8") as file:
        file.write("\n" if before and not before.endswith(b"\n") else "")
        file.write(f"{data}\n")
        file.flush()
        os.fsync(file.fileno())


def run_stages(
    stages: Mapping[str, Stage],
    results: Path,
    machine: Machine,
    *,
    device: str,
    again: bool = False,
    measure_ceilings: Task = ceilings,
) -> int:
    """Run the tasks that are not in the results yet.

    Parameters
    ----------
    stages : mapping
    results : Path
    machine : Machine
        Without ceilings.
    device : str
        Name of the device, for the results.
    again : bool
        Whether tasks that are in the results run too.
    measure_ceilings : callable
        Run before the first task that is timed.

    Returns
    -------
    int
        Number of tasks that failed.
    """
    from lorap.runtime import versions

    done = set() if again else finished(results, device)
    run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    common = {"run": run, "device": device, "versions": versions()}
    failures = 0

    def carry_out(stage: str, name: str, task: Task) -> dict[str, Any]:
        print(f"{stage}: {name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        outcome: dict[str, Any]
        try:
            outcome = {"values": task(machine)}
        except Exception as error:
            # The next task may well succeed.
            outcome = {"error": f"{type(error).__name__}: {error}"}
        line = {**common, "stage": stage, "task": name, **outcome}
        append(results, line | {"seconds": time.perf_counter() - start})
        print(json.dumps(outcome), flush=True)
        return outcome

    for stage_name, stage in stages.items():
        todo = {name: task for name, task in stage.tasks.items() if (stage_name, name) not in done}
        if todo and stage.timed and not machine.ceilings:
            outcome = carry_out("ceilings", run, measure_ceilings)
            if not _succeeded(outcome):
                return failures + 1
            machine = replace(machine, ceilings=outcome["values"])
        for name, task in todo.items():
            failures += not _succeeded(carry_out(stage_name, name, task))
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark.

    Returns
    -------
    int
        The exit status: 0, 1 where a task failed, 2 without a GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--list", action="store_true", help="list the stages, and run none")
    parser.add_argument("--results", type=Path, default=Path("build/gpu.jsonl"))
    parser.add_argument("--folder", type=Path, default=Path("build/gpu"), help="for models")
    parser.add_argument("--again", action="store_true", help="also what the results hold already")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    unknown = [name for name in given.stages if name not in STAGES]
    if unknown:
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if given.list:
        for name, stage in STAGES.items():
            print(f"{name:12} {len(stage.tasks):2} tasks: {stage.about}")
        return 0
    folder = given.folder.resolve()
    environment = provide(folder / "stand-ins")
    if given.child is not None:
        request = json.loads(given.child)
        print(json.dumps(CHILDREN[request["task"]](request)))
        return 0
    if not torch.cuda.is_available():
        print(
            "bench.gpu: there is no CUDA device here, and every stage needs one; --list lists them",
            file=sys.stderr,
        )
        return 2
    chosen = {name: STAGES[name] for name in given.stages or STAGES}
    failures = run_stages(
        chosen,
        given.results,
        Machine(folder, environment, {}),
        device=torch.cuda.get_device_name(),
        again=given.again,
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
