// Compiled with -ffp-contract=off: a fused multiply-add would skip one rounding where the instruction set has one.
#include "scatter_add.hpp"

#include <vector>

#include "check_ids.hpp"
#include "thread_pool.hpp"

namespace fedss {
namespace {

constexpr double kSerialWork = 1e4;  // additions below which threads cost more than they give

// Which of `threads` owns a row: a hash, so that regular patterns of ids (all even, say) spread evenly too.
int owner(int64_t class_id, int threads) {
  return int((uint64_t(class_id) * 0x9E3779B97F4A7C15u >> 32) % uint64_t(threads));
}

template <class T>
void scatter_add_rows(const Matrix& out, const std::vector<int64_t>& class_ids, const Matrix& rows, const Vector& scale,
                      int threads) {
  const int64_t M = rows.rows, D = rows.cols;
  if (double(M) * double(D) < kSerialWork) threads = 1;
  std::vector<std::vector<T>> scratch(threads, std::vector<T>(D));  // all of it before anything is written
  parallel_for(threads, threads, [&](int64_t part, int) {
    T* row = scratch[part].data();
    for (int64_t i = 0; i < M; ++i) {
      const int64_t c = class_ids[i];
      if (threads > 1 && owner(c, threads) != part) continue;
      rows.read_row(i, row);
      if (scale) {
        const T factor = T(scale[i]);
        for (int64_t d = 0; d < D; ++d) row[d] *= factor;
      }
      T* to = static_cast<T*>(const_cast<void*>(out.data)) + c * out.row_stride;
      for (int64_t d = 0; d < D; ++d) to[d * out.col_stride] += row[d];
    }
  });
}

}  // namespace

void scatter_add(const Matrix& out, const Vector& class_ids, const Matrix& rows, const Vector& scale, int threads) {
  const std::vector<int64_t> ids = checked_ids("class_ids", class_ids, out.rows);
  threads = threads < 1 ? 1 : threads;
  if (out.dtype == DType::float64) {
    scatter_add_rows<double>(out, ids, rows, scale, threads);
  } else {
    scatter_add_rows<float>(out, ids, rows, scale, threads);
  }
}

}  // namespace fedss
