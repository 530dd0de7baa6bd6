"""OPT: norms before attention and MLP, or (the 350M model) behind them, on the residual stream."""

from . import Family, Norm, Pair

FAMILIES = (
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        norms=(
            Norm("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            Norm("final_layer_norm", ("fc1",)),
        ),
        final_norm="model.decoder.final_layer_norm",
        pairs=(Pair("self_attn", "v_proj", "out_proj"),),
        when=(("do_layer_norm_before", True),),
    ),
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        norms=(Norm("self_attn_layer_norm", None), Norm("final_layer_norm", None)),
        final_norm=None,
        pairs=(Pair("self_attn", "v_proj", "out_proj"),),
        when=(("do_layer_norm_before", False),),
    ),
)
