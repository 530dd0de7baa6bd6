// Plain loops over channels, which the compiler turns into vectors of this instruction set.

NT_INLINE float from_bits(uint32_t u) {
    float f;
    __builtin_memcpy(&f, &u, sizeof f);
    return f;
}

NT_INLINE uint32_t to_bits(float f) {
    uint32_t u;
    __builtin_memcpy(&u, &f, sizeof u);
    return u;
}

struct Float32 {
    using type = float;
    NT_INLINE float get(float v) { return v; }
    NT_INLINE float put(float v) { return v; }
};

struct Bfloat16 {
    using type = uint16_t;
    NT_INLINE float get(uint16_t v) { return from_bits(static_cast<uint32_t>(v) << 16); }
    NT_INLINE uint16_t put(float v) {
        const uint32_t u = to_bits(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
        return static_cast<uint16_t>(v == v ? rounded : 0x7fc0);
    }
};

struct Float16 {
    using type = uint16_t;
    NT_INLINE float get(uint16_t v) {
        const uint32_t fields = (v & 0x7fffu) << 13, sign = (v & 0x8000u) << 16;
        const float magnitude = fields < 0x7c00u << 13 ? from_bits(fields) * 0x1p112f : from_bits(fields | 0x7f800000u);
        return from_bits(to_bits(magnitude) | sign);
    }
    NT_INLINE uint16_t put(float v) {
        const uint32_t sign = (to_bits(v) >> 16) & 0x8000u, u = to_bits(v) & 0x7fffffffu;
        const uint32_t normal = (u - (112u << 23) + 0xfff + ((u >> 13) & 1)) >> 13;
        const uint32_t subnormal =
            to_bits(from_bits(u) + 0.5f) - to_bits(0.5f);  // 0.5's unit is float16's smallest step
        const uint32_t finite = u < to_bits(0x1p-14f) ? subnormal : normal;
        const uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
        return static_cast<uint16_t>(sign | (u >= to_bits(65520.0f) ? special : finite));
    }
};

// Tokens and channels that are worked on together: 64 KB of float32, which stay in the L2 cache between the two passes.
static constexpr int64_t kTileTokens = 32, kTileChannels = 512;

// Mean and sum of squared deviations of `rows` (at most kTileTokens), merged into the channels' (Chan, Golub and
// LeVeque 1979). Two passes over a tile in cache read memory once and stay exact where a channel has outliers; the
// second also sums the deviations, which corrects the rounded mean that it started from.
template <class T>
static void add_tile(const typename T::type* const* rows, int64_t count, int64_t channels, int64_t before, float* tile,
                     double* mean, double* m2) {
    float center[kTileChannels], sum[kTileChannels], square[kTileChannels];
    for (int64_t c = 0; c < channels; ++c) center[c] = sum[c] = square[c] = 0.0f;
    for (int64_t t = 0; t < count; ++t) {
        const typename T::type* row = rows[t];
        float* values = tile + t * kTileChannels;
        for (int64_t c = 0; c < channels; ++c) {
            values[c] = T::get(row[c]);
            center[c] += values[c];
        }
    }
    for (int64_t c = 0; c < channels; ++c) center[c] /= static_cast<float>(count);
    for (int64_t t = 0; t < count; ++t) {
        const float* values = tile + t * kTileChannels;
        for (int64_t c = 0; c < channels; ++c) {
            const float d = values[c] - center[c];
            sum[c] += d;
            square[c] += d * d;
        }
    }
    const double n = static_cast<double>(count), total = static_cast<double>(before + count);
    const double between = n * static_cast<double>(before) / total;
    for (int64_t c = 0; c < channels; ++c) {
        const double shift = sum[c] / n, delta = center[c] + shift - mean[c];
        mean[c] += delta * (n / total);
        m2[c] += square[c] - sum[c] * shift + delta * delta * between;
    }
}

template <class T>
static int64_t slab(const Tokens& input, int64_t begin, int64_t end, float* tile, double* mean, double* m2) {
    const auto* x = static_cast<const typename T::type*>(input.x);
    for (int64_t c = 0; c < input.channels; ++c) mean[c] = m2[c] = 0.0;
    int64_t kept = 0;
    for (int64_t t = begin; t < end;) {
        const typename T::type* rows[kTileTokens];
        int64_t count = 0;
        for (; t < end && count < kTileTokens; ++t)
            if (!input.mask || input.mask[t]) rows[count++] = x + t * input.channels;
        if (count == 0) break;
        for (int64_t c = 0; c < input.channels; c += kTileChannels) {
            const int64_t left = input.channels - c, channels = left < kTileChannels ? left : kTileChannels;
            add_tile<T>(rows, count, channels, kept, tile, mean + c, m2 + c);
            for (int64_t i = 0; i < count; ++i) rows[i] += channels;
        }
        kept += count;
    }
    return kept;
}

// Tokens [begin, end): number kept, and each channel's mean and sum of squared deviations. tile: scratch
// [kTileTokens][kTileChannels].
static int64_t slab_statistics(const Tokens& input, int64_t begin, int64_t end, float* tile, double* mean, double* m2) {
    if (input.dtype == Dtype::float32) return slab<Float32>(input, begin, end, tile, mean, m2);
    if (input.dtype == Dtype::bfloat16) return slab<Bfloat16>(input, begin, end, tile, mean, m2);
    return slab<Float16>(input, begin, end, tile, mean, m2);
}

template <class T>
static void gradient(const Tokens& input, int64_t begin, int64_t end, const float* mean, const float* offset,
                     const float* slope, void* grad_x) {
    const int64_t channels = input.channels;
    for (int64_t t = begin; t < end; ++t) {
        const auto* x = static_cast<const typename T::type*>(input.x) + t * channels;
        auto* out = static_cast<typename T::type*>(grad_x) + t * channels;
        if (input.mask && !input.mask[t])
            __builtin_memset(out, 0, static_cast<size_t>(channels) * sizeof *out);
        else
#pragma GCC ivdep
            for (int64_t c = 0; c < channels; ++c) out[c] = T::put(offset[c] + slope[c] * (T::get(x[c]) - mean[c]));
    }
}

static void token_gradients(const Tokens& input, int64_t begin, int64_t end, const float* mean, const float* offset,
                            const float* slope, void* grad_x) {
    if (input.dtype == Dtype::float32)
        gradient<Float32>(input, begin, end, mean, offset, slope, grad_x);
    else if (input.dtype == Dtype::bfloat16)
        gradient<Bfloat16>(input, begin, end, mean, offset, slope, grad_x);
    else
        gradient<Float16>(input, begin, end, mean, offset, slope, grad_x);
}
