"""The reference: every equation of LoRAP in NumPy and SciPy, float64, one function per equation.

Written to be read beside the paper (arXiv 2404.09695) and SPEC.md; the paper's letters are kept.
``mgaa`` belongs to another paper, with letters of its own; ``marginal`` to none.
``lorap``, the torch path, shares no code with it: the two meet only in ``parity_tests``.
"""

from . import (
    algorithm1,
    budget,
    gradient,
    heads,
    importance,
    joint,
    llama,
    lora,
    lowrank,
    marginal,
    mgaa,
    pca,
    pruning,
    refinement,
    regression,
    statistics,
    wanda,
)

__all__ = [
    "algorithm1",
    "budget",
    "gradient",
    "heads",
    "importance",
    "joint",
    "llama",
    "lora",
    "lowrank",
    "marginal",
    "mgaa",
    "pca",
    "pruning",
    "refinement",
    "regression",
    "statistics",
    "wanda",
]
