import pytest
import torch

from normtweak_kernels import group_params, registry, which_backend

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
