"""The base quantizers beside GPTQ and RTN: AWQ, SmoothQuant, AutoRound, each in the loop with tweak and polish, saved and loaded."""

import importlib.util
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import normtweak
from normtweak import PackedLinear, QuantizeConfig, models, quantizers
from normtweak.folding import Fold
from normtweak.inputs import HessianCollector, Inputs, RangeCollector
from normtweak.quantizers import awq, smoothquant
from normtweak.rounding import Solver, nearest
from normtweak_kernels import dequant_gemm
from small_models import make_model
from test_families import SMALL

CALIBRATION = {"source": "random", "samples": 6, "length": 24, "batch_size": 4}


def run(model, out, **settings):
    settings = {"group_size": 32, "calibration": CALIBRATION, "compute_dtype": "float32"} | settings
    return normtweak.quantize(model, out=out, config=QuantizeConfig.preset(**settings))


def kl(folder, packed):
    """KL(float || packed) per token on text that no run has seen."""
    tokens = torch.randint(2, 90, (8, 32), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        own, exact = packed(tokens).logits.log_softmax(-1), models.load(folder)(tokens).logits.log_softmax(-1)
    return nn.functional.kl_div(own, exact, log_target=True, reduction="none").sum(-1).mean().item()


def packed_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


class Chain(nn.Module):
    """norm -> two readers; the first, times the second, -> a third: what a block's MLP is."""

    def __init__(self, k=64, hidden=96):
        super().__init__()
        self.norm, self.up, self.gate = nn.RMSNorm(k), nn.Linear(k, hidden, bias=False), nn.Linear(k, hidden, bias=False)
        self.down = nn.Linear(hidden, k, bias=False)
        self.requires_grad_(False)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        for reader in (self.up, self.gate):  # room for a scale: the channels that are large have small weights
            reader.weight[:, ::16] *= 0.1

    def forward(self, x):
        y = self.norm(x)
        return self.down(torch.relu(self.gate(y)) * self.up(y))

    def parts(self):
        linears = {name: module for name, module in self.named_children() if isinstance(module, nn.Linear)}
        folds = [Fold(self.norm, {"up": self.up, "gate": self.gate}), Fold(self.up, {"down": self.down})]
        return linears, folds


def with_outliers(tokens=400, k=64):
    """Inputs with a few channels that are far larger than the rest."""
    x = torch.randn(1, tokens, k)
    x[..., ::16] *= 30
    return x


def quantize_chain(method, x, scaled=True, **settings):
    """A chain quantized with or without scales that may move: its mean squared error with the packed linears."""
    torch.manual_seed(0)
    chain, config = Chain(), QuantizeConfig.from_dict({"method": method} | settings)
    target = chain(x)
    linears, folds = chain.parts()
    found = quantizers.find(method).quantize_block(linears, lambda sequences=None: chain(x), config, folds if scaled else [])
    with smoothquant.packed(linears, found, config.packed_activations):
        return (chain(x) - target).square().mean().item()


# LayerNorm with bias, 1 + w, one norm for attention and MLP side by side, experts, Conv1D, no scale that can move; the others are as these are, and slow.
QUICK = ("opt", "gemma2", "falcon", "mixtral", "gpt2", "bloom behind")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SMALL])
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_every_family_with_tweak_and_polish(tmp_path, name, method):
    model_type, extra = SMALL[name]
    folder = make_model(tmp_path / "float", model_type, **extra)
    run(folder, tmp_path / "out", method=method, bits=8 if method == "smoothquant" else 4, tweak={"reject_worse": False})
    model = normtweak.load(tmp_path / "out")
    assert {module.activations for module in packed_of(model).values()} == {"int8_token" if method == "smoothquant" else "auto"}
    assert kl(folder, model) < 0.1


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_the_float_output_stays_when_scales_move(method):
    chain, x = Chain(), with_outliers()
    before = chain(x)
    linears, folds = chain.parts()
    kept = {name: p.clone() for name, p in chain.named_parameters()}
    quantizers.find(method).quantize_block(linears, lambda sequences=None: chain(x), QuantizeConfig(bits=3, method=method), folds)
    torch.testing.assert_close(chain(x), before, rtol=1e-4, atol=1e-4)
    assert not any(torch.equal(chain.get_parameter(name), kept[name]) for name in ("norm.weight", "up.weight", "gate.weight"))


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_what_is_rounded_is_the_folded_weight_for_the_folded_input(method, rounding):
    """The codes are those of the block as it is afterwards, found anew from what its linears are given then."""
    chain, x = Chain(), with_outliers()
    linears, folds = chain.parts()
    config = QuantizeConfig(bits=3, method=method, rounding=rounding)
    found = quantizers.find(method).quantize_block(linears, lambda sequences=None: chain(x), config, folds)
    collector = HessianCollector(linears)
    with collector.attached():
        chain(x)
    for given_ in collector.shared():
        hessian = given_.hessian
        solver = Solver(hessian, config, "x", given_.tokens)
        for name in given_.names:
            weight = linears[name].weight
            wanted = solver.quantize(weight, config) if rounding == "gptq" else nearest(weight, config, hessian.diagonal().contiguous())
            assert (found[name].codes != wanted.codes).float().mean() < 0.02, name  # sums in another order may flip a near tie


@pytest.mark.parametrize(("bits", "group_size"), [(4, -1), (3, 32), (2, 32)])
@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
def test_awqs_scales_lower_the_error(bits, group_size, rounding):
    settings = {"bits": bits, "group_size": group_size, "symmetric": False, "rounding": rounding}
    x = with_outliers()
    ratio = quantize_chain("awq", x, **settings) / quantize_chain("awq", x, scaled=False, **settings)
    assert ratio < (0.8 if rounding == "nearest" else 1.0)


def test_awq_finds_the_exponent_of_least_error():
    """The best of a search by hand over the outputs themselves."""
    chain, x = Chain(), with_outliers()
    linears, _ = chain.parts()
    collector = HessianCollector({"up": chain.up})
    with collector.attached():
        chain(x)
    (one,) = collector.shared()
    hessian, config = one.hessian, QuantizeConfig(bits=3)
    y = chain.norm(x)[0]
    magnitude, weights = (values / values.log().mean().exp() for values in (y.square().mean(0).sqrt(), chain.up.weight.abs().mean(0)))
    errors = {}
    for with_weights in (False, True):
        for step in range(awq.STEPS):
            alpha = step / awq.STEPS
            scale = magnitude.pow(alpha) / (weights.pow(1 - alpha) if with_weights else 1)
            weight = nearest(chain.up.weight * scale, config, hessian.diagonal() / scale.square()).dequantize() / scale
            errors[with_weights, step] = ((y @ (weight - chain.up.weight).t()).square().sum() / (y @ chain.up.weight.t()).square().sum()).item()
            assert awq.output_error(one, linears, {"up": config}, scale) == pytest.approx(errors[with_weights, step], rel=1e-3)
    with_weights, best = min(errors, key=errors.get)
    assert errors[with_weights, best] < 0.7 * errors[False, 0]
    wanted = magnitude.pow(best / awq.STEPS) / (weights.pow(1 - best / awq.STEPS) if with_weights else 1)
    torch.testing.assert_close(awq.find_scale([one], linears, {"up": config}), wanted, rtol=1e-4, atol=1e-4)


def test_awq_leaves_silent_inputs_alone():
    linears, _ = Chain().parts()
    assert awq.find_scale([Inputs(["up"], 10, torch.zeros(64, 64), None)], linears, {"up": QuantizeConfig()}) is None
    assert awq.find_scale([], linears, {}) is None


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("bits", [4, 5, 8])
def test_smoothing_lowers_the_error_of_int8_activations(bits, rounding):
    x = with_outliers()
    settings = {"bits": bits, "rounding": rounding, "symmetric": bits != 5}
    ratio = quantize_chain("smoothquant", x, **settings) / quantize_chain("smoothquant", x, scaled=False, **settings)
    assert ratio < (0.5 if bits == 8 else 0.95)


def test_smoothquant_takes_the_best_exponent_or_none(monkeypatch):
    chain, x = Chain(), with_outliers()
    linears, folds = chain.parts()
    config, quantizer = QuantizeConfig(bits=8, method="smoothquant"), quantizers.find("smoothquant")
    before = {name: p.clone() for name, p in chain.named_parameters()}
    for best in (0, 5):  # the first candidate is no smoothing at all
        scores = iter([0.0 if i == best else 1.0 for i in range(1 + len(smoothquant.ALPHAS))])
        monkeypatch.setattr(smoothquant, "output_error", lambda output, target: next(scores))  # noqa: B023
        largest = RangeCollector(linears)
        with largest.attached():
            chain(x)
        wanted = smoothquant.smoothing(folds[0], largest.largest(), smoothquant.ALPHAS[best - 1]) if best else torch.ones(64)
        quantizer.quantize_block(linears, lambda sequences=None: chain(x), config, folds)
        assert list(scores) == []
        torch.testing.assert_close(chain.norm.weight, before["norm.weight"] / wanted)
        torch.testing.assert_close(chain.gate.weight, before["gate.weight"] * wanted)


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), seed=st.integers(0, 99), dead=st.booleans())
def test_smoothing_is_equation_4(alpha, seed, dead):
    torch.manual_seed(seed)
    norm, linear = nn.RMSNorm(12), nn.Linear(12, 5).requires_grad_(False)
    x = torch.rand(20, 12) + 0.1
    if dead:
        x[:, 3] = 0
    collector = RangeCollector({"l": linear})
    with collector.attached():
        linear(x[:8])
        linear(x[8:])
    largest = collector.largest()
    assert torch.equal(largest["l"], x.abs().amax(0))
    torch.testing.assert_close(collector.mean_square()["l"], x.square().mean(0))
    scale = smoothquant.smoothing(Fold(norm, {"l": linear}), largest, alpha)
    assert scale.isfinite().all() and (scale > 0).all()
    wanted = x.abs().amax(0).pow(alpha) / linear.weight.abs().amax(0).pow(1 - alpha)
    live = torch.arange(12) != 3 if dead else torch.ones(12, dtype=torch.bool)
    ratio = (scale / wanted)[live]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["smoothquant", "rtn", "gptq"])
def test_the_checkpoint_says_how_activations_enter(small_model, tmp_path, method):
    import transformers

    import normtweak.integrations.transformers

    run(small_model, tmp_path / "out", method=method, activations=None if method == "smoothquant" else "int8_token", tweak=None)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["meta"]["activations"] == "int8_token"
    tokens = torch.randint(2, 90, (2, 16))
    ours, exact = normtweak.load(tmp_path / "out"), normtweak.load(tmp_path / "out", activations="auto")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert {module.activations for module in packed_of(theirs).values()} == {"int8_token"}
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
        assert not torch.equal(ours(tokens).logits, exact(tokens).logits)
    # what the packed linear multiplies are integers, one scale for a token
    linear, x = ours.model.layers[0].mlp.up_proj, torch.randn(3, 64)
    scale = x.abs().amax(-1, keepdim=True) / 127
    rounded = (x / scale).round() * scale
    torch.testing.assert_close(linear(x), rounded @ linear.quantized().dequantize().t(), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_says_nothing_is_exact(small_model, tmp_path):
    run(small_model, tmp_path / "out", method="awq", tweak=None)
    assert "activations" not in json.loads((tmp_path / "out" / "quantize_config.json").read_text())["meta"]
    assert {module.activations for module in packed_of(normtweak.load(tmp_path / "out")).values()} == {"auto"}


def test_tweak_and_polish_see_rounded_activations(small_model, tmp_path, monkeypatch):
    """Every packed product of the run is of int8 activations, with gradients too; these go straight through the rounding."""
    modes, forward = set(), PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: (modes.add((self.activations, x.requires_grad)), forward(self, x))[1])
    run(small_model, tmp_path / "out", method="smoothquant", bits=4)
    assert modes == {("int8_token", True), ("int8_token", False)}
    linear = next(iter(packed_of(normtweak.load(tmp_path / "out")).values()))
    x = torch.randn(5, linear.in_features, requires_grad=True)
    y = dequant_gemm(x, linear.qweight, linear.scales, linear.zeros, bits=linear.bits, activations="int8_token")
    up = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, up)
    torch.testing.assert_close(grad, up @ linear.quantized().dequantize(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "smoothquant"])
def test_five_bits_are_stored_in_eight(small_model, tmp_path, method, symmetric):
    run(small_model, tmp_path / "out", method=method, bits=5, symmetric=symmetric, tweak=None, overrides=[{"pattern": "down", "bits": 4}])
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["bits"] == 8
    for name, module in packed_of(normtweak.load(tmp_path / "out")).items():
        assert module.bits == (4 if "down" in name else 8)
        if "down" in name:
            continue
        codes = module.quantized().codes.int()
        low, high = (112, 143) if symmetric else (0, 31)
        assert low <= int(codes.min()) and int(codes.max()) <= high
        assert int(codes.max()) - int(codes.min()) >= 24


def test_five_bits_err_less_than_four_and_more_than_eight():
    weight, x = torch.randn(32, 64), torch.randn(100, 64)
    errors = []
    for bits in (4, 5, 8):
        found = nearest(weight, QuantizeConfig(bits=bits))
        assert found.bits == (4 if bits == 4 else 8)
        errors.append((x @ (PackedLinear.from_weight(found).quantized().dequantize() - weight).t()).square().sum())
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_an_expert_that_few_tokens_reach(tmp_path, method):
    folder = make_model(tmp_path / "float", "qwen3_moe", num_experts=16, num_experts_per_tok=1, moe_intermediate_size=32)
    run(folder, tmp_path / "out", method=method, bits=8, calibration=CALIBRATION | {"samples": 2, "length": 8}, tweak=None)
    assert kl(folder, normtweak.load(tmp_path / "out")) < 0.1


def test_skipped_readers_take_the_scale_too(small_model, tmp_path):
    run(small_model, tmp_path / "out", method="awq", bits=3, skip=["k_proj"], tweak=None)
    layer, before = normtweak.load(tmp_path / "out").model.layers[0], models.load(small_model).model.layers[0]
    assert layer.input_layernorm.weight.dtype == torch.float32
    scale = before.input_layernorm.weight / layer.input_layernorm.weight
    assert scale.max() > 1.05 * scale.min()
    torch.testing.assert_close(layer.self_attn.k_proj.weight, before.self_attn.k_proj.weight * scale, rtol=2e-3, atol=1e-4)


def test_the_target_is_the_true_float_output(small_model, tmp_path, monkeypatch):
    """Whatever scales moved, the tweak aims at what the float model gives."""
    from normtweak import loop

    targets, tweak_block = {}, loop.tweak_block

    def spy(block, index, count, stream, target, config, seed):
        targets.setdefault((config.target_stream, index), []).append(target.clone())
        return tweak_block(block, index, count, stream, target, config, seed)

    monkeypatch.setattr(loop, "tweak_block", spy)
    for stream in ("float", "quantized"):
        for method in ("awq", "rtn"):
            run(small_model, tmp_path / f"{stream}-{method}", method=method, bits=3, tweak={"target_stream": stream}, polish=None)
    for key in (("float", 0), ("float", 1), ("quantized", 0)):
        ours, plain = targets[key]
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


# AutoRound


def test_autoround_without_its_package_is_one_line(small_model, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "auto_round" else find(name, *rest))
    wanted = r"autoround: auto-round must be installed: pip install 'normtweak\[autoround\]', got no such package"
    with pytest.raises(ValueError, match=wanted) as caught:
        run(small_model, tmp_path / "out", method="autoround")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.autoround
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "falcon", "gemma2", "bloom"])
def test_autoround_beats_rounding_and_can_be_tweaked(tmp_path, name):
    model_type, extra = SMALL[name]
    folder = make_model(tmp_path / "float", model_type, **extra)
    common = {"bits": 3, "calibration": CALIBRATION | {"samples": 12}}
    if name in ("llama", "mixtral"):
        common["overrides"] = [{"pattern": "down_proj|w2", "bits": 4, "group_size": 16}]
    losses = {}
    for method, tweak in (("autoround", None), ("rtn", None), ("autoround", {})):
        out = tmp_path / f"{method}-{tweak is None}"
        before = torch.random.get_rng_state()
        run(folder, out, method=method, tweak=tweak, rounding_iterations=60, **common)
        assert torch.equal(torch.random.get_rng_state(), before)
        losses[method, tweak is None] = kl(folder, normtweak.load(out))
    assert losses["autoround", True] < losses["rtn", True]
    assert losses["autoround", False] < 1.1 * losses["autoround", True]
