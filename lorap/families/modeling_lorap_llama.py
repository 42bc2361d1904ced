"""LLaMA with low-rank attention projections and narrowed feed-forward blocks.

This file travels in every compressed checkpoint and is what ``trust_remote_code=True`` loads where
lorap is not installed. It therefore imports torch and transformers only, and runs on transformers
4.57 and 5.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

FORMAT_VERSION = 1
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
AUTO_MAP = {
    "AutoConfig": "modeling_lorap_llama.LorapLlamaConfig",
    "AutoModel": "modeling_lorap_llama.LorapLlamaModel",
    "AutoModelForCausalLM": "modeling_lorap_llama.LorapLlamaForCausalLM",
}


class LorapLlamaConfig(LlamaConfig):  # type: ignore[no-untyped-call]
    """A LLaMA configuration with the rank or width of every compressed module.

    Parameters
    ----------
    lorap : mapping, optional
        ``{"format_version": 1, "layers": [...]}`` with one mapping per decoder layer. In it,
        ``"self_attn.{q,k,v,o}_proj"`` gives ``{"rank": r}`` and ``"mlp"`` gives ``{"width": w}``.
        A module that is not named is dense and at its original width. None: all modules are.
    **kwargs
        The fields of :class:`transformers.LlamaConfig`; ``intermediate_size`` is the original one.

    Raises
    ------
    ValueError
        If the structure names an unknown module, gives a rank or width out of range, or does not
        have one entry per decoder layer.
    """

    model_type = "lorap_llama"
    # A factored projection cannot be split by the plans of the dense one.
    base_model_tp_plan: ClassVar[dict[str, str]] = {}

    lorap: dict[str, Any] | None

    def __init__(self, lorap: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        rope = kwargs.get("rope_parameters")
        if rope and not hasattr(LlamaConfig, "rope_parameters"):
            # transformers 4 reads only these two, and would fall back to a theta of 10000.
            rope = dict(rope)
            kwargs["rope_theta"] = rope.pop("rope_theta", kwargs.get("rope_theta", 10000.0))
            kwargs["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        super().__init__(**kwargs)
        self.lorap = None if lorap is None else dict(lorap)
        self.check_structure()

    def projection_shape(self, name: str) -> tuple[int, int]:
        """Return ``(d_in, d_out)`` of an attention projection, ``q_proj`` to ``o_proj``."""
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        queries = self.num_attention_heads * head_dim
        keys = (self.num_key_value_heads or self.num_attention_heads) * head_dim
        shapes = {
            "q_proj": (self.hidden_size, queries),
            "k_proj": (self.hidden_size, keys),
            "v_proj": (self.hidden_size, keys),
            "o_proj": (queries, self.hidden_size),
        }
        return shapes[name]

    def rank(self, layer_idx: int, name: str) -> int | None:
        """Return the rank of an attention projection, or None where it is dense."""
        entry = self._layer(layer_idx).get(f"self_attn.{name}")
        return None if entry is None else int(entry["rank"])

    def width(self, layer_idx: int) -> int:
        """Return the number of channels of a layer's feed-forward block."""
        entry = self._layer(layer_idx).get("mlp")
        return int(self.intermediate_size) if entry is None else int(entry["width"])

    def _layer(self, layer_idx: int) -> Mapping[str, Any]:
        layer: Mapping[str, Any] = {} if self.lorap is None else self.lorap["layers"][layer_idx]
        return layer

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
        limits = {
            f"self_attn.{name}": ("rank", min(self.projection_shape(name))) for name in PROJECTIONS
        }
        limits["mlp"] = ("width", self.intermediate_size)
        for index, layer in enumerate(layers):
            for name, entry in layer.items():
                where = f"lorap.layers[{index}][{name!r}]"
                if name not in limits:
                    raise ValueError(
                        f"{where}: unknown module; expected one of {', '.join(limits)}"
                    )
                key, limit = limits[name]
                if not isinstance(entry, Mapping) or set(entry) != {key}:
                    raise ValueError(f"{where}: expected {{{key!r}: number}}, got {entry!r}")
                value = entry[key]
                if type(value) is not int or not 1 <= value <= limit:
                    raise ValueError(f"{where}: expected a {key} from 1 to {limit}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, with those that other versions of transformers read instead."""
        output: dict[str, Any] = super().to_dict()
        # save_pretrained by itself would write two of the three at most.
        output["auto_map"] = dict(AUTO_MAP)
        rope = output.get("rope_parameters")
        if rope:
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            default = scaling.get("rope_type", "default") == "default"
            output["rope_theta"] = rope["rope_theta"]
            output["rope_scaling"] = None if default else scaling
        return output

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Write config.json and, beside it, this file: a model saved again loads both ways."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(__file__).read_bytes()
        (folder / "modeling_lorap_llama.py").write_bytes(source)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


class LowRankLinear(nn.Module):
    """A linear map of bounded rank, ``y = left(right(x))``.

    Parameters
    ----------
    in_features, out_features, rank : int
        ``right`` has the weight ``(rank, in_features)``, ``left`` ``(out_features, rank)``.
    bias : bool
        Whether ``left`` has the bias of the dense layer, ``(out_features,)``.
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


class LorapLlamaAttention(LlamaAttention):
    """Attention whose projections are dense or low-rank, layer by layer.

    A class of its own, because inference engines decide by the type of the attention module
    whether its projections may be fused.
    """

    def __init__(self, config: LorapLlamaConfig, layer_idx: int) -> None:
        # The dense projections would be made to be thrown away.
        with torch.device("meta"):
            super().__init__(config, layer_idx)
        for name in PROJECTIONS:
            d_in, d_out = config.projection_shape(name)
            rank = config.rank(layer_idx, name)
            bias = config.attention_bias
            module: nn.Module
            if rank is None:
                module = nn.Linear(d_in, d_out, bias=bias)
            else:
                module = LowRankLinear(d_in, d_out, rank, bias=bias)
            setattr(self, name, module)


class LorapLlamaMLP(LlamaMLP):
    """A SwiGLU block with the layer's own number of channels."""

    def __init__(self, config: LorapLlamaConfig, layer_idx: int) -> None:
        with torch.device("meta"):
            super().__init__(config)  # type: ignore[no-untyped-call]
        width, bias = config.width(layer_idx), config.mlp_bias
        self.intermediate_size = width
        self.gate_proj = nn.Linear(self.hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(self.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, self.hidden_size, bias=bias)


class LorapLlamaDecoderLayer(LlamaDecoderLayer):  # type: ignore[no-untyped-call]
    """A LLaMA decoder layer with the structure that the configuration gives for its index."""

    def __init__(self, config: LorapLlamaConfig, layer_idx: int) -> None:
        # The bodies below stand in for the dense ones; only the initialisation above them runs.
        super(LlamaDecoderLayer, self).__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = LorapLlamaAttention(config, layer_idx)
        self.mlp = LorapLlamaMLP(config, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class LorapLlamaPreTrainedModel(LlamaPreTrainedModel):  # type: ignore[no-untyped-call]
    """What both models tell transformers about themselves."""

    config_class = LorapLlamaConfig
    config: LorapLlamaConfig
    base_model_prefix = "model"
    # Instance variables in the base class, so these cannot be ClassVar.
    # Silenced because transformers declares both as plain attributes of the instance.
    _no_split_modules = ["LorapLlamaDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LorapLlamaDecoderLayer,
        "attentions": LorapLlamaAttention,
    }


class LorapLlamaModel(LorapLlamaPreTrainedModel, LlamaModel):  # type: ignore[no-untyped-call]
    """The decoder without a language-modelling head."""

    def __init__(self, config: LorapLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        config.check_structure()
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            [LorapLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()  # type: ignore[no-untyped-call]


class LorapLlamaForCausalLM(LorapLlamaPreTrainedModel, LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """The decoder with its language-modelling head."""

    def __init__(self, config: LorapLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LorapLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]
