// row_adam_step beside the loop that says what it computes: the same bits, and a refused call writes nothing.
#include "draw.hpp"
#include "row_adam.hpp"

using namespace fuzz;

namespace {

struct State {
  Tensor weight, exp_avg, exp_avg_sq, row_steps;

  bool same(const State& other) const {
    return weight.same(other.weight) && exp_avg.same(other.exp_avg) && exp_avg_sq.same(other.exp_avg_sq) &&
           row_steps.same(other.row_steps);
  }
};

template <class T>
void define(const RowAdam& step, const Tensor& ids, const Tensor& rows, State& state) {
  for (int64_t i = 0; i < rows.rows; ++i) {
    const int64_t c = ids.id(i), n = ++state.row_steps.at<int64_t>(c);
    const T rate = T(step.lr / (1 - std::pow(step.beta1, double(n))));
    const T root = T(std::sqrt(1 - std::pow(step.beta2, double(n))));
    for (int64_t d = 0; d < rows.cols; ++d) {
      T &w = state.weight.at<T>(c, d), &m = state.exp_avg.at<T>(c, d), &v = state.exp_avg_sq.at<T>(c, d);
      const T g = T(rows.number(i, d));
      m += T(1 - step.beta1) * (g - m);
      v = T(step.beta2) * v + T(1 - step.beta2) * (g * g);
      w = T(1 - step.lr * step.weight_decay) * w - rate * (m / (std::sqrt(v) / root + T(step.eps)));
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
  RowAdam step;
  step.lr = draw.scalar(), step.eps = draw.scalar(), step.weight_decay = draw.scalar();
  step.beta1 = draw.one_of({0.0, 0.9, 0.5}), step.beta2 = draw.one_of({0.0, 0.999, 0.5});
  State state{draw.matrix(dtype, C, D), draw.matrix(dtype, C, D), draw.matrix(dtype, C, D), draw.ids(C, 1000)};
  const Tensor ids = draw.ids(M, C), rows = draw.matrix(from, M, D, true);
  for (int64_t c = 0; c < C; ++c) {
    state.row_steps.at<int64_t>(c) = std::clamp<int64_t>(state.row_steps.id(c), 0, int64_t(1) << 40);
  }

  std::string refused = first_bad_id("class_ids", ids.vector(), C);
  if (refused.empty()) refused = first_repeated_id("class_ids", ids.vector());
  State expected = state;
  if (refused.empty()) (dtype == DType::float32 ? define<float> : define<double>)(step, ids, rows, expected);
  step.weight = state.weight.matrix(), step.exp_avg = state.exp_avg.matrix();
  step.exp_avg_sq = state.exp_avg_sq.matrix(), step.row_steps = state.row_steps.vector();
  step.class_ids = ids.vector(), step.rows = rows.matrix();
  promise_refusal(refusal([&] { row_adam_step(step, threads); }), refused);
  promise(state.same(expected), "the step, bit for bit, on its rows alone");
  return 0;
}
