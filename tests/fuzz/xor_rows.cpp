// xor_rows on every instruction set beside the loop that says what it computes: the same bits.
#include "xor_rows.hpp"

#include "draw.hpp"

using namespace fuzz;

namespace {

struct Sizes {
  int64_t C, D, Q;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Draw draw(data, size);
  draw.use_some_instruction_set();
  const DType dtype = draw.floating();
  const int threads = draw.threads();
  Sizes n{draw.below(80), draw.below(140), draw.below(6)};
  if (draw.one_in(1024)) n = draw.one_of<Sizes>({{1100, 70, 40}, {9, 3, 600}});  // of several tasks; blocks of queries
  const Tensor table = draw.dense_rows(dtype, n.C, n.D);
  const int64_t bytes = (n.C + 7) / 8, stride = bytes + draw.below(4), width = n.D * size_of(dtype);
  std::vector<uint8_t> bits(n.Q > 0 ? size_t((n.Q - 1) * stride + bytes) : 0);
  for (uint8_t& byte : bits) byte = uint8_t(draw.random());

  std::vector<char> expected(size_t(n.Q * width)), answers(expected.size(), 1);
  for (int64_t q = 0; q < n.Q; ++q) {
    for (int64_t c = 0; c < n.C; ++c) {
      if (!(bits[size_t(q * stride + c / 8)] >> c % 8 & 1)) continue;
      for (int64_t b = 0; b < width; ++b) expected[size_t(q * width + b)] ^= table.matrix().row(c)[b];
    }
  }
  xor_rows(table.matrix(), {bits.data(), n.Q, stride}, answers.data(), threads);
  promise(answers == expected, "the XOR of the rows whose bits are set, bit for bit");
  return 0;
}
