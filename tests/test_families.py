"""Every family of the table, with a small model of its own: quantized, tweaked, saved, loaded, generating; and the table's data itself."""

from itertools import cycle

import pytest
import torch
from torch import nn

import normtweak
from normtweak import QuantizeConfig, families, models
from normtweak.linear import PackedLinear
from normtweak.norms import gain_offset, is_norm
from normtweak.polish import _Objective
from small_models import edit, make_model, make_packed, tensors_of

FALCON = {"head_dim": None, "num_key_value_heads": None, "num_kv_heads": 2}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
SMALL = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox in turn": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "opt behind": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "bloom": ("bloom", {}),
    "bloom behind": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "falcon": ("falcon", FALCON),
    "falcon two norms": ("falcon", FALCON | {"new_decoder_architecture": True}),
    "falcon in turn": ("falcon", FALCON | {"parallel_attn": False, "alibi": True, "bias": True}),
    "mixtral": ("mixtral", MOE),
    "qwen2_moe": ("qwen2_moe", MOE | {"mlp_only_layers": [1]}),
    "qwen3_moe": ("qwen3_moe", MOE),
}
CONFIG = QuantizeConfig.preset(
    bits=4,
    group_size=32,
    compute_dtype="float32",
    calibration={"source": "random", "samples": 6, "length": 48, "batch_size": 4},
    tweak={"reject_worse": False, "learning_rate": 5e-3},
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (float folder, packed folder), each made when first asked for."""
    root, known = tmp_path_factory.mktemp("families"), {}

    def make(name):
        if name not in known:
            model_type, settings = SMALL[name]
            folder = root / name
            known[name] = make_model(folder / "float", model_type, **settings), folder / "packed"
            # Whether held-out text likes what is done to random weights is chance. Here it likes the tweak, the polish, and not to step back.
            likes = cycle([1.0, 2.0, 0.5, 0.75])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_Objective, "mean", lambda *_: next(likes))
                normtweak.quantize(known[name][0], out=known[name][1], config=CONFIG)
        return known[name]

    return make


def reference(float_folder, packed_folder):
    """transformers' own float model with each weight that was quantized replaced by what its packed codes mean."""
    from transformers import AutoModelForCausalLM

    with models.quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(float_folder, dtype=torch.float32)
    parameters = dict(model.named_parameters())
    packed = normtweak.load(packed_folder)
    with torch.no_grad():
        for name, parameter in packed.named_parameters():
            if name in parameters:
                parameters[name].copy_(parameter)
        for name, module in packed.named_modules():
            if isinstance(module, PackedLinear):
                weight = module.dequantize()
                mixture, _, inside = name.partition(".experts.")
                if inside:
                    number, leaf = inside.split(".")
                    names = packed.get_submodule(f"{mixture}.experts").names
                    fused = parameters[f"{mixture}.experts.{'down_proj' if leaf == names[2] else 'gate_up_proj'}"][int(number)]
                    half = fused.shape[0] // 2
                    own = {names[0]: fused[:half], names[1]: fused[half:], names[2]: fused}[leaf]
                else:
                    own = parameters[f"{name}.weight"]
                weight = weight.t() if type(model.get_submodule(name.partition(".experts.")[0])).__name__ == "Conv1D" else weight
                # columns of inputs that are never seen, behind a ReLU, are zero
                assert (weight * own).sum() > 0.5 * weight.norm() * own.norm(), name
                own.copy_(weight)
    return model, packed


@pytest.mark.parametrize("name", SMALL)
def test_quantized_tweaked_saved_loaded_generating(made, name):
    folder, out = made(name)
    model, packed = reference(folder, out)
    blocks = packed.get_submodule(models.block_path(packed))
    left = [path for path, module in blocks.named_modules() if isinstance(module, nn.Linear)]
    assert all("shared_expert_gate" in path for path in left)
    tokens = torch.randint(2, 90, (3, 20))
    with torch.no_grad():
        expected, got = model(tokens).logits, packed(tokens).logits
    assert (got - expected).norm() < 1e-4 * expected.norm()
    assert packed.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (3, 24)
    # the norms were tweaked and polished, and nothing else that isn't packed
    before, after = tensors_of(folder), tensors_of(out)
    moved = {key for key in after if key in before and (after[key].float() - before[key]).abs().max() > 1e-3}
    float_model = models.load(folder)
    norms = {f"{path}.weight" for path, module in float_model.named_modules() if is_norm(module)}
    assert {key for key in moved if key.endswith("weight")} <= norms
    assert len(moved & norms) > len(norms) / 2


@pytest.mark.parametrize("name", SMALL)
def test_the_checkpoint_keeps_the_names_that_it_came_with(made, name):
    folder, out = made(name)
    before, after = set(tensors_of(folder)), set(tensors_of(out))
    leaves = ("qweight", "qzeros", "scales", "g_idx")
    assert {key for key in after if not key.endswith(leaves)} <= before
    assert {f"{key.removesuffix('qweight')}weight" for key in after if key.endswith("qweight")} <= before


@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon", "gemma3", "mixtral", "qwen2_moe"])
def test_transformers_loads_it_too(made, name):
    import transformers

    _, out = made(name)
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), normtweak.load(out)
    tokens = torch.randint(2, 90, (2, 20))
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)


DISCOVERED = {
    "gptj": {"rotary_dim": 8},
    "olmo2": {},
    "stablelm": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "deepseek_v3": MOE
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "head_dim": None}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
}


@pytest.mark.parametrize("model_type", DISCOVERED)
def test_models_outside_the_table_work_by_discovery(tmp_path, model_type):
    folder = make_model(tmp_path / "float", model_type, **DISCOVERED[model_type])
    assert families.find(models.ModelFolder(folder).config) is None
    normtweak.quantize(folder, out=tmp_path / "out", config=CONFIG)
    model, packed = reference(folder, tmp_path / "out")
    assert not any(isinstance(module, nn.Linear) for module in packed.get_submodule(models.block_path(packed)).modules())
    tokens = torch.randint(2, 90, (2, 20))
    with torch.no_grad():
        expected, got = model(tokens).logits, packed(tokens).logits
    assert (got - expected).norm() < 1e-4 * expected.norm()
    assert packed.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (2, 23)


def test_a_routers_correction_is_read_and_written_as_it_is(tmp_path):
    """It is a buffer, which modules are made with: zeros, and with them other experts are asked."""
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / "float", "deepseek_v3", **DISCOVERED["deepseek_v3"])
    name, correction = "model.layers.1.mlp.gate.e_score_correction_bias", torch.tensor([0.0, 4.001, 0.0, 4.002])
    tokens = torch.randint(2, 90, (2, 20))
    plain = normtweak.load(folder)(tokens).logits
    edit(folder, name, lambda _: correction)
    expected = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    for settings in ({}, {"polish": {}, "calibration": {"samples": 4, "length": 20}}):
        out = make_packed(folder, tmp_path / f"out{len(settings)}", bits=8, group_size=-1, **settings)
        assert torch.equal(tensors_of(out)[name], correction)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(normtweak.load(out, dtype=dtype).get_buffer(name), correction)
    got = normtweak.load(tmp_path / "out0")(tokens).logits
    assert (got - expected).norm() < 0.1 * (plain - expected).norm()


# The table itself


def presented(folder):
    """A float model with real weights and what can be quantized presented as nn.Linear, its blocks and its family."""
    source = models.ModelFolder(folder)
    model = source.skeleton()
    blocks = model.get_submodule(models.present_blocks(model))
    source.weights.fill(model, skip=models.tied_names(model))
    model.tie_weights()
    return model, blocks, families.find(source.config)


@pytest.mark.parametrize("name", SMALL)
def test_the_table_knows_every_norm(made, name):
    model, blocks, family = presented(made(name)[0])
    for block in blocks:
        found = {path for path, module in block.named_modules() if is_norm(module)}
        assert set(family.feeds(path for path, _ in block.named_modules())) == found
    inside = set(blocks.modules())
    outside = {path for path, module in model.named_modules() if module not in inside and is_norm(module)}
    assert outside == {path for path in (family.final_norm, family.embedding_norm) if path}


@pytest.mark.parametrize("name", SMALL)
def test_a_scale_moves_from_a_norm_to_what_it_feeds(made, name):
    """Each norm divided by s, each weight that reads it multiplied by s: the model stays. A reader missing in the table would show."""
    model, blocks, family = presented(made(name)[0])
    tokens = torch.randint(2, 90, (2, 20))
    with torch.no_grad():
        before = model(tokens).logits
        for block in blocks:
            feeds = {norm: readers for norm, readers in family.feeds(path for path, _ in block.named_modules()).items() if readers is not None}
            for path, readers in feeds.items():
                norm = block.get_submodule(path)
                offset = gain_offset(norm)
                scale = torch.rand(len(norm.weight)) + 0.5
                norm.weight.copy_((norm.weight + offset) / scale - offset)
                if getattr(norm, "bias", None) is not None:
                    norm.bias.div_(scale)
                assert readers
                for reader in readers:
                    block.get_submodule(reader).weight.mul_(scale)
        after = model(tokens).logits
    assert (after - before).norm() < 1e-4 * before.norm()
    behind = "behind" in name
    assert behind == (not feeds)


def test_every_entry_of_the_table_is_tested(made):
    tested = {model_type for model_type, _ in SMALL.values()}
    assert {t for t in ALL_TYPES if families.find(Settings(t)) is not None} == tested


class Settings:
    """A configuration that has every setting of `when` as released models mostly have it."""

    do_layer_norm_before, apply_residual_connection_post_layernorm, parallel_attn, qk_layernorm = True, False, True, False

    def __init__(self, model_type):
        self.model_type = model_type


def all_types():
    from transformers import CONFIG_MAPPING

    return list(CONFIG_MAPPING)


ALL_TYPES = all_types()
