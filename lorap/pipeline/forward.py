"""Running single decoder layers over the calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorap.config import CompressionConfig
from lorap.errors import LorapError
from lorap.families import Family, LayerStructure
from lorap.families.fused import split
from lorap.ops.precision import all_finite
from lorap.pipeline.activations import Kept, Store, choose_place

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 8192}
"""Tokens in a calibration forward where the user gives no batch size, by the kind of device: as
many as keep it busy."""


PROBES = 16
"""Samples, the first ones, that tell how much the model minds (SPEC: ``marginal.measure``)."""


def probe_streams(config: CompressionConfig, layers: int) -> int:
    """Return through how many models the probes are run at most: one for each module."""
    if not config.is_marginal:
        return 0
    attention = 4 - config.joint_qk if "mha" in config.sublayers else 0
    ffn = (1 if config.ffn == "channels" else 3) if "ffn" in config.sublayers else 0
    return layers * (attention + ffn)


class EnoughError(Exception):
    """Raised by a hook of a module where nothing behind it is wanted of the forward."""


class Batch:
    """Some calibration samples on their way through the model.

    Parameters
    ----------
    hidden : (batch, L, hidden) Tensor
        Input of the first layer.
    calls : sequence of mappings
        The keyword arguments that the model passes to each of its layers.
    mask : (batch, L) Tensor or None
        Nonzero where a token counts.
    store : Store
        Where the hidden states wait between layers.

    Attributes
    ----------
    kept : Kept
        The input of the next layer.
    dense : Kept or None
        The same in the uncompressed model, where that is carried along.
    tokens : int
        Tokens that count.
    """

    def __init__(
        self,
        hidden: Tensor,
        calls: Sequence[Mapping[str, Any]],
        mask: Tensor | None,
        store: Store,
    ) -> None:
        self.mask = mask
        self.tokens = hidden.shape[:-1].numel() if mask is None else int(mask.bool().sum())
        self._calls = calls
        self._store = store
        self.kept = store.keep(hidden)
        self.dense: Kept | None = None

    def run(self, layer: nn.Module, index: int, hidden: Tensor | None = None) -> Tensor:
        """Return the output of decoder layer `index`.

        Parameters
        ----------
        layer : Module
        index : int
        hidden : Tensor, optional
            Its input; by default ``kept``.
        """
        given = self.kept.load() if hidden is None else hidden
        output: Tensor | tuple[Tensor, ...] = layer(given, **self._calls[index])
        return output[0] if isinstance(output, tuple) else output

    def run_until(self, layer: nn.Module, index: int, hidden: Tensor | None = None) -> None:
        """Run decoder layer `index` for its hooks alone, until one raises :class:`EnoughError`.

        Parameters
        ----------
        layer, index, hidden
            As for ``run``.
        """
        with suppress(EnoughError):
            self.run(layer, index, hidden)

    def advance(self, output: Tensor, index: int) -> None:
        """Take the output of decoder layer `index` for the input of the next one.

        Raises
        ------
        LorapError
            If it is not finite.
        """
        if not all_finite(output):
            raise LorapError(
                f"layers.{index}: the output of the layer holds NaN or inf; computed in "
                f"{output.dtype}: a wider --dtype may help"
            )
        self.kept = self._store.keep(output)

    def advance_dense(self, layer: nn.Module, index: int) -> None:
        """Run layer `index` of the uncompressed model over its own hidden states.

        Raises
        ------
        LorapError
            If the output is not finite.
        """
        assert self.dense is not None
        output = self.run(layer, index, self.dense.load())
        if not all_finite(output):
            raise LorapError(
                f"layers.{index}: the output of the uncompressed layer holds NaN or inf; computed "
                f"in {output.dtype}: a wider --dtype may help"
            )
        self.dense = self._store.keep(output)


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
        Samples in a forward; None takes about as many tokens as ``TOKENS_PER_BATCH`` says.
    whole : (M, L) Tensor or None
        Token ids of the samples of all processes; None where these are all.
    """

    input_ids: Tensor
    mask: Tensor | None = None
    batch_size: int | None = None
    whole: Tensor | None = None

    def probes(self) -> Samples:
        """Return the first samples of all, ``PROBES`` or as many as there are."""
        ids = self.input_ids if self.whole is None else self.whole
        mask = None if self.mask is None else self.mask[:PROBES]
        return Samples(ids[:PROBES], mask, self.batch_size)

    def targets(self) -> Tensor:
        """Return which tokens after the first are predicted, ``(N, L - 1)``; see `targets_of`."""
        return targets_of(self.input_ids, self.mask)

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield ids and mask of each forward, on a device."""
        tokens = TOKENS_PER_BATCH[device.type]
        size = self.batch_size or max(1, tokens // self.input_ids.shape[1])
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
        Returns the tensors outside the decoder layers under their full names; called with whether
        the head's are wanted.
    device : torch.device
        Where to compute.
    dtype : torch.dtype
        Of the forwards.
    """

    family: Family
    config: PretrainedConfig
    load_layer: Callable[[int], Mapping[str, Tensor]]
    load_others: Callable[[bool], Mapping[str, Tensor]]
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

    def store(
        self,
        samples: Samples,
        config: CompressionConfig | None = None,
        folder: Path | None = None,
        sharing: int = 1,
    ) -> Store:
        """Return where the hidden states wait between layers.

        Parameters
        ----------
        samples : Samples
        config : CompressionConfig, optional
            Its ``activations``, by default "auto"; a gradient needs the inputs of all layers at a
            time, a target that the uncompressed model has part in those of two models, a marginal
            allocation those of the probes in all of their models.
        folder : Path, optional
            For files; by default the system's folder of temporary ones.
        sharing : int
            Processes that share the machine's memory, each of which keeps as much.
        """
        states = 2
        if config is not None and config.carries_dense:
            states = 4
        if config is not None and config.measures_gradients:
            states = max(states, self.layers + 2)
        probed = 0
        if config is not None and config.is_marginal:
            probed = (probe_streams(config, self.layers) + 1) * samples.probes().input_ids.numel()
        tokens = states * samples.input_ids.numel() + probed
        size = tokens * self.config.hidden_size * self.dtype.itemsize
        wanted = "auto" if config is None else config.activations
        place = choose_place(wanted, size, self.device, sharing)
        return Store(place, self.device, folder)

    def embed(self, samples: Samples, store: Store, *, dense: bool = False) -> list[Batch]:
        """Embed the samples, and learn from the model itself what it passes to its layers.

        Parameters
        ----------
        samples : Samples
        store : Store
            Where the hidden states wait between layers.
        dense : bool
            Carry the uncompressed model's hidden states along.
        """
        model, layers = self.without_layers(with_head=False)
        base = model.base_model
        base.norm = nn.Identity()
        batches = []
        for ids, mask in samples.batches(self.device):
            with torch.no_grad():
                base(input_ids=ids, attention_mask=mask, use_cache=False)
            calls = [layer.call for layer in layers]
            batch = Batch(layers[0].hidden, calls, mask, store)
            batch.dense = batch.kept if dense else None
            batches.append(batch)
        return batches

    def without_layers(self, *, with_head: bool = True) -> tuple[Any, list[StandIn]]:
        """Return the model, and what stands in for its decoder layers.

        Parameters
        ----------
        with_head : bool
            Load the head's weights as well.
        """
        config = self.compressed_config(None)
        types = getattr(config, "layer_types", None) or [None] * self.layers
        layers = [StandIn(attention_type) for attention_type in types]
        with torch.device("meta"):
            model: Any = self.family.model_class(config)
        model.base_model.layers = nn.ModuleList(layers)
        others = {
            name: tensor.to(self.device, self.dtype)
            for name, tensor in self.load_others(with_head).items()
        }
        model.load_state_dict(others, assign=True, strict=False)
        model.tie_weights()
        make_buffers_(model.base_model, self.device)
        return model.train(False).requires_grad_(False), layers


class Head:
    """What comes behind a model's layers, in its own forward: the last norm, the head, and caps.

    Parameters
    ----------
    decoder : Decoder
    """

    def __init__(self, decoder: Decoder) -> None:
        self._model, _ = decoder.without_layers()
        self._norm = self._model.base_model.norm = _NormOf(self._model.base_model.norm)

    def logits(self, ids: Tensor, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """Return the logits ``(batch, L, vocabulary)`` of the last layer's output.

        Parameters
        ----------
        ids : (batch, L)
        mask : (batch, L) or None
        hidden : (batch, L, hidden)
        """
        self._norm.given = hidden
        found: Tensor = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found


class _NormOf(nn.Module):
    """The last norm of a model, applied to what is given in the place of the layers' output."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.given = torch.empty(0)

    def forward(self, _: object) -> Tensor:
        """Ignore what the stand-ins of the layers give."""
        output: Tensor = self.norm(self.given)
        return output


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
