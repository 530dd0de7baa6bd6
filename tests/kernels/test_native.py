import subprocess
import sys

import pytest
import torch

from normtweak_kernels import native

MISSING = """
import logging, sys
logging.basicConfig(format="%(message)s", level=logging.WARNING)
sys.modules["normtweak_kernels._native"] = None  # an import of it fails
import torch
from normtweak_kernels import group_params, native, which_backend
for _ in range(2):
    group_params(torch.randn(3, 8), bits=4)
print(which_backend("group_params", torch.randn(3, 8), None, 8, 4, True, 0), bool(native.why_missing()))
"""


def python(code, environment=None):
    import os

    cleaned = {name: value for name, value in os.environ.items() if not name.startswith("NORMTWEAK_")}
    return subprocess.run([sys.executable, "-c", code], env={**cleaned, **(environment or {})}, capture_output=True, text=True, timeout=120)


def test_without_the_module_the_reference_runs_and_says_so_once():
    result = python(MISSING)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["reference", "True"]
    assert result.stderr.count("normtweak runs without native kernels") == 1


def test_a_forced_missing_module_is_an_error():
    result = python(MISSING, {"NORMTWEAK_BACKEND": "cpp"})
    assert "ValueError: group_params: NORMTWEAK_BACKEND=cpp can't run this call: the C++ module is missing" in result.stderr


@pytest.mark.parametrize("isa", ["sse9", "avx1024"])
def test_an_unknown_isa_in_the_environment_is_an_error(native_module, isa):
    code = "import torch; from normtweak_kernels import group_params; group_params(torch.randn(3, 8), bits=4)"
    result = python(code, {"NORMTWEAK_ISA": isa})
    assert (
        f"ValueError: native kernels: NORMTWEAK_ISA must be one of {', '.join(native_module.available_isas())} on this processor, got {isa}"
        in result.stderr
    )


def test_the_environment_chooses_the_isa(native_module):
    code = "from normtweak_kernels import native; print(native.module().isa())"
    for name in (*native_module.available_isas(), *native_module.emulated_isas()):
        assert python(code, {"NORMTWEAK_ISA": name}).stdout.strip() == name
    assert python(code).stdout.strip() == [name for name in native_module.available_isas() if name != "amx"][-1]  # amx: on request only


def test_set_isa(native_module):
    with pytest.raises(ValueError, match=r"native kernels: isa must be one of portable.* on this processor, got vax"):
        native_module.set_isa("vax")
    native_module.set_isa("portable")
    assert native_module.isa() == "portable"
    native_module.set_isa("")


def test_importing_loads_no_native_module():
    code = "import sys, normtweak_kernels; print('normtweak_kernels._native' in sys.modules)"
    assert python(code).stdout.strip() == "False"


def test_both_kernels_packages_side_by_side():
    # `kernels` belongs to Hugging Face; ours must not take its name.
    import importlib.util

    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or "normtweak" not in spec.origin


def bad_calls():
    t = torch.zeros(64)
    a = t.data_ptr()
    grid = (4, True, 0, 0.28)
    return [
        ("group_params", (1, 0, 0, 4, 8, 8, *grid, a, a), "group_params: weight must be a tensor's address, got 0"),
        ("group_params", (1, a, 0, 4, 8, 3, *grid, a, a), "group_params: group_size must be a divisor of K, got 3"),
        ("group_params", (0, a, 0, 4, 8, 8, *grid, a, a), "group_params: threads must be positive, got 0"),
        ("group_params", (1, a, 0, 4, 8, 8, 9, True, 0, 0.28, a, a), "group_params: bits must be 2 to 8, got 9"),
        ("group_params", (1, a, 0, 4, 8, 8, 4, True, -1, 0.28, a, a), "group_params: clip_steps must be 0 or more, got -1"),
        ("gptq_block_update", (1, a, a, a, a, a, 0, 4, 8, 3, 0, 8, *grid), "gptq_block_update: groups must be a divisor of K, got 3"),
        ("gptq_block_update", (1, a, a, a, a, a, 0, 4, 8, 2, 4, 4, *grid), "gptq_block_update: start, stop must be"),
        ("gptq_block_update", (1, a, a, a, a, a, 0, 4, 8, 2, 1, 8, *grid), "start, stop must be multiples of the group size, got 1"),
        ("gptq_block_update", (1, a, a, 0, a, a, 0, 4, 8, 2, 0, 8, *grid), "gptq_block_update: codes must be a tensor's address, got 0"),
        ("gptq_solve", (1, a, a, a, a, 0, a, 4, 8, 3, 4), "gptq_solve: groups must be a divisor of K, got 3"),
        ("gptq_solve", (1, a, a, a, a, 0, a, 4, 8, 2, 1), "gptq_solve: bits must be 2 to 8, got 1"),
        ("gptq_solve", (1, a, a, a, a, 0, 0, 4, 8, 2, 4), "gptq_solve: codes must be a tensor's address, got 0"),
        ("inverse_cholesky", (1, a, 0, 0, a, 4), "inverse_cholesky: damping must be a tensor's address, got 0"),
        ("inverse_cholesky", (1, a, a, 0, a, 0), "inverse_cholesky: k must be positive, got 0"),
        ("hessian_update", (1, a, a, "float16", 4, 4), "hessian_update: dtype must be one that this processor multiplies, got float16"),
        ("hessian_update", (1, a, a, "float32", 0, 4), "hessian_update: tokens must be positive, got 0"),
        ("PackedWeight", (a, a, "bfloat16", 0, 4, 32, 1, 4), "PackedWeight: scale_dtype must be float16 or float32, got bfloat16"),
        ("PackedWeight", (a, a, "float32", 0, 4, 32, 5, 4), "PackedWeight: groups must be a divisor of K, got 5"),
        ("PackedWeight", (a, a, "float32", 0, 4, 32, 1, 5), "PackedWeight: bits must be one of 2, 3, 4, 8, got 5"),
        ("PackedWeight", (0, a, "float32", 0, 4, 32, 1, 4), "PackedWeight: words must be a tensor's address, got 0"),
        ("channel_loss", (1, a, "int8", 0, 2, 4, a, a, False, a, a), "channel_loss: dtype must be float32, bfloat16 or float16, got int8"),
        ("channel_loss", (1, a, "float32", 0, 0, 4, a, a, False, a, a), "channel_loss: tokens must be positive, got 0"),
        ("channel_statistics", (1, a, "float32", 0, 2, 4, a, 0), "channel_statistics: m2 must be a tensor's address, got 0"),
        ("channel_loss_backward", (1, a, "float32", 0, 2, 4, a, a, 0, a), "channel_loss_backward: slope must be a tensor's address, got 0"),
    ]


@pytest.mark.parametrize("index", range(len(bad_calls())))
def test_the_bindings_check_what_they_get(native_module, index):
    function, arguments, message = bad_calls()[index]
    with pytest.raises(ValueError, match=message):
        getattr(native_module, function)(*arguments)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("dequant_gemm_small", (1, 8, 0, 8, 0), "dequant_gemm: m must be positive, got 0"),
        ("dequant_gemm_small", (1, 0, 0, 8, 1), "dequant_gemm: x must be a tensor's address, got 0"),
        ("dequantize_panel", (1, 8, 4, 0, 32, 16, "float32", 8), "dequantize_panel: n0 must be a multiple of 16 below n1 <= N, got 8"),
        ("dequantize_panel", (1, 0, 4, 8, 32, 16, "float32", 8), "dequantize_panel: k0 must be a multiple of 32 below k1 <= K, got 8"),
        ("dequantize_panel", (1, 0, 4, 0, 32, 16, "float16", 8), "dequantize_panel: dtype must be float32 or bfloat16, got float16"),
        ("dequantize_panel", (1, 0, 4, 0, 32, 15, "float32", 8), "dequantize_panel: stride must be n1 - n0, rounded up to 16, or more, got 15"),
        ("integer_gemm", (1, 8, 0, 8, 1, "float32", 4, False), "dequant_gemm: planes must be 1, 2 or 3, got 4"),
        ("integer_gemm", (1, 8, 0, 8, 1, "float32", 2, True), "dequant_gemm: planes must be 1 with a scale per token, got 2"),
        ("integer_gemm", (0, 8, 0, 8, 1, "float32", 2, False), "dequant_gemm: threads must be positive, got 0"),
        ("integer_gemm", (1, 8, 0, 0, 1, "float32", 2, False), "dequant_gemm: y must be a tensor's address, got 0"),
    ],
)
def test_the_bindings_check_what_a_weight_is_multiplied_with(native_module, method, arguments, message):
    tensor = torch.zeros(64)
    weight = native_module.PackedWeight(tensor.data_ptr(), tensor.data_ptr(), "float32", 0, 4, 32, 1, 4)
    with pytest.raises(ValueError, match=message):
        getattr(weight, method)(*arguments)


def test_the_integer_kernel_refuses_what_it_can_not_run(native_module):
    tensor = torch.zeros(64)
    native_module.set_isa("portable")
    try:
        with pytest.raises(ValueError, match=r"K / G must be a multiple of 32, and the instruction set above portable, got 32 on portable"):
            native_module.PackedWeight(tensor.data_ptr(), tensor.data_ptr(), "float32", 0, 4, 32, 1, 4).integer_gemm(
                1, 8, 0, 8, 1, "float32", 2, False
            )
    finally:
        native_module.set_isa("")


def test_loaded_says_why_it_can_not(monkeypatch):
    monkeypatch.setattr(native, "_load", lambda: (None, "no compiler"))
    with pytest.raises(ValueError, match="native: the compiled module must be built, got no compiler"):
        native.loaded()
    assert native.refuses(torch.zeros(1)) == "the C++ module is missing (no compiler)"
