import copy

import pytest
import torch
from torch import nn

from normtweak import PackedLinear
from normtweak.linear import quantizable_linears, replace
from normtweak_kernels import QuantizedWeight


def quantized(n, k, bits, groups, symmetric):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(groups, n) * 0.1 + 0.01).half()
    zeros = None if symmetric else torch.randint(0, 2**bits, (groups, n), dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros, bits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "groups"), [(5, 33, 1), (64, 192, 3), (17, 576, 9)])
def test_product(bits, symmetric, n, k, groups):
    weight = quantized(n, k, bits, groups, symmetric)
    bias = torch.randn(n)
    linear = PackedLinear.from_weight(weight, bias)
    assert torch.equal(linear.quantized().codes, weight.codes)
    x = torch.randn(3, 2, k)
    expected = nn.functional.linear(x.double(), weight.dequantize(torch.float64), bias.double())
    plain = nn.functional.linear(x, weight.dequantize(), bias)
    limit = 2 * (plain - expected).abs().max() + 1e-6
    assert (linear(x) - expected).abs().max() <= limit


def test_scales_keep_their_precision_through_to():
    linear = PackedLinear.from_weight(quantized(8, 32, 4, 1, True), torch.randn(8)).to(torch.bfloat16)
    assert linear.scales.dtype == torch.float16
    assert linear.bias.dtype == torch.bfloat16
    assert linear(torch.randn(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_gives_the_autocast_dtype():
    linear = PackedLinear.from_weight(quantized(8, 32, 4, 1, True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(2, 32)).dtype == torch.bfloat16


def test_shapes_without_values():
    linear = PackedLinear.from_weight(quantized(8, 32, 4, 1, False), torch.randn(8)).to("meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(torch.randn(2, 3, 32, device="meta"))
    assert (y.device.type, tuple(y.shape), y.dtype) == ("meta", (2, 3, 8), torch.float32)


def test_gradient_reaches_x():
    linear = PackedLinear.from_weight(quantized(8, 32, 4, 2, False))
    x = torch.randn(4, 32, requires_grad=True)
    linear(x).square().sum().backward()
    weight = linear.quantized().dequantize()
    torch.testing.assert_close(x.grad, 2 * (x.detach() @ weight.t()) @ weight, rtol=1e-4, atol=1e-4)


def permuted(n, k, bits, groups):
    """A linear whose inputs lie in another order than its packed columns."""
    plain = PackedLinear.from_weight(quantized(n, k, bits, groups, False), torch.randn(n))
    return PackedLinear(plain.qweight, plain.scales, plain.zeros, plain.bias, bits=bits, in_features=k, perm=torch.randperm(k))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_permuted_inputs(bits):
    linear = permuted(24, 96, bits, 3)
    x = torch.randn(3, 2, 96, requires_grad=True)
    weight = linear.dequantize()
    assert torch.equal(weight[:, linear.perm[7]], linear.quantized().dequantize()[:, 7])
    expected = nn.functional.linear(x, weight, linear.bias)
    torch.testing.assert_close(linear(x), expected, rtol=1e-4, atol=1e-4)
    (ours,), (theirs,) = (torch.autograd.grad(y.square().sum(), x) for y in (linear(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        once, again = linear(x), linear.to(torch.float32)(x)  # through the prepared call, which remembers the weight
    assert torch.equal(once, again)
    assert "inputs permuted" in repr(linear)
    assert linear.perm.dtype == torch.int32


def test_permuted_inputs_compile():
    linear = permuted(16, 64, 4, 2)
    x = torch.randn(3, 64)
    with torch.no_grad():
        compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), linear(x), rtol=1e-4, atol=1e-4)


def test_replace_and_list():
    root = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    assert list(quantizable_linears(root)) == ["0.0", "1"]
    replace(root, "0.0", nn.Identity())
    assert list(quantizable_linears(root)) == ["1"]


def test_a_copy_has_its_own_weight():
    linear = PackedLinear.from_weight(quantized(8, 32, 4, 1, True))
    x = torch.randn(3, 32)
    before = linear(x)
    twin = copy.deepcopy(linear)
    linear.qweight.zero_()
    assert torch.equal(twin(x), before)
    assert not torch.equal(linear(x), before)


def test_a_buffer_that_is_replaced_is_seen():
    linear, other = PackedLinear.from_weight(quantized(8, 32, 4, 1, True)), PackedLinear.from_weight(quantized(8, 32, 4, 1, True))
    x = torch.randn(3, 32)
    linear(x)
    linear.qweight, linear.scales = other.qweight, other.scales
    assert torch.equal(linear(x), other(x))
    linear.scales.mul_(2)
    torch.testing.assert_close(linear(x), other(x))  # shared, so both doubled


def test_the_mode_of_activations_can_be_changed():
    linear = PackedLinear.from_weight(quantized(8, 64, 4, 1, True))
    x = torch.randn(3, 64)
    exact = linear(x)
    linear.activations = "int8"
    rounded = linear(x)
    assert not torch.equal(exact, rounded)
    assert (exact - rounded).norm() < 0.05 * exact.norm()
