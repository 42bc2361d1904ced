"""FLAP, another one-shot structured method, run on the same samples for comparison.

    python -m bench.flap MODEL [--ratios 0.2 0.5] [--calibration SOURCE --evaluation SOURCE]

FLAP (An et al., *Fluctuation-based Adaptive Structured Pruning for Large Language Models*, AAAI
2024, arXiv 2312.11983) prunes channels and heads by one threshold for the whole model, and puts the
mean of what is removed into biases. As its paper states it, Section 4, with its defaults WIFV and
AL-AM:

- The score of an input feature of o or down is the variance of the feature times the squared norm
  of its column.
- The score of a head is the mean of its features'; here that of a key/value head with its query
  heads, which is what can be removed. Scores are standardised (mean 0, standard deviation 1) within
  the heads, and within the channels, of each layer.
- All are sorted together, a head counting as many channels as it has parameters of them; those
  below the threshold at which the ratio is met go.
- The bias of o, and of down, becomes the output of the removed features at their means.

``MODEL`` is a LLaMA whose linears have no biases. Ratios are of the decoder layers, as with
``--ratio-scope layer``; what is kept is at most what LoRAP keeps, biases included. Prints a table
in Markdown. Sources are as for ``bench.quality``.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorap
from bench.sampling import sample_ids
from lorap.data.calibration import load_calibration
from lorap.data.tokenizers import load_tokenizer
from lorap.evaluation.data import load_evaluation_chunks
from lorap.evaluation.likelihood import perplexity
from lorap.runtime import versions


@dataclass(frozen=True)
class Units:
    """What can be removed of a layer's attention, or of its feed-forward block.

    Attributes
    ----------
    reader : Linear
        That reads the units: o or down.
    mean, variance : (d_in,)
        Of its input.
    size : int
        Input features of a unit.
    parameters : int
        Of a unit.
    """

    reader: nn.Linear
    mean: Tensor
    variance: Tensor
    size: int
    parameters: int

    def scores(self) -> Tensor:
        """Return the standardised score of each unit."""
        of_features = self.variance * self.reader.weight.double().square().sum(0)
        raw = of_features.view(-1, self.size).mean(1)
        return (raw - raw.mean()) / raw.std()

    def remove_(self, removed: Tensor) -> None:
        """Take units out, and put the mean of what they gave into the bias."""
        features = removed.repeat_interleave(self.size)
        weight = self.reader.weight.data
        lost = weight.double()[:, features] @ self.mean[features]
        self.reader.bias = nn.Parameter(lost.to(weight.dtype))
        weight[:, features] = 0


def units_of(model: Any, ids: Tensor) -> list[Units]:
    """Return the units of all layers, attention first, by one forward of the dense model."""
    sums: dict[nn.Linear, list[Tensor]] = {}

    def add(reader: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        found = [x.sum(0), x.square().sum(0)]
        sums[reader] = (
            [a + b for a, b in zip(sums[reader], found, strict=True)] if (reader in sums) else found
        )

    layers = model.model.layers
    readers = [each for layer in layers for each in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    hooks = [reader.register_forward_pre_hook(add) for reader in readers]
    with torch.no_grad():
        for batch in torch.split(ids, 16):
            model(input_ids=batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    hidden, groups = model.config.hidden_size, model.config.num_key_value_heads
    found = []
    for place, reader in enumerate(readers):
        total, squares = sums[reader]
        mean = total / ids.numel()
        variance = squares / ids.numel() - mean.square()
        if place % 2:
            found.append(Units(reader, mean, variance, 1, 3 * hidden))
            continue
        size = reader.in_features // groups
        head_dim = reader.in_features // model.config.num_attention_heads
        found.append(Units(reader, mean, variance, size, (2 * size + 2 * head_dim) * hidden))
    return found


def prune_(model: Any, ids: Tensor, kept: int) -> int:
    """Prune a model to at most `kept` parameters of its layers' linears; return what it has.

    Parameters
    ----------
    model : LlamaForCausalLM
    ids : (N, L)
        Calibration samples.
    kept : int
    """
    units = units_of(model, ids)
    scores = torch.cat([each.scores() for each in units])
    sizes = torch.cat([torch.full((len(u.scores()),), u.parameters) for u in units])
    held = sum(each.reader.out_features for each in units)
    order = scores.sort(descending=True, stable=True).indices
    stays = torch.zeros(len(scores), dtype=torch.bool)
    stays[order] = held + sizes[order].cumsum(0) <= kept
    removed = torch.split(~stays, [len(each.scores()) for each in units])
    for each, gone in zip(units, removed, strict=True):
        each.remove_(gone)
    return held + int(sizes[stays].sum())


def linears_of(model: Any) -> int:
    """Return the parameters of the linears in the layers."""
    return sum(
        module.weight.numel()
        for module in model.model.layers.modules()
        if isinstance(module, nn.Linear)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.flap", description=__doc__.split("\n")[0]
    )
    parser.add_argument("model", help="folder of a LLaMA")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.5])
    parser.add_argument("--calibration", help="SOURCE; default: 128 sampled sequences")
    parser.add_argument("--evaluation", help="SOURCE; default: 192 sampled sequences")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of calibration")
    arguments = parser.parse_args(argv)

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)

    ids, chunks = torch.split(sample_ids(model, 128 + 192, 128, arguments.seed), [128, 192])
    limits: dict[str, Any] = {
        "tokenizer": lambda: load_tokenizer(Path(arguments.model)),
        "seqlen": 128,
        "vocab_size": model.config.vocab_size,
        "max_positions": model.config.max_position_embeddings,
    }
    if arguments.calibration is not None:
        ids = load_calibration(
            arguments.calibration, samples=128, seed=arguments.seed, **limits
        ).input_ids
    if arguments.evaluation is not None:
        chunks, _ = load_evaluation_chunks(arguments.evaluation, **limits)
    print(f"`python -m bench.flap {shlex.join(argv or sys.argv[1:])}`\n")
    print("| asked | parameters | perplexity |\n|---|---|---|")
    print(f"| dense | {model.num_parameters():,} | {perplexity(model, chunks).perplexity:.3f} |")
    for ratio in arguments.ratios:
        config = lorap.CompressionConfig(ratio=ratio, ratio_scope="layer", seed=arguments.seed)
        plan = lorap.plan_checkpoint(arguments.model, config)
        others = model.num_parameters() - linears_of(model)
        pruned = copy.deepcopy(model)
        held = prune_(pruned, ids, plan.parameters - others)
        found = perplexity(pruned, chunks).perplexity
        print(f"| {ratio:.0%} | {held + others:,} | {found:.3f} |", flush=True)
    print(f"\n{chunks.numel() // 128 * 127:,} targets; {versions()}")


if __name__ == "__main__":
    main()
