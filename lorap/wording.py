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
