import functools

import pytest
import torch

from normtweak_kernels import affine, gptq_block_update, gptq_solve, group_params
from normtweak_kernels.gptq_solve import reference
from normtweak_kernels.inverse_cholesky import reference as factor

# [N, K, group size]; the C++ body's panels are 12 to 32 rows, its leaves 16 columns, its products 240 columns and 256 deep.
SHAPES = [(200, 576, 64), (90, 1536, -1), (333, 321, 107), (600, 96, 8)]


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def problem(n, k, ordered):
    """A weight, the damped Hessian of correlated activations, its inverse's factor (float32 and float64) and the columns' order."""
    torch.manual_seed(4)
    x = torch.randn(2 * k, k) @ (torch.eye(k) + 0.5 * torch.randn(k, k) / k**0.5) * torch.linspace(0.3, 2, k)
    hessian = x.t() @ x / len(x)
    order = torch.argsort(hessian.diagonal(), descending=True) if ordered else None
    damping = torch.full((k,), 0.01 * hessian.diagonal().mean().item())
    hinv, exact = (factor.inverse_cholesky(hessian.to(t), damping.to(t), order)[0] for t in (torch.float32, torch.float64))
    return torch.randn(n, k), hessian.double() + torch.diag(damping), hinv, exact, order


@functools.cache
def grids(n, k, group_size, bits, symmetric, clip_steps, ordered):
    weight = problem(n, k, ordered)[0]
    return group_params(weight, bits=bits, group_size=group_size, symmetric=symmetric, clip_steps=clip_steps)


def objective(weight, codes, scales, zeros, bits, hessian):
    d = affine.dequantize(codes, scales, zeros, bits, torch.float64) - weight.double()
    return ((d @ hessian) * d).sum().item()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(("bits", "symmetric", "clip_steps"), [(2, False, 8), (3, True, 0), (4, True, 8), (8, False, 0)])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_objective_is_the_exact_reference_s(body, monkeypatch, n, k, group_size, bits, symmetric, clip_steps, ordered):
    weight, hessian, hinv, _, order = problem(n, k, ordered)
    scales, zeros = grids(n, k, group_size, bits, symmetric, clip_steps, ordered)
    before = weight.clone()
    codes = gptq_solve(weight, hinv, scales, zeros, bits=bits, order=order)
    assert torch.equal(weight, before)
    assert int(codes.max()) < 2**bits
    monkeypatch.delenv("NORMTWEAK_BACKEND", raising=False)
    exact = exact_codes(n, k, group_size, bits, symmetric, clip_steps, ordered)
    # Single codes may round the other way in float32, and move what follows them.
    got, wanted = (objective(weight, c, scales, zeros, bits, hessian) for c in (codes, exact))
    assert got <= 1.001 * wanted
    assert (codes != exact).float().mean() < 0.02


@functools.cache
def exact_codes(n, k, group_size, bits, symmetric, clip_steps, ordered):
    weight, _, _, hinv, order = problem(n, k, ordered)
    scales, zeros = grids(n, k, group_size, bits, symmetric, clip_steps, ordered)
    return reference.gptq_solve(weight.double(), hinv, scales.double(), zeros, order, bits, 128)


@pytest.mark.parametrize(("n", "k", "groups"), [(1, 1, 1), (5, 7, 7), (33, 16, 2), (13, 17, 1), (40, 255, 5)])
def test_small_and_odd_shapes(body, n, k, groups):
    torch.manual_seed(5)
    weight, scales = torch.randn(n, k), torch.rand(groups, n).half().float() + 0.1
    zeros = torch.randint(0, 16, (groups, n), dtype=torch.uint8)
    order = torch.randperm(k)
    # Factors that carry no error on: every column is rounded by itself.
    codes = gptq_solve(weight, torch.diag(torch.rand(k) + 0.5), scales, zeros, bits=4, order=order)
    wanted = affine.quantize(weight, affine.expand(scales, k), affine.expand(zeros.float(), k), 4)
    assert torch.equal(codes, wanted.to(torch.uint8))


def test_is_all_blocks_of_gptq_block_update(isa):
    n, k, group_size = SHAPES[0]
    weight, _, hinv, _, _ = problem(n, k, False)
    scales, zeros = grids(n, k, group_size, 4, True, 0, False)
    work, codes = weight.clone(), torch.full((n, k), 255, dtype=torch.uint8)
    index = (torch.arange(k) // group_size).int()
    for start in range(0, k, 96):
        gptq_block_update(work, hinv, codes, scales, zeros, start, start + 96, bits=4, group_index=index)
    assert (gptq_solve(weight, hinv, scales, zeros, bits=4) != codes).float().mean() < 0.01


@pytest.mark.parametrize("block_size", [1, 100, 576, 10_000])
def test_the_block_size_moves_only_roundings(monkeypatch, block_size):
    monkeypatch.setenv("NORMTWEAK_BACKEND", "reference")
    weight, _, hinv, _, order = problem(*SHAPES[0][:2], True)
    scales, zeros = grids(*SHAPES[0], 3, True, 0, True)
    codes = [gptq_solve(weight, hinv, scales, zeros, bits=3, order=order, block_size=size) for size in (128, block_size)]
    assert (codes[0] != codes[1]).float().mean() < 0.02


def test_non_contiguous_inputs(body):
    n, k, group_size = 40, 64, 16
    weight, _, hinv, _, order = problem(n, k, True)
    scales, zeros = grids(n, k, group_size, 4, False, 0, True)
    want = gptq_solve(weight, hinv, scales, zeros, bits=4, order=order)
    strided = [tensor.t().contiguous().t() for tensor in (weight, hinv, scales, zeros)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert torch.equal(gptq_solve(*strided, bits=4, order=torch.stack([order, order], 1)[:, 0]), want)


def test_result_is_independent_of_threads(isa):
    n, k, group_size = SHAPES[2]
    weight, _, hinv, _, order = problem(n, k, True)
    scales, zeros = grids(n, k, group_size, 3, False, 0, True)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(gptq_solve(weight, hinv, scales, zeros, bits=3, order=order))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck(body):
    weight, hinv = torch.randn(5, 8), torch.eye(8)
    arguments = (weight, hinv, torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.uint8), torch.randperm(8), 4, 3)
    torch.library.opcheck(torch.ops.normtweak.gptq_solve.default, arguments)


def good_arguments():
    return {
        "weight": torch.zeros(4, 8),
        "hinv": torch.eye(8),
        "scales": torch.ones(2, 4),
        "zeros": torch.zeros(2, 4, dtype=torch.uint8),
        "bits": 4,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits must be 2 to 8, got 1"),
        ({"weight": torch.zeros(8)}, "weight must be torch.float32"),
        ({"weight": torch.zeros(4, 8).half()}, r"weight must be torch.float32 \(4, 8\), got torch.float16 \(4, 8\)"),
        ({"hinv": torch.eye(7)}, r"hinv must be torch.float32 \(8, 8\), got torch.float32 \(7, 7\)"),
        ({"scales": torch.ones(2, 3)}, r"scales must be torch.float32 \(2, 4\), got torch.float32 \(2, 3\)"),
        ({"zeros": torch.zeros(2, 4)}, "zeros must be torch.uint8"),
        ({"scales": torch.ones(3, 4), "zeros": torch.zeros(3, 4, dtype=torch.uint8)}, "the number of groups must divide K = 8, got 3"),
        ({"order": torch.zeros(8)}, r"order must be int64 \[8\], got torch.float32 \(8,\)"),
        ({"block_size": 0}, "block_size must be 1 or more, got 0"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=f"gptq_solve: {message}"):
        gptq_solve(**{**good_arguments(), **arguments})


def test_an_order_that_is_no_permutation_is_refused(isa):
    with pytest.raises(ValueError, match=r"gptq_solve: order must be a permutation of the columns, got 0"):
        gptq_solve(**good_arguments(), order=torch.zeros(8, dtype=torch.int64))
