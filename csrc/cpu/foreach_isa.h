// Includes the file NT_BODY once per instruction set, each time in its own namespace, so that one source becomes a
// portable, an AVX2 and an AVX-512 body, and with NT_DOT defined also bodies for processors that multiply bytes by
// fours (NT_VNNI, NT_DOTPROD). A body holds no templates of the standard library: instantiated here they would be
// compiled for AVX-512, and the linker keeps one copy of each for the whole module.
#if defined(__x86_64__)
// GCC 12's own header uses a value that it calls uninitialized.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NT_INLINE static inline __attribute__((always_inline, unused))

#define NT_LANES 4
namespace normtweak::portable {
#include "lanes.h"
#include NT_BODY
}  // namespace normtweak::portable

#if defined(__aarch64__) && defined(NT_DOT)
#define NT_DOTPROD
#include "isa_begin.h"
namespace normtweak::dotprod {
#include "lanes.h"
#include NT_BODY
}  // namespace normtweak::dotprod
#include "isa_end.h"
#undef NT_DOTPROD
#endif
#undef NT_LANES

#if defined(__x86_64__)

#define NT_LANES 8
#include "isa_begin.h"
namespace normtweak::avx2 {
#include "lanes.h"
#include NT_BODY
}  // namespace normtweak::avx2
#include "isa_end.h"

#if defined(NT_DOT)
#define NT_VNNI
#include "isa_begin.h"
namespace normtweak::avx2_vnni {
#include "lanes.h"
#include NT_BODY
}  // namespace normtweak::avx2_vnni
#include "isa_end.h"
#undef NT_VNNI
#endif
#undef NT_LANES

#define NT_LANES 16
#include "isa_begin.h"
namespace normtweak::avx512 {
#include "lanes.h"
#include NT_BODY
}  // namespace normtweak::avx512
#include "isa_end.h"

#if defined(NT_DOT)
#define NT_VNNI
#include "isa_begin.h"
namespace normtweak::avx512_vnni {
#include "lanes.h"
#include NT_BODY
}  // namespace normtweak::avx512_vnni
#include "isa_end.h"
#undef NT_VNNI
#endif
#undef NT_LANES

#endif

// The body of the widest vectors that `isa` has; NT_PICK_DOT knows the bodies of NT_DOT too.
#if defined(__x86_64__)
#define NT_PICK(isa, name) ((isa) >= Isa::avx512 ? avx512::name : (isa) >= Isa::avx2 ? avx2::name : portable::name)
#define NT_PICK_DOT(isa, name)                     \
    ((isa) >= Isa::avx512_vnni ? avx512_vnni::name \
     : (isa) == Isa::avx512    ? avx512::name      \
     : (isa) == Isa::avx2_vnni ? avx2_vnni::name   \
     : (isa) == Isa::avx2      ? avx2::name        \
                               : portable::name)
#elif defined(__aarch64__)
#define NT_PICK(isa, name) ((void)(isa), portable::name)
#define NT_PICK_DOT(isa, name) ((isa) == Isa::dotprod ? dotprod::name : portable::name)
#else
#define NT_PICK(isa, name) ((void)(isa), portable::name)
#define NT_PICK_DOT(isa, name) ((void)(isa), portable::name)
#endif
