"""What the rest of lorap needs to know about one family of models."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

LayerStructure = Mapping[str, Mapping[str, int]]
"""What a layer's modules become: ``{"self_attn.q_proj": {"rank": 12}, "mlp": {"width": 100}}``."""

MODELING_MODULE = "lorap.families.modeling_lorap"
"""Module with the classes of all compressed forms, shipped in every checkpoint."""

JOINT = "self_attn.qk_proj"
"""Name, in a structure, of q and k that share a right factor."""

ATTENTION = MappingProxyType({role: f"self_attn.{role}_proj" for role in ("q", "k", "v", "o")})
FFN = MappingProxyType({role: f"mlp.{role}_proj" for role in ("gate", "up", "down")})
"""Names of the linears where none are fused."""

# Fields of a configuration that belong to its class or to the file it came from.
_OWN_FIELDS = frozenset(
    {"_name_or_path", "architectures", "auto_map", "lorap", "model_type", "transformers_version"}
)


def modeling_file() -> Path:
    """Return the file of ``MODELING_MODULE``, which a checkpoint carries."""
    spec = importlib.util.find_spec(MODELING_MODULE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"expected a module {MODELING_MODULE}")
    return Path(spec.origin)


@dataclass(frozen=True)
class Family:
    """Names of the modules of one model type, and the classes of its compressed form.

    Parameters
    ----------
    model_type : str
        As in the original's ``config.json``; the compressed form is ``lorap_{model_type}``.
    class_prefix : str
        Prefix of the compressed form's classes: ``Config``, ``Model`` and ``ForCausalLM`` follow.
    attention : mapping
        Role (``q``, ``k``, ``v``, ``o``) to the module's name in a decoder layer.
    ffn : mapping
        Role (``gate``, ``up``, ``down``) to the module's name in a decoder layer.
    prunes_heads : bool
        Whether heads can be left out: not where a norm spans all of them.
    plain_forward : bool
        Whether a layer computes what one of LLaMA does, so that the audit's reference covers it.
    attention_block, ffn_block : str
        Names of the two blocks in a decoder layer.
    ffn_input : str
        The module of a decoder layer whose input is the residual stream between the two blocks.
    layers_path : str
        Prefix of the decoder layers in the names of the checkpoint's tensors.
    embedding, head : str
        Names of the token embedding's and the language-modelling head's weights.
    """

    model_type: str
    class_prefix: str
    attention: Mapping[str, str] = field(default_factory=lambda: ATTENTION)
    ffn: Mapping[str, str] = field(default_factory=lambda: FFN)
    prunes_heads: bool = True
    plain_forward: bool = False
    attention_block: str = "self_attn"
    ffn_block: str = "mlp"
    ffn_input: str = "post_attention_layernorm"
    layers_path: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"

    @property
    def compressed_type(self) -> str:
        """``model_type`` of the compressed form."""
        return f"lorap_{self.model_type}"

    @property
    def joint_qk(self) -> str:
        """Name in a layer's structure for q and k factored together."""
        return f"{self.attention_block}.qk_proj"

    @property
    def joint_right(self) -> str:
        """Name in a decoder layer of the right factor that q and k share."""
        return f"{self.attention_block}.qk_right"

    @property
    def base_prefix(self) -> str:
        """Prefix of the names of all tensors but the head's, with its dot."""
        return f"{self.layers_path.split('.')[0]}."

    @property
    def config_class(self) -> type[PretrainedConfig]:
        """Configuration of the compressed form; with ``lorap=None`` that of the dense one."""
        found: type[PretrainedConfig] = self._class("Config")
        return found

    @property
    def base_class(self) -> type[PreTrainedModel]:
        """The model without a head."""
        found: type[PreTrainedModel] = self._class("Model")
        return found

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """The model with a language-modelling head."""
        found: type[PreTrainedModel] = self._class("ForCausalLM")
        return found

    @property
    def kernel(self) -> str:
        """The attention kernel of transformers to compute with: its own first choice."""
        return "sdpa" if self.base_class._supports_sdpa else "eager"

    def decoder_layer(self, config: PretrainedConfig, index: int) -> torch.nn.Module:
        """Return a decoder layer of the compressed form (``lorap=None``: of the dense one)."""
        base_class: Any = self.base_class
        layer: torch.nn.Module = base_class.decoder_layer(config, index)
        return layer

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Names of the linears that hold several, to the names of their parts in order."""
        parts: dict[str, tuple[str, ...]] = {}
        for name in (*self.attention.values(), *self.ffn.values()):
            parent = name.rpartition(".")[0]
            if parent not in (self.attention_block, self.ffn_block):
                parts[parent] = (*parts.get(parent, ()), name)
        return parts

    def dense_name(self, name: str) -> str:
        """Return the linear of the dense layer that a linear is, or is a part of."""
        return next((parent for parent, parts in self.fused.items() if name in parts), name)

    def compressed_config(
        self, config: PretrainedConfig, layers: Sequence[LayerStructure] | None
    ) -> PretrainedConfig:
        """Return the configuration of the compressed form of a model.

        Parameters
        ----------
        config : PretrainedConfig
            Of the original model; not changed.
        layers : sequence of mappings, or None
            One structure per decoder layer; None keeps all modules dense.

        Raises
        ------
        ValueError
            If a rank, width or module name does not fit the model.
        """
        values = {
            name: value
            for name, value in copy.deepcopy(config.to_dict()).items()
            if name not in _OWN_FIELDS
        }
        structure = None
        if layers is not None:
            structure = {
                "format_version": self._module().FORMAT_VERSION,
                "layers": [
                    {name: dict(entry) for name, entry in layer.items()} for layer in layers
                ],
            }
        compressed: PretrainedConfig = self._class("Config")(
            lorap=structure, attn_implementation=config._attn_implementation, **values
        )
        return compressed

    def rows(self, config: PretrainedConfig) -> dict[str, int]:
        """Return the outputs of the linears of a dense layer, fused ones apart, by name.

        Parameters
        ----------
        config : PretrainedConfig
            Of the dense form.
        """
        dense: Any = config
        # They are the same in all layers.
        return {name: linear.d_out for name, linear in dense.linears(0).items()}

    def tensor_shapes(
        self, config: PretrainedConfig, *, split: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that a checkpoint of this configuration holds.

        Parameters
        ----------
        config : PretrainedConfig
            Of the compressed form (``lorap=None``: of the original). Where it ties the embeddings,
            the head is left out.
        split : bool
            Give the parts of fused linears in their place; for the dense form only.
        """
        import torch

        with torch.device("meta"):
            model = self.model_class(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            del shapes[self.head]
        if not split:
            return shapes
        rows, found = self.rows(config), {}
        for name, shape in shapes.items():
            linear, _, kind = name.rpartition(".")
            whole = next((whole for whole in self.fused if linear.endswith(f".{whole}")), None)
            if whole is None:
                found[name] = shape
                continue
            for part in self.fused[whole]:
                found[f"{linear.removesuffix(whole)}{part}.{kind}"] = (rows[part], *shape[1:])
        return found

    @property
    def stock_class(self) -> str:
        """Name of the class of transformers that the model belonged to."""
        return f"{self.class_prefix.removeprefix('Lorap')}ForCausalLM"

    def stock_config(self, config: PretrainedConfig, values: Mapping[str, Any]) -> PretrainedConfig:
        """Return a configuration of the stock architecture.

        Parameters
        ----------
        config : PretrainedConfig
            Of a compressed model; not changed.
        values : mapping
            The fields that differ from its own.
        """
        from transformers import AutoConfig

        fields = {
            name: value
            for name, value in copy.deepcopy(config.to_dict()).items()
            if name not in _OWN_FIELDS
        }
        stock_class = type(AutoConfig.for_model(self.model_type))
        if hasattr(stock_class, "rope_parameters"):
            # Spelled out twice, for either version of transformers; the stock class knows one.
            for name in self.other_spelling(config):
                fields.pop(name, None)
        stock: PretrainedConfig = stock_class(**{**fields, **values})
        return stock

    def other_spelling(self, config: PretrainedConfig) -> dict[str, Any]:
        """Return the fields that say in transformers 4 what ``rope_parameters`` says in 5."""
        rope = getattr(config, "rope_parameters", None)
        scaling = self.config_class.stock.scaling  # type: ignore[attr-defined]
        spelled: dict[str, Any] = (
            self._module()._rope_of_transformers_4(rope, scaling) if rope else {}
        )
        return spelled

    def stock_shapes(self, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor of a checkpoint of the stock architecture.

        Parameters
        ----------
        config : PretrainedConfig
            As :meth:`stock_config` makes it. Where it ties the embeddings, the head is left out.
        """
        import torch
        from transformers import AutoModelForCausalLM

        auto_class: Any = AutoModelForCausalLM
        with torch.device("meta"):
            model = auto_class.from_config(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if config.tie_word_embeddings:
            del shapes[self.head]
        return shapes

    def register(self, module: ModuleType) -> None:
        """Make the Auto classes of transformers know the compressed form, if it knows the family.

        Parameters
        ----------
        module : ModuleType
            The complete ``MODELING_MODULE``, as a post-import hook receives it.
        """
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        try:
            config_class, base_class, model_class = (
                getattr(module, self.class_prefix + suffix)
                for suffix in ("Config", "Model", "ForCausalLM")
            )
        except ImportError:
            return
        AutoConfig.register(self.compressed_type, config_class, exist_ok=True)
        AutoModel.register(config_class, base_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)

    def _module(self) -> ModuleType:
        return importlib.import_module(MODELING_MODULE)

    def _class(self, suffix: str) -> Any:
        return getattr(self._module(), self.class_prefix + suffix)
