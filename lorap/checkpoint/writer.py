"""Writing a compressed checkpoint aside and renaming it into place."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorap.checkpoint.files import (
    CALIBRATION,
    CARD,
    CONFIG,
    INDEX,
    REPORT,
    SIDE_FILES,
    STATISTICS,
    WEIGHTS,
    side_files,
)
from lorap.errors import LorapError, UsageError
from lorap.families import FAMILIES, MULTIMODAL, Family, modeling_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# All that a checkpoint of lorap consists of.
_OWN_FILES = (
    *SIDE_FILES,
    CARD,
    CONFIG,
    WEIGHTS,
    "model-[0-9]*-of-[0-9]*.safetensors",
    INDEX,
    "modeling_lorap*.py",
    REPORT,
    CALIBRATION,
    STATISTICS,
)


def check_output(
    output: str | Path,
    *,
    overwrite: bool = False,
    replaceable: bool = True,
    needed_bytes: int = 0,
    inputs: Sequence[Path] = (),
) -> Path:
    """Return the resolved output folder if a checkpoint can be written there.

    Parameters
    ----------
    output : str or Path
        The folder that shall hold the checkpoint.
    overwrite : bool
        Whether an existing one may be replaced: an empty folder, or a checkpoint of lorap that
        holds nothing else.
    replaceable : bool
        Whether `overwrite` can be asked for at all.
    needed_bytes : int
        Disk space that the checkpoint takes. A replaced one counts as well, since it stays until
        the new one is whole.
    inputs : sequence of Path
        Files and folders that the checkpoint is made from: none may lie in the output.

    Raises
    ------
    UsageError
        If the output exists and may not be replaced, holds an input, cannot be written, or the
        disk is too full.
    """
    path = Path(os.path.expanduser(output)).resolve()
    try:
        _check_existing(path, output, overwrite, replaceable)
        for given in inputs:
            if Path(os.path.expanduser(given)).resolve().is_relative_to(path):
                raise UsageError(
                    f"{output} is not replaced: {given}, which is read, is the same or lies in it"
                )
        ancestor = _existing_ancestor(path.parent)
        with tempfile.TemporaryDirectory(prefix=".lorap.", dir=ancestor):
            pass
    except OSError as error:
        raise UsageError(
            f"{output} cannot be written: {error.filename or path}: {error.strerror}"
        ) from error
    free = shutil.disk_usage(ancestor).free
    if free < needed_bytes:
        raise UsageError(
            f"{output} needs {_gib(needed_bytes)} of disk space, and {ancestor} has {_gib(free)} "
            "free"
        )
    return path


def _check_existing(path: Path, output: str | Path, overwrite: bool, replaceable: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{output}: expected a folder, got a file")
    if not overwrite:
        way_on = "--overwrite replaces it" if replaceable else "choose another folder"
        raise UsageError(f"{output} exists already; {way_on}")
    if not any(path.iterdir()):
        return
    if not _is_compressed(path):
        raise UsageError(
            f"{output} is not replaced: it is neither empty nor a checkpoint of lorap "
            f"(expected a {REPORT}, and a {CONFIG} of a compressed model)"
        )
    foreign = list(_foreign_entries(path))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise UsageError(
            f"{output} is not replaced: lorap did not write {', '.join(foreign[:3])}{more} there, "
            "which would be lost"
        )


def _is_compressed(folder: Path) -> bool:
    """Whether a folder says of itself that lorap wrote it."""
    if not (folder / REPORT).is_file():
        return False
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    types = {family.compressed_type for family in FAMILIES.values()}
    if isinstance(config, dict) and config.get("model_type") in MULTIMODAL:
        config = config.get("text_config")
    return isinstance(config, dict) and config.get("model_type") in types


def _foreign_entries(folder: Path, start: str = "") -> Iterator[str]:
    """Yield the names of what lorap does not write: other files, folders, and all links."""
    for entry in sorted(folder.iterdir()):
        name = f"{start}{entry.name}"
        if entry.is_dir() and not entry.is_symlink():
            if any(pattern.startswith(f"{name}/") for pattern in _OWN_FILES):
                yield from _foreign_entries(entry, f"{name}/")
            else:
                yield f"{name}/"
        elif entry.is_symlink() or not any(fnmatchcase(name, pattern) for pattern in _OWN_FILES):
            yield name


class CheckpointWriter:
    """Context manager: a checkpoint that is either whole in its place or absent.

    Everything is written to a folder beside the output, which :meth:`commit` renames. Leaving the
    context without a commit, by an exception or not, removes that folder.

    Parameters
    ----------
    output : str or Path
        The folder that shall hold the checkpoint.
    overwrite : bool
        As for :func:`check_output`.

    Raises
    ------
    UsageError
        As :func:`check_output`.
    """

    def __init__(self, output: str | Path, *, overwrite: bool = False) -> None:
        self.output = check_output(output, overwrite=overwrite)
        self._overwrite = overwrite
        self._staging = self._sibling("partial")
        self._made: list[Path] = []
        self._shards: list[dict[str, Tensor]] = []

    def _sibling(self, suffix: str) -> Path:
        # Without the output's name, which may leave no room for more.
        return self.output.parent / f".lorap-{secrets.token_hex(4)}.{suffix}"

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

        Raises
        ------
        UsageError
            If a file is a link out of the folder.
        """
        for file in side_files(source):
            self._write_bytes(str(file.relative_to(source)), file.read_bytes())

    def commit(self, config: PretrainedConfig, outer: PretrainedConfig | None = None) -> Path:
        """Finish the checkpoint and put it in its place.

        Parameters
        ----------
        config : PretrainedConfig
            Of the compressed form; not changed.
        outer : PretrainedConfig, optional
            Of the multimodal model whose language model was compressed; not changed.

        Returns
        -------
        Path
            The output folder.

        Raises
        ------
        LorapError
            If the tensors written are not those that the configuration asks for.
        UsageError
            If the output, or something in it that lorap does not write, was created meanwhile.
        """
        family = _family_of_compressed(config)
        written = {name: tensor for shard in self._shards for name, tensor in shard.items()}
        prefix = "" if outer is None else MULTIMODAL[outer.model_type]
        inner = {n.removeprefix(prefix): t for n, t in written.items() if n.startswith(prefix)}
        _check_tensors(inner, family.tensor_shapes(config))
        config = copy.deepcopy(config)
        if config.dtype is None:
            config.dtype = next(iter(inner.values())).dtype
        if outer is None:
            config.architectures = [f"{family.class_prefix}ForCausalLM"]
            self._write_bytes(modeling_file().name, modeling_file().read_bytes())
        else:
            outer = copy.deepcopy(outer)
            outer.text_config = config
        self.write_text(CONFIG, (outer or config).to_json_string(use_diff=True))
        self._name_shards()
        _sync(self._staging)
        self._rename()
        return self.output

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
        with _signals_held():
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
                shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Put off what interrupts the main thread until the old checkpoint has made way for the new.

    Handlers are exchanged rather than signals blocked: with several threads, a signal blocked in
    one reaches another, and Python then runs its handler in the main thread all the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    held = {number: signal.getsignal(number) for number in _INTERRUPTS}
    for number in held:
        signal.signal(number, lambda received, _: pending.append(received))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if pending:
            signal.raise_signal(pending[0])


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
