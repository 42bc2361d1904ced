"""The machine that a run has: device, precision, versions, peak memory."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
from collections.abc import Sequence

import torch

import lorap
from lorap.errors import UsageError

PACKAGES = ("torch", "transformers", "numpy", "safetensors")
"""Packages whose versions a result depends on."""


def choose_device(device: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda`` (also ``cuda:1``).

    Parameters
    ----------
    device : str
        ``auto`` takes the GPU where there is one.

    Raises
    ------
    UsageError
        If the name is no device, or there is no such GPU here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r}: expected auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: there is no CUDA device here; use cpu or auto")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device!r}: the last CUDA device here is cuda:{torch.cuda.device_count() - 1}"
        )
    return chosen


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of that name; None stays None, for the checkpoint's own.

    Raises
    ------
    UsageError
        If it is not a floating-point dtype of torch.
    """
    if dtype is None:
        return None
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
        raise UsageError(
            f"dtype {dtype!r}: expected a floating-point type: float64, float32, bfloat16 or "
            "float16"
        )
    return chosen


def versions(extra: Sequence[str] = ()) -> dict[str, str]:
    """Return the versions of lorap, Python, and the packages that a result depends on.

    Parameters
    ----------
    extra : sequence of str
        Further packages.
    """
    found = {"lorap": lorap.__version__, "python": platform.python_version()}
    for package in (*PACKAGES, *extra):
        found[package] = importlib.metadata.version(package)
    return found


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory of this process so far, in bytes: ``cpu``, and ``cuda`` on a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak
