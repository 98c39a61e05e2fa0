// Compiled with -ffp-contract=off: a fused multiply-add would skip one rounding where the instruction set has one.
#include "lazy_momentum.hpp"

#include <atomic>
#include <cmath>
#include <cstring>

#include "check_ids.hpp"
#include "row_access.hpp"

namespace fedss {
namespace {

constexpr Shares kShares = {5e4, 1 << 15};

// What k steps without a gradient do to a row: w -= move * v, v *= decay.
struct Coast {
  double move, decay;

  Coast(const LazyMomentum& table, int64_t k) {
    const double beta = table.momentum, log_decay = k == 0 ? 0.0 : double(k) * std::log(beta);  // log 0: -infinity
    decay = std::exp(log_decay);
    move = table.lr * beta * -std::expm1(log_decay) / (1 - beta);
  }
};

// body(i, c, coast) for each row of a call, those that come a little later asked for from memory.
template <class Body>
void for_rows(const LazyMomentum& table, const std::vector<int64_t>& class_ids, int threads, const Body& body) {
  const int64_t D = table.weight.cols;
  for_listed_rows<float>(class_ids, D, kShares, threads, [&](int64_t i, int64_t next) {
    const int64_t c = class_ids[i], later = class_ids[next];
    prefetch(at<float>(table.weight, later, 0), D);
    prefetch(at<float>(table.velocity, later, 0), D);
    __builtin_prefetch(static_cast<const int64_t*>(table.stepped.data) + later * table.stepped.stride);
    body(i, c, Coast(table, table.now - table.stepped.id(c)));
  });
}

// The highest bit is set where the exponent is all ones; integers, as their sums may be taken in any order.
uint32_t sign_if_not_finite(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x7fffffff) + 0x00800000;
}

}  // namespace

void lazy_momentum_read(const LazyMomentum& table, const Vector& class_ids, const Matrix& out, int threads) {
  const std::vector<int64_t> ids = checked_ids("class_ids", class_ids, table.weight.rows);
  for_rows(table, ids, threads, [&](int64_t i, int64_t c, const Coast& coast) {
    const float* const weight = at<float>(table.weight, c, 0);
    const float* const velocity = at<float>(table.velocity, c, 0);
    float* const __restrict to = at_mutable<float>(out, i, 0);
    const float move = float(coast.move);
    for (int64_t d = 0; d < out.cols; ++d) to[d] = weight[d] - move * velocity[d];
  });
}

bool lazy_momentum_step(const LazyMomentum& table, const Vector& class_ids, const Matrix& rows, int threads) {
  const std::vector<int64_t> ids = checked_ids("class_ids", class_ids, table.weight.rows);
  check_unique("class_ids", ids);
  auto* const stepped = static_cast<int64_t*>(const_cast<void*>(table.stepped.data));
  std::atomic<bool> finite{true};
  for_rows(table, ids, threads, [&](int64_t i, int64_t c, const Coast& coast) {
    float* const __restrict weight = at_mutable<float>(table.weight, c, 0);
    float* const __restrict velocity = at_mutable<float>(table.velocity, c, 0);
    const float* const __restrict row = at<float>(rows, i, 0);
    const float move = float(coast.move), keep = float(table.momentum * coast.decay), lr = float(table.lr);
    uint32_t found = 0;
    for (int64_t d = 0; d < rows.cols; ++d) {
      const float now = weight[d] - move * velocity[d], v = keep * velocity[d] + row[d], w = now - lr * v;
      velocity[d] = v;
      weight[d] = w;
      found |= sign_if_not_finite(v) | sign_if_not_finite(w);
    }
    if (found >> 31) finite.store(false, std::memory_order_relaxed);
    stepped[c * table.stepped.stride] = table.now + 1;
  });
  return finite;
}

}  // namespace fedss
