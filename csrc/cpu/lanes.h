// Vectors of NT_LANES values. No include guard: foreach_isa.h includes it once per instruction set.

typedef float vf __attribute__((vector_size(4 * NT_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * NT_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * NT_LANES)));
typedef uint8_t vb __attribute__((vector_size(NT_LANES)));

static constexpr int64_t kLanes = NT_LANES;

template <class V>
NT_INLINE V load(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
NT_INLINE void store(void* p, V v) {
    __builtin_memcpy(p, &v, sizeof v);
}

template <class V>
NT_INLINE vf to_float(V v) {
    return __builtin_convertvector(v, vf);
}

NT_INLINE vf splat(float value) {
    return value - vf{};
}
NT_INLINE vf min(vf a, vf b) {
    return a < b ? a : b;
}
NT_INLINE vf max(vf a, vf b) {
    return a > b ? a : b;
}

// Half to even, for |v| < 2**22: the sum's unit in the last place is 1.
NT_INLINE vf round_even(vf v) {
    return (v + 12582912.0f) - 12582912.0f;
}

// float16's rounding, half to even, of 2**-24 <= v <= 65504, kept as float32.
NT_INLINE vf round_to_half(vf v) {
    const vi u = (vi)v;
    const vf normal = (vf)((u + 0xfff + ((u >> 13) & 1)) & ~0x1fff);
    const vf subnormal = (v + 0.5f) - 0.5f;  // below 2**-14 the unit is 2**-24, which is also 0.5's
    return v < 0x1p-14f ? subnormal : normal;
}

// Finite float16 bits -> float32: move the fields, then correct the exponent's bias.
NT_INLINE vf half_to_float(vh h) {
#if NT_LANES == 16
    return (vf)_mm512_cvtph_ps((__m256i)h);
#elif NT_LANES == 8
    return (vf)_mm256_cvtph_ps((__m128i)h);
#endif
    const vi u = __builtin_convertvector(h, vi);
    const vf magnitude = (vf)((u & 0x7fff) << 13) * 0x1p112f;
    return (vf)((vi)magnitude | ((u & 0x8000) << 16));
}

// GCC 12 widens bytes one by one when asked by __builtin_convertvector.
NT_INLINE vi widen(vb bytes) {
#if NT_LANES == 16
    return (vi)_mm512_cvtepu8_epi32((__m128i)bytes);
#elif NT_LANES == 8
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&bytes));
#else
    return __builtin_convertvector(bytes, vi);
#endif
}

NT_INLINE int32_t reduce_max(vi v) {
#if NT_LANES == 16
    return _mm512_reduce_max_epi32((__m512i)v);
#else
    int32_t most = v[0];
    for (int64_t lane = 1; lane < kLanes; ++lane) most = most > v[lane] ? most : v[lane];
    return most;
#endif
}
NT_INLINE int32_t reduce_add(vi v) {
#if NT_LANES == 16
    return _mm512_reduce_add_epi32((__m512i)v);
#else
    int32_t total = v[0];
    for (int64_t lane = 1; lane < kLanes; ++lane) total += v[lane];
    return total;
#endif
}

// The low byte of each value.
NT_INLINE vb narrow(vi v) {
#if NT_LANES == 16
    return (vb)_mm512_cvtepi32_epi8((__m512i)v);
#else
    return __builtin_convertvector(v, vb);
#endif
}

// Finite float32 -> bfloat16 bits, half to even.
NT_INLINE vh float_to_bfloat16(vf v) {
    const vi u = (vi)v;
    return __builtin_convertvector(((u + 0x7fff + ((u >> 16) & 1)) >> 16) & 0xffff, vh);
}

// The same for any value: NaN stays NaN, too large becomes infinite.
NT_INLINE vh any_float_to_bfloat16(vf v) {
    const vh rounded = float_to_bfloat16(v);
    return __builtin_convertvector(v == v, vh) ? rounded : (vh)(vh{} + 0x7fc0);
}
NT_INLINE vf bfloat16_to_float(vh h) {
    return (vf)(__builtin_convertvector(h, vi) << 16);
}
NT_INLINE vf any_half_to_float(vh h) {
#if NT_LANES >= 8
    return half_to_float(h);  // the instruction knows infinity and NaN
#endif
    const vi u = __builtin_convertvector(h, vi), fields = (u & 0x7fff) << 13;
    const vi magnitude = fields < (0x7c00 << 13) ? (vi)((vf)fields * 0x1p112f) : fields | 0x7f800000;
    return (vf)(magnitude | ((u & 0x8000) << 16));
}
NT_INLINE vh any_float_to_half(vf v) {
    const vi all = (vi)v, u = all & 0x7fffffff;
    const vi normal = (u - (112 << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
    const vi subnormal = (vi)((vf)u + 0.5f) - 0x3f000000;  // 0.5's unit in the last place is float16's smallest step
    const vi finite = (vf)u < 0x1p-14f ? subnormal : normal;
    const vi special = u > 0x7f800000 ? 0x7e00 - vi{} : 0x7c00 - vi{};
    return __builtin_convertvector(((u >= 0x477ff000 ? special : finite) | ((all >> 16) & 0x8000)) & 0xffff, vh);
}

// The first, or the last, halves of two vectors, lane by lane in turn.
#if defined(__clang__)
#define NT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define NT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
NT_INLINE vf interleave_first(vf a, vf b) {
#if NT_LANES == 16
    return NT_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif NT_LANES == 8
    return NT_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
#else
    return NT_SHUFFLE(a, b, 0, 4, 1, 5);
#endif
}
NT_INLINE vf interleave_last(vf a, vf b) {
#if NT_LANES == 16
    return NT_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif NT_LANES == 8
    return NT_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    return NT_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}
#undef NT_SHUFFLE

// kLanes vectors as a matrix's rows become its columns: each round is a perfect shuffle of the whole.
NT_INLINE void transpose(vf* rows) {
#pragma GCC unroll 4
    for (int64_t round = 1; round < kLanes; round *= 2) {
        vf shuffled[kLanes];
#pragma GCC unroll 8
        for (int64_t i = 0; i < kLanes / 2; ++i) {
            shuffled[2 * i] = interleave_first(rows[i], rows[i + kLanes / 2]);
            shuffled[2 * i + 1] = interleave_last(rows[i], rows[i + kLanes / 2]);
        }
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) rows[i] = shuffled[i];
    }
}

// `valid` of kLanes rows of a row-major matrix -> columns [count][kLanes], zero in the lanes past `valid`.
NT_INLINE void load_columns(const float* rows, int64_t stride, int64_t valid, int64_t count, float* columns) {
    for (int64_t lane = 0; lane < kLanes; ++lane)
        for (int64_t c = 0; c < count; ++c) columns[c * kLanes + lane] = lane < valid ? rows[lane * stride + c] : 0.0f;
}

// Stores the first `valid` lanes.
template <class T, class V>
NT_INLINE void store_valid(T* p, V v, int64_t valid) {
    for (int64_t lane = 0; lane < valid; ++lane) p[lane] = static_cast<T>(v[lane]);
}
