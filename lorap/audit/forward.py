"""The forward of the reference, in two runs: in float64, and rounded as the checkpoint's own was.

How far the two are apart is the noise of the forwards behind a checkpoint, at this very model,
layer and input (SPEC, "Audit").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lorap.errors import LorapError, UsageError
from lorap.families import FAMILIES, Family
from lorap_reference import llama

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Array = NDArray[np.float64]
T = TypeVar("T")

TOKENS_PER_BATCH = 4096
"""Tokens in a forward: bounds the memory."""


@dataclass(frozen=True)
class Pair(Generic[T]):
    """One quantity in both runs."""

    exact: T
    rounded: T

    def __iter__(self) -> Iterator[T]:
        """Yield both."""
        yield self.exact
        yield self.rounded


def llama_shape(config: PretrainedConfig, family: Family) -> llama.LlamaShape:
    """Return what the reference has to know of a model beside its weights.

    Raises
    ------
    UsageError
        If the reference does not compute the model's forward.
    """
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


def check_window(config: PretrainedConfig, tokens: int) -> None:
    """Refuse a model of which a layer does not see the whole of a sample.

    Raises
    ------
    UsageError
        If a sliding window is shorter than `tokens`.
    """
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"]
    if window is not None and window < tokens and "sliding_attention" in types:
        raise UsageError(
            f"the reference knows no sliding window, and the model's, of {window} tokens, is "
            f"shorter than the samples of {tokens}"
        )


class Compute:
    """The dtype of the forwards behind a checkpoint, and rounding to it in NumPy.

    float16 and bfloat16 are multiplied and added up in float32, and rounded after each operation.
    In a float64 model of transformers, RMSNorm and the rotary angles are float32.

    Parameters
    ----------
    dtype : torch.dtype

    Attributes
    ----------
    work : type
        What NumPy computes in.
    eps : float
        Spacing of the coarsest dtype that the forwards compute in.
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

    @property
    def wide(self) -> Compute:
        """What is not done in 16 bits: in float32 at least."""
        return Compute(torch.float64 if self.dtype == torch.float64 else torch.float32)

    def norm(self, x: NDArray[Any]) -> NDArray[Any]:
        """Round what transformers computes in float32 at most."""
        return self.round(np.asarray(x, dtype=np.float32))

    def weights(
        self, tensors: Mapping[str, Tensor], rounded: Mapping[str, Tensor] | None = None
    ) -> Pair[dict[str, NDArray[Any]]]:
        """Return a layer's weights in float64, and rounded to the dtype.

        Parameters
        ----------
        tensors : mapping
        rounded : mapping, optional
            Those of the rounded run; the same by default.
        """
        exact, other = (
            {name: tensor.double().numpy() for name, tensor in found.items()}
            for found in (tensors, tensors if rounded is None else rounded)
        )
        return Pair(exact, {name: self.round(value) for name, value in other.items()})


def rounded_forward(
    weights: Mapping[str, NDArray[Any]],
    shape: llama.LlamaShape,
    h: NDArray[Any],
    compute: Compute,
) -> llama.LayerTrace:
    """``lorap_reference.llama.layer_forward`` with a rounding after each operation.

    Parameters
    ----------
    weights : mapping
        Of one layer, names relative to it, rounded.
    shape : llama.LlamaShape
    h : (N, L, d)
        The residual stream, rounded.
    compute : Compute
    """
    r, work = compute.round, compute.work
    # Rotary frequencies are float32: this base moves them by as much as their rounding may.
    theta = shape.rope_theta * (1 + float(np.finfo(np.float32).eps))

    def linear(name: str, x: NDArray[Any]) -> NDArray[Any]:
        if f"{name}.weight" in weights:
            return r(llama.linear(weights, name, x))
        right = weights[llama.right_name(weights, name)]
        y = r(r(x @ right.T) @ weights[f"{name}.left.weight"].T)
        bias = weights.get(f"{name}.left.bias")
        return y if bias is None else r(y + bias)

    def heads(name: str) -> NDArray[Any]:
        y = linear(f"self_attn.{name}", x_attention)
        return np.asarray(llama.split_heads(y, shape.head_dim))

    def turned(y: NDArray[Any]) -> NDArray[Any]:
        return compute.norm(llama.rotary(y, theta)).astype(work)

    def rms_norm(x: NDArray[Any], name: str) -> NDArray[Any]:
        gain = weights[f"{name}.weight"].astype(np.float32)
        y = llama.rms_norm(x.astype(np.float32), gain, shape.rms_eps)
        return compute.norm(y).astype(work)

    length, share = h.shape[1], shape.heads // shape.kv_heads
    x_attention = rms_norm(h, "input_layernorm")
    q, k = turned(heads("q_proj")), np.repeat(turned(heads("k_proj")), share, axis=1)
    future = np.triu(np.ones((length, length), dtype=bool), k=1)
    logits = r(q @ k.transpose(0, 1, 3, 2) / work(np.sqrt(shape.head_dim)))
    p = r(llama.softmax(np.where(future, work(-np.inf), logits)))
    x_o = llama.join_heads(r(p @ np.repeat(heads("v_proj"), share, axis=1)))
    middle = r(h + linear("self_attn.o_proj", x_o))
    x_ffn = rms_norm(middle, "post_attention_layernorm")
    gate = r(llama.silu(linear("mlp.gate_proj", x_ffn)))
    x_down = r(gate * linear("mlp.up_proj", x_ffn))
    output = r(middle + linear("mlp.down_proj", x_down))
    return llama.LayerTrace(x_attention, x_o, middle, x_ffn, x_down, output)


@dataclass(frozen=True)
class Step:
    """A layer's forward over some samples, in both runs.

    Attributes
    ----------
    samples : slice
    before : Pair of arrays (n, L, d)
        The residual stream before the layer.
    trace : Pair of llama.LayerTrace
    """

    samples: slice
    before: Pair[NDArray[Any]]
    trace: Pair[llama.LayerTrace]


class Runs:
    """All samples on their way through a model, in both runs.

    Parameters
    ----------
    embeddings : (vocabulary, d) Tensor
    ids : (N, L)
    shape : llama.LlamaShape
    compute : Compute

    Attributes
    ----------
    h : Pair of arrays (N, L, d)
        The residual stream, changed in place.
    """

    def __init__(
        self,
        embeddings: Tensor,
        ids: NDArray[np.int64],
        shape: llama.LlamaShape,
        compute: Compute,
    ) -> None:
        self.shape, self.compute = shape, compute
        exact: NDArray[Any] = embeddings[torch.from_numpy(ids)].double().numpy()
        self.h = Pair(exact, compute.round(exact.copy()))
        size = max(1, TOKENS_PER_BATCH // ids.shape[1])
        self.batches = [slice(start, start + size) for start in range(0, ids.shape[0], size)]

    @property
    def tokens(self) -> int:
        """Tokens of all samples."""
        n, length, _ = self.h.exact.shape
        return int(n * length)

    def forward(
        self, tensors: Mapping[str, Tensor], rounded: Mapping[str, Tensor] | None = None
    ) -> Iterator[Step]:
        """Run a layer over all samples, which stay where they are.

        Parameters
        ----------
        tensors : mapping
            Of the layer, names relative to it; dense or compressed.
        rounded : mapping, optional
            Those of the rounded run; the same by default.
        """
        weights = self.compute.weights(tensors, rounded)
        for batch in self.batches:
            before = Pair(self.h.exact[batch], self.h.rounded[batch])
            exact = llama.layer_forward(weights.exact, self.shape, before.exact)
            rounded = rounded_forward(weights.rounded, self.shape, before.rounded, self.compute)
            yield Step(batch, before, Pair(exact, rounded))

    def advance(
        self,
        tensors: Mapping[str, Tensor],
        where: str,
        rounded: Mapping[str, Tensor] | None = None,
    ) -> Iterator[Step]:
        """Run a layer over all samples, and put its output in the place of its input.

        Parameters
        ----------
        tensors, rounded : mapping
            As for ``forward``.
        where : str
            What the layer is, for the error.

        Raises
        ------
        LorapError
            If an output is not finite.
        """
        for step in self.forward(tensors, rounded):
            yield step
            self.h.exact[step.samples] = step.trace.exact.output
            self.h.rounded[step.samples] = step.trace.rounded.output
        if not all(np.isfinite(h).all() for h in (self.h.exact, self.h.rounded)):
            raise LorapError(f"{where}: the output holds NaN or inf")
