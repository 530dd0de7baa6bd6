"""Mixtral: a mixture of experts whose weights are called w1, w3 and w2."""

from . import Family, Norm, Pair

FAMILIES = (
    Family(
        model_types=("mixtral",),
        blocks="model.layers",
        norms=(
            Norm("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            Norm("post_attention_layernorm", ("mlp.gate", "mlp.experts.*.w1", "mlp.experts.*.w3")),
        ),
        final_norm="model.norm",
        pairs=(Pair("self_attn", "v_proj", "o_proj"), Pair("mlp.experts.*", "w3", "w2")),
        experts=("w1", "w3", "w2"),
    ),
)
