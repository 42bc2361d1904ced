"""Compression of a model in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorap.checkpoint.reader import main_dtype
from lorap.config import CompressionConfig
from lorap.data.calibration import Calibration, calibration_from_ids, load_calibration
from lorap.errors import UsageError
from lorap.families import Family, family_of
from lorap.pipeline.forward import Decoder, Samples, make_buffers_
from lorap.pipeline.inspection import check_weight
from lorap.pipeline.layers import compress_layers
from lorap.pipeline.measure import measured_plan
from lorap.pipeline.progress import Progress, Steps
from lorap.plan import Plan, draft_plan
from lorap.runtime import choose_device, choose_dtype

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


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
    draft = draft_plan(model_config, family, config)
    chosen = _calibration_for(model, config, calibration, tokenizer, field)
    mask = None if attention_mask is None else torch.as_tensor(attention_mask)
    if mask is not None and mask.shape != chosen.input_ids.shape:
        raise UsageError(
            f"attention_mask: expected the shape of the ids, {tuple(chosen.input_ids.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    device = model.device if config.device == "auto" else choose_device(config.device)
    dtype = choose_dtype(config.dtype) or main_dtype(
        (tensor.dtype, tensor.nbytes) for tensor in model.parameters()
    )
    decoder = decoder_of(model, model_config, device, dtype)
    for name, tensor in model.state_dict().items():
        check_weight(name, tensor)
    samples = Samples(chosen.input_ids, mask, config.batch_size)
    compressed = {name: tensor.clone() for name, tensor in decoder.load_others(True).items()}
    store = decoder.store(samples, config)
    advance = Steps(progress, config, decoder.layers)
    plan, measurements = measured_plan(decoder, samples, store, draft, config, advance)
    batches = decoder.embed(samples, store, dense=config.carries_dense)
    for layer in compress_layers(decoder, batches, plan, config, measurements):
        for name, tensor in layer.tensors.items():
            compressed[f"{family.layers_path}.{layer.index}.{name}"] = tensor.to(model.device)
        advance()
    return _assemble(family, model, model_config, plan, compressed)


def decoder_of(
    model: PreTrainedModel,
    model_config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Decoder:
    """Return a model in memory layer by layer.

    Parameters
    ----------
    model : PreTrainedModel
        With its language-modelling head.
    model_config : PretrainedConfig
        As it runs.
    device : torch.device
        Where to compute.
    dtype : torch.dtype
        Of the forwards.
    """
    family = family_of(model_config)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    prefix = f"{family.layers_path}."

    def load_layer(index: int) -> dict[str, Tensor]:
        start = f"{prefix}{index}."
        return {name[len(start) :]: t for name, t in state.items() if name.startswith(start)}

    def load_others(with_head: bool) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, tensor in state.items()
            if not name.startswith(prefix) and (with_head or name != family.head)
        }

    return Decoder(family, model_config, load_layer, load_others, device, dtype)


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
    make_buffers_(compressed.base_model, model.device)
    compressed.generation_config = copy.deepcopy(model.generation_config)
    compressed.requires_grad_(True)
    compressed.train(False)
    return compressed
