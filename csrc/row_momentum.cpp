// Compiled with -ffp-contract=off: a fused multiply-add would skip one rounding where the instruction set has one.
#include "row_momentum.hpp"

#include <algorithm>

#include "check_ids.hpp"
#include "row_access.hpp"
#include "thread_pool.hpp"

namespace fedss {
namespace {

constexpr double kSerialWork = 5e4;         // elements below which threads cost more than they give
constexpr int64_t kTaskElements = 1 << 15;  // of the rows of one task

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

template <class T>
void update_rows(const RowMomentum& step, const std::vector<int64_t>& class_ids, int threads) {
  const Rule<T> rule(step);
  const int64_t M = step.rows.rows, D = step.rows.cols, ahead = rows_ahead<T>(D);
  const int64_t per_task = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, D));
  const bool contiguous = step.weight.col_stride == 1 && step.rows.col_stride == 1 && step.velocity.col_stride == 1;
  if (double(M) * double(D) < kSerialWork) threads = 1;
  with_row_type<T>(step.rows.dtype, [&](auto element) {
    using Element = decltype(element);
    parallel_for((M + per_task - 1) / per_task, threads, [&](int64_t task, int) {
      const int64_t last = std::min((task + 1) * per_task, M);
      for (int64_t i = task * per_task; i < last; ++i) {
        const int64_t later = std::min(i + ahead, M - 1);
        if (contiguous) {
          update_contiguous<T, Element>(rule, step, i, class_ids[i], later, class_ids[later]);
        } else {
          update_strided<T, Element>(rule, step, i, class_ids[i]);
        }
      }
    });
  });
}

}  // namespace

void row_momentum_step(const RowMomentum& step, int threads) {
  const std::vector<int64_t> class_ids = checked_ids("class_ids", step.class_ids, step.weight.rows);
  check_unique("class_ids", class_ids);
  threads = std::max(threads, 1);
  if (step.weight.dtype == DType::float64) {
    update_rows<double>(step, class_ids, threads);
  } else {
    update_rows<float>(step, class_ids, threads);
  }
}

}  // namespace fedss
