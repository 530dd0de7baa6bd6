"""From format to format, loss-free, and the card beside it."""

import json
from importlib import import_module

import pytest
import torch

import normtweak
from normtweak import QuantizeConfig, card
from normtweak.linear import PackedLinear
from small_models import edit, make_model, make_packed, scattered, tensors_of


def equal(a, b):
    a, b = tensors_of(a), tensors_of(b)
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def packed_of(folder):
    return {name: module for name, module in normtweak.load(folder).named_modules() if isinstance(module, PackedLinear)}


MIXED = {"overrides": [{"pattern": "down_proj", "bits": 8, "group_size": 16}, {"pattern": r"1\.mlp\.up", "bits": 3}], "skip": ["k_proj"]}


@pytest.mark.parametrize("settings", [{}, {"bits": 2, "symmetric": False}, {"bits": 3, "group_size": -1}, MIXED, {"lm_head": True}])
def test_there_and_back(small_model, tmp_path, settings):
    first = make_packed(small_model, tmp_path / "first", **settings)
    normtweak.convert(first, out=tmp_path / "other", format="compressed-tensors")
    written = json.loads((first / "quantize_config.json").read_text())["checkpoint_format"]
    size = normtweak.convert(tmp_path / "other", out=tmp_path / "back", format=written)
    assert equal(first, tmp_path / "back")
    assert size == sum(tensor.nbytes for tensor in tensors_of(first).values())
    ours, theirs = packed_of(first), packed_of(tmp_path / "other")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name].qweight, theirs[name].qweight)
        assert torch.equal(ours[name].scales, theirs[name].scales)
        assert ours[name].zeros is theirs[name].zeros is None or torch.equal(ours[name].zeros, theirs[name].zeros)
    assert not (tmp_path / "other" / "quantize_config.json").exists()
    kept = [path.name for path in first.glob("*") if path.suffix != ".safetensors" and path.name not in ("config.json", "README.md")]
    assert "normtweak.json" in kept and "tokenizer.json" in kept
    assert all(
        (tmp_path / "back" / name).read_bytes() == (first / name).read_bytes() for name in kept if "quantize" not in name and "index" not in name
    )
    settings = [json.loads((folder / "config.json").read_text()) for folder in (first, tmp_path / "back")]
    own = [config.pop("quantization_config") for config in settings]
    assert settings[0] == settings[1]
    assert all(own[0][key] == own[1][key] for key in own[0] if key not in ("meta", "dynamic", "modules_to_not_convert"))


@pytest.mark.parametrize(("model_type", "sizes"), [("gpt2", {}), ("bloom", {}), ("mixtral", {"num_local_experts": 2})])
def test_other_families(tmp_path, model_type, sizes):
    """Conv1D, names that differ from today's modules, experts."""
    first = make_packed(make_model(tmp_path / "float", model_type, **sizes), tmp_path / "first", bits=3)
    normtweak.convert(first, out=tmp_path / "other", format="compressed-tensors")
    normtweak.convert(tmp_path / "other", out=tmp_path / "back", format="gptq")
    assert equal(first, tmp_path / "back")
    assert packed_of(tmp_path / "other").keys() == packed_of(first).keys()


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "compressed-tensors"])
def test_quantize_writes_each_format(small_model, tmp_path, name):
    plain = make_packed(small_model, tmp_path / "plain")
    same = make_packed(small_model, tmp_path / "same", format=name)
    normtweak.convert(plain, out=tmp_path / "converted", format=name)
    assert equal(same, tmp_path / "converted")


def test_what_a_format_can_not_hold_is_refused_before_writing(small_model, tmp_path, monkeypatch):
    def refused(folder, name, message):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match=message) as caught, monkeypatch.context() as patch:
            patch.setattr(import_module("normtweak.convert"), "CheckpointWriter", None)
            normtweak.convert(folder, out=tmp_path / "out", format=name)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.iterdir()) == before

    zeros = make_packed(small_model, tmp_path / "zeros", bits=2, symmetric=False)
    edit(zeros, "model.layers.1.mlp.up_proj.qzeros", lambda words: words & ~3)
    refused(zeros, "gptq", r"formats: model.layers.1.mlp.up_proj must be without a zero point of 0 for format gptq")
    folder = make_packed(small_model, tmp_path / "ordered")
    scattered(folder)
    refused(folder, "compressed-tensors", "formats: model.layers.0.mlp.up_proj must be of groups that lie side by side")
    refused(folder, "awq", "formats: format must be one of gptq, gptq_v2, compressed-tensors, got awq")
    refused(small_model, "gptq", "load: .* must be a packed checkpoint, got a float model")
    normtweak.convert(folder, out=tmp_path / "v2", format="gptq_v2")
    assert json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    normtweak.convert(tmp_path / "v2", out=tmp_path / "v1", format="gptq")
    assert equal(folder, tmp_path / "v1")


def test_version_1_and_asymmetric_codes_are_refused_by_the_configuration():
    with pytest.raises(ValueError, match=r"QuantizeConfig: format must be auto, gptq_v2 or compressed-tensors for asymmetric codes .*, got gptq"):
        QuantizeConfig(symmetric=False, format="gptq")
    assert QuantizeConfig(symmetric=False).written_format == "gptq_v2"
    assert QuantizeConfig().written_format == "gptq"


def test_the_card(small_model, tmp_path):
    import yaml

    folder = make_packed(small_model, tmp_path / "packed", format="compressed-tensors", bits=2)
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == small_model.name
    assert front["tags"] == ["normtweak", "compressed-tensors", "2-bit"]
    assert front["quantization"] == {"format": "compressed-tensors", "bits": 2, "group_size": 32, "symmetric": True}
    assert str(small_model.parent) not in text
    recipe = json.loads((folder / "normtweak.json").read_text())
    assert recipe["sizes"]["packed"] == sum(tensor.nbytes for tensor in tensors_of(folder).values())
    assert f"{recipe['sizes']['packed'] / 1e6:.1f} MB" in body
    assert "What was measured" not in body
    card.add_scores(folder, {"some/text.txt": {"perplexity": 12.3456, "kl": 0.5}}, str(small_model))
    assert f"- perplexity on text.txt: 12.346, KL 0.5000 to {small_model.name}\n" in (folder / "README.md").read_text()
    normtweak.convert(folder, out=tmp_path / "gptq", format="gptq")
    text = (tmp_path / "gptq" / "README.md").read_text()
    assert "12.346" in text and "format: gptq" in text


def test_the_card_says_what_was_done(small_model, tmp_path):
    """Not what was asked for: no text where none was looked at, given tokens as such, and what was not kept."""
    assert "tokens" not in (make_packed(small_model, tmp_path / "plain") / "README.md").read_text()
    tokens = torch.randint(2, 90, (3, 16))
    given = ", from 48 given tokens, seed 0"
    config = normtweak.QuantizeConfig.preset(method="rtn", polish={"min_gain": 0.99})
    normtweak.quantize(small_model, out=tmp_path / "out", config=config, tokens=tokens)
    body = (tmp_path / "out" / "README.md").read_text()
    assert "- codes: RTN\n" in body
    assert f"learning rate 0.0003{given}; " in body
    assert f"next-token distribution{given}; not kept\n" in body
    recipe = json.loads((tmp_path / "out" / "normtweak.json").read_text())
    for rates, undone, fate in (([3e-4, 0.0], False, "kept in 1 of 2 blocks"), ([3e-4, 3e-4], True, "undone, as the polish found")):
        blocks = [block | {"rate": rate} for block, rate in zip(recipe["blocks"], rates, strict=True)]
        changed = recipe | {"blocks": blocks, "polish": recipe["polish"] | {"undone": undone}}
        assert f"; {fate}\n" in card.render(changed, {"quant_method": "gptq", "bits": 4})
    report = normtweak.tweak(tmp_path / "plain", float_model=small_model, out=tmp_path / "later", tokens=tokens)
    assert report.calibration is None
    assert f"(`normtweak tweak`){given}\n" in (tmp_path / "later" / "README.md").read_text()


def test_somebody_elses_card_is_left_alone(small_model, tmp_path):
    folder = make_packed(small_model, tmp_path / "packed")
    (folder / "README.md").write_text("# mine\n")
    normtweak.convert(folder, out=tmp_path / "out", format="gptq_v2")
    assert (tmp_path / "out" / "README.md").read_text() == "# mine\n"
    with pytest.raises(ValueError, match="card: .* must be a folder that normtweak wrote, got another"):
        card.check_has_card(tmp_path / "out")
