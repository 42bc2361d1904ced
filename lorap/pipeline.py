"""Algorithm 1: compress a model layer by layer, each fed by the compressed layers before it."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lorap import report
from lorap.checkpoint import files
from lorap.checkpoint.card import model_card
from lorap.checkpoint.reader import (
    CheckpointReader,
    fetch_tokenizer_files,
    main_dtype,
    open_checkpoint,
    read_config,
)
from lorap.checkpoint.writer import CheckpointWriter, check_output
from lorap.config import CompressionConfig
from lorap.data.calibration import Calibration, calibration_from_ids, load_calibration
from lorap.errors import LorapError, UsageError
from lorap.families import Family, family_of
from lorap.families.fused import join, split
from lorap.ops.importance import channel_importance, group_importance, weight_importance
from lorap.ops.lowrank import awsvd, column_scale, retained_energy, weighted_error
from lorap.ops.precision import compute_dtype
from lorap.ops.pruning import kept_channels, prune_ffn
from lorap.ops.statistics import feature_norms, sum_of_squares
from lorap.plan import LayerPlan, ModulePlan, Plan, make_plan
from lorap.runtime import choose_device, choose_dtype

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENS_PER_BATCH = 8192
"""Tokens in a calibration forward where the user gives no batch size."""

Progress = Callable[[int, int], None]
"""Called before the first layer and after each with the layers done and the layers in all."""


@dataclass(frozen=True)
class LayerResult:
    """One decoder layer, compressed.

    Attributes
    ----------
    index : int
    tensors : dict
        The layer's tensors, names relative to it, in the dtypes of the originals.
    modules : dict
        What the report says of each module, by name.
    norms : dict
        Norms of the linears' input features that the layer was compressed with, ``(d_in,)`` in
        float64, by kind of input: ``attention`` (of q, k and v), ``o``, ``ffn`` (of gate and up)
        and ``down``; those that the plan needed.
    seconds : float
        Wall time of the layer.
    outputs : list of Tensor
        Output of the compressed layer, ``(batch, L, hidden)`` per calibration batch: the input of
        the next layer.
    """

    index: int
    tensors: dict[str, Tensor]
    modules: dict[str, dict[str, Any]]
    norms: dict[str, Tensor]
    seconds: float
    outputs: list[Tensor]


def compress(
    model: PreTrainedModel,
    config: CompressionConfig,
    *,
    calibration: str | Path | Tensor | npt.NDArray[Any],
    attention_mask: Tensor | npt.NDArray[Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    field: str | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Compress a model in memory.

    Parameters
    ----------
    model : PreTrainedModel
        Of a supported family, with its language-modelling head; it is left as it is and shares no
        memory with the result.
    config : CompressionConfig
        ``device`` auto computes where the model is.
    calibration : source or ids
        A source as ``lorap compress`` takes it, or token ids ``(N, L)``: these are taken whole,
        whatever ``config.samples`` and ``config.seqlen`` say.
    attention_mask : (N, L) Tensor or array, optional
        For ids with padding: nonzero where a token counts.
    tokenizer : optional
        For a calibration source that holds text.
    field : str, optional
        Field of a ``.jsonl`` or ``.parquet`` calibration file.
    progress : callable, optional

    Returns
    -------
    PreTrainedModel
        The compressed model, in the dtypes and on the device of the original.

    Raises
    ------
    UsageError
        If the model, the ratio or the calibration data cannot be used.
    LorapError
        If weights or activations are not finite.
    """
    family = family_of(model.config)
    if model.config is not model.config.get_text_config():
        raise UsageError(
            f"expected a language model, got {type(model).__name__}; use compress_checkpoint, "
            "which compresses the language model in it"
        )
    model_config = _config_as_run(model)
    plan = make_plan(model_config, family, config)
    chosen = _calibration_for(model, config, calibration, tokenizer, field)
    mask = None if attention_mask is None else torch.as_tensor(attention_mask)
    if mask is not None and mask.shape != chosen.input_ids.shape:
        raise UsageError(
            f"attention_mask: expected the shape of the ids, {tuple(chosen.input_ids.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    device = model.device if config.device == "auto" else choose_device(config.device)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        _check_weight(name, tensor)
    prefix = f"{family.layers_path}."

    def load_layer(index: int) -> dict[str, Tensor]:
        start = f"{prefix}{index}."
        return {name[len(start) :]: t for name, t in state.items() if name.startswith(start)}

    others = {name: t for name, t in state.items() if not name.startswith(prefix)}
    compressed = {name: tensor.clone() for name, tensor in others.items()}
    if progress is not None:
        progress(0, len(plan.layers))
    for layer in compress_layers(
        family,
        model_config,
        plan,
        config,
        others,
        load_layer,
        chosen.input_ids,
        mask=mask,
        device=device,
        dtype=choose_dtype(config.dtype)
        or main_dtype((tensor.dtype, tensor.nbytes) for tensor in model.parameters()),
    ):
        for name, tensor in layer.tensors.items():
            compressed[f"{prefix}{layer.index}.{name}"] = tensor.to(model.device)
        if progress is not None:
            progress(layer.index + 1, len(plan.layers))
    return _assemble(family, model, model_config, plan, compressed)


def compress_checkpoint(
    model: str | Path,
    output: str | Path,
    config: CompressionConfig,
    *,
    calibration: str,
    field: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    allow_bin: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress a checkpoint on disk or on the hub into a folder, one layer in memory at a time.

    Parameters
    ----------
    model : str or Path
        A local folder or a hub name.
    output : str or Path
        Folder to write; afterwards it is whole, or, if the run did not end well, absent.
    config : CompressionConfig
    calibration : str
        A source as ``lorap compress`` takes it.
    field : str, optional
        Field of a ``.jsonl`` or ``.parquet`` calibration file.
    revision : str, optional
        Of a model on the hub.
    overwrite : bool
        Replace a folder that an earlier compression wrote.
    allow_bin : bool
        Read pickled weights (tensors only) where there are no others.
    command : str, optional
        The command line, for the report.
    progress : callable, optional

    Returns
    -------
    dict
        The report, as ``lorap_report.json`` holds it.

    Raises
    ------
    UsageError
        If anything given cannot be used; before any work, and with nothing written.
    LorapError
        If weights or activations are not finite, or the hub cannot be reached.
    """
    started = time.perf_counter()
    output = Path(output)
    given = (Path(os.path.expanduser(name)) for name in (model, calibration))
    inputs = [path for path in given if path.exists()]
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype)
    check_output(output, overwrite=overwrite, inputs=inputs)
    # What the configuration and the calibration data show wrong, before the weights are fetched.
    model_config = read_config(model, revision=revision)
    make_plan(model_config, family_of(model_config), config)
    chosen = load_calibration(
        calibration,
        tokenizer=lambda: _load_tokenizer(fetch_tokenizer_files(model, revision=revision)),
        vocab_size=model_config.vocab_size,
        max_positions=model_config.max_position_embeddings,
        samples=config.samples,
        seqlen=config.seqlen,
        seed=config.seed,
        field=field,
    )
    reader = open_checkpoint(model, revision=revision, allow_bin=allow_bin)
    family = reader.family
    plan = make_plan(reader.config, family, config)
    check_output(
        output, overwrite=overwrite, needed_bytes=_bytes_after(reader, plan), inputs=inputs
    )
    for name, tensor in reader.iter_tensors():
        _check_weight(name, tensor)
    prefix = f"{family.layers_path}."
    records: list[tuple[dict[str, dict[str, Any]], float]] = []
    norms: dict[str, Tensor] = {}
    with CheckpointWriter(output, overwrite=overwrite) as writer:
        others = reader.load_others()
        if progress is not None:
            progress(0, len(plan.layers))
        for layer in compress_layers(
            family,
            reader.config,
            plan,
            config,
            others,
            lambda index: reader.load(f"{prefix}{index}."),
            chosen.input_ids,
            device=device,
            dtype=dtype or reader.dtype,
        ):
            writer.write_shard(
                {
                    f"{reader.prefix}{prefix}{layer.index}.{name}": tensor
                    for name, tensor in layer.tensors.items()
                }
            )
            records.append((layer.modules, layer.seconds))
            norms |= {f"{prefix}{layer.index}.{kind}": x for kind, x in layer.norms.items()}
            if progress is not None:
                progress(layer.index + 1, len(plan.layers))
        writer.write_shard({f"{reader.prefix}{name}": t for name, t in others.items()})
        if reader.outside:
            writer.write_shard(reader.load_outside())
        summary = report.make_report(
            model=reader.source,
            revision=revision,
            config=config,
            plan=plan,
            calibration=chosen,
            layers=records,
            device=device,
            seconds=time.perf_counter() - started,
            command=command
            or f"lorap.compress_checkpoint({str(model)!r}, {str(output)!r}, {config}, "
            f"calibration={calibration!r})",
        )
        writer.copy_side_files(reader.path)
        writer.write_safetensors(files.CALIBRATION, {"input_ids": chosen.input_ids})
        writer.write_safetensors(files.STATISTICS, norms)
        writer.write_json(files.REPORT, summary)
        card = model_card(
            summary, name=output.name, original=reader.path, multimodal=reader.outer is not None
        )
        writer.write_text("README.md", card)
        writer.commit(family.compressed_config(reader.config, plan.structure()), reader.outer)
    return summary


def compress_layers(
    family: Family,
    model_config: PretrainedConfig,
    plan: Plan,
    config: CompressionConfig,
    others: Mapping[str, Tensor],
    load_layer: Callable[[int], Mapping[str, Tensor]],
    input_ids: Tensor,
    *,
    mask: Tensor | None = None,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[LayerResult]:
    """Compress one decoder layer after the other.

    Parameters
    ----------
    family : Family
    model_config : PretrainedConfig
        Of the original model.
    plan : Plan
    config : CompressionConfig
    others : mapping
        The tensors outside the decoder layers, under their full names.
    load_layer : callable
        Returns the original tensors of a layer, names relative to it.
    input_ids : (N, L) Tensor
    mask : (N, L) Tensor, optional
        Nonzero where a token counts.
    device : torch.device
        Where to compute.
    dtype : torch.dtype
        Of the forwards; decompositions are done in float64.

    Yields
    ------
    LayerResult

    Raises
    ------
    LorapError
        If weights or activations are not finite; the message names layer and module.

    Notes
    -----
    SPEC: ``algorithm.sequence``: one forward of the uncompressed layer gives the statistics of all
    its linears; the compressed layer then computes the next layer's input.
    """
    dense_config = family.compressed_config(model_config, None)
    compressed_config = family.compressed_config(model_config, plan.structure())
    for config_of_layers in (dense_config, compressed_config):
        # One kernel for models in memory and on disk, so that both give the same weights.
        config_of_layers._attn_implementation = family.kernel
    batches = _embed(family, dense_config, others, input_ids, mask, config, device, dtype)
    for index, layer_plan in enumerate(plan.layers):
        started = time.perf_counter()
        where = f"layers.{index}"
        original = {name: tensor.to(device) for name, tensor in load_layer(index).items()}
        needed = _inputs_needed(family, layer_plan)
        norms: dict[str, Tensor] = {}
        if needed:
            dense = _build_layer(family, dense_config, index, original, dtype)
            squares = _collect(dense, needed, batches, index)
            norms = {kind: feature_norms(total) for kind, total in squares.items()}
            del dense
        parts = split(family, dense_config, original)
        tensors, modules = _compress_layer(family, parts, layer_plan, norms, config, where)
        tensors = join(family, plan.structure()[index], tensors)
        layer = _build_layer(family, compressed_config, index, tensors, dtype)
        for batch in batches:
            batch.hidden = batch.run(layer, index)
            if not torch.isfinite(batch.hidden).all():
                raise LorapError(
                    f"{where}: the output of the compressed layer holds NaN or inf; "
                    f"computed in {dtype}: a wider --dtype may help"
                )
        yield LayerResult(
            index,
            tensors,
            modules,
            norms,
            time.perf_counter() - started,
            [batch.hidden for batch in batches],
        )


@dataclass
class _Batch:
    """Some calibration samples on their way through the model.

    ``calls`` holds the keyword arguments that the model passes to each of its layers.
    """

    hidden: Tensor
    calls: Sequence[Mapping[str, Any]]
    mask: Tensor | None

    def run(self, layer: nn.Module, index: int) -> Tensor:
        with torch.no_grad():
            output: Tensor | tuple[Tensor, ...] = layer(self.hidden, **self.calls[index])
        return output[0] if isinstance(output, tuple) else output


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes how it is called and passes its input on.

    Some models of transformers 4 expect a tuple of a layer, and ask it for the type of its
    attention; the others pass the tuple on as it is.
    """

    def __init__(self, attention_type: str | None) -> None:
        super().__init__()
        self.attention_type = attention_type
        self.hidden = torch.empty(0)
        self.call: Mapping[str, Any] = {}

    def forward(self, hidden_states: Tensor | tuple[Tensor], **kwargs: Any) -> tuple[Tensor]:
        self.hidden = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
        self.call = kwargs
        return (self.hidden,)


def _embed(
    family: Family,
    dense_config: PretrainedConfig,
    others: Mapping[str, Tensor],
    input_ids: Tensor,
    mask: Tensor | None,
    config: CompressionConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> list[_Batch]:
    """Embed the samples, and learn from the model itself what it passes to its layers."""
    with torch.device("meta"):
        base = family.base_class(dense_config)
    types = getattr(dense_config, "layer_types", None) or [None] * dense_config.num_hidden_layers
    recorders = [_Recorder(attention_type) for attention_type in types]
    base.layers = nn.ModuleList(recorders)
    prefix = family.layers_path.removesuffix("layers")
    base.load_state_dict(
        {
            name.removeprefix(prefix): tensor.to(device, dtype)
            for name, tensor in others.items()
            if name.startswith(prefix)
        },
        assign=True,
    )
    base.norm = nn.Identity()
    _make_buffers_(base, device)
    base.train(False)
    batches = []
    size = config.batch_size or max(1, TOKENS_PER_BATCH // input_ids.shape[1])
    for start in range(0, input_ids.shape[0], size):
        ids = input_ids[start : start + size].to(device)
        batch_mask = None if mask is None else mask[start : start + size].to(device)
        with torch.no_grad():
            base(input_ids=ids, attention_mask=batch_mask, use_cache=False)
        calls = [recorder.call for recorder in recorders]
        batches.append(_Batch(recorders[0].hidden, calls, batch_mask))
    return batches


def _make_buffers_(base: Any, device: torch.device) -> None:
    """Compute the buffers of a model built on the meta device, of which no checkpoint holds any."""
    with torch.device(device):
        for name, module in list(base.named_modules()):
            if name.startswith("rotary_emb"):
                setattr(base, name, type(module)(config=module.config))
            elif hasattr(module, "embed_scale"):
                # Gemma's embedding; the square root is the same in all its versions.
                module.embed_scale = torch.tensor(base.config.hidden_size**0.5)
    assert not any(buffer.is_meta for buffer in base.buffers())


def _build_layer(
    family: Family,
    config: PretrainedConfig,
    index: int,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> nn.Module:
    with torch.device("meta"):
        layer = family.decoder_layer(config, index)
    layer.load_state_dict({name: t.to(dtype) for name, t in tensors.items()}, assign=True)
    layer.train(False)
    return layer


def _inputs_needed(family: Family, layer_plan: LayerPlan) -> dict[str, str]:
    """Return the inputs whose statistics the plan asks for: kind of input to a module that has it.

    q, k and v share one input, as do gate and up.
    """
    needed: dict[str, str] = {}
    for role, name in family.attention.items():
        if layer_plan[name].kind == "low_rank":
            needed.setdefault("o" if role == "o" else "attention", family.dense_name(name))
    if layer_plan[family.ffn_block].kind == "channels":
        needed["ffn"] = family.dense_name(family.ffn["up"])
        needed["down"] = family.ffn["down"]
    return needed


def _collect(
    layer: nn.Module, needed: Mapping[str, str], batches: Iterable[_Batch], index: int
) -> dict[str, Tensor]:
    """Return the sums of squares of the needed inputs over one forward of the layer.

    SPEC: ``stats.sum-of-squares``, ``stats.padding``.
    """
    squares: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def listen(kind: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            total = sum_of_squares(inputs[0], mask)
            squares[kind] = squares[kind] + total if kind in squares else total

        return hook

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(listen(kind))
        for kind, name in needed.items()
    ]
    for batch in batches:
        mask = batch.mask
        batch.run(layer, index)
    for handle in handles:
        handle.remove()
    for kind, name in needed.items():
        if not torch.isfinite(squares[kind]).all():
            dtype = next(layer.parameters()).dtype
            raise LorapError(
                f"layers.{index}.{name}: its input holds NaN or inf; computed in {dtype}: a wider "
                "--dtype may help"
            )
    return squares


def _compress_layer(
    family: Family,
    original: Mapping[str, Tensor],
    layer_plan: LayerPlan,
    norms: Mapping[str, Tensor],
    config: CompressionConfig,
    where: str,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the tensors of the compressed layer, and the report on each module."""
    tensors = dict(original)
    modules: dict[str, dict[str, Any]] = {}
    for role, name in family.attention.items():
        modules[name] = layer_plan[name].to_dict()
        if layer_plan[name].kind == "low_rank":
            inputs = norms["o" if role == "o" else "attention"]
            modules[name] |= _factor(tensors, name, layer_plan[name], inputs, config)
    block = family.ffn_block
    modules[block] = layer_plan[block].to_dict()
    if layer_plan[block].kind == "channels":
        modules[block] |= _prune(tensors, family.ffn, layer_plan[block], norms, config)
    for name, tensor in tensors.items():
        _check_weight(f"{where}.{name}", tensor, "the compressed weight")
    return tensors, modules


def _factor(
    tensors: dict[str, Tensor],
    name: str,
    module: ModulePlan,
    norms: Tensor,
    config: CompressionConfig,
) -> dict[str, Any]:
    """Put two factors in the place of a projection's weight. SPEC: ``algorithm.mha``."""
    weight = tensors.pop(f"{name}.weight")
    assert module.rank is not None
    scale = column_scale(norms, config.weighting)
    left, right, singular_values = awsvd(weight, scale, module.rank)
    tensors[f"{name}.right.weight"] = right = right.to(weight.dtype).contiguous()
    tensors[f"{name}.left.weight"] = left = left.to(weight.dtype).contiguous()
    if f"{name}.bias" in tensors:
        tensors[f"{name}.left.bias"] = tensors.pop(f"{name}.bias")
    wide = compute_dtype(weight)
    stored = left.to(wide) @ right.to(wide)
    return {
        "relative_weighted_error": _relative(
            weighted_error(weight, stored, scale), float(singular_values.double().square().sum())
        ),
        "retained_energy": retained_energy(singular_values, module.rank),
    }


def _prune(
    tensors: dict[str, Tensor],
    ffn: Mapping[str, str],
    module: ModulePlan,
    norms: Mapping[str, Tensor],
    config: CompressionConfig,
) -> dict[str, Any]:
    """Take the removed channels out of a feed-forward block. SPEC: ``algorithm.ffn``."""
    up, gate, down = (tensors[f"{ffn[role]}.weight"] for role in ("up", "gate", "down"))
    ffn_norms, down_norms = norms["ffn"], norms["down"]
    scores = group_importance(up, gate, down, ffn_norms, down_norms, config.aggregation)
    assert module.band is not None
    low, high = module.band
    kept = kept_channels(scores, low, high)
    new = prune_ffn(up, gate, down, kept)
    for role, weight in zip(("up", "gate", "down"), new, strict=True):
        tensors[f"{ffn[role]}.weight"] = weight
    for role in ("up", "gate"):
        if f"{ffn[role]}.bias" in tensors:
            tensors[f"{ffn[role]}.bias"] = tensors[f"{ffn[role]}.bias"][kept]

    removed = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    removed[kept] = False
    lost = whole = 0.0
    errors = {}
    for role, weight, inputs, axis in (
        ("gate", gate, ffn_norms, 1),
        ("up", up, ffn_norms, 1),
        ("down", down, down_norms, 0),
    ):
        energy = channel_importance(weight_importance(weight, inputs), axis, "l2").square()
        errors[role] = _relative(float(energy[removed].sum()), float(energy.sum()))
        lost += float(energy[removed].sum())
        whole += float(energy.sum())
    ordered = scores.sort().values.tolist()
    return {
        "kept_channels": kept.tolist(),
        "scores_at_cut": {
            "least_important_kept": ordered[low - 1] if low else None,
            "lowest_removed": ordered[low],
            "highest_removed": ordered[high - 1],
            "lowest_of_top": ordered[high] if high < len(ordered) else None,
        },
        "relative_weighted_error": errors,
        "retained_energy": 1 - lost / whole if whole else 1.0,
    }


def _relative(error: float, whole: float) -> float:
    """Square root of a squared error's share; 0 where there is nothing to lose."""
    return float((error / whole) ** 0.5) if whole else 0.0


def _check_weight(name: str, tensor: Tensor, what: str = "the weight") -> None:
    if not torch.isfinite(tensor).all():
        raise LorapError(f"{name}: {what} holds NaN or inf")


def _config_as_run(model: Any) -> PretrainedConfig:
    """Return the configuration of a model in memory, untied where it runs with a head of its own.

    Raises
    ------
    UsageError
        If the model has no head, or its weights are elsewhere.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise UsageError(
            f"expected a model for causal language modelling, got {type(model).__name__}, which "
            "has no head; load it with AutoModelForCausalLM"
        )
    away = next((name for name, tensor in model.state_dict().items() if tensor.is_meta), None)
    if away is not None:
        raise UsageError(
            f"{away} is offloaded; load the whole model into memory, or use compress_checkpoint"
        )
    config: PretrainedConfig = model.config
    if config.tie_word_embeddings and head.weight is not model.get_input_embeddings().weight:
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
    return config


def _calibration_for(
    model: PreTrainedModel,
    config: CompressionConfig,
    calibration: str | Path | Tensor | npt.NDArray[Any],
    tokenizer: PreTrainedTokenizerBase | None,
    field: str | None,
) -> Calibration:
    limits: dict[str, Any] = {
        "vocab_size": model.config.vocab_size,
        "max_positions": model.config.max_position_embeddings,
    }
    if isinstance(calibration, Tensor | np.ndarray):
        return calibration_from_ids(calibration, **limits)
    if not isinstance(calibration, str | Path):
        raise UsageError(
            "calibration: expected a source, or token ids as a tensor or an array of shape (N, L), "
            f"got {type(calibration).__name__}"
        )

    def given() -> PreTrainedTokenizerBase:
        if tokenizer is None:
            raise UsageError(f"calibration {str(calibration)!r} is text: expected a tokenizer")
        return tokenizer

    return load_calibration(
        calibration,
        tokenizer=given,
        samples=config.samples,
        seqlen=config.seqlen,
        seed=config.seed,
        field=field,
        **limits,
    )


def _assemble(
    family: Family,
    model: PreTrainedModel,
    model_config: PretrainedConfig,
    plan: Plan,
    tensors: Mapping[str, Tensor],
) -> PreTrainedModel:
    """Build the compressed model around the tensors, without initialising it first."""
    config = family.compressed_config(model_config, plan.structure())
    with torch.device("meta"):
        compressed = family.model_class(config)
    compressed.load_state_dict(tensors, assign=True)
    compressed.tie_weights()
    _make_buffers_(compressed.base_model, model.device)
    compressed.generation_config = copy.deepcopy(model.generation_config)
    compressed.requires_grad_(True)
    compressed.train(False)
    return compressed


def _bytes_after(reader: CheckpointReader, plan: Plan) -> int:
    return int(reader.size_bytes * plan.parameters / plan.parameters_before)


def _load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:
        # A damaged tokenizer raises errors of many types.
        raise UsageError(
            f"{path}: the calibration source is text, and the model's tokenizer cannot be "
            f"loaded: {type(error).__name__}: {error}"
        ) from error
