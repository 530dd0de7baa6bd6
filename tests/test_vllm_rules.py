"""What the vLLM plugin decides, without vLLM."""

import pytest

from normtweak.integrations.vllm_rules import check_settings, claims, packings, part_names, version_problem

OURS = {"quant_method": "gptq", "bits": 4, "group_size": 64, "meta": {"quantizer": ["normtweak:0.1.0"]}}
QKV = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


@pytest.mark.parametrize("version", ["0.30.0", "0.31.2", "0.32.0+cpu", "0.32.1rc1"])
def test_versions_that_the_plugin_is_for(version):
    assert version_problem(version) is None


@pytest.mark.parametrize("version", ["0.29.9", "0.33.0", "1.0.0", "0.3.2", "unknown"])
def test_other_versions_are_one_line(version):
    assert version_problem(version) == f"vllm: version must be 0.30 to 0.32 for normtweak's plugin, got {version}"


@pytest.mark.parametrize(
    ("settings", "asked", "taken"),
    [
        (OURS, None, True),
        (OURS, "normtweak", True),
        (OURS, "gptq", False),  # the user's word
        (OURS | {"quant_method": "normtweak", "meta": {}}, None, True),
        (OURS | {"meta": {"quantizer": ["gptqmodel:7.6.0"]}}, None, False),
        (OURS | {"meta": {"quantizer": "gptqmodel:7.6.0"}, "bits": 3}, None, True),
        (OURS | {"meta": None, "bits": 2}, None, True),
        (OURS | {"meta": None}, None, False),
        (OURS | {"meta": "another tool's"}, None, False),
        (OURS | {"meta": {"quantizer": 3}}, None, False),
        (OURS | {"meta": None}, "normtweak", True),
        (OURS | {"meta": None, "dynamic": {"-:.*k_proj": {}, "+:.*down_proj": {"bits": 3}}}, None, True),
        ({"quant_method": "awq", "bits": 4}, None, False),
        ({"quant_method": "awq", "bits": 4}, "normtweak", False),
        ({"quant_method": "compressed-tensors"}, None, False),
    ],
)
def test_which_checkpoints_are_taken(settings, asked, taken):
    assert claims(settings, asked) is taken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "quantization_config: bits must be one of 2, 3, 4, 8, got 5"),
        ({"bits": None}, "quantization_config: bits must be one of 2, 3, 4, 8, got None"),
        ({"group_size": 0}, "quantization_config: group_size must be -1 or positive, got 0"),
        ({"checkpoint_format": "marlin"}, "quantization_config: checkpoint_format must be gptq or gptq_v2, got marlin"),
        ({"desc_act": True, "meta": {}}, "quantization_config: desc_act must be false"),
        ({"meta": {"activations": "int4"}}, "quantization_config: activations must be one of auto, int16, int8, int8_token, got int4"),
        ({"dynamic": {"+:.*down_proj": {"bits": 6}}}, "quantization_config: bits must be one of 2, 3, 4, 8, got 6"),
    ],
)
def test_settings_that_can_not_be_run(change, message):
    check_settings(OURS)
    with pytest.raises(ValueError, match=message):
        check_settings(OURS | change)


def test_settings_that_can():
    check_settings(OURS | {"desc_act": True, "group_size": -1})
    check_settings(OURS | {"checkpoint_format": "gptq_v2", "dynamic": {"-:.*v_proj": {}, "+:.*q_proj": {"bits": 8, "group_size": -1}}})


def test_parts_of_merged_linears():
    merged = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert part_names("model.layers.0.self_attn.qkv_proj", merged) == QKV
    assert part_names("model.layers.0.mlp.down_proj", merged) == ["model.layers.0.mlp.down_proj"]
    assert part_names("lm_head", merged) == ["lm_head"]


def test_how_linears_are_packed():
    assert packings(OURS, QKV, None) == [(4, 64)] * 3
    own = OURS | {"dynamic": {"+:.*(?:v_proj)": {"bits": 8, "group_size": 32}, "-:.*(?:lm_head)": {}}}
    assert packings(own, QKV, frozenset(QKV)) == [(4, 64), (4, 64), (8, 32)]
    assert packings(own, ["lm_head"], frozenset(["lm_head"])) == [None]
    assert packings(OURS, ["model.layers.0.mlp.gate"], frozenset(QKV)) == [None]  # no codes in the checkpoint
    assert packings(OURS | {"modules_to_not_convert": QKV}, QKV, None) == [None] * 3
    message = r"q_proj, .*v_proj must be all packed or all in floating point, as vLLM merges them, got no codes for model.layers.0.self_attn.k_proj"
    with pytest.raises(ValueError, match=message):
        packings(OURS | {"dynamic": {"-:.*k_proj": {}}}, QKV, None)
