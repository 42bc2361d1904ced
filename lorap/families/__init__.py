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
    "Family",
    "LayerStructure",
    "family_of",
    "modeling_file",
]

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.model_type: family for family in DECODERS}
)


def family_of(config: PretrainedConfig | Mapping[str, Any]) -> Family:
    """Return the family of a model that can be compressed.

    Parameters
    ----------
    config : PretrainedConfig or mapping
        The model's configuration, or the contents of its ``config.json``.

    Raises
    ------
    UsageError
        If the model is compressed already, quantised, or of an unsupported type.
    """
    values = config if isinstance(config, Mapping) else config.to_dict()
    model_type = values.get("model_type")
    if model_type in {family.compressed_type for family in FAMILIES.values()}:
        raise UsageError(
            f"the model is compressed already (model type {model_type}): "
            "compress the original, at the ratio wanted in the end"
        )
    quantization = values.get("quantization_config")
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
        raise UsageError(f"model type {model_type} is not supported; supported: {supported}")
    return FAMILIES[model_type]
