"""Writing a compressed checkpoint aside and renaming it into place."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorap.checkpoint.files import INDEX, REPORT, SIDE_FILES, WEIGHTS
from lorap.errors import LorapError, UsageError
from lorap.families import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_output(output: str | Path, *, overwrite: bool = False, needed_bytes: int = 0) -> Path:
    """Return the resolved output folder if a checkpoint can be written there.

    Parameters
    ----------
    output : str or Path
        The folder that shall hold the checkpoint.
    overwrite : bool
        Whether an existing one may be replaced: an empty folder, or a checkpoint of lorap.
    needed_bytes : int
        Disk space that the checkpoint takes. A replaced one counts as well, since it stays until
        the new one is whole.

    Raises
    ------
    UsageError
        If the output exists and may not be replaced, cannot be written, or the disk is too full.
    """
    path = Path(output).expanduser().resolve()
    if path.is_dir():
        if not overwrite:
            raise UsageError(f"{output} exists already; --overwrite replaces it")
        if any(path.iterdir()) and not (path / REPORT).is_file():
            raise UsageError(
                f"{output} is not replaced: it is neither empty nor a checkpoint of lorap "
                f"(it holds no {REPORT})"
            )
    elif path.exists():
        raise UsageError(f"{output}: expected a folder, got a file")
    ancestor = _existing_ancestor(path.parent)
    try:
        with tempfile.TemporaryDirectory(prefix=".lorap.", dir=ancestor):
            pass
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {ancestor}: {error.strerror}") from error
    free = shutil.disk_usage(ancestor).free
    if free < needed_bytes:
        raise UsageError(
            f"{output} needs {_gib(needed_bytes)} of disk space, and {ancestor} has {_gib(free)} "
            "free"
        )
    return path


class CheckpointWriter:
    """Context manager: a checkpoint that is either whole in its place or absent.

    Everything is written to a folder beside the output, which :meth:`commit` renames. Leaving the
    context without a commit, by an exception or not, removes that folder.

    Parameters
    ----------
    output : str or Path
        The folder that shall hold the checkpoint.
    overwrite, needed_bytes
        As for :func:`check_output`.

    Raises
    ------
    UsageError
        As :func:`check_output`.
    """

    def __init__(
        self, output: str | Path, *, overwrite: bool = False, needed_bytes: int = 0
    ) -> None:
        self.output = check_output(output, overwrite=overwrite, needed_bytes=needed_bytes)
        self._overwrite = overwrite
        self._staging = self._sibling("partial")
        self._made: list[Path] = []
        self._shards: list[dict[str, Tensor]] = []

    def _sibling(self, suffix: str) -> Path:
        return self.output.parent / f".{self.output.name}.{secrets.token_hex(4)}.{suffix}"

    @property
    def folder(self) -> Path:
        """The folder that is being written, until the commit."""
        return self._staging

    def __enter__(self) -> Self:
        self._made = _missing_folders(self._staging.parent)
        # mkdtemp would leave a checkpoint that only its writer can read.
        self._staging.mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        for folder in self._made:
            # Another run may have put something there meanwhile.
            with contextlib.suppress(OSError):
                folder.rmdir()

    def write_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Write the next shard.

        Parameters
        ----------
        tensors : mapping
            Full name, as in the model's state dict, to tensor; any device.

        Raises
        ------
        ValueError
            If a name was written before, or the shard is empty.
        """
        if not tensors:
            raise ValueError("expected at least one tensor in a shard")
        repeated = sorted(name for name in tensors for shard in self._shards if name in shard)
        if repeated:
            raise ValueError(f"written twice: {', '.join(repeated)}")
        self.write_safetensors(_shard_name(len(self._shards) + 1), tensors)
        # Names, shapes and types are all that the commit needs to know.
        self._shards.append(
            {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        )

    def write_safetensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file of that name."""
        file = self._staging / name
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(stored, file, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read.
        file.chmod(self._staging.stat().st_mode & 0o666)
        _sync(file)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of that name; NaN and infinity are refused."""
        self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of that name in UTF-8."""
        self._write_bytes(name, text.encode())

    def _write_bytes(self, name: str, data: bytes) -> None:
        file = self._staging / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        _sync(file)

    def copy_side_files(self, source: Path) -> None:
        """Carry over tokenizer, chat template, generation config and licence, byte for byte.

        Parameters
        ----------
        source : Path
            Folder of the original checkpoint.
        """
        files = {file for pattern in SIDE_FILES for file in source.glob(pattern) if file.is_file()}
        files |= set(source.glob("additional_chat_templates/*.jinja"))
        for file in sorted(files):
            self._write_bytes(str(file.relative_to(source)), file.read_bytes())

    def commit(self, config: PretrainedConfig) -> Path:
        """Finish the checkpoint and put it in its place.

        Parameters
        ----------
        config : PretrainedConfig
            Of the compressed form; not changed.

        Returns
        -------
        Path
            The output folder.

        Raises
        ------
        LorapError
            If the tensors written are not those that the configuration asks for, or the output
            was created meanwhile.
        """
        family = _family_of_compressed(config)
        written = {name: tensor for shard in self._shards for name, tensor in shard.items()}
        _check_tensors(written, family.tensor_shapes(config))
        self._write_config(config, family, written)
        self._name_shards()
        _sync(self._staging)
        self._rename()
        return self.output

    def _write_config(
        self, config: PretrainedConfig, family: Family, written: Mapping[str, Tensor]
    ) -> None:
        config = copy.deepcopy(config)
        config.architectures = [f"{family.class_prefix}ForCausalLM"]
        if config.dtype is None:
            config.dtype = next(iter(written.values())).dtype
        self.write_text("config.json", config.to_json_string(use_diff=True))
        self._write_bytes(family.modeling_file.name, family.modeling_file.read_bytes())

    def _name_shards(self) -> None:
        count = len(self._shards)
        if count == 1:
            (self._staging / _shard_name(1)).rename(self._staging / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            (self._staging / _shard_name(number)).rename(self._staging / name)
            weight_map |= dict.fromkeys(shard, name)
        size = sum(tensor.nbytes for shard in self._shards for tensor in shard.values())
        self.write_json(INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})

    def _rename(self) -> None:
        check_output(self.output, overwrite=self._overwrite)
        replaced = self._sibling("replaced") if self.output.exists() else None
        if replaced is not None:
            self.output.rename(replaced)
        try:
            self._staging.rename(self.output)
        except OSError:
            if replaced is not None:
                replaced.rename(self.output)
            raise
        _sync(self.output.parent)
        if replaced is not None:
            shutil.rmtree(replaced)


def _family_of_compressed(config: PretrainedConfig) -> Family:
    for family in FAMILIES.values():
        if family.compressed_type == config.model_type:
            return family
    raise ValueError(f"expected the configuration of a compressed model, got {config.model_type}")


def _check_tensors(written: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if name not in written:
            raise LorapError(f"the checkpoint would be incomplete: {name} was not written")
        if tuple(written[name].shape) != shape:
            raise LorapError(
                f"the checkpoint would not load: {name} has the shape "
                f"{tuple(written[name].shape)}, expected {shape}"
            )
    extra = sorted(set(written) - set(expected))
    if extra:
        raise LorapError(f"the checkpoint would not load: it has no place for {', '.join(extra)}")


def _shard_name(number: int) -> str:
    return f"model-{number:05d}.safetensors"


def _missing_folders(path: Path) -> list[Path]:
    """Return the folders that ``mkdir(parents=True)`` would make for `path`, the deepest first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _existing_ancestor(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
