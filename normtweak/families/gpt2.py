"""GPT-2: weights [in, out] in Conv1D modules."""

from . import Family, Norm

FAMILIES = (
    Family(
        model_types=("gpt2",),
        blocks="transformer.h",
        norms=(
            Norm("ln_1", ("attn.c_attn",)),
            Norm("ln_2", ("mlp.c_fc",)),
        ),
        final_norm="transformer.ln_f",
    ),
)
