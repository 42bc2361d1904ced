"""Pruning of attention heads, which Table 8 of the paper compares with low rank in the MHA.

The unit is a group of grouped-query attention: one key/value head and the query heads that share
it. Without grouped queries it is a single head. Which groups stay is Eq. (11) on their scores
(``pruning.kept_channels``, ``budget.removed_band``).
"""

import torch
from torch import Tensor

from lorap.ops.importance import Aggregation, channel_importance


def head_rows(kept: Tensor, size: int, kv_heads: int) -> Tensor:
    """Rows of q, k and v, or columns of o, that belong to the groups `kept`.

    Parameters
    ----------
    kept : (groups,) int64
        Indices of key/value heads.
    size : int
        Rows of the matrix, a multiple of `kv_heads`: each group has as many, one after the other.
    kv_heads : int
        Key/value heads.

    Returns
    -------
    (groups * size / kv_heads,) int64

    Notes
    -----
    SPEC: ``heads.group``.
    """
    rows = torch.arange(size, device=kept.device).reshape(kv_heads, size // kv_heads)
    return rows[kept].reshape(-1)


def head_scores(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, kv_heads: int, aggregation: Aggregation = "l2"
) -> Tensor:
    """Eq. (8) to (10) for groups of heads: norms of the group's blocks of q, k, v and o, added.

    The norm is that of all the scores in the block that the group has of a matrix.

    Parameters
    ----------
    q : (heads * head_dim, d)
    k, v : (kv_heads * head_dim, d)
    o : (d, heads * head_dim)
        Scores of the single weights, any floating dtype.
    kv_heads : int
        Key/value heads.
    aggregation : {"mean", "l1", "l2", "linf"}
        As in ``importance.channel_importance``.

    Returns
    -------
    (kv_heads,) float64

    Notes
    -----
    SPEC: ``heads.scores``.
    """

    def block_norms(scores: Tensor) -> Tensor:
        rows, columns = scores.shape
        blocks = scores.reshape(kv_heads, rows // kv_heads * columns)
        return channel_importance(blocks, 1, aggregation)

    return block_norms(q) + block_norms(k) + block_norms(v) + block_norms(o.T)


def prune_heads(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, kept: Tensor, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take the rows of q, k and v and the columns of o of the groups that stay, as copies.

    Biases of q, k and v lose their entries in the same way (``bias[head_rows(...)]``); the bias of
    o belongs to no head.

    Parameters
    ----------
    q : (heads * head_dim, d)
    k, v : (kv_heads * head_dim, d)
    o : (d, heads * head_dim)
    kept : (groups,) int64
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
    queries = head_rows(kept, q.shape[0], kv_heads)
    keys = head_rows(kept, k.shape[0], kv_heads)
    return q[queries], k[keys], v[keys], o[:, queries].contiguous()
