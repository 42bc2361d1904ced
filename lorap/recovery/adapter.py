"""Reading an adapter, without PEFT: what is to be added to which linear."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lorap.checkpoint.reader import CheckpointReader, read_json, read_tensors
from lorap.errors import UsageError
from lorap.ops.lora import scaling
from lorap.ops.precision import all_finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_NO_MATTER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Fields of PEFT's configuration that change nothing in what is added to a weight, or are read
below. Any other one that is set is a kind of LoRA that is not known here."""


@dataclass(frozen=True)
class Update:
    """What is added to a matrix: ``factor * left @ right``.

    Attributes
    ----------
    left : (d_out, update_rank)
        PEFT's ``lora_B``.
    right : (update_rank, d_in)
        PEFT's ``lora_A``.
    factor : float
    """

    left: Tensor
    right: Tensor
    factor: float


Updates = Mapping[str, Update]
"""The updates of a decoder layer, by the linear's name relative to it."""


@dataclass(frozen=True)
class Adapter:
    """An adapter for a compressed model.

    Attributes
    ----------
    path : Path
    layers : sequence of mappings
        The updates of each decoder layer.
    """

    path: Path
    layers: Sequence[Updates]


def open_adapter(folder: str | Path, reader: CheckpointReader) -> Adapter:
    """Read an adapter and check that it fits a model.

    Parameters
    ----------
    folder : str or Path
        As ``lorap recover`` or PEFT saves it.
    reader : CheckpointReader
        Of the compressed model.

    Raises
    ------
    UsageError
        If it is no adapter, of another kind than LoRA, damaged, or does not fit.

    Notes
    -----
    SPEC: ``lora.scaling``.
    """
    path = Path(folder).expanduser()
    config, tensors = _read_config(path), _read_tensors(path)
    prefix = f"base_model.model.{reader.family.layers_path}."
    shapes = _shapes(reader)
    pairs: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(rf"{re.escape(prefix)}(\d+)\.(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise UsageError(
                f"{path}: {name}: expected updates of the linears in the decoder layers, named "
                f"{prefix}0.self_attn.q_proj.lora_A.weight"
            )
        pairs.setdefault((int(match[1]), match[2]), {})[match[3]] = tensor
    layers: list[dict[str, Update]] = [{} for _ in range(reader.config.num_hidden_layers)]
    for (index, name), pair in pairs.items():
        where = f"{path}: layers.{index}.{name}"
        shape = shapes.get((index, name))
        if shape is None:
            raise UsageError(f"{where}: {reader.source} has no such linear")
        if set(pair) != {"A", "B"}:
            raise UsageError(f"{where}: expected lora_A and lora_B, got lora_{next(iter(pair))}")
        left, right = pair["B"], pair["A"]
        rank = right.shape[0]
        if (left.shape, right.shape) != ((shape[0], rank), (rank, shape[1])):
            raise UsageError(
                f"{where}: lora_A {tuple(right.shape)} and lora_B {tuple(left.shape)} do not fit "
                f"the linear's {shape}"
            )
        factor = scaling(config["lora_alpha"], rank)
        if config.get("use_rslora"):
            factor = config["lora_alpha"] / rank**0.5
        layers[index][name] = Update(left, right, factor)
    return Adapter(path, layers)


def _shapes(reader: CheckpointReader) -> dict[tuple[int, str], tuple[int, int]]:
    """Return ``(d_out, d_in)`` of all linears and of all factored ones, by layer and name."""
    found: dict[tuple[int, str], tuple[int, int]] = {}
    prefix = f"{reader.family.layers_path}."
    config: Any = reader.config
    for name, stored in reader.tensors.items():
        index, _, tensor = name.removeprefix(prefix).partition(".")
        linear, _, kind = tensor.rpartition(".")
        if name.startswith(prefix) and kind == "weight" and len(stored.shape) == 2:
            found[int(index), linear] = (stored.shape[0], stored.shape[1])
    for layer in range(config.num_hidden_layers):
        for name, shape in config.linears(layer).items():
            if shape.rank is not None:
                found[layer, name] = (shape.d_out, shape.d_in)
    return found


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise UsageError(f"{path}: expected the folder of an adapter: it holds no {CONFIG}")
    config = read_json(file)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UsageError(f"{file}: expected an adapter of the type LORA, got {kind}")
    for name, value in config.items():
        if name not in _NO_MATTER and value not in (None, False, {}, [], "none"):
            raise UsageError(f"{file}: {name} {value!r}: only plain LoRA can be merged")
    if config.get("init_lora_weights") not in (True, False, "gaussian"):
        raise UsageError(
            f"{file}: init_lora_weights {config['init_lora_weights']!r}: the model's own weights "
            "were changed with it"
        )
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UsageError(f"{file}: lora_alpha: expected a number, got {alpha!r}")
    return dict(config)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    file = path / WEIGHTS
    if not file.is_file():
        raise UsageError(f"{path}: expected the folder of an adapter: it holds no {WEIGHTS}")
    tensors = read_tensors(file)
    if not tensors:
        raise UsageError(f"{file} holds no tensors")
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or not all_finite(tensor):
            raise UsageError(f"{file}: {name}: expected finite floating-point numbers")
    return tensors
