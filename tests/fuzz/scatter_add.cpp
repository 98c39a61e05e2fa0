// scatter_add beside the loop that says what it computes: the same bits, and a refused call writes nothing.
#include "scatter_add.hpp"

#include "draw.hpp"

using namespace fuzz;

namespace {

template <class T>
void add(Tensor& out, const Tensor& ids, const Tensor& rows, const Vector& scale) {
  for (int64_t i = 0; i < rows.rows; ++i) {
    const T factor = scale ? T(scale[i]) : T(1);
    for (int64_t d = 0; d < rows.cols; ++d) out.at<T>(ids.id(i), d) += factor * T(rows.number(i, d));
  }
}

struct Sizes {
  int64_t M, C, D;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Draw draw(data, size);
  const DType to = draw.one_of({DType::float32, DType::float64});
  const DType from = draw.one_of({to, DType::float16, DType::bfloat16});
  const int threads = draw.threads();
  Sizes n{draw.below(12), draw.below(9), draw.below(80)};
  // What is shared out to threads: many rows, long rows, and so many ids that they are sorted in chunks.
  if (draw.one_in(1024)) n = draw.one_of<Sizes>({{300, 40, 200}, {3, 5, 20000}, {33000, 50, 2}});
  Tensor out = draw.matrix(to, n.C, n.D);
  const Tensor ids = draw.ids(n.M, n.C), rows = draw.matrix(from, n.M, n.D, true);
  const bool scaled = draw.flag();
  const Tensor scale = draw.vector(draw.floating(), n.M);

  const std::string refused = first_bad_id("class_ids", ids.vector(), n.C);
  const Vector factors = scaled ? scale.vector() : Vector();
  Tensor expected = out;
  if (refused.empty()) (to == DType::float32 ? add<float> : add<double>)(expected, ids, rows, factors);
  const auto call = [&] { scatter_add(out.matrix(), ids.vector(), rows.matrix(), factors, threads); };
  promise_refusal(refusal(call), refused);
  promise(out.same(expected), "out[class_ids[i]] += scale[i] * rows[i], bit for bit, and nothing besides");
  return 0;
}
