// Compiled with -ffp-contract=off: a fused multiply-add would skip one rounding where the instruction set has one.
#include "row_momentum.hpp"

#include <algorithm>

#include "check_ids.hpp"
#include "row_access.hpp"

namespace fedss {
namespace {

constexpr Shares kShares = {5e4, 1 << 15};

// The step's numbers, rounded to T once, and the arithmetic of one element.
template <class T>
struct Rule {
  T lr, momentum, weight_decay;
  bool nesterov, decays;

  explicit Rule(const RowMomentum& step)
      : lr(T(step.lr)),
        momentum(T(step.momentum)),
        weight_decay(T(step.weight_decay)),
        nesterov(step.nesterov),
        decays(step.weight_decay != 0) {}  // 0 * infinity is no gradient

  void update(T row, T& weight) const { weight -= lr * gradient(row, weight); }

  void update(T row, T& weight, T& velocity) const {
    const T g = gradient(row, weight), v = momentum * velocity + g;
    velocity = v;
    weight -= lr * (nesterov ? g + momentum * v : v);
  }

 private:
  T gradient(T row, T weight) const { return decays ? row + weight_decay * weight : row; }
};

// Rows whose elements lie side by side; asks for the memory of the rows that come a little later.
template <class T, class Element>
void update_contiguous(const Rule<T> rule, const RowMomentum& step, int64_t i, int64_t c, int64_t later,
                       int64_t later_c) {
  constexpr int64_t kRun = kRunBytes / sizeof(T);
  const int64_t D = step.rows.cols;
  const bool moves = step.velocity.data;
  T* const __restrict weight = at_mutable<T>(step.weight, c, 0);
  T* const __restrict velocity = moves ? at_mutable<T>(step.velocity, c, 0) : nullptr;
  const Element* const __restrict row = at<Element>(step.rows, i, 0);
  for (int64_t begin = 0; begin < D; begin += kRun) {
    const int64_t end = std::min(begin + kRun, D);
    prefetch(at<T>(step.weight, later_c, begin), end - begin);
    prefetch(at<Element>(step.rows, later, begin), end - begin);
    if (moves) {
      prefetch(at<T>(step.velocity, later_c, begin), end - begin);
      for (int64_t d = begin; d < end; ++d) rule.update(T(row[d]), weight[d], velocity[d]);
    } else {
      for (int64_t d = begin; d < end; ++d) rule.update(T(row[d]), weight[d]);
    }
  }
}

template <class T, class Element>
void update_strided(const Rule<T>& rule, const RowMomentum& step, int64_t i, int64_t c) {
  for (int64_t d = 0; d < step.rows.cols; ++d) {
    const T row = T(*at<Element>(step.rows, i, d));
    T& weight = *at_mutable<T>(step.weight, c, d);
    if (step.velocity.data) {
      rule.update(row, weight, *at_mutable<T>(step.velocity, c, d));
    } else {
      rule.update(row, weight);
    }
  }
}

template <class T, class Element>
void update_rows(const RowMomentum& step, const std::vector<int64_t>& class_ids, int threads) {
  const Rule<T> rule(step);
  const bool contiguous = step.weight.col_stride == 1 && step.rows.col_stride == 1 && step.velocity.col_stride == 1;
  for_listed_rows<T>(class_ids, step.rows.cols, kShares, threads, [&](int64_t i, int64_t later) {
    if (contiguous) {
      update_contiguous<T, Element>(rule, step, i, class_ids[i], later, class_ids[later]);
    } else {
      update_strided<T, Element>(rule, step, i, class_ids[i]);
    }
  });
}

}  // namespace

void row_momentum_step(const RowMomentum& step, int threads) {
  const std::vector<int64_t> class_ids = checked_ids("class_ids", step.class_ids, step.weight.rows);
  check_unique("class_ids", class_ids);
  with_types(step.weight.dtype, step.rows.dtype, [&](auto number, auto element) {
    update_rows<decltype(number), decltype(element)>(step, class_ids, threads);
  });
}

}  // namespace fedss
