"""What is known of the inputs of a layer's linears: recomputed in two runs, and recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lorap.audit.comparisons import within_noise
from lorap.audit.forward import Pair, Step
from lorap.audit.record import Record
from lorap.audit.results import Check
from lorap.audit.sizes import Module
from lorap.config import CompressionConfig, Sublayer
from lorap.errors import LorapError
from lorap_reference import statistics

Array = NDArray[np.float64]
Method = Literal["awsvd", "svd", "asvd", "pca", "afm"]
Input = Literal["attention", "o", "ffn", "down"]
Statistic = Literal["squares", "magnitudes", "sum", "moment"]

INPUT_OF: Mapping[str, Input] = {
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "o": "o",
    "gate": "ffn",
    "up": "ffn",
    "down": "down",
}
"""Role of a linear to the field of ``llama.LayerTrace`` that is its input."""

TOLD: Mapping[Method, frozenset[Statistic]] = {
    "svd": frozenset(),
    "awsvd": frozenset({"squares"}),
    "asvd": frozenset({"magnitudes"}),
    "pca": frozenset({"moment"}),
    "afm": frozenset({"moment", "sum"}),
}
"""What a low-rank method is told of an input (rule ``algorithm.low-rank``)."""

TAKEN: Mapping[Statistic, Callable[[Array], Array]] = {
    "squares": statistics.sum_of_squares,
    "magnitudes": statistics.sum_of_magnitudes,
    "sum": statistics.token_sum,
    "moment": statistics.second_moment,
}
"""Statistic to what takes it of the tokens ``(n, d_in)``."""


def low_rank_method(settings: CompressionConfig, sublayer: Sublayer) -> Method:
    """Return the low-rank method of a sub-layer whose modules are factored."""
    method = settings.mha if sublayer == "mha" else settings.ffn
    assert method != "heads"
    assert method != "channels"
    return method


def needed(module: Module, role: str, settings: CompressionConfig) -> frozenset[Statistic]:
    """Return what a module was compressed by, of the input of its linear of that role."""
    if module.rank is not None:
        return TOLD[low_rank_method(settings, module.sublayer)]
    if module.band is None:
        return frozenset()
    one_by_one = module.unit == "channels" and settings.selection == "obs"
    if role in ("o", "down") and (one_by_one or settings.update != "none"):
        return frozenset({"moment"})
    if settings.importance == "activation" and not one_by_one:
        return frozenset({"squares"})
    return frozenset()


Sums = Mapping[Statistic, Pair[Array]]


def collect(
    steps: Iterable[Step],
    modules: Iterable[Module],
    needs: Callable[[Module, str], frozenset[Statistic]],
    where: str,
) -> dict[Input, Sums]:
    """Take sums over the tokens of a layer's inputs, in both runs.

    Parameters
    ----------
    steps : iterable of Step
        The forward of the uncompressed layer; used up.
    modules : iterable of Module
        Of the layer.
    needs : callable
        What a module needs of the input of its linear of that role.
    where : str
        What the layer is, for the error.

    Returns
    -------
    dict
        By input, what was asked for: ``(d_in,)``, or ``(d_in, d_in)`` for a moment.

    Raises
    ------
    LorapError
        If an input is not finite.
    """
    wanted: dict[Input, set[Statistic]] = {}
    for module in modules:
        for role in module.roles:
            if needs(module, role):
                wanted.setdefault(INPUT_OF[role], set()).update(needs(module, role))
    sums: dict[Input, dict[Statistic, Pair[Array]]] = {kind: {} for kind in wanted}
    for step in steps:
        for kind, names in wanted.items():
            exact = _tokens(getattr(step.trace.exact, kind))
            rounded = _tokens(getattr(step.trace.rounded, kind))
            for name in names:
                found = Pair(TAKEN[name](exact), TAKEN[name](rounded))
                before = sums[kind].get(name)
                if before is not None:
                    found = Pair(before.exact + found.exact, before.rounded + found.rounded)
                sums[kind][name] = found
    for kind, taken in sums.items():
        if not all(np.isfinite(pair.exact).all() for pair in taken.values()):
            raise LorapError(f"{where}: the input {kind} holds NaN or inf")
    return dict(sums.items())


def _tokens(x: NDArray[Any]) -> NDArray[Any]:
    return x.reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Vector:
    """A statistic with one number per feature.

    Attributes
    ----------
    recomputed : (d_in,)
        In float64, from the ids.
    recorded : (d_in,)
        What the layer was compressed with, as the checkpoint says.
    allowed : float
        Bound on the deviation of any one, over its unit.
    checks : tuple of Check
    """

    recomputed: Array
    recorded: Array
    allowed: float
    checks: tuple[Check, ...]


@dataclass(frozen=True)
class Inputs:
    """What is known of one input of a layer's linears.

    Attributes
    ----------
    tokens : int
    sums : mapping
        As ``collect`` gives them.
    vectors : mapping
        Those that are recorded: ``norms``, ``magnitudes``, ``sum``.
    """

    tokens: int
    sums: Sums
    vectors: Mapping[str, Vector]

    @property
    def checks(self) -> list[Check]:
        """Comparisons of what is recorded with what is recomputed."""
        return [check for vector in self.vectors.values() for check in vector.checks]


def against_record(
    sums: Sums, tokens: int, kind: Input, layer: int, record: Record, eps: float
) -> Inputs:
    """Compare what is recorded of an input with what was recomputed.

    Parameters
    ----------
    sums : mapping
        As ``collect`` gives them.
    tokens : int
    kind : str
        The input.
    layer : int
    record : Record
    eps : float
        Of the dtype of the forwards.

    Raises
    ------
    UsageError
        If something is not recorded.
    """
    pairs: dict[str, tuple[Pair[Array], str]] = {}
    norms = norms_of(sums)
    if norms is not None:
        pairs["norms"] = (norms, "norms")
    if "magnitudes" in sums:
        pairs["magnitudes"] = (sums["magnitudes"], "magnitudes")
    if "sum" in sums:
        pairs["sum"] = (sums["sum"], "sums")
    vectors = {}
    for name, (pair, plural) in pairs.items():
        recorded = record.recorded(f"layers.{layer}.{kind}.{name}", pair.exact.shape)
        # A sum may be zero where its terms are not: its unit is the norm of the terms.
        unit = live(norms.exact if name == "sum" and norms is not None else pair.exact)
        rms, largest = within_noise(
            f"{plural} of the inputs ({kind})",
            np.abs(recorded - pair.exact) / unit,
            np.abs(pair.rounded - pair.exact) / unit,
            eps,
        )
        vectors[name] = Vector(pair.exact, recorded, largest.bound, (rms, largest))
    return Inputs(tokens, sums, vectors)


def norms_of(sums: Sums) -> Pair[Array] | None:
    """Return the norms of the features, where their squares are known."""
    if "squares" in sums:
        squares = sums["squares"]
    elif "moment" in sums:
        moment = sums["moment"]
        squares = Pair(np.diag(moment.exact), np.diag(moment.rounded))
    else:
        return None
    return Pair(np.sqrt(squares.exact), np.sqrt(squares.rounded))


def live(x: Array) -> Array:
    """Return the units in which deviations of `x` are taken: its own, the largest where it is 0."""
    return np.where(x > 0, x, np.max(x, initial=0.0) or 1.0)
