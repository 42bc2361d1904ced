"""Compression of a checkpoint on disk or on the hub into a folder."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorap import report
from lorap.checkpoint import files
from lorap.checkpoint.card import model_card
from lorap.checkpoint.reader import (
    CheckpointReader,
    fetch_tokenizer_files,
    open_checkpoint,
    read_config,
)
from lorap.checkpoint.writer import CheckpointWriter, check_output
from lorap.config import CompressionConfig
from lorap.data.calibration import Calibration, load_calibration
from lorap.errors import UsageError
from lorap.families import family_of
from lorap.pipeline.forward import Decoder, Samples
from lorap.pipeline.layers import compress_layers
from lorap.pipeline.measure import measured_plan
from lorap.pipeline.progress import Progress, Steps
from lorap.pipeline.sublayers import check_weight
from lorap.plan import Plan, draft_plan
from lorap.runtime import choose_device, choose_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def compress_checkpoint(
    model: str | Path,
    output: str | Path,
    config: CompressionConfig,
    *,
    calibration: str,
    field: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    allow_bin: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress a checkpoint on disk or on the hub into a folder, one layer in memory at a time.

    Parameters
    ----------
    model : str or Path
        A local folder or a hub name.
    output : str or Path
        Folder to write; afterwards it is whole, or, if the run did not end well, absent.
    config : CompressionConfig
    calibration : str
        A source as ``lorap compress`` takes it.
    field : str, optional
        Field of a ``.jsonl`` or ``.parquet`` calibration file.
    revision : str, optional
        Of a model on the hub.
    overwrite : bool
        Replace a folder that an earlier compression wrote.
    allow_bin : bool
        Read pickled weights (tensors only) where there are no others.
    command : str, optional
        The command line, for the report.
    progress : callable, optional

    Returns
    -------
    dict
        The report, as ``lorap_report.json`` holds it.

    Raises
    ------
    UsageError
        If anything given cannot be used; before any work, and with nothing written.
    LorapError
        If weights or activations are not finite, or the hub cannot be reached.
    """
    started = time.perf_counter()
    output = Path(output)
    given = (Path(os.path.expanduser(name)) for name in (model, calibration))
    inputs = [path for path in given if path.exists()]
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype)
    check_output(output, overwrite=overwrite, inputs=inputs)
    # What the configuration and the calibration data show wrong, before the weights are fetched.
    model_config = read_config(model, revision=revision)
    draft_plan(model_config, family_of(model_config), config)
    chosen = _load_calibration(calibration, model, model_config, config, field, revision)
    reader = open_checkpoint(model, revision=revision, allow_bin=allow_bin)
    family = reader.family
    draft = draft_plan(reader.config, family, config)
    check_output(
        output, overwrite=overwrite, needed_bytes=_bytes_after(reader, draft), inputs=inputs
    )
    decoder = _decoder(reader, device, dtype)
    samples = Samples(chosen.input_ids, batch_size=config.batch_size)
    records: list[tuple[dict[str, dict[str, Any]], float]] = []
    prefix = f"{family.layers_path}."
    with CheckpointWriter(output, overwrite=overwrite) as writer:
        advance = Steps(progress, config, decoder.layers)
        plan, measurements = measured_plan(decoder, samples, draft, config, advance)
        statistics = measurements.tensors(family.layers_path)
        for layer in compress_layers(decoder, samples, plan, config, measurements):
            start = f"{prefix}{layer.index}."
            writer.write_shard(
                {f"{reader.prefix}{start}{name}": t for name, t in layer.tensors.items()}
            )
            statistics |= {f"{start}{name}": x for name, x in layer.statistics.items()}
            records.append((layer.modules, layer.seconds))
            advance()
        others = reader.load_others()
        writer.write_shard({f"{reader.prefix}{name}": t for name, t in others.items()})
        if reader.outside:
            writer.write_shard(reader.load_outside())
        summary = report.make_report(
            model=reader.source,
            revision=revision,
            config=config,
            plan=plan,
            measurements=measurements,
            calibration=chosen,
            layers=records,
            device=device,
            seconds=time.perf_counter() - started,
            command=command
            or f"lorap.compress_checkpoint({str(model)!r}, {str(output)!r}, {config}, "
            f"calibration={calibration!r})",
        )
        writer.copy_side_files(reader.path)
        writer.write_safetensors(files.CALIBRATION, {"input_ids": chosen.input_ids})
        writer.write_safetensors(files.STATISTICS, statistics)
        writer.write_json(files.REPORT, summary)
        card = model_card(
            summary, name=output.name, original=reader.path, multimodal=reader.outer is not None
        )
        writer.write_text("README.md", card)
        writer.commit(family.compressed_config(reader.config, plan.structure()), reader.outer)
    return summary


def plan_checkpoint(
    model: str | Path,
    config: CompressionConfig,
    *,
    calibration: str | None = None,
    field: str | None = None,
    revision: str | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan the compression of a model on disk or on the hub.

    From its ``config.json`` alone, unless ranks or ratios are to be measured (``allocation`` mgaa).

    Parameters
    ----------
    model : str or Path
        A local folder or a hub name.
    config : CompressionConfig
    calibration : str, optional
        A source as ``lorap compress`` takes it; needed, and read, where there is something to
        measure.
    field, revision : str, optional
        As for ``compress_checkpoint``.
    progress : callable, optional

    Raises
    ------
    UsageError
        If the model is not supported or the ratio cannot be reached.
    LorapError
        If weights or activations are not finite, or the hub cannot be reached.
    """
    model_config = read_config(model, revision=revision)
    # Scores decide which channels stay, not how many.
    config = dataclasses.replace(config, importance="activation")
    draft = draft_plan(model_config, family_of(model_config), config)
    if not config.measures:
        return draft
    if calibration is None:
        raise UsageError(
            f"allocation {config.allocation}: ranks and ratios are measured on calibration data: "
            "expected a source, got none; give --calibration"
        )
    chosen = _load_calibration(calibration, model, model_config, config, field, revision)
    reader = open_checkpoint(model, revision=revision)
    decoder = _decoder(reader, choose_device(config.device), choose_dtype(config.dtype))
    samples = Samples(chosen.input_ids, batch_size=config.batch_size)
    draft = draft_plan(reader.config, reader.family, config)
    advance = Steps(progress, config, decoder.layers)
    return measured_plan(decoder, samples, draft, config, advance)[0]


def _load_calibration(
    calibration: str,
    model: str | Path,
    model_config: PretrainedConfig,
    config: CompressionConfig,
    field: str | None,
    revision: str | None,
) -> Calibration:
    return load_calibration(
        calibration,
        tokenizer=lambda: _load_tokenizer(fetch_tokenizer_files(model, revision=revision)),
        vocab_size=model_config.vocab_size,
        max_positions=model_config.max_position_embeddings,
        samples=config.samples,
        seqlen=config.seqlen,
        seed=config.seed,
        field=field,
    )


def _decoder(reader: CheckpointReader, device: torch.device, dtype: torch.dtype | None) -> Decoder:
    """Return the reader's model layer by layer, after a look at every weight.

    Raises
    ------
    LorapError
        If a weight is not finite.
    """
    for name, tensor in reader.iter_tensors():
        check_weight(name, tensor)

    def load_layer(index: int) -> Mapping[str, Tensor]:
        return reader.load(f"{reader.family.layers_path}.{index}.")

    return Decoder(
        reader.family, reader.config, load_layer, reader.load_others, device, dtype or reader.dtype
    )


def _bytes_after(reader: CheckpointReader, plan: Plan) -> int:
    return int(reader.size_bytes * plan.parameters / plan.parameters_before)


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        # A damaged tokenizer raises errors of many types.
        raise UsageError(
            f"{path}: the calibration source is text, and the model's tokenizer cannot be "
            f"loaded: {type(error).__name__}: {error}"
        ) from error
