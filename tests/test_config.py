import dataclasses

import pytest

from normtweak import CalibrationConfig, ModuleOverride, QuantizeConfig, TweakConfig


def test_round_trip():
    config = QuantizeConfig.preset("paper", bits=2, group_size=64, symmetric=False, calibration={"samples": 4})
    assert QuantizeConfig.from_dict(config.to_dict()) == config


def test_paper_preset_is_algorithm_1_to_the_letter():
    tweak = QuantizeConfig.preset("paper").tweak
    assert (tweak.loss, tweak.target_stream, tweak.step, tweak.iterations, tweak.skip_first_token) == ("channel", "quantized", "absolute", 1, False)
    assert tweak.depth_scale > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 6}, "QuantizeConfig: bits must be one of 2, 3, 4, 5, 8, got 6"),
        ({"bits": "4"}, "QuantizeConfig: bits must be int, got '4'"),
        ({"bits": True}, "QuantizeConfig: bits must be int, got True"),
        ({"group_size": 0}, "group_size must be -1 .per channel. or 1 or more, got 0"),
        ({"method": "magic"}, "method must be one of gptq, rtn, awq, smoothquant, autoround, got magic"),
        ({"rounding": "gptq"}, "rounding must be nearest for gptq, which rounds in its own way, got gptq"),
        ({"method": "awq", "rounding": "up"}, "rounding must be one of nearest, gptq, got up"),
        ({"rounding_iterations": 0}, "rounding_iterations must be 1 or more, got 0"),
        ({"activations": "int8"}, "activations must be one of None, auto, int8_token, got int8"),
        ({"method": "autoround", "lm_head": True}, "lm_head must be off with autoround, which learns whole blocks, got on"),
        ({"damp_percent": 1.5}, "damp_percent must be a fraction"),
        ({"wheight": 1}, "QuantizeConfig: key must be one of bits, .*, got wheight"),
        ({"tweak": {"lr": 1}}, "TweakConfig: key must be one of loss, .*, got lr"),
        ({"tweak": {"loss": "l1"}}, "TweakConfig: loss must be one of channel, .*, got l1"),
        ({"calibration": {"length": 4}}, "CalibrationConfig: length must be 8 or more tokens, got 4"),
        ({"calibration": 3}, "CalibrationConfig: settings must be a table"),
        ({"seed": -1}, "seed must be 0 to 4294967295, got -1"),
        ({"seed": 2**32}, "seed must be 0 to 4294967295, got 4294967296"),
        ({"overrides": [{"pattern": "("}]}, "ModuleOverride: pattern must be a regular expression, got '\\('"),
        ({"overrides": [{"pattern": "", "bits": 4}]}, "ModuleOverride: pattern must be a regular expression, got an empty one"),
        ({"overrides": [{"pattern": "x", "bits": 6}]}, "ModuleOverride: bits must be one of 2, 3, 4, 5, 8, got 6"),
        ({"overrides": [{"pattern": "x", "group_size": 0}]}, "ModuleOverride: group_size must be -1"),
        ({"overrides": [{"pattern": "x"}]}, "bits, group_size must be given, one of them at least, got neither"),
        ({"overrides": [{"pattern": "x", "wits": 4}]}, "ModuleOverride: key must be one of pattern, bits, group_size, got wits"),
        ({"overrides": "x"}, "QuantizeConfig: overrides must be a list, got 'x'"),
        ({"skip": ["+"]}, "QuantizeConfig: skip must be a regular expression, got '\\+'"),
        ({"skip": [3]}, "QuantizeConfig: skip must be str, got 3"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantizeConfig.from_dict(settings)


def test_settings_of_one_module():
    overrides = [
        {"pattern": "down_proj$", "bits": 8, "group_size": 32},
        {"pattern": r"layers\.1\.", "bits": 3},
        {"pattern": "proj", "group_size": 16},
    ]
    config = QuantizeConfig.from_dict({"bits": 4, "group_size": 64, "overrides": overrides, "skip": ["k_proj"]})
    assert QuantizeConfig.from_dict(config.to_dict()) == config
    found = {
        name: config.for_module(name) for name in ("layers.1.down_proj", "layers.1.up_proj", "layers.0.up_proj", "layers.0.gate", "layers.1.k_proj")
    }
    assert {name: own and (own.bits, own.group_size) for name, own in found.items()} == {
        "layers.1.down_proj": (8, 32),
        "layers.1.up_proj": (3, 64),
        "layers.0.up_proj": (4, 16),
        "layers.0.gate": (4, 64),
        "layers.1.k_proj": None,
    }


def test_an_override_in_a_word():
    assert ModuleOverride.parse("mlp.down_proj=4:64") == ModuleOverride("mlp.down_proj", 4, 64)
    assert ModuleOverride.parse("a=b=3") == ModuleOverride("a=b", 3)
    assert ModuleOverride.parse("x=4:-1").group_size == -1
    for text in ("x", "x=", "=4", "x=four", "x=4:", "x=4:64:2"):
        with pytest.raises(ValueError, match=r"ModuleOverride: text must be PATTERN=BITS or PATTERN=BITS:GROUP_SIZE, got"):
            ModuleOverride.parse(text)


def test_a_preset_with_some_of_the_tweak_replaced():
    paper = QuantizeConfig.preset("paper").tweak
    assert QuantizeConfig.preset("paper", tweak={"iterations": 3}).tweak == dataclasses.replace(paper, iterations=3)
    assert QuantizeConfig.preset("paper", tweak=None).tweak is None
    coarse, fine = (QuantizeConfig.preset("default", bits=bits, polish=None).tweak for bits in (2, 3))
    assert coarse.learning_rate > fine.learning_rate


def test_the_default_preset_tweaks_block_by_block_where_that_gains_something():
    tweaked = {
        (method, bits): QuantizeConfig.preset(method=method, bits=bits).tweak is not None for method in ("gptq", "rtn") for bits in (2, 3, 4, 8)
    }
    assert tweaked == {key: key[0] == "rtn" for key in tweaked}
    assert QuantizeConfig.preset(bits=4).polish is not None
    assert QuantizeConfig.preset(bits=2, polish={"extra_samples": 0}).tweak is not None
    for bits in (2, 3, 4):
        alone = QuantizeConfig.preset(bits=bits, polish=None)
        assert (alone.tweak is not None, alone.polish) == (True, None)
    both = QuantizeConfig.preset(bits=4, tweak={"iterations": 2})
    assert (both.tweak.iterations, both.polish is not None) == (2, True)


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of default, paper, got best"):
        QuantizeConfig.preset("best")


def test_frozen():
    with pytest.raises(AttributeError):
        QuantizeConfig().bits = 3


def test_whole_numbers_pass_as_floats():
    assert TweakConfig(depth_scale=1.0) == QuantizeConfig.from_dict({"tweak": {"depth_scale": 1}}).tweak
    assert QuantizeConfig.from_dict({"tweak": None}).tweak is None
    assert CalibrationConfig().source == "generated"


@pytest.mark.parametrize(("source", "documents"), [("hf:rows.json", True), ("LINES.JSONL", True), ("lines.txt", False)])
def test_what_holds_documents(source, documents):
    assert CalibrationConfig(source=source).documents is documents
