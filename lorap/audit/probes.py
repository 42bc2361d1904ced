"""How much the model minds, recomputed: the probes run again, one module at a time made small."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorap.audit.comparisons import ROOM_LARGEST
from lorap.audit.context import Context, embedded
from lorap.audit.factors import factored
from lorap.audit.files import linear_name
from lorap.audit.forward import Pair, Runs
from lorap.audit.inputs import INPUT_OF, Input, Statistic, Sums
from lorap.audit.results import Check, ModuleAudit
from lorap.audit.sizes import Module, at_place, curve
from lorap_reference import joint, llama, marginal, regression
from lorap_reference.algorithm1 import PROBES

Array = NDArray[np.float64]


class Probes:
    """The probes on their way through the original, and through one with a small module for each.

    Parameters
    ----------
    context : Context
    ids : (N, L)
        Calibration samples; the first ones are taken.
    """

    def __init__(self, context: Context, ids: NDArray[np.int64]) -> None:
        self._context = context
        self._tokens = ids.size
        self._own = embedded(context, ids[:PROBES])
        self._small: dict[str, Runs] = {}

    def advance(
        self, index: int, given: Mapping[str, Tensor], sums: Mapping[Input, Sums] | None
    ) -> None:
        """Run all probes through a layer of the original.

        Parameters
        ----------
        index : int
        given : mapping
            Its tensors, names relative to it.
        sums : mapping or None
            What is known of its inputs; None where its own modules are not audited.
        """
        where = f"layers.{index} of the original"
        for runs in self._small.values():
            _run(runs, given, where)
        if sums is not None:
            for module in self._context.plan.layers[index].values():
                # What a recipe fixes is not probed; the plan has missed all that has to be there.
                if not self._context.record.has(f"{module.path}.divergence"):
                    continue
                count = len(curve(module, self._context.record)[0])
                found = at_place(module, marginal.middle(count), count)
                runs = copy.copy(self._own)
                runs.h = Pair(self._own.h.exact.copy(), self._own.h.rounded.copy())
                small = self._approximated(found, given, sums)
                _run(runs, {**given, **small.exact}, where, {**given, **small.rounded})
                self._small[module.path] = runs
        _run(self._own, given, where)

    def audited(self) -> Iterator[ModuleAudit]:
        """Compare the recorded divergences, by the noise of the probes' own ones.

        The noise is how far rounding, of the statistics too, moves their mean, or would move it if
        it moved the tokens independently.
        """
        logits = self._head()
        own = logits(self._own)
        for path, runs in self._small.items():
            exact, rounded = (_divergences(a, b) for a, b in zip(own, logits(runs), strict=True))
            mean, moved = float(np.mean(exact)), rounded - exact
            noise = np.hypot(np.mean(moved), np.sqrt(np.sum(moved**2)) / moved.size)
            name = f"{path}.divergence"
            recorded = float(self._context.record.recorded(name, ()))
            bound = ROOM_LARGEST * (float(noise) + self._context.compute.eps / 8 * mean)
            yield ModuleAudit(name, "", (Check("divergence", abs(recorded - mean), bound),))

    def _approximated(
        self, module: Module, given: Mapping[str, Tensor], sums: Mapping[Input, Sums]
    ) -> Pair[dict[str, Tensor]]:
        """Return the dense tensors that do what a module does at its size, in both runs.

        Channels are removed in the order recorded, which ``measurements`` compares.
        """
        if module.band is not None:
            name = f"{linear_name(self._context.reader.family, 'down')}.weight"
            W = given[name].double().numpy()
            order = self._context.record.removals(module.path, W.shape[1])[: module.band[1]]
            C = sums["down"]["moment"]
            return Pair(
                {name: self._refitted(W, C.exact, order)},
                {name: self._refitted(W, C.rounded, order)},
            )
        known = sums.get(INPUT_OF[module.roles[0]], {})
        return Pair(
            self._factored(module, given, {name: pair.exact for name, pair in known.items()}),
            self._factored(module, given, {name: pair.rounded for name, pair in known.items()}),
        )

    def _refitted(self, W: Array, C: Array, order: list[int]) -> Tensor:
        """Return down without channels, refitted on the others."""
        kept = np.setdiff1d(np.arange(W.shape[1]), order)
        new = np.zeros_like(W)
        ridge = self._context.record.settings.ridge
        new[:, kept] = regression.least_squares_update(W, C, kept, ridge)
        return torch.from_numpy(new)

    def _factored(
        self, module: Module, given: Mapping[str, Tensor], known: Mapping[Statistic, Array]
    ) -> dict[str, Tensor]:
        """Return the product of a module's factors, and its biases."""
        assert module.rank is not None
        settings = self._context.record.settings
        names = [linear_name(self._context.reader.family, role) for role in module.roles]
        parts = [given[f"{name}.weight"].double().numpy() for name in names]
        L, R, bias = factored(settings, module, joint.stacked(parts), known, self._tokens)
        rows = [part.shape[0] for part in parts]
        tensors = {}
        for name, product in zip(names, joint.split(L @ R, rows), strict=True):
            tensors[f"{name}.weight"] = torch.from_numpy(product)
        if bias is not None:
            for name, added in zip(names, joint.split(bias, rows), strict=True):
                before = given.get(f"{name}.bias")
                new = added if before is None else added + before.double().numpy()
                tensors[f"{name}.bias"] = torch.from_numpy(new)
        return tensors

    def _head(self) -> Callable[[Runs], tuple[NDArray[Any], NDArray[Any]]]:
        """Return what gives the logits of the probes, in both runs."""
        reader, compute = self._context.reader, self._context.compute
        family, eps = reader.family, self._context.shape.rms_eps
        name = family.head if family.head in reader.tensors else family.embedding
        head, gain = (
            compute.weights(reader.load(n)) for n in (name, f"{family.base_prefix}norm.weight")
        )

        def logits(runs: Runs) -> tuple[NDArray[Any], NDArray[Any]]:
            exact = llama.rms_norm(runs.h.exact, gain.exact[""], eps) @ head.exact[""].T
            h = runs.h.rounded.astype(np.float32)
            x = compute.norm(llama.rms_norm(h, gain.rounded[""].astype(np.float32), eps))
            return exact, compute.round(x.astype(compute.work) @ head.rounded[""].T)

        return logits


def _run(
    runs: Runs,
    tensors: Mapping[str, Tensor],
    where: str,
    rounded: Mapping[str, Tensor] | None = None,
) -> None:
    for _ in runs.advance(tensors, where, rounded):
        pass


def _divergences(Z: NDArray[Any], Z_hat: NDArray[Any]) -> Array:
    """Return the divergence of each token, ``(N * L,)``."""
    tokens = (z.reshape(-1, 1, z.shape[-1]).astype(np.float64) for z in (Z, Z_hat))
    pairs = zip(*tokens, strict=True)
    return np.array([marginal.divergence_sum(z, z_hat) for z, z_hat in pairs])
