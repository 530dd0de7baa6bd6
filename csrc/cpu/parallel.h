// Splits work into one contiguous part per thread. Written as a loop over parts, it needs no OpenMP call, so that the
// same source runs serially where the compiler has none.
#pragma once

#include <algorithm>
#include <cstdint>

namespace normtweak {

template <class Body>
void parallel_parts(int64_t count, int threads, const Body& body) {
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(count, threads));
#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) body(part, count * part / parts, count * (part + 1) / parts);
}

}  // namespace normtweak
