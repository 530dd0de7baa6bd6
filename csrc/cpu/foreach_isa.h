// Includes the file NT_BODY once per instruction set, each time in its own namespace, so that one source becomes a
// portable, an AVX2 and an AVX-512 body. A body holds no templates of the standard library: instantiated here they
// would be compiled for AVX-512, and the linker keeps one copy of each for the whole module.
#define NT_INLINE static inline __attribute__((always_inline, unused))

#define NT_LANES 4
namespace normtweak::portable {
#include "lanes.h"
#include NT_BODY
}  // namespace normtweak::portable
#undef NT_LANES

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define NT_LANES 8
namespace normtweak::avx2 {
#include "lanes.h"
#include NT_BODY
}  // namespace normtweak::avx2
#undef NT_LANES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define NT_LANES 16
namespace normtweak::avx512 {
#include "lanes.h"
#include NT_BODY
}  // namespace normtweak::avx512
#undef NT_LANES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define NT_PICK(isa, name) ((isa) == Isa::avx512 ? avx512::name : (isa) == Isa::avx2 ? avx2::name : portable::name)

#else

#define NT_PICK(isa, name) (portable::name)

#endif
