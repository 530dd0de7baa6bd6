"""Phi: one norm for attention and MLP, side by side; Phi-3: Llama with fused projections."""

from . import Family, Norm, Pair

FAMILIES = (
    Family(
        model_types=("phi",),
        blocks="model.layers",
        norms=(Norm("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")),),
        final_norm="model.final_layernorm",
        pairs=(Pair("self_attn", "v_proj", "dense"),),
        when=(("qk_layernorm", False),),
    ),
    Family(
        model_types=("phi3",),
        blocks="model.layers",
        norms=(
            Norm("input_layernorm", ("self_attn.qkv_proj",)),
            Norm("post_attention_layernorm", ("mlp.gate_up_proj",)),
        ),
        final_norm="model.norm",
    ),
)
