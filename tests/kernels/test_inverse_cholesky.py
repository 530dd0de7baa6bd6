import functools

import pytest
import torch

from accuracy import assert_accurate
from normtweak_kernels import inverse_cholesky
from normtweak_kernels.inverse_cholesky import reference

# The C++ body's diagonal blocks are 64 wide, its tiles 240 x 480, packed 256 deep.
SIZES = [1, 2, 7, 63, 64, 65, 129, 192, 321, 700, 1100]


@functools.cache
def hessian(k):
    torch.manual_seed(2)
    x = torch.randn(2 * k + 3, k) @ (torch.eye(k) + 0.5 * torch.randn(k, k) / k**0.5) * torch.linspace(0.3, 3, k)
    return x.t() @ x / len(x), 0.01 + 0.1 * torch.rand(k), torch.randperm(k)


@functools.cache
def exact(k, ordered):
    h, damping, order = hessian(k)
    return reference.inverse_cholesky(h.double(), damping.double(), order if ordered else None)[0]


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("k", SIZES)
def test_against_float64(body, k, ordered):
    h, damping, order = hessian(k)
    order = order if ordered else None
    before = h.clone()
    factor, found = inverse_cholesky(h, damping, order=order)
    plain, _ = reference.inverse_cholesky(h, damping, order)
    assert found
    assert torch.equal(h, before)
    assert torch.equal(factor, factor.triu())
    assert_accurate(factor, plain, exact(k, ordered))


def test_the_reference_is_the_factor_of_the_inverse():
    h, damping, order = hessian(129)
    damped = (h + torch.diag(damping)).double()[order][:, order]
    wanted = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    torch.testing.assert_close(exact(129, True), wanted)


@pytest.mark.parametrize("k", [1, 64, 65, 300])
@pytest.mark.parametrize("row", [0, -1])
@pytest.mark.parametrize("value", [-1.0, 0.0, torch.nan, torch.inf])
def test_says_when_there_is_none(body, k, row, value):
    h = torch.eye(k)
    h[row, row] = value
    _, found = inverse_cholesky(h, torch.zeros(k))
    assert not found


def test_an_overflow_off_the_diagonal_is_found(body):
    # R has ones on its diagonal and 1024 beside it, all exact: its inverse's corner is 1024**(k - 1).
    k = 14
    r = torch.eye(k) + 1024 * torch.diag(torch.ones(k - 1), 1)
    _, found = inverse_cholesky(r @ r.t(), torch.zeros(k))
    assert not found
    _, found = inverse_cholesky((r @ r.t())[4:, 4:], torch.zeros(k - 4))
    assert found


def test_non_contiguous_inputs(isa):
    h, damping, order = hessian(65)
    want, _ = inverse_cholesky(h, damping, order=order)
    wide, vectors = torch.full((65, 130), torch.nan), torch.full((65, 2), torch.nan)
    wide[:, ::2], vectors[:, 0] = h, damping
    got, found = inverse_cholesky(wide[:, ::2], vectors[:, 0], order=torch.stack([order, order], 1)[:, 0])
    assert found
    assert torch.equal(got, want)


def test_result_is_independent_of_threads(isa):
    h, damping, order = hessian(1100)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(inverse_cholesky(h, damping, order=order)[0])
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck(body):
    h, damping, order = hessian(7)
    torch.library.opcheck(torch.ops.normtweak.inverse_cholesky.default, (h, damping, order))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.eye(3, 4), torch.zeros(3), None), r"hessian must be float32 \[K, K\], got torch.float32 \(3, 4\)"),
        ((torch.zeros(0, 0), torch.zeros(0), None), "hessian must be float32"),
        ((torch.eye(3).double(), torch.zeros(3), None), "hessian must be float32"),
        ((torch.eye(3), torch.zeros(2), None), r"damping must be float32 \[3\], got torch.float32 \(2,\)"),
        ((torch.eye(3), torch.zeros(3), torch.zeros(3)), r"order must be int64 \[3\], got torch.float32 \(3,\)"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=f"inverse_cholesky: {message}"):
        inverse_cholesky(arguments[0], arguments[1], order=arguments[2])


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1, 3], [-1, 1, 2]])
def test_an_order_that_is_no_permutation_is_refused(isa, order):
    with pytest.raises(ValueError, match=f"inverse_cholesky: order must be a permutation of the columns, got {order[2] if order[0] == 0 else -1}"):
        inverse_cholesky(torch.eye(3), torch.zeros(3), order=torch.tensor(order))
