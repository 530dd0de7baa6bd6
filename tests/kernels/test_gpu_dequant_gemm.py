"""dequant_gemm on a real GPU, beside dense torch at the same precision; runs as it is where there is one (make gpu)."""

import pytest
import torch

from accuracy import assert_accurate, random_weight
from normtweak_kernels import dequant_gemm, gpu, packing, registry, tuning
from normtweak_kernels.dequant_gemm import Prepared
from normtweak_kernels.dequant_gemm.reference import quantize_activations
from normtweak_kernels.launch import DEQUANT_GEMM_GPU, nearest_architecture

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]
SHAPES = [(80, 192, -1), (200, 576, 32), (80, 192, 64), (24, 384, 128), (33, 288, 96), (17, 72, -1), (1024, 4096, 128)]
ROWS = [1, 3, 8, 17, 64, 65, 300]


@pytest.fixture(autouse=True)
def _only_triton(monkeypatch):
    monkeypatch.setenv("NORMTWEAK_BACKEND", "triton")


def on_gpu(weight):
    """The packed words, scales and zeros of a weight, on the GPU."""
    return tuple(None if tensor is None else tensor.cuda() for tensor in (weight.pack(), weight.scales, weight.zeros))


def poison(count):
    """Leaves NaN in the memory that the next results are allocated in."""
    torch.full((count,), torch.nan, device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_forward_and_backward_are_as_exact_as_dense_torch(n, k, group_size, bits, zeros, dtype):
    weight = random_weight(n, k, bits, group_size, zeros=zeros)
    arguments, dense, exact = on_gpu(weight), weight.dequantize().to("cuda", dtype), weight.dequantize(torch.float64).cuda()
    for m in ROWS:
        x = torch.randn(m, k, dtype=dtype, device="cuda", requires_grad=True)
        bias = torch.randn(n, dtype=dtype, device="cuda") if m % 2 else None
        grad = torch.randn(m, n, dtype=dtype, device="cuda")
        poison(4 * m * max(n, k))
        y = dequant_gemm(x, *arguments, bias, bits=bits)
        y.backward(grad)
        rows = x.detach()
        assert_accurate(y.detach(), torch.nn.functional.linear(rows, dense, bias), rows.double() @ exact.t() + (0 if bias is None else bias.double()))
        assert_accurate(x.grad, grad @ dense, grad.double() @ exact)


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("bits", packing.BITS)
def test_int8_token(bits, m):
    weight = random_weight(200, 576, bits, 64, zeros=True)
    x = torch.randn(m, 576, dtype=torch.float16, device="cuda")
    y = dequant_gemm(x, *on_gpu(weight), bits=bits, activations="int8_token")
    exact = quantize_activations(x.double(), 9, "int8_token") @ weight.dequantize(torch.float64).cuda().t()
    # Values that fall between two integers may be rounded to the other one.
    assert ((y.double() - exact).norm() / exact.norm()) <= 8e-3


@pytest.mark.parametrize("m", [1, 17, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(m, dtype):
    weight, x = random_weight(1024, 4096, 4, 64, zeros=True), torch.randn(m, 4096, dtype=dtype, device="cuda")
    arguments = on_gpu(weight)
    first = dequant_gemm(x, *arguments, bits=4)
    assert all(torch.equal(dequant_gemm(x, *arguments, bits=4), first) for _ in range(20))


@pytest.mark.parametrize("m", [1, 17, 300])
def test_a_cuda_graph_and_torch_compile_give_the_same(m):
    weight, x = random_weight(200, 576, 4, 64, zeros=True), torch.randn(m, 576, dtype=torch.bfloat16, device="cuda")
    arguments = on_gpu(weight)
    expected = dequant_gemm(x, *arguments, bits=4)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dequant_gemm(x, *arguments, bits=4)
    y.fill_(torch.nan)
    graph.replay()
    assert torch.equal(y, expected)
    compiled = torch.compile(lambda x: dequant_gemm(x, *arguments, bits=4), fullgraph=True)
    assert torch.equal(compiled(x), expected)


def test_opcheck():
    weight = random_weight(33, 96, 3, 32, zeros=True)
    arguments, bias = on_gpu(weight), torch.randn(33, dtype=torch.float16, device="cuda")
    for m in (2, 40):
        x = torch.randn(m, 96, dtype=torch.float16, device="cuda", requires_grad=True)
        torch.library.opcheck(torch.ops.normtweak.dequant_gemm.default, (x, *arguments, bias, 3, "auto"))


def test_a_prepared_weight_gives_the_same():
    weight = random_weight(200, 576, 4, 64, zeros=True)
    arguments = on_gpu(weight)
    prepared = Prepared(*arguments, 576, bits=4)
    assert prepared.holds(*arguments)
    for shape in ((576,), (2, 3, 576), (40, 576), (0, 576)):
        x = torch.randn(shape, dtype=torch.float16, device="cuda")
        assert torch.equal(prepared(x), dequant_gemm(x, *arguments, bits=4))


def test_float32_and_groups_that_no_kernel_takes_go_to_the_reference(monkeypatch):
    monkeypatch.delenv("NORMTWEAK_BACKEND")
    for group_size, m, backend in ((64, 1, "triton"), (64, 40, "reference"), (24, 1, "reference")):
        weight = random_weight(48, 192, 4, group_size, zeros=True)
        arguments, x = on_gpu(weight), torch.randn(m, 192, device="cuda")
        assert registry.which_backend("dequant_gemm", x, *arguments, None, 4, "auto") == backend
        y, exact = dequant_gemm(x, *arguments, bits=4), x.double() @ weight.dequantize(torch.float64).cuda().t()
        assert (y.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_every_shipped_configuration_fits_and_is_right(monkeypatch):
    lists = DEQUANT_GEMM_GPU[nearest_architecture(gpu.architecture(torch.cuda.current_device()), DEQUANT_GEMM_GPU)]
    weight = random_weight(512, 1024, 4, 64, zeros=True)
    arguments, dense, exact = on_gpu(weight), weight.dequantize().to("cuda", torch.float16), weight.dequantize(torch.float64).cuda()
    for m, configs in ((2, lists.gemv), (16, lists.few_rows), (300, lists.products(4, 16))):
        for config in configs:
            monkeypatch.setattr(tuning, "chosen", lambda *_, config=config: config)
            x = torch.randn(m, 1024, dtype=torch.float16, device="cuda")
            assert_accurate(dequant_gemm(x, *arguments, bits=4), x @ dense.t(), x.double() @ exact.t())
