"""Stands in for the one function of wrapt that lorap needs at its import."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType


def register_post_import_hook(hook: Callable[[ModuleType], None], name: str) -> None:
    """Call the hook with the module, imported now instead of later; not without the module.

    PEFT's hook needs more of wrapt, and no benchmark here needs PEFT.
    """
    if name == "peft":
        return
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError:
        return
    hook(module)
