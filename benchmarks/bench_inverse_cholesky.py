import pytest
import torch

from normtweak_kernels import inverse_cholesky

LAPACK = "torch cholesky, cholesky_inverse, cholesky"
VARIANTS = (LAPACK, "reference", "cpp")
CASES = [(k,) for k in (576, 1536, 4096)]


def make(k):
    x = torch.randn(2 * k, k) * torch.linspace(0.3, 3, k)
    hessian = x.t() @ x / len(x)
    damping = 0.01 * hessian.diagonal().mean().repeat(k)
    damped = hessian + torch.diag(damping)

    def lapack():
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)

    calls = {LAPACK: lapack, **{variant: lambda: inverse_cholesky(hessian, damping) for variant in VARIANTS[1:]}}
    return calls, {"op": "inverse_cholesky", "case": f"K={k}", "moved": 8 * k * k, "flops": 2 * k**3 // 3}


@pytest.mark.parametrize("shape", CASES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_inverse_cholesky(measure, variant, shape):
    calls, info = make(*shape)
    measure(calls[variant], variant=variant, **info)
