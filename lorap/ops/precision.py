"""In which precision the math of ``lorap.ops`` is done (SPEC: ``precision.compute``); overflow."""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Elements widened to float64 at a time (32 MiB)."""

CACHED_ELEMENTS = 1 << 18
"""The same where each is read once, on a CPU (2 MiB)."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any operand is float64, else float32; fp16 and bf16 are for storage alone.

    Parameters
    ----------
    *tensors : Tensor
        Operands of any floating dtype.
    """
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def all_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor inf, in one pass over it and without a workspace.

    Parameters
    ----------
    tensor : Tensor
        Of any shape and dtype.

    Notes
    -----
    SPEC: ``algorithm.sequence``.
    """
    if tensor.numel() == 0:
        return True
    # NaN is the least and the largest of all that it is among.
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def rows_at_a_time(matrix: Tensor, *, once: bool) -> int:
    """Rows of a matrix to widen to float64 at a time: the workspace does not grow with them.

    Parameters
    ----------
    matrix : (..., columns)
    once : bool
        Whether each is read once, as by a sum. On a CPU it then is to be in its cache still.
    """
    elements = CACHED_ELEMENTS if once and matrix.device.type == "cpu" else CHUNK_ELEMENTS
    return max(1, elements // max(1, matrix.shape[-1]))
