"""dequant_gemm's Triton kernel for few rows, and which kernel the op takes on a GPU."""

import itertools
from unittest import mock

import pytest
import torch

from accuracy import assert_accurate, random_weight
from normtweak_kernels import dequant_gemm, packing, registry
from normtweak_kernels.dequant_gemm import triton_kernel
from normtweak_kernels.dequant_gemm.reference import quantize_activations
from normtweak_kernels.dequant_gemm.triton_gemv import gemv
from normtweak_kernels.launch import DEQUANT_GEMM_GPU, DequantGemmGpu, DequantGemvGpu
from triton_checks import CAPABILITIES, assert_coalesced, interpreted, only_launched, simulated

OUTPUTS = {"dequant_gemv_fwd_kernel": {"y_ptr"}}
CONFIG = DequantGemvGpu(num_warps=4, chunks=2)
# (N, K, group size): N and K that no tile divides, K that ends within a chunk of 32 and at no multiple of 16.
SHAPES = [(80, 192, -1), (200, 576, 32), (80, 192, 64), (24, 384, 128), (33, 288, 96), (17, 72, -1)]


def case(m, n, k, group_size, bits, dtype, *, zeros, bias, scale_dtype=torch.float16):
    weight = random_weight(n, k, bits, group_size, zeros=zeros, scale_dtype=scale_dtype)
    return weight, torch.randn(m, k).to(dtype), torch.randn(n).to(dtype) if bias else None


def run(weight, x, bias, config=CONFIG):
    return gemv(x, weight.pack(), weight.scales, weight.zeros, bias, weight.bits, config, x.dtype)


def assert_right(y, weight, x, bias):
    plain = torch.nn.functional.linear(x, weight.dequantize().to(x.dtype), bias)
    exact = torch.nn.functional.linear(x.double(), weight.dequantize(torch.float64), None if bias is None else bias.double())
    assert_accurate(y, plain, exact)


def check_gemv(shape, bits, zeros, dtype, config, scale_dtype, context):
    call = case(*shape, bits, dtype, zeros=zeros, bias=True, scale_dtype=scale_dtype)
    with context:
        y = run(*call, config=config)
    assert_right(y, *call)


@pytest.mark.parametrize("zeros", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
def test_interpreter(n, k, group_size, bits, zeros):
    for m, scale_dtype, dtype in ((1, torch.float16, torch.float32), (3, torch.float32, torch.float16)):
        call = case(m, n, k, group_size, bits, dtype, zeros=zeros, bias=m == 3, scale_dtype=scale_dtype)
        with interpreted():
            y = run(*call)
        assert_right(y, *call)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", packing.BITS)
def test_simulator(bits, capability, dtype):
    shapes = itertools.cycle(SHAPES[bits % 2 :: 2] + SHAPES[1 - bits % 2 :: 2])
    for m, zeros in ((1, True), (3, False)):
        call = case(m, *next(shapes), bits, dtype, zeros=zeros, bias=zeros, scale_dtype=torch.float16 if zeros else torch.float32)
        with simulated(capability, OUTPUTS):
            y = run(*call)
        assert_right(y, *call)


@pytest.mark.ptx
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("bits", packing.BITS)
def test_each_byte_is_read_once_in_whole_sectors(bits, capability):
    weight, x, bias = case(2, 48, 576, 64, bits, torch.float16, zeros=False, bias=True)
    packed = weight.pack()
    with simulated(capability, OUTPUTS) as reports:
        run(weight, x, bias)
    assert_coalesced(reports)
    assert reports[0].bytes_read == sum(tensor.nbytes for tensor in (packed, weight.scales, x, bias))
    assert reports[0].bytes_written == 2 * 48 * 2
    wide = [op for _, op, _, sectors, _ in reports[0].access_table() if sectors is not None and op.startswith("ld.global.v4")]
    assert len(wide) >= 2, "the words and x are read 16 bytes at a time"


@pytest.mark.ptx
@pytest.mark.parametrize(("bits", "k"), [(2, 1152), (3, 768), (4, 576), (8, 576)])
def test_per_channel_little_but_the_weight_is_read(bits, k):
    weight, x, _ = case(1, 256, k, -1, bits, torch.float16, zeros=True, bias=False)
    with simulated(80, OUTPUTS) as reports:
        run(weight, x, None)
    assert weight.pack().nbytes <= reports[0].bytes_read <= 1.05 * weight.pack().nbytes
    assert_coalesced(reports)


@pytest.mark.ptx
def test_zeros_of_sixteen_columns_are_half_a_sector():
    """The other half belongs to the next program, which finds it in cache; nothing else is read in more sectors than it fills."""
    call = case(1, 80, 192, 32, 4, torch.float16, zeros=True, bias=False)
    with simulated(80, OUTPUTS) as reports:
        run(*call)
    assert_coalesced(reports, ratio=2.0)
    (zeros,) = [sectors for _, op, _, sectors, _ in reports[0].access_table() if op == "ld.global.b32"]
    assert [row for row in reports[0].access_table() if row[3] is not None and row[3] > 1.3] == [
        row for row in reports[0].access_table() if row[1] == "ld.global.b32"
    ]
    assert zeros > 1.3


@pytest.mark.parametrize("config", sorted({c for lists in DEQUANT_GEMM_GPU.values() for c in lists.gemv}, key=str), ids=str)
def test_every_shipped_configuration(config):
    for m, group_size in ((2, -1), (8, 128)):
        call = case(m, 40, 768, group_size, 4, torch.float16, zeros=True, bias=True)
        with interpreted():
            y = run(*call, config=config)
        assert_right(y, *call)


def test_a_value_that_is_not_finite_is_seen_in_its_row_alone():
    weight, x, _ = case(3, 33, 288, 96, 4, torch.float16, zeros=True, bias=False)
    x[1, 77] = torch.inf
    with interpreted():
        y = run(weight, x, None)
    assert not torch.isfinite(y[1]).any()
    assert torch.isfinite(y[[0, 2]]).all()


ARGUMENTS = torch.zeros(1, 8, 16, dtype=torch.int32), torch.ones(1, 4), None


def test_the_op_takes_the_kernel_where_it_can(monkeypatch):
    monkeypatch.delenv("NORMTWEAK_BACKEND", raising=False)
    weight, x, bias = case(6, 33, 96, 32, 3, torch.float16, zeros=True, bias=True)
    x = x.view(96, 3, 2).permute(2, 1, 0)[:1]
    arguments = weight.pack(), weight.scales, weight.zeros
    with interpreted():
        assert registry.which_backend("dequant_gemm", x, *arguments, bias, 3, "auto") == "triton"
        y = dequant_gemm(x, *arguments, bias, bits=3)
        strided = torch.stack([arguments[0], arguments[0]], -1)[..., 0], weight.scales.t().contiguous().t(), weight.zeros
        assert torch.equal(dequant_gemm(x, *strided, bias.repeat_interleave(2)[::2], bits=3), y)
        assert dequant_gemm(x[:0], *arguments, bits=3).shape == (0, 3, 33)
    assert y.shape == (1, 3, 33)
    assert_right(y.view(3, 33), weight, x.reshape(3, 96), bias)


@pytest.mark.parametrize("activations", ["auto", "int16", "int8", "int8_token"])
def test_rounded_activations(activations):
    weight, x, _ = case(3, 33, 192, 64, 4, torch.float16, zeros=True, bias=False)
    with interpreted():
        y = dequant_gemm(x, weight.pack(), weight.scales, weight.zeros, bits=4, activations=activations)
    rounded = x.double() if activations in ("auto", "int16") else quantize_activations(x.double(), 3, activations)
    exact = rounded @ weight.dequantize(torch.float64).t()
    assert (y.double() - exact).abs().max() <= 2 * torch.finfo(torch.float16).eps * exact.abs().max()


def test_which_kernel_runs():
    def kernels(m, activations="auto", dtype=torch.float16, capability=80):
        names = "gemv", "gemm", "gemm_int8"
        with interpreted(capability), mock.patch.multiple(triton_kernel, **{name: mock.MagicMock(name=name) for name in names}) as _:
            for name in names:
                getattr(triton_kernel, name).return_value = torch.zeros(m, 4, dtype=dtype)
            triton_kernel.dequant_gemm(torch.zeros(m, 64, dtype=dtype), *ARGUMENTS, None, 4, activations)
            return [(name, getattr(triton_kernel, name).call_args) for name in names if getattr(triton_kernel, name).called]

    def names(*arguments, **named):
        return [name for name, _ in kernels(*arguments, **named)]

    few = DEQUANT_GEMM_GPU["sm_80"].gemv_max_rows
    assert names(1) == names(few) == ["gemv"]
    assert names(few + 1) == names(64) == names(1000) == ["gemm"]
    assert names(8, capability=86) == ["gemv"]
    assert names(8, dtype=torch.float32) == ["gemv"]
    assert names(1, "int8_token") == names(1, "int8") == ["gemv"]
    assert names(8, "int8_token") == ["gemm"]
    assert names(64, "int8_token") == ["gemm_int8"]
    assert [kernels(m)[0][1].args[-1].block_m for m in (16, 17, 64, 65)] == [16, 32, 64, 64]


@pytest.mark.parametrize(
    ("x", "scales", "reason"),
    [
        (torch.zeros(1, 48).half(), torch.ones(2, 4), "the group size must be all of K or a multiple of 32, got 24 of 48"),
        (torch.zeros(9, 64), torch.ones(1, 4), "more than 8 rows of float32 are computed by the reference only"),
        (torch.zeros(1, 64).double(), torch.ones(1, 4), "float64 is computed by the reference only"),
        (torch.zeros(1, 64).half().to("meta"), torch.ones(1, 4), "a tensor is on meta, not on a GPU"),
    ],
)
def test_what_the_reference_computes(monkeypatch, x, scales, reason):
    monkeypatch.setenv("NORMTWEAK_BACKEND", "triton")
    with interpreted(), pytest.raises(ValueError, match=f"dequant_gemm: NORMTWEAK_BACKEND=triton can't run this call: {reason}"):
        registry.select("dequant_gemm", x, ARGUMENTS[0], scales, None, None, 4, "auto")


def test_bytes_whose_sums_overflow_go_to_the_reference(monkeypatch):
    monkeypatch.setenv("NORMTWEAK_BACKEND", "triton")
    wide = torch.zeros(9, 2**16 + 32).half()
    with interpreted(), pytest.raises(ValueError, match="sums of products of two bytes over more than 65536 columns overflow 32 bits"):
        registry.select("dequant_gemm", wide, ARGUMENTS[0], torch.ones(1, 4), None, None, 8, "int8_token")


def test_what_has_no_gradient_kernel(monkeypatch):
    monkeypatch.setenv("NORMTWEAK_BACKEND", "triton")
    with interpreted(), pytest.raises(ValueError, match="a gradient in float32 is computed by the reference only"):
        registry.select("dequant_gemm_backward", torch.zeros(1, 4), *ARGUMENTS, 4, 64)


def test_nothing_waits_for_the_gpu():
    weight, x, bias = case(2, 33, 96, 32, 4, torch.float16, zeros=True, bias=True)
    packed = weight.pack()
    with only_launched() as names:
        for activations in ("auto", "int8", "int8_token"):
            triton_kernel.dequant_gemm(x, packed, weight.scales, weight.zeros, bias, 4, activations)
    assert names == ["dequant_gemv_fwd_kernel"] * 3


def test_opcheck():
    weight, x, bias = case(2, 33, 96, 32, 4, torch.float16, zeros=True, bias=True)
    with interpreted():
        torch.library.opcheck(torch.ops.normtweak.dequant_gemm.default, (x, weight.pack(), weight.scales, weight.zeros, bias, 4, "auto"))


def test_a_tuned_choice_is_launched(monkeypatch):
    chosen = {}
    monkeypatch.setattr(triton_kernel.tuning, "chosen", lambda name, configs, index: chosen.get(name))
    weight, x, _ = case(2, 33, 96, 32, 4, torch.float16, zeros=False, bias=False)
    arguments = x, weight.pack(), weight.scales, None, None, 4, "auto"
    with only_launched() as names:
        triton_kernel.dequant_gemm(*arguments)
        chosen[triton_kernel._key("fewest rows", 2, 33, 96, 4, 3)] = DequantGemmGpu(16, 64, 32)
        triton_kernel.dequant_gemm(*arguments)
    assert names == ["dequant_gemv_fwd_kernel", "dequant_gemm_fwd_kernel"]


def test_warming_times_every_regime_and_notes_the_fastest(monkeypatch):
    noted = {}
    monkeypatch.setattr(triton_kernel, "WARM_ROWS", (1, 16, 128))
    monkeypatch.setattr(triton_kernel, "WARM_BACKWARD_ROWS", (512,))
    monkeypatch.setattr(triton_kernel.tuning, "tune", lambda configs, run, does_not_fit: (run(configs[-1]), (configs[-1], 12.5))[1])
    monkeypatch.setattr(triton_kernel.tuning, "note", lambda choices, index: noted.update(choices))
    with only_launched() as names:
        lines = list(triton_kernel.warm(64, 96, 4, 3, False, torch.float16, torch.device("cpu")))
    lists = DEQUANT_GEMM_GPU["sm_80"]
    tuned = [("fewest rows", 1, lists.few_rows), ("few rows", 16, lists.few_rows), ("int8", 16, lists.int8), ("many rows", 128, lists.many_rows)]
    tuned += [("int8", 128, lists.int8), ("backward", 512, lists.gradients(4, 3))]
    assert noted == {triton_kernel._key(regime, m, 64, 96, 4, 3): configs[-1] for regime, m, configs in tuned}
    assert [line.rpartition(": ")[0] for line in lines] == [f"64 x 96, 4 bits, M = {m}, {regime}" for regime, m, _ in tuned]
    assert set(names) >= {"dequant_gemm_fwd_kernel", "quantize_tokens_kernel", "dequant_gemm_bwd_kernel"}


def test_the_first_tile_that_holds_all_rows_and_no_more_parts_than_multiprocessors_take():
    configs = [DequantGemmGpu(16, 64, 64, split_k=8), DequantGemmGpu(16, 32, 64), DequantGemmGpu(64, 64, 64, split_k=4)]
    cpu = torch.device("cpu")
    with interpreted():
        chosen = [
            triton_kernel._choose("few rows", configs, m, n, 4096, 4, 64, cpu) for m, n in ((9, 64), (17, 4096), (80, 4096), (16, 11008), (16, 65536))
        ]
    assert [(c.block_m, c.split_k) for c in chosen] == [(16, 8), (64, 4), (64, 2), (16, 2), (16, 1)]


def test_the_widest_tile_that_leaves_no_multiprocessor_idle():
    def tile(m, n, bits, groups):
        return triton_kernel._likely(*triton_kernel.candidates(DEQUANT_GEMM_GPU["sm_80"], m, bits, groups, torch.float16, "auto"), m, n, 108)

    tiles = [(c.block_m, c.block_n) for c in (tile(4096, 4096, 4, 1), tile(4096, 4096, 3, 64), tile(4096, 4096, 4, 64), tile(65, 4096, 4, 1))]
    assert tiles == [(128, 256), (64, 256), (64, 256), (64, 128)]
    few = [(c.block_m, c.block_n, c.split_k) for c in (tile(3, 4096, 4, 64), tile(17, 1665, 4, 64), tile(16, 1664, 4, 64), tile(16, 512, 4, 64))]
    assert few == [(16, 128, 8), (32, 128, 8), (16, 64, 8), (16, 64, 8)]
