"""Reading a checkpoint layer by layer, after everything about it was checked."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from lorap.checkpoint.files import INDEX, SIDE_FILES, WEIGHTS
from lorap.errors import LorapError, UsageError
from lorap.families import FAMILIES, Family, family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BIN_WEIGHTS = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what it is.

    Parameters
    ----------
    file : Path
        The shard.
    shape : tuple of int
        As stored.
    dtype : torch.dtype
        As stored; a floating-point type.
    """

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint whose files, names and shapes were found right; see :func:`open_checkpoint`.

    Parameters
    ----------
    path : Path
        Folder of the checkpoint.
    source : str
        As the user named it: a folder or a hub name.
    config : PretrainedConfig
        Of the original model.
    family : Family
        The model's family.
    tensors : mapping
        Name to place of every tensor that the model needs; tensors beyond these are left out.
    """

    path: Path
    source: str
    config: PretrainedConfig
    family: Family
    tensors: Mapping[str, StoredTensor]

    def keys(self) -> tuple[str, ...]:
        """Return the names of the model's tensors. A tied head is not among them."""
        return tuple(self.tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of all the model's tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        """The type in which most of the model's bytes are stored."""
        sizes: dict[torch.dtype, int] = {}
        for tensor in self.tensors.values():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def load(self, prefix: str = "", device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read the tensors whose names start with a prefix.

        Parameters
        ----------
        prefix : str
            For instance ``"model.layers.3."``; it is stripped from the names returned.
        device : torch.device or str
            Where the tensors are wanted.

        Returns
        -------
        dict
            Tensors in their stored dtype, in memory of their own.

        Raises
        ------
        KeyError
            If no name starts with the prefix.
        """
        names = [name for name in self.tensors if name.startswith(prefix)]
        if not names:
            raise KeyError(f"no tensor of {self.source} has a name that starts with {prefix!r}")
        loaded: dict[str, Tensor] = {}
        for file in dict.fromkeys(self.tensors[name].file for name in names):
            wanted = [name for name in names if self.tensors[name].file == file]
            # The copies let go of the mapped file, whose pages would stay resident.
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt", device="cpu") as handle:
                    for name in wanted:
                        loaded[name] = handle.get_tensor(name).to(device, copy=True)
            else:
                state = _load_bin(file)
                for name in wanted:
                    loaded[name] = state[name].to(device, copy=True)
        return {name[len(prefix) :]: loaded[name] for name in names}


def open_checkpoint(
    model: str | Path, *, revision: str | None = None, allow_bin: bool = False
) -> CheckpointReader:
    """Find a model and check all that can be checked without reading its weights.

    Parameters
    ----------
    model : str or Path
        A local folder or a hub name.
    revision : str, optional
        Branch, tag or commit of a hub name.
    allow_bin : bool
        Whether pickled weights are read where there are no others, with ``weights_only=True``.

    Raises
    ------
    UsageError
        If the model cannot be found or had, is of a type that is not supported, quantised or
        already compressed, has no usable weights, or misses a file or tensor.
    LorapError
        If the hub cannot be reached.
    """
    source = str(model)
    path, config = _find_config(model, revision)
    family = family_of(config)
    if not _is_local(model):
        _download(source, revision, [*SIDE_FILES, INDEX, BIN_INDEX])
        _download(source, revision, ["model*.safetensors"])
        if allow_bin and not (path / WEIGHTS).exists() and not (path / INDEX).exists():
            _download(source, revision, ["pytorch_model*.bin"])
    stored = _stored_tensors(path, source, allow_bin)
    try:
        expected = family.tensor_shapes(family.compressed_config(config, None))
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # transformers 4 takes any value, and fails where the model is built from it.
        raise UsageError(f"{path / 'config.json'}: not a usable configuration: {error}") from error
    tensors = _match(stored, expected, source)
    return CheckpointReader(path, source, config, family, tensors)


def open_compressed(folder: str | Path) -> CheckpointReader:
    """Find a compressed model; its tensors are all that the files hold, fitting or not.

    Parameters
    ----------
    folder : str or Path
        A local folder.

    Raises
    ------
    UsageError
        If it is no folder of a compressed model, or its files are damaged.
    """
    path = Path(folder).expanduser()
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"{folder}: expected the folder of a compressed model: no config.json")
    model_type = _read_json(file).get("model_type")
    families = {family.compressed_type: family for family in FAMILIES.values()}
    if model_type not in families:
        raise UsageError(
            f"{folder} is no compressed model: expected a model type {', '.join(families)}, "
            f"got {model_type}"
        )
    family = families[model_type]
    try:
        config = family.config_class.from_pretrained(path)
    except Exception as error:
        # transformers raises many types here, those of its validators among them.
        raise UsageError(f"{file}: not a usable configuration: {error}") from error
    stored = _stored_tensors(path, str(folder), allow_bin=False)
    return CheckpointReader(path, str(folder), config, family, stored)


def read_config(model: str | Path, *, revision: str | None = None) -> PretrainedConfig:
    """Return the configuration of a model that can be compressed, without its weights.

    Parameters
    ----------
    model : str or Path
        A local folder or a hub name.
    revision : str, optional
        Branch, tag or commit of a hub name.

    Raises
    ------
    UsageError
        If there is no such model, or it is of a type that is not supported, quantised or already
        compressed.
    LorapError
        If the hub cannot be reached.
    """
    return _find_config(model, revision)[1]


def _is_local(model: str | Path) -> bool:
    """Whether a name means a folder: it exists, or cannot be a hub name."""
    text = str(model)
    looks_like_path = isinstance(model, Path) or text.startswith((".", "/", "~"))
    return looks_like_path or text.count("/") > 1 or text.endswith("/") or Path(text).exists()


def _find_config(model: str | Path, revision: str | None) -> tuple[Path, PretrainedConfig]:
    from transformers import AutoConfig

    if _is_local(model):
        path = Path(model).expanduser()
        if revision is not None:
            raise UsageError(f"a revision belongs to a hub name, and {model} is a local folder")
        if not path.exists():
            raise UsageError(f"{model}: no such folder")
        if not path.is_dir():
            raise UsageError(f"{model}: expected a model folder, got a file")
    else:
        path = _download(str(model), revision, ["config.json"])
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"{model} is not a model folder: it holds no config.json")
    values = _read_json(file)
    family_of(values)
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        # transformers raises many types here, those of its validators among them.
        raise UsageError(f"{file}: not a usable configuration: {error}") from error
    return path, config


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    """Fetch the files of a hub repository that match, and return their folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except GatedRepoError as error:
        raise UsageError(
            f"{name} is gated: accept its terms on https://huggingface.co/{name}, "
            "then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {revision}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UsageError(
            f"{name}: neither a folder here nor a model on the hub that you may read"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise LorapError(
            f"{name} is not a folder here, and the hub cannot be reached for it: "
            f"{_first_line(error)}"
        ) from error
    return Path(folder)


def _first_line(error: Exception) -> str:
    """Cause without the paragraphs of advice that libraries append."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def _stored_tensors(path: Path, source: str, allow_bin: bool) -> dict[str, StoredTensor]:
    """Return what the checkpoint's shards hold, by the headers alone."""
    if (path / WEIGHTS).exists():
        return _safetensors_header(path / WEIGHTS)
    if (path / INDEX).exists():
        return _indexed(path, INDEX)
    bins = [file for file in (path / BIN_WEIGHTS, path / BIN_INDEX) if file.exists()]
    if not bins:
        raise UsageError(f"{source} holds no weights: expected {WEIGHTS} or {INDEX}")
    if not allow_bin:
        raise UsageError(
            f"{source} holds pickled weights only ({bins[0].name}). Convert them: load the model "
            "with transformers and save it again with save_pretrained; or allow them "
            "(--allow-bin), to be read without running code in them"
        )
    if bins[0].name == BIN_WEIGHTS:
        return _bin_header(bins[0])
    return _indexed(path, BIN_INDEX)


def _indexed(path: Path, index: str) -> dict[str, StoredTensor]:
    weight_map = _read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{path / index}: expected a weight_map from tensors to files")
    headers: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(weight_map.values())):
        file = path / shard
        if not file.is_file():
            raise UsageError(f"{path / index} names the shard {shard}, which is missing")
        read_header = _safetensors_header if index == INDEX else _bin_header
        headers[shard] = read_header(file)
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise UsageError(f"{path / index} places {name} in {shard}, which does not hold it")
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _safetensors_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise UsageError(f"{file} is truncated or no safetensors file: {size} bytes")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            entries = {
                name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()
            }
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UsageError(f"{file} is no safetensors file: its header is damaged") from error
    if size != 8 + length + end:
        raise UsageError(
            f"{file} is truncated or damaged: expected {8 + length + end} bytes, got {size}"
        )
    return {
        name: StoredTensor(file, shape, _floating(_DTYPES.get(dtype, dtype), name, file))
        for name, (dtype, shape) in entries.items()
        if not _is_buffer(name)
    }


def _bin_header(file: Path) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(file, tuple(tensor.shape), _floating(tensor.dtype, name, file))
        for name, tensor in _load_bin(file).items()
        if not _is_buffer(name)
    }


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(
            file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)
        )
    except Exception as error:
        # Damaged and malicious pickles raise errors of many types; torch's own words advise to
        # load them all the same.
        raise UsageError(
            f"{file}: expected a pickled state dict that holds tensors alone; it is damaged, or "
            "holds something else, which is not loaded"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(item, Tensor) for item in state.values()):
        raise UsageError(f"{file}: expected a mapping from names to tensors")
    return state


def _is_buffer(name: str) -> bool:
    """Whether a tensor is a rotary table, which old checkpoints hold and no model reads."""
    return name.endswith("rotary_emb.inv_freq")


def _floating(dtype: torch.dtype | str, name: str, file: Path) -> torch.dtype:
    if isinstance(dtype, str) or dtype not in _DTYPES.values():
        raise UsageError(
            f"{file}: {name} is stored as {dtype}; expected float64, float32, float16 or bfloat16 "
            "(a quantised model cannot be compressed)"
        )
    return dtype


def _match(
    stored: Mapping[str, StoredTensor], expected: Mapping[str, tuple[int, ...]], source: str
) -> dict[str, StoredTensor]:
    """Return the tensors that the model needs, or say what the first misfit is."""
    for name, shape in expected.items():
        if name not in stored:
            raise UsageError(f"{source} does not fit its config.json: {name} is missing")
        if stored[name].shape != shape:
            raise UsageError(
                f"{source} does not fit its config.json: {name} has the shape "
                f"{stored[name].shape}, expected {shape}"
            )
    return {name: stored[name] for name in expected}
