// Compiled with -ffp-contract=off: a fused multiply-add would skip one rounding where the instruction set has one.
#include "scatter_add.hpp"

#include <algorithm>

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

// What one thread does: a part's rows, in the order of i, and of them the columns [begin, end).
template <class T, class Element>
void add_part(const Matrix& out, const Matrix& rows, const Vector& scale, const Partition& partition, int64_t part,
              int64_t begin, int64_t end) {
  const bool contiguous = out.col_stride == 1 && rows.col_stride == 1;
  const int64_t first = partition.first[part], last = partition.first[part + 1], n = end - begin;
  const int64_t ahead = rows_ahead<T>(n);
  for (int64_t j = first; j < last; ++j) {
    const int64_t i = partition.order[j], later = partition.order[std::min(j + ahead, last - 1)];
    const T factor = scale ? T(scale[i]) : T(1);
    T* const to = at_mutable<T>(out, partition.ids[i], begin);
    const Element* const from = at<Element>(rows, i, begin);
    if (contiguous) {
      add_row(to, from, factor, n, at<T>(out, partition.ids[later], begin), at<Element>(rows, later, begin));
    } else {
      for (int64_t d = 0; d < n; ++d) to[d * out.col_stride] += factor * T(from[d * rows.col_stride]);
    }
  }
}

template <class T>
void scatter_add_rows(const Matrix& out, const Vector& class_ids, const Matrix& rows, const Vector& scale,
                      int threads) {
  const int64_t D = rows.cols, blocks = (D + kColumns - 1) / kColumns;
  if (double(rows.rows) * double(D) < kSerialWork) threads = 1;
  const int64_t parts = threads == 1 ? 1 : threads * kPartsPerThread;
  const Partition partition =
      partition_ids("class_ids", class_ids, out.rows, out.row_stride * int64_t(sizeof(T)), parts, threads);
  with_row_type<T>(rows.dtype, [&](auto element) {
    parallel_for(parts * blocks, threads, [&](int64_t task, int) {
      const int64_t begin = task % blocks * kColumns;
      add_part<T, decltype(element)>(out, rows, scale, partition, task / blocks, begin, std::min(begin + kColumns, D));
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
