"""How far apart two evaluations of the reference's own code may come out, entry by entry.

A ``Tracked`` array carries the spread of its distance between the two sides. NumPy hands it every
operation of the code that it is put into (``__array_ufunc__``, ``__array_function__``), and each
operation passes the spreads of its operands on and adds that of its own rounding, in quadrature.
It is the analysis of ``rounding``: to first order, roundings independent, ``CONFIDENCE`` spreads
for a bound. There, each piece of the forward has a function of its own that may be told of other
dtypes and of factors that are apart; here, all is float64 and the code itself is what is analysed,
so that the backward, several times as long, needs no second text.

An error that enters in two places is taken for two errors. A difference that cancels it comes out
too wide, a sum in which it adds up too narrow; ``test_tracked.py`` holds the spreads against errors
that are known.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import ArrayLike, NDArray

from lorap_reference import gradient, llama
from parity_tests.rounding import mapped, quadrature
from parity_tests.tolerances import EPS64, root

Array = NDArray[np.float64]

LIBRARY = 2.0
"""Units in the last place within which exponentials, logarithms and angles are known."""


class Tracked(NDArrayOperatorsMixin):
    """An array, and the spread of its distance between the two sides.

    Parameters
    ----------
    value : array
    spread : array or float
        Broadcast to the shape of `value`.
    """

    def __init__(self, value: ArrayLike, spread: ArrayLike = 0.0) -> None:
        self.value = np.asarray(value)
        self.spread = np.broadcast_to(np.asarray(spread, dtype=np.float64), self.value.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.value.shape

    @property
    def T(self) -> "Tracked":  # noqa: N802 - the name NumPy gives it
        """Transposed."""
        return self.transpose()

    def reshape(self, *shape: int) -> "Tracked":
        """Return it in another shape."""
        return Tracked(self.value.reshape(*shape), self.spread.reshape(*shape))

    def transpose(self, *axes: int) -> "Tracked":
        """Return it with its axes in another order."""
        return Tracked(self.value.transpose(*axes), self.spread.transpose(*axes))

    def __getitem__(self, key: Any) -> "Tracked":
        return Tracked(self.value[key], self.spread[key])

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if method != "__call__" or kwargs or ufunc not in UFUNCS:
            return NotImplemented
        return UFUNCS[ufunc](*map(tracked, inputs))

    def __array_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if function not in FUNCTIONS:
            return NotImplemented
        return FUNCTIONS[function](*args, **kwargs)


def tracked(x: Any) -> Tracked:
    """Return an operand as ``Tracked``; a plain one is known exactly."""
    return x if isinstance(x, Tracked) else Tracked(x)


def _add(a: Tracked, b: Tracked) -> Tracked:
    value = a.value + b.value
    return Tracked(value, quadrature(a.spread, b.spread, EPS64 * value))


def _subtract(a: Tracked, b: Tracked) -> Tracked:
    return _add(a, _negative(b))


def _negative(x: Tracked) -> Tracked:
    return Tracked(-1.0 * x.value, x.spread)


def _multiply(a: Tracked, b: Tracked) -> Tracked:
    value = a.value * b.value
    return Tracked(value, quadrature(a.spread * b.value, a.value * b.spread, EPS64 * value))


def _divide(a: Tracked, b: Tracked) -> Tracked:
    value = a.value / b.value
    return Tracked(value, quadrature(a.spread / b.value, value * b.spread / b.value, EPS64 * value))


def _power(base: Tracked, exponent: Tracked) -> Tracked:
    if np.all(exponent.value == 2):
        return Tracked(
            base.value**2, quadrature(2 * base.value * base.spread, EPS64 * base.value**2)
        )
    # The exponent was rounded too, even where it is plain.
    value, rounded = base.value**exponent.value, EPS64 * exponent.value
    of_base = exponent.value * base.spread / base.value
    of_exponent = np.log(base.value) * quadrature(exponent.spread, rounded)
    return Tracked(value, value * quadrature(of_base, of_exponent, LIBRARY * EPS64))


def _sqrt(x: Tracked) -> Tracked:
    value = np.sqrt(x.value)
    return Tracked(value, quadrature(x.spread / (2 * value), root() * value))


def _exp(x: Tracked) -> Tracked:
    value = np.exp(x.value)
    # What is masked out is minus infinity, of an unlimited rounding, and exactly 0 here.
    spread = np.where(value > 0, x.spread, 0.0)
    return Tracked(value, value * quadrature(spread, LIBRARY * EPS64))


def _log(x: Tracked) -> Tracked:
    value = np.log(x.value)
    return Tracked(value, quadrature(x.spread / x.value, LIBRARY * EPS64 * value))


def _cos(x: Tracked) -> Tracked:
    return Tracked(np.cos(x.value), quadrature(np.sin(x.value) * x.spread, LIBRARY * EPS64))


def _sin(x: Tracked) -> Tracked:
    return Tracked(np.sin(x.value), quadrature(np.cos(x.value) * x.spread, LIBRARY * EPS64))


def _matmul(a: Tracked, b: Tracked) -> Tracked:
    value = a.value @ b.value
    terms = np.sqrt(a.shape[-1]) * EPS64
    return Tracked(
        value,
        quadrature(
            mapped(a.spread, b.value),
            mapped(a.value, b.spread),
            terms * mapped(a.value, b.value),
            EPS64 * value,
        ),
    )


UFUNCS: dict[np.ufunc, Callable[..., Tracked]] = {
    np.add: _add,
    np.subtract: _subtract,
    np.negative: _negative,
    np.multiply: _multiply,
    np.true_divide: _divide,
    np.power: _power,
    np.sqrt: _sqrt,
    np.exp: _exp,
    np.log: _log,
    np.cos: _cos,
    np.sin: _sin,
    np.matmul: _matmul,
}


def _sum(x: Tracked, axis: int | None = None, keepdims: bool = False) -> Tracked:
    value = np.sum(x.value, axis=axis, keepdims=keepdims)

    def norm(a: Array) -> Array:
        return np.asarray(np.sqrt(np.sum(a**2, axis=axis, keepdims=keepdims)))

    terms = np.sqrt(x.value.size / max(value.size, 1)) * EPS64
    return Tracked(value, quadrature(norm(x.spread), terms * norm(x.value), EPS64 * value))


def _mean(x: Tracked, axis: int, keepdims: bool = False) -> Tracked:
    return _sum(x, axis, keepdims) / x.shape[axis]


def _max(x: Tracked, axis: int, keepdims: bool) -> Tracked:
    assert keepdims
    at = np.argmax(x.value, axis=axis, keepdims=True)
    return Tracked(np.take_along_axis(x.value, at, axis), np.take_along_axis(x.spread, at, axis))


def _where(condition: NDArray[np.bool_], a: Any, b: Any) -> Tracked:
    a, b = tracked(a), tracked(b)
    return Tracked(np.where(condition, a.value, b.value), np.where(condition, a.spread, b.spread))


def _repeat(x: Tracked, times: int, axis: int) -> Tracked:
    return Tracked(np.repeat(x.value, times, axis), np.repeat(x.spread, times, axis))


def _concatenate(parts: Sequence[Any], axis: int) -> Tracked:
    all_tracked = [tracked(part) for part in parts]
    return Tracked(
        np.concatenate([part.value for part in all_tracked], axis),
        np.concatenate([part.spread for part in all_tracked], axis),
    )


FUNCTIONS: dict[Callable[..., Any], Callable[..., Tracked]] = {
    np.sum: _sum,
    np.mean: _mean,
    np.max: _max,
    np.where: _where,
    np.repeat: _repeat,
    np.concatenate: _concatenate,
}


def turning(shape: llama.LlamaShape) -> llama.LlamaShape:
    """Return the shape with a tracked base: the roundings of the rotary angles come from it."""
    return replace(shape, rope_theta=Tracked(shape.rope_theta))


def stream(
    weights: Mapping[str, Array], shape: llama.LlamaShape, ids: NDArray[np.int64]
) -> list[Tracked]:
    """The residual stream before each layer and after the last, as in ``gradient.layer_inputs``."""
    h = [Tracked(llama.embed(weights, ids))]
    for index in range(shape.layers):
        layer = llama.layer_weights(weights, index)
        h.append(llama.layer_forward(layer, turning(shape), h[-1]).output)
    return h


def loss(weights: Mapping[str, Array], shape: llama.LlamaShape, ids: NDArray[np.int64]) -> Tracked:
    """``gradient.loss``, tracked."""
    h: Any = stream(weights, shape, ids)[-1]
    entropy: Any = gradient.cross_entropy(llama.head(weights, shape, h[:, :-1]), ids[:, 1:])
    return np.sum(entropy) / gradient.targets(ids)


def loss_gradients(
    weights: Mapping[str, Array], shape: llama.LlamaShape, ids: NDArray[np.int64]
) -> dict[str, Tracked]:
    """``gradient.loss_gradients``, tracked: the loop over the layers, with the same pieces."""
    inputs: list[Any] = list(stream(weights, shape, ids))
    h = inputs.pop()[:, :-1]
    logits = llama.head(weights, shape, h)
    dlogits = gradient.cross_entropy_backward(logits, ids[:, 1:]) / gradient.targets(ids)
    dh: Any
    dh, gradients = gradient.head_backward(weights, shape, h, dlogits)
    dh = np.concatenate([dh, np.zeros((len(ids), 1, dh.shape[-1]))], axis=1)
    for index in reversed(range(shape.layers)):
        layer = llama.layer_weights(weights, index)
        dh, relative = gradient.layer_backward(layer, turning(shape), inputs.pop(), dh)
        gradients |= {f"model.layers.{index}.{name}": value for name, value in relative.items()}
    vocabulary = len(weights[llama.EMBEDDINGS])
    places = (ids.reshape(-1, 1) == np.arange(vocabulary)).astype(np.float64)
    embeddings = gradient.outer(places, dh)
    gradients[llama.EMBEDDINGS] = gradients.get(llama.EMBEDDINGS, 0.0) + embeddings
    return gradients
