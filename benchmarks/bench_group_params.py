import pytest
import torch

from normtweak_kernels import group_params
from shapes import GROUP_SIZE, WEIGHTS


@pytest.mark.parametrize("clip_steps", [0, 36])
@pytest.mark.parametrize(("n", "k"), WEIGHTS)
@pytest.mark.parametrize("variant", ["reference", "cpp"])
def test_group_params(measure, variant, n, k, clip_steps):
    weight = torch.randn(n, k)
    # Per value and candidate: divide, two bounds, round, multiply, subtract, square, add.
    measure(
        lambda: group_params(weight, bits=2, group_size=GROUP_SIZE, symmetric=False, clip_steps=clip_steps),
        op="group_params", variant=variant, case=f"N={n} K={k} clip_steps={clip_steps}", moved=weight.nbytes, flops=8 * clip_steps * n * k,
    )  # fmt: skip
