import pytest
import torch

from accuracy import assert_accurate
from normtweak_kernels import hessian_update, mirror_lower
from normtweak_kernels.hessian_update import cpp_kernel, reference

# [tokens, channels]; the C++ body's tiles are 240 x 480, packed 256 values or pairs deep.
SHAPES = [(1, 1), (3, 5), (64, 33), (257, 65), (513, 241), (700, 500)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def activations(tokens, channels, dtype):
    torch.manual_seed(3)
    return (torch.randn(tokens, channels) * torch.linspace(0.1, 3, channels) + 0.5).to(dtype)


def lower_after(update, x, start):
    hessian = start.clone()
    update(hessian, x)
    return hessian.tril()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_against_float64(body, tokens, channels, dtype):
    x, start = activations(tokens, channels, dtype), torch.randn(channels, channels)
    # What stands above the diagonal is no input.
    got = lower_after(hessian_update, x, start.tril() + torch.full_like(start, torch.nan).triu(1))
    plain = lower_after(reference.hessian_update, x, start)
    assert_accurate(got, plain, lower_after(reference.hessian_update, x.double(), start.double()))


def test_float64_activations():
    x, start = activations(50, 9, torch.float64), torch.zeros(9, 9)
    exact = lower_after(reference.hessian_update, x, start.double())
    assert_accurate(lower_after(hessian_update, x, start), lower_after(reference.hessian_update, x, start), exact)


def test_any_shape_and_strides(isa):
    x = torch.full((2, 4, 30, 14), torch.nan)
    x[..., ::2] = torch.randn(2, 4, 30, 7)
    view, start = x[..., ::2], torch.zeros(7, 7)
    assert torch.equal(lower_after(hessian_update, view, start), lower_after(hessian_update, view.reshape(-1, 7).contiguous(), start))
    assert torch.equal(lower_after(hessian_update, x[:0, ..., ::2], start), start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_lower_triangle_is_written(isa, dtype):
    hessian = torch.full((300, 300), 7.0)
    hessian_update(hessian, activations(40, 300, dtype))
    assert (hessian.triu(1) == torch.full((300, 300), 7.0).triu(1)).all()
    assert (hessian.diagonal() > 7).all()


@pytest.mark.parametrize("channels", [3, 512, 1100])
def test_the_strips_for_torch(channels):
    x, start = activations(65, channels, torch.bfloat16), torch.randn(channels, channels)
    plain, exact = (lower_after(reference.hessian_update, x.to(t), start.to(t)) for t in (torch.float32, torch.float64))
    precision = torch.get_float32_matmul_precision()
    # torch splits its sums as it likes, by the shape of the product.
    torch.testing.assert_close(lower_after(cpp_kernel.with_torch, x, start).double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.get_float32_matmul_precision() == precision
    assert torch.isfinite(plain).all()


def test_bfloat16_goes_through_torch_where_amx_is(isa, monkeypatch, native_module):
    calls = []
    monkeypatch.setattr(cpp_kernel, "with_torch", lambda *args: calls.append(args))
    monkeypatch.setattr(native_module, "has_amx", lambda: True)
    hessian_update(torch.zeros(4, 4), activations(9, 4, torch.bfloat16))
    hessian_update(torch.zeros(4, 4), activations(9, 4, torch.float32))
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_result_is_independent_of_threads(isa, dtype):
    x, threads, results = activations(300, 700, dtype), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(lower_after(hessian_update, x, torch.zeros(700, 700)))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("k", [1, 255, 256, 257, 600])
def test_mirror_lower(k):
    matrix = torch.randn(k, k)
    lower = matrix.tril()
    poisoned = lower + torch.full_like(lower, torch.nan).triu(1)
    assert mirror_lower(poisoned) is poisoned
    assert torch.equal(poisoned, lower + lower.tril(-1).t())


def test_opcheck(body):
    torch.library.opcheck(torch.ops.normtweak.hessian_update.default, (torch.zeros(5, 5), torch.randn(6, 5)))


@pytest.mark.parametrize(
    ("hessian", "x", "message"),
    [
        (torch.zeros(3, 3), torch.zeros(5, 4), r"hessian must be contiguous torch.float32 \(4, 4\) for x \(5, 4\), got torch.float32 \(3, 3\)"),
        (torch.zeros(4, 4).double(), torch.zeros(5, 4), "hessian must be contiguous torch.float32"),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(5, 4), r"got torch.float32 \(4, 4\) not contiguous"),
        (torch.zeros(4, 4), torch.zeros(5, 4, dtype=torch.int32), "x must be of a float dtype, got torch.int32"),
    ],
)
def test_errors_name_the_argument(hessian, x, message):
    with pytest.raises(ValueError, match=f"hessian_update: .*{message}"):
        hessian_update(hessian, x)
