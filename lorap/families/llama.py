"""LLaMA 1 to 3, and what shares their model type."""

from types import MappingProxyType

from lorap.families.base import Family

LLAMA = Family(
    model_type="llama",
    modeling_module="lorap.families.modeling_lorap_llama",
    class_prefix="LorapLlama",
    attention=MappingProxyType(
        {
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.o_proj",
        }
    ),
    ffn=MappingProxyType({"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}),
    ffn_block="mlp",
    layers_path="model.layers",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
)
