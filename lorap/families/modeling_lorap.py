"""Compressed forms of decoder-only language models: linears change their shape layer by layer.

This file travels in every compressed checkpoint and is what ``trust_remote_code=True`` loads where
lorap is not installed. It therefore imports torch and transformers only, and runs on transformers
4.57 and 5.

A family, say ``Llama``, has the classes ``LorapLlamaConfig``, ``LorapLlamaAttention``,
``LorapLlamaMLP``, ``LorapLlamaModel`` and ``LorapLlamaForCausalLM``. They extend those of
transformers, whose forwards they keep, and are made when one is first asked for: a family that an
older transformers does not have is no obstacle to the others.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

FORMAT_VERSION = 1
ATTENTION, FFN, JOINT = "self_attn", "mlp", "self_attn.qk_proj"
"""Names in a structure that are not those of linears."""

_SUFFIXES = ("Config", "Attention", "MLP", "Model", "ForCausalLM")
_EVERY_LAYER = "layers.*."


_SEPARATE = {role: f"{ATTENTION}.{role}_proj" for role in ("q", "k", "v", "o")}
_SEPARATE |= {role: f"{FFN}.{role}_proj" for role in ("gate", "up", "down")}
_FUSED = {role: f"{ATTENTION}.qkv_proj.{role}" for role in ("q", "k", "v")}
_FUSED |= {role: f"{FFN}.gate_up_proj.{role}" for role in ("gate", "up")}
"""Role to the linear's name in a decoder layer. The parts of a fused linear have longer names."""


@dataclass(frozen=True)
class _Stock:
    """What a family is in transformers.

    Parameters
    ----------
    module : str
        Its folder in ``transformers.models``.
    text : str
        What the names of configuration and base model have beyond those of the other classes.
    linears : mapping
        Role to the linear's name in a decoder layer.
    prunes_heads : bool
        Whether heads can be left out: not where a norm spans all of them.
    scaling : tuple of str
        The keys beside ``type`` that transformers 4 insists on in ``rope_scaling``, if it does.
    """

    module: str
    text: str = ""
    linears: Mapping[str, str] = field(default_factory=lambda: _SEPARATE)
    prunes_heads: bool = True
    scaling: tuple[str, ...] = ()

    def held(self) -> dict[str, list[str]]:
        """Return, for each linear of the dense layer, itself or the parts that it fuses."""
        found: dict[str, list[str]] = {}
        for name in self.linears.values():
            found.setdefault(".".join(name.split(".")[:2]), []).append(name)
        return found


_FAMILIES = {
    "Llama": _Stock("llama"),
    "Mistral": _Stock("mistral"),
    "Qwen2": _Stock("qwen2"),
    "Qwen3": _Stock("qwen3"),
    "Gemma2": _Stock("gemma2"),
    "Gemma3": _Stock("gemma3", text="Text"),
    "Phi3": _Stock("phi3", linears=_SEPARATE | _FUSED, scaling=("short_factor", "long_factor")),
    "Olmo2": _Stock("olmo2", prunes_heads=False, scaling=("factor",)),
    "SmolLM3": _Stock("smollm3"),
}


class LinearShape(NamedTuple):
    """A linear of a compressed layer."""

    d_in: int
    d_out: int
    rank: int | None
    """Of its two factors; None where it is one matrix."""
    joint: bool
    """Whether its right factor is that of q and k together."""
    gains_bias: bool
    """Whether it has a bias even if the dense one has none."""

    @property
    def is_plain(self) -> bool:
        """Whether it is an ordinary linear, if perhaps a narrower one."""
        return self.rank is None and not self.gains_bias


class LorapConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """The stock configuration of a family, with the structure of every decoder layer.

    Parameters
    ----------
    lorap : mapping, optional
        ``{"format_version": 1, "layers": [...]}`` with one mapping per decoder layer, from the name
        of a module to what it becomes. A module that is not named is as it was. None: all are.

        - a linear, such as ``"self_attn.q_proj"``: ``{"rank": r}`` for a product of two factors;
          ``{"bias": True}`` for a bias that the dense linear has not; or both.
        - ``"self_attn.qk_proj"``: the same for q and k stacked, which share the right factor.
        - ``"self_attn"``: ``{"kv_heads": n}``, the key-value heads left, each with its query heads.
        - ``"mlp"``: ``{"width": w}``, the channels left. Ranks in the block are of what is left.
    **kwargs
        The fields of the stock configuration, with their original values: ``intermediate_size`` and
        the numbers of heads are those of the dense model.

    Raises
    ------
    ValueError
        If the structure names an unknown module, gives a number out of range or two entries that
        exclude each other, or does not have one mapping per decoder layer.
    """

    stock: ClassVar[_Stock]

    lorap: dict[str, Any] | None

    def __init__(self, lorap: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        rope = kwargs.get("rope_parameters")
        if rope:
            # Each version of transformers reads its own spelling, and would take defaults, such as
            # a theta of 10000, for what it does not find.
            spelled = _rope_of_transformers_4(rope, self.stock.scaling)
            if hasattr(type(self), "rope_parameters"):
                kwargs = {key: value for key, value in kwargs.items() if key not in spelled}
            else:
                del kwargs["rope_parameters"]
                kwargs |= spelled
        super().__init__(**kwargs)
        self.lorap = None if lorap is None else dict(lorap)
        self.check_structure()

    def layer_structure(self, layer_idx: int) -> Mapping[str, Mapping[str, Any]]:
        """Return what the modules of a decoder layer become; empty where all are as they were."""
        layer: Mapping[str, Any] = {} if self.lorap is None else self.lorap["layers"][layer_idx]
        return layer

    def kv_heads(self, layer_idx: int) -> int:
        """Return the number of key-value heads of a decoder layer."""
        given: int = self.num_key_value_heads
        return int(self.layer_structure(layer_idx).get(ATTENTION, {}).get("kv_heads", given))

    def width(self, layer_idx: int) -> int:
        """Return the number of channels of a decoder layer's feed-forward block."""
        given: int = self.intermediate_size
        return int(self.layer_structure(layer_idx).get(FFN, {}).get("width", given))

    def linears(self, layer_idx: int) -> dict[str, LinearShape]:
        """Return the linears of a decoder layer by name."""
        structure, sizes = self.layer_structure(layer_idx), self._sizes(layer_idx)
        found = {}
        for role, name in self.stock.linears.items():
            joint = role in ("q", "k") and JOINT in structure
            entry = structure.get(JOINT if joint else name, {})
            found[name] = LinearShape(
                *sizes[name],
                rank=entry.get("rank"),
                joint=joint,
                gains_bias="bias" in entry,
            )
        return found

    @property
    def base_model_tp_plan(self) -> dict[str, str]:  # type: ignore[override]
        """How tensor parallelism splits the modules of the base model: its plan as stock has it.

        Of a factored linear whose outputs are split, the left factor is, and of one whose inputs
        are, the right one; its other factor is on every device.
        """
        plan: dict[str, str] = super().base_model_tp_plan or {}
        if self.lorap is None:
            return plan
        layers = [self._layer_plan(index, plan) for index in range(self.num_hidden_layers)]
        composed = {name for _, names in layers for name in names}
        # A rule for all layers would meet modules that are factored in some of them. Rules for one
        # layer are for vLLM: transformers passes over them, and must pass over the whole block.
        single = {
            name.partition(".")[0] for rules, _ in layers for name in rules if name in composed
        }
        found = {name: style for name, style in plan.items() if not name.startswith(_EVERY_LAYER)}
        for index, (rules, _) in enumerate(layers):
            for name, style in rules.items():
                where = f"layers.{index}." if name.partition(".")[0] in single else _EVERY_LAYER
                found[f"{where}{name}"] = style
        return found

    def _layer_plan(self, index: int, plan: Mapping[str, str]) -> tuple[dict[str, str], set[str]]:
        """Return the rules of a layer, and the names of its modules that are more than a linear."""
        linears, held = self.linears(index), self.stock.held()
        rules: dict[str, str] = {}
        composed = set()
        for pattern, style in plan.items():
            stored = pattern.removeprefix(_EVERY_LAYER)
            if stored == pattern:
                continue
            parts = held.get(stored, [])
            if all(linears[part].is_plain for part in parts):
                rules[stored] = style
                continue
            composed |= {stored}
            factor = "left" if style.startswith("colwise") else "right"
            for part in parts:
                if linears[part].rank is None:
                    rules[part] = style
                else:
                    composed |= {part}
                    rules[f"{part}.{factor}"] = style
        return rules, composed

    def _sizes(self, layer_idx: int) -> dict[str, tuple[int, int]]:
        """Return ``(d_in, d_out)`` of a layer's linears, and of q and k stacked."""
        head_dim = getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
        keys = self.kv_heads(layer_idx) * head_dim
        queries = keys * (self.num_attention_heads // self.num_key_value_heads)
        hidden, width = self.hidden_size, self.width(layer_idx)
        names = self.stock.linears
        return {
            names["q"]: (hidden, queries),
            names["k"]: (hidden, keys),
            names["v"]: (hidden, keys),
            names["o"]: (queries, hidden),
            names["gate"]: (hidden, width),
            names["up"]: (hidden, width),
            names["down"]: (width, hidden),
            JOINT: (hidden, queries + keys),
        }

    def check_structure(self) -> None:
        """Raise ValueError where ``lorap`` does not fit the other fields."""
        if self.lorap is None:
            return
        version = self.lorap.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"lorap.format_version: expected {FORMAT_VERSION}, got {version!r}; "
                "the checkpoint was written by another version of lorap"
            )
        unknown = sorted(set(self.lorap) - {"format_version", "layers"})
        if unknown:
            raise ValueError(f"lorap: expected format_version and layers, got also {unknown}")
        layers = self.lorap.get("layers")
        if not isinstance(layers, list) or not all(isinstance(item, Mapping) for item in layers):
            raise ValueError("lorap.layers: expected a list with one mapping per decoder layer")
        if len(layers) != self.num_hidden_layers:
            raise ValueError(
                f"lorap.layers: expected {self.num_hidden_layers} entries (num_hidden_layers), "
                f"got {len(layers)}"
            )
        for index in range(len(layers)):
            self._check_layer(index)

    def _check_layer(self, index: int) -> None:
        structure, where = self.layer_structure(index), f"lorap.layers[{index}]"
        names = self.stock.linears
        blocks = {
            ATTENTION: ("kv_heads", self.num_key_value_heads),
            FFN: ("width", self.intermediate_size),
        }
        known = (*names.values(), JOINT, *blocks)
        for name in structure:
            if name not in known:
                raise ValueError(
                    f"{where}[{name!r}]: unknown module; expected one of {', '.join(known)}"
                )
        # These first: the limits of the ranks follow from them.
        for name, (key, limit) in blocks.items():
            if name in structure:
                _check_entry(f"{where}[{name!r}]", structure[name], key, limit)
        for name, (d_in, d_out) in self._sizes(index).items():
            if name in structure:
                _check_entry(
                    f"{where}[{name!r}]",
                    structure[name],
                    "rank",
                    min(d_in, d_out),
                    with_bias=True,
                    rankless=name != JOINT,
                )
        if ATTENTION in structure and not self.stock.prunes_heads:
            raise ValueError(f"{where}: no heads can be left out, since a norm spans all of them")
        factored = [name for name in structure if "rank" in structure[name]]
        for name in factored:
            if ATTENTION in structure and not name.startswith(f"{FFN}."):
                raise ValueError(f"{where}: expected kv_heads or a rank of {name}, got both")
        for name in (names["q"], names["k"]):
            if JOINT in structure and name in structure:
                raise ValueError(f"{where}: expected {JOINT} or {name}, got both")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, with those that other versions of transformers read instead."""
        output: dict[str, Any] = super().to_dict()
        # save_pretrained by itself would write two of the three at most.
        start = f"{Path(__file__).stem}.{type(self).__name__.removesuffix('Config')}"
        output["auto_map"] = {
            "AutoConfig": f"{start}Config",
            "AutoModel": f"{start}Model",
            "AutoModelForCausalLM": f"{start}ForCausalLM",
        }
        if output.get("rope_parameters"):
            output |= _rope_of_transformers_4(output["rope_parameters"], self.stock.scaling)
        return output

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write config.json and, beside it, this file: a model saved again loads both ways."""
        folder, source = Path(save_directory), Path(__file__)
        content = source.read_bytes()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / source.name).write_bytes(content)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _check_entry(
    where: str,
    entry: object,
    key: str,
    limit: int,
    *,
    with_bias: bool = False,
    rankless: bool = False,
) -> None:
    """Raise ValueError unless `entry` is ``{key: number}``.

    ``"bias": True`` may stand beside the number, or in its place, where the flags say so.
    """
    allowed, expected = [{key}], f"{{{key!r}: number}}"
    if with_bias:
        allowed.append({key, "bias"})
        expected += ", with 'bias': True or without"
    if rankless:
        allowed.append({"bias"})
        expected += ", or {'bias': True}"
    if not isinstance(entry, Mapping) or set(entry) not in allowed:
        raise ValueError(f"{where}: expected {expected}, got {entry!r}")
    value = entry.get(key, 1)
    if type(value) is not int or not 1 <= value <= limit:
        raise ValueError(f"{where}: expected a {key} from 1 to {limit}, got {value!r}")
    if entry.get("bias", True) is not True:
        raise ValueError(f"{where}: expected True for 'bias', got {entry['bias']!r}")


def _rope_of_transformers_4(rope: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields that say in transformers 4 what ``rope_parameters`` says in 5.

    `keys` are those that it insists on beside ``type`` in ``rope_scaling``; if empty, all are kept.
    """
    if "full_attention" in rope:
        fields = _rope_of_transformers_4(rope["full_attention"], keys)
        return fields | {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
    kind = rope.get("rope_type", "default")
    fields = {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if kind != "default" and keys:
        fields["rope_scaling"] = {"type": kind} | {key: rope[key] for key in keys}
    elif kind != "default":
        fields["rope_scaling"] = {key: rope[key] for key in rope if key not in fields}
    return fields


class LowRankLinear(nn.Module):
    """A linear map of bounded rank, ``y = left(right(x))``.

    Parameters
    ----------
    in_features, out_features, rank : int
        ``right`` has the weight ``(rank, in_features)``, ``left`` ``(out_features, rank)``.
    bias : bool
        Whether ``left`` has a bias, ``(out_features,)``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.right = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        output: Tensor = self.left(self.right(hidden_states))
        return output

    def extra_repr(self) -> str:
        """Return the shape for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class JointLinear(nn.Module):
    """A linear map whose right factor belongs to the attention module, for q and k alike.

    Parameters
    ----------
    attention : FactoredQKV
        Applies the right factor.
    in_features, out_features, rank : int
        ``left`` has the weight ``(out_features, rank)``.
    bias : bool
        Whether ``left`` has a bias, ``(out_features,)``.
    """

    def __init__(
        self,
        attention: FactoredQKV,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # In a tuple, lest the module be registered as a part of its own part; and it rather than
        # the factor, which others may replace, by a quantised one for instance.
        self._attention = (attention,)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.left = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        output: Tensor = self.left(self._attention[0].right(hidden_states))
        return output

    def extra_repr(self) -> str:
        """Return the shape for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class SplitLinear(nn.Module):
    """A fused linear whose parts are modules of their own; their outputs lie side by side.

    Parameters
    ----------
    parts : mapping
        Name to module, in the order of the outputs.
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., sum of the parts' out_features)``."""
        return torch.cat([part(hidden_states) for part in self.children()], dim=-1)


# Not called an attention: transformers expects of a file that defines one to call the kernels too,
# and would refuse to exchange them.
class FactoredQKV(nn.Module):
    """The stock attention of a family, for layers in which a projection is more than a linear.

    A class of its own, and of these layers only, because inference engines decide by the type of
    a module, and by the source of its forward, which of its linears may be fused.
    """

    def __init__(self, config: LorapConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.qk_right: nn.Linear | None = None
        self._shared: tuple[Tensor, Tensor] | None = None

    def right(self, hidden_states: Tensor) -> Tensor:
        """Map ``(..., hidden)`` to ``(..., rank)`` by the factor that q and k share."""
        if self._shared is not None and self._shared[0] is hidden_states:
            return self._shared[1]
        assert self.qk_right is not None
        output: Tensor = self.qk_right(hidden_states)
        return output

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the stock forward; a factor that q and k share is applied once."""
        if self.qk_right is None:
            return super().forward(hidden_states, *args, **kwargs)
        self._shared = (hidden_states, self.right(hidden_states))
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self._shared = None


class FactoredFFN(nn.Module):
    """The stock feed-forward block of a family, where a projection is more than a linear.

    A class and a forward of its own for the same reason as `FactoredQKV`.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run the stock forward."""
        output: Tensor = super().forward(hidden_states)
        return output


class _LayerConfig:
    """The configuration as the attention of a layer with fewer heads sees it.

    All other fields are those of the model's configuration, also when they change.
    """

    def __init__(self, config: LorapConfig, kv_heads: int) -> None:
        self._config = config
        self.num_key_value_heads = kv_heads
        share = config.num_attention_heads // config.num_key_value_heads
        self.num_attention_heads = kv_heads * share

    def __getattr__(self, name: str) -> Any:
        if name == "_config":
            # copy and pickle ask for attributes before there are any.
            raise AttributeError(name)
        return getattr(self._config, name)


class LorapModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The stock model of a family without a head, its layers given their structure.

    On a real device it passes through its dense form; ``from_pretrained``, and ``from_config`` on
    the meta device, allocate nothing that is not kept.
    """

    layer_class: ClassVar[type[nn.Module]]
    attention_class: ClassVar[type[FactoredQKV]]
    ffn_class: ClassVar[Any]

    # Not empty, as that of Gemma 3 in transformers 4.
    base_model_prefix = "model"
    config: LorapConfig
    layers: nn.ModuleList

    def __init__(self, config: LorapConfig) -> None:
        config.check_structure()
        super().__init__(config)

    def post_init(self) -> None:
        """Give the layers their structure, then initialise; the stock ``__init__`` ends here."""
        for index, layer in enumerate(self.layers):
            self._shape_(layer, self.config, index)
        super().post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def decoder_layer(cls, config: LorapConfig, index: int) -> nn.Module:
        """Return a decoder layer with the structure that the configuration gives for its index."""
        layer = cls.layer_class(config, index)
        cls._shape_(layer, config, index)
        return layer

    @classmethod
    def _shape_(cls, layer: Any, config: LorapConfig, index: int) -> None:
        """Give a dense decoder layer its structure."""
        if not config.layer_structure(index):
            return
        shapes, names = config.linears(index), config.stock.linears
        if not all(shapes[names[role]].is_plain for role in ("q", "k", "v", "o")):
            layer.self_attn = cls.attention_class(config, index)
        if not all(shapes[names[role]].is_plain for role in ("gate", "up", "down")):
            layer.mlp = cls.ffn_class(config)
        q = shapes[names["q"]]
        if q.joint:
            assert q.rank is not None
            layer.self_attn.qk_right = nn.Linear(q.d_in, q.rank, bias=False)
        kv_heads = config.kv_heads(index)
        if kv_heads != config.num_key_value_heads:
            layer.self_attn.num_key_value_heads = kv_heads
            layer.self_attn.config = _LayerConfig(config, kv_heads)
        layer.mlp.intermediate_size = config.width(index)
        for stored, held in config.stock.held().items():
            dense, parts = layer.get_submodule(stored), [shapes[name] for name in held]
            if held == [stored] or all(part.is_plain for part in parts):
                whole = parts[0]._replace(d_out=sum(part.d_out for part in parts))
                new = _make_linear(whole, dense, layer.self_attn)
            else:
                new = SplitLinear(
                    {
                        name.rpartition(".")[2]: _make_linear(part, dense, layer.self_attn)
                        for name, part in zip(held, parts, strict=True)
                    }
                )
            layer.set_submodule(stored, new)


def _make_linear(shape: LinearShape, dense: Any, attention: Any) -> nn.Module:
    """Return the module for a linear, or for a part of a fused one, of a compressed layer."""
    bias = dense.bias is not None or shape.gains_bias
    d_in, d_out, rank = shape.d_in, shape.d_out, shape.rank
    options: dict[str, Any] = {
        "bias": bias,
        "device": dense.weight.device,
        "dtype": dense.weight.dtype,
    }
    if rank is not None and shape.joint:
        return JointLinear(attention, d_in, d_out, rank, **options)
    if rank is not None:
        return LowRankLinear(d_in, d_out, rank, **options)
    return nn.Linear(d_in, d_out, **options)


class LorapForCausalLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """The stock model of a family with its head, around the compressed form."""

    model_class: ClassVar[type[LorapModel]]
    base_model_prefix = "model"

    def __init__(self, config: LorapConfig) -> None:
        # Not the stock __init__, which would make and initialise the dense model to be thrown away.
        PreTrainedModel.__init__(self, config)
        self.model = self.model_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


@functools.cache
def _make_classes(prefix: str) -> dict[str, type]:
    """Return the classes of a family by name; raise ImportError if transformers has no such one."""
    stock = _FAMILIES[prefix]
    module: Any = importlib.import_module(
        f"transformers.models.{stock.module}.modeling_{stock.module}"
    )
    made: dict[str, type] = {}

    def make(suffix: str, mixin: type, base: type, **members: Any) -> Any:
        name = f"Lorap{prefix}{suffix}"
        members |= {
            "__module__": __name__,
            "__qualname__": name,
            "__doc__": f"{base.__name__} of a compressed model; see {mixin.__name__}.",
        }
        made[name] = type(name, (mixin, base), members)
        return made[name]

    base_config = getattr(module, f"{prefix}{stock.text}Config")
    config = make(
        "Config",
        LorapConfig,
        base_config,
        # transformers 5 makes a dataclass of each class, and an __init__ where it has none itself.
        __init__=LorapConfig.__init__,
        model_type=f"lorap_{base_config.model_type}",
        stock=stock,
    )
    attention = make("Attention", FactoredQKV, getattr(module, f"{prefix}Attention"))
    ffn = make("MLP", FactoredFFN, getattr(module, f"{prefix}MLP"))
    model = make(
        "Model",
        LorapModel,
        getattr(module, f"{prefix}{stock.text}Model"),
        config_class=config,
        layer_class=getattr(module, f"{prefix}DecoderLayer"),
        attention_class=attention,
        ffn_class=ffn,
    )
    make(
        "ForCausalLM",
        LorapForCausalLM,
        getattr(module, f"{prefix}ForCausalLM"),
        config_class=config,
        model_class=model,
    )
    return made


def __getattr__(name: str) -> Any:
    for prefix in _FAMILIES:
        if name in [f"Lorap{prefix}{suffix}" for suffix in _SUFFIXES]:
            return _make_classes(prefix)[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
