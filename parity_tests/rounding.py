"""How far apart two evaluations of one decoder layer may come out, entry by entry.

A running error analysis to first order, and a probabilistic one: roundings are taken for
independent errors of mean zero, which add up in quadrature (Higham and Mary, SIAM J. Sci. Comput.
41, 2019: an inner product of n terms errs by ``lambda * sqrt(n) * eps / 2`` at most, with a
probability of ``1 - 2 exp(-lambda^2 / 2)``). Worst-case bounds would grow by some 10^4 in a layer
that is 128 wide, and prove nothing after two. Each function mirrors one of
``lorap_reference.llama``, takes the spread of the distance of its inputs between the two sides, and
adds that of what both sides round. ``CONFIDENCE`` spreads are the bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorap_reference import llama
from parity_tests.tolerances import CONFIDENCE, EPS64, root_of_positive_sum

Array = NDArray[np.float64]
Weights = Mapping[str, Array]


@dataclass(frozen=True)
class Known:
    """An array, and the spread of its distance between the two sides."""

    value: Array
    spread: Array


@dataclass(frozen=True)
class Precision:
    """Spacing of the dtypes that one side computes in; the reference is float64 throughout.

    Attributes
    ----------
    linear : float
        Of everything not named below.
    norm : float
        Of RMSNorm, for which transformers converts to float32 whatever the model's dtype.
    rotary : float
        Of the rotary angles, likewise.
    """

    linear: float = EPS64
    norm: float = EPS64
    rotary: float = EPS64


@dataclass(frozen=True)
class LayerSpreads:
    """Spreads of the distance of what ``lorap_reference.llama.LayerTrace`` holds."""

    attention: Array
    o: Array
    middle: Array
    ffn: Array
    down: Array
    output: Array


@dataclass(frozen=True)
class Layer:
    """A decoder layer, and how far its factored weights are apart.

    Attributes
    ----------
    weights : mapping
        Names relative to the layer.
    shape : llama.LlamaShape
    deviations : mapping
        Bound on the spectral norm of the distance of the products, by name of the linear; 0 where
        not named.
    precision : Precision
    """

    weights: Weights
    shape: llama.LlamaShape
    deviations: Mapping[str, float] = field(default_factory=dict)
    precision: Precision = field(default_factory=Precision)


def quadrature(*spreads: Array | float) -> Array:
    """Spread of a sum of independent errors."""
    return np.asarray(np.sqrt(sum(np.square(spread) for spread in spreads)))


def mapped(spread: Array, A: Array) -> Array:
    """Spread of ``x A`` from that of ``x``."""
    return np.asarray(np.sqrt(spread**2 @ A**2))


def linear(layer: Layer, name: str, x: Known) -> Known:
    """A dense or factored linear."""
    eps, weights = layer.precision.linear, layer.weights
    value = llama.linear(weights, name, x.value)
    if f"{name}.weight" in weights:
        W = weights[f"{name}.weight"]
        rounding = np.sqrt(W.shape[1]) * mapped(x.value, W.T)
        bias = weights.get(f"{name}.bias")
    else:
        L, R = weights[f"{name}.left.weight"], weights[llama.right_name(weights, name)]
        W = L @ R
        inner = np.sqrt(R.shape[1]) * mapped(x.value, R.T)
        rounding = quadrature(mapped(inner, L.T), np.sqrt(R.shape[0]) * mapped(x.value @ R.T, L.T))
        bias = weights.get(f"{name}.left.bias")
    if bias is not None:
        rounding = quadrature(rounding, bias)
    # A vector of at most this norm, in no particular direction.
    size = np.linalg.norm(x.value, axis=-1, keepdims=True) / np.sqrt(W.shape[0])
    deviation = layer.deviations.get(name, 0.0) * size
    return Known(value, quadrature(mapped(x.spread, W.T), eps * rounding, eps * value, deviation))


def rms_norm(layer: Layer, name: str, x: Known) -> Known:
    """RMSNorm: the derivative's two terms, half the error of the mean of d squares, a few steps."""
    gain, eps, d = layer.weights[name], layer.precision.norm, x.value.shape[-1]
    value = llama.rms_norm(x.value, gain, layer.shape.rms_eps)
    square = np.mean(x.value**2, axis=-1, keepdims=True) + layer.shape.rms_eps
    direct = gain * x.spread / np.sqrt(square)
    mean = np.linalg.norm(x.value * x.spread, axis=-1, keepdims=True) / d
    by_mean = value * mean / square
    rounding = (np.sqrt(d) / 2 + 4) * eps * value
    return Known(value, quadrature(direct, by_mean, rounding))


def rotary(layer: Layer, x: Known) -> Known:
    """Rotary embedding: the angle is a product of a position and a power, rounded on both sides."""
    theta, eps = layer.shape.rope_theta, layer.precision.rotary
    length, dim = x.value.shape[-2:]
    half = dim // 2
    frequency = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    angle = np.arange(length, dtype=np.float64)[:, None] * frequency[None, :]
    cos, sin = np.cos(angle), np.sin(angle)
    # A power errs by its exponent's rounding times the logarithm of the base.
    turned = (angle * (2 + np.log(theta)) + 2) * eps
    size = turned * quadrature(x.value[..., :half], x.value[..., half:])
    first, second = x.spread[..., :half], x.spread[..., half:]
    spread = [
        quadrature(first * cos, second * sin, size),
        quadrature(second * cos, first * sin, size),
    ]
    return Known(llama.rotary(x.value, theta), np.concatenate(spread, axis=-1))


def attention(layer: Layer, x: Known) -> Known:
    """Causal attention: logits, softmax (its derivative, exponents, sum), weighted values."""
    shape, eps = layer.shape, layer.precision.linear
    length = x.value.shape[1]

    def split(name: str) -> Known:
        y = linear(layer, f"self_attn.{name}", x)
        split_heads = llama.split_heads
        return Known(split_heads(y.value, shape.head_dim), split_heads(y.spread, shape.head_dim))

    def repeated(y: Known) -> Known:
        share = shape.heads // shape.kv_heads
        return Known(np.repeat(y.value, share, axis=1), np.repeat(y.spread, share, axis=1))

    def turned(a: Array) -> Array:
        return a.transpose(0, 1, 3, 2)

    q = rotary(layer, split("q_proj"))
    k = repeated(rotary(layer, split("k_proj")))
    v = repeated(split("v_proj"))

    root = np.sqrt(shape.head_dim)
    past = np.tril(np.ones((length, length), dtype=bool))
    z = np.where(past, q.value @ turned(k.value) / root, -np.inf)
    rounding = (root + 2) * eps * mapped(q.value, turned(k.value))
    z_spread = quadrature(
        mapped(q.spread, turned(k.value)), mapped(q.value, turned(k.spread)), rounding
    )
    below = np.where(past, np.max(z, axis=-1, keepdims=True) - np.where(past, z, 0), 0)
    p = llama.softmax(z)
    # The relative error of one exponential, then that of their sum.
    exponential = quadrature(z_spread / root, (below + 2) * eps)
    total = np.linalg.norm(p * exponential, axis=-1, keepdims=True)
    p_spread = p * quadrature(exponential, total, np.sqrt(length) * eps)
    heads = p @ v.value
    spread = quadrature(
        mapped(p_spread, v.value),
        mapped(p, v.spread),
        np.sqrt(length) * eps * mapped(p, v.value),
        eps * heads,
    )

    return Known(llama.join_heads(heads), llama.join_heads(spread))


def layer_spreads(layer: Layer, h: Known) -> LayerSpreads:
    """The whole layer.

    Parameters
    ----------
    layer : Layer
    h : Known, (N, L, d)
        Input of the layer.

    Returns
    -------
    LayerSpreads
        Each of the shape of what it belongs to.
    """
    eps = layer.precision.linear
    x_attention = rms_norm(layer, "input_layernorm.weight", h)
    x_o = attention(layer, x_attention)
    o = linear(layer, "self_attn.o_proj", x_o)
    middle = h.value + o.value
    residual = Known(middle, quadrature(h.spread, o.spread, eps * middle))
    x_ffn = rms_norm(layer, "post_attention_layernorm.weight", residual)

    gate, up = linear(layer, "mlp.gate_proj", x_ffn), linear(layer, "mlp.up_proj", x_ffn)
    sigmoid = 1 / (1 + np.exp(-gate.value))
    slope = sigmoid * (1 + gate.value * (1 - sigmoid))
    active = gate.value * sigmoid
    active_spread = quadrature(slope * gate.spread, 4 * eps * active)
    channels = Known(
        active * up.value,
        quadrature(active_spread * up.value, active * up.spread, eps * active * up.value),
    )
    down = linear(layer, "mlp.down_proj", channels)
    output = middle + down.value
    return LayerSpreads(
        attention=x_attention.spread,
        o=x_o.spread,
        middle=residual.spread,
        ffn=x_ffn.spread,
        down=channels.spread,
        output=quadrature(residual.spread, down.spread, eps * output),
    )


def logit_spreads(
    weights: Weights, shape: llama.LlamaShape, h: Known, precision: Precision | None = None
) -> Array:
    """The last norm and the head, from the output `h` of the last layer."""
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    layer = Layer(
        {"norm": weights["model.norm.weight"], "head.weight": head},
        shape,
        precision=precision or Precision(),
    )
    return linear(layer, "head", rms_norm(layer, "norm", h)).spread


def norm_bounds(X: Array, spread: Array) -> Array:
    """Bound on the distance of the norms of input features.

    The triangle inequality over the tokens, whose errors may well go together, and the rounding of
    the norms themselves.

    Parameters
    ----------
    X, spread : (..., d_in)
        Inputs of a linear, and the spread of their distance.
    """
    features = X.shape[-1]
    tokens = X.reshape(-1, features)
    moved = CONFIDENCE * np.linalg.norm(spread.reshape(-1, features), axis=0)
    rounding = root_of_positive_sum(len(tokens))
    return np.asarray(moved + rounding * np.linalg.norm(tokens, axis=0))


def weighted_bound(W: Array, moved: Array) -> float:
    """Bound on the spectral norm of ``W diag(moved)`` where `moved` are bounds of errors.

    A matrix of independent entries has a spectral norm of at most the largest norm of a row more
    by the largest norm of a column, but for a factor near 1 (Bandeira and van Handel, 2016).
    """
    A = np.abs(W) * moved[None, :]
    rows, columns = np.linalg.norm(A, axis=1), np.linalg.norm(A, axis=0)
    return float(np.max(rows, initial=0.0) + np.max(columns, initial=0.0))
