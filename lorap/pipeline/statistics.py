"""Statistics of the linears' inputs, taken while a layer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorap.errors import LorapError
from lorap.ops.precision import all_finite
from lorap.ops.statistics import (
    feature_norms,
    second_moment,
    sum_of_magnitudes,
    sum_of_squares,
    token_sum,
)
from lorap.pipeline.forward import Batch, EnoughError
from lorap.pipeline.processes import ALONE, Processes

K = TypeVar("K", bound=str)
"""Name of an input: an ``Input``, or another where more than those of the dense linears count."""

Statistic = Literal["squares", "magnitudes", "sum", "moment"]
"""Sums over the tokens, of an input's squared features, of their magnitudes, of the features
themselves, and of the products of any two."""

Input = Literal["attention", "o", "ffn", "down"]
"""The inputs of a layer's linears: of q, k and v; of o; of gate and up; of down."""

INPUT_OF: Mapping[str, Input] = {
    "q": "attention",
    "k": "attention",
    "qk": "attention",
    "v": "attention",
    "o": "o",
    "gate": "ffn",
    "up": "ffn",
    "down": "down",
}
"""Role of a linear to the input that it has."""

TAKEN: dict[Statistic, Callable[[Tensor, Tensor | None], Tensor]] = {
    "squares": sum_of_squares,
    "magnitudes": sum_of_magnitudes,
    "sum": token_sum,
    "moment": second_moment,
}


@dataclass(frozen=True)
class InputStatistics:
    """What is known of one input over all calibration tokens.

    Attributes
    ----------
    tokens : int
        Tokens that count.
    sums : mapping
        By statistic, float64: ``(d_in,)``, or ``(d_in, d_in)`` for ``moment``.
    """

    tokens: int
    sums: Mapping[Statistic, Tensor]

    @property
    def norms(self) -> Tensor:
        """Eq. (5), ``(d_in,)``; the squares are the diagonal of the moment where that was taken."""
        squares = self.sums.get("squares")
        return feature_norms(self.sums["moment"].diagonal() if squares is None else squares)

    def vectors(self) -> dict[str, Tensor]:
        """Return what is small enough to be kept with a checkpoint: norms, and sums per feature."""
        vectors = {str(name): total for name, total in self.sums.items() if total.dim() == 1}
        vectors.pop("squares", None)
        if not {"squares", "moment"}.isdisjoint(self.sums):
            vectors["norms"] = self.norms
        return vectors


@dataclass(frozen=True)
class Wanted:
    """Statistics to take of one input.

    Attributes
    ----------
    module : str
        A module of the layer that has this input.
    statistics : frozenset
    """

    module: str
    statistics: frozenset[Statistic]


class Collector(Generic[K]):
    """Takes statistics of a layer's inputs while it runs, as a context manager.

    Parameters
    ----------
    layer : Module
        A decoder layer.
    wanted : mapping
    alone : bool
        Nothing else is wanted of the forwards: end each, by :class:`EnoughError`, once it has given
        the last of the inputs.

    Notes
    -----
    SPEC: ``stats.sum-of-squares``, ``stats.padding``.
    """

    def __init__(
        self, layer: nn.Module, wanted: Mapping[K, Wanted], *, alone: bool = False
    ) -> None:
        self._layer = layer
        self._wanted = wanted
        self._alone = alone
        self._missing: set[K] = set()
        self._tokens = 0
        self._mask: Tensor | None = None
        self._sums: dict[K, dict[Statistic, Tensor]] = {kind: {} for kind in wanted}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for kind, want in self._wanted.items():
            module = self._layer.get_submodule(want.module)
            self._handles.append(module.register_forward_pre_hook(self._listener(kind)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def expect(self, batch: Batch) -> None:
        """Say which batch the layer is run on next."""
        self._mask = batch.mask
        self._missing = set(self._wanted)
        self._tokens += batch.tokens

    def _listener(self, kind: K) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            wanted = self._wanted[kind].statistics
            add_to_(self._sums[kind], wanted, inputs[0].detach(), self._mask)
            self._missing.discard(kind)
            if self._alone and not self._missing:
                raise EnoughError

        return hook

    def statistics(self, index: int, processes: Processes = ALONE) -> dict[K, InputStatistics]:
        """Return what was taken, in all processes together.

        Parameters
        ----------
        index : int
            Of the layer, for the error.
        processes : Processes

        Raises
        ------
        LorapError
            If an input is not finite.
        """
        for taken in self._sums.values():
            sum_over_(processes, taken)
        (tokens,) = processes.total(self._tokens)
        for kind, taken in self._sums.items():
            check_input(self._layer, self._wanted[kind].module, index, taken.values())
        return {kind: InputStatistics(int(tokens), taken) for kind, taken in self._sums.items()}


def collect(
    layer: nn.Module,
    wanted: Mapping[K, Wanted],
    batches: Sequence[Batch],
    index: int,
    processes: Processes = ALONE,
) -> dict[K, InputStatistics]:
    """Run a layer over the batches, which stay where they are, as far as statistics are taken.

    Parameters
    ----------
    layer : Module
        Decoder layer `index`.
    wanted : mapping
    batches : sequence of Batch
        Those of this process.
    index : int
    processes : Processes

    Raises
    ------
    LorapError
        If an input is not finite.
    """
    with torch.no_grad(), Collector(layer, wanted, alone=True) as collector:
        for batch in batches:
            collector.expect(batch)
            batch.run_until(layer, index)
    return collector.statistics(index, processes)


def add_to_(
    sums: dict[Statistic, Tensor],
    wanted: Iterable[Statistic],
    inputs: Tensor,
    mask: Tensor | None,
) -> None:
    """Add statistics of further inputs.

    Parameters
    ----------
    sums : dict
        What was taken so far.
    wanted : iterable of str
    inputs : (batch, L, d_in)
    mask : (batch, L) Tensor or None
        Nonzero where a token counts.
    """
    for statistic in wanted:
        total = TAKEN[statistic](inputs, mask)
        sums[statistic] = sums[statistic] + total if statistic in sums else total


def sum_over_(processes: Processes, sums: Mapping[Statistic, Tensor]) -> None:
    """Add up what each process took of its samples."""
    # In the order of the names: that of a set differs from process to process.
    for _, total in sorted(sums.items()):
        processes.sum_(total)


def check_input(layer: nn.Module, module: str, index: int, totals: Iterable[Tensor]) -> None:
    """Raise LorapError where what was summed over an input is not finite.

    Parameters
    ----------
    layer : Module
        Decoder layer `index`.
    module : str
        The module of the layer that has the input.
    index : int
    totals : iterable of Tensor
    """
    if not all(all_finite(total) for total in totals):
        dtype = next(layer.parameters()).dtype
        raise LorapError(
            f"layers.{index}.{module}: its input holds NaN or inf; computed in {dtype}: a wider "
            "--dtype may help"
        )
