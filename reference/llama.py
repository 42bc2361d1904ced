"""A LLaMA forward in NumPy, float64: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Weights are given under their names in a Hugging Face checkpoint. A linear is whatever stands under
``<name>.weight``, or under ``<name>.left.weight`` and ``<name>.right.weight`` once it is factored;
biases, where there are any, under ``<name>.bias`` or ``<name>.left.bias``.

Rotary frequencies are those of LLaMA 1 to 3: models that scale them, as LLaMA 3.1 does for long
texts, are outside.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .lowrank import low_rank_apply

Array = NDArray[np.float64]
Weights = Mapping[str, Array]


@dataclass(frozen=True)
class LlamaShape:
    """What the weights do not say.

    Attributes
    ----------
    layers : int
        Decoder layers.
    heads, kv_heads : int
        Query heads, and key/value heads (a divisor of the former).
    head_dim : int
        Width of a head, even.
    rope_theta : float
        Base of the rotary frequencies.
    rms_eps : float
        Added to the mean square in RMSNorm.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6


@dataclass(frozen=True)
class LayerTrace:
    """Inputs of the linears of one decoder layer, each ``(N, L, features)``, and its output.

    Attributes
    ----------
    attention : input of q, k and v
    o : input of o
    ffn : input of gate and up
    down : input of down, the channels
    output : the layer's output
    """

    attention: Array
    o: Array
    ffn: Array
    down: Array
    output: Array


def linear(weights: Weights, name: str, x: Array) -> Array:
    """Apply the linear called `name`, dense or factored (Eq. (3)), to ``x`` of ``(..., d_in)``."""
    if f"{name}.weight" in weights:
        y = x @ weights[f"{name}.weight"].T
        bias = weights.get(f"{name}.bias")
    else:
        L, R = weights[f"{name}.left.weight"], weights[f"{name}.right.weight"]
        y = low_rank_apply(L, R, x)
        bias = weights.get(f"{name}.left.bias")
    return y if bias is None else y + bias


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """RMSNorm over the last axis: ``gain * x / sqrt(mean(x^2) + eps)``."""
    return np.asarray(gain * (x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)))


def rotary(x: Array, theta: float) -> Array:
    """Rotary position embedding of ``x``, ``(N, heads, L, head_dim)``, positions 0 to L - 1.

    Feature i of the first half and feature i of the second half are turned together by the angle
    ``position * theta^(-2 i / head_dim)``, the pairing that Hugging Face checkpoints use.
    """
    length, dim = x.shape[-2:]
    frequency = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    angle = np.arange(length, dtype=np.float64)[:, None] * frequency[None, :]
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: Array) -> Array:
    """Softmax over the last axis, shifted by its maximum."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return np.asarray(e / np.sum(e, axis=-1, keepdims=True))


def silu(x: Array) -> Array:
    """``x * sigmoid(x)``, the gate's activation in SwiGLU."""
    return np.asarray(x / (1 + np.exp(-x)))


def attention(weights: Weights, shape: LlamaShape, x: Array) -> Array:
    """Concatenated heads of causal grouped-query attention, the input of o. Section 2.1.

    Parameters
    ----------
    weights : mapping
        Of one layer, names relative to it.
    shape : LlamaShape
    x : (N, L, d)
        Normalised input.

    Returns
    -------
    (N, L, heads * head_dim)
    """
    n, length, _ = x.shape

    def split(name: str, heads: int) -> Array:
        y = linear(weights, f"self_attn.{name}", x)
        return y.reshape(n, length, heads, shape.head_dim).transpose(0, 2, 1, 3)

    q = rotary(split("q_proj", shape.heads), shape.rope_theta)
    k = rotary(split("k_proj", shape.kv_heads), shape.rope_theta)
    v = split("v_proj", shape.kv_heads)
    share = shape.heads // shape.kv_heads
    k, v = np.repeat(k, share, axis=1), np.repeat(v, share, axis=1)

    logits = q @ k.transpose(0, 1, 3, 2) / np.sqrt(shape.head_dim)
    future = np.triu(np.ones((length, length), dtype=bool), k=1)
    heads = softmax(np.where(future, -np.inf, logits)) @ v
    return heads.transpose(0, 2, 1, 3).reshape(n, length, shape.heads * shape.head_dim)


def layer_forward(weights: Weights, shape: LlamaShape, h: Array) -> LayerTrace:
    """One decoder layer: ``h + MHA(norm(h))``, then ``+ FFN(norm(.))``.

    Parameters
    ----------
    weights : mapping
        Of one layer, names relative to it (``self_attn.q_proj.weight``).
    shape : LlamaShape
    h : (N, L, d)
        The residual stream.

    Returns
    -------
    LayerTrace
    """
    x_attention = rms_norm(h, weights["input_layernorm.weight"], shape.rms_eps)
    x_o = attention(weights, shape, x_attention)
    h = h + linear(weights, "self_attn.o_proj", x_o)
    x_ffn = rms_norm(h, weights["post_attention_layernorm.weight"], shape.rms_eps)
    gate = silu(linear(weights, "mlp.gate_proj", x_ffn))
    x_down = gate * linear(weights, "mlp.up_proj", x_ffn)
    output = h + linear(weights, "mlp.down_proj", x_down)
    return LayerTrace(attention=x_attention, o=x_o, ffn=x_ffn, down=x_down, output=output)


def layer_weights(weights: Weights, index: int) -> dict[str, Array]:
    """Weights of decoder layer `index` in float64, names relative to it."""
    prefix = f"model.layers.{index}."
    return {
        name.removeprefix(prefix): np.asarray(value, dtype=np.float64)
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def embed(weights: Weights, ids: NDArray[np.int64]) -> Array:
    """Embeddings ``(N, L, d)`` of token ids ``(N, L)``."""
    return np.asarray(weights["model.embed_tokens.weight"], dtype=np.float64)[ids]


def logits(weights: Weights, shape: LlamaShape, ids: NDArray[np.int64]) -> Array:
    """Next-token logits ``(N, L, vocabulary)`` of token ids ``(N, L)``; tied head where none is."""
    h = embed(weights, ids)
    for index in range(shape.layers):
        h = layer_forward(layer_weights(weights, index), shape, h).output
    h = rms_norm(h, np.asarray(weights["model.norm.weight"], dtype=np.float64), shape.rms_eps)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return h @ np.asarray(head, dtype=np.float64).T
