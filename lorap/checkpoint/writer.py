"""Writing a compressed checkpoint aside and renaming it into place."""

from __future__ import annotations

import contextlib
import copy
import hashlib
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
from safetensors.torch import load, save_file
from torch import Tensor

from lorap.checkpoint.files import (
    CALIBRATION,
    CARD,
    CONFIG,
    EVALUATION,
    EXPORT,
    INDEX,
    REPORT,
    REPORT_PAGE,
    SIDE_FILES,
    STATISTICS,
    WEIGHTS,
    side_files,
    sync,
)
from lorap.checkpoint.journal import FOLDER, SCRATCH, Journal, lock
from lorap.errors import LorapError, ResumableError, UsageError
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
    REPORT_PAGE,
    EXPORT,
    EVALUATION,
    CALIBRATION,
    STATISTICS,
    f"{FOLDER}/*",
    f"{FOLDER}/{SCRATCH}/*",
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

    One that a run had put aside, to replace it, when it was killed is put back before.

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
        _put_back(path)
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
            f"{output} needs {_size(needed_bytes)} of disk space, and {ancestor} has {_size(free)} "
            "free"
        )
    return path


def staging_of(output: Path) -> Path:
    """Return the folder beside an output in which a run that can be resumed works.

    Parameters
    ----------
    output : Path
        Resolved.
    """
    return _beside(output, "partial")


def _beside(output: Path, suffix: str) -> Path:
    # Without the output's name, which may leave no room for more.
    digest = hashlib.sha256(output.name.encode()).hexdigest()
    return output.parent / f".lorap-{digest[:16]}.{suffix}"


def _put_back(output: Path) -> None:
    """Put a checkpoint back in its place, or away for good, where a run was killed replacing it.

    Away only where another one of lorap's has that place.
    """
    replaced = _beside(output, "replaced")
    if not replaced.exists():
        return
    staging = staging_of(output)
    descriptor = lock(staging) if staging.exists() else None
    if staging.exists() and descriptor is None:
        # Not killed: at it.
        return
    if output.is_dir() and _is_own(output):
        shutil.rmtree(replaced, ignore_errors=True)
    elif not output.exists() or (output.is_dir() and not any(output.iterdir())):
        # Renaming a folder replaces an empty one.
        replaced.rename(output)
    if descriptor is not None:
        os.close(descriptor)


def check_leftovers(output: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse to write where an earlier run has left finished work, unless told what to do with it.

    Parameters
    ----------
    output : Path
        Resolved.
    overwrite : bool
        Whether to give up what was left.
    resume : bool
        Whether to go on with it.

    Raises
    ------
    UsageError
        If it is neither, or another process is still at it.
    """
    left = staging_of(output)
    if not left.is_dir():
        return
    descriptor = lock(left)
    if descriptor is None:
        raise UsageError(f"{output}: another process is writing it")
    os.close(descriptor)
    _refuse_leftovers(output, overwrite=overwrite, resume=resume)


def _refuse_leftovers(output: Path, *, overwrite: bool, resume: bool) -> None:
    left = staging_of(output)
    if overwrite or resume or not Journal(left).records:
        return
    raise UsageError(
        f"{output}: an earlier run ended early, and left what it had finished in {left}; --resume "
        "goes on with it, --overwrite starts afresh"
    )


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


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
    if not _is_own(path):
        raise UsageError(
            f"{output} is not replaced: it is neither empty nor a checkpoint of lorap "
            f"(expected a {REPORT}, and a {CONFIG} of a compressed model; or a {EXPORT})"
        )
    foreign = list(_foreign_entries(path))
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise UsageError(
            f"{output} is not replaced: lorap did not write {', '.join(foreign[:3])}{more} there, "
            "which would be lost"
        )


def _is_own(folder: Path) -> bool:
    """Whether a folder says of itself that lorap wrote it."""
    if (folder / EXPORT).is_file():
        return True
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
    context without a commit, by an exception or not, removes that folder. With a `run` it stays if
    its journal records something, unless the run cannot be done at all (``LorapError``); that a
    complete checkpoint does not find its place free is no such case.

    Parameters
    ----------
    output : str or Path
        The folder that shall hold the checkpoint.
    overwrite : bool
        As for :func:`check_output`.
    run : mapping, optional
        All that the checkpoint depends on, as JSON can hold it: makes the run one that can be
        resumed, by another one that is given the same.
    resume : bool
        Whether to go on with what an earlier run has left, if it has left anything.
    shards : int, optional
        How many there will be, where it is known; needed for a run that can be resumed.

    Attributes
    ----------
    output : Path
    journal : Journal
        Of a run that can be resumed.

    Raises
    ------
    UsageError
        As :func:`check_output` and :func:`check_leftovers`.
    """

    journal: Journal

    def __init__(
        self,
        output: str | Path,
        *,
        overwrite: bool = False,
        run: Mapping[str, Any] | None = None,
        resume: bool = False,
        shards: int | None = None,
    ) -> None:
        self.output = check_output(output, overwrite=overwrite)
        self._overwrite = overwrite
        self._run = run
        self._resume = resume
        self._staging = self._sibling("partial") if run is None else staging_of(self.output)
        self._lock: int | None = None
        self._made: list[Path] = []
        self._shards: list[dict[str, Tensor]] = []
        self._count = shards
        self._complete = False

    def _sibling(self, suffix: str) -> Path:
        # Without the output's name, which may leave no room for more.
        return self.output.parent / f".lorap-{secrets.token_hex(4)}.{suffix}"

    def _aside(self) -> Path:
        """Return where the checkpoint goes that this one replaces."""
        # Under a lock, in a place where another run finds it if this one is killed.
        known = _beside(self.output, "replaced")
        return self._sibling("replaced") if self._run is None or known.exists() else known

    @property
    def folder(self) -> Path:
        """The folder that is being written, until the commit."""
        return self._staging

    def __enter__(self) -> Self:
        self._made = _missing_folders(self._staging.parent)
        if self._run is None:
            # mkdtemp would leave a checkpoint that only its writer can read.
            self._staging.mkdir(parents=True)
            return self
        self._staging.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self._staging)
        if self._lock is None:
            raise UsageError(f"{self.output}: another process is writing it")
        try:
            self.journal = Journal(self._staging)
            if self._resume and self.journal.records:
                self.journal.resume(self._run)
            else:
                _refuse_leftovers(self.output, overwrite=self._overwrite, resume=self._resume)
                _empty(self._staging)
                self.journal.begin(self._run)
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # What a run of these settings cannot do, it cannot do when it is resumed either.
        hopeless = (
            isinstance(error, LorapError)
            and not isinstance(error, ResumableError)
            and not self._complete
        )
        if self._run is None or hopeless or not self.journal.records:
            shutil.rmtree(self._staging, ignore_errors=True)
        elif error is not None:
            error.add_note(
                f"what was finished is kept in {self._staging}, and --resume goes on with it"
            )
        self._release()
        for folder in self._made:
            # Another run may have put something there meanwhile.
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_shard(self, tensors: Mapping[str, Tensor]) -> str:
        """Write the next shard.

        Parameters
        ----------
        tensors : mapping
            Full name, as in the model's state dict, to tensor; any device.

        Returns
        -------
        str
            Name of the file.

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
        file = self._shard_name(len(self._shards) + 1)
        self.write_safetensors(file, tensors)
        self.adopt_shard(tensors)
        return file

    def adopt_shard(self, tensors: Mapping[str, Tensor]) -> None:
        """Count the next shard as written: an earlier run wrote it, with these tensors."""
        # Names, shapes and types are all that the commit needs to know.
        self._shards.append(
            {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        )

    def load_shard(self, file: str) -> dict[str, Tensor]:
        """Return the tensors of a shard that was written, in memory of their own."""
        # Not mapped, so that the file's pages do not stay resident.
        return load((self._staging / file).read_bytes())

    def _shard_name(self, number: int) -> str:
        if self._count is None:
            return f"model-{number:05d}.safetensors"
        return f"model-{number:05d}-of-{self._count:05d}.safetensors"

    def write_safetensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a safetensors file of that name."""
        file = self._staging / name
        stored = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(stored, file, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read.
        file.chmod(self._staging.stat().st_mode & 0o666)
        sync(file)

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
        sync(file)

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
        if outer is None:
            self._write_bytes(modeling_file().name, modeling_file().read_bytes())
        architecture = f"{family.class_prefix}ForCausalLM"
        return self._finish(config, family.tensor_shapes(config), architecture, {}, outer)

    def commit_stock(
        self,
        family: Family,
        config: PretrainedConfig,
        expected: Mapping[str, tuple[int, ...]],
        outer: PretrainedConfig | None = None,
    ) -> Path:
        """Finish a checkpoint of a family's stock architecture and put it in its place.

        Parameters
        ----------
        family : Family
        config : PretrainedConfig
            Of the stock architecture; not changed.
        expected : mapping
            Name to shape of the tensors that it asks for.
        outer : PretrainedConfig, optional
            As for :meth:`commit`.

        Returns
        -------
        Path
            The output folder.

        Raises
        ------
        LorapError, UsageError
            As :meth:`commit`.
        """
        fields = family.other_spelling(config)
        return self._finish(config, expected, family.stock_class, fields, outer)

    def _finish(
        self,
        config: PretrainedConfig,
        expected: Mapping[str, tuple[int, ...]],
        architecture: str,
        fields: Mapping[str, Any],
        outer: PretrainedConfig | None,
    ) -> Path:
        """Write config.json, with further `fields` in it, and rename the folder."""
        written = {name: tensor for shard in self._shards for name, tensor in shard.items()}
        prefix = "" if outer is None else MULTIMODAL[outer.model_type]
        inner = {n.removeprefix(prefix): t for n, t in written.items() if n.startswith(prefix)}
        _check_tensors(inner, expected)
        config = copy.deepcopy(config)
        if config.dtype is None:
            config.dtype = next(iter(inner.values())).dtype
        if outer is None:
            config.architectures = [architecture]
        else:
            outer = copy.deepcopy(outer)
            outer.text_config = config
        values = json.loads((outer or config).to_json_string(use_diff=True))
        (values if outer is None else values["text_config"]).update(fields)
        self.write_text(CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")
        self._name_shards()
        sync(self._staging)
        self._complete = True
        self._rename()
        if self._run is not None:
            self.journal.remove(self.output)
        return self.output

    def _name_shards(self) -> None:
        names = [self._shard_name(number) for number in range(1, len(self._shards) + 1)]
        if self._count is None:
            if len(names) == 1:
                (self._staging / names[0]).rename(self._staging / WEIGHTS)
                return
            self._count = len(names)
            for number, name in enumerate(names, start=1):
                (self._staging / name).rename(self._staging / self._shard_name(number))
        assert self._count == len(names)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            weight_map |= dict.fromkeys(shard, self._shard_name(number))
        size = sum(tensor.nbytes for shard in self._shards for tensor in shard.values())
        # In one order, whether a shard was written by this run or taken over.
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        self.write_json(INDEX, index)

    def _rename(self) -> None:
        check_output(self.output, overwrite=self._overwrite)
        with _signals_held():
            replaced = self._aside() if self.output.exists() else None
            if replaced is not None:
                self.output.rename(replaced)
            try:
                self._staging.rename(self.output)
            except OSError:
                if replaced is not None:
                    replaced.rename(self.output)
                raise
            sync(self.output.parent)
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


def _missing_folders(path: Path) -> list[Path]:
    """Return the folders that ``mkdir(parents=True)`` would make for `path`, the deepest first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _existing_ancestor(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _size(size: int) -> str:
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB")
    return f"{size / unit:.2f} {name}"
