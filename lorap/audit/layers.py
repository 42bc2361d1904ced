"""The layers of a compressed checkpoint, each fed by the checkpoint's own layers before it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from lorap.audit.comparisons import same_bits
from lorap.audit.context import Context
from lorap.audit.factors import factor_checks
from lorap.audit.files import linear_name
from lorap.audit.forward import Runs
from lorap.audit.inputs import INPUT_OF, Input, Inputs, against_record, collect, needed
from lorap.audit.refinement import refined
from lorap.audit.results import Check, ModuleAudit
from lorap.audit.selections import selection_checks
from lorap.audit.sizes import Module
from lorap.audit.stages import audit_stages


def audit_layers(
    context: Context, runs: Runs, chosen: Sequence[int], advance: Callable[[], None]
) -> Iterator[ModuleAudit]:
    """Run the checkpoint's own layers, and compare the chosen ones.

    Parameters
    ----------
    context : Context
    runs : Runs
        The embedded samples.
    chosen : sequence of int
        Ascending; the layers after the last one are not run.
    advance : callable
        Called after each layer.
    """
    settings = context.record.settings
    # Of the uncompressed model, from the same embeddings.
    dense = copy.deepcopy(runs) if settings.carries_dense else None
    for index in range(chosen[-1] + 1):
        prefix = f"{context.reader.family.layers_path}.{index}."
        held = context.stored.load(prefix)
        if index in chosen or dense is not None:
            given = context.reader.load(prefix)
            found = None
            if dense is None:
                yield from _audit_layer(context, runs, index, given, held)
            else:
                if index in chosen:
                    found = audit_stages(context, runs, dense, index, given, held)
                for _ in dense.advance(given, f"layers.{index} of the original"):
                    pass
                if found is not None and settings.refine:
                    yield from refined(context, runs, dense, index, found, held)
                elif found is not None:
                    yield from found.modules
            del given
        for _ in runs.advance(held, f"layers.{index} of the compressed model"):
            pass
        advance()


def _audit_layer(
    context: Context,
    runs: Runs,
    index: int,
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
) -> Iterator[ModuleAudit]:
    """Compare one layer."""
    plan, inputs = context.plan.layers[index], _inputs(context, runs, index, given)
    touched: set[str] = set()
    for name, module in plan.items():
        checks = _module_checks(context, module, given, held, inputs)
        touched |= set(_tensors(context, module, given))
        yield ModuleAudit(f"layers.{index}.{name}", module.becomes, tuple(checks))
    for name in (name for name in given if name not in touched):
        same = same_bits("untouched", given[name], held[name])
        yield ModuleAudit(f"layers.{index}.{name}", "as it was", (same,))


def _inputs(
    context: Context, runs: Runs, index: int, given: Mapping[str, Tensor]
) -> dict[Input, Inputs]:
    """Recompute what the layer was compressed by, and compare what is recorded of it."""
    settings, modules = context.record.settings, context.plan.layers[index].values()
    if not any(needed(module, role, settings) for module in modules for role in module.roles):
        return {}
    sums = collect(
        runs.forward(given), modules, lambda m, role: needed(m, role, settings), f"layers.{index}"
    )
    eps = context.compute.eps
    return {
        kind: against_record(found, runs.tokens, kind, index, context.record, eps)
        for kind, found in sums.items()
    }


def _tensors(context: Context, module: Module, given: Mapping[str, Tensor]) -> list[str]:
    """Names of the original tensors of a module."""
    linears = [linear_name(context.reader.family, role) for role in module.roles]
    names = [f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias")]
    return [name for name in names if name in given]


def _module_checks(
    context: Context,
    module: Module,
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    inputs: Mapping[Input, Inputs],
) -> list[Check]:
    if module.rank is not None:
        return factor_checks(context, module, given, held, inputs.get(INPUT_OF[module.roles[0]]))
    if module.band is not None:
        kinds = dict.fromkeys(INPUT_OF[role] for role in module.roles)
        own = {kind: inputs[kind] for kind in kinds if kind in inputs}
        return selection_checks(context, module, given, held, own)
    names = _tensors(context, module, given)
    short = len(module.roles) == 1
    return [
        same_bits(name.rpartition(".")[2] if short else name, given[name], held[name])
        for name in names
    ]
