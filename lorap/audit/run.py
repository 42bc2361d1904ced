"""The audit of a checkpoint, from its folder to the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lorap.audit.context import Context, embedded
from lorap.audit.files import (
    audit_config,
    audit_others,
    audit_outside,
    audit_report,
    audit_tensors,
)
from lorap.audit.forward import Compute, check_window, llama_shape
from lorap.audit.layers import audit_layers
from lorap.audit.measurements import audit_measurements, layers_of
from lorap.audit.record import Record, calibration_ids
from lorap.audit.results import AuditResult
from lorap.audit.sizes import make_plan
from lorap.checkpoint.reader import open_checkpoint, open_compressed
from lorap.errors import UsageError
from lorap.runtime import choose_dtype

Progress = Callable[[int, int], None]
"""Called with the layers done and the layers in all, those of every pass counted."""

_SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def audit(
    original: str | Path,
    compressed: str | Path,
    *,
    layers: Sequence[int] | None = None,
    calibration: str | Path | None = None,
    progress: Progress | None = None,
) -> AuditResult:
    """Recompute what a compressed checkpoint must hold, and compare.

    Parameters
    ----------
    original : str or Path
        The model that was compressed: a local folder or a hub name.
    compressed : str or Path
        Folder that ``lorap compress`` wrote.
    layers : sequence of int, optional
        Decoder layers to recompute; all by default. Those before them are run, not recomputed.
    calibration : str or Path, optional
        A source as ``lorap compress`` takes it, to be used with the settings recorded; by default
        the ids kept in the checkpoint.
    progress : callable, optional
        Called with the layers done and the layers in all, those of every pass counted.

    Returns
    -------
    AuditResult

    Raises
    ------
    UsageError
        If either folder cannot be used, the two do not belong together by their shapes, a file is
        missing or damaged, or the reference does not know what the model asks for.
    LorapError
        If activations or gradients are not finite.
    """
    reader, stored = open_checkpoint(original), open_compressed(compressed)
    record = Record.read(stored)
    for name in _SHAPE_FIELDS:
        ours, theirs = (getattr(config, name, None) for config in (reader.config, stored.config))
        if ours != theirs:
            raise UsageError(
                f"{compressed} was not made from {original}: {name} is {theirs}, and {ours} there"
            )
    chosen = _chosen_layers(layers, int(reader.config.num_hidden_layers))
    shape = llama_shape(reader.config, reader.family)
    ids = calibration_ids(reader, stored, record.settings, calibration)
    check_window(reader.config, ids.shape[1])
    plan = make_plan(reader, record)
    compute = choose_dtype(record.settings.dtype) or reader.dtype

    modules = [
        audit_report(record, plan, ids),
        audit_config(reader, stored, plan),
        audit_tensors(reader, stored, plan),
    ]
    # What the other checks compare entry by entry has to be there, and of the right shape.
    if modules[-1].passed:
        context = Context(reader, stored, record, plan, shape, Compute(compute))
        modules += audit_others(reader, stored)
        if reader.outside:
            modules.append(audit_outside(reader, stored))
        advance = _steps(progress, context, chosen)
        if record.settings.measures:
            modules += audit_measurements(context, ids, chosen, advance)
        modules += audit_layers(context, embedded(context, ids), chosen, advance)
    return AuditResult(
        original=str(original),
        compressed=str(compressed),
        storage=str(stored.dtype).removeprefix("torch."),
        compute=str(compute).removeprefix("torch."),
        layers=chosen,
        modules=tuple(modules),
    )


def _chosen_layers(layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(count))
    if not layers:
        raise UsageError("layers: expected at least one layer, got none")
    for layer in layers:
        if not 0 <= layer < count:
            raise UsageError(f"layers: expected layers from 0 to {count - 1}, got {layer}")
    return tuple(sorted(set(layers)))


def _steps(
    progress: Progress | None, context: Context, chosen: Sequence[int]
) -> Callable[[], None]:
    """Return what counts the layers done, over all passes."""
    backward = range(0)
    if context.record.settings.measures_gradients:
        backward = range(chosen[0], context.shape.layers)
    total = chosen[-1] + 1 + len(layers_of(context, chosen)) + len(backward)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    return advance
