"""The command ``lorap``.

The heavy packages (torch, transformers, numpy) are imported inside the commands: help is immediate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import lorap
from lorap.errors import Interrupted, LorapError, UsageError
from lorap.wording import duration as _duration
from lorap.wording import short as _short
from lorap.wording import spans

if TYPE_CHECKING:
    from rich.table import Table

    from lorap.audit import AuditResult, Check
    from lorap.config import CompressionConfig
    from lorap.demo import DemoResult
    from lorap.evaluation import Evaluation, PerplexityReport
    from lorap.pipeline.processes import Processes
    from lorap.plan import LayerPlan, ModulePlan, Plan

SECONDS_BETWEEN_LINES = 2.0
"""Least time between two lines of progress where stderr is not a terminal."""

ARGUMENTS = "lorap.arguments"
"""Key under which a context holds the words of the command line."""


ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a run after it has tidied up."""


class _Commands(TyperGroup):
    """The commands, with one place that turns errors into messages and exit statuses."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _RefusedWords as error:
            if not _says():
                raise typer.Exit(2) from error
            raise
        except BrokenPipeError:
            raise
        except (LorapError, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
            verdict = _verdict(error)
            if verdict is None:
                raise
            _fail(*verdict)


_RefusedWords: Any = typer.BadParameter.__bases__[0]
"""What Typer raises for words that it does not understand; in some versions its own, in others that
of click."""


def _verdict(error: BaseException) -> tuple[str, int] | None:
    """Return the message and the exit status for an error; None for a defect."""
    if isinstance(error, UsageError):
        return str(error), 2
    if isinstance(error, LorapError):
        return _noted(error), 1
    if isinstance(error, KeyboardInterrupt):
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        return f"interrupted; {_left(error)}", 128 + number
    if isinstance(error, OSError):
        return _noted(error), 1
    if _is_out_of_memory(error):
        said = (
            "out of memory; a smaller --batch-size (of recover: --micro-batch) needs less; of "
            "compress also --activations cpu or disk, which --resume allows to change"
        )
        return "; ".join(filter(None, [said, _noted(error)])), 1
    return None


def _processes() -> int:
    """Return how many processes torchrun has started, this one among them."""
    variables = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    return int(os.environ["WORLD_SIZE"]) if variables <= os.environ.keys() else 1


def _program() -> list[str]:
    """Return the words that this command was begun with, before its arguments."""
    if _processes() == 1:
        return ["lorap"]
    return ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"], "-m", "lorap"]


def _says() -> bool:
    """Return whether this is the process that says what all would say."""
    return _processes() == 1 or os.environ["RANK"] == "0"


@contextlib.contextmanager
def _joined() -> Iterator[Processes | None]:
    """Join the processes that torchrun has started; what ends them all is said by one of them."""
    if _processes() == 1:
        yield None
        return
    from lorap.pipeline.processes import ALONE, join

    processes = ALONE
    try:
        with join() as processes:
            yield processes
    except BrokenPipeError:
        raise
    except (LorapError, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
        verdict = _verdict(error)
        if verdict is None:
            raise
        message, status = verdict
        # Process 0 is interrupted as well, and knows what is left.
        silent = processes.rank > 0 and isinstance(error, KeyboardInterrupt)
        if processes.said(message) or silent:
            raise typer.Exit(status) from error
        raise


def _noted(error: BaseException) -> str:
    """Return the message of an error, and what was noted about it on its way."""
    return "; ".join(filter(None, [str(error), *getattr(error, "__notes__", [])]))


def _left(error: BaseException) -> str:
    """Say what an interrupted run has left."""
    return "; ".join(getattr(error, "__notes__", [])) or "nothing half-written is left behind"


def _is_out_of_memory(error: BaseException) -> bool:
    # The name, since torch may not have been imported; its CPU allocator has no error of its own.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def _fail(message: str, status: int) -> None:
    # The terminal may be gone; the status still tells.
    with contextlib.suppress(OSError):
        typer.echo(f"lorap: {message}", err=True)
    raise typer.Exit(status)


app = typer.Typer(
    cls=_Commands,
    help="Make language models smaller: low-rank attention, pruned feed-forward blocks (LoRAP).",
    no_args_is_help=True,
    add_completion=False,
    # A traceback that is shown is a defect of lorap, and is wanted as it is.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    # So that a run that is told to end removes what it had begun, as one that is interrupted does.
    for number in ENDING:
        # nohup has a run outlive its terminal.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    app(prog_name="lorap")


def _end(number: int, frame: object) -> None:
    # Another signal must not interrupt the removal.
    for later in ENDING:
        signal.signal(later, signal.SIG_IGN)
    raise Interrupted(number)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorap {lorap.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    if _processes() > 1 and ctx.invoked_subcommand not in ("compress", "recover"):
        if not _says():
            raise typer.Exit(2)
        raise UsageError(
            f"{ctx.invoked_subcommand}: runs in one process, got {_processes()}; torchrun is for "
            "compress and recover"
        )


# Options take None for "not given", since a recipe comes between the command line and the defaults.

_Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Model folder, or name on the Hugging Face Hub."),
]
_Ratio = Annotated[
    float | None,
    typer.Option(
        help="Share of parameters to remove, above 0 and below 1: 0.2 leaves 80%. Must be given, "
        "here or in the recipe.",
    ),
]
_Preset = Annotated[
    str | None,
    typer.Option(
        metavar="lorap|mgaa|best",
        help="Defaults of the other options. lorap: the paper. mgaa: MGAA, all matrices by pca of "
        "the outputs. best: what keeps most of the model. Options that are given win.",
        show_default="lorap",
    ),
]
_RatioScope = Annotated[
    str | None,
    typer.Option(
        metavar="model|layer",
        help="What the ratio is a share of. model: all parameters of the model, embeddings and "
        "head included. layer: the weights of the decoder layers that are compressed; it removes "
        "less of the whole.",
        show_default="model",
    ),
]
_Mha = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        help="What becomes of attention. Low-rank projections by awsvd (the paper), svd, asvd, pca "
        "(of the outputs), or afm (pca about the mean); or heads: fewer heads.",
        show_default="awsvd",
    ),
]
_Ffn = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        help="What becomes of the feed-forward blocks. channels: fewer channels (the paper); or "
        "low-rank projections by awsvd, svd, asvd, pca or afm.",
        show_default="channels",
    ),
]
_JointQk = Annotated[
    bool | None,
    typer.Option(
        help="Factor q and k together, with one right factor for both.", show_default="no"
    ),
]
_Allocation = Annotated[
    str | None,
    typer.Option(
        metavar="NUMBER|mgaa|mgaa-between|mgaa-within|marginal",
        help="How the parameters are shared out. A number: those that the factors of v and o get "
        "for each one of q and k, from 0.001 to 1000. mgaa: measured on the calibration data, "
        "between sub-layers by the similarity of input and output, within them by a common "
        "retained energy; or only one of the two. marginal: measured too, over all modules of the "
        "model by what a parameter is worth in each.",
        show_default="3",
    ),
]
_MgaaAlpha = Annotated[
    float | None,
    typer.Option(
        help="mgaa: change of a sub-layer's ratio for each standard deviation of its similarity.",
        show_default="0.35",
    ),
]
_MgaaFloor = Annotated[
    float | None,
    typer.Option(
        help="mgaa: share of its even part that a sub-layer, and a matrix in it, keeps at least. "
        "marginal: that every module keeps at least.",
        show_default="0.25",
    ),
]
_MultipleOf = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Round ranks and widths to multiples of N, such as 8, 64 or 128; a layer gets a "
        "multiple more or less than another, so that the model keeps its size. What is smaller "
        "than N stays. 1 alone gives the paper's sizes.",
        show_default="1",
    ),
]
_Importance = Annotated[
    str | None,
    typer.Option(
        metavar="activation|magnitude|taylor",
        help="Score of a weight, for channels and heads: its magnitude times the norm of its input "
        "feature (the paper), its magnitude alone, or its magnitude times that of the gradient.",
        show_default="activation",
    ),
]
_Aggregation = Annotated[
    str | None,
    typer.Option(
        metavar="l1|l2|linf",
        help="Norm that puts the scores of a channel's or head's weights together.",
        show_default="l2",
    ),
]
_Selection = Annotated[
    str | None,
    typer.Option(
        metavar="scores|obs",
        help="How the channels that stay are chosen. scores: by their scores (the paper). obs: "
        "removed one by one, each time the one that costs least in the outputs of down once the "
        "others have made up for it (optimal brain surgeon).",
        show_default="scores",
    ),
]
_Update = Annotated[
    str | None,
    typer.Option(
        metavar="none|least-squares",
        help="What becomes of down after channels are removed, and of o after heads are. "
        "least-squares: the weights that come nearest to the outputs with all of them.",
        show_default="none",
    ),
]
_DenseTarget = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Fit each matrix, those that stay dense too, to outputs between its own at the "
        "compressed model's inputs (0) and the uncompressed model's (1), each on what is "
        "compressed before it in its layer.",
        show_default="off",
    ),
]
_Refine = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Then bring each layer's outputs nearer to the uncompressed model's, all of its "
        "matrices together, by this many iterations of conjugate gradients; each takes about four "
        "forwards of the samples.",
        show_default="0",
    ),
]
_Ridge = Annotated[
    float | None,
    typer.Option(
        help="obs, least-squares, dense-target, refine: share of a feature's sum of squares that "
        "is added to it, from 1e-6 to 1.",
        show_default="1e-4",
    ),
]
_Weighting = Annotated[
    str | None,
    typer.Option(
        metavar="eq7|eq6",
        help="awsvd: weight of an input feature's squared errors: the square of its norm (Eq. 7 of "
        "the paper) or the norm (Eq. 6 as printed).",
        show_default="eq7",
    ),
]
_AsvdAlpha = Annotated[
    float | None,
    typer.Option(
        help="asvd: power of a feature's mean magnitude that weights its errors.",
        show_default="0.5",
    ),
]
_LeastImportant = Annotated[
    float | None,
    typer.Option(
        help="Share of the channels or heads that is kept from the low end of the scores.",
        show_default="0.01",
    ),
]
_Sublayers = Annotated[
    str | None,
    typer.Option(
        metavar="mha,ffn",
        help="Sub-layers to compress: attention (mha), feed-forward (ffn), or both.",
        show_default="mha,ffn",
    ),
]
_RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="RECIPE",
        help="YAML file with any of the options of compress, and overrides per layer or module. "
        "Options on the command line win over it.",
    ),
]
_Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a model on the hub.", show_default="main"),
]
_Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")
]

_SOURCE = (
    "A named set (bookcorpus, c4, wikitext2, ptb); owner/name:split:field on the hub; a .txt, "
    ".jsonl or .parquet file; or a .npy or .safetensors file of token ids of shape (N, L)."
)


_Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help=f"Calibration data. {_SOURCE} Text is cut at random into samples, without a BOS "
        "token; ids are taken as they are. Must be given, here or in the recipe.",
    ),
]
_Field = Annotated[
    str | None,
    typer.Option(help="Field of a .jsonl or .parquet file.", show_default="text, else messages"),
]
_Samples = Annotated[int | None, typer.Option(help="Calibration samples.", show_default="128")]
_Seqlen = Annotated[
    int | None,
    typer.Option(
        help="Tokens in each sample; MACs are counted for one of them.", show_default="128"
    ),
]
_Seed = Annotated[int | None, typer.Option(help="Seed of the choice of samples.", show_default="0")]
_BatchSize = Annotated[
    int | None,
    typer.Option(help="Samples in one forward.", show_default="about 1024 tokens, 8192 on a GPU"),
]
_Device = Annotated[
    str | None,
    typer.Option(
        metavar="auto|cpu|cuda",
        help="Where to compute; auto takes the GPU where there is one.",
        show_default="auto",
    ),
]
_Activations = Annotated[
    str | None,
    typer.Option(
        metavar="auto|device|cpu|disk",
        help="Where the samples' hidden states wait between layers: on the device, in the CPU's "
        "memory, or in files; auto takes the first place in which they fit.",
        show_default="auto",
    ),
]
_Dtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="float64, float32, bfloat16 or float16, for the forwards. Decompositions use "
        "float64; the output keeps the checkpoint's own.",
        show_default="the checkpoint's own",
    ),
]


@app.command()
def plan(
    ctx: typer.Context,
    model: _Model,
    ratio: _Ratio = None,
    preset: _Preset = None,
    ratio_scope: _RatioScope = None,
    mha: _Mha = None,
    ffn: _Ffn = None,
    sublayers: _Sublayers = None,
    joint_qk: _JointQk = None,
    allocation: _Allocation = None,
    mgaa_alpha: _MgaaAlpha = None,
    mgaa_floor: _MgaaFloor = None,
    multiple_of: _MultipleOf = None,
    weighting: _Weighting = None,
    asvd_alpha: _AsvdAlpha = None,
    least_important: _LeastImportant = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Calibration data, as compress takes it; needed, and read, where the allocation "
            "is measured (mgaa, marginal).",
        ),
    ] = None,
    field: _Field = None,
    samples: _Samples = None,
    seqlen: _Seqlen = None,
    seed: _Seed = None,
    batch_size: _BatchSize = None,
    device: _Device = None,
    activations: _Activations = None,
    dtype: _Dtype = None,
    config: _RecipeFile = None,
    revision: _Revision = None,
    as_json: _Json = False,
) -> None:
    """Show the ranks, widths and sizes that a ratio gives.

    Parameters and MACs before and after, per module and in all; and, estimated, the peak memory of
    compress and the bytes that it reads and writes. From the model's configuration alone, unless
    ranks and ratios are to be measured (--allocation mgaa or marginal, --preset mgaa or best): then
    the weights are read and run on the calibration data.
    """
    settings, run = _settings(ctx)
    _quieten()
    with _stdout_kept(as_json), _progress("layers") as progress:
        made = lorap.plan_checkpoint(
            model,
            settings,
            calibration=run.get("calibration"),
            field=run.get("field"),
            revision=run.get("revision"),
            progress=progress,
        )
    _say_what_stays(made.ratios(), settings.sublayers)
    if as_json:
        _print_json(made.to_dict())
    else:
        _print_plan(made)


@app.command()
def compress(
    ctx: typer.Context,
    model: _Model,
    ratio: _Ratio = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the compressed model; it appears when it is whole. Must be given, "
            "here or in the recipe.",
        ),
    ] = None,
    calibration: _Calibration = None,
    field: _Field = None,
    preset: _Preset = None,
    ratio_scope: _RatioScope = None,
    mha: _Mha = None,
    ffn: _Ffn = None,
    sublayers: _Sublayers = None,
    joint_qk: _JointQk = None,
    allocation: _Allocation = None,
    mgaa_alpha: _MgaaAlpha = None,
    mgaa_floor: _MgaaFloor = None,
    multiple_of: _MultipleOf = None,
    weighting: _Weighting = None,
    asvd_alpha: _AsvdAlpha = None,
    importance: _Importance = None,
    aggregation: _Aggregation = None,
    least_important: _LeastImportant = None,
    selection: _Selection = None,
    update: _Update = None,
    dense_target: _DenseTarget = None,
    refine: _Refine = None,
    ridge: _Ridge = None,
    samples: _Samples = None,
    seqlen: _Seqlen = None,
    seed: _Seed = None,
    batch_size: _BatchSize = None,
    device: _Device = None,
    activations: _Activations = None,
    dtype: _Dtype = None,
    revision: _Revision = None,
    config: _RecipeFile = None,
    allow_bin: Annotated[
        bool | None,
        typer.Option(
            help="Read pickled .bin weights where there are no others, tensors only.",
            show_default="no",
        ),
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option(
            help="Replace an output folder that an earlier compression wrote, and what one that "
            "ended early left.",
            show_default="no",
        ),
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            help="Go on with the finished layers of a run that ended early; the same options and "
            "files are needed. With nothing left of one, start afresh.",
            show_default="no",
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Compress a model into a folder.

    The folder loads with transformers, and holds a report of what was done.

    For example: lorap compress MODEL --ratio 0.2 --output small --calibration c4

    On several GPUs, or in several processes, on one machine or more:
    torchrun --nproc-per-node 4 -m lorap compress MODEL ...
    """
    with _joined() as processes:
        settings, run = _settings(ctx)
        for name, meaning in (("output", "a folder to write"), ("calibration", "a source of data")):
            if name not in run:
                raise UsageError(
                    f"{name}: expected {meaning}, got none; give --{name}, or {name} in the recipe"
                )
        _quieten()
        with (
            _stdout_kept(as_json),
            _progress("layers") if _says() else contextlib.nullcontext() as progress,
        ):
            report = lorap.compress_checkpoint(
                model,
                config=settings,
                **run,
                command=shlex.join([*_program(), *ctx.meta[ARGUMENTS]]),
                progress=progress,
                processes=processes,
            )
    if not _says():
        return
    _say_what_stays([layer["ratios"] for layer in report["layers"]], settings.sublayers)
    if as_json:
        _print_json(report)
    else:
        _print_summary(report, run["output"])


@app.command()
def inspect(
    model: _Model,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help=f"Calibration data, as compress takes it. {_SOURCE} Without it, the weights alone "
            "are looked at.",
            show_default="none",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="0,3-5",
            help="Decoder layers to look at; with calibration data those before them are only run.",
            show_default="all",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder for pictures (SVG), a page with all of them (lorap_inspection.html), and "
            "the numbers (lorap_inspection.json).",
            show_default="none",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace such files in the folder.")
    ] = False,
    field: _Field = None,
    samples: _Samples = None,
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens in each sample.", show_default="128")
    ] = None,
    seed: _Seed = None,
    batch_size: _BatchSize = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="auto takes the GPU where there is one.")
    ] = "auto",
    activations: _Activations = None,
    dtype: _Dtype = None,
    revision: _Revision = None,
    as_json: _Json = False,
) -> None:
    """Look at a model before it is compressed.

    Spectra of the weights, and the share of the ranks that retains a share of their energy (Table 1
    of the paper has 80%). With calibration data also of the weights times the norms of their inputs
    (AWSVD), outliers of the activations, and how little each sub-layer changes its input.

    For example: lorap inspect MODEL --calibration c4 --layers 0,15,31 --output looks
    """
    from lorap.pages import survey_page
    from lorap.pages.files import check_folder, write_files

    chosen = None if layers is None else _parse_layers(layers)
    if overwrite and output is None:
        raise UsageError("overwrite: has no effect without --output")
    measured = calibration is not None
    folder = None
    if output is not None:
        folder = check_folder(output, survey_page.file_names(measured), overwrite=overwrite)
    _quieten()
    with _stdout_kept(as_json), _progress("layers") as progress:
        survey = lorap.inspect_checkpoint(
            model,
            calibration=calibration,
            layers=chosen,
            field=field,
            samples=samples,
            seqlen=seqlen,
            seed=seed,
            batch_size=batch_size,
            activations=activations,
            dtype=dtype,
            device=device,
            revision=revision,
            progress=progress,
        )
    found = survey.to_dict()
    if folder is not None:
        write_files(folder, survey_page.survey_files(found))
    if as_json:
        _print_json(found)
    else:
        _print_survey(found, output)


@app.command()
def compare(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR...", help="Folders that lorap compress or merge wrote."),
    ],
    as_json: _Json = False,
) -> None:
    """Put compressed models side by side.

    From their reports: ratio, parameters, MACs, mean errors and retained energies of each kind of
    matrix; and results that lorap evaluate --card has put into their folders.
    """
    from lorap.comparison import compare as compare_models

    found = compare_models(folders)
    if as_json:
        _print_json(found.to_dict())
    else:
        _print_comparison(found.rows(), folders)


@app.command()
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="A compressed model's folder, or any model folder or hub name."
        ),
    ],
    perplexity: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help=f"Data to take the perplexity on. {_SOURCE} Rows of text are joined with two "
            "newlines and tokenised once, with the tokenizer's default special tokens (one BOS "
            "for LLaMA).",
            show_default="none",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks, groups and tags of the LM Evaluation Harness (lm-eval), separated by "
            "commas. paper: the seven of the paper, with its metrics and their mean.",
            show_default="none",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model, to be evaluated in the same way and shown beside.",
            show_default="none",
        ),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="perplexity: tokens in a chunk: 128 in the paper, 2048 elsewhere. With --rolling, "
            "tokens that the model sees at once.",
            show_default="128; with --rolling, all that the model takes",
        ),
    ] = None,
    rolling: Annotated[
        bool,
        typer.Option(
            "--rolling",
            help="perplexity: take each row for a document and score it whole, window by window, "
            "as lm-eval does.",
        ),
    ] = False,
    field: _Field = None,
    limit: Annotated[
        int | None,
        typer.Option(
            help="tasks: score the first so many samples of each. For a quick look: the numbers "
            "are not those of the task.",
            show_default="all",
        ),
    ] = None,
    include_path: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="tasks: a folder with tasks of your own, as lm-eval's YAML.",
            show_default="none",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Sequences in one forward.",
            show_default="about 4096 tokens for a perplexity, 8 requests of a task",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="auto takes the GPU where there is one.")
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="float64, float32, bfloat16 or float16.",
            show_default="the checkpoint's own",
        ),
    ] = None,
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Write the results into the folder: into its model card, and in full into "
            "lorap_evaluation.json.",
        ),
    ] = False,
    revision: _Revision = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run modeling code that the folder brings along. Models that lorap compressed do "
            "not need it here.",
        ),
    ] = False,
    as_json: _Json = False,
) -> None:
    """Take a model's perplexity, or score it in tasks, or both.

    Perplexity by the paper's protocol: non-overlapping chunks, the tail dropped. Printed with the
    protocol, split, length, tokens and versions.
    """
    _quieten()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_stdout_kept(as_json))
        # Two bars on one terminal would be in each other's way, and lm-eval has its own.
        progress = (
            stack.enter_context(_progress("chunks")) if tasks is None else _line_printer("chunks")
        )
        from lorap.evaluation.tasks import parse_tasks

        result = lorap.evaluate(
            model,
            perplexity=perplexity,
            seqlen=seqlen,
            field=field,
            rolling=rolling,
            tasks=() if tasks is None else parse_tasks(tasks),
            limit=limit,
            include_path=include_path,
            baseline=baseline,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            card=card,
            progress=progress,
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        _print_evaluation(result)


@app.command()
def recover(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="DIR", help="Folder that lorap compress wrote.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="Training data. Instructions: owner/name or owner/name:split on the hub "
            "(yahma/alpaca-cleaned in the paper), or a .json, .jsonl or .parquet file with the "
            "fields instruction, input and output, put into Alpaca's prompt; the response counts. "
            "Or chat messages, through the model's template; the assistant's count. Or text, or "
            "token ids (.npy, .safetensors), of which all counts.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="Folder for the adapter; it appears when it is whole. Until then, checkpoints lie "
            "beside it, in DIR.unfinished.",
        ),
    ],
    field: Annotated[
        str | None,
        typer.Option(
            help="Field of a .json, .jsonl or .parquet file.",
            show_default="instruction with output, else messages, else text",
        ),
    ] = None,
    on: Annotated[
        str,
        typer.Option(
            metavar="matrices|factors",
            help="Where the updates are. matrices: one around each matrix, factored or not (the "
            "paper). factors: one on each factor, which plain PEFT loads without lorap.",
        ),
    ] = "matrices",
    rank: Annotated[int, typer.Option(help="Rank of an update.")] = 8,
    alpha: Annotated[
        float, typer.Option(help="An update counts alpha / rank times.", show_default="16")
    ] = 16.0,
    dropout: Annotated[
        float, typer.Option(help="Share of an update's inputs that is left out in training.")
    ] = 0.05,
    learning_rate: Annotated[
        float, typer.Option(help="At its highest; it rises, then falls linearly.")
    ] = 1e-4,
    batch: Annotated[int, typer.Option(help="Samples in a step.")] = 64,
    micro_batch: Annotated[
        int, typer.Option(help="Samples in a forward of a process: less needs less memory.")
    ] = 4,
    epochs: Annotated[float, typer.Option(help="Passes over the data.", show_default="2")] = 2.0,
    warmup: Annotated[
        int,
        typer.Option(help="Steps in which the learning rate rises; a tenth of all at most."),
    ] = 100,
    cutoff: Annotated[int, typer.Option(help="Tokens that are kept of a sample.")] = 256,
    validation: Annotated[
        int, typer.Option(help="Rows held out for validation; a tenth of all at most.")
    ] = 2000,
    evaluate_every: Annotated[
        int,
        typer.Option(help="Steps between evaluations; the best adapter by them is the result."),
    ] = 100,
    save_every: Annotated[
        int, typer.Option(help="Steps between checkpoints to resume from.")
    ] = 200,
    seed: Annotated[
        int, typer.Option(help="Of the split, the order, the first updates and the dropout.")
    ] = 42,
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda", help="auto takes the GPU where there is one.")
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="float32, bfloat16 or float16, for the forwards; updates are float32.",
            show_default="bfloat16 or float16 on a GPU, float32 on a CPU",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with a run that did not end; all else as it was given then."
        ),
    ] = False,
    as_json: _Json = False,
) -> None:
    """Recover a compressed model by LoRA.

    Trains small updates beside its weights, which lorap merge puts into them. Needs PEFT and
    accelerate (pip install 'lorap[recover]'). Ctrl-C ends it after a checkpoint. On several GPUs:
    torchrun --nproc-per-node N -m lorap recover ...

    For example: lorap recover small --data yahma/alpaca-cleaned --output adapter
    """
    from lorap.recovery.settings import RecoveryConfig

    fields = {f.name for f in dataclasses.fields(RecoveryConfig)}
    settings = {name: value for name, value in ctx.params.items() if name in fields}
    config = RecoveryConfig(**settings)
    _quieten()
    with _stdout_kept(as_json), _progress("steps") as progress:
        record = lorap.recover(
            model,
            output,
            config,
            data=data,
            field=field,
            resume=resume,
            command=shlex.join(["lorap", *ctx.meta[ARGUMENTS]]),
            progress=progress,
            say=lambda line: typer.echo(line, err=True),
        )
    if not _writes():
        return
    if as_json:
        _print_json(record)
    else:
        _print_recovery(record, model, output)


def _writes() -> bool:
    """Whether this process is the one of its run that has something to say."""
    return os.environ.get("RANK", "0") == "0"


@app.command()
def merge(
    ctx: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="The compressed model that was recovered.")
    ],
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Folder that lorap recover wrote, or PEFT.")
    ],
    output: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="Folder for the merged model; it appears when it is whole."
        ),
    ],
    mode: Annotated[
        str,
        typer.Option(
            metavar="exact|same-size",
            help="What becomes of factored matrices. exact: their rank grows by that of the "
            "update, and the model computes the same. same-size: they are cut back to their rank.",
        ),
    ] = "exact",
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="same-size: data for the statistics, as of compress; the training data will do.",
            show_default="the ids kept in DIR",
        ),
    ] = None,
    field: _Field = None,
    batch_size: _BatchSize = None,
    device: _Device = None,
    dtype: _Dtype = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run wrote.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Merge an adapter into a compressed model.

    The result is a checkpoint as lorap compress writes it, and needs no PEFT.

    For example: lorap merge small adapter --output recovered
    """
    _quieten()
    with _stdout_kept(as_json), _progress("layers") as progress:
        report = lorap.merge_adapter(
            model,
            adapter,
            output,
            mode=mode,  # type: ignore[arg-type]  # checked there
            calibration=calibration,
            field=field,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            overwrite=overwrite,
            command=shlex.join(["lorap", *ctx.meta[ARGUMENTS]]),
            progress=progress,
        )
    if as_json:
        _print_json(report)
    else:
        _print_merge(report, output)


@app.command()
def audit(
    model: Annotated[
        str,
        typer.Argument(metavar="ORIGINAL", help="The model that was compressed: folder or name."),
    ],
    compressed: Annotated[
        str, typer.Argument(metavar="COMPRESSED", help="Folder that lorap compress wrote.")
    ],
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="0,3-5",
            help="Decoder layers to recompute; those before them are only run.",
            show_default="all",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="The data that it was calibrated with, to be read again.",
            show_default="the ids kept in COMPRESSED",
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Recompute a compressed model, and compare.

    In NumPy and float64, layer by layer, from the original weights, the calibration ids and the
    recorded settings: ranks, kept channels, low-rank products, untouched weights, parameters,
    report. One line per module: the comparison that uses most of its bound. The exit status is 1
    where anything is outside its bound.
    """
    chosen = None if layers is None else _parse_layers(layers)
    _quieten()
    with _stdout_kept(as_json), _progress("layers") as progress:
        from lorap.audit import audit as run_audit

        result = run_audit(
            model, compressed, layers=chosen, calibration=calibration, progress=progress
        )
    if as_json:
        _print_json(result.to_dict())
    else:
        _print_audit(result)
    if not result.passed:
        raise typer.Exit(1)


def _parse_layers(text: str) -> list[int]:
    """Return the layers that a text such as ``0,3-5`` names.

    Raises
    ------
    UsageError
        If it is no such text.
    """
    layers: list[int] = []
    for part in text.split(","):
        # Six digits: a list of a span's layers stays small, whatever is asked for.
        match = re.fullmatch(r" *(\d{1,6}) *(?:- *(\d{1,6}) *)?", part, re.ASCII)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise UsageError(
                f"layers: expected numbers and rising spans such as 0,3-5, got {text!r}"
            )
        layers += span
    return layers


@app.command()
def export(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="DIR", help="Folder that lorap compress wrote.")],
    output: Annotated[
        str, typer.Option(metavar="DIR", help="Folder to write; it appears when it is whole.")
    ],
    target: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="dense",
            help="dense: the stock architecture, factors multiplied out.",
        ),
    ] = "dense",
    pad: Annotated[
        bool,
        typer.Option(
            "--pad",
            help="Where layers differ in their width or their heads, fill all up to the largest "
            "with zeros, which changes no output.",
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run of lorap wrote.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Write a compressed model as one of the stock architecture.

    For vLLM, llama.cpp, SGLang and whatever else reads the original: it loads without lorap and
    computes the same within rounding. It gives up what the factors save; the report says how much.
    """
    if target != "dense":
        raise UsageError(f"format: expected dense, got {target!r}")
    _quieten()
    with _stdout_kept(as_json), _progress("layers") as progress:
        report = lorap.export_dense(
            model,
            output,
            pad=pad,
            overwrite=overwrite,
            command=shlex.join(["lorap", *ctx.meta[ARGUMENTS]]),
            progress=progress,
        )
    if as_json:
        _print_json(report)
    else:
        _print_export(report, output)


@app.command()
def demo(
    output: Annotated[
        str, typer.Option(metavar="DIR", help="Folder for the compressed model.")
    ] = "demo-output",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier compression wrote.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Compress the embedded tiny model, and compare.

    By 20%, with the embedded calibration text; the result is reloaded with transformers. Needs no
    network.
    """
    _quieten()
    with _stdout_kept(as_json), _progress("layers") as progress:
        from lorap.demo import run_demo

        result = run_demo(output, overwrite=overwrite, progress=progress)
    if as_json:
        _print_json(dataclasses.asdict(result))
    else:
        _print_demo(result)


def _settings(ctx: typer.Context) -> tuple[CompressionConfig, dict[str, Any]]:
    """Return the settings of the compression and of the run: options, else recipe, else preset.

    Raises
    ------
    UsageError
        If a value is out of range, or the recipe cannot be used.
    """
    from lorap.config import RUN_OPTIONS, CompressionConfig, load_recipe

    given = {name: value for name, value in ctx.params.items() if value is not None}
    recipe = load_recipe(given["config"]) if "config" in given else None
    fields = {field.name for field in dataclasses.fields(CompressionConfig)}
    settings = {
        **(recipe.settings if recipe else {}),
        **{name: value for name, value in given.items() if name in fields},
    }
    run = {
        **(recipe.run if recipe else {}),
        **{name: value for name, value in given.items() if name in RUN_OPTIONS},
    }
    preset = given.get("preset", recipe.preset if recipe else "lorap")
    return CompressionConfig.from_preset(preset, **settings), run


def _quieten() -> None:
    """Keep the libraries' messages and bars out of the output: errors arrive as exceptions."""
    # Before transformers is imported, which imports torchao where it is installed.
    for name in ("lm_eval", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging as transformers

    untyped: tuple[Any, Any] = (hub, transformers)
    for library in untyped:
        library.set_verbosity_error()
    untyped[1].disable_progress_bar()


def _stdout_kept(needed: bool) -> contextlib.AbstractContextManager[Any]:
    """Send to stderr what others print, such as code that a model brings along."""
    return contextlib.redirect_stdout(sys.stderr) if needed else contextlib.nullcontext()


@contextlib.contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress on stderr: a bar on a terminal, else a line now and then.

    Yields
    ------
    callable
        Takes the number done and the number in all; with 0 done, the first is begun.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _line_printer(unit)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
    )
    with bar:
        task = bar.add_task("preparing", total=None)
        yield lambda done, total: bar.update(task, description=unit, completed=done, total=total)


def _line_printer(unit: str) -> Callable[[int, int], None]:
    started = first = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal first, last
        now = time.monotonic()
        if done == 0:
            first = now
            return
        if done < total and now - last < SECONDS_BETWEEN_LINES:
            return
        last = now
        line = f"{done} of {total} {unit}, {_duration(now - started)} elapsed"
        if done < total:
            line += f", about {_duration((now - first) / done * (total - done))} left"
        typer.echo(line, err=True)

    return show


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _say_what_stays(ratios: Sequence[Mapping[str, float]], sublayers: Sequence[str]) -> None:
    """Warn on stderr of sub-layers that were to be compressed, and of which no layer loses any."""
    for sublayer in sublayers:
        if not any(layer.get(sublayer) for layer in ratios):
            what = {"mha": "attention", "ffn": "the feed-forward blocks"}[sublayer]
            typer.echo(
                f"lorap: warning: nothing is removed from {what}: at this ratio it would be less "
                "than one group of heads, channel or rank, or overrides keep it all",
                err=True,
            )


def _print_plan(plan: Plan) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layers")
    table.add_column("module", no_wrap=True)
    table.add_column("becomes", no_wrap=True)
    for heading in ("parameters", "before", "MACs", "before"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layers, modules in _groups(plan.layers):
        for index, (name, module) in enumerate(modules.items()):
            table.add_row(
                layers if index == 0 else "",
                name,
                _becomes(module),
                f"{module.parameters:,}",
                f"{module.parameters_before:,}",
                _short(module.macs),
                _short(module.macs_before),
                end_section=index == len(modules) - 1,
            )
    # A file has no width, and a narrow table would be cut.
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print(table)
    if any(ratios != plan.ratios()[0] for ratios in plan.ratios()):
        console.print(_ratio_table(plan))
    scope = "all parameters" if plan.ratio_scope == "model" else "the layers' parameters"
    asked = "none asked" if plan.ratio is None else f"{plan.ratio:.2%} of {scope} asked"
    typer.echo(f"ratio       {plan.achieved_ratio:.2%} of all parameters removed; {asked}")
    if plan.layer_ratio is not None:
        typer.echo(f"layer ratio {plan.layer_ratio:.6g}")
    typer.echo(f"parameters  {plan.parameters_before:,} -> {plan.parameters:,}")
    typer.echo(
        f"MACs        {_short(plan.macs_before)} -> {_short(plan.macs)} "
        f"for one sequence of {plan.tokens} tokens"
    )
    found = plan.estimate
    assert found is not None
    peak = ", ".join(f"{_gib(size)} ({at})" for at, size in found.peak_memory.items())
    typer.echo(f"peak memory {peak}, estimated; hidden states wait on: {found.activations}")
    read, written = (_gib(sum(terms.values())) for terms in (found.read, found.written))
    typer.echo(f"files       {read} read and {written} written, estimated")


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _ratio_table(plan: Plan) -> Table:
    """Return the share that each sub-layer loses, as a table by layer."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layer")
    for heading in ("attention removed", "feed-forward removed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, ratios in enumerate(plan.ratios()):
        table.add_row(str(index), *(f"{ratios[name]:.2%}" for name in ("mha", "ffn")))
    return table


def _groups(layers: Sequence[LayerPlan]) -> list[tuple[str, LayerPlan]]:
    """Return the different layer plans, each with the layers it is for, such as ``0-3, 31``."""
    members: list[tuple[LayerPlan, list[int]]] = []
    for index, layer in enumerate(layers):
        for known, indices in members:
            if known == layer:
                indices.append(index)
                break
        else:
            members.append((layer, [index]))
    return [(spans(indices), layer) for layer, indices in members]


def _becomes(module: ModulePlan) -> str:
    if module.kind == "heads":
        return f"kv heads {module.kv_heads}"
    if module.rank is not None:
        return f"rank {module.rank}"
    return f"width {module.width}" if module.kind == "channels" else "as it is"


def _print_summary(report: Mapping[str, Any], output: str) -> None:
    from lorap.checkpoint.files import REPORT_PAGE

    before, after = report["parameters"]["before"], report["parameters"]["after"]
    peak = ", ".join(
        f"{_gib(size)} ({place})" for place, size in report["peak_memory_bytes"].items()
    )
    asked = "none asked" if report["ratio"] is None else f"{report['ratio']:.2%} asked"
    if report["ratio_scope"] == "layer":
        asked += " of the layers' parameters"
    calibration = report["calibration"]
    typer.echo(f"ratio        {report['achieved_ratio']:.2%} of all parameters removed; {asked}")
    typer.echo(f"parameters   {before:,} -> {after:,}")
    typer.echo(
        f"calibration  {calibration['samples']} x {calibration['seqlen']} tokens of "
        f"{calibration['source']}"
    )
    several = f" in {report['processes']} processes" if report["processes"] > 1 else ""
    typer.echo(f"time         {_duration(report['seconds'])} on {report['device']}{several}")
    if report["resumed_layers"]:
        finished = f"{report['resumed_layers']} of {len(report['layers'])} layers"
        typer.echo(f"resumed      {finished} were finished, and taken over")
    typer.echo(f"peak memory  {peak}{' of the first of them' if several else ''}")
    typer.echo(f"output       {output}")
    typer.echo(f"report       {os.path.join(output, REPORT_PAGE)}")
    typer.echo(f"\nnext: lorap evaluate {shlex.quote(output)} --perplexity wikitext2")


def _print_survey(survey: Mapping[str, Any], output: str | None) -> None:
    from lorap.pages.survey_page import INPUTS, METHODS, TABLE_1

    layers = survey["layers"]
    means = survey["mean_rank_shares"]
    for method, name in METHODS.items():
        if layers[0][method] is None:
            continue
        roles = list(layers[0][method])
        typer.echo(f"share of the ranks that retains 80% of the energy, {name}")
        rows = [
            [
                str(layer["layer"]),
                *(f"{layer[method][role]['rank_shares'][TABLE_1]:.2%}" for role in roles),
            ]
            for layer in layers
        ]
        mean = ["mean", *(f"{means[TABLE_1][method][role]:.2%}" for role in roles)]
        _print_columns([["layer", *roles], *rows, mean])
        typer.echo("")
    typer.echo("mean over the layers of the share of the ranks, by the energy retained")
    names = list(layers[0]["svd"])
    shares = [
        [f"{float(energy):.0%}", METHODS[method], *(f"{found[role]:.2%}" for role in names)]
        for energy, by_method in means.items()
        for method, found in by_method.items()
    ]
    _print_columns([["energy", "", *names], *shares])
    if layers[0]["outliers"] is not None:
        typer.echo("\nlargest norm of an input feature over the median; cosine of input and output")
        head = ["layer", *(name for name, _ in INPUTS.values()), "attention", "feed-forward"]
        looks = [
            [
                str(layer["layer"]),
                *(
                    "-" if value is None else f"{value:.4g}"
                    for value in (layer["outliers"][kind] for kind in INPUTS)
                ),
                *(f"{layer['similarities'][sublayer]:.4f}" for sublayer in ("mha", "ffn")),
            ]
            for layer in layers
        ]
        _print_columns([head, *looks])
    about = survey["calibration"]
    if about is not None:
        typer.echo(
            f"\ncalibration  {about['samples']} x {about['seqlen']} tokens of {about['source']}"
        )
    if output is not None:
        typer.echo(f"{'' if about else chr(10)}output       {output}")


def _print_comparison(rows: Sequence[tuple[str, list[str]]], folders: Sequence[str]) -> None:
    _print_columns([["", *folders], *([name, *cells] for name, cells in rows)])


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text, the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        typer.echo("  ".join([f"{first:{widths[0]}}", *cells]).rstrip())


def _print_evaluation(result: Evaluation) -> None:
    from lorap.checkpoint.evaluations import task_rows

    baseline = result.baseline
    if result.perplexity is not None:
        _print_perplexity(result.perplexity, None if baseline is None else baseline.perplexity)
    if result.tasks is None:
        return
    if result.perplexity is not None:
        typer.echo("")
    scores = result.tasks
    compared = None if baseline is None or baseline.tasks is None else baseline.tasks.to_dict()
    rows = [("task", "metric", "this model", "baseline"), *task_rows(scores.to_dict(), compared)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)]
        typer.echo("  ".join(cells[: 3 if compared is None else 4]).rstrip())
    versions = ", ".join(f"{name} {version}" for name, version in scores.versions.items())
    typer.echo(f"\nmodel       {scores.model}")
    if compared is not None:
        typer.echo(f"baseline    {compared['model']}")
    if scores.limit is not None:
        typer.echo(f"limit       {scores.limit} samples of each task: not the task's own numbers")
    typer.echo(f"samples     {', '.join(f'{task} {n:,}' for task, n in scores.samples.items())}")
    typer.echo(f"examples    {', '.join(f'{task} {n}' for task, n in scores.shots.items())}")
    typer.echo(f"computed    in {scores.dtype} on {scores.device}")
    typer.echo(f"batch size  {scores.batch_size} requests")
    typer.echo(f"versions    {versions}")


def _print_recovery(record: Mapping[str, Any], model: str, output: str) -> None:
    from lorap.recovery.curve import sparkline

    data, loss, steps = record["data"], record["loss"], record["schedule"]["steps"]
    typer.echo(
        f"data         {data['training']:,} examples of {data['description']}, "
        f"{data['validation']:,} more for validation"
    )
    typer.echo(f"steps        {steps:,} of {record['settings']['batch']} samples")
    trained, frozen = record["parameters"]["trained"], record["parameters"]["frozen"]
    typer.echo(f"trained      {trained:,} parameters beside {frozen:,}")
    if loss["best"] is None:
        typer.echo(f"loss         {loss['training'][-1][1]:.4f} at the end; no validation")
        curve = loss["training"]
    else:
        typer.echo(
            f"validation   {loss['before']:.4f} before, {loss['best']:.4f} at step "
            f"{loss['best_step']}, which is kept"
        )
        curve = loss["validation"]
    typer.echo(f"             {sparkline([value for _, value in curve])}")
    if loss["best"] is not None and loss["best"] >= loss["before"]:
        typer.echo("             training has not lowered it: other data or settings are needed")
    typer.echo(f"time         {_duration(record['seconds'])} on {record['device']}")
    typer.echo(f"output       {output}")
    typer.echo(f"\nnext: lorap merge {shlex.quote(model)} {shlex.quote(output)} --output recovered")


def _print_merge(report: Mapping[str, Any], output: str) -> None:
    merge = report["recovery"]["merge"]
    before, after = merge["parameters"]["before"], merge["parameters"]["after"]
    grown = f", {after / before - 1:.2%} more" if after != before else ""
    typer.echo(f"mode         {merge['mode']}")
    typer.echo(f"parameters   {before:,} -> {after:,}{grown}")
    typer.echo(f"ratio        {report['achieved_ratio']:.2%} of all parameters removed")
    dense = [name for name, module in merge["modules"].items() if module["rank"] is None]
    if dense:
        more = f" and {len(dense) - 4} more" if len(dense) > 4 else ""
        typer.echo(f"dense now    {', '.join(dense[:4])}{more}: two factors would hold no less")
    typer.echo(f"output       {output}")
    typer.echo(f"\nnext: lorap evaluate {shlex.quote(output)} --perplexity wikitext2")


def _print_perplexity(report: PerplexityReport, baseline: PerplexityReport | None) -> None:
    split = f", split {report.split}" if report.split else ""
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    typer.echo(f"perplexity  {report.perplexity:.4f}")
    if baseline is not None:
        typer.echo(f"baseline    {baseline.perplexity:.4f} of {baseline.model}")
    typer.echo(f"model       {report.model}")
    typer.echo(f"data        {report.data}{split if split not in report.data else ''}")
    typer.echo(f"protocol    {report.protocol}")
    typer.echo(f"length      {report.seqlen} tokens in a chunk")
    typer.echo(f"tokens      {report.tokens:,} targets in {report.chunks:,} chunks")
    typer.echo(f"mean loss   {report.mean_nll:.6f} nats per token")
    typer.echo(f"computed    in {report.dtype} on {report.device}")
    typer.echo(f"versions    {versions}")


def _print_audit(result: AuditResult) -> None:
    def line(check: Check) -> str:
        verdict = "ok" if check.passed else "BREACH"
        return f"{check.name:42} {check.deviation:>9.2g} {check.bound:>9.2g}  {verdict}"

    width = max(len(module.name) for module in result.modules)
    typer.echo(f"{'':{width}}  {'becomes':12}  {'':42} {'deviation':>9} {'bound':>9}")
    for module in result.modules:
        typer.echo(f"{module.name:{width}}  {module.becomes:12}  {line(module.worst)}")
        for check in module.checks:
            if not check.passed and (check != module.worst or check.detail):
                typer.echo(f"{'':{width}}    {line(check)}")
                if check.detail:
                    typer.echo(f"{'':{width}}      {check.detail}")
    breached = [module.name for module in result.modules if not module.passed]
    typer.echo(f"\nlayers      {spans(result.layers)}")
    typer.echo(f"stored in   {result.storage}, computed in {result.compute}")
    verdict = "every comparison is within its bound"
    if breached:
        verdict = f"BREACH in {len(breached)} of {len(result.modules)}: {', '.join(breached[:8])}"
        verdict += " ..." if len(breached) > 8 else ""
    typer.echo(f"verdict     {verdict}")


def _print_export(report: Mapping[str, Any], output: str) -> None:
    sizes, stored = report["parameters"], report["bytes"]
    typer.echo(f"format       {report['format']}, a {report['architecture']}")
    grown = sizes["exported"] - sizes["compressed"]
    typer.echo(
        f"parameters   {sizes['compressed']:,} -> {sizes['exported']:,}: {grown:,} of what the "
        "compression saved are given up"
    )
    if sizes["original"] is not None:
        left = 1 - sizes["exported"] / sizes["original"]
        # Biases, or zeros that fill up, can outweigh what stays removed.
        what = f"of which {left:.2%} stay removed" if left >= 0 else f"and {-left:.2%} more now"
        typer.echo(f"original     {sizes['original']:,}, {what}")
    typer.echo(
        f"weights      {stored['compressed'] / 2**20:.1f} MiB -> "
        f"{stored['exported'] / 2**20:.1f} MiB"
    )
    for what, layers in report["padded_layers"].items():
        if layers:
            size = report[what]
            typer.echo(f"padded       {what} of layers {spans(layers)} to {size}, with zeros")
    typer.echo(f"output       {output}")


def _print_demo(result: DemoResult) -> None:
    original, compressed = result.original, result.compressed
    typer.echo(f"{'':12}{'original':>12}{'compressed':>12}")
    typer.echo(f"{'parameters':12}{original.parameters:>12,}{compressed.parameters:>12,}")
    typer.echo(f"{'perplexity':12}{original.perplexity:>12.3f}{compressed.perplexity:>12.3f}")
    typer.echo(
        f"\n{result.achieved_ratio:.2%} of all parameters removed, {result.ratio:.0%} asked, in "
        f"{_duration(result.seconds)}"
    )
    typer.echo(f"perplexity on {result.tokens:,} held-out tokens: {result.protocol}")
    for name, side in (("original", original), ("compressed", compressed)):
        typer.echo(f"\n{name} model, greedy, after {result.prompt!r}:")
        typer.echo(textwrap.indent(side.continuation, "  "))
    typer.echo(f"\nThe compressed model and its report ({result.report}) are in {result.output}")
