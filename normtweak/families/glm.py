"""GLM-4 as transformers has it: glm, and glm4 with norms around attention and MLP."""

from . import Family, Norm, Pair

FAMILIES = (
    Family(
        model_types=("glm", "glm4"),
        blocks="model.layers",
        norms=(
            Norm("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            Norm("post_self_attn_layernorm", None),
            Norm("post_attention_layernorm", ("mlp.gate_up_proj",)),
            Norm("post_mlp_layernorm", None),
        ),
        final_norm="model.norm",
        pairs=(Pair("self_attn", "v_proj", "o_proj"),),
    ),
)
