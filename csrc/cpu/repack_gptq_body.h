// The two layouts cut K into the same chunks of `bits` words; only the order of a chunk's bits differs, and that words
// of sixteen rows lie side by side in ours, those of all rows in GPTQ's.

// Both orders of sixteen 2-bit fields are each other's transpose as a 4 x 4 matrix: two rounds of swaps.
NT_INLINE vi transpose_pairs(vi w) {
    vi t = (w ^ (w >> 6)) & 0x00cc00cc;
    w ^= t ^ (t << 6);
    t = (w ^ (w >> 12)) & 0x0000f0f0;
    return w ^ t ^ (t << 12);
}

// Nibble j of the low half to byte j, and back.
NT_INLINE vi spread_nibbles(vi w) {
    w &= 0xffff;
    w = (w | (w << 8)) & 0x00ff00ff;
    return (w | (w << 4)) & 0x0f0f0f0f;
}
NT_INLINE vi gather_nibbles(vi w) {
    w &= 0x0f0f0f0f;
    w = (w | (w >> 4)) & 0x00ff00ff;
    return (w | (w >> 8)) & 0xffff;
}

// The bits [start, start + 3) of a stream of three words; `start` is known when it is unrolled.
NT_INLINE vi stream_code(const vi* words, int start) {
    const int word = start / 32, shift = start % 32;
    vi code = (words[word] >> shift) & ((1 << (shift > 29 ? 32 - shift : 3)) - 1);
    if (shift > 29) code |= (words[word + 1] << (32 - shift)) & 7;
    return code & 7;
}

template <int BITS>
NT_INLINE void chunk_from_gptq(const vi* in, vi* out) {
    if constexpr (BITS == 3) {
        out[0] = out[1] = out[2] = vi{};
#pragma GCC unroll 32
        for (int k = 0; k < 32; ++k) {
            const vi code = stream_code(in, 3 * k);
            const Slot low = low_slot(3, k / 4, k % 4), high = high_slot(k / 4, k % 4);
            out[low.word] |= (code & 3) << low.shift;
            out[high.word] |= (code >> 2) << high.shift;
        }
    } else {
        for (int i = 0; i < BITS; ++i) {
            if constexpr (BITS == 8) out[i] = in[i];
            if constexpr (BITS == 4) out[i] = spread_nibbles(in[i]) | (spread_nibbles(in[i] >> 16) << 4);
            if constexpr (BITS == 2) out[i] = transpose_pairs(in[i]);
        }
    }
}

template <int BITS>
NT_INLINE void chunk_to_gptq(const vi* in, vi* out) {
    if constexpr (BITS == 3) {
        out[0] = out[1] = out[2] = vi{};
#pragma GCC unroll 32
        for (int k = 0; k < 32; ++k) {
            const Slot low = low_slot(3, k / 4, k % 4), high = high_slot(k / 4, k % 4);
            const vi code = ((in[low.word] >> low.shift) & 3) | (((in[high.word] >> high.shift) & 1) << 2);
            const int word = 3 * k / 32, shift = 3 * k % 32;
            out[word] |= code << shift;
            if (shift > 29) out[word + 1] |= code >> (32 - shift);
        }
    } else {
        for (int i = 0; i < BITS; ++i) {
            if constexpr (BITS == 8) out[i] = in[i];
            if constexpr (BITS == 4) out[i] = gather_nibbles(in[i]) | (gather_nibbles(in[i] >> 4) << 16);
            if constexpr (BITS == 2) out[i] = transpose_pairs(in[i]);
        }
    }
}

// Zeroes the codes from k on.
template <int BITS>
NT_INLINE void cut_chunk(vi* words, int64_t k) {
    for (; k < kChunk; ++k) {
        const Slot low = low_slot(BITS, static_cast<int>(k / 4), static_cast<int>(k % 4));
        words[low.word] &= ~(((1 << (BITS == 3 ? 2 : BITS)) - 1) << low.shift);
        if constexpr (BITS == 3) {
            const Slot high = high_slot(static_cast<int>(k / 4), static_cast<int>(k % 4));
            words[high.word] &= ~(1 << high.shift);
        }
    }
}

template <int BITS>
static void move_chunks(const Repack& a, int64_t block, int64_t first, int64_t last) {
    const int64_t rows = ceil_div(a.k * BITS, 32), chunks = ceil_div(a.k, kChunk);
    for (int64_t chunk = first; chunk < last; ++chunk) {
        // GPTQ's last chunk ends with its last code; what is missing is zero.
        const int64_t left = rows - chunk * BITS, words = left < BITS ? left : BITS;
        for (int64_t lane = 0; lane < kPackedLanes; lane += kLanes) {
            const int64_t n = block * kPackedLanes + lane, valid = a.n - n < kLanes ? a.n - n : kLanes;
            int32_t* packed = a.packed + (block * chunks + chunk) * BITS * kPackedLanes + lane;
            int32_t* gptq = a.gptq + chunk * BITS * a.n + n;
            vi in[BITS] = {}, out[BITS];
            if (a.to_gptq) {
                if (valid <= 0) continue;
                for (int i = 0; i < BITS; ++i) in[i] = load<vi>(packed + i * kPackedLanes);
                chunk_to_gptq<BITS>(in, out);
                for (int64_t i = 0; i < words; ++i)
                    valid == kLanes ? store(gptq + i * a.n, out[i]) : store_valid(gptq + i * a.n, out[i], valid);
            } else {
                for (int64_t i = 0; i < words; ++i) {
                    if (valid == kLanes)
                        in[i] = load<vi>(gptq + i * a.n);
                    else
                        for (int64_t l = 0; l < valid; ++l) in[i][l] = gptq[i * a.n + l];
                }
                chunk_from_gptq<BITS>(in, out);
                if ((chunk + 1) * kChunk > a.k) cut_chunk<BITS>(out, a.k - chunk * kChunk);
                for (int i = 0; i < BITS; ++i) store(packed + i * kPackedLanes, out[i]);
            }
        }
    }
}

// Chunks [first, last) of one block of sixteen rows.
static void move(const Repack& a, int64_t block, int64_t first, int64_t last) {
    if (a.bits == 2)
        move_chunks<2>(a, block, first, last);
    else if (a.bits == 3)
        move_chunks<3>(a, block, first, last);
    else if (a.bits == 4)
        move_chunks<4>(a, block, first, last);
    else
        move_chunks<8>(a, block, first, last);
}
