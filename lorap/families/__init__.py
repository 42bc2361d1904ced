"""The families of models that lorap compresses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lorap.errors import UsageError
from lorap.families.base import MODELING_MODULE, Family, LayerStructure, modeling_file
from lorap.families.decoders import DECODERS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "FAMILIES",
    "MODELING_MODULE",
    "MULTIMODAL",
    "Family",
    "LayerStructure",
    "family_of",
    "modeling_file",
]

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.model_type: family for family in DECODERS}
)


MULTIMODAL: Mapping[str, str] = MappingProxyType({"llava": "language_model."})
"""Multimodal model types around a language model that is compressed, to the prefix of its tensors.

Where they build it by its own model type, they build the compressed form as well.
"""


def family_of(config: PretrainedConfig | Mapping[str, Any]) -> Family:
    """Return the family of a model that can be compressed.

    Parameters
    ----------
    config : PretrainedConfig or mapping
        The model's configuration, or the contents of its ``config.json``. Of a multimodal one, the
        language model's family is returned.

    Raises
    ------
    UsageError
        If the model is compressed already, quantised, or of an unsupported type.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    quantization = values.get("quantization_config")
    if values.get("model_type") in MULTIMODAL:
        # The default of those that there are.
        values = {"model_type": "llama"} | dict(values.get("text_config") or {})
    model_type = values.get("model_type")
    if model_type in {family.compressed_type for family in FAMILIES.values()}:
        raise UsageError(
            f"the model is compressed already (model type {model_type}): "
            "compress the original, at the ratio wanted in the end"
        )
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        raise UsageError(
            f"the model is quantised ({method or 'quantization_config is set'}): "
            "compress the unquantised model, then quantise the result"
        )
    supported = ", ".join(sorted(FAMILIES))
    if not model_type:
        raise UsageError(f"the configuration names no model_type; supported: {supported}")
    if model_type not in FAMILIES:
        kind = _unsupported_kind(model_type, values)
        what = f"{model_type}, {kind}," if kind else model_type
        raise UsageError(f"model type {what} is not supported; supported: {supported}")
    return FAMILIES[model_type]


def _unsupported_kind(model_type: str, values: Mapping[str, Any]) -> str | None:
    """Say what a model is that is no plain decoder of text; None where nothing is known of it."""
    from transformers.models.auto import modeling_auto

    if any("experts" in name and value for name, value in values.items()):
        return "a mixture of experts"
    if any(f"{sense}_config" in values for sense in ("vision", "audio")):
        return "a multimodal model"
    seq2seq = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if values.get("is_encoder_decoder") or model_type in seq2seq:
        return "an encoder-decoder"
    if model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "an encoder"
    return None
