"""In which precision the math of ``lorap.ops`` is done (SPEC: ``precision.compute``)."""

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
