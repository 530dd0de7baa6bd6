import copy
import dataclasses
import logging

import pytest
import torch
from torch import nn

from normtweak import QuantizeConfig, quantizers
from normtweak.activations import Passes
from normtweak.inputs import HessianCollector
from normtweak.rounding import Solver, inverse_factor


def correlated(tokens, k):
    return torch.randn(tokens, k) @ (torch.eye(k) + 0.5 * torch.randn(k, k) / k**0.5) * torch.linspace(0.1, 3, k)


def objective(weight, quantized, x):
    return (x.double() @ (weight.double() - quantized.double()).t()).square().sum().item()


@pytest.mark.parametrize("k", [1, 7, 96])
def test_inverse_factor(k):
    x = correlated(4 * k, k)
    hessian = x.t() @ x / len(x)
    factor = inverse_factor(hessian, 0.01, "x")
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(k)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close((factor.t() @ factor).double() @ damped, torch.eye(k, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_failing_cholesky_raises_the_damping_and_says_so(caplog):
    hessian = torch.diag(torch.tensor([1.0, 1.0, -0.05]))
    with caplog.at_level(logging.WARNING):
        factor = inverse_factor(hessian, 0.01, "block 3 q_proj")
    assert "the Hessian of block 3 q_proj is not positive definite with damping 0.01; trying 0.1" in caplog.text
    assert torch.isfinite(factor).all()


def test_hopeless_hessian_is_an_error():
    with pytest.raises(ValueError, match="gptq: the Hessian of x must be positive definite"):
        inverse_factor(torch.diag(torch.tensor([1.0, -5.0])), 0.01, "x")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_beats_rounding_on_its_own_objective(bits, group_size, symmetric, act_order):
    n, k = 40, 96
    x, linear = correlated(512, k), nn.Linear(k, n, bias=False)
    shared = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "act_order": act_order, "clip_steps": 0, "block_size": 32}
    config = QuantizeConfig.from_dict(shared)
    gptq = quantizers.find("gptq").quantize_block({"l": linear}, lambda: linear(x), config)["l"]
    rtn = quantizers.find("rtn").quantize_block({"l": linear}, lambda: None, config)["l"]
    assert gptq.group_size == (k if group_size == -1 else group_size)
    assert int(gptq.codes.max()) < 2**bits
    assert objective(linear.weight, gptq.dequantize(), x) < objective(linear.weight, rtn.dequantize(), x)


def test_weights_on_the_grid_come_back_exactly():
    n, k = 12, 64
    codes = torch.randint(0, 16, (n, k))
    codes[:, 0], codes[:, 1] = 0, 15
    weight = (codes - 8) * 0.125
    linear = nn.Linear(k, n, bias=False)
    linear.weight.data.copy_(weight)
    x = torch.randn(200, k)
    config = QuantizeConfig(symmetric=False, clip_steps=0)
    for method in ("gptq", "rtn"):
        result = quantizers.find(method).quantize_block({"l": linear}, lambda: linear(x), config)["l"]
        torch.testing.assert_close(result.dequantize(), weight)


def test_block_size_does_not_change_the_result():
    x = correlated(300, 80)
    solver = Solver(x.t() @ x / len(x), QuantizeConfig(bits=3), "x")
    weight = torch.randn(24, 80)
    whole, parts = (solver.quantize(weight, QuantizeConfig(bits=3, block_size=size)) for size in (80, 16))
    assert (whole.codes != parts.codes).float().mean() < 0.02  # sums in another order may flip a near tie


def test_dead_inputs_get_zero_weights():
    x = torch.randn(100, 16)
    x[:, 3] = 0
    linear = nn.Linear(16, 8, bias=False)
    result = quantizers.find("gptq").quantize_block({"l": linear}, lambda: linear(x), QuantizeConfig(bits=8))["l"]
    assert result.dequantize()[:, 3].abs().max() == 0
    assert objective(linear.weight, result.dequantize(), x) < 1e-2


def test_linears_with_one_input_share_a_hessian():
    q, k, o = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)
    collector = HessianCollector({"q": q, "k": k, "o": o})
    batches = [torch.randn(3, 5, 8) for _ in range(4)]
    with collector.attached():
        for x in batches:
            k(x)
            o(q(x))
    shared = {tuple(inputs.names): inputs.hessian for inputs in collector.shared()}
    assert set(shared) == {("q", "k"), ("o",)}
    tokens = torch.cat(batches).flatten(0, 1)
    torch.testing.assert_close(shared["q", "k"], tokens.t() @ tokens / len(tokens))


def test_bfloat16_inputs_give_a_positive_definite_hessian():
    x = torch.randn(64, 512, 32).bfloat16() + 4
    linear = nn.Linear(32, 32, dtype=torch.bfloat16)
    collector = HessianCollector({"l": linear})
    with collector.attached():
        for batch in x:
            linear(batch)
    (inputs,) = collector.shared()
    hessian = inputs.hessian
    exact = (x.double().flatten(0, 1).t() @ x.double().flatten(0, 1)) / (64 * 512)
    assert (hessian.double() - exact).abs().max() / exact.abs().max() < 1e-5
    assert torch.linalg.eigvalsh(hessian.double()).min() > 0


class TwoStreams(Passes):
    """Passes through a block that is given hidden states and nothing else."""

    def __init__(self, block, x, exact=None):
        self.block, self.x, self.exact = block, x, exact

    @property
    def has_float(self):
        return self.exact is not None

    batches = 1

    def __call__(self):
        self.block(self.x)

    def until(self, modules):
        self()

    def of_float(self):
        self.block(self.exact)


def test_each_linear_is_quantized_on_what_the_quantized_ones_before_it_give():
    block = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).requires_grad_(False)
    x, linears, before = correlated(400, 32), {"up": block[0], "down": block[2]}, copy.deepcopy(block.state_dict())
    config = QuantizeConfig(bits=2, symmetric=False, group_size=16, correction=0.0)
    found = quantizers.find("gptq").quantize_block(linears, TwoStreams(block, x), config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    at_once = quantizers.find("gptq").quantize_block(linears, TwoStreams(block, x), dataclasses.replace(config, sequential=False))
    assert torch.equal(found["up"].codes, at_once["up"].codes)
    assert not torch.equal(found["down"].codes, at_once["down"].codes)
    seen = (x @ found["up"].dequantize().t() + block[0].bias).relu()
    by_hand = quantizers.find("gptq").quantize_block({"down": block[2]}, lambda: block[2](seen), config)["down"]
    assert torch.equal(found["down"].codes, by_hand.codes)


def test_experts_of_one_place_are_quantized_together():
    names = [f"experts.{i}.{leaf}" for i in range(3) for leaf in ("up", "down")]
    linears = {name: nn.Linear(16, 16) for name in names}
    passes = []

    def block(x):
        passes.append(x)
        for i in range(3):
            linears[f"experts.{i}.down"](linears[f"experts.{i}.up"](x * (i + 1)))

    quantizers.find("gptq").quantize_block(linears, TwoStreams(block, correlated(100, 16)), QuantizeConfig())
    assert len(passes) == 3  # a look at the order, the ups, the downs


@pytest.mark.parametrize("act_order", [True, False])
def test_the_correction_makes_good_what_the_inputs_lack(act_order):
    linear = nn.Linear(24, 40, bias=False).requires_grad_(False)
    exact = correlated(20_000, 24)
    x = exact @ (torch.eye(24) + 0.1 * torch.randn(24, 24))
    config = QuantizeConfig(bits=8, act_order=act_order, damp_percent=1e-6)

    def loss(weight):
        return (exact @ linear.weight.t() - x @ weight.t()).square().sum().item()

    best = torch.linalg.lstsq(x, exact @ linear.weight.t()).solution.t()
    found = {}
    for share in (0.0, 0.5, 1.0):
        settings = dataclasses.replace(config, correction=share)
        found[share] = loss(quantizers.find("gptq").quantize_block({"l": linear}, TwoStreams(linear, x, exact), settings)["l"].dequantize())
    plain = loss(linear.weight)
    assert found[1.0] - loss(best) < 0.02 * plain
    assert found[0.5] == pytest.approx((plain + 3 * loss(best)) / 4, rel=0.05)  # the loss is a parabola between the two
    assert found[0.0] == pytest.approx(plain, rel=0.02)


def test_a_linear_that_sees_nothing_is_named():
    linears = {"seen": nn.Linear(4, 4), "unseen": nn.Linear(4, 4)}
    with pytest.raises(ValueError, match="quantize: every linear must see calibration tokens, got none for unseen"):
        quantizers.find("gptq").quantize_block(linears, lambda: linears["seen"](torch.randn(9, 4)), QuantizeConfig())


def test_unknown_method():
    with pytest.raises(ValueError, match="method must be one of gptq, rtn, awq, smoothquant, autoround, got magic"):
        quantizers.find("magic")
