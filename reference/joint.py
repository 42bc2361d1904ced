"""One right factor for several matrices with the same input: q and k factored together (MGAA).

Any low-rank method takes the stack as it takes a single matrix.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def stacked(matrices: Sequence[Array]) -> Array:
    """``W = [W_1; W_2; ...]``, one above the other.

    Parameters
    ----------
    matrices : sequence of (d_m, d_in)

    Returns
    -------
    (sum of d_m, d_in)

    Notes
    -----
    SPEC: ``joint.stack``.
    """
    return np.concatenate(matrices)


def split(L: Array, sizes: Sequence[int]) -> tuple[Array, ...]:
    """The rows of the stack's left factor, or of its bias, that belong to each matrix.

    Parameters
    ----------
    L : (sum of sizes, ...)
    sizes : sequence of int
        ``d_m``, the rows of each matrix, in the order of the stack.

    Returns
    -------
    tuple of (d_m, ...)

    Notes
    -----
    SPEC: ``joint.split``.
    """
    return tuple(np.split(L, np.cumsum(sizes)[:-1]))
