// Compiled with -ffp-contract=off: a fused multiply-add would skip one rounding where the instruction set has one.
#include "row_adam.hpp"

#include <algorithm>
#include <cmath>

#include "check_ids.hpp"
#include "row_access.hpp"

namespace fedss {
namespace {

constexpr Shares kShares = {2e4, 1 << 14};

// The numbers of a row's n-th step, rounded to T once, and the arithmetic of one element.
template <class T>
struct Rule {
  T keep, first, beta2, second, eps, rate, root;

  Rule(const RowAdam& step, int64_t n)
      : keep(T(1 - step.lr * step.weight_decay)),
        first(T(1 - step.beta1)),
        beta2(T(step.beta2)),
        second(T(1 - step.beta2)),
        eps(T(step.eps)),
        rate(T(step.lr / (1 - std::pow(step.beta1, double(n))))),
        root(T(std::sqrt(1 - std::pow(step.beta2, double(n))))) {}

  void update(T g, T& weight, T& exp_avg, T& exp_avg_sq) const {
    const T m = exp_avg + first * (g - exp_avg), v = beta2 * exp_avg_sq + second * (g * g);
    exp_avg = m;
    exp_avg_sq = v;
    weight = keep * weight - rate * (m / (std::sqrt(v) / root + eps));
  }
};

// Rows whose elements lie side by side; asks for the memory of the rows that come a little later.
template <class T, class Element>
void update_contiguous(const Rule<T> rule, const RowAdam& step, int64_t i, int64_t c, int64_t later, int64_t later_c) {
  constexpr int64_t kRun = kRunBytes / sizeof(T);
  const int64_t D = step.rows.cols;
  T* const __restrict weight = at_mutable<T>(step.weight, c, 0);
  T* const __restrict exp_avg = at_mutable<T>(step.exp_avg, c, 0);
  T* const __restrict exp_avg_sq = at_mutable<T>(step.exp_avg_sq, c, 0);
  const Element* const __restrict row = at<Element>(step.rows, i, 0);
  __builtin_prefetch(static_cast<const int64_t*>(step.row_steps.data) + later_c * step.row_steps.stride);
  for (int64_t begin = 0; begin < D; begin += kRun) {
    const int64_t end = std::min(begin + kRun, D);
    prefetch(at<T>(step.weight, later_c, begin), end - begin);
    prefetch(at<T>(step.exp_avg, later_c, begin), end - begin);
    prefetch(at<T>(step.exp_avg_sq, later_c, begin), end - begin);
    prefetch(at<Element>(step.rows, later, begin), end - begin);
    for (int64_t d = begin; d < end; ++d) rule.update(T(row[d]), weight[d], exp_avg[d], exp_avg_sq[d]);
  }
}

template <class T, class Element>
void update_strided(const Rule<T>& rule, const RowAdam& step, int64_t i, int64_t c) {
  for (int64_t d = 0; d < step.rows.cols; ++d) {
    rule.update(T(*at<Element>(step.rows, i, d)), *at_mutable<T>(step.weight, c, d), *at_mutable<T>(step.exp_avg, c, d),
                *at_mutable<T>(step.exp_avg_sq, c, d));
  }
}

template <class T, class Element>
void update_rows(const RowAdam& step, const std::vector<int64_t>& class_ids, int threads) {
  const bool contiguous = step.weight.col_stride == 1 && step.exp_avg.col_stride == 1 &&
                          step.exp_avg_sq.col_stride == 1 && step.rows.col_stride == 1;
  auto* const row_steps = static_cast<int64_t*>(const_cast<void*>(step.row_steps.data));
  for_listed_rows<T>(class_ids, step.rows.cols, kShares, threads, [&](int64_t i, int64_t later) {
    const int64_t c = class_ids[i];
    const Rule<T> rule(step, ++row_steps[c * step.row_steps.stride]);
    if (contiguous) {
      update_contiguous<T, Element>(rule, step, i, c, later, class_ids[later]);
    } else {
      update_strided<T, Element>(rule, step, i, c);
    }
  });
}

}  // namespace

void row_adam_step(const RowAdam& step, int threads) {
  const std::vector<int64_t> class_ids = checked_ids("class_ids", step.class_ids, step.weight.rows);
  check_unique("class_ids", class_ids);
  with_types(step.weight.dtype, step.rows.dtype, [&](auto number, auto element) {
    update_rows<decltype(number), decltype(element)>(step, class_ids, threads);
  });
}

}  // namespace fedss
