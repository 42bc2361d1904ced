"""Structured compression of language models: low-rank attention and pruned feed-forward blocks.

Importing this package is cheap, and makes transformers load compressed checkpoints: the Auto
classes learn of them as soon as transformers itself is imported, before or after. Likewise PEFT
learns to put LoRA around factored linears.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from lorap.families import FAMILIES, MODELING_MODULE

if TYPE_CHECKING:
    from lorap.comparison import compare
    from lorap.config import CompressionConfig
    from lorap.dense import export_dense
    from lorap.errors import LorapError, UsageError
    from lorap.evaluation import evaluate, evaluate_perplexity
    from lorap.pipeline.in_memory import compress
    from lorap.pipeline.on_disk import compress_checkpoint, plan_checkpoint
    from lorap.pipeline.survey import inspect_checkpoint
    from lorap.recovery.merging import merge_adapter
    from lorap.recovery.settings import RecoveryConfig
    from lorap.recovery.training import recover

__version__ = "0.1.0"

_EXPORTS = {
    "compress": "lorap.pipeline.in_memory",
    "compress_checkpoint": "lorap.pipeline.on_disk",
    "CompressionConfig": "lorap.config",
    "plan_checkpoint": "lorap.pipeline.on_disk",
    "compare": "lorap.comparison",
    "inspect_checkpoint": "lorap.pipeline.survey",
    "evaluate": "lorap.evaluation.run",
    "evaluate_perplexity": "lorap.evaluation.run",
    "export_dense": "lorap.dense",
    "recover": "lorap.recovery.training",
    "merge_adapter": "lorap.recovery.merging",
    "RecoveryConfig": "lorap.recovery.settings",
    "LorapError": "lorap.errors",
    "UsageError": "lorap.errors",
}

__all__ = [
    "CompressionConfig",
    "LorapError",
    "RecoveryConfig",
    "UsageError",
    "__version__",
    "compare",
    "compress",
    "compress_checkpoint",
    "evaluate",
    "evaluate_perplexity",
    "export_dense",
    "inspect_checkpoint",
    "merge_adapter",
    "plan_checkpoint",
    "recover",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _import_models(_: ModuleType) -> None:
    importlib.import_module(MODELING_MODULE)


def _register_lora(peft: ModuleType) -> None:
    importlib.import_module("lorap.recovery.layers").register(peft)


# Two steps, since either module may be the first one imported: the classes are registered once
# their module is complete, and transformers only causes it to be imported.
for _family in FAMILIES.values():
    wrapt.register_post_import_hook(_family.register, MODELING_MODULE)
wrapt.register_post_import_hook(_import_models, "transformers")
wrapt.register_post_import_hook(_register_lora, "peft")
