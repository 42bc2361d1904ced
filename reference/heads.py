"""Pruning of attention heads, which Table 8 of the paper compares with low rank in the MHA.

The unit is a group of grouped-query attention: one key/value head and the query heads that share
it. Without grouped queries it is a single head. Which groups stay is Eq. (11) on their scores
(``pruning.kept_channels``, ``budget.removed_band``).
"""

import numpy as np
from numpy.typing import NDArray

from .importance import Aggregation, channel_importance

Array = NDArray[np.float64]


def head_rows(kept: NDArray[np.int64], size: int, kv_heads: int) -> NDArray[np.int64]:
    """Rows of q, k and v, or columns of o, that belong to the groups `kept`.

    Parameters
    ----------
    kept : (groups,)
        Indices of key/value heads.
    size : int
        Rows of the matrix, a multiple of `kv_heads`: each group has as many, one after the other.
    kv_heads : int
        Key/value heads.

    Returns
    -------
    (groups * size / kv_heads,)

    Notes
    -----
    SPEC: ``heads.group``.
    """
    return np.arange(size).reshape(kv_heads, size // kv_heads)[kept].reshape(-1)


def head_scores(
    scores_q: Array,
    scores_k: Array,
    scores_v: Array,
    scores_o: Array,
    kv_heads: int,
    aggregation: Aggregation = "l2",
) -> Array:
    """Eq. (8) to (10) for groups of heads: ``C_g = Phi(q_g) + Phi(k_g) + Phi(v_g) + Phi(o_g)``.

    ``Phi`` is the norm of all the scores in the block that the group has of a matrix.

    Parameters
    ----------
    scores_q : (heads * head_dim, d)
    scores_k, scores_v : (kv_heads * head_dim, d)
    scores_o : (d, heads * head_dim)
        Scores of the single weights.
    kv_heads : int
        Key/value heads.
    aggregation : {"mean", "l1", "l2", "linf"}
        As in ``importance.channel_importance``.

    Returns
    -------
    (kv_heads,)
        Scores of the groups.

    Notes
    -----
    SPEC: ``heads.scores``.
    """

    def phi(scores: Array) -> Array:
        rows, columns = scores.shape
        blocks = scores.reshape(kv_heads, rows // kv_heads * columns)
        return channel_importance(blocks, 1, aggregation)

    return phi(scores_q) + phi(scores_k) + phi(scores_v) + phi(scores_o.T)


def prune_heads(
    W_q: Array, W_k: Array, W_v: Array, W_o: Array, kept: NDArray[np.int64], kv_heads: int
) -> tuple[Array, Array, Array, Array]:
    """Take the rows of q, k and v and the columns of o of the groups that stay.

    Biases of q, k and v lose their entries in the same way (``bias[head_rows(...)]``); the bias of
    o belongs to no head.

    Parameters
    ----------
    W_q : (heads * head_dim, d)
    W_k, W_v : (kv_heads * head_dim, d)
    W_o : (d, heads * head_dim)
    kept : (groups,)
        Indices of the groups that stay.
    kv_heads : int
        Key/value heads before.

    Returns
    -------
    q : (groups * heads / kv_heads * head_dim, d)
    k, v : (groups * head_dim, d)
    o : (d, groups * heads / kv_heads * head_dim)

    Notes
    -----
    SPEC: ``heads.slice``.
    """
    queries = head_rows(kept, W_q.shape[0], kv_heads)
    keys = head_rows(kept, W_k.shape[0], kv_heads)
    return W_q[queries], W_k[keys], W_v[keys], W_o[:, queries]
