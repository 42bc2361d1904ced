"""In which precision the math of ``lorap.ops`` is done (SPEC: ``precision.compute``); overflow."""

import torch
from torch import Tensor


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
