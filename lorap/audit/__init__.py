"""Audit of a compressed checkpoint: everything it must hold, recomputed by the reference.

The one part of lorap that imports ``lorap_reference``. The torch path takes no part: tensors are
read, and from then on all is NumPy. SPEC.md, "Audit", has the bounds and where they come from.

``run`` is the way in. What follows from shapes and from the record: ``record``, ``sizes``,
``files``. What is computed in two runs, one in float64 and one rounded as the checkpoint's own
forwards were: ``forward``, ``inputs``, ``measurements``, ``gradients``. What is compared in a
layer: ``layers``, ``factors``, ``selections``.
"""

from lorap.audit.results import AuditResult, Check, ModuleAudit
from lorap.audit.run import audit

__all__ = ["AuditResult", "Check", "ModuleAudit", "audit"]
