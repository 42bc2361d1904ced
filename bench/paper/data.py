"""What the cells are measured on: a model, and texts or token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from bench.sampling import CALIBRATION, EVALUATION, LENGTH, write_samples
from lorap.checkpoint.reader import read_config
from lorap.config import CompressionConfig
from lorap.data.sources import SplitRole, read_source
from lorap.errors import LorapError, UsageError
from lorap.evaluation.tasks import PAPER, find_tasks
from lorap.families import Family, family_of
from lorap.plan import Plan, draft_plan

SAMPLED = "sampled"
"""Stands for sequences that are sampled from the dense model."""

TRAINING = 2000
"""Rows that are sampled to train on."""


@dataclass(frozen=True)
class Data:
    """A model, and what it is calibrated, evaluated and trained with.

    Attributes
    ----------
    model : str
        A local folder or a hub name.
    folder : Path
        For sampled sequences, and for models in the making.
    calibration, training : str
        ``sampled``, or a source as ``lorap compress`` and ``lorap recover`` take it.
    evaluation : tuple of str
        Likewise, one or more.
    tasks : bool
        Whether the paper's seven tasks are run.
    seed : int
        Of what is sampled.
    """

    model: str
    folder: Path
    calibration: str = SAMPLED
    evaluation: tuple[str, ...] = (SAMPLED,)
    training: str = SAMPLED
    tasks: bool = False
    seed: int = 0

    @cached_property
    def config(self) -> Any:
        """Configuration of the model, or of the language model in it."""
        return read_config(self.model)

    @property
    def family(self) -> Family:
        """What is known of its type."""
        return family_of(self.config)

    @cached_property
    def dense(self) -> Plan:
        """A plan, for the sizes before it."""
        config = CompressionConfig(ratio=0.2, ratio_scope="layer")
        return draft_plan(self.config, self.family, config)

    def check(self, *, training: bool) -> None:
        """Find out whether all data can be had, before there is work to lose.

        Parameters
        ----------
        training : bool
            Whether the study trains.

        Raises
        ------
        UsageError
            Naming everything that cannot be had, and why. Nothing takes its place.
        """
        labels = [_label(source) for source in self.evaluation]
        if len(set(labels)) < len(labels):
            raise UsageError(f"--eval: expected different names, got {', '.join(labels)}")
        wanted: list[tuple[str, str, SplitRole]] = [
            ("--calibration", self.calibration, "calibration")
        ]
        wanted += [("--eval", source, "evaluation") for source in self.evaluation]
        if training:
            wanted.append(("--training", self.training, "training"))
        missing = []
        for option, source, role in wanted:
            if source != SAMPLED:
                try:
                    read_source(source, split_role=role)
                except LorapError as error:
                    missing.append(f"{option} {source}: {error}")
        if self.tasks:
            try:
                find_tasks([PAPER])
            except LorapError as error:
                missing.append(f"--tasks {PAPER}: {error}")
        if missing:
            raise UsageError(
                "\n  ".join(["not run, for want of data; nothing is put in its place:", *missing])
                + f"\nThe options take files, or {SAMPLED!r}; --tasks takes none."
            )

    def calibration_source(self, rows: int = CALIBRATION, length: int = LENGTH) -> str:
        """Return the source to calibrate with.

        Parameters
        ----------
        rows, length : int
            Of what is sampled: the rows that a choice is made from, and tokens in each.
        """
        if self.calibration != SAMPLED:
            return self.calibration
        if (rows, length) == (CALIBRATION, LENGTH):
            return str(self._base("calibration"))
        # One seed for all lengths: the shorter rows are the beginnings of the longer ones.
        return str(self._sampled(f"{rows}x{length}", rows, length, self.seed + 2))

    def evaluation_sources(self) -> dict[str, str]:
        """Return the sources to evaluate with, by a short name."""
        return {
            _label(source): str(self._base("evaluation")) if source == SAMPLED else source
            for source in self.evaluation
        }

    def training_source(self) -> str:
        """Return the source to train with."""
        if self.training != SAMPLED:
            return self.training
        return str(self._sampled("training", TRAINING, LENGTH, self.seed + 1))

    def identity(self) -> dict[str, Any]:
        """Return what tells these data from others: of files and folders, their contents."""
        return {
            "model": _identity(self.model),
            "calibration": _identity(self.calibration),
            "evaluation": [[_label(name), _identity(name)] for name in self.evaluation],
            "training": _identity(self.training),
            "tasks": self.tasks,
            "seed": self.seed,
        }

    def _base(self, kind: str) -> Path:
        """The samples of ``bench.quality``: calibration and evaluation rows from one draw."""
        folder = self._place()
        files = {folder / "calibration.npy": CALIBRATION, folder / "evaluation.npy": EVALUATION}
        self._sample(files, LENGTH, self.seed)
        return folder / f"{kind}.npy"

    def _sampled(self, name: str, rows: int, length: int, seed: int) -> Path:
        path = self._place() / f"{name}.npy"
        self._sample({path: rows}, length, seed)
        return path

    def _place(self) -> Path:
        folder = self.folder / "sampled" / f"{_identity(self.model)[:12]}-{self.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _sample(self, files: Mapping[Path, int], length: int, seed: int) -> None:
        from transformers import AutoModelForCausalLM

        if all(path.exists() for path in files):
            return
        model: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto")
        write_samples(model, files, length, seed)


def _label(source: str) -> str:
    """Return what stands for a source in a column's name."""
    path = Path(source).expanduser()
    return path.stem if path.is_file() else source


@lru_cache
def _identity(name: str) -> str:
    """Return a digest of a file, or of the files in a folder; of what is neither, of the name."""
    path = Path(name).expanduser()
    if path.is_file():
        return _digest(path)
    text = name
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        text = "\n".join(f"{file.name} {_digest(file)}" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
