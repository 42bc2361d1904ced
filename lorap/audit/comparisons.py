"""Single comparisons: exact ones, bits, numbers within a bound, vectors within a noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorap.audit.results import Check

Array = NDArray[np.float64]

EPS64 = float(np.finfo(np.float64).eps)

ROOM_RMS, ROOM_LARGEST = 5.0, 10.0
"""Between the noise that the audit measures and what it allows: in a mean or a norm over many
values, and in the worst of them, which spreads more (SPEC, "Audit")."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def equal(name: str, expected: object, got: object) -> Check:
    """Compare two values, types included."""
    if expected == got and type(expected) is type(got):
        return Check(name, 0, 0)
    return Check(name, 1, 0, f"expected {expected!r}, got {got!r}")


def same_bits(name: str, expected: Tensor, got: Tensor) -> Check:
    """Compare bit by bit: 0 and -0 differ, and NaN equals itself."""
    bits = _BITS[expected.dtype.itemsize]
    differ = expected.contiguous().view(bits) != got.contiguous().view(bits)
    count = int(differ.sum())
    where = str(tuple(differ.nonzero()[0].tolist())) if count else ""
    return Check(name, count, 0, f"first at {where}" if count else "")


def number(name: str, expected: float, said: Mapping[str, Any], key: str, allowed: float) -> Check:
    """Compare a number that the report may lack with the one expected."""
    got = said.get(key)
    if isinstance(got, bool) or not isinstance(got, int | float):
        return Check(name, float("inf"), allowed, f"expected {expected!r}, got {got!r}")
    return Check(name, float(abs(got - expected)), float(allowed))


def worst(name: str, deviation: Array, bound: Array) -> Check:
    """Return the entry that uses most of its bound."""
    with np.errstate(divide="ignore", invalid="ignore"):
        usage = np.where(deviation == 0, 0.0, deviation / bound)
    at = np.unravel_index(int(np.argmax(np.where(np.isnan(usage), np.inf, usage))), usage.shape)
    where = f"at {tuple(int(i) for i in at)}"
    return Check(name, float(deviation[at]), float(bound[at]), where)


def within_noise(name: str, deviation: Array, noise: Array, eps: float) -> tuple[Check, Check]:
    """Compare a recorded vector with a recomputed one, by what rounding does to the latter.

    Parameters
    ----------
    name : str
    deviation : (k,)
        Distance of the recorded values, each over its unit.
    noise : (k,)
        Distance of the values of the rounded run, over the same units.
    eps : float
        Of the dtype of the forwards.

    Returns
    -------
    rms, largest : Check
        The bound of the second is that of any one value.
    """
    return (
        Check(f"{name}, rms", rms(deviation), ROOM_RMS * (rms(noise) + eps / 16)),
        Check(
            f"{name}, largest",
            float(np.max(deviation)),
            ROOM_LARGEST * (float(np.max(noise)) + eps / 8),
        ),
    )


def rms(x: Array) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(x**2)))
