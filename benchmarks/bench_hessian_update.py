import pytest
import torch

from normtweak_kernels import hessian_update

PLAIN = "torch float32"
VARIANTS = (PLAIN, "reference", "cpp")
TOKENS = 2048
CASES = [(k, dtype) for k in (576, 1536, 4096) for dtype in (torch.bfloat16, torch.float32)]


def make(k, dtype):
    x, hessian = torch.randn(TOKENS, k, dtype=dtype), torch.zeros(k, k)
    values = x.float()
    calls = {PLAIN: lambda: hessian.addmm_(values.t(), values), **{variant: lambda: hessian_update(hessian, x) for variant in VARIANTS[1:]}}
    case = f"T={TOKENS} K={k} {str(dtype).removeprefix('torch.')}"
    return calls, {"op": "hessian_update", "case": case, "moved": x.nbytes + 4 * k * k, "flops": TOKENS * k * k}


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_hessian_update(measure, variant, shape):
    calls, info = make(*shape)
    measure(calls[variant], variant=variant, **info)
