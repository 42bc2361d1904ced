"""Prefill and decode of compressed models beside the dense one: time, memory, MACs.

    python -m bench.inference [--shape medium] [--layers N] [--device cpu|cuda] [--dtype float32]
                              [--ratios 0.2 0.5] [--multiple-of 1 8 64 128] [--batch 1 16]
                              [--prompt 64] [--new-tokens 16] [--modes eager compile graphs]
                              [--repeats 5]

Random weights, ratios of all parameters, default settings. Prints tables in Markdown. All models do
the same, one after the other, again and again, and the medians are taken: what else the machine
does hits all alike. On a GPU the times are those of events; a single CPU thread is timed by what it
had of the CPU, so that waiting for other programs does not count.

A prefill runs the prompts and takes the logits of the last tokens; a decode is the time of one
token after it, the mean of ``--new-tokens``. The key/value cache is a static one. ``compile`` is
``torch.compile``, ``graphs`` the same with CUDA graphs (mode ``reduce-overhead``).

"Saved" is the share of the dense model's time, ``(t_dense - t) / t_dense``. It is held against the
share of the MACs that is gone (prefill), or of the weights that a token reads (decode): all but the
embedding's. The aim is 0.9 of that; it is asked of the best modes of both models.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, StaticCache

from bench.models import SHAPES, Shape, configuration
from bench.timing import Clock, thread_clock
from lorap.config import CompressionConfig
from lorap.errors import UsageError
from lorap.families import family_of
from lorap.plan import Plan, make_plan
from lorap.runtime import versions

PHASES = ("prefill", "decode")
MODES = ("eager", "compile", "graphs")
AIM = 0.9
"""Share of what is saved in MACs or bytes that is to be saved in time."""

PAPER = (
    "The paper's text to its Table 4, whose body is not at hand: at 50%, 31.25% of the latency is "
    "saved on an A40, for sentences of 64 tokens."
)


@dataclass(frozen=True)
class Model:
    """A model that is timed.

    Attributes
    ----------
    name : str
    module : PreTrainedModel
    macs : int
        Of a prefill of one prompt.
    weights : int
        Bytes that the decoding of a token reads.
    size : int
        Bytes of all weights.
    """

    name: str
    module: Any
    macs: int
    weights: int
    size: int


@dataclass(frozen=True)
class Row:
    """A phase of a model in a mode.

    Attributes
    ----------
    model, mode, phase : str
    batch : int
    seconds : float
        Of a prefill, or of a token.
    tokens : int
        That are run in that time, of the whole batch.
    memory : int
        Bytes of the weights; on a GPU the peak that this model causes, the cache included.
    """

    model: str
    mode: str
    phase: str
    batch: int
    seconds: float
    tokens: int
    memory: int


@dataclass(frozen=True)
class Saving:
    """What a model saves of the dense one's time, each in its best mode.

    Attributes
    ----------
    model, phase : str
    batch : int
    modes : (str, str)
        The best of the dense model and of this one.
    time : float
        Share of the dense model's time.
    due : float
        Share of the MACs (prefill) or of the weights' bytes (decode).
    """

    model: str
    phase: str
    batch: int
    modes: tuple[str, str]
    time: float
    due: float

    @property
    def of_aim(self) -> float:
        """What of the aim is reached; 1 or more where it is met."""
        return self.time / (AIM * self.due)


def models(
    shape: Shape,
    ratios: Sequence[float],
    multiples: Sequence[int],
    *,
    prompt: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Model]:
    """Yield the dense model, and the compressed ones.

    Parameters
    ----------
    shape : Shape
    ratios : sequence of float
    multiples : sequence of int
        ``multiple_of``, each for every ratio.
    prompt : int
        Tokens of a prompt, for the MACs.
    dtype : torch.dtype
    device : torch.device
    """
    config = AutoConfig.for_model(**configuration(shape, dtype))
    family = family_of(config)

    def built(name: str, plan: Plan | None) -> Model:
        structure = None if plan is None else plan.structure()
        made = family.compressed_config(config, structure)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                module: Any = family.model_class(made)
        finally:
            torch.set_default_dtype(before)
        module.eval().requires_grad_(False)
        sizes = {name: p.numel() * p.element_size() for name, p in module.named_parameters()}
        linears = sum(p.numel() for name, p in module.model.layers.named_parameters() if p.ndim > 1)
        # Scores and values: each token with all of the prompt.
        attention = 2 * shape.layers * shape.hidden * prompt * prompt
        return Model(
            name,
            module,
            linears * prompt + attention + module.lm_head.weight.numel(),
            sum(sizes.values()) - sizes["model.embed_tokens.weight"],
            sum(sizes.values()),
        )

    yield built("dense", None)
    for ratio in ratios:
        for multiple in multiples:
            settings = CompressionConfig(ratio=ratio, multiple_of=multiple)
            name = f"{ratio:.0%}" if multiple == 1 else f"{ratio:.0%}, multiples of {multiple}"
            yield built(name, make_plan(config, family, settings))


class Run:
    """A model in a mode, warmed up, with a cache for a batch of prompts.

    Parameters
    ----------
    model : Model
    mode : {"eager", "compile", "graphs"}
    ids : (batch, prompt)
    new_tokens : int

    Raises
    ------
    RuntimeError
        If the logits are not those of ``eager``.
    """

    def __init__(self, model: Model, mode: str, ids: Tensor, new_tokens: int) -> None:
        module = model.module
        self.mode, self.ids, self.new_tokens = mode, ids, new_tokens
        prompt = ids.shape[1]
        self.cache: Any = StaticCache(module.config, max_cache_len=prompt + new_tokens)
        self.positions = torch.arange(prompt + new_tokens, device=ids.device).unsqueeze(0)
        self.next = ids[:, :1].contiguous()
        self.forward: Callable[..., Any] = module.forward
        # The cache is made by the first forward, which is not to be compiled.
        expected = [work().clone() for work in (self.prefill, self.decode)]
        if mode != "eager":
            how = "reduce-overhead" if mode == "graphs" else None
            self.forward = torch.compile(module.forward, dynamic=False, mode=how)
        bound = torch.finfo(expected[0].dtype).eps ** 0.5
        # Graphs are recorded by the second and the third call.
        for _ in range(1 if mode == "eager" else 3):
            for logits, work in zip(expected, (self.prefill, self.decode), strict=True):
                off = float(torch.linalg.norm((work() - logits).float()))
                if not off <= bound * float(torch.linalg.norm(logits.float())):
                    raise RuntimeError(f"the logits of {model.name} differ by {off} from eager")

    def prefill(self) -> Tensor:
        """Run the prompts, into an empty cache; return the logits of the last tokens."""
        self.cache.reset()
        return self._run(self.ids, self.positions[:, : self.ids.shape[1]])

    def decode(self) -> Tensor:
        """Run the new tokens one by one; return the logits of the last one."""
        prompt = self.ids.shape[1]
        for at in range(prompt, prompt + self.new_tokens):
            logits = self._run(self.next, self.positions[:, at : at + 1])
        return logits

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        if self.mode == "graphs":
            compiler: Any = torch.compiler
            compiler.cudagraph_mark_step_begin()
        output: Tensor = self.forward(
            input_ids=ids,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return output


@contextmanager
def _many_graphs() -> Iterator[None]:
    """Let one forward be compiled for all models, batches and phases of a mode."""
    config: Any = torch._dynamo.config
    torch._dynamo.reset()
    with config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield


def measure(
    timed: Sequence[Model],
    mode: str,
    batch: int,
    *,
    prompt: int,
    new_tokens: int,
    repeats: int,
) -> list[Row]:
    """Time models in a mode, in turn.

    Parameters
    ----------
    timed : sequence of Model
    mode : {"eager", "compile", "graphs"}
    batch, prompt, new_tokens : int
    repeats : int
        Of which the median is taken.
    """
    device = timed[0].module.device
    vocabulary = timed[0].module.config.vocab_size
    ids = torch.randint(3, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))
    clock = Clock(device, thread_clock())
    rows = []
    # Not inference mode, whose tensors a compiled function may not write to.
    with torch.no_grad(), _many_graphs():
        runs, memory = [], []
        for model in timed:
            before = torch.cuda.memory_allocated(device) if clock.on_gpu else 0
            if clock.on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
            runs.append(Run(model, mode, ids.to(device), new_tokens))
            beyond = torch.cuda.max_memory_allocated(device) - before if clock.on_gpu else 0
            memory.append(model.size + beyond)
        taken: dict[tuple[str, str], list[float]] = {}
        for _ in range(repeats):
            for model, run in zip(timed, runs, strict=True):
                for phase, work in (("prefill", run.prefill), ("decode", run.decode)):
                    taken.setdefault((model.name, phase), []).append(clock(work))
    for model, size in zip(timed, memory, strict=True):
        first, then = (statistics.median(taken[model.name, phase]) for phase in PHASES)
        rows.append(Row(model.name, mode, "prefill", batch, first, batch * prompt, size))
        rows.append(Row(model.name, mode, "decode", batch, then / new_tokens, batch, size))
    return rows


def savings(timed: Sequence[Model], rows: Sequence[Row]) -> list[Saving]:
    """Compare the compressed models with the first, each in its best mode.

    Parameters
    ----------
    timed : sequence of Model
    rows : sequence of Row
        In any modes, for any batches.
    """
    best: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        key = (row.model, row.phase, row.batch)
        best[key] = min(best.get(key, row), row, key=lambda r: r.seconds)
    dense, found = timed[0], []
    for phase in PHASES:
        for batch in sorted({row.batch for row in rows}):
            before = best[dense.name, phase, batch]
            for model in timed[1:]:
                after = best[model.name, phase, batch]
                if phase == "prefill":
                    due = 1 - model.macs / dense.macs
                else:
                    due = 1 - model.weights / dense.weights
                saved = 1 - after.seconds / before.seconds
                modes = (before.mode, after.mode)
                found.append(Saving(model.name, phase, batch, modes, saved, due))
    return found


def compare(
    timed: Sequence[Model],
    *,
    batches: Sequence[int] = (1, 16),
    prompt: int = 64,
    new_tokens: int = 16,
    modes: Sequence[str] = MODES,
    repeats: int = 5,
) -> Iterator[list[Row] | str]:
    """Time models for all batches and in all modes.

    Yields
    ------
    list of Row, or str
        What a batch and a mode give; of a mode that did not run, the error.
    """
    for batch in batches:
        for mode in modes:
            try:
                yield measure(
                    timed, mode, batch, prompt=prompt, new_tokens=new_tokens, repeats=repeats
                )
            except Exception as error:
                # The other modes may well run.
                yield f"{mode}, batch {batch}: {type(error).__name__}: {error}"


def times(timed: Sequence[Model], rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table, without its head."""
    macs = {model.name: model.macs for model in timed}
    for row in rows:
        of_prompt = f"{macs[row.model] / 1e9:.2f}" if row.phase == "prefill" else ""
        yield (
            f"| {row.batch} | {row.mode} | {row.phase} | {row.model} | {row.seconds * 1e3:.2f} | "
            f"{row.tokens / row.seconds:.0f} | {of_prompt} | {row.memory / 2**20:.0f} |"
        )


def shares(found: Sequence[Saving]) -> Iterator[str]:
    """Yield the lines of the table of what is saved."""
    yield "| batch | phase | model | best modes: dense, this | due | saved | share of the aim |"
    yield "|---|---|---|---|---|---|---|"
    for saving in found:
        yield (
            f"| {saving.batch} | {saving.phase} | {saving.model} | {', '.join(saving.modes)} | "
            f"{saving.due:.1%} | {saving.time:.1%} | {saving.of_aim:.2f} |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.inference", description=__doc__.split("\n")[0]
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="medium", help="weights are random; default: medium")
    add("--layers", type=int, help="in the place of the shape's")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="default: float32",
    )
    add(
        "--ratios",
        type=float,
        nargs="+",
        default=[0.2, 0.5],
        help="of all parameters; default: 0.2 0.5",
    )
    add("--multiple-of", type=int, nargs="+", default=[1], help="each at all ratios; default: 1")
    add("--batch", type=int, nargs="+", default=[1, 16], help="prompts at once; default: 1 16")
    add("--prompt", type=int, default=64, help="tokens of each; default: 64")
    add("--new-tokens", type=int, default=16, help="that decode is timed over; default: 16")
    add("--modes", nargs="+", choices=MODES, help="default: all that the device has")
    add("--repeats", type=int, default=5, help="of which the median counts; default: 5")
    given = parser.parse_args(arguments)
    # Without CUDA there are no CUDA graphs.
    modes = given.modes or (MODES if given.device == "cuda" else MODES[:2])
    if given.device == "cpu" and "graphs" in modes:
        parser.error("--modes graphs: CUDA graphs need --device cuda")
    shape = SHAPES[given.shape]
    if given.layers is not None:
        shape = replace(shape, layers=given.layers)
    print(f"`python -m bench.inference {shlex.join(arguments or sys.argv[1:])}`")
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores\n", flush=True)
    try:
        timed = list(
            models(
                shape,
                given.ratios,
                given.multiple_of,
                prompt=given.prompt,
                dtype=getattr(torch, given.dtype),
                device=torch.device(given.device),
            )
        )
    except UsageError as error:
        parser.error(str(error))
    print("| batch | mode | phase | model | ms | tokens/s | G MACs of a prompt | memory, MiB |")
    print("|---|---|---|---|---|---|---|---|")
    rows: list[Row] = []
    failures = []
    for found in compare(
        timed,
        batches=given.batch,
        prompt=given.prompt,
        new_tokens=given.new_tokens,
        modes=modes,
        repeats=given.repeats,
    ):
        if isinstance(found, str):
            failures.append(found)
            continue
        rows += found
        print("\n".join(times(timed, found)), flush=True)
    print("")
    print("\n".join(shares(savings(timed, rows))))
    for failure in failures:
        print(f"\nFailed: {failure}")
    print(f"\n{PAPER}\n\n{versions()}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
