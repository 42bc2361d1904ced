"""LLaMA-shaped checkpoints with random weights, written layer by layer.

python -m bench.models tinyllama FOLDER [--layers N]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA.

    Attributes
    ----------
    hidden, width : int
        Features of the residual stream, channels of a feed-forward block.
    layers, heads, kv_heads, vocabulary : int
    """

    hidden: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000


SHAPES = {
    "small": Shape(512, 1408, 2, 8, 8, 4096),
    "medium": Shape(1024, 2816, 4, 16, 4, 8192),
    "tinyllama": Shape(2048, 5632, 22, 32, 4),
    "llama-7b": Shape(4096, 11008, 32, 32, 32),
    "llama-13b": Shape(5120, 13824, 40, 40, 40),
    "llama-30b": Shape(6656, 17920, 60, 52, 52),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128256),
}
"""Those of the models of these names; ``small`` and ``medium`` are nobody's."""


def configuration(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Return the contents of ``config.json`` of a model of this shape.

    Parameters
    ----------
    shape : Shape
    dtype : torch.dtype
        Of the weights.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def write(
    shape: Shape,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> None:
    """Write a checkpoint of one shard per layer, and one for embeddings and head.

    The weights are normal, with the spread at which a layer keeps the scale of its input; input
    features differ in scale by the gains of the norms, a few by far, as those of LLaMAs do.

    Parameters
    ----------
    shape : Shape
    folder : Path
        Made where it is missing.
    dtype : torch.dtype
    seed : int
    device : torch.device
        That draws the weights: others with the same seed on another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(seed)
    count = shape.layers + 1
    weight_map: dict[str, str] = {}
    total = 0

    def matrix(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device) / columns**0.5
        rounded: Tensor = values.to(dtype).cpu()
        return rounded

    def gains() -> Tensor:
        values = torch.exp(0.5 * torch.randn(shape.hidden, generator=generator, device=device))
        values[torch.randint(shape.hidden, (4,), generator=generator, device=device)] = 20.0
        rounded: Tensor = values.to(dtype).cpu()
        return rounded

    def save(number: int, tensors: dict[str, Tensor]) -> None:
        nonlocal total
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    keys = shape.hidden // shape.heads * shape.kv_heads
    d, m = shape.hidden, shape.width
    for index in range(shape.layers):
        linears = {
            "self_attn.q_proj": matrix(d, d),
            "self_attn.k_proj": matrix(keys, d),
            "self_attn.v_proj": matrix(keys, d),
            "self_attn.o_proj": matrix(d, d),
            "mlp.gate_proj": matrix(m, d),
            "mlp.up_proj": matrix(m, d),
            "mlp.down_proj": matrix(d, m),
            "input_layernorm": gains(),
            "post_attention_layernorm": gains(),
        }
        prefix = f"model.layers.{index}."
        save(index + 1, {f"{prefix}{name}.weight": value for name, value in linears.items()})
    save(
        count,
        {
            "model.embed_tokens.weight": matrix(shape.vocabulary, d),
            "lm_head.weight": matrix(shape.vocabulary, d),
            "model.norm.weight": gains(),
        },
    )
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    config = configuration(shape, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.layers is not None:
        shape = replace(shape, layers=arguments.layers)
    write(shape, arguments.folder, getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
