"""What a checkpoint says of itself: settings, report, calibration ids, recorded statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorap.checkpoint.files import CALIBRATION, REPORT, STATISTICS
from lorap.checkpoint.reader import CheckpointReader, read_tensors
from lorap.config import CompressionConfig, Override
from lorap.data.calibration import check_vocabulary, load_calibration
from lorap.data.tokenizers import load_tokenizer
from lorap.errors import UsageError
from lorap.report import read_report

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Record:
    """``lorap_report.json``, and what the layers were planned and compressed by.

    Attributes
    ----------
    report : mapping
        As written.
    settings : CompressionConfig
        As the report gives them.
    statistics : mapping
        All of ``lorap_statistics.safetensors``, by the names there.
    file : Path
        Of the statistics, for messages.
    layers_path : str
        Prefix of the names of the layers.
    """

    report: Mapping[str, Any]
    settings: CompressionConfig
    statistics: Mapping[str, NDArray[Any]]
    file: Path
    layers_path: str

    @classmethod
    def read(cls, stored: CheckpointReader) -> Record:
        """Read what a compressed checkpoint says of itself.

        Raises
        ------
        UsageError
            If a file is missing, damaged, or of another version.
        """
        file = stored.path / REPORT
        report = read_report(stored.path, stored.source)
        if report.get("recovery") is not None:
            raise UsageError(
                f"{stored.source} was recovered, and its weights trained: audit the compressed "
                "model that it was made from"
            )
        try:
            values = dict(report["settings"])
            values["overrides"] = tuple(Override(**item) for item in values["overrides"])
            settings = CompressionConfig(**values)
        except (KeyError, TypeError, UsageError) as error:
            raise UsageError(f"{file}: its settings cannot be used: {error}") from error
        statistics = stored.path / STATISTICS
        return cls(report, settings, read_arrays(statistics), statistics, stored.family.layers_path)

    def has(self, name: str) -> bool:
        """Tell whether an array of that name is recorded."""
        return self._full(name) in self.statistics

    def _full(self, name: str) -> str:
        return f"{self.layers_path}.{name.removeprefix('layers.')}"

    def recorded(self, name: str, shape: tuple[int, ...]) -> Array:
        """Return a recorded array.

        Parameters
        ----------
        name : str
            ``layers.3.attention.norms``, ``layers.3.mha.similarity``.
        shape : tuple of int

        Raises
        ------
        UsageError
            If there is none of this shape, or it is not finite.
        """
        full = self._full(name)
        found = self.statistics.get(full)
        if found is None or found.shape != shape:
            raise UsageError(
                f"{self.file}: expected {full} of shape {shape}, got "
                f"{None if found is None else found.shape}"
            )
        if not np.isfinite(found).all():
            raise UsageError(f"{self.file}: {full} holds NaN or inf")
        return found.astype(np.float64)

    def removals(self, path: str, width: int) -> list[int]:
        """Return the recorded order in which all channels of a block but the last are removed.

        Parameters
        ----------
        path : str
            Of the block, as ``layers.3.mlp``.
        width : int
            Its channels.

        Raises
        ------
        UsageError
            If it does not name channels, each once.
        """
        name = f"{path}.removals"
        order = self.recorded(name, (width - 1,))
        if not set(order) <= set(range(width)) or len(set(order)) < order.size:
            raise UsageError(
                f"{self.file}: expected {self._full(name)} to hold channels from 0 to "
                f"{width - 1}, each once"
            )
        return [int(channel) for channel in order]

    def said(self, layer: int, name: str) -> Mapping[str, Any]:
        """Return what the report says of a module; nothing where it is not in order."""
        modules = self.said_of_layer(layer).get("modules")
        found = modules.get(name) if isinstance(modules, dict) else None
        return found if isinstance(found, dict) else {}

    def said_of_layer(self, layer: int) -> Mapping[str, Any]:
        """Return what the report says of a layer; nothing where it is not in order."""
        layers = self.report.get("layers")
        found = layers[layer] if isinstance(layers, list) and layer < len(layers) else None
        return found if isinstance(found, dict) else {}


def read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of a safetensors file.

    Raises
    ------
    UsageError
        If it is missing or damaged.
    """
    if not file.is_file():
        raise UsageError(f"{file} is missing: expected a folder that `lorap compress` wrote")
    return {name: tensor.numpy() for name, tensor in read_tensors(file).items()}


def calibration_ids(
    reader: CheckpointReader,
    stored: CheckpointReader,
    settings: CompressionConfig,
    calibration: str | Path | None,
) -> NDArray[np.int64]:
    """Return the ids (N, L) that the layers are recomputed with.

    Parameters
    ----------
    reader, stored : CheckpointReader
        Of the original and of the compressed model.
    settings : CompressionConfig
        As recorded.
    calibration : str, Path or None
        A source; None takes the ids kept in the checkpoint.

    Raises
    ------
    UsageError
        If the source, or the file of the ids, cannot be used.
    """
    if calibration is not None:
        chosen = load_calibration(
            calibration,
            tokenizer=lambda: load_tokenizer(reader.path, "the calibration source"),
            vocab_size=reader.config.vocab_size,
            max_positions=reader.config.max_position_embeddings,
            samples=settings.samples,
            seqlen=settings.seqlen,
            seed=settings.seed,
        )
        return np.asarray(chosen.input_ids.numpy())
    file = stored.path / CALIBRATION
    ids = read_arrays(file).get("input_ids")
    if ids is None or ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise UsageError(f"{file}: expected input_ids of shape (N, L) and of an integer dtype")
    ids = ids.astype(np.int64)
    check_vocabulary(ids, reader.config.vocab_size, str(file))
    return ids


def fingerprint(ids: NDArray[np.int64]) -> str:
    """Return the fingerprint that the report gives of calibration ids."""
    digest = hashlib.sha256(np.asarray(ids.shape, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()
