import sys

import pytest
import torch

from normtweak_kernels import gpu, group_params, registry, which_backend

CALL = (torch.zeros(2, 32), None, 32, 4, True, 0)


def test_every_op_has_a_reference_and_a_cpp_body(monkeypatch, native_module):
    assert registry.ops() == [
        "channel_loss",
        "channel_loss_and_grad",
        "channel_loss_backward",
        "channel_statistics",
        "dequant_gemm",
        "dequant_gemm_backward",
        "gptq_block_update",
        "gptq_solve",
        "group_params",
        "hessian_update",
        "inverse_cholesky",
        "repack_gptq",
        "repack_to_gptq",
    ]
    for backend in ("reference", "cpp"):
        monkeypatch.setenv("NORMTWEAK_BACKEND", backend)
        assert which_backend("group_params", *CALL) == backend


def test_the_fastest_is_the_default(monkeypatch, native_module):
    monkeypatch.delenv("NORMTWEAK_BACKEND", raising=False)
    assert which_backend("group_params", *CALL) == "cpp"
    x = torch.zeros(2, 8)
    arguments = (torch.zeros(1, 4, 16, dtype=torch.int32), torch.ones(1, 4), None, None, 4, "auto")
    assert which_backend("dequant_gemm", x, *arguments) == "cpp"
    assert which_backend("dequant_gemm", x.double(), *arguments) == "reference"


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", "group_params: NORMTWEAK_BACKEND must be one of triton, cpp, reference, got cuda"),
        ("triton", "group_params: NORMTWEAK_BACKEND must be one of .* for this op, got triton"),
    ],
)
def test_a_forced_backend_that_is_not_there_is_an_error(monkeypatch, backend, message):
    if backend == "triton" and "triton" in registry._IMPLEMENTATIONS["group_params"]:
        pytest.skip("the op has a triton body")
    monkeypatch.setenv("NORMTWEAK_BACKEND", backend)
    with pytest.raises(ValueError, match=message):
        group_params(torch.zeros(2, 32), bits=4)


def test_a_forced_backend_that_refuses_is_an_error(monkeypatch, native_module):
    monkeypatch.setenv("NORMTWEAK_BACKEND", "cpp")
    with pytest.raises(ValueError, match=r"group_params: NORMTWEAK_BACKEND=cpp can't run this call: .* not on the CPU"):
        registry.select("group_params", torch.zeros(2, 32, device="meta"), *CALL[1:])
    with pytest.raises(ValueError, match="float64 is computed by the reference only"):
        registry.select("group_params", torch.zeros(2, 32).double(), *CALL[1:])


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="nonsense: op must be one of channel_loss"):
        registry.select("nonsense")
    with pytest.raises(ValueError, match="register: backend must be one of triton, cpp, reference, got fpga"):
        registry.register("group_params", "fpga")


def test_when_nothing_runs_the_call(monkeypatch):
    monkeypatch.delenv("NORMTWEAK_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", {"op": {}})
    with pytest.raises(ValueError, match="op: no backend runs this call"):
        registry.select("op")


def test_a_lazy_body_is_imported_by_the_first_call_that_it_does_not_refuse(monkeypatch, tmp_path):
    (tmp_path / "lazy_body.py").write_text(
        "from normtweak_kernels import registry\n"
        "@registry.register('op', 'triton', lambda x: 'x is odd' if x % 2 else None)\n"
        "def op(x):\n    return x + 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("NORMTWEAK_BACKEND", raising=False)
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", {})
    registry.register("op", "reference")(lambda x: -1)
    registry.register_lazily("op", "triton", "lazy_body", lambda x: "x is negative" if x < 0 else None)
    assert which_backend("op", -2) == "reference"
    assert "lazy_body" not in sys.modules
    assert which_backend("op", 3) == "reference"
    assert "lazy_body" in sys.modules
    chosen = registry.select("op", 2)
    assert (chosen.backend, chosen.run(2)) == ("triton", 3)
    monkeypatch.setenv("NORMTWEAK_BACKEND", "triton")
    with pytest.raises(ValueError, match="op: NORMTWEAK_BACKEND=triton can't run this call: x is odd"):
        registry.select("op", 3)


def test_triton_runs_on_gpus_and_in_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(2)
    assert gpu.refuses(x, None, 4) == "a tensor is on cpu, not on a GPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "why_missing", lambda: "")
    assert gpu.refuses(x, None, 4, "auto") is None
    assert gpu.refuses(x, x.double()) == "float64 is computed by the reference only"
    assert gpu.refuses(x, x.to("meta")) == "a tensor is on meta, not on a GPU"
    monkeypatch.setattr(gpu, "why_missing", lambda: "No module named 'triton'")
    assert gpu.refuses(x) == "Triton is missing (No module named 'triton')"
    with gpu.on_device_of(x):
        pass


def test_triton_refuses_gpus_that_it_makes_no_tensor_core_code_for(monkeypatch):
    monkeypatch.setattr(gpu, "why_missing", lambda: "")
    monkeypatch.setattr(torch.version, "hip", None)
    for index, capability, name in ((0, (7, 5), "sm_75"), (1, (9, 0), "sm_90"), (2, (12, 0), "sm_120")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        for cached in (gpu.architecture, gpu._too_old):
            cached.cache_clear()
        assert gpu.architecture(index) == name
        assert gpu._too_old(index) == ("the GPU is an sm_75, older than sm_80" if index == 0 else None)
    for cached in (gpu.architecture, gpu._too_old):
        cached.cache_clear()
