"""What a recovery is asked to do: ``RecoveryConfig``, with the defaults of Table 14."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lorap import checks
from lorap.config import Device, DType
from lorap.errors import UsageError

Target = Literal["matrices", "factors"]

SMALLEST_SHARE = 10
"""A bound that a small data set sets: validation and warm-up take a tenth at most."""

EVALUATIONS = 4
"""The fewest evaluations of a run, however short."""


@dataclass(frozen=True)
class RecoveryConfig:
    """The settings of a recovery; every field is an option of ``lorap recover``.

    Attributes
    ----------
    on : {"matrices", "factors"}
        Where the updates are: one around each matrix, factored or not (Eq. (12), (13)); or one on
        each of the two factors.
    rank : int
        Of an update.
    alpha : float
        The factor of an update is ``alpha / rank``.
    dropout : float
        Share of an update's inputs that is left out at random while training, below 1.
    learning_rate : float
        At its highest, after the warm-up; it then falls linearly to 0.
    batch : int
        Samples in a step.
    micro_batch : int
        Samples in a forward, per process.
    epochs : float
        Passes over the data.
    warmup : int
        Steps over which the learning rate rises; a tenth of all steps at most.
    cutoff : int
        Tokens that are kept of a sample.
    validation : int
        Samples held out; a tenth of all at most.
    evaluate_every, save_every : int
        Steps between evaluations, and between checkpoints to resume from.
    seed : int
        Of the split, the order, the first updates and the dropout.
    device : {"auto", "cpu", "cuda"}
    dtype : str or None
        Of the forwards; None takes bfloat16, or float16 where the GPU has no bfloat16, and float32
        on a CPU. Updates are float32 always.

    Raises
    ------
    UsageError
        If a value is out of range; the message names the option.
    """

    on: Target = "matrices"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    learning_rate: float = 1e-4
    batch: int = 64
    micro_batch: int = 4
    epochs: float = 2.0
    warmup: int = 100
    cutoff: int = 256
    validation: int = 2000
    evaluate_every: int = 100
    save_every: int = 200
    seed: int = 42
    device: Device = "auto"
    dtype: DType | None = None

    def __post_init__(self) -> None:
        checks.choice("on", self.on, get_args(Target))
        for name, minimum in (
            ("rank", 1),
            ("batch", 1),
            ("micro_batch", 1),
            ("warmup", 0),
            ("cutoff", 2),
            ("validation", 0),
            ("evaluate_every", 1),
            ("save_every", 1),
            ("seed", 0),
        ):
            object.__setattr__(self, name, checks.whole_number(name, getattr(self, name), minimum))
        for name in ("alpha", "learning_rate", "epochs"):
            object.__setattr__(self, name, checks.number(name, getattr(self, name)))
            if getattr(self, name) <= 0:
                raise UsageError(f"{name}: expected more than 0, got {getattr(self, name)!r}")
        object.__setattr__(self, "dropout", checks.number("dropout", self.dropout))
        if not 0 <= self.dropout < 1:
            raise UsageError(
                f"dropout: expected a share of at least 0 and below 1, got {self.dropout!r}"
            )
        checks.choice("device", self.device, get_args(Device))
        if self.dtype is not None:
            checks.choice("dtype", self.dtype, get_args(DType))
            if self.dtype == "float64":
                raise UsageError("dtype: expected float32, bfloat16 or float16, got 'float64'")

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, for the record."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Schedule:
    """The steps of a training.

    Attributes
    ----------
    steps : int
        In all.
    warmup : int
    evaluate_every, save_every : int
    accumulation : int
        Forwards of a process in a step.
    """

    steps: int
    warmup: int
    evaluate_every: int
    save_every: int
    accumulation: int


def held_out(samples: int, wanted: int) -> int:
    """Return how many samples validate: as many as wanted, a tenth of all at most.

    SPEC: ``recovery.split``.
    """
    return min(wanted, samples // SMALLEST_SHARE)


def schedule(config: RecoveryConfig, samples: int, processes: int = 1) -> Schedule:
    """Return the steps that a number of training samples makes.

    Parameters
    ----------
    config : RecoveryConfig
    samples : int
        To train on.
    processes : int

    Raises
    ------
    UsageError
        If the batch cannot be shared out evenly.

    Notes
    -----
    SPEC: ``recovery.schedule``.
    """
    at_once = config.micro_batch * processes
    if config.batch % at_once:
        each = "" if processes == 1 else f" in each of {processes} processes"
        raise UsageError(
            f"batch {config.batch}: expected a multiple of the {config.micro_batch} samples of a "
            f"micro-batch{each}"
        )
    # As the Trainer counts: the last step of a pass takes what is left.
    per_epoch = math.ceil(math.ceil(samples / at_once) / (config.batch // at_once))
    steps = math.ceil(per_epoch * config.epochs)
    evaluate_every = min(config.evaluate_every, math.ceil(steps / EVALUATIONS))
    return Schedule(
        steps=steps,
        warmup=min(config.warmup, steps // SMALLEST_SHARE),
        evaluate_every=evaluate_every,
        save_every=min(config.save_every, math.ceil(steps / EVALUATIONS)),
        accumulation=config.batch // at_once,
    )
