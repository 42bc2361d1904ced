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
Ids = NDArray[np.int64]
Weights = Mapping[str, Array]

SHARED_RIGHT = "self_attn.qk_right.weight"
"""Name in a layer of the right factor that q and k share where they are factored together."""

EMBEDDINGS, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


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
    middle : the residual stream between MHA and FFN, before the norm
    ffn : input of gate and up
    down : input of down, the channels
    output : the layer's output
    """

    attention: Array
    o: Array
    middle: Array
    ffn: Array
    down: Array
    output: Array


def right_name(weights: Weights, name: str) -> str:
    """Name of the right factor of the factored linear `name`: its own, or that of q and k."""
    own = f"{name}.right.weight"
    return own if own in weights else SHARED_RIGHT


def linear(weights: Weights, name: str, x: Array) -> Array:
    """Apply the linear called `name`, dense or factored (Eq. (3)), to ``x`` of ``(..., d_in)``."""
    if f"{name}.weight" in weights:
        y = x @ weights[f"{name}.weight"].T
        bias = weights.get(f"{name}.bias")
    else:
        L, R = weights[f"{name}.left.weight"], weights[right_name(weights, name)]
        y = low_rank_apply(L, R, x)
        bias = weights.get(f"{name}.left.bias")
    return y if bias is None else y + bias


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """RMSNorm over the last axis: ``gain * x / sqrt(mean(x^2) + eps)``."""
    y: Array = gain * (x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps))
    return y


def rotary_angles(length: int, dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine of ``position * theta^(-2 i / dim)``, each ``(length, dim / 2)``."""
    frequency = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    angle = np.arange(length, dtype=np.float64)[:, None] * frequency[None, :]
    return np.cos(angle), np.sin(angle)


def rotary(x: Array, theta: float) -> Array:
    """Rotary position embedding of ``x``, ``(N, heads, L, head_dim)``, positions 0 to L - 1.

    Feature i of the first half and feature i of the second half are turned together by the angle
    of ``rotary_angles``, the pairing that Hugging Face checkpoints use.
    """
    length, dim = x.shape[-2:]
    cos, sin = rotary_angles(length, dim, theta)
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def softmax(x: Array) -> Array:
    """Softmax over the last axis, shifted by its maximum."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True))
    p: Array = e / np.sum(e, axis=-1, keepdims=True)
    return p


def silu(x: Array) -> Array:
    """``x * sigmoid(x)``, the gate's activation in SwiGLU."""
    y: Array = x / (1 + np.exp(-x))
    return y


def split_heads(y: Array, head_dim: int) -> Array:
    """``(N, L, heads * head_dim)`` as ``(N, heads, L, head_dim)``, however many heads there are."""
    n, length, features = y.shape
    return y.reshape(n, length, features // head_dim, head_dim).transpose(0, 2, 1, 3)


def join_heads(y: Array) -> Array:
    """``(N, heads, L, head_dim)`` as ``(N, L, heads * head_dim)``."""
    n, heads, length, head_dim = y.shape
    return y.transpose(0, 2, 1, 3).reshape(n, length, heads * head_dim)


def queries_keys_values(
    weights: Weights, shape: LlamaShape, x: Array
) -> tuple[Array, Array, Array]:
    """q, k (both turned by ``rotary``) and v of every query head, ``(N, heads, L, head_dim)``.

    Query head h uses key/value head ``h // (heads / kv_heads)``: the heads that share one follow
    each other, and k and v are repeated for them. A layer whose heads were pruned has fewer of
    both.
    """
    q = split_heads(linear(weights, "self_attn.q_proj", x), shape.head_dim)
    k = split_heads(linear(weights, "self_attn.k_proj", x), shape.head_dim)
    v = split_heads(linear(weights, "self_attn.v_proj", x), shape.head_dim)
    share = shape.heads // shape.kv_heads
    k, v = np.repeat(rotary(k, shape.rope_theta), share, axis=1), np.repeat(v, share, axis=1)
    return rotary(q, shape.rope_theta), k, v


def attention_pattern(q: Array, k: Array) -> Array:
    """Causal softmax of ``q k^T / sqrt(head_dim)``, ``(N, heads, L, L)``, a query per row."""
    length, head_dim = q.shape[-2:]
    logits = q @ k.transpose(0, 1, 3, 2) / np.sqrt(head_dim)
    future = np.triu(np.ones((length, length), dtype=bool), k=1)
    return softmax(np.where(future, -np.inf, logits))


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
    q, k, v = queries_keys_values(weights, shape, x)
    return join_heads(attention_pattern(q, k) @ v)


def channels(weights: Weights, x: Array) -> Array:
    """The channels of the FFN, SwiGLU without down: the input of down, ``(N, L, d_m)``.

    Parameters
    ----------
    weights : mapping
        Of one layer, names relative to it.
    x : (N, L, d)
        Normalised input.
    """
    return silu(linear(weights, "mlp.gate_proj", x)) * linear(weights, "mlp.up_proj", x)


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
    middle = h + linear(weights, "self_attn.o_proj", x_o)
    x_ffn = rms_norm(middle, weights["post_attention_layernorm.weight"], shape.rms_eps)
    x_down = channels(weights, x_ffn)
    output = middle + linear(weights, "mlp.down_proj", x_down)
    return LayerTrace(x_attention, x_o, middle, x_ffn, x_down, output)


def layer_weights(weights: Weights, index: int) -> dict[str, Array]:
    """Weights of decoder layer `index` in float64, names relative to it."""
    prefix = f"model.layers.{index}."
    return {
        name.removeprefix(prefix): np.asarray(value, dtype=np.float64)
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def embed(weights: Weights, ids: Ids) -> Array:
    """Embeddings ``(N, L, d)`` of token ids ``(N, L)``."""
    return np.asarray(weights[EMBEDDINGS], dtype=np.float64)[ids]


def head_name(weights: Weights) -> str:
    """Name of the head's weight; that of the embeddings where the two are tied."""
    return HEAD if HEAD in weights else EMBEDDINGS


def head(weights: Weights, shape: LlamaShape, h: Array) -> Array:
    """The last norm and the head: logits ``(..., vocabulary)`` of the residual ``(..., d)``."""
    x = rms_norm(h, np.asarray(weights[FINAL_NORM], dtype=np.float64), shape.rms_eps)
    return x @ np.asarray(weights[head_name(weights)], dtype=np.float64).T


def logits(weights: Weights, shape: LlamaShape, ids: Ids) -> Array:
    """Next-token logits ``(N, L, vocabulary)`` of token ids ``(N, L)``; tied head where none is."""
    h = embed(weights, ids)
    for index in range(shape.layers):
        h = layer_forward(layer_weights(weights, index), shape, h).output
    return head(weights, shape, h)
