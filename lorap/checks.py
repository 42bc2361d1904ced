"""Values of options, checked: numbers, whole numbers, choices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from lorap.errors import UsageError


def number(where: str, value: object) -> float:
    """Return a finite number, NumPy's kinds among them, as a float.

    Parameters
    ----------
    where : str
        Name of the option, for the error.
    value : object

    Raises
    ------
    UsageError
        If it is none.
    """
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if math.isfinite(found):
            return found
    raise UsageError(f"{where}: expected a number, got {value!r}")


def whole_number(where: str, value: object, minimum: int) -> int:
    """Return a whole number, NumPy's kinds among them, as an int.

    Parameters
    ----------
    where : str
        Name of the option, for the error.
    value : object
    minimum : int

    Raises
    ------
    UsageError
        If it is none, or too small.
    """
    if not isinstance(value, bool) and isinstance(value, Integral) and int(value) >= minimum:
        return int(value)
    raise UsageError(f"{where}: expected a whole number of at least {minimum}, got {value!r}")


def choice(where: str, value: object, choices: Sequence[str]) -> None:
    """Raise UsageError unless a value is one of the choices.

    Parameters
    ----------
    where : str
        Name of the option, for the error.
    value : object
    choices : sequence of str
    """
    if value not in choices:
        raise UsageError(f"{where}: expected one of {', '.join(choices)}, got {value!r}")
