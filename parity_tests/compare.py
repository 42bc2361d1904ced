"""Comparators: each takes what both sides gave, asserts, and records the share of its bound used.

A comparator never compares singular vectors one by one: their signs, and the basis of a degenerate
subspace, belong to the library. Products, projectors and singular values do not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from parity_tests import tolerances

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass
class Worst:
    """The comparison of a quantity that used most of its bound.

    Attributes
    ----------
    ratio : float
        Deviation in units of the bound, at most 1 in a passing run.
    deviation, bound : float
    comparisons : int
        How many were made.
    """

    ratio: float = 0.0
    deviation: float = 0.0
    bound: float = 0.0
    comparisons: int = 0


class Collector:
    """Worst comparison per quantity over a session."""

    def __init__(self) -> None:
        self.worst: dict[str, Worst] = {}

    def add(self, quantity: str, deviation: float, bound: float, ratio: float) -> None:
        """Record one comparison."""
        worst = self.worst.setdefault(quantity, Worst())
        worst.comparisons += 1
        if ratio > worst.ratio or worst.comparisons == 1:
            worst.ratio, worst.deviation, worst.bound = ratio, deviation, bound

    def merge(self, table: dict[str, dict[str, Any]]) -> None:
        """Take over the ``table`` of another process."""
        for quantity, row in table.items():
            comparisons = row["comparisons"]
            self.add(quantity, row["deviation"], row["bound"], row["ratio"])
            self.worst[quantity].comparisons += comparisons - 1

    def table(self) -> dict[str, dict[str, Any]]:
        """Return one row per quantity, by name."""
        return {quantity: asdict(self.worst[quantity]) for quantity in sorted(self.worst)}


_collectors = [Collector()]


def collector() -> Collector:
    """Return the collector in use."""
    return _collectors[-1]


@contextmanager
def recording() -> Iterator[Collector]:
    """Record into a collector of one's own: comparators under test leave the session's alone."""
    _collectors.append(Collector())
    try:
        yield _collectors[-1]
    finally:
        _collectors.pop()


def as_array(value: object) -> Array:
    """Return what either side gave as a float64 array."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def within(quantity: str, deviation: ArrayLike, bound: ArrayLike) -> float:
    """Assert ``deviation <= bound`` entry by entry.

    Parameters
    ----------
    quantity : str
        Name in the report.
    deviation, bound : broadcastable arrays
        Not negative.

    Returns
    -------
    float
        The largest deviation in units of its bound; a deviation of 0 counts as 0 at any bound.

    Raises
    ------
    AssertionError
        If it is above 1, or not a number.
    """
    deviation, bound = np.broadcast_arrays(
        np.asarray(deviation, dtype=np.float64), np.asarray(bound, dtype=np.float64)
    )
    if deviation.size == 0:
        collector().add(quantity, 0.0, 0.0, 0.0)
        return 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(deviation == 0, 0.0, deviation / bound)
    at = int(np.argmax(np.where(np.isnan(ratios), np.inf, ratios)))
    worst = float(ratios.flat[at])
    collector().add(quantity, float(deviation.flat[at]), float(bound.flat[at]), worst)
    assert worst <= 1, (
        f"{quantity}: deviation {deviation.flat[at]:.3e} where the bound is {bound.flat[at]:.3e}"
    )
    return worst


def close(quantity: str, ours: object, reference: object, bound: ArrayLike) -> float:
    """Assert that values agree entry by entry within an absolute bound."""
    a, b = as_array(ours), as_array(reference)
    assert a.shape == b.shape, f"{quantity}: shape {a.shape} where the reference has {b.shape}"
    return within(quantity, np.abs(a - b), bound)


def relatively_close(quantity: str, ours: object, reference: object, bound: float) -> float:
    """Assert that values agree entry by entry within `bound` times the reference's magnitude."""
    return close(quantity, ours, reference, bound * np.abs(as_array(reference)))


def exact(quantity: str, ours: object, reference: object) -> float:
    """Assert that values agree to the last bit: indices, ranks, counts, slices."""
    return close(quantity, ours, reference, 0.0)


def singular_values(
    quantity: str, ours: object, reference: object, shape: tuple[int, int], eps: float
) -> float:
    """Assert that singular values agree within ``tolerances.singular_values``."""
    S = as_array(reference)
    return close(quantity, ours, S, tolerances.singular_values(S, shape, eps))


def squared_singular_values(
    quantity: str, ours: object, reference: object, shape: tuple[int, int], delta: float = 0.0
) -> float:
    """Assert that singular values agree as far as a Gram matrix knows them: by their squares.

    Parameters
    ----------
    quantity : str
    ours, reference : (k,)
        Descending.
    shape : (int, int)
        Of the matrix.
    delta : float
        Distance of the two matrices, where the sides were not given the same.
    """
    S = as_array(reference)
    moved = delta * (2 * float(S[0]) + delta) if S.size else 0.0
    bound = tolerances.square_of_singular_values(S, shape) + moved
    return close(quantity, as_array(ours) ** 2, S**2, bound)


def spectral(quantity: str, ours: object, reference: object, bound: float) -> float:
    """Assert that matrices (products, projectors) agree within `bound` in the spectral norm."""
    a, b = as_array(ours), as_array(reference)
    assert a.shape == b.shape, f"{quantity}: shape {a.shape} where the reference has {b.shape}"
    return within(quantity, tolerances.spectral_norm(a - b), bound)


def kept_channels(
    quantity: str,
    ours: object,
    reference: object,
    C: Array,
    error: ArrayLike,
    cuts: tuple[int, int],
) -> bool:
    """Assert that the same channels are kept, but for scores at the cut closer than their bound.

    Parameters
    ----------
    quantity : str
    ours, reference : (width,)
        Indices of the kept channels.
    C : (d_m,)
        The reference's scores.
    error : (d_m,) or float
        Bound on the deviation of a score between the sides.
    cuts : (low, high)
        The removed band.

    Returns
    -------
    bool
        Whether they are the same.
    """
    mine, theirs = as_array(ours).astype(int), as_array(reference).astype(int)
    assert mine.shape == theirs.shape, f"{quantity}: {mine.size} kept, reference {theirs.size}"
    assert np.all(np.diff(mine) > 0), f"{quantity}: indices out of order"
    moved = np.setxor1d(mine, theirs)
    bound = np.broadcast_to(np.asarray(error, dtype=np.float64), C.shape)
    ascending = np.argsort(C, kind="stable")
    edges = [ascending[i] for cut in cuts for i in (cut - 1, cut) if 0 <= i < C.size]
    for channel in moved:
        # A channel changes sides only by passing one across the cut, which lies between them.
        nearest = min(abs(C[channel] - C[edge]) for edge in edges if edge != channel)
        within(quantity, nearest, bound[channel] + np.max(bound))
    if moved.size == 0:
        within(quantity, 0.0, 0.0)
    return moved.size == 0


def removals(
    quantity: str,
    order: Indices,
    W: Array,
    C: Array,
    ridge: float,
    delta: float = 0.0,
    relative: float = 0.0,
) -> bool:
    """Assert that each removal was the cheapest one left, but for costs closer than their bound.

    Parameters
    ----------
    quantity : str
    order : (count,)
        Input features in the order of their removal.
    W : (d_out, d_in)
    C : (d_in, d_in)
        ``second_moment`` of the inputs.
    ridge : float
    delta, relative : float
        As for ``tolerances.removal_cost``.

    Returns
    -------
    bool
        Whether the order is the only one within the bounds.
    """
    d, K = tolerances.correlation_of(C, ridge)
    V = W * d
    inverse = 1 / float(np.linalg.eigvalsh(K)[0]) if len(K) else 0.0
    gone: list[int] = []
    before, clear = 0.0, True
    for j in order:
        cost = np.full(len(d), np.inf)
        for candidate in np.setdiff1d(np.arange(len(d)), gone):
            # By its definition: the least error without all of these features, afresh.
            cost[candidate] = removed_error(V, K, [*gone, int(candidate)]) - before
        cheapest = float(np.min(cost))
        bound = 2 * tolerances.removal_cost(V, K, inverse, before + cost[j], delta, relative)
        within(quantity, cost[j] - cheapest, bound)
        others = np.delete(cost, j)
        clear &= not others.size or float(np.min(others)) - cost[j] > bound
        gone.append(int(j))
        before += float(cost[j])
    return clear


def removed_error(V: Array, K: Array, gone: list[int]) -> float:
    """Least ``trace(E K E^T)`` over the E with ``E_R = -V_R``: by the Schur complement of R."""
    kept = np.setdiff1d(np.arange(len(K)), gone)
    across = K[np.ix_(gone, kept)]
    schur = K[np.ix_(gone, gone)] - across @ np.linalg.solve(K[np.ix_(kept, kept)], across.T)
    return float(np.sum((V[:, gone] @ schur) * V[:, gone]))
