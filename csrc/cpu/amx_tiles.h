// The operations on AMX's tiles that kernels use, as the instructions and, for the tests on processors without AMX, in
// plain C++. Kernels take one of the two as a template argument, so that the same kernel runs on both.
//
// The kernels were compiled for AMX and their logic was executed with emulated tiles; they have not yet run on an AMX
// processor.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)

namespace normtweak {

constexpr int kTiles = 8;
constexpr int kTileRows = 16;   // at most
constexpr int kTileBytes = 64;  // of a row, at most

// What ldtilecfg reads: palette 1, and the shape of each tile.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};  // tiles past the eighth must be zero
    uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64, "ldtilecfg reads 64 bytes");

// Inline assembly, because the intrinsics of GCC 12 don't say that they read memory. It also leaves the functions
// without a target of their own, so that they are inlined into kernels of any. Compilers never put values of theirs
// into tiles; volatile keeps the instructions in order.
struct AmxTiles {
    static inline __attribute__((always_inline)) void configure(const TileConfig& config) {
        asm volatile("ldtilecfg %0" : : "m"(config));
    }
    static inline __attribute__((always_inline)) void release() { asm volatile("tilerelease"); }
    template <int T>
    static inline __attribute__((always_inline)) void zero() {
        asm volatile("tilezero %%tmm%c0" : : "i"(T));
    }
    template <int T>
    static inline __attribute__((always_inline)) void load(const void* from, ptrdiff_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    static inline __attribute__((always_inline)) void store(void* to, ptrdiff_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
    }
    // C += A . B, fours of A's signed bytes times fours of B's unsigned ones.
    template <int C, int A, int B>
    static inline __attribute__((always_inline)) void dot() {
        asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
    }
};

// The same on memory of the thread, after the operations' description in Intel's manual (Software Developer's Manual,
// volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBSUD). What raises #UD or #GP there throws std::logic_error.
struct EmulatedTiles {
    static void configure(const TileConfig& config);
    static void release();
    template <int T>
    static void zero() {
        zero(T);
    }
    template <int T>
    static void load(const void* from, ptrdiff_t stride) {
        load(T, from, stride);
    }
    template <int T>
    static void store(void* to, ptrdiff_t stride) {
        store(T, to, stride);
    }
    template <int C, int A, int B>
    static void dot() {
        dot(C, A, B);
    }

  private:
    static void zero(int tile);
    static void load(int tile, const void* from, ptrdiff_t stride);
    static void store(int tile, void* to, ptrdiff_t stride);
    static void dot(int c, int a, int b);
};

}  // namespace normtweak

#endif
