"""Fixtures that choose an op's body and its instruction set."""

import os
import platform

import pytest
import torch

from normtweak_kernels import gpu, native

# They import Triton; the summary says that they didn't run.
collect_ignore_glob = ["test_*triton*.py"] if gpu.why_missing() else []

X86_64 = ("avx2", "avx2_vnni", "avx512", "avx512_vnni", "amx", "amx_emulated")
# Those that the module may have been built with; a processor that lacks one skips its tests.
ISAS = ("portable", *(X86_64 if platform.machine() in ("x86_64", "AMD64") else ("dotprod",)))


def _native_module():
    module = native.module()
    if module is None:
        assert os.environ.get("NORMTWEAK_REQUIRE_NATIVE") != "1", native.why_missing()
        pytest.skip(native.why_missing())
    return module


@pytest.fixture
def native_module():
    return _native_module()


def _force_cpp(isa, monkeypatch):
    module = _native_module()
    if isa not in (*module.available_isas(), *module.emulated_isas()):
        pytest.skip(f"this processor has no {isa}")
    monkeypatch.setenv("NORMTWEAK_BACKEND", "cpp")
    module.set_isa(isa)
    return module


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """The C++ bodies of every instruction set that this processor has."""
    module = _force_cpp(request.param, monkeypatch)
    yield request.param
    module.set_isa("")


@pytest.fixture(params=["reference", *ISAS])
def body(request, monkeypatch):
    """The reference, then the C++ bodies."""
    if request.param == "reference":
        monkeypatch.setenv("NORMTWEAK_BACKEND", "reference")
        yield request.param
        return
    module = _force_cpp(request.param, monkeypatch)
    yield request.param
    module.set_isa("")


@pytest.fixture
def one_thread():
    """For references of thousands of tiny operations, for which waking threads takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
