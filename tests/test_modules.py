"""What differs by module: bits and groups, linears left alone, the output head, experts that few tokens reach."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import normtweak
from normtweak import PackedLinear, QuantizeConfig, formats, models, quantizers
from normtweak.linear import Experts, RoutedLinear, present_linears
from small_models import make_model

CALIBRATION = {"source": "random", "samples": 6, "length": 24, "batch_size": 4}


def run(model, out, **settings):
    settings = {"bits": 4, "group_size": 32, "calibration": CALIBRATION, "compute_dtype": "float32"} | settings
    return normtweak.quantize(model, out=out, config=QuantizeConfig.preset(**settings))


def packed_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_bits_and_groups_by_module(small_model, tmp_path, method):
    overrides = [{"pattern": r"layers\.1\.mlp", "bits": 8}, {"pattern": "down_proj", "bits": 2, "group_size": 16}]
    run(small_model, tmp_path / "out", method=method, overrides=overrides, skip=["k_proj", "0.self_attn.v"])
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    dynamic = settings["dynamic"]
    assert dynamic[r"-:model\.layers\.\d+\.self_attn\.k_proj$"] == {}
    model = normtweak.load(tmp_path / "out")
    packed = packed_of(model)
    assert len(packed) == 14 - 3
    for name, module in packed.items():
        expected = (8, 32) if "layers.1.mlp" in name else (2, 16) if "down_proj" in name else (4, 32)
        assert (module.bits, module.group_size) == expected
        assert (settings | (peers_reading(dynamic, name) or {}))["bits"] == module.bits
    left = {name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)}
    assert left == {"0.self_attn.k_proj", "1.self_attn.k_proj", "0.self_attn.v_proj"}
    assert all(peers_reading(dynamic, f"model.layers.{name}") is False for name in left)
    assert set(settings["modules_to_not_convert"]) == {f"model.layers.{name}" for name in left} | {"lm_head"}
    before = load_file(small_model / "model.safetensors")
    for name in left:
        assert torch.equal(model.model.layers.get_submodule(name).weight, before[f"model.layers.{name}.weight"].half().float())


def peers_reading(dynamic, name):
    """How GPTQModel and vLLM read `dynamic`."""
    for pattern, own in dynamic.items():
        if re.match(re.sub(r"^[-+]:", "", pattern), name):
            return False if pattern.startswith("-:") else own
    return None


def test_dynamic_as_peers_write_it():
    settings = {"bits": 4, "group_size": 128, "dynamic": {r".*\.18\..*gate.*": {"bits": 8}, r"+:.*down.*": {"group_size": 32}, r"-:.*\.20\..*": {}}}
    form = formats.open_format(settings | {"quant_method": "gptq"})
    read = {name: form.scheme(name) for name in ("layers.18.mlp.gate_proj", "layers.20.down", "layers.20.up", "layers.1.up", "down.x")}
    assert {name: own and (own.bits, own.group_size) for name, own in read.items()} == {
        "layers.18.mlp.gate_proj": (8, 128),
        "layers.20.down": (4, 32),
        "layers.20.up": None,
        "layers.1.up": (4, 128),
        "down.x": (4, 32),
    }
    with pytest.raises(ValueError, match="load: dynamic must have regular expressions for keys, got '\\*'"):
        formats.open_format({"quant_method": "gptq", "dynamic": {"*": {}}})


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_transformers_loads_mixed_precision(tmp_path, model_type):
    import transformers

    folder = make_model(tmp_path / "float", model_type)
    overrides = [{"pattern": "c_fc|up_proj", "bits": 8, "group_size": 16}]
    run(folder, tmp_path / "out", overrides=overrides, skip=[r"0\..*(c_attn|q_proj)"], lm_head=True)
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), normtweak.load(tmp_path / "out")
    assert packed_of(theirs).keys() == packed_of(ours).keys()
    assert {module.bits for module in packed_of(ours).values()} == {4, 8}
    tokens = torch.randint(2, 90, (2, 16))
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)


def test_a_skipped_conv1d_keeps_its_layout(tmp_path):
    folder = make_model(tmp_path / "float", "gpt2", vocab_size=103)
    run(folder, tmp_path / "out", skip=["c_attn"], tweak=None)
    stored = {name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()}
    before = load_file(folder / "model.safetensors")
    name = "transformer.h.1.attn.c_attn.weight"
    assert stored[name].shape == (64, 192)
    assert torch.equal(stored[name], before[name].half())
    model = normtweak.load(tmp_path / "out")
    linear, x = model.transformer.h[1].attn.c_attn, torch.randn(3, 64)
    torch.testing.assert_close(linear(x), x @ before[name].half().float() + before[name.replace("weight", "bias")].half().float())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_the_output_head(tmp_path, tied, method):
    folder = make_model(tmp_path / "float", tie_word_embeddings=tied)
    run(folder, tmp_path / "out", method=method, lm_head=True, overrides=[{"pattern": "lm_head", "bits": 8}])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["lm_head"] is True
    assert config["tie_word_embeddings"] is False
    model, before = normtweak.load(tmp_path / "out"), models.load(folder)
    assert model.lm_head.bits == 8
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight.half().float())
    error = model.lm_head.quantized().dequantize() - before.lm_head.weight
    assert 0 < error.norm() < 0.01 * before.lm_head.weight.norm()
    tokens = torch.randint(2, 90, (2, 16))
    assert model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (2, 20)


def test_gptq_of_the_head_is_made_for_what_reaches_it(tmp_path):
    folder = make_model(tmp_path / "float")
    losses = {}
    tokens = torch.randint(2, 90, (32, 24))
    for method in ("gptq", "rtn"):
        config = QuantizeConfig(bits=2, group_size=32, symmetric=False, method=method, clip_steps=0, tweak=None, compute_dtype="float32")
        config = QuantizeConfig.from_dict(config.to_dict() | {"lm_head": True, "overrides": [{"pattern": "layers", "bits": 8}]})
        normtweak.quantize(folder, out=tmp_path / method, config=config, tokens=tokens)
        with torch.no_grad():
            losses[method] = (normtweak.load(tmp_path / method)(tokens).logits - models.load(folder)(tokens).logits).square().mean().item()
    assert losses["gptq"] < 0.8 * losses["rtn"]


def test_sizes_by_module_are_as_announced(small_model, tmp_path, monkeypatch):
    from normtweak import pipeline

    sizes, check = [], pipeline._Plan.check_disk
    monkeypatch.setattr(pipeline._Plan, "check_disk", lambda self, out: (sizes.append(self.packed_size()), check(self, out)))
    overrides = [{"pattern": "mlp", "bits": 8, "group_size": 16}]
    report = run(small_model, tmp_path / "out", method="rtn", tweak=None, overrides=overrides, skip=["q_proj"], lm_head=True)
    headers = sum(int.from_bytes(file.read_bytes()[:8], "little") + 8 for file in (tmp_path / "out").glob("*.safetensors"))
    assert report.packed_size - headers == pytest.approx(sizes[0], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"skip": ["gate_prj"]},
            "quantize: skip must be patterns found in a linear's path .as in model.layers.0.self_attn.q_proj., got 'gate_prj', found in none",
        ),
        ({"overrides": [{"pattern": "lm_head", "bits": 8}]}, "overrides must be patterns found in a linear's path .*, got 'lm_head', found in none"),
        ({"skip": ["proj"]}, "quantize: skip must be patterns that leave some linear to be quantized"),
        (
            {"overrides": [{"pattern": "down", "group_size": 64}]},
            "group_size must be a divisor of model.layers.0.mlp.down_proj's 96 input features, got 64",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model(small_model, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        run(small_model, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


# Experts


def fused_experts():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=5)
    config._experts_implementation = "eager"
    fused = MixtralExperts(config)
    for parameter in fused.parameters():
        nn.init.normal_(parameter)
    return fused


def test_experts_give_what_fused_ones_give():
    holder = nn.Module()
    holder.experts = fused = fused_experts()
    present_linears(holder, ("w1", "w3", "w2"))
    assert isinstance(holder.experts, Experts)
    gate, up = fused.gate_up_proj.chunk(2, 1)
    weights = {f"{e}.{name}.weight": w[e] for name, w in (("w1", gate), ("w3", up), ("w2", fused.down_proj)) for e in range(5)}
    holder.experts.load_state_dict(weights, assign=True)
    x, index = torch.randn(30, 16), torch.rand(30, 5).topk(2).indices.clamp(max=3)  # none for the last
    share = torch.rand(30, 2)
    torch.testing.assert_close(holder.experts(x, index, share), fused(x, index, share), rtol=1e-4, atol=1e-4)


def test_experts_of_another_layout_are_refused_in_one_line(tmp_path):
    folder = make_model(tmp_path / "float", "gpt_oss", num_local_experts=4)
    with pytest.raises(ValueError, match=r"model: the weights of mlp.experts .GptOssExperts. must be gate_up_proj \[E, 2I, H\] and") as caught:
        run(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", ["olmoe", "phimoe"])
def test_mixtures_outside_the_table(tmp_path, model_type):
    folder = make_model(tmp_path / "float", model_type, num_experts=4, num_local_experts=4, num_experts_per_tok=2)
    run(folder, tmp_path / "out")
    model = normtweak.load(tmp_path / "out")
    assert len([name for name in packed_of(model) if "experts" in name]) == 2 * 4 * 3
    tokens = torch.randint(2, 90, (2, 16))
    with torch.no_grad():
        own, exact = model(tokens).logits.log_softmax(-1), models.load(folder)(tokens).logits.log_softmax(-1)
    assert nn.functional.kl_div(own, exact, log_target=True, reduction="none").sum(-1).mean() < 0.1


def routed(k, n=24):
    return {"up": RoutedLinear(k, n, bias=False)}


def test_an_expert_that_few_tokens_reach_is_rounded_and_named(caplog):
    linears = {"0.up": RoutedLinear(96, 24), "1.up": RoutedLinear(96, 24), "2.up": RoutedLinear(96, 24)}
    x = torch.randn(2, 96)
    config = QuantizeConfig(group_size=32)
    with caplog.at_level(logging.WARNING):
        found = quantizers.find("gptq").quantize_block(linears, lambda: (linears["0.up"](torch.randn(200, 96)), linears["1.up"](x)), config)
    assert "were routed to 1.up (2 of 3), 2.up (0 of 3); rounded to nearest" in caplog.text
    plain = quantizers.find("rtn").quantize_block(linears, lambda: None, config)
    for name in ("1.up", "2.up"):
        assert torch.equal(found[name].codes, plain[name].codes)
    assert not torch.equal(found["0.up"].codes, plain["0.up"].codes)


@pytest.mark.parametrize("share", [1 / 32, 1 / 4, 1 / 2, 1, 2])
def test_an_experts_few_tokens_do_no_harm(share):
    """On tokens that it has not seen, GPTQ from few tokens loses less than rounding; by the plain Hessian of these it would lose up to twice as much."""
    k = 128
    mix = torch.diag(torch.arange(1, k + 1).float().pow(-0.15)) @ torch.linalg.qr(torch.randn(k, k))[0]
    linears = routed(k, 96)
    weight, seen, unseen = linears["up"].weight, torch.randn(int(share * k), k) @ mix, torch.randn(4000, k) @ mix
    config = QuantizeConfig(bits=4, group_size=32)
    losses = {}
    for method in ("gptq", "rtn"):
        found = quantizers.find(method).quantize_block(linears, lambda: linears["up"](seen), config)["up"]
        losses[method] = (unseen @ (weight - found.dequantize()).t()).square().sum()
    assert losses["gptq"] < losses["rtn"]
