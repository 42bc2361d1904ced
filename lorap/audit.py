"""Audit of a compressed checkpoint: everything it must hold, recomputed by the reference.

The one module of lorap that imports ``lorap_reference``. The torch path takes no part: tensors are
read, and from then on all is NumPy. SPEC.md, "Audit", has the bounds and where they come from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lorap.checkpoint.files import CALIBRATION, REPORT, STATISTICS
from lorap.checkpoint.reader import CheckpointReader, open_checkpoint, open_compressed
from lorap.config import CompressionConfig, Override
from lorap.data.calibration import check_vocabulary, load_calibration
from lorap.errors import LorapError, UsageError
from lorap.families import FAMILIES, Family
from lorap.report import FORMAT_VERSION
from lorap.runtime import choose_dtype
from lorap_reference import budget, importance, llama, lowrank, pruning, statistics

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Array = NDArray[np.float64]
Kind = Literal["attention", "o", "ffn", "down"]
Progress = Callable[[int, int], None]

EPS64 = float(np.finfo(np.float64).eps)

ROOM_RMS, ROOM_LARGEST = 5.0, 10.0
"""Between the noise that the audit measures in the norms and what it allows: in the mean over the
features, and in the worst of them, which spreads more (SPEC, "Audit")."""

SVD_FACTOR = 20.0
"""Two decompositions of a matrix in float64, in ``eps * max(m, n) * sigma_1``: see the class
"product" of SPEC.md."""

SPREADS = 7.0
"""Standard deviations that a sum of independent roundings may reach: 3e-12 in probability."""

GAUGE = 0.05
"""Factors whose base differs from the reference's by more than this are not compared entry by
entry; a change of an entry that is as large shows in the product."""

TOKENS_PER_BATCH = 4096
"""Tokens in a forward: bounds the memory."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes
    ----------
    name : str
        What was compared.
    deviation : float
        How far apart, at the place that uses most of its bound; for exact comparisons the number of
        values that differ.
    bound : float
        How far apart they may be; 0 for exact comparisons.
    detail : str
        Where, or what was expected and what came; empty where there is nothing to say.
    """

    name: str
    deviation: float
    bound: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the deviation is a number within the bound."""
        return bool(self.deviation <= self.bound)

    @property
    def usage(self) -> float:
        """Share of the bound that is used; infinite for a breach of an exact comparison."""
        if self.deviation == 0:
            return 0.0
        return self.deviation / self.bound if self.bound > 0 else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; infinite and undefined numbers as text, which JSON can hold."""
        values = asdict(self) | {"passed": self.passed}
        for key in ("deviation", "bound"):
            if not np.isfinite(values[key]):
                values[key] = str(values[key])
        return values


@dataclass(frozen=True)
class ModuleAudit:
    """The comparisons of one module, or of one part of the checkpoint.

    Attributes
    ----------
    name : str
        ``layers.3.self_attn.q_proj``, or the name of a file or tensor.
    becomes : str
        ``rank 12``, ``100 channels``, ``as it was``; empty for what is no module.
    checks : tuple of Check
        At least one.
    """

    name: str
    becomes: str
    checks: tuple[Check, ...]

    @property
    def worst(self) -> Check:
        """The check that fails, or uses most of its bound."""
        return max(self.checks, key=lambda check: (not check.passed, check.usage))

    @property
    def passed(self) -> bool:
        """Whether all checks pass."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes
    ----------
    original, compressed : str
        As the user named them.
    storage, compute : str
        The dtype that most of the checkpoint is stored in, and that of the forwards behind it.
    layers : tuple of int
        Decoder layers that were recomputed.
    modules : tuple of ModuleAudit
    """

    original: str
    compressed: str
    storage: str
    compute: str
    layers: tuple[int, ...]
    modules: tuple[ModuleAudit, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is outside its bound."""
        return all(module.passed for module in self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as ``lorap audit --json`` prints it."""
        return {
            "original": self.original,
            "compressed": self.compressed,
            "passed": self.passed,
            "storage": self.storage,
            "compute": self.compute,
            "layers": list(self.layers),
            "modules": [
                {
                    "name": module.name,
                    "becomes": module.becomes,
                    "passed": module.passed,
                    "checks": [check.to_dict() for check in module.checks],
                }
                for module in self.modules
            ],
        }


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
        Called with the layers done and the layers in all.

    Returns
    -------
    AuditResult

    Raises
    ------
    UsageError
        If either folder cannot be used, the two do not belong together by their shapes, a file is
        missing or damaged, or the reference does not know what the model asks for.
    LorapError
        If activations are not finite.
    """
    reader, stored = open_checkpoint(original), open_compressed(compressed)
    record = _Record.read(stored)
    for name in _SHAPE_FIELDS:
        ours, theirs = (getattr(config, name, None) for config in (reader.config, stored.config))
        if ours != theirs:
            raise UsageError(
                f"{compressed} was not made from {original}: {name} is {theirs}, and {ours} there"
            )
    count = int(reader.config.num_hidden_layers)
    chosen = _chosen_layers(layers, count)
    shape = _llama_shape(reader.config, reader.family)
    ids = _calibration_ids(reader, stored, record, calibration)
    _check_window(reader.config, ids.shape[1])
    plan = _plan(reader, record.settings)
    compute = choose_dtype(record.settings.dtype) or reader.dtype

    modules = [
        _audit_report(record, plan, reader, ids),
        _audit_config(reader, stored, plan),
        _audit_tensors(reader, stored, plan),
    ]
    # What the other checks compare entry by entry has to be there, and of the right shape.
    if modules[-1].passed:
        modules += _audit_others(reader, stored)
        if reader.outside:
            modules.append(_audit_outside(reader, stored))
        modules += _audit_layers(
            _Context(reader, stored, record, plan, shape, _Compute(compute)), ids, chosen, progress
        )
    return AuditResult(
        original=str(original),
        compressed=str(compressed),
        storage=str(stored.dtype).removeprefix("torch."),
        compute=str(compute).removeprefix("torch."),
        layers=chosen,
        modules=tuple(modules),
    )


_SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
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


def _llama_shape(config: PretrainedConfig, family: Family) -> llama.LlamaShape:
    if not family.plain_forward:
        known = ", ".join(name for name, each in FAMILIES.items() if each.plain_forward)
        raise UsageError(
            f"the reference computes the forward of {known}, not that of {family.model_type}"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    scaling = rope or getattr(config, "rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise UsageError(f"the reference knows no rotary embedding of the type {kind!r}")
    if config.hidden_act != "silu":
        raise UsageError(f"the reference knows the activation 'silu', not {config.hidden_act!r}")
    return llama.LlamaShape(
        layers=int(config.num_hidden_layers),
        heads=int(config.num_attention_heads),
        kv_heads=int(config.num_key_value_heads),
        head_dim=int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ),
        rope_theta=float(rope.get("rope_theta") or config.rope_theta),
        rms_eps=float(config.rms_norm_eps),
    )


def _check_window(config: PretrainedConfig, tokens: int) -> None:
    """Refuse a model of which a layer does not see the whole of a sample."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and window < tokens and "sliding_attention" in types:
        raise UsageError(
            f"the reference knows no sliding window, and the model's, of {window} tokens, is "
            f"shorter than the samples of {tokens}"
        )


# --- what the checkpoint says of itself ----------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """``lorap_report.json`` and the norms that the layers were compressed with.

    ``norms`` are under the layer's prefix and the kind of input: ``model.layers.3.attention``.
    """

    report: Mapping[str, Any]
    settings: CompressionConfig
    norms: Mapping[str, Array]

    @classmethod
    def read(cls, stored: CheckpointReader) -> _Record:
        file = stored.path / REPORT
        if not file.is_file():
            raise UsageError(
                f"{stored.source} holds no {REPORT}: expected a folder that lorap wrote"
            )
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{file}: not readable as JSON: {error}") from error
        version = report.get("format_version") if isinstance(report, dict) else None
        if version != FORMAT_VERSION:
            raise UsageError(f"{file}: expected format_version {FORMAT_VERSION}, got {version!r}")
        if report.get("recovery") is not None:
            raise UsageError(
                f"{stored.source} was recovered, and its weights trained: audit the compressed "
                "model that it was made from"
            )
        try:
            values = dict(report["settings"])
            values["overrides"] = tuple(Override(**item) for item in values["overrides"])
            settings = CompressionConfig(**values)
        except (KeyError, TypeError, UsageError) as error:
            raise UsageError(f"{file}: its settings cannot be used: {error}") from error
        norms = _read_arrays(stored.path / STATISTICS)
        return cls(report, settings, {name: x.astype(np.float64) for name, x in norms.items()})


def _read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    try:
        with safe_open(file, framework="np") as handle:
            # Silenced because a handle of safetensors is no mapping and has no iterator.
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UsageError(
            f"{file} is missing: expected a folder that `lorap compress` wrote"
        ) from None
    except (OSError, SafetensorError, TypeError) as error:
        raise UsageError(f"{file}: not readable as safetensors: {error}") from error


def _calibration_ids(
    reader: CheckpointReader,
    stored: CheckpointReader,
    record: _Record,
    calibration: str | Path | None,
) -> NDArray[np.int64]:
    """Return the ids (N, L) that the layers are recomputed with."""
    if calibration is not None:
        from transformers import AutoTokenizer

        settings = record.settings
        chosen = load_calibration(
            calibration,
            tokenizer=lambda: AutoTokenizer.from_pretrained(reader.path),
            vocab_size=reader.config.vocab_size,
            max_positions=reader.config.max_position_embeddings,
            samples=settings.samples,
            seqlen=settings.seqlen,
            seed=settings.seed,
        )
        return np.asarray(chosen.input_ids.numpy())
    file = stored.path / CALIBRATION
    ids = _read_arrays(file).get("input_ids")
    if ids is None or ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
        raise UsageError(f"{file}: expected input_ids of shape (N, L) and of an integer dtype")
    ids = ids.astype(np.int64)
    check_vocabulary(ids, reader.config.vocab_size, str(file))
    return ids


def _fingerprint(ids: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(np.asarray(ids.shape, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()


# --- ranks, widths and parameters by the reference -----------------------------------------------


@dataclass(frozen=True)
class _Module:
    """What becomes of a module by the reference.

    Attributes
    ----------
    name : str
        Relative to the layer.
    rank : int or None
        Of a factored projection.
    band : (int, int) or None
        Removed band of a feed-forward block that loses channels.
    width : int or None
        Channels of a feed-forward block.
    parameters, parameters_before : int
        Biases included.
    """

    name: str
    rank: int | None
    band: tuple[int, int] | None
    width: int | None
    parameters: int
    parameters_before: int

    @property
    def structure(self) -> dict[str, int] | None:
        """Entry of ``config.json``; None for a module that stays as it was."""
        if self.rank is not None:
            return {"rank": self.rank}
        return {"width": self.width} if self.band and self.width is not None else None

    @property
    def kind(self) -> str:
        if self.rank is not None:
            return "low_rank"
        return "channels" if self.band else "dense"

    @property
    def becomes(self) -> str:
        if self.rank is not None:
            return f"rank {self.rank}"
        return f"{self.width} channels" if self.band else "as it was"


@dataclass(frozen=True)
class _Plan:
    """Modules by layer and name, the layer ratio of those that no override fixes, parameters."""

    layers: tuple[Mapping[str, _Module], ...]
    layer_ratio: float | None
    before: int
    after: int


def _plan(reader: CheckpointReader, settings: CompressionConfig) -> _Plan:
    """Ranks and widths by ``lorap_reference.budget`` (SPEC, rules ``budget.*``)."""
    family, total = reader.family, sum(prod(t.shape) for t in reader.tensors.values())
    count = int(reader.config.num_hidden_layers)
    sizes: dict[tuple[int, str], tuple[int, int]] = {}
    biases: dict[tuple[int, str], int] = {}
    overrides: dict[tuple[int, str], Override | None] = {}
    for layer in range(count):
        prefix = f"{family.layers_path}.{layer}."

        def size(name: str, prefix: str = prefix) -> int:
            found = reader.tensors.get(f"{prefix}{name}")
            return 0 if found is None else prod(found.shape)

        for name in family.attention.values():
            d_out, d_in = reader.tensors[f"{prefix}{name}.weight"].shape
            sizes[layer, name] = (d_out, d_in)
            biases[layer, name] = size(f"{name}.bias")
        gate, up, down = (family.ffn[role] for role in ("gate", "up", "down"))
        channels = reader.tensors[f"{prefix}{up}.weight"].shape[0]
        removable = sum(
            size(f"{name}.{kind}") for name in (gate, up, down) for kind in ("weight", "bias")
        ) - size(f"{down}.bias")
        sizes[layer, family.ffn_block] = (channels, removable // channels)
        biases[layer, family.ffn_block] = size(f"{down}.bias")
    for layer, name in sizes:
        sublayer = "ffn" if name == family.ffn_block else "mha"
        if sublayer in settings.sublayers:
            matching = [o for o in settings.overrides if _names(o.match, f"layers.{layer}.{name}")]
            overrides[layer, name] = matching[-1] if matching else None

    ratio = _layer_ratio(settings, total, sizes, overrides)
    ranks: dict[tuple[int, str], int | None] = {}
    bands: dict[tuple[int, str], tuple[int, int]] = {}
    roles = {name: role for role, name in family.attention.items()}
    shared: dict[tuple[int, Override | None], dict[str, tuple[int, int]]] = {}
    for (layer, name), override in overrides.items():
        own = ratio if override is None else override.ratio
        channels = sizes[layer, name][0]
        if override is not None and override.rank is not None:
            ranks[layer, name] = override.rank
        elif override is not None and override.width is not None:
            low = min(int(settings.least_important * channels), override.width - 1)
            bands[layer, name] = (low, low + channels - override.width)
        elif own is not None and name in roles:
            shared.setdefault((layer, override), {})[name] = sizes[layer, name]
        elif own is not None:
            bands[layer, name] = budget.removed_band(channels, own, settings.least_important)
    for (layer, override), shapes in shared.items():
        own = ratio if override is None else override.ratio
        assert own is not None
        nested = settings.ratio_scope == "layer"
        given = {roles[name]: shape for name, shape in shapes.items()}
        for role, rank in budget.ranks(given, own, settings.allocation, nested).items():
            ranks[layer, family.attention[role]] = rank

    layers: list[dict[str, _Module]] = [{} for _ in range(count)]
    for key, (d_out, d_in) in sizes.items():
        rank, (low, high) = ranks.get(key), bands.get(key, (0, 0))
        is_ffn = key[1] == family.ffn_block
        removed = (high - low) * d_in
        if rank is not None:
            removed = d_out * d_in - rank * (d_out + d_in)
        layers[key[0]][key[1]] = _Module(
            name=key[1],
            rank=rank,
            band=(low, high) if high > low else None,
            width=d_out - (high - low) if is_ffn else None,
            parameters=d_out * d_in + biases[key] - removed,
            parameters_before=d_out * d_in + biases[key],
        )
    lost = sum(m.parameters_before - m.parameters for layer in layers for m in layer.values())
    return _Plan(tuple(layers), ratio, total, total - lost)


def _names(pattern: str, path: str) -> bool:
    """Whether a pattern names a module or one of its parents (rule ``budget.overrides``)."""
    parts = path.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(2, len(parts) + 1))


def _layer_ratio(
    settings: CompressionConfig,
    total: int,
    sizes: Mapping[tuple[int, str], tuple[int, int]],
    overrides: Mapping[tuple[int, str], Override | None],
) -> float | None:
    """Layer ratio of the free modules, None where there are none."""
    free = sum(prod(sizes[key]) for key, override in overrides.items() if override is None)
    if not free or settings.ratio is None:
        return None
    if settings.ratio_scope == "layer":
        return settings.ratio
    fixed: float = 0
    for key, override in overrides.items():
        if override is None:
            continue
        rows, columns = sizes[key]
        if override.ratio is not None:
            fixed += override.ratio * (rows * columns)
        elif override.rank is not None:
            fixed += rows * columns - override.rank * (rows + columns)
        elif override.width is not None:
            fixed += (rows - override.width) * columns
    if not fixed:
        return float(budget.layer_ratio(total, 1, free, settings.ratio))
    return (total * settings.ratio - fixed) / free


# --- report, config.json, names and shapes -------------------------------------------------------


def _equal(name: str, expected: object, got: object) -> Check:
    if expected == got and type(expected) is type(got):
        return Check(name, 0, 0)
    return Check(name, 1, 0, f"expected {expected!r}, got {got!r}")


def _audit_report(
    record: _Record, plan: _Plan, reader: CheckpointReader, ids: NDArray[np.int64]
) -> ModuleAudit:
    """Compare all that follows without reading a weight. Errors belong to the layers' checks."""
    report, settings = record.report, record.settings
    checks = [
        _equal("ratio", settings.ratio, report.get("ratio")),
        _equal("ratio scope", settings.ratio_scope, report.get("ratio_scope")),
        _equal("layer ratio", plan.layer_ratio, report.get("layer_ratio")),
        _equal("achieved ratio", 1 - plan.after / plan.before, report.get("achieved_ratio")),
        _equal(
            "parameters", {"before": plan.before, "after": plan.after}, report.get("parameters")
        ),
    ]
    about = report.get("calibration")
    about = about if isinstance(about, dict) else {}
    checks += [
        _equal("calibration samples", ids.shape[0], about.get("samples")),
        _equal("calibration length", ids.shape[1], about.get("seqlen")),
        _equal("calibration seed", settings.seed, about.get("seed")),
        _equal("calibration fingerprint", _fingerprint(ids), about.get("fingerprint")),
    ]
    listed = report.get("layers")
    checks.append(
        _equal("layers", len(plan.layers), len(listed) if isinstance(listed, list) else 0)
    )
    for index, layer in enumerate(plan.layers):
        for name, module in layer.items():
            said = _said_of(report, index, name)
            expected: dict[str, Any] = {"kind": module.kind}
            if module.rank is not None:
                expected["rank"] = module.rank
            if module.width is not None:
                expected["width"] = module.width
            expected["parameters"] = module.parameters
            expected["parameters_before"] = module.parameters_before
            got = {key: said.get(key) for key in expected}
            checks.append(_equal(f"layers.{index}.{name}", expected, got))
    return ModuleAudit(REPORT, "", tuple(checks))


def _said_of(report: Mapping[str, Any], index: int, name: str) -> Mapping[str, Any]:
    """Return what the report says of a module; nothing where it is not in order."""
    try:
        said = report["layers"][index]["modules"][name]
    except (IndexError, KeyError, TypeError):
        return {}
    return said if isinstance(said, dict) else {}


def _audit_config(reader: CheckpointReader, stored: CheckpointReader, plan: _Plan) -> ModuleAudit:
    structure = [
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
        "config.json",
        "",
        tuple(_equal(name, expected.get(name), got.get(name)) for name in sorted(fields)),
    )


def _audit_tensors(reader: CheckpointReader, stored: CheckpointReader, plan: _Plan) -> ModuleAudit:
    """Compare names, shapes and dtypes; the parameter budget is the sum of the sizes."""
    family, expected = reader.family, {}
    for name, tensor in reader.tensors.items():
        layer, module, role, kind = _place(family, name)
        planned = None if layer is None else plan.layers[layer].get(module)
        if planned is None or planned.structure is None:
            expected[name] = (tensor.shape, tensor.dtype)
        elif planned.rank is not None:
            base = name.removesuffix(kind)
            if kind == "bias":
                expected[f"{base}left.bias"] = (tensor.shape, tensor.dtype)
            else:
                d_out, d_in = tensor.shape
                expected[f"{base}right.weight"] = ((planned.rank, d_in), tensor.dtype)
                expected[f"{base}left.weight"] = ((d_out, planned.rank), tensor.dtype)
        else:
            assert planned.width is not None
            shape = tensor.shape
            if role != "down":
                shape = (planned.width, *shape[1:])
            elif kind == "weight":
                shape = (shape[0], planned.width)
            expected[name] = (shape, tensor.dtype)
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
            _equal("parameters held", plan.after, held),
        ),
    )


def _place(family: Family, name: str) -> tuple[int | None, str, str, str]:
    """Return layer, module, role and kind ("weight" or "bias") of an original's tensor."""
    prefix = f"{family.layers_path}."
    if not name.startswith(prefix):
        return None, "", "", ""
    index, _, rest = name.removeprefix(prefix).partition(".")
    linear, _, kind = rest.rpartition(".")
    for role, known in family.ffn.items():
        if linear == known:
            return int(index), family.ffn_block, role, kind
    return int(index), linear, "", kind


# --- bit for bit ---------------------------------------------------------------------------------

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _same_bits(name: str, expected: Tensor, got: Tensor) -> Check:
    """Compare bit by bit: 0 and -0 differ, and NaN equals itself."""
    bits = _BITS[expected.dtype.itemsize]
    differ = expected.contiguous().view(bits) != got.contiguous().view(bits)
    count = int(differ.sum())
    where = str(tuple(differ.nonzero()[0].tolist())) if count else ""
    return Check(name, count, 0, f"first at {where}" if count else "")


def _audit_others(reader: CheckpointReader, stored: CheckpointReader) -> Iterator[ModuleAudit]:
    """Compare embeddings, last norm and head."""
    prefix = f"{reader.family.layers_path}."
    for name in reader.tensors:
        if not name.startswith(prefix):
            same = _same_bits("untouched", reader.load(name)[""], stored.load(name)[""])
            yield ModuleAudit(name, "as it was", (same,))


def _audit_outside(reader: CheckpointReader, stored: CheckpointReader) -> ModuleAudit:
    """Compare what is around the language model of a multimodal one."""
    names = (reader.outside.keys(), stored.outside.keys())
    checks = [_equal("names", sorted(names[0]), sorted(names[1]))]
    if checks[0].passed:
        given, held = reader.load_outside(), stored.load_outside()
        checks += [_same_bits(name, given[name], held[name]) for name in given]
    return ModuleAudit("outside the language model", "as it was", tuple(checks))


# --- the layers ----------------------------------------------------------------------------------


class _Compute:
    """The dtype of the forwards behind a checkpoint, and rounding to it in NumPy.

    float16 and bfloat16 are multiplied and added up in float32, and rounded after each operation.
    In a float64 model of transformers, RMSNorm and the rotary angles are float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.work: type[np.floating[Any]] = np.float64 if dtype == torch.float64 else np.float32
        self.eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps

    def round(self, x: NDArray[Any]) -> NDArray[Any]:
        """Round to the dtype; the values come in the working dtype."""
        x = np.asarray(x, dtype=self.work)
        if self.dtype == torch.float16:
            return x.astype(np.float16).astype(np.float32)
        if self.dtype == torch.bfloat16:
            bits = np.ascontiguousarray(x).view(np.uint32)
            # To nearest, ties to even: the upper half of a float32 is a bfloat16.
            even = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
            return (even & np.uint32(0xFFFF0000)).view(np.float32)
        return x

    def norm(self, x: NDArray[Any]) -> NDArray[Any]:
        """Round what transformers computes in float32 at most."""
        return self.round(np.asarray(x, dtype=np.float32))


def _rounded_forward(
    weights: Mapping[str, NDArray[Any]],
    shape: llama.LlamaShape,
    h: NDArray[Any],
    compute: _Compute,
) -> llama.LayerTrace:
    """``lorap_reference.llama.layer_forward`` with a rounding after each operation."""
    r, work = compute.round, compute.work
    n, length, _ = h.shape
    # Rotary frequencies are float32: this base moves them by as much as their rounding may.
    theta = shape.rope_theta * (1 + float(np.finfo(np.float32).eps))

    def linear(name: str, x: NDArray[Any]) -> NDArray[Any]:
        if f"{name}.weight" in weights:
            return r(llama.linear(weights, name, x))
        y = r(r(x @ weights[f"{name}.right.weight"].T) @ weights[f"{name}.left.weight"].T)
        bias = weights.get(f"{name}.left.bias")
        return y if bias is None else r(y + bias)

    def split(name: str, heads: int, turn: bool) -> NDArray[Any]:
        y = linear(f"self_attn.{name}", x_attention).reshape(n, length, heads, shape.head_dim)
        y = y.transpose(0, 2, 1, 3)
        y = compute.norm(llama.rotary(y, theta)).astype(work) if turn else y
        return np.repeat(y, shape.heads // heads, axis=1)

    def rms_norm(x: NDArray[Any], name: str) -> NDArray[Any]:
        gain = weights[f"{name}.weight"].astype(np.float32)
        y = llama.rms_norm(x.astype(np.float32), gain, shape.rms_eps)
        return compute.norm(y).astype(work)

    x_attention = rms_norm(h, "input_layernorm")
    q, k = split("q_proj", shape.heads, True), split("k_proj", shape.kv_heads, True)
    future = np.triu(np.ones((length, length), dtype=bool), k=1)
    logits = r(q @ k.transpose(0, 1, 3, 2) / work(np.sqrt(shape.head_dim)))
    p = r(llama.softmax(np.where(future, work(-np.inf), logits)))
    x_o = r(p @ split("v_proj", shape.kv_heads, False)).transpose(0, 2, 1, 3).reshape(n, length, -1)
    middle = r(h + linear("self_attn.o_proj", x_o))
    x_ffn = rms_norm(middle, "post_attention_layernorm")
    gate = r(llama.silu(linear("mlp.gate_proj", x_ffn)))
    x_down = r(gate * linear("mlp.up_proj", x_ffn))
    output = r(middle + linear("mlp.down_proj", x_down))
    return llama.LayerTrace(x_attention, x_o, middle, x_ffn, x_down, output)


@dataclass(frozen=True)
class _Context:
    reader: CheckpointReader
    stored: CheckpointReader
    record: _Record
    plan: _Plan
    shape: llama.LlamaShape
    compute: _Compute


@dataclass(frozen=True)
class _Norms:
    """Norms of the features of one kind of input.

    Attributes
    ----------
    recomputed : (d_in,)
        In float64, from the ids.
    recorded : (d_in,)
        What the layer was compressed with, as the checkpoint says.
    allowed : float
        Bound on the relative deviation of any one.
    checks : tuple of Check
    """

    recomputed: Array
    recorded: Array
    allowed: float
    checks: tuple[Check, ...]


def _audit_layers(
    context: _Context,
    ids: NDArray[np.int64],
    chosen: Sequence[int],
    progress: Progress | None,
) -> Iterator[ModuleAudit]:
    """Run the checkpoint's own layers, and compare the chosen ones."""
    family, compute, shape = context.reader.family, context.compute, context.shape
    embedding = f"{family.layers_path.removesuffix('layers')}embed_tokens.weight"
    table = context.reader.load(embedding)[""].double().numpy()
    h: Array = table[ids]
    rounded = compute.round(h.copy())
    del table
    size = max(1, TOKENS_PER_BATCH // ids.shape[1])
    batches = [slice(start, start + size) for start in range(0, ids.shape[0], size)]
    last = chosen[-1] + 1
    for index in range(last):
        prefix = f"{family.layers_path}.{index}."
        held = context.stored.load(prefix)
        if index in chosen:
            given = context.reader.load(prefix)
            yield from _audit_layer(context, index, given, held, h, rounded, batches)
            del given
        exact, coarse = _as_arrays(held, compute)
        for batch in batches:
            h[batch] = llama.layer_forward(exact, shape, h[batch]).output
            rounded[batch] = _rounded_forward(coarse, shape, rounded[batch], compute).output
        if not np.isfinite(h).all():
            raise LorapError(f"layers.{index}: the output of the compressed layer holds NaN or inf")
        if progress is not None:
            progress(index + 1, last)


def _as_arrays(
    tensors: Mapping[str, Tensor], compute: _Compute
) -> tuple[dict[str, Array], dict[str, NDArray[Any]]]:
    """Return a layer's weights in float64, and rounded to the dtype of the forwards."""
    exact = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    return exact, {name: compute.round(value) for name, value in exact.items()}


def _audit_layer(
    context: _Context,
    index: int,
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    h: Array,
    rounded: NDArray[Any],
    batches: Sequence[slice],
) -> Iterator[ModuleAudit]:
    """Compare one layer, whose input `h` (N, L, d) comes from the checkpoint's own layers."""
    family, plan = context.reader.family, context.plan.layers[index]
    norms = _norms(context, index, given, h, rounded, batches)
    touched: set[str] = set()
    for role, name in family.attention.items():
        module = plan[name]
        checks: list[Check] = []
        if module.rank is not None:
            checks += norms["o" if role == "o" else "attention"].checks
            checks += _factor_checks(
                context,
                given[f"{name}.weight"],
                held[f"{name}.left.weight"],
                held[f"{name}.right.weight"],
                norms["o" if role == "o" else "attention"],
                _said_of(context.record.report, index, name),
            )
        else:
            checks.append(_same_bits("weight", given[f"{name}.weight"], held[f"{name}.weight"]))
        if f"{name}.bias" in given:
            stored_as = f"{name}.bias" if module.rank is None else f"{name}.left.bias"
            checks.append(_same_bits("bias", given[f"{name}.bias"], held[stored_as]))
        touched |= {f"{name}.weight", f"{name}.bias"}
        yield ModuleAudit(f"layers.{index}.{name}", module.becomes, tuple(checks))

    block = plan[family.ffn_block]
    names = [f"{family.ffn[role]}.{kind}" for role in family.ffn for kind in ("weight", "bias")]
    names = [name for name in names if name in given]
    if block.band is not None:
        said = _said_of(context.record.report, index, family.ffn_block)
        checks = _channel_checks(context, block, given, held, norms, said)
    else:
        checks = [_same_bits(name, given[name], held[name]) for name in names]
    touched |= set(names)
    yield ModuleAudit(f"layers.{index}.{family.ffn_block}", block.becomes, tuple(checks))
    for name in (name for name in given if name not in touched):
        same = _same_bits("untouched", given[name], held[name])
        yield ModuleAudit(f"layers.{index}.{name}", "as it was", (same,))


def _norms(
    context: _Context,
    index: int,
    given: Mapping[str, Tensor],
    h: Array,
    rounded: NDArray[Any],
    batches: Sequence[slice],
) -> dict[str, _Norms]:
    """Recompute the norms that the layer's plan needs, and measure how far rounding moves them."""
    family, plan = context.reader.family, context.plan.layers[index]
    kinds: list[Kind] = []
    factored = {role for role, name in family.attention.items() if plan[name].rank is not None}
    kinds += ["attention"] if factored & {"q", "k", "v"} else []
    kinds += ["o"] if "o" in factored else []
    kinds += ["ffn", "down"] if plan[family.ffn_block].band is not None else []
    if not kinds:
        return {}
    exact, coarse = _as_arrays(given, context.compute)
    squares: dict[str, Array] = {}
    coarse_squares: dict[str, Array] = {}
    for batch in batches:
        trace = llama.layer_forward(exact, context.shape, h[batch])
        near = _rounded_forward(coarse, context.shape, rounded[batch], context.compute)
        for kind in kinds:
            for total, X in (
                (squares, getattr(trace, kind)),
                (coarse_squares, getattr(near, kind)),
            ):
                added = statistics.sum_of_squares(X.reshape(-1, X.shape[-1]))
                total[kind] = total[kind] + added if kind in total else added
    found: dict[str, _Norms] = {}
    for kind in kinds:
        x, moved = np.sqrt(squares[kind]), np.sqrt(coarse_squares[kind])
        if not np.isfinite(x).all():
            raise LorapError(f"layers.{index}: an input of a linear holds NaN or inf")
        name = f"{family.layers_path}.{index}.{kind}.norms"
        recorded = context.record.norms.get(name)
        if recorded is None or recorded.shape != x.shape:
            raise UsageError(
                f"{context.stored.path / STATISTICS}: expected {name} of shape {x.shape}, got "
                f"{None if recorded is None else recorded.shape}"
            )
        unit = np.where(x > 0, x, np.max(x, initial=0.0) or 1.0)
        noise, deviation = np.abs(moved - x) / unit, np.abs(recorded - x) / unit
        allowed = ROOM_LARGEST * (float(np.max(noise)) + context.compute.eps / 8)
        checks = (
            Check(
                f"norms of the inputs ({kind}), rms",
                _rms(deviation),
                ROOM_RMS * (_rms(noise) + context.compute.eps / 16),
            ),
            Check(f"norms of the inputs ({kind}), largest", float(np.max(deviation)), allowed),
        )
        found[kind] = _Norms(x, recorded, allowed, checks)
    return found


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))


# --- low rank ------------------------------------------------------------------------------------


def _spacing(x: Array, dtype: torch.dtype) -> Array:
    """Distance of neighbouring numbers of a dtype at x."""
    info = torch.finfo(dtype)
    _, exponent = np.frexp(np.maximum(np.abs(x), info.smallest_normal))
    return np.asarray(np.ldexp(info.eps, exponent - 1))


def _rounding(L: Array, R: Array, dtype: torch.dtype) -> Array:
    """Variance of the entries of ``L R`` where both are rounded to a dtype."""
    E, F = _spacing(L, dtype), _spacing(R, dtype)
    return np.asarray((E**2 @ R**2 + L**2 @ F**2) / 12)


def _worst(name: str, deviation: Array, bound: Array) -> Check:
    """Return the entry that uses most of its bound."""
    with np.errstate(divide="ignore", invalid="ignore"):
        usage = np.where(deviation == 0, 0.0, deviation / bound)
    at = np.unravel_index(int(np.argmax(np.where(np.isnan(usage), np.inf, usage))), usage.shape)
    where = f"at {tuple(int(i) for i in at)}"
    return Check(name, float(deviation[at]), float(bound[at]), where)


def _factor_checks(
    context: _Context,
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    norms: _Norms,
    said: Mapping[str, Any],
) -> list[Check]:
    """Compare the factors of a projection (SPEC, "Audit")."""
    settings = context.record.settings
    W, L, R = (tensor.double().numpy() for tensor in (weight, left, right))
    dtype, r = left.dtype, L.shape[1]
    eps = torch.finfo(dtype).eps
    scale = lowrank.column_scale(norms.recorded, settings.weighting)
    U, R_ref, S = lowrank.awsvd(W, scale, r)
    unit = SVD_FACTOR * EPS64 * max(W.shape) * float(S[0])
    checks, as_written = [], False

    product = L @ R
    # The reference's factors rounded, and those stored: they may have been rescaled and rounded
    # again, or be in another basis.
    noise = np.sqrt(_rounding(U, R_ref, dtype) + _rounding(L, R, dtype))
    gap = float(S[r - 1] - (S[r] if r < S.size else 0.0))
    size = float(np.linalg.norm(W, 2))
    if gap > 2 * unit:
        turned = 2 * unit / gap * size + 10 * EPS64 * max(W.shape) * size
        bound = SPREADS * noise + turned
        checks.append(_worst("product", np.abs(product - U @ R_ref), bound))
        entries, as_written = _entry_checks(W, L, R, U, R_ref, S, unit, dtype)
        checks += entries
    else:
        # Any basis of a degenerate subspace is right: the product is some projection of W.
        projected = L @ (np.linalg.pinv(L) @ W)
        moved = float(np.linalg.norm(product - projected))
        checks.append(Check("projection", moved, 2 * eps * float(np.linalg.norm(W))))

    again = lowrank.column_scale(norms.recomputed, settings.weighting)
    S_again = np.linalg.svd(W * again, compute_uv=False)
    optimum = float(np.linalg.norm(S_again[r:]))
    share = norms.allowed / (2 if settings.weighting == "eq6" else 1)
    factor = (1 + share) / (1 - share) if share < 1 else np.inf
    rounding = SPREADS * float(np.linalg.norm(noise * again))
    whole = float(np.linalg.norm(W * again)) or 1.0
    slack = (factor - 1) * optimum + rounding + unit * float(np.sqrt(min(W.shape)))
    excess = np.sqrt(lowrank.weighted_error(W, product, again)) - optimum
    checks.append(
        Check("weighted error above the optimum", max(excess, 0.0) / whole, slack / whole)
    )

    # The report's number was taken in float32 unless the weights are float64.
    wide = EPS64 if dtype == torch.float64 else float(np.finfo(np.float32).eps)
    whole = float(np.linalg.norm(S))
    error = np.sqrt(lowrank.weighted_error(W, product, scale)) / whole if whole else 0.0
    summed = np.linalg.norm((np.abs(W) + np.sqrt(r) * np.sqrt(L**2 @ R**2)) * scale)
    allowed = 2 * wide * summed / whole if whole else 0.0
    allowed += 10 * EPS64 * max(W.shape)
    if not as_written and whole:
        # It was taken before these factors were rounded once more.
        allowed += SPREADS * float(np.linalg.norm(noise * scale)) / whole
    checks += [
        _number("report: relative weighted error", error, said, "relative_weighted_error", allowed),
        _number(
            "report: retained energy",
            lowrank.retained_energy(S, r),
            said,
            "retained_energy",
            10 * EPS64 * max(W.shape),
        ),
    ]
    return checks


def _entry_checks(
    W: Array,
    L: Array,
    R: Array,
    U: Array,
    R_ref: Array,
    S: Array,
    unit: float,
    dtype: torch.dtype,
) -> tuple[list[Check], bool]:
    """Compare the factors entry by entry, up to signs and one common scale.

    Nothing is compared where they are given in another basis, such as that of equal singular
    values: then the product alone counts. Returns also whether they are in the reference's own
    basis and scale.
    """
    r = L.shape[1]
    C = U.T @ L
    empty = ~U.any(axis=0)
    C[empty, empty] = 1.0
    common = float(np.median(np.abs(np.diag(C))))
    sign = np.where(np.diag(C) < 0, -1.0, 1.0)
    if np.max(np.abs(C - common * np.diag(sign))) > GAUGE * common:
        return [], False
    rescaled = abs(common - 1) > torch.finfo(dtype).eps
    c: Array = common * sign if rescaled else sign
    # Rescaled: half a unit twice, the first of which the scale may make twice as many.
    ulps = 2.0 if rescaled else 0.5
    # A single vector turns by the error over the distance to the nearest other singular value.
    distance = np.abs(S[:r, None] - S[None, :])
    distance[np.arange(r), np.arange(r)] = np.inf
    with np.errstate(divide="ignore"):
        turned = 2 * unit / np.min(distance, axis=1)
    # Stored by way of float32, which rounds once more.
    ulps *= 1.001
    columns = np.linalg.norm(W, axis=0)
    checks = [
        _worst(
            "left factor",
            np.abs(L - U * c),
            ulps * _spacing(L, dtype) + np.abs(turned * c),
        ),
        _worst(
            "right factor",
            np.abs(R - R_ref / c[:, None]),
            ulps * _spacing(R, dtype) + np.abs(turned / c)[:, None] * columns,
        ),
    ]
    return checks, not rescaled


def _number(name: str, expected: float, said: Mapping[str, Any], key: str, allowed: float) -> Check:
    got = said.get(key)
    if isinstance(got, bool) or not isinstance(got, int | float):
        return Check(name, float("inf"), allowed, f"expected {expected!r}, got {got!r}")
    return Check(name, float(abs(got - expected)), float(allowed))


# --- channels ------------------------------------------------------------------------------------


def _channel_checks(
    context: _Context,
    block: _Module,
    given: Mapping[str, Tensor],
    held: Mapping[str, Tensor],
    norms: Mapping[str, _Norms],
    said: Mapping[str, Any],
) -> list[Check]:
    """Compare the channels that a feed-forward block keeps (SPEC, "Audit")."""
    family, aggregation = context.reader.family, context.record.settings.aggregation
    assert block.band is not None
    assert block.width is not None
    low, high = block.band
    weights = {role: given[f"{name}.weight"] for role, name in family.ffn.items()}
    gate, up, down = (weights[role].double().numpy() for role in ("gate", "up", "down"))
    checks = [*norms["ffn"].checks, *norms["down"].checks]

    listed = said.get("kept_channels")
    kept = np.array(listed if _is_selection(listed, len(up), block.width) else [], dtype=np.int64)
    checks.append(
        Check("report: kept channels", 0, 0)
        if kept.size
        else Check(
            "report: kept channels",
            1,
            0,
            f"expected {block.width} ascending channels below {len(up)}",
        )
    )
    if not kept.size:
        return checks
    chosen = torch.from_numpy(kept)
    for role, name in family.ffn.items():
        for kind in ("weight", "bias"):
            whole = given.get(f"{name}.{kind}")
            if whole is None:
                continue
            if role != "down":
                part = whole[chosen]
            else:
                part = whole[:, chosen] if kind == "weight" else whole
            checks.append(_same_bits(f"{name}.{kind}", part, held[f"{name}.{kind}"]))

    C = importance.group_importance(
        up, gate, down, norms["ffn"].recomputed, norms["down"].recomputed, aggregation
    )
    band = importance.group_importance(
        up,
        gate,
        down,
        norms["ffn"].allowed * norms["ffn"].recomputed,
        norms["down"].allowed * norms["down"].recomputed,
        aggregation,
    )
    checks += _selection_checks("recomputed scores", C, band, kept, low)
    # Given the norms, scores are products in float32 (float64 for such weights) and float64 sums.
    wide = EPS64 if weights["up"].dtype == torch.float64 else float(np.finfo(np.float32).eps)
    relative = 2 * wide + 2 * EPS64 * (len(up) + up.shape[1])
    x_ffn, x_down = norms["ffn"].recorded, norms["down"].recorded
    C = importance.group_importance(up, gate, down, x_ffn, x_down, aggregation)
    checks += _selection_checks("recorded norms", C, relative * C, kept, low)

    ordered = np.sort(C)
    places = {
        "least_important_kept": low - 1,
        "lowest_removed": low,
        "highest_removed": high - 1,
        "lowest_of_top": high,
    }
    cut = said.get("scores_at_cut")
    cut = cut if isinstance(cut, dict) else {}
    for key, at in places.items():
        name = f"report: score of {key}"
        if not 0 <= at < C.size:
            checks.append(_equal(name, None, cut.get(key)))
            continue
        expected = float(ordered[at])
        checks.append(_number(name, expected, cut, key, relative * expected))

    removed = np.ones(len(up), dtype=bool)
    removed[kept] = False
    errors = said.get("relative_weighted_error")
    errors = errors if isinstance(errors, dict) else {}
    lost = all_energy = 0.0
    for role, W, x, axis in (
        ("gate", gate, x_ffn, 1),
        ("up", up, x_ffn, 1),
        ("down", down, x_down, 0),
    ):
        energy = importance.channel_importance(importance.weight_importance(W, x), axis, "l2") ** 2
        gone, total = float(np.sum(energy[removed])), float(np.sum(energy))
        lost, all_energy = lost + gone, all_energy + total
        expected = float(np.sqrt(gone / total)) if total else 0.0
        checks.append(
            _number(
                f"report: relative weighted error of {role}", expected, errors, role, 2 * relative
            )
        )
    energy_kept = 1 - lost / all_energy if all_energy else 1.0
    checks.append(
        _number("report: retained energy", energy_kept, said, "retained_energy", 4 * relative)
    )
    return checks


def _is_selection(listed: object, channels: int, width: int) -> bool:
    return (
        isinstance(listed, list)
        and len(listed) == width
        and all(type(channel) is int and 0 <= channel < channels for channel in listed)
        and all(a < b for a, b in pairwise(listed))
    )


def _selection_checks(
    name: str, C: Array, band: Array, kept: NDArray[np.int64], low: int
) -> list[Check]:
    """Compare the kept channels with the scores: none on the wrong side of a cut by its noise.

    A selection is the one of some scores within the noise of `C` if no removed channel lies above
    one of the top, nor a channel of the least important above a removed one, by more than the
    noise of the two.
    """
    high = low + C.size - kept.size
    expected = set(pruning.kept_channels(C, low, high).tolist())
    others = len(expected - set(kept.tolist()))
    detail = f"{others} channels differ from the reference's" if others else ""
    removed = np.setdiff1d(np.arange(C.size), kept)
    ascending = kept[np.argsort(C[kept], kind="stable")]
    checks = []
    for cut, below, above in (
        ("top", removed, ascending[low:]),
        ("least important", ascending[:low], removed),
    ):
        if below.size and above.size:
            b = below[np.argmax(C[below] - band[below])]
            a = above[np.argmin(C[above] + band[above])]
            checks.append(
                Check(
                    f"channels by {name}, {cut}",
                    max(float(C[b] - C[a]), 0.0),
                    float(band[b] + band[a]),
                    detail,
                )
            )
    return checks
