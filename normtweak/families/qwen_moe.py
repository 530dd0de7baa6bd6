"""Qwen's mixtures of experts, with a shared expert (Qwen 2) or norms on queries and keys (Qwen 3); some blocks may be dense."""

from . import Family, Norm, Pair

FAMILIES = (
    Family(
        model_types=("qwen2_moe", "qwen3_moe"),
        blocks="model.layers",
        norms=(
            Norm("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            Norm("self_attn.q_norm", None),
            Norm("self_attn.k_norm", None),
            Norm(
                "post_attention_layernorm",
                (
                    "mlp.gate",
                    "mlp.experts.*.gate_proj",
                    "mlp.experts.*.up_proj",
                    "mlp.shared_expert_gate",
                    "mlp.shared_expert.gate_proj",
                    "mlp.shared_expert.up_proj",
                    "mlp.gate_proj",
                    "mlp.up_proj",
                ),
            ),
        ),
        final_norm="model.norm",
        pairs=(
            Pair("self_attn", "v_proj", "o_proj"),
            Pair("mlp.experts.*", "up_proj", "down_proj"),
            Pair("mlp.shared_expert", "up_proj", "down_proj"),
            Pair("mlp", "up_proj", "down_proj"),
        ),
        keep=(r"mlp\.shared_expert_gate$",),
    ),
)
