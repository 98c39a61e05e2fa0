// lazy_momentum_read beside its closed form: the same bits, the table as it was, and a refused call writes nothing.
#include "lazy_table.hpp"

using namespace fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Draw draw(data, size);
  LazyTable table(draw);
  const int64_t C = table.weight.rows, D = table.weight.cols;
  const Tensor ids = draw.ids(table.M, C);
  Tensor out = draw.dense_rows(DType::float32, table.M, D), expected = out;
  const std::string refused = first_bad_id("class_ids", ids.vector(), C);
  for (int64_t i = 0; refused.empty() && i < table.M; ++i) {
    const int64_t c = ids.id(i);
    const float move = float(table.move(c));
    for (int64_t d = 0; d < D; ++d) {
      expected.at<float>(i, d) = table.weight.at<float>(c, d) - move * table.velocity.at<float>(c, d);
    }
  }
  const LazyTable before = table;
  const auto call = [&] { lazy_momentum_read(table.view(), ids.vector(), out.matrix(), table.threads); };
  promise_refusal(refusal(call), refused);
  promise(out.same(expected), "each row as it is now, bit for bit, and nothing besides");
  promise(table.same(before), "reading changes nothing");
  return 0;
}
