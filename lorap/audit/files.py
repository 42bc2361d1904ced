"""What is compared without running the model: report, ``config.json``, tensors that stay."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorap.audit.comparisons import equal, same_bits
from lorap.audit.record import Record, fingerprint
from lorap.audit.results import Check, ModuleAudit
from lorap.audit.sizes import Module, Plan
from lorap.checkpoint.files import CONFIG, REPORT
from lorap.checkpoint.reader import CheckpointReader
from lorap.families import Family

Held = tuple[tuple[int, ...], torch.dtype]
"""Shape and dtype of a tensor."""


def audit_report(record: Record, plan: Plan, ids: NDArray[np.int64]) -> ModuleAudit:
    """Compare all in the report that follows without reading a weight.

    Parameters
    ----------
    record : Record
    plan : Plan
    ids : (N, L)
        Calibration ids.
    """
    report, settings = record.report, record.settings
    checks = [
        equal("ratio", settings.ratio, report.get("ratio")),
        equal("ratio scope", settings.ratio_scope, report.get("ratio_scope")),
        equal("layer ratio", plan.layer_ratio, report.get("layer_ratio")),
        equal("achieved ratio", 1 - plan.after / plan.before, report.get("achieved_ratio")),
        equal("parameters", {"before": plan.before, "after": plan.after}, report.get("parameters")),
    ]
    about = report.get("calibration")
    about = about if isinstance(about, dict) else {}
    checks += [
        equal("calibration samples", ids.shape[0], about.get("samples")),
        equal("calibration length", ids.shape[1], about.get("seqlen")),
        equal("calibration seed", settings.seed, about.get("seed")),
        equal("calibration fingerprint", fingerprint(ids), about.get("fingerprint")),
    ]
    listed = report.get("layers")
    checks.append(equal("layers", len(plan.layers), len(listed) if isinstance(listed, list) else 0))
    for index, layer in enumerate(plan.layers):
        said = record.said_of_layer(index)
        checks.append(equal(f"layers.{index}: ratios", plan.ratios(index), said.get("ratios")))
        checks.append(
            equal(
                f"layers.{index}: similarities",
                _similarities(record, index),
                said.get("similarities"),
            )
        )
        for name, module in layer.items():
            expected, of_module = module.report, record.said(index, name)
            got = {key: of_module.get(key) for key in expected}
            checks.append(equal(f"layers.{index}.{name}", expected, got))
    return ModuleAudit(REPORT, "", tuple(checks))


def _similarities(record: Record, layer: int) -> dict[str, float] | None:
    if not record.settings.measures_similarity:
        return None
    return {
        sublayer: float(record.recorded(f"layers.{layer}.{sublayer}.similarity", ()))
        for sublayer in ("mha", "ffn")
    }


def audit_config(reader: CheckpointReader, stored: CheckpointReader, plan: Plan) -> ModuleAudit:
    """Compare ``config.json``: the structure by the plan, all else by the original's."""
    structure: list[dict[str, Any]] = [
        {name: module.structure for name, module in layer.items() if module.structure is not None}
        for layer in plan.layers
    ]
    expected = reader.family.compressed_config(reader.config, structure).to_dict()
    got = stored.config.to_dict()
    # Where a model was loaded from, and by what, is no part of it.
    fields = (set(expected) | set(got)) - {
        "_name_or_path",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
    }
    return ModuleAudit(
        CONFIG,
        "",
        tuple(equal(name, expected.get(name), got.get(name)) for name in sorted(fields)),
    )


def audit_tensors(reader: CheckpointReader, stored: CheckpointReader, plan: Plan) -> ModuleAudit:
    """Compare names, shapes and dtypes; the parameter budget is the sum of the sizes."""
    family = reader.family
    expected = {name: (tensor.shape, tensor.dtype) for name, tensor in reader.tensors.items()}
    for index, layer in enumerate(plan.layers):
        for module in layer.values():
            if module.structure is not None:
                _replace(expected, f"{family.layers_path}.{index}.", family, module)
    got = {name: (tensor.shape, tensor.dtype) for name, tensor in stored.tensors.items()}
    wrong = sorted(
        name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)
    )
    detail = ""
    if wrong:
        first = wrong[0]
        detail = f"{first}: expected {expected.get(first)}, got {got.get(first)}"
    held = sum(prod(shape) for shape, _ in got.values())
    return ModuleAudit(
        "tensors",
        "",
        (
            Check("names, shapes and dtypes", len(wrong), 0, detail),
            equal("parameters held", plan.after, held),
        ),
    )


def _replace(expected: dict[str, Held], prefix: str, family: Family, module: Module) -> None:
    """Put the tensors of a compressed module in the place of the original's."""
    names = {role: f"{prefix}{linear_name(family, role)}" for role in module.roles}
    if module.rank is not None:
        right = f"{prefix}{right_name(family, module)}.weight"
        for name in names.values():
            (d_out, d_in), dtype = expected.pop(f"{name}.weight")
            expected[right] = ((module.rank, d_in), dtype)
            expected[f"{name}.left.weight"] = ((d_out, module.rank), dtype)
            bias = expected.pop(f"{name}.bias", None)
            if module.affine:
                bias = ((d_out,), dtype)
            if bias is not None:
                expected[f"{name}.left.bias"] = bias
        return
    for role, name in names.items():
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in expected:
                shape, dtype = expected[f"{name}.{kind}"]
                axis = pruned_axis(role, kind)
                if axis is not None:
                    size = shape[axis] // module.shape[0] * module.kept
                    shape = (*shape[:axis], size, *shape[axis + 1 :])
                expected[f"{name}.{kind}"] = (shape, dtype)


def linear_name(family: Family, role: str) -> str:
    """Name, within a layer, of the linear with a role."""
    return {**family.attention, **family.ffn}[role]


def right_name(family: Family, module: Module) -> str:
    """Name, within a layer, of a factored module's right factor, without its ``.weight``."""
    if len(module.roles) > 1:
        return family.joint_right
    return f"{linear_name(family, module.roles[0])}.right"


def pruned_axis(role: str, kind: str) -> int | None:
    """Axis of a tensor along which channels or heads lie; None for a bias that stays."""
    if role not in ("o", "down"):
        return 0
    return 1 if kind == "weight" else None


def audit_others(reader: CheckpointReader, stored: CheckpointReader) -> Iterator[ModuleAudit]:
    """Compare embeddings, last norm and head, bit for bit."""
    prefix = f"{reader.family.layers_path}."
    for name in reader.tensors:
        if not name.startswith(prefix):
            same = same_bits("untouched", reader.load(name)[""], stored.load(name)[""])
            yield ModuleAudit(name, "as it was", (same,))


def audit_outside(reader: CheckpointReader, stored: CheckpointReader) -> ModuleAudit:
    """Compare what is around the language model of a multimodal one, bit for bit."""
    names = (reader.outside.keys(), stored.outside.keys())
    checks = [equal("names", sorted(names[0]), sorted(names[1]))]
    if checks[0].passed:
        given, held = reader.load_outside(), stored.load_outside()
        checks += [same_bits(name, given[name], held[name]) for name in given]
    return ModuleAudit("outside the language model", "as it was", tuple(checks))
