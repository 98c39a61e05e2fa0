// Compiled with -ffp-contract=off: a fused multiply-add would skip one rounding where the instruction set has one.
#include "scatter_add.hpp"

#include <algorithm>
#include <vector>

#include "partition_ids.hpp"
#include "row_access.hpp"
#include "thread_pool.hpp"

namespace fedss {
namespace {

constexpr double kSerialWork = 5e4;     // additions below which threads cost more than they give
constexpr int64_t kPartsPerThread = 4;  // so that a thread that is done early takes another part
constexpr int64_t kColumns = 1 << 14;   // of one task: few long rows are shared out too

// to[d] += factor * from[d]; asks for the memory of the rows that are added a little later.
template <class T, class Element>
void add_row(T* __restrict to, const Element* __restrict from, T factor, int64_t n, const T* later_to,
             const Element* later_from) {
  constexpr int64_t kRun = kRunBytes / sizeof(T);
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = std::min(begin + kRun, n);
    prefetch(later_to + begin, end - begin);
    prefetch(later_from + begin, end - begin);
    for (int64_t d = begin; d < end; ++d) to[d] += factor * T(from[d]);
  }
}

// The rows of `entries`, one after another, and of them the columns [begin, end).
template <class T, class Element>
void add_entries(const Matrix& out, const std::vector<Entry>& entries, const Matrix& rows, const Vector& scale,
                 int64_t begin, int64_t end) {
  const bool contiguous = out.col_stride == 1 && rows.col_stride == 1;
  const size_t ahead = rows_ahead<T>(end - begin);
  for (size_t e = 0; e < entries.size(); ++e) {
    const auto [i, c] = entries[e];
    const T factor = scale ? T(scale[i]) : T(1);
    T* const to = at_mutable<T>(out, c, begin);
    const Element* const from = at<Element>(rows, i, begin);
    if (contiguous) {
      const auto [later, later_c] = entries[std::min(e + ahead, entries.size() - 1)];
      add_row(to, from, factor, end - begin, at<T>(out, later_c, begin), at<Element>(rows, later, begin));
    } else {
      for (int64_t d = 0; d < end - begin; ++d) to[d * out.col_stride] += factor * T(from[d * rows.col_stride]);
    }
  }
}

template <class T>
void scatter_add_rows(const Matrix& out, const Vector& class_ids, const Matrix& rows, const Vector& scale,
                      int threads) {
  const int64_t D = rows.cols, blocks = (D + kColumns - 1) / kColumns;
  if (double(rows.rows) * double(D) < kSerialWork) threads = 1;
  const int64_t parts = threads == 1 ? 1 : threads * kPartsPerThread;
  const int64_t row_bytes = out.rows > 1 ? out.row_stride * int64_t(sizeof(T)) : 0;  // the stride of one row is any
  const Partition partition = partition_ids("class_ids", class_ids, out.rows, row_bytes, parts, threads);
  with_row_type<T>(rows.dtype, [&](auto element) {
    parallel_for(parts * blocks, threads, [&](int64_t task, int) {
      const int64_t part = task / blocks, begin = task % blocks * kColumns, end = std::min(begin + kColumns, D);
      for (const auto& chunk : partition) add_entries<T, decltype(element)>(out, chunk[part], rows, scale, begin, end);
    });
  });
}

}  // namespace

void scatter_add(const Matrix& out, const Vector& class_ids, const Matrix& rows, const Vector& scale, int threads) {
  threads = std::max(threads, 1);
  if (out.dtype == DType::float64) {
    scatter_add_rows<double>(out, class_ids, rows, scale, threads);
  } else {
    scatter_add_rows<float>(out, class_ids, rows, scale, threads);
  }
}

}  // namespace fedss
