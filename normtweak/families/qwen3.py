"""Qwen3: Llama with norms on queries and keys."""

from . import Family, Norm, Pair

FAMILIES = (
    Family(
        model_types=("qwen3",),
        blocks="model.layers",
        norms=(
            Norm("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            Norm("self_attn.q_norm", None),
            Norm("self_attn.k_norm", None),
            Norm("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ),
        final_norm="model.norm",
        pairs=(Pair("self_attn", "v_proj", "o_proj"), Pair("mlp", "up_proj", "down_proj")),
    ),
)
