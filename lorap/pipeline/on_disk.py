"""Compression of a checkpoint on disk or on the hub into a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Mapping, Sequence
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
from lorap.checkpoint.writer import CheckpointWriter, check_leftovers, check_output
from lorap.config import CompressionConfig
from lorap.data.calibration import Calibration, load_calibration
from lorap.data.tokenizers import load_tokenizer
from lorap.errors import UsageError
from lorap.families import family_of
from lorap.pages.report_page import report_page
from lorap.pipeline.activations import Store
from lorap.pipeline.estimate import estimate
from lorap.pipeline.forward import Batch, Decoder, Samples
from lorap.pipeline.inspection import Inspection
from lorap.pipeline.layers import LayerResult, compress_layers, run_compressed, run_dense
from lorap.pipeline.measure import measured_plan
from lorap.pipeline.processes import ALONE, Processes
from lorap.pipeline.progress import Progress, Steps
from lorap.pipeline.streaming import WriteBehind, read_ahead
from lorap.plan import Measurements, Plan, draft_plan, make_plan
from lorap.runtime import choose_device, choose_dtype, versions

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def compress_checkpoint(
    model: str | Path,
    output: str | Path,
    config: CompressionConfig,
    *,
    calibration: str,
    field: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    allow_bin: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> dict[str, Any]:
    """Compress a checkpoint on disk or on the hub into a folder, one layer in memory at a time.

    The next layer's weights are read while one is computed, and finished ones are written while the
    next is. A run that ends early, however it ends, leaves its finished layers in a folder beside
    the output, for another one to go on from.

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
        Replace a folder that an earlier compression wrote, and what one that ended early left.
    resume : bool
        Go on with what a run of the same settings, on the same files, has left; the result is that
        of a run without a break. With nothing left, start afresh.
    allow_bin : bool
        Read pickled weights (tensors only) where there are no others.
    command : str, optional
        The command line, for the report.
    progress : callable, optional
        Of process 0 alone.
    processes : Processes, optional
        That do this together, each of which calls this with the same arguments; from
        :func:`lorap.pipeline.processes.join`. All read the model; process 0 does everything else
        that touches files. By default this one is alone.

    Returns
    -------
    dict
        The report, as ``lorap_report.json`` holds it.

    Raises
    ------
    UsageError
        If anything given cannot be used; before any work, and with nothing written.
    LorapError
        If weights or activations are not finite, the hub cannot be reached, or another process has
        failed.
    """
    processes = processes or ALONE
    if config.samples < processes.size:
        raise UsageError(
            f"samples {config.samples}: expected at least one for each of the {processes.size} "
            "processes"
        )
    if processes.rank:
        return _assist(model, config, processes, revision=revision, allow_bin=allow_bin)
    started = time.perf_counter()
    output = Path(output)
    given = (Path(os.path.expanduser(name)) for name in (model, calibration))
    inputs = [path for path in given if path.exists()]
    device = processes.device(choose_device(config.device))
    place = check_output(output, overwrite=overwrite, inputs=inputs)
    check_leftovers(place, overwrite=overwrite, resume=resume)
    # What the configuration and the calibration data show wrong, before the weights are fetched.
    model_config = read_config(model, revision=revision)
    draft_plan(model_config, family_of(model_config), config)
    chosen = load_samples(calibration, model, model_config, config, field, revision)
    reader = open_checkpoint(model, revision=revision, allow_bin=allow_bin)
    family = reader.family
    draft = draft_plan(reader.config, family, config)
    check_output(
        output, overwrite=overwrite, needed_bytes=_bytes_after(reader, draft), inputs=inputs
    )
    processes.wait()
    _meet(processes, reader, device)
    ids = processes.share({"input_ids": chosen.input_ids})["input_ids"]
    decoder, samples = _own_part(processes, reader, config, device, ids)
    others = reader.shards_of_others()
    writer = CheckpointWriter(
        output,
        overwrite=overwrite,
        run=_run(reader, chosen, config, device) | {"processes": processes.size},
        resume=resume,
        shards=decoder.layers + len(others),
    )
    with writer, Inspection(reader.iter_tensors()) as inspection:
        store = decoder.store(samples, config, writer.journal.scratch, processes.local_size)
        advance = Steps(progress, config, decoder.layers)
        plan, measurements = _measured(
            writer, decoder, samples, store, draft, config, processes, advance
        )
        batches = decoder.embed(samples, store, dense=config.carries_dense)
        records = _resumed(writer, decoder, plan, batches, processes, advance)
        resumed = len(records)
        with WriteBehind() as behind:
            for layer in compress_layers(
                decoder, batches, plan, config, measurements, resumed, processes
            ):
                inspection.check()
                behind(_write_layer, writer, reader, layer)
                records.append(layer.record())
                advance()
        del batches
        for names in others:
            writer.write_shard(reader.load_as_stored(names))
        summary = report.make_report(
            model=reader.source,
            revision=revision,
            config=config,
            plan=plan,
            measurements=measurements,
            calibration=chosen,
            layers=records,
            resumed_layers=resumed,
            processes=processes.size,
            device=device,
            seconds=time.perf_counter() - started,
            command=command
            or f"lorap.compress_checkpoint({str(model)!r}, {str(output)!r}, {config}, "
            f"calibration={calibration!r})",
        )
        writer.copy_side_files(reader.path)
        writer.write_safetensors(files.CALIBRATION, {"input_ids": chosen.input_ids})
        writer.write_safetensors(files.STATISTICS, _statistics(writer, decoder, measurements))
        writer.write_json(files.REPORT, summary)
        writer.write_text(files.REPORT_PAGE, report_page(summary, name=output.name))
        card = model_card(
            summary, name=output.name, original=reader.path, multimodal=reader.outer is not None
        )
        writer.write_text("README.md", card)
        inspection.finish()
        writer.commit(family.compressed_config(reader.config, plan.structure()), reader.outer)
    return processes.tell(summary)


def _assist(
    model: str | Path,
    config: CompressionConfig,
    processes: Processes,
    *,
    revision: str | None,
    allow_bin: bool,
) -> dict[str, Any]:
    """Do this process's part of what process 0 does; every exchange here has its match there."""
    # Process 0 goes first: it may have to fetch the model.
    processes.wait()
    reader = open_checkpoint(model, revision=revision, allow_bin=allow_bin)
    device = processes.device(choose_device(config.device))
    draft = draft_plan(reader.config, reader.family, config)
    _meet(processes, reader, device)
    ids = processes.share({})["input_ids"]
    decoder, samples = _own_part(processes, reader, config, device, ids)
    store = decoder.store(samples, config, sharing=processes.local_size)
    advance = Steps(None, config, decoder.layers)
    plan, measurements = _measured(None, decoder, samples, store, draft, config, processes, advance)
    batches = decoder.embed(samples, store, dense=config.carries_dense)
    first = len(_resumed(None, decoder, plan, batches, processes, advance))
    for _ in compress_layers(decoder, batches, plan, config, measurements, first, processes):
        pass
    report: dict[str, Any] = processes.tell({})
    return report


def _meet(processes: Processes, reader: CheckpointReader, device: torch.device) -> None:
    """Make sure that all processes have the same before them, and that none has failed by now.

    Raises
    ------
    UsageError
        If this process reads another model than process 0, or has other packages or another kind
        of device.
    """
    model = hashlib.sha256((reader.path / files.CONFIG).read_bytes())
    # Without the times of change, which differ from machine to machine.
    sizes = {tensor.file.name: tensor.file.stat().st_size for tensor in reader.tensors.values()}
    model.update(repr(sorted(sizes.items())).encode())
    own = {
        "device": device.type,
        "model": f"one of digest {model.hexdigest()[:8]}",
        **{f"version of {package}": version for package, version in versions().items()},
    }
    for what, expected in processes.tell(own).items():
        if own[what] != expected:
            raise UsageError(
                f"process {processes.rank} of {processes.size}: its {what} is {own[what]}, that of "
                f"process 0 {expected}; expected the same for all"
            )
    processes.wait()


def _own_part(
    processes: Processes,
    reader: CheckpointReader,
    config: CompressionConfig,
    device: torch.device,
    ids: Tensor,
) -> tuple[Decoder, Samples]:
    """Return the model, and this process's samples of all ``(N, L)``."""
    decoder = decoder_of(reader, device, choose_dtype(config.dtype))
    own = ids[processes.part(len(ids))]
    return decoder, Samples(own, batch_size=config.batch_size, whole=ids)


def _run(
    reader: CheckpointReader,
    calibration: Calibration,
    config: CompressionConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Return all that the compressed weights depend on."""
    model: dict[str, Any] = {}
    for file in sorted({tensor.file for tensor in reader.tensors.values()}):
        found = file.stat()
        seconds, rest = divmod(found.st_mtime_ns, 10**9)
        changed = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
        model[file.name] = {
            "bytes": found.st_size,
            # It tells what a sample does not, and may be kept by a copy, which the sample tells.
            "modified": f"{changed}.{rest:09d} UTC",
            "sample": files.sample_digest(file),
        }
    model[files.CONFIG] = hashlib.sha256((reader.path / files.CONFIG).read_bytes()).hexdigest()
    settings = config.to_dict()
    # Where hidden states wait changes none of them.
    del settings["activations"]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "settings": settings,
        "calibration ids": calibration.fingerprint,
        "model": model,
        "device": name,
        "versions": versions(),
    }


def _layer_record(index: int) -> str:
    return f"layer-{index:05d}"


_MEASURED = "measured"


def _write_layer(writer: CheckpointWriter, reader: CheckpointReader, layer: LayerResult) -> None:
    """Write a layer's shard, and note that it is finished."""
    start = f"{reader.prefix}{reader.family.layers_path}.{layer.index}."
    shard = writer.write_shard({f"{start}{name}": t for name, t in layer.tensors.items()})
    writer.journal.record(
        _layer_record(layer.index),
        {"shard": shard, **layer.record()},
        files=[shard],
        tensors=layer.statistics,
    )


def _measured(
    writer: CheckpointWriter | None,
    decoder: Decoder,
    samples: Samples,
    store: Store,
    draft: Plan,
    config: CompressionConfig,
    processes: Processes,
    advance: Steps,
) -> tuple[Plan, Measurements]:
    """Return plan and measurements, those of an earlier run where it got so far.

    Parameters
    ----------
    writer : CheckpointWriter or None
        Of process 0.
    decoder, samples, store, draft, config, advance, processes
        As for ``measured_plan``.
    """
    if not config.measures:
        return draft, Measurements()
    path = decoder.family.layers_path
    found = writer.journal.find(_MEASURED) if writer is not None else None
    tensors = {} if found is None else found[1]
    if processes.tell(found is not None):
        advance.skip_measurement()
    else:
        _, measured = measured_plan(decoder, samples, store, draft, config, advance, processes)
        tensors = measured.tensors(path)
        if writer is not None:
            writer.journal.record(_MEASURED, {}, tensors=tensors)
    measurements = Measurements.of_tensors(processes.share(tensors), path, decoder.device)
    return make_plan(decoder.config, decoder.family, config, measurements), measurements


def _resumed(
    writer: CheckpointWriter | None,
    decoder: Decoder,
    plan: Plan,
    batches: Sequence[Batch],
    processes: Processes,
    advance: Steps,
) -> list[dict[str, Any]]:
    """Take over the layers that an earlier run has finished, and run the samples through them.

    Parameters
    ----------
    writer : CheckpointWriter or None
        Of process 0, from which the others have the layers.
    decoder, plan, batches, processes, advance
        As for ``compress_layers``.

    Returns
    -------
    list of dict
        As ``LayerResult.record`` returns it, one for each.
    """
    finished: list[dict[str, Any]] = []
    while writer is not None and len(finished) < decoder.layers:
        found = writer.journal.find(_layer_record(len(finished)))
        if found is None:
            break
        finished.append(found[0])
    finished = processes.tell(finished)

    def load(index: int) -> dict[str, Tensor]:
        return {} if writer is None else writer.load_shard(finished[index]["shard"])

    config = decoder.compressed_config(plan.structure())
    for index, read in read_ahead(load, range(len(finished))):
        tensors = processes.share(read)
        if writer is not None:
            writer.adopt_shard(tensors)
        marker = f"{decoder.family.layers_path}.{index}."
        own = {
            name.partition(marker)[2]: tensor.to(decoder.device) for name, tensor in tensors.items()
        }
        run_compressed(decoder, config, index, own, batches)
        if any(batch.dense is not None for batch in batches):
            dense = decoder.build(decoder.compressed_config(None), index, decoder.tensors(index))
            run_dense(dense, index, batches)
        advance()
    return finished


def _statistics(
    writer: CheckpointWriter, decoder: Decoder, measurements: Measurements
) -> dict[str, Tensor]:
    """Return what the layers were compressed by, under the names of the layers."""
    path = decoder.family.layers_path
    statistics = measurements.tensors(path)
    for index in range(decoder.layers):
        found = writer.journal.tensors(_layer_record(index))
        statistics |= {f"{path}.{index}.{name}": x for name, x in found.items()}
    return statistics


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

    Returns
    -------
    Plan
        With an estimate of the memory and the traffic that ``compress_checkpoint`` would need.

    Raises
    ------
    UsageError
        If the model is not supported or the ratio cannot be reached.
    LorapError
        If weights or activations are not finite, or the hub cannot be reached.
    """
    model_config = read_config(model, revision=revision)
    family, asked = family_of(model_config), config
    # Scores decide which channels stay, not how many.
    config = dataclasses.replace(config, importance="activation")
    draft = draft_plan(model_config, family, config)
    if not config.measures:
        return dataclasses.replace(draft, estimate=estimate(model_config, family, asked, draft))
    if calibration is None:
        raise UsageError(
            f"allocation {config.allocation}: ranks and ratios are measured on calibration data: "
            "expected a source, got none; give --calibration"
        )
    chosen = load_samples(calibration, model, model_config, config, field, revision)
    reader = open_checkpoint(model, revision=revision)
    decoder = decoder_of(reader, choose_device(config.device), choose_dtype(config.dtype))
    samples = Samples(chosen.input_ids, batch_size=config.batch_size)
    draft = draft_plan(reader.config, reader.family, config)
    advance = Steps(progress, config, decoder.layers, compresses=False)
    store = decoder.store(samples, config)
    with Inspection(reader.iter_tensors()):
        plan, _ = measured_plan(decoder, samples, store, draft, config, advance)
    found = estimate(reader.config, reader.family, asked, plan)
    return dataclasses.replace(plan, estimate=found)


def load_samples(
    calibration: str,
    model: str | Path,
    model_config: PretrainedConfig,
    config: CompressionConfig,
    field: str | None,
    revision: str | None,
) -> Calibration:
    """Return the calibration samples, tokenised by the model's tokenizer where they are text.

    Parameters
    ----------
    calibration, model, field, revision
        As for ``compress_checkpoint``.
    model_config : PretrainedConfig
        Of the original model.
    config : CompressionConfig
        Gives ``samples``, ``seqlen`` and ``seed``.

    Raises
    ------
    UsageError, LorapError
        As :func:`lorap.data.calibration.load_calibration`.
    """
    return load_calibration(
        calibration,
        tokenizer=lambda: load_tokenizer(
            fetch_tokenizer_files(model, revision=revision), "the calibration source"
        ),
        vocab_size=model_config.vocab_size,
        max_positions=model_config.max_position_embeddings,
        samples=config.samples,
        seqlen=config.seqlen,
        seed=config.seed,
        field=field,
    )


def decoder_of(
    reader: CheckpointReader, device: torch.device, dtype: torch.dtype | None
) -> Decoder:
    """Return the reader's model layer by layer.

    Parameters
    ----------
    reader : CheckpointReader
    device : torch.device
    dtype : torch.dtype or None
        Of the forwards; None takes the checkpoint's own.
    """

    def load_layer(index: int) -> Mapping[str, Tensor]:
        return reader.load(f"{reader.family.layers_path}.{index}.", device)

    return Decoder(
        reader.family, reader.config, load_layer, reader.load_others, device, dtype or reader.dtype
    )


def _bytes_after(reader: CheckpointReader, plan: Plan) -> int:
    return int(reader.size_bytes * plan.parameters / plan.parameters_before)
