"""gptq_block_update's Triton kernel: interpreted, as compiled PTX in a simulator, and on a GPU where there is one.

Its arithmetic is the reference's: in one launch weights, codes, scales and zeros are equal to the last bit, but for the order of sums in the clip search.
"""

import functools

import pytest
import torch

from normtweak_kernels import affine, gptq_block_update, gptq_solve, group_params, which_backend
from normtweak_kernels.gptq_block_update import reference
from normtweak_kernels.gptq_solve import reference as solve
from triton_checks import CAPABILITIES, assert_coalesced, interpreted, only_launched, simulated

OUTPUTS = {"gptq_block_update_fwd_kernel": {"codes_ptr", "errors_ptr"}}
# N, K, group size: rows that no program's 4 divide, widths that are no power of two.
SHAPES = [(3, 3, 3), (1, 33, 33), (5, 96, 24), (11, 128, 32)]


@functools.cache
def problem(n, k):
    """A weight, the Hessian of correlated activations and the upper Cholesky factor of its inverse."""
    torch.manual_seed(1)
    x = torch.randn(2 * k, k, dtype=torch.float64) @ (torch.eye(k) + 0.2 * torch.randn(k, k) / k**0.5).double()
    hessian = x.t() @ x / len(x) + 0.01 * torch.eye(k)
    return torch.randn(n, k), hessian, torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float().contiguous()


def run(update, weight, hinv, *, bits, group_size, symmetric=True, clip_steps=0, static=False, block=None, order=None):
    """All blocks in turn, outputs poisoned; returns weight, codes, scales, zeros."""
    n, k = weight.shape
    codes = torch.full((n, k), 255, dtype=torch.uint8, device=weight.device)
    index = None
    if static:
        scales, zeros = group_params(weight, bits=bits, group_size=group_size, symmetric=symmetric, clip_steps=clip_steps)
        index = (torch.arange(k, device=weight.device) // group_size).int()
    else:
        scales = torch.full((k // group_size, n), torch.nan, device=weight.device)
        zeros = torch.full((k // group_size, n), 255, dtype=torch.uint8, device=weight.device)
    weight = weight.clone()
    if order is not None:
        weight, index = weight[:, order].contiguous(), index[order]
    for start in range(0, k, block or k):
        update(weight, hinv, codes, scales, zeros, index, start, min(start + (block or k), k), bits, symmetric, clip_steps)
    return weight, codes, scales, zeros


def public(weight, hinv, codes, scales, zeros, index, start, stop, bits, symmetric, clip_steps):
    assert which_backend("gptq_block_update", weight, hinv, codes, scales, zeros, index, start, stop, bits, symmetric, clip_steps) == "triton"
    gptq_block_update(weight, hinv, codes, scales, zeros, start, stop, bits=bits, group_index=index, symmetric=symmetric, clip_steps=clip_steps)


def objective(weight, quantized, hessian):
    d = (quantized - weight).double().cpu()
    return ((d @ hessian) * d).sum()


def check_equal(context, n, k, **call):
    weight, _, hinv = problem(n, k)
    want = run(reference.gptq_block_update, weight, hinv, **call)
    with context as reports:
        got = run(public, weight, hinv, **call)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    return reports


def check_close(got, want, weight, hessian, bits):
    """Sums in another order: the codes are those of the scales, and the objective is as good."""
    assert torch.equal(got[0], affine.dequantize(got[1], got[2], got[3], bits))
    assert (got[1] == want[1]).float().mean() > 0.95
    assert objective(weight, got[0], hessian) <= 1.001 * objective(weight, want[0], hessian)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_interpreted(n, k, group_size, bits, static, symmetric):
    check_equal(interpreted(), n, k, bits=bits, group_size=group_size, static=static, symmetric=symmetric)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search(bits, symmetric):
    weight, hessian, hinv = problem(11, 128)
    call = {"bits": bits, "group_size": 32, "symmetric": symmetric, "clip_steps": 8}
    with interpreted():
        got = run(public, weight, hinv, **call)
    check_close(got, run(reference.gptq_block_update, weight, hinv, **call), weight, hessian, bits)
    # Clipping is what a small number of bits gains from.
    plain = run(reference.gptq_block_update, weight, hinv, **{**call, "clip_steps": 0})
    assert objective(weight, got[0], hessian) < 0.9 * objective(weight, plain[0], hessian) or bits > 2
    assert not torch.equal(got[2], plain[2])


@pytest.mark.parametrize("clip_steps", [1, 7, 24])
def test_clip_factors_are_the_reference_s(clip_steps):
    from normtweak_kernels.gptq_block_update.triton_kernel import _clip_factors

    want = torch.tensor([1.0 - step * (1.0 - affine.MIN_CLIP) / clip_steps for step in range(1, clip_steps + 1)])
    got = _clip_factors(clip_steps, torch.device("cpu"))
    assert torch.equal(got[:clip_steps], want)
    # Read two at a time.
    assert len(got) % 2 == 0
    assert (got[clip_steps:] == 1).all()


# Blocks of several launches: groups of 48 columns go in twos, a group that is wider than a launch has its grid found before.
@pytest.mark.parametrize(
    ("k", "group_size", "block", "static", "clip_steps"),
    [(288, 48, 288, False, 0), (288, 48, 144, True, 0), (200, 200, 200, False, 0), (320, 160, 320, False, 4)],
)
def test_blocks_of_more_columns_than_a_launch_takes(k, group_size, block, static, clip_steps):
    weight, hessian, hinv = problem(6, k)
    call = {"bits": 4, "group_size": group_size, "block": block, "static": static, "clip_steps": clip_steps, "symmetric": False}
    with interpreted():
        got = run(public, weight, hinv, **call)
    check_close(got, run(reference.gptq_block_update, weight, hinv, **call), weight, hessian, 4)


def test_static_groups_in_any_column_order():
    weight, hessian, _ = problem(9, 128)
    order = torch.randperm(128)
    hinv = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True).float().contiguous()
    call = {"bits": 3, "group_size": 32, "static": True, "order": order}
    want = run(reference.gptq_block_update, weight, hinv, **call)
    with interpreted():
        got = run(public, weight, hinv, **call)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.ptx
@pytest.mark.parametrize(("bits", "static", "symmetric"), [(2, False, False), (3, True, False), (4, False, True), (8, True, True)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_simulated(capability, bits, static, symmetric):
    check_equal(simulated(capability, OUTPUTS), 7, 72, bits=bits, group_size=24, static=static, symmetric=symmetric)


@pytest.mark.ptx
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_simulated_clip_search(capability):
    weight, hessian, hinv = problem(7, 72)
    call = {"bits": 2, "group_size": 24, "symmetric": False, "clip_steps": 5}
    with simulated(capability, OUTPUTS):
        got = run(public, weight, hinv, **call)
    check_close(got, run(reference.gptq_block_update, weight, hinv, **call), weight, hessian, 2)


@pytest.mark.ptx
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_block_in_the_middle(capability):
    weight, _, hinv = problem(10, 96)
    results = []
    for update, context in ((reference.gptq_block_update, interpreted()), (public, simulated(capability, OUTPUTS))):
        w, codes = weight.clone(), torch.full((10, 96), 77, dtype=torch.uint8)
        scales, zeros = torch.full((6, 10), torch.nan), torch.full((6, 10), 99, dtype=torch.uint8)
        with context:
            update(w, hinv, codes, scales, zeros, None, 32, 64, 4, False, 0)
        assert torch.equal(w[:, :32], weight[:, :32])
        results.append((w, codes, scales.nan_to_num(-1), zeros))
    (w, *got), (want_w, *want) = results[1], results[0]
    # The simulator poisons what was not written of an output, here the other columns' codes.
    got[0][:, :32] = got[0][:, 64:] = 77
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(w[:, :64], want_w[:, :64])
    assert torch.allclose(w[:, 64:], want_w[:, 64:], rtol=0, atol=1e-5)


@pytest.mark.ptx
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_memory_is_asked_for_once(capability, static):
    reports = check_equal(simulated(capability, OUTPUTS), 16, 128, bits=4, group_size=32, static=static)
    assert_coalesced(reports)
    # The weight, of U the triangle in squares of four, once for all rows, and grids with the columns' groups.
    triangle = 16 * 32 * 33 // 2
    parameters = 4 * 16 * 5 + 128 * 4 if static else 0
    assert reports[0].bytes_read == 4 * (16 * 128 + triangle) + parameters


@pytest.mark.ptx
def test_a_group_that_is_not_there_is_not_read():
    weight, _, hinv = problem(4, 32)
    index = torch.zeros(32, dtype=torch.int32)
    index[20] = 2
    codes, scales, zeros = torch.zeros(4, 32, dtype=torch.uint8), torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.uint8)
    with simulated(80, OUTPUTS):
        gptq_block_update(weight.clone(), hinv, codes, scales, zeros, 0, 32, bits=4, group_index=index)


def test_solve_runs_it_block_by_block_without_waiting_for_the_device():
    weight, _, hinv = problem(6, 256)
    scales, zeros = group_params(weight, bits=4, group_size=64)
    order = torch.randperm(256)
    arguments = (weight, hinv, scales, zeros, order, 4, 128)
    with only_launched() as names:
        solve.gptq_solve(*arguments)
        # Grids that are found, by a clip search.
        codes, found = torch.empty(6, 256, dtype=torch.uint8), (scales.clone(), zeros.clone())
        torch.ops.normtweak.gptq_block_update(weight.clone(), hinv, codes, *found, None, 0, 256, 4, True, 8)
    assert names == ["gptq_block_update_fwd_kernel"] * 4
    with interpreted():
        got = solve.gptq_solve(*arguments)
    want = solve.gptq_solve(*arguments)
    assert (got == want).float().mean() > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip_steps", [0, 24])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), [*SHAPES, (576, 1536, 64), (100, 1536, 1536)])
def test_on_a_gpu(n, k, group_size, bits, clip_steps, symmetric):
    weight, hessian, hinv = problem(n, k)
    call = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "clip_steps": clip_steps}
    got = [value.cpu() for value in run(public, weight.cuda(), hinv.cuda(), **call)]
    check_close(got, run(reference.gptq_block_update, weight, hinv, **call), weight, hessian, bits)


@pytest.mark.gpu
def test_solve_on_a_gpu():
    weight, hessian, hinv = problem(576, 1536)
    scales, zeros = group_params(weight, bits=4, group_size=64)
    want = gptq_solve(weight, hinv, scales, zeros, bits=4)
    got = gptq_solve(*(value.cuda() for value in (weight, hinv, scales, zeros)), bits=4).cpu()
    quantized = [affine.dequantize(codes, scales, zeros, 4) for codes in (got, want)]
    assert objective(weight, quantized[0], hessian) <= 1.001 * objective(weight, quantized[1], hessian)
