"""GPT-NeoX and Pythia: attention and MLP side by side or in turn, each behind a norm of its own."""

from . import Family, Norm

FAMILIES = (
    Family(
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        norms=(
            Norm("input_layernorm", ("attention.query_key_value",)),
            Norm("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        final_norm="gpt_neox.final_layer_norm",
    ),
)
