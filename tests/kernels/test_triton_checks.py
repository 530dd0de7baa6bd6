"""The checks themselves: a kernel that is right passes them, and each planted fault is found."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import triton_checks
from triton_checks import CAPABILITIES, assert_coalesced, interpreted, only_launched, simulated

OUTPUTS = {"scale_fwd_kernel": {"out_ptr"}}


@triton.jit
def scale_fwd_kernel(x_ptr, bias_ptr, out_ptr, size, factor, STRIDE: tl.constexpr, BLOCK: tl.constexpr, SLACK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size + SLACK
    x = tl.load(x_ptr + offs * STRIDE, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr)
    x -= tl.max(x, axis=0) * 0
    tl.store(out_ptr + offs, (x * factor).to(out_ptr.dtype.element_ty), mask=mask)


def scale(x, factor, bias=None, stride=1, slack=0):
    out = torch.empty_like(x[::stride])
    scale_fwd_kernel[lambda meta: (triton.cdiv(len(out), meta["BLOCK"]),)](
        x, bias, out, len(out), factor, STRIDE=stride, BLOCK=128, SLACK=slack, num_warps=2, enable_fp_fusion=True
    )
    return out


@pytest.mark.parametrize("bias", [None, torch.ones(1)])
def test_interpreter(bias):
    x = torch.randn(301)
    with interpreted():
        assert torch.empty(9).isnan().all()
        assert torch.equal(scale(x, 2.5, bias), (x if bias is None else x + 1) * 2.5)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("size", [301, 336])
def test_simulator(capability, dtype, size):
    x = torch.randn(size).to(dtype)
    with simulated(capability, OUTPUTS) as reports:
        assert torch.equal(scale(x, 2.5), x * 2.5)
    assert len(reports) == 1
    if size % 16 == 0:
        assert_coalesced(reports)


@pytest.mark.ptx
def test_a_read_past_the_end_is_found():
    with simulated(80, OUTPUTS), pytest.raises(AssertionError, match="bounds"):
        scale(torch.randn(301), 2.5, slack=1)


@pytest.mark.ptx
def test_strided_reads_are_found():
    with simulated(80, OUTPUTS) as reports:
        scale(torch.randn(1200), 2.5, stride=4)
    with pytest.raises(AssertionError, match="scale_fwd_kernel"):
        assert_coalesced(reports)


@pytest.mark.ptx
def test_what_was_not_written_is_not_an_input():
    with simulated(80, {"scale_fwd_kernel": {"x_ptr", "out_ptr"}}), pytest.raises(AssertionError, match="init"):
        scale(torch.randn(301), 2.5)


def test_waiting_for_the_device_is_found():
    with only_launched() as names:
        out = scale(torch.randn(300), 2.5)
        with pytest.raises(AssertionError, match="waits for the device"):
            out.sum().item()
        with pytest.raises(AssertionError, match="waits for the device"):
            assert out[0] > 0
    assert names == ["scale_fwd_kernel"]


def test_a_tools_folder_that_is_named_must_hold_them(monkeypatch, tmp_path):
    monkeypatch.setenv(triton_checks.ENVIRONMENT, str(tmp_path))
    with pytest.raises(pytest.UsageError, match="NORMTWEAK_TOOLS must name the folder of ptx_check.py"):
        triton_checks.tools_folder()
    (tmp_path / "ptx_check.py").touch()
    assert triton_checks.tools_folder() == tmp_path


@pytest.mark.parametrize(("value", "kind"), [(2.5, np.float32), (7, np.int32), (2**40, np.int64)])
def test_numbers_get_the_types_that_triton_gives_them(value, kind):
    assert type(triton_checks._argument(value)) is kind
