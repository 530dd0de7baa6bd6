"""Packed weights in the registers of dequant_gemm's GEMMs on GPUs: words, codes, weights.

Codes come in pairs, k and k + 1, that lie 8 bits apart in a word (packing.py): one shift brings both to where each takes one more instruction, which
cuts it out and sets it into the mantissa of a power of two. A step of a product costs 3 to 5 instructions a weight, its scaling included.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _as_loaded(values, ptr, K):
    """values, as a load that reads nothing gives them.

    The compiler lays words out as the tensor cores want codes only where it can trace codes back to loads and uniform constants. Shifts
    computed from tl.arange would stop it, and every code would pass through shared memory.
    """
    first = tl.zeros_like(values)
    return tl.load(ptr + first, mask=first > K, other=values)


@triton.jit
def unpacking_tables(ptr, K, BITS: tl.constexpr, RUN: tl.constexpr):
    """What turns words into weights, made once before the loop.

    The first two say where in a word the k-th run of RUN of its codes begins, 2 or 4, each code 8 bits behind the one before: k = 4r + j is field r of
    byte j (packing.py). Of 3 bits the first is for the low two, the second, less 2 and modulo 32, for the high bit. Then which of two words in an int64, and
    the bits of the powers of two, in float32, whose mantissas count ones from bit 0 and from bit 8 on: known to be constant they would take an
    instruction more each time.
    """
    FIELD: tl.constexpr = 2 if BITS == 3 else BITS
    PER_ROW: tl.constexpr = 4 // RUN
    run, high_run = tl.arange(0, 32 // FIELD // RUN), tl.arange(0, 32 // RUN)
    shift = _as_loaded(16 * (run % PER_ROW) + FIELD * (run // PER_ROW), ptr, K).to(tl.int32)
    rotation = _as_loaded((16 * (high_run % PER_ROW) + high_run // PER_ROW + 30) % 32, ptr, K).to(tl.int32)
    word = _as_loaded(32 * tl.arange(0, 2), ptr, K).to(tl.int64)
    second = tl.arange(0, 2)
    mask = _as_loaded(((1 << BITS) - 1) << 8 * second, ptr, K)
    power = _as_loaded((150 - 8 * second) << 23, ptr, K)
    return shift, rotation, word, mask.to(tl.int32), power.to(tl.int32)


@triton.jit
def shifts_of(ptr, K, BITS: tl.constexpr):
    """Where in an int64 each of its scales or zeros begins, for `parameters_of`. Made before the loop that needs it, which would load it at every step."""
    return _as_loaded(BITS * tl.arange(0, 64 // BITS), ptr, K).to(tl.int64)


@triton.jit
def _words(
    ptr, panel, panels_left, chunks_left, word_shift, FIRST: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, PER: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Of each chunk's BITS words those from FIRST on, WORDS of them: [BLOCK_N, CHUNKS * WORDS], PER rows' at a time.

    Loaded in one dimension, memory's: shared memory then holds them in the same order, 16 rows beside each other for each word, which gives the
    threads of a warp different banks both when they copy and when they read. Of two dimensions the compiler's order is another for small tiles, and the
    same word of all rows lies together, a whole number of turns of the banks from the next.
    """
    LANES: tl.constexpr = 16 // PER
    offs = tl.arange(0, BLOCK_N // PER * CHUNKS * WORDS)
    chunk, at_panel = offs // (WORDS * LANES) % CHUNKS, offs // (CHUNKS * WORDS * LANES)
    # What is past the last one repeats it: it meets zeros of x, or isn't stored. No load waits for a mask.
    if not EVEN_N:
        at_panel = tl.minimum(at_panel, panels_left - 1)
    if not EVEN_K:
        chunk = tl.minimum(chunk, chunks_left - 1)
    at = at_panel * (panel // PER) + chunk * (BITS * LANES) + FIRST * LANES + offs % (WORDS * LANES)
    if PER == 2:
        ptr = ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    words = tl.permute(tl.reshape(tl.load(ptr + at), [BLOCK_N // 16, CHUNKS * WORDS, LANES]), (0, 2, 1))
    if PER == 2:
        words = (words[:, :, None, :] >> word_shift[None, None, :, None]).to(tl.int32)
    return tl.reshape(words, [BLOCK_N, CHUNKS * WORDS])


@triton.jit
def packed_words(
    qweight_ptr, panel, rows_left, k, K, tables,
    BITS: tl.constexpr, PER: tl.constexpr, PER_HIGH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """The words of codes from k on, a multiple of 32: [BLOCK_N, BLOCK_K * BITS / 32]; of 3 bits those of the low two, and those of the high bit."""
    ptr = qweight_ptr + k // 32 * (BITS * 16)
    CHUNKS: tl.constexpr = BLOCK_K // 32
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    panels_left, chunks_left = rows_left // 16, tl.cdiv(K, 32) - k // 32
    low = _words(ptr, panel, panels_left, chunks_left, tables[2], 0, LOW, BITS, PER, BLOCK_N, CHUNKS, EVEN_N, EVEN_K)
    high = low
    if BITS == 3:
        high = _words(ptr, panel, panels_left, chunks_left, tables[2], 2, 1, BITS, PER_HIGH, BLOCK_N, CHUNKS, EVEN_N, EVEN_K)
    return low, high


@triton.jit
def _moved(words, tables, BITS: tl.constexpr, LOW_MASK: tl.constexpr):
    """The codes of `packed_words` in runs [N, K / RUN], a run from bit 0 on: of 3 bits what LOW_MASK has is the low two, all else is rotated for the third."""
    low, high = words
    low = tl.reshape(low[:, :, None] >> tables[0][None, None, :], [low.shape[0], low.shape[1] * tables[0].shape[0]])
    if BITS == 3:
        # Rotated, as the high bit may lie below the third of the code, where it goes.
        high, right = high.to(tl.uint32, bitcast=True)[:, :, None], tables[1].to(tl.uint32, bitcast=True)[None, None, :]
        rotated = (high >> (right & 31)) | (high << ((0 - right) & 31))
        low = (low & LOW_MASK) | (tl.reshape(rotated.to(tl.int32, bitcast=True), low.shape) & ~LOW_MASK)
    return low


@triton.jit
def pairs_of(words, tables, BITS: tl.constexpr):
    """The codes of `packed_words`, two in an int32 [N, K / 2]: from bits 0 and 8 on; what else is in it is undefined."""
    return _moved(words, tables, BITS, 0x303)


@triton.jit
def int8_of(words, zeros, tables, BITS: tl.constexpr):
    """code - zero as int8 [N, K] of `packed_words`; of 8 bits always code - 128, as code - zero needs 9.

    Four codes at a time, one in each byte as they come; a difference doesn't borrow from its neighbour, as the high bits are set before and taken away after.
    """
    HIGH_BITS: tl.constexpr = -0x7F7F7F80
    if BITS == 8:
        codes = words[0] ^ HIGH_BITS
    else:
        codes = _moved(words, tables, BITS, 0x03030303) & ((1 << BITS) - 1) * 0x01010101
        zero = 1 << (BITS - 1) if zeros is None else zeros & ((1 << BITS) - 1)
        codes = ((codes | HIGH_BITS) - zero * 0x01010101) ^ HIGH_BITS
    codes = tl.join(tl.join(codes, codes >> 16), tl.join(codes >> 8, codes >> 24)).to(tl.int8)
    return tl.reshape(codes, [codes.shape[0], 4 * codes.shape[1]])


@triton.jit
def weights_of(pairs, zeros, scales, tables, BITS: tl.constexpr, dtype: tl.constexpr):
    """(code - zero) times the scale where there is one, rounded once: [N, K / 2, 2]. zeros and scales [N, 1] or [N, K / 2].

    A code is set into the mantissa of a power of two in float32, as conversions run at a quarter of the rate or less.
    """
    masks, powers = tables[3][None, None, :], tables[4][None, None, :]
    values = ((pairs[:, :, None] & masks) | powers).to(tl.float32, bitcast=True)
    if zeros is None:
        weights = values - (powers.to(tl.float32, bitcast=True) + (1 << (BITS - 1)))
    else:
        # The zero by the mantissa of the first power, then exactly added to both.
        first_power = tl.split(powers)[0]
        zero = ((zeros & ((1 << BITS) - 1)) | first_power).to(tl.float32, bitcast=True) - first_power.to(tl.float32, bitcast=True)
        weights = values - (powers.to(tl.float32, bitcast=True) + zero[:, :, None])
    if scales is not None:
        weights *= scales.to(tl.float32)[:, :, None]
    return weights.to(dtype)


@triton.jit
def as_rows(pairs):
    """[N, K / 2, 2] -> [K, N], the 32 columns of a chunk in rows that one thread has: what it unpacks of a word, and scales, is what it multiplies.

    On tensor cores those are rows 8 apart, and as far apart as a product of all warps is high: half the tile or less.
    """
    N: tl.constexpr = pairs.shape[0]
    K: tl.constexpr = 2 * pairs.shape[1]
    return tl.reshape(tl.permute(tl.reshape(pairs, [N, K // 32, 2, 8, 2]), (2, 1, 4, 3, 0)), [K, N])


@triton.jit
def as_columns(rows):
    """Rows [K, M] that `as_rows` moved apart, in the order of the columns that they were."""
    K: tl.constexpr = rows.shape[0]
    blocks = tl.reshape(rows, [2, K // 32, 2, 8, rows.shape[1]])
    return tl.reshape(tl.permute(blocks, (1, 0, 3, 2, 4)), [K, rows.shape[1]])


@triton.jit
def parameters_of(
    ptr, k, n, K, N, shifts, GROUP_SIZE: tl.constexpr, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr = False, EVEN_K: tl.constexpr = False,
):  # fmt: skip
    """Scales or zeros, of BITS each, of BLOCK_N rows from n and BLOCK_K columns from k on: [BLOCK_N, 1], of several groups [BLOCK_N, BLOCK_K / 2].

    Of zeros, int32, only the low 8 bits are theirs. Where they come as int64 each holds 64 / BITS of them: one by one they would be too small for
    the asynchronous copies that bring the rest.
    """
    GROUPS: tl.constexpr = BLOCK_K // GROUP_SIZE if GROUP_SIZE > 0 and GROUP_SIZE < BLOCK_K else 1
    PER: tl.constexpr = 64 // BITS if ptr.dtype.element_ty == tl.int64 else 1
    ROWS: tl.constexpr = BLOCK_N // PER
    # In one dimension and without a mask, like the words.
    offs = tl.arange(0, GROUPS * ROWS)
    group, row = offs // ROWS, offs % ROWS
    if not EVEN_N:
        row = tl.minimum(row, (N - n) // PER - 1)
    if GROUP_SIZE > 0:
        first = (k if EVEN_K else tl.minimum(k, K - 1)) // GROUP_SIZE
        if GROUPS > 1 and not EVEN_K:
            group = tl.minimum(group, (K - 1) // GROUP_SIZE - first)
        ptr += first.to(tl.int64) * (N // PER)
    values = tl.trans(tl.reshape(tl.load(ptr + n // PER + (group * (N // PER) + row)), [GROUPS, ROWS]))
    if PER > 1:
        values = tl.reshape(values[:, None, :] >> shifts[None, :, None], [BLOCK_N, GROUPS])
        if BITS == 8:
            values = values.to(tl.int32)
        elif BITS == 16:
            values = values.to(tl.int16).to(tl.float16, bitcast=True)
        else:
            values = values.to(tl.int32).to(tl.float32, bitcast=True)
    elif BITS == 8:
        values = values.to(tl.int32)
    if GROUPS > 1:
        values = tl.reshape(tl.broadcast_to(values[:, :, None], [BLOCK_N, GROUPS, GROUP_SIZE // 2]), [BLOCK_N, BLOCK_K // 2])
    return values
