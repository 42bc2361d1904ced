"""``lorap_report.json``: what was asked, what was done, and how well it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorap.checkpoint.files import CALIBRATION
from lorap.config import CompressionConfig
from lorap.data.calibration import Calibration
from lorap.plan import Measurements, Plan
from lorap.runtime import peak_memory, versions

FORMAT_VERSION = 1


def make_report(
    *,
    model: str,
    revision: str | None,
    config: CompressionConfig,
    plan: Plan,
    measurements: Measurements,
    calibration: Calibration,
    layers: Sequence[tuple[Mapping[str, Any], float]],
    resumed_layers: int,
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
    layers : sequence of (modules, seconds)
        One pair per decoder layer, as in ``pipeline.layers.LayerResult``.
    resumed_layers : int
        Of these, how many an earlier run had finished.
    device : torch.device
        Where it was computed.
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
                "seconds": spent,
                "ratios": ratios,
                "similarities": measurements.similarities_of(index),
                "modules": dict(modules),
            }
            for index, ((modules, spent), ratios) in enumerate(
                zip(layers, plan.ratios(), strict=True)
            )
        ],
        "resumed_layers": resumed_layers,
        "device": str(device),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(device),
        "versions": versions(),
        "command": command,
    }
