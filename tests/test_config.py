import dataclasses

import pytest

from normtweak import CalibrationConfig, QuantizeConfig, TweakConfig


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
        ({"bits": 5}, "QuantizeConfig: bits must be one of 2, 3, 4, 8, got 5"),
        ({"bits": "4"}, "QuantizeConfig: bits must be int, got '4'"),
        ({"bits": True}, "QuantizeConfig: bits must be int, got True"),
        ({"group_size": 0}, "group_size must be -1 .per channel. or 1 or more, got 0"),
        ({"method": "magic"}, "method must be one of gptq, rtn, got magic"),
        ({"damp_percent": 1.5}, "damp_percent must be a fraction"),
        ({"wheight": 1}, "QuantizeConfig: key must be one of bits, .*, got wheight"),
        ({"tweak": {"lr": 1}}, "TweakConfig: key must be one of loss, .*, got lr"),
        ({"tweak": {"loss": "l1"}}, "TweakConfig: loss must be one of channel, .*, got l1"),
        ({"calibration": {"length": 4}}, "CalibrationConfig: length must be 8 or more tokens, got 4"),
        ({"calibration": 3}, "CalibrationConfig: settings must be a table"),
        ({"seed": -1}, "seed must be 0 or more"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        QuantizeConfig.from_dict(settings)


def test_a_preset_with_some_of_the_tweak_replaced():
    paper = QuantizeConfig.preset("paper").tweak
    assert QuantizeConfig.preset("paper", tweak={"iterations": 3}).tweak == dataclasses.replace(paper, iterations=3)
    assert QuantizeConfig.preset("paper", tweak=None).tweak is None
    assert QuantizeConfig.preset("default", bits=2).tweak.learning_rate > QuantizeConfig.preset("default", bits=4).tweak.learning_rate


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
