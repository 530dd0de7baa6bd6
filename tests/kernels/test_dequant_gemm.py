import sys
from dataclasses import replace

import pytest
import torch

from accuracy import assert_accurate, random_weight
from normtweak_kernels import dequant_gemm, native, packing
from normtweak_kernels.dequant_gemm import Prepared, cpp_kernel
from normtweak_kernels.dequant_gemm.reference import quantize_activations
from normtweak_kernels.launch import DEQUANT_GEMM_CPU

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (N, K, group size), none a multiple of every tile; 24 and 33 cut chunks of 32.
SHAPES = [(5, 33, -1), (17, 96, 24), (80, 192, 64), (200, 576, 32), (80, 1536, -1), (1, 1, 1)]
# Rows on either side of the fused kernel's limit.
ROWS = [1, 3, 17, 67]


# How the C++ bodies are chosen: as shipped, and by configurations that give all rows but two to one of them.
CHOICES = {
    "shipped": None,
    "integer": {"integer_max_rows": sys.maxsize, "integer_max_rows_8bit": sys.maxsize, "bfloat16_panel_rows": sys.maxsize},
    "float": {"integer_max_rows": 0, "integer_max_rows_8bit": 0, "float_max_rows": sys.maxsize},
    "panels": {"integer_max_rows": 0, "integer_max_rows_8bit": 0, "float_max_rows": 2, "panel_bytes": 1},
}


@pytest.fixture(params=CHOICES)
def choice(request, monkeypatch):
    changes = CHOICES[request.param]
    if changes is not None:
        monkeypatch.setattr(cpp_kernel, "DEQUANT_GEMM_CPU", {isa: replace(launch, **changes) for isa, launch in DEQUANT_GEMM_CPU.items()})
    return request.param


def plain_product(a, b, span):
    """a @ b by torch, in pieces of `span` columns of b where given, laid out as panels are: the BLAS sums in another order then."""
    return a @ b if span is None else torch.cat([a @ part.contiguous() for part in b.split(span, 1)], 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_forward_and_backward_are_as_exact_as_dense_torch(body, choice, n, k, group_size, bits, dtype):
    for m, zeros, with_bias, scale_dtype in zip(
        ROWS, (True, False, True, False), (False, True, True, False), (torch.float16, torch.float32) * 2, strict=True
    ):
        weight = random_weight(n, k, bits, group_size, zeros=zeros, scale_dtype=scale_dtype)
        x = torch.randn(m, k, dtype=dtype, requires_grad=True)
        bias = torch.randn(n, dtype=dtype) if with_bias else None
        dense, exact = weight.dequantize().to(dtype), weight.dequantize(torch.float64)
        y = dequant_gemm(x, weight.pack(), weight.scales, weight.zeros, bias, bits=bits)
        plain = plain_product(x.detach(), dense.t(), packing.LANES if choice == "panels" else None) + (0 if bias is None else bias)
        assert_accurate(y.detach(), plain, torch.nn.functional.linear(x.detach().double(), exact, None if bias is None else bias.double()))
        grad = torch.randn(m, n, dtype=dtype)
        y.backward(grad)
        assert_accurate(x.grad, plain_product(grad, dense, packing.CHUNK if choice == "panels" else None), grad.double() @ exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions_and_non_contiguous_inputs(body, choice, dtype):
    weight = random_weight(23, 96, 4, 32, zeros=True)
    packed = weight.pack()
    x = torch.randn(96, 5, 3, dtype=dtype).permute(2, 1, 0)
    y = dequant_gemm(x, packed, weight.scales, weight.zeros, bits=4)
    assert y.is_contiguous()
    assert torch.equal(y, dequant_gemm(x.contiguous(), packed, weight.scales, weight.zeros, bits=4))
    strided = torch.stack([packed, packed], -1)[..., 0]
    columns = weight.scales.t().contiguous().t(), weight.zeros.t().contiguous().t()
    assert torch.equal(y, dequant_gemm(x, strided, *columns, torch.zeros(46, dtype=dtype)[::2], bits=4))
    assert dequant_gemm(x[0, 0], packed, weight.scales, weight.zeros, bits=4).shape == (23,)
    assert dequant_gemm(x[:0], packed, weight.scales, weight.zeros, bits=4).shape == (0, 5, 23)


def test_gradients_in_float64():
    weight = random_weight(5, 33, 3, -1, zeros=True)
    x, bias = torch.randn(3, 33, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64, requires_grad=True)
    packed = weight.pack()
    assert torch.autograd.gradcheck(lambda x, bias: dequant_gemm(x, packed, weight.scales, weight.zeros, bias, bits=3), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, bias: dequant_gemm(x, packed, weight.scales, weight.zeros, bias, bits=3).sin(), (x, bias))


@pytest.mark.parametrize("choice", ["auto", "int8"])
def test_a_gradient_penalty_has_a_gradient(body, choice):
    """The second derivative is that of dense weights."""
    weight = random_weight(37, 96, 3, 32, zeros=True)
    packed, dense = weight.pack(), weight.dequantize()

    def penalty(product):
        x = torch.linspace(-1, 1, 5 * 96).view(5, 96).requires_grad_()
        y = product(x)
        (slope,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad((slope.pow(2) * x).sum(), x)[0]

    got = penalty(lambda x: dequant_gemm(x, packed, weight.scales, weight.zeros, bits=3, activations=choice))
    wanted = penalty(lambda x: x @ dense.t())
    assert (got - wanted).norm() < (1e-5 if choice == "auto" else 0.05) * wanted.norm()


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_float_kernel_writes_all_of_its_output_and_nothing_else(isa, native_module, n, k, group_size, bits):
    weight = random_weight(n, k, bits, group_size, zeros=False)
    inner = cpp_kernel.Weight(weight.pack(), weight.scales, None, bits, k)
    x = torch.nn.functional.pad(torch.randn(7, k), (0, -k % packing.CHUNK))
    guarded = torch.full((7 * n + 64,), torch.nan)
    inner.native.dequant_gemm_small(2, native.address(x), 0, guarded.data_ptr(), 7)
    assert torch.isfinite(guarded[: 7 * n]).all()
    assert torch.isnan(guarded[7 * n :]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_panels_are_the_dequantized_weight(isa, native_module, n, k, group_size, bits, dtype):
    weight = random_weight(n, k, bits, group_size, zeros=True)
    inner = cpp_kernel.Weight(weight.pack(), weight.scales, weight.zeros, bits, k)
    for n0, n1, k0, k1 in {(0, n, 0, k), (n // 32 * 16, n, k // 64 * 32, k), (0, (n + 1) // 2, 0, (k + 1) // 2)}:
        exact = weight.dequantize()[n0:n1, k0:k1].t().to(dtype)
        assert torch.equal(cpp_kernel._panel(inner, n0, n1, k0, k1, dtype), exact)
        width = -(-(n1 - n0) // 16) * 16
        guarded = torch.full(((k1 - k0 + 1) * (width + 3),), torch.nan, dtype=dtype)
        inner.native.dequantize_panel(2, n0, n1, k0, k1, width + 3, native.DTYPES[dtype], guarded.data_ptr())
        rows = guarded.view(k1 - k0 + 1, width + 3)
        assert torch.equal(rows[:-1, : n1 - n0], exact)
        assert torch.isnan(rows[:-1, width:]).all()
        assert torch.isnan(rows[-1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_integer_kernel_writes_all_of_its_output_and_nothing_else(isa, n, k, group_size, bits, dtype):
    weight = random_weight(n, k, bits, group_size, zeros=True)
    inner = cpp_kernel.Weight(weight.pack(), weight.scales, weight.zeros, bits, k)
    if not inner.native.integer_gemm_supported():
        assert isa == "portable" or inner.k // inner.native.groups % 32
        return
    for m, planes, per_token in ((1, 1, False), (2, 2, False), (7, 3, False), (261, 2, False), (9, 1, True)):
        x = torch.randn(m, k, dtype=dtype)
        guarded = torch.full((m * n + 64,), torch.nan, dtype=dtype)
        inner.native.integer_gemm(2, x.data_ptr(), 0, guarded.data_ptr(), m, native.DTYPES[dtype], planes, per_token)
        assert torch.isfinite(guarded[: m * n]).all()
        assert torch.isnan(guarded[m * n :]).all()


# What a mode may add to the error of float32: half a step of a run's scale, for gaussian x; int8_token's runs are whole rows.
ROUNDING = {"int16": 1e-4, "int8": 2e-2, "int8_token": 4e-2}


@pytest.mark.parametrize("activations", ROUNDING)
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_rounded_activations(body, n, k, group_size, bits, activations):
    for m, dtype, zeros in ((1, torch.float32, True), (3, torch.bfloat16, False), (17, torch.float16, True), (67, torch.float32, False)):
        weight, x = random_weight(n, k, bits, group_size, zeros=zeros), torch.randn(m, k).to(dtype)
        dense = weight.dequantize(torch.float64)
        y = dequant_gemm(x, weight.pack(), weight.scales, weight.zeros, bits=bits, activations=activations)
        rounded = quantize_activations(x.double(), weight.scales.shape[0], activations) @ dense.t()
        # As the definition says, but for values that fall between two integers and are rounded to the other one, and the output's rounding.
        error = (y.double() - rounded).norm() / rounded.norm()
        assert error <= 0.2 * ROUNDING[activations] + 2 * torch.finfo(dtype).eps, error
        exact = x.double() @ dense.t()
        assert (y.double() - exact).norm() <= (ROUNDING[activations] + 2 * torch.finfo(dtype).eps) * x.double().norm() * dense.norm()
        assert y.dtype == dtype


@pytest.mark.parametrize("activations", ["auto", "int16", "int8"])
def test_a_large_value_costs_only_its_own_64(body, activations):
    # One scale for a whole row would round everything beside the outlier to nothing.
    weight = random_weight(48, 256, 4, 64, zeros=True)
    x = torch.randn(5, 256)
    x[:, 0] = 1e4
    dense = weight.dequantize(torch.float64)
    y = dequant_gemm(x, weight.pack(), weight.scales, weight.zeros, bits=4, activations=activations)
    exact_outlier = dequant_gemm(x * (torch.arange(256) < 64), weight.pack(), weight.scales, weight.zeros, bits=4, activations=activations)
    rest = x[:, 64:].double() @ dense[:, 64:].t()
    tolerance = {"auto": 1e-3, "int16": 1e-3, "int8": 2e-2}[activations]  # float32's sums hold the outlier's part too
    assert ((y - exact_outlier).double() - rest).norm() <= tolerance * rest.norm()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_is_seen_in_its_row_alone(body, choice, dtype, value):
    weight = random_weight(21, 192, 4, 64, zeros=True)
    x = torch.randn(9, 192).to(dtype)
    x[4, 77] = value
    y = dequant_gemm(x, weight.pack(), weight.scales, weight.zeros, bits=4)
    assert not torch.isfinite(y[4]).any()
    assert torch.isfinite(y[torch.arange(9) != 4]).all()


def test_zeros_and_tiny_values(body, choice):
    weight = random_weight(21, 192, 4, 64, zeros=True)
    x = torch.zeros(5, 192)
    x[1], x[2, 3] = 1e-38, 1e-20
    y = dequant_gemm(x, weight.pack(), weight.scales, weight.zeros, bits=4)
    assert torch.equal(y[0], torch.zeros(21))
    exact = x.double() @ weight.dequantize(torch.float64).t()
    assert ((y.double() - exact).abs() <= 1e-6 * exact.abs() + 1e-33).all()


@pytest.mark.parametrize("m", [7, 300])
@pytest.mark.parametrize("choice", ["integer", "float"], indirect=True)
def test_our_kernels_are_independent_of_threads(isa, choice, m):
    if isa == "portable" and choice == "integer":
        m = 7  # has no integer kernel, and the BLAS takes the rows that the float kernel leaves
    weight, x = random_weight(200, 576, 2, 64, zeros=True), torch.randn(m, 576)
    packed, threads, results = weight.pack(), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(dequant_gemm(x, packed, weight.scales, weight.zeros, bits=2))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_prepared_weight_gives_the_same(body):
    weight = random_weight(23, 96, 4, 32, zeros=True)
    tensors = weight.pack(), weight.scales, weight.zeros
    prepared = Prepared(*tensors, 96, bits=4)
    assert prepared.holds(*tensors)
    assert not prepared.holds(tensors[0].clone(), *tensors[1:])
    for x in (torch.randn(2, 3, 96), torch.randn(96).bfloat16(), torch.randn(40, 96).half(), torch.randn(5, 192)[:, ::2]):
        bias = torch.randn(46, dtype=x.dtype)[::2]
        assert torch.equal(prepared(x, bias), dequant_gemm(x, *tensors, bias, bits=4))
    x = torch.randn(3, 96, requires_grad=True)
    prepared(x).sum().backward()
    assert x.grad is not None
    with pytest.raises(ValueError, match="dequant_gemm: bias must be"):
        prepared(torch.randn(96), torch.zeros(3))
    with pytest.raises(ValueError, match="dequant_gemm: scales must be"):
        prepared(torch.randn(2, 95))
    with pytest.raises(ValueError, match="dequant_gemm: qweight must be"):
        Prepared(tensors[0][:1], *tensors[1:], 96, bits=4)


def test_opcheck(body):
    weight = random_weight(5, 48, 3, 24, zeros=True)
    for x in (torch.randn(2, 3, 48, requires_grad=True), torch.randn(40, 48, dtype=torch.bfloat16)):
        bias = torch.randn(5, dtype=x.dtype)
        torch.library.opcheck(torch.ops.normtweak.dequant_gemm.default, (x, weight.pack(), weight.scales, weight.zeros, bias, 3, "auto"))
    torch.library.opcheck(torch.ops.normtweak.dequant_gemm_backward.default, (torch.randn(4, 5), weight.pack(), weight.scales, None, 3, 48))


def good_arguments():
    return {"x": torch.zeros(2, 32), "qweight": torch.zeros(1, 4, 16, dtype=torch.int32), "scales": torch.ones(2, 4), "bits": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activations": "int4"}, "activations must be one of auto, int16, int8, int8_token, got int4"),
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
        ({"x": torch.zeros(2, 32).int()}, r"x must be float16, bfloat16, float32 or float64 \[..., K\], got torch.int32 \(2, 32\)"),
        ({"x": torch.zeros(2, 32).to(torch.float8_e4m3fn)}, r"x must be float16, bfloat16, float32 or float64 \[..., K\], got torch.float8_e4m3fn"),
        ({"scales": torch.ones(3, 4)}, r"scales must be float16 or float32 \[G, N\] with G dividing K = 32, got torch.float32 \(3, 4\)"),
        ({"scales": torch.ones(2, 4).bfloat16()}, "scales must be float16 or float32"),
        ({"qweight": torch.zeros(1, 3, 16, dtype=torch.int32)}, r"qweight must be int32 \(1, 4, 16\), got torch.int32 \(1, 3, 16\)"),
        ({"qweight": torch.zeros(1, 4, 16)}, "qweight must be int32"),
        ({"zeros": torch.zeros(2, 4)}, r"zeros must be uint8 \(2, 4\) or None"),
        ({"zeros": torch.zeros(1, 4, dtype=torch.uint8)}, r"zeros must be uint8 \(2, 4\) or None"),
        ({"bias": torch.zeros(3)}, r"bias must be torch.float32 \[4\] or None"),
        ({"bias": torch.zeros(4).half()}, r"bias must be torch.float32 \[4\] or None"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=f"dequant_gemm: {message}"):
        dequant_gemm(**{**good_arguments(), **arguments})


def test_positive_activations_and_many_columns(body, choice):
    # Nothing cancels: one float32 sum over 4096 columns would lose twice what torch's blocked sums do.
    weight = random_weight(16, 4096, 4, 64, zeros=False)
    weight.codes.fill_(15)
    x = torch.rand(3, 4096) + 0.5
    y = dequant_gemm(x, weight.pack(), weight.scales, weight.zeros, bits=4)
    dense = weight.dequantize()
    assert_accurate(y, plain_product(x, dense.t(), packing.LANES if choice == "panels" else None), x.double() @ dense.double().t())


@pytest.mark.parametrize("size", [1e-20, 1e-25, 1e-30])
def test_small_activations_are_as_exact_as_large_ones(body, choice, size):
    weight = random_weight(21, 192, 4, 64, zeros=True)
    x = torch.randn(5, 192) * size
    y = dequant_gemm(x, weight.pack(), weight.scales, weight.zeros, bits=4)
    exact = x.double() @ weight.dequantize(torch.float64).t()
    assert (y.double() - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("activations", ["auto", *ROUNDING])
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize("zeros", [False, True])
def test_rows_full_of_nothing_finite(body, activations, bits, zeros):
    weight = random_weight(21, 192, bits, 64, zeros=zeros)
    x = torch.randn(5, 192)
    x[1], x[3] = torch.nan, torch.inf
    y = dequant_gemm(x, weight.pack(), weight.scales, weight.zeros, bits=bits, activations=activations)
    assert not torch.isfinite(y[[1, 3]]).any()
    assert torch.isfinite(y[[0, 2, 4]]).all()


def test_default_dtype_and_device_change_nothing(body, choice):
    weight = random_weight(21, 96, 4, 24, zeros=True)
    arguments = weight.pack(), weight.scales, weight.zeros
    x = torch.randn(40, 96)
    few, many = dequant_gemm(x[:2], *arguments, bits=4), dequant_gemm(x, *arguments, bits=4)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(dequant_gemm(x[:2], *arguments, bits=4), few)
        assert torch.equal(dequant_gemm(x, *arguments, bits=4), many)
    finally:
        torch.set_default_dtype(torch.float32)
    if body != "reference":
        with torch.device("meta"):
            assert torch.equal(dequant_gemm(x, *arguments, bits=4), many)
    assert torch.equal(dequant_gemm(x, *arguments, bits=4), many)


def test_a_prepared_weight_sees_what_happens_to_its_tensors(body):
    weight = random_weight(23, 96, 4, 32, zeros=True)
    tensors = weight.pack(), weight.scales.clone(), weight.zeros
    x = torch.randn(3, 96)
    prepared = Prepared(*tensors, 96, bits=4)
    prepared(x)
    tensors[1].mul_(2)
    assert torch.equal(prepared(x), dequant_gemm(x, *tensors, bits=4))
    for tensor in tensors[:2]:
        prepared = Prepared(*tensors, 96, bits=4)
        assert prepared.holds(*tensors)
        tensor.data = tensor.data.clone()
        assert body == "reference" or not prepared.holds(*tensors)
    strided = tensors[1].t().contiguous().t()
    prepared = Prepared(tensors[0], strided, tensors[2], 96, bits=4)
    before = prepared(x)
    strided.mul_(2)
    assert not torch.equal(prepared(x), before)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_passes_by_the_dispatcher(body):
    weight = random_weight(8, 32, 4, -1, zeros=False)
    arguments = weight.pack(), weight.scales, None
    x = torch.randn(3, 32)
    y = dequant_gemm(x, *arguments, bits=4)
    assert torch.equal(dequant_gemm(torch._neg_view(-x), *arguments, bits=4), y)
    traced = torch.jit.trace(lambda x: dequant_gemm(x, *arguments, bits=4), (torch.zeros(3, 32),), check_trace=False)
    assert torch.equal(traced(x), y)
    bias = torch.zeros(8, requires_grad=True)
    dequant_gemm(x[0], *arguments, bias, bits=4).sum().backward()
    assert torch.equal(bias.grad, torch.ones(8))


def test_transforms_that_would_lose_the_gradient_are_refused():
    weight = random_weight(8, 32, 4, -1, zeros=False)
    arguments = weight.pack(), weight.scales, None
    x = torch.randn(3, 32)
    with pytest.raises(ValueError, match="reverse mode, got a transform of torch.func"):
        torch.func.grad(lambda x: dequant_gemm(x, *arguments, bits=4).sum())(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match="reverse mode, got a forward-mode tangent"):
            dequant_gemm(dual, *arguments, bits=4)
        assert dequant_gemm(x, *arguments, bits=4).shape == (3, 8)
