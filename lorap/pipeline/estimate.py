"""Peak memory and traffic of a compression, beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lorap.config import CompressionConfig
from lorap.ops.precision import CHUNK_ELEMENTS
from lorap.pipeline.activations import Place, choose_place
from lorap.pipeline.forward import PROBES, TOKENS_PER_BATCH, probe_streams
from lorap.pipeline.stages import STAGES
from lorap.pipeline.statistics import INPUT_OF, Input, Statistic, Wanted
from lorap.pipeline.sublayers import low_rank_method, statistics_of, wanted_statistics
from lorap.plan import LayerPlan, ModulePlan, Plan
from lorap.runtime import choose_dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lorap.families import Family

Device = Literal["cpu", "cuda"]

LIBRARIES = {"cpu": 420 * 2**20, "cuda": 2 * 2**30}
"""Memory of a process that has compressed next to nothing, by the device that it computes on;
measured for a CPU with torch 2.13 and transformers 5.23, assumed for a GPU."""

CUBLAS = 32 * 2**20
"""What torch sets aside for cuBLAS on a GPU."""

LARGE_BLOCK = 32 * 2**20
"""Blocks from this size on go back to the system when they are freed, whatever glibc's threshold
has grown to; smaller ones stay in the heap."""

Terms = Mapping[str, int]
"""Bytes by what they are for."""


@dataclass(frozen=True)
class Estimate:
    """What a compression from disk to disk takes.

    Attributes
    ----------
    device : {"cpu", "cuda"}
        Where it computes.
    activations : {"device", "cpu", "disk"}
        Where the hidden states wait.
    memory : mapping
        Peak in bytes, by term: under ``cpu`` that of the process, under ``cuda``, where it computes
        there, that of the tensors on the GPU, without what the driver takes.
    read, written : mapping
        Bytes that pass between the process and files; more than once where something is read more
        than once, from the system's cache or not.
    """

    device: Device
    activations: Place
    memory: Mapping[str, Terms]
    read: Terms
    written: Terms

    @property
    def peak_memory(self) -> dict[str, int]:
        """Bytes at the peak, of the process and of the GPU."""
        return {place: sum(terms.values()) for place, terms in self.memory.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate as ``lorap plan --json`` prints it."""
        return {
            "device": self.device,
            "activations": self.activations,
            "peak_memory_bytes": self.peak_memory,
            "memory_terms": {place: dict(terms) for place, terms in self.memory.items()},
            "bytes_read": dict(self.read),
            "bytes_written": dict(self.written),
        }


def estimate(
    model_config: PretrainedConfig, family: Family, config: CompressionConfig, plan: Plan
) -> Estimate:
    """Estimate what it takes to carry out a plan, from disk to disk.

    From the shapes alone: the process passes through a few moments at which it holds the most, and
    the peak is the largest of them. A moment is the sum of

    - ``libraries``: the interpreter and what is imported (``LIBRARIES``); on a GPU the workspace of
      cuBLAS;
    - ``mapped``: pages of the model's files, of the largest tensor that the look at all weights has
      in hand and of the largest one that is read ahead;
    - ``weights``: the layer in work and the one read ahead, as stored; where the forward computes
      in another dtype, a copy in that;
    - ``written``: the compressed layer that is being written, and what there is of the next one;
    - ``activations``: the hidden states of all samples, where they wait in this memory; with
      importance ``taylor`` those of all layers, with a dense target those of two models, with the
      marginal allocation those of the probes in all of their models;
    - ``statistics``: the sums over each input's features, of their products ``8 d_in^2`` bytes, and
      twice as much again for the sum of a batch and the new total;
    - ``workspace``: the largest of what the forward of a batch needs (:func:`forward_workspace`),
      the factors of a matrix (:func:`low_rank_workspace`), the scores of channels and heads
      (:func:`pruning_workspace`) and a least-squares fit (:func:`fit_workspace`);
    - ``heap``: on a CPU, the workspace of the forward while the next steps have theirs, where its
      blocks are too small for the C library to give them back (``LARGE_BLOCK``).

    The others are the moments at which the samples are embedded, and at which the tensors outside
    the layers are copied; with importance ``taylor`` also the head's and a layer's gradients, with
    the marginal allocation the predictions of two models, with refinement what a layer's descent
    holds (:func:`descent_workspace`). None of it grows with the number of
    layers, but for the activations with ``taylor``, and those of the probes with the marginal
    allocation.

    Everything in the model's files is looked at once, and read again to be computed with or copied,
    the embedding for both; measurements read the layers once more, gradients twice, and the probes
    of the marginal allocation embedding and head. Each finished layer is read back for its
    checksum. Hidden states on disk are written once per layer and read once per forward.

    Parameters
    ----------
    model_config : PretrainedConfig
        Of the original model. Where it does not say in which dtype it is stored, float32 is taken.
        What is not the language model's is left out.
    family : Family
    config : CompressionConfig
    plan : Plan
        For this configuration.

    Raises
    ------
    UsageError
        If ``config.dtype`` is none.
    """
    return _Estimator(model_config, family, config, plan).estimate()


def forward_workspace(
    tokens: int, samples: int, sizes: Mapping[str, int], itemsize: int, *, eager: bool
) -> int:
    """Return the bytes that the forward of a batch through a layer takes beside its weights.

    The residual stream, a block's input and output and one more, ``4 T d``; with it the largest of
    three tensors as wide as the feed-forward block (the two factors of the product and itself), the
    product and two chunks of it in float64 (its sum of squares; a CPU takes smaller ones), six as
    wide as the queries (the rotation of q and k), with the eager kernel the scores of attention and
    their softmax in float32, and three of the stream in float32 (its norm).

    Parameters
    ----------
    tokens, samples : int
        In the batch.
    sizes : mapping
        ``hidden``, ``width``, ``queries`` (features) and ``heads``.
    itemsize : int
        Bytes of the dtype computed in.
    eager : bool
        Whether the kernel keeps the scores.
    """
    hidden, width, queries = (tokens * sizes[name] for name in ("hidden", "width", "queries"))
    scores = tokens * (tokens // samples) * sizes["heads"] * (itemsize + 4) if eager else 0
    return 4 * hidden * itemsize + max(
        3 * width * itemsize,
        width * itemsize + 2 * 8 * min(width, CHUNK_ELEMENTS),
        6 * queries * itemsize + scores,
        3 * hidden * 4,
    )


def low_rank_workspace(shape: tuple[int, int], rank: int, method: str, itemsize: int) -> int:
    """Return the bytes that the factors of an ``(m, n)`` matrix take beside weight and result.

    All in float64. By the Gram matrix (``lorap.ops.solvers.gram``), with k the smaller side and l
    the larger one: the weight and the weighted one, ``2 m n``, and the larger of

    - ``6 k^2``: the Gram matrix, its eigenvectors, their copy in descending order, and LAPACK's
      ``2 k^2`` and one more;
    - ``k l + 7 k^2 + 2 r (k - r)`` while the corrected directions are made orthonormal: the
      weighted matrix in coordinates of the directions, the Gram matrix, the directions and the
      corrected ones, apart and together, the two factors of the QR and its copy, the turn and the
      gaps;
    - ``2 k l + 3 k^2 + 2 r (k - r)``: the same in the old and the new coordinates.

    For ``pca`` and ``afm``: the weight, and its product with the moment or ``3 m^2`` more than the
    ``3 m^2`` of the outputs' moment and its eigenvectors; for ``afm`` the centred moment and the
    means' product. In the end the error: product, weight and difference in the dtype of the
    computation and two of float64.

    Parameters
    ----------
    shape : (int, int)
        (d_out, d_in).
    rank : int
    method : str
        A ``LowRankMethod``.
    itemsize : int
        Bytes of the weight's dtype.
    """
    m, n = shape
    if method in ("pca", "afm"):
        centred = 2 * n * n if method == "afm" else 0
        elements = m * n + 3 * m * m + max(m * n, 3 * m * m) + centred
        return 8 * max(elements, 4 * m * n + centred)
    short, long = min(shape), max(shape)
    cut = 2 * rank * (short - rank)
    found = 2 * m * n + max(
        6 * short * short,
        short * long + 7 * short * short + cut,
        2 * short * long + 3 * short * short + cut,
    )
    wide = max(itemsize, 4)
    return max(8 * found, (2 * wide + 16) * m * n)


def pruning_workspace(weights: Iterable[tuple[int, int]], itemsize: int) -> int:
    """Return the bytes that the scores of channels or heads take.

    The scores of all weights, in float32 or wider, and of the largest matrix the scores and their
    squares in float64.

    Parameters
    ----------
    weights : iterable of (int, int)
        Shapes of the block's matrices.
    itemsize : int
        Bytes of the weights' dtype.
    """
    sizes = [math.prod(shape) for shape in weights]
    wide = max(itemsize, 4)
    return wide * sum(sizes) + (16 if wide == 4 else 8) * max(sizes)


def fit_workspace(shape: tuple[int, int]) -> int:
    """Return the bytes that a least-squares fit of a weight needs.

    The correlations of its inputs, their factor, its inverse and a copy, and the weight, the
    target's moment with the inputs and the fitted weight, all in float64.

    Parameters
    ----------
    shape : (int, int)
        ``(d_out, d_in)``
    """
    d_out, d_in = shape
    return 8 * (4 * d_in**2 + 3 * d_out * d_in)


def descent_workspace(
    weights: Iterable[tuple[int, int]], inputs: Iterable[int], itemsize: int
) -> int:
    """Return the bytes that refining a layer takes beside its weights and the backward's tensors.

    Of the weights the start, where the descent is and where it looks, the gradients there and
    before, the preconditioned ones, and the directions of two iterations, all in float32 or wider;
    while gradients are summed, their sums in float64 in the place of the preconditioned ones, and
    those of a batch. The inverse moments of the inputs in float64, and while they are taken a sum
    and what a batch adds.

    Parameters
    ----------
    weights : iterable of (int, int)
        Shapes of all weights that change.
    inputs : iterable of int
        Features of what they are applied to, once for those that share it.
    itemsize : int
        Bytes of the dtype computed in.
    """
    elements = sum(math.prod(shape) for shape in weights)
    features = list(inputs)
    wide = max(itemsize, 4)
    moments = 8 * (sum(d**2 for d in features) + 2 * max(features, default=0) ** 2)
    return (7 * wide + 8 + itemsize) * elements + moments


class _Estimator:
    """The sizes of a model and of its compressed form, in bytes."""

    def __init__(
        self, model_config: PretrainedConfig, family: Family, config: CompressionConfig, plan: Plan
    ) -> None:
        self.family, self.config, self.plan = family, config, plan
        on_gpu = config.device.startswith("cuda") or (
            config.device == "auto" and torch.cuda.is_available()
        )
        self.device: Device = "cuda" if on_gpu else "cpu"
        stored = getattr(model_config, "dtype", None) or getattr(model_config, "torch_dtype", None)
        self.stored = (choose_dtype(stored) or torch.float32).itemsize
        self.computed = (choose_dtype(config.dtype or stored) or torch.float32).itemsize
        self.same = config.dtype is None or choose_dtype(config.dtype) == choose_dtype(stored)
        shapes = family.tensor_shapes(family.compressed_config(model_config, None), split=True)
        self.shapes = shapes
        self.hidden = int(model_config.hidden_size)
        self.vocabulary = int(model_config.vocab_size)
        self.heads = int(model_config.num_attention_heads)
        eager = family.kernel == "eager" or model_config._attn_implementation == "eager"
        self.eager = eager
        self.layers: list[dict[str, tuple[int, ...]]] = [{} for _ in plan.layers]
        self.others: dict[str, int] = {}
        for name, shape in shapes.items():
            if name.startswith(f"{family.layers_path}."):
                index, _, rest = name.removeprefix(f"{family.layers_path}.").partition(".")
                self.layers[int(index)][rest] = shape
            else:
                self.others[name] = math.prod(shape) * self.stored
        self.sizes = [
            self.stored * sum(math.prod(shape) for shape in layer.values()) for layer in self.layers
        ]
        self.after = [
            size - self.stored * sum(module.removed for module in layer.values())
            for size, layer in zip(self.sizes, plan.layers, strict=True)
        ]
        self.batch_samples = min(
            config.batch_size or max(1, TOKENS_PER_BATCH[self.device] // config.seqlen),
            config.samples,
        )
        self.state = config.samples * config.seqlen * self.hidden * self.computed
        # As many as Decoder.store makes room for.
        self.states = 4 if config.carries_dense else 2
        if config.measures_gradients:
            self.states = max(self.states, len(self.layers) + 2)
        streams = probe_streams(config, len(self.layers))
        probes = min(PROBES, config.samples) * config.seqlen * self.hidden * self.computed
        self.probed = (streams + 1) * probes if streams else 0
        self.place = self._place()

    def _place(self) -> Place:
        auto = self.config.activations == "auto"
        if auto and self.device == "cuda" and not torch.cuda.is_available():
            # The machine that it is planned for is another one.
            return "device"
        device = torch.device(self.device)
        size = self.states * self.state + self.probed
        return choose_place(self.config.activations, size, device)

    def estimate(self) -> Estimate:
        streams = 2 if self.config.carries_dense else 1
        kept = self.state * (self.states - 1 if self.config.measures_gradients else streams)
        kept = max(kept, self.state + self.probed)
        on_device = self.place == "device" or (self.place == "cpu" and self.device == "cpu")
        moments = [{"activations": kept if on_device else 0} | moment for moment in self._moments()]
        base = self._process()
        if self.device == "cpu":
            memory = {"cpu": _largest(base | moment for moment in moments)}
        else:
            base["activations"] = kept if self.place == "cpu" else 0
            # The weights on their way to and from the GPU.
            base["weights"] = max(self.sizes, default=0)
            base["written"] = max([*self.after, self._shard()])
            gpu = ({"libraries": CUBLAS} | moment for moment in moments)
            memory = {"cpu": base, "cuda": _largest(gpu)}
        memory = {
            place: {term: size for term, size in terms.items() if size}
            for place, terms in memory.items()
        }
        return Estimate(self.device, self.place, memory, *self._traffic())

    def _process(self) -> dict[str, int]:
        tensors = [math.prod(shape) * self.stored for shape in self.shapes.values()]
        in_layer = [math.prod(shape) * self.stored for shape in self.layers[0].values()]
        return {"libraries": LIBRARIES[self.device], "mapped": max(tensors) + max(in_layer)}

    def _shard(self) -> int:
        """Bytes of the largest shard of the tensors outside the layers, at most."""
        return max([min(sum(self.others.values()), self.sizes[0]), *self.others.values()])

    def _moments(self) -> Iterable[dict[str, int]]:
        """Yield what is held at a time, on the device."""
        embedding = sum(n for name, n in self.others.items() if name != self.family.head)
        yield {"weights": embedding + self._cast(embedding)}
        previous = max(self.after)
        if self.device == "cpu":
            yield {"activations": 0, "written": previous + self._shard()}
        # Layers are often all alike.
        seen: list[tuple[int, LayerPlan]] = []
        for index, plan in enumerate(self.plan.layers):
            if (self.sizes[index], plan) not in seen:
                seen.append((self.sizes[index], plan))
                yield from self._moments_of_layer(index, previous)
        if self.config.measures_gradients:
            yield from self._moments_of_gradients()
        if self.probed:
            yield self._moment_of_predictions()

    def _moments_of_layer(self, index: int, previous: int) -> Iterable[dict[str, int]]:
        layer, plan = self.layers[index], self.plan.layers[index]
        size = self.sizes[index]
        wanted = wanted_statistics(self.family, plan, self._statistics_of)
        sums, adding = self._statistics(layer, wanted)
        made = self.stored * sum(m.parameters for m in plan.values() if m.kind != "dense")
        held = {"weights": 2 * size, "written": previous, "statistics": sums}
        cast = self._cast(size)
        yield held | {
            "weights": 2 * size + cast,
            "statistics": sums + adding,
            "workspace": self._forward(layer),
        }
        workspaces = [self._workspace(layer, module) for module in plan.values()]
        both = {"written": previous + made, "heap": self._heap(layer)}
        yield held | both | {"workspace": max(workspaces, default=0)}
        yield (
            held
            | both
            | {
                "weights": 2 * size + self._cast(self.after[index]),
                "workspace": self._forward(layer),
            }
        )
        if self.config.refine:
            yield self._moment_of_descent(index, previous + made)

    def _moment_of_descent(self, index: int, written: int) -> dict[str, int]:
        """Return what is held while a layer is refined."""
        layer = self.layers[index]
        shapes: list[tuple[int, int]] = []
        features: dict[str, int] = {}
        for module in self.plan.layers[index].values():
            for role in () if module.untouched else module.roles:
                d_out, d_in = self._shape(layer, role)
                if module.kind == "channels":
                    assert module.width is not None
                    d_out, d_in = (d_out, module.width) if role == "down" else (module.width, d_in)
                features[INPUT_OF[role]] = d_in
                if module.rank is None:
                    shapes.append((d_out, d_in))
                    continue
                shapes += [(d_out, module.rank), (module.rank, d_in)]
                features[f"left of {role}"] = module.rank
        size = self.sizes[index]
        return {
            "weights": 2 * size + self._cast(size) + self.after[index],
            "written": written,
            # With what the backward keeps of the forward.
            "workspace": descent_workspace(shapes, features.values(), self.computed)
            + 3 * self._forward(layer),
        }

    def _moments_of_gradients(self) -> Iterable[dict[str, int]]:
        tokens = self.batch_samples * self.config.seqlen
        wide = max(self.computed, 4)
        others = sum(self.others.values())
        logits = tokens * self.vocabulary * (2 * self.computed + 3 * wide)
        yield {"weights": others + self._cast(others), "workspace": logits}
        layer, size = self.layers[0], self.sizes[0]
        scored = sum(
            math.prod(self._shape(layer, role))
            for module in self.plan.layers[0].values()
            if module.sublayer in self.config.pruned_sublayers
            for role in module.roles
        )
        backward = 3 * self._forward(layer) + (8 + self.computed) * scored
        yield {
            "weights": 2 * size + self._cast(size),
            "workspace": max(backward, 24 * scored),
        }

    def _moment_of_predictions(self) -> dict[str, int]:
        """Return what the marginal allocation holds when it compares predictions."""
        others = sum(self.others.values())
        # The model's own, those of the one that approximates it, and one more while they are made.
        predictions = min(PROBES, self.batch_samples) * self.config.seqlen * self.vocabulary
        return {
            "weights": others + self._cast(others),
            "workspace": 3 * self.computed * predictions,
        }

    def _cast(self, size: int) -> int:
        """Bytes of a copy in the dtype computed in, of tensors of that many bytes."""
        return 0 if self.same else size // self.stored * self.computed

    def _shape(self, layer: Mapping[str, tuple[int, ...]], role: str) -> tuple[int, int]:
        name = {**self.family.attention, **self.family.ffn}[role]
        d_out, d_in = layer[f"{name}.weight"]
        return d_out, d_in

    def _statistics(
        self, layer: Mapping[str, tuple[int, ...]], wanted: Mapping[Input, Wanted]
    ) -> tuple[int, int]:
        """Return the bytes of all sums, and what the largest takes besides while it grows."""
        role_of = {kind: role for role, kind in INPUT_OF.items() if role != "qk"}
        sums, adding = 0, 0
        for kind, want in wanted.items():
            features = self._shape(layer, role_of[kind])[1]
            for statistic in want.statistics:
                size = 8 * features ** (2 if statistic == "moment" else 1)
                sums, adding = sums + size, max(adding, 2 * size)
        return sums, adding

    def _forward(self, layer: Mapping[str, tuple[int, ...]]) -> int:
        sizes = {
            "hidden": self.hidden,
            "width": self._shape(layer, "up")[0],
            "queries": self._shape(layer, "q")[0],
            "heads": self.heads,
        }
        tokens = self.batch_samples * self.config.seqlen
        return forward_workspace(tokens, self.batch_samples, sizes, self.computed, eager=self.eager)

    def _heap(self, layer: Mapping[str, tuple[int, ...]]) -> int:
        tokens = self.batch_samples * self.config.seqlen
        widest = tokens * max(self.hidden, self._shape(layer, "up")[0]) * self.computed
        small = self.device == "cpu" and widest < LARGE_BLOCK
        return self._forward(layer) if small else 0

    def _statistics_of(self, module: ModulePlan, role: str) -> frozenset[Statistic]:
        return statistics_of(module, role, self.config)

    def _workspace(self, layer: Mapping[str, tuple[int, ...]], module: ModulePlan) -> int:
        shapes = [self._shape(layer, role) for role in module.roles]
        if module.kind == "low_rank":
            assert module.rank is not None
            shape = (sum(d_out for d_out, _ in shapes), shapes[0][1])
            method = low_rank_method(self.config, module.sublayer)
            low_rank = low_rank_workspace(shape, module.rank, method, self.stored)
            return low_rank + (0 if self.config.dense_target is None else fit_workspace(shape))
        fitted = max(fit_workspace(shape) for shape in shapes)
        if module.kind == "dense":
            return 0 if self.config.dense_target is None else fitted
        fits = self.config.update != "none" or self.config.selection == "obs"
        pruned = 0 if self.config.measures_gradients else pruning_workspace(shapes, self.stored)
        return pruned + (fitted if fits or self.config.dense_target is not None else 0)

    def _traffic(self) -> tuple[dict[str, int], dict[str, int]]:
        layers, others = sum(self.sizes), sum(self.others.values())
        embedding = others - self.others.get(self.family.head, 0)
        written = sum(self.after)
        read = {"model": 2 * (layers + others) + embedding, "layers written": written}
        forwards = 0
        for plan in self.plan.layers:
            wanted = wanted_statistics(self.family, plan, self._statistics_of)
            forwards += 2 if wanted else 1
            if self.config.dense_target is not None:
                # At each input of its linears, in both models; then the uncompressed one.
                forwards += 2 * len(STAGES)
            elif self.config.carries_dense:
                forwards += 1
            if self.config.refine:
                # The moments, and then input and target of each loss and gradient.
                forwards += 1 + 2 * (2 * self.config.refine + 2)
        states = len(self.layers) * (2 if self.config.carries_dense else 1) + 1
        if self.config.measures:
            read["model"] += layers + embedding
            forwards += len(self.layers)
            states *= 2
        if self.config.measures_gradients:
            read["model"] += layers + others
            # The last output, and at each layer its input and its gradient.
            forwards += 2 * len(self.layers) + 1
            states += len(self.layers) + 1
        wrote = {"model": written + others}
        probes = 0
        if self.probed:
            read["model"] += embedding + others
            # A stream for each module, from its layer on, and that of the model itself.
            count = len(self.layers)
            streams = probe_streams(self.config, count)
            probes = self.probed // (streams + 1) * (streams * (count + 1) // 2 + count + 1)
        if self.place == "disk":
            read["activations"] = forwards * self.state + probes
            wrote["activations"] = states * self.state + probes
        return read, wrote


def _largest(moments: Iterable[dict[str, int]]) -> dict[str, int]:
    return max(moments, key=lambda terms: sum(terms.values()))
