"""Words for what messages and tables say."""

from __future__ import annotations

from collections.abc import Sequence


def spans(indices: Sequence[int]) -> str:
    """Return ascending numbers in words: 0, 1, 2, 5 is ``0-2, 5``."""
    found: list[list[int]] = []
    for index in indices:
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)


def short(count: int) -> str:
    """Return a count with four digits and a unit: 1234567 is 1.235M."""
    value, units = float(count), iter(("", "k", "M", "G", "T"))
    unit = next(units)
    while value >= 999.95 and unit != "T":
        value, unit = value / 1000, next(units)
    return f"{value:.4g}{unit}"


def duration(seconds: float) -> str:
    """Return a time in words: 9.3 s, 75 s is 1 min 15 s, 4000 s is 1 h 7 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def named(name: str) -> str:
    """Return what stands for a name where there is little room: of a path, its last part."""
    path = name.startswith(("/", "~", "."))
    return name.rstrip("/").rpartition("/")[2] if path else name
