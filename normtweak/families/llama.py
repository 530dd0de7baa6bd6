"""Llama and what is built like it."""

from . import Family

FAMILY = Family(
    model_types=("llama", "mistral", "qwen2"),
    blocks="model.layers",
    norms={
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
