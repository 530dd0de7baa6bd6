"""The one tolerance rule, and the weights that several tests share."""

import torch

from normtweak_kernels import QuantizedWeight


def assert_accurate(actual: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
    """At most twice the error that plain torch makes at the same precision, plus some roundings of float32 where torch made few by luck."""
    assert actual.shape == exact.shape
    assert actual.dtype == plain.dtype
    assert torch.isfinite(actual).all()
    error, allowed = (actual.double() - exact).abs().max(), 2 * (plain.double() - exact).abs().max()
    assert error <= allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max(), (error, allowed)


def random_weight(n: int, k: int, bits: int, group_size: int, *, zeros: bool, scale_dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    groups = 1 if group_size == -1 else k // group_size
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(groups, n) + 0.5).to(scale_dtype)
    return QuantizedWeight(codes, scales, torch.randint(0, 2**bits, (groups, n), dtype=torch.uint8) if zeros else None, bits)
