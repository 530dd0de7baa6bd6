import functools

import pytest
import torch

from normtweak_kernels import affine, gptq_block_update, group_params
from normtweak_kernels.gptq_block_update import reference

SHAPES = [(5, 33, 33), (17, 96, 24), (80, 192, 64), (200, 576, 32)]


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def problem(n, k):
    """A weight, the Hessian of correlated activations and the upper Cholesky factor of its inverse; float64."""
    torch.manual_seed(1)
    x = torch.randn(2 * k, k, dtype=torch.float64) @ (torch.eye(k) + 0.2 * torch.randn(k, k) / k**0.5).double()
    hessian = x.t() @ x / len(x) + 0.01 * torch.eye(k)
    return torch.randn(n, k), hessian, torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).contiguous()


def run(update, weight, hinv, *, bits, group_size, block, symmetric, clip_steps, static, order=None):
    """All blocks in turn, outputs poisoned; returns weight, codes, scales, zeros."""
    n, k = weight.shape
    weight, dtype = weight.clone(), weight.dtype
    codes = torch.full((n, k), 255, dtype=torch.uint8)
    if static:
        scales, zeros = group_params(weight.float(), bits=bits, group_size=group_size, symmetric=symmetric, clip_steps=clip_steps)
        scales, index = scales.to(dtype), (torch.arange(k) // group_size).int()
        if order is not None:
            weight, index = weight[:, order].contiguous(), index[order]
    else:
        scales, zeros = torch.full((k // group_size, n), torch.nan, dtype=dtype), torch.full((k // group_size, n), 255, dtype=torch.uint8)
        index = None
    for start in range(0, k, block):
        update(weight, hinv.to(dtype), codes, scales, zeros, index, start, min(start + block, k), bits, symmetric, clip_steps)
    return weight, codes, scales, zeros


def public(weight, hinv, codes, scales, zeros, index, start, stop, bits, symmetric, clip_steps):
    gptq_block_update(weight, hinv, codes, scales, zeros, start, stop, bits=bits, group_index=index, symmetric=symmetric, clip_steps=clip_steps)


@functools.cache
def exact_result(n, k, **call):
    weight, _, hinv = problem(n, k)
    return run(reference.gptq_block_update, weight.double(), hinv, **call)[0]


def objective(weight, quantized, hessian):
    d = quantized.double() - weight.double()
    return ((d @ hessian) * d).sum()


def test_the_reference_is_column_by_column_gptq():
    weight, _, hinv = problem(7, 48)
    weight = weight.double()
    quantized, codes, scales, _ = run(
        reference.gptq_block_update, weight, hinv, bits=3, group_size=12, block=24, symmetric=False, clip_steps=0, static=False
    )
    w = weight.clone()
    for j in range(48):
        if j % 12 == 0:
            scale, zero = affine.grid(w[:, j : j + 12], 3, False, 0)
            assert torch.equal(scale, scales[j // 12])
        code = affine.quantize(w[:, j], scale, zero, 3)
        assert torch.equal(code, codes[:, j].double())
        q = (code - zero) * scale
        w[:, j + 1 :] -= torch.outer((w[:, j] - q) / hinv[j, j], hinv[j, j + 1 :])
        w[:, j] = q
    assert torch.allclose(w, quantized, rtol=0, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_objective_is_the_exact_reference_s(body, n, k, group_size, bits, static, symmetric):
    weight, hessian, hinv = problem(n, k)
    call = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "static": static}
    for block, clip_steps in ((k, 0), (2 * group_size, 8)):
        got, codes, scales, zeros = run(public, weight, hinv, block=block, clip_steps=clip_steps, **call)
        exact = exact_result(n, k, block=block, clip_steps=clip_steps, **call)
        assert torch.equal(got, affine.dequantize(codes, scales, zeros, bits))
        assert int(codes.max()) < 2**bits
        # Single codes may round the other way in float32, on either side; a small weight averages few of them out.
        assert objective(weight, got, hessian) <= objective(weight, exact, hessian) * (1.001 if n * k > 10_000 else 1.03)


def test_static_groups_in_any_column_order(body):
    weight, hessian, _ = problem(40, 128)
    order = torch.randperm(128)
    hinv = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True).contiguous()
    call = {"bits": 4, "group_size": 32, "block": 48, "symmetric": True, "clip_steps": 0, "static": True, "order": order}
    got, codes, scales, _ = run(public, weight, hinv, **call)
    exact, exact_codes, *_ = run(reference.gptq_block_update, weight.double(), hinv, **call)
    assert (codes != exact_codes).float().mean() < 0.01
    assert torch.equal(got, (codes.float() - 8) * scales[order // 32].t())
    assert objective(weight[:, order], got, hessian[order][:, order]) <= 1.001 * objective(weight[:, order], exact, hessian[order][:, order])


@pytest.mark.parametrize(("start", "stop"), [(0, 64), (64, 96), (96, 160), (128, 160)])
def test_one_block_touches_its_own_outputs_only(isa, start, stop):
    weight, _, hinv = problem(19, 160)
    results = []
    for update in (public, reference.gptq_block_update):
        w, codes = weight.clone(), torch.full((19, 160), 77, dtype=torch.uint8)
        scales, zeros = torch.full((5, 19), torch.nan), torch.full((5, 19), 99, dtype=torch.uint8)
        update(w, hinv.float(), codes, scales, zeros, None, start, stop, 4, False, 0)
        assert torch.equal(w[:, :start], weight[:, :start])
        assert (codes[:, :start] == 77).all()
        assert (codes[:, stop:] == 77).all()
        assert torch.isfinite(scales).all(1).tolist() == [start <= 32 * g < stop for g in range(5)]
        results.append((w, scales.nan_to_num(0), zeros))
    (w, scales, zeros), (want_w, want_scales, want_zeros) = results
    # A code that rounds the other way moves what follows it: the rows without one agree to rounding.
    same = (w[:, start:stop] - want_w[:, start:stop]).abs().amax(1) < 1e-5
    assert same.float().mean() > 0.8
    assert torch.allclose(w[same], want_w[same], rtol=0, atol=1e-4)
    assert torch.allclose(scales[:, same], want_scales[:, same], rtol=1e-3)
    assert (zeros[:, same].int() - want_zeros[:, same].int()).abs().max() <= 1


def test_result_is_independent_of_threads(isa):
    weight, _, hinv = problem(50, 96)
    call = {"bits": 2, "group_size": 32, "block": 96, "symmetric": False, "clip_steps": 6, "static": False}
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(public, weight, hinv, **call))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_opcheck(body):
    weight, _, hinv = problem(5, 48)
    scales, zeros = torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.uint8)
    arguments = (weight, hinv.float(), torch.zeros(5, 48, dtype=torch.uint8), scales, zeros)
    torch.library.opcheck(torch.ops.normtweak.gptq_block_update.default, (*arguments, None, 0, 24, 4, False, 2))


def good_arguments():
    return {
        "weight": torch.zeros(4, 8),
        "hinv": torch.eye(8),
        "codes": torch.zeros(4, 8, dtype=torch.uint8),
        "scales": torch.ones(2, 4),
        "zeros": torch.zeros(2, 4, dtype=torch.uint8),
        "start": 0,
        "stop": 8,
        "bits": 4,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "bits must be 2 to 8, got 9"),
        ({"weight": torch.zeros(8, 4).t()}, r"weight must be contiguous torch.float32 \(4, 8\), got torch.float32 \(4, 8\) not contiguous"),
        ({"weight": torch.zeros(8)}, "weight must be contiguous torch.float32"),
        ({"hinv": torch.eye(7)}, r"hinv must be contiguous torch.float32 \(8, 8\), got torch.float32 \(7, 7\)"),
        ({"codes": torch.zeros(4, 8)}, "codes must be contiguous torch.uint8"),
        ({"scales": torch.ones(2, 4).half()}, "scales must be contiguous torch.float32"),
        ({"zeros": torch.zeros(1, 4, dtype=torch.uint8)}, r"zeros must be contiguous torch.uint8 \(2, 4\)"),
        ({"scales": torch.ones(3, 4), "zeros": torch.zeros(3, 4, dtype=torch.uint8)}, "the number of groups must divide K = 8, got 3"),
        ({"start": 4, "stop": 4}, "start, stop must satisfy 0 <= start < stop <= 8, got 4, 4"),
        ({"stop": 9}, "start, stop must satisfy"),
        ({"start": 2}, "start and stop must be multiples of the group size 4 .* got 2, 8"),
        ({"group_index": torch.zeros(8)}, r"group_index must be int32 \[8\]"),
        ({"clip_steps": -2}, "clip_steps must be 0 or more, got -2"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=f"gptq_block_update: {message}"):
        gptq_block_update(**{**good_arguments(), **arguments})


def test_group_index_out_of_range_is_refused(isa):
    with pytest.raises(ValueError, match=r"gptq_block_update: group_index must be in \[0, G\), got 2"):
        gptq_block_update(**good_arguments(), group_index=torch.full((8,), 2, dtype=torch.int32))
