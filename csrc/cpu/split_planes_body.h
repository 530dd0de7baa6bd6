// x in planes of bytes for integer_gemm_body.h: P planes, x ~ scale * sum_p 256^(P-1-p) * plane_p. One plane is int8
// per run ("a8"), two are 16 bits ("a16"), three 24 ("a24", float32's own precision).

// A run: values of x whose products are summed in int32 before they are scaled. 64 share a scale; with one scale per
// token a run only bounds the sums: 2**15 products of codes and bytes stay below 2**31.
static constexpr int64_t kPiece = 64, kTokenRun = 1 << 15;

static int64_t run_length(const PackedWeight& w, bool per_token) {
    const int64_t group_size = w.groups == 1 ? ceil_div(w.k, kChunk) * kChunk : w.k / w.groups;
    return !per_token ? kPiece : group_size < kTokenRun ? group_size : kTokenRun;
}

// What sdot subtracts from codes of 8 bits to make them signed; their zeros lose it too.
#if defined(NT_DOTPROD)
static constexpr int kSignedOffset = 128;
#else
static constexpr int kSignedOffset = 0;
#endif

// The biggest code of x: plane 0 must hold it with the carry of the planes below.
template <int P>
constexpr float plane_limit() {
    return P == 1 ? 127.0f : P == 2 ? 32512.0f : 4161536.0f;
}

NT_INLINE void copy_run(const void* x, Dtype dtype, int64_t at, int64_t count, float* run) {
    const uint16_t* halves = static_cast<const uint16_t*>(x) + at;
    const int64_t whole = dtype == Dtype::float32 ? 0 : count / kLanes * kLanes;
    if (dtype == Dtype::bfloat16)
        for (int64_t i = 0; i < whole; i += kLanes) store(run + i, bfloat16_to_float(load<vh>(halves + i)));
    else if (dtype == Dtype::float16)
        for (int64_t i = 0; i < whole; i += kLanes) store(run + i, any_half_to_float(load<vh>(halves + i)));
    else
        for (int64_t i = 0; i < count; ++i) run[i] = static_cast<const float*>(x)[at + i];
    if (dtype == Dtype::float32 || whole == count) return;
    vh v = {};
    for (int64_t lane = 0; lane < kLanes && whole + lane < count; ++lane) v[lane] = halves[whole + lane];
    const vf last = dtype == Dtype::bfloat16 ? bfloat16_to_float(v) : any_half_to_float(v);
    for (int64_t lane = 0; lane < kLanes && whole + lane < count; ++lane) run[whole + lane] = last[lane];
}

// The largest magnitude of `count` values, a multiple of 32; NaN when one isn't finite. Magnitudes are ordered as their
// bits are, infinity and then NaN above all numbers.
NT_INLINE float largest(const float* values, int64_t count) {
    vi most = {};
    for (int64_t i = 0; i < count; i += kLanes) {
        const vi v = load<vi>(values + i) & 0x7fffffff;
        most = v > most ? v : most;
    }
    const int32_t bits = reduce_max(most);
    float result;
    __builtin_memcpy(&result, &bits, sizeof result);
    return bits < 0x7f800000 ? result : __builtin_nanf("");
}

// A piece of `count` values, a multiple of 32, of row `row` of a tile; `bytes` is where the piece begins. TILED: in
// blocks of 16 rows, [block][plane][row][count]. Each chunk's bytes of a plane lie together, so that they are stored
// whole.
template <int P, bool TILED>
NT_INLINE void split_piece(const float* piece, int64_t count, float inverse, int64_t row, int64_t rows, int32_t* bytes,
                           vi* sums) {
    auto* out = reinterpret_cast<int8_t*>(bytes);
    for (int64_t i = 0; i < count; i += kLanes) {
        vi rest = __builtin_convertvector(round_even(load<vf>(piece + i) * inverse), vi);
#pragma GCC unroll 4
        for (int p = P - 1; p >= 0; --p) {
            const vi carried = p ? (rest + 128) >> 8 : vi{};
            const vi low = p ? rest - (carried << 8) : rest;
            sums[p] += low;
            const int64_t at = TILED ? ((row / 16 * P + p) * 16 + row % 16) * count + i
                                     : ((i / kChunk * rows + row) * P + p) * kChunk + i % kChunk;
            store(out + at, narrow(low));
            rest = carried;
        }
    }
}

// Row `row` of a tile of `rows`, from row `source` of x; a negative source makes a row of zeros. TILED: for
// integer_gemm_amx_body.h, which multiplies all zeros itself, and those of the first two planes in one instruction.
template <int P, bool TILED = false>
static void split_row(const IntegerGemm& a, int64_t source, int64_t row, int64_t rows, const TileOfX& tile) {
    const PackedWeight& w = a.weight;
    const int64_t padded = ceil_div(w.k, kChunk) * kChunk, length = run_length(w, a.per_token);
    const int64_t group_size = w.groups == 1 ? padded : w.k / w.groups;
    const int32_t zero = w.zeros || TILED ? 1 : (1 << (w.bits - 1)) - (w.bits == 8 ? kSignedOffset : 0);
    static const float kNothing[kPiece] = {};
    float copied[kPiece];
    // Values [k, min(k + kPiece, end)) of the row, zeros after its end.
    const auto read = [&](int64_t k, int64_t count) -> const float* {
        const int64_t valid = source < 0 ? 0 : w.k - k < count ? w.k - k : count;
        const int64_t at = valid ? source * w.k + k : 0;
        if (valid == count && a.dtype == Dtype::float32) return static_cast<const float*>(a.x) + at;
        if (valid == kPiece)
            copy_run(a.x, a.dtype, at, kPiece, copied);
        else
            copy_run(a.x, a.dtype, at, valid, copied);
        for (int64_t i = valid; i < count; ++i) copied[i] = 0.0f;
        return copied;
    };
    const auto piece_after = [](int64_t k, int64_t end) { return end - k < kPiece ? end - k : kPiece; };
    float scale = 0.0f;
    if (a.per_token) {
        for (int64_t k = 0; k < padded; k += kPiece) {
            const float here = largest(read(k, piece_after(k, padded)), piece_after(k, padded)) / plane_limit<P>();
            scale = scale > here || scale != scale ? scale : here;
        }
        tile.scales[row] = scale;
    }
    int64_t run = 0;
    for (int64_t group = 0; group < padded; group += group_size) {
        for (int64_t k = group, end; k < group + group_size; k = end, ++run) {
            end = k + length < group + group_size ? k + length : group + group_size;
            vi sums[P] = {};
            for (int64_t at = k; at < end; at += kPiece) {
                const int64_t count = piece_after(at, end);
                const float* values = read(at, count);
                if (!a.per_token) tile.scales[run * rows + row] = scale = largest(values, count) / plane_limit<P>();
                // All zeros, too small to divide by, or not finite, which the scale shows: nothing is left to split.
                const bool split = scale > 0x1p-126f;
                const float inverse = split ? 1.0f / scale : 0.0f;
                if (!split) values = kNothing;
                int32_t* bytes = tile.bytes + at / 4 * rows * P;
                if (count == kPiece)
                    split_piece<P, TILED>(values, kPiece, inverse, row, rows, bytes, sums);
                else
                    split_piece<P, TILED>(values, count, inverse, row, rows, bytes, sums);
            }
            int32_t* minus = tile.minus + (run * rows + row) * P;
            for (int p = 0; p < P; ++p) minus[p] = -reduce_add(sums[p]) * zero;
            if (TILED && P > 1) minus[0] = (minus[P > 1] & 0xffff) | static_cast<int32_t>(minus[0] * (2u << 16));
        }
    }
}
