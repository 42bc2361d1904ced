"""``lorap merge``: an adapter put into the model it was trained on, as a checkpoint of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from lorap import checks
from lorap.checkpoint.card import model_card
from lorap.checkpoint.files import CALIBRATION, REPORT, REPORT_PAGE, STATISTICS
from lorap.checkpoint.reader import CheckpointReader, open_compressed, read_tensors
from lorap.checkpoint.writer import CheckpointWriter, check_output
from lorap.data.calibration import Calibration, calibration_from_ids, load_calibration
from lorap.data.tokenizers import load_tokenizer
from lorap.errors import UsageError
from lorap.families import Family, LayerStructure
from lorap.families.fused import join
from lorap.ops.joint import split, stacked
from lorap.ops.lora import (
    merge_dense,
    merge_factors,
    merge_same_size,
    merged_product,
    merged_rank,
    stacked_update,
)
from lorap.ops.lowrank import column_scale, retained_energy, weighted_error
from lorap.pages.report_page import report_page
from lorap.pipeline.activations import Kept
from lorap.pipeline.forward import Decoder, Samples
from lorap.pipeline.inspection import check_weight
from lorap.pipeline.layers import run_compressed
from lorap.pipeline.progress import Progress
from lorap.pipeline.statistics import INPUT_OF, Wanted, collect
from lorap.recovery.adapter import Adapter, Update, Updates, open_adapter
from lorap.recovery.record import check_complete, fingerprint, read_record
from lorap.report import read_report
from lorap.runtime import choose_device, choose_dtype, versions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Mode = Literal["exact", "same-size"]


def merge_adapter(
    model: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    mode: Mode = "exact",
    calibration: str | None = None,
    field: str | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Merge an adapter into a compressed model, one layer in memory at a time.

    Parameters
    ----------
    model : str or Path
        Folder that ``lorap compress`` wrote; it is left as it is.
    adapter : str or Path
        Folder that ``lorap recover`` wrote, or PEFT.
    output : str or Path
        Folder to write; afterwards it is whole, or, if the run did not end well, absent.
    mode : {"exact", "same-size"}
        Whether factored matrices grow by the rank of their updates, or are cut back to the rank
        they had.
    calibration : str, optional
        Source of the statistics for ``same-size``, in samples as the model was compressed with; by
        default the ids kept in the model's folder.
    field : str, optional
        Field of a ``.json``, ``.jsonl`` or ``.parquet`` calibration file.
    batch_size : int, optional
        Samples in a forward.
    device, dtype : str, optional
        Of the forwards, as for ``lorap compress``.
    overwrite : bool
        Replace a folder that an earlier run wrote.
    command : str, optional
        The command line, for the report.
    progress : callable, optional
        Called with the layers done and the layers in all.

    Returns
    -------
    dict
        The report, as ``lorap_report.json`` holds it: that of the compression, its sizes brought up
        to date, with a section ``recovery``.

    Raises
    ------
    UsageError
        If anything given cannot be used; before any work, and with nothing written.
    LorapError
        If a merged weight is not finite.

    Notes
    -----
    SPEC: ``lora.sequence``.
    """
    started = time.perf_counter()
    checks.choice("mode", mode, get_args(Mode))
    if mode == "exact":
        for name, value in (
            ("calibration", calibration),
            ("field", field),
            ("batch_size", batch_size),
            ("device", device),
            ("dtype", dtype),
        ):
            if value is not None:
                raise UsageError(f"{name} {value}: has no effect with mode exact")
    if batch_size is not None:
        checks.whole_number("batch_size", batch_size, 1)
    where, kind = choose_device(device or "auto"), choose_dtype(dtype)
    given = [Path(os.path.expanduser(name)) for name in (model, adapter, calibration or "") if name]
    inputs = [path for path in given if path.exists()]
    check_output(output, overwrite=overwrite, inputs=inputs)
    reader = open_compressed(model)
    if reader.outer is not None:
        raise UsageError(f"{model} is a multimodal model: expected a language model")
    check_complete(reader)
    report = read_report(reader.path, reader.source)
    found = open_adapter(adapter, reader)
    record = read_record(found.path)
    if record is not None and record["model_fingerprint"] != fingerprint(reader):
        raise UsageError(f"{adapter} was trained on {record['model']}, which is not {model}")
    plans = [
        LayerMerge.of(reader.family, reader.config, index, updates)
        for index, updates in enumerate(found.layers)
    ]
    if mode == "same-size" and not any(plan.groups for plan in plans):
        raise UsageError(
            f"mode same-size: {adapter} has no update around a factored matrix, so that mode exact "
            "keeps every size"
        )
    samples = _samples(reader, report, calibration, field) if mode == "same-size" else None
    growth = sum(group.growth for plan in plans for group in plan.groups) if mode == "exact" else 0
    size = reader.size_bytes + growth * reader.dtype.itemsize
    check_output(output, overwrite=overwrite, needed_bytes=size, inputs=inputs)
    structure = [plan.structure if mode == "exact" else plan.before for plan in plans]
    config = reader.family.compressed_config(reader.config, structure)
    decoder = Decoder(
        reader.family,
        reader.config,
        lambda index: reader.load(f"{reader.family.layers_path}.{index}."),
        reader.load_others,
        where,
        kind or reader.dtype,
    )
    with CheckpointWriter(output, overwrite=overwrite) as writer:
        tell = progress or (lambda done, total: None)
        tell(0, len(plans))
        merged = (
            merge_exactly(decoder, found, plans)
            if samples is None
            else merge_to_size(
                decoder, found, plans, Samples(samples.input_ids, batch_size=batch_size)
            )
        )
        modules: dict[str, dict[str, Any]] = {}
        for index, layer in enumerate(merged):
            prefix = f"{reader.family.layers_path}.{index}."
            writer.write_shard({f"{prefix}{name}": t for name, t in layer.tensors.items()})
            modules |= {f"layers.{index}.{name}": said for name, said in layer.modules.items()}
            tell(index + 1, len(plans))
        expected = reader.family.tensor_shapes(config)
        others = {name: t for name, t in reader.load_others().items() if name in expected}
        writer.write_shard(others)
        summary = _merged_report(report, growth, expected)
        summary["recovery"] = {
            "adapter": str(adapter),
            "training": record,
            "merge": {
                "mode": mode,
                "factors": sorted({u.factor for layer in found.layers for u in layer.values()}),
                "parameters": {
                    "before": report["parameters"]["after"],
                    "after": summary["parameters"]["after"],
                },
                "modules": modules,
                "calibration": None
                if samples is None
                else {"source": samples.source, "fingerprint": samples.fingerprint},
                "seconds": time.perf_counter() - started,
                "versions": versions(),
                "command": command
                or f"lorap.merge_adapter({str(model)!r}, {str(adapter)!r}, {str(output)!r}, "
                f"mode={mode!r})",
            },
            "previous": report.get("recovery"),
        }
        writer.copy_side_files(reader.path)
        for name in (CALIBRATION, STATISTICS):
            if (reader.path / name).is_file():
                writer.write_safetensors(name, read_tensors(reader.path / name))
        writer.write_json(REPORT, summary)
        writer.write_text(REPORT_PAGE, report_page(summary, name=Path(output).name))
        card = model_card(summary, name=Path(output).name, original=reader.path)
        writer.write_text("README.md", card)
        writer.commit(config)
    return summary


@dataclass(frozen=True)
class Group:
    """A factored linear with an update around it; or q and k that share a right factor.

    Attributes
    ----------
    key : str
        Its name in the structure of the layer.
    names : tuple of str
        The linears.
    right : str
        Name of the right factor.
    shape : (d_out, d_in)
        Of the linears stacked.
    rank, update_rank : int
    """

    key: str
    names: tuple[str, ...]
    right: str
    shape: tuple[int, int]
    rank: int
    update_rank: int

    @property
    def merged(self) -> int | None:
        """Rank after an exact merge; None where the matrix becomes dense."""
        return merged_rank(self.shape, self.rank, self.update_rank)

    @property
    def parameters_before(self) -> int:
        """Of the factors."""
        return self.rank * sum(self.shape)

    @property
    def growth(self) -> int:
        """Parameters that an exact merge adds."""
        after = prod(self.shape) if self.merged is None else self.merged * sum(self.shape)
        return after - self.parameters_before


@dataclass(frozen=True)
class LayerMerge:
    """What becomes of a layer.

    Attributes
    ----------
    before, structure : mapping
        As the configuration has it, before and after an exact merge.
    groups : tuple of Group
    """

    before: LayerStructure
    structure: LayerStructure
    groups: tuple[Group, ...]

    @classmethod
    def of(
        cls, family: Family, config: PretrainedConfig, index: int, updates: Updates
    ) -> LayerMerge:
        """Plan layer `index` of a compressed model."""
        compressed: Any = config
        before: LayerStructure = compressed.layer_structure(index)
        structure = {name: dict(entry) for name, entry in before.items()}
        groups = tuple(_groups(family, config, index, updates))
        for group in groups:
            entry = structure.pop(group.key)
            if group.merged is not None:
                structure[group.key] = entry | {"rank": group.merged}
            elif "bias" in entry:
                structure |= {name: {"bias": True} for name in group.names}
        return cls(before, structure, groups)


def _groups(
    family: Family, config: PretrainedConfig, index: int, updates: Updates
) -> Iterator[Group]:
    """Yield the factored linears of a layer that have an update around them."""
    linears: Any = config
    by_key: dict[str, list[str]] = {}
    shapes = linears.linears(index)
    for name, shape in shapes.items():
        if shape.rank is not None:
            by_key.setdefault(family.joint_qk if shape.joint else name, []).append(name)
    for key, names in by_key.items():
        updated = [name for name in names if name in updates]
        if not updated:
            continue
        rank = shapes[names[0]].rank
        yield Group(
            key,
            tuple(names),
            f"{family.joint_right if key == family.joint_qk else key + '.right'}.weight",
            (sum(shapes[name].d_out for name in names), shapes[names[0]].d_in),
            rank,
            sum(updates[name].right.shape[0] for name in updated),
        )


@dataclass(frozen=True)
class MergedLayer:
    """A decoder layer with its updates merged.

    Attributes
    ----------
    tensors : dict
        Names relative to the layer, in the dtypes of the model's own.
    modules : dict
        What there is to say of each module that changed its form, by name.
    outputs : list of Kept
        Of the merged layer, ``(batch, L, hidden)`` per batch of samples; none where there are no
        samples.
    """

    tensors: dict[str, Tensor]
    modules: dict[str, dict[str, Any]]
    outputs: list[Kept]


def merge_exactly(
    decoder: Decoder, adapter: Adapter, plans: Sequence[LayerMerge]
) -> Iterator[MergedLayer]:
    """Merge every layer so that it computes what it does with its updates beside it.

    Parameters
    ----------
    decoder : Decoder
        Of the compressed model.
    adapter : Adapter
    plans : sequence

    Notes
    -----
    SPEC: ``lora.merge-factors``, ``lora.break-even``, ``lora.joint``.
    """
    for index, (plan, updates) in enumerate(zip(plans, adapter.layers, strict=True)):
        tensors = exact_layer(decoder.family, plan, decoder.load_layer(index), updates)
        _check_finite(index, tensors)
        said = {
            group.key: {
                "rank_before": group.rank,
                "rank": group.merged,
                "parameters_before": group.parameters_before,
                "parameters": group.parameters_before + group.growth,
            }
            for group in plan.groups
        }
        yield MergedLayer(tensors, said, [])


def merge_to_size(
    decoder: Decoder, adapter: Adapter, plans: Sequence[LayerMerge], samples: Samples
) -> Iterator[MergedLayer]:
    """Merge every layer, and cut its factored matrices back to the rank they had.

    Each layer is fed by the merged layers before it. One forward of the exactly merged layer gives
    the statistics; the one that is cut back then computes the next layer's input.

    Parameters
    ----------
    decoder : Decoder
        Of the compressed model.
    adapter : Adapter
    plans : sequence
    samples : Samples

    Notes
    -----
    SPEC: ``lora.sequence``, ``lora.merge-same-size``.
    """
    exact_config = decoder.compressed_config([plan.structure for plan in plans])
    config = decoder.compressed_config([plan.before for plan in plans])
    family = decoder.family
    roles = {name: role for role, name in {**family.attention, **family.ffn}.items()}
    batches = decoder.embed(samples, decoder.store(samples))
    for index, (plan, updates) in enumerate(zip(plans, adapter.layers, strict=True)):
        original = decoder.tensors(index)
        updates = {name: _to(update, decoder.device) for name, update in updates.items()}
        kinds = {group: INPUT_OF[roles[group.names[0]]] for group in plan.groups}
        wanted = {
            kind: Wanted(family.dense_name(group.names[0]), frozenset({"squares"}))
            for group, kind in kinds.items()
        }
        inputs = {}
        if wanted:
            layer = decoder.build(exact_config, index, exact_layer(family, plan, original, updates))
            inputs = collect(layer, wanted, batches, index)
            del layer
        tensors, said = add_updates(original, updates), {}
        for group, kind in kinds.items():
            said[group.key] = _cut_(tensors, group, updates, inputs[kind].norms)
        _check_finite(index, tensors)
        run_compressed(decoder, config, index, tensors, batches)
        yield MergedLayer(tensors, said, [batch.kept for batch in batches])


def add_updates(tensors: Mapping[str, Tensor], updates: Updates) -> dict[str, Tensor]:
    """Return a layer with the updates of its matrices added: the dense ones, and single factors.

    Parameters
    ----------
    tensors : mapping
        Of a decoder layer, names relative to it.
    updates : mapping

    Notes
    -----
    SPEC: ``lora.merge-dense``.
    """
    merged = dict(tensors)
    for name, update in updates.items():
        weight = tensors.get(f"{name}.weight")
        if weight is not None:
            new = merge_dense(weight, update.left, update.right, update.factor)
            merged[f"{name}.weight"] = new.to(weight.dtype)
    return merged


def exact_layer(
    family: Family, plan: LayerMerge, tensors: Mapping[str, Tensor], updates: Updates
) -> dict[str, Tensor]:
    """Return a layer that computes what it does with its updates beside it.

    Parameters
    ----------
    family : Family
    plan : LayerMerge
    tensors : mapping
        Of the layer, names relative to it.
    updates : mapping
    """
    merged = add_updates(tensors, updates)
    for group in plan.groups:
        parts = _stack(merged, group, updates)
        sizes = [merged[f"{name}.left.weight"].shape[0] for name in group.names]
        dtype = merged[group.right].dtype
        if group.merged is not None:
            left, right = merge_factors(*parts)
            merged[group.right] = right.to(dtype)
            for name, rows in zip(group.names, split(left, sizes), strict=True):
                merged[f"{name}.left.weight"] = rows.to(dtype)
            continue
        del merged[group.right]
        for name, rows in zip(group.names, split(merged_product(*parts), sizes), strict=True):
            del merged[f"{name}.left.weight"]
            merged[f"{name}.weight"] = rows.to(dtype)
            if f"{name}.left.bias" in merged:
                merged[f"{name}.bias"] = merged.pop(f"{name}.left.bias")
    return join(family, plan.structure, merged)


def _cut_(
    tensors: dict[str, Tensor], group: Group, updates: Updates, norms: Tensor
) -> dict[str, Any]:
    """Put merged factors of the old rank in the place of the old ones; say how good they are."""
    parts = _stack(tensors, group, updates)
    scale = column_scale(norms)
    left, right, singular_values = merge_same_size(*parts, scale)
    dtype = tensors[group.right].dtype
    left, right = left.to(dtype), right.to(dtype).contiguous()
    error = weighted_error(merged_product(*parts), left.double() @ right.double(), scale)
    whole = float(singular_values.square().sum())
    sizes = [tensors[f"{name}.left.weight"].shape[0] for name in group.names]
    tensors[group.right] = right
    for name, rows in zip(group.names, split(left, sizes), strict=True):
        tensors[f"{name}.left.weight"] = rows
    return {
        "rank": group.rank,
        "relative_weighted_error": (error / whole) ** 0.5 if whole else 0.0,
        "retained_energy": retained_energy(singular_values, group.rank),
    }


def _stack(
    tensors: Mapping[str, Tensor], group: Group, updates: Updates
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Return left, right, both matrices of the update and its factor, the linears stacked."""
    lefts, right = [tensors[f"{name}.left.weight"] for name in group.names], tensors[group.right]
    factor = next(updates[name].factor for name in group.names if name in updates)
    pairs = []
    for name, rows in zip(group.names, lefts, strict=True):
        update = updates.get(name)
        if update is None:
            pairs.append((rows.new_zeros(len(rows), 0), right.new_zeros(0, right.shape[1])))
        else:
            # Updates of different ranks have different factors.
            same = update.factor == factor
            left = update.left if same else update.left * (update.factor / factor)
            pairs.append((left, update.right))
    return stacked(lefts), right, *stacked_update(pairs), factor


def _to(update: Update, device: torch.device) -> Update:
    return Update(update.left.to(device), update.right.to(device), update.factor)


def _check_finite(index: int, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        check_weight(f"layers.{index}.{name}", tensor, "the merged weight")


def _samples(
    reader: CheckpointReader, report: Mapping[str, Any], source: str | None, field: str | None
) -> Calibration:
    """Return the samples to take the statistics on."""
    said = report["calibration"]
    limits: dict[str, Any] = {
        "vocab_size": reader.config.vocab_size,
        "max_positions": reader.config.max_position_embeddings,
    }
    if source is not None:
        return load_calibration(
            source,
            tokenizer=lambda: load_tokenizer(reader.path),
            samples=said["samples"],
            seqlen=said["seqlen"],
            seed=said["seed"],
            field=field,
            **limits,
        )
    if field is not None:
        raise UsageError(f"field {field}: has no effect without calibration")
    file = reader.path / CALIBRATION
    if not file.is_file():
        raise UsageError(
            f"{reader.source} holds no {CALIBRATION}: give the data for the statistics "
            "(--calibration)"
        )
    ids = read_tensors(file)["input_ids"]
    return calibration_from_ids(ids, source=str(said["source"]), **limits)


def _merged_report(
    report: Mapping[str, Any], growth: int, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return the report of the compression with the sizes of the merged model."""
    before = report["parameters"]["before"]
    after = sum(prod(shape) for shape in expected.values())
    macs = report["macs"]
    return {
        **report,
        "achieved_ratio": 1 - after / before,
        "parameters": {"before": before, "after": after},
        # A weight is a multiply-accumulate for each token.
        "macs": {**macs, "after": macs["after"] + growth * macs["tokens"]},
    }
