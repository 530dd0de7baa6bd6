"""Gemma 2 and 3: norms around attention and MLP (sandwich norms), and in 3 on queries and keys; all of them multiply by 1 + weight."""

from . import Family, Norm, Pair

FAMILIES = (
    Family(
        model_types=("gemma2", "gemma3_text"),
        blocks="model.layers",
        norms=(
            Norm("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            Norm("self_attn.q_norm", None),
            Norm("self_attn.k_norm", None),
            Norm("post_attention_layernorm", None),
            Norm("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            Norm("post_feedforward_layernorm", None),
        ),
        final_norm="model.norm",
        pairs=(Pair("self_attn", "v_proj", "o_proj"), Pair("mlp", "up_proj", "down_proj")),
    ),
)
