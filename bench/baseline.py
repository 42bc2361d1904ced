"""LoRAP as printed and as the authors ran it, in plain steps of our own, beside ``lorap.compress``.

    python -m bench.baseline [--shape small] [--layers N] [--samples 128] [--ratio 0.2]
                             [--dtype float32] [--device cpu|cuda]

Both compress the same random model, resident in memory, on the same samples of 128 tokens, with the
same ranks and widths, in one run. Prints a table in Markdown.

What the baseline does is fixed by the facts that are known of the authors' code
(github.com/lihuang258/LoRAP at 4e34b7f), quoted here as they are in ``lorap-facts.md``, section 1,
beside the step that carries each out. Nothing in it is slower than that.

1. "App. C.1 sequence: per layer: one forward of the uncompressed layer collects the statistics of
   all seven linears at once [...]; then compress; then a second forward for the next layer's
   input": ``compress_literally``. The samples go through one at a time, at "batch size 1", the only
   one at which all of that code's statistics are right; every hook of the seven linears takes its
   own sum, though some share an input.
2. "Eq. 1: running mean over samples of the sum over tokens of x_j^2, in fp32; its square root is
   norm(X_j)/sqrt(N)": ``RunningMean``.
3. "Eq. 5: the same, with a zero entry replaced by 1e-4": ``decompose``.
4. "Eq. 7: norm(WD - LRD), D = diag(norm(X_j))", "D inverted as a dense matrix", "solution:
   L = U sqrt(S), R = sqrt(S) V D^-1: the same product, balanced", "SVD in fp32": ``decompose``. The
   products with D and with its inverse are those of dense matrices.
5. "factors stored in fp16": in the dtype of the model. They are two linears in a row, as Eq. 3 has
   it.
6. "Eq. 8: row norms for up and gate, column norms for down", "Eq. 9, 10: the plain sum [...]; down
   is scored with the statistics of its own input", "Eq. 11: channels sorted ascending by score; the
   slice [...] is removed; survivors keep their original order": ``prune``.
7. "Ranks in the authors' code" and "the ratio given is used as the layer ratio": the plan of
   ``lorap`` in layer scope, which has the authors' ranks and slices (SPEC
   ``budget.ranks.square``).
8. "The model in fp16", on the device as a whole: here in ``--dtype``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import lorap
from bench.models import SHAPES, Shape, write
from bench.timing import now
from lorap import CompressionConfig
from lorap.families import family_of
from lorap.ops.lowrank import awsvd
from lorap.plan import LayerPlan, Plan, make_plan
from lorap.runtime import peak_memory, versions

ZERO = 1e-4
"""What a norm of zero is replaced by."""


class RunningMean:
    """Mean over samples of the sum over tokens of the squared input features, in float32."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.mean = torch.zeros(features, device=device)
        self.samples = 0

    def add(self, inputs: Tensor) -> None:
        """Take one sample, ``(1, L, features)``."""
        squares = torch.linalg.vector_norm(inputs[0].float(), dim=0) ** 2
        self.mean = self.mean * (self.samples / (self.samples + 1)) + squares / (self.samples + 1)
        self.samples += 1

    def norms(self) -> Tensor:
        """Return the norms up to the root of the number of samples."""
        return self.mean.sqrt()


def decompose(weight: Tensor, norms: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factor a weight by Eq. (7) with diagonal matrices, an inverse and a whole SVD in float32.

    Parameters
    ----------
    weight : (d_out, d_in)
    norms : (d_in,)
    rank : int

    Returns
    -------
    left : (d_out, rank)
    right : (rank, d_in)
        In the dtype of the weight.
    """
    scale = torch.diag(torch.where(norms == 0, ZERO, norms))
    u, s, v = torch.linalg.svd(weight.float() @ scale, full_matrices=False)
    root = torch.diag(s[:rank].sqrt())
    left = u[:, :rank] @ root
    right = root @ v[:rank] @ torch.linalg.inv(scale)
    return left.to(weight.dtype), right.to(weight.dtype)


def prune(
    block: Any, norms: Mapping[str, Tensor], band: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the channels that stay by Eq. (8) to (11), and the three weights that are left.

    Parameters
    ----------
    block : Module
        With ``up_proj``, ``gate_proj`` and ``down_proj``.
    norms : mapping
        By those names.
    band : (int, int)
        The slice of the ascending order that is removed.
    """
    scores = torch.zeros(block.up_proj.weight.shape[0], device=block.up_proj.weight.device)
    for name, axis in (("up_proj", 1), ("gate_proj", 1), ("down_proj", 0)):
        importance = getattr(block, name).weight.float().abs() * norms[name]
        scores += torch.linalg.vector_norm(importance, dim=axis)
    order = torch.argsort(scores, stable=True)
    low, high = band
    kept = torch.cat([order[:low], order[high:]]).sort().values
    weights = {name: getattr(block, name).weight[kept] for name in ("up_proj", "gate_proj")}
    weights["down_proj"] = block.down_proj.weight[:, kept]
    return kept, weights


@dataclass
class Baseline:
    """What the baseline did.

    Attributes
    ----------
    seconds : dict
        By step: ``statistics`` (the first forward), ``decompositions``, ``pruning``, ``forward``.
    first : dict
        Of the first layer: the products of the factors by the name of the module, and the kept
        channels under ``mlp``.
    weights, norms : dict
        Of the first layer's factored linears, by name.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str, device: torch.device) -> Iterator[None]:
        """Add the time of what is done inside to a step."""
        start = now(device)
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + now(device) - start


def compress_literally(model: Any, ids: Tensor, plan: Plan) -> Baseline:
    """Compress a LLaMA in place, one sample at a time.

    Parameters
    ----------
    model : LlamaForCausalLM
        On its device, as a whole.
    ids : (N, L) Tensor
    plan : Plan
        Gives ranks and removed slices.
    """
    result = Baseline()
    base, device = model.model, model.device
    with torch.no_grad():
        hidden = [base.embed_tokens(sample[None].to(device)) for sample in ids]
        positions = torch.arange(ids.shape[1], device=device)[None]
        rotation = base.rotary_emb(hidden[0], positions)

        def run(layer: nn.Module, sample: Tensor) -> Tensor:
            output: Any = layer(
                sample,
                attention_mask=None,
                position_ids=positions,
                position_embeddings=rotation,
                use_cache=False,
            )
            return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

        for index, layer in enumerate(base.layers):
            layer_plan = plan.layers[index]
            with result.step("statistics", device):
                norms = _statistics(layer, hidden, run)
            with result.step("decompositions", device):
                factors = _factor(layer, norms, layer_plan)
            if index == 0:
                for name, (left, right) in factors.items():
                    result.first[name] = left.float() @ right.float()
                    result.weights[name] = layer.get_submodule(name).weight.clone()
                    result.norms[name] = norms[name]
            for name, (left, right) in factors.items():
                first, second = _linear(right), _linear(left)
                parent, _, own = name.rpartition(".")
                setattr(layer.get_submodule(parent), own, nn.Sequential(first, second))
            band = layer_plan["mlp"].band
            if band is not None:
                with result.step("pruning", device):
                    of_block = {name: norms[f"mlp.{name}"] for name in _FFN}
                    kept, weights = prune(layer.mlp, of_block, band)
                    for name, weight in weights.items():
                        setattr(layer.mlp, name, _linear(weight))
                if index == 0:
                    result.first["mlp"] = kept
            with result.step("forward", device):
                hidden = [run(layer, sample) for sample in hidden]
    return result


_FFN = ("up_proj", "gate_proj", "down_proj")


def _statistics(
    layer: nn.Module, hidden: list[Tensor], run: Callable[[nn.Module, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Run the samples through a layer, and return the norms of the seven linears' inputs."""
    means: dict[str, RunningMean] = {}
    handles = []
    for name, linear in layer.named_modules():
        if isinstance(linear, nn.Linear):
            means[name] = mean = RunningMean(linear.in_features, linear.weight.device)
            handles.append(
                linear.register_forward_pre_hook(lambda _, given, mean=mean: mean.add(given[0]))
            )
    for sample in hidden:
        run(layer, sample)
    for handle in handles:
        handle.remove()
    return {name: mean.norms() for name, mean in means.items()}


def _factor(
    layer: nn.Module, norms: Mapping[str, Tensor], plan: LayerPlan
) -> dict[str, tuple[Tensor, Tensor]]:
    factors = {}
    for name, module in plan.items():
        if module.kind == "low_rank":
            assert module.rank is not None
            weight = layer.get_parameter(f"{name}.weight").detach()
            factors[name] = decompose(weight, norms[name], module.rank)
    return factors


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return linear


@dataclass(frozen=True)
class Comparison:
    """Times of both, in seconds, and whether they did the same.

    Attributes
    ----------
    baseline, lorap : float
        End to end.
    parts : dict
        Of the baseline; see ``Baseline.seconds``.
    decompositions : (float, float)
        Of the first layer: by the baseline's ``decompose``, by ``awsvd``.
    difference : float
        Largest difference of the two's products in the first layer, over the norm of the product.
    same_channels : float
        Share of the first layer's channels that are the same in both, place by place.
    peaks : dict
        Peak memory in bytes: of the process after both, on a GPU of each.
    """

    baseline: float
    lorap: float
    parts: dict[str, float]
    decompositions: tuple[float, float]
    difference: float
    same_channels: float
    peaks: dict[str, int]


def compare(
    shape: Shape,
    *,
    ratio: float,
    samples: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Comparison:
    """Compress a random model both ways."""
    ids = torch.randint(
        3, shape.vocabulary, (samples, 128), generator=torch.Generator().manual_seed(seed)
    )
    config = CompressionConfig(ratio=ratio, ratio_scope="layer", samples=samples)
    model = _random_model(shape, dtype, device, seed)
    plan = make_plan(model.config, family_of(model.config), config)
    # Libraries and kernels are loaded, and chosen, by the first to need them.
    _warm_up(dtype, device)
    peaks: dict[str, int] = {}
    _reset_peak(device)
    start = now(device)
    ours: Any = lorap.compress(model, config, calibration=ids).requires_grad_(False)
    seconds = now(device) - start
    peaks["lorap"] = peak_memory(device)[device.type]
    layer = ours.model.layers[0]
    products = {
        name: layer.get_submodule(name).left.weight.float()
        @ layer.get_submodule(name).right.weight.float()
        for name, module in plan.layers[0].items()
        if module.kind == "low_rank"
    }
    up = layer.mlp.up_proj.weight
    original_up = model.model.layers[0].mlp.up_proj.weight
    del ours
    _reset_peak(device)
    start = now(device)
    theirs = compress_literally(model, ids, plan)
    baseline = now(device) - start
    peaks["baseline"] = peak_memory(device)[device.type]
    differences = [
        float(torch.linalg.norm(theirs.first[name] - product) / torch.linalg.norm(product))
        for name, product in products.items()
    ]
    kept = theirs.first.get("mlp")
    same = 1.0 if kept is None else float((original_up[kept] == up).all(dim=1).float().mean())
    return Comparison(
        baseline,
        seconds,
        theirs.seconds,
        _decompositions(theirs, plan.layers[0], device),
        max(differences, default=0.0),
        same,
        peaks,
    )


def _warm_up(dtype: torch.dtype, device: torch.device) -> None:
    """Compress a tiny model both ways."""
    shape = Shape(64, 176, 1, 4, 4, 512)
    model = _random_model(shape, dtype, device, 0)
    ids = torch.randint(3, 512, (4, 128), generator=torch.Generator().manual_seed(0))
    config = CompressionConfig(ratio=0.4, ratio_scope="layer")
    lorap.compress(model, config, calibration=ids)
    compress_literally(model, ids, make_plan(model.config, family_of(model.config), config))


def _random_model(shape: Shape, dtype: torch.dtype, device: torch.device, seed: int) -> Any:
    from transformers import AutoModelForCausalLM

    with TemporaryDirectory() as name:
        write(shape, Path(name), dtype, seed, device)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name)
        return loaded.to(device=device, dtype=dtype).requires_grad_(False)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _decompositions(found: Baseline, plan: LayerPlan, device: torch.device) -> tuple[float, float]:
    """Return the seconds that the first layer's decompositions take, both ways."""
    taken = []
    for way in (decompose, awsvd):
        start = now(device)
        for name, weight in found.weights.items():
            rank = plan[name].rank
            assert rank is not None
            way(weight, found.norms[name], rank)
        taken.append(now(device) - start)
    return taken[0], taken[1]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--samples", type=int, default=128, help="of 128 tokens")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        shape = replace(shape, layers=arguments.layers)
    found = compare(
        shape,
        ratio=arguments.ratio,
        samples=arguments.samples,
        dtype=getattr(torch, arguments.dtype),
        device=torch.device(arguments.device),
    )
    print(f"`python -m bench.baseline {shlex.join(sys.argv[1:])}`")
    print(f"{torch.get_num_threads()} threads of {os.cpu_count()} cores\n")
    print("| | baseline, s | lorap, s | ratio |")
    print("|---|---|---|---|")
    for name, theirs, ours in (
        ("end to end", found.baseline, found.lorap),
        ("decompositions of the first layer", *found.decompositions),
    ):
        print(f"| {name} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f} |")
    parts = ", ".join(f"{name} {taken:.2f} s" for name, taken in found.parts.items())
    print(f"\nOf the baseline: {parts}.")
    print(
        f"In the first layer the products differ by at most {found.difference:.1e} of their norm, "
        f"and {found.same_channels:.2%} of the kept channels are the same."
    )
    print(f"\n{versions()}")


if __name__ == "__main__":
    main()
