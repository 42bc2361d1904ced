"""The scores of gradients, recomputed from the original: a backward in the same two runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lorap.audit.comparisons import within_noise
from lorap.audit.context import Context
from lorap.audit.forward import Compute, Pair, Runs
from lorap.audit.inputs import live
from lorap.audit.results import ModuleAudit
from lorap.audit.selections import unit_scores
from lorap.errors import LorapError
from lorap_reference import gradient, importance, llama

Array = NDArray[np.float64]
Stream = Pair[NDArray[Any]]
"""Residual stream ``(N, L, d)`` in both runs, or the gradient of the loss by it."""


def audit_gradients(
    context: Context,
    runs: Runs,
    ids: NDArray[np.int64],
    inputs: Sequence[Stream],
    chosen: Sequence[int],
    advance: Callable[[], None],
) -> Iterator[ModuleAudit]:
    """Run the original back from its loss, and compare the recorded scores of the chosen layers.

    Parameters
    ----------
    context : Context
    runs : Runs
        Behind the last layer of the original.
    ids : (N, L)
    inputs : sequence of Pair
        The residual stream before each layer.
    chosen : sequence of int
        Ascending; the layers before the first one are not run.
    advance : callable
        Called after each layer.

    Raises
    ------
    LorapError
        If a gradient is not finite.
    """
    compute, shape = context.compute, context.shape
    targets = gradient.targets(ids)
    dy = _head_backward(context, runs, ids)
    for index in reversed(range(chosen[0], shape.layers)):
        given = context.reader.load(f"{context.reader.family.layers_path}.{index}.")
        weights = compute.weights(given)
        totals: Pair[dict[str, Array]] = Pair({}, {})
        before = inputs[index]
        for batch in runs.batches:
            for wrap, layer, h, d, total in (
                (plain, weights.exact, before.exact, dy.exact, totals.exact),
                (rounder(compute), weights.rounded, before.rounded, dy.rounded, totals.rounded),
            ):
                layer = {name: wrap(weight) for name, weight in layer.items()}
                d[batch], found = gradient.layer_backward(
                    layer, shape, wrap(h[batch]), wrap(d[batch])
                )
                for name, value in found.items():
                    total[name] = total.get(name, 0.0) + np.asarray(value, dtype=np.float64)
        if not all(np.isfinite(d).all() for d in (dy.exact, dy.rounded)):
            raise LorapError(f"layers.{index}: the gradient of the loss holds NaN or inf")
        if index in chosen:
            yield from _audit_scores(context, index, given, totals, targets)
        advance()


def _head_backward(context: Context, runs: Runs, ids: NDArray[np.int64]) -> Stream:
    """Gradient of the SUM of the cross-entropies by the output of the last layer.

    As lorap takes it: the gradient of the mean would vanish in float16.
    """
    family, reader, compute = context.reader.family, context.reader, context.compute
    name = family.head if family.head in reader.tensors else family.embedding
    head, gain = (
        compute.weights(reader.load(n)) for n in (name, f"{family.base_prefix}norm.weight")
    )
    eps = context.shape.rms_eps
    dy = Pair(np.zeros_like(runs.h.exact), np.zeros_like(runs.h.rounded))
    for n, tokens in enumerate(ids):
        for wrap, W, g, h, d in (
            (plain, head.exact[""], gain.exact[""], runs.h.exact, dy.exact),
            (rounder(compute), head.rounded[""], gain.rounded[""], runs.h.rounded, dy.rounded),
        ):
            W, g, x = wrap(W), wrap(g), wrap(h[n, :-1])
            # lorap takes the cross-entropy in float32, whatever the dtype of the logits.
            logits = np.asarray(llama.rms_norm(x, g, eps) @ W.T)
            dx = wrap(gradient.cross_entropy_backward(logits, tokens[1:])) @ W
            d[n, :-1] = gradient.rms_norm_backward(x, g, eps, dx)[0]
    return dy


def _audit_scores(
    context: Context,
    index: int,
    given: Mapping[str, Tensor],
    totals: Pair[dict[str, Array]],
    targets: int,
) -> Iterator[ModuleAudit]:
    """Compare the recorded scores of a layer's channels and heads."""
    settings, family = context.record.settings, context.reader.family
    for sublayer in settings.pruned_sublayers:
        linears = family.attention if sublayer == "mha" else family.ffn
        W = {role: given[f"{name}.weight"].double().numpy() for role, name in linears.items()}
        exact, rounded = (
            unit_scores(
                {
                    role: importance.taylor_importance(weight, G[f"{linears[role]}.weight"])
                    for role, weight in W.items()
                },
                sublayer,
                context.shape.kv_heads,
                settings.aggregation,
            )
            / targets
            for G in (totals.exact, totals.rounded)
        )
        name = f"layers.{index}.{sublayer}.scores"
        unit = live(exact)
        checks = within_noise(
            "scores by gradients",
            np.abs(context.record.recorded(name, exact.shape) - exact) / unit,
            np.abs(rounded - exact) / unit,
            context.compute.eps,
        )
        yield ModuleAudit(name, "", checks)


def plain(x: NDArray[Any]) -> NDArray[Any]:
    """Return what is given: the other of ``rounder``."""
    return x


def rounder(compute: Compute) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """Return what makes an array one whose operations are all rounded.

    NumPy hands it every operation of the code that it is put into, so that the reference's own
    backward runs with a rounding after each of them.
    """

    class Rounded(np.ndarray[Any, np.dtype[Any]]):
        def __array_ufunc__(
            self, ufunc: np.ufunc, method: Any, *inputs: Any, out: Any = None, **kwargs: Any
        ) -> Any:
            plain = [x.view(np.ndarray) if isinstance(x, Rounded) else x for x in inputs]
            result = compute.round(getattr(ufunc, method)(*plain, **kwargs)).view(Rounded)
            if out is not None:
                out[0][...] = result.view(np.ndarray)
            return result

    return lambda x: compute.round(x).view(Rounded)
