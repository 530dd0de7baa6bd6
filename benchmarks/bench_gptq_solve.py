"""The GPTQ loop over a whole weight, and a whole solve: grids, factor and loop, as quantizers/gptq.py calls them."""

import pytest
import torch

from normtweak.config import QuantizeConfig
from normtweak.quantizers.gptq import Solver
from normtweak_kernels import gptq_solve, group_params
from shapes import GROUP_SIZE, WEIGHTS

VARIANTS = ("reference", "cpp")


def loop(n, k):
    weight = torch.randn(n, k)
    hinv = torch.eye(k) + 0.01 * torch.randn(k, k).triu(1)
    scales, zeros = group_params(weight, bits=4, group_size=GROUP_SIZE)
    call = {variant: lambda: gptq_solve(weight, hinv, scales, zeros, bits=4) for variant in VARIANTS}
    return call, {"op": "gptq_solve", "case": f"N={n} K={k} loop", "moved": 5 * n * k + 2 * k * k, "flops": n * k * k}


def total(n, k):
    weight, x = torch.randn(n, k), torch.randn(2 * k, k) * torch.linspace(0.3, 3, k)
    hessian = x.t() @ x / len(x)
    config = QuantizeConfig(bits=4, group_size=GROUP_SIZE)
    call = {variant: lambda: Solver(hessian, config, "benchmark").quantize(weight, config) for variant in VARIANTS}
    # Per value and candidate of the clip search: divide, two bounds, round, multiply, subtract, square, add.
    flops = n * k * k + 2 * k**3 // 3 + 8 * config.clip_steps * n * k
    return call, {"op": "gptq_solve", "case": f"N={n} K={k} grids, factor and loop", "moved": 5 * n * k + 8 * k * k, "flops": flops}


CASES = [(make, shape) for make in (loop, total) for shape in WEIGHTS]


@pytest.mark.parametrize(("make", "shape"), CASES, ids=lambda value: getattr(value, "__name__", str(value)))
@pytest.mark.parametrize("variant", VARIANTS)
def test_gptq_solve(measure, variant, make, shape):
    calls, info = make(*shape)
    measure(calls[variant], variant=variant, **info)
