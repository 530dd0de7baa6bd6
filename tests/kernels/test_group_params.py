import pytest
import torch

from normtweak_kernels import affine, group_params
from normtweak_kernels.group_params import reference

SHAPES = [(5, 33, -1), (17, 96, 24), (80, 192, 64), (3, 1536, -1), (200, 576, 32), (1, 1, 1)]


def achieved_error(weight, scales, zeros, bits, importance=None):
    """The squared error of each row's groups that the search minimizes, in float64."""
    groups = weight.double().unflatten(1, (scales.shape[0], -1))
    scale, zero = scales.t().double().unsqueeze(-1), zeros.t().double().unsqueeze(-1)
    square = ((affine.quantize(groups, scale, zero, bits) - zero) * scale - groups).square()
    return (square if importance is None else square * importance.double().view(1, scales.shape[0], -1)).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_min_max_is_the_reference_exactly(isa, n, k, group_size, bits, symmetric):
    weight = torch.randn(n, k) + 0.3
    scales, zeros = group_params(weight, bits=bits, group_size=group_size, symmetric=symmetric)
    want_scales, want_zeros = reference.group_params(weight, None, k if group_size == -1 else group_size, bits, symmetric, 0)
    assert torch.equal(scales, want_scales)
    assert torch.equal(zeros, want_zeros)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_clip_search_achieves_the_exact_search_s_error(body, n, k, group_size, bits, symmetric):
    weight, importance = torch.randn(n, k).pow(3), torch.rand(k)
    size = k if group_size == -1 else group_size
    for cost in (None, importance):
        scales, zeros = group_params(weight, bits=bits, group_size=group_size, symmetric=symmetric, clip_steps=36, importance=cost)
        error = achieved_error(weight, scales, zeros, bits, cost)
        # The same candidates, with sums in another order: another may win a near tie.
        same_precision = reference.group_params(weight, cost, size, bits, symmetric, 36)
        assert (error <= achieved_error(weight, *same_precision, bits, cost) * (1 + 1e-4) + 1e-12).all()
        # In float64 a few zeros and scales round the other way, so that single groups differ, better or worse.
        exact = reference.group_params(weight.double(), cost, size, bits, symmetric, 36)
        assert error.sum() <= achieved_error(weight, *exact, bits, cost).sum() * 1.001


@pytest.mark.parametrize("symmetric", [True, False])
def test_float16_rounding_over_its_whole_range(isa, symmetric):
    # From below the smallest subnormal to above the largest finite float16.
    weight = torch.randn(64, 24) * torch.logspace(-32, 20, 64, base=2).unsqueeze(1)
    scales, zeros = group_params(weight, bits=4, group_size=24, symmetric=symmetric)
    want_scales, want_zeros = reference.group_params(weight, None, 24, 4, symmetric, 0)
    assert torch.equal(scales, want_scales)
    assert torch.equal(zeros, want_zeros)
    assert torch.equal(scales, scales.half().float())
    assert scales.min() >= affine.MIN_SCALE
    assert scales.max() == 65504


def test_known_grids(body):
    weight = torch.tensor([[-1.0, 0.0, 2.0, 0.5], [0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 1.5]])
    scales, zeros = group_params(weight, bits=2, symmetric=False)
    assert scales.tolist() == [[1.0, affine.MIN_SCALE, 1.0]]
    assert zeros.tolist() == [[1, 0, 0]]
    scales, zeros = group_params(weight, bits=2, symmetric=True)
    assert scales[0].tolist() == [torch.tensor(4 / 3).half().item(), affine.MIN_SCALE, 2.0]
    assert zeros.tolist() == [[2, 2, 2]]


def test_ties_keep_the_widest_range(body):
    weight = torch.zeros(3, 32)
    assert (group_params(weight, bits=4, clip_steps=10)[0] == affine.MIN_SCALE).all()
    # Without weight every range costs nothing: the first, unclipped one stays.
    weight = torch.randn(3, 32)
    clipped = group_params(weight, bits=4, clip_steps=10, importance=torch.zeros(32))
    assert torch.equal(clipped[0], group_params(weight, bits=4)[0])


def test_non_contiguous_and_threads(isa):
    weight, importance = torch.randn(192, 37).t(), torch.rand(384)[::2]
    call = {"bits": 3, "group_size": 64, "symmetric": False, "clip_steps": 12}
    want = group_params(weight.contiguous(), importance=importance.contiguous(), **call)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            got = group_params(weight, importance=importance, **call)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_no_rows(body):
    scales, zeros = group_params(torch.empty(0, 64), bits=4, group_size=32)
    assert tuple(scales.shape) == tuple(zeros.shape) == (2, 0)


def test_opcheck(body):
    torch.library.opcheck(torch.ops.normtweak.group_params.default, (torch.randn(5, 48), torch.rand(48), 24, 3, False, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "group_params: bits must be 2 to 8, got 9"),
        ({"bits": 4, "weight": torch.zeros(4, dtype=torch.float32)}, r"group_params: weight must be float32 \[N, K\], got torch.float32 \(4,\)"),
        ({"bits": 4, "weight": torch.zeros(4, 8).half()}, "group_params: weight must be float32"),
        ({"bits": 4, "group_size": 7}, "group_params: group_size must divide K = 8, got 7"),
        ({"bits": 4, "group_size": 0}, "group_params: group_size must divide K = 8, got 0"),
        ({"bits": 4, "clip_steps": -1}, "group_params: clip_steps must be 0 or more, got -1"),
        ({"bits": 4, "importance": torch.ones(7)}, r"group_params: importance must be float32 \[8\]"),
        ({"bits": 4, "importance": torch.ones(8).double()}, r"group_params: importance must be float32 \[8\]"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        group_params(**{"weight": torch.zeros(4, 8), **arguments})
