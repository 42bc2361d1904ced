"""LoRA in PEFT: Eq. (13), a layer around a factored linear as a whole, and which linears get one.

PEFT wraps linears of torch, and lets others be registered with a ``LoraConfig``. ``register`` does
that for every ``LoraConfig`` there will be, so that an adapter loads as any other one does:
``PeftModel.from_pretrained`` makes the configuration by itself, from a file that cannot name
classes.
"""

from __future__ import annotations

import re
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import wrapt
from peft import LoraConfig
from peft.tuners import lora
from torch import nn

from lorap.recovery.settings import RecoveryConfig, Target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTORED = ("LowRankLinear", "JointLinear")
"""Classes of ``modeling_lorap``: lorap's own, or those of the file that a checkpoint carries."""


class _Factored(type):
    """Makes ``isinstance`` recognise the factored linears by name."""

    def __instancecheck__(cls, instance: object) -> bool:
        kind = type(instance)
        return kind.__name__ in FACTORED and kind.__module__.endswith("modeling_lorap")


class FactoredLinear(metaclass=_Factored):
    """What a factored linear is an instance of, whichever file its class comes from."""


class FactoredLora(lora.Linear):
    """``y = left(right(x)) + factor * B(A(dropout(x)))``, A and B being PEFT's letters.

    SPEC: ``lora.factored``.

    All but what asks for the one matrix that there is not: it cannot be merged in place, and has no
    variants such as DoRA.
    """

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter; those that start from the matrix are refused."""
        if config.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} starts from the weight of the "
                "linear, and a factored linear has none: expected True or 'gaussian'"
            )
        if config.use_dora:
            raise ValueError("use_dora=True: a factored linear has plain LoRA alone")
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone."""
        return {(): None}

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        sides: Any = module
        return int(sides.in_features), int(sides.out_features)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device, torch.dtype]:
        weight = base_layer.get_submodule("left").weight
        assert isinstance(weight, torch.Tensor)
        return weight.device, weight.dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: the ranks in the model's configuration would have to change with the factors."""
        raise NotImplementedError(
            "a factored linear cannot take an update in place: save the adapter, then run "
            "`lorap merge MODEL ADAPTER --output FOLDER`"
        )


def register(peft: ModuleType) -> None:
    """Have every ``LoraConfig`` of PEFT know the layer.

    Parameters
    ----------
    peft : ModuleType
        The complete package, as a post-import hook receives it.
    """

    @wrapt.patch_function_wrapper(peft.LoraConfig, "__post_init__")
    def made(wrapped: Any, config: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        # Private to PEFT, and all that there is: without it PEFT refuses the linear by itself.
        if hasattr(config, "_register_custom_module"):
            config._register_custom_module({FactoredLinear: FactoredLora})


def lora_config(model: PreTrainedModel, config: RecoveryConfig) -> LoraConfig:
    """Return the configuration with which PEFT puts the updates in place.

    Parameters
    ----------
    model : PreTrainedModel
        Compressed.
    config : RecoveryConfig
    """
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT only ever divides it
        lora_dropout=config.dropout,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=target_modules(model, config.on),
    )


def target_modules(model: PreTrainedModel, on: Target) -> str:
    """Return a regular expression for the names of the modules that get an update.

    Parameters
    ----------
    model : PreTrainedModel
        Compressed.
    on : {"matrices", "factors"}
        As in ``RecoveryConfig``.
    """
    base: Any = model.base_model
    layers_of: dict[str, list[str]] = {}
    for index, layer in enumerate(base.layers):
        for name in _targets(layer, on):
            layers_of.setdefault(name, []).append(str(index))
    names_of: dict[tuple[str, ...], list[str]] = {}
    for name, layers in layers_of.items():
        names_of.setdefault(tuple(layers), []).append(re.escape(name))
    return "|".join(
        rf"{model.base_model_prefix}\.layers\.(?:{'|'.join(layers)})\.(?:{'|'.join(names)})"
        for layers, names in names_of.items()
    )


def _targets(layer: nn.Module, on: Target) -> list[str]:
    """Return the names of the modules of a decoder layer that get an update."""
    linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    if on == "factors":
        return linears
    modules = dict(layer.named_modules())
    factored = [name for name, module in modules.items() if isinstance(module, FactoredLinear)]
    factors = tuple(f"{name}." for name in factored)
    # The right factor that q and k share stands beside them.
    return [*factored, *(n for n in linears if not n.startswith(factors) and "qk_right" not in n)]
