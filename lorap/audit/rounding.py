"""How far the storage dtype moves factors and their product."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]

SPREADS = 7.0
"""Standard deviations that a sum of independent roundings may reach: 3e-12 in probability."""


def spacing(x: Array, dtype: torch.dtype) -> Array:
    """Distance of neighbouring numbers of a dtype at x."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(x), info.smallest_normal))
    return np.asarray(np.ldexp(info.eps, exponent - 1))


def variance(x: Array, dtype: torch.dtype) -> Array:
    """Variance of a rounding of x: errors are uniform within half a spacing."""
    return spacing(x, dtype) ** 2 / 12


def product_variance(L: Array, R: Array, dtype: torch.dtype) -> Array:
    """Variance of the entries of ``L R`` where both are rounded."""
    return np.asarray(variance(L, dtype) @ R**2 + L**2 @ variance(R, dtype))


def applied_variance(L: Array, R: Array, x: Array, dtype: torch.dtype) -> Array:
    """Variance of the entries of ``L (R x)`` where both factors are rounded, and x is exact."""
    return np.asarray(variance(L, dtype) @ (R @ x) ** 2 + L**2 @ (variance(R, dtype) @ x**2))


def projection_variance(W: Array, L: Array, R: Array, dtype: torch.dtype) -> Array:
    """Variance of the entries of ``L R - P W`` where ``R = L^+ W`` but for rounding.

    P projects on the columns of the rounded L. With e and f the roundings of L and R, Q = W - P W
    and ``L^+`` the pseudo-inverse, to first order ``L R - P W = P e R + L f - (L^+)^T e^T Q``.
    """
    inverse = np.linalg.pinv(L)
    projector, rest = L @ inverse, W - L @ (inverse @ W)
    moved = variance(L, dtype)
    return np.asarray(
        projector**2 @ (moved @ R**2)
        + L**2 @ variance(R, dtype)
        + inverse.T**2 @ (moved.T @ rest**2)
    )
