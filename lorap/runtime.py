"""The machine that a run has: device, precision, versions, peak memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

import lorap
from lorap.config import DType
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
        If the name is none of these, or there is no such GPU here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::([0-9]+))?", device)
    if match is None:
        raise UsageError(f"device {device!r}: expected auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: there is no CUDA device here; use cpu or auto")
    if match[1] is None:
        return torch.device("cuda")
    if int(match[1]) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device!r}: the last CUDA device here is cuda:{torch.cuda.device_count() - 1}"
        )
    return torch.device("cuda", int(match[1]))


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of that name; None stays None, for the checkpoint's own.

    Raises
    ------
    UsageError
        If it is none of float64, float32, bfloat16 and float16.
    """
    if dtype is None:
        return None
    known: dict[str, torch.dtype] = {name: getattr(torch, name) for name in get_args(DType)}
    if isinstance(dtype, str) and dtype in known:
        return known[dtype]
    if isinstance(dtype, torch.dtype) and dtype in known.values():
        return dtype
    raise UsageError(
        f"dtype {str(dtype)!r}: expected a floating-point type: float64, float32, bfloat16 or "
        "float16"
    )


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


def available_memory() -> int:
    """Return the bytes of memory that a program can have at present without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except OSError:
        # Not a Linux.
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory of this process so far, in bytes: ``cpu``, and ``cuda`` on a GPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak
