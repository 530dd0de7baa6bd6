import logging

import pytest
import torch
from torch import nn

from normtweak import QuantizeConfig, quantizers
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
    shared = {tuple(names): hessian for names, hessian in collector.shared()}
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
    ((_, hessian),) = collector.shared()
    exact = (x.double().flatten(0, 1).t() @ x.double().flatten(0, 1)) / (64 * 512)
    assert (hessian.double() - exact).abs().max() / exact.abs().max() < 1e-5
    assert torch.linalg.eigvalsh(hessian.double()).min() > 0


def test_a_linear_that_sees_nothing_is_named():
    linears = {"seen": nn.Linear(4, 4), "unseen": nn.Linear(4, 4)}
    with pytest.raises(ValueError, match="quantize: every linear must see calibration tokens, got none for unseen"):
        quantizers.find("gptq").quantize_block(linears, lambda: linears["seen"](torch.randn(9, 4)), QuantizeConfig())


def test_unknown_method():
    with pytest.raises(ValueError, match="method must be one of gptq, rtn, awq, smoothquant, autoround, got magic"):
        quantizers.find("magic")
