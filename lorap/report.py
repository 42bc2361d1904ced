"""``lorap_report.json``: what was asked, what was done, and how well it went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lorap.checkpoint.files import CALIBRATION, REPORT
from lorap.config import CompressionConfig
from lorap.data.calibration import Calibration
from lorap.errors import UsageError
from lorap.plan import Measurements, Plan
from lorap.runtime import peak_memory, versions

FORMAT_VERSION = 1


def read_report(folder: Path, source: str) -> dict[str, Any]:
    """Read the report of a folder.

    Parameters
    ----------
    folder : Path
    source : str
        The folder as the user named it, for the error.

    Raises
    ------
    UsageError
        If there is none, or it is damaged or of another version.
    """
    file = folder / REPORT
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"{source} holds no {REPORT}: expected a folder that lorap wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file}: not readable as a report: not readable as JSON: {error}"
        ) from error
    version = report.get("format_version") if isinstance(report, dict) else None
    if version != FORMAT_VERSION:
        raise UsageError(
            f"{file}: not readable as a report: expected format_version {FORMAT_VERSION}, "
            f"got {version!r}"
        )
    return dict(report)


def make_report(
    *,
    model: str,
    revision: str | None,
    config: CompressionConfig,
    plan: Plan,
    measurements: Measurements,
    calibration: Calibration,
    layers: Sequence[Mapping[str, Any]],
    resumed_layers: int,
    processes: int,
    device: torch.device,
    seconds: float,
    command: str,
) -> dict[str, Any]:
    """Put the report of a compression together.

    Parameters
    ----------
    model : str
        As the user named it.
    revision : str or None
        Of a model on the hub.
    config : CompressionConfig
    plan : Plan
    measurements : Measurements
        That the plan was made from; empty where nothing was measured.
    calibration : Calibration
    layers : sequence of mapping
        By decoder layer, as ``pipeline.layers.LayerResult.record`` returns it.
    resumed_layers : int
        Of these, how many an earlier run had finished.
    processes : int
        That worked together.
    device : torch.device
        Where it was computed, by the first of them.
    seconds : float
        Wall time in all.
    command : str
        What was run.

    Returns
    -------
    dict
        Plain values, ready for JSON.
    """
    samples, seqlen = calibration.input_ids.shape
    planned = plan.to_dict()
    del planned["layers"]
    return {
        "format_version": FORMAT_VERSION,
        "model": model,
        "revision": revision,
        **planned,
        "settings": config.to_dict(),
        "calibration": {
            "source": calibration.source,
            "samples": samples,
            "seqlen": seqlen,
            "seed": config.seed,
            "fingerprint": calibration.fingerprint,
            "file": CALIBRATION,
        },
        "layers": [
            {
                "seconds": layer["seconds"],
                "ratios": ratios,
                "similarities": measurements.similarities_of(index),
                "losses": layer["losses"],
                "modules": layer["modules"],
            }
            for index, (layer, ratios) in enumerate(zip(layers, plan.ratios(), strict=True))
        ],
        "resumed_layers": resumed_layers,
        "processes": processes,
        "device": str(device),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(device),
        "versions": versions(),
        "command": command,
    }
