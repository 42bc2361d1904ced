"""Reading a checkpoint layer by layer, after everything about it was checked."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lorap.checkpoint.files import (
    CARD,
    CONFIG,
    INDEX,
    SIDE_FILES,
    TEMPLATES,
    WEIGHTS,
    side_files,
)
from lorap.errors import LorapError, ResumableError, UsageError, first_line
from lorap.families import FAMILIES, MULTIMODAL, Family, family_of

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
    key : str
        Its name there, which may lack the model's prefix.
    shape : tuple of int
        As stored.
    dtype : torch.dtype
        As stored; a floating-point type.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes of the data."""
        return prod(self.shape) * self.dtype.itemsize


class _Entry(NamedTuple):
    """A tensor as a shard's header describes it; of a dtype that torch may not have."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    @property
    def size_bytes(self) -> int:
        """Bytes of the data; of a dtype that torch has not, at most."""
        return prod(self.shape) * (8 if isinstance(self.dtype, str) else self.dtype.itemsize)

    def floating(self) -> StoredTensor:
        """Return the tensor's place if it can be compressed."""
        if isinstance(self.dtype, str) or self.dtype not in _DTYPES.values():
            raise UsageError(
                f"{self.file}: {self.key} is stored as {self.dtype}; expected float64, float32, "
                "float16 or bfloat16 (a quantised model cannot be compressed)"
            )
        return StoredTensor(self.file, self.key, self.shape, self.dtype)


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
        Of the original model. It ties the head to the embedding only where the weights do.
    family : Family
        The model's family.
    tensors : mapping
        Name to place of every tensor that the model needs; tensors beyond these are left out.
    outer : PretrainedConfig, optional
        Of the multimodal model whose language model all of the above is about.
    outside : mapping
        Name to place of the tensors that are not the language model's, under the names stored.
    """

    path: Path
    source: str
    config: PretrainedConfig
    family: Family
    tensors: Mapping[str, StoredTensor]
    outer: PretrainedConfig | None = None
    outside: Mapping[str, _Entry] = field(default_factory=dict)

    @property
    def prefix(self) -> str:
        """What the names stored begin with before those of ``tensors``."""
        return "" if self.outer is None else MULTIMODAL[self.outer.model_type]

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
        return main_dtype((tensor.dtype, tensor.size_bytes) for tensor in self.tensors.values())

    def load(self, prefix: str = "", device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Read the tensors whose names start with a prefix.

        Parameters
        ----------
        prefix : str
            For instance ``"model.layers.3."``; it is stripped from the names returned.
        device : torch.device
            To which they go from the file, with no other copy in between.

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
        read = self._copies(names, device)
        return {name[len(prefix) :]: tensor for name, tensor in read.items()}

    def load_others(self, with_head: bool = True) -> dict[str, Tensor]:
        """Read the tensors outside the decoder layers.

        Parameters
        ----------
        with_head : bool
            Read the language-modelling head's as well.

        Returns
        -------
        dict
            Tensors under their full names, in their stored dtype, in memory of their own.
        """
        return self._copies(
            [name for name in self.other_names() if with_head or name != self.family.head]
        )

    def other_names(self) -> list[str]:
        """Return the names of the tensors outside the decoder layers."""
        prefix = f"{self.family.layers_path}."
        return [name for name in self.tensors if not name.startswith(prefix)]

    def load_outside(self) -> dict[str, Tensor]:
        """Read the tensors that are not the language model's, under the names stored."""
        return {name: tensor.clone() for name, tensor in _stream(self.outside)}

    def sizes_of_others(self) -> dict[str, int]:
        """Return the bytes of all tensors but the decoder layers', by the names stored."""
        return {name: entry.size_bytes for name, entry in self._others().items()}

    def shards_of_others(self) -> list[list[str]]:
        """Share the tensors of ``sizes_of_others`` out to shards no larger than a layer's.

        But for a tensor that is larger by itself.
        """
        prefix = f"{self.family.layers_path}.0."
        limit = sum(t.size_bytes for name, t in self.tensors.items() if name.startswith(prefix))
        shards: list[list[str]] = []
        room = 0
        for name, size in self.sizes_of_others().items():
            if not shards or size > room:
                shards.append([])
                room = limit
            shards[-1].append(name)
            room -= size
        return shards

    def load_as_stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read tensors of ``sizes_of_others``, in memory of their own."""
        others = self._others()
        return {n: tensor.clone() for n, tensor in _stream({name: others[name] for name in names})}

    def _others(self) -> dict[str, StoredTensor | _Entry]:
        own = {f"{self.prefix}{name}": self.tensors[name] for name in self.other_names()}
        return {**own, **self.outside}

    def iter_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Go through all the model's tensors, each once, shard by shard.

        Yields
        ------
        tuple of str and Tensor
            Full name and tensor, in its stored dtype. It is backed by the file itself, not copied:
            do not write to it, and let go of it before the next, lest all of the model become
            resident.
        """
        return _stream(self.tensors)

    def _copies(
        self, names: Iterable[str], device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Read tensors, in the order of their names."""
        wanted = {name: self.tensors[name] for name in names}
        # The copies let go of the mapped file, whose pages would stay resident.
        loaded = {name: tensor.to(device, copy=True) for name, tensor in _stream(wanted)}
        return {name: loaded[name] for name in wanted}


def main_dtype(parts: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """Return the dtype of most bytes.

    Parameters
    ----------
    parts : iterable of (dtype, int)
        Dtype and bytes of each tensor.
    """
    sizes: dict[torch.dtype, int] = {}
    for dtype, size in parts:
        sizes[dtype] = sizes.get(dtype, 0) + size
    return max(sizes, key=lambda dtype: sizes[dtype])


def open_checkpoint(
    model: str | Path, *, revision: str | None = None, allow_bin: bool = False
) -> CheckpointReader:
    """Find a model and check all that can be checked without reading its layers' weights.

    Of a hub name, everything is downloaded; :func:`read_config` and :func:`fetch_tokenizer_files`
    fetch the small files alone.

    Where the configuration ties the head to the embedding but the two are stored and differ,
    transformers runs the model with its own head: then it counts as untied, in the reader's
    configuration too. The weights of a base model, stored without the prefix ``model.``, are
    found if the head is tied.

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
        already compressed, has no usable weights, misses a file or tensor, or holds a link to a
        file outside its folder.
    LorapError
        If the hub cannot be reached.
    """
    source = str(model)
    path, whole = _find_config(model, revision)
    family, config = family_of(whole), whole.get_text_config()
    if not is_local(model):
        _fetch_side_files(source, revision)
        _download(source, revision, [INDEX, BIN_INDEX])
        _download(source, revision, ["model*.safetensors"])
        if allow_bin and not (path / WEIGHTS).exists() and not (path / INDEX).exists():
            _download(source, revision, ["pytorch_model*.bin"])
    side_files(path)
    outer = None if whole is config else whole
    inner, outside = _inner(_stored_tensors(path, source, allow_bin), outer, source)
    stored = _prefixed(inner, family)
    if config.tie_word_embeddings and _has_own_head(stored, family):
        config.tie_word_embeddings = whole.tie_word_embeddings = False
    try:
        expected = family.tensor_shapes(family.compressed_config(config, None))
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        # transformers 4 takes any value, and fails where the model is built from it.
        raise UsageError(f"{path / CONFIG}: not a usable configuration: {error}") from error
    if set(expected) - set(stored) == {family.head}:
        raise UsageError(
            f"{source} is a base model without a language-modelling head: {family.head} is "
            "missing, and its config.json does not tie the head to the embedding"
        )
    tensors = _match(stored, expected, source)
    return CheckpointReader(path, source, config, family, tensors, outer, outside)


def open_compressed(folder: str | Path, *, complete: bool = False) -> CheckpointReader:
    """Find a compressed model; its tensors are all that the files hold, fitting or not.

    Parameters
    ----------
    folder : str or Path
        A local folder.
    complete : bool
        Have the tensors be those that the model needs, and no others.

    Raises
    ------
    UsageError
        If it is no folder of a compressed model, its files are damaged, or, where it shall be
        complete, a tensor is missing or has another shape.
    """
    from transformers import AutoConfig

    path = Path(os.path.expanduser(folder))
    file = path / CONFIG
    if not file.is_file():
        raise UsageError(f"{folder}: expected the folder of a compressed model: no config.json")
    values = read_json(file)
    multimodal = values.get("model_type") in MULTIMODAL
    model_type = (values.get("text_config") or {} if multimodal else values).get("model_type")
    families = {family.compressed_type: family for family in FAMILIES.values()}
    if model_type not in families:
        raise UsageError(
            f"{folder} is no compressed model: expected a model type {', '.join(families)}, "
            f"got {model_type}"
        )
    family = families[model_type]
    try:
        whole = AutoConfig.from_pretrained(path) if multimodal else None
        config = whole.get_text_config() if whole else family.config_class.from_pretrained(path)
    except Exception as error:
        # transformers raises many types here, those of its validators among them.
        raise UsageError(f"{file}: not a usable configuration: {error}") from error
    stored, outside = _inner(_stored_tensors(path, str(folder), allow_bin=False), whole, folder)
    if complete:
        tensors = _match(stored, family.tensor_shapes(config), str(folder))
    else:
        tensors = {name: entry.floating() for name, entry in stored.items()}
    return CheckpointReader(path, str(folder), config, family, tensors, whole, outside)


def read_config(model: str | Path, *, revision: str | None = None) -> PretrainedConfig:
    """Return the configuration of a model that can be compressed, without its weights.

    Of a multimodal model, that of its language model.

    It says that the head is tied to the embedding wherever ``config.json`` does; that the weights
    disagree is seen by :func:`open_checkpoint` only.

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
    return _find_config(model, revision)[1].get_text_config()


def fetch_tokenizer_files(model: str | Path, *, revision: str | None = None) -> Path:
    """Return a folder that holds a model's tokenizer, without downloading its weights.

    Parameters
    ----------
    model : str or Path
        A local folder, which is returned itself, or a hub name.
    revision : str, optional
        Branch, tag or commit of a hub name.

    Raises
    ------
    UsageError
        If there is no such model.
    LorapError
        If the hub cannot be reached.
    """
    if is_local(model):
        return _local_folder(model, revision)
    return _fetch_side_files(str(model), revision)


def is_local(model: str | Path) -> bool:
    """Whether a name means a folder: it exists, or cannot be a hub name."""
    text = str(model)
    looks_like_path = isinstance(model, Path) or text.startswith((".", "/", "~"))
    return looks_like_path or text.count("/") > 1 or text.endswith("/") or Path(text).exists()


def _find_config(model: str | Path, revision: str | None) -> tuple[Path, PretrainedConfig]:
    from transformers import AutoConfig

    if is_local(model):
        path = _local_folder(model, revision)
    else:
        path = _download(str(model), revision, [CONFIG])
    file = path / CONFIG
    if not file.is_file():
        raise UsageError(f"{model} is not a model folder: it holds no config.json")
    values = read_json(file)
    family_of(values)
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        # transformers raises many types here, those of its validators among them.
        raise UsageError(f"{file}: not a usable configuration: {error}") from error
    return path, config


def _local_folder(model: str | Path, revision: str | None) -> Path:
    path = Path(os.path.expanduser(model))
    if revision is not None:
        raise UsageError(f"a revision belongs to a hub name, and {model} is a local folder")
    if not path.exists():
        raise UsageError(f"{model}: no such folder")
    if not path.is_dir():
        raise UsageError(f"{model}: expected a model folder, got a file")
    return path


def _fetch_side_files(name: str, revision: str | None) -> Path:
    """Fetch what is carried over, and the card, whose licence is."""
    _download(name, revision, [TEMPLATES], ignored="*/*/*")
    return _download(name, revision, [*SIDE_FILES, CARD])


def _download(
    name: str, revision: str | None, patterns: list[str], *, ignored: str = "*/*"
) -> Path:
    """Fetch the files of a hub repository that match, and return their folder.

    The hub's ``*`` matches slashes too; `ignored` keeps files of deeper folders away.
    """
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
            name, revision=revision, allow_patterns=patterns, ignore_patterns=[ignored]
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
            f"{first_line(error)}"
        ) from error
    return Path(folder)


def read_json(file: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises
    ------
    UsageError
        If it cannot be read, or holds none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises
    ------
    UsageError
        If it cannot be read.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file}: not readable as safetensors: {error}") from error


def _stored_tensors(path: Path, source: str, allow_bin: bool) -> dict[str, _Entry]:
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


def _indexed(path: Path, index: str) -> dict[str, _Entry]:
    weight_map = read_json(path / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{path / index}: expected a weight_map from tensors to files")
    headers: dict[str, dict[str, _Entry]] = {}
    for shard in weight_map.values():
        if not isinstance(shard, str) or PurePath(shard).is_absolute() or ".." in shard.split("/"):
            raise UsageError(
                f"{path / index}: expected the names of files in its folder, got {shard!r}"
            )
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


def _safetensors_header(file: Path) -> dict[str, _Entry]:
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
                name: _Entry(
                    file, name, tuple(entry["shape"]), _DTYPES.get(entry["dtype"], entry["dtype"])
                )
                for name, entry in header.items()
            }
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise UsageError(f"{file} is no safetensors file: its header is damaged") from error
    if size != 8 + length + end:
        raise UsageError(
            f"{file} is truncated or damaged: expected {8 + length + end} bytes, got {size}"
        )
    return entries


def _bin_header(file: Path) -> dict[str, _Entry]:
    return {
        name: _Entry(file, name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in _load_bin(file).items()
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


def _stream(tensors: Mapping[str, StoredTensor | _Entry]) -> Iterator[tuple[str, Tensor]]:
    """Read tensors file by file; see :meth:`CheckpointReader.iter_tensors`."""
    for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
        wanted = {name: tensor.key for name, tensor in tensors.items() if tensor.file == file}
        if file.suffix == ".safetensors":
            for name, key in wanted.items():
                yield name, _read(file, key)
        else:
            try:
                state = _load_bin(file)
            except UsageError as error:
                # It was read before.
                raise ResumableError(str(error)) from error
            for name, key in wanted.items():
                yield name, state[key]


def _read(file: Path, key: str) -> Tensor:
    """Return a tensor of a safetensors file whose header was read before."""
    try:
        # Opened for each: pages once read stay resident as long as the file is mapped.
        with safe_open(file, framework="pt", device="cpu") as handle:
            tensor: Tensor = handle.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise ResumableError(
            f"{file} can no longer be read, it has changed or gone: {first_line(error)}"
        ) from error
    return tensor


def _inner(
    stored: dict[str, _Entry], outer: PretrainedConfig | None, source: str | Path
) -> tuple[dict[str, _Entry], dict[str, _Entry]]:
    """Return the language model's tensors under its own names, and all others."""
    if outer is None:
        return stored, {}
    prefix = MULTIMODAL[outer.model_type]
    inner = {name.removeprefix(prefix): e for name, e in stored.items() if name.startswith(prefix)}
    if not inner:
        raise UsageError(f"{source}: expected tensors of the language model, named {prefix}*")
    return inner, {name: e for name, e in stored.items() if not name.startswith(prefix)}


def _prefixed(stored: Mapping[str, _Entry], family: Family) -> Mapping[str, _Entry]:
    """Return the tensors under the names of the model with a head, if a base model was saved."""
    prefix = family.base_prefix
    if any(name.startswith(prefix) for name in stored):
        return stored
    return {
        name if name == family.head else f"{prefix}{name}": entry for name, entry in stored.items()
    }


def _has_own_head(stored: Mapping[str, _Entry], family: Family) -> bool:
    """Whether a head is stored that is not, bit for bit, the embedding."""
    if family.embedding not in stored or family.head not in stored:
        return False
    head, embedding = stored[family.head].floating(), stored[family.embedding].floating()
    if head.dtype != embedding.dtype:
        return True
    first, second = (tensor for _, tensor in _stream({"head": head, "embedding": embedding}))
    # NaN equals itself as bytes only.
    return not torch.equal(
        first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8)
    )


def _match(
    stored: Mapping[str, _Entry], expected: Mapping[str, tuple[int, ...]], source: str
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
    return {name: stored[name].floating() for name in expected}
