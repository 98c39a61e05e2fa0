// scale_to_bfloat16 on every instruction set: the bits of the product, rounded to nearest.
#include "scale_to_bfloat16.hpp"

#include "draw.hpp"

using namespace fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Draw draw(data, size);
  draw.use_some_instruction_set();
  const int threads = draw.threads();
  const int64_t n = draw.one_in(1024) ? 70000 : draw.below(200);  // of several tasks, or one
  const float factor = float(draw.one_of({draw.scalar(), kInf, kNaN, 0x1p-20}));
  Tensor values = draw.dense_rows(DType::float32, 1, n), out = draw.dense_rows(DType::bfloat16, 1, n);
  Tensor expected = out;
  for (int64_t i = 0; i < n; ++i) {
    const float value = factor * values.at<float>(0, i);
    expected.at<uint16_t>(0, i) = value == value ? bfloat16_bits(value) : 0x7fc0;
  }
  scale_to_bfloat16(static_cast<const float*>(values.data()), n, factor, static_cast<uint16_t*>(out.data()), threads);
  promise(out.memory == expected.memory, "factor * values, rounded to bfloat16, bit for bit");
  return 0;
}
