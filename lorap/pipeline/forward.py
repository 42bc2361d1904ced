"""Running single decoder layers over the calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorap.errors import LorapError
from lorap.families import Family, LayerStructure
from lorap.families.fused import split

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOKENS_PER_BATCH = 8192
"""Tokens in a calibration forward where the user gives no batch size."""


@dataclass
class Batch:
    """Some calibration samples on their way through the model.

    Attributes
    ----------
    hidden : Tensor
        Input of the next layer, ``(batch, L, hidden)``.
    calls : sequence of mappings
        The keyword arguments that the model passes to each of its layers.
    mask : (batch, L) Tensor or None
        Nonzero where a token counts.
    """

    hidden: Tensor
    calls: Sequence[Mapping[str, Any]]
    mask: Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens that count."""
        return self.hidden.shape[:-1].numel() if self.mask is None else int(self.mask.bool().sum())

    def run(self, layer: nn.Module, index: int) -> Tensor:
        """Return the output of decoder layer `index` for ``hidden``."""
        output: Tensor | tuple[Tensor, ...] = layer(self.hidden, **self.calls[index])
        return output[0] if isinstance(output, tuple) else output

    def advance(self, layer: nn.Module, index: int) -> None:
        """Replace ``hidden`` by the output of decoder layer `index`.

        Raises
        ------
        LorapError
            If the output is not finite.
        """
        with torch.no_grad():
            self.hidden = self.run(layer, index)
        if not torch.isfinite(self.hidden).all():
            raise LorapError(
                f"layers.{index}: the output of the layer holds NaN or inf; computed in "
                f"{self.hidden.dtype}: a wider --dtype may help"
            )


@dataclass(frozen=True)
class Samples:
    """Calibration samples.

    Attributes
    ----------
    input_ids : (N, L) Tensor
        Token ids.
    mask : (N, L) Tensor or None
        Nonzero where a token counts.
    batch_size : int or None
        Samples in a forward; None takes about ``TOKENS_PER_BATCH`` tokens.
    """

    input_ids: Tensor
    mask: Tensor | None = None
    batch_size: int | None = None

    def targets(self) -> Tensor:
        """Return which tokens after the first are predicted, ``(N, L - 1)``; see `targets_of`."""
        return targets_of(self.input_ids, self.mask)

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield ids and mask of each forward, on a device."""
        size = self.batch_size or max(1, TOKENS_PER_BATCH // self.input_ids.shape[1])
        for start in range(0, self.input_ids.shape[0], size):
            part = slice(start, start + size)
            mask = None if self.mask is None else self.mask[part].to(device)
            yield self.input_ids[part].to(device), mask


def targets_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return which tokens after the first count, and have one before them that does.

    Parameters
    ----------
    ids : (N, L) Tensor
    mask : (N, L) Tensor or None
        Nonzero where a token counts.

    Returns
    -------
    (N, L - 1) Tensor of bool
    """
    if mask is None:
        return torch.ones_like(ids[:, 1:], dtype=torch.bool)
    return mask[:, 1:].bool() & mask[:, :-1].bool()


@dataclass(frozen=True)
class Decoder:
    """The original model, layer by layer.

    Attributes
    ----------
    family : Family
    config : PretrainedConfig
        Of the original model.
    load_layer : callable
        Returns the original tensors of a decoder layer, names relative to it.
    load_others : callable
        Returns the tensors outside the decoder layers, under their full names.
    device : torch.device
        Where to compute.
    dtype : torch.dtype
        Of the forwards.
    """

    family: Family
    config: PretrainedConfig
    load_layer: Callable[[int], Mapping[str, Tensor]]
    load_others: Callable[[], Mapping[str, Tensor]]
    device: torch.device
    dtype: torch.dtype

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """Return the original tensors of decoder layer `index`, on the device; fused as stored."""
        return {name: tensor.to(self.device) for name, tensor in self.load_layer(index).items()}

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the fused linears of a layer apart; see :func:`lorap.families.fused.split`."""
        return split(self.family, self.compressed_config(None), tensors)

    def compressed_config(self, structure: Sequence[LayerStructure] | None) -> PretrainedConfig:
        """Return the configuration to build layers from; None as `structure` keeps all dense."""
        config = self.family.compressed_config(self.config, structure)
        # One kernel for models in memory and on disk, so that both give the same weights.
        config._attn_implementation = self.family.kernel
        return config

    def build(
        self, config: PretrainedConfig, index: int, tensors: Mapping[str, Tensor]
    ) -> nn.Module:
        """Return decoder layer `index` around its tensors.

        Parameters
        ----------
        config : PretrainedConfig
            From ``compressed_config``.
        index : int
        tensors : mapping
            Names relative to the layer; any dtype, on the device.
        """
        with torch.device("meta"):
            layer = self.family.decoder_layer(config, index)
        layer.load_state_dict({name: t.to(self.dtype) for name, t in tensors.items()}, assign=True)
        layer.train(False)
        return layer

    def embed(self, samples: Samples) -> list[Batch]:
        """Embed the samples, and learn from the model itself what it passes to its layers."""
        model, layers = self.without_layers()
        base = model.base_model
        base.norm = nn.Identity()
        batches = []
        for ids, mask in samples.batches(self.device):
            with torch.no_grad():
                base(input_ids=ids, attention_mask=mask, use_cache=False)
            batches.append(Batch(layers[0].hidden, [layer.call for layer in layers], mask))
        return batches

    def without_layers(self) -> tuple[Any, list[StandIn]]:
        """Return the model with its head, and what stands in for its decoder layers."""
        config = self.compressed_config(None)
        types = getattr(config, "layer_types", None) or [None] * self.layers
        layers = [StandIn(attention_type) for attention_type in types]
        with torch.device("meta"):
            model: Any = self.family.model_class(config)
        model.base_model.layers = nn.ModuleList(layers)
        others = {name: t.to(self.device, self.dtype) for name, t in self.load_others().items()}
        model.load_state_dict(others, assign=True, strict=False)
        model.tie_weights()
        make_buffers_(model.base_model, self.device)
        return model.train(False).requires_grad_(False), layers


class StandIn(nn.Module):
    """Stands in for a decoder layer: notes how it is called and passes its input on.

    Some models of transformers 4 expect a tuple of a layer, and ask it for the type of its
    attention; the others pass the tuple on as it is.

    Attributes
    ----------
    hidden : Tensor
        Its last input.
    call : mapping
        The keyword arguments of its last call.
    """

    def __init__(self, attention_type: str | None) -> None:
        super().__init__()
        self.attention_type = attention_type
        self.hidden = torch.empty(0)
        self.call: Mapping[str, Any] = {}

    def forward(self, hidden_states: Tensor | tuple[Tensor], **kwargs: Any) -> tuple[Tensor]:
        """Note the call."""
        self.hidden = hidden_states[0] if isinstance(hidden_states, tuple) else hidden_states
        self.call = kwargs
        return (self.hidden,)


def make_buffers_(base: Any, device: torch.device) -> None:
    """Compute the buffers of a model built on the meta device, of which no checkpoint holds any."""
    with torch.device(device):
        for name, module in list(base.named_modules()):
            if name.startswith("rotary_emb"):
                setattr(base, name, type(module)(config=module.config))
            elif hasattr(module, "embed_scale"):
                # Gemma's embedding; the square root is the same in all its versions.
                module.embed_scale = torch.tensor(base.config.hidden_size**0.5)
    assert not any(buffer.is_meta for buffer in base.buffers())
