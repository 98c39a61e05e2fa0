// lazy_momentum_step: starts from exactly what a read gives, touches the rows it is for alone, and writes nothing if it
// is refused.
#include <cmath>

#include "lazy_table.hpp"

using namespace fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Draw draw(data, size);
  LazyTable table(draw);
  const int64_t C = table.weight.rows, D = table.weight.cols, M = table.M;
  const Tensor ids = draw.ids(M, C), rows = draw.dense_rows(DType::float32, M, D);
  std::string refused = first_bad_id("class_ids", ids.vector(), C);
  if (refused.empty()) refused = first_repeated_id("class_ids", ids.vector());

  LazyTable expected = table;
  Tensor read = rows;
  bool finite = true, said = true;
  if (refused.empty()) lazy_momentum_read(table.view(), ids.vector(), read.matrix(), 1);
  for (int64_t i = 0; refused.empty() && i < M; ++i) {
    const int64_t c = ids.id(i);
    const float keep = float(table.momentum * table.decay(c)), lr = float(table.lr);
    for (int64_t d = 0; d < D; ++d) {
      float& velocity = expected.velocity.at<float>(c, d);
      velocity = keep * velocity + float(rows.number(i, d));
      expected.weight.at<float>(c, d) = read.at<float>(i, d) - lr * velocity;
    }
    for (int64_t d = 0; d < D; ++d) {
      finite =
          finite && std::isfinite(expected.velocity.at<float>(c, d)) && std::isfinite(expected.weight.at<float>(c, d));
    }
    expected.stepped.at<int64_t>(c) = table.now + 1;
  }
  const auto call = [&] { said = lazy_momentum_step(table.view(), ids.vector(), rows.matrix(), table.threads); };
  promise_refusal(refusal(call), refused);
  promise(table.same(expected), "the step, bit for bit, on its rows alone");
  promise(said == finite, "whether what it wrote is finite");
  return 0;
}
