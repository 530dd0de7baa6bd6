import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normtweak_kernels import packing

shapes = st.tuples(st.integers(1, 70), st.integers(1, 100))
bits_of = st.sampled_from(packing.BITS)
quick = settings(max_examples=40, deadline=None)


def random_codes(shape: tuple[int, int], bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8)


@quick
@given(shape=shapes, bits=bits_of)
def test_packed_round_trip(shape, bits):
    codes = random_codes(shape, bits)
    packed = packing.pack(codes, bits)
    assert tuple(packed.shape) == packing.packed_shape(*shape, bits)
    assert packed.is_contiguous()
    assert torch.equal(packing.unpack(packed, bits, *shape), codes)


@quick
@given(shape=shapes, bits=bits_of)
def test_gptq_round_trip(shape, bits):
    codes = random_codes(shape, bits)
    packed = packing.pack_gptq(codes, bits)
    assert tuple(packed.shape) == (-(-shape[1] * bits // 32), shape[0])
    assert torch.equal(packing.unpack_gptq(packed, bits, shape[1]), codes)


@quick
@given(shape=shapes, bits=bits_of, v2=st.booleans())
def test_gptq_zeros_round_trip(shape, bits, v2):
    zeros = random_codes(shape, bits)
    assert torch.equal(packing.unpack_gptq_zeros(packing.pack_gptq_zeros(zeros, bits, v2=v2), bits, shape[1], v2=v2), zeros)


@quick
@given(k=st.integers(1, 100), bits=bits_of)
def test_gptq_words_are_one_stream_of_bits(k, bits):
    codes = random_codes((1, k), bits)
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes[0]))
    words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(-(-k * bits // 32))]
    assert [int(word) & 0xFFFFFFFF for word in packing.pack_gptq(codes, bits)[:, 0]] == words


@pytest.mark.parametrize("bits", packing.BITS)
def test_packed_words_are_the_documented_ones(bits):
    codes = random_codes((17, 40), bits)
    packed = packing.pack(codes, bits).to(torch.int64) & 0xFFFFFFFF
    for n, k in ((0, 0), (3, 7), (15, 31), (16, 0), (16, 39), (2, 32)):
        r, j = divmod(k % 32, 4)
        chunk = packed[n // 16, k // 32 * bits :, n % 16]
        byte = [(int(word) >> (8 * j)) & 0xFF for word in chunk]
        value = {
            2: lambda: (byte[r // 4] >> (2 * (r % 4))) & 3,  # noqa: B023
            3: lambda: ((byte[r // 4] >> (2 * (r % 4))) & 3) | (((byte[2] >> r) & 1) << 2),  # noqa: B023
            4: lambda: (byte[r // 2] >> (4 * (r % 2))) & 15,  # noqa: B023
            8: lambda: byte[r],  # noqa: B023
        }[bits]()
        assert value == codes[n, k], (n, k)


@pytest.mark.parametrize(("bits", "v1", "v2"), [(2, 0x55555555, 0xAAAAAAAA), (4, 0x77777777, 0x88888888), (8, 0x7F7F7F7F, 0x80808080)])
def test_symmetric_zeros_are_the_known_words(bits, v1, v2):
    zeros = torch.full((3, 64), 2 ** (bits - 1), dtype=torch.uint8)
    for word, is_v2 in ((v1, False), (v2, True)):
        words = packing.pack_gptq_zeros(zeros, bits, v2=is_v2).to(torch.int64) & 0xFFFFFFFF
        assert set(words.flatten().tolist()) == {word}


@pytest.mark.parametrize(("bits", "ones"), [(2, 0x55555555), (4, 0x11111111), (8, 0x01010101)])
def test_zero_0_borrows_from_its_neighbour_in_v1(bits, ones):
    """Peers subtract 1 in every field from a whole word, and add it to whole words."""
    zeros = (torch.arange(32).unsqueeze(0) % 2**bits).to(torch.uint8)
    v1, v2 = (packing.pack_gptq_zeros(zeros, bits, v2=v2).to(torch.int64) for v2 in (False, True))
    assert torch.equal(v1 & 0xFFFFFFFF, (v2 - ones) & 0xFFFFFFFF)


def test_zero_0_wraps_around_in_v1_at_3_bits():
    assert packing.pack_gptq_zeros(torch.zeros(1, 32, dtype=torch.uint8), 3).tolist() == [[-1, -1, -1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packing.pack(torch.zeros(2, 2, dtype=torch.uint8), 5), "pack: bits must be one of 2, 3, 4, 8, got 5"),
        (lambda: packing.pack(torch.zeros(2, 2), 4), r"pack: codes must be uint8 \[N, K\], got torch.float32 \(2, 2\)"),
        (lambda: packing.pack(torch.zeros(2, dtype=torch.uint8), 4), r"pack: codes must be uint8 \[N, K\], got torch.uint8 \(2,\)"),
        (lambda: packing.unpack(torch.zeros(1, 4, 16), 4, 16, 32), "unpack: qweight must be int32"),
        (lambda: packing.unpack(torch.zeros(1, 4, 16, dtype=torch.int32), 4, 17, 32), r"unpack: .* got torch.int32 \(1, 4, 16\)"),
        (lambda: packing.unpack_gptq(torch.zeros(3, 4, dtype=torch.int32), 4, 32), r"unpack_gptq: qweight must be int32 \[4, N\]"),
        (lambda: packing.unpack_gptq_zeros(torch.zeros(3, 4, dtype=torch.int32), 4, 33), r"unpack_gptq_zeros: qzeros must be int32 \[G, 5\]"),
        (lambda: packing.pack_gptq(torch.zeros(2, 2, dtype=torch.uint8), 1), "pack_gptq: bits must be"),
        (lambda: packing.pack_gptq_zeros(torch.zeros(2, 2, dtype=torch.uint8), 1), "pack_gptq_zeros: bits must be"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
