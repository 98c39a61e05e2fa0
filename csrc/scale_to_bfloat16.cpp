#include "scale_to_bfloat16.hpp"

#include <algorithm>

#include "instruction_sets.hpp"
#include "thread_pool.hpp"

namespace fedss {

void scale_to_bfloat16(const float* values, int64_t n, float factor, uint16_t* out, int threads) {
  constexpr int64_t kBlock = 1 << 15;
  const Kernels& kernels = current_kernels();
  parallel_for((n + kBlock - 1) / kBlock, threads, [&](int64_t task, int) {
    const int64_t begin = task * kBlock;
    kernels.scale_to_bfloat16(values + begin, std::min(kBlock, n - begin), factor, out + begin);
  });
}

}  // namespace fedss
