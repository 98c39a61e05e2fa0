// The C++ kernels against the definition in float64, without Python: for instruction sets that this machine only
// emulates, and for sanitizers and valgrind. Prints one line for each instruction set; exit status 1 if any is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "instruction_sets.hpp"
#include "sampled_softmax.hpp"

using namespace fedss;

namespace {

struct Problem {
  int64_t B, C, D, S;
  bool all, cosine, bias, bfloat16, float64;
  std::vector<double> x, w, log_count, target_log_count, class_bias, upstream;
  std::vector<int64_t> target, class_ids;
};

struct Answer {
  std::vector<double> loss, grad_x, grad_w, grad_bias;
  double grad_scale = 0;
};

double rounded(const Problem& p, double value) {
  if (p.float64) return value;
  return p.bfloat16 ? round_to_bfloat16(float(value)) : float(value);
}

Problem draw(int64_t B, int64_t C, int64_t D, int64_t S, std::mt19937& g, bool bfloat16, bool float64) {
  std::normal_distribution<double> normal;
  Problem p{B, C, D, S, S < 0, g() % 3 != 0, g() % 2 == 0, bfloat16, float64, {}, {}, {}, {}, {}, {}, {}, {}};
  const auto fill = [&](std::vector<double>& v, int64_t n, double scale) {
    for (int64_t i = 0; i < n; ++i) v.push_back(rounded(p, normal(g) * scale));
  };
  fill(p.x, B * D, 1), fill(p.w, C * D, p.cosine ? 3 : 1 / std::sqrt(double(D) + 1)), fill(p.class_bias, C, 1);
  fill(p.upstream, B, 1), fill(p.log_count, p.all ? C : S, 1), fill(p.target_log_count, B, 1);
  for (double& count : p.log_count) count = g() % 7 == 0 ? std::numeric_limits<double>::infinity() : count;
  for (int64_t i = 0; i < B; ++i) p.target.push_back(g() % 9 == 0 ? -100 : int64_t(g() % C));
  for (int64_t j = 0; j < S; ++j) p.class_ids.push_back(int64_t(g() % C));
  if (p.all) {
    for (int64_t j = 0; j < C; ++j) p.class_ids.push_back(j);
  }
  if (D > 0 && g() % 2) std::fill_n(p.w.begin(), D, 0.0);
  return p;
}

constexpr double kScale = 7;

// The definition, term by term.
Answer define(const Problem& p) {
  Answer a;
  a.loss.assign(p.B, 0), a.grad_x.assign(p.B * p.D, 0), a.grad_w.assign(p.C * p.D, 0), a.grad_bias.assign(p.C, 0);
  const auto norm = [&](const double* row) {
    double squares = 0;
    for (int64_t d = 0; d < p.D; ++d) squares += row[d] * row[d];
    return std::sqrt(squares);
  };
  const auto factor = [&](const double* x, const double* w) {
    if (!p.cosine) return 1.0;
    return norm(x) < 1e-12 || norm(w) < 1e-12 ? 0.0 : 1 / (norm(x) * norm(w));
  };
  for (int64_t i = 0; i < p.B; ++i) {
    const int64_t t = p.target[i];
    if (t == -100) continue;
    const double* x = &p.x[i * p.D];
    std::vector<int64_t> ids{t};
    std::vector<double> counts{p.target_log_count[i]};
    for (size_t j = 0; j < p.class_ids.size(); ++j) {
      if (p.class_ids[j] == t || p.log_count[j] == std::numeric_limits<double>::infinity()) continue;
      ids.push_back(p.class_ids[j]), counts.push_back(p.log_count[j]);
    }
    std::vector<double> similarity, o;
    for (size_t j = 0; j < ids.size(); ++j) {
      const double* w = &p.w[ids[j] * p.D];
      double dot = 0;
      for (int64_t d = 0; d < p.D; ++d) dot += x[d] * w[d];
      similarity.push_back(dot * factor(x, w));
      o.push_back(kScale * similarity[j] + (p.bias ? p.class_bias[ids[j]] : 0) - counts[j]);
    }
    const double max = *std::max_element(o.begin(), o.end());
    double sum = 0;
    for (double value : o) sum += std::exp(value - max);
    a.loss[i] = max + std::log(sum) - o[0];
    for (size_t j = 0; j < ids.size(); ++j) {
      const double gradient = p.upstream[i] * (std::exp(o[j] - max) / sum - (j == 0));
      const double* w = &p.w[ids[j] * p.D];
      a.grad_scale += gradient * similarity[j];
      a.grad_bias[ids[j]] += gradient;
      const double f = factor(x, w), x2 = norm(x) * norm(x), w2 = norm(w) * norm(w);
      for (int64_t d = 0; d < p.D; ++d) {
        const double along_x = p.cosine && f != 0 ? similarity[j] * x[d] / x2 : 0.0;
        const double along_w = p.cosine && f != 0 ? similarity[j] * w[d] / w2 : 0.0;
        a.grad_x[i * p.D + d] += kScale * gradient * (f * w[d] - along_x);
        a.grad_w[ids[j] * p.D + d] += kScale * gradient * (f * x[d] - along_w);
      }
    }
  }
  return a;
}

template <class T>
std::vector<T> converted(const std::vector<double>& values) {
  return std::vector<T>(values.begin(), values.end());
}

std::vector<uint16_t> bfloats(const std::vector<double>& values) {
  std::vector<uint16_t> out;
  for (double value : values) out.push_back(uint16_t(float_to_bits(float(value)) >> 16));
  return out;
}

template <class Out>
Answer compute(const Problem& p, int threads) {
  const auto x = converted<Out>(p.x), w = converted<Out>(p.w), bias = converted<Out>(p.class_bias);
  const auto x16 = bfloats(p.x), w16 = bfloats(p.w);
  const DType dtype = p.float64 ? DType::float64 : p.bfloat16 ? DType::bfloat16 : DType::float32;
  SampledSoftmax s;
  s.input = {p.bfloat16 ? (const void*)x16.data() : x.data(), dtype, p.B, p.D, p.D, 1};
  s.weight = {p.bfloat16 ? (const void*)w16.data() : w.data(), dtype, p.C, p.D, p.D, 1};
  s.target = {p.target.data(), DType::int64, p.B, 1};
  s.all_classes = p.all;
  if (!p.all) s.class_ids = {p.class_ids.data(), DType::int64, p.S, 1};
  s.log_expected_count = {p.log_count.data(), DType::float64, int64_t(p.log_count.size()), 1};
  s.target_log_expected_count = {p.target_log_count.data(), DType::float64, p.B, 1};
  if (p.bias) s.bias = {bias.data(), p.float64 ? DType::float64 : DType::float32, p.C, 1};
  s.scale = kScale, s.cosine = p.cosine, s.reduction = Reduction::none;
  s.grad_loss = {p.upstream.data(), DType::float64, p.B, 1};

  const int64_t capacity = p.all ? p.C : std::min(p.S + p.B, p.C);
  std::vector<Out> loss(p.B), grad_x(p.B * p.D), grad_rows(capacity * p.D), grad_bias(capacity);
  std::vector<int64_t> ids(capacity);
  Answer a;
  SampledSoftmaxResult result;
  result.loss = loss.data(), result.grad_input = grad_x.data(), result.grad_rows = grad_rows.data();
  result.row_ids = p.all ? nullptr : ids.data(), result.capacity = capacity, result.grad_scale = &a.grad_scale;
  if (p.bias) result.grad_bias = grad_bias.data();
  const int64_t touched = sampled_softmax(s, result, threads);
  a.loss.assign(loss.begin(), loss.end()), a.grad_x.assign(grad_x.begin(), grad_x.end());
  a.grad_w.assign(p.C * p.D, 0), a.grad_bias.assign(p.C, 0);
  for (int64_t slot = 0; slot < touched; ++slot) {
    const int64_t id = p.all ? slot : ids[slot];
    for (int64_t d = 0; d < p.D; ++d) a.grad_w[id * p.D + d] = grad_rows[slot * p.D + d];
    if (p.bias) a.grad_bias[id] = grad_bias[slot];
  }
  return a;
}

double worst(const std::vector<double>& got, const std::vector<double>& expected) {
  double largest = 1e-30, error = 0;
  for (double value : expected) largest = std::max(largest, std::abs(value));
  for (size_t i = 0; i < got.size(); ++i) {
    const double difference = std::abs(got[i] - expected[i]) / largest;
    if (!(difference <= error)) error = difference;  // a NaN too
  }
  return error;
}

bool same(const Answer& a, const Answer& b) {
  return a.loss == b.loss && a.grad_x == b.grad_x && a.grad_w == b.grad_w && a.grad_bias == b.grad_bias &&
         a.grad_scale == b.grad_scale;
}

// How many times its tolerance the worst result is off.
double check(const Problem& p) {
  const Answer expected = define(p), got = p.float64 ? compute<double>(p, 1) : compute<float>(p, 1);
  const Answer on_threads = p.float64 ? compute<double>(p, 3) : compute<float>(p, 3);
  if (!same(got, on_threads)) return std::numeric_limits<double>::infinity();
  const double tolerance = p.float64 ? 1e-11 : p.bfloat16 ? 0x1p-8 : 2e-5;
  double error = std::max(worst(got.loss, expected.loss), worst(got.grad_x, expected.grad_x));
  error = std::max(error, worst(got.grad_w, expected.grad_w));
  if (p.bias) error = std::max(error, worst(got.grad_bias, expected.grad_bias));
  return std::max(error, worst({got.grad_scale}, {expected.grad_scale}) / 100) / tolerance;
}

// exp(o - max) of a tile, in units in the last place of T; o from float64 sums of the tile's parts.
template <class T>
double exponential_error() {
  const KernelsFor<T>& kernels = kernels_for<T>(current_kernels());
  const int64_t classes = 2000, rows = 2 * kernels.lanes;
  std::mt19937 g(1);
  std::uniform_real_distribution<double> uniform(-1, 1);
  std::vector<T> values(classes * rows), factor(classes, T(1)), offset(classes), low(classes), max(rows);
  std::vector<T> row_factor(rows), row_low(rows), target(rows, T(-1)), label(classes, T(0));
  std::vector<double> sum(rows), o(classes * rows);
  for (int64_t r = 0; r < rows; ++r) {
    const double scale = std::ldexp(20.3, int(r % 4)) / kLogitUnit<T>;
    row_factor[r] = T(scale), row_low[r] = T(scale - double(row_factor[r]));
  }
  for (int64_t j = 0; j < classes; ++j) {
    const double value = 3 * uniform(g);
    offset[j] = sizeof(T) == 4 ? T(std::nearbyint(value * 512) / 512) : T(value), low[j] = T(value - double(offset[j]));
    for (int64_t r = 0; r < rows; ++r) {
      values[j * rows + r] = T(uniform(g));
      o[j * rows + r] = double(values[j * rows + r]) * (double(row_factor[r]) + double(row_low[r])) +
                        double(offset[j]) + double(low[j]);
    }
  }
  kernels.exponentiate({classes, rows, rows, values.data(), factor.data(), offset.data(), low.data(), row_factor.data(),
                        row_low.data(), nullptr, target.data(), label.data(), max.data(), sum.data(), nullptr});
  double worst = 0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < classes; ++j) {
      const double exact = std::exp((o[j * rows + r] - double(max[r])) * kLogitUnit<T>);
      if (exact < (sizeof(T) == 4 ? 1e-37 : 1e-300)) continue;
      int exponent;
      std::frexp(exact, &exponent);
      const double ulp = std::ldexp(1.0, exponent - std::numeric_limits<T>::digits);
      worst = std::max(worst, std::abs(double(values[j * rows + r]) - exact) / ulp);
    }
  }
  return worst;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 60;
  bool right = true;
  for (const std::string& name : instruction_sets()) {
    use_instruction_set(name);
    std::mt19937 g(0);
    double most = 0;
    for (int i = 0; i < cases; ++i) {
      // Small ones are computed in float64, the others cross the edges of tiles of rows (64), classes and vectors.
      const int64_t B = 1 + g() % (i % 3 ? 150 : 8), D = 2 + g() % (i % 5 ? 90 : 300), C = 1 + g() % 700;
      const int64_t S = g() % 4 ? int64_t(g() % 600) : -1;
      const double error = check(draw(B, C, D, S, g, i % 4 == 1, i % 4 == 2));
      if (!(error <= 1))
        std::printf("case %d: B %ld, C %ld, D %ld, S %ld: %g\n", i, long(B), long(C), long(D), long(S), error);
      most = error <= most ? most : error;
    }
    std::printf("%s: %d cases, worst at %.2g of its tolerance\n", name.c_str(), cases, most);
    // In float64 the exact value has rounding errors of its own: those of o - max, which is as large as 300.
    const double in_float = exponential_error<float>(), in_double = exponential_error<double>();
    std::printf("%s: exp within %.2f units in the last place of float, %.2f of double\n", name.c_str(), in_float,
                in_double);
    right = right && most <= 1 && in_float < 2 && in_double < 600;
  }
  return right ? 0 : 1;
}
