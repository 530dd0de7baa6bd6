"""Falcon: attention and MLP side by side behind one norm (7B) or one each (40B, 180B), or in turn (the RW models)."""

from . import Family, Norm

FAMILIES = (
    Family(
        model_types=("falcon",),
        blocks="transformer.h",
        norms=(
            Norm("ln_attn", ("self_attention.query_key_value",)),
            Norm("ln_mlp", ("mlp.dense_h_to_4h",)),
            Norm("input_layernorm", ("self_attention.query_key_value", "mlp.dense_h_to_4h")),
        ),
        final_norm="transformer.ln_f",
        when=(("parallel_attn", True),),
    ),
    Family(
        model_types=("falcon",),
        blocks="transformer.h",
        norms=(
            Norm("input_layernorm", ("self_attention.query_key_value",)),
            Norm("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        final_norm="transformer.ln_f",
        when=(("parallel_attn", False), ("new_decoder_architecture", False)),
    ),
)
