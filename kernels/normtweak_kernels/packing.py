"""THE packed layout, in one place, and its conversion to and from GPTQ's. The C++ twin is `csrc/packing.h`.

Both layouts cut K into chunks of 32 codes; a chunk of b-bit codes fills b words of 32 bits. A layout is a table that says,
for the k-th code of a chunk, which of its bits go to which word at which shift, so one engine packs and unpacks both.

Packed (ours): int32 `[ceil(N/16), ceil(K/32) * bits, 16]`. Sixteen rows of the weight are the lanes, so that each 64-byte
vector holds one word of each of 16 rows. Byte j of a word, cut into fields, yields the codes k = 4r + j: one shift and one mask turn a
vector into row r of the VNNI layout (four consecutive k per lane) that vpdpbusd and AMX int8 multiply directly.
    8 bits: word r,      byte j                -> k = 4r + j
    4 bits: word r // 2, nibble r % 2 of byte j -> k = 4r + j
    2 bits: word r // 4, pair r % 4 of byte j   -> k = 4r + j
    3 bits: words 0 and 1 are the low two bits as above; bit r of byte j of word 2 is the high bit
N is padded to 16 and K to 32 with zero codes; padded lanes are never written out, padded k meet a zero activation.

GPTQ: int32 `[ceil(K*bits/32), N]`, codes packed along K, least significant first, 3-bit codes as one continuous stream; zeros
are packed the same way along N. Checkpoints of format "gptq" (v1) store zero - 1, "gptq_v2" the zero itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 32
LANES = 16
BITS = (2, 3, 4, 8)

# For each k of a chunk: pieces (word, shift in the word, lowest bit of the code, number of bits).
Slots = tuple[tuple[tuple[int, int, int, int], ...], ...]


def _packed_slots(bits: int) -> Slots:
    slots: list[tuple[tuple[int, int, int, int], ...]] = []
    for k in range(CHUNK):
        row, byte = divmod(k, 4)
        if bits == 3:
            slots.append(((row // 4, 8 * byte + 2 * (row % 4), 0, 2), (2, 8 * byte + row, 2, 1)))
        else:
            per_byte = 8 // bits
            slots.append(((row // per_byte, 8 * byte + bits * (row % per_byte), 0, bits),))
    return tuple(slots)


def _stream_slots(bits: int) -> Slots:
    slots: list[tuple[tuple[int, int, int, int], ...]] = []
    for k in range(CHUNK):
        word, shift = divmod(k * bits, 32)
        here = min(bits, 32 - shift)
        pieces = [(word, shift, 0, here)]
        if here < bits:
            pieces.append((word + 1, 0, here, bits - here))
        slots.append(tuple(pieces))
    return tuple(slots)


_PACKED = {bits: _packed_slots(bits) for bits in BITS}
_STREAM = {bits: _stream_slots(bits) for bits in BITS}


def check_bits(where: str, bits: int) -> None:
    """Raise ValueError unless `bits` is one that the layouts carry (2, 3, 4, 8)."""
    if bits not in BITS:
        raise ValueError(f"{where}: bits must be one of 2, 3, 4, 8, got {bits}")


def _to_words(codes: Tensor, bits: int, slots: Slots) -> Tensor:
    """codes uint8 [..., L] -> words int32 [..., ceil(L/32) * bits]."""
    length = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, -length % CHUNK)).unflatten(-1, (-1, CHUNK))
    words = codes.new_zeros((*codes.shape[:-1], bits), dtype=torch.int64)
    for k in range(CHUNK):
        code = codes[..., k].to(torch.int64)
        for word, shift, low, width in slots[k]:
            words[..., word] |= ((code >> low) & ((1 << width) - 1)) << shift
    return words.to(torch.int32).flatten(-2)


def _from_words(words: Tensor, bits: int, length: int, slots: Slots) -> Tensor:
    """words int32 [..., ceil(length/32) * bits] -> codes uint8 [..., length]."""
    words = words.unflatten(-1, (-1, bits))
    codes = words.new_zeros((*words.shape[:-1], CHUNK), dtype=torch.uint8)
    for k in range(CHUNK):
        for word, shift, low, width in slots[k]:
            piece = (words[..., word] >> shift) & ((1 << width) - 1)
            codes[..., k] |= (piece << low).to(torch.uint8)
    return codes.flatten(-2)[..., :length].contiguous()


def packed_shape(n: int, k: int, bits: int) -> tuple[int, int, int]:
    """Shape of the packed tensor of a weight [n, k]."""
    return -(-n // LANES), -(-k // CHUNK) * bits, LANES


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes, uint8 [N, K] with values below 2**bits, into int32 [ceil(N/16), ceil(K/32)*bits, 16]."""
    check_bits("pack", bits)
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise ValueError(f"pack: codes must be uint8 [N, K], got {codes.dtype} {tuple(codes.shape)}")
    words = _to_words(codes, bits, _PACKED[bits])
    words = torch.nn.functional.pad(words, (0, 0, 0, -words.shape[0] % LANES))
    return words.unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()


def unpack(qweight: Tensor, bits: int, n: int, k: int) -> Tensor:
    """The inverse of `pack`: uint8 codes [n, k]."""
    check_bits("unpack", bits)
    if tuple(qweight.shape) != packed_shape(n, k, bits) or qweight.dtype != torch.int32:
        raise ValueError(
            f"unpack: qweight must be int32 {packed_shape(n, k, bits)} for {bits} bits and a weight [{n}, {k}], "
            f"got {qweight.dtype} {tuple(qweight.shape)}"
        )
    words = qweight.transpose(1, 2).flatten(0, 1)[:n]
    return _from_words(words, bits, k, _PACKED[bits])


def pack_gptq(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [N, K] -> GPTQ's qweight int32 [ceil(K*bits/32), N]."""
    check_bits("pack_gptq", bits)
    words = -(-codes.shape[-1] * bits // 32)
    return _to_words(codes, bits, _STREAM[bits])[:, :words].t().contiguous()


def unpack_gptq(qweight: Tensor, bits: int, k: int) -> Tensor:
    """GPTQ's qweight int32 [ceil(k*bits/32), N] -> codes uint8 [N, k]."""
    check_bits("unpack_gptq", bits)
    if qweight.dim() != 2 or qweight.shape[0] != -(-k * bits // 32):
        raise ValueError(f"unpack_gptq: qweight must be int32 [{-(-k * bits // 32)}, N] for {bits} bits and K = {k}, got {tuple(qweight.shape)}")
    words = qweight.t()
    words = torch.nn.functional.pad(words, (0, -words.shape[1] % bits))
    return _from_words(words, bits, k, _STREAM[bits])


def pack_gptq_zeros(zeros: Tensor, bits: int, *, v2: bool = False) -> Tensor:
    """Zeros uint8 [G, N] -> GPTQ's qzeros int32 [G, ceil(N*bits/32)]; v1 stores zero - 1."""
    check_bits("pack_gptq_zeros", bits)
    words = -(-zeros.shape[1] * bits // 32)
    if not v2 and bits == 3:
        zeros = (zeros.to(torch.int16) - 1).remainder(2**bits).to(torch.uint8)
    packed = _to_words(zeros, bits, _STREAM[bits])[:, :words]
    return (packed if v2 or bits == 3 else packed - _ones(bits)).contiguous()


def unpack_gptq_zeros(qzeros: Tensor, bits: int, n: int, *, v2: bool = False) -> Tensor:
    """The inverse of `pack_gptq_zeros`: zeros uint8 [G, n]."""
    check_bits("unpack_gptq_zeros", bits)
    if qzeros.dim() != 2 or qzeros.shape[1] != -(-n * bits // 32) or qzeros.dtype != torch.int32:
        wanted = f"int32 [G, {-(-n * bits // 32)}] for {bits} bits and N = {n}"
        raise ValueError(f"unpack_gptq_zeros: qzeros must be {wanted}, got {qzeros.dtype} {tuple(qzeros.shape)}")
    words = qzeros if v2 or bits == 3 else qzeros + _ones(bits)
    zeros = _from_words(torch.nn.functional.pad(words, (0, -words.shape[1] % bits)), bits, n, _STREAM[bits])
    return zeros if v2 or bits != 3 else (zeros.to(torch.int16) + 1).remainder(2**bits).to(torch.uint8)


def _ones(bits: int) -> int:
    """A word with 1 in each of its fields. Peers that write v1 subtract it from whole words, so that a zero of 0 borrows from its neighbour; not at 3 bits."""
    return sum(1 << shift for shift in range(0, 32, bits))
