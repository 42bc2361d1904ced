"""The decoder-only families, and what is particular to each."""

from types import MappingProxyType

from lorap.families.base import ATTENTION, FFN, Family

LLAMA = Family("llama", "LorapLlama", plain_forward=True)
"""LLaMA 1 to 3, Vicuna, and what else shares their model type."""

MISTRAL = Family("mistral", "LorapMistral", plain_forward=True)
"""The same sliding window in all layers, or none."""

QWEN2 = Family("qwen2", "LorapQwen2", plain_forward=True)
"""Biases in q, k and v, not in o."""

QWEN3 = Family("qwen3", "LorapQwen3")
"""q and k are normed head by head."""

GEMMA2 = Family("gemma2", "LorapGemma2", ffn_input="pre_feedforward_layernorm")
"""Scaled embeddings, norms before and after each block, capped logits, sliding windows in turn."""

GEMMA3 = Family("gemma3_text", "LorapGemma3", ffn_input="pre_feedforward_layernorm")
"""As Gemma 2; with q and k normed head by head, and another rotary base in sliding windows."""

PHI3 = Family(
    "phi3",
    "LorapPhi3",
    attention=MappingProxyType(
        {role: f"self_attn.qkv_proj.{role}" for role in ("q", "k", "v")} | {"o": ATTENTION["o"]}
    ),
    ffn=MappingProxyType(
        {role: f"mlp.gate_up_proj.{role}" for role in ("gate", "up")} | {"down": FFN["down"]}
    ),
)
"""q, k and v are one linear, as are gate and up."""

OLMO2 = Family("olmo2", "LorapOlmo2", prunes_heads=False, ffn_input="mlp")
"""Norms after the blocks only; q and k are normed over all heads together."""

SMOLLM3 = Family("smollm3", "LorapSmolLM3")
"""No rotary embedding in some layers."""

DECODERS = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2, SMOLLM3)
