// out = factor * values, rounded to float32 and then to bfloat16: what a float32 gradient becomes once the upstream
// gradient is known.
#pragma once

#include <cstdint>

namespace fedss {

// n contiguous elements.
void scale_to_bfloat16(const float* values, int64_t n, float factor, uint16_t* out, int threads);

}  // namespace fedss
