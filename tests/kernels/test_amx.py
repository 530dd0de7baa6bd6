"""AMX's tiles: their emulation against its definition, and the integer product on them against the one by vectors."""

import pytest
import torch

from accuracy import random_weight
from normtweak_kernels import native, packing
from normtweak_kernels.dequant_gemm import cpp_kernel

# (m, n, k): rows and columns of int32, and fours of bytes along k.
TILES = [(16, 16, 16), (16, 16, 8), (5, 3, 7), (1, 16, 2), (16, 1, 1), (1, 1, 16)]


@pytest.fixture(params=[True, False], ids=["emulated", "instructions"])
def emulated(request, native_module):
    names = native_module.emulated_isas() if request.param else native_module.available_isas()
    if ("amx_emulated" if request.param else "amx") not in names:
        pytest.skip("this processor has no AMX, or no AVX-512 with VNNI to emulate it beside")
    return request.param


def guarded(rows, row_bytes, dtype=torch.uint8):
    """Rows that lie further apart than they are long, of random bytes."""
    return torch.randint(0, 256, (rows + 1, row_bytes + 12), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize(("m", "n", "k"), TILES)
@pytest.mark.parametrize("add", [False, True])
def test_a_product_of_tiles_is_its_definition(native_module, emulated, m, n, k, add):
    torch.manual_seed(0)
    a, b, c = guarded(m, 4 * k), guarded(k, 4 * n), guarded(m, 4 * n, torch.int32)
    before = c.clone()
    strides = (tensor.stride(0) * tensor.itemsize for tensor in (a, b, c))
    native_module.tile_product(emulated, a.data_ptr(), b.data_ptr(), c.data_ptr(), m, n, k, *strides, add)
    signed = a[:m, : 4 * k].view(torch.int8).long().reshape(m, k, 4)
    unsigned = b[:k, : 4 * n].long().reshape(k, n, 4)
    expected = torch.einsum("mki,kni->mn", signed, unsigned) + add * before[:m, :n].long()
    wrapped = (expected + 2**31) % 2**32 - 2**31  # tdpbsud's sums don't saturate
    assert torch.equal(c[:m, :n].long(), wrapped)
    assert torch.equal(c[m:], before[m:])
    assert torch.equal(c[:, n:], before[:, n:])


def test_sums_of_tiles_wrap(native_module, emulated):
    a, b = torch.full((16, 64), -128, dtype=torch.int8), torch.full((16, 64), 255, dtype=torch.uint8)
    c = torch.full((16, 16), -(2**31), dtype=torch.int32)
    native_module.tile_product(emulated, a.data_ptr(), b.data_ptr(), c.data_ptr(), 16, 16, 16, 64, 64, 64, True)
    assert (c == 2**31 - 64 * 128 * 255).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": 17}, "tile_product: m must be 1 to 16, got 17"),
        ({"k": 0}, "tile_product: k must be 1 to 16, got 0"),
        ({"stride_b": 63}, r"tile_product: stride_b must be 4 \* n or more, got 63"),
        ({"c": 0}, "tile_product: c must be a tensor's address, got 0"),
    ],
)
def test_a_product_of_tiles_checks_its_arguments(native_module, emulated, changes, message):
    arguments = {"a": 8, "b": 8, "c": 8, "m": 16, "n": 16, "k": 16, "stride_a": 64, "stride_b": 64, "stride_c": 64, "add": False}
    with pytest.raises(ValueError, match=message):
        native_module.tile_product(emulated, *{**arguments, **changes}.values())


def test_tiles_that_the_processor_lacks_are_refused(native_module):
    if "amx" in native_module.available_isas():
        pytest.skip("this processor has AMX")
    with pytest.raises(ValueError, match="tile_product: emulated must be what this processor has, got 0"):
        native_module.tile_product(False, 8, 8, 8, 16, 16, 16, 64, 64, 64, False)
    with pytest.raises(ValueError, match="native kernels: isa must be one of .* on this processor, got amx"):
        native_module.set_isa("amx")


def test_emulated_instruction_sets_are_never_chosen_or_offered(native_module):
    assert not set(native_module.emulated_isas()) & set(native_module.available_isas())
    native_module.set_isa("")
    assert native_module.isa() not in native_module.emulated_isas()


# Runs of 64, of 32, both in a group (96), with K's tail, one group; columns that end in either vector or in the strip.
SHAPES = [(32, 64, 64), (48, 96, 32), (80, 192, 96), (37, 100, -1), (70, 1536, 128), (1, 32, 32)]
# On either side of the fewest rows that tiles take, of one block and of two, and more than are split at once.
ROWS = [1, 8, 9, 16, 17, 24, 25, 32, 33, 41, 57, 281]


def product(module, isa, weight, x, bias, planes, per_token):
    module.set_isa(isa)
    inner = cpp_kernel.Weight(weight.pack(), weight.scales, weight.zeros, weight.bits, x.shape[1])
    y = torch.full((x.shape[0] * weight.scales.shape[1] + 64,), torch.nan, dtype=x.dtype)
    dtype = native.DTYPES[x.dtype]
    try:
        inner.native.integer_gemm(2, x.data_ptr(), native.address(bias), y.data_ptr(), x.shape[0], dtype, planes, per_token)
    finally:
        module.set_isa("")
    assert torch.isnan(y[-64:]).all()
    return y[:-64].view(x.shape[0], -1)


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
@pytest.mark.parametrize("zeros", [False, True])
def test_tiles_give_the_bits_of_the_product_by_vectors(native_module, emulated, n, k, group_size, zeros, bits):
    torch.manual_seed(0)
    weight = random_weight(n, k, bits, group_size, zeros=zeros)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for i, m in enumerate(ROWS):
        x, bias = torch.randn(m, k).to(dtypes[i % 3]), torch.randn(n).to(dtypes[i % 3])
        x[m // 2, k // 3] = torch.inf
        for planes, per_token in ((1, False), (2, False), (3, False), (1, True)):
            isas = ("amx_emulated" if emulated else "amx", "avx512_vnni")
            tiled, vectors = (product(native_module, isa, weight, x, bias, planes, per_token) for isa in isas)
            assert torch.equal(tiled.nan_to_num(), vectors.nan_to_num())
            assert torch.equal(tiled.isnan(), vectors.isnan())
            assert torch.isfinite(tiled).all(1).sum() == m - 1


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_largest_sums_fit(native_module, emulated, zeros, sign):
    # Every byte of x and every code at its limit, over runs of a whole row.
    n, k, m = 33, 40000 // 32 * 32, 16
    weight = random_weight(n, k, 8, -1, zeros=zeros)
    weight.codes.fill_(255)
    if zeros:
        weight.zeros.fill_(255 if sign > 0 else 0)
    x = torch.full((m, k), float(sign))
    for planes, per_token in ((1, False), (2, False), (3, False), (1, True)):
        isas = ("amx_emulated" if emulated else "amx", "avx512_vnni")
        tiled, vectors = (product(native_module, isa, weight, x, None, planes, per_token) for isa in isas)
        assert torch.equal(tiled, vectors)
        exact = x.double() @ weight.dequantize(torch.float64).t()
        assert torch.allclose(tiled.double(), exact, rtol=1e-2 if planes == 1 else 1e-4, atol=1e-30)
