"""Llama and what is built like it."""

from . import Family, Norm, Pair

FAMILIES = (
    Family(
        model_types=("llama", "mistral", "qwen2", "gemma"),
        blocks="model.layers",
        norms=(
            Norm("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            Norm("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ),
        final_norm="model.norm",
        pairs=(Pair("self_attn", "v_proj", "o_proj"), Pair("mlp", "up_proj", "down_proj")),
    ),
)
