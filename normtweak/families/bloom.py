"""BLOOM: a norm behind the embedding; the residual branches off before a block's norms or, in some models, behind them."""

from . import Family, Norm

FAMILIES = (
    Family(
        model_types=("bloom",),
        blocks="transformer.h",
        norms=(
            Norm("input_layernorm", ("self_attention.query_key_value",)),
            Norm("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
        ),
        final_norm="transformer.ln_f",
        embedding_norm="transformer.word_embeddings_layernorm",
        when=(("apply_residual_connection_post_layernorm", False),),
    ),
    Family(
        model_types=("bloom",),
        blocks="transformer.h",
        norms=(Norm("input_layernorm", None), Norm("post_attention_layernorm", None)),
        final_norm="transformer.ln_f",
        embedding_norm="transformer.word_embeddings_layernorm",
        when=(("apply_residual_connection_post_layernorm", True),),
    ),
)
