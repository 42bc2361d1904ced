"""``lorap recover``: LoRA on a compressed model, with PEFT and the Trainer of transformers."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorap.checkpoint.reader import CheckpointReader, open_compressed
from lorap.checkpoint.writer import check_output
from lorap.data.tokenizers import load_tokenizer
from lorap.errors import Interrupted, LorapError, UsageError
from lorap.pipeline.progress import Progress
from lorap.recovery import curve
from lorap.recovery.examples import TrainingData, load_examples
from lorap.recovery.record import (
    CARD,
    CURVE,
    FORMAT_VERSION,
    RECORD,
    adapter_card,
    check_complete,
    fingerprint,
    write_json,
)
from lorap.recovery.run import ADAPTER, BEST, Run
from lorap.recovery.settings import RecoveryConfig, schedule
from lorap.runtime import choose_device, peak_memory, versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""What PEFT needs of an adapter."""

PACKAGES = ("peft", "accelerate")

Say = Callable[[str], None]
"""Takes a line for the user."""


def recover(
    model: str | Path,
    output: str | Path,
    config: RecoveryConfig,
    *,
    data: str,
    field: str | None = None,
    resume: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
) -> dict[str, Any]:
    """Train LoRA on a compressed model, and save the adapter into a folder.

    Under ``torchrun`` or ``accelerate launch`` every process calls it; one of them writes.

    Parameters
    ----------
    model : str or Path
        Folder that ``lorap compress`` wrote; it is left as it is.
    output : str or Path
        Folder to write; it appears when the adapter is whole. Until then, checkpoints to resume
        from lie beside it, in a folder that ends in ``.unfinished``.
    config : RecoveryConfig
    data : str
        A source of instructions, chat messages, text or token ids; see `lorap.data.sources`.
    field : str, optional
        Field of a ``.json``, ``.jsonl`` or ``.parquet`` file.
    resume : bool
        Go on from the last checkpoint of a run that did not end; from the start where there is
        none.
    command : str, optional
        The command line, for the record.
    progress : callable, optional
        Called with the steps done and the steps in all.
    say : callable, optional
        Called with a line at each evaluation, and where something about the data is worth knowing.

    Returns
    -------
    dict
        The record, as ``lorap_recovery.json`` holds it.

    Raises
    ------
    UsageError
        If anything given cannot be used; before any work, and with nothing written.
    LorapError
        If a package is missing, the loss is not finite, or the hub cannot be reached.
    Interrupted
        At Ctrl-C or SIGTERM, after a checkpoint was saved.
    """
    started = time.perf_counter()
    _require_packages()
    processes, main = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0") == "0"
    run = Run(Path(os.path.expanduser(output)).resolve(), main)
    told: Say = say if say is not None and main else lambda line: None
    device = choose_device(config.device)
    dtype = training_dtype(config, device)
    inputs = [Path(os.path.expanduser(name)) for name in (model, data)]
    if main:
        check_output(output, replaceable=False, inputs=[path for path in inputs if path.exists()])
    reader = open_compressed(model)
    if reader.outer is not None:
        raise UsageError(f"{model} is a multimodal model: expected a language model")
    check_complete(reader)
    examples = load_examples(
        data,
        tokenizer=lambda: load_tokenizer(reader.path),
        vocab_size=reader.config.vocab_size,
        cutoff=config.cutoff,
        validation=config.validation,
        seed=config.seed,
        field=field,
    )
    steps = schedule(config, len(examples.training), processes)
    for line in notes(examples):
        told(line)
    identity = {
        "model": fingerprint(reader),
        "data": examples.fingerprint,
        "processes": processes,
        "dtype": str(dtype),
        **config.to_dict(),
    }
    with run.held(identity, resume=resume):
        # Not before they are needed: they take seconds to import.
        from lorap.recovery import trainer as training

        checkpoint = run.last_checkpoint() if resume else None
        watch = training.Watch(run, progress or (lambda done, total: None), told)
        trainer = training.make_trainer(
            load_model(reader, dtype),
            examples,
            config,
            steps,
            watch,
            device=device,
            dtype=dtype,
            resuming=checkpoint is not None,
        )
        if checkpoint is not None:
            told(f"going on after step {_step(checkpoint)} of {steps.steps}")
        with training.signals_noted(watch), training.third_party_warnings():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if watch.signal is not None:
            ended = Interrupted(watch.signal)
            ended.add_note(
                f"step {trainer.state.global_step} of {steps.steps} is saved: the same command "
                "with --resume goes on from there"
            )
            raise ended
        if run.best() is None:
            trainer.save_model(str(run.folder / BEST))
        record = {
            "format_version": FORMAT_VERSION,
            "model": str(model),
            "model_fingerprint": identity["model"],
            "settings": config.to_dict(),
            "data": about(examples),
            "schedule": vars(steps) | {"processes": processes},
            "parameters": trained_parameters(trainer),
            "loss": losses(trainer.state.log_history, run.best()),
            "resumed_from": None if checkpoint is None else _step(checkpoint),
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "seconds": time.perf_counter() - started,
            "peak_memory_bytes": peak_memory(device),
            "versions": versions(PACKAGES),
            "command": command
            or f"lorap.recover({str(model)!r}, {str(output)!r}, {config}, data={data!r})",
        }
        if main:
            run.finish(_adapter_folder(run, record))
    return record


def _require_packages() -> None:
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise LorapError(
                f"recovery needs the package {name}: install it with `pip install 'lorap[recover]'`"
            ) from error


def training_dtype(config: RecoveryConfig, device: torch.device) -> torch.dtype:
    """Return the type of the forwards.

    Raises
    ------
    UsageError
        If the device cannot train in the one asked for.

    Notes
    -----
    SPEC: ``recovery.precision``.
    """
    if config.dtype is not None:
        wanted: torch.dtype = getattr(torch, config.dtype)
        if device.type == "cpu" and wanted == torch.float16:
            raise UsageError("dtype float16: on a CPU expected float32 or bfloat16")
        return wanted
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16


def load_model(reader: CheckpointReader, dtype: torch.dtype) -> PreTrainedModel:
    """Load a compressed model, as transformers does.

    Parameters
    ----------
    reader : CheckpointReader
    dtype : torch.dtype
    """
    model_class: Any = reader.family.model_class
    model: PreTrainedModel = model_class.from_pretrained(
        reader.path, dtype=dtype, use_safetensors=True
    )
    return model


def notes(examples: TrainingData) -> list[str]:
    """Return what is worth knowing about the data, a line each."""
    tally, lines = examples.tally, []
    if tally.without_target:
        lines.append(f"{tally.without_target} rows have no token to predict and are left out")
    if tally.all_counts:
        lines.append(
            f"in {tally.all_counts} conversations all tokens count: the chat template does not "
            "show where the assistant speaks"
        )
    if not examples.validation:
        lines.append("no validation: of fewer than 10 rows none is held out")
    return lines


def about(examples: TrainingData) -> dict[str, Any]:
    """Return what the record says of the data."""
    return {
        "source": examples.source,
        "description": examples.description,
        "kind": examples.kind,
        "rows": examples.rows,
        "training": len(examples.training),
        "validation": len(examples.validation),
        "targets": sum(example.targets for example in examples.training),
        **vars(examples.tally),
        "fingerprint": examples.fingerprint,
    }


def trained_parameters(trainer: Trainer) -> dict[str, int]:
    """Return the parameters of the updates, and of all the model without them."""
    model: Any = trainer.model
    counts = {"trained": 0, "frozen": 0}
    for parameter in model.parameters():
        counts["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


def losses(history: Sequence[Mapping[str, Any]], best: tuple[int, float] | None) -> dict[str, Any]:
    """Return both loss curves, in nats per token.

    Parameters
    ----------
    history : sequence of mappings
        The Trainer's.
    best : (step, loss) or None
    """
    validation = [(entry["step"], entry["eval_nll"]) for entry in history if "eval_nll" in entry]
    return {
        "training": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "validation": [list(point) for point in validation],
        "before": next((loss for step, loss in validation if step == 0), None),
        "best_step": None if best is None else best[0],
        "best": None if best is None else best[1],
    }


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _adapter_folder(run: Run, record: Mapping[str, Any]) -> Path:
    """Write the adapter folder, whole but for its place."""
    folder = run.folder / ADAPTER
    folder.mkdir(exist_ok=True)
    for name in ADAPTER_FILES:
        (folder / name).write_bytes((run.folder / BEST / name).read_bytes())
    write_json(folder / RECORD, record)
    loss = record["loss"]
    (folder / CURVE).write_text(curve.svg(loss["training"], loss["validation"]), "utf-8")
    (folder / CARD).write_text(adapter_card(record, run.output.name), "utf-8")
    return folder
