// Vectors run across channels. A template takes the lanes that it works on: kLanes of them, or one at a row's ends.

struct Lanes {
    typedef vf f;
    typedef vi i;
    typedef vh h;
};

struct One {
    typedef float f __attribute__((vector_size(4)));
    typedef int32_t i __attribute__((vector_size(4)));
    typedef uint16_t h __attribute__((vector_size(2)));
};

struct Float32 {
    using type = float;
    template <class L>
    NT_INLINE typename L::f get(const float* p) {
        return load<typename L::f>(p);
    }
    template <class L>
    NT_INLINE typename L::f put(typename L::f v) {
        return v;
    }
};

struct Bfloat16 {
    using type = uint16_t;
    template <class L>
    NT_INLINE typename L::f get(const uint16_t* p) {
        return (typename L::f)(__builtin_convertvector(load<typename L::h>(p), typename L::i) << 16);
    }
    template <class L>
    NT_INLINE typename L::h put(typename L::f v) {
        const typename L::i u = (typename L::i)v, rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        return __builtin_convertvector((v == v ? rounded : 0x7fc0 - typename L::i{}) & 0xffff, typename L::h);
    }
};

template <class L>
NT_INLINE typename L::f from_half(L, typename L::h h) {
    typedef typename L::i I;
    typedef typename L::f F;
    const I u = __builtin_convertvector(h, I), fields = (u & 0x7fff) << 13;
    const I finite = (I)((F)fields * 0x1p112f), magnitude = fields < 0x7c00 << 13 ? finite : fields | 0x7f800000;
    return (F)(magnitude | ((u & 0x8000) << 16));
}

template <class L>
NT_INLINE typename L::h to_half(L, typename L::f v) {
    typedef typename L::i I;
    typedef typename L::f F;
    constexpr int32_t kHalf = 0x3f000000, kSmallestNormal = 113 << 23, kOverflow = 0x477ff000, kInfinity = 0x7f800000;
    const I u = (I)v & 0x7fffffff, sign = ((I)v >> 16) & 0x8000;
    const I normal = (u - (112 << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
    const I subnormal = (I)((F)u + 0.5f) - kHalf;  // 0.5's unit is float16's smallest step
    const I finite = u < kSmallestNormal ? subnormal : normal;
    const I special = 0x7c00 + (u > kInfinity ? 0x200 - I{} : I{});
    return __builtin_convertvector((sign | (u >= kOverflow ? special : finite)) & 0xffff, typename L::h);
}

// The same where the processor has it; preferred to the templates.
#if defined(__x86_64__) && NT_LANES == 16
static constexpr uint16_t kAll = 0xffff;  // the forms without a mask warn of an undefined value in GCC 12
NT_INLINE vf from_half(Lanes, vh h) {
    return (vf)_mm512_maskz_cvtph_ps(kAll, (__m256i)h);
}
NT_INLINE vh to_half(Lanes, vf v) {
    return (vh)_mm512_maskz_cvtps_ph(kAll, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__x86_64__) && NT_LANES == 8
NT_INLINE vf from_half(Lanes, vh h) {
    return (vf)_mm256_cvtph_ps((__m128i)h);
}
NT_INLINE vh to_half(Lanes, vf v) {
    return (vh)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#endif

struct Float16 {
    using type = uint16_t;
    template <class L>
    NT_INLINE typename L::f get(const uint16_t* p) {
        return from_half(L{}, load<typename L::h>(p));
    }
    template <class L>
    NT_INLINE typename L::h put(typename L::f v) {
        return to_half(L{}, v);
    }
};

// Rows that are reduced together: few enough to stay in registers between the two passes, and for every processor to
// prefetch them as streams of their own; enough that the merge in double costs little.
static constexpr int64_t kBlockRows = 8;
// Channels between two merges: their sums stay in the first cache.
static constexpr int64_t kStrip = 256;
// How far ahead a row is asked for, in bytes: hardware prefetchers stop at the end of a page.
static constexpr int64_t kAhead = 1024;

// Of a block of rows, [kStrip] each: the rounded mean, and the sums of deviations from it and of their squares.
struct Sums {
    float *center, *sum, *square;
};

// Two passes over rows in registers: exact where a channel has outliers or a mean that is large against its deviation.
// The sum of deviations corrects the rounded mean that they start from.
template <class L, class T>
NT_INLINE void add_rows(const typename T::type* const* rows, int64_t count, int64_t c, int64_t at, const Sums& sums) {
    typedef typename L::f F;
    F x[kBlockRows], center = {}, sum = {}, square = {};
    for (int64_t r = 0; r < count; ++r) center += x[r] = T::template get<L>(rows[r] + c);
    center /= static_cast<float>(count);
    for (int64_t r = 0; r < count; ++r) {
        const F d = x[r] - center;
        sum += d;
        square += d * d;
    }
    store(sums.center + at, center);
    store(sums.sum + at, sum);
    store(sums.square + at, square);
}

// Merges a block of `count` rows into mean and sum of squared deviations of `before` (Chan, Golub and LeVeque 1979).
NT_INLINE void merge(const Sums& sums, int64_t count, int64_t before, int64_t channels, double* mean, double* m2) {
    const double per_row = 1.0 / static_cast<double>(count), total = static_cast<double>(before + count);
    const double share = static_cast<double>(count) / total, between = share * static_cast<double>(before);
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
        const double sum = sums.sum[c], shift = sum * per_row, delta = sums.center[c] + shift - mean[c];
        mean[c] += delta * share;
        m2[c] += sums.square[c] - sum * shift + delta * delta * between;
    }
}

template <class T>
static void add_block(const typename T::type* const* rows, int64_t count, int64_t before, int64_t channels,
                      double* mean, double* m2) {
    float center[kStrip], sum[kStrip], square[kStrip];
    const Sums sums = {center, sum, square};
    for (int64_t begin = 0; begin < channels; begin += kStrip) {
        const int64_t width = channels - begin < kStrip ? channels - begin : kStrip;
        int64_t at = 0;
        if (count == kBlockRows) {
            for (; at + kLanes <= width; at += kLanes) {
                for (int64_t r = 0; r < kBlockRows; ++r)
                    __builtin_prefetch(reinterpret_cast<const char*>(rows[r] + begin + at) + kAhead);
                add_rows<Lanes, T>(rows, kBlockRows, begin + at, at, sums);
            }
        } else {
            for (; at + kLanes <= width; at += kLanes) add_rows<Lanes, T>(rows, count, begin + at, at, sums);
        }
        for (; at < width; ++at) add_rows<One, T>(rows, count, begin + at, at, sums);
        merge(sums, count, before, width, mean + begin, m2 + begin);
    }
}

template <class T>
static int64_t slab(const Tokens& input, int64_t begin, int64_t end, double* mean, double* m2) {
    const auto* x = static_cast<const typename T::type*>(input.x);
    const int64_t channels = input.channels;
    for (int64_t c = 0; c < channels; ++c) mean[c] = m2[c] = 0.0;
    int64_t kept = 0;
    for (int64_t t = begin; t < end;) {
        const typename T::type* rows[kBlockRows];
        int64_t count = 0;
        for (; t < end && count < kBlockRows; ++t)
            if (!input.mask || input.mask[t]) rows[count++] = x + t * channels;
        if (count == 0) break;
        add_block<T>(rows, count, kept, channels, mean, m2);
        kept += count;
    }
    return kept;
}

// Tokens [begin, end): number kept, and each channel's mean and sum of squared deviations.
static int64_t slab_statistics(const Tokens& input, int64_t begin, int64_t end, double* mean, double* m2) {
    if (input.dtype == Dtype::float32) return slab<Float32>(input, begin, end, mean, m2);
    if (input.dtype == Dtype::bfloat16) return slab<Bfloat16>(input, begin, end, mean, m2);
    return slab<Float16>(input, begin, end, mean, m2);
}

// Stores past the caches, of a vector to an address that is aligned to it. A gradient larger than the caches is written
// at two thirds of the traffic this way: an ordinary store first reads the line.
#if defined(__x86_64__) && NT_LANES == 16
NT_INLINE void stream(float* p, vf v) {
    _mm512_stream_ps(p, (__m512)v);
}
NT_INLINE void stream(uint16_t* p, vh v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
}
#elif defined(__x86_64__) && NT_LANES == 8
NT_INLINE void stream(float* p, vf v) {
    _mm256_stream_ps(p, (__m256)v);
}
NT_INLINE void stream(uint16_t* p, vh v) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)v);
}
#else
template <class V>
NT_INLINE void stream(void* p, V v) {
    store(p, v);
}
#endif

// Of tokens that start at x + rows[r], the gradients of the channels from c on.
template <class L, class T, bool Stream>
NT_INLINE void gradients_at(const typename T::type* x, const int64_t* rows, int64_t count, int64_t c,
                            const TokenGradient& g) {
    typedef typename L::f F;
    auto* out = static_cast<typename T::type*>(g.grad_x);
    const F mean = load<F>(g.mean + c), offset = load<F>(g.offset + c), slope = load<F>(g.slope + c);
    for (int64_t r = 0; r < count; ++r) {
        const auto value = T::template put<L>(offset + slope * (T::template get<L>(x + rows[r] + c) - mean));
        if constexpr (Stream)
            stream(out + rows[r] + c, value);
        else
            store(out + rows[r] + c, value);
    }
}

// A block of rows shares what it loads of each channel: one row at a time waits for the second cache.
template <class T, bool Stream>
static void gradient(const Tokens& input, int64_t begin, int64_t end, const TokenGradient& g) {
    typedef typename T::type Value;
    const auto* x = static_cast<const Value*>(input.x);
    const int64_t channels = input.channels;
    for (int64_t t = begin; t < end;) {
        int64_t rows[kBlockRows], count = 0, c = 0;
        for (; t < end && count < kBlockRows; ++t) {
            if (!input.mask || input.mask[t])
                rows[count++] = t * channels;
            else
                __builtin_memset(static_cast<Value*>(g.grad_x) + t * channels, 0,
                                 static_cast<size_t>(channels) * sizeof(Value));
        }
        if (count == kBlockRows)
            for (; c + kLanes <= channels; c += kLanes) gradients_at<Lanes, T, Stream>(x, rows, kBlockRows, c, g);
        for (; c + kLanes <= channels; c += kLanes) gradients_at<Lanes, T, Stream>(x, rows, count, c, g);
        for (; c < channels; ++c) gradients_at<One, T, false>(x, rows, count, c, g);
    }
#if defined(__x86_64__)
    if (Stream) _mm_sfence();  // streaming stores are ordered by nothing else
#endif
}

template <bool Stream>
static void gradients_of(const Tokens& input, int64_t begin, int64_t end, const TokenGradient& g) {
    if (input.dtype == Dtype::float32)
        gradient<Float32, Stream>(input, begin, end, g);
    else if (input.dtype == Dtype::bfloat16)
        gradient<Bfloat16, Stream>(input, begin, end, g);
    else
        gradient<Float16, Stream>(input, begin, end, g);
}

// streamed: past the caches, for rows that all start at a multiple of 64 bytes.
static void token_gradients(const Tokens& input, int64_t begin, int64_t end, const TokenGradient& g, bool streamed) {
    streamed ? gradients_of<true>(input, begin, end, g) : gradients_of<false>(input, begin, end, g);
}
