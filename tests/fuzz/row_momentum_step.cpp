// row_momentum_step beside the loop that says what it computes: the same bits, and a refused call writes nothing.
#include "draw.hpp"
#include "row_momentum.hpp"

using namespace fuzz;

namespace {

template <class T>
void define(const RowMomentum& step, const Tensor& ids, const Tensor& rows, Tensor& weight, Tensor* velocity) {
  const T lr = T(step.lr), momentum = T(step.momentum), weight_decay = T(step.weight_decay);
  for (int64_t i = 0; i < rows.rows; ++i) {
    for (int64_t d = 0; d < rows.cols; ++d) {
      T& w = weight.at<T>(ids.id(i), d);
      T g = T(rows.number(i, d)), v = 0;
      if (step.weight_decay != 0) g += weight_decay * w;  // 0 * infinity is no gradient
      if (velocity) v = velocity->at<T>(ids.id(i), d) = momentum * velocity->at<T>(ids.id(i), d) + g;
      w -= lr * (!velocity ? g : step.nesterov ? g + momentum * v : v);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Draw draw(data, size);
  const DType dtype = draw.one_of({DType::float32, DType::float64});
  const DType from = draw.one_of({dtype, DType::float16, DType::bfloat16});
  const int threads = draw.threads();
  int64_t M = draw.below(10), C = draw.below(12), D = draw.below(150);
  if (draw.one_in(1024)) M = 200, C = 256, D = 260;  // shared out to threads
  RowMomentum step;
  step.lr = draw.scalar(), step.weight_decay = draw.scalar(), step.nesterov = draw.flag();
  const bool moves = draw.flag();
  if (moves) step.momentum = draw.scalar();
  Tensor weight = draw.matrix(dtype, C, D), velocity = draw.matrix(dtype, C, D);
  const Tensor ids = draw.ids(M, C), rows = draw.matrix(from, M, D, true);

  std::string refused = first_bad_id("class_ids", ids.vector(), C);
  if (refused.empty()) refused = first_repeated_id("class_ids", ids.vector());
  Tensor expected_weight = weight, expected_velocity = velocity;
  if (refused.empty()) {
    (dtype == DType::float32 ? define<float> : define<double>)(step, ids, rows, expected_weight,
                                                               moves ? &expected_velocity : nullptr);
  }
  step.weight = weight.matrix(), step.class_ids = ids.vector(), step.rows = rows.matrix();
  if (moves) step.velocity = velocity.matrix();
  promise_refusal(refusal([&] { row_momentum_step(step, threads); }), refused);
  promise(weight.same(expected_weight) && velocity.same(expected_velocity), "the step, bit for bit, on its rows alone");
  return 0;
}
