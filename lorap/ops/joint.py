"""One right factor for several matrices with the same input: q and k factored together (MGAA).

Any low-rank method takes the stack as it takes a single matrix.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices with the same input, one above the other.

    Parameters
    ----------
    matrices : sequence of (rows, d_in)
        Of one dtype.

    Returns
    -------
    (sum of rows, d_in)

    Notes
    -----
    SPEC: ``joint.stack``.
    """
    return torch.cat(list(matrices))


def split(left: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The rows of the stack's left factor, or of its bias, that belong to each matrix.

    Parameters
    ----------
    left : (sum of sizes, ...)
    sizes : sequence of int
        Rows of each matrix, in the order of the stack.

    Returns
    -------
    tuple of (rows, ...)
        Copies, each of its own memory.

    Notes
    -----
    SPEC: ``joint.split``.
    """
    return tuple(part.clone() for part in torch.split(left, list(sizes)))
