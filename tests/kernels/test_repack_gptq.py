import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normtweak_kernels import native, packing, repack_gptq, repack_to_gptq

SHAPES = [(1, 1), (16, 32), (17, 33), (80, 200), (576, 96), (33, 1537)]


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_both_ways_by_way_of_the_codes(body, n, k, bits):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    gptq, packed = packing.pack_gptq(codes, bits), packing.pack(codes, bits)
    assert torch.equal(repack_gptq(gptq, bits, k), packed)
    assert torch.equal(repack_to_gptq(packed, bits, n, k), gptq)


@pytest.mark.parametrize("bits", packing.BITS)
def test_bits_after_the_last_code_are_dropped(body, bits):
    n, k = 20, 33
    gptq = torch.full((-(-k * bits // 32), n), -1, dtype=torch.int32)
    assert torch.equal(repack_gptq(gptq, bits, k), packing.pack(torch.full((n, k), 2**bits - 1, dtype=torch.uint8), bits))


@settings(max_examples=30, deadline=None)
@given(bits=st.sampled_from(packing.BITS), n=st.integers(1, 70), k=st.integers(1, 130), seed=st.integers(0, 2**31))
def test_there_and_back(bits, n, k, seed):
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = packing.pack(codes, bits)
    assert torch.equal(repack_gptq(repack_to_gptq(packed, bits, n, k), bits, k), packed)


def test_a_matrix_that_is_not_contiguous_and_an_empty_one(body):
    codes = torch.randint(0, 16, (40, 64), dtype=torch.uint8)
    gptq = packing.pack_gptq(codes, 4)
    assert torch.equal(repack_gptq(gptq.t().contiguous().t(), 4, 64), packing.pack(codes, 4))
    assert repack_gptq(torch.empty(8, 0, dtype=torch.int32), 4, 64).shape == (0, 8, 16)


@pytest.mark.parametrize("bits", packing.BITS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_nothing_is_written_past_the_end(isa, native_module, n, k, bits):
    gptq = torch.randint(-(2**31), 2**31 - 1, (-(-k * bits // 32), n), dtype=torch.int32)
    size = torch.Size(packing.packed_shape(n, k, bits)).numel()
    for to_gptq, count in ((False, size), (True, gptq.numel())):
        source = gptq if not to_gptq else torch.zeros(size, dtype=torch.int32)
        guarded = torch.full((count + 64,), 77, dtype=torch.int32)
        pair = (source, guarded) if not to_gptq else (guarded, source)
        native_module.repack_gptq(2, native.address(pair[0]), native.address(pair[1]), n, k, bits, to_gptq)
        assert (guarded[count:] == 77).all()


def test_opcheck(body):
    gptq = torch.randint(-(2**31), 2**31 - 1, (8, 5), dtype=torch.int32)
    torch.library.opcheck(torch.ops.normtweak.repack_gptq.default, (gptq, 4, 64))
    torch.library.opcheck(torch.ops.normtweak.repack_to_gptq.default, (repack_gptq(gptq, 4, 64), 4, 5, 64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: repack_gptq(torch.zeros(4, 5, dtype=torch.int32), 5, 32), "bits must be one of 2, 3, 4, 8, got 5"),
        (lambda: repack_gptq(torch.zeros(5, 5, dtype=torch.int32), 4, 32), r"repack_gptq: qweight must be int32 \[4, N\] for 4 bits and K = 32"),
        (lambda: repack_gptq(torch.zeros(4, 5), 4, 32), r"repack_gptq: qweight must be int32 \[4, N\]"),
        (lambda: repack_to_gptq(torch.zeros(1, 4, 16), 4, 5, 32), r"repack_to_gptq: packed must be int32 \(1, 4, 16\), got torch.float32"),
        (lambda: repack_to_gptq(torch.zeros(1, 4, 16, dtype=torch.int32), 4, 17, 32), r"repack_to_gptq: packed must be int32 \(2, 4, 16\)"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
