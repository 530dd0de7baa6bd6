"""hessian_update's Triton kernel: interpreted, as compiled PTX in a simulator, and on a GPU where there is one."""

import importlib

import pytest
import torch

from accuracy import assert_accurate
from normtweak_kernels import hessian_update, launch, which_backend
from normtweak_kernels.hessian_update import reference
from triton_checks import CAPABILITIES, assert_coalesced, interpreted, only_launched, simulated

# What it adds to is an input.
OUTPUTS = {"hessian_update_fwd_kernel": set()}
# [tokens, channels] around tiles of 64 channels and 32 or 16 tokens.
SHAPES = [(1, 1), (3, 5), (33, 65), (70, 130)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def activations(tokens, channels, dtype):
    return (torch.randn(tokens, channels) * torch.linspace(0.1, 3, channels) + 0.5).to(dtype)


def check(context, tokens, channels, dtype):
    x, start = activations(tokens, channels, dtype), torch.randn(channels, channels)
    plain, exact, got = start.clone(), start.double(), start.tril() + torch.full_like(start, torch.nan).triu(1)
    reference.hessian_update(plain, x)
    reference.hessian_update(exact, x.double())
    with context as reports:
        assert which_backend("hessian_update", got, x) == "triton"
        hessian_update(got, x)
    # What stands above the diagonal is no input, and undefined.
    assert_accurate(got.tril(), plain.tril(), exact.tril())
    return reports


@pytest.fixture
def module():
    return importlib.import_module("normtweak_kernels.hessian_update.triton_kernel")


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("tokens", "channels"), SHAPES)
def test_interpreted(module, monkeypatch, tokens, channels, dtype):
    monkeypatch.setattr(module, "_FLOAT32", "ieee")  # all that the interpreter has
    check(interpreted(), tokens, channels, dtype)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), [(3, 5), (70, 130)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_simulated(capability, tokens, channels, dtype):
    check(simulated(capability, OUTPUTS), tokens, channels, dtype)


@pytest.mark.ptx
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_older_versions_of_triton_multiply_float32_by_tf32_thrice(module, monkeypatch, capability):
    monkeypatch.setattr(module, "_FLOAT32", "tf32x3")
    check(simulated(capability, OUTPUTS), 70, 130, torch.float32)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_tiles_for_many_channels(monkeypatch, capability, dtype):
    monkeypatch.setattr(launch, "_HESSIAN_NARROW", launch._HESSIAN_WIDE)
    check(simulated(capability, OUTPUTS), 90, 140, dtype)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiles", ["narrow", "wide"])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_memory_is_asked_for_in_whole_lines(monkeypatch, capability, tiles, dtype):
    if tiles == "wide":
        monkeypatch.setattr(launch, "_HESSIAN_NARROW", launch._HESSIAN_WIDE)
    reports = check(simulated(capability, OUTPUTS), 96, 160, dtype)
    assert_coalesced(reports)


def test_only_tiles_of_the_lower_triangle_are_touched(module, monkeypatch):
    monkeypatch.setattr(module, "_FLOAT32", "ieee")
    hessian = torch.full((150, 150), 7.0)
    with interpreted():
        hessian_update(hessian, activations(20, 150, torch.float32))
    for start, stop in ((0, 64), (64, 128)):
        assert (hessian[start:stop, stop:] == 7).all()
    assert (hessian.diagonal() != 7).all()


def test_any_shape_and_strides(module, monkeypatch):
    monkeypatch.setattr(module, "_FLOAT32", "ieee")
    x = torch.full((2, 4, 30, 14), torch.nan)
    x[..., ::2] = torch.randn(2, 4, 30, 7)
    view, results = x[..., ::2], [torch.zeros(7, 7) for _ in range(3)]
    with interpreted():
        for hessian, values in zip(results, (view, view.reshape(-1, 7).contiguous(), x[:0, ..., ::2]), strict=True):
            hessian_update(hessian, values)
    assert torch.equal(results[0], results[1])
    assert (results[2] == 0).all()


def test_nothing_waits_for_the_device():
    with only_launched() as names:
        hessian_update(torch.zeros(80, 80), torch.randn(9, 80).half())
    assert names == ["hessian_update_fwd_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "channels"), [*SHAPES, (2048, 576), (1000, 2304), (513, 4096)])
def test_on_a_gpu(tokens, channels, dtype):
    x, start = activations(tokens, channels, dtype).cuda(), torch.randn(channels, channels, device="cuda")
    plain, exact, got = start.clone(), start.double(), start.clone()
    assert which_backend("hessian_update", got, x) == "triton"
    hessian_update(got, x)
    reference.hessian_update(exact, x.double())
    # Not reference.hessian_update, which may multiply bfloat16 values at a lower precision of sums.
    plain.addmm_(x.float().t(), x.float())
    assert_accurate(got.tril(), plain.tril(), exact.tril())
