"""Where hidden states wait between layers: on the device, in the CPU's memory, or on disk."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lorap.config import Activations
from lorap.runtime import available_memory

Place = Literal["device", "cpu", "disk"]
"""On a CPU, ``device`` and ``cpu`` are the same memory."""

SHARE_OF_DEVICE, SHARE_OF_MEMORY = 0.3, 0.5
"""Parts of a GPU's, and of the machine's, free memory that hidden states may fill by themselves."""


def choose_place(
    activations: Activations, size: int, device: torch.device, sharing: int = 1
) -> Place:
    """Return where hidden states of that many bytes in all wait.

    Parameters
    ----------
    activations : {"auto", "device", "cpu", "disk"}
        ``auto`` takes the first place in which they fit.
    size : int
        Bytes that are kept at a time.
    device : torch.device
        Where the layers run.
    sharing : int
        Processes that share the machine's memory, each of which keeps as much.
    """
    if activations != "auto":
        return activations
    if device.type == "cuda" and size <= SHARE_OF_DEVICE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "cpu" if sharing * size <= SHARE_OF_MEMORY * available_memory() else "disk"


class Store:
    """Keeps tensors in a place until they are let go of.

    Parameters
    ----------
    place : {"device", "cpu", "disk"}
    device : torch.device
        Where the tensors come from, and are given back.
    folder : Path or None
        For those on disk; None for the system's folder of temporary files.
    """

    def __init__(self, place: Place, device: torch.device, folder: Path | None = None) -> None:
        self.place = place
        self.device = device
        self._folder = folder

    def keep(self, tensor: Tensor) -> Kept:
        """Put a tensor away."""
        if self.place == "disk":
            return _OnDisk(tensor, self._folder)
        return Kept(tensor if self.place == "device" else tensor.cpu(), tensor.device)


class Kept:
    """A tensor that was put away.

    Attributes
    ----------
    shape : torch.Size
    dtype : torch.dtype
    """

    def __init__(self, tensor: Tensor, device: torch.device) -> None:
        self.shape = tensor.shape
        self.dtype = tensor.dtype
        self._device = device
        self._tensor: Tensor | None = tensor

    def load(self) -> Tensor:
        """Return it, on the device; not to be written to."""
        assert self._tensor is not None
        return self._tensor.to(self._device)


class _OnDisk(Kept):
    def __init__(self, tensor: Tensor, folder: Path | None) -> None:
        super().__init__(tensor, tensor.device)
        self._tensor = None
        number, name = tempfile.mkstemp(prefix=".lorap-hidden-", dir=folder)
        self._file = name
        weakref.finalize(self, Path(name).unlink, missing_ok=True)
        data = tensor.detach().cpu().contiguous().view(torch.uint8)
        with os.fdopen(number, "wb") as file:
            # Not mapped: mapped pages would count as this process's memory.
            data.numpy().tofile(file)

    def load(self) -> Tensor:
        data = torch.from_numpy(np.fromfile(self._file, dtype=np.uint8))
        return data.view(self.dtype).view(self.shape).to(self._device)
