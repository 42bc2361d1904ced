"""Linears that hold several: taken apart for the compression, put together where it left them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorap.families.base import JOINT, Family, LayerStructure

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def split(
    family: Family, config: PretrainedConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Take the fused linears of a layer apart, so that each linear has tensors of its own.

    Parameters
    ----------
    family : Family
    config : PretrainedConfig
        Of the dense form.
    tensors : mapping
        The original tensors of a decoder layer, names relative to it.

    Returns
    -------
    dict
        Weights ``(d_out, d_in)`` and biases ``(d_out,)`` of the parts, in memory of their own, in
        the place of those of the whole; all else as it is.

    Notes
    -----
    SPEC: ``family.parts``.
    """
    found, rows = dict(tensors), family.rows(config)
    for whole, parts in family.fused.items():
        sizes = [rows[part] for part in parts]
        for kind in ("weight", "bias"):
            if f"{whole}.{kind}" in found:
                pieces = torch.split(found.pop(f"{whole}.{kind}"), sizes)
                found |= {
                    f"{part}.{kind}": piece.clone()
                    for part, piece in zip(parts, pieces, strict=True)
                }
    return found


def join(
    family: Family, structure: LayerStructure, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Put the parts of fused linears together, where the compressed layer has them fused.

    Parameters
    ----------
    family : Family
    structure : mapping
        Of the layer. A linear with a part that it names stays apart.
    tensors : mapping
        The tensors of the compressed layer, as :func:`split` names them.

    Notes
    -----
    SPEC: ``family.parts``.
    """
    named = set(structure)
    if JOINT in structure:
        named |= {family.attention["q"], family.attention["k"]}
    found = dict(tensors)
    for whole, parts in family.fused.items():
        if not named.isdisjoint(parts):
            continue
        for kind in ("weight", "bias"):
            if f"{parts[0]}.{kind}" in found:
                pieces = [found.pop(f"{part}.{kind}") for part in parts]
                found[f"{whole}.{kind}"] = torch.cat(pieces)
    return found
