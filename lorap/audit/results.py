"""What an audit finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes
    ----------
    name : str
        What was compared.
    deviation : float
        How far apart, at the place that uses most of its bound; for exact comparisons the number of
        values that differ.
    bound : float
        How far apart they may be; 0 for exact comparisons.
    detail : str
        Where, or what was expected and what came; empty where there is nothing to say.
    """

    name: str
    deviation: float
    bound: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the deviation is a number within the bound."""
        return bool(self.deviation <= self.bound)

    @property
    def usage(self) -> float:
        """Share of the bound that is used; infinite for a breach of an exact comparison."""
        if self.deviation == 0:
            return 0.0
        return self.deviation / self.bound if self.bound > 0 else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; infinite and undefined numbers as text, which JSON can hold."""
        values = asdict(self) | {"passed": self.passed}
        for key in ("deviation", "bound"):
            if not np.isfinite(values[key]):
                values[key] = str(values[key])
        return values


@dataclass(frozen=True)
class ModuleAudit:
    """The comparisons of one module, or of one part of the checkpoint.

    Attributes
    ----------
    name : str
        ``layers.3.self_attn.q_proj``, or the name of a file or tensor.
    becomes : str
        ``rank 12``, ``100 channels``, ``as it was``; empty for what is no module.
    checks : tuple of Check
        At least one.
    """

    name: str
    becomes: str
    checks: tuple[Check, ...]

    @property
    def worst(self) -> Check:
        """The check that fails, or uses most of its bound."""
        return max(self.checks, key=lambda check: (not check.passed, check.usage))

    @property
    def passed(self) -> bool:
        """Whether all checks pass."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes
    ----------
    original, compressed : str
        As the user named them.
    storage, compute : str
        The dtype that most of the checkpoint is stored in, and that of the forwards behind it.
    layers : tuple of int
        Decoder layers that were recomputed.
    modules : tuple of ModuleAudit
    """

    original: str
    compressed: str
    storage: str
    compute: str
    layers: tuple[int, ...]
    modules: tuple[ModuleAudit, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is outside its bound."""
        return all(module.passed for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as ``lorap audit --json`` prints it."""
        return {
            "original": self.original,
            "compressed": self.compressed,
            "passed": self.passed,
            "storage": self.storage,
            "compute": self.compute,
            "layers": list(self.layers),
            "modules": [
                {
                    "name": module.name,
                    "becomes": module.becomes,
                    "passed": module.passed,
                    "checks": [check.to_dict() for check in module.checks],
                }
                for module in self.modules
            ],
        }
