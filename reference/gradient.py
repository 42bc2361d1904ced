"""The loss of a LLaMA and its gradient by every weight: the backward of ``llama``, by hand.

Each ``<piece>_backward`` stands beside the piece of ``llama`` of that name. It takes the inputs of
the piece and ``dy``, the gradient of the loss by its output, and returns the gradients by its
inputs: ``dy`` times the Jacobian, from the left. Where the piece has weights, a mapping follows
with theirs, under the same names; a weight stands for all of its uses, so that contributions add
up over tokens.

No piece needs more than its inputs: what lies between is computed again. Kept from the forward are
the inputs of the layers, ``layers + 1`` arrays of ``(N, L, d)``, and logits of one sample at a
time.
"""

import numpy as np
from numpy.typing import NDArray

from . import llama
from .llama import Ids, LlamaShape, Weights

Array = NDArray[np.float64]
Gradients = dict[str, Array]


def cross_entropy(logits: Array, targets: Ids) -> Array:
    """``-log softmax(logits)[target]`` of each token, ``(...)``, in nats.

    Parameters
    ----------
    logits : (..., vocabulary)
    targets : (...)
        The tokens that came.

    Notes
    -----
    ``log sum exp`` of the logits less the target's, both shifted by the largest logit: nothing
    overflows, and no logarithm of a small probability is taken.
    """
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    chosen = np.sum(np.where(_one_hot(targets, logits.shape[-1]), shifted, 0), axis=-1)
    entropy: Array = np.log(np.sum(np.exp(shifted), axis=-1)) - chosen
    return entropy


def cross_entropy_backward(logits: Array, targets: Ids) -> Array:
    """Gradient of each token's cross-entropy by its logits: softmax less 1 at the target."""
    return llama.softmax(logits) - _one_hot(targets, logits.shape[-1])


def _one_hot(targets: Ids, vocabulary: int) -> NDArray[np.bool_]:
    return np.equal(targets[..., None], np.arange(vocabulary))


def linear_backward(weights: Weights, name: str, x: Array, dy: Array) -> tuple[Array, Gradients]:
    """Backward of ``y = W x + b``, or of ``y = L (R x) + b`` where the linear is factored.

    Parameters
    ----------
    weights : mapping
    name : str
        Of the linear.
    x : (..., d_in)
    dy : (..., d_out)

    Returns
    -------
    dx : (..., d_in)
    gradients : dict
        Of what is there of ``.weight``, ``.bias``, ``.left.weight``, ``.right.weight`` (or the
        factor that q and k share) and ``.left.bias``.
    """
    if f"{name}.weight" in weights:
        dx = dy @ weights[f"{name}.weight"]
        gradients = {f"{name}.weight": outer(dy, x)}
        bias_name = f"{name}.bias"
    else:
        right = llama.right_name(weights, name)
        L, R = weights[f"{name}.left.weight"], weights[right]
        dz = dy @ L
        dx = dz @ R
        gradients = {
            f"{name}.left.weight": outer(dy, x @ R.T),
            right: outer(dz, x),
        }
        bias_name = f"{name}.left.bias"
    if bias_name in weights:
        gradients[bias_name] = np.sum(_rows(dy), axis=0)
    return dx, gradients


def _rows(x: Array) -> Array:
    """``(..., features)`` as ``(tokens, features)``."""
    return x.reshape(-1, x.shape[-1])


def outer(dy: Array, x: Array) -> Array:
    """Sum over tokens of the outer products ``dy x^T``, ``(d_out, d_in)``."""
    return _rows(dy).T @ _rows(x)


def rms_norm_backward(x: Array, gain: Array, eps: float, dy: Array) -> tuple[Array, Array]:
    """Backward of ``y = gain * n``, ``n = x / s`` and ``s = sqrt(mean(x^2) + eps)``.

    ``ds / dx_i = x_i / (d s)``, so that ``dx = (dn - n * mean(dn * n)) / s``.

    Parameters
    ----------
    x, dy : (..., d)
    gain : (d,)
    eps : float

    Returns
    -------
    dx : (..., d)
    dgain : (d,)
    """
    s = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    n, dn = x / s, dy * gain
    dx = (dn - n * np.mean(dn * n, axis=-1, keepdims=True)) / s
    return dx, np.sum(_rows(dy * n), axis=0)


def rotary_backward(dy: Array, theta: float) -> Array:
    """Backward of ``rotary``: a rotation's transpose turns back by the same angle."""
    length, dim = dy.shape[-2:]
    cos, sin = llama.rotary_angles(length, dim, theta)
    first, second = dy[..., : dim // 2], dy[..., dim // 2 :]
    return np.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)


def softmax_backward(p: Array, dp: Array) -> Array:
    """Backward of ``p = softmax(z)`` over the last axis: ``dz = p * (dp - sum(dp * p))``."""
    dz: Array = p * (dp - np.sum(dp * p, axis=-1, keepdims=True))
    return dz


def silu_backward(x: Array, dy: Array) -> Array:
    """Backward of ``y = x * g``, ``g = sigmoid(x)`` and ``dg / dx = g (1 - g)``."""
    g = 1 / (1 + np.exp(-x))
    dx: Array = dy * g * (1 + x * (1 - g))
    return dx


def repeat_backward(dy: Array, share: int) -> Array:
    """Backward of ``np.repeat(x, share, axis=1)``: each head gets the sum over its copies."""
    n, heads, length, head_dim = dy.shape
    dx: Array = np.sum(dy.reshape(n, heads // share, share, length, head_dim), axis=2)
    return dx


def attention_backward(
    weights: Weights, shape: LlamaShape, x: Array, dy: Array
) -> tuple[Array, Gradients]:
    """Backward of ``attention``: ``P = softmax(z / sqrt(head_dim))``, ``z = q k^T``, ``P v``.

    ``dv = P^T dheads``, ``dP = dheads v^T``, ``dq = dz k`` and ``dk = dz^T q``. The mask needs no
    care: P is 0 in the future, and with it ``dz``.

    Parameters
    ----------
    weights : mapping
        Of one layer, names relative to it.
    shape : LlamaShape
    x : (N, L, d)
    dy : (N, L, heads * head_dim)

    Returns
    -------
    dx : (N, L, d)
    gradients : dict
        Of q, k and v.
    """
    q, k, v = llama.queries_keys_values(weights, shape, x)
    P = llama.attention_pattern(q, k)
    dheads = llama.split_heads(dy, shape.head_dim)
    dv = P.transpose(0, 1, 3, 2) @ dheads
    dz = softmax_backward(P, dheads @ v.transpose(0, 1, 3, 2)) / np.sqrt(shape.head_dim)
    dq, dk = dz @ k, dz.transpose(0, 1, 3, 2) @ q
    share = shape.heads // shape.kv_heads
    dq = rotary_backward(dq, shape.rope_theta)
    dk = rotary_backward(repeat_backward(dk, share), shape.rope_theta)
    dv = repeat_backward(dv, share)
    dx_q, gradients_q = linear_backward(weights, "self_attn.q_proj", x, llama.join_heads(dq))
    dx_k, gradients_k = linear_backward(weights, "self_attn.k_proj", x, llama.join_heads(dk))
    dx_v, gradients_v = linear_backward(weights, "self_attn.v_proj", x, llama.join_heads(dv))
    gradients = gradients_q | gradients_k | gradients_v
    if llama.SHARED_RIGHT in gradients:
        gradients[llama.SHARED_RIGHT] = (
            gradients_q[llama.SHARED_RIGHT] + gradients_k[llama.SHARED_RIGHT]
        )
    return dx_q + dx_k + dx_v, gradients


def channels_backward(weights: Weights, x: Array, dy: Array) -> tuple[Array, Gradients]:
    """Backward of ``channels``, ``silu(gate) * up``.

    Parameters
    ----------
    weights : mapping
        Of one layer, names relative to it.
    x : (N, L, d)
    dy : (N, L, d_m)

    Returns
    -------
    dx : (N, L, d)
    gradients : dict
        Of gate and up.
    """
    gate = llama.linear(weights, "mlp.gate_proj", x)
    up = llama.linear(weights, "mlp.up_proj", x)
    dgate, dup = silu_backward(gate, dy * up), dy * llama.silu(gate)
    dx_gate, gradients_gate = linear_backward(weights, "mlp.gate_proj", x, dgate)
    dx_up, gradients_up = linear_backward(weights, "mlp.up_proj", x, dup)
    return dx_gate + dx_up, gradients_gate | gradients_up


def layer_backward(
    weights: Weights, shape: LlamaShape, h: Array, dy: Array
) -> tuple[Array, Gradients]:
    """Backward of ``layer_forward``: ``m = h + o(MHA(norm(h)))``, ``y = m + down(FFN(norm(m)))``.

    Parameters
    ----------
    weights : mapping
        Of one layer, names relative to it.
    shape : LlamaShape
    h : (N, L, d)
        Input of the layer.
    dy : (N, L, d)

    Returns
    -------
    dh : (N, L, d)
    gradients : dict
        Of all weights of the layer.
    """
    trace = llama.layer_forward(weights, shape, h)

    name = "post_attention_layernorm.weight"
    d_down, gradients_down = linear_backward(weights, "mlp.down_proj", trace.down, dy)
    d_ffn, gradients_ffn = channels_backward(weights, trace.ffn, d_down)
    dm, d_gain = rms_norm_backward(trace.middle, weights[name], shape.rms_eps, d_ffn)
    gradients = gradients_down | gradients_ffn | {name: d_gain}
    dm = dy + dm

    name = "input_layernorm.weight"
    d_o, gradients_o = linear_backward(weights, "self_attn.o_proj", trace.o, dm)
    d_mha, gradients_mha = attention_backward(weights, shape, trace.attention, d_o)
    dh, d_gain = rms_norm_backward(h, weights[name], shape.rms_eps, d_mha)
    return dm + dh, gradients | gradients_o | gradients_mha | {name: d_gain}


def head_backward(
    weights: Weights, shape: LlamaShape, h: Array, dy: Array
) -> tuple[Array, Gradients]:
    """Backward of ``head``, the last norm and the matrix that follows.

    Parameters
    ----------
    weights : mapping
        Of the whole model.
    shape : LlamaShape
    h : (..., d)
        Output of the last layer.
    dy : (..., vocabulary)

    Returns
    -------
    dh : (..., d)
    gradients : dict
        Of the norm and the head; of the embeddings, as far as they are the head, where it is tied.
    """
    name = llama.head_name(weights)
    gain = np.asarray(weights[llama.FINAL_NORM], dtype=np.float64)
    x = llama.rms_norm(h, gain, shape.rms_eps)
    dx = dy @ np.asarray(weights[name], dtype=np.float64)
    dh, d_gain = rms_norm_backward(h, gain, shape.rms_eps, dx)
    return dh, {llama.FINAL_NORM: d_gain, name: outer(dy, x)}


def embed_backward(vocabulary: int, ids: Ids, dy: Array) -> Array:
    """Backward of ``embed``: each row gets the sum over the places of its token.

    Parameters
    ----------
    vocabulary : int
        Rows of the embeddings.
    ids : (N, L)
    dy : (N, L, d)

    Returns
    -------
    (vocabulary, d)
    """
    dx = np.zeros((vocabulary, dy.shape[-1]))
    np.add.at(dx, ids.reshape(-1), _rows(dy))
    return dx


def layer_inputs(weights: Weights, shape: LlamaShape, ids: Ids) -> list[Array]:
    """The residual stream ``(N, L, d)`` before each layer, and after the last one."""
    stream = [llama.embed(weights, ids)]
    for index in range(shape.layers):
        layer = llama.layer_weights(weights, index)
        stream.append(llama.layer_forward(layer, shape, stream[-1]).output)
    return stream


def targets(ids: Ids) -> int:
    """Return how many tokens of ``(N, L)`` ids have one before them, ``N (L - 1)``.

    Raises
    ------
    ValueError
        If none has: there is nothing to predict.
    """
    count = ids[:, 1:].size
    if count == 0:
        raise ValueError(f"expected at least one sample of two tokens, got ids of {ids.shape}")
    return count


def loss(weights: Weights, shape: LlamaShape, ids: Ids) -> float:
    """Mean cross-entropy of the next token, over all ``targets``, in nats.

    Parameters
    ----------
    weights : mapping
        Of the whole model, under their names in a Hugging Face checkpoint, dense or factored.
    shape : LlamaShape
    ids : (N, L)

    Raises
    ------
    ValueError
        If there is no target.

    Notes
    -----
    SPEC: ``gradient.loss``.
    """
    count, total = targets(ids), 0.0
    for tokens, h in zip(ids, layer_inputs(weights, shape, ids)[-1], strict=True):
        total += float(np.sum(cross_entropy(llama.head(weights, shape, h[:-1]), tokens[1:])))
    return total / count


def loss_gradients(weights: Weights, shape: LlamaShape, ids: Ids) -> Gradients:
    """Gradient of ``loss`` by every weight.

    Parameters
    ----------
    weights : mapping
        As for ``loss``.
    shape : LlamaShape
    ids : (N, L)

    Returns
    -------
    dict
        By the names in `weights`, in their shapes. Embeddings that are the head as well have the
        sum of both; a head under a name of its own is a weight of its own.

    Raises
    ------
    ValueError
        If there is no target.

    Notes
    -----
    SPEC: ``gradient.backward``.
    """
    count = targets(ids)
    stream = layer_inputs(weights, shape, ids)
    h = stream.pop()
    dh = np.zeros_like(h)
    gradients: Gradients = {}
    for n, tokens in enumerate(ids):
        logits = llama.head(weights, shape, h[n, :-1])
        dlogits = cross_entropy_backward(logits, tokens[1:]) / count
        dh[n, :-1], sample = head_backward(weights, shape, h[n, :-1], dlogits)
        gradients = {name: gradients.get(name, 0.0) + value for name, value in sample.items()}
    for index in reversed(range(shape.layers)):
        layer = llama.layer_weights(weights, index)
        dh, relative = layer_backward(layer, shape, stream.pop(), dh)
        gradients |= {f"model.layers.{index}.{name}": value for name, value in relative.items()}
    embeddings = embed_backward(weights[llama.EMBEDDINGS].shape[0], ids, dh)
    gradients[llama.EMBEDDINGS] = gradients.get(llama.EMBEDDINGS, 0.0) + embeddings
    return gradients
