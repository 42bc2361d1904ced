"""Tiny random models, their checkpoints, and structures to compress them to."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 96
WORDS = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(VOCAB_SIZE - 3))]

# A model type per trait of LLaMAs that the code must keep right.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 2},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "wide_heads": {"head_dim": 16, "num_key_value_heads": 1},
}


# What is particular to each family, so that every trait that the code must keep right is there. The
# windows are shorter than the samples, and the layers of two types where the family has two.
_SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
_SLIDING["layer_types"].pop()
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, **_SLIDING},
    "qwen3": {"use_sliding_window": True, "head_dim": 16, **_SLIDING},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 24, **_SLIDING},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 24, **_SLIDING},
    "phi3": {"partial_rotary_factor": 0.5},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, **_SLIDING},
}

# Not the defaults, so that a lost rotary base shows in the logits.
THETA, LOCAL_THETA = 500.0, 70.0


def _tiny_fields(config_class: type[PretrainedConfig]) -> dict[str, Any]:
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    if hasattr(config_class, "rope_parameters"):
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": THETA}
    else:
        values["rope_theta"] = THETA
    return values


def tiny_config(**overrides: Any) -> LlamaConfig:
    """Return the configuration of a three-layer LLaMA of width 32; any field can be given."""
    return LlamaConfig(**(_tiny_fields(LlamaConfig) | overrides))


def tiny_family_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a random model of a family, in evaluation mode, with its traits."""
    config_class = type(AutoConfig.for_model(model_type))
    values = _tiny_fields(config_class) | {"num_key_value_heads": 2, "pad_token_id": 0}
    values |= FAMILY_FIELDS[model_type]
    if model_type == "gemma3_text" and "rope_parameters" in values:
        local = {"rope_type": "default", "rope_theta": LOCAL_THETA}
        values["rope_parameters"] = {
            "full_attention": values["rope_parameters"],
            "sliding_attention": local,
        }
    elif model_type == "gemma3_text":
        values["rope_local_base_freq"] = LOCAL_THETA
    model = AutoModelForCausalLM.from_config(config_class(**(values | overrides)))
    randomise_(model, seed)
    return model.eval()


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> LlamaForCausalLM:
    """Return a random LLaMA in evaluation mode; biases and norms are random too."""
    model = LlamaForCausalLM(tiny_config(**overrides))
    randomise_(model, seed, dtype)
    return model.eval()


def randomise_(model: torch.nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Fill all parameters at random: those that start as zeros and ones would hide errors.

    Only parameters take the dtype, as in a loaded model: ``model.to`` rounds the rotary table too.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            offset = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (offset + 0.2 * noise).to(dtype)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words ``w0``, ``w1``, ... with a chat template."""
    tokenizer = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return wrapped


def save_tiny_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "50GB",
    **overrides: Any,
) -> LlamaForCausalLM:
    """Write a checkpoint with tokenizer, generation config and licence; return its model."""
    model = tiny_model(seed, dtype, **overrides)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE.txt").write_bytes(b"Terms of the tiny model\r\n")
    return model


def tiny_structure(layers: int = 3) -> list[dict[str, dict[str, int]]]:
    """Return ranks and widths that differ from layer to layer; the last layer stays dense."""
    structure: list[dict[str, dict[str, int]]] = [
        {
            "self_attn.q_proj": {"rank": 5 + index},
            "self_attn.k_proj": {"rank": 4},
            "self_attn.v_proj": {"rank": 7},
            "self_attn.o_proj": {"rank": 9 - index},
            "mlp": {"width": 30 + index},
        }
        for index in range(layers - 1)
    ]
    return [*structure, {}]


def varied_structure() -> list[dict[str, dict[str, Any]]]:
    """Return every kind of entry, over three layers of at least two key-value heads."""
    return [
        {
            "self_attn.qk_proj": {"rank": 9, "bias": True},
            "self_attn.v_proj": {"rank": 6, "bias": True},
            "mlp": {"width": 29},
            "mlp.down_proj": {"bias": True},
        },
        {
            "self_attn": {"kv_heads": 1},
            "self_attn.o_proj": {"bias": True},
            "mlp.gate_proj": {"rank": 5},
            "mlp.up_proj": {"rank": 6, "bias": True},
            "mlp.down_proj": {"rank": 4, "bias": True},
        },
        {
            "self_attn.qk_proj": {"rank": 8},
            "self_attn.o_proj": {"rank": 11},
            "mlp": {"width": 20},
            "mlp.up_proj": {"rank": 3},
        },
    ]


def multiplied_out(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the dense model that computes the same as a compressed one.

    Factors are multiplied out; channels and heads that are gone, and biases that a linear has not,
    are zero. `like` are tensors of the shapes wanted.
    """
    dense = {}
    for name, tensor in like.items():
        linear, _, kind = name.rpartition(".")
        found = state.get(name, state.get(f"{linear}.left.{kind}"))
        if kind == "weight" and name not in state:
            block = linear.rpartition(".")[0]
            right = state.get(f"{linear}.right.weight", state.get(f"{block}.qk_right.weight"))
            assert found is not None
            assert right is not None
            found = found @ right
        dense[name] = torch.zeros_like(tensor)
        if found is not None:
            dense[name][tuple(slice(size) for size in found.shape)] = found
    return dense


def token_ids(rows: int = 2, length: int = 11, seed: int = 0) -> Tensor:
    """Return random ids (rows, length) without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=generator)
