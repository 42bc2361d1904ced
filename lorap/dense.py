"""Export to the stock architecture: factors multiplied out, one width for all layers."""

from __future__ import annotations

import copy
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorap.checkpoint.card import dense_card
from lorap.checkpoint.files import EXPORT, REPORT
from lorap.checkpoint.reader import CheckpointReader, open_compressed
from lorap.checkpoint.writer import CheckpointWriter, check_output
from lorap.errors import LorapError, UsageError
from lorap.families import Family
from lorap.families.fused import join
from lorap.ops.precision import compute_dtype
from lorap.runtime import versions
from lorap.wording import spans

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lorap.pipeline.progress import Progress

DENSE = "dense"
"""The one format that there is."""

_BIAS_FLAGS = ("attention_bias", "mlp_bias")
"""Fields of a stock configuration that give biases to some of the linears."""


@dataclass(frozen=True)
class DenseShape:
    """What all layers of the export have in common.

    Parameters
    ----------
    width : int
        Channels of the feed-forward blocks.
    kv_heads : int
        Key-value heads.
    config : PretrainedConfig
        Of the stock architecture.
    biased : frozenset of str
        Names of the linears that have a bias.
    """

    width: int
    kv_heads: int
    config: PretrainedConfig
    biased: frozenset[str]


def export_dense(
    folder: str | Path,
    output: str | Path,
    *,
    pad: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a compressed model as one of the stock architecture, one layer in memory at a time.

    It computes the same within rounding, and loads without lorap and without code of its own.

    Parameters
    ----------
    folder : str or Path
        Of a compressed model.
    output : str or Path
        Folder to write; afterwards it is whole, or, if the run did not end well, absent.
    pad : bool
        Where layers differ in their width or their heads, fill all up to the largest with zeros.
    overwrite : bool
        Replace a folder that an earlier run of lorap wrote.
    command : str, optional
        The command line, for the report.
    progress : callable, optional
        Called with the layers done and the layers in all.

    Returns
    -------
    dict
        The report, as ``lorap_export.json`` holds it.

    Raises
    ------
    UsageError
        If the folder holds no compressed model, the stock architecture cannot express it, or the
        output cannot be written.
    LorapError
        If a tensor is missing or has a wrong shape.

    Notes
    -----
    SPEC: ``export.dense``.
    """
    started = time.perf_counter()
    output = Path(output)
    inputs = [Path(os.path.expanduser(folder))]
    check_output(output, overwrite=overwrite, inputs=inputs)
    reader = open_compressed(folder, complete=True)
    shape = dense_shape(reader.family, reader.config, pad=pad)
    expected = reader.family.stock_shapes(shape.config)
    parameters = sum(prod(size) for size in expected.values())
    check_output(
        output,
        overwrite=overwrite,
        needed_bytes=parameters * reader.dtype.itemsize,
        inputs=inputs,
    )
    layers = reader.config.num_hidden_layers
    with CheckpointWriter(output, overwrite=overwrite) as writer:
        written = 0
        for index in range(layers):
            if progress is not None:
                progress(index, layers)
            start = f"{reader.family.layers_path}.{index}."
            tensors = dense_layer(reader.family, reader.config, index, reader.load(start), shape)
            written += sum(tensor.nbytes for tensor in tensors.values())
            writer.write_shard({f"{reader.prefix}{start}{n}": t for n, t in tensors.items()})
        if progress is not None:
            progress(layers, layers)
        for names in reader.shards_of_others():
            others = reader.load_as_stored(names)
            written += sum(
                tensor.nbytes for name, tensor in others.items() if name.startswith(reader.prefix)
            )
            writer.write_shard(others)
        report = _report(reader, shape, parameters, written)
        report |= {
            "seconds": time.perf_counter() - started,
            "versions": versions(),
            "command": command
            or f"lorap.export_dense({str(folder)!r}, {str(output)!r}, pad={pad})",
        }
        writer.copy_side_files(reader.path)
        writer.write_json(EXPORT, report)
        writer.write_text("README.md", dense_card(report, name=output.name, source=reader.path))
        writer.commit_stock(reader.family, shape.config, expected, reader.outer)
    return report


def dense_shape(family: Family, config: PretrainedConfig, *, pad: bool = False) -> DenseShape:
    """Return the stock configuration that a compressed model fits, and what its layers have.

    Parameters
    ----------
    family : Family
    config : PretrainedConfig
        Of the compressed model; not changed.
    pad : bool
        Whether layers may be filled up to the largest.

    Raises
    ------
    UsageError
        If the layers differ and may not be filled up, or a linear has a bias that the stock
        architecture has no place for.
    """
    layers: Any = config
    count = config.num_hidden_layers
    widths = [layers.width(index) for index in range(count)]
    heads = [layers.kv_heads(index) for index in range(count)]
    uneven = [
        f"{what} ({_groups(sizes)})"
        for what, sizes in (("widths of the feed-forward blocks", widths), ("kv heads", heads))
        if len(set(sizes)) > 1
    ]
    if uneven and not pad:
        raise UsageError(
            f"the layers differ in their {' and '.join(uneven)}, and {family.stock_class} has "
            "one size for all: --pad fills them up to the largest with zeros, which changes no "
            "output"
        )
    values = {"intermediate_size": max(widths)}
    if max(heads) != layers.num_key_value_heads:
        share = layers.num_attention_heads // layers.num_key_value_heads
        values |= {
            # Where it is not set, it would follow from the number of heads.
            "head_dim": _head_dim(config),
            "num_attention_heads": max(heads) * share,
            "num_key_value_heads": max(heads),
        }
    needed: dict[str, list[int]] = {}
    for index in range(count):
        for name, linear in layers.linears(index).items():
            if linear.gains_bias:
                needed.setdefault(family.dense_name(name), []).append(index)
    for stock, biased in _stock_configs(family, family.stock_config(config, values)):
        if needed.keys() <= biased:
            return DenseShape(max(widths), max(heads), stock, biased)
    homeless = sorted(needed.keys() - biased)
    raise UsageError(
        f"{family.stock_class} has no place for the bias of {', '.join(homeless)} (layers "
        f"{spans(sorted({index for name in homeless for index in needed[name]}))}): a model "
        "compressed by afm has biases that its family has not; another method gives one that "
        "can be exported"
    )


def dense_layer(
    family: Family,
    config: PretrainedConfig,
    index: int,
    tensors: Mapping[str, Tensor],
    shape: DenseShape,
) -> dict[str, Tensor]:
    """Return the tensors of a layer of the stock architecture.

    Parameters
    ----------
    family : Family
    config : PretrainedConfig
        Of the compressed model.
    index : int
        Of the layer.
    tensors : mapping
        Of the compressed layer, names relative to it.
    shape : DenseShape

    Raises
    ------
    LorapError
        If a tensor is missing.

    Notes
    -----
    SPEC: ``export.dense``. Products are done in float32 (float64 where a factor is float64) and
    rounded to the factors' dtype.
    """
    layers: Any = config
    linears = layers.linears(index)
    sizes = _linear_sizes(family, config, shape)
    holders = _holders(family, linears)
    others = {n: tensor for n, tensor in tensors.items() if n.rpartition(".")[0] not in holders}
    dense: dict[str, Tensor] = {}
    for name in linears:
        weight, bias = _linear(family, index, name, linears, tensors)
        d_out, d_in = sizes[name]
        dense[f"{name}.weight"] = _filled(weight, (d_out, d_in))
        if family.dense_name(name) in shape.biased:
            whole = weight.new_zeros(d_out) if bias is None else _filled(bias, (d_out,))
            dense[f"{name}.bias"] = whole
    return others | join(family, {}, dense)


def multiplied_out(left: Tensor, right: Tensor) -> Tensor:
    """Return the product of two factors, in their own dtype.

    Parameters
    ----------
    left : Tensor, shape (d_out, r)
    right : Tensor, shape (r, d_in)

    Returns
    -------
    Tensor, shape (d_out, d_in)
        Summed in float32, or float64 where a factor is, and rounded once.

    Notes
    -----
    SPEC: ``export.dense``, ``precision.compute``.
    """
    dtype = compute_dtype(left, right)
    return (left.to(dtype) @ right.to(dtype)).to(left.dtype)


def _linear(
    family: Family,
    index: int,
    name: str,
    linears: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a linear, or of a part of a fused one."""

    def tensor(full: str) -> Tensor:
        if full not in tensors:
            raise LorapError(f"{family.layers_path}.{index}.{full} is missing")
        return tensors[full]

    shape = linears[name]
    if shape.rank is not None:
        right = family.joint_right if shape.joint else f"{name}.right"
        product = multiplied_out(tensor(f"{name}.left.weight"), tensor(f"{right}.weight"))
        return product, tensors.get(f"{name}.left.bias")
    whole = family.dense_name(name)
    if whole == name or f"{name}.weight" in tensors:
        return tensor(f"{name}.weight"), tensors.get(f"{name}.bias")
    parts = family.fused[whole]
    before = sum(linears[part].d_out for part in parts[: parts.index(name)])
    rows = slice(before, before + shape.d_out)
    bias = tensors.get(f"{whole}.bias")
    return tensor(f"{whole}.weight")[rows].clone(), None if bias is None else bias[rows].clone()


def _holders(family: Family, linears: Mapping[str, Any]) -> set[str]:
    """Return the names of the modules that hold the weights of the linears, in any form."""
    names = {*linears, *(family.dense_name(name) for name in linears), family.joint_right}
    return names | {f"{name}.{side}" for name in linears for side in ("left", "right")}


def _filled(tensor: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a tensor in the first corner of zeros."""
    if tuple(tensor.shape) == size:
        return tensor
    filled = tensor.new_zeros(size)
    filled[tuple(slice(length) for length in tensor.shape)] = tensor
    return filled


def _linear_sizes(
    family: Family, config: PretrainedConfig, shape: DenseShape
) -> dict[str, tuple[int, int]]:
    """Return ``(d_out, d_in)`` of the linears of the export, fused ones apart."""
    layers: Any = config
    keys = shape.kv_heads * _head_dim(config)
    queries = keys * (layers.num_attention_heads // layers.num_key_value_heads)
    hidden, width = config.hidden_size, shape.width
    by_role = {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }
    return {name: by_role[role] for role, name in {**family.attention, **family.ffn}.items()}


def _head_dim(config: PretrainedConfig) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _stock_configs(
    family: Family, config: PretrainedConfig
) -> Iterator[tuple[PretrainedConfig, frozenset[str]]]:
    """Yield the configurations with their own biases and with more, and the linears that have some.

    Those with the fewest come first.
    """
    free = [flag for flag in _BIAS_FLAGS if getattr(config, flag, None) is False]
    for count in range(len(free) + 1):
        for flags in itertools.combinations(free, count):
            stock = copy.deepcopy(config)
            for flag in flags:
                setattr(stock, flag, True)
            start = f"{family.layers_path}.0."
            names = family.stock_shapes(stock)
            yield (
                stock,
                frozenset(
                    name.removeprefix(start).removesuffix(".bias")
                    for name in names
                    if name.startswith(start) and name.endswith(".bias")
                ),
            )


def _report(
    reader: CheckpointReader, shape: DenseShape, parameters: int, written: int
) -> dict[str, Any]:
    layers: Any = reader.config
    compressed = sum(prod(tensor.shape) for tensor in reader.tensors.values())
    indices = range(reader.config.num_hidden_layers)
    return {
        "format": DENSE,
        "model": reader.source,
        "architecture": reader.family.stock_class,
        "parameters": {
            "original": _original_parameters(reader),
            "compressed": compressed,
            "exported": parameters,
        },
        "bytes": {"compressed": reader.size_bytes, "exported": written},
        "width": shape.width,
        "kv_heads": shape.kv_heads,
        "padded_layers": {
            "width": [index for index in indices if layers.width(index) != shape.width],
            "kv_heads": [index for index in indices if layers.kv_heads(index) != shape.kv_heads],
        },
    }


def _original_parameters(reader: CheckpointReader) -> int | None:
    """Return the parameters of the original by the compression's report, if that is there."""
    try:
        report = json.loads((reader.path / REPORT).read_text(encoding="utf-8"))
        return int(report["parameters"]["before"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _groups(sizes: Sequence[int]) -> str:
    """Return which layers have which size: ``layers 0-3: 86, layer 4: 90``."""
    found = []
    for size in sorted(set(sizes)):
        layers = [index for index, own in enumerate(sizes) if own == size]
        found.append(f"{'layers' if len(layers) > 1 else 'layer'} {spans(layers)}: {size}")
    return ", ".join(found)
